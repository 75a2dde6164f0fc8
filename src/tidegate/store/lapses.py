"""Finding the jobs of workers that are not heard of any more.

Invariant: a worker that falls silent is looked at when that is first seen, and all that are silent
are looked at again and again, but for no more than a fiftieth of the time: what a worker ever held
stays in an index for as long as any transaction may see it.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import asyncpg

from tidegate.store.lookback import AT_ONCE, Look, Lookback
from tidegate.store.queries import sql


class Lapses:
    """One in each process. `begin`, `lock` in the transaction, and `end` after its commit."""

    def __init__(self, lease_ms: int) -> None:
        self._lease_ms = lease_ms
        self._lookback = Lookback()
        self._seen: dict[str, datetime] = {}  # silent ones, with when they were last heard
        self._silent: dict[str, datetime] = {}

    def begin(self) -> Look:
        return self._lookback.begin()

    async def lock(self, connection: asyncpg.Connection, look: Look) -> list[UUID]:
        """Lock up to 500 jobs that have lapsed; returns their ids."""
        found = await connection.fetch(sql("silent_workers"), self._lease_ms)
        self._silent = {row["instance_id"]: row["seen_at"] for row in found}
        names = [
            name
            for name, seen_at in self._silent.items()
            if look.is_whole or self._seen.get(name) != seen_at
        ]
        if look.is_whole:
            unknown = await connection.fetch(sql("unknown_holders"), self._lease_ms)
            names += [row["claimed_by"] for row in unknown]
        if not names:
            return []
        return [
            row["id"] for row in await connection.fetch(sql("lock_lapsed"), names, self._lease_ms)
        ]

    def end(self, look: Look, retaken: int) -> None:
        if retaken < AT_ONCE:
            self._seen = self._silent
        self._lookback.end(look, complete=retaken < AT_ONCE)
