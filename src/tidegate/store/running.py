"""Where requests stand between the queue and the provider, for an operator: read only."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg
import orjson

from tidegate.errors import NotFound
from tidegate.store.connection import Connections
from tidegate.store.places import Places
from tidegate.store.queries import sql
from tidegate.store.states import Status

_TIMEOUT_MS = 2_000


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """A request. `claimed_by` is the process that has it, None while none has."""

    request_id: UUID
    tenant_id: str
    pool: str
    status: Status
    kind: str | None
    model: str | None
    claimed_by: str | None
    attempts: int
    created_at: datetime
    not_before: datetime | None
    admitted_at: datetime | None
    finished_at: datetime | None
    failure_code: str | None


@dataclass(frozen=True, slots=True)
class RunningCall:
    """A job that holds a permit since `admitted_at`."""

    request_id: UUID
    admitted_at: datetime | None


class Running:
    """Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._places = Places()

    async def whereabouts(self, request_id: UUID) -> Whereabouts:
        """Raises NotFound: streams, too, are on record only once they have ended."""

        async def read(connection: asyncpg.Connection) -> asyncpg.Record | None:
            return await connection.fetchrow(sql("get_whereabouts"), request_id)

        row = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        if row is None:
            raise NotFound(f"no request {request_id} is on record")
        failure = None if row["failure"] is None else orjson.loads(row["failure"])
        return Whereabouts(
            request_id=UUID(int=row["id"].int),
            tenant_id=row["tenant_id"],
            pool=row["pool"],
            status=Status(row["status"]),
            kind=row["kind"],
            model=row["model"],
            claimed_by=row["claimed_by"],
            attempts=row["attempts"],
            created_at=row["created_at"],
            not_before=row["not_before"],
            admitted_at=row["admitted_at"],
            finished_at=row["finished_at"],
            failure_code=None if failure is None else failure.get("code"),
        )

    async def place(self, request_id: UUID) -> int | None:
        """The place of a queued job, 1 is next; None where that takes too long to tell."""

        async def read(connection: asyncpg.Connection) -> int | None:
            row = await connection.fetchrow(sql("get_whereabouts"), request_id)
            return None if row is None else await self._places.of(connection, row)

        return await self._connections.run(read, timeout_ms=_TIMEOUT_MS)

    async def calls(self, pool: str) -> dict[tuple[str, int], RunningCall]:
        """The jobs that hold permits, by process and the sequence of the permit's fence."""

        async def read(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            rows: list[asyncpg.Record] = await connection.fetch(sql("running_calls"), pool)
            return rows

        rows = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        return {
            (row["instance_id"], row["fence_sequence"]): RunningCall(
                UUID(int=row["id"].int), row["admitted_at"]
            )
            for row in rows
        }
