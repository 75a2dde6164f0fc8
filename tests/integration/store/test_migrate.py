"""Migrations on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from tests.waiting import wait_until
from tidegate.errors import ConfigError, StoreUnavailable
from tidegate.settings import load
from tidegate.store import database as partitions
from tidegate.store.database import HEAD, migrate, revision_of, upgrade
from tidegate.store.diagnostics import check_url
from tidegate.supervisor.services import check_database_url


async def test_a_migration_reports_its_revision_and_the_next_has_nothing_to_do(
    empty_database_url: str,
) -> None:
    assert await migrate(empty_database_url) == HEAD
    assert await migrate(empty_database_url) is None


async def test_the_code_needs_the_newest_revision(empty_database_url: str) -> None:
    folder = Path(partitions.__file__).parent / "migrations"
    assert max(path.name[1:5] for path in folder.glob("r0*.sql")) == HEAD


async def test_processes_that_migrate_at_once_are_safe(empty_database_url: str) -> None:
    code = (
        "import asyncio, sys; from tidegate.store.database import migrate; "
        "print(asyncio.run(migrate(sys.argv[1])))"
    )
    children = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code, empty_database_url), stdout=asyncio.subprocess.PIPE
        )
        for _ in range(2)
    ]
    outputs = [(await child.communicate())[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert any(HEAD.encode() in output for output in outputs)
    connection = await asyncpg.connect(empty_database_url)
    count = await connection.fetchval("SELECT count(*) FROM alembic_version")
    await connection.close()
    assert count == 1


async def test_migrating_without_a_server_says_that_the_store_is_away() -> None:
    with pytest.raises(StoreUnavailable):
        await migrate("postgresql://nobody@127.0.0.1:1/nothing")


async def test_a_server_that_is_silent_is_reported_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(partitions, "_CONNECT_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://nobody@127.0.0.1:{silent.getsockname()[1]}/nothing"
        with pytest.raises(StoreUnavailable, match="does not answer: no answer in time"):
            await migrate(url)


async def test_a_migration_gives_up_while_a_backup_has_a_table(empty_database_url: str) -> None:
    reader = await asyncpg.connect(empty_database_url)
    await upgrade(reader, "0012")
    async with reader.transaction():
        await reader.execute("LOCK TABLE audit IN ACCESS SHARE MODE")
        async with asyncio.timeout(5):
            with pytest.raises(StoreUnavailable, match="in use, perhaps by a backup"):
                await migrate(empty_database_url)
    assert await revision_of(reader) == "0012"
    await reader.close()
    assert await migrate(empty_database_url) == HEAD


async def test_a_migration_that_is_cut_off_says_that_the_store_is_away(
    empty_database_url: str,
) -> None:
    reader = await asyncpg.connect(empty_database_url)
    await upgrade(reader, "0012")
    # Of pg_stat_activity a transaction would see what it saw first, each time.
    cut = (
        "SELECT pg_terminate_backend(pid) FROM pg_locks "
        "WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
    )
    async with reader.transaction():
        await reader.execute("SELECT pg_advisory_xact_lock(7423000)")
        migrating = asyncio.create_task(migrate(empty_database_url))
        await wait_until(lambda: reader.fetchval(cut))
        with pytest.raises(StoreUnavailable):
            await migrating
    await reader.close()


async def test_a_user_that_may_not_migrate_is_a_wrong_setting(empty_database_url: str) -> None:
    owner = await asyncpg.connect(empty_database_url)
    user = f"guest_{uuid4().hex}"
    await owner.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'x'")
    url = urlsplit(empty_database_url)
    address = url.netloc.rpartition("@")[2]
    with pytest.raises(ConfigError, match="may not change the schema"):
        await migrate(url._replace(netloc=f"{user}:x@{address}").geturl())
    await owner.execute(f"DROP ROLE {user}")
    await owner.close()


@pytest.mark.parametrize(
    "query",
    [
        *("sslmode=nonsense", "target_session_attrs=any-one", "sslmode=verify-ca"),
        "sslmode=verify-full&sslrootcert=/nowhere/ca.crt",
    ],
)
async def test_what_no_server_can_accept_is_refused_as_a_setting(
    query: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not as an outage, whose end would be waited for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="DATABASE_URL can't be used: ") as refused:
        await migrate(f"postgresql://nobody:word@127.0.0.1:1/nothing?{query}")
    with pytest.raises(ConfigError) as unmigrated:  # MIGRATE_AT_START=0
        await check_url(f"postgresql://nobody:word@127.0.0.1:1/nothing?{query}")
    for one in (refused, unmigrated):
        assert "\n" not in str(one.value)
        assert "word" not in str(one.value)
        assert ("/nowhere/ca.crt" in str(one.value)) == ("/nowhere" in query), "the file's name"
    await check_url("postgresql://nobody:word@127.0.0.1:1/nothing?sslmode=prefer")


def test_a_start_that_does_not_migrate_waits_for_no_name_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered, ended = threading.Event(), list[bool]()

    def look_up(*_: object, **__: object) -> NoReturn:
        ended.append(answered.wait(2))
        raise socket.gaierror("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    url = "postgresql://nobody:word@postgres.example/nothing"
    given = {"DATABASE_URL": url, "REDIS_URL": "redis://127.0.0.1:1", "GEMINI_API_KEY": "k"}
    check_database_url(load(given, dotenv=None))
    assert not ended, "it may take minutes"
    answered.set()


async def test_the_index_of_words_reads_no_partition_of_before(empty_database_url: str) -> None:
    connection = await asyncpg.connect(empty_database_url)
    await upgrade(connection, "0027")
    today = datetime.now(UTC).date()
    async with connection.transaction():
        await partitions.make_ahead(connection, today - timedelta(days=9))
        await partitions.make_ahead(connection, today)
    indexed = (
        "SELECT x.indrelid::regclass::text FROM pg_inherits i "
        "JOIN pg_index x ON x.indexrelid = i.inhrelid WHERE i.inhparent = 'audit_words'::regclass"
    )
    files = (
        "SELECT relfilenode FROM pg_class WHERE relname LIKE 'audit%' AND relkind = 'r' ORDER BY 1"
    )
    before = await connection.fetch(files)
    await upgrade(connection)
    assert await connection.fetch(files) == before, "no table is written anew"
    async with connection.transaction():
        made = await partitions.make_ahead(connection, today + timedelta(days=1))
    names = {row[0] for row in await connection.fetch(indexed)}
    first = await connection.fetchval(partitions.sql("search_words_from"))
    await connection.close()
    ahead = [partitions.name_of("audit", today + timedelta(days=days)) for days in range(9)]
    assert ahead[-1] in made
    assert names == {"audit_default", *ahead}
    assert first == f"{today:%Y%m%d}"
