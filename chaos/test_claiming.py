"""Claiming jobs with a million that have ended, while an old transaction keeps the dead ones.

The age of a transaction costs nothing by itself: what costs is all that died since it began and
that nobody may clear away. So a snapshot is opened first, and then as many jobs go through the
queue
as half an hour at 550 a second brings: each is written, claimed, begun and ended, which leaves
three
dead versions of its row and its entry in the queue's index.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from tests.databases import make_template
from tidegate.call import DEFAULT_POOL, Kind
from tidegate.embedded.postgres import PostgresServer
from tidegate.store.blobs import Blobs
from tidegate.store.queries import sql
from tidegate.store.store import Store

JOBS = 1_000_000
STEPS = (10_000, 90_000, 900_000)
AT_ONCE = 100_000
TENANTS = 20
CLAIMS = 400
EACH = 16
MOST_P99_MS = 20.0

WRITE = """
    INSERT INTO requests (id, tenant_id, pool, source, status, kind, classified_by,
        classified_reason, prompt, created_at)
    SELECT gen_random_uuid(), 't' || (n % $2), 'gemini', 'job', 'queued', 'text_only', 'rules',
        '', 'p', clock_timestamp() FROM generate_series(1, $1) AS n
"""
CHURN = (
    "UPDATE requests SET claim = 1, claimed_by = 'w' WHERE status = 'queued'",
    "UPDATE requests SET status = 'running', version = 2 WHERE claimed_by = 'w'",
    "UPDATE requests SET status = 'succeeded', finished_at = now(), claimed_by = NULL, version = 3 "
    "WHERE claimed_by = 'w'",
)


@asynccontextmanager
async def database(folder: Path) -> AsyncIterator[str]:
    """A migrated database in a server of its own."""
    server = PostgresServer(folder / "postgres", settings={"fsync": "off"})
    server.start()
    try:
        yield server.url(await make_template(server))
    finally:
        await asyncio.to_thread(server.stop)


async def churn(busy: asyncpg.Connection, jobs: int) -> None:
    """So many jobs come, are claimed, begin and end."""
    at_once = min(jobs, AT_ONCE)
    for _ in range(jobs // at_once):
        await busy.execute(WRITE, at_once, TENANTS)
        for step in CHURN:
            await busy.execute(step)
    await busy.execute("VACUUM ANALYZE requests")


async def claims_ms(url: str, folder: Path, busy: asyncpg.Connection) -> list[float]:
    """How long claims take while jobs go on coming, in order."""
    store = Store.from_url(
        url,
        instance_id="w-1",
        blobs=Blobs.from_url("", folder),
        spill_dir=folder / "spill",
        spill_max_bytes=10_000_000,
        audit_full="block",
        claim_lease_ms=60_000,
    )
    await store.start()
    taken: list[float] = []
    try:
        for number in range(CLAIMS + 5):
            await busy.execute(WRITE, EACH, TENANTS)
            began = time.perf_counter()
            jobs = await store.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=EACH)
            if number >= 5:  # the first ones open connections
                taken.append((time.perf_counter() - began) * 1000)
            assert len(jobs) == EACH
    finally:
        await store.aclose()
    return sorted(taken)


def say(name: str, taken: list[float]) -> float:
    """Print it; the p99."""
    p50, p99 = taken[len(taken) // 2], taken[len(taken) * 99 // 100]
    figures = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {taken[-1]:.1f} ms"
    sys.stdout.write(f"\n  {name}, claims of {EACH}: {figures}\n")
    return p99


async def test_a_million_ended_jobs_do_not_slow_claiming(tmp_path: Path) -> None:
    async with database(tmp_path) as url:
        busy = await asyncpg.connect(url)
        await churn(busy, JOBS)
        p99 = say("1,000,000 ended", await claims_ms(url, tmp_path, busy))
        await busy.close()
    assert p99 <= MOST_P99_MS


async def test_what_an_old_transaction_costs_ends_with_it(tmp_path: Path) -> None:
    """While it is open, claiming is slowed by all that died since: that is measured, and is no
    promise. Once it has ended and the dead were cleared away, claims are as quick as before."""
    async with database(tmp_path) as url:
        busy, old = await asyncpg.connect(url), await asyncpg.connect(url)
        await old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await old.fetchval("SELECT count(*) FROM requests")
        for jobs in STEPS:
            await churn(busy, jobs)
            await busy.execute(WRITE, EACH, TENANTS)
            began = time.perf_counter()
            arguments = ("gemini", "text_only", EACH, "w-0", "", 32)
            taken = await busy.fetch(sql("claim"), *arguments, timeout=300)
            took_ms = (time.perf_counter() - began) * 1000
            assert len(taken) == EACH
            dead = await busy.fetchval("SELECT count(*) FROM requests")
            sys.stdout.write(f"\n  {dead:,} jobs since it began: a claim takes {took_ms:.0f} ms\n")
        await old.close()
        await busy.execute("VACUUM requests")
        p99 = say("after it has ended", await claims_ms(url, tmp_path, busy))
        await busy.close()
    assert p99 <= MOST_P99_MS
