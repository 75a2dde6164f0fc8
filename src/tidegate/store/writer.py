"""Group commit: writes that arrive while a transaction is under way share the next one.

Invariant: every write gets exactly one answer; a bad row fails alone. There is no timer: the next
batch leaves when the one before it has returned.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from tidegate.errors import StoreUnavailable

Row = TypeVar("Row")
Result = TypeVar("Result")

MAX_ROWS = 500
MAX_BATCH_BYTES = 8_000_000
MAX_WAITING = 20_000


class GroupWriter(Generic[Row, Result]):
    """Hands batches to `commit`, which answers one result, or one exception, per row.

    `size_of` gives the bytes of a row, so that a batch stays bounded.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Row]], Awaitable[Sequence[Result | Exception]]],
        size_of: Callable[[Row], int],
    ) -> None:
        self._commit = commit
        self._size_of = size_of
        self._waiting: deque[tuple[Row, asyncio.Future[Result]]] = deque()
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def write(self, row: Row) -> Result:
        """Wait until `row` is committed. A cancelled caller's row may still be written."""
        if len(self._waiting) >= MAX_WAITING:
            raise StoreUnavailable("too many writes are waiting for PostgreSQL")
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, future))
        if self._task is None:
            self._task = asyncio.create_task(self._drain())
        return await future

    async def aclose(self) -> None:
        """Wait for what is waiting; each batch has its own deadline."""
        while self._task is not None:
            await asyncio.wait({self._task})

    async def _drain(self) -> None:
        try:
            while self._waiting:
                await self._settle(self._next())
        finally:
            self._task = None

    def _next(self) -> list[tuple[Row, asyncio.Future[Result]]]:
        batch: list[tuple[Row, asyncio.Future[Result]]] = []
        size_bytes = 0
        while self._waiting and len(batch) < MAX_ROWS and size_bytes < MAX_BATCH_BYTES:
            batch.append(self._waiting.popleft())
            size_bytes += self._size_of(batch[-1][0])
        return batch

    async def _settle(self, batch: list[tuple[Row, asyncio.Future[Result]]]) -> None:
        results: Sequence[Result | Exception]
        try:
            results = await self._commit([row for row, _ in batch])
        except StoreUnavailable as away:
            results = [StoreUnavailable(away.message) for _ in batch]
        except Exception as failed:  # noqa: BLE001 -- handed to the caller whose row it is
            if len(batch) > 1:
                for pair in batch:
                    await self._settle([pair])
                return
            results = [failed]
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
