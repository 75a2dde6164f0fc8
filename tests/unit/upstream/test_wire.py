"""Closing that no cancellation interrupts."""

from __future__ import annotations

import asyncio

import pytest

from tidegate.upstream.gemini_transport import uninterrupted


async def test_work_is_finished_however_often_the_caller_is_cancelled() -> None:
    begun, may_end, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def close() -> None:
        begun.set()
        await may_end.wait()
        ended.set()

    task = asyncio.create_task(uninterrupted(close()))
    await begun.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_an_error_of_the_work_comes_out() -> None:
    async def close() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        await uninterrupted(close())
