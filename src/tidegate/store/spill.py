"""Spill: finished work, kept on disk while PostgreSQL is unavailable.

Rows of ended calls wait in memory first, so that many are written together (`WaitingRows`).

Invariant: an entry is on disk once `keep` returns, and will be replayed, in order, by this process
or by the next one with the same folder; never by two concurrently, since a file belongs to the
holder of its lock. Replaying twice is harmless: every write is fenced or keyed.

A file is lines of `<crc32 as 8 hex digits> <JSON>`; a torn last line was never acknowledged. Beside
the files `CallJournal` has the calls that are not finished.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import struct
import sys
import zlib
from base64 import b64encode
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson

from tidegate.call import UNKNOWN_CHARGE, Charge, Usage, UsageDetails, UsageState, new_id
from tidegate.errors import StoreUnavailable
from tidegate.record import NO_LINEAGE, CallRecord, Lineage
from tidegate.store.records import Json
from tidegate.telemetry.logging import Log, get_logger

REJECTED = "rejected.jsonl"
_SUFFIX = ".spill"
_CHUNK = 200
_PIECE_BYTES = 196_608  # a multiple of three, so that the pieces' base64 can be joined


@dataclass(slots=True)
class _File:
    """A spill file, locked as long as the descriptor is open."""

    path: Path
    descriptor: int

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


class Spill:
    """At most `max_bytes` in `folder`, including other processes' files, plus one write of each
    process. Other files are measured at each write and each replay."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._active: _File | None = None
        self._sealed: list[_File] = []
        self._on_disk_bytes = self._measured()
        self._pending_bytes = 0  # of the queue
        self._queue: list[tuple[bytes, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._replaying = asyncio.Lock()

    @property
    def used_bytes(self) -> int:
        return self._on_disk_bytes + self._pending_bytes

    async def keep(self, entry: Json) -> None:
        """Return once `entry` is on disk; raises StoreUnavailable if there is no room."""
        is_large = len(entry.get("row", {}).get("answer") or "") > _PIECE_BYTES
        line = await asyncio.to_thread(_line_of, entry) if is_large else _line_of(entry)
        if self.used_bytes + len(line) > self._max_bytes:
            raise StoreUnavailable("PostgreSQL is unavailable and the spill is full")
        self._pending_bytes += len(line)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((line, future))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await future

    async def replay(self, write: Callable[[list[Json]], Awaitable[None]]) -> int:
        """Pass every entry to `write`, in chunks; delete each file once it is written. Return the
        number of entries.

        `write` raises StoreUnavailable to stop; the file is then kept for the next replay.
        """
        async with self._replaying:
            if self._active is not None and self._writing is None:
                self._sealed.append(self._active)
                self._active = None
            if _is_any(self._folder, _SUFFIX):
                self._sealed += await asyncio.to_thread(self._adopt)
            self._on_disk_bytes = self._measured()
            count = 0
            while self._sealed:
                file = self._sealed[0]
                for chunk in _chunks(file.path):
                    await write(chunk)
                    count += len(chunk)
                self._sealed.pop(0)
                file.drop()
                self._on_disk_bytes = self._measured()
            if count:
                get_logger().info(Log.SPILL_REPLAYED, entries=count)
            return count

    async def reject(self, entry: Json, reason: str) -> None:
        """Store an entry that PostgreSQL will never accept in a file for operators."""
        line = orjson.dumps({"reason": reason, "entry": entry}, default=_in_base64) + b"\n"
        await asyncio.to_thread(_append_to, self._folder / REJECTED, line)

    def close(self) -> None:
        """Release the locks; the next process replays the files."""
        for file in [*self._sealed, *([self._active] if self._active else [])]:
            os.close(file.descriptor)
        self._sealed.clear()
        self._active = None

    async def _write(self) -> None:
        try:
            while self._queue:
                batch, self._queue = self._queue, []
                failure: OSError | None = None
                try:
                    data = b"".join(line for line, _ in batch)
                    self._on_disk_bytes = await asyncio.to_thread(self._append, data)
                except OSError as failed:
                    failure = failed
                self._pending_bytes -= sum(len(line) for line, _ in batch)
                for _, future in batch:
                    if future.done():
                        continue
                    if failure is None:
                        future.set_result(None)
                    else:
                        future.set_exception(StoreUnavailable(f"cannot spill to disk: {failure}"))
        finally:
            self._writing = None

    def _append(self, data: bytes) -> int:
        """Append to this process's file; return the number of bytes in the folder."""
        if self._active is None:
            self._active = self._create()
            get_logger().warning(Log.SPILLED, path=str(self._active.path))
        whole = os.fstat(self._active.descriptor).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self._active.descriptor, data[written:])
            os.fsync(self._active.descriptor)
        except OSError:
            os.ftruncate(self._active.descriptor, whole)
            raise
        return self._measured()

    def _measured(self) -> int:
        sizes = 0
        if not _is_any(self._folder, _SUFFIX):
            return sizes
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with suppress(FileNotFoundError):  # another process has just replayed it
                sizes += path.stat().st_size
        return sizes

    def _create(self) -> _File:
        # Locked before it gets its name: another process would adopt an unlocked file, and delete
        # it.
        return _created(self._folder, _SUFFIX, os.O_APPEND)

    def _adopt(self) -> list[_File]:
        """Lock the files of dead processes, oldest first."""
        own = {file.path for file in self._sealed}
        if self._active is not None:
            own.add(self._active.path)
        return _adopted(self._folder, own)[0]


_CALLS_SUFFIX = ".calls"
_SLOTS = 4_096
_SLOT_BYTES = 1_024
_SLOT = struct.Struct("<16sH")  # after the taken flag: id, length of the facts
# Next in newer versions: the lineage. Older versions write zeros or an older text here, which have
# no lineage, and do not read it.
_LINEAGE = struct.Struct("<BBH")
_LINEAGE_MARK = (0, 1)
_TAKEN, _FREE = 1, 0
# At the end of the slot, behind its text: a session's charge so far.
_CHARGE = struct.Struct("<IHBB")  # CRC-32 and length of the text
_CHARGE_MARK = (0, 2)
_NO_CHARGE = bytes(_CHARGE.size)


class WaitingRows:
    """Records in memory that wait to be written, `batch_rows` at a time, each with its size.

    A batch costs PostgreSQL and this process about as much as a single row. So after a batch the
    next one waits `LINGER_TIMES` as long as that took, unless half of a batch waits before.
    """

    LINGER_S, MOST_LINGER_S, LINGER_TIMES = 0.05, 0.25, 20

    def __init__(self, batch_rows: int) -> None:
        self.batch_rows = batch_rows
        self.waiting: deque[tuple[CallRecord, int]] = deque()
        self.size_bytes = 0
        self.writer: asyncio.Task[None] | None = None
        self._any, self._many = asyncio.Event(), asyncio.Event()
        self._linger_s = self.LINGER_S
        self._hurries = False

    @property
    def has_many(self) -> bool:
        """Whether half of a batch waits."""
        return 2 * len(self.waiting) >= self.batch_rows

    def add(self, record: CallRecord, size_bytes: int) -> None:
        self.waiting.append((record, size_bytes))
        self.size_bytes += size_bytes
        self._any.set()
        if self._hurries or 2 * len(self.waiting) >= self.batch_rows:
            self._many.set()

    def hurry(self) -> None:
        """Let no record wait for others from now on."""
        self._hurries = True
        self._many.set()

    async def gather(self, is_urgent: Callable[[], bool]) -> None:
        """Wait for a record, and for more of them, which is short if the first one is urgent.
        Cancellation leaves all records."""
        await self._any.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.LINGER_S if is_urgent() else self._linger_s):
                await self._many.wait()
        self._any.clear()
        if not self._hurries:
            self._many.clear()

    def take(self) -> list[tuple[CallRecord, int]]:
        """Remove the next batch, and return it."""
        return [self.waiting.popleft() for _ in range(min(len(self.waiting), self.batch_rows))]

    def wrote(self, took_s: float) -> None:
        """Note how long the last batches took; records may have come meanwhile."""
        self._linger_s = max(self.LINGER_S, min(self.LINGER_TIMES * took_s, self.MOST_LINGER_S))
        if self.waiting:
            self._any.set()


class CallJournal:
    """Native calls and streams that this process has sent upstream and not recorded yet, in a file
    that outlives the process: if it is killed, another process records its calls.

    The file is mapped into memory: a call writes without I/O. It survives the process, not the
    machine. Concurrent calls beyond its slots are not in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: _File | None = None
        self._memory: mmap.mmap | None = None
        self._free: list[int] = []

    def __repr__(self) -> str:
        return f"<CallJournal open={self._memory is not None} free={len(self._free)}>"

    def open(self) -> None:
        """Create the file with all its blocks: writing to a mapped page for which a full disk has
        no room would kill the process. Without room now, no calls are entered. Raises OSError if
        the folder cannot be written."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = _created(self._folder, _CALLS_SUFFIX)
        try:
            if sys.platform == "linux":
                os.posix_fallocate(self._file.descriptor, 0, _SLOTS * _SLOT_BYTES)
            else:
                os.ftruncate(self._file.descriptor, _SLOTS * _SLOT_BYTES)
        except OSError as failed:
            get_logger().error(Log.JOURNAL_MISSING, detail=str(failed))
            self._file.drop()
            self._file = None
            return
        self._memory = mmap.mmap(self._file.descriptor, _SLOTS * _SLOT_BYTES)
        self._free = list(range(_SLOTS - 1, -1, -1))

    def close(self) -> None:
        """Delete the file if it is empty; otherwise another process records its calls."""
        if self._memory is None or self._file is None:
            return
        self._memory.close()
        self._memory = None
        if len(self._free) == _SLOTS:
            self._file.drop()
        else:
            os.close(self._file.descriptor)
        self._file = None

    def enter(self, record: CallRecord) -> None:
        """Enter a call that is about to be sent; a retry uses the same slot. Without I/O."""
        memory = self._memory
        if memory is None or (record.slot is None and not self._free):
            return
        facts = orjson.dumps(_facts_of(record))
        room = _SLOT_BYTES - _SLOT.size - 1 - len(facts)
        if room < 0:
            return
        lineage = orjson.dumps([*record.lineage])
        if len(lineage) + _LINEAGE.size > room:
            lineage = b""
        if record.slot is None:
            record.slot = self._free.pop()
        place = record.slot * _SLOT_BYTES
        memory[place] = _FREE
        assert record.request_id is not None
        end = place + _SLOT_BYTES
        memory[end - _CHARGE.size : end] = _NO_CHARGE
        entry = _SLOT.pack(record.request_id.bytes, len(facts)) + facts
        if room >= _LINEAGE.size:
            entry += _LINEAGE.pack(*_LINEAGE_MARK, len(lineage)) + lineage
        memory[place + 1 : place + 1 + len(entry)] = entry
        memory[place] = _TAKEN  # set last, so that a partial slot is not taken

    def note(self, record: CallRecord) -> None:
        """Store the charge so far of a continuing call, such as a realtime session, if it fits.
        Without I/O."""
        if record.slot is None or self._memory is None:
            return
        memory, place, text = self._memory, record.slot * _SLOT_BYTES, _charge_text(record.charge)
        begin = place + _SLOT_BYTES - _CHARGE.size - len(text)
        if begin < _end_of_text(memory, place):
            return
        memory[begin : begin + len(text)] = text
        _CHARGE.pack_into(memory, begin + len(text), zlib.crc32(text), len(text), *_CHARGE_MARK)

    def leave(self, record: CallRecord) -> None:
        """Free the slot of a call that is recorded, or never will be."""
        if record.slot is None or self._memory is None:
            return
        self._memory[record.slot * _SLOT_BYTES] = _FREE
        self._free.append(record.slot)
        record.slot = None

    async def lost(self, keep: Callable[[list[CallRecord]], Awaitable[None]]) -> None:
        """Pass calls of dead processes to `keep`, and delete their files once it returns."""
        own = set() if self._file is None else {self._file.path}
        if not _is_any(self._folder, _CALLS_SUFFIX, {path.name for path in own}):
            return
        files, _ = await asyncio.to_thread(_adopted, self._folder, own, _CALLS_SUFFIX)
        try:
            while files:
                calls = await asyncio.to_thread(_calls_in, files[0].path)
                if calls:
                    await keep(calls)
                    get_logger().warning(Log.CALLS_LOST, calls=len(calls))
                files.pop(0).drop()
        finally:
            for file in files:  # left for the next run
                os.close(file.descriptor)


# Fields of a `CallRecord`; times are in ISO 8601.
_TIMES = ("received_at", "admitted_at")
_FACTS = (
    *("source", "tenant_id", *_TIMES, "endpoint", "dialect", "operation", "priority"),
    *("key_id", "subject", "kind", "model", "streamed", "upstream", "pool", "attempts"),
)


_facts_of = attrgetter(*_FACTS)


def facts_of(record: CallRecord) -> list[Any]:
    """Return the journal's facts of a call that has not ended."""
    return list(_facts_of(record))


def record_from(request_id: UUID, values: Sequence[Any]) -> CallRecord:
    """Return the record of a call from its facts."""
    facts = dict(zip(_FACTS, values, strict=True))
    for name in _TIMES:
        facts[name] = facts[name] and datetime.fromisoformat(facts[name])
    return CallRecord(request_id=request_id, **facts)


def lineage_text(lineage: Lineage) -> str | None:
    """Return a lineage as text; None for an empty one."""
    return None if lineage == NO_LINEAGE else orjson.dumps([*lineage]).decode()


def lineage_from(text: str | bytes | None) -> Lineage:
    """Return a lineage from its text, with the fields that this version knows."""
    if not text:
        return NO_LINEAGE
    values = dict(zip(Lineage._fields, orjson.loads(text), strict=False))
    parent_id = values.get("parent_id")
    return Lineage(**values | {"parent_id": UUID(parent_id) if parent_id else None})


def _charge_text(charge: Charge) -> bytes:
    usage = {name: value for name, value in _stated(charge.usage).items() if name != "details"}
    return orjson.dumps([usage, _stated(charge.usage.details), charge.cost_micros])


def _stated(of: Usage | UsageDetails | None) -> dict[str, Any]:
    """Return the known fields by name."""
    named = () if of is None else ((one.name, getattr(of, one.name)) for one in fields(of))
    return {name: value for name, value in named if value is not None}


def _charge_in(data: bytes, place: int) -> Charge:
    """Return the charge in a slot as a lower bound; unknown if it is missing or torn."""
    end = place + _SLOT_BYTES - _CHARGE.size
    crc, length, *mark = _CHARGE.unpack_from(data, end)
    text = data[end - length : end]
    if tuple(mark) != _CHARGE_MARK or length > _SLOT_BYTES or zlib.crc32(text) != crc:
        return UNKNOWN_CHARGE
    usage, details, cost_micros = orjson.loads(text)
    reported = Usage(**usage, details=UsageDetails(**details) if details else None)
    return Charge(UsageState.PARTIAL, reported, None, cost_micros)


def _end_of_text(data: bytes | mmap.mmap, place: int) -> int:
    """Return where a slot's facts and lineage end."""
    end = place + 1 + _SLOT.size + int(_SLOT.unpack_from(data, place + 1)[1])
    if end + _LINEAGE.size <= place + _SLOT_BYTES:
        end += _LINEAGE.size + int(_LINEAGE.unpack_from(data, end)[2])
    return end


def _lineage_in(data: bytes, begin: int) -> Lineage:
    """Return the lineage of a slot, whose facts end at `begin`."""
    if begin % _SLOT_BYTES + _LINEAGE.size > _SLOT_BYTES or begin % _SLOT_BYTES == 0:
        return NO_LINEAGE
    *mark, length = _LINEAGE.unpack_from(data, begin)
    begin += _LINEAGE.size
    return lineage_from(data[begin : begin + length] if tuple(mark) == _LINEAGE_MARK else None)


def _calls_in(path: Path) -> list[CallRecord]:
    data = path.read_bytes()
    calls = []
    for place in range(0, len(data), _SLOT_BYTES):
        if data[place] != _TAKEN:
            continue
        request_id, length = _SLOT.unpack_from(data, place + 1)
        begin = place + 1 + _SLOT.size
        facts = orjson.loads(data[begin : begin + length])
        calls.append(record_from(UUID(bytes=request_id), facts))
        calls[-1].lineage = _lineage_in(data, begin + length)
        calls[-1].charge = _charge_in(data, place)
        calls[-1].answer.usage = calls[-1].charge.usage
    return calls


def scrub(
    folder: Path, matches: Callable[[Json], bool], *, dry_run: bool = False
) -> tuple[int, int]:
    """Delete matching entries from the files of dead processes, and from the rejected ones. Return
    how many, and the number of files that running processes hold, which are left alone."""
    scrubbed = 0
    files, held = _adopted(folder, set())
    for file in files:
        try:
            remaining, count = [], 0
            for chunk in _chunks(file.path):
                keep = [entry for entry in chunk if not matches(entry)]
                remaining += [_line_of(entry) for entry in keep]
                count += len(chunk) - len(keep)
            scrubbed += count
            if count and not dry_run:
                _replace(file.path, b"".join(remaining))
        finally:
            os.close(file.descriptor)
    rejected = folder / REJECTED
    if rejected.exists():
        with rejected.open("r+b") as aside:
            fcntl.flock(aside, fcntl.LOCK_EX)
            lines = list(aside)
            left = [line for line in lines if not matches(orjson.loads(line)["entry"])]
            scrubbed += len(lines) - len(left)
            if len(left) < len(lines) and not dry_run:
                aside.seek(0)
                aside.truncate()
                aside.writelines(left)
                aside.flush()
                os.fsync(aside.fileno())
    return scrubbed, held


def _replace(path: Path, data: bytes) -> None:
    """Replace a file atomically; delete it if there is no data."""
    if not data:
        path.unlink(missing_ok=True)
        return
    hidden = path.with_name(f".{new_id()}")
    with hidden.open("xb") as file:
        hidden.chmod(0o600)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    hidden.rename(path)


def _created(folder: Path, suffix: str, flags: int = 0) -> _File:
    hidden = folder / f".{new_id()}"
    descriptor = os.open(hidden, os.O_CREAT | os.O_RDWR | flags, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    path = folder / f"{new_id()}{suffix}"
    hidden.rename(path)
    place = os.open(folder, os.O_RDONLY)
    os.fsync(place)
    os.close(place)
    return _File(path, descriptor)


def _is_any(folder: Path, suffix: str, without: Collection[str] = ()) -> bool:
    """Return whether the folder has such a file. Idle processes look for those of dead ones every
    few seconds: a thread for that would cost as much as all their other upkeep of the record."""
    with suppress(FileNotFoundError):
        return any(one.endswith(suffix) and one not in without for one in os.listdir(folder))
    return False


def _adopted(folder: Path, own: set[Path], suffix: str = _SUFFIX) -> tuple[list[_File], int]:
    """Lock and return the files of dead processes, oldest first, and the number of files others
    hold."""
    found, held = [], 0
    for path in sorted(folder.glob(f"*{suffix}")):
        if path in own:
            continue
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            held += 1
            continue
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            found.append(_File(path, descriptor))
        else:
            os.close(descriptor)
    return found, held


def _line_of(entry: Json) -> bytes:
    body = orjson.dumps(entry, default=_in_base64)
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _in_base64(value: object) -> orjson.Fragment:
    if isinstance(value, bytes):  # in pieces, between which the event loop may run
        places = range(0, len(value), _PIECE_BYTES)
        pieces = [b64encode(value[at : at + _PIECE_BYTES]) for at in places]
        return orjson.Fragment(b"".join((b'"', *pieces, b'"')))
    raise TypeError(f"{type(value).__name__} can't be spilled")


def _append_to(path: Path, line: bytes) -> None:
    with path.open("ab") as rejected:
        fcntl.flock(rejected, fcntl.LOCK_EX)
        rejected.write(line)
        rejected.flush()
        os.fsync(rejected.fileno())


def _chunks(path: Path) -> Iterator[list[Json]]:
    chunk: list[Json] = []
    with path.open("rb") as lines:
        for line in lines:
            checksum, _, body = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or b"%08x" % zlib.crc32(body) != checksum:
                continue  # torn by a crash during a write
            chunk.append(orjson.loads(body))
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
    if chunk:
        yield chunk
