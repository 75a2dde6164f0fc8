"""Scale on paper: `python -m bench.scale` runs a pool of 1,000 processes on the executable model.

Simulates with a clock of its own, so that the figures are the same on every machine: who gets which
share and how long each waits. The same tasks ask again and again, so that as many wait at the end
as at the beginning. Says nothing of how long Valkey works; `bench.limiter` measures that.
"""

from __future__ import annotations

import argparse
import heapq
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import count

from bench.limiter.trace import quantile
from tidegate.limiter import PoolPolicy
from tidegate.limiter.simulation import Join, PoolModel, Renewal, SyncReply, SyncRequest, flow_of

LIMIT = "kind:text_only"
WEIGHTS = (1, 2, 4)
RUN = "run"
UPTIME_MS = 1_000_000
HARD_MS = 600_000
# As in session.py: so many grants are acknowledged although there is nothing else to say.
ACK_EARLY = 4
EXPECTED_MS = 200
SPREAD = 0.5


@dataclass(frozen=True, slots=True)
class Size:
    """Each tenant has its waiters spread evenly over `spread` processes."""

    processes: int = 1000
    tenants: int = 1000
    waiters: int = 100_000
    limit: int = 500
    admissions: int = 400_000
    spread: int = 10
    lease_ms: int = 3000
    seed: int = 1


@dataclass(slots=True)
class Waiter:
    """One call of one tenant, from asking to its end."""

    ticket: int
    tenant: str
    weight: int
    asked_ms: int
    takes_ms: int

    @property
    def member(self) -> str:
        return f"{self.ticket}|{HARD_MS}|{EXPECTED_MS}|"

    @property
    def flow(self) -> str:
        return flow_of(2, self.tenant, (LIMIT,))


@dataclass(slots=True)
class Process:
    """One session, with what it waits for."""

    sid: str
    gen: int = 0
    epoch: int = 0
    batch: int = 0
    ack: int = 0
    seen: int = 0
    roster: int = 0
    waiting: dict[int, Waiter] = field(default_factory=dict)


@dataclass(slots=True)
class Seen:
    """What the simulation counts, after its warm-up: admissions and permit-ms by weight, and waits
    of those who asked during `cohort`, a part early enough for all of them to be let in before the
    end. `left` are those of them who still wait. `scripts` are calls of scripts by name."""

    began_ms: int = 0
    ended_ms: int = 0
    admissions: Counter[int] = field(default_factory=Counter)
    permit_ms: Counter[int] = field(default_factory=Counter)
    permit_ms_of: Counter[str] = field(default_factory=Counter)
    waits_ms: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    left: int = 0
    scripts: Counter[str] = field(default_factory=Counter)
    most_open: int = 0
    total: int = 0


class Simulation:
    """A modelled pool, its processes, and the events to come."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.seen = Seen()
        self.model = PoolModel()
        self.now_ms = 1_000_000
        self._random = random.Random(size.seed)
        self.weights = {f"t{n}": WEIGHTS[n % len(WEIGHTS)] for n in range(size.tenants)}
        self._policy = PoolPolicy(
            {LIMIT: size.limit},
            weights=self.weights,
            lease_ms=size.lease_ms,
            hand_off=False,
        )
        self._tickets = count(1)
        self._events: list[tuple[int, int, Process, Waiter | None]] = []
        self._order = count()
        self._open = 0
        self._filled = False
        self._counting = False
        self._waited: list[tuple[int, int, int]] = []
        self._processes = {f"s{n}": Process(f"s{n}") for n in range(size.processes)}
        self._enter()
        self._fill()

    def _enter(self) -> None:
        """All join, and hear of each other."""
        for process in self._processes.values():
            self.model.pool.subscribed.add(process.sid)
            join = Join(self._policy, "bench", process.sid, [], [])
            reply = self._say(process, join=join, full=True)
            process.gen, process.epoch = reply.gen, reply.epoch
        self.now_ms += self.size.lease_ms // 2 + 1
        for number, process in enumerate(self._processes.values()):
            self._say(process, full=True)
            first = number * self.size.lease_ms // 3 // self.size.processes
            self._at(self.now_ms + first, process, None)

    def _fill(self) -> None:
        """Everybody who will ever wait asks: each process for all of its tasks at once."""
        processes, size = list(self._processes.values()), self.size
        homes: defaultdict[int, list[str]] = defaultdict(list)
        for number, tenant in enumerate(self.weights):
            for task in range(size.waiters // size.tenants):
                homes[(number + task % size.spread) % size.processes].append(tenant)
        for number in self._random.sample(sorted(homes), len(homes)):
            process = processes[number]
            waiters = [self._new(process, tenant) for tenant in homes[number]]
            flows = sorted({waiter.flow for waiter in waiters})
            entries = [(1 + flows.index(waiter.flow), waiter.member) for waiter in waiters]
            self._say(process, flows=flows, enqueues=entries)
        self._filled = True

    def run(self) -> Seen:
        """Until so many were let in. The first tenth only warms up, who asks during the next fifth
        is the cohort."""
        seen, goal = self.seen, self.size.admissions
        self._run_until(goal // 10)
        seen.scripts.clear()
        self._counting, seen.began_ms = True, self.now_ms
        self._run_until(goal * 3 // 10)
        cohort_ms = self.now_ms
        self._run_until(goal)
        seen.ended_ms = self.now_ms
        for weight, asked_ms, waited_ms in self._waited:
            if seen.began_ms <= asked_ms < cohort_ms:
                seen.waits_ms[weight].append(waited_ms)
        seen.left = sum(
            seen.began_ms <= waiter.asked_ms < cohort_ms
            for process in self._processes.values()
            for waiter in process.waiting.values()
        )
        return seen

    def _run_until(self, admissions: int) -> None:
        while self.seen.total < admissions:
            self.now_ms, _, process, waiter = heapq.heappop(self._events)
            if waiter is None:
                self._renew(process)
            else:
                self._end(process, waiter)

    def _new(self, process: Process, tenant: str) -> Waiter:
        takes_ms = max(
            1, round(EXPECTED_MS * self._random.lognormvariate(-(SPREAD**2) / 2, SPREAD))
        )
        weight = self.weights[tenant]
        waiter = Waiter(next(self._tickets), tenant, weight, self.now_ms, takes_ms)
        process.waiting[waiter.ticket] = waiter
        return waiter

    def _at(self, at_ms: int, process: Process, waiter: Waiter | None) -> None:
        heapq.heappush(self._events, (at_ms, next(self._order), process, waiter))

    def _renew(self, process: Process) -> None:
        self.seen.scripts["renew"] += 1
        reply = self.model.renew(Renewal(process.sid, process.gen, process.epoch, RUN), self.now_ms)
        if reply.status != "ok":
            raise RuntimeError(f"{process.sid}: {reply.status}")
        self._at(self.now_ms + self.size.lease_ms // 3, process, None)

    def _end(self, process: Process, waiter: Waiter) -> None:
        """A call ends, and its task asks for the next one in the same breath."""
        self._open -= 1
        if self._counting:
            self.seen.permit_ms[waiter.weight] += waiter.takes_ms
            self.seen.permit_ms_of[waiter.tenant] += waiter.takes_ms
        again = self._new(process, waiter.tenant)
        self._say(
            process,
            flows=[waiter.flow],
            releases=[(waiter.ticket, 1, 0, waiter.takes_ms, "")],
            enqueues=[(1, again.member)],
        )

    def _say(self, process: Process, **fields: object) -> SyncReply:
        process.batch += 1
        request = SyncRequest(
            sid=process.sid,
            gen=process.gen,
            epoch=process.epoch,
            run=RUN,
            uptime_ms=UPTIME_MS,
            lease_ms=self.size.lease_ms,
            revision=1,
            batch=process.batch,
            ack=process.ack,
            **fields,  # type: ignore[arg-type]
        )
        ordinary = not (request.full or request.join)
        reply = self.model.sync(request, self.now_ms) if ordinary else None
        self.seen.scripts["sync"] += ordinary
        if reply is None or reply.status == "tend":
            reply = self.model.tend(request, self.now_ms)
            self.seen.scripts["tend"] += 1
        if reply.status != "ok":
            raise RuntimeError(f"{process.sid}: {reply.status}")
        process.seen = process.ack
        for ticket, _ in reply.grants:
            self._begin(process, ticket)
        self._deliver()
        return reply

    def _deliver(self) -> None:
        """What was pushed is heard at once."""
        pushed = list(self.model.pool.pushed)
        self.model.pool.pushed.clear()
        for sid, push in pushed:
            self.seen.scripts["push"] += 1
            process = self._processes[sid]
            process.ack = push.sent
            for ticket, _ in push.grants:
                self._begin(process, ticket)
            if process.ack - process.seen >= ACK_EARLY:
                self._say(process)

    def _begin(self, process: Process, ticket: int) -> None:
        seen = self.seen
        waiter = process.waiting.pop(ticket)
        self._open += 1
        seen.most_open = max(seen.most_open, self._open)
        if self._filled:
            seen.total += 1
        if self._counting:
            seen.admissions[waiter.weight] += 1
            waited_ms = self.now_ms - waiter.asked_ms
            self._waited.append((waiter.weight, waiter.asked_ms, waited_ms))
        self._at(self.now_ms + waiter.takes_ms, process, waiter)


def _wait_s(waits_ms: list[int], part: float) -> str:
    found = quantile(sorted(waits_ms), part)
    return "-" if found is None else f"{found / 1000:.1f} s"


def report(size: Size, simulation: Simulation, seen: Seen) -> list[str]:
    """The figures, a line each. What is ideal follows from the weights alone."""
    weights = Counter(simulation.weights.values())
    whole = sum(weight * number for weight, number in weights.items())
    total, permit_ms = seen.admissions.total(), seen.permit_ms.total()
    span_ms = seen.ended_ms - seen.began_ms
    lines = [
        f"{size.processes} processes, {size.tenants} tenants, {size.waiters} waiters, limit "
        f"{size.limit}, calls of {EXPECTED_MS} ms on average, seed {size.seed}",
        f"{total} admissions in {span_ms / 1000:.1f} s of the simulation's clock; at most "
        f"{seen.most_open} open at once, {permit_ms / span_ms / size.limit:.1%} of permits used",
        "",
        "| weight | tenants | of admissions | of permit-seconds | ideal | off | wait p50 | p99 "
        "| ideal wait |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for weight, number in sorted(weights.items()):
        ideal = weight * number / whole
        calls, used = seen.admissions[weight] / total, seen.permit_ms[weight] / permit_ms
        each = (size.waiters - size.limit) / size.tenants
        ideal_s = each * whole * span_ms / weight / total / 1000
        lines.append(
            f"| {weight} | {number} | {calls:.2%} | {used:.2%} | {ideal:.2%} "
            f"| {abs(used / ideal - 1):.2%} | {_wait_s(seen.waits_ms[weight], 0.5)} "
            f"| {_wait_s(seen.waits_ms[weight], 0.99)} | {ideal_s:.1f} s |"
        )
    worst = max(
        abs(seen.permit_ms_of[tenant] * whole / permit_ms / weight - 1)
        for tenant, weight in simulation.weights.items()
    )
    calls_of = ", ".join(f"{n / total:.3f} {name}" for name, n in sorted(seen.scripts.items()))
    return [
        *lines,
        "",
        f"the tenant that is farthest off its share of permit-seconds: {worst:.1%}",
        f"per admission: {calls_of}",
        f"waits of {sum(map(len, seen.waits_ms.values()))} calls, {seen.left} of them not let in",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    for name in Size.__dataclass_fields__:
        default = getattr(Size(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    size = Size(**vars(parser.parse_args()))
    began_s = time.monotonic()
    simulation = Simulation(size)
    print("\n".join(report(size, simulation, simulation.run())))
    print(f"simulated in {time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    main()
