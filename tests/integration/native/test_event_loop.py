"""Large bodies beside small calls: no step of the event loop works on one.

What is counted are the calls, from this package, of functions in C with a large value, in the
thread of the loop; how long one takes is another machine's affair.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import aiohttp
import orjson
import pytest

import tidegate
from tests.gateway import PNG, Gateway, Opener
from tests.integration.security.hostile import Hostile, hostile
from tests.integration.tenants.asking import ADMIN_TOKEN, key_of
from tests.waiting import wait_until
from tidegate.jobs import background

__all__ = ["hostile"]

SOURCE = str(Path(tidegate.__file__).parent)
EMULATOR = f"{SOURCE}/emulator"
MODEL = "gemini-2.5-flash"
CHAT = "/v1/chat/completions"
LARGE_BYTES = 262_144  # from there on a body is read beside the event loop
LETTERS = bytes(b"abcdefghijklmnop "[each % 17] for each in range(256))
TEXT = random.Random(1).randbytes(600_000).translate(LETTERS).decode()
PICTURE = PNG + random.Random(1).randbytes(600_000)
IN_BASE64 = b64encode(PICTURE).decode()
# The same for a value of any size: what they look at is its kind, its length or its first bytes.
QUICK = frozenset(
    (
        *("len", "isinstance", "type", "id", "next", "dict", "str.isascii", "bytes.startswith"),
        *("dict.get", "dict.pop", "dict.keys", "dict.values", "dict.items"),
        *("list.append", "list.pop", "list.clear", "frozenset.isdisjoint"),
    )
)


def size_of(value: Any, depth: int = 3) -> int:
    """The bytes and letters in a value, and in what it holds."""
    if isinstance(value, bytes | bytearray | str):
        return len(value)
    if depth and isinstance(value, dict):
        value = [*value.values()]
    if depth and isinstance(value, list | tuple):
        return sum(size_of(one, depth - 1) for one in value)
    return 0


class LoopWatch:
    """What was called with a large value in the thread of the event loop, and by which code."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()
        self._thread = threading.get_ident()
        self._monitoring: Any = vars(sys)["monitoring"]

    def note(self, code: CodeType, _place: int, called: object, value: object) -> object:
        file = code.co_filename
        if not file.startswith(SOURCE) or file.startswith(EMULATOR):
            return self._monitoring.DISABLE
        name = getattr(called, "__qualname__", "")
        if hasattr(called, "__code__") or name in QUICK or threading.get_ident() != self._thread:
            return None
        if isinstance(called, type) and called not in (bytes, bytearray, str, list):
            return None
        if size_of(value) > LARGE_BYTES:
            self.seen.add((f"{Path(file).name}:{code.co_name}", name))
        return None

    @contextmanager
    def on(self) -> Iterator[None]:
        monitoring = self._monitoring
        tool, calls = monitoring.PROFILER_ID, monitoring.events.CALL
        monitoring.use_tool_id(tool, "loop watch")
        monitoring.register_callback(tool, calls, self.note)
        monitoring.set_events(tool, calls)
        try:
            yield
        finally:
            monitoring.set_events(tool, 0)
            monitoring.register_callback(tool, calls, None)
            monitoring.free_tool_id(tool)


@pytest.fixture
def watch() -> Iterator[LoopWatch]:
    watching = LoopWatch()
    with watching.on():
        yield watching


def said(text: Any = TEXT, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": (CHAT, said()),
    "stream": (CHAT, said(stream=True)),
    "stream with options": (CHAT, said(stream=True, stream_options={"include_usage": False})),
    "another name for the model": (CHAT, said() | {"model": "quick"}),
    "picture": (
        CHAT,
        said([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IN_BASE64}"}}]),
    ),
    "messages": (
        CHAT,
        {"model": MODEL, "messages": [{"role": "user", "content": TEXT[:2_000]}] * 300},
    ),
    "gemini": (
        f"/v1beta/models/{MODEL}:generateContent",
        {
            "contents": [
                {"parts": [{"inlineData": {"mimeType": "image/png", "data": IN_BASE64}}]},
                {"parts": [{"text": TEXT}]},
            ]
        },
    ),
    "anthropic": ("/v1/messages", said(max_tokens=50)),
    "anthropic, cached": (
        "/v1/messages",
        said(
            [{"type": "text", "text": TEXT, "cache_control": {"type": "ephemeral"}}], max_tokens=50
        ),
    ),
    "anthropic, refused": ("/v1/messages", said(max_tokens=50) | {"messages": [], "system": TEXT}),
    "responses": ("/v1/responses", {"model": MODEL, "input": TEXT}),
    "background": ("/v1/responses", {"model": MODEL, "input": TEXT, "background": True}),
    "job": ("/submit", {"endpoint": CHAT, "body": said()}),
    "passed through": ("/v1/new-thing", {"model": MODEL, "query": "x", "documents": [TEXT]}),
}
POLICY = """
[upstreams.gemini]
models = ["*"]
aliases = { quick = "gemini-2.5-flash" }

[upstreams.away]
base_url = "http://127.0.0.1:9/v1"
models = ["none"]
passthrough = ["/v1/new-thing"]
"""


async def posted(
    gateway: Gateway, path: str, headers: dict[str, str], body: Any
) -> tuple[int, bytes]:
    given = {"data": orjson.dumps(body)} if isinstance(body, dict) else {"data": body}
    kind = {"Content-Type": "application/json", "anthropic-version": "2023-06-01"}
    async with gateway.http.post(gateway.url + path, headers=kind | headers, **given) as answer:
        return answer.status, await answer.read()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="traces with sys.monitoring")
async def test_no_step_of_the_event_loop_works_on_a_large_body(
    open_gateway: Opener, watch: LoopWatch, tmp_path: Path
) -> None:
    """By a tenant with a budget, a cap on streams and some models only, which are all looked up in
    a body; the second time under a key, and answered from the record."""
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    gateway = await open_gateway(auth="on", admin_token=ADMIN_TOKEN, tidegate_policy=policy)
    bounds: dict[str, Any] = {
        "budget_day_tokens": 10**9,
        "most_streams": 5,
        "models": (MODEL, "quick"),
    }
    acme = await key_of(gateway, "acme", **bounds)
    found: dict[str, set[tuple[str, str]]] = {}
    for name, (path, body) in BODIES.items():
        once = {"Idempotency-Key": f"key {name}"} if path == CHAT else {}
        for _ in range(1 + len(once)):
            status, answer = await posted(gateway, path, acme | once, body)
            expected = {"anthropic, refused": 400, "job": 202, "passed through": 502}.get(name, 200)
            assert status == expected, (name, answer[:500])
            assert b"not relayed" not in answer, name
        found[name] = watch.seen
        watch.seen = set()
    form = aiohttp.FormData()
    form.add_field("data", "Describe the picture")
    form.add_field("file", PICTURE, filename="a.png", content_type="image/png")
    async with gateway.http.post(gateway.url + "/stream", headers=acme, data=form) as response:
        assert response.status == 200, await response.read()
        assert b"event: done" in await response.read()
    assert (await gateway.calls())[-1]
    found["form"] = watch.seen

    async def all_ended() -> bool:
        left = "SELECT count(*) FROM requests WHERE status IN ('queued', 'running')"
        calls = "SELECT count(*) FROM background_calls WHERE state = 'running'"
        return not (await gateway.database.fetchval(left) or await gateway.database.fetchval(calls))

    await wait_until(all_ended, 30, "jobs and work in the background")
    found["workers"] = watch.seen
    assert {name: seen for name, seen in found.items() if seen} == {}


WORDS = TEXT[:300_000]
DRAWN = b64encode(random.Random(1).randbytes(300_000)).decode()
CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": WORDS}}
USED = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
DELTA = {"choices": [{"index": 0, "delta": {"content": WORDS[:1_000]}}]}
PARTS = [{"text": "so"}, {"inlineData": {"mimeType": "image/png", "data": DRAWN}}]
GENERATED = {"candidates": [{"content": {"role": "model", "parts": PARTS}}]}
MESSAGE = {"id": "m", "type": "message", "content": [{"type": "text", "text": WORDS}]}
GENERATE = f"/v1beta/models/{MODEL}:generateContent"
STREAMED = b"".join(b"data: %b\n\n" % orjson.dumps(DELTA) for _ in range(320))
# What is asked for, and what is answered.
ANSWERS: dict[str, tuple[str, dict[str, Any], bytes]] = {
    "text": (CHAT, said("x"), orjson.dumps({"choices": [CHOICE], "usage": USED})),
    "text without usage": (CHAT, said("x"), orjson.dumps({"choices": [CHOICE]})),
    "stream": (CHAT, said("x", stream=True), STREAMED + b"data: [DONE]\n\n"),
    "pictures": (
        "/v1/images/generations",
        {"model": MODEL, "prompt": "x"},
        orjson.dumps({"created": 1, "data": [{"b64_json": DRAWN}]}),
    ),
    "gemini": (GENERATE, {"contents": [{"parts": [{"text": "x"}]}]}, orjson.dumps(GENERATED)),
    "anthropic": ("/v1/messages", said("x", max_tokens=50), orjson.dumps(MESSAGE)),
    "vectors": (
        "/v1/embeddings",
        {"model": MODEL, "input": "x"},
        orjson.dumps({"data": [{"embedding": [0.123456789] * 40_000}], "usage": USED}),
    ),
    "response that is kept": (
        "/v1/responses",
        {"model": MODEL, "input": "x"},
        orjson.dumps({"id": "resp_1", "output": [{"content": [{"text": WORDS}]}], "usage": USED}),
    ),
    "cut off": (CHAT, said("x"), orjson.dumps({"choices": [CHOICE], "usage": USED})[:-1_000]),
}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="traces with sys.monitoring")
async def test_no_step_of_the_event_loop_works_on_a_large_answer(
    open_gateway: Opener, watch: LoopWatch, hostile: Hostile, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    urls = f'openai = "{hostile.url}/v1", gemini = "{hostile.url}", anthropic = "{hostile.url}"'
    others = '[upstreams.gemini]\nmodels = ["none"]\n'
    policy.write_text(f"{others}[upstreams.away]\ndialects = {{ {urls} }}\n")
    gateway = await open_gateway(tidegate_policy=policy, worker=False)
    found: dict[str, set[tuple[str, str]]] = {}
    for name, (path, body, answer) in ANSWERS.items():
        is_stream = answer.startswith(b"data:")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
        kind = b"text/event-stream" if is_stream else b"application/json"
        whole_bytes = len(answer) + 1_000 * (name == "cut off")

        async def answers(
            writer: asyncio.StreamWriter, data: bytes = head % (kind, whole_bytes) + answer
        ) -> None:
            writer.write(data)
            await writer.drain()

        hostile.answer = answers
        asked = orjson.dumps(body)
        try:
            async with gateway.http.post(
                gateway.url + path,
                data=asked,
                headers={"Content-Type": "application/json", "anthropic-version": "x"},
            ) as response:
                got = await response.read()
                assert (response.status, len(got)) == (200, len(answer)), (
                    name,
                    got[:300],
                    response.headers,
                )
        except aiohttp.ClientPayloadError:
            assert name == "cut off"
        request_id = response.headers["x-tidegate-request-id"]
        query = "SELECT 1 FROM audit WHERE request_id = $1::uuid"
        await wait_until(partial(gateway.database.fetchval, query, request_id), 20)
        found[name] = watch.seen
        watch.seen = set()
    assert {name: seen for name, seen in found.items() if seen} == {}


SPENT = {"promptTokenCount": 5, "candidatesTokenCount": 7}
LONG_BATCH: dict[str, Any] = {
    "name": "batches/b1",
    "done": True,
    "metadata": {"state": "BATCH_STATE_SUCCEEDED"},
    "response": {
        "inlinedResponses": {
            "inlinedResponses": [
                {"response": GENERATED | {"usageMetadata": SPENT}},
                {"response": GENERATED | {"usageMetadata": SPENT}},
            ]
        }
    },
}
LONG_RESPONSE = {
    "id": "resp_2",
    "status": "completed",
    "output": [{"content": [{"text": WORDS}]}],
    "usage": {"input_tokens": 5, "output_tokens": 7, "total_tokens": 12},
}
BATCHED: dict[str, Any] = {
    "batch": {"inputConfig": {"requests": {"requests": [{"request": {"contents": []}}]}}}
}
# What is asked for, the first answer, and the answer once it has ended.
CONTINUED: dict[str, tuple[str, dict[str, Any], Any, Any]] = {
    "batch": (
        f"/v1beta/models/{MODEL}:batchGenerateContent",
        BATCHED,
        {"name": "batches/b1", "metadata": {"state": "BATCH_STATE_RUNNING"}},
        LONG_BATCH,
    ),
    "response": (
        "/v1/responses",
        {"model": MODEL, "input": "x", "background": True},
        {"id": "resp_2", "status": "queued"},
        LONG_RESPONSE,
    ),
}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="traces with sys.monitoring")
@pytest.mark.parametrize("most_bytes", [64_000_000, 500_000])
async def test_no_step_of_the_event_loop_works_on_the_large_end_of_background_work(
    open_gateway: Opener,
    watch: LoopWatch,
    hostile: Hostile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    most_bytes: int,
) -> None:
    """Nor on a list that contains it."""
    monkeypatch.setattr(background, "_MOST_ANSWER_BYTES", most_bytes)
    policy = tmp_path / "policy.toml"
    urls = f'openai = "{hostile.url}/v1", gemini = "{hostile.url}"'
    others = '[upstreams.gemini]\nmodels = ["none"]\n'
    policy.write_text(f"{others}[upstreams.away]\ndialects = {{ {urls} }}\n")
    gateway = await open_gateway(tidegate_policy=policy, background_poll_ms=100)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"

    def answer(value: Any) -> None:
        body = orjson.dumps(value)
        hostile.answer = head % len(body) + body

    found: dict[str, set[tuple[str, str]]] = {}
    for name, (path, body, begun, ended) in CONTINUED.items():
        answer(begun)
        status, got = await posted(gateway, path, {}, body)
        assert status == 200, got[:300]
        answer(ended)
        query = "SELECT output_tokens FROM audit WHERE endpoint LIKE '%' || $1"
        ask = partial(gateway.database.fetchrow, query, path.rpartition("/")[2])
        row = await wait_until(ask, 20, f"the end of the {name}")
        found[name], watch.seen = watch.seen, set()
        assert row["output_tokens"], name
        if name == "batch":
            async with gateway.http.get(f"{gateway.url}/v1beta/batches") as response:
                listed = (await response.json())["operations"]
            assert [one["name"] for one in listed] == ["batches/b1"]
            found["list"], watch.seen = watch.seen, set()
    assert {name: seen for name, seen in found.items() if seen} == {}
