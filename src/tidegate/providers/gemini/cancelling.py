"""Cancelling code that is not safe to cancel twice.

httpcore2 tidies up after a cancellation inside anyio's shielded scopes, which hold off anyio's
cancellations but not asyncio's `Task.cancel`: a second one (a client leaves, then a timeout or a
shutdown) would stop it half-way, with the socket open and the pool believing it in use. Invariant:
work started here is cancelled at most once, and has ended when we return.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Finish `work` even if the caller is cancelled meanwhile, then let the cancellation go on."""
    task = asyncio.ensure_future(work)
    interrupted = await _ended(task)
    if interrupted is not None:
        raise interrupted
    task.result()


async def cancelled_once(
    work: Coroutine[Any, Any, T], discard: Callable[[T], Awaitable[None]] | None = None
) -> T:
    """Await `work` in a task of its own, which sees at most one of the caller's cancellations.

    A result that came too late for a cancelled caller is given to `discard`.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,))
    except asyncio.CancelledError:
        task.cancel()
        await _ended(task)
        if discard is not None and not task.cancelled() and task.exception() is None:
            await uninterrupted(_discarded(discard, task.result()))
        raise
    return task.result()


async def _discarded(discard: Callable[[T], Awaitable[None]], result: T) -> None:
    await discard(result)


async def _ended(task: asyncio.Task[Any]) -> asyncio.CancelledError | None:
    """Wait for the task's end, whatever happens to us; the last cancellation meant for us."""
    interrupted: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as cancelled:
            interrupted = cancelled
    if not task.cancelled():
        task.exception()  # seen: no complaint about an exception that was never retrieved
    return interrupted
