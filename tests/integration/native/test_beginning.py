"""What comes of a stream before any output is held back: a call that fails then is helped."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from tests.gateway import Gateway, Opener
from tests.integration.security.hostile import Answer, Hostile, hostile, one_try
from tests.waiting import promised_s
from tidegate.dialects import refusals
from tidegate.dialects.spec import Operation
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.spine.run import HELD_S

__all__ = ["hostile", "one_try"]

POLICY = """
[upstreams.first]
dialects = {{ openai = "{first}/v1", anthropic = "{first}" }}
key = "FIRST_KEY"

[upstreams.second]
dialects = {{ openai = "{second}/v1", anthropic = "{second}" }}
key = "SECOND_KEY"

[[routes]]
model = "*"
try = ["first", "second"]
"""
Called = tuple[str, dict[str, object]]
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHAT: Called = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Say hello"}]})
RESPONSES: Called = ("/v1/responses", {"input": "Say hello"})
MESSAGES: Called = (
    "/v1/messages",
    {"max_tokens": 900, "messages": [{"role": "user", "content": "Say hello"}]},
)


def event(name: str = "", **said: object) -> bytes:
    value = {"type": name, **said} if name else said
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(value)}\n\n".encode()


CREATED = event("response.created", response={"status": "in_progress", "error": None})
UNPAID = {"code": "insufficient_quota", "message": "You exceeded your current quota"}
BUSY = {"code": "server_error", "message": "The model can not serve this"}
START = event("message_start", message={"role": "assistant", "content": [], "usage": {}})
ROLE = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
ENDS = {RESPONSES[0]: "completed", MESSAGES[0]: "end_turn", CHAT[0]: "stop"}
FAILING: dict[str, tuple[Called, tuple[bytes, ...]]] = {
    "a response": (
        RESPONSES,
        (
            CREATED,
            event("response.in_progress", response={"error": None}),
            event("response.failed", response={"status": "failed", "error": BUSY}),
        ),
    ),
    "a response without money": (
        RESPONSES,
        (CREATED, event("error", error=UNPAID), event("response.failed", response={})),
    ),
    "a message": (
        MESSAGES,
        (
            START,
            event("ping"),
            event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
            event("error", error={"type": "overloaded_error", "message": "Overloaded"}),
        ),
    ),
    "a flat error": (
        CHAT,
        (b'data: {"object":"error","message":"busy","type":"ServiceUnavailable","code":503}\n\n',),
    ),
    "an event with the name error": (
        CHAT,
        (ROLE, b'event: error\ndata: {"code":"InternalError","message":"no luck"}\n\n'),
    ),
    "a balance": (
        CHAT,
        (ROLE, event(error={"message": "Insufficient Balance", "code": "invalid_request_error"})),
    ),
    "a chunk": (
        CHAT,
        (
            b": PROCESSING\n\n",
            ROLE,
            event(id="g", error={"code": 502, "message": "no"}, choices=[{"delta": {}}]),
        ),
    ),
    "an error in the choice that it ends": (
        CHAT,
        (
            ROLE,
            event(choices=[{"delta": {"content": ""}, "error": {"code": 502, "message": "no"}}]),
        ),
    ),
}


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in pieces)


@pytest.fixture
async def second() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


@pytest.fixture
async def gateway(
    open_gateway: Opener,
    hostile: Hostile,
    second: Emulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Gateway:
    monkeypatch.setenv("FIRST_KEY", "key-of-the-first")
    monkeypatch.setenv("SECOND_KEY", "key-of-the-second")
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY.format(first=hostile.url, second=second.url))
    return await open_gateway(worker=False, tidegate_policy=policy)


async def read(
    gateway: Gateway, called: Called, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    path, body = called
    whole = {"model": "m", "stream": True, **body}
    if called is MESSAGES:
        headers["anthropic-version"] = "2023-06-01"
    async with gateway.http.post(gateway.url + path, json=whole, headers=headers) as response:
        named = {name.lower(): value for name, value in response.headers.items()}
        return response.status, named, await response.read()


@pytest.mark.parametrize("name", FAILING)
async def test_an_error_behind_what_has_no_output_goes_to_the_next_upstream(
    gateway: Gateway, hostile: Hostile, name: str
) -> None:
    called, pieces = FAILING[name]
    hostile.answer = SSE + chunked(*pieces, b"")
    status, headers, body = await read(gateway, called)
    assert (status, headers["x-tidegate-upstream"]) == (200, "second")
    assert len(hostile.seen) == 1
    assert b'"error":{' not in body.replace(b" ", b"")
    row = await gateway.audit(headers["x-tidegate-request-id"])
    assert (row["status"], row["attempts"]) == ("succeeded", 2)
    assert row["finish_reason"] == ENDS[called[0]]
    assert row["model_version"]


PAGE = b"<!DOCTYPE html><html><body>Sign in to the network</body></html>"
NOTHING = {"role": "assistant", "content": ""}
CHOICE = {"message": NOTHING, "finish_reason": "error", "error": {"code": 502, "message": "no"}}
FAILED = json.dumps({"id": "gen-1", "model": "m", "choices": [CHOICE]}).encode()
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
JSON, EVENTS, HTML = b"application/json", b"text/event-stream", b"text/html; charset=utf-8"


async def test_a_200_without_an_answer_goes_to_the_next_upstream(
    gateway: Gateway, hostile: Hostile, one_try: None
) -> None:
    """As of a proxy that asks to sign in. It was passed on, and counted as a success."""
    for stream, answer in (
        (False, HEAD % (JSON, 0)),
        (False, HEAD % (JSON, 2) + b"\n\n"),
        (False, HEAD % (HTML, len(PAGE)) + PAGE),
        (False, HEAD % (JSON, len(FAILED)) + FAILED),
        (True, HEAD % (HTML, len(PAGE)) + PAGE),
        (True, HEAD % (EVENTS, 0)),
    ):
        hostile.answer, hostile.seen = answer, []
        await gateway.services.spine.health["first"].worked("m", tried=True)
        status, headers, _ = await read(gateway, (CHAT[0], {**CHAT[1], "stream": stream}))
        assert (status, headers["x-tidegate-upstream"]) == (200, "second"), answer
        assert len(hostile.seen) == 1
        row = await gateway.audit(headers["x-tidegate-request-id"])
        assert (row["status"], row["attempts"], row["upstream"]) == ("succeeded", 2, "second")
    gateway.services.spine.health["second"].drain(True)
    hostile.answer = HEAD % (HTML, len(PAGE)) + PAGE
    status, headers, body = await read(gateway, CHAT, **{"x-tidegate-deadline-ms": "20000"})
    assert (status, b"Sign in" in body) == (502, False)
    row = await gateway.audit(headers["x-tidegate-request-id"])
    assert row["failure"]["code"] == "upstream_garbled"
    assert "a page of HTML" in row["failure"]["message"]


@pytest.mark.parametrize(
    ("operation", "content_type", "body", "passes"),
    [
        (Operation.TRANSCRIBE, b"text/plain", b"\n", True),  # of silence
        (Operation.TRANSCRIBE, HTML, PAGE, False),
        (Operation.SPEAK, b"audio/mpeg", b"\xff\xfb", True),
        (Operation.EMBED, HTML, PAGE, False),
    ],
)
def test_what_may_be_empty_or_a_page(
    operation: Operation, content_type: bytes, body: bytes, passes: bool
) -> None:
    headers = [(b"Content-Type", content_type)]
    assert (refusals.no_answer(operation, headers, body, at_end=True) == "") is passes


@pytest.mark.parametrize("name", FAILING)
async def test_an_error_that_comes_later_than_what_has_no_output_goes_there_too(
    gateway: Gateway, hostile: Hostile, name: str
) -> None:
    called, pieces = FAILING[name]
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(SSE + chunked(*pieces[:1]))
        await writer.drain()
        begun.set()
        await go_on.wait()
        writer.write(chunked(*pieces[1:], b""))

    hostile.answer = answer
    asked = asyncio.create_task(read(gateway, called))
    await begun.wait()
    for _ in range(2):  # the gateway has read the first piece by then
        async with gateway.http.get(f"{gateway.url}/health/live"):
            pass
    go_on.set()
    status, headers, _ = await asked
    assert (status, headers["x-tidegate-upstream"]) == (200, "second")


async def test_it_is_held_back_only_for_a_while(gateway: Gateway, hostile: Hostile) -> None:
    """A model may think in silence for a minute; what came first is passed on as it came."""
    go_on = asyncio.Event()
    text = event("response.output_text.delta", delta="Hi")
    end = event("response.completed", response={"status": "completed", "error": None})

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(SSE + chunked(CREATED))
        await go_on.wait()
        writer.write(chunked(text, end, b""))
        await writer.drain()

    hostile.answer = answer
    path, body = RESPONSES
    asked = {"model": "m", "stream": True, **body}
    async with gateway.http.post(gateway.url + path, json=asked) as response:
        async with asyncio.timeout(promised_s(HELD_S + 1)):
            first = await response.content.readany()
        assert first == CREATED
        go_on.set()
        assert await response.read() == text + end
    row = await gateway.audit(response.headers["x-tidegate-request-id"])
    assert row["status"] == "succeeded"


@pytest.mark.parametrize("padding_bytes", [10, 3_500, 20_000, 300_000])
async def test_a_response_that_failed_is_on_record_however_long_its_last_event_is(
    gateway: Gateway, hostile: Hostile, padding_bytes: int
) -> None:
    failed = {"instructions": "x" * padding_bytes, "status": "failed", "error": BUSY}
    stream = b"".join(
        (
            CREATED,
            event("response.output_text.delta", delta="Tea is"),
            event("response.failed", response=failed),
        )
    )
    pieces = [stream[at : at + 1_448] for at in range(0, len(stream), 1_448)]
    hostile.answer = SSE + chunked(*pieces, b"")
    for tries in (1, 2):
        status, headers, body = await read(gateway, RESPONSES, **{"idempotency-key": "one"})
        assert (status, body) == (200, stream)
        row = await gateway.audit(headers["x-tidegate-request-id"])
        assert (row["status"], row["failure"]["code"]) == ("failed", "upstream_unavailable")
        assert len(hostile.seen) == tries, "a failed answer is not given again under its key"


async def test_a_client_reads_the_error_as_one_that_came_at_once(
    open_gateway: Opener, hostile: Hostile
) -> None:
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url)
    refused = {"code": "invalid_prompt", "type": "invalid_request_error", "message": "not so"}
    failed = event("response.failed", response={"error": refused})
    hostile.answer = SSE + chunked(CREATED, failed, b"")
    status, headers, body = await read(gateway, RESPONSES)
    assert (status, orjson.loads(body)) == (400, {"error": refused})
    assert headers["content-type"] == "application/json"
    assert headers["x-tidegate-upstream"] == "gemini"


@pytest.mark.parametrize("status", [400, 404, 503])
async def test_a_refusal_says_which_upstream_it_is_from(
    open_gateway: Opener, hostile: Hostile, one_try: None, status: int
) -> None:
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url)
    page = b"<html>no</html>"
    hostile.answer = b"HTTP/1.1 %d No\r\ncontent-length: %d\r\n\r\n%b" % (status, len(page), page)
    found, headers, body = await read(gateway, CHAT)
    assert (found, body) == (status, page)
    assert headers["x-tidegate-upstream"] == "gemini"
    assert float(headers["x-tidegate-queue-ms"]) >= 0
    ours, headers, _ = await read(gateway, ("/v1/nothing", {}))
    assert ours == 404
    assert "x-tidegate-upstream" not in headers


@pytest.mark.parametrize("status", [400, 413])
async def test_a_page_of_a_proxy_goes_to_the_next_upstream(
    gateway: Gateway, hostile: Hostile, status: int
) -> None:
    page = b"<html><center>nginx</center></html>"
    head = b"HTTP/1.1 %d No\r\ncontent-type: text/html\r\ncontent-length: %d\r\n\r\n"
    hostile.answer = head % (status, len(page)) + page
    found, headers, _ = await read(gateway, CHAT)
    assert (found, headers["x-tidegate-upstream"]) == (200, "second")
    row = await gateway.audit(headers["x-tidegate-request-id"])
    assert (row["status"], row["attempts"]) == ("succeeded", 2)


async def test_a_place_that_is_not_served_goes_to_the_next_upstream(
    gateway: Gateway, hostile: Hostile
) -> None:
    words = "User location is not supported for the API use."
    error = {"code": 400, "message": words, "status": "FAILED_PRECONDITION"}
    body = json.dumps({"error": error}).encode()
    head = (
        b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    hostile.answer = head % len(body) + body
    found, headers, _ = await read(gateway, CHAT)
    assert (found, headers["x-tidegate-upstream"]) == (200, "second")
    assert gateway.services.spine.health["first"].state == "ok"


async def _silent(_writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n", "upstream_garbled"),
        (b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n", "upstream_unauthorized"),
        (b"x: y\r\n\r\n", "upstream_garbled"),
        (_silent, "upstream_timeout"),
        (None, "upstream_unavailable"),
    ],
)
async def test_an_error_of_ours_says_at_which_upstream_the_call_failed(
    open_gateway: Opener, hostile: Hostile, one_try: None, answer: Answer | bytes | None, code: str
) -> None:
    url = "http://127.0.0.1:9" if answer is None else hostile.url
    gateway = await open_gateway(
        worker=False, gemini_base_url=url, first_byte_timeout_ms=500, connect_timeout_ms=500
    )
    hostile.answer = answer or b""
    _, headers, body = await read(gateway, CHAT)
    assert orjson.loads(body)["error"]["code"] == code
    assert headers["x-tidegate-upstream"] == "gemini"
    assert float(headers["x-tidegate-queue-ms"]) >= 0


async def test_a_refusal_that_no_time_helps_asks_for_no_retry(
    gateway: Gateway, hostile: Hostile
) -> None:
    """SDKs repeat a 429, though no pause makes the request small enough."""
    said = b'{"error":{"message":"Request too large: Limit 300, Requested 315.","type":"tokens"}}'
    head = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\n\r\n"
    hostile.answer = head % len(said) + said
    status, headers, body = await read(gateway, CHAT)
    assert (status, body) == (429, said)
    assert headers["x-should-retry"] == "false"


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_a_compressed_error_goes_to_the_next_upstream_too(
    gateway: Gateway, hostile: Hostile, coding: str, streamed: bool
) -> None:
    kind = b"text/event-stream" if streamed else b"application/json"
    plain = event(error=BUSY) if streamed else orjson.dumps({"error": BUSY})
    packed = gzip.compress(plain) if coding == "gzip" else zlib.compress(plain)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-encoding: %b\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n"
    pieces = packed[:4], packed[4:-9], packed[-9:]  # of the first nothing can be read
    hostile.answer = head % (kind, coding.encode()) + chunked(*pieces, b"")
    path, body = CHAT
    status, headers, answer = await read(gateway, (path, {**body, "stream": streamed}))
    assert (status, headers["x-tidegate-upstream"]) == (200, "second")
    assert b"choices" in answer
    assert len(hostile.seen) == 1
