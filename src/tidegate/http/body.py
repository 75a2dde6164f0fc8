"""Request bodies while they arrive, bounded in size, silence and slowness.

Invariants: nothing is read beyond a bound; only time spent waiting for the client counts; disk I/O
runs in threads; after `close` nothing is left on disk, also if the caller was cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import file_digest, sha256
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from anyio import to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from tidegate.dialects.forms import (
    FormFile,
    MediaForm,
    MediaFormReader,
    boundary_in,
    recording_seconds,
)
from tidegate.errors import (
    InvalidRequest,
    PayloadTooLarge,
    QueueFull,
    RequestTimeout,
    StoreUnavailable,
)
from tidegate.settings import Config

WITH_ITS_HEAD_BYTES = 65_536
_FREED_AT_ONCE = 16
_COPIED_AT_ONCE_BYTES = 1_048_576  # from this size on Python copies without holding the GIL
_RETRY_AFTER_MS = 1_000


@dataclass(slots=True)
class BodyMemory:
    """Bytes of request bodies in the memory of this process, in total and by tenant.

    Bodies of native calls, prompts and files of streams count from their arrival (files: from their
    loading) to the end of their calls, since they wait in memory; jobs and uploads count until they
    are stored; stored answers of over 64 KB until their client has read them. A body of up to 64 KB
    that arrives with its head does not count.

    `turn` is held to parse a large body of a job: its values take several times its size.
    """

    held_bytes: int = 0
    of_tenants: Counter[str] = field(default_factory=Counter)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def add(self, tenant_id: str, size_bytes: int) -> None:
        """Add a number of bytes; subtract it if negative."""
        self.held_bytes += size_bytes
        self.of_tenants[tenant_id] += size_bytes
        if not self.of_tenants[tenant_id]:
            del self.of_tenants[tenant_id]


@dataclass(frozen=True, slots=True)
class MemoryBound:
    """Bound of a BodyMemory. `shared`: a tenant may use half of what the others leave, so that no
    number of tenants can fill it; one body of the largest size always fits if no other tenant has
    any. `of`: what it bounds, and `setting`: by which it is bounded."""

    most_bytes: int
    largest_bytes: int
    shared: bool
    of: str = "memory"
    setting: str = "MAX_HELD_BYTES"

    def share_bytes(self, others_bytes: int) -> int:
        left_bytes = self.most_bytes - others_bytes
        if not self.shared:
            return left_bytes
        return max(left_bytes // 2, 0 if others_bytes else self.largest_bytes)


class BodyBudget:
    """The part of `memory` that a request of a tenant uses. `on_disk`: that of its temporary
    files."""

    __slots__ = ("_bound", "_memory", "_tenant_id", "held_bytes", "on_disk")

    def __init__(
        self,
        memory: BodyMemory,
        bound: MemoryBound,
        tenant_id: str,
        on_disk: BodyBudget | None = None,
    ) -> None:
        self._memory = memory
        self._bound = bound
        self._tenant_id = tenant_id
        self.held_bytes = 0
        self.on_disk = on_disk

    @property
    def turn(self) -> asyncio.Lock:
        return self._memory.turn

    def reach(self, size_bytes: int) -> None:
        """Set the used size. Raises QueueFull if it does not fit."""
        more_bytes, memory = size_bytes - self.held_bytes, self._memory
        own_bytes = memory.of_tenants.get(self._tenant_id, 0)
        others_bytes = memory.held_bytes - own_bytes
        if own_bytes + more_bytes > self._bound.share_bytes(others_bytes):
            whose = f"of tenant {self._tenant_id}" if self._bound.shared else "of requests"
            bound = self._bound
            message = f"this process has no {bound.of} left for the bodies {whose}"
            raise QueueFull(message, limit=bound.setting, retry_after_ms=_RETRY_AFTER_MS)
        memory.add(self._tenant_id, more_bytes)
        self.held_bytes = size_bytes

    def keep(self, size_bytes: int) -> None:
        """Lower the used size to at most `size_bytes`; to 0 if that could arrive with a head."""
        if (left := size_bytes if size_bytes > WITH_ITS_HEAD_BYTES else 0) < self.held_bytes:
            self._memory.add(self._tenant_id, left - self.held_bytes)
            self.held_bytes = left

    def occupy(self, size_bytes: int) -> None:
        """Set the used size; to 0 if `size_bytes` could arrive with a head. Raises QueueFull if it
        does not fit."""
        if size_bytes > max(self.held_bytes, WITH_ITS_HEAD_BYTES):
            self.reach(size_bytes)
        else:
            self.keep(size_bytes)

    def spool(self, size_bytes: int) -> None:
        """Set the size of the temporary files. Raises QueueFull if it does not fit."""
        if self.on_disk is not None:
            self.on_disk.occupy(size_bytes)

    def release(self) -> None:
        """Release all bytes, on disk too. Idempotent."""
        if self.held_bytes:
            self._memory.add(self._tenant_id, -self.held_bytes)
        self.held_bytes = 0
        self.spool(0)


@dataclass(frozen=True, slots=True)
class Pace:
    """Bounds on a client that sends a body slowly: `silence_ms` without any byte, and `grace_ms` in
    total below `min_bytes_per_s`, however fast it was before. `whole_ms`: the longest time for a
    whole body that waits in memory."""

    silence_ms: int
    grace_ms: int = 15_000
    min_bytes_per_s: int = 1024
    whole_ms: int = 600_000


class Patience:
    """The remaining time of a `Pace`. Only time spent waiting for the client counts."""

    __slots__ = ("_grace_s", "_pace", "_whole_s")

    def __init__(self, pace: Pace, *, in_memory: bool) -> None:
        self._pace = pace
        self._grace_s = pace.grace_ms / 1000
        self._whole_s = pace.whole_ms / 1000 if in_memory else math.inf

    def left_s(self) -> float:
        """Return how long the next piece may take."""
        return max(0.0, min(self._pace.silence_ms / 1000, self._grace_s, self._whole_s))

    def waited(self, waited_s: float, size_bytes: int) -> None:
        """Subtract the wait for a piece, and add the time that its size earns, up to the grace."""
        earned_s = size_bytes / self._pace.min_bytes_per_s
        self._grace_s = min(self._pace.grace_ms / 1000, self._grace_s - waited_s + earned_s)
        self._whole_s -= waited_s


class Incoming:
    """The body of a request: read whole, or piece by piece, once.

    If the client is too slow, `task` is cancelled, which must be the task that reads or one that
    waits for it; `is_slow` is true from then on. Reads raise PayloadTooLarge beyond `max_bytes`,
    RequestTimeout (in `task` only), or ClientDisconnect if the client has disconnected. Cancelling
    a read is safe, but the body cannot be read further.
    """

    __slots__ = (
        *("_hold", "_max_bytes", "_more", "_patience", "_receive", "_task"),
        *("is_slow", "received_bytes"),
    )

    def __init__(
        self,
        receive: Receive,
        task: asyncio.Task[Any],
        pace: Pace,
        *,
        max_bytes: int,
        in_memory: bool,
    ) -> None:
        self.is_slow = False
        self.received_bytes = 0
        self._receive = receive
        self._task = task
        self._max_bytes = max_bytes
        self._patience = Patience(pace, in_memory=in_memory)
        self._more = True
        self._hold: BodyBudget | None = None

    async def next(self) -> bytes | None:
        """Return the next piece, never an empty one; None at the end."""
        while self._more:
            message = await self._message()
            self._more = message.get("more_body", False)
            piece: bytes = message.get("body", b"")
            self.received_bytes += len(piece)
            check_size(self.received_bytes, self._max_bytes)
            if piece:
                return piece
        return None

    async def pieces(self) -> AsyncIterator[bytes]:
        while (piece := await self.next()) is not None:
            yield piece

    async def whole(self, hold: BodyBudget | None = None, *, free_bytes: int = 0) -> bytes:
        """Return the whole body. It counts in `hold` until `release` once it is longer than
        `free_bytes`, unless it arrived with its head. Also raises QueueFull."""
        self._hold = hold
        piece = await self.next() or b""
        if not self._more and len(piece) <= WITH_ITS_HEAD_BYTES:
            return piece
        pieces, size_bytes = [piece], len(piece)
        count_in(hold, size_bytes, free_bytes)
        while (more := await self.next()) is not None:
            pieces.append(more)
            size_bytes += len(more)
            count_in(hold, size_bytes, free_bytes)
        if size_bytes <= _COPIED_AT_ONCE_BYTES:
            return b"".join(pieces)
        return await to_thread.run_sync(_joined, pieces)  # outside of the event loop

    def release(self) -> None:
        """Release the bytes that count in the budget, at the end of the call. Idempotent."""
        if self._hold is not None:
            self._hold.release()

    async def _message(self) -> Message:
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
            self._more = False
            raise ClientDisconnect
        patience.waited(loop.time() - began, len(message.get("body", b"")))
        return message

    def _too_slow(self) -> None:
        self.is_slow = True
        self._task.cancel()


def _joined(pieces: list[bytes]) -> bytes:
    """Join the pieces and free them in steps, since other threads wait during each step."""
    whole = b"".join(pieces)
    while pieces:
        del pieces[-_FREED_AT_ONCE:]
    return whole


def incoming_of(
    request: Request,
    config: Config,
    *,
    max_bytes: int | None = None,
    pace: Pace | None = None,
    in_memory: bool = False,
) -> Incoming:
    """Return the body of `request`, to be read in the current task. `max_bytes` defaults to
    MAX_BODY_BYTES. Raises PayloadTooLarge and InvalidRequest for its announced length."""
    task = asyncio.current_task()
    assert task is not None
    most = config.max_body_bytes if max_bytes is None else max_bytes
    check_announced(request.scope["headers"], most)
    pace = pace or Pace(silence_ms=config.receive_timeout_ms)
    return Incoming(request.receive, task, pace, max_bytes=most, in_memory=in_memory)


_NUMBER = re.compile(rb"[0-9]{1,18}")


def announced_bytes(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """Return the length that the head announces; None if it announces none. Raises InvalidRequest
    for a length that is not a number."""
    for name, value in headers:
        if name == b"content-length":
            if not _NUMBER.fullmatch(value):
                raise InvalidRequest("Content-Length", "Content-Length is not a number of bytes")
            return int(value)
    return None


def check_announced(headers: Iterable[tuple[bytes, bytes]], max_bytes: int) -> None:
    """Check the announced length before anything is read. Raises PayloadTooLarge, and
    InvalidRequest for a length that is not a number."""
    check_size(announced_bytes(headers) or 0, max_bytes)


def check_size(size_bytes: int, max_bytes: int) -> None:
    """Raise PayloadTooLarge if a body is larger than `max_bytes`."""
    if size_bytes > max_bytes:
        allowed = f"at most {max_bytes} bytes"
        raise PayloadTooLarge("body", f"the body is larger than {max_bytes} bytes", allowed=allowed)


def count_in(hold: BodyBudget | None, held_bytes: int, free_bytes: int) -> None:
    """Count a body's bytes in memory once they exceed `free_bytes`. Raises QueueFull."""
    if hold is not None and held_bytes > max(free_bytes, hold.held_bytes):
        hold.reach(held_bytes)


SLICE_BYTES = 64 * 1024


def in_slices(content: bytes) -> Iterator[tuple[bytes, bool]]:
    """Yield a whole answer in slices, and with each whether more follow: between them a slow client
    is waited for."""
    for at in range(0, max(1, len(content)), SLICE_BYTES):
        yield content[at : at + SLICE_BYTES], at + SLICE_BYTES < len(content)


MAX_PART_HEADERS = 8
MAX_PART_HEADER_BYTES = 4096
_AS_IT_IS = frozenset((b"7bit", b"8bit", b"binary"))
# For some servers a lone LF ends a line: they would read another header after it.
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

# The parser would log each malformed body, with the caller's bytes; the error reports it already.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class PartHead:
    """The headers of a part, by lower-case name."""

    headers: Mapping[str, bytes]

    def disposition(self) -> tuple[bytes, dict[bytes, bytes]]:
        """Return the type of `Content-Disposition` and its options."""
        return parse_options_header(self.headers.get("content-disposition"))


Part = PartHead | bytes | None  # the head of a part, some of its content, its end


class Multipart:
    """Parser of a multipart body; parts are reported in the order of the bytes."""

    def __init__(self, content_type: str) -> None:
        """Raises InvalidRequest for a Content-Type without a valid boundary."""
        self._parts: list[Part] = []
        self._headers: dict[str, bytes] = {}
        self._name = bytearray()
        self._value = bytearray()
        self._ended = False
        self._slice = b""
        self._read_bytes = 0  # before the current slice
        self.starts: list[int] = []  # where each part's content begins; -1 for none
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        if not boundary:
            raise InvalidRequest(
                "Content-Type",
                "multipart/form-data without a boundary",
                allowed="multipart/form-data; boundary=...; let your HTTP client write this header",
            )
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": lambda: self._parts.append(None),
                    "on_end": self._on_end,
                },
                max_header_count=MAX_PART_HEADERS,
                max_header_size=MAX_PART_HEADER_BYTES,
            )
        except FormParserError as unfit:
            raise InvalidRequest("Content-Type", f"invalid boundary: {unfit}") from None

    async def read(self, body: Incoming, take: Callable[[Part], Awaitable[None]]) -> None:
        """Pass each part to `take`. Raises InvalidRequest, and the errors of `body` and `take`."""
        while (chunk := await body.next()) is not None:
            for at in range(0, len(chunk), SLICE_BYTES):
                for part in self.feed(chunk[at : at + SLICE_BYTES]):
                    await take(part)
            # A body that is complete already must not block the event loop to its end.
            await asyncio.sleep(0)
        self.check_ended()

    def feed(self, data: bytes) -> list[Part]:
        """Return the parts that begin, continue or end in `data`. Raises InvalidRequest."""
        self._slice = data
        try:
            self._parser.write(data)
        except FormParserError as malformed:
            raise InvalidRequest("body", f"malformed multipart body: {malformed}") from None
        self._read_bytes += len(data)
        parts, self._parts = self._parts, []
        return parts

    def check_ended(self) -> None:
        """Raise InvalidRequest if the body ended before its last boundary."""
        if self._read_bytes == 0:
            raise InvalidRequest("body", "the body is empty")
        if not self._ended:
            raise InvalidRequest("body", "the multipart body ends before its closing boundary")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        name = self._name.decode("ascii", "replace").lower()
        if name in self._headers:
            message = f"malformed multipart body: a part has the header {name[:64]!a} twice"
            raise InvalidRequest("body", message, allowed="each header once")
        if _CONTROL.search(self._value):
            message = f"malformed multipart body: the header {name[:64]!a} has a control character"
            raise InvalidRequest(
                "body", message, allowed="headers of one line each, of printable text"
            )
        self._headers[name] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        coding = self._headers.get("content-transfer-encoding", b"binary").strip().lower()
        if coding not in _AS_IT_IS:
            message = "a part of the form is encoded, which servers read differently"
            allowed = "no Content-Transfer-Encoding, or binary"
            raise InvalidRequest("Content-Transfer-Encoding", message, allowed=allowed)
        self._parts.append(PartHead(self._headers))
        self._headers = {}
        self.starts.append(-1)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self.starts[-1] < 0:
            # Bytes that could have begun a boundary, and did not, belong to earlier slices.
            begins = start if data is self._slice else -end
            self.starts[-1] = self._read_bytes + begins
        self._parts.append(data[start:end])

    def _on_end(self) -> None:
        self._ended = True


MEMORY_BYTES = 256 * 1024
PREFIX = "upload-"


def remove_leftovers(folder: Path, *, older_than_s: float = 86_400) -> int:
    """Remove files that killed processes left in `folder`, and return their number. Blocks."""
    removed = 0
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(FileNotFoundError):  # another process was first
            if time.time() - path.stat().st_mtime > older_than_s:
                path.unlink()
                removed += 1
    return removed


class Spool:
    """Temporary storage of a body: write, then `finish`, then read `path` (or `data` if that is
    None); `close` removes it."""

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
        """Return the whole content, if it stayed in memory."""
        assert self.path is None
        return bytes(self._buffer)

    @property
    def held_bytes(self) -> int:
        """Return how many bytes are in memory."""
        return len(self._buffer)

    async def write(self, data: bytes) -> None:
        """Append data. Raises StoreUnavailable if the disk fails."""
        self.size_bytes += len(data)
        self._buffer += data
        if len(self._buffer) > self._memory_bytes:
            await self._to_disk()

    async def finish(self) -> None:
        """End writing. Raises StoreUnavailable if the disk fails."""
        if self.path is not None:
            await self._to_disk(last=True)

    async def sha256(self) -> str:
        """Return the hexadecimal SHA-256 of the finished content. Raises StoreUnavailable if the
        disk fails."""
        if self.path is None:
            return sha256(self._buffer).hexdigest()
        try:
            return await to_thread.run_sync(_sha256_of, self.path)
        except OSError as failed:
            raise StoreUnavailable(f"an upload could not be read: {failed.strerror}") from failed

    async def close(self) -> None:
        """Remove the content. Idempotent."""
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
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
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


_FORM_MEMORY_BYTES = WITH_ITS_HEAD_BYTES


async def read_form(
    content_types: list[bytes],
    pieces: AsyncIterator[bytes],
    spool: Spool,
    hold: BodyBudget,
    *,
    records: bool,
    digests: bool,
) -> MediaForm:
    """Read a form while writing it to `spool`. records: its files are recordings. Raises
    InvalidRequest, PayloadTooLarge and QueueFull, and the errors of `pieces` and `spool`."""
    if len(content_types) > 1:
        message = "there is more than one Content-Type"
        raise InvalidRequest("Content-Type", message, allowed="one Content-Type")
    boundary = boundary_in(content_types[0])
    parser = Multipart(content_types[0].decode("latin-1"))
    reader, delimiters = MediaFormReader(boundary, digests=digests), _Delimiters(boundary)
    async for piece in pieces:
        for at in range(0, len(piece), SLICE_BYTES):
            part_of_it = piece[at : at + SLICE_BYTES]
            delimiters.scan(part_of_it)
            for part in parser.feed(part_of_it):
                if isinstance(part, PartHead):
                    reader.begin(part.headers)
                elif part is None:
                    reader.end()
                else:
                    reader.data(part)
            await spool.write(part_of_it)
            hold.spool(spool.size_bytes)
            count_in(hold, reader.held_bytes, _FORM_MEMORY_BYTES)
        await asyncio.sleep(0)
    parser.check_ended()
    if delimiters.count != len(parser.starts) + 1 or not delimiters.are_ends:
        problem = "the form's boundary stands within a part, or before or behind all parts"
        raise InvalidRequest("body", problem, allowed="a boundary that no part contains")
    await spool.finish()
    form = reader.form(parser.starts, spool.size_bytes)
    if not records:
        return form
    try:
        return replace(form, files=await to_thread.run_sync(_with_lengths, form.files, spool))
    except OSError as failed:
        raise StoreUnavailable(f"an upload could not be read: {failed.strerror}") from failed


class _Delimiters:
    """Counts boundaries at the start of a line, also after a lone LF or CR, which some servers
    accept. `are_ends`: the body begins with a boundary, and has nothing after the last one."""

    def __init__(self, boundary: bytes) -> None:
        self.count = 0
        self._sought = b"\n--" + boundary
        self._behind_cr = b"\r--" + boundary
        self._before = b"\n"  # the first boundary begins the body
        self._first = b""
        self._last = b""

    def scan(self, data: bytes) -> None:
        if len(self._first) < 2:
            self._first = (self._first + data)[:2]
        window = self._before + data
        self.count += window.count(self._sought) + window.count(self._behind_cr)
        self._before = window[-(len(self._sought) - 1) :]
        self._last = (self._last + data)[-len(self._sought) - 8 :]

    @property
    def are_ends(self) -> bool:
        return self._first == b"--" and self._last.rstrip(b"\r\n").endswith(self._sought + b"--")


def _with_lengths(files: tuple[FormFile, ...], spool: Spool) -> tuple[FormFile, ...]:
    """Return the files with the length of each recording."""
    with BytesIO(spool.data) if spool.path is None else spool.path.open("rb") as body:
        return tuple(
            replace(one, seconds=recording_seconds(body, one.start, one.end)) for one in files
        )


def _sha256_of(path: Path) -> str:
    with path.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()
