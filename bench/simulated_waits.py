"""Told times and early refusals under steady load, on the executable model in virtual time.

    python -m bench.simulated_waits [--seconds 120] [--seeds 3] [--only tokens] [--spread 0.5]

The loads of `bench.waits`, in seconds instead of minutes and without the noise of a machine: the
sessions, queues and estimates are the product's own. Each call draws how long it may wait, from 1
to 60 s. One that the pool would refuse early waits nevertheless, which shows whether it would have
been admitted in time if nobody left.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Any

from bench.waits import LIMIT, LOADS, SHARE, SLACK_MS, Load, Told
from tidegate.limiter import CallUse, Concurrency, Demand, Ramp, Rate, Tokens
from tidegate.limiter.simulation import Barred, Holding, SessionState, SyncRequest, read_place
from tidegate.rehearse.simulation import START_MS, Playback, Process, Setting

WARM_UP_MS = 12_000.0
# How often a process compares all with the pool, as it does with the usual lease.
PULSE_MS = 1_000.0
HARD_MS = 1_000_000
# How far the Retry-After of a certain refusal may be off.
CERTAIN_SHARE, CERTAIN_MS = 0.02, 1_000.0
Lasts = Callable[[Random, float], float]


@dataclass(slots=True)
class Refusals:
    """Of each call: how long it could wait, how long it waited, and what the pool would have
    refused it with, if it would have."""

    rows: list[tuple[float, float, Barred | None]] = field(default_factory=list)

    @property
    def late(self) -> int:
        """Calls that were not admitted in time."""
        return sum(waited_ms > left_ms for left_ms, waited_ms, _ in self.rows)

    def refused(self, *, by_estimate: bool) -> list[tuple[float, float, Barred]]:
        return [
            (left_ms, waited_ms, barred)
            for left_ms, waited_ms, barred in self.rows
            if barred is not None and bool(barred.is_estimate) == by_estimate
        ]

    def wrong(self, *, by_estimate: bool) -> int:
        """Refused calls that would have been admitted in time."""
        found = self.refused(by_estimate=by_estimate)
        return sum(waited_ms <= left_ms for left_ms, waited_ms, _ in found)

    def true(self, *, by_estimate: bool) -> int:
        """Refused calls whose Retry-After is right: as a told time, or where it is certain within
        2 % or a second."""
        share, slack_ms = (SHARE, SLACK_MS) if by_estimate else (CERTAIN_SHARE, CERTAIN_MS)
        return sum(
            abs(barred.room_ms - waited_ms) <= max(share * waited_ms, slack_ms)
            for _, waited_ms, barred in self.refused(by_estimate=by_estimate)
        )


class Admission(asyncio.Future[Holding]):
    """Calls back when a call has its permit: no task waits for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[Holding], None]) -> None:
        super().__init__(loop=loop)
        self._call = call

    def set_result(self, result: Holding, /) -> None:
        super().set_result(result)
        self._call(result)


class SimulatedLoad(Playback):
    """See the module. `lasts_ms` draws how long a call takes at a moment of the simulation, and
    `used` which part of the tokens that it reserved it uses."""

    def __init__(
        self,
        load: Load,
        seed: int,
        lasts_ms: Lasts,
        used: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__(load.policy(), Setting(processes=load.processes, hold_ms=0.0))
        self.told, self.refusals = Told(), Refusals()
        self._load, self._random = load, Random(seed)
        self._lasts_ms, self._used = lasts_ms, used
        self._barred: dict[tuple[str, int], Barred] = {}
        self._asking_sid = ""
        self._warm_at_ms = math.inf
        self._watch_refusals()

    def measure(self, seconds: float) -> SimulatedLoad:
        """Run for so long, after a while in which nothing counts."""
        with closing(self.loop):
            self._enter()
            self._warm_at_ms = self.now_ms + WARM_UP_MS
            processes = list(self._processes.values())
            for process in processes:
                process.session._foresee = lambda *_: None  # type: ignore[method-assign]
            for (tenant, band), callers in self._load.callers.items():
                for number in range(callers):
                    self._ask(processes[number % len(processes)], tenant, band)
            self._pulse()
            until_ms = self._warm_at_ms + seconds * 1000
            while self.now_ms < until_ms:
                self._step()
        return self

    def _watch_refusals(self) -> None:
        """Note what the pool refuses, and let it wait."""
        pump, outlooks = self.model.pump, self.model.outlooks
        bar, ask = outlooks.refuse_late, pump.enqueue

        def note(*arguments: Any) -> bool:
            if bar(*arguments):
                barred = outlooks.barred.pop()
                self._barred[self._asking_sid, barred.ticket] = barred
            return False

        def ask_of(q: SyncRequest, session: SessionState) -> tuple[list[float], list[int]]:
            self._asking_sid = q.sid
            return ask(q, session)

        outlooks.refuse_late, pump.enqueue = note, ask_of  # type: ignore[method-assign,assignment]

    def _pulse(self) -> None:
        for process in self._processes.values():
            process.session.refresh()
        self.after(PULSE_MS, self._pulse)

    def _ask(self, process: Process, tenant: str, band: str) -> None:
        tokens, asked_ms = self._load.tokens_of(tenant, self._random.randint), self.now_ms
        left_ms = math.exp(self._random.uniform(math.log(1_000), math.log(60_000)))
        demand = Demand((LIMIT,), tenant, band, Tokens(tokens))
        flow = process._issuer.flow_of(demand)
        told: list[tuple[float, float]] = []

        def admitted(holding: Holding) -> None:
            barred = self._barred.pop((process.session.sid, holding.ticket), None)
            if asked_ms >= self._warm_at_ms:
                self.refusals.rows.append((left_ms, self.now_ms - asked_ms, barred))
            self.told.pairs += [(told_ms, self.now_ms - at_ms) for told_ms, at_ms in told]
            self.after(self._lasts_ms(self._random, self.now_ms), partial(end, holding))

        def end(holding: Holding) -> None:
            used = CallUse(Tokens(round(tokens * self._random.uniform(*self._used))))
            process.queue.release(
                holding.ticket,
                outcome="success",
                actual=flow.actual(used),
                now_ms=self.now_ms,
                use=flow.cost_of(used),
            )
            process._kick()
            self._ask(process, tenant, band)

        process.queue._new_future = lambda: Admission(self.loop, admitted)
        waiter = process.queue.ask(
            flow,
            amounts=flow.amounts(demand),
            use=flow.use_of(demand),
            hard_ms=HARD_MS,
            now_ms=asked_ms,
            deadline_ms=asked_ms + left_ms,
            by_estimate=True,
        )
        process._kick()

        def look() -> None:
            if waiter.future.done() or self.now_ms < self._warm_at_ms:
                return
            wall_ms = START_MS + int(self.now_ms)
            place = read_place(self.model.position(process.session.sid, waiter.ticket, wall_ms))
            if place is not None and place.wait_ms is not None:
                told.append((place.wait_ms, self.now_ms))

        self.after(self._random.uniform(50, 6_000), look)


def gamma(mean_ms: float, spread: float) -> Lasts:
    """Durations with a standard deviation of `spread` times their mean."""
    if not spread:
        return lambda random, now_ms: mean_ms
    shape = 1 / spread**2
    return lambda random, now_ms: random.gammavariate(shape, mean_ms / shape)


def _two_lengths(random: Random, now_ms: float) -> float:
    return 200 if random.random() < 0.9 else 8_000


def _long_tail(random: Random, now_ms: float) -> float:
    return random.lognormvariate(math.log(800), 1.2)


def _six_times_faster(random: Random, now_ms: float) -> float:
    return (3_000 if now_ms // 60_000 % 2 == 0 else 500) * random.uniform(0.5, 1.5)


_ONE = LOADS["concurrency, one tenant"]
_WIDE = replace(_ONE, limit=8)
# What an estimate has to do with beside the steady loads: (load, duration, share used).
HARDER: dict[str, tuple[Load, Lasts, tuple[float, float]]] = {
    "requests, one tenant": (
        Load(Rate(20, window_ms=10_000), 200, {("a", "normal"): 60}),
        gamma(200, 0.5),
        (1.0, 1.0),
    ),
    "requests that grow by 40 % a minute, two tenants": (
        Load(
            Rate(600, window_ms=60_000, ramp=Ramp(40, start=60)),
            200,
            {("a", "normal"): 30, ("b", "normal"): 20},
        ),
        gamma(200, 0.5),
        (1.0, 1.0),
    ),
    "tokens that grow by 40 % a minute, two tenants": (
        Load(
            Rate(600_000, window_ms=60_000, unit="tokens", ramp=Ramp(40, start=60_000)),
            300,
            {("a", "normal"): 30, ("b", "normal"): 20},
        ),
        gamma(300, 0.5),
        (1.0, 1.0),
    ),
    "requests of a bucket that grow by 40 % a minute": (
        Load(
            Rate(600, window_ms=60_000, ramp=Ramp(40, start=60), shape="bucket"),
            200,
            {("a", "normal"): 30, ("b", "normal"): 20},
        ),
        gamma(200, 0.5),
        (1.0, 1.0),
    ),
    "requests that grow by 40 % a minute, two bands": (
        Load(
            Rate(600, window_ms=60_000, ramp=Ramp(40, start=60)),
            200,
            {("a", "high"): 30, ("b", "normal"): 20},
        ),
        gamma(200, 0.5),
        (1.0, 1.0),
    ),
    "tokens that grow by 40 % a minute, two bands": (
        Load(
            Rate(600_000, window_ms=60_000, unit="tokens", ramp=Ramp(40, start=60_000)),
            300,
            {("a", "high"): 30, ("b", "normal"): 20},
        ),
        gamma(300, 0.5),
        (1.0, 1.0),
    ),
    "requests a minute, half of them in a higher band": (
        Load(Rate(300, window_ms=60_000), 400, {("a", "high"): 1, ("b", "normal"): 30}),
        gamma(400, 0.5),
        (1.0, 1.0),
    ),
    "requests of a bucket, half of them in a higher band": (
        Load(
            Rate(60, window_ms=10_000, shape="bucket"),
            400,
            {("a", "high"): 1, ("b", "normal"): 30},
        ),
        gamma(400, 0.5),
        (1.0, 1.0),
    ),
    "tokens, half of them in a higher band": (
        Load(
            Rate(60_000, window_ms=10_000, unit="tokens"),
            400,
            {("a", "high"): 2, ("b", "normal"): 20, ("c", "normal"): 10},
            tokens={"a": (300, 900), "b": (200, 800), "c": (500, 1500)},
        ),
        gamma(400, 0.5),
        (1.0, 1.0),
    ),
    "requests a minute, two bands": (
        Load(Rate(300, window_ms=60_000), 200, {("a", "high"): 8, ("b", "normal"): 30}),
        gamma(200, 0.5),
        (1.0, 1.0),
    ),
    "tokens, two bands": (
        Load(
            Rate(60_000, window_ms=10_000, unit="tokens"),
            200,
            {("a", "high"): 8, ("b", "normal"): 20, ("c", "normal"): 10},
        ),
        gamma(200, 0.5),
        (1.0, 1.0),
    ),
    "requests of a bucket, two bands": (
        Load(
            Rate(60, window_ms=10_000, shape="bucket"),
            200,
            {("a", "high"): 8, ("b", "normal"): 30},
        ),
        gamma(200, 0.5),
        (1.0, 1.0),
    ),
    "tokens, 30 to 100 % of them used": (
        LOADS["tokens, 20,000 in 10 s"],
        gamma(300, 0.5),
        (0.3, 1.0),
    ),
    "concurrency, 0.2 or 8 s": (_WIDE, _two_lengths, (1.0, 1.0)),
    "concurrency, four tenants, a long tail": (
        LOADS["concurrency, four tenants"],
        _long_tail,
        (1.0, 1.0),
    ),
    "concurrency, six times faster after a minute": (_WIDE, _six_times_faster, (1.0, 1.0)),
    "tokens in flight, small calls behind large ones": (
        Load(
            Concurrency(6_000, unit="tokens_in_flight"),
            600,
            {("a", "high"): 60, ("b", "normal"): 40},
            tokens={"a": (1500, 1800), "b": (200, 300)},
        ),
        gamma(600, 0.5),
        (1.0, 1.0),
    ),
    "concurrency, shares in cost, two bands": (
        Load(
            12,
            300,
            {("a", "high"): 14, ("b", "normal"): 40, ("c", "normal"): 30},
            tokens={"b": (200, 300), "c": (1500, 1800)},
            fair_by="cost",
        ),
        gamma(300, 0.5),
        (1.0, 1.0),
    ),
}


def simulate(name: str, seconds: float, seeds: int, spread: float = 0.5) -> tuple[Told, Refusals]:
    """All that was told, over so many seeds."""
    told, refusals = Told(), Refusals()
    for seed in range(seeds):
        load = LOADS.get(name)
        if load is not None:
            run = SimulatedLoad(load, seed, gamma(load.lasts_ms, spread))
        else:
            run = SimulatedLoad(HARDER[name][0], seed, *HARDER[name][1:])
        run.measure(seconds)
        told.pairs += run.told.pairs
        refusals.rows += run.refusals.rows
    return told, refusals


def main(seconds: float, seeds: int, only: str, spread: float) -> None:
    heads = "load|told times true|calls|not admitted in time|refused early|wrongly|"
    heads += "certain|Retry-After true|estimated|Retry-After true"
    print(f"|{heads}|\n|{'---|' * 10}")
    for name in [*LOADS, *HARDER]:
        if only not in name:
            continue
        told, found = simulate(name, seconds, seeds, spread)
        certain, guessed = (len(found.refused(by_estimate=x)) for x in (False, True))
        wrong = found.wrong(by_estimate=False) + found.wrong(by_estimate=True)
        print(
            f"| {name} | {told.true():.1%} of {len(told.pairs)} | {len(found.rows)} | {found.late} "
            f"| {certain + guessed} | {wrong} | {certain} | {_part(found, certain, False)} "
            f"| {guessed} | {_part(found, guessed, True)} |",
            flush=True,
        )


def _part(found: Refusals, count: int, by_estimate: bool) -> str:
    return f"{found.true(by_estimate=by_estimate) / count:.1%}" if count else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--spread", type=float, default=0.5)
    chosen = parser.parse_args()
    main(chosen.seconds, chosen.seeds, chosen.only, chosen.spread)
