"""Waiting for what may not come: that it did not is a result, not an error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable

_POLL_S = 0.02


async def until(condition: Callable[[], bool | Awaitable[bool]], within_s: float) -> bool:
    """Whether it came to hold in time."""
    end_s = time.monotonic() + within_s
    while True:
        holds = condition()
        if isawaitable(holds):
            holds = await holds
        if holds or time.monotonic() > end_s:
            return bool(holds)
        await asyncio.sleep(_POLL_S)
