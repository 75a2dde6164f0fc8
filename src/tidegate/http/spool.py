"""One uploaded file while it arrives: in memory while small, on disk when large.

Invariant: disk work happens in threads, never on the event loop; after `close`, nothing is left
on disk, also when a thread was still writing for a caller that had been cancelled.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from hashlib import file_digest, sha256
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from anyio import to_thread

from tidegate.errors import StoreUnavailable

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
