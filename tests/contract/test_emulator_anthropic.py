"""The unmodified Anthropic SDK against the emulator."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.waiting import wait_until
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.emulator.state import Billed

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic

MODEL = "claude-sonnet-5-5"


def client(emulator: Emulator, **options: Any) -> AsyncAnthropic:
    """It repeats nothing by itself, so that a test sees what came."""
    from anthropic import AsyncAnthropic

    return AsyncAnthropic(
        **{"api_key": "any-key", "base_url": emulator.url, "max_retries": 0, **options}
    )


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


@pytest.fixture
async def sdk(emulator: Emulator) -> AsyncIterator[AsyncAnthropic]:
    async with client(emulator) as opened:
        yield opened


def asked(content: Any = "Hello", **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": MODEL, "max_tokens": 1000, "messages": messages, **options}


async def ask(sdk: AsyncAnthropic, content: Any = "Hello", **options: Any) -> Any:
    return await sdk.messages.create(**asked(content, **options))


async def test_a_message_quotes_the_prompt_and_tells_its_usage(
    sdk: AsyncAnthropic, emulator: Emulator
) -> None:
    message = await ask(sdk, "Why is the sky blue?", system="Be kind")
    (block,) = message.content
    assert "Why is the sky blue?" in block.text
    assert (message.role, message.stop_reason, message.model) == ("assistant", "end_turn", MODEL)
    assert message.usage.input_tokens == 7
    assert message.usage.output_tokens == len(block.text.split())
    stats = await emulator.control.stats()
    assert stats["text_only"].finished == 1
    billed = Billed(1, message.usage.input_tokens, message.usage.output_tokens)
    assert stats.tokens == {MODEL: {"finished": billed}}
    (call,) = await emulator.control.calls()
    assert (call.dialect, call.method) == ("anthropic", "generate")


async def test_the_synchronous_sdk_streams_what_the_whole_says(emulator: Emulator) -> None:
    from anthropic import Anthropic

    def both() -> tuple[Any, Any]:
        with Anthropic(api_key="k", base_url=emulator.url) as sdk:
            whole = sdk.messages.create(**asked())
            with sdk.messages.stream(**asked()) as stream:
                return whole, stream.get_final_message()

    whole, streamed = await asyncio.to_thread(both)
    assert [block.text for block in whole.content] == [block.text for block in streamed.content]
    assert whole.usage.output_tokens == streamed.usage.output_tokens
    assert whole.stop_reason == streamed.stop_reason == "end_turn"


async def test_a_stream_has_its_events_in_order(sdk: AsyncAnthropic, emulator: Emulator) -> None:
    await emulator.control.set_behaviour(chunks=3)
    events = [event async for event in await ask(sdk, stream=True)]
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0].message.usage.input_tokens == 2
    whole = await ask(sdk)
    counts = events[-2].usage.model_dump(exclude_none=True)
    counts.pop("output_tokens_details")
    begun = events[0].message.usage.model_dump()
    assert counts == {name: begun[name] for name in counts} | {
        "output_tokens": whole.usage.output_tokens
    }
    assert counts.keys() > {"cache_read_input_tokens", "cache_creation_input_tokens"}
    assert events[-2].delta.stop_reason == "end_turn"


async def test_a_bound_on_output_is_kept_and_told(sdk: AsyncAnthropic) -> None:
    message = await ask(sdk, max_tokens=3)
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 3)


WEATHER = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


async def test_a_tool_is_called_and_its_result_heard(sdk: AsyncAnthropic) -> None:
    plain = await ask(sdk, "Is it raining?", tools=[WEATHER])
    forced = await ask(sdk, "Is it raining?", tools=[WEATHER], tool_choice={"type": "any"})
    assert (plain.stop_reason, forced.stop_reason) == ("end_turn", "tool_use")
    async with sdk.messages.stream(**asked("Please get weather", tools=[WEATHER])) as stream:
        message: Any = await stream.get_final_message()
    (use,) = message.content
    assert (message.stop_reason, use.name, bool(use.input["city"])) == (
        "tool_use",
        "get_weather",
        True,
    )
    assert use.input == forced.content[0].input
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "22 degrees"}
    messages = [
        *asked("Please get weather")["messages"],
        {"role": "assistant", "content": [use.to_dict()]},
        {"role": "user", "content": [result]},
    ]
    second = await ask(sdk, tools=[WEATHER], messages=messages)
    assert second.stop_reason == "end_turn"
    assert "22 degrees" in second.content[0].text


async def test_pictures_and_documents_cost_tokens(sdk: AsyncAnthropic, emulator: Emulator) -> None:
    data = b64encode(b"x" * 100).decode()
    content: list[Any] = [
        {"type": "text", "text": "What is it?"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
        {"type": "document", "source": {"type": "url", "url": "https://example.com/a.pdf"}},
    ]
    message = await ask(sdk, content)
    named = "2 files: image/png (100 bytes), application/pdf (https://example.com/a.pdf)"
    assert named in message.content[0].text
    counted = await sdk.messages.count_tokens(model=MODEL, messages=asked(content)["messages"])
    assert message.usage.input_tokens == counted.input_tokens == 3 + 258 + 258
    stats = await emulator.control.stats()
    assert (stats["multi_modal"].finished, stats["other"].finished) == (1, 1)


async def test_an_answer_fits_its_schema(sdk: AsyncAnthropic) -> None:
    from pydantic import BaseModel

    class Seen(BaseModel):
        what: str
        sure: bool

    message = await sdk.messages.parse(**asked(output_format=Seen))
    assert message.parsed_output is not None
    assert message.parsed_output.what


async def test_models_are_told_by_the_version_header(sdk: AsyncAnthropic) -> None:
    assert MODEL in [model.id async for model in sdk.models.list()]
    assert (await sdk.models.retrieve(MODEL)).id == MODEL


ERRORS: list[tuple[str, str, int, str]] = [
    ("throttled", "RateLimitError", 429, "rate_limit_error"),
    ("day_quota", "RateLimitError", 429, "rate_limit_error"),
    ("unavailable", "OverloadedError", 529, "overloaded_error"),
    ("internal", "InternalServerError", 500, "api_error"),
    ("unauthorized", "AuthenticationError", 401, "authentication_error"),
    ("forbidden", "PermissionDeniedError", 403, "permission_error"),
]


@pytest.mark.parametrize(("fault", "name", "status", "kind"), ERRORS)
async def test_a_plain_error_has_its_class_and_type(
    sdk: AsyncAnthropic, emulator: Emulator, fault: str, name: str, status: int, kind: str
) -> None:
    from anthropic import APIStatusError, _exceptions

    await emulator.control.set_fault(fault, retry_after_s=1.2)
    with pytest.raises(APIStatusError) as failed:
        await ask(sdk)
    assert isinstance(failed.value, getattr(_exceptions, name))
    body: Any = failed.value.body
    assert (failed.value.status_code, body["error"]["type"]) == (status, kind)
    assert body["type"] == "error"
    assert ("retry-after" in failed.value.response.headers) == (status == 429)


async def test_a_limit_that_is_enforced_is_told_in_this_dialect(
    sdk: AsyncAnthropic, emulator: Emulator
) -> None:
    from anthropic import RateLimitError

    await emulator.control.set_behaviour(rates=[{"scope": "total", "limit": 0}])
    with pytest.raises(RateLimitError) as failed:
        await ask(sdk)
    assert failed.value.response.headers["anthropic-ratelimit-requests-limit"] == "0"
    await emulator.control.set_behaviour(rates=[], concurrency={"text_only": 0})
    with pytest.raises(RateLimitError, match="concurrent connections"):
        await ask(sdk)


async def test_keys_models_and_bodies_are_checked(sdk: AsyncAnthropic, emulator: Emulator) -> None:
    from anthropic import AuthenticationError, BadRequestError, NotFoundError

    async with client(emulator, api_key="invalid-key") as wrong:
        with pytest.raises(AuthenticationError):
            await ask(wrong)
    wrong_ones: list[Any] = [{"messages": []}, {"max_tokens": 0}, {"messages": [{"role": "x"}]}]
    for body in wrong_ones:
        with pytest.raises(BadRequestError):
            await ask(sdk, **body)
    await emulator.control.set_behaviour(strict_models=True)
    with pytest.raises(NotFoundError):
        await ask(sdk, model="claude-0")
    url = f"{emulator.url}/v1/messages"
    for headers, status in (({}, 401), ({"x-api-key": "k"}, 400)):
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(url, json=asked()) as response,
        ):
            assert (response.status, (await response.json())["type"]) == (status, "error")
    place = urlsplit(emulator.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    lines = (
        *(b"POST /v1/messages HTTP/1.1", b"host: a", b"x-api-key: k", b"content-length: 2"),
        *(b"anthropic-version: 2023-06-01", b"anthropic-beta: \xff", b"", b"{}"),
    )
    writer.write(b"\r\n".join(lines))
    assert b" 400 " in await reader.readline(), "a header that is not UTF-8"
    writer.close()


async def test_an_error_comes_inside_a_stream_that_began_well(
    sdk: AsyncAnthropic, emulator: Emulator
) -> None:
    from anthropic import APIStatusError

    await emulator.control.set_fault("error_in_stream", code=529)
    events: list[Any] = []
    with pytest.raises(APIStatusError, match="overloaded_error"):
        await listen(sdk, events)
    assert events[-1].type == "content_block_delta"
    assert (await emulator.control.stats())["text_only"].failed == 1


async def listen(sdk: AsyncAnthropic, events: list[Any]) -> None:
    async for event in await ask(sdk, stream=True):
        events.append(event)


async def gone(emulator: Emulator) -> bool:
    return (await emulator.control.stats())["text_only"].client_gone == 1


async def test_leaving_in_mid_stream_is_counted_and_charged_for_what_came(
    sdk: AsyncAnthropic, emulator: Emulator
) -> None:
    await emulator.control.set_fault("hang_mid_stream", after_chunks=2)
    events: list[Any] = []
    task = asyncio.create_task(listen(sdk, events))
    await wait_until(lambda: len(events) == 4)
    task.cancel()
    await wait_until(partial(gone, emulator))
    said = "".join(event.delta.text for event in events[2:])
    stats = await emulator.control.stats()
    assert stats.tokens == {MODEL: {"client_gone": Billed(1, 2, len(said.split()))}}
