"""What waits for a person: dead jobs, and webhooks that were given up. Of all tenants.

Invariant: a list is bounded, and so is the look for it: both have an index of nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg

from tidegate.call import Kind
from tidegate.errors import NotFound
from tidegate.store.bell import Bell
from tidegate.store.connection import Connections
from tidegate.store.queries import sql
from tidegate.store.requeues import Requeues

MOST_COUNTED = 1_000
_TIMEOUT_MS = 3_000


@dataclass(frozen=True, slots=True)
class DeadJob:
    """A job whose workers died under it so often that it is not tried again."""

    request_id: UUID
    tenant: str
    pool: str
    type: Kind | None
    model: str | None
    attempts: int
    lapses: int
    submitted_at: datetime
    died_at: datetime
    problem: str | None


@dataclass(frozen=True, slots=True)
class GivenUpWebhook:
    """A webhook that no try has delivered. `answer_status` and `problem` are of the last try."""

    webhook_id: UUID
    request_id: UUID
    tenant: str
    event: str
    url: str
    tries: int
    answer_status: int | None
    problem: str | None
    given_up_at: datetime


class Stuck:
    """Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections, bell: Bell) -> None:
        self._connections = connections
        self._bell = bell
        self.requeues = Requeues(connections, bell)

    async def counts(self) -> tuple[int, int]:
        """Dead jobs and webhooks given up, as far as `MOST_COUNTED` of each."""

        async def read(connection: asyncpg.Connection) -> asyncpg.Record:
            return await connection.fetchrow(sql("count_stuck"), MOST_COUNTED)

        row = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        return row["jobs"], row["webhooks"]

    async def dead(self, most: int) -> list[DeadJob]:
        """The jobs that died last, the newest first."""
        return [
            DeadJob(
                request_id=_uuid(row["id"]),
                tenant=row["tenant_id"],
                pool=row["pool"],
                type=None if row["kind"] is None else Kind(row["kind"]),
                model=row["model"],
                attempts=row["attempts"],
                lapses=row["lapses"],
                submitted_at=row["created_at"],
                died_at=row["finished_at"],
                problem=row["problem"],
            )
            for row in await self._rows("list_dead", most)
        ]

    async def given_up(self, most: int) -> list[GivenUpWebhook]:
        """The webhooks that were given up last, the newest first."""
        return [
            GivenUpWebhook(
                webhook_id=_uuid(row["id"]),
                request_id=_uuid(row["request_id"]),
                tenant=row["tenant_id"],
                event=row["event"],
                url=row["url"],
                tries=row["tries"],
                answer_status=row["answer_status"],
                problem=row["problem"],
                given_up_at=row["ended_at"],
            )
            for row in await self._rows("list_given_up", most)
        ]

    async def discard(self, request_id: UUID) -> None:
        """End a dead job for good, as cancelled; raises NotFound when there is no such dead job."""

        async def discard(connection: asyncpg.Connection) -> UUID | None:
            found: UUID | None = await connection.fetchval(sql("discard_dead"), request_id)
            return found

        if await self._connections.run(discard) is None:
            raise NotFound(f"no dead job {request_id}")
        self._bell.changed([request_id])

    async def _rows(self, name: str, most: int) -> list[asyncpg.Record]:
        async def read(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            found: list[asyncpg.Record] = await connection.fetch(sql(name), most)
            return found

        return await self._connections.run(read, timeout_ms=_TIMEOUT_MS)

    async def requeue(self, request_id: UUID) -> None:
        """Give a dead job a fresh start; raises NotFound when there is no such dead job."""

        async def requeue(connection: asyncpg.Connection) -> str | None:
            pool: str | None = await connection.fetchval(sql("requeue_dead"), request_id)
            return pool

        pool = await self._connections.run(requeue)
        if pool is None:
            raise NotFound(f"no dead job {request_id}")
        self._bell.changed([request_id])
        self._bell.work([pool])


def _uuid(value: UUID) -> UUID:
    return UUID(int=value.int)  # asyncpg has a class of its own
