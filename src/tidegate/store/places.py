"""Which place a job has in its queue, where that can be told quickly.

Counting those before it walks past all that have left the queue and cannot be cleared away yet: see
`lookback`. It is a courtesy, so it takes little time and is left out while it would take more.
"""

from __future__ import annotations

import time

import asyncpg

from tidegate.store.queries import sql
from tidegate.store.states import Status

_MOST_MS = 250
_SLOW_S = 0.2
_SHARE = 20


class Places:
    """One in each process."""

    def __init__(self) -> None:
        self._not_before = 0.0

    async def of(self, connection: asyncpg.Connection, row: asyncpg.Record) -> int | None:
        """1 is next. The last thing in its transaction: that is broken when it took too long."""
        if row["status"] != Status.QUEUED or time.monotonic() < self._not_before:
            return None
        await connection.execute(f"SET LOCAL statement_timeout = {_MOST_MS}")
        began = time.monotonic()
        try:
            place: int | None = await connection.fetchval(sql("get_place"), row["id"])
        except asyncpg.QueryCanceledError:
            place = None
        took_s = time.monotonic() - began
        if took_s > _SLOW_S:
            self._not_before = time.monotonic() + _SHARE * took_s
        return place
