"""State of a pool in the model: its limits, sessions, queues and permits as plain records.

Invariant: nothing is counted that can be derived: the use of a limit is the permits under it, the
waiters are the tickets of the queues.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import floor
from typing import NamedTuple

from tidegate.limiter.messages import Push
from tidegate.limiter.model.rates import Charge, RateSpending
from tidegate.limiter.policy import (
    CALL_USE,
    Band,
    Concurrency,
    FairBy,
    Limit,
    PoolPolicy,
    Quota,
    Rate,
    implicit_limit,
)

# The place of a queue whose session takes no grants.
BLOCKED = "!"
# A limit that is not in the policy admits no call.
NO_LIMIT = Concurrency(0)

_RATES = (Rate, Quota)

ADAPT_PAUSE_MS = 1000
# The limit rises by at most one per this many calls.
ADAPT_CALLS = 25


class FlowName(NamedTuple):
    """What the waiters of one queue have in common. Bands count from 1, the highest."""

    band: int
    tenant: str
    lane: tuple[str, ...]


@lru_cache(maxsize=10_000)
def read_flow(key: str) -> FlowName:
    band, tenant, lane = key.split("|", 2)
    return FlowName(int(band), tenant, tuple(lane.split(" ")))


class Member(NamedTuple):
    """A ticket in its queue.

    use: its probable use, in the measure of shares. amounts: in the order of the lane; a missing
    one is 1.
    """

    ticket: int
    hard_ms: int
    use: int
    amounts: tuple[int, ...]

    def amount(self, position: int) -> int:
        return self.amounts[position] if position < len(self.amounts) else 1


@lru_cache(maxsize=10_000)
def read_member(text: str) -> Member:
    ticket, hard_ms, use, amounts = text.split("|", 3)
    read = tuple(1 if amount is None else amount for amount in read_actual(amounts))
    return Member(int(ticket), int(hard_ms), int(use), read)


def read_actual(text: str) -> list[int | None]:
    """Return what a call used, by position in its lane; None where unknown."""
    amounts = text.split(",") if text else []
    return [int(amount) if amount.isdigit() else None for amount in amounts]


def read_charges(text: str) -> dict[int, Charge]:
    """Return charges from the scripts' format: position=amount@bucket, positions counting from
    1.
    """
    found: dict[int, Charge] = {}
    for one in text.split(",") if text else ():
        position, _, charge = one.partition("=")
        amount, _, end = charge.partition("@")
        found[int(position) - 1] = int(amount), int(end)
    return found


def write_charges(charges: Mapping[int, Charge]) -> str:
    """Return charges in the scripts' format: the inverse of `read_charges`."""
    return ",".join(f"{i + 1}={amount}@{end}" for i, (amount, end) in charges.items())


@dataclass(slots=True)
class HeldPermit:
    """A permit in use.

    use: what its tenant was charged for it, 0 if it was admitted while no call waited. charges:
    position in the lane -> what it took of that rate.
    """

    seq: int
    until: int
    use: int
    charges: dict[int, Charge]
    flow: str


@dataclass(slots=True, eq=False)
class SessionQueue:
    """The waiters of one flow in one session: member -> stamp, in the order of the stamps.

    at: the limit that blocks it, or `BLOCKED`. bounces: how often the ticket of stamp `bounced`
    was moved from limit to limit. starving: the sequence at which that became too often.
    """

    sid: str
    key: str
    flow: FlowName
    tickets: dict[str, float] = field(default_factory=dict)
    at: str | None = None
    bounces: int = 0
    bounced: float = 0
    starving: int = 0

    @property
    def id(self) -> str:
        return f"{self.sid}|{self.key}"

    def first(self) -> tuple[str, float]:
        return next(iter(self.tickets.items()))

    def add(self, member: str, stamp: float) -> None:
        last = next(reversed(self.tickets.values()), 0)
        self.tickets[member] = stamp
        if stamp <= last:  # due before others, or that of a session that joined again
            in_order = sorted(self.tickets.items(), key=lambda one: (one[1], one[0]))
            self.tickets = dict(in_order)


@dataclass(slots=True)
class SessionState:
    """A process's session.

    queues: by flow, those that are not empty. since: the version of the roster at which it came.
    full: since when, and at which rate, its waiters keep their turn until it acknowledges grants.
    revision: of the policy that it has.
    """

    gen: int
    batch: int
    expiry: int
    name: str
    sent: int = 0
    acked: int = 0
    blocked: bool = False
    closed_at: int | None = None
    full: tuple[int, str] | None = None
    since: int = 0
    revision: int = 0
    held: dict[int, HeldPermit] = field(default_factory=dict)
    queues: dict[str, SessionQueue] = field(default_factory=dict)


@dataclass(slots=True)
class PauseGate:
    """What makes a pause last until it is opened: one call at a time may probe.

    taker: the session and ticket of the last probe. every_ms: the least time between two. rounds:
    how many failed.
    """

    every_ms: int
    most_ms: int
    rounds: int = 0
    taker: tuple[str, int] | None = None


@dataclass(slots=True)
class Pause:
    """A pause until `until`, after which calls resume one by one over `ramp_ms`.

    `passed`: how much was admitted during the ramp, as far as it was not returned.
    """

    until: int
    ramp_ms: int
    reason: str
    passed: int = 0
    gate: PauseGate | None = None


class Lapsing(NamedTuple):
    """A permit held over for a dead session."""

    ticket: int
    sid: str
    lane: str


@dataclass(slots=True)
class BandState:
    """The waiters of one band under a limit, and their order.

    lines: tenant -> its queues here, by id. tags: tenant -> virtual start, including former tenants
    that are ahead of `virtual`, the band's time. credit: thousandths of a turn that it has saved.

    Under a rate the band is owed what its least share gives from `from_us` to `passed_us`, the last
    time that a higher band took something; `from_us` is in the future if it had more than its
    share. held_at: when it last found no room. used_at: when it last took something. taken,
    taken_before: how much in that window of the clock and the one before it.
    """

    lines: dict[str, dict[str, SessionQueue]] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)
    virtual: int = 0
    credit: int = 0
    from_us: int = 0
    passed_us: int = 0
    held_at: int = 0
    used_at: int = 0
    taken: int = 0
    taken_before: int = 0

    @property
    def waits(self) -> int:
        return sum(map(len, self.lines.values()))

    def taken_lately(self, now: int, span_ms: int) -> int:
        """Return about how much it took of a rate in the last window."""
        taken, before = self._taken_by(now, span_ms)
        return taken + floor(before * ((span_ms - now % span_ms) / span_ms))

    def take(self, amount: int, now: int, span_ms: int) -> None:
        """Record that it took something of a rate."""
        self.taken, self.taken_before = self._taken_by(now, span_ms)
        self.taken, self.used_at = self.taken + amount, now

    def _taken_by(self, now: int, span_ms: int) -> tuple[int, int]:
        passed = now // span_ms - self.used_at // span_ms
        if passed == 0:
            return self.taken, self.taken_before
        return 0, self.taken if passed == 1 else 0

    def tag(self, tenant: str) -> int:
        if tenant in self.lines:
            return self.tags[tenant]
        return max(self.virtual, self.tags.get(tenant, 0))

    def front(self) -> tuple[int, str]:
        """Return the least tag and its tenant, whose turn it is."""
        return min(zip(map(self.tags.__getitem__, self.lines), self.lines, strict=True))

    def line_front(self, tenant: str) -> tuple[float, SessionQueue]:
        """Return the oldest first ticket of a tenant's queues here, and its queue."""
        heads = ((queue.first()[1], queue.id) for queue in self.lines[tenant].values())
        stamp, queue_id = min(heads)
        return stamp, self.lines[tenant][queue_id]


LATENCY_FIRST = 4
LATENCY_PART = 16


def prompt_class(tokens: int) -> int:
    """Return the class of a prompt by the tokens that had to be read.

    There are two classes for each doubling from 16 on.
    """
    found, start = 0, 16
    while tokens >= 2 * start:
        found, start = found + 2, 2 * start
    return found + int(2 * tokens >= 3 * start)


@dataclass(slots=True)
class LatencyWindow:
    """What times to first tokens show of the calls that queue within a server. Lua: `latency`.

    Of this round: `calls` that ended, the time that they `took` and `waited`, and in `used` the sum
    of the calls in use at each end. now, before: the shortest times by class of prompt, in this
    window of rounds and the one before. starting: the server has not been full yet.
    """

    starting: bool = True
    rounds: int = 0
    calls: int = 0
    took: int = 0
    waited: int = 0
    used: int = 0
    now: dict[int, int] = field(default_factory=dict)
    before: dict[int, int] = field(default_factory=dict)

    def note(self, took_ms: int, first_ms: int, tokens: int, used: int) -> None:
        """Record a call that ended.

        A longer prompt is read no faster, so its time is an upper bound for shorter ones.
        """
        one = prompt_class(tokens)
        self.now[one] = min(self.now.get(one, first_ms), first_ms)
        samples = (*self.now.items(), *self.before.items())
        least = min(first for longer, first in samples if longer >= one)
        self.calls, self.took, self.used = self.calls + 1, self.took + took_ms, self.used + used
        self.waited += min(took_ms, max(0, first_ms - least))

    def next_level(self, current: int, paces: Paces) -> int:
        """Return the limit after this round, in thousandths.

        By Little's law, the average number of queued calls is the number in flight times the
        fraction of their time that they wait.
        """
        if self.calls < max(paces.latency_calls, current // 1000):
            return current
        queued = self.used * 1000 // self.calls * self.waited // max(1, self.took)
        full = self.used * 10 >= self.calls * (current // 1000) * 9
        most, fit = 1000 + current // LATENCY_PART, (1000 + current // LATENCY_PART) // 2
        self.rounds += 1
        if queued > most:
            current -= min(current // 2, (queued - fit) // 2)
            self.starting = False
        elif queued <= fit and full:
            current += current if self.starting else max(1000, current // LATENCY_PART)
        if self.rounds >= paces.latency_rounds:
            self.rounds, self.before, self.now, self.starting = 0, self.now, {}, False
            current -= most if full else 0  # measure the next shortest times without a queue
        self.calls = self.took = self.waited = self.used = 0
        return current

    def write(self) -> str:
        """Return the state in the scripts' format."""
        figures = (int(self.starting), self.rounds, self.calls, self.took, self.waited, self.used)
        lists = (
            ",".join(f"{one}={first}" for one, first in sorted(samples.items()))
            for samples in (self.now, self.before)
        )
        return "|".join((*map(str, figures), *lists))


@dataclass(slots=True)
class Restored:
    """What sessions report of a rate after a loss, in the order of the sequence numbers of an
    epoch. Lua: `join`.

    base: its usage up to `seq`. later: admissions after it by their numbers. loose: by session, the
    amount of admissions without a number.
    """

    epoch: int
    seq: int
    base: int
    later: dict[int, int] = field(default_factory=dict)
    loose: dict[str, int] = field(default_factory=dict)

    def more_seen(self, epoch: int, seen: int, seq: int) -> int:
        """Return how much more counts by a report of usage up to `seq`, 0 if unknown."""
        included = 0
        if epoch == self.epoch and seq:
            if seq <= self.seq:
                return 0
            included = sum(amount for at, amount in self.later.items() if at <= seq)
            self.later = {at: amount for at, amount in self.later.items() if at > seq}
            self.seq = seq
        elif epoch > self.epoch:
            self.epoch, self.seq, self.later = epoch, seq, {}
        extra = max(0, seen - self.base - included)
        self.base += included + extra
        return extra

    def more_later(self, epoch: int, sid: str, since: Sequence[int]) -> int:
        """Return how much more counts by a session's own admissions: number and amount,
        alternating."""
        more = loose = 0
        for at, amount in zip(since[::2], since[1::2], strict=True):
            if epoch != self.epoch or at == 0:
                loose += amount
            elif at > self.seq and at not in self.later:
                self.later[at] = amount
                more += amount
        before = self.loose.get(sid, 0)
        if loose > before:
            self.loose[sid] = loose
        return more + max(0, loose - before)

    def write(self) -> str:
        later = ",".join(f"{at}={amount}" for at, amount in sorted(self.later.items()))
        loose = ",".join(f"{sid}={amount}" for sid, amount in sorted(self.loose.items()))
        return f"{self.epoch}|{self.seq}|{self.base}|{later}|{loose}"


@dataclass(slots=True)
class LimitState:
    """One limit.

    under: the permits that count under it, (session, ticket), with what each was charged; tokens in
    flight are the sum. current: the bound that an adaptive limit has found, in thousandths.
    retry_at, reserved and passing belong to one call; passing is a band whose turn precedes that of
    a higher one, and that higher band.
    """

    name: str
    limit: Limit = NO_LIMIT
    under: dict[tuple[str, int], int] = field(default_factory=dict)
    bands: dict[int, BandState] = field(default_factory=dict)
    spending: RateSpending = field(default_factory=RateSpending)
    pause: Pause | None = None
    current: int | None = None
    dropped_at: int = 0
    latency: LatencyWindow | None = None
    shadowed: int = 0
    asserted: int = 0
    restored: Restored | None = None
    retry_at: int | None = None
    reserved: int = 0
    passing: tuple[int, int] = (0, 0)
    cost_ms: int = 0

    def note_room_at(self, at: int) -> None:
        """Note that there is room at `at` unless something is returned before; the earliest
        counts.
        """
        self.retry_at = at if self.retry_at is None else min(self.retry_at, at)

    def clamped(self, amount: int) -> int:
        """Return what one call takes of a rate, at most all that the rate can ever give."""
        exact = isinstance(self.limit, Rate) and self.limit.exact
        return min(amount, 1 if exact else self.limit.bound)

    def usual_ms(self, cost_ms: int) -> int:
        """Return the probable duration of a call."""
        return self.cost_ms or cost_ms

    def learn(self, took_ms: int) -> None:
        """Update the duration of calls by one that took `took_ms`."""
        more = (took_ms - self.cost_ms) // 8 if self.cost_ms else took_ms
        self.cost_ms = max(1, self.cost_ms + more)

    @property
    def used(self) -> int:
        return sum(self.under.values()) if self.by_tokens else len(self.under)

    @property
    def by_tokens(self) -> bool:
        """Whether calls take their tokens of it until they end."""
        return isinstance(self.limit, Concurrency) and self.limit.by_tokens

    @property
    def is_implicit(self) -> bool:
        """Whether the policy does not contain it and it has no bound."""
        return self.limit is implicit_limit(self.name)

    @property
    def is_named(self) -> bool:
        """Whether the policy contains it."""
        return self.limit is not NO_LIMIT and not self.is_implicit

    @property
    def waits(self) -> int:
        return sum(band.waits for band in self.bands.values())

    @property
    def is_rate(self) -> bool:
        return isinstance(self.limit, _RATES)

    def concerns(self, amount: int) -> bool:
        """Whether a call waits for it at all: one that takes nothing of a rate does not, not even
        while the rate is paused.
        """
        return amount > 0 or not self.is_rate

    @property
    def is_freed(self) -> bool:
        """Whether a call that ends may make room, without regard to its usage."""
        return not self.is_rate or (self.pause is not None and self.pause.gate is not None)

    @property
    def is_sized(self) -> bool:
        """Whether calls take different amounts of it."""
        return self.is_rate or self.by_tokens

    @property
    def settles(self) -> bool:
        """Whether usage is corrected after a call; an exact log only counts admissions."""
        return self.is_rate and not (isinstance(self.limit, Rate) and self.limit.exact)

    @property
    def minimum(self) -> int:
        """The least bound of an adaptive limit; 0 if it does not adapt."""
        if isinstance(self.limit, Concurrency) and self.limit.adaptive and self.limit.bound:
            return self.limit.adaptive.minimum
        return 0

    def band(self, number: int) -> BandState:
        band = self.bands.get(number)
        if band is None:
            band = self.bands[number] = BandState()
        return band

    def parked(self, number: int) -> int:
        return self.bands[number].waits if number in self.bands else 0

    def waiting_bands(self) -> list[int]:
        return [number for number in sorted(self.bands) if self.bands[number].lines]

    @property
    def by_latency(self) -> bool:
        """Whether times to first tokens decide how many calls it admits."""
        return self.minimum > 0 and isinstance(self.limit, Concurrency) and self.limit.by_latency

    def adapted(self) -> int:
        if self.current is not None:
            return self.current
        bound = self.limit.bound
        return 1000 * (min(bound, max(self.minimum, LATENCY_FIRST)) if self.by_latency else bound)

    def rewind(self, by_ms: int) -> None:
        """Move times back after the clock was set back."""
        self.dropped_at = max(0, self.dropped_at - by_ms)
        for band in self.bands.values():
            band.held_at, band.used_at = max(0, band.held_at - by_ms), max(0, band.used_at - by_ms)
            band.from_us = max(0, band.from_us - by_ms * 1000)
            band.passed_us = max(0, band.passed_us - by_ms * 1000)

    def adapt_by_latency(self, took_ms: int, first_ms: int, tokens: int, paces: Paces) -> None:
        """Adapt to a call that ended and whose time to the first token is known."""
        latency = self.latency = self.latency or LatencyWindow()
        latency.note(took_ms, first_ms, tokens, self.used)
        level = latency.next_level(self.adapted(), paces)
        self.current = max(self.minimum * 1000, min(self.limit.bound * 1000, level))

    def adapt(self, outcome: int, now: int) -> None:
        """Adapt to the outcome of a call.

        The limit rises by one for a round of successes while it is used up. It falls by one for
        each call that was dropped then; for other dropped calls it falls at most once a second.
        """
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


def read_bands(bands: tuple[Band, ...]) -> list[tuple[int, int]]:
    """Return per band, in thousandths: its least share, and what is kept free for higher bands."""
    found, above = [], 0
    for band in bands:
        found.append((round(band.min_share * 1000), above))
        above += round(band.headroom * 1000)
    return found


# Units of virtual time for one ms (or micro-dollar) of use by a tenant of weight 1: the rounding
# error is below a fifth of a percent from 5 ms on, at any weight.
VIRTUAL_UNITS = 100_000
# Tickets of a tenant of weight 1 whose calls cost a micro-dollar.
TICKET_UNITS = 10_000_000


# Deadlines closer together than this may be served in the order of arrival.
DUE_APART_MS = 250
DUE_STEPS = 1 << 30


@dataclass(slots=True)
class DueOrder:
    """Deadlines of one tenant and band: (due, stamp) of tickets that were the last when they came.

    `last`: the latest of these deadlines. A ticket that is due before some of them gets a stamp
    between two of theirs.
    """

    last: int
    steps: list[tuple[int, int]] = field(default_factory=list)

    def note(self, due: int, stamp: int, now: int) -> None:
        """Record a ticket at the end of the queue. No later ticket is due before `now`."""
        if due >= self.last + DUE_APART_MS:
            self.last = due
            self.steps = [*(step for step in self.steps if step[0] > now), (due, stamp)]

    def before(self, due: int) -> float | None:
        """Return the stamp of a ticket that is due before others; None if it is not."""
        if due >= self.last - DUE_APART_MS:
            return None
        for at, stamp in self.steps:
            if at > due:
                return stamp - min(at - due, DUE_STEPS - 1) / DUE_STEPS
        return None


@dataclass(frozen=True, slots=True)
class Paces:
    """Constants of the scripts, which tests set lower to reach all cases.

    at_once: steps of one call. due_at_once: due timers that one call processes. unblocked_at_once:
    queues per call of a session that takes grants again. ended_at_once: permits and queues of ended
    sessions per call. starves: the number of moves from limit to limit after which capacity is kept
    free for a ticket. longest: virtual time restarts before this value. on_page: how many entries
    of each list one call reports. looked_at: for how many rates it updates the spent amount.
    most_owed: for how many calls of a session usage is still expected. ahead_ms: only waiters whose
    turn comes this soon anyway are admitted by permits passed on in their process. due_after_ms:
    when a call without a deadline is due. latency_calls: the least calls of a round of a limit by
    latency. latency_rounds: the rounds of a window of shortest times.
    """

    at_once: int = 30
    starves: int = 8
    # A double represents whole numbers exactly up to 2^53.
    longest: int = 1 << 51
    on_page: int = 100
    looked_at: int = 50
    most_owed: int = 2000
    ahead_ms: int = 150
    due_after_ms: int = 600_000
    latency_calls: int = 8
    latency_rounds: int = 20
    due_at_once: int = 15
    unblocked_at_once: int = 10
    ended_at_once: int = 20


@dataclass(eq=False, repr=False)
class PoolState:
    """The state that all parts of the model share.

    orders: tenant -> band -> the order of its deadlines, if any of its waiters has had one.
    touched: limits under which a call may be admitted now. left: tenants that left a queue and
    whose stamps may be reset. subscribed: sessions whose channel has a subscriber. pushed: messages
    published to them. kept: epoch and sequence number of the record when this epoch began; None if
    it was empty. noted_sessions: the number of sessions as of the last answered `tend`.
    """

    paces: Paces
    policy: PoolPolicy | None = None
    limits: dict[str, LimitState] = field(default_factory=dict)
    sessions: dict[str, SessionState] = field(default_factory=dict)
    queues_of: defaultdict[str, dict[str, SessionQueue]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    stamps: dict[str, int] = field(default_factory=dict)
    orders: dict[str, dict[int, DueOrder]] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    seq: int = 0
    recover_until: int = 0
    # These belong to one call.
    now: int = 0
    resets: Mapping[str, int] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    epoch: int = 0
    subscribed: set[str] = field(default_factory=set)
    pushed: list[tuple[str, Push]] = field(default_factory=list)
    kept: tuple[int, int] | None = None
    noted_sessions: int = 0
    # As of the policy read last.
    _ruled_by: PoolPolicy | None = None
    _rules: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])

    def limit(self, name: str) -> LimitState:
        limit = self.limits.get(name)
        if limit is None:
            limit = self.limits[name] = LimitState(name, implicit_limit(name) or NO_LIMIT)
        return limit

    def pause_of(self, limit: LimitState) -> Pause | None:
        """Return the limit's pause, its ramp included, or None."""
        pause = limit.pause
        is_active = pause and (pause.gate or self.now < pause.until + pause.ramp_ms)
        return pause if is_active else None

    def is_tried(self, gate: PauseGate) -> bool:
        """Return whether the call that probes a gate is still in progress."""
        sid, ticket = gate.taker or ("", 0)
        return sid in self.sessions and ticket in self.sessions[sid].held

    def forget_unnamed(self) -> None:
        """Forget the order at limits that are not in the policy and have no waiters."""
        for limit in self.limits.values():
            if not limit.is_named and not limit.waits:
                limit.bands.clear()

    def lane(self, flow: FlowName) -> list[LimitState]:
        return [self.limit(name) for name in flow.lane]

    def weight(self, tenant: str) -> int:
        return self.policy.weights.get(tenant, 1) if self.policy else 1

    @property
    def fair_by(self) -> FairBy:
        """The measure of shares."""
        return self.policy.fair_by if self.policy else "seconds"

    def probable_use(self, limit: LimitState, use: int) -> int:
        """Return what a call is charged until it ends; `use`: the estimate of its process."""
        if self.fair_by == "calls":
            return CALL_USE
        return use if self.fair_by == "cost" else limit.usual_ms(use)

    def tickets(self, use: int, tenant: str) -> int:
        """Return how many of a tenant's calls take one unit of its band's time, relative to others.

        That is its weight; in shares by cost, divided by the use of its calls.
        """
        weight = self.weight(tenant)
        return max(1, weight * TICKET_UNITS // use) if self.fair_by == "cost" else weight

    def step(self, use: int, tenant: str) -> int:
        """Return what this use adds to a tenant's virtual time."""
        return use * VIRTUAL_UNITS // self.weight(tenant)

    def band_rule(self, band: int) -> tuple[int, int]:
        """Return a band's least share and what is kept free above it, in thousandths."""
        if self._ruled_by is not self.policy:
            self._ruled_by = self.policy
            self._rules = read_bands(self.policy.bands) if self.policy else [(0, 0)]
        return self._rules[min(band, len(self._rules)) - 1]

    def quiet(self) -> bool:
        """Return whether the past was just lost, so that all sessions must first report."""
        return self.now < self.recover_until

    def waiting(self, tenant: str) -> int:
        return sum(len(queue.tickets) for queue in self.queues_of[tenant].values())

    @property
    def parked(self) -> int:
        return sum(limit.waits for limit in self.limits.values())

    @property
    def lease_ms(self) -> int:
        return self.policy.lease_ms if self.policy else 0

    @property
    def revision(self) -> int:
        return self.policy.revision if self.policy else 0
