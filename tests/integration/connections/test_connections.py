"""Our connections to upstreams: reused, ended, and never one answer taken for another's.

On both event loops: the product runs on uvloop, and on the one of asyncio where that is not there.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator

import pytest

from tests.integration.connections.scripted import (
    GOOD,
    Script,
    Upstream,
    always,
    answer_of,
    ask,
    request,
)
from tests.waiting import wait_until
from tidegate.errors import (
    PayloadTooLarge,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from tidegate.upstream.transport import RelayWire, Timeouts


def first(answer: bytes, then: asyncio.Event, late: bytes) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(answer)
        await then.wait()
        writer.write(late)

    return script


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
    await wait_until(lambda: upstream.ended == 1, 20, "the connection that was left")
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
    await wait_until(lambda: upstream.ended == 1, 20, "its end")
    upstream.script = always(GOOD)
    await wait_until(lambda: not wire.connections, 20, "that it is seen here")
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


@pytest.mark.parametrize(
    "framing",
    [b"content-length: %d" % len(GOOD), b"transfer-encoding: chunked", b"content-length: 1"],
)
async def test_hints_that_announce_a_body_are_no_answer(
    framing: bytes, wire: RelayWire, upstream: Upstream
) -> None:
    """They have none: what comes behind them would be taken for it, and lost."""
    upstream.script = always(b"HTTP/1.1 103 Early Hints\r\n" + framing + b"\r\n\r\n" + GOOD * 2)
    with pytest.raises(UpstreamGarbled, match="answered 103 with a body"):
        await ask(wire, upstream.url)
    upstream.script = always(b"HTTP/1.1 103 Early Hints\r\ncontent-length: 0\r\n\r\n" + GOOD)
    assert await answer_of(wire, upstream.url) == b"{}"


async def test_spaces_behind_a_value_are_none_of_it(wire: RelayWire, upstream: Upstream) -> None:
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked \r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    empty = b"HTTP/1.1 204 No Content\r\ncontent-length: 0 \r\nx:  y  \r\n\r\n"
    for answer, text in ((chunked, b"{}"), (empty, b""), (GOOD.replace(b": 2", b": 2 "), b"{}")):
        upstream.script = always(answer)
        exchange = await ask(wire, upstream.url)
        assert not any(value.endswith(b" ") for _, value in exchange.headers)
        assert await exchange.read(1_000) == text
        assert exchange.close(), "its end was found"
        await wire.aclose()
    # With a tab the parser finds no chunks.
    upstream.script = always(chunked.replace(b"Chunked ", b"chunked\t"))
    with pytest.raises(UpstreamGarbled, match="unknown transfer coding"):
        await answer_of(wire, upstream.url)


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
    await wait_until(lambda: upstream.ended == 2, 20, "both connections")


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
    await wait_until(lambda: upstream.ended == 1, 20, "the connection")
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
    await wait_until(lambda: given > 1, 20)
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


async def answers_early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An upstream that answers once it has the head, and reads nothing behind it."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(GOOD)
    await asyncio.get_running_loop().create_future()


async def test_a_body_that_was_not_taken_whole_holds_up_no_other_request(
    wire: RelayWire, upstream: Upstream
) -> None:
    upstream.script = answers_early
    exchange = await ask(wire, upstream.url, b"x" * 20_000_000)
    assert (await exchange.next(), exchange.close()) == (b"{}", True)
    assert await answer_of(wire, upstream.url) == b"{}"
    assert upstream.connections == 2


async def test_a_body_in_pieces_is_read_no_further_once_its_answer_was_read(
    wire: RelayWire, upstream: Upstream
) -> None:
    ended = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        try:
            yield b"x"
            await asyncio.get_running_loop().create_future()  # a client that sends no more
        finally:
            ended.set()

    upstream.script = answers_early
    exchange = await wire.open("POST", wire.place(f"{upstream.url}/upload"), [], pieces())
    assert (await exchange.next(), exchange.close()) == (b"{}", True)
    await asyncio.wait_for(ended.wait(), 5)


async def test_a_client_that_takes_long_for_its_body_is_no_silence_of_the_upstream(
    upstream: Upstream,
) -> None:
    read_on, asked, floods = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def takes_some(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await read_on.wait()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"x"
        await floods.wait()
        for _ in range(1_000):
            yield b"x" * 100_000

    upstream.script = takes_some
    found = RelayWire(Timeouts(connect_ms=500, first_byte_ms=500, idle_ms=500, total_ms=60_000))
    asking = asyncio.create_task(
        found.open("POST", found.place(f"{upstream.url}/upload"), [], pieces())
    )
    await asked.wait()
    (exchange,), (connection,) = found.exchanges, found.connections
    now = found.time()
    assert [exchange.overdue(now + later_s) for later_s in (1, 2, 3)] == [None] * 3
    floods.set()  # the client is there, and the upstream takes no more
    await wait_until(lambda: not connection.goes_out(), 20, "full buffers")
    assert exchange.overdue(now + 3.1) is None
    assert exchange.overdue(now + 4) == "first_byte"
    asking.cancel()
    read_on.set()
    await asyncio.wait([asking])
    await found.aclose()


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


async def test_a_host_that_has_moved_is_found_by_the_next_call(
    wire: RelayWire, upstream: Upstream
) -> None:
    upstream.script = always(GOOD)
    origin = wire.place(upstream.url).origin
    with socket.socket() as left:  # where the host was: nothing listens there any more
        left.bind(("127.0.0.1", 0))
        was = [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", left.getsockname())]
        wire._names[origin.host, origin.port] = (wire.time() + 1_000, was)
        with pytest.raises(UpstreamUnavailable, match="could not connect"):
            await ask(wire, upstream.url)
        assert await answer_of(wire, upstream.url) == b"{}"


def test_certificates_are_checked() -> None:
    context = RelayWire.tls_context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


async def test_a_host_name_that_cannot_be_resolved_is_told_apart(wire: RelayWire) -> None:
    for host in ("nowhere.invalid", "x" * 64 + ".invalid"):
        place = RelayWire.place(f"http://{host}/v1/models")
        with pytest.raises(UpstreamUnavailable, match="cannot be resolved") as failed:
            await wire.open("GET", place, [], None)
        assert failed.value.broke == "connecting"
