"""Webhooks are written with the end that they tell of, and stay until they are settled."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from uuid import UUID

import asyncpg
import pytest

from tests.integration.store.conftest import MakeStore
from tests.integration.store.jobs import new_job, now, result
from tests.waiting import wait_until
from tidegate.call import DEFAULT_POOL, Kind, Status, new_id
from tidegate.errors import ClaimLost, NotFound
from tidegate.record import Failure
from tidegate.store.database import sql
from tidegate.store.outbox import add_webhooks
from tidegate.store.records import ClaimedJob
from tidegate.store.store import Store

URL = "https://example.com/hook"
LEASE_MS = 60_000


async def run_one(store: Store, url: str | None = URL) -> ClaimedJob:
    await store.jobs.submit(new_job(webhook_url=url))
    (job,) = await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1)
    await store.queue.running(job, model="m", fence=(1, 1), queue_ms=0)
    return job


async def ended(store: Store) -> UUID:
    job = await run_one(store)
    await store.queue.finish(job, result())
    return job.request_id


async def test_only_the_one_end_that_is_recorded_has_a_webhook(
    store: Store, peek: asyncpg.Connection
) -> None:
    job = await run_one(store)
    await store.queue.retry(job, result(failure=Failure("x", "x")), now() - timedelta(seconds=1))
    assert await store.outbox.claim(10, LEASE_MS) == []
    (again,) = await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1)
    with pytest.raises(ClaimLost):
        await store.queue.finish(job, result("stale"))
    for _ in range(2):  # the second as after a lost reply
        await store.queue.finish(again, result())
    other = await run_one(store, None)
    await store.queue.finish(other, result())
    (delivery,) = await store.outbox.claim(10, LEASE_MS)
    assert (delivery.request_id, delivery.event) == (job.request_id, "request.succeeded")
    assert (delivery.url, delivery.tries) == (URL, 1)


async def test_an_end_and_its_webhook_are_recorded_together_or_not_at_all(
    store: Store, peek: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await run_one(store)
    failures = [RuntimeError("killed in the middle")]

    async def killed(connection: asyncpg.Connection, rows: list[asyncpg.Record]) -> None:
        await add_webhooks(connection, rows)
        if failures:
            raise failures.pop()

    monkeypatch.setattr("tidegate.store.audit.add_webhooks", killed)
    with pytest.raises(RuntimeError):
        await store.queue.finish(job, result())
    assert (await store.requests.get(job.request_id, "default")).status is Status.RUNNING
    assert await peek.fetchval("SELECT count(*) FROM webhooks") == 0
    await store.queue.finish(job, result())
    assert await peek.fetchval("SELECT count(*) FROM webhooks") == 1


async def test_ends_without_a_worker_have_a_webhook_too(
    store: Store, peek: asyncpg.Connection
) -> None:
    late = new_job(webhook_url=URL, deadline_at=now() - timedelta(seconds=1))
    unwanted = new_job(webhook_url=URL)
    for job in (late, unwanted):
        await store.jobs.submit(job)
    await store.queue.expire_due()
    await store.jobs.cancel(unwanted.request_id, "default")
    found = await store.outbox.claim(10, LEASE_MS)
    assert {each.request_id: each.event for each in found} == {
        late.request_id: "request.expired",
        unwanted.request_id: "request.cancelled",
    }


async def test_two_senders_never_have_the_same_one_and_a_lost_one_is_due_again(
    make_store: MakeStore, database_url: str
) -> None:
    stores = [await make_store(database_url) for _ in range(2)]
    ids = {await ended(stores[0]) for _ in range(20)}
    halves = await asyncio.gather(*(store.outbox.claim(10, 200) for store in stores))
    claimed = [each for half in halves for each in half]
    assert len(claimed) == 20
    assert {each.request_id for each in claimed} == ids
    assert await stores[0].outbox.claim(10, 200) == []
    for delivery in claimed[1:]:
        await stores[1].outbox.settle(delivery, "delivered", answer_status=200)
    (again,) = await wait_until(lambda: stores[1].outbox.claim(10, LEASE_MS), 20)
    assert again == replace(claimed[0], tries=2)
    # The first sender was only slow: what it says now counts no more.
    await stores[0].outbox.settle(claimed[0], "given_up", problem="too late")
    shown = (await stores[0].requests.get(again.request_id, "default")).webhook
    assert shown is not None
    assert (shown.state, shown.tries) == ("pending", 2)


async def test_what_failed_is_due_later_and_what_is_settled_never_unless_asked_for(
    store: Store,
) -> None:
    request_id = await ended(store)
    (delivery,) = await store.outbox.claim(1, LEASE_MS)
    await store.outbox.settle(delivery, "pending", problem="busy", due_in_ms=3_600_000)
    assert await store.outbox.claim(1, LEASE_MS) == []
    shown = (await store.requests.get(request_id, "default")).webhook
    assert shown is not None
    assert shown.due_at is not None
    assert (shown.problem, shown.due_at > now() + timedelta(minutes=55)) == ("busy", True)
    await store.outbox.redeliver(delivery.webhook_id)
    (again,) = await store.outbox.claim(1, LEASE_MS)
    assert again == delivery
    await store.outbox.settle(again, "delivered", answer_status=200)
    assert await store.outbox.claim(1, LEASE_MS) == []
    with pytest.raises(NotFound):
        await store.outbox.redeliver(new_id())


async def test_they_go_with_their_request(store: Store, peek: asyncpg.Connection) -> None:
    await ended(store)
    await peek.execute("UPDATE requests SET finished_at = $1", now() - timedelta(days=40))
    await store.retention.prune(30)
    assert await peek.fetchval("SELECT count(*) FROM webhooks") == 0


async def test_a_long_history_is_not_scanned(store: Store, peek: asyncpg.Connection) -> None:
    await ended(store)
    await peek.execute(
        "INSERT INTO webhooks (id, request_id, pool, event, url, state) "
        "SELECT gen_random_uuid(), r.id, 'gemini', 'request.succeeded', 'x', 'delivered' "
        "FROM requests r, generate_series(1, 20000)"
    )
    await peek.execute("SET enable_seqscan = off")
    hot: dict[str, list[object]] = {
        "claim_webhooks": [32, 1000.0, ["acme"]],
        "get_webhook": [new_id()],
        "settle_webhook": [new_id(), 1, "delivered", 200, None, 0.0],
    }
    for name, arguments in hot.items():
        lines = await peek.fetch(f"EXPLAIN {sql(name)}", *arguments)
        plan = "\n".join(line[0] for line in lines)
        assert "Index Scan" in plan, plan
        assert "Seq Scan" not in plan, plan
