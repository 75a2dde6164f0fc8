"""What the limiter does everywhere: the same short suite for every kind of server."""

from __future__ import annotations

import asyncio
import sys
from functools import partial

from tests.integration.limiter.makers import LIMIT, Body, Maker, quiet, until_used, until_waiting
from tests.waiting import wait_until, work_for
from tidegate.limiter.limiter import Limiter

BOUND = 2
HOLDER = """
import asyncio, sys
from tidegate.limiter import Limiter, PoolPolicy
from tests.integration.limiter.makers import LIMIT, LEASE_MS

async def main():
    policy = PoolPolicy({LIMIT: 2}, lease_ms=LEASE_MS)
    async with Limiter.from_url(sys.argv[1], pool=sys.argv[2], policy=policy) as limiter:
        async with limiter.acquire(LIMIT):
            print("held", flush=True)
            await asyncio.Event().wait()

asyncio.run(main())
"""


async def never_over(limiters: list[Limiter], bound: int, calls: int = 60) -> None:
    """All calls are made, as many at once as may be and never more."""
    running = peak = done = 0

    async def call(limiter: Limiter) -> None:
        nonlocal running, peak, done
        async with limiter.acquire(LIMIT):
            running += 1
            peak = max(peak, running)
            await work_for(0.002)
            running -= 1
            done += 1

    await asyncio.gather(*(call(limiters[n % len(limiters)]) for n in range(calls)))
    assert (peak, done) == (bound, calls)
    await until_used(limiters[0], 0)


async def a_killed_process_gives_back(url: str, pool: str, limiter: Limiter) -> None:
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDER, url, pool), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert await holder.stdout.readline() == b"held\n"
        await until_used(limiter, 1)
    finally:
        holder.kill()
    await holder.wait()
    await until_used(limiter, 0)


async def is_pushed(bound: int, one: Limiter, two: Limiter) -> None:
    """A freed permit reaches the other process by push: nothing is renewed for a minute.

    The first of three may come with the answer to a question that was under way.
    """
    await quiet(one, two)
    before = two._session.traffic.pushes
    for _ in range(3):
        fillers = [await Body(one).until_admitted() for _ in range(bound)]
        waiter = Body(two)
        await until_waiting(one, 1)
        await fillers[0].end()
        await waiter.until_admitted(2.0)
        for body in (*fillers[1:], waiter):
            await body.end()
        await until_used(one, 0)
    assert two._session.traffic.pushes - before >= 2


def renewed(limiter: Limiter) -> bool:
    assert limiter._heartbeat is not None
    return limiter._heartbeat.renewals > 1


async def works(url: str, maker: Maker) -> None:
    """The whole suite, over two limiters of one pool."""
    limiters = [await maker(url, BOUND) for _ in range(2)]
    await never_over(limiters, BOUND)
    await a_killed_process_gives_back(url, maker.pool, limiters[0])
    for limiter in limiters:
        await wait_until(partial(renewed, limiter), what="a heartbeat of its own")
    await is_pushed(BOUND, *limiters)
