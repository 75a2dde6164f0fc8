"""Our connections to upstreams: reused, ended, and never one answer taken for another's.

On both event loops: the product runs on uvloop, most tests do not.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.waiting import wait_until
from tidegate.errors import (
    PayloadTooLarge,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from tidegate.providers.gemini.timeouts import Timeouts
from tidegate.providers.relay import Exchange, RelayWire

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


def first(answer: bytes, then: asyncio.Event, late: bytes) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(answer)
        await then.wait()
        writer.write(late)

    return script


async def ask(wire: RelayWire, url: str, body: bytes = b"{}") -> Exchange:
    return await wire.open("POST", wire.place(f"{url}/v1/x"), [(b"a", b"b")], body)


async def answer_of(wire: RelayWire, url: str) -> bytes:
    exchange = await ask(wire, url)
    try:
        return await exchange.read(1_000_000)
    finally:
        exchange.close()


async def test_a_connection_whose_answer_was_read_takes_the_next_request(
    wire: RelayWire, upstream: Upstream
) -> None:
    upstream.script = always(GOOD)
    for _ in range(3):
        assert await answer_of(wire, upstream.url) == b"{}"
    assert upstream.connections == 1


async def test_one_that_was_left_or_says_close_takes_none(
    wire: RelayWire, upstream: Upstream
) -> None:
    upstream.script = always(GOOD.replace(b"{}", b"{}").replace(b": 2", b": 9"))
    exchange = await ask(wire, upstream.url)
    assert await exchange.next() == b"{}"
    assert not exchange.close()
    assert not exchange.close(), "closing again says the same"
    await wait_until(lambda: upstream.ended == 1, 2, "the connection that was left")
    upstream.script = always(GOOD.replace(b"OK\r\n", b"OK\r\nconnection: close\r\n"))
    for _ in range(2):
        assert await answer_of(wire, upstream.url) == b"{}"
    assert upstream.connections == 3


@pytest.mark.parametrize("late", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged"])
async def test_an_idle_one_that_the_upstream_ends_or_writes_to_is_not_used(
    wire: RelayWire, upstream: Upstream, late: bytes
) -> None:
    then = asyncio.Event()
    upstream.script = first(GOOD, then, late)
    assert await answer_of(wire, upstream.url) == b"{}"
    then.set()
    await wait_until(lambda: upstream.ended == 1, 2, "its end")
    upstream.script = always(GOOD)
    await wait_until(lambda: not wire.connections, 2, "that it is seen here")
    assert await answer_of(wire, upstream.url) == b"{}"


async def test_an_answer_without_a_length_ends_with_its_connection(
    wire: RelayWire, upstream: Upstream
) -> None:
    async def until_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall ")
        await writer.drain()
        writer.write(b"of it")

    upstream.script = until_close
    assert await answer_of(wire, upstream.url) == b"all of it"


async def test_hints_before_an_answer_are_passed_over(wire: RelayWire, upstream: Upstream) -> None:
    upstream.script = always(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 2 + GOOD)
    exchange = await ask(wire, upstream.url)
    assert exchange.headers == [(b"content-length", b"2")]
    assert await exchange.next() == b"{}"
    assert exchange.close()


async def test_chunks_trailers_and_their_extensions_are_bounded(
    wire: RelayWire, upstream: Upstream
) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    good = head + b"2;a=b\r\n{}\r\n0\r\nx-trailer: y\r\n\r\n"
    upstream.script = always(good.replace(b"OK", b"OK\r\nconnection: close"))
    exchange = await ask(wire, upstream.url)
    assert await exchange.next() == b"{}"
    assert exchange.headers[1:] == [(b"transfer-encoding", b"chunked")]
    exchange.close()
    upstream.script = always(head + b"0\r\n" + b"".join(b"t%d: y\r\n" % n for n in range(20_000)))
    with pytest.raises(UpstreamGarbled, match="trailers"):
        await answer_of(wire, upstream.url)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n2\r\n{}",
        b"HTTP/1.1 204 No Content\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nx: a\r\n b\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\nx: a\ncontent-length: 2\n\n{}",
        b"HTTP/1.1 200 OK\r\nx : a\r\ncontent-length: 2\r\n\r\n{}",
    ],
)
async def test_what_can_be_read_in_two_ways_is_not_read(
    wire: RelayWire, upstream: Upstream, answer: bytes
) -> None:
    upstream.script = always(answer)
    with pytest.raises(UpstreamGarbled):
        await answer_of(wire, upstream.url)


async def test_silence_is_cut_in_each_phase(wire: RelayWire, upstream: Upstream) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        await reader.read()

    upstream.script = silent
    with pytest.raises(UpstreamTimeout) as found:
        await ask(wire, upstream.url)
    assert found.value.phase == "first_byte"
    upstream.script = always(GOOD.replace(b": 2", b": 9"))
    exchange = await ask(wire, upstream.url)
    assert await exchange.next() == b"{}"
    with pytest.raises(UpstreamTimeout) as found:
        await exchange.next()
    assert (found.value.phase, exchange.close()) == ("idle", False)
    await wait_until(lambda: upstream.ended == 2, 2, "both connections")


async def test_cancelling_ends_the_connection(wire: RelayWire, upstream: Upstream) -> None:
    asked = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        asked.set()
        await reader.read()

    upstream.script = silent
    asking = asyncio.create_task(ask(wire, upstream.url))
    await asked.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await wait_until(lambda: upstream.ended == 1, 2, "the connection")
    assert not wire.exchanges


async def test_a_body_in_pieces_waits_for_the_upstream_and_its_own_fault_is_told(
    wire: RelayWire, upstream: Upstream
) -> None:
    read_on, given = asyncio.Event(), 0

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await read_on.wait()
        while got := await reader.read(1_000_000):
            if got.endswith(b"\r\n0\r\n\r\n"):
                writer.write(GOOD)

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal given
        for _ in range(300):
            given += 1
            yield b"x" * 100_000

    async def too_large() -> AsyncIterator[bytes]:
        yield b"x"
        raise PayloadTooLarge("body", "the body is too large", allowed="at most 1 byte")

    upstream.script = slow
    place = wire.place(f"{upstream.url}/upload")
    asking = asyncio.create_task(wire.open("POST", place, [], pieces()))
    await wait_until(lambda: given > 1, 2)
    before = -1
    while given > before:  # until the sockets' buffers are full
        before = given
        for _ in range(20):
            await asyncio.sleep(0)
    assert given < 300
    read_on.set()
    exchange = await asking
    assert (await exchange.next(), exchange.close()) == (b"{}", True)
    with pytest.raises(PayloadTooLarge):
        await wire.open("POST", place, [], too_large())


async def test_what_would_be_another_request_is_not_sent(
    wire: RelayWire, upstream: Upstream
) -> None:
    upstream.script = always(GOOD)
    place = wire.place(f"{upstream.url}/x")
    for name, value in ((b"a", b"b\r\nhost: c"), (b"a\nb", b"c"), (b"a", b"\0")):
        with pytest.raises(UpstreamRejected):
            await wire.open("POST", place, [(name, value)], b"")
    for url in ("http://h/a b", "ftp://h/", "http:///x", "http://h/\xe4"):
        with pytest.raises(UpstreamRejected):
            wire.place(url)
    assert upstream.connections == 0


async def test_who_cannot_be_reached_is_told_apart(wire: RelayWire, upstream: Upstream) -> None:
    async def plain(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GOOD)

    upstream.script = plain
    with pytest.raises(UpstreamUnavailable, match="could not connect"):
        await ask(wire, "http://127.0.0.1:1")
    with pytest.raises(UpstreamUnavailable, match="no secure connection"):
        await ask(wire, upstream.url.replace("http:", "https:"))


def test_certificates_are_checked() -> None:
    context = RelayWire.tls_context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


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
    monkeypatch.setattr("tidegate.providers.relay._CROSSED_S", -1.0)
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
