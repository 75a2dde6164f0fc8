"""Claiming jobs while a million that have ended cannot be cleared away.

The age of a transaction costs nothing by itself: what costs is all that died since it began and
that nobody may clear away. So a snapshot is opened first, and then as many jobs go through the
queue as half an hour at 550 a second brings. Each is written, claimed, begun and ended, which
leaves three dead versions of its row and its entries in the indexes of the queue; one in ten is
also retried. Claims are measured while that snapshot is still open, and once more when it has ended
and a vacuum has passed: then a million jobs that have ended are left, and nothing that is dead.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from tests.clusters import FAST, copied
from tidegate.call import DEFAULT_POOL, Kind
from tidegate.store.blobs import Blobs
from tidegate.store.store import Store

JOBS = 1_000_000
AT_ONCE = 20_000
TENANTS = 20
CLAIMS = 2_000
FIRST = 5
EACH = 16
MOST_P99_MS = 20.0

WRITE = """
    INSERT INTO requests (id, tenant_id, pool, source, status, kind, classified_by,
        classified_reason, prompt, created_at, deadline_at)
    SELECT gen_random_uuid(), 't' || (n % $2), 'gemini', 'job', 'queued', 'text_only', 'rules',
        '', 'p', clock_timestamp(), now() + interval '1 hour' FROM generate_series(1, $1) AS n
"""
GOING = "CREATE TEMPORARY TABLE going (n bigserial, id uuid)"
COME = f"WITH new AS ({WRITE} RETURNING id) INSERT INTO going (id) SELECT id FROM new"
STEP = "UPDATE requests r SET {} FROM going WHERE r.id = going.id AND {}"
CHURN = (
    STEP.format("claim = claim + 1, claimed_by = 'w' || n % 4", "true"),
    STEP.format("status = 'queued', claimed_by = NULL, not_before = now()", "n % 10 = 0"),
    STEP.format("not_before = NULL", "n % 10 = 0"),
    STEP.format("claim = claim + 1, claimed_by = 'w' || n % 4", "n % 10 = 0"),
    STEP.format("status = 'running', version = version + 1", "true"),
    STEP.format("status = 'succeeded', finished_at = now(), claimed_by = NULL", "true"),
    "TRUNCATE going",
)


@asynccontextmanager
async def database(folder: Path) -> AsyncIterator[str]:
    """A migrated database in a server of its own."""
    server = copied(folder / "postgres", FAST, migrated=True)
    server.start()
    try:
        yield server.url()
    finally:
        await asyncio.to_thread(server.stop)


async def churn(busy: asyncpg.Connection, jobs: int) -> None:
    """So many jobs come, are claimed, begin and end."""
    await busy.execute(GOING)
    await busy.execute("SET enable_seqscan = off")
    for _ in range(jobs // AT_ONCE):
        await busy.execute(COME, AT_ONCE, TENANTS)
        for step in CHURN:
            await busy.execute(step)
    await busy.execute("VACUUM ANALYZE requests")


async def claims_ms(url: str, folder: Path, busy: asyncpg.Connection) -> list[float]:
    """How long the claims of a worker that has just started take while jobs go on coming."""
    store = Store(
        url,
        instance_id=f"w-{time.time()}",
        blobs=Blobs.from_url("", folder),
        spill_dir=folder / "spill",
        spill_max_bytes=10_000_000,
        audit_full="block",
        claim_lease_ms=15_000,
    )

    async def look_around() -> None:
        await store.queue.heartbeat()
        await store.queue.retake_expired()
        await store.queue.maintain()
        await store.queue.expire_due()

    async def tend() -> None:
        while True:
            await asyncio.sleep(1)
            await look_around()

    await store.start()
    taken: list[float] = []
    tending = None
    try:
        for number in range(FIRST + CLAIMS):
            await busy.execute(WRITE, EACH, TENANTS)
            began = time.perf_counter()
            jobs = await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=EACH)
            taken.append((time.perf_counter() - began) * 1000)
            assert len(jobs) == EACH
            if number == FIRST - 1:
                await look_around()  # the first time at all there is, as a worker that starts does
                tending = asyncio.create_task(tend())
        assert tending is not None
        assert not tending.done()
    finally:
        if tending is not None:
            tending.cancel()
            await asyncio.gather(tending, return_exceptions=True)
        await store.aclose()
    first, usual = taken[:FIRST], taken[FIRST:]
    sys.stdout.write(f"\n  a new worker's first claims: {[round(one) for one in first]} ms\n")
    return sorted(usual)


def say(name: str, taken: list[float]) -> float:
    """Print it; the p99."""
    p50, p99 = taken[len(taken) // 2], taken[len(taken) * 99 // 100]
    figures = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {taken[-1]:.1f} ms"
    sys.stdout.write(f"\n  {name}, claims of {EACH}: {figures}\n")
    return p99


async def test_a_million_ended_jobs_do_not_slow_claiming_beside_an_old_snapshot_or_without_it(
    tmp_path: Path,
) -> None:
    async with database(tmp_path) as url:
        busy, old = await asyncpg.connect(url), await asyncpg.connect(url)
        await old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await old.fetchval("SELECT count(*) FROM requests")
        await churn(busy, JOBS)
        beside = say("1,000,000 since a snapshot", await claims_ms(url, tmp_path, busy))
        assert await old.fetchval("SELECT count(*) FROM requests") == 0  # it was there all the time
        await old.close()
        await busy.execute("VACUUM ANALYZE requests")
        after = say("1,000,000 ended", await claims_ms(url, tmp_path, busy))
        await busy.close()
    assert beside <= MOST_P99_MS
    assert after <= MOST_P99_MS
