"""The bars of latencies, which are round trips to Valkey."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

from tidegate.verify.plan import BATON, Report
from tidegate.verify.promises import measure

_BUSY_S = 0.02


class Busy:
    """A limiter of one permit on a machine that becomes busy in the middle of a verification."""

    calls = 0
    waiting: Counter[str]
    baton: asyncio.Lock

    @classmethod
    async def answers(cls) -> None:
        cls.calls += 1
        if cls.calls > 4:
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), _BUSY_S)

    async def ping(self, _timeout_ms: int) -> None:
        await self.answers()

    @asynccontextmanager
    async def acquire(self, limit: str, **_: Any) -> AsyncIterator[None]:
        await self.answers()
        if limit != BATON:
            yield
            return
        self.waiting[BATON] += 1
        async with self.baton:
            self.waiting[BATON] -= 1
            yield

    def local_state(self) -> Any:
        return SimpleNamespace(waiting=self.waiting)


async def test_a_machine_that_becomes_busy_slows_down_the_bar_too() -> None:
    Busy.waiting, Busy.baton = Counter(), asyncio.Lock()
    report, limiter = Report(), Busy()
    await measure(limiter, limiter, 4, report)  # type: ignore[arg-type]
    assert not report.broken, report.results
