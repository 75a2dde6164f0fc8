"""Tenants with days of their own: kept longer than others, or gone earlier."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta

import asyncpg
import orjson
import pytest

from tests.integration.store.jobs import new_job, result
from tidegate.call import DEFAULT_POOL, Kind, new_id
from tidegate.errors import NotFound
from tidegate.prices.budgets import Budget
from tidegate.store import database as partitions
from tidegate.store.blobs import new_key
from tidegate.store.records import acting
from tidegate.store.retention import Whose
from tidegate.store.store import Store

TENANTS = {"brief": 5, "usual": None, "long": 60}


async def there(store: Store, key: str) -> bool:
    try:
        await store.blobs.get(key)
    except NotFound:
        return False
    return True


async def put(store: Store, peek: asyncpg.Connection, tenant: str, age_days: int) -> str:
    """A native call so many days ago, with a body in a blob; the key of that."""
    at = datetime.combine(datetime.now(UTC).date() - timedelta(days=age_days), time(5), UTC)
    key, request_id = new_key(at), new_id()
    await store.blobs.put(key, b"body")
    await peek.execute(
        "INSERT INTO bodies (id, created_at, role, tenant_id, pool, encoding, size_bytes, blob_key)"
        " VALUES ($1, $2, 'request', $3, 'gemini', 'raw', 4, $4)",
        *(request_id, at, tenant, key),
    )
    await peek.execute(
        "INSERT INTO audit (id, created_at, request_id, tenant_id, pool, source, status,"
        " classified_by, classified_reason, priority, attempts, lapses, instance_id, submitted_at,"
        " finished_at) VALUES ($1, $2, $1, $3, 'gemini', 'relay', 'succeeded', 'body', '', 0, 1, 0,"
        " 'i', $2, $2)",
        *(request_id, at, tenant),
    )
    return key


@pytest.mark.parametrize("with_partitions", [True, False])
async def test_each_tenant_keeps_its_own_days(
    store: Store, peek: asyncpg.Connection, with_partitions: bool
) -> None:
    for tenant, days in TENANTS.items():
        await store.tenants.set(tenant, {"retention_days": days}, by="test")
    ages = (1, 10, 40, 70)
    if with_partitions:
        for age in ages:
            async with peek.transaction():
                await partitions.make_ahead(peek, datetime.now(UTC).date() - timedelta(days=age))
    keys = {
        (tenant, age): await put(store, peek, tenant, age) for tenant in TENANTS for age in ages
    }
    kept = {("brief", 1), ("usual", 1), ("usual", 10), ("long", 1), ("long", 10), ("long", 40)}
    for _ in range(2):  # and a second run finds nothing more to do
        await store.retention.prune(30)
        for table in ("audit", "bodies"):
            rows = await peek.fetch(f"SELECT tenant_id, created_at FROM {table}")
            today = datetime.now(UTC).date()
            left = {(row["tenant_id"], (today - row["created_at"].date()).days) for row in rows}
            assert left == kept
        assert {place for place, key in keys.items() if await there(store, key)} == kept
    if with_partitions:
        gone = partitions.name_of("audit", datetime.now(UTC).date() - timedelta(days=70))
        assert await peek.fetchval("SELECT to_regclass($1) IS NULL", gone)
    await store.retention.prune(3)  # another default changes nothing for those with their own
    assert await peek.fetchval("SELECT count(*) FROM audit WHERE tenant_id = 'long'") == 3
    assert await peek.fetchval("SELECT count(*) FROM audit WHERE tenant_id = 'usual'") == 1


async def test_ended_requests_go_by_their_tenants_days(
    store: Store, peek: asyncpg.Connection
) -> None:
    for tenant, days in TENANTS.items():
        await store.tenants.set(tenant, {"retention_days": days}, by="test")
        for age in (1, 10, 40, 70):
            await store.jobs.submit(new_job(f"{age}", tenant_id=tenant))
    for job in await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=50):
        await store.queue.running(job, model="m", fence=(1, 1), queue_ms=0)
        await store.queue.finish(job, result())
    await peek.execute(
        "UPDATE requests SET created_at = now() - make_interval(days => prompt::integer),"
        " finished_at = now() - make_interval(days => prompt::integer)"
    )
    report = await store.retention.prune(30)
    rows = await peek.fetch("SELECT tenant_id, prompt FROM requests")
    assert report.requests == 6
    assert {(row["tenant_id"], int(row["prompt"])) for row in rows} == {
        *(("brief", 1), ("usual", 1), ("usual", 10)),
        *(("long", 1), ("long", 10), ("long", 40)),
    }


async def test_requests_that_a_tenant_keeps_longer_are_passed_once(
    store: Store, peek: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.tenants.set("long", {"retention_days": 90}, by="test")
    insert = (
        "INSERT INTO requests (id, tenant_id, pool, source, status, classified_by,"
        " classified_reason, prompt, priority, attempts, created_at, finished_at)"
        " SELECT gen_random_uuid(), $1, 'gemini', 'job', 'succeeded', 'rules', '', '', 0, 1, at, at"
        " FROM generate_series(1, $2) AS n, LATERAL"
        " (SELECT now() - $3 * interval '1 day' + n * interval '1 s' AS at) AS times"
    )
    await peek.execute(insert, "long", 300, 60)
    await peek.execute(insert, "default", 1_200, 50)
    await peek.execute(
        "SET enable_seqscan = off; SET enable_sort = off; SET enable_bitmapscan = off"
    )
    rows, passed = store.retention.rows, []

    async def explained(name: str, *values: object) -> list[asyncpg.Record]:
        if name == "prune_candidates":
            plan = await peek.fetch("EXPLAIN (ANALYZE) " + partitions.sql(name), *values)
            passed.append(any("Rows Removed by Filter: 300" in row[0] for row in plan))
        return await rows(name, *values)

    monkeypatch.setattr(store.retention, "rows", explained)
    assert (await store.retention.prune(30)).requests == 1_200
    assert passed == [True, False, False, False]


async def test_no_action_of_an_operator_names_a_person_who_could_be_erased(
    store: Store, peek: asyncpg.Connection
) -> None:
    records = store.budgets.records
    with acting("the key tg_1", "admin", "127.0.0.1"):
        await records.set(Budget("p", "usd", 9, "day", each=("tenant", "subject")), by="op")
        await records.set(Budget("a", "usd", 9, "day", subject="ann"), by="op")
    for scope in ('["acme", "ann"]', None):
        with acting("the key tg_1", "admin", "127.0.0.1"):
            await records.resume("p", scope=scope, extra=5, by="op")
    with acting("the key tg_1", "admin", "127.0.0.1"):
        await store.retention.erase(Whose(None, "ann"))
    rows = await peek.fetch("SELECT a.*, a::text AS said FROM operator_actions a ORDER BY number")
    assert not [row["said"] for row in rows if "ann" in row["said"]]
    after = [orjson.loads(row["is_now"] or "null") for row in rows]
    digest = rows[4]["target"]
    assert [one["subject"] for one in after[:2]] == [None, digest]
    assert [one["scope"] for one in after[2:4]] == [f'["acme", "{digest}"]', None]
