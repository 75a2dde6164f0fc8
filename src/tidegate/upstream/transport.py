"""Transport of calls: an HTTP/1.1 client for requests and streams; llhttp parses answers.

Connections are opened by RFC 8305 ("happy eyeballs"). A place may belong to an upstream's access:
then the access determines headers, credentials, proxy and TLS.

Invariants: one attempt, no redirect, no decompression; an answer ends where its own framing says,
or has failed; unexpected bytes end the connection; an abandoned exchange is closed before its
permit is returned; read-ahead and heads are bounded.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from time import perf_counter
from typing import Any, NamedTuple, Protocol, cast

import aiohappyeyeballs
from httptools import HttpParserCallbackError, HttpParserError, HttpResponseParser
from yarl import URL

from tidegate.errors import (
    TidegateError,
    UpstreamError,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnauthorized,
    UpstreamUnavailable,
)
from tidegate.policy.access import Access, Authentication, Network, Proxy

if sys.platform == "linux":
    from fcntl import ioctl
    from termios import TIOCOUTQ

RawHeaders = list[tuple[bytes, bytes]]

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 200
# Unread bytes of an answer above which reading from its connection is paused.
READ_AHEAD_BYTES = 256 * 1024
# A larger body is written separately, so that it is not copied to be joined with the head.
_COPIED_BYTES = 64 * 1024
_NO_BODY = (204, 304)
_LENGTH, _CODING = b"content-length", b"transfer-encoding"


class _Unusable(Exception):
    """The bytes are not a valid answer; the message has the reason."""


@dataclass(frozen=True, slots=True)
class RepeatableBody:
    """A body in pieces of known length; each call of `pieces` starts it again."""

    size_bytes: int
    pieces: Callable[[], AsyncIterator[bytes]]


@dataclass(frozen=True, slots=True)
class SizedBody:
    """A body in pieces of known length that can be read once, as its client sends it."""

    size_bytes: int
    pieces: AsyncIterator[bytes]


RequestBody = bytes | RepeatableBody | SizedBody | AsyncIterator[bytes] | None
_REPEATABLE = (bytes, RepeatableBody)


class HttpAnswer:
    """The answer to a request, as far as received. `status` is 0 until the head is parsed; `ended`
    is set at the end of the body; `failure` is the reason why no more will come."""

    __slots__ = (
        *("_loop", "_waiter", "ended", "failure", "headers", "pieces", "size_bytes", "status"),
        "stirred",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.headers: RawHeaders = []
        self.pieces: list[bytes] = []
        self.size_bytes = 0  # of the unread pieces
        self.ended = False
        self.failure: TidegateError | None = None
        self.stirred = False  # bytes have arrived since the last check
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_awaited(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def change(self) -> asyncio.Future[None]:
        """Return a future that is done when more has arrived. For one task at a time."""
        self._waiter = waiter = self._loop.create_future()
        return waiter

    def changed(self) -> None:
        self.stirred = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def fail(self, failure: TidegateError) -> None:
        """Record a failure, unless the answer has ended; the first failure is kept."""
        if not self.ended and self.failure is None:
            self.failure = failure
            self.changed()


class Connection(asyncio.Protocol):
    """An HTTP connection; `when_lost` is called when it is closed."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, when_lost: Callable[[Connection], None]
    ) -> None:
        self.idle_since = 0.0  # set while it is kept idle
        self.lost = False
        self._loop = loop
        self._when_lost = when_lost
        self._transport: asyncio.Transport
        self._answer: HttpAnswer | None = None
        self._parser = HttpResponseParser(self)
        self._begin_head()
        self._may_stay = False
        self._until_close = False
        self._is_long = False
        self._reads = True
        self._hinted: HttpAnswer | None = None  # preceded by a 1xx, such as early hints
        self._sending: asyncio.Task[None] | None = None
        self._room: asyncio.Future[None] | None = None  # set while the write buffer is full
        self._taken = False  # the upstream has read more since the last check

    # -- one exchange

    def send(self, head: bytes, body: RequestBody) -> HttpAnswer:
        """Send a request. `head` ends before its empty line, and has no length if the body is in
        pieces."""
        answer = self._answer = HttpAnswer(self._loop)
        self._may_stay = self._until_close = False
        self._is_long = body is not None and not (
            isinstance(body, bytes) and len(body) <= _COPIED_BYTES
        )
        if body is None:
            self._transport.write(head + b"\r\n")
        elif not isinstance(body, bytes):
            if isinstance(body, RepeatableBody):
                self._transport.write(b"%bcontent-length: %d\r\n\r\n" % (head, body.size_bytes))
                sending = self._send_sized(body.pieces())
            elif isinstance(body, SizedBody):
                self._transport.write(b"%bcontent-length: %d\r\n\r\n" % (head, body.size_bytes))
                sending = self._send_sized(body.pieces)
            else:
                self._transport.write(head + b"transfer-encoding: chunked\r\n\r\n")
                sending = self._send_pieces(body)
            self._sending = self._loop.create_task(sending)
            self._sending.add_done_callback(partial(_sent, answer))
        elif len(body) <= _COPIED_BYTES:
            self._transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        else:
            self._transport.write(b"%bcontent-length: %d\r\n\r\n" % (head, len(body)))
            self._transport.write(body)
        return answer

    async def _send_pieces(self, body: AsyncIterator[bytes]) -> None:
        async for piece in body:
            if piece:
                self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            if self._room is not None:
                await self._room
        self._transport.write(b"0\r\n\r\n")

    async def _send_sized(self, body: AsyncIterator[bytes]) -> None:
        async for piece in body:
            self._transport.write(piece)
            if self._room is not None:
                await self._room

    def goes_out(self) -> bool:
        """Return whether a body in pieces is still being sent and progresses: the upstream has read
        some of it since the last check, or the write buffer has room."""
        taken, self._taken = self._taken, False
        sending = self._sending
        return sending is not None and not sending.done() and (taken or self._room is None)

    def read_on(self) -> None:
        """Resume reading: there is room for more of the answer."""
        if not self._reads:
            self._reads = True
            if not self.lost:
                self._transport.resume_reading()

    def done(self) -> bool:
        """Finish an exchange whose answer is read. Return True if the connection can take another
        request; otherwise it is closed."""
        sending = self._sending
        if (
            self.lost
            or not self._may_stay
            or (sending is not None and not sending.done())
            or (self._is_long and self._unsent_bytes())
        ):
            self.drop()
            return False
        self._answer = self._sending = None
        return not self._transport.is_closing()

    def _unsent_bytes(self) -> int:
        """Return the request's bytes that the upstream has not received: an answer may come
        earlier, and the next request would wait behind them. Under TLS only the kernel knows."""
        own_bytes = self._transport.get_write_buffer_size()
        sock = self._transport.get_extra_info("socket")
        if own_bytes or sys.platform != "linux" or sock is None or sock.fileno() < 0:
            return own_bytes
        return int.from_bytes(ioctl(sock.fileno(), TIOCOUTQ, b"\0\0\0\0"), sys.byteorder)

    def drop(self) -> None:
        """Close the connection in the event loop's next iteration."""
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        if not self.lost:
            self._transport.abort()

    @property
    def is_open(self) -> bool:
        return not self.lost and not self._transport.is_closing()

    # -- what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None or answer.ended or answer.failure is not None:
            self._transport.abort()
            return
        try:
            if not self._in_head:
                self._surplus_bytes += len(data)
                self._parser.feed_data(data)
            elif self._head_bytes + len(data) < MAX_HEAD_BYTES:
                self._head_bytes += len(data)
                self._parser.feed_data(data)
            else:
                self._read_head(data)
            if self._surplus_bytes > MAX_HEAD_BYTES + 8 * self._body_bytes:
                raise _Unusable("the provider's chunks and trailers are too large")
        except (HttpParserError, _Unusable) as error:
            why = error.__context__ if isinstance(error, HttpParserCallbackError) else error
            text = str(why) if isinstance(why, _Unusable) else "the provider's answer is not HTTP"
            answer.fail(UpstreamGarbled(text))
            self._transport.abort()

    def _read_head(self, data: bytes) -> None:
        """Parse the head in pieces, so that the parser never gets more than the bound."""
        while data:
            room = MAX_HEAD_BYTES - self._head_bytes if self._in_head else len(data)
            piece, data = (data, b"") if len(data) <= room else (data[:room], data[room:])
            self._head_bytes += len(piece)
            self._parser.feed_data(piece)
            if self._in_head and self._head_bytes >= MAX_HEAD_BYTES:
                raise _Unusable(f"the head of the provider's answer is over {MAX_HEAD_BYTES} bytes")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        answer, self._answer = self._answer, None
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        if answer is not None and not answer.ended:
            if exc is None and self._until_close and answer.failure is None:
                answer.ended = True
                answer.changed()
            elif answer.status:
                answer.fail(UpstreamUnavailable("the provider closed the connection in mid-answer"))
            else:
                began = self._head_bytes or self._hinted is answer
                message = "the provider closed the connection before its answer"
                answer.fail(UpstreamUnavailable(message, broke=None if began else "unheard"))
        self._when_lost(self)

    def pause_writing(self) -> None:
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        room, self._room = self._room, None
        self._taken = True
        if room is not None and not room.done():
            room.set_result(None)

    # -- what the parser calls; `feed_data` raises an error that is raised here

    def _begin_head(self) -> None:
        self._in_head = True
        self._interim = False
        self._head_bytes = self._surplus_bytes = self._body_bytes = 0
        self._headers: RawHeaders = []
        self._length: bytes | None = None
        self._coding: bytes | None = None

    def on_message_begin(self) -> None:
        if self._answer is None or self._answer.ended:
            raise _Unusable("data follows the provider's answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: none was requested
        headers = self._headers
        if len(headers) >= MAX_HEADERS:
            raise _Unusable(f"the provider's answer has more than {MAX_HEADERS} headers")
        value = value.rstrip(b" ")  # the parser keeps trailing whitespace: RFC 9110, section 5.5
        headers.append((name, value))
        size = len(name)
        if size == 14 and name.lower() == _LENGTH:
            self._length = value
        elif size == 17 and name.lower() == _CODING:
            self._coding = value if self._coding is None else b"several"

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if not 200 <= status < 600:
            if status < 100 or status == 101 or status >= 600:
                # 101: no other protocol is supported here.
                raise _Unusable(f"the provider answered {status}, which is no answer")
            if self._coding or self._length not in (None, b"0"):
                # RFC 9112, section 6.3: no body, but the parser would read the next bytes as one.
                raise _Unusable(f"the provider answered {status} with a body")
            self._interim = True
            self._hinted = self._answer
            return
        if self._coding is not None and self._coding.lower() != b"chunked":
            raise _Unusable("the provider's answer is in an unknown transfer coding")
        if status in _NO_BODY and (self._coding or self._length not in (None, b"0")):
            raise _Unusable(f"the provider answered {status} with a body")
        framed = self._length is not None or self._coding is not None or status in _NO_BODY
        self._until_close = not framed
        self._may_stay = framed and self._parser.should_keep_alive()
        self._in_head = False
        answer = self._answer
        assert answer is not None
        answer.headers = self._headers
        answer.status = status
        answer.changed()

    def on_body(self, body: bytes) -> None:
        answer = self._answer
        assert answer is not None
        size = len(body)
        self._surplus_bytes -= size
        self._body_bytes += size
        answer.pieces.append(body)
        answer.size_bytes += size
        if answer.size_bytes > READ_AHEAD_BYTES and self._reads:
            self._reads = False
            self._transport.pause_reading()
        answer.changed()

    def on_message_complete(self) -> None:
        interim = self._interim
        self._begin_head()
        answer = self._answer
        if not interim and answer is not None:
            answer.ended = True
            answer.changed()


def _sent(answer: HttpAnswer, sending: asyncio.Task[None]) -> None:
    """Record the failure of a body's source, once the task that sends the body has ended."""
    broken = None if sending.cancelled() else sending.exception()
    if isinstance(broken, TidegateError):
        answer.fail(broken)
    elif broken is not None:
        name = type(broken).__name__
        answer.fail(UpstreamUnavailable(f"the request's body broke off ({name})"))


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Bounds of an upstream call. connect: until the connection is open, TLS included. first_byte:
    from sending (for a body in pieces, from the last one that the upstream read) to the first byte
    of the answer's body. idle: between two pieces of it. total: the whole call, and the only bound
    that includes time spent on a slow sink."""

    connect_ms: int
    first_byte_ms: int
    idle_ms: int
    total_ms: int


def out_of_time(phase: str, limit_ms: int) -> UpstreamTimeout:
    return UpstreamTimeout(f"the provider took longer than {limit_ms} ms ({phase})", phase=phase)


_KEEPALIVE_S = 15.0  # shorter than most servers' timeout, so that this side closes first
# A server that closed an idle connection while a request was sent reports that within a round trip.
# An error that comes later means that the server had the request, and may have processed it.
_CROSSED_S = 1.0
_NAMES_S = 30.0
_SWEEP_S = 0.25
_NEXT_ADDRESS_S = 0.25
_URLS_KEPT = 2_000
_UNAUTHORIZED = 401
_PROXY_BYTES = 16 * 1024
_PROXY_ANSWER = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")
_NOT_IN_LINE = re.compile(rb"[\x00-\x20\x7f-\xff]")


@dataclass(frozen=True, slots=True, eq=False)
class UpstreamOrigin:
    """The server and network of connections; `origin_at` returns one object for equal values.
    network: how connections are made, None for the usual way."""

    host: str
    port: int
    secure: bool
    network: Network | None = None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


# Compared by identity, which is fast: each call looks up its idle connections by origin.
origin_at = lru_cache(_URLS_KEPT)(UpstreamOrigin)


@dataclass(frozen=True, slots=True)
class RequestPlace:
    """A parsed URL. `line` is the request line without its method, and the host header. access:
    that of the upstream; None for a request that is sent as it is."""

    origin: UpstreamOrigin
    line: bytes
    access: Access | None = None


class Signer(Protocol):
    """Renewed credentials of an upstream."""

    def sign(
        self, method: str, place: RequestPlace, headers: RawHeaders, body: object
    ) -> RawHeaders:
        """Return `headers` with the credentials added. Raises UpstreamUnauthorized if none are
        valid."""

    def refused(self) -> None:
        """Report that the upstream rejected the credentials, so that they are renewed early."""


class BareConnection(NamedTuple):
    """A connection on which nothing was sent yet. headers: those of its first request. tls: the
    context to use, None for no TLS."""

    sock: socket.socket
    tls: ssl.SSLContext | None
    headers: RawHeaders


class Exchange:
    """A request and its answer. `status` and `headers` are set once the exchange is opened.
    first_byte_ms: from `sent_s` (by `perf_counter`) to the first bytes of the body; None before
    them."""

    __slots__ = (
        *("_answer", "_began", "_connection", "_origin", "_sent_at", "_timeouts", "_whole"),
        *("_wait_until", "_wire", "first_byte_ms", "headers", "sent_s", "status"),
    )

    def __init__(
        self,
        wire: RelayWire,
        origin: UpstreamOrigin,
        connection: Connection,
        answer: HttpAnswer,
        timeouts: Timeouts,
    ) -> None:
        now = wire.time()
        self.status = 0
        self.headers: RawHeaders = []  # as received, names in any case
        self.first_byte_ms: float | None = None
        self.sent_s = perf_counter()  # the event loop's clock is too coarse
        self._wire = wire
        self._origin = origin
        self._connection = connection
        self._answer = answer
        self._began = False  # the first bytes of its body have been read
        self._whole: bool | None = None  # set by `close`
        self._timeouts = timeouts
        self._sent_at = now
        self._wait_until = now + timeouts.first_byte_ms / 1000

    async def begun(self) -> None:
        """Wait for the head of the answer. Raises UpstreamError."""
        answer = self._answer
        while True:
            if answer.failure is not None and not answer.pieces and answer.status < 400:
                raise answer.failure
            if answer.status:
                break
            await answer.change()
        self.status, self.headers = answer.status, answer.headers
        answer.stirred = True

    async def next(self) -> bytes:
        """Wait for the next bytes of the body and return them; empty at its end.

        Raises UpstreamError. Cancelling leaves the exchange open: `close` it.
        """
        answer = self._answer
        while not answer.pieces:
            if answer.ended:
                return b""
            if answer.failure is not None:
                raise answer.failure
            await answer.change()
        pieces = answer.pieces
        whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if answer.size_bytes > READ_AHEAD_BYTES:
            self._connection.read_on()
        answer.size_bytes = 0
        if not self._began:
            self._began = True
            self.first_byte_ms = (perf_counter() - self.sent_s) * 1000
        return whole

    @property
    def has_response(self) -> bool:
        """Return whether the head has arrived, read or not, or the exchange has failed."""
        return self._answer.status != 0 or self._answer.failure is not None

    @property
    def at_end(self) -> bool:
        """Return whether all of the body has been read."""
        return self._answer.ended and not self._answer.pieces

    async def read(self, max_bytes: int) -> bytes:
        """Return the whole body, or its first `max_bytes`."""
        whole = bytearray()
        while len(whole) < max_bytes and (piece := await self.next()):
            whole += piece
        return bytes(whole[:max_bytes])

    async def read_refusal(self, max_bytes: int) -> bytes:
        """Return the body of a refusal as far as it arrives: a body that breaks off is still a
        refusal. Raises the errors of the request's own body."""
        found = bytearray()
        with suppress(UpstreamError):
            while len(found) < max_bytes and (piece := await self.next()):
                found += piece
        return bytes(found[:max_bytes])

    def has_crossed(self, failed: BaseException) -> bool:
        """Return whether, as far as known here, the upstream had closed the connection before it
        read any part of the request."""
        if not isinstance(failed, UpstreamUnavailable) or failed.broke != "unheard":
            return False
        return self._whole is None and self._wire.time() - self._sent_at <= _CROSSED_S

    def close(self) -> bool:
        """Close the exchange; return whether the answer has ended. If so, the connection is kept;
        otherwise it closes in the event loop's next iteration. Idempotent."""
        if self._whole is None:
            self._wire.exchanges.discard(self)
            self._whole = self.at_end
            if not self._whole:
                self._connection.drop()
            elif self._connection.done():
                self._wire.keep(self._origin, self._connection)
        return self._whole

    def overdue(self, now: float) -> str | None:
        """Return the phase whose timeout has passed, or None. Called periodically."""
        answer = self._answer
        if (now - self._sent_at) * 1000 > self._timeouts.total_ms:
            return "total"
        if not (self._began or answer.pieces or answer.ended):
            if self._connection.goes_out():
                self._wait_until = now + self._timeouts.first_byte_ms / 1000
            return "first_byte" if now > self._wait_until else None
        if answer.stirred or not answer.is_awaited:
            answer.stirred = False
            self._wait_until = now + self._timeouts.idle_ms / 1000
        return "idle" if now > self._wait_until else None

    def cut(self, phase: str) -> None:
        self._answer.fail(out_of_time(phase, getattr(self._timeouts, f"{phase}_ms")))
        self._connection.drop()


class RelayWire:
    """The HTTP client of a process. Call `start` before the first request, `aclose` at the end."""

    def __init__(self, timeouts: Timeouts, tls: ssl.SSLContext | None = None) -> None:
        """tls: by default a context with the system's certificates."""
        self.exchanges: set[Exchange] = set()
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self.time = self._loop.time
        self._timeouts = timeouts
        self._idle: dict[UpstreamOrigin, list[Connection]] = {}
        self.connections: set[Connection] = set()
        self._names: dict[tuple[str, int], tuple[float, list[Any]]] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._used = asyncio.Event()  # set once there is work for the sweeper
        self._tls_of: dict[Network, ssl.SSLContext] = {}
        self.signers: Mapping[Authentication, Signer] = {}

    async def start(self) -> None:
        self._sweeper = asyncio.create_task(self._sweep())

    async def aclose(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for exchange in list(self.exchanges):
            exchange.close()
        self._idle.clear()
        for connection in list(self.connections):
            connection.drop()
        await asyncio.sleep(0)

    @staticmethod
    @lru_cache(_URLS_KEPT)
    def place(text: str, access: Access | None = None) -> RequestPlace:
        """Parse a whole, quoted URL; cached, since parsing is slow. Raises UpstreamRejected.
        access: that of the upstream whose headers and credentials the request carries."""
        try:
            url = URL(text, encoded=True)
            host, port = url.raw_host, url.port
        except ValueError:
            host = port = None
        if host is None or port is None or url.scheme not in ("http", "https"):
            raise UpstreamRejected("the request could not be sent: its URL is not valid")
        target, named = url.raw_path_qs.encode(), (url.host_port_subcomponent or "").encode()
        if _NOT_IN_LINE.search(target) or _NOT_IN_LINE.search(named):
            raise UpstreamRejected("the request could not be sent: its URL is not in ASCII")
        network = None if access is None else access.network
        secure = url.scheme == "https"
        if network is not None and network.proxy is not None and not secure:
            target = b"http://%b%b" % (named, target)
        line = b"%b HTTP/1.1\r\nhost: %b\r\n" % (target, named)
        if network is not None and network.proxy is not None and not secure:
            line += _proxy_line(network.proxy)
        return RequestPlace(origin_at(host, port, secure, network), line, access)

    async def open(
        self,
        method: str,
        place: RequestPlace,
        headers: Iterable[tuple[bytes, bytes]],
        body: RequestBody,
        on_sent: Callable[[], None] | None = None,
        timeouts: Timeouts | None = None,
        *,
        once: bool = False,
        opened: Callable[[Exchange], None] | None = None,
    ) -> Exchange:
        """Send a request and wait for the head of its answer. Raises UpstreamError.

        `timeouts` replace those of this client, except connect, which `place.access` may set.
        `on_sent` is called once there is a connection, before the first byte; `opened` for each
        exchange that starts to wait. `once` uses a new connection, so that the request is never
        repeated.

        A body in pieces is sent as it arrives; a TidegateError of its source is raised here. If the
        upstream closed a kept connection while the request was sent, the request is sent once more,
        on a new one. A body that cannot be repeated always uses a new one. Cancelling closes the
        connection.
        """
        access = place.access
        signer = None
        if access is not None and access.authentication is not None:
            signer = self._signer_of(access.authentication)
        head = _head(method, place, headers, body, signer)
        if body is None and method != "GET":
            body = b""
        origin = place.origin
        again = not once and (body is None or isinstance(body, _REPEATABLE))
        idle = self._idle_one(origin) if again else None
        connection = idle or await self._connect(place)
        if on_sent is not None:
            on_sent()
        while True:
            answer = connection.send(head, body)
            exchange = Exchange(self, origin, connection, answer, timeouts or self._timeouts)
            self.exchanges.add(exchange)
            self._used.set()
            if opened is not None:
                opened(exchange)
            try:
                await exchange.begun()
                if signer is not None and exchange.status == _UNAUTHORIZED:
                    signer.refused()
                return exchange
            except BaseException as failed:  # cancellation too: the exchange must not stay open
                crossed = connection is idle and exchange.has_crossed(failed)
                exchange.close()
                # The connection closes in the next iteration; its permit is to be returned after
                # that.
                await asyncio.sleep(0)
                if not crossed:
                    raise
            connection = await self._connect(place)

    def _signer_of(self, authentication: Authentication) -> Signer:
        signer = self.signers.get(authentication)
        if signer is None:
            message = f"this process has no credentials for auth = {authentication.kind}"
            raise UpstreamUnauthorized(message)
        return signer

    # -- connections

    def keep(self, origin: UpstreamOrigin, connection: Connection) -> None:
        """Keep a connection for the next request."""
        connection.idle_since = self.time()
        self._idle.setdefault(origin, []).append(connection)

    def _idle_one(self, origin: UpstreamOrigin) -> Connection | None:
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self, place: RequestPlace) -> Connection:
        origin = place.origin
        async with self._connecting(place):
            connected = await self._socket(origin, tunnels=origin.secure)
            _, connection = await self._loop.create_connection(
                lambda: Connection(self._loop, self.connections.discard),
                sock=connected,
                ssl=self._tls_for(origin.network) if origin.secure else None,
                server_hostname=origin.host if origin.secure else None,
            )
        self.connections.add(connection)
        return connection

    async def bare(self, place: RequestPlace, headers: RawHeaders) -> BareConnection:
        """Open a connection for another protocol, with the upstream's network, proxy and
        credentials. Raises UpstreamError."""
        access, origin = place.access, place.origin
        if access is not None:
            headers = access.dressed(headers)
            if access.authentication is not None:
                signer = self._signer_of(access.authentication)
                headers = signer.sign("GET", place, headers, None)
        async with self._connecting(place):
            connected = await self._socket(origin, tunnels=True)
        return BareConnection(
            connected, self._tls_for(origin.network) if origin.secure else None, headers
        )

    @asynccontextmanager
    async def _connecting(self, place: RequestPlace) -> AsyncIterator[None]:
        """Apply the connect timeout, and translate the errors of connecting."""
        own = None if place.access is None else place.access.connect_ms
        limit_ms = self._timeouts.connect_ms if own is None else own
        try:
            async with asyncio.timeout(limit_ms / 1000):
                yield
        except (OSError, UnicodeError) as failed:
            self._names.pop(_server_of(place.origin), None)  # its address may have changed
            if isinstance(failed, TimeoutError):
                raise out_of_time("connect", limit_ms) from None
            message = "could not connect to the provider"
            if isinstance(failed, ssl.SSLError):
                why = failed.reason or type(failed).__name__
                message = f"no secure connection to the provider ({why})"
            elif isinstance(failed, socket.gaierror | UnicodeError):
                message = "the provider's host name cannot be resolved"
            raise UpstreamUnavailable(message, broke="connecting") from None

    async def _socket(self, origin: UpstreamOrigin, *, tunnels: bool) -> socket.socket:
        proxy = None if origin.network is None else origin.network.proxy
        connected = await aiohappyeyeballs.start_connection(
            await self._addresses(origin),
            happy_eyeballs_delay=_NEXT_ADDRESS_S,
            interleave=1,
            loop=self._loop,
        )
        if proxy is not None and tunnels:
            await self._tunnel(connected, origin, proxy)
        return connected

    async def _tunnel(self, connected: socket.socket, origin: UpstreamOrigin, proxy: Proxy) -> None:
        """Request a tunnel from the proxy. Raises UpstreamUnavailable or OSError, with the socket
        closed."""
        try:
            host = f"[{origin.host}]" if ":" in origin.host else origin.host
            named = f"{host}:{origin.port}".encode("ascii")
            request = b"CONNECT %b HTTP/1.1\r\nhost: %b\r\n" % (named, named)
            await self._loop.sock_sendall(connected, request + _proxy_line(proxy) + b"\r\n")
            answer = b""
            while b"\r\n\r\n" not in answer:
                piece = await self._loop.sock_recv(connected, _PROXY_BYTES)
                answer += piece
                if not piece or len(answer) > _PROXY_BYTES:
                    raise _no_tunnel(proxy, "it closed the connection or answered too much")
            found = _PROXY_ANSWER.match(answer)
            is_good = found is not None and found[1].startswith(b"2")
            if found is None or (is_good and not answer.endswith(b"\r\n\r\n")):
                raise _no_tunnel(proxy, "its answer is not HTTP")
            if not is_good:
                raise _no_tunnel(proxy, f"it answered {found[1].decode()}")
        except BaseException:  # also for cancellation
            connected.close()
            raise

    def _tls_for(self, network: Network | None) -> ssl.SSLContext:
        if network is None or not (network.ca_file or network.certificate):
            return self._tls or self.tls_context()
        context = self._tls_of.get(network)
        if context is None:
            context = self._tls_of[network] = network.tls_context()
        return context

    async def _addresses(self, origin: UpstreamOrigin) -> list[Any]:
        now, name = self.time(), _server_of(origin)
        until, found = self._names.get(name, (0.0, []))
        if now > until:
            found = await self._loop.getaddrinfo(
                *name, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
            )
            self._names[name] = (now + _NAMES_S, found)
        return found

    @staticmethod
    @cache
    def tls_context() -> ssl.SSLContext:
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        return context

    async def _sweep(self) -> None:
        """Check all timeouts by one timer: a timer for each read would cost more than the read."""
        while True:
            if not self.exchanges and not any(self._idle.values()):
                self._used.clear()
                await self._used.wait()
            await asyncio.sleep(_SWEEP_S)
            now = self.time()
            for exchange in list(self.exchanges):
                if (phase := exchange.overdue(now)) is not None:
                    exchange.cut(phase)
            for origin, idle in self._idle.items():
                self._idle[origin] = [one for one in idle if not _retired(one, now)]


def _server_of(origin: UpstreamOrigin) -> tuple[str, int]:
    proxy = None if origin.network is None else origin.network.proxy
    return (origin.host, origin.port) if proxy is None else (proxy.host, proxy.port)


def _head(
    method: str,
    place: RequestPlace,
    headers: Iterable[tuple[bytes, bytes]],
    body: object,
    signer: Signer | None,
) -> bytes:
    """Return the head of a request, without the empty line at its end."""
    if (access := place.access) is not None:
        headers = access.dressed(headers) if access.replaced else [*headers, *access.headers]
        if signer is not None:
            headers = signer.sign(method, place, headers, body)
    lines = [b"%b: %b\r\n" % pair for pair in headers]
    head = b"".join(lines)
    if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or 0 in head:
        raise UpstreamRejected("the request could not be sent: a header contains a line break")
    return b"%b %b%b" % (method.encode("ascii"), place.line, head)


def _proxy_line(proxy: Proxy) -> bytes:
    return b"proxy-authorization: %b\r\n" % proxy.authorization if proxy.authorization else b""


def _no_tunnel(proxy: Proxy, reason: str) -> UpstreamUnavailable:
    message = f"the proxy {proxy} makes no connection to the provider: {reason}"
    return UpstreamUnavailable(message, broke="connecting")


def _retired(connection: Connection, now: float) -> bool:
    if connection.is_open and now - connection.idle_since <= _KEEPALIVE_S:
        return False
    connection.drop()
    return True
