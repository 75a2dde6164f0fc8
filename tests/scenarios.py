"""Checks of a whole deployment under load and faults, at any size."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from dataclasses import asdict
from typing import Any

from tests.fleet import LEASE_S, LIMITS, Fleet
from tests.load import Load, form_for, stream, submit
from tests.waiting import wait_until, work_for

SLOW = {"first_byte_ms": {"*": {"uniform": [60, 180]}, "classifier": 20}, "between_ms": 10}


async def _finished(fleet: Fleet, count: int) -> bool:
    truth = await fleet.truth()
    return sum(truth[kind].finished for kind in LIMITS) >= count


async def _idle(fleet: Fleet) -> bool:
    return (await fleet.truth()).in_flight == 0


async def _get(fleet: Fleet, url: str, path: str) -> tuple[int, dict[str, Any]]:
    async with fleet.http.get(url + path) as response:
        return response.status, await response.json(content_type=None)


async def mixed_load(fleet: Fleet, *, submits: int, streams: int) -> None:
    """All end well, the limits are reached and never passed, nothing is called twice."""
    await fleet.control.set_behaviour(**SLOW)
    load = Load(fleet)
    load.start_streams(streams)
    await load.submit(submits)
    await load.assert_all_succeeded()
    ends = await load.stream_ends()
    assert {end.end for end in ends.values()} == {"done"}, ends
    await fleet.assert_never_over(reached=True)
    await load.assert_called_once()
    truth = await fleet.truth()
    assert not any(truth[kind].over for kind in LIMITS)


async def kill_worker_and_api(fleet: Fleet, *, submits: int, streams: int) -> None:
    """kill -9 of one of each: permits back within the lease, at most one repeat per cut call."""
    await fleet.control.set_behaviour(**SLOW)
    load = Load(fleet)
    await load.submit(submits)
    load.start_streams(streams)
    await wait_until(lambda: _finished(fleet, submits // 4), 30)
    dead_url = next(iter(fleet.apis))
    fleet.workers[0].kill()
    fleet.apis[dead_url].kill()
    killed_at_ns = time.time_ns()
    await load.assert_all_succeeded()
    await fleet.assert_never_over()
    await load.assert_called_once(killed_at_ns=[killed_at_ns])
    for url, task in load.streams.values():
        end = await task
        assert end.end == "done" or (url == dead_url and end.end == "cut"), (url, end)
    # The survivor has the whole limit again: what the dead held came back.
    later = Load(fleet, "after")
    fleet.apis.pop(dead_url)
    await later.submit(24)
    await later.assert_all_succeeded()
    await fleet.assert_never_over(reached=True)


async def valkey_restarts_empty(fleet: Fleet, *, submits: int, streams: int) -> None:
    """Never over, no job lost, nothing called twice."""
    await fleet.control.set_behaviour(**SLOW)
    load = Load(fleet)
    await load.submit(submits)
    load.start_streams(streams)
    await wait_until(lambda: _finished(fleet, submits // 4), 30)
    await asyncio.to_thread(fleet.valkey.kill)
    await asyncio.to_thread(fleet.valkey.start)
    await load.assert_all_succeeded()
    ends = await load.stream_ends()
    assert {end.end for end in ends.values()} == {"done"}, ends
    await fleet.assert_never_over()
    await load.assert_called_once()


async def valkey_away_closed(fleet: Fleet, *, submits: int, away_s: float) -> None:
    """Running calls finish; after the lease nothing new is admitted; then all goes on."""
    await fleet.control.set_behaviour(**SLOW)
    load = Load(fleet)
    await load.submit(submits)
    await wait_until(lambda: _finished(fleet, submits // 4), 30)
    await asyncio.to_thread(fleet.valkey.stop)
    stopped = time.monotonic()
    await wait_until(lambda: _quiet(fleet), 20, "no call in flight once the lease is over")
    status, health = await _get(fleet, fleet.url, "/health/dependencies")
    assert (status, health["valkey"]["status"]) == (503, "failed")
    assert (await _get(fleet, fleet.url, "/health/ready"))[0] == 200
    body = {"data": "Hello [refused]", "deadline_ms": "1500"}
    refused = await stream(fleet, fleet.url, body)
    assert refused.status == 503, refused
    assert refused.events[0][1]["code"] == "limiter_unavailable"
    await wait_until(lambda: time.monotonic() - stopped > away_s, away_s + 5)
    await asyncio.to_thread(fleet.valkey.start)
    await load.assert_all_succeeded()
    await fleet.assert_never_over()
    await load.assert_called_once()


async def _quiet(fleet: Fleet) -> bool:
    """No call in flight, and none started between two looks."""
    first = await fleet.truth()
    if first.in_flight:
        return False
    await work_for(0.4)
    second = await fleet.truth()
    return second.in_flight == 0 and second.last_id == first.last_id


async def valkey_away_local(fleet: Fleet, *, submits: int, away_s: float) -> None:
    """Work goes on within each process's share, never over in sum."""
    await fleet.control.set_behaviour(**SLOW)
    load = Load(fleet)
    await load.submit(submits)
    await wait_until(lambda: _finished(fleet, submits // 6), 30)
    await asyncio.to_thread(fleet.valkey.stop)
    stopped = time.monotonic()
    await wait_until(lambda: time.monotonic() - stopped > LEASE_S + 0.5)
    reached = (await fleet.truth())["text_only"].finished
    await load.submit(submits // 4)
    await wait_until(lambda: _more_text(fleet, reached + 2), 20, "text calls without Valkey")
    await wait_until(lambda: time.monotonic() - stopped > away_s, away_s + 5)
    await asyncio.to_thread(fleet.valkey.start)
    await load.assert_all_succeeded()
    await fleet.assert_never_over()
    await load.assert_called_once()


async def _more_text(fleet: Fleet, count: int) -> bool:
    truth = await fleet.truth()
    # With fewer permits than processes a share may be none: then nothing is left to finish.
    return truth["text_only"].finished >= count


async def postgres_away(fleet: Fleet, *, submits: int, away_s: float) -> None:
    """Submits get 503; what runs is finished and recorded afterwards; nothing is called twice."""
    await fleet.control.set_behaviour(**SLOW)
    load = Load(fleet)
    await load.submit(submits)
    await wait_until(lambda: _finished(fleet, submits // 4), 30)
    await asyncio.to_thread(fleet.postgres.stop)
    stopped = time.monotonic()
    status, problem = await submit(fleet, fleet.url, {"data": "Hello [refused]"})
    assert (status, problem["code"]) == (503, "store_unavailable"), problem
    live = await stream(fleet, fleet.url, {"data": "Streams go on [live]"})
    assert live.end == "done", live
    assert (await _get(fleet, fleet.url, "/health/ready"))[0] == 200
    status, health = await _get(fleet, fleet.url, "/health/dependencies")
    assert (status, health["postgresql"]["status"]) == (503, "failed")
    await wait_until(lambda: time.monotonic() - stopped > away_s, away_s + 5)
    await asyncio.to_thread(fleet.postgres.start)
    await load.assert_all_succeeded()
    await fleet.assert_never_over()
    await load.assert_called_once()
    done = next(data for name, data in live.events if name == "done")
    assert (await fleet.end_of(done["request_id"]))["text"] == live.text


async def cancelled_streams(fleet: Fleet, *, streams: int, seed: int) -> float:
    """Clients that leave at any moment leave nothing behind, neither here nor upstream.

    Returns the milliseconds from the last one's leaving until the provider was idle.
    """
    await fleet.control.set_behaviour(first_byte_ms={"uniform": [20, 120]}, between_ms=30, chunks=8)
    rng = random.Random(seed)
    urls = list(fleet.apis)
    for start in range(0, streams, 50):
        tasks = []
        for number in range(start, min(start + 50, streams)):
            body = form_for(f"c{number}", number)[1]
            tasks.append(asyncio.create_task(stream(fleet, urls[number % len(urls)], body)))
        delays = [rng.uniform(0, 1.2) for _ in tasks]
        await asyncio.gather(
            *(_cancel_after(task, delay) for task, delay in zip(tasks, delays, strict=True))
        )
    left = time.monotonic()
    await wait_until(lambda: _idle(fleet), 20, "no upstream call left")
    took_ms = (time.monotonic() - left) * 1000
    await fleet.assert_never_over()
    await wait_until(lambda: _all_free(fleet), 20, "all permits free")
    return took_ms


async def _cancel_after(task: asyncio.Task[Any], delay_s: float) -> None:
    await asyncio.wait({task}, timeout=delay_s)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _all_free(fleet: Fleet) -> bool:
    """Every permit can be had at once: as many streams as the limit are admitted together."""
    started = await asyncio.gather(
        *(stream(fleet, fleet.url, {"data": "free?", "deadline_ms": "500"}) for _ in range(5))
    )
    return all(end.end == "done" for end in started)


async def sigterm_under_load(fleet: Fleet, *, submits: int, streams: int) -> None:
    """A worker and an API are told to stop while they work: nothing fails, nothing is repeated."""
    await fleet.control.set_behaviour(**SLOW)
    load = Load(fleet)
    await load.submit(submits)
    load.start_streams(streams)
    await wait_until(lambda: _finished(fleet, submits // 4), 30)
    leaving_url = next(iter(fleet.apis))
    leaving = (fleet.workers[0], fleet.apis[leaving_url])
    for child in leaving:
        child.signal(signal.SIGTERM)
    assert [await child.ended() for child in leaving] == [0, 0]
    await load.assert_all_succeeded()
    ends = await load.stream_ends()
    assert {end.end for end in ends.values()} == {"done"}, [asdict(e) for e in ends.values()]
    await fleet.assert_never_over()
    await load.assert_called_once()


async def paused_worker(fleet: Fleet, *, submits: int, paused_s: float, over: bool) -> None:
    """A worker frozen for longer than all leases comes back: it stores nothing that is not its.

    With `over` (ON_EXPIRY=reuse) the provider may see, while it is frozen, what it held as well.
    """
    await fleet.control.set_behaviour(**SLOW)
    load = Load(fleet)
    await load.submit(submits)
    await wait_until(lambda: _finished(fleet, submits // 6), 30)
    worker = fleet.workers[0]
    worker.signal(signal.SIGSTOP)
    stopped, held = time.monotonic(), set[str]()
    async with fleet.record() as record:

        async def was_long_enough() -> bool:
            held.update(await fleet.claimed_by(worker, record))
            return time.monotonic() - stopped > paused_s

        await wait_until(was_long_enough, paused_s + 20)
    worker.signal(signal.SIGCONT)
    await load.assert_all_succeeded()
    if not over:
        await fleet.assert_never_over()
    # Of these it had made the call, or sends it when it is back, before it finds them lost.
    await load.assert_called_once(held=held)
    calls = await fleet.calls_by_marker()
    repeated = [marker for marker in load.ids if len(calls[marker]) > 1]
    assert len(repeated) <= 2 * sum(LIMITS.values()), repeated
    # And it works on: the whole limit is used again.
    later = Load(fleet, "after")
    await later.submit(24)
    await later.assert_all_succeeded()
