"""The unmodified OpenAI SDK against the emulator: chat completions."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from enum import Enum
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.contract.openai_sdk import (
    MODEL,
    ask,
    client,
    emulator,
    sdk,
    stream,
    sync_client,
    text_of,
    user,
)
from tidegate.emulator.server import Emulator

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["emulator", "sdk"]
PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 92


def data_url(mime_type: str, data: bytes) -> str:
    return f"data:{mime_type};base64,{b64encode(data).decode()}"


@pytest.mark.parametrize("prefix", ["/v1", "/v1beta/openai"])
async def test_an_answer_quotes_the_prompt_and_tells_its_usage(
    emulator: Emulator, prefix: str
) -> None:
    async with client(emulator, prefix) as sdk:
        answer = await ask(sdk, "Why is the sky blue?")
    (choice,) = answer.choices
    assert "Why is the sky blue?" in choice.message.content
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    words = len(choice.message.content.split())
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, words)
    assert usage.total_tokens == 5 + words
    assert (answer.model, answer.object) == (MODEL, "chat.completion")
    stats = await emulator.control.stats()
    assert (stats["text_only"].finished, stats["text_only"].in_flight) == (1, 0)
    (call,) = await emulator.control.calls()
    assert (call.dialect, call.method, call.model) == ("openai", "generate", MODEL)
    assert (call.input_tokens, call.output_tokens) == (5, words)


async def test_the_synchronous_sdk_is_served_too(emulator: Emulator) -> None:
    def both() -> tuple[str | None, str]:
        with sync_client(emulator) as sdk:
            whole = sdk.chat.completions.create(model=MODEL, messages=user("One two"))
            chunks = sdk.chat.completions.create(model=MODEL, messages=user("One two"), stream=True)
            return whole.choices[0].message.content, text_of(list(chunks))

    whole, streamed = await asyncio.to_thread(both)
    assert whole == streamed != ""


async def test_a_stream_tells_no_usage_unless_it_is_asked_to(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    await emulator.control.set_behaviour(chunks=5)
    whole = await ask(sdk)
    chunks = await stream(sdk)
    assert text_of(chunks) == whole.choices[0].message.content
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) == 5 + 2
    assert {(chunk.object, chunk.id) for chunk in chunks} == {
        ("chat.completion.chunk", chunks[0].id)
    }
    (_, streamed) = await emulator.control.calls()
    assert streamed.method == "stream"
    assert streamed.output_tokens == whole.usage.completion_tokens


async def test_a_stream_with_usage_ends_in_a_chunk_without_choices(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    *before, last = await stream(sdk, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in before)
    assert last.choices == []
    assert last.usage == (await ask(sdk)).usage


async def test_the_bytes_of_a_stream_are_events_and_a_done(emulator: Emulator) -> None:
    body = {
        "model": MODEL,
        "messages": user("Hello"),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with (
        aiohttp.ClientSession(headers={"Authorization": "Bearer k"}) as session,
        session.post(f"{emulator.url}/v1/chat/completions", json=body) as response,
    ):
        assert response.content_type == "text/event-stream"
        *events, done, rest = (await response.text()).split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    parsed = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all("usage" in event and event["usage"] is None for event in parsed[:-1])
    assert (parsed[-1]["choices"], parsed[-1]["usage"]["prompt_tokens"]) == ([], 2)


async def test_chunks_arrive_one_by_one_not_all_at_the_end(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    await emulator.control.set_fault("hang_mid_stream", count=1)
    chunks = await ask(sdk, stream=True)
    await asyncio.wait_for(anext(chunks), 20)
    assert (await asyncio.wait_for(anext(chunks), 20)).choices[0].delta.content
    assert (await emulator.control.stats())["text_only"].in_flight == 1
    await chunks.close()


async def test_several_choices_are_each_charged_for(sdk: AsyncOpenAI) -> None:
    one, three = await ask(sdk), await ask(sdk, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert three.usage.completion_tokens == 3 * one.usage.completion_tokens
    chunks = await stream(sdk, n=3)
    for index in range(3):
        said = [
            c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index
        ]
        assert "".join(said) == one.choices[0].message.content


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_a_bound_on_output_is_kept_and_told(sdk: AsyncOpenAI, name: str) -> None:
    answer = await ask(sdk, **{name: 3})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3
    chunks = await stream(sdk, **{name: 3})
    assert chunks[-1].choices[0].finish_reason == "length"
    assert text_of(chunks) == answer.choices[0].message.content


async def test_thoughts_are_part_of_the_completion_and_bounded_with_it(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    answer = await ask(sdk, reasoning_effort="low")
    thoughts = answer.usage.completion_tokens_details.reasoning_tokens
    words = len(answer.choices[0].message.content.split())
    assert thoughts > 0
    assert answer.usage.completion_tokens == words + thoughts
    short = await ask(sdk, reasoning_effort="low", max_completion_tokens=10)
    assert short.usage.completion_tokens == 10
    assert (short.choices[0].finish_reason, short.choices[0].message.content) == ("length", "")
    calls = await emulator.control.calls()
    assert [call.thoughts_tokens for call in calls] == [thoughts, 10]


async def test_unknown_fields_are_ignored(sdk: AsyncOpenAI) -> None:
    answer = await ask(sdk, extra_body={"something_new": {"a": 1}}, temperature=0.1)
    assert answer.choices[0].message.content


PARTS: list[tuple[str, Any, str, int]] = [
    ("picture", {"type": "image_url", "image_url": {"url": data_url("image/png", PNG)}},
     "image/png (100 bytes)", 258),
    ("picture elsewhere",
     {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
     "image/* (https://example.com/a.png)", 258),
    ("sound",
     {"type": "input_audio",
      "input_audio": {"data": b64encode(b"x" * 200_000).decode(), "format": "mp3"}},
     "audio/mp3 (200000 bytes)", 400),
    ("file", {"type": "file", "file": {"filename": "a.pdf",
              "file_data": data_url("application/pdf", b"%PDF-" + b"x" * 1000)}},
     "application/pdf (1005 bytes)", 258),
]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "named", "tokens"), [row[1:] for row in PARTS], ids=[row[0] for row in PARTS]
)
async def test_files_are_named_by_type_and_size_and_cost_tokens(
    sdk: AsyncOpenAI, emulator: Emulator, part: Any, named: str, tokens: int
) -> None:
    answer = await ask(sdk, [{"type": "text", "text": "What is in it?"}, part])
    assert named in answer.choices[0].message.content
    assert answer.usage.prompt_tokens == 4 + tokens
    assert (await emulator.control.stats())["multi_modal"].finished == 1


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 2},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "tell_time", "parameters": {"type": "object"}}}


async def test_a_tool_is_called_when_the_prompt_names_it_or_it_must_be(sdk: AsyncOpenAI) -> None:
    tools = [WEATHER, CLOCK]
    plain = await ask(sdk, "Is it raining?", tools=tools)
    named = await ask(sdk, "Please get weather of Oslo", tools=tools)
    forced = await ask(sdk, "Is it raining?", tools=tools, tool_choice="required")
    other = {"type": "function", "function": {"name": "tell_time"}}
    chosen = await ask(sdk, "Is it raining?", tools=tools, tool_choice=other)
    never = await ask(sdk, "get_weather", tools=tools, tool_choice="none")
    assert plain.choices[0].finish_reason == never.choices[0].finish_reason == "stop"
    for answer, name in ((named, "get_weather"), (forced, "get_weather"), (chosen, "tell_time")):
        (choice,) = answer.choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls
        assert (call.type, call.function.name) == ("function", name)
        assert answer.usage.completion_tokens == len(call.function.arguments.split())
    given = json.loads(named.choices[0].message.tool_calls[0].function.arguments)
    assert given["unit"] in ("celsius", "fahrenheit")
    assert (given["days"], bool(given["city"])) == (2, True)


async def test_both_tools_are_called_when_both_are_named(sdk: AsyncOpenAI) -> None:
    prompt = "Use get_weather and tell_time."
    both = await ask(sdk, prompt, tools=[WEATHER, CLOCK])
    one = await ask(sdk, prompt, tools=[WEATHER, CLOCK], parallel_tool_calls=False)
    names = [call.function.name for call in both.choices[0].message.tool_calls]
    assert names == ["get_weather", "tell_time"]
    assert len(one.choices[0].message.tool_calls) == 1


async def test_a_streamed_tool_call_comes_in_pieces_of_its_arguments(sdk: AsyncOpenAI) -> None:
    options: dict[str, Any] = {"tools": [WEATHER, CLOCK]}
    prompt = "Use get_weather and tell_time."
    whole = await ask(sdk, prompt, **options)
    async with sdk.chat.completions.stream(
        model=MODEL, messages=user(prompt), stream_options={"include_usage": True}, **options
    ) as opened:
        names = [event.type async for event in opened]
        final = await opened.get_final_completion()
    assert names.count("tool_calls.function.arguments.delta") > 2
    expected = [call.function for call in whole.choices[0].message.tool_calls]
    found = [call.function for call in final.choices[0].message.tool_calls or []]
    assert [(one.name, one.arguments) for one in found] == [
        (one.name, one.arguments) for one in expected
    ]
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.usage == whole.usage


async def test_a_conversation_with_a_tools_answer_gets_a_plain_one(sdk: AsyncOpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "tools": [WEATHER], "tool_choice": "required"}
    messages = user("Please get weather of Oslo")
    first = await sdk.chat.completions.create(messages=messages, **options)
    (call,) = first.choices[0].message.tool_calls
    messages += [
        first.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"},
    ]
    second = await sdk.chat.completions.create(messages=messages, **options)
    assert second.choices[0].finish_reason == "stop"
    assert "22 degrees" in second.choices[0].message.content


async def test_a_pydantic_model_is_parsed(sdk: AsyncOpenAI) -> None:
    from typing import Literal

    from pydantic import BaseModel, Field

    class Mood(Enum):
        TEXT = "text"
        IMAGE = "image"

    class Step(BaseModel):
        title: str = Field(max_length=10)
        weight: float

    class Plan(BaseModel):
        kind: Literal["plan"]
        mood: Mood
        steps: list[Step] = Field(min_length=2)
        parent: Plan | None
        note: str | None

    Plan.model_rebuild(_types_namespace={"Plan": Plan, "Step": Step, "Mood": Mood})
    answer = await sdk.chat.completions.parse(
        model=MODEL, messages=user("a photo of rain"), response_format=Plan
    )
    parsed = answer.choices[0].message.parsed
    assert parsed is not None
    assert (parsed.kind, parsed.mood, len(parsed.steps)) == ("plan", Mood.IMAGE, 2)


async def test_a_json_object_is_one(sdk: AsyncOpenAI, emulator: Emulator) -> None:
    answer = await ask(sdk, response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)
    stats = await emulator.control.stats()
    assert (stats["text_only"].finished, stats["classifier"].finished) == (1, 0)
