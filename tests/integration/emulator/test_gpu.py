"""A GPU server over HTTP, by OpenAI's own SDK and by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import httpx2
import orjson
import pytest
from openai import APIStatusError, AsyncOpenAI

from tests.waiting import wait_until
from tidegate.emulator.server import Emulator
from tidegate.policy.deployment import Upstream
from tidegate.upstream.credentials import open_wire
from tidegate.upstream.server_load import ServerLoad, server_load
from tidegate.upstream.transport import Timeouts

CHAT: Final = "/v1/chat/completions"
SPEED: Final = 40


@pytest.fixture
async def sdk(emulator: Emulator) -> AsyncIterator[AsyncOpenAI]:
    await emulator.control.set_behaviour(gpu={"speed": SPEED})
    async with AsyncOpenAI(
        api_key="none", base_url=f"{emulator.url}/v1", max_retries=0, timeout=10
    ) as client:
        yield client


@pytest.fixture
async def http(emulator: Emulator) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=emulator.url, timeout=10) as client:
        yield client


def under_way(client: httpx2.AsyncClient, request: httpx2.Request) -> asyncio.Task[httpx2.Response]:
    """A request under way; cancelled, its connection is closed."""
    return asyncio.create_task(client.send(request))


def body(words: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "any", "messages": [{"role": "user", "content": words}], **more}


async def test_it_answers_plain_and_streamed_with_what_it_read(sdk: AsyncOpenAI) -> None:
    prompt = "A long beginning that all of these have in common. " * 20
    messages: Any = [{"role": "user", "content": prompt}]
    plain = await sdk.chat.completions.create(model="any", messages=messages, max_tokens=12)
    assert plain.usage is not None
    assert plain.usage.completion_tokens == 12
    assert plain.choices[0].finish_reason == "length"
    stream = await sdk.chat.completions.create(
        model="other",
        messages=messages,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert len([one for one in chunks if one.choices and one.choices[0].delta.content]) == 12
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 12
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


async def test_behind_a_stream_the_connection_is_closed_without_a_word(
    emulator: Emulator, sdk: AsyncOpenAI
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", emulator.port)
    sent = orjson.dumps(body(max_tokens=2, stream=True))
    writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\n" % CHAT.encode())
    writer.write(b"content-length: %d\r\n\r\n%b" % (len(sent), sent))
    head, _, rest = (await reader.read()).partition(b"\r\n\r\n")  # until it is closed
    writer.close()
    assert b"keep-alive: timeout=5" in head.lower()
    assert b"connection: close" not in head.lower()
    assert rest.endswith(b"0\r\n\r\n")


async def test_its_own_pages_tell_who_computes_and_who_waits(
    emulator: Emulator, sdk: AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    await emulator.control.set_behaviour(gpu={"speed": 0.1, "slots": 2})
    async with httpx2.AsyncClient(base_url=emulator.url) as leaving:
        posts = [leaving.build_request("POST", CHAT, json=body(stream=True)) for _ in range(3)]
        tasks = [under_way(leaving, post) for post in posts]
        try:

            async def is_full() -> bool:
                text = (await http.get("/metrics")).text
                return "processing 2\n" in text and "deferred 1\n" in text

            await wait_until(is_full)
            slots = (await http.get("/slots")).json()
            assert [slot["is_processing"] for slot in slots] == [True, True]
            assert (await http.get("/props")).json()["total_slots"] == 2
        finally:
            for task in tasks:
                task.cancel()
    await emulator.control.set_behaviour(gpu={"speed": 1_000, "slots": 2})
    await wait_until(lambda: in_flight_is(emulator, 0))


async def in_flight_is(emulator: Emulator, count: int) -> bool:
    stats = await emulator.control.stats()
    return bool(stats.in_flight == count)


async def test_a_plain_call_that_was_left_goes_on_beside_a_stream(
    emulator: Emulator, sdk: AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    await emulator.control.set_behaviour(gpu={"speed": 4, "slots": 2})
    async with http.stream("POST", CHAT, json=body(max_tokens=600, stream=True)) as answer:
        pieces = answer.aiter_raw()
        await anext(pieces)
        async with httpx2.AsyncClient(base_url=emulator.url) as leaving:
            plain = under_way(
                leaving, leaving.build_request("POST", CHAT, json=body(max_tokens=200))
            )
            await wait_until(lambda: in_flight_is(emulator, 2))
            plain.cancel()
        async for _ in pieces:
            if await in_flight_is(emulator, 1):
                break
    outcomes = {call.outcome for call in await emulator.control.calls() if call.outcome}
    assert "finished" in outcomes  # the plain one was computed to its end, for nobody


@pytest.mark.parametrize(
    ("software", "status", "said"),
    [
        ("llama.cpp", 503, "unavailable_error"),
        ("vllm", 503, "queue is full"),
        ("sglang", 503, "queue is full"),
        ("tgi", 429, "overloaded"),
        ("ollama", 503, "maximum pending requests"),
    ],
)
async def test_each_is_busy_in_its_own_words(
    emulator: Emulator, http: httpx2.AsyncClient, software: str, status: int, said: str
) -> None:
    spec = {"software": software, "slots": 1, "most_waiting": 0, "speed": 1}
    await emulator.control.set_behaviour(gpu=spec)
    async with httpx2.AsyncClient(base_url=emulator.url) as leaving:
        first = under_way(leaving, leaving.build_request("POST", CHAT, json=body()))
        await wait_until(lambda: in_flight_is(emulator, 1))
        refused = await http.post(CHAT, json=body())
        first.cancel()
    assert refused.status_code == status
    assert said in refused.text


@pytest.mark.parametrize(
    ("software", "told"),
    [
        ("llama.cpp", ServerLoad(1, 0, 3)),
        ("vllm", ServerLoad(1, 0, None, 1_600, 0.063125)),
        ("sglang", ServerLoad(1, 0, None, 1_600, 0.063125)),
        ("tgi", ServerLoad(1, 0)),
        ("ollama", ServerLoad()),
    ],
)
async def test_its_load_is_read_from_its_own_pages(
    emulator: Emulator, software: str, told: ServerLoad
) -> None:
    spec = {"software": software, "slots": 3, "kv_tokens": 1_600, "speed": 0.01}
    await emulator.control.set_behaviour(gpu=spec)
    upstream = Upstream("gpu", {"openai": f"{emulator.url}/v1"}, "", provider=software)
    async with (
        httpx2.AsyncClient(base_url=emulator.url) as leaving,
        open_wire(Timeouts(1_000, 1_000, 1_000, 1_000), [upstream]) as wire,
    ):
        computing = under_way(leaving, leaving.build_request("POST", CHAT, json=body("a")))
        await wait_until(lambda: in_flight_is(emulator, 1))
        assert await server_load(wire, upstream) == told
        computing.cancel()


async def test_it_loads_and_says_in_numbers_what_was_wrong(
    emulator: Emulator, sdk: AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    await emulator.control.set_behaviour(gpu={"loading_ms": 1e8})
    with pytest.raises(APIStatusError) as loading:
        await sdk.chat.completions.create(**body())
    assert loading.value.status_code == 503
    await emulator.control.set_behaviour(gpu={"context_tokens": 100})
    long = (await http.post(CHAT, json=body("word " * 200))).json()["error"]
    assert (long["code"], long["type"]) == (400, "exceed_context_size_error")
    assert (await http.post(CHAT, content=b"{no")).status_code == 500
