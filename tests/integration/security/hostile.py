"""Raw bytes on both sides of the relay: an upstream that attacks us, a client that does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest

from tests.gateway import Gateway
from tidegate.spine import run as spine

MODEL = "gemini-2.5-flash"
PATH = f"/v1beta/models/{MODEL}:generateContent"
BODY = b'{"contents":[{"parts":[{"text":"hello"}]}]}'
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Hostile:
    """An upstream on a raw socket. `answer` writes what it likes; `seen` are the requests, whole
    heads and bodies by their Content-Length; `begun` counts the heads."""

    url: str = ""
    answer: Answer | bytes = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
    seen: list[bytes] = field(default_factory=list)
    begun: int = 0
    closed: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.begun += 1
                length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
                body = await reader.readexactly(int(length)) if length else b""
                self.seen.append(head + body)
                if isinstance(self.answer, bytes):
                    writer.write(self.answer)
                    await writer.drain()
                    if b"content-length" not in self.answer.lower():
                        return
                else:
                    await self.answer(writer)
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            self.closed += 1
            writer.close()


@pytest.fixture
async def hostile() -> AsyncIterator[Hostile]:
    upstream = Hostile()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield upstream
    server.close()


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call is tried again: the pause before that would outlast any deadline."""
    monkeypatch.setattr(spine, "_FIRST_PAUSE_S", 1e6)
    monkeypatch.setattr(spine, "_LONGEST_PAUSE_S", 1e6)


async def raw(gateway: Gateway, data: bytes, within_s: float = 10) -> bytes:
    """All that is answered to these bytes until the connection ends, or the time is over. It is
    read while they are sent, as clients do: what is too large is refused before it has come."""
    parts = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    got = b""
    try:
        writer.write(data)
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(within_s):
                while piece := await reader.read(65536):
                    got += piece
    finally:
        writer.close()
    return got


def post(
    *headers: bytes, path: bytes = PATH.encode(), body: bytes = BODY, version: bytes = b"1.1"
) -> bytes:
    """A request with a Content-Length, after which the connection is to be closed."""
    lines = [
        b"POST %b HTTP/%b" % (path, version),
        b"host: localhost",
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        b"connection: close",
        *headers,
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def status_of(answer: bytes) -> int:
    """0 where there was none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0
