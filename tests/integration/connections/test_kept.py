"""A kept connection that the upstream closes just as we send: sent again, once, and only there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.integration.connections.scripted import (
    GOOD,
    Script,
    Upstream,
    answer_of,
    ask,
    request,
)
from tidegate.errors import UpstreamUnavailable
from tidegate.upstream.transport import RelayWire, Timeouts


def closes_after(answers: int, then: bytes = b"") -> Script:
    """Answers so many requests on each connection; at the next it says `then`, and closes."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(answers):
            await request(reader)
            writer.write(GOOD)
        await request(reader)
        writer.write(then)

    return script


async def test_what_meets_the_end_of_a_kept_connection_is_sent_again_on_a_new_one(
    wire: RelayWire, upstream: Upstream
) -> None:
    upstream.script = closes_after(1)
    for _ in range(4):
        assert await answer_of(wire, upstream.url) == b"{}"
    assert upstream.connections == 4


async def test_the_same_where_the_upstream_ends_it_with_a_reset(
    wire: RelayWire, upstream: Upstream
) -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(GOOD)
        await reader.readexactly(1)
        writer.transport.abort()  # with bytes unread: a reset

    upstream.script = reset
    for _ in range(3):
        assert await answer_of(wire, upstream.url) == b"{}"


async def test_it_is_sent_again_once_and_only_there(wire: RelayWire, upstream: Upstream) -> None:
    upstream.script = closes_after(0)
    with pytest.raises(UpstreamUnavailable):
        await ask(wire, upstream.url)
    assert upstream.connections == 1, "a new connection was not closed while it was idle"
    upstream.script = closes_after(1)
    assert await answer_of(wire, upstream.url) == b"{}"
    upstream.script = closes_after(0)
    with pytest.raises(UpstreamUnavailable):
        await ask(wire, upstream.url)
    assert upstream.connections == 3


@pytest.mark.parametrize(
    "then",
    [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"],
)
async def test_what_has_been_answered_in_part_is_not_sent_again(
    wire: RelayWire, upstream: Upstream, then: bytes
) -> None:
    upstream.script = closes_after(1, then)
    assert await answer_of(wire, upstream.url) == b"{}"
    with pytest.raises(UpstreamUnavailable):
        await answer_of(wire, upstream.url)
    assert upstream.connections == 1


async def test_an_end_that_comes_late_was_no_closed_idle_connection(
    wire: RelayWire, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.script = closes_after(1)
    assert await answer_of(wire, upstream.url) == b"{}"
    monkeypatch.setattr("tidegate.upstream.transport._CROSSED_S", -1.0)
    with pytest.raises(UpstreamUnavailable):
        await answer_of(wire, upstream.url)
    assert upstream.connections == 1


async def test_a_body_that_cannot_be_sent_again_goes_on_a_new_connection(
    wire: RelayWire, upstream: Upstream
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"x"

    async def chunked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.write(GOOD)

    upstream.script = closes_after(1)
    assert await answer_of(wire, upstream.url) == b"{}"
    upstream.script = chunked
    exchange = await wire.open("POST", wire.place(f"{upstream.url}/upload"), [], pieces())
    assert (await exchange.next(), exchange.close()) == (b"{}", True)
    assert upstream.connections == 2


async def test_nothing_is_sent_again_once_the_wire_is_closed(upstream: Upstream) -> None:
    asked = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(GOOD)
        await request(reader)
        asked.set()
        await reader.read()

    found = RelayWire(Timeouts(connect_ms=500, first_byte_ms=500, idle_ms=400, total_ms=3_000))
    upstream.script = silent
    assert await answer_of(found, upstream.url) == b"{}"
    asking = asyncio.create_task(ask(found, upstream.url))
    await asked.wait()
    await found.aclose()
    with pytest.raises(UpstreamUnavailable):
        await asking
    assert (upstream.connections, found.connections) == (1, set())
