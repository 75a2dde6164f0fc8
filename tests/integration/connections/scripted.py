"""A scripted upstream on a raw socket, and the wire that is tested against it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tidegate.upstream.transport import Exchange, RelayWire, Timeouts

GOOD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Upstream:
    """Plays `script` on each connection."""

    def __init__(self) -> None:
        self.url = ""
        self.connections = 0
        self.ended = 0
        self.script: Script

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self.script(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the other side has gone, which is what some tests are about
        finally:
            self.ended += 1
            writer.close()


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    found = Upstream()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield found
    server.close()


@pytest.fixture
async def wire() -> AsyncIterator[RelayWire]:
    timeouts = Timeouts(connect_ms=500, first_byte_ms=500, idle_ms=400, total_ms=3_000)
    found = RelayWire(timeouts)
    await found.start()
    yield found
    await found.aclose()


async def request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.partition(b"content-length: ")[2].split(b"\r\n")[0]
    return head + (await reader.readexactly(int(length)) if length else b"")


def always(answer: bytes) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await request(reader)
            writer.write(answer)

    return script


async def ask(wire: RelayWire, url: str, body: bytes = b"{}") -> Exchange:
    return await wire.open("POST", wire.place(f"{url}/v1/x"), [(b"a", b"b")], body)


async def answer_of(wire: RelayWire, url: str) -> bytes:
    exchange = await ask(wire, url)
    try:
        return await exchange.read(1_000_000)
    finally:
        exchange.close()
