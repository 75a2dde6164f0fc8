"""A raw upstream for the Gemini contract tests: exact bytes out, the truth about connections in.

The emulator serves all that it can; this serves what needs exact bytes or a broken connection.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from tests.waiting import wait_until
from tidegate.call import Answer, Call, Event, Kind, Media
from tidegate.upstream.gemini import GeminiProcessor
from tidegate.upstream.transport import Timeouts

KEY = "AIzaSyNotARealKeyButLooksLikeOne0123456"
PATIENT = Timeouts(connect_ms=5_000, first_byte_ms=10_000, idle_ms=10_000, total_ms=20_000)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


@dataclass(slots=True)
class Received:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One request to answer, on its connection."""

    def __init__(
        self, upstream: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._upstream = upstream
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def event(self, value: object) -> None:
        """One SSE event in one HTTP chunk."""
        data = b"data: " + json.dumps(value).encode() + b"\r\n\r\n"
        await self.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def whole(self, status: int, body: bytes | object, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} Reason", f"content-length: {len(data)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.send("\r\n".join([*lines, "", ""]).encode() + data)

    async def hang(self) -> None:
        """Wait until the client closes, and note when it did."""
        while await self._reader.read(65_536):
            pass
        self._upstream.closed_at.append(time.monotonic())

    def cut(self, *, reset: bool = False) -> None:
        if reset:
            self._writer.transport.abort()
        else:
            self._writer.close()


Script = Callable[[Received, Connection], Awaitable[None]]


@dataclass
class RawUpstream:
    """Runs `script` for every request."""

    script: Script
    url: str = ""
    received: list[Received] = field(default_factory=list)
    closed_at: list[float] = field(default_factory=list)
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (request := await _read(reader)) is not None:
                self.received.append(request)
                await self.script(request, Connection(self, reader, writer))
                if writer.is_closing():
                    return
        except ConnectionError:
            self.closed_at.append(time.monotonic())
        finally:
            self.connections -= 1
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    method, target, _ = first.split(" ")
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Received(method, target, headers, body)


@asynccontextmanager
async def raw_upstream(script: Script) -> AsyncIterator[RawUpstream]:
    upstream = RawUpstream(script)
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0, limit=2**20)
    host, port = server.sockets[0].getsockname()
    upstream.url = f"http://{host}:{port}"
    try:
        yield upstream
    finally:
        server.close()
    await wait_until(lambda: upstream.connections == 0, 20, "the client closes every connection")


@asynccontextmanager
async def gemini(
    url: str, timeouts: Timeouts = PATIENT, **options: Any
) -> AsyncIterator[GeminiProcessor]:
    """A started processor, which must have no call open at the end."""
    processor = GeminiProcessor(api_key=KEY, base_url=url, timeouts=timeouts, **options)
    await processor.start()
    try:
        yield processor
    finally:
        await processor.aclose()
    assert processor.open_calls == 0


def call(
    kind: Kind = Kind.TEXT_ONLY, *, prompt: str = "What is a tide?", media: tuple[Media, ...] = ()
) -> Call:
    model = "gemini-2.5-flash-image" if kind is Kind.IMAGE_GENERATION else "gemini-2.5-flash"
    return Call(uuid4(), prompt, kind, model, media)


class Collected:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    async def __call__(self, event: Event) -> None:
        self.events.append(event)


def chunk(
    text: str | None = None, *, finish: str | None = None, tokens: int | None = None
) -> dict[str, Any]:
    """One streamed response as Gemini sends it."""
    candidate: dict[str, Any] = {"index": 0}
    if text is not None:
        candidate["content"] = {"role": "model", "parts": [{"text": text}]}
    if finish is not None:
        candidate["finishReason"] = finish
    value: dict[str, Any] = {"candidates": [candidate], "modelVersion": "m-1", "responseId": "r-1"}
    if tokens is not None:
        value["usageMetadata"] = {"promptTokenCount": 7, "candidatesTokenCount": tokens}
    return value


async def run_against(
    script: Script, made: Call | None = None, timeouts: Timeouts = PATIENT, **options: Any
) -> Answer:
    """Make one call against a raw upstream; the answer, or what `run` raised."""
    answer = Answer()
    async with raw_upstream(script) as upstream, gemini(upstream.url, timeouts, **options) as ours:
        await ours.run(made or call(), answer, Collected())
        assert ours.open_calls == 0
    return answer
