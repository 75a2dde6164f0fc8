"""WebSockets of realtime sessions: the client's, and the provider's.

The client's takes over a connection that was HTTP's. Both are connections of the library
`websockets`: it frames, checks UTF-8, answers pings, and bounds a message and what is read ahead;
neither side is compressed.

Invariants: no redirect is followed, since it would carry the key elsewhere; a side that answers no
ping for `PING_S` is gone, but for the time in which nothing is read of it here, or a client reads
nothing; of a message over the bound no more than that is read (1009).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, cast

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.connection import Connection
from websockets.asyncio.messages import Assembler
from websockets.asyncio.server import Server, ServerConnection
from websockets.datastructures import Headers as WireHeaders
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, ProtocolError
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from tidegate.dialects.spec import Headers
from tidegate.errors import (
    InvalidRequest,
    QueueFull,
    UpstreamError,
    UpstreamGarbled,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from tidegate.upstream.transport import BareConnection

# Google's and OpenAI's own bound on a message is about as much; a picture is the largest.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
READ_AHEAD_MESSAGES = 4
READ_AHEAD_BYTES = 1024 * 1024  # of a provider; a client's count in the memory of the process
WRITE_AHEAD_BYTES = 64 * 1024
PING_S = 20.0
CLOSE_S = 5.0
_SWITCHING, _TRY_AGAIN = 101, 1013
# Its notes on each connection say nothing that ours do not.
_QUIET = logging.getLogger("tidegate.websockets")
_QUIET.setLevel(logging.ERROR)


# Raises QueueFull where a process has no memory left for so many bytes.
Occupy = Callable[[int], None]


class Handshake:
    """A client's handshake, checked and not answered yet."""

    def __init__(self, headers: Headers, subprotocol: str | None) -> None:
        """Raises InvalidRequest for a request that opens no WebSocket."""
        self._protocol = ServerProtocol(
            select_subprotocol=lambda _protocol, offered: _chosen(offered, subprotocol),
            max_size=MAX_MESSAGE_BYTES,
            logger=_QUIET,
        )
        named = WireHeaders()
        for name, value in headers:
            if name != b"connection":
                named[name.decode("latin-1")] = value.decode("latin-1")
        named["connection"] = "Upgrade"
        pairs = named.raw_items()
        lines = b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in pairs)
        self._protocol.receive_data(b"GET / HTTP/1.1\r\n" + lines + b"\r\n")
        events = self._protocol.events_received()
        request = events[0] if events else None
        if not isinstance(request, Request):
            raise _no_handshake("its head is too large")
        self._request = request
        self._response = self._protocol.accept(request)
        if self._response.status_code != _SWITCHING:
            raise _no_handshake(str(self._protocol.handshake_exc))

    def socket(self, headers: Headers) -> ClientSocket:
        """The socket, to which the connection is to be switched; `headers` go with the answer."""
        for name, value in headers:
            self._response.headers[name.decode("latin-1")] = value.decode("latin-1")
        return ClientSocket(self._protocol, self._request, self._response)


def _chosen(offered: Sequence[Subprotocol], subprotocol: str | None) -> Subprotocol | None:
    return Subprotocol(subprotocol) if subprotocol in offered and subprotocol else None


def _no_handshake(why: str) -> InvalidRequest:
    return InvalidRequest(
        "Upgrade", f"the request opens no WebSocket: {why[:200]}", allowed="RFC 6455, version 13"
    )


class ClientSocket(ServerConnection):
    """The client's side. `connections`: those of the server, from which it removes itself. occupy:
    takes how many bytes of its messages are in memory. pieces: how often bytes of it came.
    is_blocked: no pong of it can be read now."""

    connections: set[Any]

    def __init__(self, protocol: ServerProtocol, request: Request, response: Any) -> None:
        super().__init__(
            protocol,
            cast(Server, None),  # asked of nothing but the handshake, which is done here
            ping_interval=PING_S,
            close_timeout=CLOSE_S,
            max_queue=READ_AHEAD_MESSAGES,
            write_limit=WRITE_AHEAD_BYTES,
        )
        self.connections = set()
        self.request = request
        self.response = response
        self.occupy: Occupy | None = None
        self.pieces = 0
        self._in_hand_bytes = 0  # of the message that was received last

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Answer the handshake."""
        Connection.connection_made(self, transport)
        assert self.response is not None
        self.protocol.send_response(self.response)
        self.send_data()
        self.start_keepalive()

    def data_received(self, data: bytes) -> None:
        self.pieces += 1
        super().data_received(data)
        self._count()

    @property
    def is_blocked(self) -> bool:
        return self.recv_messages.paused or self.paused  # which has a bound of its own

    async def keepalive(self) -> None:
        await _keep_alive(self)

    async def recv(self, decode: bool | None = None) -> Any:
        self._in_hand_bytes = 0
        self._count()
        message = await super().recv(decode)
        self._in_hand_bytes = len(message)
        self._count()
        return message

    def _count(self) -> None:
        """Occupy memory for what came and was not passed on; end where there is none left."""
        if self.occupy is None:
            return
        protocol = self.protocol
        ahead = sum(len(frame.data) for frame in self.recv_messages.frames.queue)
        held = ahead + self._in_hand_bytes + len(protocol.reader.buffer)
        try:
            self.occupy(held + (getattr(protocol, "current_size", 0) or 0))  # not in every version
        except QueueFull as full:
            self.occupy = None
            protocol.fail(_TRY_AGAIN, shortened(full.message))
            self.send_data()
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """What the server calls when it stops: the session goes on until its grace is over."""


class _MessagesAhead(Assembler):
    """Bounded in bytes too: nothing is read while more than `READ_AHEAD_BYTES` wait. A message that
    is longer is read to its end."""

    def maybe_pause(self) -> None:
        if not self.paused and self._is_long:
            self.paused = True
            self.pause()
        else:
            super().maybe_pause()

    def maybe_resume(self) -> None:
        if not self._is_long:
            super().maybe_resume()

    @property
    def _is_long(self) -> bool:
        waiting = self.frames.queue
        # Of many only as far as the bound on their number: then nothing is read anyway.
        return sum(len(one.data) for one in islice(waiting, READ_AHEAD_MESSAGES)) > READ_AHEAD_BYTES


class UpstreamSocket(ClientConnection):
    """The provider's side; as the client's, `pieces` and `is_blocked`."""

    pieces = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        reading = cast(asyncio.Transport, transport)
        pause, resume = reading.pause_reading, reading.resume_reading
        self.recv_messages = _MessagesAhead(READ_AHEAD_MESSAGES, pause=pause, resume=resume)

    def data_received(self, data: bytes) -> None:
        self.pieces += 1
        super().data_received(data)

    @property
    def is_blocked(self) -> bool:
        return self.recv_messages.paused

    async def keepalive(self) -> None:
        await _keep_alive(self)


async def _keep_alive(socket: ClientSocket | UpstreamSocket) -> None:
    """Ping a side, and cut it where for `PING_S` neither its pong nor anything else came; a pong
    comes behind all that the side has sent before, which may wait until it is read."""
    with suppress(ConnectionClosed):
        while True:
            await asyncio.sleep(PING_S)
            pong = asyncio.ensure_future(await socket.ping())
            while not pong.done():
                pieces, was_blocked = socket.pieces, socket.is_blocked
                await asyncio.wait({pong}, timeout=PING_S)
                is_heard = pong.done() or socket.pieces != pieces
                if not (is_heard or was_blocked or socket.is_blocked):
                    cut(socket)
                    return


class _Connect(connect):
    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


async def open_upstream(
    url: str, bare: BareConnection, *, subprotocol: str | None, connect_ms: int
) -> ClientConnection:
    """Open a provider's WebSocket on a connection to it; `url` begins with http. Raises
    InvalidStatus for a refusal, and UpstreamError."""
    url = f"ws{url.removeprefix('http')}"
    secured: dict[str, Any] = {} if bare.tls is None else {"ssl": bare.tls}
    connecting = _Connect(
        url,
        create_connection=UpstreamSocket,
        additional_headers=[(n.decode("latin-1"), v.decode("latin-1")) for n, v in bare.headers],
        user_agent_header=None,
        subprotocols=None if subprotocol is None else [Subprotocol(subprotocol)],
        compression=None,
        proxy=None,
        open_timeout=connect_ms / 1000,
        ping_interval=PING_S,
        close_timeout=CLOSE_S,
        max_size=MAX_MESSAGE_BYTES,
        max_queue=READ_AHEAD_MESSAGES,
        write_limit=WRITE_AHEAD_BYTES,
        logger=_QUIET,
        sock=bare.sock,
        **secured,
    )
    try:
        return await connecting
    except InvalidStatus:
        raise
    except TimeoutError:
        raise UpstreamTimeout(
            f"no connection to the provider within {connect_ms} ms", phase="connect"
        ) from None
    except ssl.SSLError as wrong:
        why = wrong.reason or type(wrong).__name__
        raise _unconnected(f"no secure connection to the provider ({why})") from None
    except (InvalidHandshake, ProtocolError):
        raise UpstreamGarbled("the provider's answer opens no WebSocket") from None
    except (OSError, EOFError):
        raise _unconnected("could not connect to the provider") from None


def _unconnected(message: str) -> UpstreamError:
    return UpstreamUnavailable(message, broke="connecting")


async def close(socket: Connection, code: int, reason: str) -> None:
    """Close in order, within `CLOSE_S`; what does not answer is cut. What still comes in is passed
    over, as the other side's close comes after it."""
    draining = asyncio.create_task(_drained(socket))
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await socket.close(sendable(code), shortened(reason))
    finally:
        draining.cancel()
        cut(socket)


def cut(socket: Connection) -> None:
    """End the connection in the event loop's next round, where it has not ended."""
    if not socket.connection_lost_waiter.done():
        socket.transport.abort()


async def _drained(socket: Connection) -> None:
    with suppress(ConnectionClosed):
        while True:
            await socket.recv()


_MOST_REASON_BYTES = 123
_NEVER_SENT = {1004: 1000, 1005: 1000, 1006: 1011, 1015: 1011}


def sendable(code: int) -> int:
    """A close code as it may be sent: those that stand for none are local."""
    code = _NEVER_SENT.get(code, code)
    return code if 1000 <= code <= 1014 or 3000 <= code <= 4999 else 1011


def shortened(reason: str) -> str:
    """As much of a reason as a close frame holds."""
    return reason.encode()[:_MOST_REASON_BYTES].decode("utf-8", "ignore")
