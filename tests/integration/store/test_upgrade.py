"""Upgrade of a database of version 0.1.0, and of one that is older than any release."""

from __future__ import annotations

import asyncio
import os
import subprocess
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest

from tests.commands import ran
from tests.gateway import Gateway, Opener, open_gateway
from tests.integration.store.conftest import MakeStore
from tests.waiting import wait_until
from tidegate.call import Kind
from tidegate.embedded.servers import binaries_of
from tidegate.errors import ConfigError, StoreUnavailable
from tidegate.store.database import HEAD, _load, migrate
from tidegate.store.requests import END, START, Filter, Role, SearchFilter
from tidegate.store.statistics import past_calls

__all__ = ["open_gateway"]
STATEMENTS = Path(__file__).parents[2] / "data/statements_0_1_0.sql"
FIXTURE = Path(__file__).parents[2] / "data/version_0_1_0.sql"
MADE_ON = date(2026, 11, 28)
_TABLES = """
    SELECT relname FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
    ORDER BY relname
"""


@pytest.fixture
async def url_0_1_0(empty_database_url: str) -> str:
    """A database as version 0.1.0 left it."""
    connection = await asyncpg.connect(empty_database_url)
    await connection.execute(FIXTURE.read_text(encoding="utf-8"))
    # A key counts for a day.
    await connection.execute("UPDATE native_keys SET created_at = now(), ended_at = now()")
    await connection.close()
    return empty_database_url


async def rows_of(url: str) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables but that of the revision."""
    connection = await asyncpg.connect(url)
    tables = [row["relname"] for row in await connection.fetch(_TABLES)]
    found = {
        table: [
            orjson.loads(row[0])
            for row in await connection.fetch(f"SELECT to_jsonb(t)::text FROM {table} AS t")
        ]
        for table in tables
        if table != "alembic_version"
    }
    await connection.close()
    return found


async def schema_of(url: str) -> list[str]:
    """What pg_dump says of it, without the partitions by day."""
    pg_dump = str(binaries_of(None) / "pg_dump")
    options = ("--schema-only", "--exclude-table=*_20*", "--no-owner", "--no-privileges")
    done = await asyncio.to_thread(
        subprocess.run, [pg_dump, *options, url], check=True, capture_output=True, text=True
    )
    assert "CREATE TABLE public.audit " in done.stdout
    # `\restrict` and `\unrestrict` bear a random word.
    return [line for line in done.stdout.splitlines() if "restrict " not in line]


async def test_an_upgrade_keeps_every_row_of_every_table(url_0_1_0: str) -> None:
    before = await rows_of(url_0_1_0)
    assert [table for table, rows in before.items() if not rows] == []
    assert await migrate(url_0_1_0) == HEAD
    after = await rows_of(url_0_1_0)
    for table, rows in before.items():
        kept = [{name: row[name] for name in rows[0]} for row in after[table]]
        assert sorted(kept, key=orjson.dumps) == sorted(rows, key=orjson.dumps), table


async def test_an_upgraded_database_has_the_schema_of_a_new_one(
    url_0_1_0: str, database_url: str
) -> None:
    await migrate(url_0_1_0)
    assert await schema_of(url_0_1_0) == await schema_of(database_url)


async def test_requests_of_0_1_0_are_read(url_0_1_0: str, make_store: MakeStore) -> None:
    await migrate(url_0_1_0)
    store = await make_store(url_0_1_0)
    seen: dict[str, list[tuple[str, str]]] = {}
    for tenant in ("default", "acme"):
        page = await store.requests.page(tenant, Filter(), 100, START)
        for item in page.items:
            record = await store.requests.get(item.request_id, tenant)
            assert (record.status, record.created_at) == (item.status, item.created_at)
            seen.setdefault(tenant, []).append((record.source, record.status.value))
    assert {tenant: sorted(rows) for tenant, rows in seen.items()} == {
        "default": [
            ("job", "succeeded"),
            ("relay", "succeeded"),
            ("relay", "succeeded"),
            ("stream", "succeeded"),
        ],
        "acme": [
            ("job", "expired"),
            ("job", "queued"),
            ("job", "succeeded"),
            ("job", "succeeded"),
            ("job", "succeeded"),
        ],
    }
    bodies = 0
    found = await store.requests.search(SearchFilter(), 100, END)
    for hit in found.items:
        detail = await store.requests.detail(hit.listed.request_id)
        for kept in detail.bodies:
            role: Role = "request" if kept.role == "request" else "response"
            body = await store.requests.body_of_any(hit.listed.request_id, role)
            assert len(b"".join([piece async for piece in body.pieces])) == kept.size_bytes
            bodies += 1
    assert bodies > len(found.items)
    since = _made_at() - timedelta(days=1)
    assert len(await past_calls(store.connections, "gemini", since, datetime.now(UTC))) == 9


async def test_the_rest_of_0_1_0_is_read(url_0_1_0: str, make_store: MakeStore) -> None:
    await migrate(url_0_1_0)
    store = await make_store(url_0_1_0)
    batches = await store.batches.listed("default", after=None, limit=10)
    assert sorted(batch.status for batch in batches) == ["completed", "in_progress"]
    files = await store.batches.files("default", after=None, purpose=None, limit=9, upwards=True)
    assert [file.purpose for file in files] == ["batch", "batch_output", "batch"]
    tenants = {tenant.tenant_id: tenant for tenant in await store.tenants.list_tenants()}
    assert (tenants["acme"].most_priority, tenants["acme"].most_queued_jobs) == (10, 100)
    keys = {key.name: key for key in await store.tenants.list_keys()}
    assert (keys["ci"].tenant_id, keys["revoked"].revoked_at is None) == ("default", False)
    assert [policy.revision for policy in await store.policies.history("gemini", 10)] == [3, 2, 1]
    assert await store.history.read(10, _made_at().timestamp())
    known = await store.native_keys.known("default", "native-once")
    assert known is not None
    assert (known.http_status, known.request_id.version) == (200, 7)


async def test_a_job_that_a_worker_of_0_1_0_had_claimed_goes_to_another(
    url_0_1_0: str, make_store: MakeStore
) -> None:
    await migrate(url_0_1_0)
    store = await make_store(url_0_1_0)

    async def retaken() -> list[UUID]:
        with suppress(StoreUnavailable):  # a heartbeat that took over a third of a short lease
            await store.queue.heartbeat()
            return await store.queue.retake_expired()
        return []

    (request_id,) = await wait_until(retaken)
    (job,) = await store.queue.claim("gemini", Kind.TEXT_ONLY, 10)
    assert (job.request_id, job.prompt) == (request_id, "Explain why the queue waits.")


async def test_a_gateway_does_the_work_that_0_1_0_left(
    url_0_1_0: str, open_gateway: Opener
) -> None:
    """Its queued job and its batch, whose lines a worker had that is gone, end; the keys, limits
    and budgets that it kept are in force."""
    connection = await asyncpg.connect(url_0_1_0)
    await connection.execute(
        "UPDATE batches SET expires_at = now() + interval '1 hour' WHERE status = 'in_progress';"
        "UPDATE tenants SET budget_day_money = 5 WHERE id = 'acme'"
    )
    await connection.close()
    await migrate(url_0_1_0)
    gateway = await open_gateway(database_url=url_0_1_0)
    ended = await wait_until(lambda: _ended(gateway), 30, "the job and the batch of 0.1.0")
    assert ended == ("succeeded", ("completed", 2, 2, 0))
    _, limits = await gateway.get("/admin/limits")
    assert limits["policy"]["limits"]["kind:text_only"] == 7  # set live
    _, acme = await gateway.get("/admin/tenants/acme")
    assert (acme["weight"], acme["most_priority"], acme["budget_day_money"]) == (4, 10, 5)
    budgets: Any = (await gateway.get("/admin/budgets"))[1]
    assert [(one["name"], one["tenant"]) for one in budgets] == [("acme/budget_day_money", "acme")]
    keys: Any = (await gateway.get("/admin/keys"))[1]
    assert {one["name"]: one["state"] for one in keys} == {
        "ci": "works",
        "revoked": "revoked",
        "acme": "works",
    }


async def test_a_rolled_back_0_1_0_finds_all_that_its_statements_name(database_url: str) -> None:
    """PostgreSQL plans each of them for the newest schema: tables, columns, conflicts and types."""
    connection = await asyncpg.connect(database_url)
    statements = _load(STATEMENTS.read_text(encoding="utf-8"))
    refused = {}
    for one in statements.values():
        if one.sql.split(maxsplit=1)[0] not in ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH"):
            continue
        try:
            await connection.execute(f"EXPLAIN (GENERIC_PLAN) {one.sql}")
        except asyncpg.PostgresError as failed:
            refused[one.name] = str(failed)
    await connection.close()
    assert len(statements) == 169
    assert refused == {}


async def _ended(gateway: Gateway) -> tuple[str, tuple[Any, ...]] | None:
    job = await gateway.database.fetchval(
        "SELECT status FROM requests WHERE prompt = 'Explain why the queue waits.'"
    )
    batch = await gateway.database.fetchrow(
        "SELECT status, total, completed, failed FROM batches ORDER BY id DESC LIMIT 1"
    )
    is_over = job == "succeeded" and batch["status"] == "completed"
    return (job, tuple(batch)) if is_over else None


@pytest.mark.parametrize("revision", ["0001", "0011"])
async def test_a_database_before_the_first_release_stops_the_start_with_one_line(
    url_0_1_0: str, tmp_path: Path, revision: str
) -> None:
    connection = await asyncpg.connect(url_0_1_0)
    await connection.execute("UPDATE alembic_version SET version_num = $1", revision)
    await connection.close()
    before = await rows_of(url_0_1_0)
    with pytest.raises(ConfigError, match=f"revision {revision}"):
        await migrate(url_0_1_0)
    env = {**os.environ, "DATABASE_URL": url_0_1_0, "REDIS_URL": "redis://127.0.0.1:1/0"}
    for command in ("migrate", "worker"):
        done = await ran(command, cwd=tmp_path, env={**env, "GEMINI_API_KEY": "k"})
        (line,) = done.complained.splitlines()
        assert (done.code, done.said) == (2, "")
        assert line == (
            f"tidegate: DATABASE_URL names a database at revision {revision}, which no release"
            " had: it cannot be upgraded; export what you need of it with pg_dump,"
            " then start with an empty database"
        )
    assert await rows_of(url_0_1_0) == before


def _made_at() -> datetime:
    return datetime.combine(MADE_ON, datetime.min.time(), UTC)
