"""Submits under an idempotency key: one job for each, whoever comes first."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from tests.integration.store.conftest import MakeStore
from tests.integration.store.jobs import new_job, now, unadmitted, upload
from tidegate.call import DEFAULT_POOL, Kind, Status, new_id
from tidegate.errors import IdempotencyConflict
from tidegate.record import Failure
from tidegate.store.records import Earlier, Idempotency, NewJob
from tidegate.store.store import Store

SAME, OTHER = "a" * 64, "b" * 64


def keyed(key: str, digest: str = SAME, **overrides: Any) -> NewJob:
    return new_job(once=Idempotency(key, digest), **overrides)


async def test_the_same_key_and_request_gives_the_first_one_and_records_nothing_else(
    store: Store, peek: asyncpg.Connection
) -> None:
    first = keyed("k", attachments=(upload(),))
    assert await store.jobs.submit(first) is None
    again = await store.jobs.submit(keyed("k", attachments=(upload(),)))
    assert again == Earlier(first.request_id, Status.QUEUED, first.classification)
    assert await peek.fetchval("SELECT count(*) FROM requests") == 1
    files = await peek.fetch("SELECT id FROM files")
    assert [row["id"] for row in files] == [first.attachments[0].file_id]


async def test_the_same_key_with_another_request_is_a_conflict(store: Store) -> None:
    await store.jobs.submit(keyed("k"))
    with pytest.raises(IdempotencyConflict):
        await store.jobs.submit(keyed("k", OTHER))


async def test_a_key_belongs_to_its_tenant(store: Store) -> None:
    await store.jobs.submit(keyed("k"))
    assert await store.jobs.submit(keyed("k", OTHER, tenant_id="acme")) is None


async def test_a_conflict_harms_no_other_job_of_its_batch(
    store: Store, peek: asyncpg.Connection
) -> None:
    first = keyed("k")
    await store.jobs.submit(first)
    plain = [new_job(attachments=(upload(),)) for _ in range(3)]
    fresh, again, wrong = keyed("new"), keyed("k"), keyed("k", OTHER, attachments=(upload(),))
    batch = [plain[0], again, plain[1], wrong, fresh, plain[2]]
    outcomes = await asyncio.gather(
        *(store.jobs.submit(job) for job in batch), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [
        *(type(None), Earlier, type(None), IdempotencyConflict, type(None), type(None)),
    ]
    found = {row["id"] for row in await peek.fetch("SELECT id FROM requests")}
    assert found == {job.request_id for job in (first, fresh, *plain)}
    assert await peek.fetchval("SELECT count(*) FROM files") == 3


async def test_a_repeat_of_a_submit_whose_reply_was_lost_is_no_replay(store: Store) -> None:
    job = keyed("k", attachments=(upload(),))
    assert await store.jobs.submit(job) is None
    assert await store.jobs.submit(job) is None


async def test_a_hundred_at_once_over_two_processes_are_one_job(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    stores = [await make_store(database_url) for _ in range(2)]
    # In opposite orders: whoever locks in the order of arrival waits in a circle.
    keys = [f"k{number}" for number in range(10)]
    jobs = [
        [keyed(key) for key in order for _ in range(50)] for order in (keys, list(reversed(keys)))
    ]
    outcomes = await asyncio.gather(
        *(store.jobs.submit(job) for store, own in zip(stores, jobs, strict=True) for job in own)
    )
    ids: dict[str, set[object]] = {key: set() for key in keys}
    for job, outcome in zip([*jobs[0], *jobs[1]], outcomes, strict=True):
        assert job.once is not None
        ids[job.once.key].add(outcome.request_id if outcome else job.request_id)
    assert [len(found) for found in ids.values()] == [1] * 10
    assert sum(outcome is None for outcome in outcomes) == 10
    assert await peek.fetchval("SELECT count(*) FROM requests") == 10


async def test_a_key_lives_as_long_as_its_request(store: Store, peek: asyncpg.Connection) -> None:
    await store.jobs.submit(keyed("k"))
    (job,) = await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1)
    await store.queue.fail_unadmitted(job, unadmitted(Status.FAILED, Failure("internal", "x")))
    again = await store.jobs.submit(keyed("k"))
    assert again is not None
    assert again.status is Status.FAILED
    await peek.execute("UPDATE requests SET finished_at = $1", now() - timedelta(days=40))
    await store.retention.prune(30)
    fresh = replace(keyed("k", OTHER), request_id=new_id())
    assert await store.jobs.submit(fresh) is None


async def test_a_submit_without_a_key_costs_no_look_at_keys(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tidegate.store import jobs as submits

    async def never(*_given: object) -> object:
        raise AssertionError("looked for keys")

    monkeypatch.setattr(submits, "_find", never)
    assert await store.jobs.submit(new_job()) is None
