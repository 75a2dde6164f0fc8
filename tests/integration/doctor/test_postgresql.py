"""Each fault of a real database is found, and reported with its fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from tests.integration.pgbouncer.bouncer import Bouncer
from tidegate.doctor.checks import Finding, State
from tidegate.doctor.stores import judge, judge_no_answer
from tidegate.embedded.servers import PostgresServer
from tidegate.errors import ConfigError, StoreUnavailable
from tidegate.store.database import FIRST, HEAD
from tidegate.store.diagnostics import examine


async def found(url: str, processes: int | None = 2, **more: Any) -> dict[str, Finding]:
    return {
        one.check.removeprefix("postgresql."): one
        for one in judge(await examine(url, **more), processes)
    }


async def said(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def test_a_sound_database_is_well(database_url: str) -> None:
    all_found = await found(database_url)
    # The tests' server loses what a crash of the machine would take: it says so itself.
    assert all_found.pop("durability").state is State.WARN
    assert {one.state for one in all_found.values()} == {State.OK}, all_found


async def test_a_statement_on_all_days_takes_as_many_locks_as_doctor_counts(
    database_url: str,
) -> None:
    counted = (await examine(database_url)).facts["partitions"]
    assert counted > 7
    most = 0
    for table in ("audit", "attempts", "bodies"):
        connection = await asyncpg.connect(database_url)
        try:
            async with connection.transaction():
                await connection.execute(f"SELECT FROM {table} LIMIT 1")
                locked = await connection.fetchval(
                    "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation"
                    " WHERE l.pid = pg_backend_pid() AND c.relispartition"
                )
                most = max(most, locked)
        finally:
            await connection.close()
    assert most == counted


async def test_a_schema_that_is_missing_old_or_newer_is_told(
    database_url: str, empty_database_url: str
) -> None:
    missing = (await found(empty_database_url))["schema"]
    assert (missing.state, missing.fix) == (State.FAIL, "run `tidegate migrate`")
    for revision, state, remedy in (
        ("0001", State.FAIL, "export what you need"),
        (FIRST, State.FAIL, "run `tidegate migrate`"),
        ("9999", State.WARN, "that is fine after a rollback"),
        (HEAD, State.OK, ""),
    ):
        await said(database_url, f"UPDATE alembic_version SET version_num = '{revision}'")
        schema = (await found(database_url))["schema"]
        assert (schema.state, schema.fix.startswith(remedy)) == (state, True)


async def test_old_transactions_and_scarce_connections_are_told(database_url: str) -> None:
    idle = await asyncpg.connect(database_url, server_settings={"application_name": "a person"})
    try:
        await idle.execute("BEGIN; SELECT 1")
        old = (await found(database_url, old_s=0.0))["transactions"]
        assert old.state is State.WARN
        assert "idle in transaction (tidegate, a person, pid " in old.found
        assert "pg_terminate_backend" in old.fix
        assert (await found(database_url))["transactions"].state is State.OK
    finally:
        await idle.close()
    crowd = (await found(database_url, processes=1_000))["connections"]
    assert (crowd.state, "12000" in crowd.found) == (State.WARN, True)


async def test_a_database_that_takes_no_writes_is_told(database_url: str) -> None:
    name = urlsplit(database_url).path.removeprefix("/")
    await said(database_url, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    assert (await found(database_url))["rights"].state is State.FAIL


async def test_a_user_without_rights_is_told(
    database_url: str, postgres_server: PostgresServer
) -> None:
    user = f"u_{uuid4().hex[:8]}"
    theirs = database_url.replace("//tidegate", f"//{user}", 1)
    await said(database_url, f"CREATE ROLE {user} LOGIN PASSWORD '{_password(database_url)}'")
    try:
        none = (await found(theirs))["rights"]
        assert (none.state, "GRANT ALL" in none.fix) == (State.FAIL, True)
        await said(database_url, f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {user}")
        some = (await found(theirs))["rights"]
        assert (some.state, "can't migrate" in some.found) == (State.WARN, True)
        assert f"{user} does not own " in some.found
    finally:
        await said(database_url, f"DROP OWNED BY {user}; DROP ROLE {user}")


async def test_a_server_without_room_and_a_file_that_is_missing_are_told_with_their_fix(
    database_url: str,
) -> None:
    user = f"u_{uuid4().hex[:8]}"
    full = database_url.replace("//tidegate", f"//{user}", 1)
    password = _password(database_url)
    await said(database_url, f"CREATE ROLE {user} LOGIN CONNECTION LIMIT 0 PASSWORD '{password}'")
    try:
        with pytest.raises(StoreUnavailable) as refused:
            await examine(full)
    finally:
        await said(database_url, f"DROP ROLE {user}")
    assert judge_no_answer(refused.value).fix.startswith("raise max_connections: each process")
    url = urlsplit(database_url)._replace(query="sslmode=verify-full&sslrootcert=/nowhere/a")
    with pytest.raises(ConfigError) as missing:
        await examine(url.geturl())
    finding = judge_no_answer(missing.value)
    assert (finding.state, "/nowhere/a" in finding.found) == (State.FAIL, True)


async def test_another_encoding_is_told(postgres_server: PostgresServer) -> None:
    name = f"t_{uuid4().hex}"
    made = f"CREATE DATABASE \"{name}\" ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0"
    await said(postgres_server.url("postgres"), made)
    try:
        encoding = (await found(postgres_server.url(name)))["encoding"]
        assert (encoding.state, "SQL_ASCII" in encoding.found) == (State.FAIL, True)
    finally:
        await said(postgres_server.url("postgres"), f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.mark.parametrize(("mode", "state"), [("transaction", State.OK), ("session", State.WARN)])
async def test_a_pooler_is_noticed_and_so_is_its_mode(
    mode: str, state: State, database_url: str, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    with Bouncer(tmp_path / "pooler", postgres_server, f"pool_mode = {mode}") as pooler:
        all_found = await found(pooler.url(database_url.rpartition("/")[2]))
    assert (all_found["pooler"].state, all_found["connections"].state) == (state, State.SKIPPED)
    assert mode in f"{all_found['pooler'].found} {all_found['pooler'].fix}"


@pytest.mark.parametrize(
    "url", ["postgresql://127.0.0.1:1/x", "postgresql://nobody:wrong@{place}", "postgresql://h:x/y"]
)
async def test_a_database_that_cannot_be_used_is_told(url: str, database_url: str) -> None:
    with pytest.raises(StoreUnavailable):
        await examine(url.format(place=database_url.rpartition("@")[2]))


def _password(url: str) -> str:
    return url.partition("://")[2].rpartition("@")[0].partition(":")[2]
