"""The unmodified OpenAI SDK through the gateway: only its base URL is another one."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.gateway import PNG, Gateway, Opener
from tests.waiting import wait_until

MODEL = "gemini-2.5-flash"
MakeSdk = Callable[..., AsyncOpenAI]
PICTURE = f"data:image/png;base64,{b64encode(PNG).decode()}"


@pytest.fixture
async def sdk() -> AsyncIterator[MakeSdk]:
    made: list[AsyncOpenAI] = []

    def make(gateway: Gateway, **options: Any) -> AsyncOpenAI:
        usual = {"base_url": f"{gateway.url}/v1", "api_key": "of-a-client", "max_retries": 0}
        made.append(AsyncOpenAI(**{**usual, **options}))
        return made[-1]

    yield make
    for client in made:
        await client.close()


def says(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


class Colour(BaseModel):
    name: str
    bright: bool


async def test_a_whole_answer_and_its_record(gateway: Gateway, sdk: MakeSdk) -> None:
    raw = await sdk(gateway).chat.completions.with_raw_response.create(
        model=MODEL, messages=says("Say hello")
    )
    answer = raw.parse()
    assert "Say hello" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    row = await gateway.audit(raw.headers["x-tidegate-request-id"])
    told = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert (row["input_tokens"], row["output_tokens"]) == told
    assert (row["finish_reason"], row["response_id"]) == ("stop", answer.id)
    (call,) = await gateway.calls()
    assert (call.dialect, call.kind, call.outcome) == ("openai", "text_only", "finished")


async def test_the_synchronous_client_and_its_stream(gateway: Gateway) -> None:
    def both() -> tuple[str, str]:
        with OpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0) as client:
            whole = client.chat.completions.create(model=MODEL, messages=says("One two"))
            chunks = client.chat.completions.create(
                model=MODEL, messages=says("One two"), stream=True
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            return whole.choices[0].message.content or "", text

    whole, streamed = await asyncio.to_thread(both)
    assert whole == streamed != ""


async def test_a_stream_shows_no_usage_that_was_not_asked_for_and_is_accounted_all_the_same(
    gateway: Gateway, sdk: MakeSdk
) -> None:
    client = sdk(gateway)
    stream = await client.chat.completions.create(
        model=MODEL, messages=says("Tell me a story"), stream=True
    )
    request_id = stream.response.headers["x-tidegate-request-id"]
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)
    row = await gateway.audit(request_id)
    billed = (await gateway.upstream.stats()).billed()
    assert row["output_tokens"] + row["thoughts_tokens"] == billed.output_tokens > 0
    assert row["input_tokens"] == billed.input_tokens > 0
    assert row["streamed"]


async def test_a_stream_shows_the_usage_that_was_asked_for(gateway: Gateway, sdk: MakeSdk) -> None:
    stream = await sdk(gateway).chat.completions.create(
        model=MODEL,
        messages=says("Tell me a story"),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None


async def test_tools(gateway: Gateway, sdk: MakeSdk) -> None:
    tool: Any = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    answer = await sdk(gateway).chat.completions.create(
        model=MODEL, messages=says("Weather?"), tools=[tool], tool_choice="required"
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    calls = answer.choices[0].message.tool_calls or []
    assert [getattr(call, "function").name for call in calls] == ["weather"]  # noqa: B009


async def test_structured_output(gateway: Gateway, sdk: MakeSdk) -> None:
    answer = await sdk(gateway).chat.completions.parse(
        model=MODEL, messages=says("A colour"), response_format=Colour
    )
    assert isinstance(answer.choices[0].message.parsed, Colour)


async def test_files_make_it_multi_modal(gateway: Gateway, sdk: MakeSdk) -> None:
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": PICTURE}},
    ]
    await sdk(gateway).chat.completions.create(model=MODEL, messages=says(parts))
    (call,) = await gateway.calls()
    assert call.kind == "multi_modal"


async def test_responses_whole_and_streamed(gateway: Gateway, sdk: MakeSdk) -> None:
    client = sdk(gateway)
    whole = await client.responses.create(model=MODEL, input="Say hello")
    assert "Say hello" in whole.output_text
    stream = await client.responses.create(model=MODEL, input="Say hello", stream=True)
    kinds = [event.type async for event in stream]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    rows = await wait_until(lambda: two_rows(gateway), 20, "both records")
    billed = (await gateway.upstream.stats()).billed()
    assert sum(row["output_tokens"] for row in rows) == billed.output_tokens


async def two_rows(gateway: Gateway) -> list[Any] | None:
    rows = await gateway.database.fetch("SELECT * FROM audit WHERE source = 'relay'")
    return rows if len(rows) == 2 else None


async def test_embeddings_images_and_models(gateway: Gateway, sdk: MakeSdk) -> None:
    client = sdk(gateway)
    embedded = await client.embeddings.create(model="text-embedding-3-small", input=["a", "b"])
    assert len(embedded.data) == 2
    made = await client.images.generate(model="gemini-2.5-flash-image", prompt="A cat", n=2)
    assert len(made.data or []) == 2
    assert [model.id async for model in client.models.list()]
    kinds = [call.kind for call in await gateway.calls()]
    assert "image_generation" in kinds


async def test_errors_are_those_that_the_sdk_knows(open_gateway: Opener, sdk: MakeSdk) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1})
    client = sdk(gateway)
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model="", messages=says("x"))
    assert wrong.value.param == "model"
    await gateway.upstream.set_fault("hang", match="hold it")
    holding = asyncio.create_task(
        client.chat.completions.create(model=MODEL, messages=says("hold it"))
    )
    await gateway.in_flight(1)
    hurried = client.with_options(default_headers={"x-tidegate-deadline-ms": "30"})
    with pytest.raises(openai.RateLimitError) as full:
        await hurried.chat.completions.create(model=MODEL, messages=says("x"))
    assert int(full.value.response.headers["retry-after"]) >= 1
    assert full.value.body["limit"] == "kind:text_only"
    holding.cancel()


async def test_what_the_provider_refuses_is_told_in_its_own_words(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_behaviour(strict_models=True)
    with pytest.raises(openai.NotFoundError) as unknown:
        await sdk(gateway).chat.completions.create(model="no-such-model", messages=says("x"))
    assert unknown.value.code == "model_not_found"


async def test_a_fault_in_mid_stream_reaches_the_sdk_as_an_error(
    gateway: Gateway, sdk: MakeSdk
) -> None:
    await gateway.upstream.set_fault("cut_mid_stream")
    stream = await sdk(gateway).chat.completions.create(
        model=MODEL, messages=says("Tell me a story"), stream=True
    )
    with pytest.raises(openai.APIError):
        async for _ in stream:
            pass
    await wait_until(lambda: gateway.held == 0, 20, "the permit back")


async def test_leaving_in_mid_stream_closes_the_providers_call(
    gateway: Gateway, sdk: MakeSdk
) -> None:
    await gateway.upstream.set_behaviour(chunks=100, between_ms=20)
    stream = await sdk(gateway).chat.completions.create(
        model=MODEL, messages=says("Tell me a story"), stream=True
    )
    await anext(stream)
    await stream.close()
    await gateway.in_flight(0)
    await wait_until(lambda: gateway.held == 0, 20, "the permit back")
    assert [call.outcome for call in await gateway.calls()] == ["client_gone"]
