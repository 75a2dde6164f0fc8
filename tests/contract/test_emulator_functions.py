"""What frameworks do with the emulator beyond text: functions, thoughts, JSON, sound, old paths."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.contract.openai_sdk import MODEL, client, emulator, sdk, user
from tidegate.dialects.openai import usage_of
from tidegate.emulator.server import Emulator
from tidegate.emulator.state import Billed
from tidegate.usual_models import EMULATORS_KEY

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["emulator", "sdk"]
GEMINI = "/v1beta/models/gemini-2.5-flash"
CITY = {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {"name": "get_weather", "parameters": CITY}
TIME: dict[str, Any] = {"name": "get_time", "parametersJsonSchema": {"type": "object"}}
OFFERED = {"tools": [{"functionDeclarations": [WEATHER, TIME]}]}


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"x-goog-api-key": "k", "x-api-key": "k", "anthropic-version": "2023-06-01"}
    async with aiohttp.ClientSession(headers=headers) as opened:
        yield opened


def said(role: str, *parts: Any) -> dict[str, Any]:
    return {
        "role": role,
        "parts": [{"text": part} if isinstance(part, str) else part for part in parts],
    }


async def parts_of(
    session: aiohttp.ClientSession, emulator: Emulator, *contents: Any, **options: Any
) -> list[Any]:
    body = {"contents": list(contents), **OFFERED, **options}
    async with session.post(f"{emulator.url}{GEMINI}:generateContent", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
    found: list[Any] = answer["candidates"][0]["content"].get("parts", [])
    return found


def mode(name: str, *allowed: str) -> dict[str, Any]:
    config: dict[str, Any] = {"mode": name}
    if allowed:
        config["allowedFunctionNames"] = list(allowed)
    return {"toolConfig": {"functionCallingConfig": config}}


async def test_gemini_s_mode_decides_which_function_is_called(
    session: aiohttp.ClientSession, emulator: Emulator
) -> None:
    async def called(prompt: str, **options: Any) -> list[str]:
        parts = await parts_of(session, emulator, said("user", prompt), **options)
        return [part["functionCall"]["name"] for part in parts if "functionCall" in part]

    assert await called("Please get weather and get time") == ["get_weather", "get_time"]
    assert await called("Hello") == []
    assert await called("Hello", **mode("AUTO")) == []
    assert await called("Hello", **mode("ANY")) == ["get_weather"]
    assert await called("Hello", **mode("ANY", "get_time")) == ["get_time"]
    assert await called("Please get weather", **mode("NONE")) == []
    snake = {"tools": {"function_declarations": [WEATHER]}}
    forced = {"tool_config": {"function_calling_config": {"mode": "any"}}}
    assert await called("Hello", **snake, **forced) == ["get_weather"]


@pytest.mark.parametrize(
    "options",
    [
        mode("SOMETIMES"),
        mode("ANY", "unknown"),
        {"tools": [{"functionDeclarations": [{}]}]},
        {"tools": [{"functionDeclarations": 5}]},
    ],
)
async def test_functions_that_gemini_would_refuse_are_refused(
    session: aiohttp.ClientSession, emulator: Emulator, options: dict[str, Any]
) -> None:
    body = {"contents": [said("user", "Hello")], **OFFERED, **options}
    async with session.post(f"{emulator.url}{GEMINI}:generateContent", json=body) as response:
        answer = await response.json()
    assert (response.status, answer["error"]["status"]) == (400, "INVALID_ARGUMENT")


async def test_what_gemini_s_function_returns_is_heard_and_ends_the_calls(
    session: aiohttp.ClientSession, emulator: Emulator
) -> None:
    question = said("user", "Please get weather")
    (call,) = await parts_of(session, emulator, question)
    assert call["functionCall"]["args"]["city"]
    result = {"functionResponse": {"name": "get_weather", "response": {"result": "22 degrees"}}}
    turns = [question, said("model", call), said("user", result)]
    (text,) = await parts_of(session, emulator, *turns)
    assert "22 degrees" in text["text"]
    # One must be called: another one, and when none is left, a text.
    (other,) = await parts_of(session, emulator, *turns, **mode("ANY"))
    assert other["functionCall"]["name"] == "get_time"
    late = {"functionResponse": {"name": "get_time", "response": {"hours": 5, "minutes": 3}}}
    (text,) = await parts_of(
        session, emulator, *turns, said("model", other), said("user", late), **mode("ANY")
    )
    assert "hours" in text["text"]
    (again,) = await parts_of(session, emulator, *turns, said("model", text), question)
    assert again["functionCall"] == call["functionCall"]


async def test_google_s_sdk_calls_functions_by_itself_whole_and_streamed(
    emulator: Emulator,
) -> None:
    from google import genai
    from google.genai.types import GenerateContentConfig, HttpOptions

    asked: list[str] = []

    def get_weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "raining"

    config = GenerateContentConfig(tools=[get_weather])
    sdk = genai.Client(api_key="k", http_options=HttpOptions(base_url=emulator.url))
    try:
        answer = await sdk.aio.models.generate_content(
            model="gemini-2.5-pro", contents="Please get weather", config=config
        )
        assert "raining" in (answer.text or "")
        stream = await sdk.aio.models.generate_content_stream(
            model="gemini-2.5-flash", contents="Please get weather", config=config
        )
        assert "raining" in "".join([chunk.text or "" async for chunk in stream])
    finally:
        await sdk.aio.aclose()
        sdk.close()
    assert len(asked) == 2
    assert all(asked)


async def test_a_streamed_call_of_gemini_is_whole_and_charged(
    session: aiohttp.ClientSession, emulator: Emulator
) -> None:
    body = {"contents": [said("user", "get weather, get time")], **OFFERED}
    url = f"{emulator.url}/v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse"
    async with session.post(url, json=body) as response:
        text = await response.text()
    chunks = [json.loads(event.removeprefix("data: ")) for event in text.strip().split("\r\n\r\n")]
    parts = [chunk["candidates"][0]["content"]["parts"] for chunk in chunks]
    assert [part["functionCall"]["name"] for (part,) in parts] == ["get_weather", "get_time"]
    assert ["thoughtSignature" in part for (part,) in parts] == [True, False]
    assert [chunk["candidates"][0].get("finishReason") for chunk in chunks] == [None, "STOP"]
    told = chunks[-1]["usageMetadata"]
    written = told["candidatesTokenCount"] + told["thoughtsTokenCount"]
    billed = Billed(1, told["promptTokenCount"], written, told["thoughtsTokenCount"])
    assert (await emulator.control.stats()).tokens == {"gemini-2.5-pro": {"finished": billed}}


async def test_a_bound_leaves_out_calls_that_do_not_fit(
    session: aiohttp.ClientSession, emulator: Emulator
) -> None:
    few = {"generationConfig": {"maxOutputTokens": 1}}
    assert await parts_of(session, emulator, said("user", "get weather"), **few) == []


@pytest.mark.parametrize(("most", "thoughts"), [(40, 32), (20, 20)])
async def test_a_bound_of_gemini_s_output_is_of_its_thoughts_as_well(
    session: aiohttp.ClientSession, emulator: Emulator, most: int, thoughts: int
) -> None:
    """What thoughts leave nothing of has a role and no parts, and its usage no candidates."""
    config = {"maxOutputTokens": most, "thinkingConfig": {"includeThoughts": most == 40}}
    body = {"contents": [said("user", "Hello")], "generationConfig": config}
    for action in ("generateContent", "streamGenerateContent?alt=sse"):
        await emulator.control.reset()
        url = f"{emulator.url}/v1beta/models/gemini-2.5-pro:{action}"
        async with session.post(url, json=body) as response:
            text = await response.text()
        last = json.loads(text.strip().split("\r\n\r\n")[-1].removeprefix("data: "))
        (candidate,), told = last["candidates"], last["usageMetadata"]
        assert candidate["finishReason"] == "MAX_TOKENS"
        assert ("parts" in candidate["content"]) == (most > thoughts)
        assert told["thoughtsTokenCount"] == thoughts
        assert told.get("candidatesTokenCount") == (most - thoughts or None)
        assert told["totalTokenCount"] == told["promptTokenCount"] + most
        billed = Billed(1, told["promptTokenCount"], most, thoughts)
        assert (await emulator.control.stats()).billed() == billed


async def test_gemini_in_openais_dialect_has_its_thoughts_in_the_total_alone(
    emulator: Emulator,
) -> None:
    """As recorded at Google: three counts without details, of which two leave the thoughts out."""
    model = "gemini-2.5-pro"
    async with client(emulator, "/v1beta/openai") as sdk:
        answer = await sdk.chat.completions.create(model=model, messages=user("Hello"))
        usage = answer.model_dump(exclude_unset=True)["usage"]
        chunks = await sdk.chat.completions.create(
            model=model,
            messages=user("Hello"),
            stream=True,
            stream_options={"include_usage": True},
        )
        last = [chunk async for chunk in chunks][-1]
    assert usage.keys() == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert not {"service_tier", "system_fingerprint"} & answer.model_fields_set
    assert last.model_dump(exclude_unset=True)["usage"] == usage
    thoughts = usage["total_tokens"] - usage["prompt_tokens"] - usage["completion_tokens"]
    assert thoughts > 0
    read = usage_of(usage)
    assert (read.input_tokens, read.output_tokens) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert read.thoughts_tokens == thoughts
    calls = await emulator.control.calls()
    assert [call.output_tokens for call in calls] == [usage["completion_tokens"] + thoughts] * 2


async def test_gemini_speaks_and_shows_its_thoughts(
    session: aiohttp.ClientSession, emulator: Emulator
) -> None:
    spoken = {"generationConfig": {"responseModalities": ["AUDIO"]}}
    (sound,) = await parts_of(session, emulator, said("user", "Say hello"), **spoken)
    assert sound["inlineData"]["mimeType"].startswith("audio/L16")
    shown = {
        "generationConfig": {"thinkingConfig": {"thinkingBudget": 64, "includeThoughts": True}}
    }
    thought, text = await parts_of(session, emulator, said("user", "Hello"), **shown)
    assert (thought["thought"], "thought" in text) == (True, False)
    json_only = {"generationConfig": {"responseMimeType": "application/json"}}
    (found,) = await parts_of(session, emulator, said("user", "Hello"), **json_only)
    assert isinstance(json.loads(found["text"]), dict)


async def test_one_that_must_be_called_is_another_than_the_last(sdk: AsyncOpenAI) -> None:
    names = ("lookup", "final_result")
    tools: list[Any] = [{"type": "function", "function": {"name": name}} for name in names]
    messages = user("Hello")
    for expected in (*names, None):
        answer: Any = await sdk.chat.completions.create(
            model=MODEL, messages=messages, tools=tools, tool_choice="required"
        )
        message = answer.choices[0].message
        calls = message.tool_calls or []
        assert [call.function.name for call in calls] == ([] if expected is None else [expected])
        messages.append(message.to_dict())
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in calls]


SCHEMA = json.dumps({"properties": {"age": {"type": "integer"}}, "type": "object"}, indent=2)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (
            f"JSON schema:\n{SCHEMA}\nYou MUST answer with a JSON object",
            {"response_format": {"type": "json_object"}},
        ),
        (f"Adhere to {{this}}: {SCHEMA}. Return it within a ```json codeblock", {}),
    ],
)
async def test_a_schema_that_stands_in_the_prompt_is_kept_to(
    sdk: AsyncOpenAI, prompt: str, options: dict[str, Any]
) -> None:
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=[{"role": "system", "content": prompt}, *user("Hello")], **options
    )
    text: str = answer.choices[0].message.content or ""
    assert text.startswith("```json\n") == (not options)
    assert json.loads(text.removeprefix("```json\n").removesuffix("\n```")) == {"age": 1}


async def test_completions_are_answered_whole_and_streamed(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    create = sdk.completions.create
    whole = await create(model=MODEL, prompt="Once upon a time", max_tokens=50)
    assert (whole.object, whole.choices[0].finish_reason) == ("text_completion", "stop")
    assert "Once upon a time" in whole.choices[0].text
    assert whole.usage is not None
    billed = Billed(1, whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert (await emulator.control.stats()).tokens == {MODEL: {"finished": billed}}
    short = await create(model=MODEL, prompt=["One", "Two"], n=2)
    assert [choice.finish_reason for choice in short.choices] == ["length"] * 4
    assert short.usage is not None
    assert short.usage.completion_tokens == 4 * 16
    usage = {"include_usage": True}
    stream = await create(
        model=MODEL, prompt=[1, 2, 3], max_tokens=50, stream=True, stream_options=usage
    )
    chunks = [chunk async for chunk in stream]
    assert "1 2 3" in "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert (chunks[-2].choices[0].finish_reason, chunks[-1].choices) == ("stop", [])
    assert chunks[-1].usage.completion_tokens


async def test_completions_that_openai_would_refuse_are_refused(emulator: Emulator) -> None:
    from openai import BadRequestError

    async with client(emulator) as sdk:
        wrong: list[dict[str, Any]] = [
            {"prompt": []},
            {"prompt": [None]},
            {"prompt": "a", "n": 200},
        ]
        for body in wrong:
            with pytest.raises(BadRequestError):
                await sdk.completions.create(model=MODEL, **body)


async def message(
    session: aiohttp.ClientSession, emulator: Emulator, **options: Any
) -> tuple[int, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": "claude-opus-5-5", "max_tokens": 4000, "messages": messages, **options}
    async with session.post(f"{emulator.url}/v1/messages", json=body) as response:
        return response.status, await response.json()


async def test_a_system_message_among_anthropic_s_messages_is_heard(
    session: aiohttp.ClientSession, emulator: Emulator
) -> None:
    messages = [
        {"role": "user", "content": "Say hello"},
        {"role": "system", "content": "Be brief, as always."},
    ]
    status, answer = await message(session, emulator, messages=messages)
    assert status == 200
    assert "Say hello" in answer["content"][0]["text"]
    assert answer["usage"]["input_tokens"] == 8  # both texts


async def test_anthropic_s_thoughts_come_signed_before_the_answer(emulator: Emulator) -> None:
    from anthropic import AsyncAnthropic

    async with AsyncAnthropic(api_key="k", base_url=emulator.url, max_retries=0) as sdk:
        asked: dict[str, Any] = {
            "model": "claude-opus-5-5",
            "max_tokens": 4000,
            "messages": [{"role": "user", "content": "Hello"}],
            "thinking": {"type": "enabled", "budget_tokens": 2000},
        }
        whole: Any = await sdk.messages.create(**asked)
        async with sdk.messages.stream(**asked) as stream:
            deltas = [
                event.delta.type async for event in stream if event.type == "content_block_delta"
            ]
            streamed: Any = await stream.get_final_message()
        hidden: Any = await sdk.messages.create(
            **asked | {"thinking": {"type": "adaptive", "display": "omitted"}}
        )
        again = [*asked["messages"], {"role": "assistant", "content": whole.to_dict()["content"]}]
        again.append({"role": "user", "content": "Go on"})
        later: Any = await sdk.messages.create(**asked | {"messages": again})
    thought, text = whole.content
    assert (thought.type, text.type) == ("thinking", "text")
    assert thought.signature
    assert [block.to_dict() for block in streamed.content] == [thought.to_dict(), text.to_dict()]
    assert deltas[:3] == ["thinking_delta", "signature_delta", "text_delta"]
    assert whole.usage.output_tokens == len(thought.thinking.split()) + len(text.text.split())
    assert (hidden.content[0].thinking, bool(hidden.content[0].signature)) == ("", True)
    assert "Go on" in later.content[1].text


@pytest.mark.parametrize(
    "thinking",
    [{"type": "enabled"}, {"type": "enabled", "budget_tokens": 4000}, {"type": "always"}],
)
async def test_thoughts_that_anthropic_would_refuse_are_refused(
    session: aiohttp.ClientSession, emulator: Emulator, thinking: dict[str, Any]
) -> None:
    status, answer = await message(session, emulator, thinking=thinking)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


async def test_no_answer_repeats_the_key_that_it_was_sent(
    session: aiohttp.ClientSession, emulator: Emulator
) -> None:
    """Or the relay would mask parts of answers, as it does with any key that is repeated."""
    bad = await asyncio.gather(message(session, emulator, messages=[]), message(session, emulator))
    assert EMULATORS_KEY not in json.dumps(bad)
    (_, first), (_, second) = await message(session, emulator, max_tokens=0), bad[0]
    assert first["request_id"] != second["request_id"]
