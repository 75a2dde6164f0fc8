"""Transports of one's own under ours: answers that are there at once, failing demands, closing."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import httpx2
import pytest

from tests.integration.library.makers import LIMIT, MakeLimiter, MakeSync, held, until_free
from tests.waiting import wait_until
from tidegate.integrations import httpx as ours_httpx
from tidegate.integrations import httpx2 as ours_httpx2
from tidegate.limiter import Demand

ONE = Demand((LIMIT,), deadline_ms=20_000)
PAIRS = pytest.mark.parametrize(
    ("library", "ours"), [(httpx, ours_httpx), (httpx2, ours_httpx2)], ids=["httpx", "httpx2"]
)


@PAIRS
async def test_an_answer_that_is_there_at_once_goes_through_the_permit_too(
    make_limiter: MakeLimiter, library: Any, ours: Any
) -> None:
    limiter = await make_limiter()
    seen = []

    def answer(request: Any) -> Any:
        seen.append(held(limiter))
        return library.Response(201, json={"path": request.url.path}, headers={"x-one": "1"})

    inner = library.MockTransport(answer)
    transport = ours.AsyncLimitedTransport(limiter, ONE, inner=inner)
    async with library.AsyncClient(transport=transport) as client:
        for _ in range(3):
            got = await client.get("http://upstream/some")
            assert (got.status_code, got.json(), got.headers["x-one"]) == (
                201,
                {"path": "/some"},
                "1",
            )
    assert seen == [1, 1, 1]
    await until_free(limiter)


@PAIRS
async def test_the_same_in_threads(make_sync: MakeSync, library: Any, ours: Any) -> None:
    limiter = make_sync()

    def answer(request: Any) -> Any:
        return library.Response(200, text=str(held(limiter)))

    def call() -> str:
        transport = ours.LimitedTransport(limiter, ONE, inner=library.MockTransport(answer))
        with library.Client(transport=transport) as client:
            text: str = client.get("http://upstream/some").text
            return text

    assert await asyncio.to_thread(call) == "1"
    await wait_until(lambda: held(limiter) == 0)


@PAIRS
async def test_a_demand_that_fails_sends_nothing(
    make_limiter: MakeLimiter, library: Any, ours: Any
) -> None:
    limiter = await make_limiter()

    def demand(request: Any) -> Demand:
        raise ZeroDivisionError

    def answer(request: Any) -> Any:
        raise AssertionError("sent")

    inner = library.MockTransport(answer)
    transport = ours.AsyncLimitedTransport(limiter, demand, inner=inner)
    async with library.AsyncClient(transport=transport) as client:
        with pytest.raises(ZeroDivisionError):
            await client.get("http://upstream/some")
    assert held(limiter) == 0


@PAIRS
async def test_closing_the_client_closes_the_inner_transport_and_not_the_limiter(
    make_limiter: MakeLimiter, make_sync: MakeSync, library: Any, ours: Any
) -> None:
    closed = []

    class Inner(library.MockTransport):  # type: ignore[misc]
        def close(self) -> None:
            closed.append("threads")

        async def aclose(self) -> None:
            closed.append("asyncio")

    limiter, threads = await make_limiter(), make_sync()
    inner = Inner(lambda request: library.Response(200))
    async with library.AsyncClient(transport=ours.AsyncLimitedTransport(limiter, ONE, inner=inner)):
        pass
    with library.Client(transport=ours.LimitedTransport(threads, ONE, inner=inner)):
        pass
    assert closed == ["asyncio", "threads"]
    async with limiter.acquire(LIMIT, deadline_ms=20_000):
        assert held(limiter) == 1
