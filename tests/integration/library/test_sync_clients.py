"""Real sync clients of httpx and httpx2 in threads, against the emulator's truth."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import httpx2
import pytest

from tests.integration.library.makers import LIMIT, MakeSync, ask, held, stream, waiting, whole
from tests.integration.library.upstream import Upstream
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator
from tidegate.errors import DeadlineExceeded, LeaseLost, UpstreamTimeout
from tidegate.integrations import httpx as ours_httpx
from tidegate.integrations import httpx2 as ours_httpx2
from tidegate.limiter import Demand, SyncLimiter

ONE = Demand((LIMIT,), deadline_ms=20_000)
HEADERS = {"x-goog-api-key": "k"}
MakeClient = Callable[..., Any]


@pytest.fixture(params=["httpx", "httpx2"])
def make_client(request: pytest.FixtureRequest) -> Iterator[MakeClient]:
    with ExitStack() as stack:

        def make(limiter: SyncLimiter, demand: Any) -> Any:
            client: Any
            if request.param == "httpx":
                one = ours_httpx.LimitedTransport(limiter, demand)
                client = httpx.Client(transport=one, headers=HEADERS, timeout=20)
            else:
                two = ours_httpx2.LimitedTransport(limiter, demand)
                client = httpx2.Client(transport=two, headers=HEADERS, timeout=20)
            return stack.enter_context(client)

        yield make


async def in_flight(emulator: Emulator) -> int:
    return (await emulator.control.stats()).in_flight


async def until_in_flight(emulator: Emulator, count: int) -> None:
    async def reached() -> bool:
        return await in_flight(emulator) == count

    await wait_until(reached, what=f"{count} in flight")


async def hanging(emulator: Emulator, client: Any) -> Any:
    """A stream that stops after its first chunk, which has not been read."""
    await emulator.control.set_fault("hang_mid_stream", count=1)
    request = client.build_request("POST", stream(emulator.url), json=ask("hang"))
    return await asyncio.to_thread(client.send, request, stream=True)


async def test_never_more_than_the_limit_are_in_flight_over_two_limiters(
    make_sync: MakeSync, make_client: MakeClient, emulator: Emulator
) -> None:
    clients = [make_client(make_sync(3), ONE) for _ in range(2)]
    await emulator.control.set_behaviour(first_byte_ms=4)

    def call(number: int) -> int:
        url = (stream if number % 3 else whole)(emulator.url)
        status: int = clients[number % 2].post(url, json=ask(f"call {number}")).status_code
        return status

    def all_calls() -> list[int]:
        with ThreadPoolExecutor(12) as threads:
            return list(threads.map(call, range(40)))

    assert await asyncio.to_thread(all_calls) == [200] * 40
    stats = await emulator.control.stats()
    assert (stats["text_only"].over, stats.max_in_flight) == (0, 3)


async def test_a_permit_is_held_until_the_answer_is_closed(
    make_sync: MakeSync, make_client: MakeClient, emulator: Emulator
) -> None:
    limiter = make_sync()
    answer = await hanging(emulator, make_client(limiter, ONE))
    assert held(limiter) == 1
    await asyncio.to_thread(answer.close)
    await asyncio.to_thread(answer.close)
    await wait_until(lambda: held(limiter) == 0)
    await until_in_flight(emulator, 0)


async def test_an_answer_that_is_dropped_is_closed_and_its_permit_given_back(
    make_sync: MakeSync, make_client: MakeClient, emulator: Emulator
) -> None:
    limiter = make_sync()
    answer = await hanging(emulator, make_client(limiter, ONE))
    assert (held(limiter), await in_flight(emulator)) == (1, 1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        del answer
        # The thread that brought it may have it a moment longer.
        await wait_until(lambda: gc.collect() >= 0 and held(limiter) == 0)
    assert any("neither read to its end nor closed" in str(one.message) for one in warned)
    await until_in_flight(emulator, 0)


async def test_errors_give_the_permit_back(
    make_sync: MakeSync, make_client: MakeClient, emulator: Emulator
) -> None:
    limiter = make_sync()
    client = make_client(limiter, ONE)
    for fault in ("cut", "cut_mid_stream"):
        await emulator.control.set_fault(fault, count=1)
        with pytest.raises((httpx.TransportError, httpx2.TransportError)):
            await asyncio.to_thread(client.post, stream(emulator.url), json=ask("fail"))
    with pytest.raises((httpx.ConnectError, httpx2.ConnectError)):
        await asyncio.to_thread(client.get, "http://127.0.0.1:1/")
    await wait_until(lambda: held(limiter) == 0)


async def test_past_the_deadline_nothing_is_sent(
    make_sync: MakeSync, make_client: MakeClient, emulator: Emulator
) -> None:
    limiter = make_sync()
    client = make_client(limiter, Demand((LIMIT,), deadline_ms=30))

    def two_at_once() -> None:
        with limiter.acquire(LIMIT), pytest.raises(DeadlineExceeded):
            client.post(whole(emulator.url), json=ask("late"))

    await asyncio.to_thread(two_at_once)
    assert (await emulator.control.stats())["text_only"].arrived == 0


async def test_redirects_and_requests_without_a_demand(
    make_sync: MakeSync, make_client: MakeClient, upstream: Upstream
) -> None:
    limiter = make_sync(1)
    client = make_client(limiter, lambda request: None if "empty" in str(request.url) else ONE)

    def calls() -> tuple[int, int]:
        whole = client.get(f"{upstream.url}/redirect", follow_redirects=True)
        with limiter.acquire(LIMIT):
            return whole.status_code, client.get(f"{upstream.url}/empty").status_code

    assert await asyncio.to_thread(calls) == (200, 204)
    assert upstream.paths == ["/redirect", "/whole", "/empty"]


async def test_a_reader_whose_permit_is_lost_gets_lease_lost(
    make_sync: MakeSync, make_client: MakeClient, emulator: Emulator
) -> None:
    limiter = make_sync()
    client = make_client(limiter, ONE)
    await emulator.control.set_behaviour(between_ms=30, chunks=200)
    reading = threading.Event()

    def read() -> None:
        with client.stream("POST", stream(emulator.url), json=ask("long")) as answer:
            for _ in answer.iter_bytes():
                reading.set()

    task = asyncio.create_task(asyncio.to_thread(read))
    await wait_until(reading.is_set)
    await asyncio.to_thread(limiter.close)
    with pytest.raises(LeaseLost):
        await task
    await until_in_flight(emulator, 0)


async def test_an_answer_that_nobody_reads_is_closed_when_its_permit_is_lost(
    make_sync: MakeSync, make_client: MakeClient, emulator: Emulator
) -> None:
    limiter = make_sync()
    answer = await hanging(emulator, make_client(limiter, ONE))
    await asyncio.to_thread(limiter.close)
    await until_in_flight(emulator, 0)
    with pytest.raises(LeaseLost):
        await asyncio.to_thread(answer.read)


async def test_a_call_that_is_overdue_is_closed(
    make_sync: MakeSync, make_client: MakeClient, emulator: Emulator
) -> None:
    limiter = make_sync()
    answer = await hanging(emulator, make_client(limiter, Demand((LIMIT,), hard_ms=100)))
    await until_in_flight(emulator, 0)
    await wait_until(lambda: held(limiter) == 0)
    with pytest.raises(UpstreamTimeout):
        await asyncio.to_thread(answer.read)
    assert waiting(limiter) == 0
