"""Pump of a pool: admits waiters in order, and decides which processes may pass permits on.

Invariant: within a band no waiter is admitted before one with an earlier turn at a limit that both
need.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from tidegate.limiter.messages import Hint, Push, SyncRequest
from tidegate.limiter.model.capacity import Capacity
from tidegate.limiter.model.outlook import Outlooks, line_of
from tidegate.limiter.model.queues import Permits, Queues
from tidegate.limiter.model.state import (
    BLOCKED,
    DueOrder,
    FlowName,
    HeldPermit,
    LimitState,
    PoolState,
    SessionQueue,
    SessionState,
    read_flow,
    read_member,
)
from tidegate.limiter.policy import Concurrency, Rate

# Grants that a session may have without having acknowledged any.
ACK_WINDOW = 8
# How long waiters of a rate keep their turn while their session has that many.
ACK_WITHIN_MS = 100
MOST_STARVING = 8

Grant = tuple[int, int]


@dataclass(eq=False, repr=False)
class Pump:
    """The pump. Lua: `apply`, `pump`, `starving`, `timers`, `blocked` and `hints`.

    timed: limit -> when it is checked again. own: the session that made the request.
    """

    pool: PoolState
    capacity: Capacity
    queues: Queues
    permits: Permits
    outlooks: Outlooks
    timed: dict[str, int] = field(default_factory=dict)
    # Sessions that not all others know yet, and until when they wait for that.
    fresh: dict[str, int] = field(default_factory=dict)
    # These belong to one call.
    own: str | None = None
    budget: int = 0
    served: bool = False
    more: int = 0
    granted: list[Grant] = field(default_factory=list)
    given_to: defaultdict[str, list[Grant]] = field(default_factory=lambda: defaultdict(list))

    def _deliverable(self, sid: str) -> bool:
        """Return whether a session may get grants: a dead one none, a paused one only a few."""
        session, known = self.pool.sessions.get(sid), sid not in self.fresh
        if known and sid == self.own:
            return True
        if session is None or session.expiry <= self.pool.now:
            return False
        if known and sid in self.pool.subscribed and session.sent - session.acked < ACK_WINDOW:
            return True
        session.blocked = True
        return False

    def _acknowledges_soon(self, sid: str, limit: LimitState) -> bool:
        """Return whether the turn of another session's waiters is kept until it acknowledges
        grants.

        Under a rate they would wait for another window if others passed them.
        """
        session, now = self.pool.sessions.get(sid), self.pool.now
        if sid == self.own or sid in self.fresh or sid not in self.pool.subscribed:
            return False
        if session is None or session.blocked or session.expiry <= now:
            return False
        if session.sent - session.acked < ACK_WINDOW:
            return False
        since, _ = session.full or (now, "")
        if now - since >= ACK_WITHIN_MS:
            session.full = None
            return False
        session.full = since, limit.name
        limit.note_room_at(since + ACK_WITHIN_MS)
        return True

    def _admit(self, sid: str, flow_key: str, member_text: str, use: int) -> None:
        member, flow = read_member(member_text), read_flow(flow_key)
        seq, session = self.permits.next_seq(), self.pool.sessions[sid]
        self.permits.taker = sid, member.ticket
        charges = self.permits.spend_lane(
            flow, member, lambda limit, amount: self.permits.admission(limit, flow.band, amount)
        )
        self.permits.count(flow.lane, sid, member.ticket, charges)
        until = self.pool.now + member.hard_ms
        session.held[member.ticket] = HeldPermit(seq, until, use, charges, flow_key)
        if sid == self.own:
            self.granted.append((member.ticket, seq))
        else:
            session.sent += 1
            self.given_to[sid].append((member.ticket, seq))

    def publish(self) -> None:
        for sid, grants in self.given_to.items():
            session = self.pool.sessions[sid]
            self.pool.pushed.append(
                (sid, Push(self.pool.epoch, session.gen, session.sent, grants, self.pool.now))
            )

    def enqueue(self, q: SyncRequest, session: SessionState) -> tuple[list[float], list[int]]:
        """Return the stamps of the new waiters, 0 for other tickets, and the refused tickets.

        A repeated batch (`full`) may name tickets that are queued already: they keep their place.
        """
        stamps: list[float] = []
        refused: list[int] = []
        for place, (number, member) in enumerate(q.enqueues):
            key = q.flows[number - 1]
            queue, ticket = session.queues.get(key), read_member(member).ticket
            stamp: float = 0
            if q.full and queue is not None and member in queue.tickets:
                stamp = queue.tickets[member]
            elif not (q.full and ticket in session.held):
                left_ms = q.lefts[place] if q.lefts else 0
                due_ms = q.dues[place] if q.dues else 0
                former = q.stamps[place] if q.stamps and q.epoch == self.pool.epoch else 0
                stamp = self._ask_one(session, q.sid, key, member, left_ms, due_ms, former)
                if stamp < 0:
                    refused.append(ticket)
                elif stamp > 0:
                    self.outlooks.waited[number] = session.queues[key]
            stamps.append(max(0, stamp))
        return stamps, refused

    def _ask_one(
        self,
        session: SessionState,
        sid: str,
        key: str,
        member: str,
        left_ms: int,
        due_ms: int,
        former: float,
    ) -> float:
        """Return the stamp of a new ticket, or its `former` one.

        0 if it was admitted immediately or its deadline comes too early, -1 if it is refused.
        """
        flow, queue = read_flow(key), session.queues.get(key)
        limit: LimitState | None = self.queues.place_of(flow, read_member(member))
        if queue is None and not self.pool.quiet() and sid not in self.fresh:
            limit = self.queues.blocker_of_new(flow, read_member(member))
        if limit is None:
            self._admit(sid, key, member, 0)
            return 0
        place = limit if queue is None else self._at(queue)
        refuse = self.outlooks.refuse_late
        between = former or self._between(flow, due_ms)
        last = self.pool.stamps.get(flow.tenant, 0) + 1
        place_of = last if between is None else between
        if left_ms and place and refuse(flow, queue, read_member(member), left_ms, place, place_of):
            return 0
        most = self.pool.policy.queue_per_tenant if self.pool.policy else 0
        if self.pool.waiting(flow.tenant) >= most:
            return -1
        stamps = self.pool.stamps
        if former:
            stamps[flow.tenant] = max(stamps.get(flow.tenant, 0), int(former))
        stamp = self._stamp(flow, due_ms, between)
        if queue is not None and between is not None:
            self.permits.inserted(queue)
        if queue is None:
            queue = session.queues[key] = SessionQueue(sid, key, flow)
            self.pool.queues_of[flow.tenant][queue.id] = queue
            self.queues.park(queue, limit)
            self.pool.touched.add(limit.name)
        queue.add(member, stamp)
        return stamp

    def _between(self, flow: FlowName, due_ms: int) -> float | None:
        """Return the stamp of a ticket that is due before others of its tenant and band, else None.

        A ticket without a deadline is due after a time, so that it does not wait for ever. Lua:
        `deadlines`.
        """
        pool, tenant = self.pool, flow.tenant
        order = pool.orders.get(tenant, {}).get(flow.band)
        if order is None and due_ms:
            order = self._first_order(tenant)
        return order.before(pool.now + (due_ms or pool.paces.due_after_ms)) if order else None

    def _first_order(self, tenant: str) -> DueOrder:
        """Return the order for the first deadline: other waiters count as having come now."""
        pool = self.pool
        order = DueOrder(pool.now)
        if pool.waiting(tenant):
            order.note(pool.now + pool.paces.due_after_ms, 1, pool.now)
        return order

    def _stamp(self, flow: FlowName, due_ms: int, between: float | None) -> float:
        pool, tenant = self.pool, flow.tenant
        order = pool.orders.get(tenant, {}).get(flow.band)
        if order is None and due_ms:
            order = pool.orders.setdefault(tenant, {})[flow.band] = self._first_order(tenant)
        if between is not None:
            return between
        stamp = pool.stamps[tenant] = pool.stamps.get(tenant, 0) + 1
        if order is not None:
            order.note(pool.now + (due_ms or pool.paces.due_after_ms), stamp, pool.now)
        return stamp

    def _at(self, queue: SessionQueue) -> LimitState | None:
        """Return the limit that blocks a queue, or None."""
        at = queue.at
        return self.pool.limit(at) if at is not None and at != BLOCKED else None

    def _let_in(self, queue: SessionQueue, limit: LimitState) -> None:
        """Admit the first ticket of a queue that waits at `limit`."""
        text, _ = queue.first()
        member, flow = read_member(text), queue.flow
        del queue.tickets[text]
        use = self.pool.probable_use(limit, member.use)
        step = self.pool.step(use, flow.tenant)
        for each in self.pool.lane(flow):
            if each is limit or each.parked(flow.band):
                self.queues.advance(each.band(flow.band), self.queues.charge(each, flow, step))
            if each is not limit and each.is_sized and each.waits:
                self.pool.touched.add(each.name)  # another call may be next there
        self._admit(queue.sid, queue.key, text, use)
        if not queue.tickets:
            self.queues.vacate(queue)
            return
        if self.queues.starved:
            self.queues.forget_starving(queue)
        self.queues.leave_line(queue)

    def _step(self, limit: LimitState, number: int, bands: list[int]) -> bool:
        """Process the queue whose turn it is in a band; return True if there may be more to do."""
        band = limit.band(number)
        queue = band.line_front(band.front()[1])[1]
        self.budget -= 1
        if limit.is_rate and self._acknowledges_soon(queue.sid, limit):
            return False
        if not self._deliverable(queue.sid):
            self.queues.block(queue)
            return True
        text, stamp = queue.first()
        if isinstance(limit.limit, Concurrency) and number != bands[0]:
            limit.passing = number, bands[0]
        other, full = self.queues.blocker(queue, read_member(text), stamp)
        limit.passing = 0, 0
        if other is None:
            if isinstance(limit.limit, Rate) and 0 < band.used_at <= band.held_at:
                band.held_at = max(band.held_at, self.pool.now - 1)  # until now
            self._let_in(queue, limit)
            self._pay_turn(limit, number, bands)
            return True
        if other is limit:
            amount = read_member(text).amount(queue.flow.lane.index(limit.name))
            if isinstance(limit.limit, Rate) and self.capacity.is_used_up(limit, amount):
                band.held_at = self.pool.now
            return False
        self.queues.move(queue, other)
        # A band that is owed a turn may take what is kept free of it.
        if not full or (not other.is_rate and self._is_owed(other, number)):
            self.pool.touched.add(other.name)
        return True

    def serve_starving(self) -> None:
        """Keep free capacity for tickets that were moved too often, in their order.

        Only if what they lack is returned by calls that end.
        """
        if self.served or self.pool.quiet() or not self.queues.starved:
            return
        self.served = True
        for queue in self.queues.starving()[:MOST_STARVING]:
            if not self._deliverable(queue.sid) or self._passes_older(queue):
                continue
            member, band = read_member(queue.first()[0]), queue.flow.band
            lacking = [
                limit
                for position, limit in enumerate(self.pool.lane(queue.flow))
                if limit.concerns(member.amount(position))
                and not self.capacity.has_room(limit, band, member.amount(position))
            ]
            if not lacking:
                assert queue.at is not None
                self._let_in(queue, self.pool.limit(queue.at))
            elif all(self._is_given_back(limit, band) for limit in lacking):
                for position, limit in enumerate(self.pool.lane(queue.flow)):
                    limit.reserved += member.amount(position) if limit.by_tokens else 1

    def _passes_older(self, queue: SessionQueue) -> bool:
        """Return whether an older ticket of its tenant waits for a limit of its lane."""
        (_, stamp), flow = queue.first(), queue.flow
        return any(
            older.first()[1] < stamp
            for limit in self.pool.lane(flow)
            for older in line_of(limit.band(flow.band), flow.tenant)
        )

    def _is_given_back(self, limit: LimitState, band: int) -> bool:
        """Return whether ending calls make room under a limit."""
        return (
            not limit.is_rate
            and not self.pool.pause_of(limit)
            and self.capacity.cap(limit, band) > 0
        )

    def pump(self) -> None:
        """Admit waiters under the touched limits, as far as the budget reaches."""
        if self.pool.quiet():
            return
        self._touch_due()
        self.serve_starving()
        while self.pool.touched and self.budget > 0 and self.pool.parked:
            for name in sorted(self.pool.touched):
                if self.budget > 0:
                    self.pool.touched.discard(name)
                    self._pump_limit(self.pool.limit(name))
        if not self.pool.parked:
            self.pool.touched.clear()
        elif self.budget <= 0:
            self.more = 1
            for name in self.pool.touched:
                self.schedule_check(name, self.pool.now)
        self.set_timers()

    def _touch_due(self) -> None:
        """Process some due timers; the next call continues."""
        most = self.pool.paces.due_at_once
        due = sorted((at, name) for name, at in self.timed.items() if at <= self.pool.now)[:most]
        if len(due) == most:
            self.more = 1
        for _, name in due:
            del self.timed[name]
            self.pool.touched.add(name)
            self._end_implicit(self.pool.limit(name))

    def _end_implicit(self, limit: LimitState) -> None:
        """Forget the ended pause of a limit that is not in the policy."""
        pause = limit.pause
        if not limit.is_implicit or pause is None or pause.gate:
            return
        if self.pool.pause_of(limit) is None:
            limit.pause = None
        else:
            over_at = pause.until + pause.ramp_ms
            self.schedule_check(limit.name, pause.until if self.pool.now < pause.until else over_at)

    def _pump_limit(self, limit: LimitState) -> None:
        if not limit.waits:
            return
        self.budget -= 1
        going = True
        while going and self.budget > 0:
            number, bands = self._turn(limit)
            going = number > 0 and self._step(limit, number, bands)
        if self.budget <= 0:
            self.pool.touched.add(limit.name)

    def _turn(self, limit: LimitState) -> tuple[int, list[int]]:
        """Return the band whose turn it is, 0 for none, and all bands that could be served.

        It is the highest, unless a lower one has saved up for a turn. The capacity of a concurrency
        limit that is kept free of a lower band is used by higher ones while they wait.
        """
        bands, has_turns = list[int](), isinstance(limit.limit, Concurrency)
        for number in limit.waiting_bands():
            has_room = self.capacity.has_room(limit, number, 0)
            if has_room or (bands and has_turns and self.capacity.share(number)):
                bands.append(number)
        for number in bands[1:]:
            owed = self._is_owed(limit, number)
            if owed and self._fits_head(limit, number):
                return number, bands
            if owed and isinstance(limit.limit, Rate):
                break  # lower bands do not go before it either
        return (bands[0] if bands else 0), bands

    def _pay_turn(self, limit: LimitState, chosen: int, bands: list[int]) -> None:
        """Credit each lower waiting band with its least share of a turn."""
        if isinstance(limit.limit, Rate):
            return
        for number in bands[1:]:
            band = limit.band(number)
            if band.lines:
                band.credit = min(2000, band.credit + self.pool.band_rule(number)[0])
                if number == chosen:
                    band.credit = max(0, band.credit - 1000)

    def _is_owed(self, limit: LimitState, number: int) -> bool:
        """Return whether a lower band has saved up for its first ticket."""
        band = limit.band(number)
        if not isinstance(limit.limit, Rate):
            return band.credit >= 1000
        if band.passed_us <= band.from_us:
            return False
        return self.capacity.has_saved(limit, number, self.capacity.head_amount(limit, number))

    def _fits_head(self, limit: LimitState, number: int) -> bool:
        if isinstance(limit.limit, Concurrency):
            return True
        return self.capacity.has_room(limit, number, self.capacity.head_amount(limit, number))

    def schedule_check(self, name: str, at: int) -> None:
        self.timed[name] = min(self.timed.get(name, at), at)

    def set_timers(self) -> None:
        """Set a time at which each limit that only time frees is checked again."""
        for limit in self.pool.limits.values():
            if limit.retry_at is not None and limit.waits:
                self.schedule_check(limit.name, limit.retry_at)

    def unblock(self, session: SessionState) -> None:
        """Restore some queues of a session that takes grants again, by the age of their tickets."""
        most = self.pool.paces.unblocked_at_once
        stalled = [queue for queue in session.queues.values() if queue.at == BLOCKED]
        for queue in sorted(stalled, key=lambda queue: queue.id)[:most]:
            text, stamp = queue.first()
            found, _ = self.queues.blocker(queue, read_member(text), stamp)
            limit = found or self.queues.place_of(queue.flow, read_member(text))
            self.queues.park(queue, limit)
            self.pool.touched.add(limit.name)
        session.blocked = len(stalled) >= most
        # A fresh session's queues are blocked again; it returns on its own.
        self.more |= session.blocked and self.own not in self.fresh

    def _may_pass_on(self, queue: SessionQueue) -> bool:
        """Return whether permits may be passed on: no other band waits for the same limits, and no
        limit must learn how each call ended.
        """
        for limit in self.pool.lane(queue.flow):
            if limit.is_rate or self.pool.pause_of(limit) or limit.minimum or limit.by_tokens:
                return False
            if not limit.limit.shadow and limit.used > self.capacity.cap(limit, queue.flow.band):
                return False
            here = [queue.flow.band] if limit.name == queue.at else []
            if limit.waiting_bands() not in ([], here):
                return False
        return True

    def hints(self, q: SyncRequest) -> list[Hint]:
        """Return which of its waiters a session may admit by permits that it frees itself."""
        allowed = self.pool.policy.hand_off if self.pool.policy else True
        if self.own is None or not allowed or self.queues.starved or self.pool.quiet():
            return []
        entries = [
            (queue, number, cost_ms, use)
            for number, cost_ms, use in q.wants
            if (queue := self.pool.sessions[q.sid].queues.get(q.flows[number - 1])) is not None
            and queue.at != BLOCKED
        ]
        tickets = defaultdict[tuple[str | None, int], list[int]](list)
        for queue, _, _, use in entries:
            each = self.pool.tickets(use, queue.flow.tenant)
            tickets[queue.at, queue.flow.band].append(each)
        return [
            self._hint(queue, number, cost_ms, use, tickets[queue.at, queue.flow.band])
            for queue, number, cost_ms, use in entries
            if self._may_pass_on(queue) and not self._passes_others(queue)
        ]

    def _passes_others(self, queue: SessionQueue) -> bool:
        """Return whether the next ticket of the tenant goes before others because of its
        deadline.
        """
        assert queue.at is not None
        band = self.pool.limit(queue.at).band(queue.flow.band)
        return band.line_front(queue.flow.tenant)[0] % 1 > 0

    def _hint(
        self, queue: SessionQueue, number: int, cost_ms: int, use: int, tickets: list[int]
    ) -> Hint:
        """Return a hint with which all tenants advance equally far in virtual time.

        Otherwise one of them would reach its end long before the others. `tickets`: those of the
        requested tenants, relative to each other; the remaining tenants are assumed to have as many
        on average.
        """
        assert queue.at is not None
        flow: FlowName = queue.flow
        limit = self.pool.limit(queue.at)
        band = limit.band(flow.band)
        first, _ = band.line_front(flow.tenant)
        cost_ms = limit.usual_ms(cost_ms)
        step = max(1, self.pool.step(self.pool.probable_use(limit, use), flow.tenant))
        tag = band.tag(flow.tenant)
        ahead = 1 + self.capacity.cap(limit, flow.band) * self.pool.paces.ahead_ms // cost_ms
        behind = (band.virtual - tag) // step
        own = ahead * len(tickets) * self.pool.tickets(use, flow.tenant)
        horizon = int(first) + behind - (-own // (sum(tickets) * len(band.lines))) - 1
        return Hint(number, horizon, tag, int(first), step)
