"""Many calls that end in every way at once: nothing over, nothing left."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Callable
from random import Random

from tests.integration.library.http_clients import CLIENT_ERRORS, Http
from tests.integration.library.makers import LIMIT, MakeLimiter, ask, held, stream, waiting, whole
from tests.waiting import wait_until, work_for
from tidegate.emulator.server import Emulator
from tidegate.errors import DeadlineExceeded
from tidegate.limiter import Demand

CALLS = 150


class Storm:
    """Calls of one client in random ways. `ends` counts how they ended."""

    def __init__(self, http: Http, emulator: Emulator, dice: Random) -> None:
        self._http = http
        self._url = emulator.url
        self._dice = dice
        self.ends: Counter[str] = Counter()

    async def call(self, number: int) -> None:
        way = self._dice.choice(["whole", "stream", "close", "some", "cancel", "cancel"])
        task = asyncio.create_task(self._call(way, number))
        if way == "cancel":
            await work_for(self._dice.uniform(0, 0.15))
            task.cancel()
        try:
            await task
            self.ends[way] += 1
        except asyncio.CancelledError:
            self.ends["cancelled"] += 1
        except CLIENT_ERRORS:
            self.ends["failed"] += 1
        except DeadlineExceeded:
            self.ends["late"] += 1

    async def _call(self, way: str, number: int) -> None:
        url = whole(self._url) if way == "whole" else stream(self._url)
        answer = await self._http.send("POST", url, ask(f"call {number}"))
        try:
            if way == "some":
                async for _ in answer.chunks():
                    break
            elif way != "close":
                await answer.read()
        finally:
            await answer.close()


async def test_calls_that_end_in_every_way_are_never_over_and_leave_nothing(
    make_limiter: MakeLimiter,
    make_http: Callable[..., Http],
    emulator: Emulator,
) -> None:
    dice = Random(random.randrange(10**9))  # by the seed that pytest-randomly prints
    limiters = [await make_limiter(3) for _ in range(2)]
    demands = [Demand((LIMIT,), deadline_ms=400), Demand((LIMIT,), hard_ms=30_000)]
    storms = [
        Storm(make_http(limiter, lambda _: dice.choice(demands)), emulator, dice)
        for limiter in limiters
    ]
    await emulator.control.set_behaviour(first_byte_ms={"uniform": [0, 8]}, between_ms=1)
    for fault in ("cut", "cut_mid_stream", "unavailable"):
        await emulator.control.set_fault(fault, probability=0.06)
    await asyncio.gather(*(storms[number % 2].call(number) for number in range(CALLS)))

    ends = storms[0].ends + storms[1].ends
    assert sum(ends.values()) == CALLS
    assert {"whole", "stream", "close", "some", "cancelled", "failed"} <= set(ends), ends
    await wait_until(lambda: gc.collect() >= 0 and not any(map(held, limiters)))
    assert not any(map(waiting, limiters))
    stats = await emulator.control.stats()
    assert (stats["text_only"].over, stats.max_in_flight) == (0, 3)

    async def nothing_left() -> bool:
        seen = (await limiters[0].snapshot()).limits[LIMIT]
        return (seen.used, seen.waiting, (await emulator.control.stats()).in_flight) == (0, 0, 0)

    await wait_until(nothing_left)
