"""The unmodified SDKs of Google and OpenAI under the limiter."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from google import genai
from google.genai.types import HttpOptions
from openai import AsyncOpenAI, OpenAI

from tests.integration.library.makers import LIMIT, MODEL, MakeLimiter, MakeSync, held
from tests.integration.library.upstream import Upstream
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator
from tidegate.errors import DeadlineExceeded
from tidegate.integrations.httpx2 import AsyncLimitedTransport, LimitedTransport
from tidegate.limiter import Demand, Limiter

ONE = Demand((LIMIT,), deadline_ms=20_000)


@asynccontextmanager
async def google(
    limiter: Limiter, emulator: Emulator, demand: Demand = ONE
) -> AsyncIterator[genai.client.AsyncClient]:
    transport = AsyncLimitedTransport(limiter, demand)
    async with httpx2.AsyncClient(transport=transport) as http:
        options = HttpOptions(base_url=emulator.url, httpx_async_client=http)
        yield genai.Client(api_key="k", http_options=options).aio


async def test_googles_sdk_never_has_more_in_flight_than_the_limit(
    make_limiter: MakeLimiter, emulator: Emulator
) -> None:
    limiter = await make_limiter(3)
    await emulator.control.set_behaviour(first_byte_ms=4, between_ms=1)

    async def whole(sdk: genai.client.AsyncClient, number: int) -> str:
        answer = await sdk.models.generate_content(model=MODEL, contents=f"call {number}")
        return answer.text or ""

    async def streamed(sdk: genai.client.AsyncClient, number: int) -> str:
        chunks = await sdk.models.generate_content_stream(model=MODEL, contents=f"call {number}")
        return "".join([chunk.text or "" async for chunk in chunks])

    async with google(limiter, emulator) as sdk:
        ways = (whole, streamed)
        answers = await asyncio.gather(*(ways[n % 2](sdk, n) for n in range(30)))
    assert all(f"call {number}" in answer for number, answer in enumerate(answers))
    stats = await emulator.control.stats()
    assert (stats["text_only"].over, stats.max_in_flight) == (0, 3)


async def test_a_stream_of_googles_sdk_that_is_left_early_gives_the_permit_back(
    make_limiter: MakeLimiter, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    await emulator.control.set_fault("hang_mid_stream", count=1)

    async def read_the_first(sdk: genai.client.AsyncClient) -> str:
        chunks = await sdk.models.generate_content_stream(model=MODEL, contents="leave")
        async for chunk in chunks:
            assert held(limiter) == 1
            return chunk.text or ""
        return ""

    async with google(limiter, emulator) as sdk:
        assert await read_the_first(sdk)
        # The SDK leaves closing to Python's collector of cycles.
        await wait_until(lambda: gc.collect() >= 0 and held(limiter) == 0)


async def test_a_refusal_leaves_googles_sdk_as_it_is(
    make_limiter: MakeLimiter, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    async with (
        google(limiter, emulator, Demand((LIMIT,), deadline_ms=20)) as sdk,
        limiter.acquire(LIMIT),
    ):
        with pytest.raises(DeadlineExceeded):
            await sdk.models.generate_content(model=MODEL, contents="late")


async def test_googles_sync_sdk_in_threads(make_sync: MakeSync, emulator: Emulator) -> None:
    limiter = make_sync(3)
    await emulator.control.set_behaviour(first_byte_ms=50)

    def calls() -> list[str]:
        with httpx2.Client(transport=LimitedTransport(limiter, ONE)) as http:
            options = HttpOptions(base_url=emulator.url, httpx_client=http)
            models = genai.Client(api_key="k", http_options=options).models

            def call(number: int) -> str:
                answer = models.generate_content(model=MODEL, contents=f"call {number}")
                return answer.text or ""

            with ThreadPoolExecutor(8) as threads:
                return list(threads.map(call, range(20)))

    assert all(
        f"call {number}" in answer for number, answer in enumerate(await asyncio.to_thread(calls))
    )
    stats = await emulator.control.stats()
    assert (stats["text_only"].over, stats.max_in_flight) == (0, 3)


async def test_openais_sdk_never_has_more_in_flight_than_the_limit(
    make_limiter: MakeLimiter, upstream: Upstream
) -> None:
    limiter = await make_limiter(3)
    http = httpx2.AsyncClient(transport=AsyncLimitedTransport(limiter, ONE))
    async with AsyncOpenAI(api_key="k", base_url=f"{upstream.url}/v1", http_client=http) as sdk:

        async def call(number: int) -> Any:
            answer = await sdk.chat.completions.create(
                model="gpt", messages=[{"role": "user", "content": f"call {number}"}]
            )
            return answer.choices[0].message.content

        answers = await asyncio.gather(*(call(number) for number in range(30)))
    assert answers == [f"You said call {number}" for number in range(30)]
    assert upstream.peak == 3


async def test_a_refusal_leaves_openais_sdk_as_it_is_and_is_not_repeated(
    make_limiter: MakeLimiter, upstream: Upstream
) -> None:
    limiter = await make_limiter()
    transport = AsyncLimitedTransport(limiter, Demand((LIMIT,), deadline_ms=20))
    async with httpx2.AsyncClient(transport=transport) as http, limiter.acquire(LIMIT):
        sdk = AsyncOpenAI(api_key="k", base_url=f"{upstream.url}/v1", http_client=http)
        with pytest.raises(DeadlineExceeded):
            await sdk.chat.completions.create(
                model="gpt", messages=[{"role": "user", "content": "late"}]
            )
    assert upstream.paths == []
    assert limiter._queue.counts.admitted == 1


async def test_openais_sync_sdk(make_sync: MakeSync, upstream: Upstream) -> None:
    limiter = make_sync()

    def call() -> Any:
        http = httpx2.Client(transport=LimitedTransport(limiter, ONE))
        with OpenAI(api_key="k", base_url=f"{upstream.url}/v1", http_client=http) as sdk:
            answer = sdk.chat.completions.create(
                model="gpt", messages=[{"role": "user", "content": "hello"}]
            )
            return answer.choices[0].message.content

    assert await asyncio.to_thread(call) == "You said hello"
    await wait_until(lambda: held(limiter) == 0)
