"""The way to an upstream for native calls: bytes out, bytes back, nothing understood.

Owns the connections. Invariants: one attempt, no redirect, no decompression, no proxy; an exchange
that was left is closed before its permit goes back; whoever is silent for longer than allowed is
cut off. Connections are tried by RFC 8305 ("happy eyeballs").
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any

import aiohappyeyeballs
from yarl import URL

from tidegate.errors import UpstreamRejected, UpstreamUnavailable
from tidegate.providers.gemini.timeouts import Timeouts
from tidegate.providers.http1 import READ_AHEAD_BYTES, Answer, Connection, RawHeaders

_KEEPALIVE_S = 15.0  # most servers keep an idle connection for longer: whoever closes first is us
# A server that closed an idle connection as we sent says so within a round trip. One that takes
# longer had the request, and may have worked on it.
_CROSSED_S = 1.0
_NAMES_S = 30.0
_SWEEP_S = 0.25
_NEXT_ADDRESS_S = 0.25
_URLS_KEPT = 2_000
_NOT_IN_LINE = re.compile(rb"[\x00-\x20\x7f-\xff]")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections go."""

    host: str
    port: int
    secure: bool

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Place:
    """A URL, taken apart: `line` is the request's first line without its method, and the host."""

    origin: Origin
    line: bytes


class Exchange:
    """One call and its answer. `status` and `headers` are there once it is opened; first_byte_ms:
    from its sending to the first bytes of its body, None until there are some."""

    __slots__ = (
        *("_answer", "_began", "_connection", "_origin", "_sent", "_sent_at", "_timeouts"),
        *("_wait_until", "_whole", "_wire", "first_byte_ms", "headers", "status", "timed_out"),
    )

    def __init__(
        self,
        wire: RelayWire,
        origin: Origin,
        connection: Connection,
        answer: Answer,
        timeouts: Timeouts,
    ) -> None:
        now = wire.time()
        self.status = 0
        self.headers: RawHeaders = []  # as they came, names in any case
        self.timed_out: str | None = None
        self.first_byte_ms: float | None = None
        self._sent = perf_counter()  # the loop's clock is too coarse for it
        self._wire = wire
        self._origin = origin
        self._connection = connection
        self._answer = answer
        self._began = False  # the first bytes of its body have been read
        self._whole: bool | None = None  # once closed
        self._timeouts = timeouts
        self._sent_at = now
        self._wait_until = now + timeouts.first_byte_ms / 1000

    async def begun(self) -> None:
        """Wait for the head of the answer. Raises UpstreamError."""
        answer = self._answer
        while True:
            if answer.failure is not None and not answer.pieces:
                raise answer.failure
            if answer.status:
                break
            await answer.change()
        self.status, self.headers = answer.status, answer.headers
        answer.stirred = True

    async def next(self) -> bytes:
        """The next bytes of the body as soon as there are some; empty at its end.

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
            self.first_byte_ms = (perf_counter() - self._sent) * 1000
        return whole

    @property
    def has_ended(self) -> bool:
        """Whether all of the body has come: the next piece is the last."""
        return self._answer.ended

    @property
    def at_end(self) -> bool:
        """Whether all of the body has been read."""
        return self._answer.ended and not self._answer.pieces

    async def read(self, max_bytes: int) -> bytes:
        """The whole body, or its first `max_bytes`."""
        whole = bytearray()
        while len(whole) < max_bytes and (piece := await self.next()):
            whole += piece
        return bytes(whole[:max_bytes])

    def has_crossed(self, failed: BaseException) -> bool:
        """Whether the request met the end of a connection that the upstream had closed before it
        saw any of it, as far as can be told from here."""
        if not isinstance(failed, UpstreamUnavailable) or failed.broke != "unheard":
            return False
        return self._whole is None and self._wire.time() - self._sent_at <= _CROSSED_S

    def close(self) -> bool:
        """End it: the connection is kept, and True returned, only when the answer has come to its
        end. Else it is closed in the event loop's next round. Idempotent."""
        if self._whole is None:
            self._wire.exchanges.discard(self)
            self._whole = self.at_end
            if not self._whole:
                self._connection.drop()
            elif self._connection.done():
                self._wire.keep(self._origin, self._connection)
        return self._whole

    def overdue(self, now: float) -> str | None:
        """The phase that has taken too long; asked again and again."""
        answer = self._answer
        if (now - self._sent_at) * 1000 > self._timeouts.total_ms:
            return "total"
        if not (self._began or answer.pieces or answer.ended):
            return "first_byte" if now > self._wait_until else None
        if answer.stirred or not answer.is_awaited:
            answer.stirred = False
            self._wait_until = now + self._timeouts.idle_ms / 1000
        return "idle" if now > self._wait_until else None

    def cut(self, phase: str) -> None:
        self.timed_out = phase
        self._answer.fail(self._timeouts.ran_out(phase))
        self._connection.drop()


class RelayWire:
    """One per process. `start` before the first call, `aclose` at the end."""

    def __init__(self, timeouts: Timeouts) -> None:
        self.exchanges: set[Exchange] = set()
        self._loop = asyncio.get_running_loop()
        self.time = self._loop.time
        self._timeouts = timeouts
        self._places: dict[str, Place] = {}
        self._idle: dict[Origin, list[Connection]] = {}
        self.connections: set[Connection] = set()
        self._names: dict[Origin, tuple[float, list[Any]]] = {}
        self._sweeper: asyncio.Task[None] | None = None

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

    def place(self, text: str) -> Place:
        """Of a URL that is whole and quoted already; kept, since taking one apart is dear. Raises
        UpstreamRejected."""
        known = self._places.get(text)
        if known is None:
            known = _place(text)
            if len(self._places) < _URLS_KEPT:
                self._places[text] = known
        return known

    async def open(
        self,
        method: str,
        place: Place,
        headers: Iterable[tuple[bytes, bytes]],
        body: bytes | AsyncIterator[bytes] | None,
        on_sent: Callable[[], None] | None = None,
        timeouts: Timeouts | None = None,
    ) -> Exchange:
        """Send a request and wait for the head of its answer. Raises UpstreamError.

        `timeouts`: other ones than those of all calls, but for connecting. `on_sent` is called when
        there is a connection, before the first byte goes out.

        A body that comes in pieces is sent as it comes; what it raises of ours is raised here.
        Where a kept connection was closed as we sent, the request is sent again, once, on a new
        one; a body in pieces could not be, and goes on a new one at once. Cancelling closes the
        connection.
        """
        lines = [b"%b: %b\r\n" % pair for pair in headers]
        said = b"".join(lines)
        if said.count(b"\n") != len(lines) or said.count(b"\r") != len(lines) or b"\0" in said:
            raise UpstreamRejected("the request could not be sent: a header holds a line's end")
        head = b"%b %b%b" % (method.encode("ascii"), place.line, said)
        if body is None and method != "GET":
            body = b""
        origin = place.origin
        again = body is None or isinstance(body, bytes)
        kept = self._idle_one(origin) if again else None
        connection = kept or await self._connect(origin)
        if on_sent is not None:
            on_sent()
        while True:
            answer = connection.send(head, body)
            exchange = Exchange(self, origin, connection, answer, timeouts or self._timeouts)
            self.exchanges.add(exchange)
            try:
                await exchange.begun()
                return exchange
            except BaseException as failed:
                crossed = connection is kept and exchange.has_crossed(failed)
                exchange.close()
                # A connection is really closed in the loop's next round: its permit goes after
                # that.
                await asyncio.sleep(0)
                if not crossed:
                    raise
            connection = await self._connect(origin)

    # -- connections

    def keep(self, origin: Origin, connection: Connection) -> None:
        """It may take another request."""
        connection.idle_since = self.time()
        self._idle.setdefault(origin, []).append(connection)

    def _idle_one(self, origin: Origin) -> Connection | None:
        kept = self._idle.get(origin)
        while kept:
            connection = kept.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self, origin: Origin) -> Connection:
        try:
            async with asyncio.timeout(self._timeouts.connect_ms / 1000):
                connected = await aiohappyeyeballs.start_connection(
                    await self._addresses(origin),
                    happy_eyeballs_delay=_NEXT_ADDRESS_S,
                    interleave=1,
                    loop=self._loop,
                )
                _, connection = await self._loop.create_connection(
                    lambda: Connection(self._loop, self.connections.discard),
                    sock=connected,
                    ssl=self.tls_context() if origin.secure else None,
                    server_hostname=origin.host if origin.secure else None,
                )
        except TimeoutError:
            raise self._timeouts.ran_out("connect") from None
        except ssl.SSLError as wrong:
            why = wrong.reason or type(wrong).__name__
            raise _unconnected(f"no secure connection to the provider ({why})") from None
        except (OSError, UnicodeError):
            raise _unconnected("could not connect to the provider") from None
        self.connections.add(connection)
        return connection

    async def _addresses(self, origin: Origin) -> list[Any]:
        now = self.time()
        until, found = self._names.get(origin, (0.0, []))
        if now > until:
            found = await self._loop.getaddrinfo(
                origin.host, origin.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
            )
            self._names[origin] = (now + _NAMES_S, found)
        return found

    @staticmethod
    @cache
    def tls_context() -> ssl.SSLContext:
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        return context

    async def _sweep(self) -> None:
        """One timer for all: a timeout of its own for each read would cost more than the read."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = self.time()
            for exchange in list(self.exchanges):
                if (phase := exchange.overdue(now)) is not None:
                    exchange.cut(phase)
            for origin, kept in self._idle.items():
                self._idle[origin] = [one for one in kept if not _retired(one, now)]


def _retired(connection: Connection, now: float) -> bool:
    if connection.is_open and now - connection.idle_since <= _KEEPALIVE_S:
        return False
    connection.drop()
    return True


def _unconnected(message: str) -> UpstreamUnavailable:
    return UpstreamUnavailable(message, broke="connecting")


def _place(text: str) -> Place:
    try:
        url = URL(text, encoded=True)
        host, port = url.raw_host, url.port
    except ValueError:
        host = port = None
    line = b"%b HTTP/1.1\r\nhost: %b\r\n"
    if host is None or port is None or url.scheme not in ("http", "https"):
        raise UpstreamRejected("the request could not be sent: its URL is none")
    target, named = url.raw_path_qs.encode(), url.host_port_subcomponent or ""
    if _NOT_IN_LINE.search(target) or _NOT_IN_LINE.search(named.encode()):
        raise UpstreamRejected("the request could not be sent: its URL is not in ASCII")
    return Place(Origin(host, port, url.scheme == "https"), line % (target, named.encode()))
