"""Scheduler of a pool: limits, queues, permits, and start-time fair queueing at each limit. Pure.

Goyal, Vin and Cheng, "Start-time fair queueing" (SIGCOMM 1996): a tenant's turn comes by the
virtual time at which its service starts; its use, divided by its weight, moves its next start
forward; the limit's own time is the start of what is served, so an idle tenant saves nothing.

Invariants: all limits of a call or none; nothing is counted that can be derived; a queue that is
not empty stands at the one limit that blocks it; a repeated message has no second effect; a call
is refused early only if no order of events could still admit it in time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import floor
from typing import NamedTuple

from tidegate.limiter.messages import USAGE_LATER, Barred, Hint, Outlook, Push, SyncRequest
from tidegate.limiter.model.rates import Charge, Spending, span_of
from tidegate.limiter.policy import (
    Band,
    Concurrency,
    Limit,
    PoolPolicy,
    Quota,
    Rate,
    implicit_limit,
)

# Where a queue stands whose session takes no grants.
BLOCKED = "!"
# What a limit is that no policy names: nobody gets in.
NO_LIMIT = Concurrency(0)

ADAPT_PAUSE_MS = 1000
# One more in so many calls, at the most.
ADAPT_CALLS = 25


class Flow(NamedTuple):
    """What waiters have in common that stand in one queue. Bands count from 1, the highest."""

    band: int
    tenant: str
    lane: tuple[str, ...]


@lru_cache(maxsize=10_000)
def read_flow(key: str) -> Flow:
    band, tenant, lane = key.split("|", 2)
    return Flow(int(band), tenant, tuple(lane.split(" ")))


class Member(NamedTuple):
    """A ticket as it stands in its queue. `amounts` are in the order of the lane; where there is
    none it takes 1."""

    ticket: int
    hard_ms: int
    cost_ms: int
    amounts: tuple[int, ...]

    def amount(self, position: int) -> int:
        return self.amounts[position] if position < len(self.amounts) else 1


@lru_cache(maxsize=10_000)
def read_member(text: str) -> Member:
    ticket, hard_ms, cost_ms, amounts = text.split("|", 3)
    read = tuple(1 if amount is None else amount for amount in read_actual(amounts))
    return Member(int(ticket), int(hard_ms), int(cost_ms), read)


def read_actual(text: str) -> list[int | None]:
    """What a call really used, by position in its lane; None where that is not known."""
    amounts = text.split(",") if text else []
    return [int(amount) if amount.isdigit() else None for amount in amounts]


@dataclass(slots=True)
class Held:
    """A permit. `charges`: position in the lane -> what it took of that rate."""

    seq: int
    until: int
    cost_ms: int
    charges: dict[int, Charge]
    flow: str


@dataclass(slots=True, eq=False)
class Queue:
    """What one session has waiting of one flow: member -> stamp, oldest first.

    at: the limit that holds it up, or `BLOCKED`. bounces: how often the ticket of stamp `bounced`
    was sent from limit to limit. starving: the sequence at which that became too often.
    """

    sid: str
    key: str
    flow: Flow
    tickets: dict[str, int] = field(default_factory=dict)
    at: str | None = None
    bounces: int = 0
    bounced: int = 0
    starving: int = 0

    @property
    def id(self) -> str:
        return f"{self.sid}|{self.key}"

    def first(self) -> tuple[str, int]:
        return next(iter(self.tickets.items()))


@dataclass(slots=True)
class Session:
    """A process's liveness. `queues` by flow: those that are not empty. `since`: the version of the
    roster at which it came."""

    gen: int
    batch: int
    expiry: int
    name: str
    sent: int = 0
    acked: int = 0
    blocked: bool = False
    closed_at: int | None = None
    since: int = 0
    held: dict[int, Held] = field(default_factory=dict)
    queues: dict[str, Queue] = field(default_factory=dict)


@dataclass(slots=True)
class Gate:
    """What makes a pause last until it is opened: one call at a time may try. taker: the session
    and ticket of the last one. every_ms: the least time between two. rounds: how many failed."""

    every_ms: int
    most_ms: int
    rounds: int = 0
    taker: tuple[str, int] | None = None


@dataclass(slots=True)
class Pause:
    """Nobody is admitted until `until`, and then one by one over `ramp_ms`; `passed` is how much
    has been."""

    until: int
    ramp_ms: int
    said: str
    passed: int = 0
    gate: Gate | None = None


class Lapsing(NamedTuple):
    """A permit held over for a dead session."""

    ticket: int
    sid: str
    lane: str


@dataclass(slots=True)
class BandState:
    """What waits under a limit in one band, and whose turn it is.

    lines: tenant -> its queues here, by id. tags: tenant -> virtual start, also of tenants that
    went and are ahead of `virtual`, the band's time. credit: thousandths of a turn that it has
    saved. Under a rate it is owed what its least share gives from `from_us` to `passed_us`, when a
    higher band took something last; `from_us` lies ahead where it had more than its share.
    `held_at` is when it found no room last, `used_at` when it took something.
    """

    lines: dict[str, dict[str, Queue]] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)
    virtual: int = 0
    credit: int = 0
    from_us: int = 0
    passed_us: int = 0
    held_at: int = 0
    used_at: int = 0

    @property
    def waits(self) -> int:
        return sum(map(len, self.lines.values()))

    def tag(self, tenant: str) -> int:
        if tenant in self.lines:
            return self.tags[tenant]
        return max(self.virtual, self.tags.get(tenant, 0))

    def front(self) -> tuple[int, str]:
        """Whose turn it is: the least tag, and the tenant."""
        return min(zip(map(self.tags.__getitem__, self.lines), self.lines, strict=True))

    def line_front(self, tenant: str) -> tuple[int, Queue]:
        """The oldest first ticket of a tenant's queues here, and the queue."""
        heads = ((queue.first()[1], queue.id) for queue in self.lines[tenant].values())
        stamp, queue_id = min(heads)
        return stamp, self.lines[tenant][queue_id]


@dataclass(slots=True)
class LimitState:
    """One limit. `under` are the permits that count under it: (session, ticket). `current` is what
    an adaptive one has found out, in thousandths. `retry_at` and `reserved` are of one call."""

    name: str
    limit: Limit = NO_LIMIT
    under: set[tuple[str, int]] = field(default_factory=set)
    bands: dict[int, BandState] = field(default_factory=dict)
    spending: Spending = field(default_factory=Spending)
    pause: Pause | None = None
    current: int | None = None
    dropped_at: int = 0
    shadowed: int = 0
    asserted: int = 0
    retry_at: int | None = None
    reserved: int = 0
    cost_ms: int = 0

    def room_again(self, at: int) -> None:
        """Room at `at`, unless something is released before; of several who look, the first
        counts."""
        self.retry_at = at if self.retry_at is None else min(self.retry_at, at)

    def clamped(self, amount: int) -> int:
        """What one call takes of a rate: more than it can ever give is all of it."""
        exact = isinstance(self.limit, Rate) and self.limit.exact
        return min(amount, 1 if exact else self.limit.bound)

    def cost(self, cost_ms: int) -> int:
        """What a call is charged until it has ended."""
        return self.cost_ms or cost_ms

    def learn(self, took_ms: int) -> None:
        """A call took so long."""
        more = (took_ms - self.cost_ms) // 8 if self.cost_ms else took_ms
        self.cost_ms = max(1, self.cost_ms + more)

    @property
    def used(self) -> int:
        return len(self.under)

    @property
    def is_implicit(self) -> bool:
        """Whether no policy names it, and it has no bound."""
        return self.limit is implicit_limit(self.name)

    @property
    def is_named(self) -> bool:
        """Whether the policy names it."""
        return self.limit is not NO_LIMIT and not self.is_implicit

    @property
    def waits(self) -> int:
        return sum(band.waits for band in self.bands.values())

    @property
    def is_rate(self) -> bool:
        return isinstance(self.limit, Rate | Quota)

    @property
    def settles(self) -> bool:
        """Whether usage is corrected after a call: an exact log counts admissions."""
        return self.is_rate and not (isinstance(self.limit, Rate) and self.limit.exact)

    @property
    def minimum(self) -> int:
        """The least that an adaptive limit goes down to; 0 where it does not adapt."""
        if isinstance(self.limit, Concurrency) and self.limit.adaptive:
            return self.limit.adaptive.minimum
        return 0

    def band(self, number: int) -> BandState:
        return self.bands.setdefault(number, BandState())

    def parked(self, number: int) -> int:
        return self.bands[number].waits if number in self.bands else 0

    def waiting_bands(self) -> list[int]:
        return [number for number in sorted(self.bands) if self.bands[number].lines]

    def adapted(self) -> int:
        return self.limit.bound * 1000 if self.current is None else self.current

    def adapt(self, outcome: int, now: int) -> None:
        """One more for a round of successes while it is used up; one less for each call that was
        dropped then, else less at most once a second."""
        most, full = self.limit.bound * 1000, self.used >= self.adapted() // 1000
        if outcome == 0 and full:
            step = 1_000_000 // max(self.adapted(), ADAPT_CALLS * 1000)
            self.current = min(most, self.adapted() + step)
        elif outcome == 2 and full:
            taken = max(self.minimum, self.used - 1) * 1000
            if taken < self.adapted():
                self.current, self.dropped_at = taken, now
        elif outcome == 2 and now - self.dropped_at >= ADAPT_PAUSE_MS:
            less = max(self.minimum * 1000, self.adapted() * 7 // 10)
            self.current, self.dropped_at = min(most, less), now


@lru_cache(maxsize=100)
def read_bands(bands: tuple[Band, ...]) -> list[tuple[int, int]]:
    """Per band, in thousandths: its least share, and what is kept free for the bands above."""
    found, above = [], 0
    for band in bands:
        found.append((round(band.min_share * 1000), above))
        above += round(band.headroom * 1000)
    return found


# A limit without a bound comes back after a pause as one of this bound does.
RAMP_BOUND = 64
# A ticket that was sent from limit to limit so often gets what it needs kept free.
STARVES = 8
# Of virtual time in a ms of use by a tenant of weight 1: what is rounded off is less than a fifth
# of a percent from 5 ms on, at any weight.
VIRTUAL_UNITS = 100_000
# A double counts whole numbers up to 2^53: virtual time begins again before it comes near.
LONGEST = 1 << 51
# How far behind a band's time the tag of a tenant that waits no more is still known: its calls may
# be under way, and what they used is added to it. An hour of one permit of weight 1.
BEHIND = 3_600_000 * VIRTUAL_UNITS

# While a higher band uses a rate, lower ones leave one part in so many of it free.
LEFT_FREE = 20


class Places:
    """The limits and the queues of a pool. Fields under `of one call` are set again by each."""

    def __init__(self) -> None:
        self.policy: PoolPolicy | None = None
        self.limits: dict[str, LimitState] = {}
        self.sessions: dict[str, Session] = {}
        self.queues_of: defaultdict[str, dict[str, Queue]] = defaultdict(dict)
        self.stamps: dict[str, int] = {}
        # Tenants that left a queue and whose stamps may be forgotten.
        self.left: set[str] = set()
        self._starving: set[Queue] = set()
        self.starves = STARVES
        self.longest = LONGEST
        self.seq = 0
        self.recover_until = 0
        # of one call
        self.now = 0
        self.resets: Mapping[str, int] = {}
        self.touched: set[str] = set()

    # -- what the policy says

    def limit(self, name: str) -> LimitState:
        limit = self.limits.get(name)
        if limit is None:
            limit = self.limits[name] = LimitState(name, implicit_limit(name) or NO_LIMIT)
        return limit

    def pause_of(self, limit: LimitState) -> Pause | None:
        """Its pause, the time included over which calls come back after it."""
        pause = limit.pause
        goes_on = pause and (pause.gate or self.now < pause.until + pause.ramp_ms)
        return pause if goes_on else None

    def is_tried(self, gate: Gate) -> bool:
        """Whether the call that a gate let try is still under way."""
        sid, ticket = gate.taker or ("", 0)
        return sid in self.sessions and ticket in self.sessions[sid].held

    def forget_unnamed(self) -> None:
        """Nothing is kept of the order at a limit that no policy names and nobody waits at."""
        for limit in self.limits.values():
            if not limit.is_named and not limit.waits:
                limit.bands.clear()

    def lane(self, flow: Flow) -> list[LimitState]:
        return [self.limit(name) for name in flow.lane]

    def weight(self, tenant: str) -> int:
        return self.policy.weights.get(tenant, 1) if self.policy else 1

    def step(self, cost_ms: int, tenant: str) -> int:
        """What so much use adds to a tenant's virtual time."""
        return cost_ms * VIRTUAL_UNITS // self.weight(tenant)

    def band_rule(self, band: int) -> tuple[int, int]:
        """Least share and what is kept free above, in thousandths."""
        rules = read_bands(self.policy.bands) if self.policy else [(0, 0)]
        return rules[min(band, len(rules)) - 1]

    def quiet(self) -> bool:
        """The past was lost a moment ago: everybody is to say first what he holds."""
        return self.now < self.recover_until

    # -- derived

    def waiting(self, tenant: str) -> int:
        return sum(len(queue.tickets) for queue in self.queues_of[tenant].values())

    @property
    def parked(self) -> int:
        return sum(limit.waits for limit in self.limits.values())

    def starving(self) -> list[Queue]:
        """Those for whom something is kept free, in their order."""
        return sorted(self._starving, key=lambda queue: (queue.starving, queue.id))

    # -- room

    def cap(self, limit: LimitState, band: int) -> int:
        """How many calls a band may have under a concurrency."""
        bound = limit.adapted() // 1000 if limit.minimum else limit.limit.bound
        above = self.band_rule(band)[1]
        if above == 0:
            return bound
        return max(min(bound, 1), bound * (1000 - above) // 1000)

    def spent(self, limit: LimitState) -> int:
        return limit.spending.look(limit.limit, self.now, self.resets.get(limit.name, 0))

    def _pause_lets(self, limit: LimitState) -> bool:
        pause = self.pause_of(limit)
        bound = RAMP_BOUND if limit.is_implicit else limit.limit.bound
        if pause is None:
            return True
        if self.now < pause.until:
            limit.room_again(pause.until)
            return False
        if pause.gate is not None:
            if not self.is_tried(pause.gate):
                return True
            limit.room_again(self.now + pause.gate.every_ms)
            return False
        if pause.passed < 1 + bound * (self.now - pause.until) // pause.ramp_ms:
            return True
        at = pause.until + -(-pause.passed * pause.ramp_ms // max(1, bound))
        limit.room_again(max(at, self.now + 1))
        return False

    def is_full(self, limit: LimitState, band: int, amount: int) -> bool:
        """True if `amount` does not fit; where only time frees, `retry_at` says when it will."""
        if not self._pause_lets(limit):
            return True
        if isinstance(limit.limit, Concurrency):
            return limit.used + limit.reserved >= self.cap(limit, band)
        spent, bound = self.spent(limit), limit.limit.bound
        if amount == 0:
            return False
        amount = limit.clamped(amount)
        if 0 < spent + amount <= bound:
            kept, at = self._kept_beside(limit, band, amount)
            if at:
                limit.room_again(at)
                return True
            amount += kept
            if spent + amount <= bound:
                return False
        limit.room_again(limit.spending.room_at(limit.limit, amount, self.now))
        return True

    def has_room(self, limit: LimitState, band: int, amount: int) -> bool:
        return limit.limit.shadow or not self.is_full(limit, band, amount)

    # -- least shares of a rate

    def _share(self, number: int) -> int:
        return self.band_rule(number)[0] if number > 1 else 0

    def _lasts_us(self, limit: LimitState, number: int, amount: int) -> int:
        """How long a share takes to give so much."""
        assert isinstance(limit.limit, Rate)
        bound, span_ms = limit.limit.bound, span_of(limit.limit)
        return floor(amount / bound * span_ms * 1_000_000 / self._share(number)) if bound else 0

    def wanted(self, limit: LimitState, number: int) -> int:
        """How much the first ticket of a band takes."""
        band = limit.band(number)
        _, queue = band.line_front(band.front()[1])
        member = read_member(queue.first()[0])
        return limit.clamped(member.amount(queue.flow.lane.index(limit.name)))

    def _kept_for(self, limit: LimitState, number: int) -> int:
        """The part of what its first ticket takes that is kept free for a band: as much as it is
        owed, where a window's share is enough for the ticket; for a greater one nothing until the
        last window before all of it is owed, and then more and more."""
        assert isinstance(limit.limit, Rate)
        band = limit.band(number)
        if not band.lines or band.passed_us <= band.from_us or not self._share(number):
            return 0
        amount = self.wanted(limit, number)
        needed_us = self._lasts_us(limit, number, amount)
        rising_us = min(needed_us, span_of(limit.limit) * 1000)
        left_us = needed_us - (band.passed_us - band.from_us)
        if left_us <= 0:
            return amount
        return max(0, floor(amount * ((rising_us - left_us) / rising_us)))

    def has_saved(self, limit: LimitState, number: int, amount: int) -> bool:
        band = limit.band(number)
        if band.passed_us <= band.from_us or not self._share(number):
            return False
        return band.passed_us - band.from_us >= self._lasts_us(limit, number, amount)

    def _kept_beside(self, limit: LimitState, number: int, amount: int) -> tuple[int, int]:
        """What has to stay free beside a demand, and the moment before which there is no room for
        it. Never so much that it could not be met at all."""
        if not isinstance(limit.limit, Rate):
            return 0, 0
        bound, span_ms = limit.limit.bound, span_of(limit.limit)
        kept = sum(self._kept_for(limit, below) for below in limit.bands if below > number)
        if number > 1 and not self.has_saved(limit, number, amount):
            above = [band for higher, band in limit.bands.items() if higher < number]
            held_at = max((min(band.held_at, self.now) for band in above), default=0)
            if held_at + span_ms > self.now:
                return 0, held_at + span_ms
            if any(band.used_at + span_ms > self.now for band in above):
                kept += bound // LEFT_FREE
        return min(kept, bound - amount), 0

    def count_shares(self, limit: LimitState, number: int, amount: int) -> None:
        """A call of a band took something of a rate: those that wait below are passed, and its own
        share was used."""
        if not isinstance(limit.limit, Rate) or amount == 0:
            return
        now_us, window_us = self.now * 1000, span_of(limit.limit) * 1000
        limit.band(number).used_at = self.now
        for below, band in limit.bands.items():
            if below > number and band.lines and self._share(below):
                if not band.passed_us:
                    band.from_us = max(band.from_us, now_us)
                band.passed_us = now_us
        if self._share(number):
            band = limit.band(number)
            needed_us = self._lasts_us(limit, number, limit.clamped(amount))
            earliest = band.passed_us - needed_us - window_us if band.passed_us else now_us
            band.from_us = min(max(band.from_us, earliest) + needed_us, now_us + window_us)

    # -- places

    def park(self, queue: Queue, limit: LimitState) -> None:
        band, tenant = limit.band(queue.flow.band), queue.flow.tenant
        band.tags[tenant] = band.tag(tenant)
        band.lines.setdefault(tenant, {})[queue.id] = queue
        queue.at = limit.name

    def unpark(self, queue: Queue) -> None:
        """A tenant that goes takes no credit along, and stays charged for what its calls under way
        may use."""
        assert queue.at is not None
        band, tenant = self.limit(queue.at).band(queue.flow.band), queue.flow.tenant
        del band.lines[tenant][queue.id]
        if not band.lines[tenant]:
            del band.lines[tenant]
            if band.tags[tenant] <= band.virtual - BEHIND:
                del band.tags[tenant]
        if not band.lines:
            band.credit = 0
            if band.passed_us:  # what was kept for it is free
                self.touched.add(queue.at)
            band.passed_us = 0

    def forget_starving(self, queue: Queue) -> None:
        """What was kept free for it is anybody's."""
        if queue in self._starving:
            self._starving.discard(queue)
            self.touched.update(queue.flow.lane)
        queue.bounces, queue.bounced = 0, 0

    def vacate(self, queue: Queue) -> None:
        """The queue is empty or its session gone."""
        if queue.at != BLOCKED:
            self.unpark(queue)
        self.forget_starving(queue)
        queue.at = None
        del self.queues_of[queue.flow.tenant][queue.id]
        self.left.add(queue.flow.tenant)
        del self.sessions[queue.sid].queues[queue.key]

    def move(self, queue: Queue, limit: LimitState) -> None:
        """Held up by another limit than it stood at. What is sent to and fro goes first at last."""
        stamp = queue.first()[1]
        self.unpark(queue)
        if queue.bounced != stamp:
            self.forget_starving(queue)
        queue.bounces, queue.bounced = queue.bounces + 1, stamp
        if queue.bounces == self.starves:
            queue.starving = self.seq
            self._starving.add(queue)
        self.park(queue, limit)

    def leave_line(self, queue: Queue) -> None:
        """A queue whose new head takes nothing of the rate in whose line it stands waits where it
        takes something: others who lack that rate are not before it."""
        assert queue.at is not None
        if not self.limit(queue.at).is_rate:
            return
        member = read_member(queue.first()[0])
        takes = [name for i, name in enumerate(queue.flow.lane) if member.amount(i) > 0]
        if takes and queue.at not in takes:
            self.unpark(queue)
            self.park(queue, self.limit(takes[0]))
            self.touched.add(takes[0])

    def block(self, queue: Queue) -> None:
        """Its session takes no grants."""
        self.unpark(queue)
        self.forget_starving(queue)
        queue.at = BLOCKED

    def charge(self, limit: LimitState, flow: Flow, step: int) -> int:
        """Move a tenant's start on; returns where it stood."""
        band = limit.band(flow.band)
        tag = band.tag(flow.tenant)
        band.tags[flow.tenant] = tag + step
        return tag

    def advance(self, band: BandState, tag: int) -> None:
        """Move the time of a band on to `tag`."""
        band.virtual = max(band.virtual, tag)
        if band.virtual > self.longest:
            band.tags = {name: tag - band.virtual for name, tag in band.tags.items()}
            band.virtual = 0

    def correct(self, limit: LimitState, flow: Flow, step: int) -> None:
        """Add what a tenant's calls used beyond what it was charged for them. One that waits gets
        back what it was charged too much, even if that is more than it lies ahead; one that does
        not wait starts no earlier than the band's time."""
        band, tenant = limit.band(flow.band), flow.tenant
        if tenant in band.lines:
            band.tags[tenant] += step
        elif band.lines:
            earliest = band.virtual - BEHIND
            band.tags[tenant] = max(earliest, band.tags.get(tenant, earliest)) + step

    # -- who is held up by what

    def _its_turn(self, queue: Queue, limit: LimitState, stamp: int) -> bool:
        """Not past a higher band, nor past a tenant whose turn comes before, nor past an older
        ticket of its own tenant."""
        if any(limit.parked(higher) for higher in range(1, queue.flow.band)):
            return False
        band, tenant = limit.band(queue.flow.band), queue.flow.tenant
        if not band.lines:
            return True
        if band.tag(tenant) > band.front()[0]:
            return False
        return tenant not in band.lines or band.line_front(tenant)[0] >= stamp

    def blocker(self, queue: Queue, member: Member, stamp: int) -> tuple[LimitState | None, bool]:
        """The limit that holds the first ticket of a queue up, and whether it is full."""
        for position, limit in enumerate(self.lane(queue.flow)):
            amount = member.amount(position)
            if not self.has_room(limit, queue.flow.band, amount):
                return limit, True
            # What takes nothing of a rate does not stand in its line.
            elsewhere = amount > 0 and limit.name != queue.at
            if elsewhere and not self._its_turn(queue, limit, stamp):
                return limit, False
        return None, False

    def blocker_of_new(self, flow: Flow, member: Member) -> LimitState | None:
        """The limit at which a newcomer has to wait: nobody passes earlier waiters."""
        for position, limit in enumerate(self.lane(flow)):
            amount = member.amount(position)
            if (amount > 0 and limit.waits) or not self.has_room(limit, flow.band, amount):
                return limit
        return None


# Of how many calls of a session usage is still expected.
MOST_OWED = 2000


@dataclass(slots=True)
class Reheaded:
    """A queue that lost tickets without their turn having come, and what they cost."""

    queue: Queue
    handed_ms: int | None = None


class Permits(Places):
    """See the module. `owed` is what sessions have still to tell of calls that ended."""

    def __init__(self) -> None:
        super().__init__()
        self.lapsing: dict[Lapsing, int] = {}
        self.owed: dict[str, dict[int, tuple[dict[int, Charge], Flow]]] = {}
        self._reheaded: dict[str, Reheaded] = {}
        self._differs: dict[str, int] = {}
        self.most_owed = MOST_OWED
        # Who is being admitted.
        self.taker = ("", 0)

    def next_seq(self) -> int:
        """A thousand apart: a permit that is passed on inside a process takes the next ones."""
        self.seq += 1000
        return self.seq

    # -- counting

    def count(self, lane: tuple[str, ...], sid: str, ticket: int) -> None:
        for name in lane:
            self.limit(name).under.add((sid, ticket))

    def uncount(self, lane: tuple[str, ...], sid: str, ticket: int, *, touch: bool = True) -> None:
        for name in lane:
            limit = self.limit(name)
            limit.under.discard((sid, ticket))
            if touch and not limit.is_rate:
                self.touched.add(name)

    def admission(self, limit: LimitState, band: int, amount: int) -> Charge | None:
        """One call gets in under one limit. Returns what a settlement needs of a rate."""
        if limit.limit.shadow and self.is_full(limit, band, amount):
            limit.shadowed += 1
        pause = self.pause_of(limit)
        if pause is not None and pause.gate is not None:
            pause.gate.taker = self.taker
            pause.until = max(pause.until, self.now + pause.gate.every_ms)
        elif pause is not None and self.now >= pause.until:
            pause.passed += max(1, min(amount, limit.limit.bound))
        self.count_shares(limit, band, amount)
        return self._spend(limit, amount)

    def _spend(self, limit: LimitState, amount: int) -> Charge | None:
        if not limit.is_rate:
            return None
        self.spent(limit)
        return limit.spending.take(limit.limit, amount, self.now)

    def settle_charges(
        self, charges: dict[int, Charge], flow: Flow, actual: list[int | None]
    ) -> None:
        """Correct what was reserved by what was used; what is not known stays as it is."""
        for position, charge in charges.items():
            used = actual[position] if position < len(actual) else None
            limit = self.limit(flow.lane[position])
            if used is None or not limit.settles:
                continue
            self.spent(limit)
            if limit.spending.settle(limit.limit, charge, used, self.now):
                self.touched.add(limit.name)

    def used(self, key: str, charged_ms: int, took_ms: int) -> None:
        """A call of a flow used `took_ms` of a permit, and its tenant was charged `charged_ms` for
        it: 0 for one that was admitted while nobody waited."""
        if charged_ms:
            self._differs[key] = self._differs.get(key, 0) + took_ms - charged_ms

    def _correct_all(self) -> None:
        for key, differs_ms in self._differs.items():
            flow = read_flow(key)
            for limit in self.lane(flow):
                self.correct(limit, flow, self.step(differs_ms, flow.tenant))
        self._differs = {}

    def free_lapsing(self, permit: Lapsing) -> bool:
        if self.lapsing.pop(permit, None) is None:
            return False
        self.uncount(tuple(permit.lane.split(" ")), permit.sid, permit.ticket)
        return True

    # -- entries

    def say_back(self, q: SyncRequest, session: Session) -> None:
        """All entries of a request that release or give up."""
        self._reheaded = {}
        for transfer in q.transfers:
            self._transfer(q, session, *transfer)
        for release in q.releases:
            self._release(q, session, *release)
        for ticket, actual in q.settles:
            charges, flow = self.owed.get(q.sid, {}).pop(ticket, ({}, None))
            if flow is not None:
                self.settle_charges(charges, flow, read_actual(actual))
        for cancel in q.cancels:
            self._cancel(q, session, *cancel)
        self._correct_all()
        self._charge_handed()
        filling = {q.flows[number - 1] for number, _ in q.enqueues}
        for key, each in list(self._reheaded.items()):
            # Empty for this moment, it would lose its turn to waiters behind it.
            if key not in filling or each.queue.bounces >= self.starves or self._is_rated(each):
                self._rehead(each.queue)
                del self._reheaded[key]

    def rehead_filled(self) -> None:
        """Queues that lost tickets and that new ones came to."""
        for each in self._reheaded.values():
            self._rehead(each.queue)

    def bound_owed(self, sid: str) -> None:
        """Of more calls than so many whose usage is still to be reported the eldest are
        forgotten."""
        owed = self.owed.get(sid, {})
        for ticket in sorted(owed)[: max(0, len(owed) - self.most_owed)]:
            del owed[ticket]

    def _unqueue(self, session: Session, key: str, member: str) -> bool:
        queue = session.queues.get(key)
        if queue is None or queue.tickets.pop(member, None) is None:
            return False
        self._reheaded.setdefault(key, Reheaded(queue))
        return True

    def _transfer(
        self,
        q: SyncRequest,
        session: Session,
        source: int,
        to: int,
        seq: int,
        hard_ms: int,
        flow_number: int,
        member_text: str,
        outcome: int,
        took_ms: int,
    ) -> None:
        """The permit was passed on inside the process already: `to` is held whatever we find.

        Where it has been granted meanwhile it is one permit too many, and the old one is free.
        Where neither is there this was said before and `to` has ended: its release follows.
        """
        key = q.flows[flow_number - 1]
        flow, cost_ms = read_flow(key), 0
        if self._unqueue(session, key, member_text):
            cost_ms = read_member(member_text).cost_ms
            each = self._reheaded[key]
            if each.queue.at is not None and each.queue.at != BLOCKED:
                cost_ms = self.limit(each.queue.at).cost(cost_ms)
            each.handed_ms = (each.handed_ms or 0) + cost_ms
        before, there = session.held.get(source), to in session.held
        if before is not None:
            lane = read_flow(before.flow).lane
            if outcome % USAGE_LATER == 0:
                self._learn(read_flow(before.flow), took_ms)
            self.used(before.flow, before.cost_ms, took_ms)
            del session.held[source]
            passed_on = lane == flow.lane and not there
            self.uncount(lane, q.sid, source, touch=not passed_on)
        if there:
            return
        charges: dict[int, Charge] = {}
        if before is not None:
            member = read_member(member_text or f"{to}|0|0|")
            charges = self.spend_lane(flow, member, self._spend)
        self.count(flow.lane, q.sid, to)
        session.held[to] = Held(seq, self.now + hard_ms, cost_ms, charges, key)

    def spend_lane(
        self, flow: Flow, member: Member, spend: Callable[[LimitState, int], Charge | None]
    ) -> dict[int, Charge]:
        """What one call takes of each limit of its lane, by position."""
        found = (
            (position, spend(limit, member.amount(position)))
            for position, limit in enumerate(self.lane(flow))
        )
        return {position: charge for position, charge in found if charge is not None}

    def _learn(self, flow: Flow, took_ms: int) -> None:
        for limit in self.lane(flow):
            if limit.is_named:
                limit.learn(took_ms)

    def _charge_handed(self) -> None:
        """Tenants are charged for what was passed on out of order: the time of their band comes to
        where its front stands then."""
        bands: dict[tuple[str, int], BandState] = {}
        for each in self._reheaded.values():
            flow, at = each.queue.flow, each.queue.at
            if each.handed_ms is not None and at is not None and at != BLOCKED:
                limit = self.limit(at)
                self.charge(limit, flow, self.step(each.handed_ms, flow.tenant))
                bands[at, flow.band] = limit.band(flow.band)
        for band in bands.values():
            self.advance(band, band.front()[0])

    def _is_rated(self, each: Reheaded) -> bool:
        at = each.queue.at
        return at is not None and at != BLOCKED and self.limit(at).is_rate

    def _rehead(self, queue: Queue) -> None:
        """A queue stands by its new head, which may take less of a rate."""
        if queue.at is not None and queue.at != BLOCKED and self.limit(queue.at).is_rate:
            self.touched.add(queue.at)
        if not queue.tickets:
            self.vacate(queue)
            return
        if queue in self._starving and queue.bounced != queue.first()[1]:
            self.forget_starving(queue)
        if queue.at != BLOCKED:
            self.leave_line(queue)

    def _release(
        self,
        q: SyncRequest,
        session: Session,
        ticket: int,
        flow_number: int,
        outcome: int,
        took_ms: int,
        actual: str,
    ) -> None:
        held = session.held.pop(ticket, None)
        if held is None:
            lane = q.flows[flow_number - 1].split("|", 2)[2]
            self.free_lapsing(Lapsing(ticket, q.sid, lane))
            return
        flow = read_flow(held.flow)
        for limit in self.lane(flow):
            if limit.minimum:
                limit.adapt(outcome % USAGE_LATER, self.now)
            limit.under.discard((q.sid, ticket))
            if not limit.is_rate:
                self.touched.add(limit.name)
        if outcome < USAGE_LATER:
            self.settle_charges(held.charges, flow, read_actual(actual))
        elif held.charges:
            self.owed.setdefault(q.sid, {})[ticket] = held.charges, flow
        if took_ms > 0:
            if outcome % USAGE_LATER == 0:
                self._learn(flow, took_ms)
            self.used(held.flow, held.cost_ms, took_ms)

    def _cancel(
        self, q: SyncRequest, session: Session, ticket: int, flow_number: int, member: str
    ) -> None:
        """A grant that crossed it is released, unused."""
        key = q.flows[flow_number - 1] if flow_number else ""
        if self._unqueue(session, key, member):
            return
        held = session.held.pop(ticket, None)
        if held is not None:
            flow = read_flow(held.flow)
            self.uncount(flow.lane, q.sid, ticket)
            self.used(held.flow, held.cost_ms, 0)
            self.settle_charges(held.charges, flow, [0] * len(flow.lane))


class Earliest(NamedTuple):
    """When there will be room if nothing is released, 0 where a call that ends makes it or nobody
    knows; what is used, -1 of a limit that is paused; whether `at` is certain for every call."""

    at: int
    used: int
    firm: bool


class Outlooks(Permits):
    """See the module. `waited`: queues of which a session may want to know what they wait for, by
    the number of their flow. All fields are of one call."""

    def __init__(self) -> None:
        super().__init__()
        self.firm: frozenset[str] = frozenset()
        self.barred: list[Barred] = []
        self.waited: dict[int, Queue] = {}

    def _is_firm(self, limit: LimitState) -> bool:
        """Nothing is released where requests are counted; else a call may have reserved more than
        it uses."""
        exact = isinstance(limit.limit, Rate) and limit.limit.exact
        return exact or (limit.is_rate and limit.name in self.firm)

    def _earliest(self, limit: LimitState, amount: int) -> Earliest:
        pause, at, used = self.pause_of(limit), 0, limit.used
        if limit.is_rate:
            used, amount = self.spent(limit), limit.clamped(amount)
            if amount and limit.limit.bound and used + amount > limit.limit.bound:
                at = limit.spending.room_at(limit.limit, amount, self.now)
        if limit.limit.shadow:
            return Earliest(0, used, firm=False)
        paused_at = pause.until if pause and pause.until > self.now else 0
        if at > paused_at:
            return Earliest(at, used, self._is_firm(limit))
        if pause and paused_at:
            return Earliest(paused_at, -1, pause.gate is None)
        return Earliest(0, used, firm=False)

    def bar(self, flow: Flow, member: Member, left_ms: int) -> bool:
        """Refuse a ticket that can't be admitted within `left_ms`, even if it were alone; True if
        that is so."""
        latest, found = self.now + left_ms - 1, None
        for position, limit in enumerate(self.lane(flow)):
            returned = not limit.under and not any(self.owed.values())
            settled = limit.is_rate and (self._is_firm(limit) or returned)
            if settled or self.pause_of(limit):
                at, used, firm = self._earliest(limit, member.amount(position))
                if at > latest and (firm or (settled and used >= 0)):
                    latest, found = at, Barred(member.ticket, limit.name, at - self.now, used)
        if found is not None:
            self.barred.append(found)
        return found is not None

    def outlook(self) -> list[Outlook]:
        """What each of `waited` waits for now."""
        found = []
        for number, queue in sorted(self.waited.items()):
            if queue.at is not None and queue.at != BLOCKED:
                limit, amount = self.limit(queue.at), 1
                if limit.is_rate and not self._is_firm(limit):
                    member = read_member(queue.first()[0])
                    amount = member.amount(queue.flow.lane.index(limit.name))
                at, used, firm = self._earliest(limit, amount)
                room_ms = max(0, at - self.now)
                found.append(Outlook(number, queue.at, room_ms, used, int(firm)))
        return found


# Grants that a session may have without having acknowledged one.
ACK_WINDOW = 8
# Steps of one call of the script.
AT_ONCE = 500
# Only waiters whose turn comes so soon anyway are admitted by a permit passed on in their process.
AHEAD_MS = 150
MOST_STARVING = 8

Grant = tuple[int, int]


class Pump(Outlooks):
    """See the module. `subscribed` says whose channel somebody listens to."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0
        self.at_once = AT_ONCE
        self.ahead_ms = AHEAD_MS
        self.subscribed: set[str] = set()
        self.pushed: list[tuple[str, Push]] = []
        self.timed: dict[str, int] = {}
        # Sessions that not all others know yet, and until when they are to wait for that.
        self.fresh: dict[str, int] = {}
        # of one call
        self.own: str | None = None
        self.budget = 0
        self.served = False
        self.more = 0
        self.granted: list[Grant] = []
        self.given_to: defaultdict[str, list[Grant]] = defaultdict(list)

    # -- grants

    def _deliverable(self, sid: str) -> bool:
        """A killed process must not swallow grants, nor a paused one more than a few."""
        session, known = self.sessions.get(sid), sid not in self.fresh
        if known and sid == self.own:
            return True
        if session is None or session.expiry <= self.now:
            return False
        if known and sid in self.subscribed and session.sent - session.acked < ACK_WINDOW:
            return True
        session.blocked = True
        return False

    def _admit(self, sid: str, flow_key: str, member_text: str, cost_ms: int) -> None:
        member, flow = read_member(member_text), read_flow(flow_key)
        seq, session = self.next_seq(), self.sessions[sid]
        self.taker = sid, member.ticket
        charges = self.spend_lane(
            flow, member, lambda limit, amount: self.admission(limit, flow.band, amount)
        )
        self.count(flow.lane, sid, member.ticket)
        until = self.now + member.hard_ms
        session.held[member.ticket] = Held(seq, until, cost_ms, charges, flow_key)
        if sid == self.own:
            self.granted.append((member.ticket, seq))
        else:
            session.sent += 1
            self.given_to[sid].append((member.ticket, seq))

    def publish(self) -> None:
        for sid, grants in self.given_to.items():
            session = self.sessions[sid]
            self.pushed.append((sid, Push(self.epoch, session.gen, session.sent, grants, self.now)))

    # -- newcomers

    def ask(self, q: SyncRequest, session: Session) -> tuple[list[int], list[int]]:
        """Stamps of those that queue up, 0 for the others, and the tickets that were refused.

        A batch that is said again (`full`) may name tickets that are there: they keep their place.
        """
        stamps, refused = [], []
        for place, (number, member) in enumerate(q.enqueues):
            key = q.flows[number - 1]
            queue, ticket = session.queues.get(key), read_member(member).ticket
            stamp = 0
            if q.full and queue is not None and member in queue.tickets:
                stamp = queue.tickets[member]
            elif not (q.full and ticket in session.held):
                left_ms = q.lefts[place] if q.lefts else 0
                stamp = self._ask_one(session, q.sid, key, member, left_ms)
                if stamp < 0:
                    refused.append(ticket)
                elif stamp > 0:
                    self.waited[number] = session.queues[key]
            stamps.append(max(0, stamp))
        return stamps, refused

    def _ask_one(self, session: Session, sid: str, key: str, member: str, left_ms: int) -> int:
        """The stamp of a new ticket; 0 if it went straight in or its deadline comes too early, -1
        if it is refused."""
        flow, queue = read_flow(key), session.queues.get(key)
        limit: LimitState | None = self.limit(flow.lane[0])
        if queue is None and not self.quiet() and sid not in self.fresh:
            limit = self.blocker_of_new(flow, read_member(member))
        if limit is None:
            self._admit(sid, key, member, 0)
            return 0
        if left_ms and self.bar(flow, read_member(member), left_ms):
            return 0
        most = self.policy.queue_per_tenant if self.policy else 0
        if self.waiting(flow.tenant) >= most:
            return -1
        stamp = self.stamps[flow.tenant] = self.stamps.get(flow.tenant, 0) + 1
        if queue is None:
            queue = session.queues[key] = Queue(sid, key, flow)
            self.queues_of[flow.tenant][queue.id] = queue
            self.park(queue, limit)
            self.touched.add(limit.name)
        queue.tickets[member] = stamp
        return stamp

    # -- waiters

    def _let_in(self, queue: Queue, limit: LimitState) -> None:
        """The first ticket of a queue that stands at `limit`."""
        text, _ = queue.first()
        member, flow = read_member(text), queue.flow
        del queue.tickets[text]
        cost_ms = limit.cost(member.cost_ms)
        step = self.step(cost_ms, flow.tenant)
        for each in self.lane(flow):
            if each is limit or each.parked(flow.band):
                self.advance(each.band(flow.band), self.charge(each, flow, step))
        self._admit(queue.sid, queue.key, text, cost_ms)
        if not queue.tickets:
            self.vacate(queue)
            return
        if self._starving:
            self.forget_starving(queue)
        self.leave_line(queue)

    def _step(self, limit: LimitState, number: int, bands: list[int]) -> bool:
        """Look at the queue whose turn it is in a band; True if there may be more to do here."""
        band = limit.band(number)
        queue = band.line_front(band.front()[1])[1]
        self.budget -= 1
        if not self._deliverable(queue.sid):
            self.block(queue)
            return True
        text, stamp = queue.first()
        other, full = self.blocker(queue, read_member(text), stamp)
        if other is None:
            self._let_in(queue, limit)
            self._pay_turn(limit, number, bands)
            return True
        if other is limit:
            if isinstance(limit.limit, Rate):
                band.held_at = self.now
            return False
        self.move(queue, other)
        if not full:
            self.touched.add(other.name)
        return True

    def serve_starving(self) -> None:
        """What is free is kept for waiters that were sent to and fro too often, in their order:
        where what they lack is released by calls that end."""
        if self.served or self.quiet() or not self._starving:
            return
        self.served = True
        for queue in self.starving()[:MOST_STARVING]:
            if not self._deliverable(queue.sid):
                continue
            member, band = read_member(queue.first()[0]), queue.flow.band
            lacking = [
                limit
                for position, limit in enumerate(self.lane(queue.flow))
                if not self.has_room(limit, band, member.amount(position))
            ]
            if not lacking:
                assert queue.at is not None
                self._let_in(queue, self.limit(queue.at))
            elif all(self._is_given_back(limit, band) for limit in lacking):
                for limit in self.lane(queue.flow):
                    limit.reserved += 1

    def _is_given_back(self, limit: LimitState, band: int) -> bool:
        """Whether calls that end make room under a limit."""
        return not limit.is_rate and not self.pause_of(limit) and self.cap(limit, band) > 0

    def pump(self) -> None:
        if self.quiet():
            return
        for name in [name for name, at in self.timed.items() if at <= self.now]:
            del self.timed[name]
            self.touched.add(name)
            self._end_implicit(self.limit(name))
        self.serve_starving()
        while self.touched and self.budget > 0:
            for name in sorted(self.touched):
                self.touched.discard(name)
                self._pump_limit(self.limit(name))
                if self.budget <= 0:
                    self.touched.add(name)
        if self.budget <= 0:
            self.more = 1
            for name in self.touched:
                self.limit(name).retry_at = self.now
        self._set_timers()

    def _end_implicit(self, limit: LimitState) -> None:
        """Of a pause that has passed nothing is kept where no policy names the limit."""
        pause = limit.pause
        if not limit.is_implicit or pause is None or pause.gate:
            return
        if self.pause_of(limit) is None:
            limit.pause = None
        else:
            over_at = pause.until + pause.ramp_ms
            self.look_again(limit.name, pause.until if self.now < pause.until else over_at)

    def _pump_limit(self, limit: LimitState) -> None:
        going = True
        while going and self.budget > 0:
            number, bands = self._turn(limit)
            going = number > 0 and self._step(limit, number, bands)

    def _turn(self, limit: LimitState) -> tuple[int, list[int]]:
        """The band whose turn it is, 0 for none, and all that could go. Strictly the highest, but
        a lower one that has saved up for a turn has it."""
        bands = [n for n in limit.waiting_bands() if self.has_room(limit, n, 0)]
        for number in bands[1:]:
            owed = self._is_owed(limit, number)
            if owed and self._fits_head(limit, number):
                return number, bands
            if owed and isinstance(limit.limit, Rate):
                break  # nor does a band below it go before
        return (bands[0] if bands else 0), bands

    def _pay_turn(self, limit: LimitState, chosen: int, bands: list[int]) -> None:
        """Every admission gives each lower band that waits its least share of a turn."""
        if isinstance(limit.limit, Rate):
            return
        for number in bands[1:]:
            band = limit.band(number)
            if band.lines:
                band.credit = min(2000, band.credit + self.band_rule(number)[0])
                if number == chosen:
                    band.credit = max(0, band.credit - 1000)

    def _is_owed(self, limit: LimitState, number: int) -> bool:
        """Whether a lower band has saved up for its first ticket."""
        band = limit.band(number)
        if not isinstance(limit.limit, Rate):
            return band.credit >= 1000
        if band.passed_us <= band.from_us:
            return False
        return self.has_saved(limit, number, self.wanted(limit, number))

    def _fits_head(self, limit: LimitState, number: int) -> bool:
        if isinstance(limit.limit, Concurrency):
            return True
        return self.has_room(limit, number, self.wanted(limit, number))

    def look_again(self, name: str, at: int) -> None:
        self.timed[name] = min(self.timed.get(name, at), at)

    def _set_timers(self) -> None:
        """A limit that only time frees has a moment at which somebody looks again."""
        for limit in self.limits.values():
            if limit.retry_at is not None and limit.waits:
                self.look_again(limit.name, limit.retry_at)

    # -- back in line

    def unblock(self, session: Session) -> None:
        """It takes grants again: its queues stand where they stood, by the age of their tickets."""
        session.blocked = False
        for queue in sorted(session.queues.values(), key=lambda queue: queue.id):
            if queue.at == BLOCKED:
                text, stamp = queue.first()
                found, _ = self.blocker(queue, read_member(text), stamp)
                limit = found or self.limit(queue.flow.lane[0])
                self.park(queue, limit)
                self.touched.add(limit.name)

    # -- passing on

    def _may_pass_on(self, queue: Queue) -> bool:
        """Where nobody else waits for the same limits, and none has to hear how each call went."""
        for limit in self.lane(queue.flow):
            if limit.is_rate or self.pause_of(limit) or limit.minimum:
                return False
            if not limit.limit.shadow and limit.used > self.cap(limit, queue.flow.band):
                return False
            here = [queue.flow.band] if limit.name == queue.at else []
            if limit.waiting_bands() not in ([], here):
                return False
        return True

    def hints(self, q: SyncRequest) -> list[Hint]:
        """Which of its own waiters a session may admit by permits that it frees itself."""
        allowed = self.policy.hand_off if self.policy else True
        if self.own is None or not allowed or self._starving or self.quiet():
            return []
        wants = [
            (queue, number, cost_ms)
            for number, cost_ms in q.wants
            if (queue := self.sessions[q.sid].queues.get(q.flows[number - 1])) is not None
            and queue.at != BLOCKED
        ]
        weights = defaultdict[tuple[str | None, int], list[int]](list)
        for queue, _, _ in wants:
            weights[queue.at, queue.flow.band].append(self.weight(queue.flow.tenant))
        return [
            self._hint(queue, number, cost_ms, weights[queue.at, queue.flow.band])
            for queue, number, cost_ms in wants
            if self._may_pass_on(queue)
        ]

    def _hint(self, queue: Queue, number: int, cost_ms: int, weights: list[int]) -> Hint:
        """All tenants come so far in virtual time, so that none is at its end long before the
        others. What those that are not asked for weigh is taken to be as much as these do on
        average."""
        assert queue.at is not None
        flow: Flow = queue.flow
        limit = self.limit(queue.at)
        band = limit.band(flow.band)
        first, _ = band.line_front(flow.tenant)
        cost_ms = limit.cost(cost_ms)
        tag, step = band.tag(flow.tenant), max(1, self.step(cost_ms, flow.tenant))
        ahead = 1 + self.cap(limit, flow.band) * self.ahead_ms // cost_ms
        behind = (band.virtual - tag) // step
        own = ahead * len(weights) * self.weight(flow.tenant)
        horizon = first + behind - (-own // (sum(weights) * len(band.lines))) - 1
        return Hint(number, horizon, tag, first, step)
