"""Claiming the lines of batches while their upstream is out."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from tests.waiting import wait_until
from tidegate.errors import UpstreamThrottled
from tidegate.jobs.batches import LineCaller
from tidegate.jobs.calls import LastTries
from tidegate.jobs.outages import Held, Outages, Turn


class Lines:
    """Of no batch."""

    def __init__(self) -> None:
        self.claims = 0

    async def held_up(self) -> frozenset[Any]:
        return frozenset()

    async def claim(self, limit: int, most_bytes: int) -> list[Any]:
        self.claims += 1
        await asyncio.sleep(0)
        return []


async def a_batch_is_open() -> bool:
    return True


async def test_a_process_without_lines_looks_once_for_a_probe_and_waits() -> None:
    now = [1000.0]
    outages = Outages({"gemini"}, clock=lambda: now[0])
    refused = UpstreamThrottled("later", retry_after_ms=1)
    outages.ended(Turn([("gemini", "")]), "gemini", refused)
    now[0] += 60
    assert outages.may_claim(100) == 1, "the next probe is due"
    outages.unclaimed()
    lines, waits = Lines(), asyncio.Event()

    async def wait_work(*_: object) -> None:
        waits.set()
        await asyncio.Event().wait()

    notifications = SimpleNamespace(work_mark=lambda _: 0, wait_work=wait_work)
    open_batches = SimpleNamespace(ours=a_batch_is_open)
    store = SimpleNamespace(
        batch_lines=lines, notifications=notifications, open_batches=open_batches
    )
    caller = LineCaller(*cast(Any, (None, store, None, Held(outages, {}), LastTries())))
    feeding = asyncio.create_task(caller.feed())
    try:
        await wait_until(lambda: waits.is_set() or lines.claims > 50, 20, "it waits for work")
    finally:
        feeding.cancel()
    assert lines.claims == 1
