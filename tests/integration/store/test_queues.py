"""No job is stranded: by whatever way it comes back, a worker that has read past it finds it.

Nothing here calls `tend_queues`, which looks again at all: what is found is found by the claim.
"""

from __future__ import annotations

import random
import re
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest

from tests.integration.store.conftest import MakeStore
from tests.integration.store.jobs import (
    TEXT,
    UNSURE,
    beat,
    new_job,
    now,
    plan,
    plan_for_any,
    result,
)
from tests.integration.store.test_claims import FILL
from tests.waiting import wait_until
from tidegate.call import DEFAULT_POOL, Kind
from tidegate.store import queue
from tidegate.store.database import PREPARED, Begin, sql
from tidegate.store.queue import Callers
from tidegate.store.records import ClaimedJob, NewJob
from tidegate.store.store import Store

Way = Callable[[Store, asyncpg.Connection, ClaimedJob], Awaitable[object]]
WAITS = "SELECT not_before IS NOT NULL FROM requests WHERE id = $1"
DEAD = "UPDATE requests SET status = 'dead', claimed_by = NULL, finished_at = now() WHERE id = $1"


async def claim(
    store: Store, limit: int = 10, without: Mapping[str, Callers] | None = None
) -> list[ClaimedJob]:
    return await store.queue.claim(DEFAULT_POOL, Kind.TEXT_ONLY, limit, without)


async def ids(store: Store, limit: int = 10) -> list[UUID]:
    return [job.request_id for job in await claim(store, limit)]


def old_job(**overrides: Any) -> NewJob:
    return new_job(created_at=now() - timedelta(hours=1), **overrides)


async def hand_back(holder: Store, _peek: asyncpg.Connection, job: ClaimedJob) -> None:
    await holder.queue.release([job])


async def bring_back(holder: Store, peek: asyncpg.Connection, job: ClaimedJob) -> None:
    await holder.queue.release([job], {job.request_id: 3_600_000})
    await holder.queue.bring_back({job.request_id: job.claim})
    assert await peek.fetchval(WAITS, job.request_id), "it was put off since that claim"
    await holder.queue.bring_back({job.request_id: job.claim + 1})


async def retry(holder: Store, _peek: asyncpg.Connection, job: ClaimedJob) -> None:
    await holder.queue.running(job, model="m", fence=(1, 1), queue_ms=0)
    await holder.queue.retry(job, result(), now() - timedelta(milliseconds=1))


async def leave(holder: Store, _peek: asyncpg.Connection, _job: ClaimedJob) -> None:
    await holder.queue.leave()


async def lapse(holder: Store, peek: asyncpg.Connection, _job: ClaimedJob) -> None:
    await peek.execute(
        "UPDATE workers SET seen_at = now() - interval '1 hour' WHERE instance_id = $1",
        holder.instance_id,
    )


async def forgotten(holder: Store, peek: asyncpg.Connection, _job: ClaimedJob) -> None:
    await peek.execute("DELETE FROM workers WHERE instance_id = $1", holder.instance_id)


async def stray(holder: Store, _peek: asyncpg.Connection, job: ClaimedJob) -> None:
    holder.queue.settled(job)
    holder.queue._doubtful = True
    await holder.queue.heartbeat()


async def requeue(holder: Store, peek: asyncpg.Connection, job: ClaimedJob) -> None:
    await peek.execute(DEAD, job.request_id)
    await holder.stuck.requeue(job.request_id)


async def by_hand(_holder: Store, peek: asyncpg.Connection, job: ClaimedJob) -> None:
    """As the version before this one does it too, which knows nothing of `ready_xid`."""
    await peek.execute(
        "UPDATE requests SET claimed_by = NULL, claim = claim + 1 WHERE id = $1", job.request_id
    )


@pytest.mark.parametrize(
    "way", [hand_back, bring_back, retry, leave, lapse, forgotten, stray, requeue, by_hand]
)
async def test_a_job_that_comes_back_is_found_behind_where_a_worker_has_read(
    way: Way, make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    is_judged = way in (lapse, forgotten)
    worker = await make_store(database_url, claim_lease_ms=1_500 if is_judged else 60_000)
    holder = await make_store(database_url, claim_lease_ms=60_000)
    job = old_job()
    await worker.jobs.submit(job)
    (held,) = await claim(holder)
    later = [new_job() for _ in range(2)]
    for one in later:
        await worker.jobs.submit(one)
    assert await ids(worker, 1) == [later[0].request_id]
    await way(holder, peek, held)

    async def found() -> list[UUID]:
        if is_judged:
            await beat(worker)
            await worker.queue.retake_expired()
        return [found for found in await ids(worker) if found != later[1].request_id]

    assert await wait_until(found, 60) == [job.request_id]


async def test_an_unsure_job_is_found_under_its_kind(store: Store) -> None:
    await store.jobs.submit(new_job())
    await claim(store)
    job = old_job(classification=UNSURE)
    await store.jobs.submit(job)
    assert await ids(store) == []
    (unsure,) = await store.queue.claim(pool=DEFAULT_POOL, kind=None, limit=9)
    await store.queue.classified(unsure, TEXT)
    await store.queue.release([unsure])
    assert await ids(store) == [job.request_id]


async def test_jobs_that_come_back_keep_their_place(store: Store) -> None:
    jobs = [new_job(created_at=now() - timedelta(minutes=9 - n)) for n in range(6)]
    for job in jobs:
        await store.jobs.submit(job)
    first = await claim(store, 2)
    await store.queue.release(first[::-1])
    assert await ids(store, 6) == [job.request_id for job in jobs]


async def test_a_worker_looks_at_an_empty_queue_in_one_round_trip(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins: list[str] = []
    run = store.connections.run

    async def counted(work: Any, *, begin: Begin = "always", **named: Any) -> Any:
        begins.append(begin)
        return await run(work, begin=begin, **named)

    await claim(store)
    monkeypatch.setattr(store.connections, "run", counted)
    assert (await ids(store), begins) == ([], ["if needed"])
    job = new_job()
    await store.jobs.submit(job)
    store.notifications.wake_all()
    begins.clear()
    assert (await ids(store), begins) == ([job.request_id], ["always"])


@pytest.mark.parametrize("is_put_off", [False, True])
async def test_a_job_is_found_without_its_notification(
    is_put_off: bool, make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    worker, other = [await make_store(database_url, claim_lease_ms=3_000) for _ in range(2)]
    assert await ids(worker) == await ids(worker) == []
    job = new_job()
    await other.jobs.submit(job)
    if is_put_off:
        (held,) = await claim(other)
        await other.queue.release([held], {job.request_id: 3_600_000})
        assert await ids(worker) == []
        await peek.execute("UPDATE requests SET not_before = now() WHERE id = $1", job.request_id)
    assert await wait_until(lambda: ids(worker)) == [job.request_id]


async def test_a_commit_that_is_late_is_found_beside_a_transaction_that_never_ends(
    store: Store, peek: asyncpg.Connection, database_url: str
) -> None:
    await store.jobs.submit(new_job())
    idle = await asyncpg.connect(database_url)
    await idle.execute("BEGIN; SELECT pg_current_xact_id()")
    await peek.execute("BEGIN")
    late = await peek.fetchval(
        "INSERT INTO requests (id, pool, source, status, kind, classified_by, classified_reason, "
        "prompt, created_at) VALUES (gen_random_uuid(), 'gemini', 'job', 'queued', 'text_only', "
        "'rules', '', 'p', now() - interval '1 minute') RETURNING id"
    )
    assert len(await ids(store)) == 1
    for _ in range(3):
        await store.jobs.submit(new_job())
        assert len(await ids(store)) == 1
    await peek.execute("COMMIT")
    assert await ids(store) == [late]
    assert await ids(store) == []
    await idle.close()


async def known_read(store: Store) -> None:
    """Have it read what came, as `tend_queues` does."""
    queues, lane = store.queue._queues, (DEFAULT_POOL, "text_only")
    await queues._read(lane, queues.lanes[lane])


async def test_more_than_are_remembered_by_name_come_back(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    worker, other = [await make_store(database_url, claim_lease_ms=60_000) for _ in range(2)]
    await peek.execute(FILL, "a", 400)
    held = await claim(other, 400)
    await worker.jobs.submit(new_job())
    assert len(await ids(worker)) == 1
    for start in range(0, 400, 50):  # each few enough to be named, in all too many
        await other.queue.release(held[start : start + 50])
        await known_read(worker)
    found = await ids(worker, 150) + await ids(worker, 150) + await ids(worker, 150)
    assert found == [job.request_id for job in held]


async def test_a_worker_that_starts_finds_what_was_there_in_steps_of_any_length(
    make_store: MakeStore, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = [await make_store(database_url, claim_lease_ms=60_000) for _ in range(2)]
    jobs = [new_job() for _ in range(6)]
    for job in jobs:
        await first.jobs.submit(job)
    monkeypatch.setattr("tidegate.store.queue._QUICK_S", 0.0)  # every step counts as slow
    assert await ids(second, 4) == [job.request_id for job in jobs[:4]]
    assert await ids(first) == [job.request_id for job in jobs[4:]]


async def test_what_the_first_claim_had_no_time_for_ends_the_wait_for_work_once_it_is_found(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job()
    await store.jobs.submit(job)
    await store.notifications.aclose()  # its own hints are sent
    with monkeypatch.context() as slow:
        slow.setattr(queue, "_MOST_SWEEP_S", 0.0)
        mark = store.notifications.work_mark("text_only")
        assert await ids(store) == []
    await store.queue.maintain()
    assert store.notifications.work_mark("text_only") != mark
    assert await ids(store) == [job.request_id]
    mark = store.notifications.work_mark("text_only")
    await store.queue.maintain()
    assert store.notifications.work_mark("text_only") == mark


async def test_what_a_worker_has_overlooked_is_found_when_it_looks_again(store: Store) -> None:
    await store.jobs.submit(new_job())
    await claim(store)
    job = new_job()
    await store.jobs.submit(job)
    known = store.queue._queues.lanes[DEFAULT_POOL, "text_only"]
    known.ready._xmax = 2**40  # as after a server that had come farther
    assert await ids(store) == []
    await store.queue.maintain()
    assert await ids(store) == [job.request_id]
    other = new_job()
    await store.jobs.submit(other)
    await known_read(store)
    known.ready._queues.clear()
    known.ready._tenants.clear()
    known.swept_at = -1e9
    await store.queue.maintain()
    assert await ids(store) == [other.request_id]


async def test_a_claim_passes_over_some_callers_however_many_jobs_they_have(
    make_store: MakeStore, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "_SEARCHED", 9)
    one, other = [await make_store(database_url, claim_lease_ms=60_000) for _ in range(2)]
    passed: list[NewJob] = []
    for given in ({"key_id": "k"}, {"subject": "ann"}, {"conversation": "talk"}):
        for _ in range(100):
            passed.append(new_job(tenant_id="acme", **given))
            await one.jobs.submit(passed[-1])
    wanted = [
        await one.jobs.submit(new_job(tenant_id="acme", **given))
        for given in ({}, {"key_id": "l"}, {"subject": "bob", "key_id": "l"})
    ]
    callers = frozenset({("key", "k"), ("user", "ann"), ("conversation", "talk")})
    found: list[UUID] = []

    async def all_found() -> bool:
        found.extend(job.request_id for job in await claim(one, 10, {"acme": callers}))
        return len(found) >= len(wanted)

    await wait_until(all_found, 20, "the jobs behind them")
    assert len(found) == len(wanted)
    searches, find = 0, queue._of_others

    async def counted(*given: Any) -> Any:
        nonlocal searches
        searches += 1
        return await find(*given)

    with monkeypatch.context() as patch:
        patch.setattr(queue, "_of_others", counted)
        assert await claim(one, 10, {"acme": callers}) == []
    assert searches == 1, "nothing is searched again that was passed over a moment ago"
    (back,) = await claim(other, 1)
    assert back.request_id == passed[0].request_id
    assert len(await claim(one, 400)) == len(passed) - 1
    assert await claim(other, 10) == []


async def test_a_claim_that_passes_over_callers_leaves_none_behind_the_oldest(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "_SEARCHED", 9)
    wanted: list[UUID] = []
    for number in range(90):
        is_wanted = number < 5 or 66 <= number < 69
        job = new_job(tenant_id="acme", key_id="l" if is_wanted else "k")
        await store.jobs.submit(job)
        wanted += [job.request_id] * is_wanted
    found: list[UUID] = []
    for _ in range(6):
        jobs = await claim(store, 2, {"acme": frozenset({("key", "k")})})
        found += [job.request_id for job in jobs]
    assert found == wanted


async def test_random_moves_of_three_workers_strand_no_job(
    make_store: MakeStore,
    database_url: str,
    peek: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queue, "_SEARCHED", 3)
    dice = random.Random(7)
    stores = [await make_store(database_url, claim_lease_ms=60_000) for _ in range(3)]
    held: list[tuple[Store, ClaimedJob]] = []
    ended: list[UUID] = []
    submitted = 0
    for _ in range(240):
        store, move = dice.choice(stores), dice.random()
        if move < 0.35:
            tenant, priority = dice.choice("abc"), dice.choice([0, 0, 5])
            made_at = now() - timedelta(seconds=dice.choice([0, 0, 60]))
            await store.jobs.submit(
                new_job(
                    tenant_id=tenant,
                    priority=priority,
                    created_at=made_at,
                    key_id=dice.choice("xyz"),
                )
            )
            submitted += 1
        elif move < 0.5:
            held += [(store, job) for job in await claim(store, dice.randint(1, 4))]
        elif move < 0.65:
            keys = {"a": {dice.choice("xyz")}, "b": {"x", "y"}}
            without = {one: frozenset(("key", key) for key in own) for one, own in keys.items()}
            taken = await claim(store, dice.randint(1, 4), without)
            assert not any(job.key_id in keys.get(job.tenant_id, ()) for job in taken)
            held += [(store, job) for job in taken]
        elif held:
            holder, job = held.pop(dice.randrange(len(held)))
            if move < 0.8:
                await holder.queue.release([job])
            elif move < 0.9:
                await retry(holder, peek, job)
            else:
                await holder.queue.finish(job, result())
                ended.append(job.request_id)
    while jobs := await claim(dice.choice(stores)):
        held += [(stores[0], job) for job in jobs]
    in_all = [*ended, *(job.request_id for _, job in held)]
    assert len(in_all) == len(set(in_all)) == submitted
    assert await peek.fetchval("SELECT count(*) FROM requests WHERE claimed_by IS NULL") == len(
        ended
    )


CHURN = (
    "UPDATE requests SET claimed_by = 'w', not_before = now() - interval '1 hour'",
    "UPDATE requests SET not_before = NULL, cancel_asked_at = now()",
    "UPDATE requests SET status = 'running'",
    "UPDATE requests SET status = 'succeeded', finished_at = now(), claimed_by = NULL",
    "ANALYZE requests",
)


async def test_nothing_hot_walks_past_what_an_old_snapshot_keeps(
    peek: asyncpg.Connection, database_url: str
) -> None:
    old = await asyncpg.connect(database_url)
    await old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM workers")
    await peek.execute(FILL, "a", 5_000)
    for step in CHURN:
        await peek.execute(step)
    await peek.execute(FILL, "a", 1)
    job = await peek.fetchrow("SELECT id, ready_xid FROM requests WHERE status = 'queued'")
    one = orjson.dumps([{"id": str(job["id"]), "claim": 0, "status": "queued"}]).decode()
    turn = {"n": 0, "tenant_id": "a", "priority": 0, "since": now(), "early": [str(job["id"])]}
    lane = ["gemini", "text_only"]
    hot: dict[str, list[object]] = {
        "came": [*lane, job["ready_xid"], 2**62, [1, 2], 20.0],
        "claim": [*lane, 16, "w", orjson.dumps([turn]).decode()],
        "find_others": [*lane, "a", 0, now(), UUID(int=0), [job["id"]], ["k"], [], [], 16, 5_000],
        "ripen": [20.0],
        "expire_due": ["{}", 20.0],
        "set_classified": [job["id"], 0, "text_only", "rules", ""],
        "begin_running": [one, "w", now()],
        "end_requests": [one],
        "retry_requests": [one],
        "release_claims": [one],
        "cancel_queued": [job["id"], "{}"],
        "get_versions": [[job["id"]]],
        "silent_workers": [1000.0],
    }
    await peek.execute("SET enable_seqscan = off; SET jit = off")
    for name, arguments in hot.items():
        found = [await plan(peek, name, *arguments, options="ANALYZE, BUFFERS")]
        if sql(name) in PREPARED:
            found.append(await plan_for_any(peek, name, *arguments, options="ANALYZE, BUFFERS"))
        for one in found:
            read = next(line for line in one.splitlines() if "Buffers: " in line)
            pages = sum(int(count) for count in re.findall(r"(?:hit|read)=(\d+)", read))
            assert 0 < pages < 100, f"{name}: {pages} pages\n{one}"
    await old.close()
