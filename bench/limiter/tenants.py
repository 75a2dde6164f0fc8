"""Many tenants with limits of their own: how long one call has Valkey, and one question the loop.

A server of its own, one process that joins with the policy, and one on the event loop with calls
of a thousand tenants, each with one that runs and one that waits. Valkey's slow log says how long
each script worked; the loop's own clock says how late it came back.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis.asyncio
import uvloop

from bench.limiter.trace import quantile
from tidegate.embedded.servers import ValkeyServer
from tidegate.limiter import Limit, Limiter, Observer, PoolPolicy, Rate, State
from tidegate.limiter.simulation import load

TENANTS = 10_000
BUSY = 1000
CALL_S = 1.0
TICK_S = 0.001
LEASE_MS = 3000


def policy(tenants: int) -> PoolPolicy:
    """A concurrency and a rate for each."""
    limits: dict[str, int | Limit] = {}
    for number in range(tenants):
        limits[f"tenant:{number}"] = 1
        limits[f"rpm:{number}"] = Rate(60, 60_000)
    return PoolPolicy(limits, lease_ms=LEASE_MS)


class _Up(Observer):
    def __init__(self) -> None:
        self.reached = asyncio.Event()

    def state_changed(self, old: State, new: State) -> None:
        if new == "up":
            self.reached.set()


async def _calls(limiter: Limiter, tenant: str) -> None:
    while True:
        async with limiter.acquire(f"tenant:{tenant}", f"rpm:{tenant}", tenant=tenant):
            await asyncio.sleep(CALL_S)


async def _lateness(late_ms: list[float]) -> None:
    while True:
        due_s = time.perf_counter() + TICK_S
        await asyncio.sleep(TICK_S)
        late_ms.append((time.perf_counter() - due_s) * 1000)


async def _run(url: str, seconds: float, tenants: int) -> dict[str, float | None]:
    server: Any = redis.asyncio.Redis.from_url(url)
    await server.config_set("slowlog-max-len", 100_000)
    made, up = policy(tenants), _Up()
    async with (
        Limiter(url, pool="tenants", policy=made, observer=up) as limiter,
        Limiter(url, pool="tenants", policy=made),
    ):
        await up.reached.wait()
        tasks = [
            asyncio.create_task(_calls(limiter, str(number)))
            for number in range(BUSY)
            for _ in range(2)
        ]
        # Beyond the first comparisons, in which every process learns what all have spent.
        await asyncio.sleep(2 * LEASE_MS / 1000)
        await server.config_set("slowlog-log-slower-than", 0)
        late_ms: list[float] = []
        tasks.append(asyncio.create_task(_lateness(late_ms)))
        asked_ms = []
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            before_s = time.perf_counter()
            limiter.local_state()
            asked_ms.append((time.perf_counter() - before_s) * 1000)
            await asyncio.sleep(0.05)
        waiting = limiter.waiters
        log = await server.slowlog_get(100_000)
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
    await server.aclose()
    worked_ms: dict[str, list[float]] = {"tend": [], "sync": []}
    for entry in log:
        for name in ("tend", "sync"):
            if entry["command"].split()[1:2] == [load(name).sha.encode()]:
                worked_ms[name].append(entry["duration"] / 1000)
    for found in (*worked_ms.values(), late_ms):
        found.sort()
    return {
        "tend_p50_ms": quantile(worked_ms["tend"], 0.5),
        "tend_p99_ms": quantile(worked_ms["tend"], 0.99),
        "tend_max_ms": max(worked_ms["tend"]),
        "tends": len(worked_ms["tend"]),
        "sync_p99_ms": quantile(worked_ms["sync"], 0.99),
        "local_state_max_ms": max(asked_ms),
        "loop_late_p99_ms": quantile(late_ms, 0.99),
        "waiting": waiting,
    }


def measure(seconds: float, tenants: int = TENANTS) -> dict[str, float | None]:
    """The figures of so many tenants."""
    with tempfile.TemporaryDirectory() as folder:
        valkey = ValkeyServer(Path(folder))
        valkey.start()
        try:
            return uvloop.run(_run(valkey.url, seconds, tenants))
        finally:
            valkey.stop()
