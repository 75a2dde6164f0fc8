"""A process that is to take the place of another, as soon as it says that it is ready.

Invariant: one that has not taken it over is ended with the block, and its pipe is closed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

_READY_WITHIN_S = 60.0

Process = asyncio.subprocess.Process


class Successor:
    """`async with` starts it. `born`: the process and the end of its pipe that is read here."""

    def __init__(
        self,
        born: Awaitable[tuple[Process, int]],
        end: Callable[[Process], Awaitable[None]],
    ) -> None:
        self._born = born
        self._end = end
        self._process: Process | None = None
        self._pipe = -1

    async def __aenter__(self) -> Self:
        self._process, self._pipe = await self._born
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._pipe)
        if self._process is not None:
            await self._end(self._process)

    def taken_over(self) -> Process:
        """The process, for which the caller answers from now on."""
        assert self._process is not None
        process, self._process = self._process, None
        return process

    async def not_ready(self) -> str | None:
        """None once it is ready; why it is not, when it has ended or takes too long."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._pipe, readable.set)
        try:
            async with asyncio.timeout(_READY_WITHIN_S):
                await readable.wait()
        except TimeoutError:
            return f"not ready within {_READY_WITHIN_S:g} s"
        finally:
            loop.remove_reader(self._pipe)
        if os.read(self._pipe, 1):
            return None
        assert self._process is not None
        return f"ended with exit code {await self._process.wait()} at its start"
