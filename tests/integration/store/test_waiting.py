"""Long polls and waiting for work: woken at once, and right without notifications too."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from tests.integration.store.conftest import MakeStore
from tests.integration.store.jobs import new_job, result
from tests.waiting import wait_turns, wait_until
from tidegate.call import DEFAULT_POOL, Kind, Status, new_id
from tidegate.errors import NotFound
from tidegate.store import notifications as watch
from tidegate.store.database import DatabaseSession, row_alone
from tidegate.store.notifications import LANES, Notifications
from tidegate.store.records import ClaimedJob
from tidegate.store.store import Store

LONG_MS = 600_000  # longer than any test
LAST_STEP = 40  # of the event loop, by which a pulse has ended


async def claim_one(store: Store) -> ClaimedJob:
    (job,) = await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1)
    return job


async def listening(store: Store) -> None:
    """Wait until `store` hears notifications."""
    store.notifications.listen()
    await wait_until(
        lambda: store.notifications._line is not None and store.notifications.work_mark() > 0
    )


async def test_a_long_poll_is_woken_at_once_by_a_change_in_another_process(
    make_store: MakeStore, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL_MS", LONG_MS)  # nothing but a notification ends the wait
    api, worker = [await make_store(database_url, claim_lease_ms=5_000) for _ in range(2)]
    await listening(api)
    job = new_job()
    await api.jobs.submit(job)
    claimed = await claim_one(worker)
    before = await api.requests.get(job.request_id, "default")
    version = before.version
    for change in ("running", "finish"):
        waiting = asyncio.create_task(
            api.requests.wait_change(job.request_id, "default", version, timeout_ms=LONG_MS)
        )
        await wait_until(lambda: len(api.notifications) == 1 and api.notifications._seen)
        if change == "running":
            await worker.queue.running(claimed, model="m", fence=(1, 1), queue_ms=0)
        else:
            await worker.queue.finish(claimed, result())
        version = (await waiting).version
    assert (await api.requests.get(job.request_id, "default")).status is Status.SUCCEEDED
    assert len(api.notifications) == 0


async def test_moves_of_conversations_are_notified_to_all_processes_in_one_order(
    make_store: MakeStore, database_url: str
) -> None:
    stores = [await make_store(database_url) for _ in range(2)]
    heard: list[list[tuple[bytes, str, int]]] = [[], []]
    for store, moves in zip(stores, heard, strict=True):
        store.notifications.on_moved.append(lambda *move, moves=moves: moves.append(move))
        await listening(store)
    sent = [(bytes([number]) * 16, f"account-{number % 3}", number) for number in range(120)]
    for number, move in enumerate(sent):
        stores[number % 2].notifications.moved(*move)
    await wait_until(lambda: [len(moves) for moves in heard] == [len(sent)] * 2)
    assert heard[0] == heard[1]
    assert sorted(heard[0]) == sent


async def test_a_long_poll_ends_by_polling_when_notifications_are_lost(
    make_store: MakeStore, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As behind PgBouncer in transaction mode: nobody hears anything.
    monkeypatch.setattr(Notifications, "listen", lambda _self: None)
    api = await make_store(database_url)
    job = new_job()
    await api.jobs.submit(job)
    version = (await api.requests.get(job.request_id, "default")).version
    waiting = asyncio.create_task(
        api.requests.wait_change(job.request_id, "default", version, LONG_MS)
    )
    await wait_until(lambda: api.notifications._seen)
    claimed = await claim_one(api)
    await api.queue.running(claimed, model="m", fence=(1, 1), queue_ms=0)
    assert (await waiting).status is Status.RUNNING


async def test_a_long_poll_answers_at_once_when_the_caller_is_behind(store: Store) -> None:
    job = new_job()
    await store.jobs.submit(job)
    await store.requests.wait_change(job.request_id, "default", version=0, timeout_ms=LONG_MS)
    with pytest.raises(NotFound):
        await store.requests.wait_change(new_id(), "default", version=0, timeout_ms=LONG_MS)


async def test_a_long_poll_without_a_change_returns_what_there_is(store: Store) -> None:
    job = new_job()
    await store.jobs.submit(job)
    version = (await store.requests.get(job.request_id, "default")).version
    record = await store.requests.wait_change(job.request_id, "default", version, timeout_ms=50)
    assert (record.status, record.version) == (Status.QUEUED, version)


async def test_a_cancelled_long_poll_leaves_nothing_behind(store: Store) -> None:
    job = new_job()
    await store.jobs.submit(job)
    version = (await store.requests.get(job.request_id, "default")).version
    waiting = [
        asyncio.create_task(store.requests.wait_change(job.request_id, "default", version, 10_000))
        for _ in range(20)
    ]
    await wait_until(lambda: len(store.notifications) == 20)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert len(store.notifications) == 0
    assert store.notifications._seen == {}
    await wait_until(lambda: store.notifications._poller is None)


async def test_too_many_watchers_answer_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "MAX_WATCHERS", 0)
    job = new_job()
    await store.jobs.submit(job)
    version = (await store.requests.get(job.request_id, "default")).version
    await store.requests.wait_change(job.request_id, "default", version, LONG_MS)


async def test_a_worker_is_woken_by_a_submit_elsewhere(
    make_store: MakeStore, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_PULSE_S", 600), ("_SURE_S", 600), ("PULSED_MS", LONG_MS)):
        monkeypatch.setattr(watch, name, value)  # nothing but a notification ends the wait
    api, worker = [await make_store(database_url) for _ in range(2)]
    await listening(worker)
    await wait_until(worker.notifications.is_sure)
    for _ in range(3):
        waiting = asyncio.create_task(worker.notifications.wait_work(LONG_MS))
        await asyncio.sleep(0)
        await api.jobs.submit(new_job())
        await waiting


async def test_work_wakes_only_those_who_wait_for_its_lane(
    make_store: MakeStore, database_url: str
) -> None:
    store = await make_store(database_url)
    await listening(store)
    before = {lane: store.notifications.work_mark(lane) for lane in LANES}
    await store.jobs.submit(new_job())
    await wait_until(
        lambda: store.notifications.work_mark(Kind.TEXT_ONLY) != before[Kind.TEXT_ONLY]
    )
    woken = {lane for lane in LANES if store.notifications.work_mark(lane) != before[lane]}
    assert woken == {Kind.TEXT_ONLY}
    store.notifications.work([DEFAULT_POOL])  # as processes of an older release ring
    await wait_until(
        lambda: all(store.notifications.work_mark(lane) != before[lane] for lane in LANES)
    )


async def test_work_that_came_between_claim_and_wait_is_not_missed(
    make_store: MakeStore, database_url: str
) -> None:
    worker = await make_store(database_url)
    await listening(worker)
    mark = worker.notifications.work_mark()
    assert await worker.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1) == []
    await worker.jobs.submit(new_job())
    await wait_until(lambda: worker.notifications.work_mark() != mark)
    missed = asyncio.create_task(worker.notifications.wait_work(10_000, since=mark))
    await wait_turns(missed.done, what="the end of a wait")


async def test_waiting_for_work_never_outlasts_a_second(store: Store) -> None:
    began = time.monotonic()
    await store.notifications.wait_work(LONG_MS)
    assert time.monotonic() - began < watch.PULSED_MS / 1000


async def _execute(statement: str, request_id: UUID, connection: asyncpg.Connection) -> None:
    await connection.execute(statement, request_id)


async def test_the_pulse_wakes_those_who_wait_for_work_that_nobody_notified_them_of(
    make_store: MakeStore, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, worker = [await make_store(database_url) for _ in range(2)]
    worker.notifications.pool = DEFAULT_POOL
    await listening(worker)
    await wait_until(worker.notifications.is_sure)
    for notify in ("work", "changed"):
        monkeypatch.setattr(api.notifications, notify, lambda *_: None)
    ready = asyncio.create_task(worker.notifications.wait_work(watch.PULSED_MS))
    ripe = asyncio.create_task(worker.notifications.due("ripe"))
    overdue = asyncio.create_task(worker.notifications.due("overdue"))
    await asyncio.sleep(0)
    job = new_job()
    await api.jobs.submit(job)
    async with asyncio.timeout(watch.PULSED_MS / 2000):
        await ready
    assert not ripe.done()
    assert not overdue.done()
    for column, waits in (("not_before", ripe), ("deadline_at", overdue)):
        put = f"UPDATE requests SET {column} = now() + interval '100 ms' WHERE id = $1"
        await api.connections.run(partial(_execute, put, job.request_id))
        async with asyncio.timeout(watch.PULSED_MS / 2000):
            await waits


async def test_the_pulse_finds_work_whose_transaction_ends_after_a_later_one(
    store: Store, peek: asyncpg.Connection
) -> None:
    job = new_job()
    await store.jobs.submit(job)
    put_off = "UPDATE requests SET not_before = now() + interval '1 hour' WHERE id = $1"
    await peek.execute(put_off, job.request_id)
    store.notifications.pool = DEFAULT_POOL
    await listening(store)
    async with peek.transaction():
        await peek.execute("UPDATE requests SET not_before = NULL WHERE id = $1", job.request_id)
        later = "SELECT pg_current_xact_id()::text::bigint"
        under_way = await peek.fetchval(later)
        await store.connections.run(lambda connection: connection.execute(later))
        await wait_until(lambda: (store.notifications._seen_transaction or 0) > under_way)
        ready = asyncio.create_task(store.notifications.wait_work(watch.PULSED_MS))
        await asyncio.sleep(0)
        assert not ready.done()
    async with asyncio.timeout(watch.PULSED_MS / 2000):
        await ready


async def test_a_lost_connection_ends_the_waits_that_relied_on_its_pulse(
    make_store: MakeStore, database_url: str
) -> None:
    store = await make_store(database_url)
    await listening(store)
    await wait_until(store.notifications.is_sure)
    waits = [
        asyncio.create_task(store.notifications.due("cancelled")),
        asyncio.create_task(store.notifications.wait_work(watch.PULSED_MS)),
    ]
    await asyncio.sleep(0)
    followed = asyncio.Event()
    store.notifications.on_upstreams.append(followed.set)
    assert store.notifications._line is not None
    store.notifications._line.terminate()
    async with asyncio.timeout(watch.PULSED_MS / 2000):
        await asyncio.gather(*waits)
        await followed.wait()  # what was changed meanwhile is looked for


async def test_a_listener_that_is_cut_off_between_any_two_steps_listens_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, cuts = list[DatabaseSession](), list[asyncio.Task[None]]()

    async def cut_after(steps: int, line: DatabaseSession) -> None:
        for _ in range(steps):
            await asyncio.sleep(0)
        line.terminate()

    async def pulse(line: DatabaseSession, *given: Any, **more: Any) -> asyncpg.Record:
        if line not in lines:
            lines.append(line)
            if len(lines) == 1:
                raise asyncpg.InternalClientError  # for an end announced between two statements
            if len(lines) < LAST_STEP:
                cuts.append(asyncio.create_task(cut_after(len(lines), line)))
        return await row_alone(line, *given, **more)

    monkeypatch.setattr(watch, "row_alone", pulse)
    monkeypatch.setattr(watch, "_RECONNECT_MS", 1)
    await wait_until(lambda: not store.connections.unavailable)
    store.notifications.listen()
    await wait_until(lambda: len(lines) == LAST_STEP and store.notifications.is_sure())
    await asyncio.gather(*cuts)


async def test_a_new_budget_is_in_force_without_a_notification(
    make_store: MakeStore, database_url: str
) -> None:
    store = await make_store(database_url)
    await listening(store)
    await wait_until(store.notifications.is_sure)
    changed = asyncio.Event()
    store.notifications.on_budgets.append(changed.set)
    raised = "UPDATE budget_revision SET revision = revision + 1"
    await store.connections.run(lambda connection: connection.execute(raised))
    async with asyncio.timeout(5):
        await changed.wait()
