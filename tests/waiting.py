"""Waiting for a condition instead of sleeping, and for no midnight."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

_SHORTEST_S, _LONGEST_S = 0.005, 0.25
_CHEAP_S = 0.00125
_TURN_S = 0.01


async def wait_until(
    condition: Callable[[], Any | Awaitable[Any]], timeout_s: float = 20, what: str = ""
) -> Any:
    """Return the first truthy value of `condition()`; fail after `timeout_s`, naming `what`.

    It is asked every 5 ms, then every 25 ms; what is dear to ask, such as a server, after twenty
    times what asking took, and never later than a twentieth of the time that it has taken: who
    waits for seconds leaves the processor to what it waits for.
    """
    began = time.monotonic()
    while True:
        asked = time.monotonic()
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        now = time.monotonic()
        if now - began > timeout_s:
            raise AssertionError(f"not within {timeout_s} s: {what or condition}")
        dear_s = min(20 * max(now - asked, _CHEAP_S), _LONGEST_S)
        await asyncio.sleep(max(_SHORTEST_S, min((now - began) / 20, dear_s)))


async def wait_turns(
    condition: Callable[[], Any | Awaitable[Any]], most: int = 25, what: str = ""
) -> None:
    """Fail unless `condition()` holds within `most` turns of this event loop, 10 ms apart.

    For what one loop does without a wait for anything else. A product that waits for a timer of
    half a second is seen to take fifty turns; on a machine that stalls there are fewer turns in a
    second, and what is to be done takes as many as before.
    """
    for _ in range(most):
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return
        await asyncio.sleep(_TURN_S)
    raise AssertionError(f"not within {most} turns: {what or condition}")


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


def where_it_is(hour: int) -> str:
    """A time zone in which it is that hour of the day now: its midnight is so far away."""
    west = (datetime.now(UTC).hour - hour) % 24
    return f"Etc/GMT{west if west <= 12 else west - 24:+d}"
