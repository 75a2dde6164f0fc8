"""Tenants that always wait, in virtual time: the product's own sessions over the executable model.

A rehearsal whose calls never run out: where one ends, its tenant asks for the next. What is
measured is permit-time, to the moment, calls under way included; or the calls that were admitted,
or what they cost.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from random import Random

from tidegate.limiter import FairBy, PoolPolicy
from tidegate.rehearse.load import Arrival
from tidegate.rehearse.report import LoadCall, LoadTally
from tidegate.rehearse.simulation import Playback, Process, Setting

LIMIT = "kind:text_only"
# A random case is drawn again whose rarest tenant has fewer calls than one in so many.
RAREST = 20


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose calls last so long, and cost so much: half of it at least, and twice as much at most.
    It asks in so many of the processes, by so many callers in each: 3 more than there are permits,
    if not given."""

    weight: int
    call_ms: float
    processes: int = 1
    callers: int | None = None
    cost_usd: float = 0.01


class Meter(LoadTally):
    """Adds up what each tenant uses since the last reset: permit-time in ms, calls or dollars."""

    def __init__(self, policy: PoolPolicy) -> None:
        super().__init__(policy)
        self._fair_by = policy.fair_by
        self.calls_of: Counter[str] = Counter()
        self._used: defaultdict[str, float] = defaultdict(float)
        self._open: Counter[str] = Counter()
        self._seen_ms: dict[str, float] = {}

    def asked(self, call: LoadCall) -> None:
        """Nothing is kept of a call that waits."""

    def began(self, call: LoadCall, now_ms: float) -> None:
        arrival = call.arrival
        if self._fair_by == "seconds":
            self._count(arrival.tenant, 1, now_ms)
        else:
            self._used[arrival.tenant] += 1 if self._fair_by == "calls" else arrival.cost_usd

    def ended(self, call: LoadCall, now_ms: float) -> None:
        if self._fair_by == "seconds":
            self._count(call.arrival.tenant, -1, now_ms)
        self.calls_of[call.arrival.tenant] += 1

    def reset(self, now_ms: float) -> None:
        self.used(now_ms)
        self._used.clear()
        self.calls_of.clear()

    def used(self, now_ms: float) -> dict[str, float]:
        for tenant in list(self._open):
            self._count(tenant, 0, now_ms)
        return self._used

    def _count(self, tenant: str, change: int, now_ms: float) -> None:
        since_ms = self._seen_ms.get(tenant, now_ms)
        self._used[tenant] += self._open[tenant] * (now_ms - since_ms)
        self._seen_ms[tenant] = now_ms
        self._open[tenant] += change


class Backlog(Playback):
    """See the module."""

    def __init__(
        self,
        tenants: Mapping[str, Tenant],
        bound: int,
        *,
        processes: int = 1,
        hand_off: bool,
        fair_by: FairBy = "seconds",
    ) -> None:
        policy = PoolPolicy(
            {LIMIT: bound},
            weights={name: tenant.weight for name, tenant in tenants.items()},
            hand_off=hand_off,
            fair_by=fair_by,
        )
        super().__init__(policy, Setting(processes=processes, hold_ms=0.0))
        self.tally = self.meter = Meter(self.policy)
        self._tenants = tenants
        self._bound = bound
        self._random = Random(bound)
        self._asks_in: dict[int, Process] = {}

    def over(self, call: LoadCall) -> None:
        """The tenant asks again, in the same process."""
        process = self._asks_in.pop(id(call.arrival))
        self._ask(process, call.arrival.tenant)

    def _ask(self, process: Process, tenant: str) -> None:
        of = self._tenants[tenant]
        cost_usd = of.cost_usd * self._random.uniform(0.5, 2.0)
        arrival = Arrival(0.0, tenant, duration_ms=of.call_ms, cost_usd=cost_usd)
        self._asks_in[id(arrival)] = process
        process.ask(arrival)

    def shares(self, calls: int, together: int = 0) -> dict[str, float]:
        """The part of all use that each tenant got, over its own part by weight, measured until
        each has had so many calls, and all together so many."""
        with closing(self.loop):
            self._enter()
            processes = list(self._processes.values())
            for number, (name, tenant) in enumerate(self._tenants.items()):
                for place in range(tenant.processes):
                    process = processes[(number + place) % len(processes)]
                    for _ in range(tenant.callers or self._bound + 3):
                        self._ask(process, name)
            self._go_on(max(2, calls // 10), 0)
            self.meter.reset(self.now_ms)
            self._go_on(calls, together)
        used = self.meter.used(self.now_ms)
        total, weights = sum(used.values()), sum(t.weight for t in self._tenants.values())
        return {
            name: used[name] / total * weights / tenant.weight
            for name, tenant in self._tenants.items()
        }

    def _go_on(self, calls: int, together: int) -> None:
        of = self.meter.calls_of
        while of.total() < together or any(of[name] < calls for name in self._tenants):
            self._step()


def random_backlog(number: int, fair_by: FairBy = "seconds") -> Backlog:
    """Two or three tenants of weights from 1 to 1,000, with calls of 5 ms to 30 s that cost $0.0001
    to $1."""
    random = Random(number)
    tenants = _tenants(random, fair_by)
    return Backlog(
        tenants,
        random.choice([1, 2, 5]),
        processes=random.choice([1, 2]),
        hand_off=random.random() < 0.7,
        fair_by=fair_by,
    )


def _tenants(random: Random, fair_by: FairBy) -> dict[str, Tenant]:
    while True:
        tenants = {
            f"t{number}": Tenant(
                round(_evenly(random, 1, 1000)),
                round(_evenly(random, 5, 30_000)),
                processes=random.choice([1, 2]),
                cost_usd=_evenly(random, 0.0001, 1) if fair_by == "cost" else 0.01,
            )
            for number in range(random.choice([2, 2, 3]))
        }
        calls = [tenant.weight / _use(tenant, fair_by) for tenant in tenants.values()]
        if sum(calls) <= RAREST * min(calls):
            return tenants


def _use(tenant: Tenant, fair_by: FairBy) -> float:
    return {"seconds": tenant.call_ms, "calls": 1.0, "cost": tenant.cost_usd}[fair_by]


def _evenly(random: Random, least: float, most: float) -> float:
    """As often from 10 to 20 as from 100 to 200."""
    return math.exp(random.uniform(math.log(least), math.log(most)))
