"""Room for large bodies in a worker."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from tidegate.jobs.worker import Room


async def test_what_does_not_fit_waits_in_its_order() -> None:
    room, inside = Room(100), list[int]()

    async def go(number: int, size_bytes: int, leave: asyncio.Event) -> None:
        async with room.of(size_bytes):
            inside.append(number)
            await leave.wait()

    leaves = [asyncio.Event() for _ in range(4)]
    async with asyncio.TaskGroup() as tasks:
        for number, size_bytes in enumerate((60, 60, 10, 500)):
            tasks.create_task(go(number, size_bytes, leaves[number]))
        await _settled()
        assert inside == [0], "the small one would fit, and is behind one that does not"
        leaves[0].set()
        await _settled()
        assert inside == [0, 1, 2]
        leaves[1].set()
        await _settled()
        assert inside == [0, 1, 2], "what is larger by itself has all of it"
        leaves[2].set()
        await _settled()
        assert inside == [0, 1, 2, 3]
        leaves[3].set()


async def test_one_that_is_cancelled_leaves_no_trace() -> None:
    room = Room(100)
    async with AsyncExitStack() as first:
        await first.enter_async_context(room.of(100))
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), room.of(50):
                    pytest.fail("there was no room")
    async with asyncio.timeout(1), room.of(100):
        pass


async def _settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)
