"""Failed jobs that an operator queues again in bulk, under their own ids.

Invariant: only jobs that have failed or are dead are touched, at most as many as was said. A job
that is queued again is as it was when it was new: all its attempts, and as long until its deadline
as it had. What is on record of the earlier end stays; the new end is recorded beside it, and its
webhook is sent as for any end. So a repeat of the same order finds nothing more to do.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

import asyncpg

from tidegate.store.bell import Bell
from tidegate.store.connection import Connections
from tidegate.store.queries import sql
from tidegate.store.states import Status

MOST_REQUEUED = 10_000
REQUEUED_FROM = (Status.FAILED, Status.DEAD)
_STEP = 500
_WITHIN_S = 20.0
_TIMEOUT_MS = 5_000


@dataclass(frozen=True, slots=True)
class Requeue:
    """Which jobs: those that ended in [since, until), of one tenant and error code where given."""

    since: datetime
    until: datetime
    statuses: tuple[Status, ...] = (Status.FAILED,)
    tenant_id: str | None = None
    error_code: str | None = None
    limit: int = 1_000

    def __post_init__(self) -> None:
        assert set(self.statuses) <= set(REQUEUED_FROM)
        assert 1 <= self.limit <= MOST_REQUEUED


@dataclass(frozen=True, slots=True)
class RequeueReport:
    """`matching`: jobs that an order means, by error code, those beyond its limit left out.
    `requeued`: how many of them are queued again. `has_more`: the same order would find more."""

    matching: int
    requeued: int = 0
    has_more: bool = False
    by_code: Mapping[str, int] = field(default_factory=dict)


class Requeues:
    """Raises StoreUnavailable, after which a part may be queued again: repeat the order."""

    def __init__(self, connections: Connections, bell: Bell) -> None:
        self._connections = connections
        self._bell = bell

    async def preview(self, order: Requeue) -> RequeueReport:
        """What `run` would do."""

        async def read(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            found: list[asyncpg.Record] = await connection.fetch(
                sql("count_requeues"), *_filters(order), order.limit + 1
            )
            return found

        rows = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        by_code = Counter({row["code"]: row["jobs"] for row in rows})
        matching = by_code.total()
        return RequeueReport(
            matching=min(matching, order.limit),
            has_more=matching > order.limit,
            by_code=dict(by_code),
        )

    async def run(self, order: Requeue) -> RequeueReport:
        """Queue the jobs again, step by step, for at most about 20 s."""
        before = await self.preview(order)
        loop = asyncio.get_running_loop()
        until = loop.time() + _WITHIN_S
        requeued = 0
        while requeued < order.limit and loop.time() < until:
            step = min(_STEP, order.limit - requeued)
            rows = await self._step(order, step)
            requeued += len(rows)
            self._bell.changed(UUID(int=row["id"].int) for row in rows)
            self._bell.work({row["pool"] for row in rows})
            if len(rows) < step:
                break
        left = before.matching - requeued
        return RequeueReport(before.matching, requeued, before.has_more or left > 0, before.by_code)

    async def _step(self, order: Requeue, most: int) -> list[asyncpg.Record]:
        async def requeue(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            rows: list[asyncpg.Record] = await connection.fetch(
                sql("requeue_ended"), *_filters(order), most
            )
            return rows

        # A repeat would take other jobs, beyond the limit.
        return await self._connections.run(requeue, timeout_ms=_TIMEOUT_MS, repeatable=False)


def _filters(order: Requeue) -> tuple[list[str], datetime, datetime, str | None, str | None]:
    statuses = [status.value for status in order.statuses]
    return statuses, order.since, order.until, order.tenant_id, order.error_code
