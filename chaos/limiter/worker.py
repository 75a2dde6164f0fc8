"""One process under test: many tasks that acquire, make a call of a fixed length, and release.

`python -m chaos.limiter.worker '{"url": ..., "pool": ..., "truth": port, ...}'`
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
from dataclasses import dataclass
from typing import Any

from chaos.limiter.truth import Caller
from tidegate.errors import AdmissionError, LeaseLost
from tidegate.limiter import Limiter, PoolPolicy

LIMIT = "kind:text_only"


@dataclass(frozen=True, slots=True)
class Orders:
    """What a worker is told. `storm` cancels that share of all waits and calls at random."""

    url: str
    pool: str
    truth: int
    name: str
    limit: int = 5
    lease_ms: int = 500
    tasks: int = 20
    call_ms: float = 20.0
    hard_ms: int = 2000
    when_away: str = "closed"
    on_lost: str = "finish"
    on_expiry: str = "reuse"
    storm: float = 0.0


def policy_of(orders: Orders) -> PoolPolicy:
    fields: dict[str, Any] = {
        "when_away": orders.when_away,
        "on_lost": orders.on_lost,
        "on_expiry": orders.on_expiry,
    }
    return PoolPolicy({LIMIT: orders.limit}, lease_ms=orders.lease_ms, **fields)


async def call(limiter: Limiter, caller: Caller, orders: Orders) -> None:
    async with limiter.acquire(LIMIT, hard_ms=orders.hard_ms):
        opened = asyncio.ensure_future(caller.say("+"))
        try:
            await asyncio.shield(opened)
            await asyncio.sleep(orders.call_ms / 1000)
        finally:
            await asyncio.shield(asyncio.ensure_future(close(caller, opened)))


async def close(caller: Caller, opened: asyncio.Future[None]) -> None:
    await opened
    await caller.say("-")


async def loop_for_ever(limiter: Limiter, caller: Caller, orders: Orders) -> None:
    chance = random.Random()
    while True:
        try:
            if chance.random() < orders.storm:
                async with asyncio.timeout(chance.random() * orders.call_ms / 500):
                    await call(limiter, caller, orders)
            else:
                await call(limiter, caller, orders)
        except LeaseLost:
            await caller.say("L")
        except (AdmissionError, TimeoutError):
            continue


async def main(orders: Orders) -> None:
    me = asyncio.current_task()
    assert me is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, me.cancel)
    caller = await Caller.connect(orders.truth, orders.name)
    limiter = Limiter.from_url(orders.url, pool=orders.pool, policy=policy_of(orders))
    listening = asyncio.create_task(caller.listen())  # to the end: closing a call needs it
    async with limiter, asyncio.TaskGroup() as group:
        for _ in range(orders.tasks):
            group.create_task(loop_for_ever(limiter, caller, orders))
    listening.cancel()


if __name__ == "__main__":
    with contextlib.suppress(asyncio.CancelledError):  # SIGTERM: an orderly end
        asyncio.run(main(Orders(**json.loads(sys.argv[1]))))
