"""What can be told of a database without changing it: for whoever looks for what is wrong.

Invariant: nothing is written, and nothing waits longer than a few seconds.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import asyncpg

from tidegate.errors import StoreUnavailable
from tidegate.store.migrate import HEAD, revision_of
from tidegate.store.queries import sql

OLD_S = 300.0
_CONNECT_S = 5.0
_ANSWER_S = 5.0
_TRIPS = 11
_REVISIONS = "alembic_version"


@dataclass(frozen=True, slots=True)
class OldTransaction:
    pid: int
    who: str
    program: str
    state: str
    age_s: float


@dataclass(frozen=True, slots=True)
class DatabaseReport:
    """facts: the columns of `look_at_server`. revision: of the schema, None where there is none or
    it may not be read; `needed` is the code's. pooled: a pooler stands in between; `shares`: it
    gives one server's connection to several clients in turn, as in transaction mode."""

    facts: dict[str, Any]
    revision: str | None
    needed: str
    round_trip_ms: float
    clock_ahead_ms: float
    pooled: bool
    shares: bool
    old: tuple[OldTransaction, ...]
    sizes: dict[str, int]
    foreign: tuple[str, ...]
    unusable: tuple[str, ...]


async def examine(url: str, old_s: float = OLD_S) -> DatabaseReport:
    """Look at the database; transactions count as old after `old_s` seconds.

    Raises StoreUnavailable, which says why, where it can't be used at all.
    """
    try:
        connection = await _connect(url)
        try:
            return await _report(connection, url, old_s)
        finally:
            connection.terminate()
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as no:
        why = str(no) or "no answer in time"
        raise StoreUnavailable(f"PostgreSQL can't be used: {why}") from no


async def _connect(url: str) -> asyncpg.Connection:
    return await asyncpg.connect(
        url,
        timeout=_CONNECT_S,
        command_timeout=_ANSWER_S,
        statement_cache_size=0,
        server_settings={"application_name": "tidegate doctor"},
    )


async def _report(connection: asyncpg.Connection, url: str, old_s: float) -> DatabaseReport:
    async with connection.transaction(readonly=True):
        began_at = time.time()
        facts = dict(await connection.fetchrow(sql("look_at_server")))
        middle = (began_at + time.time()) / 2
        trips = []
        for _ in range(_TRIPS):
            began = time.perf_counter()
            await connection.execute("SELECT 1")
            trips.append((time.perf_counter() - began) * 1000)
        old = await connection.fetch(sql("look_at_transactions"), old_s)
        tables = await connection.fetch(sql("look_at_tables"))
        unusable = tuple(row["name"] for row in tables if not row["may_use"])
        revision = None if _REVISIONS in unusable else await revision_of(connection)
    # A pooler hands out process numbers of its own.
    pooled = connection.get_server_pid() != facts["backend"]
    return DatabaseReport(
        facts=facts,
        revision=revision,
        needed=HEAD,
        round_trip_ms=statistics.median(trips),
        clock_ahead_ms=(facts["clock_s"] - middle) * 1000,
        pooled=pooled,
        shares=pooled and await _shares(connection, url),
        old=tuple(
            OldTransaction(row["pid"], row["who"], row["program"], row["state"] or "", row["age_s"])
            for row in old
        ),
        sizes={row["name"]: row["size_bytes"] for row in tables},
        foreign=tuple(row["name"] for row in tables if not row["is_ours"]),
        unusable=unusable,
    )


async def _shares(connection: asyncpg.Connection, url: str) -> bool:
    """Whether a second client gets the server's connection that ours has just used: a pooler in
    transaction mode takes the one that was used last, one in session mode keeps it for us."""
    other = await _connect(url)
    try:
        first = await _backend(connection)
        return first == await _backend(other)
    finally:
        other.terminate()


async def _backend(connection: asyncpg.Connection) -> int:
    async with connection.transaction(readonly=True):
        found: int = await connection.fetchval("SELECT pg_backend_pid()")
        return found
