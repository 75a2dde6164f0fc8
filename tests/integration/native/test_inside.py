"""Errors that an upstream tells inside of a 200: helped before any output, on record after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import orjson
import pytest

from tests.gateway import Gateway, Opener
from tests.integration.connections.scripted import Upstream, request, upstream
from tests.integration.security.hostile import Hostile, hostile, one_try
from tests.waiting import promised_s, wait_until
from tidegate.emulator.server import Emulator, run_emulator

__all__ = ["hostile", "one_try", "upstream"]

BODY = {"contents": [{"parts": [{"text": "Say hello"}]}]}
STREAM = "/v1beta/models/gemini-2.5-flash:streamGenerateContent"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LIST = SSE.replace(b"text/event-stream", b"application/json")
CHUNK = b'data: {"candidates":[{"content":{"parts":[{"text":"Hi"}]}}]}\n\n'
THROTTLED = (
    b'{"error":{"code":429,"message":"Please retry in 0.2s.","status":"RESOURCE_EXHAUSTED"}}'
)
FOR_LONG = THROTTLED.replace(b"0.2s", b"20s")
BROKEN = b'{"error":{"code":503,"message":"overloaded","status":"UNAVAILABLE"}}'
POLICY = """
[upstreams.second]
dialects = {{ gemini = "{url}" }}
key = "SECOND_KEY"

[[routes]]
model = "*"
try = ["gemini", "second"]
"""


@pytest.fixture
async def gateway(open_gateway: Opener, hostile: Hostile) -> Gateway:
    return await open_gateway(worker=False, gemini_base_url=hostile.url)


@pytest.fixture
async def second() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in (*pieces, b""))


async def read(gateway: Gateway, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    async with gateway.http.post(gateway.url + path, json=BODY, headers=headers) as response:
        named = {name.lower(): value for name, value in response.headers.items()}
        return response.status, named, await response.read()


@pytest.mark.parametrize(
    "answer",
    [
        SSE + chunked(b"data: " + FOR_LONG + b"\n\n"),
        SSE + chunked(b"data: " + FOR_LONG[:30], FOR_LONG[30:] + b"\r\n\r\n"),
        LIST + chunked(b"[" + FOR_LONG + b"\n]"),
        LIST + chunked(FOR_LONG),
    ],
)
async def test_an_error_before_any_output_is_an_answer_with_its_status(
    gateway: Gateway, hostile: Hostile, answer: bytes
) -> None:
    hostile.answer = answer
    soon = {"x-tidegate-deadline-ms": "10000"}
    status, headers, body = await read(gateway, f"{STREAM}?alt=sse", **soon)
    assert (status, body) == (429, FOR_LONG)
    assert headers["content-type"] == "application/json"
    assert int(headers["retry-after"]) >= 1
    row = await gateway.audit(headers["x-tidegate-request-id"])
    assert (row["status"], row["failure"]["code"]) == ("failed", "upstream_throttled")
    assert gateway.held == 0


async def test_it_is_tried_again_or_passed_to_the_next(
    open_gateway: Opener,
    hostile: Hostile,
    second: Emulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECOND_KEY", "key-of-the-second")
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY.format(url=second.url))
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url, tidegate_policy=policy)
    hostile.answer = SSE + chunked(CHUNK)

    async def serves() -> bool:
        return (await read(gateway, f"{STREAM}?alt=sse"))[1]["x-tidegate-upstream"] == "gemini"

    await wait_until(serves, 20, "the first upstream")
    hostile.answer = SSE + chunked(b"data: " + BROKEN + b"\n\n")
    status, headers, body = await read(gateway, f"{STREAM}?alt=sse")
    assert (status, headers["x-tidegate-upstream"]) == (200, "second")
    assert b"error" not in body
    assert (await gateway.audit(headers["x-tidegate-request-id"]))["attempts"] == 2


@pytest.mark.parametrize(
    ("path", "head", "pieces"),
    [
        (f"{STREAM}?alt=sse", SSE, (CHUNK, b"data: " + BROKEN + b"\n\n")),
        (f"{STREAM}?alt=sse", SSE, (CHUNK, b"data:" + BROKEN[:20], BROKEN[20:] + b"\r\n\r\n")),
        (STREAM, LIST, (b'[{"candidates":[]}', b"\n,\n" + BROKEN + b"\n]")),
    ],
)
async def test_an_error_in_mid_stream_passes_as_it_came_and_is_on_record(
    gateway: Gateway, hostile: Hostile, path: str, head: bytes, pieces: tuple[bytes, ...]
) -> None:
    hostile.answer = head + chunked(*pieces)
    status, headers, body = await read(gateway, path)
    assert (status, body) == (200, b"".join(pieces)), "byte for byte, and nothing behind it"
    row = await gateway.audit(headers["x-tidegate-request-id"])
    assert (row["status"], row["http_status"]) == ("failed", 200)
    assert row["failure"]["code"] == "upstream_unavailable"
    assert len(hostile.seen) == 1
    assert gateway.services.spine.health["gemini"].faults == 1
    assert gateway.held == 0


CHAT = "/v1/chat/completions"
ASKED = {"model": "m", "messages": [{"role": "user", "content": "Say hello"}]}
USED = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


async def chat(gateway: Gateway, **more: object) -> tuple[int, dict[str, str], bytes]:
    async with gateway.http.post(f"{gateway.url}{CHAT}", json=ASKED | more) as response:
        body = await response.read()
        return response.status, {k.lower(): v for k, v in response.headers.items()}, body


@pytest.mark.parametrize(
    "choice",
    [
        {"finish_reason": "error", "error": {"code": 502, "message": "it broke off"}},
        {"finish_reason": "error"},
    ],
)
async def test_a_whole_answer_that_ends_with_an_error_passes_and_has_failed(
    gateway: Gateway, hostile: Hostile, choice: dict[str, object]
) -> None:
    message = {"role": "assistant", "content": "Hello, I"}
    said = orjson.dumps({"choices": [{"message": message, **choice}], "usage": USED})
    hostile.answer = JSON % len(said) + said
    status, headers, body = await chat(gateway)
    assert (status, body) == (200, said), "byte for byte"
    row = await gateway.audit(headers["x-tidegate-request-id"])
    assert (row["status"], row["failure"]["code"]) == ("failed", "upstream_unavailable")
    assert (row["input_tokens"], row["output_tokens"]) == (7, 2), "what it used is charged"
    assert len(hostile.seen) == 1, "the client has an answer"
    assert gateway.held == 0


async def test_a_stream_of_comments_alone_is_no_answer(
    gateway: Gateway, hostile: Hostile, one_try: None
) -> None:
    hostile.answer = SSE + chunked(b": PROCESSING\n\n", b": PROCESSING\n\n")
    status, headers, body = await chat(gateway, stream=True)
    assert (status, b"without an event" in body) == (502, True), body
    row = await gateway.audit(headers["x-tidegate-request-id"])
    assert (row["status"], row["failure"]["code"]) == ("failed", "upstream_unavailable")
    assert gateway.held == 0


async def test_a_stream_that_failed_is_not_given_again_under_its_key(
    gateway: Gateway, hostile: Hostile
) -> None:
    hostile.answer = SSE + chunked(CHUNK, b"data: " + BROKEN + b"\n\n")
    await read(gateway, f"{STREAM}?alt=sse", **{"idempotency-key": "one"})
    hostile.answer = SSE + chunked(CHUNK)
    _, headers, body = await read(gateway, f"{STREAM}?alt=sse", **{"idempotency-key": "one"})
    assert body == CHUNK
    assert not [name for name in headers if "replay" in name]
    assert len(hostile.seen) == 2


async def test_openais_sdk_raises_what_the_provider_meant(
    gateway: Gateway, hostile: Hostile
) -> None:
    text = b"slow down. Please try again in 20s."
    said = b'{"error":{"message":"%b","type":"tokens","code":"rate_limit_exceeded"}}' % text
    hostile.answer = SSE + chunked(b"data: " + said + b"\n\n")
    client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0)
    async with client:
        with pytest.raises(openai.RateLimitError, match="slow down"):
            await client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "x"}],
                stream=True,
                extra_headers={"x-tidegate-deadline-ms": "10000"},
            )


@pytest.mark.parametrize("phase", ["before the head", "before the first byte", "in mid-stream"])
async def test_a_client_that_leaves_closes_the_upstream_and_frees_its_permit_in_each_phase(
    open_gateway: Opener, upstream: Upstream, phase: str
) -> None:
    reached, closed = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        if phase != "before the head":
            writer.write(SSE)
        if phase == "in mid-stream":
            writer.write(chunked(CHUNK).removesuffix(b"0\r\n\r\n"))
        await writer.drain()
        reached.set()
        await reader.read()
        closed.set()

    upstream.script = script
    gateway = await open_gateway(worker=False, gemini_base_url=upstream.url)
    asking = asyncio.create_task(read(gateway, f"{STREAM}?alt=sse"))
    await reached.wait()
    assert gateway.held == 1
    asking.cancel()
    await asyncio.wait_for(closed.wait(), promised_s(2))

    async def none_held() -> bool:
        snapshot = await gateway.services.limiter.snapshot()
        return all(view.used == 0 for view in snapshot.limits.values())

    await wait_until(none_held, 20, "no permit in Valkey")
