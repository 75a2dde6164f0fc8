"""Audio, pictures, moderations and ranks: OpenAI's SDK through the gateway, whole and streamed."""

from __future__ import annotations

import asyncio
import wave
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.gateway import PNG, Gateway, Opener
from tests.waiting import wait_until


def recording(seconds: int) -> bytes:
    file = BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 8_000, 0, "NONE", ""))
        out.writeframes(b"\0\1" * 8_000 * seconds)
    return file.getvalue()


AUDIO = ("a.wav", recording(7))
LONG = recording(60)  # of a megabyte: on disk, not in memory


@pytest.fixture
async def sdk(gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    url = f"{gateway.url}/v1"
    async with AsyncOpenAI(base_url=url, api_key="of-a-client", max_retries=0) as client:
        yield client


async def kept(gateway: Gateway, request_id: str, role: str) -> bytes:
    url = f"{gateway.url}/requests/{request_id}/{role}"
    async with gateway.http.get(url) as response:
        assert response.status == 200
        return await response.read()


async def test_recordings_become_texts_whole_and_streamed(
    gateway: Gateway, sdk: AsyncOpenAI
) -> None:
    raw = await sdk.audio.transcriptions.with_raw_response.create(model="whisper-1", file=AUDIO)
    assert "sun rises" in raw.parse().text
    row = await gateway.audit(raw.headers["x-tidegate-request-id"])
    assert (row["kind"], row["model"], row["status"]) == ("multi_modal", "whisper-1", "succeeded")
    assert row["endpoint"] == "/v1/audio/transcriptions"
    assert row["usage_state"] == "told"
    assert orjson.loads(row["usage_details"])["input_audio_seconds"] == 7
    sent = await kept(gateway, raw.headers["x-tidegate-request-id"], "request")
    assert AUDIO[1] in sent
    assert b'name="model"' in sent

    stream = await sdk.audio.transcriptions.create(
        model="gpt-4o-transcribe", file=("long.wav", LONG), stream=True
    )
    events = [event async for event in stream]
    assert {event.type for event in events} == {"transcript.text.delta", "transcript.text.done"}
    assert len(events) > 5

    verbose = await sdk.audio.transcriptions.create(
        model="whisper-1",
        file=AUDIO,
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
    )
    assert verbose.duration == pytest.approx(6.75)
    text: Any = await sdk.audio.transcriptions.create(
        model="whisper-1", file=AUDIO, response_format="text"
    )
    assert "sun rises" in text
    told = await gateway.http.get(f"{gateway.url}/status/{raw.headers['x-tidegate-request-id']}")
    assert (await told.json())["usage"]["input_audio_seconds"] == 7
    english = await sdk.audio.translations.create(model="whisper-1", file=AUDIO)
    assert "sun rises" in english.text
    assert gateway.held == 0
    folder = gateway.config.data_dir / "tmp"
    await wait_until(lambda: not list(folder.glob("upload-*")), what="forms to be removed")


async def test_a_text_is_spoken_whole_and_streamed(gateway: Gateway, sdk: AsyncOpenAI) -> None:
    raw = await sdk.audio.speech.with_raw_response.create(
        model="tts-1", voice="alloy", input="Good morning, everybody."
    )
    assert raw.headers["content-type"] == "audio/mpeg"
    assert raw.content.startswith(b"ID3")
    request_id = raw.headers["x-tidegate-request-id"]
    await gateway.audit(request_id)
    assert await kept(gateway, request_id, "response") == raw.content
    row = await gateway.audit(request_id)
    assert row["usage_state"] == "estimated"
    assert orjson.loads(row["usage_details"])["input_characters"] == 24
    async with sdk.audio.speech.with_streaming_response.create(
        model="gpt-4o-mini-tts", voice="alloy", input="Good morning.", stream_format="sse"
    ) as streamed:
        body = b"".join([piece async for piece in streamed.iter_bytes()])
    assert b"speech.audio.done" in body
    row = await gateway.audit(streamed.headers["x-tidegate-request-id"])
    assert (row["streamed"], row["usage_state"]) == (True, "told")
    assert row["output_tokens"] > 10


async def test_pictures_are_edited_and_varied(gateway: Gateway, sdk: AsyncOpenAI) -> None:
    raw = await sdk.images.with_raw_response.edit(
        model="gpt-image-1", image=[("a.png", PNG), ("b.png", PNG)], prompt="A hat", n=2
    )
    answer = raw.parse()
    assert answer.data is not None
    assert len(answer.data) == 2
    row = await gateway.audit(raw.headers["x-tidegate-request-id"])
    assert (row["kind"], row["images"], row["usage_state"]) == ("image_generation", 2, "told")
    varied = await sdk.images.create_variation(image=("a.png", PNG))
    assert varied.data
    (last,) = (await gateway.calls())[-1:]
    assert last.model == "dall-e-2"


async def test_the_synchronous_client_and_its_streams(gateway: Gateway) -> None:
    def calls() -> tuple[str, str, int]:
        with OpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0) as client:
            whole = client.audio.transcriptions.create(model="whisper-1", file=AUDIO)
            events = list(
                client.audio.transcriptions.create(
                    model="gpt-4o-mini-transcribe", file=AUDIO, stream=True
                )
            )
            spoken = client.audio.speech.create(model="tts-1", voice="alloy", input="Hi")
            return whole.text, getattr(events[-1], "text", ""), len(spoken.read())

    whole, streamed, size_bytes = await asyncio.to_thread(calls)
    assert whole == streamed != ""
    assert size_bytes > 100


async def test_judgements_ranks_counts_and_compactions(gateway: Gateway, sdk: AsyncOpenAI) -> None:
    judged = await sdk.moderations.with_raw_response.create(input="I want to kill them")
    assert judged.parse().results[0].flagged
    row = await gateway.audit(judged.headers["x-tidegate-request-id"])
    assert (row["kind"], row["status"]) == ("text_only", "succeeded")

    counted = await sdk.responses.input_tokens.with_raw_response.count(model="gpt-5", input="Hi")
    assert counted.parse().input_tokens > 0
    row = await gateway.audit(counted.headers["x-tidegate-request-id"])
    assert (row["kind"], row["usage_state"]) == (None, "none")

    compacted = await sdk.responses.with_raw_response.compact(model="gpt-5", input="Hi there")
    usage = compacted.parse().usage
    row = await gateway.audit(compacted.headers["x-tidegate-request-id"])
    assert (row["input_tokens"], row["output_tokens"]) == (usage.input_tokens, usage.output_tokens)

    questions: Any = [
        {"type": "predicate", "name": "rain", "instructions": "Does it rain?"},
        {"type": "score", "instructions": "How hard?", "levels": [{"label": "a bit"}]},
    ]
    decided = await sdk.decisions.with_raw_response.create(
        model="gpt-6-luna", input="It pours", questions=questions
    )
    found = decided.parse()
    assert [one.type for one in found.answers] == ["predicate", "score"]
    row = await gateway.audit(decided.headers["x-tidegate-request-id"])
    assert (row["kind"], row["model"], row["usage_state"]) == ("text_only", "gpt-6-luna", "told")
    assert row["input_tokens"] == found.usage.input_tokens
    assert row["output_tokens"] == found.usage.output_tokens

    body = {"model": "jina-reranker-v3", "query": "what is ruby", "documents": ["a", "ruby"]}
    async with gateway.http.post(f"{gateway.url}/v1/rerank", json=body) as response:
        found = await response.json()
        assert [one["index"] for one in found["results"]] == [1, 0]
        row = await gateway.audit(response.headers["x-tidegate-request-id"])
    assert (row["kind"], row["model"]) == ("text_only", "jina-reranker-v3")


async def test_seconds_of_audio_are_a_limit_and_a_price(
    open_gateway: Opener, tmp_path: Path
) -> None:
    """The first recording fills the limit; the price is of the upstream, by what was told."""
    policy = tmp_path / "tidegate.toml"
    policy.write_text(
        '[limits]\n"asph:whisper-1" = 10\n"kind:multi_modal" = 3\n'
        '[upstreams.gemini.prices]\n"whisper-1" = { audio_minute = 0.6 }\n'
        '"tts-1" = { characters = 15 }\n"rerank-*" = { search = 2 }\n'
    )
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    url = f"{gateway.url}/v1"
    async with AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
        headers = {"x-tidegate-deadline-ms": "300"}
        calls = client.audio.transcriptions.with_raw_response
        raw = await calls.create(model="whisper-1", file=AUDIO, extra_headers=headers)
        row = await gateway.audit(raw.headers["x-tidegate-request-id"])
        assert row["cost_micros"] == 70_000
        with pytest.raises(openai.RateLimitError, match="asph:whisper-1"):
            await calls.create(model="whisper-1", file=AUDIO, extra_headers=headers)
        # A text without audio is not bound by it.
        await client.chat.completions.create(
            model="whisper-1", messages=[{"role": "user", "content": "hi"}]
        )
        spoken = await client.audio.speech.with_raw_response.create(
            model="tts-1", voice="alloy", input="x" * 200
        )
        row = await gateway.audit(spoken.headers["x-tidegate-request-id"])
        assert row["cost_micros"] == 3_000
    body = {"model": "rerank-v4", "query": "what", "documents": ["a"] * 101}
    async with gateway.http.post(f"{url}/rerank", json=body) as response:
        row = await gateway.audit(response.headers["x-tidegate-request-id"])
    assert (row["cost_micros"], row["usage_state"]) == (4_000, "told")


async def test_a_refused_form_names_the_field(sdk: AsyncOpenAI, gateway: Gateway) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.audio.transcriptions.create(
            model="whisper-1", file=AUDIO, extra_body={"MODEL": "gpt-5"}
        )
    assert refused.value.param == "model"
    assert "another spelling" in str(refused.value)
    assert await gateway.calls() == []
