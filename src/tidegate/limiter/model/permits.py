"""What a process says of its permits: passed on, given back, settled, cancelled.

Invariants: saying something twice does nothing the second time; a permit counts under every limit
of its lane from its admission until it is given back, whatever the policy says meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tidegate.limiter.model.places import Places
from tidegate.limiter.model.spending import Charge
from tidegate.limiter.model.state import (
    BLOCKED,
    BandState,
    Flow,
    Held,
    Lapsing,
    LimitState,
    Member,
    Queue,
    Session,
    read_actual,
    read_flow,
    read_member,
)
from tidegate.limiter.wire import USAGE_LATER, SyncRequest

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
        it: 0 for one that was let in while nobody waited."""
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
        """All entries of a request that give back or give up."""
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
            # Empty for this moment, it would lose its turn to those who are behind it.
            if key not in filling or each.queue.bounces >= self.starves or self._is_rated(each):
                self._rehead(each.queue)
                del self._reheaded[key]

    def rehead_filled(self) -> None:
        """Queues that lost tickets and that new ones came to."""
        for each in self._reheaded.values():
            self._rehead(each.queue)

    def bound_owed(self, sid: str) -> None:
        """Of more calls than so many whose usage is still to be told the eldest are forgotten."""
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
        """A grant that crossed it is given back, unused."""
        key = q.flows[flow_number - 1] if flow_number else ""
        if self._unqueue(session, key, member):
            return
        held = session.held.pop(ticket, None)
        if held is not None:
            flow = read_flow(held.flow)
            self.uncount(flow.lane, q.sid, ticket)
            self.used(held.flow, held.cost_ms, 0)
            self.settle_charges(held.charges, flow, [0] * len(flow.lane))
