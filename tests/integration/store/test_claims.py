"""Claiming in fairness, dying with claims, and what the planner makes of a long queue."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import orjson
import pytest

from tests.integration.store.conftest import MakeStore
from tests.integration.store.jobs import beat, new_job, now, plan, plan_for_any, result
from tests.waiting import wait_until
from tidegate.call import DEFAULT_POOL, Kind, Status
from tidegate.errors import ClaimLost, NotFound, StoreUnavailable
from tidegate.store.database import PREPARED, sql
from tidegate.store.queue import MAX_LAPSES
from tidegate.store.records import ClaimedJob
from tidegate.store.store import Store

LEASE_MS = 900
FILL = """
    INSERT INTO requests (id, tenant_id, pool, source, status, kind, classified_by,
        classified_reason, prompt, created_at, priority, deadline_at)
    SELECT gen_random_uuid(), $1, 'gemini', 'job', 'queued', 'text_only', 'rules', '', 'p',
        now() - interval '1 day' + n * interval '1 ms', 0, now() + interval '1 day'
    FROM generate_series(1, $2) AS n
"""


READS = "ANALYZE, COSTS OFF, TIMING OFF, BUFFERS"


_MOST_AHEAD = 10_000  # jobs that `get_place` counts, in no order of their pages


def pages_read(plan: str) -> int:
    """How many pages a statement has looked at, which no load of the machine changes: one that
    passes the whole queue looks at each page of its table."""
    of_whole = plan.partition("Buffers: shared ")[2].partition("\n")[0].partition(",")[0]
    return sum(int(count) for count in re.findall(r"(?:hit|read)=(\d+)", of_whole))


LISTED = ["greedy", datetime.min.replace(tzinfo=UTC), now(), now(), UUID(int=2**128 - 1)]


async def claim(store: Store, limit: int) -> list[ClaimedJob]:
    return await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=limit)


async def test_a_long_queue_of_one_tenant_does_not_delay_anothers_first_job(
    store: Store, peek: asyncpg.Connection
) -> None:
    await peek.execute(FILL, "greedy", 5_000)
    modest = [new_job(tenant_id=name) for name in ("a-modest", "modest", "zz-modest")]
    for job in modest:
        await store.jobs.submit(job)
    # One at a time, each finished before the next: nothing in flight tells who had his turn.
    tenants = []
    for _ in range(8):
        (claimed,) = await claim(store, 1)
        tenants.append(claimed.tenant_id)
        await store.queue.running(claimed, model="m", fence=(1, 1), queue_ms=0)
        await store.queue.finish(claimed, result())
    assert set(tenants[:4]) == {"greedy", "a-modest", "modest", "zz-modest"}
    assert tenants[4:] == ["greedy"] * 4


async def test_a_batch_takes_the_tenants_in_turn(store: Store) -> None:
    for tenant in ("a", "b", "c"):
        for _ in range(4):
            await store.jobs.submit(new_job(tenant_id=tenant))
    assert Counter(job.tenant_id for job in await claim(store, 6)) == {"a": 2, "b": 2, "c": 2}
    # The next batch goes on where the last one stopped.
    assert [job.tenant_id for job in await claim(store, 4)] == ["a", "b", "c", "a"]


async def test_within_a_tenant_priority_comes_first_and_then_age(store: Store) -> None:
    old = now() - timedelta(minutes=1)
    jobs = {
        "young": new_job(),
        "old": new_job(created_at=old),
        "urgent": new_job(priority=9),
    }
    for job in jobs.values():
        await store.jobs.submit(job)
    order = [job.request_id for job in await claim(store, 3)]
    assert order == [jobs[name].request_id for name in ("urgent", "old", "young")]


async def test_stores_that_claim_at_once_never_get_the_same_job_and_leave_none(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    await peek.execute(FILL, "a", 150)
    await peek.execute(FILL, "b", 150)
    stores = [await make_store(database_url, claim_lease_ms=5_000) for _ in range(3)]

    async def take(store: Store) -> list[ClaimedJob]:
        taken: list[ClaimedJob] = []
        while jobs := await claim(store, 7):
            taken += jobs
        return taken

    taken = [job for jobs in await asyncio.gather(*map(take, stores)) for job in jobs]
    assert len({job.request_id for job in taken}) == len(taken)
    # One that found all candidates locked may stop early, but what it left is still there.
    taken += await claim(stores[0], 300 - len(taken) or 1)
    assert len({job.request_id for job in taken}) == 300


async def test_a_dead_workers_jobs_return_and_the_killer_is_dead_after_three_lapses(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    judge = await make_store(database_url, claim_lease_ms=LEASE_MS)
    job, waiting = new_job(), new_job()
    await judge.jobs.submit(job)
    for lapse in range(1, MAX_LAPSES + 1):
        victim = await make_store(database_url, claim_lease_ms=60_000)
        (claimed,) = await claim(victim, 1)
        await victim.queue.running(claimed, model="m", fence=(1, 1), queue_ms=0)
        assert await retaken(judge) == [job.request_id]
        record = await judge.requests.get(job.request_id, "default")
        assert record.status is (Status.DEAD if lapse == MAX_LAPSES else Status.QUEUED)
        with pytest.raises(ClaimLost):
            await victim.queue.finish(claimed, result("too late"))
    assert record.failure is not None
    assert record.failure.code == "worker_died"
    outcomes = await peek.fetch("SELECT outcome FROM attempts")
    assert [row["outcome"] for row in outcomes] == ["ambiguous"] * MAX_LAPSES
    assert await peek.fetchval("SELECT count(*) FROM audit WHERE status = 'dead'") == 1
    # A job that was only queued at a worker that died is not to blame.
    await judge.jobs.submit(waiting)
    victim = await make_store(database_url, claim_lease_ms=60_000)
    await claim(victim, 1)
    assert await retaken(judge) == [waiting.request_id]
    assert await peek.fetchval("SELECT max(lapses) FROM requests WHERE status = 'queued'") == 0
    await judge.stuck.requeue(job.request_id)
    assert (await judge.requests.get(job.request_id, "default")).status is Status.QUEUED
    with pytest.raises(NotFound):
        await judge.stuck.requeue(job.request_id)


async def test_a_worker_that_stood_still_before_its_call_learns_that_another_has_the_job(
    make_store: MakeStore, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen between the commit of its mark and the reading of the reply."""
    judge = await make_store(database_url, claim_lease_ms=LEASE_MS)
    # The judge needs its whole lease, and the victim finds a third of its own too long.
    victim = await make_store(database_url, claim_lease_ms=LEASE_MS * 5 // 2)
    await judge.jobs.submit(new_job())
    (claimed,) = await claim(victim, 1)
    marks = victim.queue._runs
    write, asked = marks.write, []

    async def frozen(row: dict[str, object]) -> None:
        asked.append(row)
        await write(row)
        if len(asked) == 1:
            assert await retaken(judge) == [claimed.request_id]

    monkeypatch.setattr(marks, "write", frozen)
    with pytest.raises(ClaimLost):
        await victim.queue.running(claimed, model="m", fence=(1, 1), queue_ms=0)


async def retaken(judge: Store) -> list[object]:
    async def beat_and_take() -> list[object]:
        with suppress(StoreUnavailable):  # within a third of a short lease: the next look does it
            await judge.queue.heartbeat()
            return list(await judge.queue.retake_expired())
        return []

    found: list[object] = await wait_until(beat_and_take)
    return found


async def test_a_worker_that_has_just_started_judges_nobody(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    silent = await make_store(database_url, claim_lease_ms=60_000)
    await silent.jobs.submit(new_job())
    (claimed,) = await claim(silent, 1)
    await peek.execute("UPDATE workers SET seen_at = now() - interval '1 hour'")
    fresh = await make_store(database_url, claim_lease_ms=LEASE_MS)
    await beat(fresh)
    assert await fresh.queue.retake_expired() == []
    await silent.queue.running(claimed, model="m", fence=(1, 1), queue_ms=0)


async def test_live_workers_keep_what_they_hold(make_store: MakeStore, database_url: str) -> None:
    judge, worker = await judge_and_worker(make_store, database_url)
    judged_at: list[float] = []

    async def judged() -> bool:
        with suppress(StoreUnavailable):  # a beat that came late: nothing is judged before the next
            # In this order the worker is never silent for longer than the judge.
            await judge.queue.heartbeat()
            await worker.queue.heartbeat()
            may_judge = judge.queue.may_judge
            assert await judge.queue.retake_expired() == []
            judged_at.extend([time.monotonic()] * may_judge)
        return len(judged_at) > 5 and judged_at[-1] - judged_at[0] > LEASE_MS / 1000

    await wait_until(judged, 60)


async def judge_and_worker(make_store: MakeStore, database_url: str) -> tuple[Store, Store]:
    """The second one has a job."""
    judge = await make_store(database_url, claim_lease_ms=LEASE_MS)
    worker = await make_store(database_url, claim_lease_ms=60_000)
    await worker.jobs.submit(new_job())
    await claim(worker, 1)
    return judge, worker


async def test_workers_that_fall_silent_with_postgresql_keep_what_they_hold(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    """As in a stall of the server, or of the machine, while a worker judges."""
    judge, worker = await judge_and_worker(make_store, database_url)

    async def may_judge() -> bool:
        await beat(judge)
        return judge.queue.may_judge

    await wait_until(may_judge)
    async with peek.transaction():
        await peek.execute("LOCK TABLE workers IN ACCESS EXCLUSIVE MODE")
        judging = asyncio.create_task(judge.queue.retake_expired())
        beats_end = time.monotonic() + LEASE_MS / 1000
        await wait_until(lambda: time.monotonic() > beats_end and not judge.queue.may_judge)
    with suppress(StoreUnavailable):  # what it found out came too late
        assert await judging == []
    assert len(worker.queue._held) == 1
    assert await peek.fetchval("SELECT claimed_by IS NOT NULL FROM requests")


async def test_a_worker_that_leaves_frees_what_it_had_queued(store: Store) -> None:
    await store.jobs.submit(new_job())
    (first,) = await claim(store, 1)
    await store.queue.leave()
    (second,) = await claim(store, 1)
    assert second.request_id == first.request_id
    with pytest.raises(ClaimLost):
        await store.queue.running(first, model="m", fence=(1, 1), queue_ms=0)


async def test_claims_that_a_cancelled_caller_never_saw_are_given_back(store: Store) -> None:
    await store.jobs.submit(new_job())
    await store.queue.heartbeat()
    for turns in range(1, 60):
        claiming = asyncio.create_task(claim(store, 1))
        for _ in range(turns):
            await asyncio.sleep(0)
        claiming.cancel()
        outcome = (await asyncio.gather(claiming, return_exceptions=True))[0]
        if isinstance(outcome, list):
            await store.queue.release(outcome)

    async def back() -> list[ClaimedJob]:
        await store.queue.heartbeat()
        return await claim(store, 1)

    (job,) = await wait_until(back)
    assert len(store.queue._held) == 1
    await store.queue.running(job, model="m", fence=(1, 1), queue_ms=0)


@pytest.fixture
async def long_queue(peek: asyncpg.Connection) -> asyncpg.Connection:
    """100,000 queued jobs of one tenant, 2,000 of ten others, and as many that have ended."""
    await peek.execute(FILL, "greedy", 100_000)
    for number in range(10):
        await peek.execute(FILL, f"t{number}", 200)
    await peek.execute(FILL, "done", 20_000)
    await peek.execute(
        "UPDATE requests SET status = 'succeeded', finished_at = created_at "
        "WHERE tenant_id = 'done'"
    )
    await peek.execute("ANALYZE requests")
    return peek


async def test_no_hot_statement_scans_the_queue(
    long_queue: asyncpg.Connection, store: Store
) -> None:
    some = await long_queue.fetchrow("SELECT id FROM requests OFFSET 50000 LIMIT 1")
    one = orjson.dumps([{"id": str(some["id"]), "claim": 0, "status": "queued"}]).decode()
    queue = {"n": 0, "tenant_id": "greedy", "priority": 0, "since": LISTED[1], "early": []}
    queues = orjson.dumps([queue]).decode()
    hot: dict[str, list[object]] = {
        "claim": ["gemini", "text_only", 16, "w", queues],
        "came": ["gemini", "text_only", 2**40, 2**62, [1, 2, 3], 20.0],
        "ripen": [1e9],
        "get_request": [some["id"], "greedy"],
        "get_place": [some["id"]],
        "get_request_files": [some["id"]],
        "get_versions": [[some["id"]]],
        "begin_running": [one, "w", now()],
        "end_requests": [one],
        "retry_requests": [one],
        "already_written": [one],
        "release_claims": [one],
        "release_strays": ["w", []],
        "leave": ["w"],
        "silent_workers": [1000.0],
        "unknown_holders": [1000.0],
        "lock_lapsed": [["w", "w-2"], 1000.0],
        "retake": [[some["id"]], 3, "{}"],
        "expire_due": ["{}", 1e9],
        "pulse": [DEFAULT_POOL, 2**40, [*Kind], [1, 2]],
        "requeue_dead": [some["id"]],
        "count_stuck": [1_000, 1000.0],
        "list_dead": [100],
        "discard_dead": [some["id"]],
        "cancel_queued": [some["id"], "{}"],
        "cancelled_of_worker": ["w", [some["id"]]],
        "cancel_returned": ["{}"],
        "list_requests": [*LISTED, None, None, None, None, 51, 51, None, None],
        "list_reach": [*LISTED, 20_000],
        "depth_of_queues": [200, 10_000],
        "depth_of_jobs": [10_000],
        "prune_candidates": [now() - timedelta(days=30), 500, ["kept-longer"], LISTED[1]],
        "running_calls": ["gemini"],
    }
    pages: int = await long_queue.fetchval("SELECT pg_relation_size('requests') / 8192")
    await long_queue.execute("SET enable_seqscan = off")  # as in every transaction of a process
    for name, arguments in hot.items():
        found = [await plan(long_queue, name, *arguments, options=READS)]
        if sql(name) in PREPARED:
            found.append(await plan_for_any(long_queue, name, *arguments, options=READS))
        for one in found:
            assert "Seq Scan on requests" not in one, f"{name}:\n{one}"
            most = 2 * _MOST_AHEAD if name == "get_place" else pages / 2
            assert pages_read(one) < most, f"{name}:\n{one}"
    await claim(store, 1)
    await wait_until(lambda: swept(store), 60)  # on a busy machine one claim has no time for it
    jobs = await claim(store, 11)
    assert len({job.tenant_id for job in jobs}) == 11


async def swept(store: Store) -> bool:
    await store.queue.maintain()
    return store.queue._queues.lanes[DEFAULT_POOL, "text_only"].ready.is_swept
