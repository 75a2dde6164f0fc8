"""`python bench/limiter.py`: what the limiter costs, against a bare EVALSHA in the same run.

Starts a Valkey of its own. Ratios are comparable between machines, microseconds are not.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import time
from pathlib import Path

import redis.asyncio

from chaos.limiter.fleet import Fleet
from chaos.limiter.truth import Truth
from chaos.limiter.worker import Orders
from tests.waiting import wait_until
from tidegate.embedded.valkey import ValkeyServer
from tidegate.limiter import Limiter, PoolPolicy
from tidegate.limiter.scripts import Script

LIMIT = "kind:text_only"
ROUNDS = 2000


async def uncontended(url: str) -> None:
    """Acquire and release of one task, against `EVALSHA return 1` over the same connection class
    and over redis-py's client."""
    source = b"return 1"
    floor = Script("floor", source, hashlib.sha1(source, usedforsecurity=False).hexdigest(), {})
    policy = PoolPolicy({LIMIT: 5})
    client = redis.asyncio.Redis.from_url(url)
    best: dict[str, float] = {}
    async with Limiter.from_url(url, pool="bench", policy=policy) as limiter:
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(ROUNDS):
                async with limiter.acquire(LIMIT):
                    pass
            took = {"acquire+release": time.perf_counter() - began}
            began = time.perf_counter()
            for _ in range(ROUNDS):
                await limiter._link.run(floor, (), b"", 1.0)
            took["bare EVALSHA, our link"] = time.perf_counter() - began
            began = time.perf_counter()
            for _ in range(ROUNDS):
                await client.evalsha(floor.sha, 0)
            took["bare EVALSHA, redis-py"] = time.perf_counter() - began
            best = {name: min(best.get(name, 9e9), value) for name, value in took.items()}
    await client.aclose()
    for name, value in best.items():
        ratio = best["acquire+release"] / value
        print(f"{name}: {value / ROUNDS * 1e6:.0f} us (acquire+release is {ratio:.2f} of it)")


async def contended(url: str, bound: int, call_ms: float, seconds: float) -> None:
    """Four processes with eight times as many tasks as permits: share of permit-seconds used."""
    truth = Truth()
    await truth.start()
    client = redis.asyncio.Redis.from_url(url)
    async with Fleet() as fleet:
        for number in range(4):
            orders = Orders(
                url, f"bench-{bound}-{call_ms}", truth.port, f"w{number}", limit=bound,
                lease_ms=3000, tasks=2 * bound, call_ms=call_ms,
            )  # fmt: skip
            fleet.start(orders)
        await wait_until(lambda: truth.total >= 20 * bound, 30.0, "warm workers")
        await client.config_resetstat()
        before, used_s, began = truth.total, truth.used_s(), time.perf_counter()
        await asyncio.sleep(seconds)
        calls, took = truth.total - before, time.perf_counter() - began
        used_s = truth.used_s() - used_s
        stats = await client.info("commandstats")
    await client.aclose()
    await truth.stop()
    script = stats["cmdstat_evalsha"]
    print(
        f"limit {bound}, {call_ms:.0f} ms calls: {used_s / took / bound:.1%} used, "
        f"at most {truth.peak}, {script['calls'] / calls:.2f} script calls and "
        f"{script['usec'] / calls:.0f} us of Valkey per admission"
    )


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        valkey = ValkeyServer(Path(folder))
        valkey.start()
        try:
            await uncontended(valkey.url)
            for bound, call_ms in ((5, 20.0), (5, 200.0), (50, 20.0), (50, 200.0)):
                await contended(valkey.url, bound, call_ms, 6.0)
        finally:
            valkey.stop()


if __name__ == "__main__":
    asyncio.run(main())
