"""The bodies of wrapped calls as a worker holds them: read when they are to be called.

Invariant: of large ones, which are files, a worker holds a bounded amount for each type of job.
Those that find no room wait in the blob store, and no longer than for their deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tidegate.call import Kind
from tidegate.errors import DeadlineExceeded, NotFound
from tidegate.jobs.ends import time_left_ms
from tidegate.store.blobs import Blobs
from tidegate.store.records import ClaimedJob


class Room:
    """For `most_bytes` at once. What is larger by itself is let in alone; all in their order."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held_bytes = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def of(self, size_bytes: int) -> AsyncIterator[None]:
        """Wait for so much of it, and have it inside of the block. Cancelling is safe."""
        async with self._turn:
            while self._held_bytes and self._held_bytes + size_bytes > self._most_bytes:
                self._freed.clear()
                await self._freed.wait()
            self._held_bytes += size_bytes
        try:
            yield
        finally:
            self._held_bytes -= size_bytes
            self._freed.set()


class CallBodies:
    """Of all wrapped calls that a worker makes."""

    def __init__(self, blobs: Blobs, most_bytes: int) -> None:
        self._blobs = blobs
        # Each its own: the calls of one type may be held up for long.
        self._rooms = {kind: Room(most_bytes // len(Kind)) for kind in Kind}

    @asynccontextmanager
    async def of(self, job: ClaimedJob, kind: Kind) -> AsyncIterator[bytes]:
        """The body, for as long as the block lasts. Raises DeadlineExceeded, StoreUnavailable, and
        NotFound where its bytes are gone."""
        if not job.attachments:
            yield job.prompt.encode()
            return
        (kept,) = job.attachments
        left_ms = time_left_ms(job)
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(None if left_ms is None else left_ms / 1000):
                    await held.enter_async_context(self._rooms[kind].of(kept.size_bytes))
            except TimeoutError:
                said = "its deadline came while it waited for room for its body"
                raise DeadlineExceeded(said, limit=kind.limit) from None
            try:
                body = await self._blobs.get(kept.blob_key)
            except NotFound:
                raise NotFound("the body of this call is not there any more") from None
            yield body
