"""The body of a native request as it arrives, bounded in size, in silence and in slowness.

Invariant: it is bounded by a plain timer, since a timeout's context costs as much as all the rest.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Message, Receive

from tidegate.errors import PayloadTooLarge, QueueFull, RequestTimeout

WITH_ITS_HEAD_BYTES = 65_536
_RETRY_AFTER_MS = 1_000


@dataclass(slots=True)
class Bodies:
    """How much of requests' bodies this process holds: those of native calls from their arrival to
    the end of their calls, and prompts of streams, since they wait in memory; of jobs and of
    uploads until they are stored. What comes with its head, 64 KB or so, does not count.

    `turn` is taken to parse a large one of a job: what comes of it is several times its size.
    """

    held_bytes: int = 0
    of_tenants: Counter[str] = field(default_factory=Counter)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def hold(self, tenant_id: str, size_bytes: int) -> None:
        """So many more; fewer where it is negative."""
        self.held_bytes += size_bytes
        self.of_tenants[tenant_id] += size_bytes
        if not self.of_tenants[tenant_id]:
            del self.of_tenants[tenant_id]


@dataclass(frozen=True, slots=True)
class Room:
    """How much all of `bodies` may be together. `shared`: a tenant may have half of what the others
    leave of it, so that no number of tenants can fill it; one body of the largest size always
    fits where nobody else holds any."""

    most_bytes: int
    largest_bytes: int
    shared: bool

    def share_bytes(self, others_bytes: int) -> int:
        left_bytes = self.most_bytes - others_bytes
        if not self.shared:
            return left_bytes
        return max(left_bytes // 2, 0 if others_bytes else self.largest_bytes)


class Hold:
    """What one request of a tenant holds in `bodies`."""

    __slots__ = ("_bodies", "_room", "_tenant_id", "held_bytes")

    def __init__(self, bodies: Bodies, room: Room, tenant_id: str) -> None:
        self._bodies = bodies
        self._room = room
        self._tenant_id = tenant_id
        self.held_bytes = 0

    @property
    def turn(self) -> asyncio.Lock:
        return self._bodies.turn

    def reach(self, size_bytes: int) -> None:
        """Hold so much in all. Raises QueueFull where there is no room for it."""
        more_bytes, bodies = size_bytes - self.held_bytes, self._bodies
        own_bytes = bodies.of_tenants.get(self._tenant_id, 0)
        others_bytes = bodies.held_bytes - own_bytes
        if own_bytes + more_bytes > self._room.share_bytes(others_bytes):
            whose = f"of tenant {self._tenant_id}" if self._room.shared else "of requests"
            said = f"this process holds as much of the bodies {whose} as it may"
            raise QueueFull(said, limit="MAX_HELD_BYTES", retry_after_ms=_RETRY_AFTER_MS)
        bodies.hold(self._tenant_id, more_bytes)
        self.held_bytes = size_bytes

    def keep(self, size_bytes: int) -> None:
        """Hold no more than that from here on, and nothing where it would have come with a head."""
        if (left := size_bytes if size_bytes > WITH_ITS_HEAD_BYTES else 0) < self.held_bytes:
            self._bodies.hold(self._tenant_id, left - self.held_bytes)
            self.held_bytes = left

    def give_back(self) -> None:
        """All of it. Idempotent."""
        if self.held_bytes:
            self._bodies.hold(self._tenant_id, -self.held_bytes)
        self.held_bytes = 0


@dataclass(frozen=True, slots=True)
class Pace:
    """How slow a client may be with its body: silent for `silence_ms`, and slower than
    `min_bytes_per_s` for `grace_ms` in all, however fast it was before. `whole_ms`: how long all of
    a body may take that waits in memory."""

    silence_ms: int
    grace_ms: int = 15_000
    min_bytes_per_s: int = 1024
    whole_ms: int = 600_000


class Patience:
    """What is left of a `Pace`. Only the time spent waiting for the client counts."""

    __slots__ = ("_grace_s", "_pace", "_whole_s")

    def __init__(self, pace: Pace, *, in_memory: bool) -> None:
        self._pace = pace
        self._grace_s = pace.grace_ms / 1000
        self._whole_s = pace.whole_ms / 1000 if in_memory else math.inf

    def left_s(self) -> float:
        """How long the next piece may take."""
        return max(0.0, min(self._pace.silence_ms / 1000, self._grace_s, self._whole_s))

    def waited(self, waited_s: float, size_bytes: int) -> None:
        """For a piece of that size, which earns time; but never more than the grace."""
        earned_s = size_bytes / self._pace.min_bytes_per_s
        self._grace_s = min(self._pace.grace_ms / 1000, self._grace_s - waited_s + earned_s)
        self._whole_s -= waited_s


class ClientGone(Exception):
    """The client left before its request was whole."""


class Incoming:
    """Read it in `task`, which is cancelled when the client is too slow; `is_slow` is true then,
    for where another task does the reading. Raises PayloadTooLarge, RequestTimeout or ClientGone.
    """

    __slots__ = ("_hold", "_patience", "_receive", "_task", "is_slow")

    def __init__(
        self, receive: Receive, task: asyncio.Task[Any], pace: Pace, *, in_memory: bool
    ) -> None:
        self._receive = receive
        self._task = task
        self._patience = Patience(pace, in_memory=in_memory)
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
        whole = b"".join(pieces)
        await asyncio.sleep(0)  # a copy of many MB takes its time: others go first now
        return whole

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
        loop, patience = asyncio.get_running_loop(), self._patience
        began = loop.time()
        timer = loop.call_later(patience.left_s(), self._too_slow)
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
        patience.waited(loop.time() - began, len(message.get("body", b"")))
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
