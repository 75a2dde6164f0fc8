"""Removing what a verification left in Valkey, also where that is slow or Ctrl-C comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from tidegate.errors import TidegateError
from tidegate.verify.promises import Report

_WITHIN_S = 15.0
_PAUSE_S = 0.2


async def finish(work: Coroutine[Any, Any, object]) -> None:
    """Await it to its end, even where Ctrl-C comes meanwhile; the cancellation goes on then."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


async def clean_pool(remove: Callable[[], Awaitable[object]], pool: str, report: Report) -> None:
    """Call `remove` until it has worked, for some time; then the report says what is left."""
    end_s = time.monotonic() + _WITHIN_S
    while True:
        try:
            await remove()
            return
        except TidegateError as away:
            if time.monotonic() > end_s:
                report.left.append(f"keys of the pool {pool}: {away.message}")
                return
        await asyncio.sleep(_PAUSE_S)
