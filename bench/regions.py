"""Regions that share one provider's account by leased shares, on the executable model.

    python -m bench.regions [--unit calls] [--only cut] [--seed 1]

Each region has a pool of its own: the model of the scripts, driven by the product's own sessions
and queues in virtual time. A coordinator leases shares of the account's limit to the regions, as
Doorman leases capacity (github.com/youtube/doorman, doc/design.md): a share is valid until its
lease ends, is renewed often, and is cut down before another one grows. A simulation: nothing of it
is part of the product.

Invariant: what the regions may use never adds up to more than the limit. For that the coordinator
counts of a region the larger of its share and of what it reports that it holds, until the region
reports less or its lease ends; and a region uses more than its safe share only while its lease has
longer to run than an admission counts: the longest call, or the window of a rate. Clocks measure
durations alone, and run apart by `drift` at most.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Literal

from bench.grid import Grid
from bench.simulated_waits import Admission
from tidegate.limiter import CallUse, Demand, PoolPolicy, Rate, Tokens
from tidegate.limiter.simulation import Holding
from tidegate.limiter.simulation import Waiter as QueueWaiter
from tidegate.rehearse.simulation import START_MS, Playback, Process, Setting

LIMIT = "kind:x"
MINUTE_MS = 60_000
# For a lowered limit to be in force in all processes of a region.
IN_FORCE_MS = 1_000.0
# Whom the coordinator did not hear for so many refreshes keeps what it has, until its lease ends.
SILENT = 4
_HARD_MS = 1_000_000
_NOTHING = CallUse(Tokens())

Unit = Literal["calls", "a minute"]
Way = Literal["both", "to the coordinator", "to the region"]


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """What all regions and the coordinator know.

    limit: of the account, calls in flight or calls a minute. safe: the share that each region
    always has, which is lent to nobody. longest_ms: of a call. drift: how much faster or slower
    than true a clock may run. Raises ValueError for terms that can't be kept.
    """

    limit: int
    regions: tuple[str, ...]
    unit: Unit = "calls"
    lease_ms: float = 120_000.0
    refresh_ms: float = 1_000.0
    safe: int = 1
    longest_ms: float = 30_000.0
    drift: float = 0.001

    def __post_init__(self) -> None:
        if self.safe < 1 or self.safe * len(self.regions) > self.limit:
            raise ValueError("each region needs a safe share, and all together fit the limit")
        if self.region_lease_ms <= self.counts_ms + IN_FORCE_MS:
            raise ValueError("a lease lasts longer than an admission counts")

    @property
    def counts_ms(self) -> float:
        """How long an admission counts, by the clock of its region."""
        return self.longest_ms if self.unit == "calls" else float(MINUTE_MS + 501)

    @property
    def region_lease_ms(self) -> float:
        """How long a lease lasts by a region's clock: it is over there before it is over here."""
        return self.lease_ms * (1 - self.drift) / (1 + self.drift)

    @property
    def each(self) -> int:
        """What one task that asks again and again uses of the limit: at the least ten a minute."""
        return 1 if self.unit == "calls" else 10

    def rule(self, share: int) -> int | Rate:
        return share if self.unit == "calls" else Rate(share, MINUTE_MS)


@dataclass(frozen=True, slots=True)
class ShareRequest:
    """A region's request for a lease.

    number: of its requests; it takes the answer to the last one alone. heard: the last one that was
    answered. to: the coordinator that it knows. share: what it admits by. holds: the most of the
    limit that it may have in use from now until it gets an answer. wants: what it would use.
    """

    region: str
    number: int
    heard: int
    to: int
    share: int
    holds: int
    wants: int


@dataclass(frozen=True, slots=True)
class LeasedShare:
    """The answer. `share` is None from a coordinator that the request was not meant for."""

    number: int
    by: int
    share: int | None


def fair_shares(capacity: int, wants: Mapping[str, int], safe: int) -> dict[str, int]:
    """Max-min fair shares in whole numbers, none below `safe`; what nobody wants is spread evenly,
    so that whose load grows need not ask first."""
    found: dict[str, int] = {}
    order, left = sorted(wants, key=lambda name: (wants[name], name)), capacity
    for position, name in enumerate(order):
        found[name] = max(safe, min(wants[name], left // (len(order) - position)))
        left -= found[name]
    for position, name in enumerate(order):
        more = left // (len(order) - position)
        found[name], left = found[name] + more, left - more
    return found


@dataclass(slots=True)
class BookEntry:
    """What a region may be using, until when, and what it said last."""

    amount: int
    until_ms: float
    wants: int
    number: int
    heard_ms: float


class Coordinator:
    """Leases shares; times are of its own clock. Knows nothing at its start, as after a restart.

    Until every region has reported to it, or every lease of its predecessor has ended, it learns:
    each region that reports gets the share that it has, and nobody gets more; as does a region that
    does not hear the answers. A request counts only if it was meant for this coordinator: one of
    before may report less than is held now.
    """

    def __init__(self, terms: LeaseTerms, number: int, now_ms: float) -> None:
        self.number = number
        self.terms = terms
        self._learns_until_ms = now_ms + terms.lease_ms
        self._book: dict[str, BookEntry] = {}

    def answer(self, request: ShareRequest, now_ms: float) -> LeasedShare | None:
        """None to a request that was overtaken by a later one."""
        if request.to != self.number:
            return LeasedShare(request.number, self.number, None)
        before = self._book.get(request.region)
        if before is not None and request.number <= before.number:
            return None
        hears = before is None or request.number - request.heard <= SILENT
        heard_ms = now_ms if hears or before is None else before.heard_ms
        until_ms = now_ms + self.terms.lease_ms
        entry = BookEntry(request.holds, until_ms, request.wants, request.number, heard_ms)
        self._book[request.region] = entry
        share = request.share
        if hears and not self.is_learning(now_ms):
            share = self._share_of(request.region, now_ms)
        entry.amount = max(request.holds, share)
        return LeasedShare(request.number, self.number, share)

    def is_learning(self, now_ms: float) -> bool:
        known = len(self._book) == len(self.terms.regions)
        return not known and now_ms < self._learns_until_ms

    def taken(self, region: str, now_ms: float) -> int:
        """The most that a region may have in use."""
        entry = self._book.get(region)
        if entry is None or entry.until_ms <= now_ms:
            return self.terms.safe
        return max(self.terms.safe, entry.amount)

    def _share_of(self, region: str, now_ms: float) -> int:
        others = [name for name in self.terms.regions if name != region]
        free = self.terms.limit - sum(self.taken(name, now_ms) for name in others)
        since_ms = now_ms - SILENT * self.terms.refresh_ms
        heard = {name: one for name, one in self._book.items() if one.heard_ms > since_ms}
        kept = sum(self.taken(name, now_ms) for name in others if name not in heard)
        wants = {name: entry.wants for name, entry in heard.items()}
        wanted = fair_shares(self.terms.limit - kept, wants, self.terms.safe)[region]
        return max(self.terms.safe, min(wanted, free))


@dataclass(slots=True)
class Provider:
    """What the account sees, in true time: the calls in flight, or those of the last minute.

    most: that were seen. used, wanted: over time, in call-ms; the limit is wanted as far as there
    is demand, which is the tasks of all regions.
    """

    terms: LeaseTerms
    open: int = 0
    most: int = 0
    demand: int = 0
    used: float = 0.0
    wanted: float = 0.0
    _at_ms: float = 0.0
    _minute: deque[float] = field(default_factory=deque)

    @property
    def counted(self) -> int:
        return self.open if self.terms.unit == "calls" else len(self._minute)

    def pass_time(self, now_ms: float) -> None:
        while self._minute and self._minute[0] + MINUTE_MS <= now_ms:
            self._integrate(self._minute[0] + MINUTE_MS)
            self._minute.popleft()
        self._integrate(now_ms)

    def _integrate(self, until_ms: float) -> None:
        spent_ms, self._at_ms = until_ms - self._at_ms, until_ms
        self.used += self.counted * spent_ms
        self.wanted += min(self.terms.limit, self.demand * self.terms.each) * spent_ms

    def begin(self, now_ms: float) -> None:
        self.pass_time(now_ms)
        self.open += 1
        if self.terms.unit == "a minute":
            self._minute.append(now_ms)
        self.most = max(self.most, self.counted)

    def end(self, now_ms: float) -> None:
        self.pass_time(now_ms)
        self.open -= 1

    def change_demand(self, by: int, now_ms: float) -> None:
        self.pass_time(now_ms)
        self.demand += by


@dataclass(frozen=True, slots=True)
class Cut:
    """Nothing passes between a region and the coordinator, or nothing in one direction."""

    region: str
    from_ms: float
    to_ms: float
    way: Way = "both"


@dataclass(frozen=True, slots=True)
class Course:
    """What happens in a run.

    load: from when on how many tasks of each region ask again and again. restarts: the coordinator
    ends and another one starts so much later, which knows nothing. clocks: how fast those of the
    regions run, the coordinator's as the last. trouble: of a message, the chance that it is lost,
    that it comes twice, and that it is up to half a minute late.
    """

    load: Sequence[tuple[float, Mapping[str, int]]]
    cuts: Sequence[Cut] = ()
    restarts: Sequence[tuple[float, float]] = ()
    clocks: Sequence[float] = ()
    trouble: float = 0.0
    call_ms: float = 4_000.0
    one_way_ms: tuple[float, float] = (20.0, 120.0)


class Region(Playback):
    """A region: its pool, its processes, its load and its agent, which asks for the lease. Times
    are of its own clock."""

    def __init__(self, name: str, world: World, speed: float, random: Random) -> None:
        terms = world.terms
        policy = PoolPolicy({LIMIT: terms.rule(terms.safe)})
        super().__init__(policy, Setting(processes=2, hold_ms=0.0))
        self.name, self.speed = name, speed
        self.share, self.tasks = terms.safe, 0
        self._world, self._terms, self._random = world, terms, random
        self._busy = 0
        self._waiting: dict[tuple[str, int], QueueWaiter] = {}
        self._requests = count(1)
        self._coordinator = 0
        self._asked: tuple[int, float] = (0, 0.0)
        self._heard = 0
        self._stops_at_ms = 0.0
        self._enter()
        self._began_ms = self.now_ms

    # -- time

    @property
    def next_ms(self) -> float:
        """When something happens next, in true time."""
        return (self._due[0][0] - self._began_ms) / self.speed

    def at_true(self, true_ms: float, call: Callable[[], None]) -> None:
        self.after(self._began_ms + true_ms * self.speed - self.now_ms, call)

    @property
    def true_ms(self) -> float:
        return (self.now_ms - self._began_ms) / self.speed

    # -- the lease

    def ask_for_lease(self) -> None:
        """Every refresh, whether or not the last request was answered."""
        self.after(self._terms.refresh_ms, self.ask_for_lease)
        self._request()

    def _request(self) -> None:
        in_use, bound = self._in_use()
        number, holds = next(self._requests), max(self.share, bound, in_use)
        self._asked = number, self.now_ms
        wants = min(self._terms.limit, in_use + len(self._waiting))
        known = self._heard, self._coordinator
        request = ShareRequest(self.name, number, *known, self.share, holds, wants)
        self._world.carry(self, request)

    def hear(self, answer: LeasedShare) -> None:
        number, asked_ms = self._asked
        if answer.number != number:
            return
        self._heard, self._asked = number, (0, 0.0)
        if answer.share is None:
            self._coordinator = answer.by
            self._request()
            return
        lasts_ms = self._terms.region_lease_ms - self._terms.counts_ms - IN_FORCE_MS
        stops_at_ms = self._stops_at_ms = asked_ms + lasts_ms
        if self.now_ms < stops_at_ms:
            self._admit_by(answer.share)
        in_ms = max(0.0, stops_at_ms - self.now_ms)
        self.after(in_ms, lambda: self._stop_in_time(stops_at_ms))

    def _stop_in_time(self, stops_at_ms: float) -> None:
        """Unless there is a later lease."""
        if stops_at_ms == self._stops_at_ms:
            self._admit_by(self._terms.safe)

    def _admit_by(self, share: int) -> None:
        if share == self.share:
            return
        self.share = share
        limits = {LIMIT: self._terms.rule(share)}
        self.policy = replace(self.policy, limits=limits, revision=self.policy.revision + 1)
        first = next(iter(self._processes.values()))
        first.session.set_policy(self.policy, "the lease")

    def _in_use(self) -> tuple[int, int]:
        """What is used of the limit by the pool's record, and the bound that is in force there."""
        pool = self.model.pool
        pool.now = max(START_MS + int(self.now_ms), self.model.clock)
        limit = pool.limit(LIMIT)
        used = limit.used if self._terms.unit == "calls" else self.model.capacity.spent(limit)
        return used, limit.limit.bound

    # -- the load

    def set_tasks(self, tasks: int) -> None:
        """So many calls are wanted at a time from now on; calls in flight run to their end."""
        self._world.provider.change_demand(tasks - self.tasks, self._world.now_ms)
        self.tasks = tasks
        for (sid, ticket), waiter in list(self._waiting.items()):
            if self._busy <= tasks:
                break
            del self._waiting[sid, ticket]
            self._busy -= 1
            process = self._processes[sid]
            waiter.future.cancel()
            process.queue.abandon(ticket, self.now_ms)
            process._kick()
        while self._busy < tasks:
            self._busy += 1
            self._call()

    def _call(self) -> None:
        process = self._random.choice([*self._processes.values()])
        flow = process._issuer.flow_of(Demand((LIMIT,)))
        sid = process.session.sid

        def admitted(holding: Holding) -> None:
            self._waiting.pop((sid, holding.ticket), None)
            self._world.provider.begin(self.true_ms)
            drawn_ms = self._random.lognormvariate(math.log(self._world.course.call_ms), 0.6)
            lasts_ms = min(self._terms.longest_ms, drawn_ms)
            self.after(lasts_ms, lambda: self._end(process, holding))

        process.queue._new_future = lambda: Admission(self.loop, admitted)
        waiter = process.queue.ask(
            flow,
            amounts=flow.amounts(Demand((LIMIT,))),
            hard_ms=_HARD_MS,
            now_ms=self.now_ms,
            deadline_ms=math.inf,
        )
        if not waiter.future.done():
            self._waiting[sid, waiter.ticket] = waiter
        process._kick()

    def _end(self, process: Process, holding: Holding) -> None:
        self._world.provider.end(self.true_ms)
        actual = holding.flow.actual(_NOTHING)
        process.queue.release(holding.ticket, outcome="success", actual=actual, now_ms=self.now_ms)
        process._kick()
        if self._busy > self.tasks:
            self._busy -= 1
        else:
            self._call()


class World:
    """True time, the network, the coordinators one after another, and the provider."""

    def __init__(
        self,
        terms: LeaseTerms,
        course: Course,
        seed: int = 1,
        coordinator: type[Coordinator] = Coordinator,
    ) -> None:
        self.terms, self.course = terms, course
        self.now_ms = 0.0
        self.provider = Provider(terms)
        self.messages = 0
        self._random = Random(seed)
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._kind, self._coordinators = coordinator, count(1)
        self._coordinator: Coordinator | None = None
        speeds = [*course.clocks, *[1.0] * (len(terms.regions) + 1 - len(course.clocks))]
        self._coordinator_speed = speeds[-1]
        self.regions = {
            name: Region(name, self, speed, Random(f"{seed} {name}"))
            for name, speed in zip(terms.regions, speeds, strict=False)
        }
        self._plan()

    def _plan(self) -> None:
        self._start()
        for at_ms, gap_ms in self.course.restarts:
            self._at(at_ms, self._lose)
            self._at(at_ms + gap_ms, self._start)
        for at_ms, tasks in self.course.load:
            for name, wanted in tasks.items():
                region = self.regions[name]
                region.at_true(at_ms, lambda region=region, wanted=wanted: region.set_tasks(wanted))  # type: ignore[misc]
        for region in self.regions.values():
            region.at_true(self._random.uniform(0, self.terms.refresh_ms), region.ask_for_lease)

    def run_until(self, until_ms: float) -> None:
        """Everything that happens before a moment."""
        while True:
            first = min(self.regions.values(), key=lambda region: region.next_ms)
            own_ms = self._due[0][0] if self._due else math.inf
            at_ms = min(first.next_ms, own_ms)
            if at_ms >= until_ms:
                break
            self.now_ms = max(self.now_ms, at_ms)
            if own_ms <= first.next_ms:
                heappop(self._due)[2]()
            else:
                first._step()
        self.now_ms = until_ms
        self.provider.pass_time(until_ms)

    def close(self) -> None:
        for region in self.regions.values():
            region.loop.close()

    def carry(self, region: Region, request: ShareRequest) -> None:
        """A request to the coordinator, and its answer back."""

        def arrived() -> None:
            if self._coordinator is None:
                return
            answer = self._coordinator.answer(request, self._coordinator_ms)
            if answer is not None:
                self._send(region.name, "to the region", lambda: back(answer))

        def back(answer: LeasedShare) -> None:
            region.at_true(self.now_ms, lambda: region.hear(answer))

        self._send(region.name, "to the coordinator", arrived)

    @property
    def _coordinator_ms(self) -> float:
        return self.now_ms * self._coordinator_speed

    def _send(self, region: str, way: Way, deliver: Callable[[], None]) -> None:
        self.messages += 1
        chance, trouble = self._random, self.course.trouble
        is_cut = any(
            cut.region == region
            and cut.way in (way, "both")
            and cut.from_ms <= self.now_ms < cut.to_ms
            for cut in self.course.cuts
        )
        for _ in range(2 if chance.random() < trouble else 1):
            delay_ms = chance.uniform(*self.course.one_way_ms)
            if chance.random() < trouble:
                delay_ms = chance.uniform(0, 30_000)
            if not is_cut and chance.random() >= trouble:
                self._at(self.now_ms + delay_ms, deliver)

    def _at(self, at_ms: float, call: Callable[[], None]) -> None:
        heappush(self._due, (at_ms, next(self._order), call))

    def _lose(self) -> None:
        self._coordinator = None

    def _start(self) -> None:
        number = next(self._coordinators)
        self._coordinator = self._kind(self.terms, number, self._coordinator_ms)


# -- what is measured

MINUTES = 16
_CUT = 6 * MINUTE_MS, 11 * MINUTE_MS
_WARM_UP_MS = 2 * MINUTE_MS
_REGIONS = ("asia", "europe", "east", "west")
_EVERYWHERE = dict.fromkeys(_REGIONS, 30)
LIMITS: dict[Unit, int] = {"calls": 60, "a minute": 600}


def moving(minutes: int = MINUTES, every: int = 3) -> list[tuple[float, dict[str, int]]]:
    """Demand that goes around: most of it in one region, some in the next, little elsewhere."""
    found = []
    for turn in range(-(-minutes // every)):
        tasks = dict.fromkeys(_REGIONS, 5)
        tasks[_REGIONS[turn % 4]], tasks[_REGIONS[(turn + 1) % 4]] = 50, 25
        found.append((turn * every * float(MINUTE_MS), tasks))
    return found


def _cut(*regions: str, way: Way = "both") -> tuple[Cut, ...]:
    return tuple(Cut(region, *_CUT, way) for region in regions)


def _around_the_cut(during: Mapping[str, int]) -> list[tuple[float, Mapping[str, int]]]:
    return [(0.0, _EVERYWHERE), (_CUT[0], during), (_CUT[1], _EVERYWHERE)]


_FIRST = _REGIONS[0]
_STEADY = [(0.0, _EVERYWHERE)]
_FAST_AND_SLOW = (1.001, 0.999, 1.001, 0.999, 1.001)
CASES: dict[str, Course] = {
    "demand everywhere": Course(_STEADY),
    "demand moves every 3 minutes": Course(moving()),
    "it moves; clocks 0.2 % apart, 5 % of messages lost, twice or late": Course(
        moving(), clocks=_FAST_AND_SLOW, trouble=0.05
    ),
    "it moves; the coordinator restarts every 2 minutes": Course(
        moving(), restarts=[(at * float(MINUTE_MS), 5_000.0) for at in range(3, MINUTES, 2)]
    ),
    "a region cut off, demand everywhere": Course(_STEADY, _cut(_FIRST)),
    "the same, answers alone are lost": Course(_STEADY, _cut(_FIRST, way="to the region")),
    "a region cut off whose demand ends then": Course(
        _around_the_cut({**_EVERYWHERE, _FIRST: 2}), _cut(_FIRST)
    ),
    "a region cut off to which all demand moves": Course(
        _around_the_cut({**dict.fromkeys(_REGIONS, 2), _FIRST: 90}), _cut(_FIRST)
    ),
    "all regions cut off, demand everywhere": Course(_STEADY, _cut(*_REGIONS)),
}


@dataclass(frozen=True, slots=True)
class RegionFigures:
    """Of a run: the most that the account saw, the part of the limit that was used while it was
    wanted, over all and in the minutes of the cut, and messages a region and second."""

    most: int
    used: float
    used_in_cut: float
    messages: float


def measure(terms: LeaseTerms, course: Course, seed: int = 1) -> RegionFigures:
    world = World(terms, course, seed)
    marks = []
    for at_ms in (_WARM_UP_MS, *_CUT, MINUTES * MINUTE_MS):
        world.run_until(at_ms)
        marks.append((world.provider.used, world.provider.wanted))
    world.close()
    seconds = MINUTES * 60 * len(terms.regions)
    return RegionFigures(
        world.provider.most,
        _part(marks[0], marks[-1]),
        _part(marks[1], marks[2]),
        world.messages / seconds,
    )


def _part(begin: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[0] - begin[0]) / (end[1] - begin[1])


def sharings(unit: Unit) -> dict[str, LeaseTerms]:
    """Ways to share: a fixed split, which is a lease of nothing, and leases of two lengths."""
    terms = LeaseTerms(LIMITS[unit], _REGIONS, unit)
    short_s = 15 + terms.counts_ms // 1000
    return {
        "split in four": replace(terms, safe=terms.limit // len(_REGIONS)),
        f"leases of {short_s:.0f} s": replace(terms, lease_ms=short_s * 1000),
        "leases of 10 min": replace(terms, lease_ms=600_000.0),
    }


def table(unit: Unit, only: str, seed: int) -> Grid:
    ways = sharings(unit)
    heads = [f"{name}: most, used, used in minutes 6 to 11" for name in ways]
    rows = []
    for name, course in CASES.items():
        if only not in name:
            continue
        found = [measure(terms, course, seed) for terms in ways.values()]
        rows.append([name, *(f"{x.most}, {x.used:.1%}, {x.used_in_cut:.1%}" for x in found)])
    return Grid(f"{LIMITS[unit]} {unit}, four regions, {MINUTES} minutes", ["", *heads], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="a part of the names of the cases")
    parser.add_argument("--unit", choices=[*LIMITS], help="calls in flight, or calls a minute")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    for unit in [given.unit] if given.unit else LIMITS:
        print(table(unit, given.only, given.seed).markdown(), flush=True)


if __name__ == "__main__":
    main()
