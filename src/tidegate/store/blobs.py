"""Blobs: uploads, generated images and large bodies, in a folder or an object store.

Invariant: a blob is whole or absent: written beside its place and renamed. In the local folder it
and its directory entry are on the disk before `put` returns, since a 202 relies on it; an object
store's own promise serves elsewhere. Keys are `YYYY-MM-DD/<uuid>`, so that age can be read off;
those of exports begin with `exports/`, and are nobody's but the operator's to delete.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import datetime, timedelta
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.call import new_id
from tidegate.errors import NotFound, StoreUnavailable

if TYPE_CHECKING:  # a process that meets no file does without its library
    from obstore import GetOptions
    from obstore.store import ObjectStore

_READ_BYTES = 256 * 1024
_LEAVES_IN_S = 0.1
_DELETE_AT_ONCE = 500
# Of one request with all of its body, but for `stream`, which reads on with another one.
_TIMEOUT_MS = 30_000
# A larger file is sent in parts of this, so many together. They share the way to the bucket: each
# has as many times as long, so that a slow one carries a large file as it carries a small one.
_PART_BYTES = 5_242_880
_PARTS = 4
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_STATUS = re.compile(r"status code: (\d{3})")


@cache
def _leave_time_for_threads() -> None:
    """A thread of obstore that is still on its way out of reporting a result aborts a process whose
    interpreter ends (before Python 3.14), as that of a command which last listed files."""
    atexit.register(time.sleep, _LEAVES_IN_S)


def _options(timeout_ms: int) -> dict[str, Any]:
    return {
        # An endpoint without TLS is used only where its URL names one.
        "client_options": {
            "connect_timeout": "2s",
            "timeout": f"{timeout_ms}ms",
            "allow_http": True,
        },
        # Without bounds of ours an outage would hold a submit for three minutes.
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
    """A fresh key; `now` in UTC."""
    return f"{now:%Y-%m-%d}/{new_id()}"


class Blobs:
    """Every error is StoreUnavailable, or NotFound for a key that is not there to be read.

    `away`: the last write has failed; see `ping`. is_silent: the last ping has.
    """

    def __init__(
        self,
        store: ObjectStore | None,
        folder: Path | None,
        in_parts: Callable[[], ObjectStore] | None = None,
    ) -> None:
        """`store`: None for the folder's own, which is opened with its first use. in_parts: opens
        the one for files that are sent in parts."""
        self._opened = store
        self._open_in_parts = in_parts
        self._in_parts: ObjectStore | None = None
        self._folder = folder  # of the local store, whose writes we sync ourselves
        self.away = False
        self.is_silent = False

    @classmethod
    def from_url(cls, blob_url: str, data_dir: Path) -> Blobs:
        """`blob_url` is s3://, gs:// or az://, or empty for the folder `blobs` in `data_dir`."""
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
        """Raises StoreUnavailable unless the store answers and allows listing."""
        try:
            await self._ping()
        except StoreUnavailable:
            self.is_silent = True
            raise
        self.away = self.is_silent = False

    async def _ping(self) -> None:
        if self._opened is None and self._folder is not None:
            try:
                await asyncio.to_thread(os.listdir, self._folder)
            except OSError as failed:
                why = f"the blob store failed: {type(failed).__name__}"
                raise StoreUnavailable(why) from failed
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
        """The bytes in pieces; NotFound comes before the first of them. A slow reader, and an
        answer that breaks, have it read on from there, as long as each request brings some."""
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
        """Delete what is there; a key that is not is no error."""
        import obstore.exceptions

        wanted = list(keys)
        for start in range(0, len(wanted), _DELETE_AT_ONCE):
            try:
                await obstore.delete_async(self._store, wanted[start : start + _DELETE_AT_ONCE])
            except (obstore.exceptions.NotFoundError, FileNotFoundError):
                await self._delete_one_by_one(wanted[start : start + _DELETE_AT_ONCE])
            except (obstore.exceptions.BaseError, OSError) as failed:
                raise _translated(failed, wanted[start]) from failed

    async def days(self) -> list[str]:
        """The days (`YYYY-MM-DD`) that have blobs, in order."""
        import obstore.exceptions

        try:
            listing = await obstore.list_with_delimiter_async(self._store)
        except (obstore.exceptions.BaseError, OSError) as failed:
            raise _translated(failed, "") from failed
        names = (str(prefix).strip("/") for prefix in listing["common_prefixes"])
        return sorted(name for name in names if _DAY.fullmatch(name))

    async def written(self, folder: str) -> dict[str, datetime]:
        """When each blob below a folder was written, by its key."""
        import obstore.exceptions

        found: dict[str, datetime] = {}
        try:
            async for batch in obstore.list(self._store, prefix=folder):
                found |= {str(entry["path"]): entry["last_modified"] for entry in batch}
        except (obstore.exceptions.BaseError, OSError) as failed:
            raise _translated(failed, folder) from failed
        return found

    async def keys_of(self, day: str) -> AsyncIterator[list[str]]:
        """The keys of one day, in batches."""
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
        """Returns when the bytes, or those of the file, which is read in pieces, are durable. A
        cancelled put may leave the whole blob."""
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
            self.away = True
            raise _unavailable(failed) from failed
        self.away = False


def _sync(folder: Path, key: str) -> None:
    """obstore renames a finished file into place but does not wait for the disk."""
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
    """The error without its text, which holds addresses and the server's answer."""
    import obstore.exceptions

    said = str(failed)
    status = found[1] if (found := _STATUS.search(said)) else ""
    if "169.254.169.254" in said:
        why = "no credentials were found for it"
    elif "NoSuchBucket" in said:
        why = "there is no such bucket"
    elif status in ("401", "403"):
        why = f"it refuses our credentials, or that they do this ({status})"
    elif status:
        why = f"it answered {status}"
    else:
        is_theirs = isinstance(failed, obstore.exceptions.BaseError)
        why = "it does not answer" if is_theirs else type(failed).__name__
    return StoreUnavailable(f"the blob store failed: {why}")
