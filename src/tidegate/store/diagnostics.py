"""Diagnostics of a database: check-up, and the rows of a trial.

Invariants: a check-up writes nothing and is bounded in time; a trial's removal touches only its own
rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from tidegate.errors import ConfigError, StoreUnavailable
from tidegate.store.database import HEAD, Connections, check_files, revision_of, sql
from tidegate.store.records import record_of, uuid_of

OLD_S = 300.0
_CONNECT_S = 5.0
_ANSWER_S = 5.0
_TRIPS = 11
_REVISIONS = "alembic_version"


@dataclass(frozen=True, slots=True)
class OldTransaction:
    """A transaction of another session that has been open for long."""

    pid: int
    who: str
    program: str
    state: str
    age_s: float


@dataclass(frozen=True, slots=True)
class DatabaseReport:
    """Result of a check-up. facts: the columns of `look_at_server`. revision: of the schema, None
    if there is none or it may not be read; `needed`: the code's revision. pooled: there is a
    connection pooler; `shares`: it serves several clients by one server connection, as in
    transaction mode."""

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
    """Examine the database; transactions count as old after `old_s` seconds.

    Raises StoreUnavailable with the reason if the database cannot be used at all, ConfigError for a
    file in its URL that cannot be read.
    """
    try:
        connection = await _connect(url)
        try:
            return await _report(connection, url, old_s)
        finally:
            connection.terminate()
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as no:
        check_files(url, no)
        why = str(no) or "no answer in time"
        raise StoreUnavailable("PostgreSQL can't be used", reason=why) from no


def lacks_room(failed: BaseException) -> bool:
    """Whether an examination failed because PostgreSQL has no room for another connection."""
    return isinstance(failed.__cause__, asyncpg.TooManyConnectionsError)


async def check_url(url: str) -> None:
    """Raises ConfigError for a URL that no server can accept, such as one with an unknown sslmode.
    Does not try whether a server answers: asyncpg parses the whole URL before it connects."""
    try:
        connection = await asyncpg.connect(url, timeout=0)
    except asyncpg.ClientConfigurationError as error:
        raise ConfigError("DATABASE_URL", None, f"can't be used: {error.args[0]}") from None
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as failed:
        check_files(url, failed)
        return
    connection.terminate()


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
    # A pooler reports process numbers of its own.
    pooled = connection.get_server_pid() != facts["backend"]
    return DatabaseReport(
        facts=facts,
        revision=revision,
        needed=HEAD,
        round_trip_ms=statistics.median(trips),
        clock_ahead_ms=(facts["clock_s"] - middle) * 1000,
        pooled=pooled,
        shares=pooled and await _shares(connection, url),
        old=tuple(record_of(OldTransaction, row, state=row["state"] or "") for row in old),
        sizes={row["name"]: row["size_bytes"] for row in tables},
        foreign=tuple(row["name"] for row in tables if not row["is_ours"]),
        unusable=unusable,
    )


async def _shares(connection: asyncpg.Connection, url: str) -> bool:
    """Whether a second client gets the server connection that this one has just used: a pooler in
    transaction mode uses the last one again, one in session mode keeps it for its client."""
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


_TIMEOUT_MS = 10_000


class Trial:
    """Records and removal of a verification's requests. Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def recorded(self, request_ids: Sequence[UUID]) -> dict[UUID, int]:
        """Return how many records of its end each request has, without those that have none."""
        rows = await self._connections.rows("recorded_of", request_ids)
        return {uuid_of(row["request_id"]): row["records"] for row in rows}

    async def cut_short(self, request_ids: Sequence[UUID]) -> dict[UUID, dict[str, int]]:
        """Return, for each request, the attempts whose result was never recorded, by the process
        that made them; requests without one are left out."""

        found: dict[UUID, dict[str, int]] = {}
        for row in await self._connections.rows("cut_short", request_ids):
            by = found.setdefault(uuid_of(row["request_id"]), {})
            by[row["instance_id"]] = row["attempts"]
        return found

    async def remove(
        self, tenant_id: str, request_ids: Sequence[UUID], workers: Sequence[str]
    ) -> None:
        """Delete the requests with attempts, records and bodies, their totals, and the workers."""

        async def delete(connection: asyncpg.Connection) -> None:
            rows = await connection.fetch(sql("audit_of"), request_ids)
            audit = [row["id"] for row in rows]
            await connection.execute(sql("erase_requests"), request_ids)
            await connection.execute(sql("erase_attempts"), request_ids)
            await connection.execute(sql("erase_bodies"), audit)
            await connection.execute(sql("erase_audit"), audit)
            await connection.execute(sql("drop_usage_of"), tenant_id)
            await connection.execute(sql("forget_queued"), tenant_id)
            await connection.execute(sql("drop_workers"), workers)

        await self._connections.run(delete, timeout_ms=_TIMEOUT_MS)
