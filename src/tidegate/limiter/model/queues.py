"""Queues and permits of a pool: waiters by start-time fair queueing, and holders.

Goyal, Vin and Cheng, "Start-time fair queueing" (SIGCOMM 1996): tenants are served in the order of
the virtual time at which their service starts. The use of a call, divided by the tenant's weight,
moves its next start forward. The limit's own time is the start of what is being served, so that an
idle tenant saves nothing.

Invariants: all limits of a call or none; a queue that is not empty is at the one limit that blocks
it; a repeated message has no second effect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tidegate.limiter.messages import USAGE_LATER, SyncRequest
from tidegate.limiter.model.capacity import Capacity
from tidegate.limiter.model.rates import Charge
from tidegate.limiter.model.state import (
    BLOCKED,
    VIRTUAL_UNITS,
    BandState,
    FlowName,
    HeldPermit,
    Lapsing,
    LimitState,
    Member,
    PoolState,
    SessionQueue,
    SessionState,
    read_actual,
    read_flow,
    read_member,
)

# How far behind a band's time the tag of a tenant without waiters is kept: its calls may be in
# progress, and their use is added to it. An hour of one permit of weight 1.
BEHIND = 3_600_000 * VIRTUAL_UNITS


@dataclass(eq=False, repr=False)
class Queues:
    """The order of the queues at each limit. Lua: `queues` and `blocked`."""

    pool: PoolState
    capacity: Capacity
    starved: set[SessionQueue] = field(default_factory=set)

    def starving(self) -> list[SessionQueue]:
        """Return the queues for which capacity is kept free, in order."""
        return sorted(self.starved, key=lambda queue: (queue.starving, queue.id))

    def park(self, queue: SessionQueue, limit: LimitState) -> None:
        band, tenant = limit.band(queue.flow.band), queue.flow.tenant
        band.tags[tenant] = band.tag(tenant)
        band.lines.setdefault(tenant, {})[queue.id] = queue
        queue.at = limit.name

    def unpark(self, queue: SessionQueue) -> None:
        """Remove a queue from its limit.

        A tenant that leaves loses its credit, and stays charged for the probable use of its calls
        in progress.
        """
        assert queue.at is not None
        band, tenant = self.pool.limit(queue.at).band(queue.flow.band), queue.flow.tenant
        del band.lines[tenant][queue.id]
        if not band.lines[tenant]:
            del band.lines[tenant]
            if band.tags[tenant] <= band.virtual - BEHIND:
                del band.tags[tenant]
        if not band.lines:
            band.credit = 0
            if band.passed_us:  # what was kept free for it is free now
                self.pool.touched.add(queue.at)
            band.passed_us = 0

    def forget_starving(self, queue: SessionQueue) -> None:
        """Keep no more capacity free for a queue."""
        if queue in self.starved:
            self.starved.discard(queue)
            self.pool.touched.update(queue.flow.lane)
        queue.bounces, queue.bounced = 0, 0

    def vacate(self, queue: SessionQueue) -> None:
        """Remove a queue that is empty or whose session is gone."""
        if queue.at != BLOCKED:
            self.unpark(queue)
        self.forget_starving(queue)
        queue.at = None
        del self.pool.queues_of[queue.flow.tenant][queue.id]
        self.pool.left.add(queue.flow.tenant)
        del self.pool.sessions[queue.sid].queues[queue.key]

    def move(self, queue: SessionQueue, limit: LimitState) -> None:
        """Move a queue to another limit that blocks it; after too many moves it goes first."""
        stamp = queue.first()[1]
        self.unpark(queue)
        if queue.bounced != stamp:
            self.forget_starving(queue)
        queue.bounces, queue.bounced = queue.bounces + 1, stamp
        if queue.bounces == self.pool.paces.starves:
            queue.starving = self.pool.seq
            self.starved.add(queue)
        self.park(queue, limit)

    def touch_sized(self, queue: SessionQueue) -> None:
        """Check the limit at which a queue loses its head again, if the next may take less."""
        if queue.at is not None and queue.at != BLOCKED and self.pool.limit(queue.at).is_sized:
            self.pool.touched.add(queue.at)

    def leave_line(self, queue: SessionQueue) -> None:
        """Move a queue whose new head takes nothing of the rate at which it waits.

        It waits at a limit of which the head takes something, so that waiters for the rate are not
        ahead of it.
        """
        assert queue.at is not None
        if not self.pool.limit(queue.at).is_rate:
            return
        member = read_member(queue.first()[0])
        if member.amount(queue.flow.lane.index(queue.at)) > 0:
            return
        place = self.place_of(queue.flow, member)
        if place.name != queue.at:
            self.unpark(queue)
            self.park(queue, place)
            self.pool.touched.add(place.name)

    def block(self, queue: SessionQueue) -> None:
        """Block a queue, because its session takes no grants."""
        self.unpark(queue)
        self.forget_starving(queue)
        queue.at = BLOCKED

    def charge(self, limit: LimitState, flow: FlowName, step: int) -> int:
        """Move a tenant's start forward; return the start before."""
        band = limit.band(flow.band)
        tag = band.tag(flow.tenant)
        band.tags[flow.tenant] = tag + step
        return tag

    def advance(self, band: BandState, tag: int) -> None:
        """Advance the time of a band to `tag`."""
        band.virtual = max(band.virtual, tag)
        if band.virtual > self.pool.paces.longest:
            band.tags = {name: tag - band.virtual for name, tag in band.tags.items()}
            band.virtual = 0

    def restart(self, limit: LimitState) -> None:
        """Restart shares in another measure: waiting tenants start equal, other tags are
        forgotten.
        """
        for band in limit.bands.values():
            band.tags = dict.fromkeys(band.lines, band.virtual)

    def correct(self, limit: LimitState, flow: FlowName, step: int) -> None:
        """Add what a tenant's calls used beyond what it was charged.

        A waiting tenant gets back excess charges, even if that is more than it is ahead; any other
        starts no earlier than the band's time.
        """
        band, tenant = limit.band(flow.band), flow.tenant
        if tenant in band.lines:
            before = band.front()[1]
            band.tags[tenant] += step
            if limit.is_sized and band.front()[1] != before:
                self.pool.touched.add(limit.name)
        elif band.lines:
            earliest = band.virtual - BEHIND
            band.tags[tenant] = max(earliest, band.tags.get(tenant, earliest)) + step

    def _its_turn(self, queue: SessionQueue, limit: LimitState, stamp: float) -> bool:
        """Return whether a ticket may be admitted now at a limit where it does not wait.

        It must not pass a higher band, a tenant with an earlier turn, or an older ticket of its own
        tenant.
        """
        if any(limit.parked(higher) for higher in range(1, queue.flow.band)):
            return False
        band, tenant = limit.band(queue.flow.band), queue.flow.tenant
        if not band.lines:
            return True
        if band.tag(tenant) > band.front()[0]:
            return False
        return tenant not in band.lines or band.line_front(tenant)[0] >= stamp

    def blocker(
        self, queue: SessionQueue, member: Member, stamp: float
    ) -> tuple[LimitState | None, bool]:
        """Return the limit that blocks the first ticket of a queue, and whether it is full."""
        for position, limit in enumerate(self.pool.lane(queue.flow)):
            amount = member.amount(position)
            if not limit.concerns(amount):
                continue
            if not self.capacity.has_room(limit, queue.flow.band, amount):
                return limit, True
            elsewhere = amount > 0 and limit.name != queue.at
            if elsewhere and not self._its_turn(queue, limit, stamp):
                return limit, False
        return None, False

    def blocker_of_new(self, flow: FlowName, member: Member) -> LimitState | None:
        """Return the limit at which a new ticket must wait; it passes no waiting ticket."""
        for position, limit in enumerate(self.pool.lane(flow)):
            amount = member.amount(position)
            if not limit.concerns(amount):
                continue
            if (amount > 0 and limit.waits) or not self.capacity.has_room(limit, flow.band, amount):
                return limit
        return None

    def place_of(self, flow: FlowName, member: Member) -> LimitState:
        """Return where a ticket waits that no limit blocks: the first limit that concerns it."""
        lane = self.pool.lane(flow)
        found = (one for i, one in enumerate(lane) if one.concerns(member.amount(i)))
        return next(found, lane[0])


@dataclass(slots=True)
class Reheaded:
    """A queue that lost tickets out of turn.

    transferred: their probable use, if permits were passed on to them.
    """

    queue: SessionQueue
    transferred: int | None = None


@dataclass(eq=False, repr=False)
class Permits:
    """Permits in use, and their release. Lua: `permits` and `releases`.

    carried: the charges of `lapsing`. owed: usage that sessions have still to report of ended
    calls.
    """

    pool: PoolState
    capacity: Capacity
    queues: Queues
    lapsing: dict[Lapsing, int] = field(default_factory=dict)
    carried: dict[Lapsing, dict[int, Charge]] = field(default_factory=dict)
    owed: dict[str, dict[int, tuple[dict[int, Charge], FlowName]]] = field(default_factory=dict)
    _reheaded: dict[str, Reheaded] = field(default_factory=dict)
    _differs: dict[str, int] = field(default_factory=dict)
    # The session and ticket being admitted.
    taker: tuple[str, int] = ("", 0)

    def next_seq(self) -> int:
        """Return the next sequence; a permit passed on inside a process uses those in between."""
        self.pool.seq += 1000
        return self.pool.seq

    def count(
        self, lane: tuple[str, ...], sid: str, ticket: int, charges: dict[int, Charge]
    ) -> None:
        for position, name in enumerate(lane):
            amount, _ = charges.get(position, (1, 0))
            self.pool.limit(name).under[sid, ticket] = amount

    def uncount(self, lane: tuple[str, ...], sid: str, ticket: int, *, touch: bool = True) -> None:
        for name in lane:
            limit = self.pool.limit(name)
            limit.under.pop((sid, ticket), None)
            if touch and limit.is_freed:
                self.pool.touched.add(name)

    def admission(self, limit: LimitState, band: int, amount: int) -> Charge | None:
        """Count an admission under one limit; return what its settlement needs, for a rate."""
        if not limit.concerns(amount):
            return self.spend(limit, amount)
        if limit.limit.shadow and self.capacity.is_full(limit, band, amount):
            limit.shadowed += 1
        pause = self.pool.pause_of(limit)
        if pause is not None and pause.gate is not None:
            pause.gate.taker = self.taker
            pause.until = max(pause.until, self.pool.now + pause.gate.every_ms)
        elif pause is not None and self.pool.now >= pause.until:
            pause.passed += max(1, min(amount, limit.limit.bound))
        self.capacity.count_shares(limit, band, amount)
        return self.spend(limit, amount)

    def spend(self, limit: LimitState, amount: int) -> Charge | None:
        if not limit.is_rate:
            return self.in_flight(limit, amount)
        self.capacity.spent(limit)
        return limit.spending.take(limit.limit, amount, self.pool.now)

    def in_flight(self, limit: LimitState, amount: int) -> Charge | None:
        return (amount, 0) if limit.by_tokens else None

    def charged_before(self, limit: LimitState, amount: int) -> Charge | None:
        """Return the charge of a call that was charged in an unknown part of a window."""
        if not limit.settles:
            return self.in_flight(limit, amount)
        amount = amount if limit.limit.shadow else min(amount, limit.limit.bound)
        return (amount, 0) if amount else None

    def settle_charges(
        self, charges: dict[int, Charge], flow: FlowName, actual: list[int | None]
    ) -> None:
        """Correct reservations by actual usage; reservations of unknown usage stay."""
        for position, charge in charges.items():
            used = actual[position] if position < len(actual) else None
            limit = self.pool.limit(flow.lane[position])
            if used is None or not limit.settles:
                continue
            self.capacity.spent(limit)
            if limit.spending.settle(limit.limit, charge, used, self.pool.now):
                self.pool.touched.add(limit.name)
            self._correct_ramp(limit, used - charge[0])

    def _correct_ramp(self, limit: LimitState, more: int) -> None:
        """Count in the ramp of a pause what a call used instead of what it reserved."""
        pause = self.pool.pause_of(limit)
        if pause is not None and pause.gate is None and self.pool.now >= pause.until:
            pause.passed = max(0, pause.passed + more)

    def _used(self, key: str, charged: int, use: int) -> None:
        """Record the use of a call of a flow, and what its tenant was charged for it.

        `charged` is 0 for a call that was admitted while none waited.
        """
        if charged:
            self._differs[key] = self._differs.get(key, 0) + use - charged

    def _use_of(self, q: SyncRequest, ticket: int, held: HeldPermit, took_ms: int) -> int:
        """Return the use of an ended call in the measure of shares.

        In shares by calls every call counts the same; a call of unknown cost keeps its charge.
        """
        if self.pool.fair_by == "seconds":
            return took_ms
        return dict(q.uses).get(ticket, held.use) if self.pool.fair_by == "cost" else held.use

    def _correct_all(self) -> None:
        for key, differs in self._differs.items():
            flow = read_flow(key)
            for limit in self.pool.lane(flow):
                self.queues.correct(limit, flow, self.pool.step(differs, flow.tenant))
        self._differs = {}

    def free_lapsing(self, permit: Lapsing) -> bool:
        if self.lapsing.pop(permit, None) is None:
            return False
        self.carried.pop(permit, None)
        self.uncount(tuple(permit.lane.split(" ")), permit.sid, permit.ticket)
        return True

    def apply_releases(self, q: SyncRequest, session: SessionState) -> None:
        """Process all entries of a request that release or abandon."""
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
        self._charge_transferred()
        filling = {q.flows[number - 1] for number, _ in q.enqueues}
        for key, each in list(self._reheaded.items()):
            # While empty, the queue would lose its turn to those behind it.
            if (
                key not in filling
                or each.queue.bounces >= self.pool.paces.starves
                or self._is_rated(each)
            ):
                self._rehead(each.queue)
                del self._reheaded[key]

    def inserted(self, queue: SessionQueue) -> None:
        """Note a ticket that goes before others of its queue."""
        self._reheaded.setdefault(queue.key, Reheaded(queue))
        if queue.at is not None and queue.at != BLOCKED:
            self.pool.touched.add(queue.at)

    def rehead_filled(self) -> None:
        """Update queues that lost tickets and got new ones."""
        for each in self._reheaded.values():
            self._rehead(each.queue)

    def bound_owed(self, sid: str) -> None:
        """Forget the oldest calls whose usage is still expected, beyond the maximum."""
        owed = self.owed.get(sid, {})
        for ticket in sorted(owed)[: max(0, len(owed) - self.pool.paces.most_owed)]:
            del owed[ticket]

    def _unqueue(self, session: SessionState, key: str, member: str) -> bool:
        queue = session.queues.get(key)
        if queue is None or queue.tickets.pop(member, None) is None:
            return False
        self._reheaded.setdefault(key, Reheaded(queue))
        return True

    def _transfer(
        self,
        q: SyncRequest,
        session: SessionState,
        source: int,
        to: int,
        seq: int,
        hard_ms: int,
        flow_number: int,
        member_text: str,
        outcome: int,
        took_ms: int,
    ) -> None:
        """Record that the process passed a permit on: `to` is held in any case.

        If `to` has been granted meanwhile, there is one permit too many, and the old one is free.
        If neither is found, this is a repeat and `to` has ended: its release follows.
        """
        key = q.flows[flow_number - 1]
        flow, use = read_flow(key), 0
        if self._unqueue(session, key, member_text):
            use = read_member(member_text).use
            each = self._reheaded[key]
            if each.queue.at is not None and each.queue.at != BLOCKED:
                use = self.pool.probable_use(self.pool.limit(each.queue.at), use)
            each.transferred = (each.transferred or 0) + use
        before, there = session.held.get(source), to in session.held
        if before is not None:
            lane = read_flow(before.flow).lane
            if outcome % USAGE_LATER == 0:
                self._learn(read_flow(before.flow), took_ms)
            self._used(before.flow, before.use, self._use_of(q, source, before, took_ms))
            del session.held[source]
            by_tokens = any(limit.by_tokens for limit in self.pool.lane(flow))
            passed_on = lane == flow.lane and not (there or by_tokens)
            self.uncount(lane, q.sid, source, touch=not passed_on)
        if there:
            return
        member = read_member(member_text or f"{to}|0|0|")
        spend = self.in_flight if before is None else self.spend
        charges = self.spend_lane(flow, member, spend)
        self.count(flow.lane, q.sid, to, charges)
        session.held[to] = HeldPermit(seq, self.pool.now + hard_ms, use, charges, key)

    def spend_lane(
        self, flow: FlowName, member: Member, spend: Callable[[LimitState, int], Charge | None]
    ) -> dict[int, Charge]:
        """Return what one call takes of each limit of its lane, by position."""
        found = (
            (position, spend(limit, member.amount(position)))
            for position, limit in enumerate(self.pool.lane(flow))
        )
        return {position: charge for position, charge in found if charge is not None}

    def _learn(self, flow: FlowName, took_ms: int) -> None:
        for limit in self.pool.lane(flow):
            if limit.is_named:
                limit.learn(took_ms)

    def _charge_transferred(self) -> None:
        """Charge tenants for permits that were passed on out of order.

        The time of their band advances to its new front.
        """
        bands: dict[tuple[str, int], BandState] = {}
        for each in self._reheaded.values():
            flow, at = each.queue.flow, each.queue.at
            if each.transferred is not None and at is not None and at != BLOCKED:
                limit = self.pool.limit(at)
                self.queues.charge(limit, flow, self.pool.step(each.transferred, flow.tenant))
                bands[at, flow.band] = limit.band(flow.band)
        for band in bands.values():
            self.queues.advance(band, band.front()[0])

    def _is_rated(self, each: Reheaded) -> bool:
        at = each.queue.at
        return at is not None and at != BLOCKED and self.pool.limit(at).is_rate

    def _rehead(self, queue: SessionQueue) -> None:
        """Update a queue for its new head, which may take less of a rate."""
        self.queues.touch_sized(queue)
        if not queue.tickets:
            self.queues.vacate(queue)
            return
        if queue in self.queues.starved and queue.bounced != queue.first()[1]:
            self.queues.forget_starving(queue)
        if queue.at != BLOCKED:
            self.queues.leave_line(queue)

    def _release(
        self,
        q: SyncRequest,
        session: SessionState,
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
        first = next((one[1:] for one in q.firsts if one[0] == ticket), None)
        for limit in self.pool.lane(flow):
            if limit.by_latency and first and outcome % USAGE_LATER == 0 and took_ms > 0:
                limit.adapt_by_latency(took_ms, *first, self.pool.paces)
            elif limit.minimum:
                limit.adapt(outcome % USAGE_LATER, self.pool.now)
            limit.under.pop((q.sid, ticket), None)
            if limit.is_freed:
                self.pool.touched.add(limit.name)
        if outcome < USAGE_LATER:
            self.settle_charges(held.charges, flow, read_actual(actual))
        elif held.charges:
            self.owed.setdefault(q.sid, {})[ticket] = held.charges, flow
        if took_ms > 0:
            if outcome % USAGE_LATER == 0:
                self._learn(flow, took_ms)
            self._used(held.flow, held.use, self._use_of(q, ticket, held, took_ms))

    def _cancel(
        self, q: SyncRequest, session: SessionState, ticket: int, flow_number: int, member: str
    ) -> None:
        """Remove a ticket; a grant that crossed the message is returned unused."""
        key = q.flows[flow_number - 1] if flow_number else ""
        if self._unqueue(session, key, member):
            return
        held = session.held.pop(ticket, None)
        if held is not None:
            flow = read_flow(held.flow)
            self.uncount(flow.lane, q.sid, ticket)
            self._used(held.flow, held.use, 0)
            self.settle_charges(held.charges, flow, [0] * len(flow.lane))
