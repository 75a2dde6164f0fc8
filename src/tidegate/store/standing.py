"""How long the queues are and what waits beside them, for those who watch over all.

Invariant: it costs the database no more than a fiftieth of the time of one connection: each read is
bounded, and the longer it takes, the longer the next one is put off.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime

import asyncpg

from tidegate.store.connection import Connections
from tidegate.store.queries import sql

MOST_COUNTED = 10_000
MOST_QUEUES = 200
_FRESH_S = 1.0
_SHARE = 50
_TIMEOUT_MS = 1_000


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Jobs that are ready in one queue: at most `MOST_COUNTED` are counted."""

    pool: str
    lane: str
    tenant: str
    jobs: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class Depths:
    """All figures are of the same moment. webhooks_oldest_s: for how long one has been due."""

    queues: tuple[QueueDepth, ...]
    retrying: int
    claimed: int
    running: int
    dead: int
    webhooks: int
    webhooks_oldest_s: float
    workers: int


class Standing:
    """One per process."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._read: Depths | None = None
        self._next_at = float("-inf")

    async def depths(self) -> Depths:
        """As they stood a moment ago. Raises StoreUnavailable."""
        if self._read is not None and time.monotonic() < self._next_at and not self._away:
            return self._read
        began = time.monotonic()
        self._read = await self._connections.run(_read, timeout_ms=_TIMEOUT_MS)
        ended = time.monotonic()
        self._next_at = ended + max(_FRESH_S, _SHARE * (ended - began))
        return self._read

    @property
    def _away(self) -> bool:
        return self._connections.away


async def _read(connection: asyncpg.Connection) -> Depths:
    queues = await connection.fetch(sql("standing_queues"), MOST_QUEUES, MOST_COUNTED)
    row = await connection.fetchrow(sql("standing_jobs"), MOST_COUNTED)
    assert row is not None
    now = datetime.now(UTC)
    return Depths(
        queues=tuple(
            QueueDepth(
                *(one["pool"], one["lane"], one["tenant_id"], one["jobs"]),
                0.0 if one["oldest"] is None else max(0.0, (now - one["oldest"]).total_seconds()),
            )
            for one in queues
        ),
        retrying=row["retrying"],
        claimed=row["claimed"],
        running=row["running"],
        dead=row["dead"],
        webhooks=row["webhooks"],
        webhooks_oldest_s=float(row["webhooks_oldest_s"] or 0),
        workers=row["workers"],
    )
