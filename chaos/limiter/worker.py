"""One process under test: many tasks that acquire, make a call of a fixed length, and release.

`python -m chaos.limiter.worker '{"url": ..., "pool": ..., "truth": port, ...}'`

SIGTERM ends it in good order. SIGUSR1 blocks its event loop for `block_ms`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from chaos.limiter.truth import Caller
from tidegate.errors import AdmissionError, LeaseLost
from tidegate.limiter import Band, Limit, Limiter, PoolPolicy, Rate

LIMIT = "kind:text_only"


@dataclass(frozen=True, slots=True)
class Orders:
    """What a worker is told. `storm` cancels that share of all waits and calls at random.

    truth: a port of loopback, or the path of a Unix socket. history: tell the truth who asked for
    what. limits: besides `LIMIT`, a number or `["rate", bound, window_ms, unit]` each. demands:
    what the tasks ask for, each `{"limits": [...]}` and perhaps tenant, priority and tokens; task i
    asks for the i-th, and they begin anew when they are used up. Without any, all ask for `LIMIT`,
    as one of `tenants`. policy: further fields of the pool's. spread_ms: over so long the tasks
    begin, each at a moment chosen by chance.
    """

    url: str
    pool: str
    truth: int | str
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
    history: bool = False
    tenants: Sequence[str] = ("default",)
    stalled_s: float = 30.0
    block_ms: float = 0.0
    spread_ms: float = 0.0
    limits: dict[str, Any] = field(default_factory=dict)
    demands: Sequence[dict[str, Any]] = ()
    policy: dict[str, Any] = field(default_factory=dict)


def policy_of(orders: Orders) -> PoolPolicy:
    fields: dict[str, Any] = {
        "when_away": orders.when_away,
        "on_lost": orders.on_lost,
        "on_expiry": orders.on_expiry,
        **orders.policy,
    }
    if "bands" in fields:
        fields["bands"] = tuple(Band(*band) for band in fields["bands"])
    limits = {LIMIT: orders.limit, **{name: _limit(spec) for name, spec in orders.limits.items()}}
    return PoolPolicy(limits, lease_ms=orders.lease_ms, **fields)


def _limit(spec: Any) -> int | Limit:
    return spec if isinstance(spec, int) else Rate(*spec[1:])


def demands_of(orders: Orders) -> list[dict[str, Any]]:
    return list(orders.demands) or [{"limits": [LIMIT], "tenant": one} for one in orders.tenants]


class Tasks:
    """The tasks of one process. Every call is open at the truth for less time than its permit."""

    def __init__(self, limiter: Limiter, caller: Caller, orders: Orders) -> None:
        self._limiter = limiter
        self._caller = caller
        self._orders = orders
        self._calls = count(1)

    async def loop_for_ever(self, demand: dict[str, Any]) -> None:
        chance, orders = random.Random(), self._orders
        await asyncio.sleep(chance.random() * orders.spread_ms / 1000)
        while True:
            try:
                if chance.random() < orders.storm:
                    async with asyncio.timeout(chance.random() * orders.call_ms / 500):
                        await self._call(demand)
                else:
                    await self._call(demand)
            except LeaseLost:
                await self._tell("L")
            except (AdmissionError, TimeoutError):
                continue

    async def _call(self, demand: dict[str, Any]) -> None:
        orders, number = self._orders, next(self._calls)
        begun: asyncio.Future[None] | None = None
        limits, wanted = demand["limits"], {"tenant": "default", **demand}
        del wanted["limits"]
        if orders.history:
            tokens, priority = wanted.get("tokens", 0), wanted.get("priority", "-")
            self._tell(f"?{number} {wanted['tenant']} {tokens} {priority} {','.join(limits)}")
        try:
            acquisition = self._limiter.acquire(*limits, hard_ms=orders.hard_ms, **wanted)
            async with acquisition as permit:
                await permit.confirm()
                begun = self._tell(f"+{number} {permit.fence[0]}")
                try:
                    await asyncio.shield(begun)
                    await asyncio.sleep(orders.call_ms / 1000)
                finally:
                    await _undisturbed(asyncio.ensure_future(self._close(number, begun)))
        finally:
            if begun is None and orders.history:
                self._tell(f"!{number}")

    async def _close(self, number: int, begun: asyncio.Future[None]) -> None:
        await begun
        await self._tell(f"-{number}")

    def _tell(self, message: str) -> asyncio.Future[None]:
        return self._caller.tell(f"{message}\n" if self._orders.history else message[0])


async def _undisturbed(closing: asyncio.Future[None]) -> None:
    """Wait for it through every cancellation: the permit must outlive the call."""
    cancelled: asyncio.CancelledError | None = None
    while not closing.done():
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _end_without_truth(listening: asyncio.Future[None]) -> None:
    if not listening.cancelled():
        os._exit(3)


async def main(orders: Orders) -> None:
    me = asyncio.current_task()
    assert me is not None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, me.cancel)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    # What a library that never yields does to the loop; threads go on.
    loop.add_signal_handler(signal.SIGUSR1, time.sleep, orders.block_ms / 1000)
    caller = await Caller.connect(orders.truth, orders.name, history=orders.history)
    policy = policy_of(orders)
    limiter = Limiter(
        orders.url,
        pool=orders.pool,
        policy=policy,
        on_conflict="keep",
        stalled_s=orders.stalled_s,
    )
    listening = asyncio.create_task(caller.listen())  # to the end: closing a call needs it
    listening.add_done_callback(_end_without_truth)
    tasks = Tasks(limiter, caller, orders)
    async with limiter, asyncio.TaskGroup() as group:
        demands = demands_of(orders)
        for number in range(orders.tasks):
            group.create_task(tasks.loop_for_ever(demands[number % len(demands)]))
    listening.cancel()


if __name__ == "__main__":
    with contextlib.suppress(asyncio.CancelledError):  # SIGTERM: an orderly end
        asyncio.run(main(Orders(**json.loads(sys.argv[1]))))
