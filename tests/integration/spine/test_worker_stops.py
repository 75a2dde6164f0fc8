"""A worker that is told to stop, or that dies: what becomes of the jobs that it had."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.gateway import Opener
from tests.waiting import promised_s, wait_until
from tidegate.store.queue import JobQueue


async def test_a_heartbeat_on_its_way_ends_before_the_worker_leaves(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off, it could reach the record afterwards, as of a worker that lives."""
    gateway = await open_gateway(worker=False, claim_lease_ms=600)
    beat, leave, done = JobQueue.heartbeat, JobQueue.leave, list[str]()
    began, go = asyncio.Event(), asyncio.Event()
    await gateway.start_ready_worker()

    async def slow_beat(queue: JobQueue) -> None:
        began.set()
        await go.wait()
        await beat(queue)
        done.append("beat")

    async def noted_leave(queue: JobQueue) -> None:
        done.append("left")
        await leave(queue)

    monkeypatch.setattr(JobQueue, "leave", noted_leave)
    monkeypatch.setattr(JobQueue, "heartbeat", slow_beat)
    await began.wait()
    asyncio.get_running_loop().call_later(0.05, go.set)
    await gateway.stop_worker()
    assert done == ["beat", "left"]
    assert await gateway.database.fetchval("SELECT count(*) FROM workers") == 0


async def test_running_jobs_finish_and_waiting_ones_are_free_at_once(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 1}, shutdown_grace_ms=20_000)
    await gateway.upstream.set_behaviour(first_byte_ms=2_000)  # more than the others take to leave
    await gateway.upstream.set_fault("hang", kind="classifier", count=1)
    ids = [await gateway.submit(data=f"Explain {number}") for number in range(4)]
    await gateway.in_flight(1)
    unsure = await gateway.submit(data="Nice!")
    stopping = asyncio.create_task(gateway.stop_worker())

    async def free() -> bool:
        claimed = await gateway.database.fetchval(
            "SELECT count(*) FROM requests WHERE claimed_by IS NOT NULL"
        )
        return bool(claimed == 1)

    await wait_until(free, 20, "only the running one is still claimed")
    assert not stopping.done(), "it is free before the running one has ended"
    await stopping
    assert (await gateway.status(ids[0]))["status"] == "succeeded"
    assert {(await gateway.status(request_id))["status"] for request_id in ids[1:]} == {"queued"}
    assert len(await gateway.calls()) == 1
    assert await gateway.database.fetchval("SELECT count(*) FROM workers") == 0
    await gateway.upstream.set_behaviour(first_byte_ms=0)
    gateway.start_worker()
    for request_id in (*ids, unsure):
        record = await gateway.end_of(request_id)
        assert (record["status"], record["attempts"]) == ("succeeded", 1)
    assert len(await gateway.calls()) == 5


async def test_what_outlasts_the_grace_is_cut_and_handed_back(open_gateway: Opener) -> None:
    gateway = await open_gateway(shutdown_grace_ms=200)
    await gateway.upstream.set_fault("hang", count=1)
    request_id = await gateway.submit(data="Explain the tide")
    await gateway.in_flight(1)
    started = time.monotonic()
    await gateway.stop_worker()
    assert time.monotonic() - started < promised_s(2)
    stats = await gateway.upstream.stats()
    assert (stats.in_flight, stats["text_only"].client_gone) == (0, 1)
    queued = await gateway.status(request_id)
    assert (queued["status"], queued["attempts"]) == ("queued", 1)
    (attempt,) = await gateway.attempts(request_id)
    assert attempt["outcome"] == "ambiguous"
    gateway.start_worker()
    record = await gateway.end_of(request_id)
    assert (record["status"], record["attempts"]) == ("succeeded", 2)


async def test_an_end_that_is_being_recorded_is_not_handed_back(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, may_finish = JobQueue.finish, asyncio.Event()

    async def slow(self: JobQueue, *given: object) -> None:
        await may_finish.wait()
        await finish(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(JobQueue, "finish", slow)
    gateway = await open_gateway(shutdown_grace_ms=100)
    request_id = await gateway.submit(data="Explain the tide")

    async def called() -> bool:
        return (await gateway.upstream.stats())["text_only"].finished == 1

    await wait_until(called, 20)
    stopping = asyncio.create_task(gateway.stop_worker())
    asyncio.get_running_loop().call_later(0.4, may_finish.set)
    await stopping
    record = await gateway.status(request_id)
    assert (record["status"], record["attempts"]) == ("succeeded", 1)
    assert len(await gateway.calls()) == 1


async def test_a_worker_with_nothing_to_do_stops_at_once(open_gateway: Opener) -> None:
    gateway = await open_gateway(shutdown_grace_ms=20_000)
    started = time.monotonic()
    await gateway.stop_worker()
    assert time.monotonic() - started < promised_s(1.5)


async def test_two_workers_share_the_limit_and_call_nothing_twice(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    gateway.start_worker()
    await gateway.upstream.set_behaviour(first_byte_ms={"uniform": [100, 200]})
    ids = [await gateway.submit(data=f"Explain {number}") for number in range(40)]
    for request_id in ids:
        record = await gateway.end_of(request_id)
        assert (record["status"], record["attempts"]) == ("succeeded", 1)
    stats = (await gateway.upstream.stats())["text_only"]
    assert (stats.arrived, stats.max_in_flight) == (40, 5)
