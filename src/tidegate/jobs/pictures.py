"""The pictures of a job's answer, kept in the blob store before the answer is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime

from tidegate.call import Media, new_id
from tidegate.errors import StoreUnavailable
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.records import OutputFile

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 4.0


async def kept(blobs: Blobs, pictures: Iterable[Media]) -> tuple[OutputFile, ...]:
    """Pictures as the files of a record. Raises StoreUnavailable when the blob store stays away for
    long."""
    files = []
    for picture in pictures:
        key = await _put(blobs, picture.data)
        kind, data = picture.mime_type, picture.data
        files.append(OutputFile(new_id(), kind, len(data), key, picture.name))
    return tuple(files)


async def _put(blobs: Blobs, data: bytes) -> str:
    pause_s = _FIRST_PAUSE_S
    while True:
        key = new_key(datetime.now(UTC))
        try:
            await blobs.put(key, data)
            return key
        except StoreUnavailable:
            if pause_s > _LONGEST_PAUSE_S:
                raise
        await asyncio.sleep(pause_s)
        pause_s *= 2
