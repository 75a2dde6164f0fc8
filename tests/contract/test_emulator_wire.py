"""The unmodified google-genai SDK against the emulator: generating and classifying."""

from __future__ import annotations

import asyncio
import struct
import zlib
from base64 import b64encode
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession

from tests.contract.gemini_sdk import MODEL, PNG, call, emulator, sdk
from tidegate.emulator.server import Emulator

if TYPE_CHECKING:
    from google.genai import Client

__all__ = ["emulator", "sdk"]


async def test_an_answer_quotes_the_prompt_and_counts_its_own_words(sdk: Client) -> None:
    answer = await sdk.aio.models.generate_content(model=MODEL, contents="Why is the sky blue?")
    assert answer.text is not None
    assert "Why is the sky blue?" in answer.text
    assert "emulated" in answer.text
    usage = answer.usage_metadata
    assert usage is not None
    assert usage.prompt_token_count == 5
    assert usage.candidates_token_count == len(answer.text.split())
    assert usage.thoughts_token_count == 32  # which this model has where nothing is requested
    assert usage.total_token_count == 5 + 32 + len(answer.text.split())
    assert answer.candidates is not None
    assert answer.candidates[0].finish_reason == "STOP"
    assert answer.model_version == MODEL


async def test_the_synchronous_sdk_is_served_too(sdk: Client) -> None:
    def ask() -> tuple[str | None, str]:
        whole = sdk.models.generate_content(model=MODEL, contents="One two")
        stream = sdk.models.generate_content_stream(model=MODEL, contents="One two")
        return whole.text, "".join(chunk.text or "" for chunk in stream)

    whole, streamed = await asyncio.to_thread(ask)
    assert whole == streamed


async def test_a_stream_comes_in_chunks_with_running_usage(sdk: Client, emulator: Emulator) -> None:
    await emulator.control.set_behaviour(chunks=5)
    stream = await sdk.aio.models.generate_content_stream(model=MODEL, contents="Hello")
    chunks = [chunk async for chunk in stream]
    whole = await sdk.aio.models.generate_content(model=MODEL, contents="Hello")
    assert len(chunks) == 5
    assert "".join(chunk.text or "" for chunk in chunks) == whole.text
    counts = [
        chunk.usage_metadata.candidates_token_count or 0 for chunk in chunks if chunk.usage_metadata
    ]
    assert counts == sorted(set(counts))
    assert counts[-1] == len((whole.text or "").split())
    reasons = [chunk.candidates[0].finish_reason for chunk in chunks if chunk.candidates]
    assert reasons == [None] * 4 + ["STOP"]
    assert len({chunk.response_id for chunk in chunks}) == 1


async def test_chunks_arrive_one_by_one_not_all_at_the_end(sdk: Client, emulator: Emulator) -> None:
    await emulator.control.set_fault("hang_mid_stream", count=1)
    stream = await sdk.aio.models.generate_content_stream(model=MODEL, contents="Hello")
    first = await asyncio.wait_for(anext(stream), 20)
    assert first.text
    assert (await emulator.control.stats())["text_only"].in_flight == 1


async def test_the_stream_without_sse_is_one_json_array(emulator: Emulator) -> None:
    body = {"contents": [{"parts": [{"text": "Hello"}]}]}
    status, answer = await call(emulator, f"/v1beta/models/{MODEL}:streamGenerateContent", body)
    assert status == 200
    assert len(answer) == 4
    assert answer[-1]["candidates"][0]["finishReason"] == "STOP"


async def test_each_provider_s_content_types(emulator: Emulator) -> None:
    google, text = f"/v1beta/models/{MODEL}", {"contents": [{"parts": [{"text": "Hi"}]}]}
    asked = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    bearer, claude = {"Authorization": "Bearer k"}, {"x-api-key": "k", "anthropic-version": "1"}
    events, plain = "text/event-stream; charset=utf-8", "application/json"
    of_google = "application/json; charset=UTF-8"
    key: dict[str, str] = {"x-goog-api-key": "k"}
    for path, headers, body, wanted in (
        (f"{google}:generateContent", key, text, (200, of_google)),
        (f"{google}:generateContent", key, {}, (400, of_google)),
        (f"{google}:streamGenerateContent", key, text, (200, of_google)),
        (f"{google}:streamGenerateContent?alt=sse", key, text, (200, "text/event-stream")),
        (f"{google}:streamGenerateContent?alt=sse", key, {}, (400, "text/event-stream")),
        ("/upload/v1beta/files", key, {}, (200, "text/plain; charset=utf-8")),
        ("/v1/chat/completions", bearer, asked, (200, plain)),
        ("/v1/chat/completions", bearer, asked | {"stream": True}, (200, events)),
        ("/v1/chat/completions", bearer, {}, (400, plain)),
        ("/v1/messages", claude, asked, (200, plain)),
        ("/v1/messages", claude, asked | {"stream": True}, (200, events)),
        ("/v1/messages", claude, {}, (400, plain)),
        ("/model/m/converse", bearer, {"messages": []}, (400, plain)),
    ):
        async with (
            ClientSession(emulator.url, headers=headers) as session,
            session.post(path, json=body) as answer,
        ):
            assert (answer.status, answer.headers["Content-Type"]) == wanted, path


async def test_camel_case_and_snake_case_are_the_same(emulator: Emulator) -> None:
    data = b64encode(PNG).decode()
    camel = {
        "contents": [{"parts": [{"inlineData": {"mimeType": "image/png", "data": data}}]}],
        "generationConfig": {"maxOutputTokens": 3, "thinkingConfig": {"thinkingBudget": 0}},
    }
    snake = {
        "contents": [{"parts": [{"inline_data": {"mime_type": "image/png", "data": data}}]}],
        "generation_config": {
            "max_output_tokens": 3,
            "thinking_config": {"thinking_budget": 0},
        },
    }
    path = f"/v1beta/models/{MODEL}:generateContent"
    (_, first), (_, second) = await call(emulator, path, camel), await call(emulator, path, snake)
    assert first["candidates"] == second["candidates"]
    assert first["usageMetadata"] == second["usageMetadata"]
    assert first["candidates"][0]["finishReason"] == "MAX_TOKENS"
    assert first["usageMetadata"]["candidatesTokenCount"] == 3


async def test_files_are_named_by_type_and_size_and_cost_tokens(
    sdk: Client, emulator: Emulator
) -> None:
    from google.genai.types import Part

    contents = [
        "What is in these?",
        Part.from_bytes(data=PNG, mime_type="image/png"),
        Part.from_bytes(data=b"%PDF-" + b"x" * 1000, mime_type="application/pdf"),
    ]
    answer = await sdk.aio.models.generate_content(model=MODEL, contents=contents)
    assert answer.text is not None
    assert "2 files: image/png (100 bytes), application/pdf (1005 bytes)" in answer.text
    usage = answer.usage_metadata
    assert usage is not None
    assert usage.prompt_token_count == 5 + 258 + 258
    assert (await emulator.control.stats())["multi_modal"].finished == 1


def check_png(data: bytes) -> tuple[int, int]:
    """Parse every chunk, check each CRC and the size of the pixels; returns width and height."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, names, pixels, size = 8, [], b"", (0, 0)
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        name, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        (crc,) = struct.unpack(">I", data[place + 8 + length : place + 12 + length])
        assert crc == zlib.crc32(name + body)
        names.append(name)
        if name == b"IHDR":
            width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", body)
            assert (depth, colour, rest) == (8, 2, [0, 0, 0])
            size = (width, height)
        elif name == b"IDAT":
            pixels += body
        place += 12 + length
    assert (names[0], names[-1]) == (b"IHDR", b"IEND")
    raw = zlib.decompress(pixels)
    assert len(raw) == size[1] * (1 + 3 * size[0])
    return size


@pytest.mark.parametrize(
    ("model", "modalities"), [("gemini-2.5-flash-image", None), (MODEL, ["TEXT", "IMAGE"])]
)
async def test_an_image_model_answers_with_text_and_a_real_png(
    sdk: Client, emulator: Emulator, model: str, modalities: list[str] | None
) -> None:
    from google.genai.types import GenerateContentConfig

    config = GenerateContentConfig(response_modalities=modalities)
    answer = await sdk.aio.models.generate_content(
        model=model, contents="Paint me a fox", config=config
    )
    assert answer.parts is not None
    text, picture = answer.parts
    assert "Paint me a fox" in (text.text or "")
    assert picture.inline_data is not None
    assert picture.inline_data.mime_type == "image/png"
    assert check_png(picture.inline_data.data or b"") == (512, 512)
    assert (await emulator.control.stats())["image_generation"].finished == 1


async def test_an_image_model_streams_the_text_before_the_picture(sdk: Client) -> None:
    stream = await sdk.aio.models.generate_content_stream(
        model="gemini-2.5-flash-image", contents="A harbour"
    )
    parts = [part async for chunk in stream for part in chunk.parts or []]
    assert parts[0].text is not None
    assert parts[1].inline_data is not None


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["text_only", "multi_modal", "image_generation"]},
        "reason": {"type": "string"},
        "confidence": {"type": "number"},
    },
    "required": ["kind"],
}


async def classify(sdk: Client, prompt: str, **config: Any) -> Any:
    import json

    from google.genai.types import GenerateContentConfig

    whole = GenerateContentConfig(response_mime_type="application/json", **config)
    answer = await sdk.aio.models.generate_content(model=MODEL, contents=prompt, config=whole)
    return json.loads(answer.text or "")


@pytest.mark.parametrize("name", ["response_schema", "response_json_schema"])
async def test_a_classifying_call_gets_json_that_fits_its_schema(
    sdk: Client, emulator: Emulator, name: str
) -> None:
    config = {name: SCHEMA}
    drawn = await classify(sdk, "please draw a dog", **config)
    written = await classify(sdk, "why do dogs bark", **config)
    assert drawn["kind"] == "image_generation"
    assert written["kind"] == "text_only"
    assert isinstance(written["confidence"], float)
    assert (await emulator.control.stats())["classifier"].finished == 2


async def test_a_pydantic_schema_and_a_plain_enum_are_understood(sdk: Client) -> None:
    from enum import Enum

    from google.genai.types import GenerateContentConfig
    from pydantic import BaseModel

    class Choice(Enum):
        TEXT = "text"
        IMAGE = "image"

    class Verdict(BaseModel):
        choice: Choice

    config = GenerateContentConfig(response_mime_type="application/json", response_schema=Verdict)
    answer = await sdk.aio.models.generate_content(
        model=MODEL, contents="a photo of rain", config=config
    )
    assert answer.parsed == Verdict(choice=Choice.IMAGE)
    plain = GenerateContentConfig(response_mime_type="text/x.enum", response_schema=Choice)
    answer = await sdk.aio.models.generate_content(model=MODEL, contents="rain?", config=plain)
    assert answer.text == "text"


async def test_the_answer_of_a_classifier_can_be_ordered(sdk: Client, emulator: Emulator) -> None:
    await emulator.control.set_behaviour(classifier_answer="multi_modal")
    assert (await classify(sdk, "x", response_schema=SCHEMA))["kind"] == "multi_modal"
    await emulator.control.set_behaviour(classifier_answer={"kind": 7})
    assert await classify(sdk, "x", response_schema=SCHEMA) == {"kind": 7}


async def test_the_text_of_an_answer_can_be_ordered(sdk: Client, emulator: Emulator) -> None:
    await emulator.control.set_behaviour(answer="one  two\nthree four")
    stream = await sdk.aio.models.generate_content_stream(model=MODEL, contents="x")
    assert "".join([chunk.text or "" async for chunk in stream]) == "one  two\nthree four"


async def test_a_thinking_model_reports_its_thoughts(sdk: Client) -> None:
    answer = await sdk.aio.models.generate_content(model="gemini-2.5-pro", contents="Hello")
    usage = answer.usage_metadata
    assert usage is not None
    assert usage.thoughts_token_count
    assert usage.total_token_count == (
        (usage.prompt_token_count or 0)
        + (usage.candidates_token_count or 0)
        + usage.thoughts_token_count
    )
