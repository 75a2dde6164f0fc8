"""Waiting in a queue for as long as it is worth it."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Generic, TypeVar

from tidegate.demand import Demand
from tidegate.limiter import Permit
from tidegate.spine.routing import Gate

PermitT = TypeVar("PermitT", bound=Permit | None)


class NotWorthWaiting(Exception):
    """What the call needs was paused while it waited: for longer than it may wait, or so that it
    must be asked for again."""


class Patience(Generic[PermitT]):
    """An admission that is left as soon as a pause outlasts the call's deadline.

    Entering it raises NotWorthWaiting then, beside what the admission raises; also where the call
    was admitted after something else that binds it was paused: the permit has spent nothing.
    Cancelled, it leaves the queue, as the admission does.
    """

    def __init__(
        self,
        admission: AbstractAsyncContextManager[PermitT],
        gate: Gate,
        demand: Demand,
        model: str,
        left_ms: float,
    ) -> None:
        self._admission = admission
        self._gate = gate
        self._demand = demand
        self._model = model
        self._until = time.monotonic() + left_ms / 1000
        self._waiting = asyncio.timeout(None)
        self._leaves = False

    async def __aenter__(self) -> PermitT:
        try:
            async with self._waiting:
                with self._gate.limiter.told_of_pauses(self._paused):
                    permit = await self._admission.__aenter__()
        except TimeoutError as error:
            if not self._leaves:
                raise
            raise NotWorthWaiting from error
        if not self._gate.binds_more(self._demand, self._model):
            return permit
        if permit is not None:
            permit.settle("ignored", tokens=0, images=0)
        await self._admission.__aexit__(None, None, None)
        raise NotWorthWaiting

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return await self._admission.__aexit__(kind, error, trace)

    def _paused(self) -> None:
        if self._leaves:
            return
        gate, left_ms = self._gate, (self._until - time.monotonic()) * 1000
        if gate.late(gate.bind(self._demand, self._model), max(0.0, left_ms)) is not None:
            self._leaves = True
            self._waiting.reschedule(0)
