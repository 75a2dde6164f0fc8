"""Request bodies while they arrive, bounded in size, silence and slowness.

Invariants: nothing is read beyond a bound; only time spent waiting for the client counts; disk
work happens in threads; after `close` nothing is left on disk, also if the caller was cancelled.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from anyio import to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from tidegate.errors import (
    InvalidRequest,
    PayloadTooLarge,
    QueueFull,
    RequestTimeout,
    StoreUnavailable,
)
from tidegate.settings import Config

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


_NUMBER = re.compile(r"[0-9]{1,18}")


class Body:
    """Pieces of the body by `next()`; None at its end.

    `next` raises PayloadTooLarge, RequestTimeout, or starlette's ClientDisconnect when the client
    has gone. Cancelling it is safe; the body cannot be read on afterwards.
    """

    def __init__(
        self,
        request: Request,
        config: Config,
        *,
        pace: Pace | None = None,
        max_bytes: int | None = None,
    ) -> None:
        """Raises PayloadTooLarge at once when the announced length is over the limit."""
        self.received_bytes = 0
        self._max_bytes = config.max_body_bytes if max_bytes is None else max_bytes
        self._pace = pace or Pace(silence_ms=config.receive_timeout_ms)
        self._patience = Patience(self._pace, in_memory=False)
        self._receive = request.receive
        self._more = True
        announced = request.headers.get("content-length", "0")
        if not _NUMBER.fullmatch(announced):
            raise InvalidRequest("Content-Length", "Content-Length is not a number of bytes")
        if int(announced) > self._max_bytes:
            raise self._too_large()

    async def next(self) -> bytes | None:
        loop = asyncio.get_running_loop()
        while self._more:
            begun = loop.time()
            try:
                async with asyncio.timeout(self._patience.left_s()):
                    message = await self._receive()
            except TimeoutError:
                raise RequestTimeout("the request's body arrives too slowly") from None
            waited_s = loop.time() - begun
            if message["type"] != "http.request":
                self._more = False
                raise ClientDisconnect
            self._more = message.get("more_body", False)
            piece: bytes = message.get("body", b"")
            self._patience.waited(waited_s, len(piece))
            self.received_bytes += len(piece)
            if self.received_bytes > self._max_bytes:
                raise self._too_large()
            if piece:
                return piece
        return None

    async def read(self, max_bytes: int, *, field: str, hold: Hold | None = None) -> bytes:
        """The whole body, counted in `hold` once it is more than comes with a head. Raises
        PayloadTooLarge, naming `field`, at the first piece over, and QueueFull for the hold."""
        whole = bytearray()
        self._patience = Patience(self._pace, in_memory=True)
        while (piece := await self.next()) is not None:
            whole += piece
            if len(whole) > max_bytes:
                raise too_long(field, max_bytes)
            count_in(hold, len(whole))
        return bytes(whole)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            "body",
            f"the request is larger than {self._max_bytes} bytes",
            allowed=f"at most {self._max_bytes} bytes in all",
        )


def count_in(hold: Hold | None, held_bytes: int) -> None:
    """Count what a body holds of memory, once it is more than comes with a head. Raises
    QueueFull."""
    if hold is not None and held_bytes > max(WITH_ITS_HEAD_BYTES, hold.held_bytes):
        hold.reach(held_bytes)


def too_long(field: str, max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        field,
        f"the body is longer than {max_bytes} bytes",
        allowed=f"at most {max_bytes} bytes of this content type",
    )


MEMORY_BYTES = 256 * 1024
PREFIX = "upload-"


def remove_leftovers(folder: Path, *, older_than_s: float = 86_400) -> int:
    """Remove what killed processes left in `folder`; blocks. Returns how many files it was."""
    removed = 0
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(FileNotFoundError):  # another process was first
            if time.time() - path.stat().st_mtime > older_than_s:
                path.unlink()
                removed += 1
    return removed


class Spool:
    """Write, then `finish`, then read `path` (or `data` when None); `close` removes everything."""

    def __init__(self, folder: Path, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self.size_bytes = 0
        self.path: Path | None = None
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._buffer = bytearray()
        self._file: BinaryIO | None = None
        self._closed = False
        # A cancelled caller leaves its thread running: `close` must wait for that thread.
        self._lock = Lock()

    @property
    def data(self) -> bytes:
        """The whole content of a file that stayed in memory."""
        assert self.path is None
        return bytes(self._buffer)

    @property
    def held_bytes(self) -> int:
        """What of it is in memory."""
        return len(self._buffer)

    async def write(self, data: bytes) -> None:
        """Raises StoreUnavailable when the disk does not take it."""
        self.size_bytes += len(data)
        self._buffer += data
        if len(self._buffer) > self._memory_bytes:
            await self._to_disk()

    async def finish(self) -> None:
        """No more data will come. Raises StoreUnavailable when the disk does not take it."""
        if self.path is not None:
            await self._to_disk(last=True)

    async def sha256(self) -> str:
        """Of the finished content, hexadecimal. Raises StoreUnavailable when the disk fails."""
        if self.path is None:
            return sha256(self._buffer).hexdigest()
        try:
            return await to_thread.run_sync(_sha256_of, self.path)
        except OSError as failed:
            raise StoreUnavailable(f"an upload could not be read: {failed.strerror}") from failed

    async def close(self) -> None:
        """Idempotent."""
        self._buffer.clear()
        if not self._closed:
            await to_thread.run_sync(self._remove)

    async def _to_disk(self, *, last: bool = False) -> None:
        pending, self._buffer = self._buffer, bytearray()
        try:
            await to_thread.run_sync(self._append, pending, last)
        except OSError as full:
            raise StoreUnavailable(f"an upload could not be kept: {full.strerror}") from full

    def _append(self, pending: bytearray, last: bool) -> None:
        with self._lock:
            if self._closed:
                return
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                handle, name = tempfile.mkstemp(prefix=PREFIX, dir=self._folder)
                self.path, self._file = Path(name), os.fdopen(handle, "wb", buffering=0)
            view = memoryview(pending)
            while view:
                view = view[self._file.write(view) :]
            if last:
                self._file.close()

    def _remove(self) -> None:
        with self._lock:
            self._closed = True
            if self._file is not None:
                self._file.close()
            if self.path is not None:
                self.path.unlink(missing_ok=True)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()
