"""How true the estimated time is that a waiting call is told, under steady load.

    python -m bench.waits [--seconds 60] [--only concurrency] [--spread 0.5]

Callers in a closed loop fill a limit of a Valkey of its own; each asks once, at a random moment of
its wait, for its place. A told time counts as true within 25 % of the time that it then waited, or
within 2 s. Durations of calls are drawn from a gamma distribution; `--spread` is their standard
deviation over their mean. With 1 (an exponential distribution) the order itself is that uncertain:
tenants share by time of use, so that a dozen calls of one tenant come 29 % early or late.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tidegate.embedded.servers import ValkeyServer
from tidegate.errors import DeadlineExceeded
from tidegate.limiter import Limit, Limiter, PoolPolicy, Rate, Tokens

SHARE, SLACK_MS = 0.25, 2_000
WARM_UP_S = 12.0
SPREAD = [0.5]


@dataclass(frozen=True, slots=True)
class Load:
    """callers: by tenant and band. lasts_ms: of a call on average."""

    limit: int | Limit
    lasts_ms: float
    callers: Mapping[tuple[str, str], int]
    weights: Mapping[str, int] = field(default_factory=dict)
    processes: int = 2


LOADS = {
    "concurrency, one tenant": Load(4, 800, {("a", "normal"): 60}),
    "concurrency, four tenants": Load(
        8,
        1_000,
        {("a", "normal"): 60, ("b", "normal"): 40, ("c", "normal"): 20, ("d", "normal"): 3},
        {"a": 3},
    ),
    "concurrency, two bands": Load(
        6, 600, {("a", "high"): 7, ("b", "normal"): 40, ("c", "normal"): 20}
    ),
    "requests, 20 in 10 s": Load(
        Rate(20, window_ms=10_000), 200, {("a", "normal"): 16, ("b", "normal"): 10}
    ),
    "requests, smoothed": Load(
        Rate(30, window_ms=10_000, pace_ms=1_000), 200, {("a", "normal"): 20, ("b", "normal"): 12}
    ),
    "tokens, 20,000 in 10 s": Load(
        Rate(20_000, window_ms=10_000, unit="tokens"),
        300,
        {("a", "normal"): 20, ("b", "normal"): 12},
    ),
}


@dataclass(slots=True)
class Told:
    """told_ms, and how long it then took."""

    pairs: list[tuple[float, float]] = field(default_factory=list)
    unknown: int = 0

    def true(self) -> float:
        within = sum(abs(told - real) <= max(SHARE * real, SLACK_MS) for told, real in self.pairs)
        return within / max(1, len(self.pairs) + self.unknown)


async def _call(
    limiter: Limiter, tenant: str, band: str, load: Load, told: Told, warm_at: float
) -> None:
    tokens = random.randint(200, 1800)
    acquisition = limiter.acquire("kind:x", tenant=tenant, priority=band, tokens=Tokens(tokens))
    asking = asyncio.create_task(_ask(limiter, acquisition, told, warm_at))
    try:
        async with acquisition as permit:
            admitted = time.monotonic()
            asking.cancel()
            await asyncio.wait({asking})
            if not asking.cancelled() and (answer := asking.result()) is not None:
                told.pairs.append((answer[0], (admitted - answer[1]) * 1000))
            await permit.confirm()
            shape = 1 / SPREAD[0] ** 2
            await asyncio.sleep(random.gammavariate(shape, load.lasts_ms / 1000 / shape))
            permit.settle("success", tokens=Tokens(tokens))
    finally:
        asking.cancel()


async def _ask(
    limiter: Limiter, acquisition: object, told: Told, warm_at: float
) -> tuple[float, float] | None:
    await asyncio.sleep(random.uniform(0.05, 6))
    ticket = getattr(acquisition, "ticket", None)
    if ticket is None or time.monotonic() < warm_at:
        return None
    asked = time.monotonic()
    place = await limiter.place(limiter.session, ticket)
    if place is None:
        return None
    if place.wait_ms is None:
        told.unknown += 1
        return None
    return place.wait_ms, asked


async def _caller(
    limiter: Limiter, tenant: str, band: str, load: Load, told: Told, warm_at: float
) -> None:
    while True:
        try:
            await _call(limiter, tenant, band, load, told, warm_at)
        except DeadlineExceeded:
            return


async def measure(url: str, name: str, load: Load, seconds: float) -> Told:
    told, warm_at = Told(), time.monotonic() + WARM_UP_S
    policy = PoolPolicy({"kind:x": load.limit}, weights=dict(load.weights))
    async with AsyncExitStack() as stack:
        limiters = [
            await stack.enter_async_context(
                Limiter.from_url(url, pool=name.replace(" ", "-").replace(",", ""), policy=policy)
            )
            for _ in range(load.processes)
        ]
        tasks = [
            asyncio.create_task(
                _caller(limiters[n % len(limiters)], tenant, band, load, told, warm_at)
            )
            for (tenant, band), count in load.callers.items()
            for n in range(count)
        ]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return told


async def measured(seconds: float, only: str = "") -> AsyncIterator[tuple[str, Told]]:
    """Each load whose name has `only` in it, and what its callers were told."""
    with tempfile.TemporaryDirectory() as folder:
        server = ValkeyServer(Path(folder))
        server.start()
        try:
            for name, load in LOADS.items():
                if only in name:
                    yield name, await measure(server.url, name, load, seconds)
        finally:
            server.stop()


async def main(seconds: float, only: str) -> None:
    print(f"| load | told | true within 25 % or 2 s | median error | median wait |\n|{'---|' * 5}")
    async for name, told in measured(seconds, only):
        errors = [abs(one - real) for one, real in told.pairs] or [0.0]
        waits = [real for _, real in told.pairs] or [0.0]
        print(
            f"| {name} | {len(told.pairs)} | {told.true():.1%} | "
            f"{statistics.median(errors) / 1000:.1f} s | "
            f"{statistics.median(waits) / 1000:.1f} s |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", default="")
    parser.add_argument("--spread", type=float, default=0.5)
    chosen = parser.parse_args()
    SPREAD[0] = chosen.spread
    asyncio.run(main(chosen.seconds, chosen.only))
