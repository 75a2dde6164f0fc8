"""The rows of a tenant and a pool that were made for a trial, and their removal.

Invariant: only what is named is touched: requests by their ids, the rest by the tenant's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import asyncpg

from tidegate.store.connection import Connections
from tidegate.store.queries import sql

_TIMEOUT_MS = 10_000


class Trial:
    """Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def recorded(self, request_ids: Sequence[UUID]) -> dict[UUID, int]:
        """How many records of its end each request has; those without one are left out."""

        async def read(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            rows: list[asyncpg.Record] = await connection.fetch(sql("recorded_of"), request_ids)
            return rows

        rows = await self._connections.run(read)
        return {UUID(int=row["request_id"].int): row["records"] for row in rows}

    async def cut_short(self, request_ids: Sequence[UUID]) -> dict[UUID, dict[str, int]]:
        """How many attempts at each request were cut short before their result was on record, by
        the process that made them; requests without one are left out."""

        async def read(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            rows: list[asyncpg.Record] = await connection.fetch(sql("cut_short"), request_ids)
            return rows

        found: dict[UUID, dict[str, int]] = {}
        for row in await self._connections.run(read):
            by = found.setdefault(UUID(int=row["request_id"].int), {})
            by[row["instance_id"]] = row["attempts"]
        return found

    async def remove(
        self, tenant_id: str, request_ids: Sequence[UUID], workers: Sequence[str]
    ) -> None:
        """Everything: requests with attempts, records and bodies; sums; workers."""

        async def delete(connection: asyncpg.Connection) -> None:
            rows = await connection.fetch(sql("audit_of"), request_ids)
            audit = [row["id"] for row in rows]
            await connection.execute(sql("erase_requests"), request_ids)
            await connection.execute(sql("erase_attempts"), request_ids)
            await connection.execute(sql("erase_bodies"), audit)
            await connection.execute(sql("erase_audit"), audit)
            await connection.execute(sql("drop_usage_of"), tenant_id)
            await connection.execute(sql("drop_queued_of"), tenant_id)
            await connection.execute(sql("drop_workers"), workers)

        await self._connections.run(delete, timeout_ms=_TIMEOUT_MS)
