"""Realtime sessions by the unmodified SDKs of OpenAI and Google: only their base URL is another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from google.genai import Client
from openai import AsyncOpenAI

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until
from tidegate.policy.format import edit

MODEL = "gemini-2.5-flash"
_PRICES = """
[upstreams.gemini]
aliases = { fast = "whisper-x" }
[upstreams.gemini.prices]
"whisper-x" = { audio_minute = 0.6 }
"""


async def the_record(gateway: Gateway) -> dict[str, Any]:
    """The row of the only session."""
    query = "SELECT request_id FROM audit WHERE kind = 'realtime'"
    rows = await wait_until(lambda: gateway.database.fetch(query), 20, "a session's row")
    assert len(rows) == 1
    return await gateway.audit(str(rows[0]["request_id"]))


def says(text: str) -> Any:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


async def test_turns_of_openais_sdk_and_their_record(
    gateway: Gateway, openai: Callable[..., AsyncOpenAI]
) -> None:
    told: list[Any] = []
    async with openai(gateway).realtime.connect(model=MODEL) as session:
        first = await session.recv()
        assert first.type == "session.created"
        assert gateway.held == 1
        await session.session.update(session={"type": "realtime", "output_modalities": ["text"]})
        for text in ("Say hello", "And once more"):
            await session.conversation.item.create(item=says(text))
            await session.response.create()
            said = ""
            async for event in session:
                if event.type == "response.output_text.delta":
                    said += event.delta
                if event.type == "response.done":
                    told.append(event.response.usage)
                    break
            assert text in said
    await wait_until(lambda: gateway.held == 0, 5, "the permit's return")
    row = await the_record(gateway)
    assert (row["status"], row["http_status"], row["model"]) == ("succeeded", 101, MODEL)
    assert row["input_tokens"] == sum(one.input_tokens for one in told)
    assert row["output_tokens"] == sum(one.output_tokens for one in told)
    assert row["cached_tokens"] == sum(one.input_token_details.cached_tokens for one in told)
    assert row["usage_state"] == "told"
    summary = orjson.loads(row["response"])
    assert (summary["turns"], summary["closed_by"], summary["code"]) == (2, "client", 1000)
    (call,) = await gateway.calls()
    assert (call.dialect, call.kind, call.outcome) == ("openai", "realtime", "finished")
    assert (call.input_tokens, call.output_tokens) == (row["input_tokens"], row["output_tokens"])


async def test_transcripts_alone_by_openais_sdk_are_turns_of_their_model(
    open_gateway: Opener, openai: Callable[..., AsyncOpenAI], tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(_PRICES)
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    limits = {"kind:realtime": 5, "rpm:total": 9}
    await gateway.services.keeper.change(edit(limits), set_by="test")
    query = {"intent": "transcription"}

    async def until(session: Any, kind: str) -> Any:
        async for event in session:
            if event.type == kind:
                return event
        raise AssertionError(f"no {kind}")

    async with openai(gateway).realtime.connect(model="fast", extra_query=query) as session:
        updated = await until(session, "session.updated")
        assert updated.session.type == "transcription"
        assert updated.session.audio.input.transcription.model == "whisper-x"
        for named in ({"language": "en"}, {"model": "fast"}):
            audio = {"input": {"transcription": named, "turn_detection": None}}
            await session.session.update(session={"type": "transcription", "audio": audio})
            updated = await until(session, "session.updated")
            assert updated.session.audio.input.transcription.model == "whisper-x", named
        other = {"input": {"transcription": {"model": "another"}}}
        await session.session.update(session={"type": "transcription", "audio": other})
        assert "can't be changed" in (await until(session, "error")).error.message
        for _ in range(2):
            await session.input_audio_buffer.append(audio="A" * 64_000)
            await session.input_audio_buffer.commit()
            done = await until(session, "conversation.item.input_audio_transcription.completed")
            assert done.usage.seconds == 1
    row = await the_record(gateway)
    assert (row["status"], row["model"], row["cost_micros"]) == ("succeeded", "whisper-x", 20_000)
    assert orjson.loads(row["response"])["turns"] == 2
    snapshot = await gateway.services.limiter.snapshot()
    assert snapshot.limits["rpm:total"].used == 2
    url = f"{gateway.url}/v1/realtime?intent=transcription"
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    async with gateway.http.get(url, headers=upgrade) as response:
        said = (await response.json())["error"]["message"]
        assert (response.status, "intent=transcription&model=" in said) == (400, True)


@pytest.mark.parametrize("of_vertex", [False, True])
async def test_turns_of_googles_sdk_and_their_record(
    gateway: Gateway, genai: Callable[..., Client], of_vertex: bool
) -> None:
    config: Any = {"response_modalities": ["TEXT"]}
    total = 0
    async with genai(of_vertex=of_vertex).aio.live.connect(model=MODEL, config=config) as session:
        assert gateway.held == 1
        for text in ("Say hello", "And once more"):
            turns: Any = {"role": "user", "parts": [{"text": text}]}
            await session.send_client_content(turns=turns, turn_complete=True)
            said = ""
            async for message in session.receive():
                said += message.text or ""
                if message.usage_metadata is not None:
                    total += message.usage_metadata.total_token_count or 0
            assert text in said
    await wait_until(lambda: gateway.held == 0, 5, "the permit's return")
    row = await the_record(gateway)
    assert (row["status"], row["model"]) == ("succeeded", MODEL)
    assert row["input_tokens"] + row["output_tokens"] == total
    assert orjson.loads(row["response"])["turns"] == 2
    whole = f"projects/p/locations/l/publishers/google/models/{MODEL}"
    named = whole if of_vertex else f"models/{MODEL}"
    assert orjson.loads(row["request"])["setup"]["model"] == named
