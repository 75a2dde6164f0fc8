"""How long whose rows are kept: the deployment's days, and those of tenants that have their own.

Invariant: no row is kept longer than its tenant's days, nor deleted before. Partitions of days that
nobody keeps are dropped whole; in the others rows are deleted in one walk, a few at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from uuid import UUID

import asyncpg

from tidegate.store.blobs import Blobs
from tidegate.store.connection import Connections
from tidegate.store.queries import sql

TIMEOUT_MS = 30_000
_WALKED_AT_ONCE = 20_000
_START = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Retention:
    """What ended before the day `cutoff` goes; of the tenants in `own` what ended before theirs."""

    cutoff: date
    own: Mapping[str, date]

    @property
    def longer(self) -> list[str]:
        """Tenants that keep what others don't."""
        return [tenant for tenant, day in self.own.items() if day < self.cutoff]

    def keepers(self, day: date) -> list[str]:
        """Tenants that keep rows of a day that has passed for the others."""
        return [tenant for tenant, first in self.own.items() if first <= day]

    def due(self, day: date) -> list[str]:
        """Tenants for which a day has passed that others keep."""
        return [tenant for tenant, first in self.own.items() if first > day]

    @property
    def last_due(self) -> date:
        """Before this day somebody's rows may have to go."""
        return max((self.cutoff, *self.own.values()))


async def retention_of(connections: Connections, days: int, today: date) -> Retention:
    """Raises StoreUnavailable."""

    async def read(connection: asyncpg.Connection) -> list[asyncpg.Record]:
        found: list[asyncpg.Record] = await connection.fetch(sql("own_retention"), days)
        return found

    rows = await connections.run(read, timeout_ms=TIMEOUT_MS)
    # Days beyond the calendar's beginning are as good as for ever.
    most = (today - date.min).days
    own = {row["id"]: today - timedelta(days=min(row["retention_days"], most)) for row in rows}
    return Retention(today - timedelta(days=min(days, most)), own)


async def delete_rows(
    connections: Connections, blobs: Blobs, name: str, tenants: Sequence[str], *, theirs: bool
) -> tuple[int, int]:
    """Delete the rows of these tenants from one partition, or of all but these; blobs of bodies
    first. Returns how many rows and blobs."""
    last: UUID | None = _START
    rows = keys = 0
    while last is not None:

        async def walk(connection: asyncpg.Connection, after: UUID = last) -> asyncpg.Record:
            return await connection.fetchrow(
                "SELECT (array_agg(id ORDER BY id DESC))[1] AS last, array_agg(id)"
                " FILTER (WHERE (tenant_id = ANY($2::text[])) = $3) AS found"
                f" FROM (SELECT id, tenant_id FROM {name} WHERE id > $1 ORDER BY id LIMIT $4) AS n",
                *(after, list(tenants), theirs, _WALKED_AT_ONCE),
            )

        row = await connections.run(walk, timeout_ms=TIMEOUT_MS)
        last = row["last"]
        if row["found"]:
            keys += await _delete_blobs(connections, blobs, name, row["found"])
            rows += await _delete(connections, name, row["found"])
    return rows, keys


async def _delete_blobs(
    connections: Connections, blobs: Blobs, name: str, ids: Sequence[UUID]
) -> int:
    if not name.startswith("bodies_"):
        return 0

    async def read(connection: asyncpg.Connection) -> list[str]:
        found = await connection.fetch(
            f"SELECT blob_key FROM {name} WHERE id = ANY($1::uuid[]) AND blob_key IS NOT NULL", ids
        )
        return [row["blob_key"] for row in found]

    keys = await connections.run(read, timeout_ms=TIMEOUT_MS)
    await blobs.delete(keys)
    return len(keys)


async def _delete(connections: Connections, name: str, ids: Sequence[UUID]) -> int:
    async def delete(connection: asyncpg.Connection) -> int:
        done = await connection.execute(f"DELETE FROM {name} WHERE id = ANY($1::uuid[])", ids)
        return int(done.split()[1])

    return await connections.run(delete, timeout_ms=TIMEOUT_MS)
