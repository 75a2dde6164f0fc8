"""How true the estimated time is that a waiting call is told, under steady load.

    python -m bench.waits [--seconds 180] [--only concurrency] [--spread 0.5]

Callers in a closed loop fill a limit; each asks once, at a random moment of its wait, for its
place. All loads run side by side on one Valkey, and end when whoever was told a time has been
admitted: the longest waits count too. A told time counts as true within 25 % of the time that it
then waited, or within 2 s. Durations of calls are drawn from a gamma distribution; `--spread` is
their standard deviation over their mean. With 1 (an exponential distribution) the order itself is
that uncertain: tenants share by time of use, so that a dozen calls of one tenant come 29 % early
or late.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from asyncio import FIRST_EXCEPTION
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tidegate.embedded.servers import ValkeyServer
from tidegate.errors import DeadlineExceeded
from tidegate.limiter import FairBy, Limit, Limiter, PoolPolicy, Rate, Tokens

LIMIT = "kind:x"
SHARE, SLACK_MS = 0.25, 2_000
WARM_UP_S, LONGEST_S = 12.0, 180.0
SPREAD = [0.5]


@dataclass(frozen=True, slots=True)
class Load:
    """callers: by tenant and band. lasts_ms: of a call on average. tokens: by tenant, of a call at
    least and at most."""

    limit: int | Limit
    lasts_ms: float
    callers: Mapping[tuple[str, str], int]
    weights: Mapping[str, int] = field(default_factory=dict)
    processes: int = 2
    tokens: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    fair_by: FairBy = "seconds"

    def policy(self) -> PoolPolicy:
        return PoolPolicy({LIMIT: self.limit}, weights=dict(self.weights), fair_by=self.fair_by)

    def tokens_of(self, tenant: str, draw: Callable[[int, int], int]) -> int:
        """Of one call."""
        return draw(*self.tokens.get(tenant, (200, 1800)))


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
    """told_ms, and how long it then took. waiting: calls that were told a time and wait still."""

    pairs: list[tuple[float, float]] = field(default_factory=list)
    unknown: int = 0
    waiting: int = 0

    def true(self) -> float:
        within = sum(abs(told - real) <= max(SHARE * real, SLACK_MS) for told, real in self.pairs)
        return within / max(1, len(self.pairs) + self.unknown)


@dataclass(frozen=True, slots=True)
class Run:
    """Callers of one load, who ask between two moments of the monotonic clock."""

    load: Load
    from_s: float
    until_s: float
    told: Told = field(default_factory=Told)

    async def callers(self, limiter: Limiter, tenant: str, band: str) -> None:
        while True:
            with suppress(DeadlineExceeded):
                await self._call(limiter, tenant, band)

    async def _call(self, limiter: Limiter, tenant: str, band: str) -> None:
        tokens = self.load.tokens_of(tenant, random.randint)
        acquisition = limiter.acquire(LIMIT, tenant=tenant, priority=band, tokens=Tokens(tokens))
        answers: list[tuple[float, float]] = []
        asking = asyncio.create_task(self._ask(limiter, acquisition, answers))
        try:
            async with acquisition as permit:
                admitted = time.monotonic()
                asking.cancel()
                for told_ms, asked in answers:
                    self.told.pairs.append((told_ms, (admitted - asked) * 1000))
                await permit.confirm()
                shape = 1 / SPREAD[0] ** 2
                lasts_s = self.load.lasts_ms / 1000
                await asyncio.sleep(random.gammavariate(shape, lasts_s / shape))
                permit.settle("success", tokens=Tokens(tokens))
        finally:
            asking.cancel()
            self.told.waiting -= len(answers)

    async def _ask(
        self, limiter: Limiter, acquisition: object, answers: list[tuple[float, float]]
    ) -> None:
        await asyncio.sleep(random.uniform(0.05, 6))
        ticket = getattr(acquisition, "ticket", None)
        if ticket is None or not self.from_s <= time.monotonic() < self.until_s:
            return
        asked = time.monotonic()
        place = await limiter.place(limiter.session, ticket)
        if place is None:
            return
        if place.wait_ms is None:
            self.told.unknown += 1
            return
        answers.append((place.wait_ms, asked))
        self.told.waiting += 1


async def measure(url: str, loads: Mapping[str, Load], seconds: float) -> dict[str, Told]:
    """What the callers of each load were told in so many seconds after the first ones."""
    from_s = time.monotonic() + WARM_UP_S
    runs = {name: Run(load, from_s, from_s + seconds) for name, load in loads.items()}
    async with AsyncExitStack() as stack:
        tasks = list[asyncio.Task[None]]()
        for name, run in runs.items():
            policy, pool = run.load.policy(), name.replace(" ", "-").replace(",", "")
            limiters = [
                await stack.enter_async_context(Limiter.from_url(url, pool=pool, policy=policy))
                for _ in range(run.load.processes)
            ]
            tasks += [
                asyncio.create_task(run.callers(limiters[n % len(limiters)], tenant, band))
                for (tenant, band), count in run.load.callers.items()
                for n in range(count)
            ]
        await asyncio.wait(tasks, timeout=WARM_UP_S + seconds, return_when=FIRST_EXCEPTION)
        last_s = time.monotonic() + LONGEST_S
        while any(run.told.waiting for run in runs.values()) and time.monotonic() < last_s:
            await asyncio.wait(tasks, timeout=1.0, return_when=FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(ended, asyncio.CancelledError):
                raise RuntimeError("a caller ended by itself") from ended
    return {name: run.told for name, run in runs.items()}


async def measured(seconds: float, only: str = "") -> dict[str, Told]:
    """Each load whose name has `only` in it, and what its callers were told."""
    with tempfile.TemporaryDirectory() as folder:
        server = ValkeyServer(Path(folder))
        server.start()
        try:
            loads = {name: load for name, load in LOADS.items() if only in name}
            return await measure(server.url, loads, seconds)
        finally:
            server.stop()


async def main(seconds: float, only: str) -> None:
    print(f"| load | told | true within 25 % or 2 s | median error | median wait |\n|{'---|' * 5}")
    for name, told in (await measured(seconds, only)).items():
        errors = [abs(one - real) for one, real in told.pairs] or [0.0]
        waits = [real for _, real in told.pairs] or [0.0]
        print(
            f"| {name} | {len(told.pairs)} | {told.true():.1%} | "
            f"{statistics.median(errors) / 1000:.1f} s | "
            f"{statistics.median(waits) / 1000:.1f} s |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--only", default="")
    parser.add_argument("--spread", type=float, default=0.5)
    chosen = parser.parse_args()
    SPREAD[0] = chosen.spread
    asyncio.run(main(chosen.seconds, chosen.only))
