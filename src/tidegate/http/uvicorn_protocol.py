"""HTTP/1.1 protocol on uvicorn with bounds on what one connection may cost.

Bounded are size, number and duration of request heads, chunk overhead, pipelined requests and
clients that do not read. A rejected body is neither read nor reset: the response is sent and the
connection closes a little later. The relay's requests and answers bypass uvicorn's `receive` and
`send`. Guarded by `tests/integration/http_input/test_uvicorn_internals.py`.

Invariants: no connection stays open without progress beyond its timers; a head that two servers
could read differently (RFC 9112) is rejected.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import sys
from collections.abc import Callable, Iterable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson
from uvicorn.protocols.http.flow_control import FlowControl

from tidegate.dialects import DIALECTS, endpoint_in, native_path
from tidegate.dialects.spec import Dialect
from tidegate.errors import TidegateError
from tidegate.http._compat import (
    STATUS_LINE,
    ASGI3Application,
    ASGIReceiveCallable,
    ASGISendCallable,
    ASGISendEvent,
    HttpToolsProtocol,
    RequestResponseCycle,
    Scope,
)
from tidegate.http.sse import ABORT_EXTENSION, DISCONNECT_EXTENSION
from tidegate.telemetry.logging import Log, get_logger

DIRECT_EXTENSION = "tidegate.direct"
UPGRADE_EXTENSION = "tidegate.upgrade"
_NO_BODY = (204, 304)

Headers = list[tuple[bytes, bytes]]


class Direct:
    """Direct access to the connection of a request, past `receive` and `send`. Use it for a whole
    answer, or not at all."""

    __slots__ = ("_cycle", "_flow", "_left_bytes")

    def __init__(self, cycle: RequestResponseCycle, flow: FlowControl) -> None:
        self._cycle = cycle
        self._flow = flow
        self._left_bytes: int | None = None  # of the length that the head has announced

    def take_body(self) -> bytes | None:
        """Return the request's body if it is complete; None if it must be received."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected or cycle.waiting_for_100_continue:
            return None
        body = bytes(cycle.body)
        cycle.body = bytearray()
        cycle.message_event.clear()
        return body

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer; a length among the headers is replaced by the real one."""
        if self._may_be_lost and await self._is_lost():
            return
        sent = [pair for pair in headers if pair[0] != b"content-length"]
        if status in _NO_BODY:
            body = b""
        else:
            sent.append((b"content-length", b"%d" % len(body)))
        self._cycle.transport.write(self._head_of(status, sent) + body)
        self._end()

    async def head(self, status: int, headers: Headers) -> None:
        """Send the head of an answer in pieces."""
        if self._may_be_lost and await self._is_lost():
            return
        length = next((value for name, value in headers if name == b"content-length"), None)
        if length is not None:
            self._left_bytes = int(length)
        elif status in _NO_BODY:
            self._left_bytes = 0
        else:
            headers = [*headers, (b"transfer-encoding", b"chunked")]
        self._cycle.transport.write(self._head_of(status, headers))

    async def piece(self, piece: bytes, more: bool) -> None:
        """Send a piece of the body. Raises ValueError if the body does not have the announced
        length."""
        if (self._flow.write_paused or self._cycle.disconnected) and await self._is_lost():
            return
        if self._left_bytes is None:
            data = b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
            if not more:
                data += b"0\r\n\r\n"
        else:
            data = piece
            self._left_bytes -= len(piece)
            if self._left_bytes < 0 or (self._left_bytes and not more):
                raise ValueError("an answer whose length differs from its Content-Length")
        if data:
            self._cycle.transport.write(data)
        if not more:
            self._end()

    @property
    def _may_be_lost(self) -> bool:
        return self._flow.write_paused or self._cycle.disconnected

    async def _is_lost(self) -> bool:
        """Wait until the client reads again. Return True if it has disconnected."""
        if self._flow.write_paused and not self._cycle.disconnected:
            await self._flow.drain()
        return self._cycle.disconnected

    def _head_of(self, status: int, headers: Headers) -> bytes:
        cycle = self._cycle
        lines = [*map(b": ".join, cycle.default_headers), *map(b": ".join, headers), b"\r\n"]
        if not cycle.keep_alive:
            lines.insert(0, b"connection: close")
        block = b"\r\n".join(lines)
        if block.count(b"\n") != len(lines) or block.count(b"\r") != len(lines) or 0 in block:
            raise ValueError("a header contains a line break")
        cycle.response_started = True
        return STATUS_LINE[status] + block

    def _end(self) -> None:
        cycle = self._cycle
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()


class Upgrade:
    """Passes the connection of a request that offers another protocol to that protocol."""

    __slots__ = ("_cycle", "_switch")

    def __init__(
        self,
        switch: Callable[[RequestResponseCycle, asyncio.Protocol], None],
        cycle: RequestResponseCycle,
    ) -> None:
        self._switch = switch
        self._cycle = cycle

    def to(self, protocol: asyncio.Protocol) -> None:
        """Switch the connection to `protocol`, which has to send the answer. Its method `shutdown`
        is called when the process stops; it must remove itself from `connections`, which is set
        here, when the connection is lost."""
        self._switch(self._cycle, protocol)


# Status, code and text of a refusal.
Refusal = tuple[int, str, str]

# RFC 9110, section 7.2: a host and a port, without a user. An empty host is valid.
_HOST = re.compile(
    rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2}){0,255})(?::\d{0,5})?"
)
_ORIGIN = re.compile(rb"\A[A-Za-z][A-Za-z0-9+.-]*://[^/?]*")  # of an absolute-form target
_BAD = "bad_request"
_NOT_HTTP = "the request is not valid HTTP/1.1: its head, its length or a chunk breaks RFC 9112"
_END = b"\r\n"
# Values that were found valid: nearly all clients send the same few.
_HOSTS: set[bytes] = set()
_MOST_HOSTS = 200


# The option of a Connection header by which a client offers another protocol.
_OFFER = re.compile(rb"(\r\nconnection:[^\r\n]{0,200}?)upgrade\b", re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"


def without_offer(piece: bytes) -> bytes:
    """Return the next bytes of a connection with the offer of another protocol in a head
    disabled, at the same length. RFC 9110, section 7.8, allows a server to ignore the offer, and
    the parser would read no body after one. The JDK's client sends an offer with each request on
    plain HTTP."""
    end = piece.find(_HEAD_END)
    head = piece if end < 0 else piece[:end]
    return _OFFER.sub(rb"\1xpgrade", head) + piece[len(head) :]


_CONNECTION = b"\r\nconnection:"
_LONGEST_OFFER_BYTES = 256


def before_offer(piece: bytes) -> int:
    """Return how many bytes of a head may be parsed before more arrive: those before an incomplete
    Connection header, which can still become the offer of another protocol."""
    if piece.find(_HEAD_END) >= 0:
        return len(piece)
    if piece.endswith(b"\r"):
        return len(piece) - (not piece.endswith(b"\r\n\r"))  # the last one may end the head
    start = piece.rfind(b"\r\n")
    line = piece[start:].lower()
    begins = line.startswith(_CONNECTION) or _CONNECTION.startswith(line)
    return start if start >= 0 and begins and len(line) <= _LONGEST_OFFER_BYTES else len(piece)


class RequestLine:
    """The request line as received, of which the parser returns only the parts."""

    __slots__ = ("_begun", "_is_known", "_is_second", "_piece", "_used")

    def __init__(self) -> None:
        self._begun = b""  # of a line that began in an earlier piece
        self._piece = b""
        self._used = 0  # how much of the piece earlier lines have used
        self._is_second = False  # another request ended in this piece
        self._is_known = True  # the start of the line is known

    def take(self, piece: bytes) -> None:
        """Set the next bytes of the connection, before they are parsed."""
        self._piece, self._used, self._is_second = piece, 0, False

    def keep(self) -> None:
        """Keep the line after a piece was parsed, since its head continues in the next piece."""
        if self._is_known:
            self._begun = self._line()

    def begin(self) -> None:
        """Note that a request has begun in the current piece."""
        self._is_known = not self._is_second

    def end_message(self) -> None:
        """Note that a request has ended in the current piece: the next may begin anywhere in it."""
        self._is_second = True

    def is_as(self, expected: bytes) -> bool:
        """Return whether the line equals `expected`, the line composed of its parts, once the head
        is complete. For a request that began after another one in the same piece, only check that
        it occurs later in the piece."""
        piece = self._piece
        if self._is_known:
            self._used = len(expected)
            if (
                not self._begun
                and piece.startswith(expected)
                and piece.startswith(_END, self._used)
            ):
                return True
            line, self._begun = self._line(), b""
            self._used = len(line)
            return line.rstrip(b"\r\n") == expected
        self._is_known, self._begun = True, b""
        if not self._is_second:
            return True
        at = piece.find(expected, self._used)
        self._used = at + len(expected)
        return at >= 0

    def _line(self) -> bytes:
        """Return the line as far as it has arrived by the end of the current piece."""
        line, piece = self._begun, self._piece
        if line.endswith(b"\n"):
            return line
        if not line:
            piece = piece.lstrip(b"\r\n")  # as the parser does: RFC 9112, section 2.2
        return line + piece[: piece.find(b"\n") + 1 or len(piece)]


def refusal_of_head(
    version: str, headers: Iterable[tuple[bytes, bytes]], line_is_plain: bool
) -> Refusal | None:
    """Return the refusal of an invalid head; None for a valid one. Header names are in lower
    case."""
    if version not in ("1.1", "1.0"):
        if version == "0.9":
            return 400, _BAD, "the request line names no version of HTTP"
        return 505, "http_version_not_supported", f"HTTP/{version} is not supported; use HTTP/1.1"
    if not line_is_plain:
        return 400, _BAD, "the request line must be method, target and version with one space each"
    hosts = 0
    for name, value in headers:
        if name == b"host":
            hosts += 1
            if hosts > 1:
                return 400, _BAD, "there is more than one Host"
            if value not in _HOSTS and not _is_host(value):
                return 400, _BAD, "Host is not a host with an optional port"
        elif name == b"transfer-encoding":
            refusal = _refusal_of_coding(version, value.strip().lower())
            if refusal is not None:
                return refusal
    if not hosts and version == "1.1":
        return 400, _BAD, "the header Host is missing, which HTTP/1.1 requires"
    return None


def dialect_in(target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> Dialect | None:
    """Return the dialect of the path in a request line; None for a path that is not native, and for
    what is not a path."""
    path, _, query = _ORIGIN.sub(b"", target, count=1).partition(b"?")
    meant = native_path(unquote_to_bytes(path).decode("latin-1"))
    return None if meant is None else endpoint_in("POST", meant, headers, query)[1]


def as_answer(
    refusal: Refusal, headers: Iterable[tuple[bytes, bytes]], dialect: Dialect | None = None
) -> bytes:
    """Return the answer of a refusal without its status line, in a provider's dialect or as problem
    JSON; `headers` are the server's own."""
    status, code, detail = refusal
    if dialect is not None:
        error = TidegateError(detail)
        error.code = code
        body, kind = orjson.dumps(DIALECTS[dialect].problem(error, status, None)), b"json"
    else:
        kind = b"problem+json"
        body = orjson.dumps(
            {
                "type": f"urn:tidegate:problem:{code}",
                "title": HTTPStatus(status).phrase,
                "status": status,
                "detail": detail,
                "code": code,
            }
        )
    fields = [
        *headers,
        (b"content-type", b"application/" + kind),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    return b"".join(name + b": " + value + b"\r\n" for name, value in fields) + b"\r\n" + body


def _is_host(value: bytes) -> bool:
    if _HOST.fullmatch(value) is None:
        return False
    if len(_HOSTS) < _MOST_HOSTS:
        _HOSTS.add(value)
    return True


def _refusal_of_coding(version: str, coding: bytes) -> Refusal | None:
    """Check Transfer-Encoding by RFC 9112, sections 6.1 and 6.3. Several headers are several calls:
    the parser rejects codings after `chunked`, and this function all codings before it."""
    if version == "1.0":
        return 400, _BAD, "HTTP/1.0 has no Transfer-Encoding"
    if coding == b"chunked":
        return None
    if coding.rpartition(b",")[2].strip() != b"chunked":
        return 400, _BAD, "chunked must be the last coding of Transfer-Encoding"
    return 501, "not_implemented", "chunked is the only supported Transfer-Encoding"


if sys.platform == "linux":
    from fcntl import ioctl
    from termios import TIOCOUTQ

# After the route's own timer, whose error for a slow client is the one to be recorded.
_AFTER_THE_ROUTE_S = 5.0


def bounded(*, receive_timeout_ms: int, stalled_reader_ms: int) -> type[BoundedProtocol]:
    """Return the protocol with timers from the settings of the same names."""
    timers = {
        "HEAD_TIMEOUT_S": receive_timeout_ms / 1000,
        "STALLED_READER_S": stalled_reader_ms / 1000 + _AFTER_THE_ROUTE_S,
    }
    return type("BoundedProtocol", (BoundedProtocol,), timers)


class BoundedProtocol(HttpToolsProtocol):
    """The protocol; pass it to uvicorn as `http=`. See `bounded` for timers from the settings.

    Its idle timer and the end of its tasks replace uvicorn's, whose cost each request pays: one
    timer is kept for the whole connection, and compares the time. A task ends by `ended`.
    """

    MAX_HEADERS = 100
    MAX_HEAD_BYTES = 64 * 1024
    MAX_PIPELINED = 16
    HEAD_TIMEOUT_S = 15.0  # from the connection, or a request's first byte, to the end of its head
    STALLED_READER_S = 30.0  # while a response is written, without the client reading any of it
    CLOSING_S = 5.0  # the same while closing
    LINGER_S = 2.0  # how long, and how many bytes, an early response waits for the client to stop
    LINGER_BYTES = 1024 * 1024
    UNDER_WAY_S = 2.0  # at shutdown: time for a first request, or the rest of a head
    leaving = False  # on the class: for all connections of a process

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.url, self.headers = b"", []
        self._in_head = True
        self._head_bytes = 0
        self._line = RequestLine()
        self._overhead_bytes = 0  # of a body: bytes other than its content
        self._body_bytes = 0
        self._refusal: tuple[int, str, str] | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._write_paused = False
        self._answered_early = False
        self._lingering = False
        self._lingered_bytes = 0
        self._linger_timer: asyncio.TimerHandle | None = None
        self._on_disconnect: list[Callable[[], None]] = []
        self._answering: RequestResponseCycle | None = None
        self._offers_protocol = False
        self._unparsed = b""  # the beginning of a Connection header
        self._idle_since_s: float | None = None
        self._waiting_error = b""  # the last answer, sent after those to earlier requests

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if not self.server_state.connections:  # without connections the date was not renewed
            date = formatdate(usegmt=True).encode()
            self.server_state.default_headers = [(b"date", date), *self.config.encoded_headers]
        super().connection_made(transport)
        self._extensions: dict[str, dict[object, object]] = {
            ABORT_EXTENSION: {"call": self._abort},
            DISCONNECT_EXTENSION: {"call": self._on_disconnect.append},
        }
        self._arm_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lingering = True  # no request begins from now on
        for timer in (self._head_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._write_timer = self._linger_timer = None
        self.end_keep_alive_timer()
        self._notify_answering()
        super().connection_lost(exc)
        for notify in self._on_disconnect:
            notify()
        self._extensions.clear()  # breaks a reference cycle, so that all is freed immediately

    def _abort(self) -> None:
        self._notify_answering()
        self.transport.abort()

    def _notify_answering(self) -> None:
        """Notify the request that is being answered of the disconnect, and the newest one. uvicorn
        notifies only the newest: the first of several would continue without a client."""
        for cycle in (self._answering, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            self._lingered_bytes += len(data)
            if self._lingered_bytes > self.LINGER_BYTES and not self.transport.is_closing():
                # Not closed: a reset could destroy the answer before a busy client reads it. A
                # client that cannot send more will read sooner.
                self.transport.pause_reading()
            return
        if self._waiting_error:  # what follows an invalid request is not parsed
            self._lingered_bytes += len(data)
            if self._lingered_bytes > self.LINGER_BYTES:
                self._cut()
            return
        if not self._in_head or self._head_bytes + len(data) < self.MAX_HEAD_BYTES:
            if data and not self.transport.is_closing():
                self._feed(data)
            return
        while data and not self._is_ending():
            # In pieces: bytes beyond the bound of a head never reach the parser.
            room = self.MAX_HEAD_BYTES - self._head_bytes if self._in_head else len(data)
            piece, data = data[:room], data[room:]
            self._feed(piece)
            if self._in_head and self._head_bytes >= self.MAX_HEAD_BYTES:
                self._refuse(431, "headers_too_large", "the request's head is larger than 64 KB")
                return

    def _is_ending(self) -> bool:
        """Return whether no more bytes of this connection are parsed."""
        return self._lingering or bool(self._waiting_error) or self.transport.is_closing()

    def _feed(self, piece: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(piece)
            if self._unparsed:
                piece = self._unparsed + piece
            end = before_offer(piece)
            piece, self._unparsed = piece[:end], piece[end:]
            if piece.find(b"pgrade") >= 0 or piece.find(b"PGRADE") >= 0:
                self._offers_protocol = True
                piece = without_offer(piece)
        else:
            self._overhead_bytes += len(piece)
        self._line.take(piece)
        super().data_received(piece)
        if self._unparsed and not self._in_head:
            rest, self._unparsed = self._unparsed, b""  # part of the body
            self._feed(rest)
        if self._in_head and self._head_bytes:
            self._line.keep()
            self._arm_head_timer()
        if self._overhead_bytes > self.MAX_HEAD_BYTES + 8 * self._body_bytes:
            self._refuse(400, "bad_request", "the request's chunks and trailers are too large")

    # Callbacks of the parser; an error raised here ends the connection by `send_400_response`

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._line.begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: not requested, and not to be taken for a header
        if len(self.headers) >= self.MAX_HEADERS:
            self._refusal = (431, "too_many_headers", f"more than {self.MAX_HEADERS} headers")
            raise ValueError(self._refusal[2])
        # As uvicorn does; calling it for each header would double the cost of this.
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = self._overhead_bytes = self._body_bytes = 0
        self._disarm_head_timer()
        version = self.parser.get_http_version()
        expected = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version.encode())
        self._refusal = refusal_of_head(version, self.headers, self._line.is_as(expected))
        if self._refusal is None and self.parser.should_upgrade():
            # The parser reads no body after it, and would take the next bytes for another request.
            self._refusal = (400, _BAD, "CONNECT and upgrades to other protocols are not supported")
        if self._refusal is not None:
            raise ValueError(self._refusal[2])
        super().on_headers_complete()
        if self.leaving:
            self.cycle.keep_alive = False
        if len(self.pipeline) > self.MAX_PIPELINED:
            self._refusal = (429, "too_many_pipelined", "too many pipelined requests")
            raise ValueError(self._refusal[2])
        if self.pipeline and len(self.pipeline) <= self.MAX_PIPELINED // 2:
            # uvicorn stops reading; but only by reading is a disconnect detected.
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        self._overhead_bytes -= len(body)
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
        self._line.end_message()
        self._head_bytes = self._overhead_bytes = self._body_bytes = 0

    # The answer

    def ended(self) -> None:
        """Mark the current task as finished, whether its answer succeeded or failed."""
        task = asyncio.current_task()
        if task is not None:
            self.tasks.discard(task)

    def end_keep_alive_timer(self) -> None:
        """Stop the timer that closes an idle connection."""
        self._idle_since_s = None
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since_s = None

    def _check_idle_later(self, after_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(after_s, self._check_idle)

    def _check_idle(self) -> None:
        self.timeout_keep_alive_task = None
        if self._idle_since_s is None:
            return
        left_s = self._idle_since_s + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._check_idle_later(left_s)
        else:
            self.timeout_keep_alive_handler()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        task = self.loop.create_task(cycle.run_asgi(self.answering(cycle, app)))
        self.tasks.add(task)

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: a request that offers another protocol is answered in HTTP, by RFC 9110,
        section 7.8, and any client may send any number of them."""

    def answering(self, cycle: RequestResponseCycle, app: ASGI3Application) -> ASGI3Application:
        async def answer(
            scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
        ) -> None:
            assert scope["type"] == "http"
            scope["extensions"] = extensions = dict(self._extensions)
            if cycle.more_body:
                send = self._marking_early(cycle, send)
            else:  # the body is complete: no answer can be early
                extensions[DIRECT_EXTENSION] = {"answer": Direct(cycle, self.flow)}
                if self._offers_protocol and not self.pipeline:
                    extensions[UPGRADE_EXTENSION] = {"call": Upgrade(self._switch, cycle)}
            self._offers_protocol = False
            try:
                await app(scope, receive, send)
            finally:
                self.ended()
                self._on_disconnect.clear()  # answers of a connection are made one after another
                extensions.clear()  # breaks a reference cycle, which would delay freeing
                if not cycle.response_complete or self.transport.is_closing():
                    self.loop.call_soon(self._watch_closing)

        self._answering = cycle
        return answer

    def _marking_early(
        self, cycle: RequestResponseCycle, send: ASGISendCallable
    ) -> ASGISendCallable:
        async def send_on(message: ASGISendEvent) -> None:
            if message["type"] == "http.response.start" and cycle.more_body:
                self._answered_early = True
                named = [pair for pair in message.get("headers", ()) if pair[0] != b"connection"]
                message["headers"] = [*named, (b"connection", b"close")]
                await send(message)
                cycle.keep_alive = True  # otherwise uvicorn would close, and so reset
            else:
                await send(message)

        return send_on

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self._answered_early:
            self._linger()
            return
        if self.transport.is_closing():
            self._watch_writes(self.CLOSING_S)
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
            return
        if self._waiting_error:
            self.transport.write(self._waiting_error)
            self._linger()
            return
        self._idle_since_s = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._check_idle_later(self.timeout_keep_alive)

    def send_400_response(self, msg: str) -> None:
        """Send an error and close. uvicorn calls this when the parser fails, with one text for all
        failures; the bounds here call it too. Requests before an invalid one are answered before
        its error. A flood, and a body that becomes invalid behind others, cut the connection."""
        if self._is_ending():
            return
        cycle, refusal = self.cycle, self._refusal or (400, _BAD, _NOT_HTTP)
        is_answering = cycle is not None and not cycle.response_complete
        if is_answering and cycle.more_body and (cycle.response_started or self.pipeline):
            self._cut()
            return
        dialect = dialect_in(self.url, self.headers)
        answer = STATUS_LINE[refusal[0]]
        answer += as_answer(refusal, self.server_state.default_headers, dialect)
        if is_answering and not cycle.more_body:  # the requests before this one are complete
            self._waiting_error = answer
            self.flow.resume_reading()  # only by reading is a disconnect detected
            return
        self._notify_answering()
        self.transport.write(answer)
        self._linger()

    def _cut(self) -> None:
        """Close in the middle of an answer; the requests behind it are not answered."""
        self._notify_answering()
        self.pipeline.clear()
        self.transport.close()
        self._watch_closing()

    def _refuse(self, status: int, code: str, detail: str) -> None:
        self._refusal = (status, code, detail)
        self.send_400_response(detail)

    def _switch(self, cycle: RequestResponseCycle, protocol: asyncio.Protocol) -> None:
        """Switch the connection to another protocol; this object does not use it from then on."""
        self._lingering = True
        for timer in (self._head_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._write_timer = self._linger_timer = None
        self.end_keep_alive_timer()
        self.flow.resume_reading()
        self._on_disconnect.clear()
        cycle.response_started = cycle.response_complete = True
        self.server_state.total_requests += 1
        connections: set[Any] = self.connections
        connections.discard(self)
        connections.add(protocol)
        protocol.connections = connections  # type: ignore[attr-defined]
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)

    # Timers

    def _arm_head_timer(self) -> None:
        if self._head_timer is None and not self._lingering:
            self._head_timer = self.loop.call_later(self.HEAD_TIMEOUT_S, self._head_timeout)

    def _disarm_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_timeout(self) -> None:
        self._head_timer = None
        if self._lingering or self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # Half of the next request arrived during a long answer, which must not be cut.
            self._arm_head_timer()
        elif self._head_bytes:
            self._refuse(408, "request_timeout", "the request's head arrives too slowly")
        else:
            # Browsers open connections in advance: an unrequested answer would confuse them.
            self.transport.close()

    def _linger(self) -> None:
        """Half-close the connection, and wait before closing it so that the client can read the
        answer.

        Closing while the client sends would cause a reset, which can destroy the answer.
        """
        if self._lingering or self.transport.is_closing():
            return
        self._lingering = True
        self._disarm_head_timer()
        self.end_keep_alive_timer()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._linger_timer = self.loop.call_later(self.LINGER_S, self._end_linger)
        else:
            self._end_linger()

    def _end_linger(self) -> None:
        self.transport.close()
        self._watch_closing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_paused = True
        self._watch_writes(self.STALLED_READER_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_paused = False

    def leave(self) -> None:
        """Make the current answer the last of its connection, if its head is not sent yet."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_started and not self.pipeline:
            cycle.keep_alive = False

    def shutdown(self) -> None:
        """Close once nothing is in progress: no answer, no request that began to arrive, and no
        first request of a client that has just connected."""
        type(self).leaving = True
        self.leave()
        if (self._head_bytes and self._in_head) or self.cycle is None:
            self.loop.call_later(self.UNDER_WAY_S, self._end_unasked)
            return
        super().shutdown()
        self._watch_closing()

    def _end_unasked(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_closing()

    def _watch_closing(self) -> None:
        if self.transport.is_closing():
            self._watch_writes(self.CLOSING_S)

    def _watch_writes(self, interval_s: float) -> None:
        """Abort the connection if the client reads nothing for `interval_s`."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        if self.transport.get_write_buffer_size():
            self._write_timer = self.loop.call_later(
                interval_s, self._check_writes, interval_s, self._unread_bytes()
            )

    def _check_writes(self, interval_s: float, before: int) -> None:
        self._write_timer = None
        if not self._write_paused and not self.transport.is_closing():
            return
        if self.transport.get_write_buffer_size() and self._unread_bytes() >= before:
            self.transport.abort()
        else:
            self._watch_writes(interval_s)

    def _unread_bytes(self) -> int:
        """Return the bytes that the client has not received: in our buffer and, if known, the
        kernel's."""
        buffered_bytes = self.transport.get_write_buffer_size()
        if sys.platform != "linux":
            return buffered_bytes
        sock = self.transport.get_extra_info("socket")
        if sock is None or sock.fileno() < 0:
            return buffered_bytes
        unsent = ioctl(sock.fileno(), TIOCOUTQ, b"\0\0\0\0")
        return buffered_bytes + int.from_bytes(unsent, sys.byteorder)


# Connections accepted in an iteration of the event loop: few if other processes accept on the same
# socket; otherwise one process would get most of a burst.
MOST_A_ROUND, MOST_OF_SHARED = 16, 4
_NONE_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_AGAIN_S = 1.0


class Acceptor:
    """Accepts connections to `listener` until `close`, like a server of the event loop, but many in
    one iteration.

    libuv accepts one connection per iteration. Of 64 that a client opens concurrently the last
    waits for 64 iterations, and an iteration under load takes 20 ms. asyncio's own loops accept up
    to their backlog.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        protocol: Callable[[], asyncio.Protocol],
        most_a_round: int = MOST_A_ROUND,
    ) -> None:
        self._loop = loop
        self._most_a_round = most_a_round
        self._listener = listener
        self._protocol = protocol
        self._again: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[object]] = set()
        listener.setblocking(False)
        self._listen()

    def _listen(self) -> None:
        self._again = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(self._most_a_round):
            try:
                connected, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as failed:
                if failed.errno not in _NONE_LEFT:
                    raise
                get_logger().error(Log.INTERNAL_ERROR, component="acceptor", error=repr(failed))
                self._loop.remove_reader(self._listener)
                self._again = self._loop.call_later(_AGAIN_S, self._listen)
                return
            connected.setblocking(False)
            opening = self._loop.connect_accepted_socket(self._protocol, connected)
            task: asyncio.Task[object] = self._loop.create_task(opening)
            self._opening.add(task)
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[object]) -> None:
        self._opening.discard(task)
        if not task.cancelled() and (failed := task.exception()) is not None:
            get_logger().error(Log.INTERNAL_ERROR, component="acceptor", error=repr(failed))

    def close(self) -> None:
        """Stop accepting; open connections stay open."""
        if self._again is not None:
            self._again.cancel()
        else:
            self._loop.remove_reader(self._listener)

    async def wait_closed(self) -> None:
        """Return immediately: there is nothing to wait for."""
