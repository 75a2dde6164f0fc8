"""The calls of the last hours as the record has them: what a load was like."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import asyncpg

from tidegate.store.connection import Connections
from tidegate.store.queries import sql

_TIMEOUT_MS = 30_000
MOST_CALLS = 200_000


@dataclass(frozen=True, slots=True)
class PastCall:
    """One call that was let in. `kind` and `model` are None where the record does not have them."""

    submitted_at: datetime
    tenant_id: str
    kind: str | None
    model: str | None
    priority: int
    upstream_ms: float
    input_tokens: int
    output_tokens: int
    images: int


async def past_calls(connections: Connections, pool: str, last_s: float) -> list[PastCall]:
    """What was handed in during the last seconds, in order of time; the newest `MOST_CALLS` where
    there was more. Raises StoreUnavailable."""

    async def read(connection: asyncpg.Connection) -> list[asyncpg.Record]:
        rows: list[asyncpg.Record] = await connection.fetch(
            sql("past_calls"), pool, last_s, MOST_CALLS
        )
        return rows

    rows = await connections.run(read, timeout_ms=_TIMEOUT_MS)
    return [PastCall(**row) for row in reversed(rows)]
