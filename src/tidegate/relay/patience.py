"""Waiting in a queue for as long as it is worth it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from tidegate.limiter import Limiter, Permit
from tidegate.relay.call import NativeCall


class NotWorthWaiting(Exception):
    """While a call waited, one of its limits was paused for longer than the call may wait."""


class Patience:
    """An admission that is left as soon as a pause outlasts the call's deadline.

    Entering it raises NotWorthWaiting then, beside what the admission raises. Cancelled, it leaves
    the queue, as the admission does.
    """

    def __init__(
        self,
        admission: AbstractAsyncContextManager[Permit | None],
        limiter: Limiter,
        limits: Sequence[str],
        call: NativeCall,
    ) -> None:
        self._admission = admission
        self._limiter = limiter
        self._limits = limits
        self._call = call
        self._waiting = asyncio.timeout(None)
        self._leaves = False

    async def __aenter__(self) -> Permit | None:
        try:
            async with self._waiting:
                with self._limiter.told_of_pauses(self._paused):
                    return await self._admission.__aenter__()
        except TimeoutError as error:
            if not self._leaves:
                raise
            raise NotWorthWaiting from error

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return await self._admission.__aexit__(kind, error, trace)

    def _paused(self) -> None:
        if not self._leaves and self._limiter.paused_ms(self._limits) > self._call.left_ms():
            self._leaves = True
            self._waiting.reschedule(0)
