"""Background calls on record: work at a provider that continues after its first answer.

    sending ──► running ──► ended ──► gone
       └── not taken by the provider ──► gone

A call is recorded before its request is sent. It is `running`, with the owner of its resource and
its budget reservation, before its answer reaches the client: from then on a worker polls it.

Invariants: a call has at most one valid claim, which fences a worker's writes; its record is
written with its end, in one transaction.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from tidegate.errors import ClaimLost
from tidegate.record import CallRecord
from tidegate.store.audit import WORTH_A_THREAD_BYTES, AuditLog, Mark, erased_among
from tidegate.store.budgets import Budgets
from tidegate.store.database import Connections, sql
from tidegate.store.provider.resources import NewResource, add_resources
from tidegate.store.queue import JobQueue
from tidegate.store.records import record_of
from tidegate.store.spill import facts_of, lineage_from, lineage_text, record_from

_TIMEOUT_MS = 5_000


@dataclass(frozen=True, slots=True)
class BackgroundCall:
    """A background call. kind, resource_id: of the resource that it makes. permit: its name in the
    limiter, in the upstream's pool. limits: with the amount that it takes of each. looks: the
    number of polls. cancelled_ms: since its cancellation at the provider, None before it. age_ms,
    left_ms: since its start, and until its longest time has passed. All by PostgreSQL's clock."""

    id: UUID
    state: str
    tenant_id: str
    dialect: str
    kind: str
    resource_id: str | None
    upstream: str
    pool: str
    limits: Mapping[str, int]
    permit: str
    hold_id: UUID | None
    record: CallRecord
    looks: int
    cancelled_ms: float | None
    age_ms: float
    left_ms: float
    claim: int


@dataclass(frozen=True, slots=True)
class CountedCall:
    """What a call counts in the limiter, as in BackgroundCall. left_ms: of its longest time."""

    upstream: str
    permit: str
    limits: Mapping[str, int]
    left_ms: int


class BackgroundCalls:
    """Background calls on record. Every method raises StoreUnavailable; those with a call as
    argument raise ClaimLost."""

    def __init__(
        self,
        connections: Connections,
        audit: AuditLog,
        queue: JobQueue,
        budgets: Budgets,
        instance_id: str,
        lease_ms: int,
    ) -> None:
        self._connections = connections
        self._audit = audit
        self._queue = queue
        self._budgets = budgets
        self._instance_id = instance_id
        self._lease_ms = lease_ms

    # For the process that makes the call

    async def begin(
        self, record: CallRecord, kind: str, limits: Mapping[str, int], permit: str, within_ms: int
    ) -> None:
        """Record a call that is about to be sent. within_ms: its longest time."""
        packed = await _aside(record.request, partial(zlib.compress, level=1))
        await self._connections.execute(
            "add_background_call",
            record.id,
            record.tenant_id,
            record.dialect,
            kind,
            record.upstream,
            record.pool,
            [name if amount == 1 else f"{name} {amount}" for name, amount in limits.items()],
            permit,
            orjson.dumps(facts_of(record)).decode(),
            packed,
            float(within_ms),
            lineage_text(record.lineage),
            timeout_ms=_TIMEOUT_MS,
        )

    async def start(
        self, record: CallRecord, made: Sequence[NewResource], check_after_ms: float
    ) -> None:
        """Start a call that the provider has accepted, with the resources it makes: workers have it
        from now on, with its budget reservation."""
        hold = self._budgets.held_by(record.id)

        async def work(connection: asyncpg.Connection) -> bool:
            row = await connection.fetchrow(
                sql("start_background_call"),
                record.id,
                made[0].resource_id,
                hold,
                orjson.dumps(facts_of(record)).decode(),
                check_after_ms,
            )
            if hold is not None:
                await connection.execute(sql("hand_over_budget_hold"), hold)
            of_call = Mark(record.tenant_id, record.subject, record.received_at)
            if not await erased_among(connection, [of_call]):
                await add_resources(connection, made)
            return row is not None

        await self._connections.run(work, timeout_ms=_TIMEOUT_MS)
        if hold is not None:
            self._budgets.detach_hold(hold)

    async def drop(self, request_id: UUID) -> None:
        """Delete a call that the provider has not accepted."""
        await self._connections.execute("drop_background_call", request_id)

    async def is_running(self, dialect: str, kind: str, resource_id: str) -> bool:
        """Whether the call that makes this resource has not ended."""
        row = await self._connections.row("background_call_of", dialect, kind, resource_id)
        return row is not None

    async def hasten(self, dialect: str, kind: str, resource_id: str) -> None:
        """Have a worker poll the call soon."""
        await self._connections.execute("hasten_background_call", dialect, kind, resource_id)

    # For workers

    async def take(
        self, in_hand: Collection[UUID], crowded: Collection[str]
    ) -> BackgroundCall | None:
        """Claim a due call, except those `in_hand` in this process or at a `crowded` upstream; also
        one of a dead worker."""
        row = await self._connections.row(
            "take_background_call",
            self._instance_id,
            list(in_hand),
            self._queue.may_judge,
            self._lease_ms,
            list(crowded),
        )
        if row is None:
            return None
        packed = row["request"]
        return _call(row, await _aside(packed, zlib.decompress) if packed else b"")

    async def put_off(
        self, call: BackgroundCall, after_ms: float, *, is_cancelled: bool = False
    ) -> None:
        """Release a call that continues, to be polled again by any worker."""
        done = await self._connections.execute(
            "put_off_background_call", call.id, call.claim, after_ms, is_cancelled
        )
        self._check(call, done)

    async def end(self, call: BackgroundCall, record: CallRecord, check_after_ms: float) -> None:
        """End a call: write its record, and settle its budgets."""
        if call.hold_id is not None:
            self._budgets.settle(call.hold_id, record.charge, call.id)
        prepared = await self._audit.prepare(record)

        async def work(connection: asyncpg.Connection) -> tuple[bool, bool]:
            is_erased = False
            row = await connection.fetchrow(
                sql("end_background_call"), call.id, call.claim, check_after_ms
            )
            if row is not None and not await connection.fetchval(sql("is_on_record"), call.id):
                is_erased = bool(await self._audit.add(connection, [prepared]))
            await self._budgets.settle_in(connection, [call.id])
            return row is not None, is_erased

        done, is_erased = await self._connections.run(work)
        self._check(call, done)
        if is_erased:
            await self._audit.forget_bodies([prepared])
        self._audit.noted([record])

    async def forget(self, call: BackgroundCall) -> None:
        """Delete an ended call."""
        self._check(
            call, await self._connections.execute("forget_background_call", call.id, call.claim)
        )

    async def leave(self) -> None:
        """Release this process's calls when it stops."""
        await self._connections.execute("free_background_calls", self._instance_id)

    async def under_way(self) -> dict[str, int]:
        """Return the number of running calls at each upstream."""
        found = await self._connections.rows("count_background_calls")
        return {row["upstream"]: row["calls"] for row in found}

    async def counted(self) -> list[CountedCall]:
        """Return what all running calls count in the limiters."""
        found = await self._connections.rows("counted_background_calls")
        return [record_of(CountedCall, row, limits=_limits(row)) for row in found]

    @staticmethod
    def _check(call: BackgroundCall, done: int) -> None:
        if not done:
            raise ClaimLost(f"another worker has the background call {call.id} now")


async def _aside(body: bytes, work: Callable[[bytes], bytes]) -> bytes:
    """Return the result of `work` on a body: of a large one in a thread."""
    large = len(body) > WORTH_A_THREAD_BYTES
    return await asyncio.to_thread(work, body) if large else work(body)


def _call(row: Mapping[str, Any], request: bytes) -> BackgroundCall:
    record = record_from(row["id"], orjson.loads(row["facts_text"]))
    record.request = request
    record.lineage = lineage_from(row["lineage_text"])
    return record_of(BackgroundCall, row, record=record, limits=_limits(row))


def _limits(row: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(amount or 1) for name, _, amount in (x.partition(" ") for x in row["limits"])}
