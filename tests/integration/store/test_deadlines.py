"""Claims by deadline: a job with a near deadline does not wait behind its tenant's backlog."""

from __future__ import annotations

import asyncio
import random
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from tests.integration.store.conftest import MakeStore
from tests.integration.store.jobs import new_job, now
from tidegate.call import DEFAULT_POOL, Kind
from tidegate.store import queue
from tidegate.store.records import ClaimedJob
from tidegate.store.requests import JobsAhead
from tidegate.store.store import Store

MINUTE = timedelta(minutes=1)
BACKLOG = """
    INSERT INTO requests (id, tenant_id, pool, source, status, kind, classified_by,
        classified_reason, prompt, created_at, priority, deadline_at)
    SELECT gen_random_uuid(), $1, 'gemini', 'job', 'queued', 'text_only', 'rules', '', 'p',
        now() - $3 * interval '1 second' + n * interval '1 ms', $4,
        now() - $3 * interval '1 second' + n * interval '1 ms' + $5 * interval '1 second'
    FROM generate_series(1, $2) AS n
"""


async def add_backlog(
    peek: asyncpg.Connection,
    jobs: int,
    *,
    tenant: str = "acme",
    age_s: float = 60,
    priority: int = 0,
    given_s: float | None = None,
) -> None:
    """Queue so many jobs, made `age_s` ago, with `given_s` until their deadlines if any."""
    await peek.execute(BACKLOG, tenant, jobs, age_s, priority, given_s)


async def submit(
    store: Store,
    *,
    due: timedelta | None = MINUTE,
    tenant: str = "acme",
    priority: int = 0,
    key_id: str | None = None,
) -> UUID:
    made_at = now()
    due_at = None if due is None else made_at + due
    of: dict[str, Any] = {"tenant_id": tenant, "priority": priority, "key_id": key_id}
    job = new_job(created_at=made_at, deadline_at=due_at, **of)
    await store.jobs.submit(job)
    return job.request_id


async def claim(store: Store, limit: int = 1) -> list[ClaimedJob]:
    return await store.queue.claim(DEFAULT_POOL, Kind.TEXT_ONLY, limit)


async def ids(store: Store, limit: int = 1) -> list[UUID]:
    return [job.request_id for job in await claim(store, limit)]


@pytest.fixture
async def worker(make_store: MakeStore, database_url: str) -> Store:
    return await make_store(database_url, claim_lease_ms=60_000)


async def test_a_job_with_a_near_deadline_is_claimed_before_the_backlog(
    worker: Store, peek: asyncpg.Connection
) -> None:
    await add_backlog(peek, 5_000)
    assert len(await claim(worker, 4)) == 4
    later, sooner = await submit(worker, due=2 * MINUTE), await submit(worker, due=MINUTE)
    first = await claim(worker, 3)
    assert [job.request_id for job in first[:2]] == [sooner, later]
    assert first[2].deadline_at is None
    await submit(worker, due=30 * MINUTE)  # later than the backlog, which counts as due in 10 min
    assert [job.deadline_at for job in await claim(worker, 16)] == [None] * 16


async def test_a_job_that_waited_for_ten_minutes_is_claimed_before_near_deadlines(
    worker: Store, peek: asyncpg.Connection
) -> None:
    await add_backlog(peek, 200, age_s=3_600)
    urgent = {await submit(worker) for _ in range(100)}
    assert urgent.isdisjoint(await ids(worker, 200))
    assert set(await ids(worker, 200)) == urgent


async def test_deadlines_change_neither_turns_of_tenants_nor_priorities(
    worker: Store, peek: asyncpg.Connection
) -> None:
    await add_backlog(peek, 500, tenant="greedy")
    await add_backlog(peek, 500, tenant="modest")
    await add_backlog(peek, 20, tenant="greedy", priority=5)
    assert len(await claim(worker, 2)) == 2
    urgent = [await submit(worker, tenant="greedy") for _ in range(40)]
    claimed = [job for _ in range(20) for job in await claim(worker, 2)]
    assert [job.tenant_id for job in claimed].count("greedy") == 20
    of_greedy = [job for job in claimed if job.tenant_id == "greedy"]
    assert [job.priority for job in of_greedy] == [5] * 19 + [0]
    assert of_greedy[-1].request_id == urgent[0]


async def test_two_workers_that_know_of_a_job_claim_it_once(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    await add_backlog(peek, 2_000)
    stores = [await make_store(database_url, claim_lease_ms=60_000) for _ in range(2)]
    for store in stores:
        await claim(store)
    for _ in range(5):
        urgent = {await submit(stores[0]) for _ in range(6)}
        taken = await asyncio.gather(*(ids(store, 4) for store in stores))
        both = [one for some in taken for one in some]
        left = urgent.difference(both)  # the loser of a race for the same rows takes others
        both += await ids(stores[0], len(left) or 1) + await ids(stores[1])
        assert urgent <= set(both)
        assert len(set(both)) == len(both)
    known = stores[1].queue._queues.lanes[DEFAULT_POOL, "text_only"].ready
    await ids(stores[1], 64)
    assert len(known.turns(["acme"], 64)[0].early) < 64, "what others have claimed is forgotten"


@pytest.mark.parametrize("quick_s", [queue._QUICK_S, 0.0])
async def test_a_worker_that_starts_finds_deadlines_behind_a_backlog(
    make_store: MakeStore,
    database_url: str,
    peek: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    quick_s: float,
) -> None:
    first, second = [await make_store(database_url, claim_lease_ms=60_000) for _ in range(2)]
    await add_backlog(peek, 3_000)
    urgent = [await submit(first, due=(5 + n) * MINUTE / 4) for n in range(20)]
    await add_backlog(peek, 1_000, age_s=-1)
    monkeypatch.setattr(queue, "_QUICK_S", quick_s)  # 0: every step counts as slow
    assert await ids(second, 8) == urgent[:8]
    assert (await ids(second, 16))[:12] == urgent[8:]


async def test_more_deadlines_than_are_remembered_are_claimed_in_their_order(
    worker: Store, peek: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "_HURRIED_SWEEP_S", 0.0)
    monkeypatch.setattr(queue, "_SWEEP_SHARE", 0)
    await add_backlog(peek, 2_000)
    await claim(worker)
    await add_backlog(peek, 1_000, age_s=0, given_s=120)
    claimed: list[ClaimedJob] = []
    for _ in range(40):
        claimed += await claim(worker, 25)
        await worker.queue.maintain()
    due_at = [job.deadline_at for job in claimed]
    assert None not in due_at
    assert due_at == sorted(due_at, key=lambda at: at or datetime.min)
    assert [job.deadline_at for job in await claim(worker, 25)] == [None] * 25


async def test_a_job_with_a_deadline_that_comes_back_is_claimed_first_again(
    worker: Store, peek: asyncpg.Connection
) -> None:
    await add_backlog(peek, 2_000)
    await claim(worker)
    urgent = [await submit(worker, due=(2 + n) * MINUTE / 2) for n in range(4)]
    held = await claim(worker, 4)
    assert [job.request_id for job in held] == urgent
    await worker.queue.release(held[::-1])
    assert await ids(worker, 4) == urgent


async def test_random_deadlines_are_claimed_in_order_and_none_is_stranded(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    dice = random.Random(11)
    stores = [await make_store(database_url, claim_lease_ms=60_000) for _ in range(3)]
    await add_backlog(peek, 300)
    await add_backlog(peek, 50, given_s=86_400)
    submitted = 350
    held: list[tuple[Store, ClaimedJob]] = []
    taken: list[ClaimedJob] = []
    for _ in range(200):
        store = dice.choice(stores)
        if dice.random() < 0.5:
            seconds = dice.choice([None, 30, 60, 300, 3_600])
            due = None if seconds is None else timedelta(seconds=seconds)
            await submit(store, due=due, priority=dice.choice([0, 0, 5]))
            submitted += 1
        elif held and dice.random() < 0.4:
            holder, job = held.pop(dice.randrange(len(held)))
            await holder.queue.release([job])
        else:
            held += [(store, job) for job in await claim(store, dice.randint(1, 4))]
    while jobs := await claim(dice.choice(stores), 64):
        taken += jobs
    in_all = [job.request_id for job in (*taken, *(job for _, job in held))]
    assert len(in_all) == len(set(in_all)) == submitted
    assert await peek.fetchval("SELECT count(*) FROM requests WHERE claimed_by IS NULL") == 0


async def test_a_few_jobs_that_were_overtaken_are_claimed_without_a_search(
    worker: Store, peek: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search would pass the index entries of all jobs that were claimed before them."""
    monkeypatch.setattr(queue, "_HURRIED_SWEEP_S", 0.0)
    monkeypatch.setattr(queue, "_SWEEP_SHARE", 0)
    await add_backlog(peek, 100)
    assert len(await claim(worker, 64) + await claim(worker, 28)) == 92
    await add_backlog(peek, 600, age_s=30, given_s=60)
    for _ in range(10):
        assert len(await claim(worker, 60)) == 60
        await worker.queue.maintain()
    left = await peek.fetch("SELECT id FROM requests WHERE claimed_by IS NULL ORDER BY created_at")
    assert len(left) == 8
    assert await ids(worker) == [left[0]["id"]]
    ready = worker.queue._queues.lanes[DEFAULT_POOL, "text_only"].ready
    (turn,) = ready.turns(["acme"], 16)
    assert turn.since is None
    assert list(turn.early) == [row["id"] for row in left[1:]]
    assert await ids(worker, 16) == list(turn.early)


async def test_a_claim_that_passes_over_callers_takes_the_earliest_deadlines_of_others(
    worker: Store, peek: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "_SEARCHED", 9)
    await add_backlog(peek, 300)
    await peek.execute(
        "UPDATE requests SET key_id = CASE WHEN random() < 0.5 THEN 'k' ELSE 'l' END"
    )
    assert len(await claim(worker, 2)) == 2
    urgent = [
        await submit(worker, due=due, key_id=key)
        for due, key in ((MINUTE, "k"), (2 * MINUTE, "l"), (MINUTE, "l"))
    ]
    without = {"acme": frozenset({("key", "k")})}
    first = await worker.queue.claim(DEFAULT_POOL, Kind.TEXT_ONLY, 4, without)
    assert [job.request_id for job in first[:2]] == [urgent[2], urgent[1]]
    assert {job.key_id for job in first} == {"l"}
    assert await ids(worker) == [urgent[0]]


async def test_the_jobs_ahead_are_counted_in_the_order_of_claims(
    worker: Store, peek: asyncpg.Connection
) -> None:
    usual = [await submit(worker, due=None) for _ in range(5)]
    await submit(worker, due=MINUTE, priority=5)
    await submit(worker, due=MINUTE, tenant="other")
    urgent = [await submit(worker, due=due) for due in (2 * MINUTE, MINUTE)]
    expected = {usual[0]: 3, usual[4]: 7, urgent[0]: 2, urgent[1]: 1}
    for request_id, count in expected.items():
        assert await worker.running_calls.ahead(request_id) == JobsAhead(count, 0)
    of_acme = [job for job in await claim(worker, 9) if job.tenant_id == "acme"]
    order = [job.request_id for job in of_acme]
    assert {one: order.index(one) for one in expected} == expected
