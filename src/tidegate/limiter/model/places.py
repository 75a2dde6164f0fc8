"""Where queues stand and whose turn it is: start-time fair queueing at each limit.

Goyal, Vin and Cheng, "Start-time fair queueing" (SIGCOMM 1996): a tenant's turn comes by the
virtual time at which its service starts; what it uses, divided by its weight, moves its next start
on; the limit's own time is the start of what is served, so that nobody who was idle has saved up
anything. Invariant: a queue that is not empty stands at one limit, the one that holds it up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import floor

from tidegate.limiter.limits import Concurrency, PoolPolicy, Rate, implicit_limit
from tidegate.limiter.model.spending import span_of
from tidegate.limiter.model.state import (
    BLOCKED,
    NO_LIMIT,
    BandState,
    Flow,
    Gate,
    LimitState,
    Member,
    Pause,
    Queue,
    Session,
    read_bands,
    read_member,
)

# A limit without a bound comes back after a pause as one of this bound does.
RAMP_BOUND = 64
# A ticket that was sent from limit to limit so often gets what it needs kept free.
STARVES = 8
# Of virtual time in a ms of use by a tenant of weight 1: what is rounded off is less than a fifth
# of a percent from 5 ms on, at any weight.
UNITS = 100_000
# A double counts whole numbers up to 2^53: virtual time begins again before it comes near.
LONGEST = 1 << 51
# How far behind a band's time the tag of a tenant that waits no more is still known: its calls may
# be under way, and what they used is added to it. An hour of one permit of weight 1.
BEHIND = 3_600_000 * UNITS

# While a higher band uses a rate, lower ones leave one part in so many of it free.
LEFT_FREE = 20


class Places:
    """The limits and the queues of a pool. Fields under `of one call` are set anew by each."""

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
        return cost_ms * UNITS // self.weight(tenant)

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
        """The limit at which a newcomer has to wait: nobody passes those who wait already."""
        for position, limit in enumerate(self.lane(flow)):
            amount = member.amount(position)
            if (amount > 0 and limit.waits) or not self.has_room(limit, flow.band, amount):
                return limit
        return None
