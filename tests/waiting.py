"""Waiting for a condition instead of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def wait_until(
    condition: Callable[[], Any | Awaitable[Any]], timeout_s: float = 20, what: str = ""
) -> Any:
    """Return the first truthy value of `condition()`; fail after `timeout_s`, naming `what`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or condition}")
        await asyncio.sleep(0.005)


async def work_for(seconds: float) -> None:
    """Stands for work that takes its time, or for the pace of something repeated.

    Never to wait for something to happen: that is `wait_until`.
    """
    await asyncio.sleep(seconds)


def promised_s(seconds: float) -> float:
    """How long something may take that shall take no longer than `seconds`: five times that beside
    other tests, where it says that nobody waits for something else to end, and not how fast we are.
    """
    return seconds * 5 if "PYTEST_XDIST_WORKER" in os.environ else seconds
