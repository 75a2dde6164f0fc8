"""Processes under test: none outlives its block, whatever comes in between."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.waiting import wait_until
from tidegate.verify.processes import ProcessFamily

SLOW = "tests.integration.verify.slow_to_end"
# Its processes do not look for modules in the working folder.
PATHS = {"PYTHONPATH": str(Path(__file__).parents[3])}


async def test_a_block_that_is_cancelled_at_its_end_waits_for_its_processes() -> None:
    family = ProcessFamily("", SLOW)

    async def block() -> None:
        async with family:
            await family.start("slow", {}, PATHS)
            await wait_until(lambda: family.told("up"))

    running = asyncio.create_task(block())
    await wait_until(lambda: family.told("ending"))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert family.told("ended") == 1, "it was waited for, and not killed"
    assert family.names == []


async def test_a_killing_that_is_cancelled_is_done_at_the_end() -> None:
    family = ProcessFamily("", SLOW)

    async def block() -> None:
        async with family:
            await family.start("slow", {}, PATHS)
            await wait_until(lambda: family.told("up"))
            killing = asyncio.create_task(family.end("slow"))
            await wait_until(lambda: family.told("ending"))
            killing.cancel()
            await asyncio.wait({killing})
            assert killing.cancelled()

    await block()
    assert family.names == []
