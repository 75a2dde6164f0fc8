"""Uploads, generated pictures and large bodies, in a folder or an object store.

Invariant: a blob is whole or absent: written beside its place and renamed. In the local folder it
and its directory entry are on the disk before `put` returns, since a 202 relies on it; an object
store's own promise serves elsewhere. Keys are `YYYY-MM-DD/<uuid>`, so that age can be read off.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from datetime import datetime
from pathlib import Path

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, ObjectStore, from_url

from tidegate.call import new_id
from tidegate.errors import NotFound, StoreUnavailable

_READ_BYTES = 256 * 1024
_DELETE_AT_ONCE = 500


def new_key(now: datetime) -> str:
    """A fresh key; `now` in UTC."""
    return f"{now:%Y-%m-%d}/{new_id()}"


class Blobs:
    """Every error is StoreUnavailable, or NotFound for a key that is not there."""

    def __init__(self, store: ObjectStore, folder: Path | None) -> None:
        self._store = store
        self._folder = folder  # of the local store, whose writes we sync ourselves

    @classmethod
    def from_url(cls, blob_url: str, data_dir: Path) -> Blobs:
        """`blob_url` is s3://, gs:// or az://, or empty for the folder `blobs` in `data_dir`."""
        if blob_url:
            return cls(from_url(blob_url), None)
        folder = data_dir.resolve() / "blobs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(LocalStore(folder, mkdir=True), folder)

    async def put(self, key: str, data: bytes) -> None:
        """Returns when the bytes are durable. A cancelled put may leave the whole blob."""
        await self._put(key, data)

    async def put_file(self, key: str, path: Path) -> None:
        """The same for a file, which is read in pieces."""
        await self._put(key, path)

    async def get(self, key: str) -> bytes:
        try:
            found = await obstore.get_async(self._store, key)
            return bytes(await found.bytes_async())
        except (BaseError, OSError) as failed:
            raise _translated(failed, key) from failed

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        """The bytes in pieces; NotFound comes before the first of them."""
        try:
            found = await obstore.get_async(self._store, key)
            async for piece in found.stream(min_chunk_size=_READ_BYTES):
                yield bytes(piece)
        except (BaseError, OSError) as failed:
            raise _translated(failed, key) from failed

    async def delete(self, keys: Iterable[str]) -> None:
        """Delete what is there; a key that is not is no error."""
        wanted = list(keys)
        for start in range(0, len(wanted), _DELETE_AT_ONCE):
            try:
                await obstore.delete_async(self._store, wanted[start : start + _DELETE_AT_ONCE])
            except (NotFoundError, FileNotFoundError):
                await self._delete_one_by_one(wanted[start : start + _DELETE_AT_ONCE])
            except (BaseError, OSError) as failed:
                raise _translated(failed, wanted[start]) from failed

    async def days(self) -> list[str]:
        """The days (`YYYY-MM-DD`) that have blobs, in order."""
        try:
            listing = await obstore.list_with_delimiter_async(self._store)
        except (BaseError, OSError) as failed:
            raise _translated(failed, "") from failed
        return sorted(str(prefix).strip("/") for prefix in listing["common_prefixes"])

    async def keys_of(self, day: str) -> AsyncIterator[list[str]]:
        """The keys of one day, in batches."""
        try:
            async for batch in obstore.list(self._store, prefix=day, chunk_size=_DELETE_AT_ONCE):
                yield [str(entry["path"]) for entry in batch]
        except (BaseError, OSError) as failed:
            raise _translated(failed, day) from failed

    async def _delete_one_by_one(self, keys: list[str]) -> None:
        for key in keys:
            try:
                await obstore.delete_async(self._store, key)
            except (NotFoundError, FileNotFoundError):
                continue
            except (BaseError, OSError) as failed:
                raise _translated(failed, key) from failed

    async def _put(self, key: str, source: bytes | Path) -> None:
        folder = self._folder
        try:
            await obstore.put_async(self._store, key, source)
            if folder is not None:
                await asyncio.to_thread(_sync, folder, key)
        except (BaseError, OSError) as failed:
            raise _translated(failed, key) from failed


def _sync(folder: Path, key: str) -> None:
    """obstore renames a finished file into place but does not wait for the disk."""
    path = folder / key
    for target in (path, path.parent, folder):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _translated(failed: BaseException, key: str) -> NotFound | StoreUnavailable:
    if isinstance(failed, NotFoundError | FileNotFoundError):
        return NotFound(f"no blob {key}")
    return StoreUnavailable(f"the blob store failed: {type(failed).__name__}")
