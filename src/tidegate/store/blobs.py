"""Blobs: uploads, generated images and large bodies, in a folder or an object store.

Invariant: a blob is complete or absent: it is written beside its place and renamed. In the local
folder the blob and its directory entry are on disk before `put` returns, since a 202 relies on
that; an object store guarantees it itself. Keys are `YYYY-MM-DD/<uuid>`, so that the age can be
read from a key. Keys of exports begin with `exports/`; only the operator deletes those.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import os
import re
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.call import new_id
from tidegate.errors import NotFound, StoreUnavailable

if TYPE_CHECKING:  # imported on first use: many processes meet no file
    from obstore import GetOptions
    from obstore.store import ObjectStore

_READ_BYTES = 256 * 1024
_LEAVES_IN_S = 0.1
_DELETE_AT_ONCE = 500
# For one request with its body; `stream` continues after it with another request.
_TIMEOUT_MS = 30_000
# A larger file is sent in parts of this size, several concurrently. They share the bandwidth, so
# each gets that many times the timeout.
_PART_BYTES = 5_242_880
_PARTS = 4
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_STATUS = re.compile(r"status code: (\d{3})")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Their names say what to do; those of a network's failures are left out with their addresses.
_OF_A_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ENOTDIR, errno.EMFILE, errno.ENFILE),
}


@cache
def _leave_time_for_threads() -> None:
    """Delay the exit of the interpreter. Before Python 3.14 a thread of obstore that is just
    reporting a result aborts the process, for example after a command that listed files last."""
    atexit.register(time.sleep, _LEAVES_IN_S)


def _options(timeout_ms: int) -> dict[str, Any]:
    return {
        # Plain HTTP is only used if the URL names it.
        "client_options": {
            "connect_timeout": "2s",
            "timeout": f"{timeout_ms}ms",
            "allow_http": True,
        },
        # obstore's own bounds would delay a submit for three minutes in an outage.
        "retry_config": {
            "max_retries": 2,
            "retry_timeout": timedelta(seconds=5),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=1),
                "base": 2,
            },
        },
    }


def new_key(now: datetime) -> str:
    """Return a new key; `now` in UTC."""
    return f"{now:%Y-%m-%d}/{new_id()}"


class Blobs:
    """The blob store. Every error is StoreUnavailable, or NotFound for a missing key to be read.

    `unavailable`: the last write failed; see `ping`. is_silent: the last ping failed.
    """

    def __init__(
        self,
        store: ObjectStore | None,
        folder: Path | None,
        in_parts: Callable[[], ObjectStore] | None = None,
    ) -> None:
        """`store`: None for the folder, which is opened on first use. in_parts: opens the store for
        files that are sent in parts."""
        self._opened = store
        self._open_in_parts = in_parts
        self._in_parts: ObjectStore | None = None
        self._folder = folder  # of the local store, whose writes are synced here
        self.unavailable = False
        self.is_silent = False

    @classmethod
    def from_url(cls, blob_url: str, data_dir: Path) -> Blobs:
        """Open `blob_url`, s3://, gs:// or az://; empty for the folder `blobs` in `data_dir`."""
        if blob_url:
            from obstore.store import from_url

            _leave_time_for_threads()
            in_parts = partial(from_url, blob_url, **_options(_PARTS * _TIMEOUT_MS))
            return cls(from_url(blob_url, **_options(_TIMEOUT_MS)), None, in_parts)
        folder = data_dir.resolve() / "blobs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(None, folder)

    @property
    def _store(self) -> ObjectStore:
        if self._opened is None:
            from obstore.store import LocalStore

            _leave_time_for_threads()
            self._opened = LocalStore(self._folder, mkdir=True)
        return self._opened

    async def _store_for(self, source: bytes | Path) -> ObjectStore:
        if self._open_in_parts is None:
            return self._store
        if isinstance(source, bytes):
            size_bytes = len(source)
        else:
            size_bytes = (await asyncio.to_thread(source.stat)).st_size
        if size_bytes <= _PART_BYTES:
            return self._store
        if self._in_parts is None:
            self._in_parts = self._open_in_parts()
        return self._in_parts

    async def ping(self) -> None:
        """Raises StoreUnavailable unless the store answers and allows listing and, if the last
        write failed, takes another one: a full disk can still be listed."""
        try:
            await self._ping()
            if self.unavailable:
                key = new_key(datetime.now(UTC))
                await self.put(key, b"a trial")
                await self.delete([key])
        except StoreUnavailable:
            self.is_silent = True
            raise
        self.unavailable = self.is_silent = False

    async def _ping(self) -> None:
        if self._folder is not None:
            try:
                await asyncio.to_thread(os.listdir, self._folder)
            except OSError as failed:
                raise StoreUnavailable(f"the blob store failed: {failed.strerror}") from failed
        else:
            await self.days()

    async def get(self, key: str) -> bytes:
        import obstore.exceptions

        if self._folder is None:
            return b"".join([piece async for piece in self.stream(key)])
        try:
            found = await obstore.get_async(self._store, key)
            return bytes(await found.bytes_async())
        except (obstore.exceptions.BaseError, OSError) as failed:
            raise _translated(failed, key) from failed

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        """Yield the bytes in pieces; NotFound is raised before the first. After a timeout or a
        broken answer another request reads on, as long as each brings some bytes."""
        import obstore.exceptions

        read_bytes, size_bytes = 0, -1
        while read_bytes != size_bytes:
            options: GetOptions = {"range": {"offset": read_bytes}} if read_bytes else {}
            begun_bytes = read_bytes
            try:
                found = await obstore.get_async(self._store, key, options=options)
                size_bytes = found.meta["size"]
                async for piece in found.stream(min_chunk_size=_READ_BYTES):
                    read_bytes += len(piece)
                    yield bytes(piece)
                return
            except (obstore.exceptions.BaseError, OSError) as failed:
                if read_bytes == begun_bytes:
                    raise _translated(failed, key) from failed

    async def delete(self, keys: Iterable[str]) -> None:
        """Delete blobs; a missing key is no error."""
        import obstore.exceptions

        targets = list(keys)
        for start in range(0, len(targets), _DELETE_AT_ONCE):
            try:
                await obstore.delete_async(self._store, targets[start : start + _DELETE_AT_ONCE])
            except (obstore.exceptions.NotFoundError, FileNotFoundError):
                await self._delete_one_by_one(targets[start : start + _DELETE_AT_ONCE])
            except (obstore.exceptions.BaseError, OSError) as failed:
                raise _translated(failed, targets[start]) from failed

    async def days(self) -> list[str]:
        """Return the days (`YYYY-MM-DD`) that have blobs, in order."""
        import obstore.exceptions

        try:
            listing = await obstore.list_with_delimiter_async(self._store)
        except (obstore.exceptions.BaseError, OSError) as failed:
            raise _translated(failed, "") from failed
        names = (str(prefix).strip("/") for prefix in listing["common_prefixes"])
        return sorted(name for name in names if _DAY.fullmatch(name))

    async def written(self, folder: str) -> dict[str, datetime]:
        """Return when each blob below a folder was written, by key."""
        import obstore.exceptions

        found: dict[str, datetime] = {}
        try:
            async for batch in obstore.list(self._store, prefix=folder):
                found |= {str(entry["path"]): entry["last_modified"] for entry in batch}
        except (obstore.exceptions.BaseError, OSError) as failed:
            raise _translated(failed, folder) from failed
        return found

    async def keys_of(self, day: str) -> AsyncIterator[list[str]]:
        """Yield the keys of one day, in batches."""
        import obstore.exceptions

        try:
            async for batch in obstore.list(self._store, prefix=day, chunk_size=_DELETE_AT_ONCE):
                yield [str(entry["path"]) for entry in batch]
        except (obstore.exceptions.BaseError, OSError) as failed:
            raise _translated(failed, day) from failed

    async def _delete_one_by_one(self, keys: list[str]) -> None:
        import obstore.exceptions

        for key in keys:
            try:
                await obstore.delete_async(self._store, key)
            except (obstore.exceptions.NotFoundError, FileNotFoundError):
                continue
            except (obstore.exceptions.BaseError, OSError) as failed:
                raise _translated(failed, key) from failed

    async def put(self, key: str, source: bytes | Path) -> None:
        """Write bytes, or a file in pieces; return once they are durable. A cancelled put may leave
        the complete blob."""
        import obstore.exceptions

        folder = self._folder
        try:
            await obstore.put_async(
                await self._store_for(source),
                key,
                source,
                chunk_size=_PART_BYTES,
                max_concurrency=_PARTS,
            )
            if folder is not None:
                await asyncio.to_thread(_sync, folder, key)
        except (obstore.exceptions.BaseError, OSError) as failed:
            self.unavailable = True
            raise _unavailable(failed) from failed
        self.unavailable = False


def _sync(folder: Path, key: str) -> None:
    """Sync a blob and its folders: obstore renames a finished file into place without waiting for
    the disk."""
    path = folder / key
    above = [parent for parent in path.parents if parent.is_relative_to(folder)]
    for target in (path, *above):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _translated(failed: BaseException, key: str) -> NotFound | StoreUnavailable:
    import obstore.exceptions

    if isinstance(failed, obstore.exceptions.NotFoundError | FileNotFoundError):
        return NotFound(f"no blob {key}")
    return _unavailable(failed)


def _unavailable(failed: BaseException) -> StoreUnavailable:
    """Return the error without its text, which contains addresses and the server's answer."""
    import obstore.exceptions

    text = str(failed)
    status = found[1] if (found := _STATUS.search(text)) else ""
    code = failed.errno if isinstance(failed, OSError) else None
    code = int(found[1]) if code is None and (found := _OS_ERROR.search(text)) else code
    if "169.254.169.254" in text:
        why = "no credentials were found for it"
    elif "NoSuchBucket" in text:
        why = "there is no such bucket"
    elif status in ("401", "403"):
        why = f"it rejects the credentials, or they lack a permission ({status})"
    elif status:
        why = f"it answered {status}"
    elif code is not None and code in _OF_A_DISK:
        why = os.strerror(code)
    else:
        is_store_error = isinstance(failed, obstore.exceptions.BaseError)
        why = "it does not answer" if is_store_error else type(failed).__name__
    return StoreUnavailable(f"the blob store failed: {why}")


_QUICK = 1  # zlib's level for native bodies, compressed on the CPU that relays
_SAMPLED_BYTES, _SAMPLE_BYTES, _WORTH_IT = 262_144, 16_384, 0.7


def as_kept(raw: bytes) -> tuple[str, bytes]:
    """Return a native body in its stored encoding."""
    if len(raw) > _SAMPLED_BYTES and not _shrinks(raw):
        return "raw", raw
    return "zlib-raw", zlib.compress(raw, _QUICK)


def _shrinks(raw: bytes) -> bool:
    """Whether a body is worth compressing, by samples at three places. A file in base64 would only
    shrink by a quarter, at half a second of CPU time for 20 MB."""
    step = len(raw) // 4
    samples = [raw[at : at + _SAMPLE_BYTES] for at in (step, 2 * step, 3 * step)]
    size = sum(len(zlib.compress(one, _QUICK)) for one in samples)
    return size < _WORTH_IT * sum(map(len, samples))
