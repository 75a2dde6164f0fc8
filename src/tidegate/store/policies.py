"""Policies on record: which policy of a pool was in force since when.

Invariant: revisions of a pool are written by one transaction at a time, each decided on what is on
record just then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import asyncpg
import orjson

from tidegate.store.database import Connections, sql
from tidegate.store.records import PolicyRecord, clean, record_of

MOST_SHOWN = 1_000
_TIMEOUT_MS = 2_000
_LIVE_KEPT = 1_000

Decide = Callable[[PolicyRecord | None, bool], Sequence[PolicyRecord]]


class Policies:
    """The table of policies. Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def newest(self, pool: str) -> PolicyRecord | None:
        """The revision in force as far as is on record."""
        found = await self.history(pool, 1)
        return found[0] if found else None

    async def history(self, pool: str, most: int) -> list[PolicyRecord]:
        """The newest `most` revisions (1,000 at the utmost), the one in force first."""
        rows = await self._connections.rows(
            "get_policies", pool, min(most, MOST_SHOWN), timeout_ms=_TIMEOUT_MS
        )
        return [_policy(row) for row in rows]

    async def decide(self, pool: str, digest: str, decide: Decide) -> None:
        """Put on record what `decide` returns, while no other process can do so.

        `decide` gets the newest revision and whether a policy of `digest` was a deployment's at
        any time; it may be called again, when the reply of a commit was lost, and must be pure.
        """

        async def work(connection: asyncpg.Connection) -> None:
            await connection.execute(sql("lock_policies"), pool)
            newest = await connection.fetchrow(sql("get_policies"), pool, 1)
            seen = await connection.fetch(sql("deployed_before"), pool, [digest])
            for record in decide(None if newest is None else _policy(newest), bool(seen)):
                await connection.execute(
                    sql("add_policy"),
                    pool,
                    record.revision,
                    record.origin,
                    record.digest,
                    orjson.dumps(record.policy).decode(),
                    clean(record.set_by),
                    clean(record.reason),
                )
                oldest = record.revision - _LIVE_KEPT
                await connection.execute(sql("prune_policies"), pool, oldest)

        await self._connections.run(work, timeout_ms=_TIMEOUT_MS)


def _policy(row: asyncpg.Record) -> PolicyRecord:
    return record_of(PolicyRecord, row, policy=orjson.loads(row["policy"]))
