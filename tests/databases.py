"""A migrated database per test: copied from a template, and given to the next test when it is again
as it was made.

Invariant: a test finds what the migrations made, and nothing else. A database whose schema,
settings or statistics a test has changed is dropped; rows that the migrations made are made again.

A test takes its database before all else (`taken_first` in `tests/order.py`): given back while a
store was still open, it would have what the store repeats of work that this cuts off.

A connection to each database is kept: looking through a database costs a new one 13 ms of a core,
and one that has planned that before 2 ms.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from io import BytesIO
from typing import Any, TypeVar
from uuid import uuid4

import asyncpg
import pytest

from tests.clusters import TEMPLATE
from tidegate.embedded.servers import PostgresServer

# Of the function beneath `pg_stat_activity`: the view also joins the names of databases and users.
_TERMINATE = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_get_activity(NULL)
WHERE datid = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND pid <> pg_backend_pid()
"""
# All that a test could change but for rows. A copy has the numbers (oid) of its template, and rows
# of catalogs that were written (xmin) before the transaction `$1`; those of `pg_class` are compared
# themselves, since emptying a table writes to them.
_SHAPE = """
SELECT concat_ws(';',
    (SELECT md5(string_agg(concat_ws(' ', oid, relname, relkind, relnatts, reloptions), ','
                           ORDER BY oid))
     FROM pg_class WHERE relnamespace = 'public'::regnamespace),
    (SELECT concat(count(*), ' ', count(*) FILTER (WHERE age(xmin) < age($1::text::xid)))
     FROM pg_attribute WHERE attrelid >= 16384),
    (SELECT concat(count(*), ' ', count(*) FILTER (WHERE age(xmin) < age($1::text::xid)))
     FROM pg_constraint WHERE connamespace = 'public'::regnamespace),
    (SELECT concat(count(*), ' ', count(*) FILTER (WHERE age(xmin) < age($1::text::xid)))
     FROM pg_trigger WHERE NOT tgisinternal),
    (SELECT concat(count(*), ' ', count(*) FILTER (WHERE age(xmin) < age($1::text::xid)))
     FROM pg_proc WHERE pronamespace = 'public'::regnamespace),
    (SELECT count(*) FROM pg_statistic WHERE starelid >= 16384),
    (SELECT count(*) FROM pg_db_role_setting JOIN pg_database ON pg_database.oid = setdatabase
     WHERE datname = current_database()),
    (SELECT count(*) FROM pg_extension), (SELECT count(*) FROM pg_largeobject_metadata))
"""
# Partitions by themselves, and not the tables that they are of: emptying a table empties all of
# its partitions, with their indexes, at ten times the cost.
_WRITTEN = """
SELECT oid::regclass::text FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND pg_relation_size(oid) > 0
"""

KEPT = "tests"  # the name of the connections that are kept
T = TypeVar("T")

_CONTENT = "SELECT coalesce(string_agg(t::text, ';' ORDER BY t::text), '') FROM {table} AS t"


class Databases:
    """Those of one server: `take` one, and `give_back` its name; `close` at the end. The loop of
    a test that is asynchronous must not be running."""

    def __init__(self, server: PostgresServer) -> None:
        """Notes how the template looks."""
        self.server = server
        self._loop = asyncio.new_event_loop()
        self._kept: dict[str, asyncpg.Connection] = {}
        self._spare: list[str] = []
        self._shape = self._since = self._look = self._seeded = ""
        self._seeds: dict[str, str] = {}
        self._copies: dict[str, bytes] = {}
        self._run(self._prepare())

    def take(self) -> str:
        if self._spare:
            return self._spare.pop()
        name = f"t_{uuid4().hex}"
        # Through the log, as it is by default, costs three times as much.
        self._run(self._command(f'CREATE DATABASE "{name}" TEMPLATE {TEMPLATE} STRATEGY FILE_COPY'))
        return name

    def give_back(self, name: str) -> None:
        if self._run(self._is_as_new(name)):
            self._spare.append(name)
        else:
            self._run(self._drop(name))

    def close(self) -> None:
        for connection in self._kept.values():
            connection.terminate()
        self._run(asyncio.sleep(0))  # in which the loop closes their sockets
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)

    async def _prepare(self) -> None:
        connection = await asyncpg.connect(self.server.url(TEMPLATE))
        try:
            self._since = str(await connection.fetchval("SELECT pg_current_xact_id()::xid"))
            self._shape = await connection.fetchval(_SHAPE, self._since)
            for table in await _written(connection):
                self._seeds[table] = await _content(connection, table)
                copy = BytesIO()
                await connection.copy_from_table(table, output=copy, format="binary")
                self._copies[table] = copy.getvalue()
            # In one statement: each that a new connection plans costs milliseconds.
            contents = ", ".join(f"({_CONTENT.format(table=table)})" for table in self._seeds)
            self._seeded = f"SELECT ARRAY[{contents}]::text[]"
            self._look = f"SELECT ({_SHAPE}), ARRAY({_WRITTEN}), ARRAY[{contents}]::text[]"
        finally:
            await connection.close()

    async def _command(self, statement: str) -> None:
        connection = await asyncpg.connect(self.server.url("postgres"))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def _is_as_new(self, name: str) -> bool:
        """Empty its tables; whether it is then what it was."""
        connection = await self._alone_in(name)
        if connection is None:
            return False
        shape, written, contents = await connection.fetchrow(self._look, self._since)
        if shape != self._shape:
            return False
        emptied = {*written} - self._seeds.keys()
        changed = contents != [*self._seeds.values()]
        if not (emptied or changed):
            return True
        if changed:
            emptied |= self._seeds.keys()
        await connection.execute(f"TRUNCATE {', '.join(emptied)} CASCADE")
        if changed:
            await connection.execute("SET session_replication_role = replica")  # no triggers
            for table, copy in self._copies.items():
                await connection.copy_to_table(table, source=BytesIO(copy), format="binary")
            await connection.execute("RESET session_replication_role")
        return await self._has_seeds(connection)

    async def _alone_in(self, name: str) -> asyncpg.Connection | None:
        """The connection to a database, once all others are ended; None where there is none."""
        kept = self._kept.pop(name, None)
        if kept is not None:
            try:
                await kept.execute(_TERMINATE)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):  # a test has ended it
                kept.terminate()
                kept = None
        if kept is None:
            try:
                kept = await asyncpg.connect(
                    self.server.url(name), server_settings={"application_name": KEPT}
                )
            except asyncpg.PostgresError:
                return None
            await kept.execute(_TERMINATE)
        self._kept[name] = kept
        return kept

    async def _drop(self, name: str) -> None:
        if (kept := self._kept.pop(name, None)) is not None:
            kept.terminate()
        await self._command(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    async def _has_seeds(self, connection: asyncpg.Connection) -> bool:
        """Whether the tables that the migrations wrote to are as they were."""
        contents: list[str] = await connection.fetchval(self._seeded)
        return contents == [*self._seeds.values()]


async def _written(connection: asyncpg.Connection) -> list[str]:
    return [row[0] for row in await connection.fetch(_WRITTEN)]


async def _content(connection: asyncpg.Connection, table: str) -> str:
    content: str = await connection.fetchval(_CONTENT.format(table=table))
    return content


@pytest.fixture(scope="session")
def databases(postgres_server: PostgresServer) -> Iterator[Databases]:
    """Of the shared server."""
    made = Databases(postgres_server)
    yield made
    made.close()


@pytest.fixture
def database_url(databases: Databases) -> Iterator[str]:
    """A migrated, empty database of the test's own in the shared server."""
    name = databases.take()
    yield databases.server.url(name)
    databases.give_back(name)
