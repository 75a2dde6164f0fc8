"""The body of a native request as it arrives, bounded in size and in silence.

Invariant: it is bounded by a plain timer, since a timeout's context costs as much as all the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Message, Receive

from tidegate.errors import PayloadTooLarge, QueueFull, RequestTimeout

_RETRY_AFTER_MS = 1_000


@dataclass(slots=True)
class Bodies:
    """How much of requests' bodies this process holds: those of native calls from their arrival to
    the end of their calls, since they wait in memory, and JSON of jobs until it is stored. What
    comes with its head, 64 KB or so, does not count.

    `turn` is taken to parse a large one of a job: what comes of it is several times its size.
    """

    held_bytes: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Hold:
    """What one request holds in `bodies`, all of which are to hold `most_bytes` at most."""

    __slots__ = ("_bodies", "_most_bytes", "held_bytes")

    def __init__(self, bodies: Bodies, most_bytes: int) -> None:
        self._bodies = bodies
        self._most_bytes = most_bytes
        self.held_bytes = 0

    @property
    def turn(self) -> asyncio.Lock:
        return self._bodies.turn

    def reach(self, size_bytes: int) -> None:
        """Hold so much in all. Raises QueueFull where there is no room for it."""
        more_bytes = size_bytes - self.held_bytes
        if self._bodies.held_bytes + more_bytes > self._most_bytes:
            said = "this process holds as much of requests' bodies as it may"
            raise QueueFull(said, limit="MAX_HELD_BYTES", retry_after_ms=_RETRY_AFTER_MS)
        self._bodies.held_bytes += more_bytes
        self.held_bytes = size_bytes

    def give_back(self) -> None:
        """All of it. Idempotent."""
        self._bodies.held_bytes -= self.held_bytes
        self.held_bytes = 0


class ClientGone(Exception):
    """The client left before its request was whole."""


class Incoming:
    """Read it in `task`, which is cancelled when the client is too slow; `is_slow` is true then,
    for where another task does the reading. Raises PayloadTooLarge, RequestTimeout or ClientGone.
    """

    __slots__ = ("_hold", "_receive", "_silence_s", "_task", "is_slow")

    def __init__(self, receive: Receive, task: asyncio.Task[Any], silence_s: float) -> None:
        self._receive = receive
        self._task = task
        self._silence_s = silence_s
        self.is_slow = False
        self._hold: Hold | None = None

    async def whole(self, most_bytes: int, hold: Hold) -> bytes:
        """All of it; it is counted in `hold` until `give_back`. Raises QueueFull too."""
        message = await self._next()
        piece: bytes = message.get("body", b"")
        if not message.get("more_body", False) and len(piece) <= most_bytes:
            return piece
        self._hold = hold
        pieces = []
        async for one in self.pieces(most_bytes, message):
            hold.reach(hold.held_bytes + len(one))
            pieces.append(one)
        return b"".join(pieces)

    def give_back(self) -> None:
        """The call has ended. Idempotent."""
        if self._hold is not None:
            self._hold.give_back()

    async def pieces(self, most_bytes: int, message: Message | None = None) -> AsyncIterator[bytes]:
        """Piece by piece, from `message` on where there is one."""
        size_bytes, more = 0, True
        while more:
            message = await self._next() if message is None else message
            piece, more = message.get("body", b""), message.get("more_body", False)
            message = None
            size_bytes += len(piece)
            check_size(size_bytes, most_bytes)
            if piece:
                yield piece

    async def _next(self) -> Message:
        timer = asyncio.get_running_loop().call_later(self._silence_s, self._too_slow)
        try:
            message = await self._receive()
        except asyncio.CancelledError:
            if not self.is_slow:
                raise
            self._task.uncancel()
            raise RequestTimeout("the request's body arrives too slowly") from None
        finally:
            timer.cancel()
        if message["type"] != "http.request":
            raise ClientGone
        return message

    def _too_slow(self) -> None:
        self.is_slow = True
        self._task.cancel()


def check_announced(headers: Iterable[tuple[bytes, bytes]], most_bytes: int) -> None:
    """Before anything is read: what the head says of the body. Raises PayloadTooLarge."""
    for name, value in headers:
        if name == b"content-length":  # a number, or the server would not have let it in
            check_size(int(value), most_bytes)


def check_size(size_bytes: int, most_bytes: int) -> None:
    """Raises PayloadTooLarge."""
    if size_bytes > most_bytes:
        allowed = f"at most {most_bytes} bytes"
        raise PayloadTooLarge("body", "the body is too large", allowed=allowed)
