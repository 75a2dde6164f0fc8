"""WebSockets of realtime sessions: the client's, and the provider's.

The client's socket takes over an HTTP connection. Both are connections of the library `websockets`,
which frames, checks UTF-8, answers pings, and bounds messages and read-ahead; neither is
compressed.

Invariants: no redirect is followed, since it would carry the key elsewhere; a side that answers no
ping for `PING_S` is cut, not counting time in which nothing is read from it here or in which a
client reads nothing; of a message over the bound no more than the bound is read (1009).
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

# About the bound of Google and OpenAI on a message; a picture is the largest.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
READ_AHEAD_MESSAGES = 4
READ_AHEAD_BYTES = 1024 * 1024  # of a provider; a client's is counted by `occupy`
WRITE_AHEAD_BYTES = 64 * 1024
PING_S = 20.0
CLOSE_S = 5.0
_SWITCHING, _TRY_AGAIN = 101, 1013
# Its log lines on each connection repeat ours.
_QUIET = logging.getLogger("tidegate.websockets")
_QUIET.setLevel(logging.ERROR)


# Raises QueueFull if the process has no memory left for so many bytes.
Occupy = Callable[[int], None]


class Handshake:
    """A client's handshake, checked but not answered yet."""

    def __init__(self, headers: Headers, subprotocol: str | None) -> None:
        """Raises InvalidRequest for a request that does not open a WebSocket."""
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
        """Return the socket to which the connection is to be switched; `headers` are sent with the
        answer."""
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
    """The client's socket.

    connections: those of the server; the socket removes itself from them. occupy: called with the
    bytes of its messages in memory. pieces: how often bytes have arrived. is_blocked: no pong can
    be read now.
    """

    connections: set[Any]

    def __init__(self, protocol: ServerProtocol, request: Request, response: Any) -> None:
        super().__init__(
            protocol,
            cast(Server, None),  # used only for the handshake, which is done here
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
        self._in_hand_bytes = 0  # of the last message received

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
        return self.recv_messages.paused or self.paused  # paused writes have their own bound

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
        """Count the memory of messages that were received and not forwarded; close if there is none
        left."""
        if self.occupy is None:
            return
        protocol = self.protocol
        ahead = sum(len(frame.data) for frame in self.recv_messages.frames.queue)
        held = ahead + self._in_hand_bytes + len(protocol.reader.buffer)
        try:
            self.occupy(held + (getattr(protocol, "current_size", 0) or 0))  # not in all versions
        except QueueFull as full:
            self.occupy = None
            protocol.fail(_TRY_AGAIN, shortened(full.message))
            self.send_data()
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Do nothing: the server calls this when it stops, and the session continues until its
        grace ends."""


class _MessagesAhead(Assembler):
    """A read-ahead queue that is bounded in bytes too: reading pauses while more than
    `READ_AHEAD_BYTES` wait. A longer message is read to its end."""

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
        # Only as many as the bound on their number: above it, reading is paused anyway.
        return sum(len(one.data) for one in islice(waiting, READ_AHEAD_MESSAGES)) > READ_AHEAD_BYTES


class UpstreamSocket(ClientConnection):
    """The provider's socket; `pieces` and `is_blocked` as on the client's."""

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
    """Ping a side, and cut it if for `PING_S` neither its pong nor any other bytes arrive: a pong
    comes after all that the side has sent before, which may still wait to be read."""
    with suppress(ConnectionClosed):
        while True:
            await asyncio.sleep(PING_S)
            pong = asyncio.ensure_future(await socket.ping())
            while not pong.done():
                pieces, was_blocked = socket.pieces, socket.is_blocked
                await asyncio.wait({pong}, timeout=PING_S)
                is_alive = pong.done() or socket.pieces != pieces
                if not (is_alive or was_blocked or socket.is_blocked):
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
    except ssl.SSLError as error:
        why = error.reason or type(error).__name__
        raise _unconnected(f"no secure connection to the provider ({why})") from None
    except (InvalidHandshake, ProtocolError):
        raise UpstreamGarbled("the provider's answer opens no WebSocket") from None
    except (OSError, EOFError):
        raise _unconnected("could not connect to the provider") from None


def _unconnected(message: str) -> UpstreamError:
    return UpstreamUnavailable(message, broke="connecting")


async def close(socket: Connection, code: int, reason: str) -> None:
    """Close with a close handshake within `CLOSE_S`, or else cut. Messages that still arrive are
    discarded, since the other side's close comes after them."""
    draining = asyncio.create_task(_drained(socket))
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await socket.close(sendable(code), shortened(reason))
    finally:
        draining.cancel()
        cut(socket)


def cut(socket: Connection) -> None:
    """Close the connection in the event loop's next iteration, if it is open."""
    if not socket.connection_lost_waiter.done():
        socket.transport.abort()


async def _drained(socket: Connection) -> None:
    with suppress(ConnectionClosed):
        while True:
            await socket.recv()


_MOST_REASON_BYTES = 123
_NEVER_SENT = {1004: 1000, 1005: 1000, 1006: 1011, 1015: 1011}


def sendable(code: int) -> int:
    """Return a close code that may be sent: some codes are for local use only."""
    code = _NEVER_SENT.get(code, code)
    return code if 1000 <= code <= 1014 or 3000 <= code <= 4999 else 1011


def shortened(reason: str) -> str:
    """Return the part of a reason that fits into a close frame."""
    return reason.encode()[:_MOST_REASON_BYTES].decode("utf-8", "ignore")
