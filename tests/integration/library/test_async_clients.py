"""Real clients of httpx, httpx2 and aiohttp under the limiter, against the emulator's truth."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Callable

import pytest

from tests.integration.library.http_clients import CLIENT_ERRORS, Aiohttp, Http, OpenAnswer
from tests.integration.library.makers import (
    LIMIT,
    MakeLimiter,
    ask,
    held,
    stream,
    until_free,
    waiting,
    whole,
)
from tests.integration.library.upstream import Upstream
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator
from tidegate.errors import DeadlineExceeded, LeaseLost, UpstreamTimeout
from tidegate.limiter import Demand

MakeHttp = Callable[..., Http]
ONE = Demand((LIMIT,), deadline_ms=20_000)


async def in_flight(emulator: Emulator) -> int:
    return (await emulator.control.stats()).in_flight


async def until_closed_upstream(emulator: Emulator) -> None:
    async def closed() -> bool:
        return await in_flight(emulator) == 0

    await wait_until(closed, what="the upstream sees the end")


async def hanging(emulator: Emulator, http: Http) -> OpenAnswer:
    """A stream that stops after its first chunk, which has not been read."""
    await emulator.control.set_fault("hang_mid_stream", count=1)
    return await http.send("POST", stream(emulator.url), ask("hang"))


class Reader:
    """A task that reads an answer; `begun` once its first bytes have come."""

    def __init__(self, answer: OpenAnswer) -> None:
        self.begun = asyncio.Event()
        self.task = asyncio.create_task(self._read(answer))

    async def _read(self, answer: OpenAnswer) -> None:
        async for _ in answer.chunks():
            self.begun.set()


async def reading(answer: OpenAnswer) -> asyncio.Task[None]:
    reader = Reader(answer)
    async with asyncio.timeout(10):
        await reader.begun.wait()
    return reader.task


async def test_never_more_than_the_limit_are_in_flight_over_two_limiters(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    clients = [make_http(await make_limiter(3), ONE) for _ in range(2)]
    await emulator.control.set_behaviour(first_byte_ms=4, between_ms=1)

    async def call(number: int) -> int:
        url = (stream if number % 3 else whole)(emulator.url)
        answer = await clients[number % 2].send("POST", url, ask(f"call {number}"))
        await answer.read()
        return answer.status

    assert await asyncio.gather(*(call(number) for number in range(40))) == [200] * 40
    stats = await emulator.control.stats()
    assert (stats["text_only"].over, stats.max_in_flight) == (0, 3)
    assert stats["text_only"].finished == 40


async def test_a_permit_is_held_until_the_last_byte_was_read(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, ONE)
    await emulator.control.set_behaviour(between_ms=20)
    answer = await http.send("POST", stream(emulator.url), ask("one"))
    chunks = answer.chunks()
    assert await anext(chunks)
    assert held(limiter) == 1
    second = asyncio.create_task(http.send("POST", stream(emulator.url), ask("two")))
    await wait_until(lambda: waiting(limiter) == 1)
    assert [chunk async for chunk in chunks]
    await (await second).read()
    await until_free(limiter)
    assert (await emulator.control.stats()).max_in_flight == 1


async def test_the_body_may_be_read_by_another_task(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, ONE)
    answer = await asyncio.create_task(http.send("POST", stream(emulator.url), ask("one")))
    assert b"one" in await asyncio.create_task(answer.read())
    await until_free(limiter)


async def test_closing_an_answer_gives_the_permit_back_and_ends_the_call(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    answer = await hanging(emulator, make_http(limiter, ONE))
    assert (held(limiter), await in_flight(emulator)) == (1, 1)
    await answer.close()
    await answer.close()
    await until_free(limiter)
    await until_closed_upstream(emulator)


async def test_cancelling_a_reader_in_mid_stream_gives_the_permit_back(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    answer = await hanging(emulator, make_http(limiter, ONE))
    task = await reading(answer)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_free(limiter)
    await until_closed_upstream(emulator)


async def test_cancelling_a_request_before_its_answer_gives_the_permit_back(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    await emulator.control.set_fault("hang", count=1)
    http = make_http(limiter, ONE)
    asking = asyncio.create_task(http.send("POST", whole(emulator.url), ask("hang")))

    async def sent() -> bool:
        return await in_flight(emulator) == 1

    await wait_until(sent)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await until_free(limiter)
    await until_closed_upstream(emulator)


async def test_cancelling_the_wait_takes_the_ticket_out(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, ONE)
    async with limiter.acquire(LIMIT):
        asking = asyncio.create_task(http.send("POST", whole(emulator.url), ask("late")))
        await wait_until(lambda: waiting(limiter) == 1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await wait_until(lambda: waiting(limiter) == 0)
    assert (await emulator.control.stats())["text_only"].arrived == 0


async def test_an_answer_that_is_dropped_is_closed_and_its_permit_given_back(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, ONE)
    answer = await hanging(emulator, http)
    assert (held(limiter), await in_flight(emulator)) == (1, 1)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always", ResourceWarning)
        del answer
        if isinstance(http, Aiohttp):
            # Until then aiohttp keeps what nobody else has.
            await http.aclose()
        await wait_until(lambda: gc.collect() >= 0 and held(limiter) == 0)
    await until_closed_upstream(emulator)


@pytest.mark.parametrize("fault", ["cut", "cut_mid_stream"])
async def test_a_broken_connection_gives_the_permit_back(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator, fault: str
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, ONE)
    await emulator.control.set_fault(fault, count=1)

    async def call() -> None:
        answer = await http.send("POST", stream(emulator.url), ask("fail"))
        await answer.read()

    with pytest.raises(CLIENT_ERRORS):
        await call()
    await until_free(limiter)


async def test_an_error_as_an_answer_gives_the_permit_back(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, ONE)
    await emulator.control.set_fault("unavailable", count=1)
    answer = await http.send("POST", stream(emulator.url), ask("fail"))
    assert (answer.status, b"overloaded" in await answer.read()) == (503, True)
    await until_free(limiter)


async def test_a_refused_connection_gives_the_permit_back(
    make_limiter: MakeLimiter, make_http: MakeHttp
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, ONE)
    for _ in range(3):
        with pytest.raises(CLIENT_ERRORS):
            await http.send("GET", "http://127.0.0.1:1/")
    await until_free(limiter)


async def test_past_the_deadline_nothing_is_sent(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, Demand((LIMIT,), deadline_ms=30))
    async with limiter.acquire(LIMIT):
        with pytest.raises(DeadlineExceeded) as refused:
            await http.send("POST", whole(emulator.url), ask("late"))
    assert refused.value.limit == LIMIT
    assert (await emulator.control.stats())["text_only"].arrived == 0


async def test_a_request_without_a_demand_needs_no_permit(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, lambda request: ONE if "stream" in str(request.url) else None)
    async with limiter.acquire(LIMIT):
        answer = await http.send("POST", whole(emulator.url), ask("free"))
        assert b"free" in await answer.read()
        asking = asyncio.create_task(http.send("POST", stream(emulator.url), ask("waits")))
        await wait_until(lambda: waiting(limiter) == 1)
    await (await asking).read()


async def test_each_hop_of_a_redirect_takes_a_permit_of_its_own(
    make_limiter: MakeLimiter, make_http: MakeHttp, upstream: Upstream
) -> None:
    limiter = await make_limiter(1)
    http = make_http(limiter, ONE)
    answer = await http.send("GET", f"{upstream.url}/redirect")
    assert b"total_tokens" in await answer.read()
    assert upstream.paths == ["/redirect", "/whole"]
    assert limiter._queue.counts.admitted == 2
    await until_free(limiter)


async def test_an_answer_without_a_body_gives_the_permit_back(
    make_limiter: MakeLimiter, make_http: MakeHttp, upstream: Upstream
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, ONE)
    for method in ("GET", "HEAD"):
        answer = await http.send(method, f"{upstream.url}/empty")
        assert await answer.read() == b""
        await until_free(limiter)


async def test_a_reader_whose_permit_is_lost_gets_lease_lost_and_the_call_ends(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    answer = await hanging(emulator, make_http(limiter, ONE))
    task = await reading(answer)
    await limiter.aclose()
    with pytest.raises(LeaseLost):
        await task
    assert task.cancelling() == 0
    await until_closed_upstream(emulator)


async def test_a_reader_whose_process_is_revoked_gets_lease_lost(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter, other = await make_limiter(1, "taken for dead"), await make_limiter()
    task = await reading(await hanging(emulator, make_http(limiter, ONE)))
    assert await other.revoke("taken for dead") == 1
    with pytest.raises(LeaseLost):
        await task
    await until_closed_upstream(emulator)


async def test_an_answer_that_nobody_reads_is_closed_when_its_permit_is_lost(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    answer = await hanging(emulator, make_http(limiter, ONE))
    await limiter.aclose()
    await until_closed_upstream(emulator)
    with pytest.raises(LeaseLost):
        await answer.read()


async def test_a_sender_whose_permit_is_lost_gets_lease_lost(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    await emulator.control.set_fault("hang", count=1)
    http = make_http(limiter, ONE)
    asking = asyncio.create_task(http.send("POST", whole(emulator.url), ask("hang")))

    async def sent() -> bool:
        return await in_flight(emulator) == 1

    await wait_until(sent)
    await limiter.aclose()
    with pytest.raises(LeaseLost):
        await asking
    await until_closed_upstream(emulator)


@pytest.mark.parametrize("read", [True, False], ids=["being read", "left alone"])
async def test_a_call_that_is_overdue_is_closed(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator, read: bool
) -> None:
    limiter = await make_limiter()
    answer = await hanging(emulator, make_http(limiter, Demand((LIMIT,), hard_ms=1_000)))
    if not read:
        await until_closed_upstream(emulator)
    with pytest.raises(UpstreamTimeout) as overdue:
        await answer.read()
    assert overdue.value.phase == "total"
    await until_free(limiter)
    await until_closed_upstream(emulator)
