"""A COMMIT whose reply is lost: what it did stands, and its maker knows or finds out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import asyncpg
import pytest

from tests.integration.store.conftest import MakeStore
from tests.integration.store.jobs import new_job, result, unadmitted
from tests.integration.store.lossy import lossy
from tests.waiting import wait_until
from tidegate.call import DEFAULT_POOL, Kind, Status
from tidegate.errors import NotFound, PolicyChanged, StoreUnavailable
from tidegate.prices.budgets import Budget
from tidegate.record import Failure
from tidegate.store.database import sql
from tidegate.store.store import Store

JOBS = 40
_UNKNOWN = "SELECT count(*) FROM requests WHERE claimed_by IS NOT NULL"


async def claim(store: Store, limit: int) -> list[object]:
    return list(await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=limit))


async def test_jobs_of_a_claim_whose_commit_reply_was_lost_are_claimed_again(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    direct = await make_store(database_url)
    for _ in range(JOBS):
        await direct.jobs.submit(new_job())
    async with lossy(database_url) as proxy:
        worker = await make_store(proxy.url)
        await worker.queue.heartbeat()
        proxy.lose_commit_of(sql("claim"))
        with pytest.raises(StoreUnavailable):
            await claim(worker, 12)
        assert proxy.lost == 1
        assert await peek.fetchval(_UNKNOWN) == 12, "it was committed"
        # Not by a heartbeat: the next claim of the same worker finds them.
        claimed = await claim(worker, JOBS)
        assert len(claimed) == JOBS


async def test_a_heartbeat_finds_claims_that_nobody_doubts(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    """Whatever mistake loses a claim, its worker releases it while it lives."""
    worker = await make_store(database_url)
    await worker.jobs.submit(new_job())
    await worker.queue.heartbeat()
    await peek.execute("UPDATE requests SET claim = 1, claimed_by = $1", worker.instance_id)

    async def released() -> bool:
        await worker.queue.heartbeat()
        return bool(await peek.fetchval(_UNKNOWN) == 0)

    await wait_until(released)
    assert len(await claim(worker, 1)) == 1


async def test_an_end_whose_commit_reply_was_lost_is_recorded_once(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    async with lossy(database_url) as proxy:
        worker = await make_store(proxy.url)
        job = new_job()
        await worker.jobs.submit(job)
        (claimed,) = await worker.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1)
        await worker.queue.running(claimed, model="m", fence=(1, 1), queue_ms=0)
        proxy.lose_commit_of(sql("end_requests"))
        await worker.queue.finish(claimed, result())
        assert proxy.lost == 1
    assert await peek.fetchval("SELECT count(*) FROM audit") == 1
    assert await peek.fetchval("SELECT status FROM requests") == "succeeded"


_LATE = Failure("deadline_exceeded", "the deadline passed while the job waited")


async def test_an_attempt_whose_mark_had_no_reply_ends_with_its_job(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    worker = await make_store(database_url)
    await worker.jobs.submit(new_job())
    (claimed,) = await worker.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1)
    # The mark stands, and its worker does not know it when the deadline comes: it makes no call.
    await worker.queue.running(claimed, model="m", fence=(1, 1), queue_ms=0)
    await worker.queue.fail_unadmitted(claimed, unadmitted(Status.EXPIRED, _LATE))
    (attempt,) = await peek.fetch("SELECT outcome, finished_at, failure FROM attempts")
    assert attempt["outcome"] == "expired"
    assert attempt["finished_at"] == await peek.fetchval("SELECT finished_at FROM requests")
    assert _LATE.code in attempt["failure"]


@pytest.mark.parametrize("is_called", [False, True])
async def test_an_attempt_that_has_ended_stays_as_it_ended(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection, is_called: bool
) -> None:
    worker = await make_store(database_url)
    await worker.jobs.submit(new_job())
    (first,) = await worker.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1)
    await worker.queue.running(first, model="m", fence=(1, 1), queue_ms=0)
    await worker.queue.retry(first, result(status="retried", failure=Failure("x", "y")), None)
    (again,) = await worker.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1)
    # The second claim ends before its mark: in the queue, or cancelled with its permit.
    if is_called:
        await worker.queue.finish(again, result(status=Status.CANCELLED, failure=_LATE))
    else:
        await worker.queue.fail_unadmitted(again, unadmitted(Status.EXPIRED, _LATE))
    assert [row["outcome"] for row in await peek.fetch("SELECT outcome FROM attempts")] == [
        "failed"
    ]


async def remove_a_tenant(store: Store) -> None:
    await store.tenants.remove("acme", by="ann")


async def remove_a_budget(store: Store) -> None:
    await store.budgets.records.remove("all", by="ann")


REMOVALS = {"remove_tenant": remove_a_tenant, "drop_budget": remove_a_budget}


@pytest.mark.parametrize(("statement", "remove"), REMOVALS.items(), ids=REMOVALS)
async def test_a_removal_whose_commit_reply_was_lost_is_no_404(
    make_store: MakeStore,
    database_url: str,
    statement: str,
    remove: Callable[[Store], Awaitable[None]],
) -> None:
    async with lossy(database_url) as proxy:
        store = await make_store(proxy.url)
        await store.tenants.set("acme", {}, by="ann")
        await store.budgets.records.set(Budget("all", "tokens", 10, "day"), by="ann")
        proxy.lose_commit_of(sql(statement))
        await remove(store)
        assert proxy.lost == 1
        with pytest.raises(NotFound):
            await remove(store)


async def test_a_change_whose_commit_reply_was_lost_is_no_conflict_with_itself(
    make_store: MakeStore, database_url: str
) -> None:
    def ten(before: Budget | None) -> Budget:
        PolicyChanged.check({"before": before}, {"before": None})
        return Budget("all", "tokens", 10, "day")

    async with lossy(database_url) as proxy:
        store = await make_store(proxy.url)
        await store.tenants.set("acme", {"most_streams": 1}, by="ann")
        proxy.lose_commit_of(sql("set_tenant"))
        expected = {"most_streams": 1}
        changed = await store.tenants.set("acme", {"most_streams": 2}, by="ann", expected=expected)
        assert changed.most_streams == 2
        proxy.lose_commit_of(sql("set_budget"))
        _, is_new = await store.budgets.records.change("all", ten, by="ann")
        assert is_new
        assert proxy.lost == 2
        with pytest.raises(PolicyChanged):
            await store.tenants.set("acme", {}, by="ann", expected=expected)
        with pytest.raises(PolicyChanged):
            await store.budgets.records.change("all", ten, by="ann")
