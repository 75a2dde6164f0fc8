"""Letting newcomers and waiters in: whatever is free under the touched limits.

Invariants: all limits of a call or none; nobody is let in while the past may be lost; a session
that may not hear of a grant gets none. Others' grants go out by push, our own by the reply.
"""

from __future__ import annotations

from collections import defaultdict

from tidegate.limiter.limits import Concurrency, Rate
from tidegate.limiter.model.outlook import Outlooks
from tidegate.limiter.model.state import (
    BLOCKED,
    Flow,
    Held,
    LimitState,
    Queue,
    Session,
    read_flow,
    read_member,
)
from tidegate.limiter.wire import Hint, Push, SyncRequest

# Grants that a session may have without having acknowledged one.
ACK_WINDOW = 8
# Steps of one call of the script.
AT_ONCE = 500
# Only waiters whose turn comes so soon anyway are let in by a permit passed on in their process.
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
        """What is free is kept for those who were sent to and fro too often, in their order: where
        what they lack is given back by calls that end."""
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
        """Which of its own waiters a session may let in by permits that it frees itself."""
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
