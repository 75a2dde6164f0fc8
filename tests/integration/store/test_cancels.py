"""Ending a job for its owner, whatever becomes of the worker that has it."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID

import asyncpg
import pytest

from tests.integration.store.conftest import MakeStore
from tests.integration.store.jobs import new_job, now, result, unadmitted
from tests.waiting import wait_until
from tidegate.call import DEFAULT_POOL, Kind, Status, new_id
from tidegate.errors import AlreadyEnded, ClaimLost, NotFound
from tidegate.record import Failure
from tidegate.store.records import ClaimedJob
from tidegate.store.store import Store


async def claim_one(store: Store) -> ClaimedJob:
    (job,) = await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1)
    return job


async def run_one(store: Store) -> ClaimedJob:
    await store.jobs.submit(new_job())
    job = await claim_one(store)
    await store.queue.running(job, model="m", fence=(1, 1), queue_ms=0)
    return job


async def status_of(store: Store, request_id: UUID) -> Status:
    return (await store.requests.get(request_id, "default")).status


async def test_a_queued_job_is_cancelled_at_once_and_on_record(
    store: Store, peek: asyncpg.Connection
) -> None:
    job = new_job("A prompt to keep")
    await store.jobs.submit(job)
    assert await store.jobs.cancel(job.request_id, "default") is Status.QUEUED
    record = await store.requests.get(job.request_id, "default")
    assert (record.status, record.attempts) == (Status.CANCELLED, 0)
    assert record.failure is not None
    assert (record.failure.code, record.finished_at is not None) == ("cancelled", True)
    audits = await peek.fetch("SELECT status FROM audit")
    assert [row["status"] for row in audits] == ["cancelled"]
    assert await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1) == []
    assert await store.jobs.cancel(job.request_id, "default") is Status.CANCELLED
    assert await peek.fetchval("SELECT count(*) FROM audit") == 1


async def test_whoever_had_claimed_a_cancelled_job_can_write_no_more(store: Store) -> None:
    await store.jobs.submit(new_job())
    job = await claim_one(store)
    assert await store.jobs.cancel(job.request_id, "default") is Status.QUEUED
    for attempt in (
        store.queue.running(job, model="m", fence=(1, 1), queue_ms=0),
        store.queue.finish(job, result("stale")),
        store.queue.fail_unadmitted(job, unadmitted(Status.FAILED, Failure("internal", "x"))),
    ):
        with pytest.raises(ClaimLost):
            await attempt
    await store.queue.release([job])
    assert await status_of(store, job.request_id) is Status.CANCELLED


async def test_unknown_others_and_ended_requests_are_not_cancelled(store: Store) -> None:
    job = await run_one(store)
    for request_id, tenant_id in ((new_id(), "default"), (job.request_id, "other")):
        with pytest.raises(NotFound):
            await store.jobs.cancel(request_id, tenant_id)
    await store.queue.finish(job, result())
    with pytest.raises(AlreadyEnded):
        await store.jobs.cancel(job.request_id, "default")
    assert await status_of(store, job.request_id) is Status.SUCCEEDED


async def test_the_worker_of_a_running_job_hears_of_it_and_no_other_does(
    make_store: MakeStore, store: Store, database_url: str
) -> None:
    other = await make_store(database_url)
    job, kept = await run_one(store), await run_one(store)
    hearing = asyncio.create_task(store.notifications.wait_cancels(20_000))
    await wait_until(store.notifications.is_sure)  # it listens by then
    assert await other.jobs.cancel(job.request_id, "default") is Status.RUNNING
    assert await hearing == {job.request_id}
    assert await store.jobs.to_cancel([]) == {job.request_id}
    assert await other.jobs.to_cancel([]) == set()
    await store.queue.finish(
        job, result("so far", Status.CANCELLED, failure=Failure("cancelled", "x"))
    )
    record = await store.requests.get(job.request_id, "default")
    assert (record.status, record.text) == (Status.CANCELLED, "so far")
    assert await store.jobs.to_cancel([]) == set()
    assert await status_of(store, kept.request_id) is Status.RUNNING


@pytest.mark.parametrize("how", ["handed back", "tried again", "its worker died"])
async def test_a_job_that_comes_back_into_the_queue_is_not_run_again(
    how: str, store: Store, peek: asyncpg.Connection
) -> None:
    job = await run_one(store)
    assert await store.jobs.cancel(job.request_id, "default") is Status.RUNNING
    if how == "handed back":
        await store.queue.release([job])
    elif how == "tried again":
        await store.queue.retry(
            job, result(failure=Failure("x", "x")), now() - timedelta(seconds=1)
        )
    else:
        await peek.execute(
            "UPDATE requests SET status = 'queued', claim = claim + 1, claimed_by = NULL"
        )
    # Though somebody takes it first, it is not admitted.
    again = await claim_one(store)
    with pytest.raises(ClaimLost):
        await store.queue.running(again, model="m", fence=(1, 2), queue_ms=0)
    assert await store.queue.cancel_returned() == 1
    assert await store.queue.cancel_returned() == 0
    record = await store.requests.get(job.request_id, "default")
    assert (record.status, record.attempts) == (Status.CANCELLED, 1)
    assert await peek.fetchval("SELECT count(*) FROM audit WHERE status = 'cancelled'") == 1


async def test_a_dead_job_whose_end_was_asked_for_can_be_given_a_fresh_start(
    store: Store, peek: asyncpg.Connection
) -> None:
    job = await run_one(store)
    await store.jobs.cancel(job.request_id, "default")
    await peek.execute("UPDATE requests SET status = 'dead', claimed_by = NULL")
    await store.stuck.requeue(job.request_id)
    assert await store.queue.cancel_returned() == 0
    again = await claim_one(store)
    await store.queue.running(again, model="m", fence=(1, 2), queue_ms=0)


async def test_a_search_that_finds_no_job_to_end_reads_no_files(
    store: Store, peek: asyncpg.Connection
) -> None:
    """Idle workers search every ten seconds."""
    async with peek.transaction():
        await peek.execute("LOCK TABLE files IN ACCESS EXCLUSIVE MODE")
        assert await store.queue.cancel_returned() == 0
        assert await store.queue.expire_due() == 0
