"""Executable specification of a pool: what the scripts must do, in plain Python. Pure.

The property tests step it beside the real Lua and compare every reply, every push and the state.
Where the Lua counts, the model derives: usage of a limit *is* the permits under it, waiters *are*
the queues.

Invariants: the server's clock never goes back within an epoch; after a loss no call is admitted
for a lease; an overtaken request has no effect; what a process reports as held counts, even above
the limit, which then drains; the highest revision of the policy wins; a reported spent amount is
never less than the true one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

from tidegate.limiter.messages import (
    Push,
    Renewal,
    RenewReply,
    Status,
    SyncReply,
    SyncRequest,
    Whole,
    band_shares,
    definition,
)
from tidegate.limiter.model.capacity import Capacity
from tidegate.limiter.model.outlook import Outlooks, Positions
from tidegate.limiter.model.pump import Pump
from tidegate.limiter.model.queues import Permits, Queues
from tidegate.limiter.model.rates import span_of
from tidegate.limiter.model.state import (
    BLOCKED,
    NO_LIMIT,
    HeldPermit,
    Lapsing,
    LimitState,
    Paces,
    Pause,
    PauseGate,
    PoolState,
    SessionState,
    read_charges,
    read_flow,
    read_member,
    write_charges,
)
from tidegate.limiter.policy import Limit, PoolPolicy, Quota, Rate

# Above so many sessions newcomers are not announced; above MOST_ON_ROSTER none is named.
MOST_TO_ANNOUNCE = 64
# The most newcomers that one call checks.
MOST_AT_ONCE = 64
MOST_ON_ROSTER = 256


@dataclass(eq=False, repr=False)
class Roster:
    """The sessions of a pool, and which of them know which others. Lua: `roster`.

    version: grows with every session that comes or goes. seen: the version that each session has.
    expected: sessions that are expected to return. empty: the server had no data. vouched: a
    session has named the sessions of the time before."""

    pool: PoolState
    pump: Pump
    version: int = 0
    seen: dict[str, int] = field(default_factory=dict)
    expected: set[str] = field(default_factory=set)
    empty: bool = False
    vouched: bool = False
    began: int = 0

    def forget_roster(self, *, empty: bool) -> None:
        """Begin another epoch."""
        self.seen, self.pump.fresh, self.expected = {}, {}, set()
        self.empty, self.vouched = empty, False

    def notify(self, sid: str) -> None:
        """Push a message without grants, so that the session compares everything."""
        session = self.pool.sessions.get(sid)
        if session and session.expiry > self.pool.now and sid in self.pool.subscribed:
            pool = self.pool
            push = Push(pool.epoch, session.gen, session.sent, [], pool.now)
            pool.pushed.append((sid, push))

    def notify_others(self, but: str) -> None:
        for sid in self.pool.sessions:
            if sid != but:
                self.notify(sid)

    def _announce(self, sid: str) -> None:
        if not self.pool.quiet() and len(self.pool.sessions) <= MOST_TO_ANNOUNCE:
            self.notify_others(sid)

    def enter_roster(
        self, sid: str, session: SessionState, before: SessionState | None, *, is_news: bool
    ) -> None:
        """Add a session. A known session only joins again to report something new; `is_news`: it
        brought a policy that others do not have."""
        if before is not None:
            session.since = before.since
            if is_news:
                self._announce(sid)
            return
        self.version += 1
        session.since = self.seen[sid] = self.version
        if len(self.pool.sessions) > 1:
            self.pump.fresh[sid] = self.pool.now + self.pool.lease_ms // 2
            self._announce(sid)

    def leave_roster(self, sid: str) -> None:
        self.version += 1
        self.seen.pop(sid, None)
        self.pump.fresh.pop(sid, None)

    def acknowledge(self, q: SyncRequest) -> None:
        """Record which version a session has, and which newcomers all sessions know by now."""
        self.seen[q.sid] = max(self.seen[q.sid], q.roster)
        least = min(self.seen.values())
        eldest = sorted(self.pump.fresh.items(), key=lambda each: (each[1], each[0]))
        for sid, until in eldest[:MOST_AT_ONCE]:
            if until <= self.pool.now or self.pool.sessions[sid].since <= least:
                del self.pump.fresh[sid]
                if sid != q.sid:
                    self.notify(sid)

    def vouch(self, q: SyncRequest) -> None:
        """Take the names of earlier sessions from a session that returns after an empty restart."""
        assert q.join is not None
        if not self.empty or not self.pool.quiet():
            return
        self.expected |= {sid for sid in q.join.roster if sid not in self.pool.sessions}
        self.expected.discard(q.sid)
        self.vouched |= bool(q.join.roster)
        if self.vouched and not self.expected:
            self.began = self.pool.now - max(self.pool.lease_ms, q.lease_ms)
            self.pool.recover_until = self.pool.now
            self.notify_others(q.sid)

    def roster(self, q: SyncRequest) -> tuple[int, list[str] | None]:
        """Return the version, and the sessions if the requester does not have that version."""
        if len(self.pool.sessions) > MOST_ON_ROSTER:
            return 0, []
        return self.version, None if q.roster == self.version else list(self.pool.sessions)


# Interval of a gate whose record was lost.
GATE_MS = 1000


@dataclass(eq=False, repr=False)
class Joins:
    """Epochs, and sessions that join or end. Lua: `join` and `recover`.

    spending: limit -> the number of its last change, and the amount spent then."""

    pool: PoolState
    capacity: Capacity
    queues: Queues
    permits: Permits
    pump: Pump
    roster: Roster
    conflict: int = 0
    changes: int = 0
    spending: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def hold(self) -> bool:
        return self.pool.policy is not None and self.pool.policy.on_expiry == "hold"

    def forget_stamps(self, returning: Set[str] = frozenset()) -> None:
        """Reset the stamps of tenants whose queues are empty, except those `returning`."""
        for tenant in self.pool.left - returning:
            if not self.pool.queues_of[tenant]:
                self.pool.stamps.pop(tenant, None)
                self.pool.orders.pop(tenant, None)
        self.pool.left &= returning

    def note_spenders(self) -> None:
        """Number each change of a spent amount."""
        for name, limit in sorted(self.pool.limits.items()):
            if limit.spending.changed:
                limit.spending.changed = False
                self.changes += 1
                self.spending[name] = self.changes, self.capacity.spent(limit)

    def begin_epoch(self, q: SyncRequest) -> None:
        known = self.pool.epoch > 0 or q.epoch > 0
        for sid in list(self.pool.sessions):
            self.reap(sid, hold=self.hold)
        for limit in self.pool.limits.values():
            limit.asserted, limit.restored = 0, None
        self.pool.kept = (self.pool.epoch, self.pool.seq) if self.pool.epoch else None
        self.roster.forget_roster(empty=self.pool.epoch == 0)
        quiet_ms = max(self.pool.lease_ms, q.lease_ms)
        if not known:
            # No session knows this pool: sessions that saw it in an earlier run of the server have
            # had the time since its start to return.
            quiet_ms = max(0, quiet_ms - q.uptime_ms)
        self.pool.epoch = max(self.pool.now, self.pool.epoch + 1, q.epoch + 1)
        self.roster.began, self.pool.recover_until = self.pool.now, self.pool.now + quiet_ms

    def reap(self, sid: str, *, hold: bool, is_returning: bool = False) -> None:
        """End a session. With `hold`, its permits count until the hard deadline of their calls;
        with `is_returning`, the usage that it still has to report of ended calls is kept."""
        session = self.pool.sessions.get(sid)
        if session is not None:
            for ticket, held in session.held.items():
                lane = read_flow(held.flow).lane
                if hold and held.until > self.pool.now:
                    permit = Lapsing(ticket, sid, " ".join(lane))
                    self.permits.lapsing[permit] = held.until
                    self.permits.carried |= {permit: held.charges} if held.charges else {}
                else:
                    self.permits.uncount(lane, sid, ticket)
            for queue in list(session.queues.values()):
                self.queues.touch_sized(queue)
                self.queues.vacate(queue)
            del self.pool.sessions[sid]
        if not is_returning:
            self.permits.owed.pop(sid, None)
            self.roster.leave_roster(sid)

    def join(self, q: SyncRequest) -> Status:
        """Begin the session again with what it reports to hold."""
        assert q.join is not None
        before = self.pool.sessions.get(q.sid)
        if before is not None and q.batch <= before.batch:
            return "stale"
        charges = {t: held.charges for t, held in before.held.items()} if before else {}
        returning = {one.flow.tenant for one in before.queues.values()} if before else set[str]()
        self.reap(q.sid, hold=False, is_returning=True)
        is_news = self._merge(q.join.policy, returning)
        lost = 0 < q.epoch < self.pool.epoch
        if lost:
            # A session of an earlier epoch proves that there was one.
            quiet_ms = max(self.pool.lease_ms, q.lease_ms)
            self.pool.recover_until = max(self.pool.recover_until, self.roster.began + quiet_ms)
        expiry = self.pool.now + self.pool.lease_ms
        session = SessionState(self.permits.next_seq(), q.batch, expiry, q.join.name)
        session.revision = self.pool.revision
        self.pool.sessions[q.sid] = session
        self.roster.enter_roster(q.sid, session, before, is_news=is_news)
        for ticket, number, seq, hard_ms, use, amounts, ended in q.join.held:
            key = q.flows[number - 1]
            flow, permit = read_flow(key), Lapsing(ticket, q.sid, q.flows[number - 1].split("|")[2])
            if self.permits.lapsing.pop(permit, None) is not None:
                known = self.permits.carried.pop(permit, {})
            elif ticket in charges:
                known = charges[ticket]
            elif before and ended:
                continue  # an earlier request released it
            else:
                member = read_member(f"{ticket}|0|0|{amounts}")
                known = self.permits.spend_lane(flow, member, self.permits.charged_before)
            self.permits.count(flow.lane, q.sid, ticket, known)
            session.held[ticket] = HeldPermit(seq, self.pool.now + hard_ms, use, known, key)
        # Other permits held over for it are free, since it reports all that it holds.
        for permit in [permit for permit in self.permits.lapsing if permit.sid == q.sid]:
            self.permits.free_lapsing(permit)
        if lost:
            self._remember(q)
        self.capacity.count_local(q.sid, q.join.own)
        return "ok"

    def _remember(self, q: SyncRequest) -> None:
        """Restore what the server lost and the session has seen."""
        assert q.join is not None
        for member, left_ms, charges in q.join.lapsing:
            ticket, sid, lane = member.split("|", 2)
            permit = Lapsing(int(ticket), sid, lane)
            if sid not in self.pool.sessions and permit not in self.permits.lapsing:
                known = read_charges(charges)
                self.permits.lapsing[permit] = self.pool.now + left_ms
                self.permits.carried |= {permit: known} if known else {}
                self.permits.count(tuple(lane.split(" ")), sid, int(ticket), known)
        for name, seen, seq, since in q.join.spent:
            is_new = name in self.spending
            self.capacity.restore(self.pool.limit(name), q, seen, seq, since, is_new=is_new)
        for name, left_ms, ramp_ms, reason in q.join.pauses:
            pause = self.pool.pause_of(self.pool.limit(name))
            if pause is None or pause.until < self.pool.now + left_ms:
                self._assert_pause(self.pool.limit(name), self.pool.now + left_ms, ramp_ms, reason)
        self.roster.vouch(q)

    def _assert_pause(self, limit: LimitState, until: int, ramp_ms: int, reason: str) -> None:
        gate = None
        if ramp_ms == 0:
            before = limit.pause.gate if limit.pause else None
            gate = before or PauseGate(GATE_MS, GATE_MS)
        limit.pause = Pause(until, ramp_ms, reason, gate=gate)
        if limit.is_implicit:
            self.pump.schedule_check(limit.name, until)

    def _merge(self, policy: PoolPolicy, returning: Set[str]) -> bool:
        """Adopt a policy with a higher revision; a start-up never overwrites a newer one. Return
        whether it is new for others."""
        before, revision = self.pool.policy, self.pool.revision
        if policy.revision == revision and before and policy.pack() != before.pack():
            self.conflict = 1
        if policy.revision <= revision:
            return False
        self.forget_stamps(returning)
        self.pool.forget_unnamed()
        self.pool.policy = policy
        changed = [
            name
            for name, limit in policy.limits.items()
            if not before
            or (old := before.limit(name)) is None
            or definition(old) != definition(limit)
        ]
        for name in changed if before else ():
            self._end_charges(self.pool.limit(name), policy.limit(name))
        for name in {*self.pool.limits, *policy.limits}:
            limit = self.pool.limit(name)
            limit.limit = policy.binding(name) or NO_LIMIT
            limit.retry_at = None
            if name not in policy.limits:
                limit.cost_ms = limit.shadowed = limit.asserted = 0
                limit.restored = None
            if not limit.is_rate:
                self.spending.pop(name, None)
            if not limit.spending.is_paced(limit.limit):
                limit.spending.pacing = None
            if not isinstance(limit.limit, Rate) or limit.limit.shape != "bucket":
                limit.spending.bucket = None
            if not limit.by_latency:
                limit.latency = None
            if not limit.minimum:
                limit.current, limit.dropped_at = None, 0
            elif limit.current is not None:
                least, most = limit.minimum * 1000, limit.limit.bound * 1000
                limit.current = min(max(limit.current, least), most)
        self.pool.forget_unnamed()
        if before and before.fair_by != policy.fair_by:
            self._restart_shares()
        same = before is not None and band_shares(before.bands) == band_shares(policy.bands)
        concerned = changed if same else policy.limits
        self.pool.touched |= {name for name in concerned if self.pool.limit(name).waits}
        # In a new record nothing was counted under another policy.
        for limit in map(self.pool.limit, changed if before else ()):
            if limit.is_rate:
                self.capacity.spent(limit)
                old = before.limit(limit.name) if before else None
                bound = old.bound if isinstance(old, Rate | Quota) else 0
                limit.spending.carry_over(limit.limit, self.pool.now, bound)
        return before is not None

    def _end_charges(self, limit: LimitState, new: Limit | None) -> None:
        """End charges for a difference to a bound with that difference. If the limit counts in
        another way from now on, it is unknown what was charged."""
        old, spending = limit.limit, limit.spending
        if isinstance(old, Rate) and isinstance(new, Rate):
            is_comparable = old.window_ms == new.window_ms
            is_same = (span_of(old), old.exact, old.shape) == (span_of(new), new.exact, new.shape)
        else:
            is_comparable = is_same = isinstance(old, Quota) and isinstance(new, Quota)
        if is_comparable and new is not None and new.bound < old.bound and spending.charged:
            self.capacity.spent(limit)
            spending.end_charges(old, old.bound - new.bound, self.pool.now)
        if not (is_comparable and is_same):
            spending.charged = {}

    def _restart_shares(self) -> None:
        """Restart shares after a change of their measure, since uses in different measures
        cannot be compared. Waiters keep their order within their tenant."""
        for name, limit in self.pool.limits.items():
            self.queues.restart(limit)
            for number in limit.bands:
                self.pump.outlooks.progress.pop((name, number), None)
        for session in self.pool.sessions.values():
            for held in session.held.values():
                held.use = 0


# The end of a pause without an end.
FOR_EVER = 9007199254740991
Place = tuple[str, int]


@dataclass(eq=False, repr=False)
class Reports:
    """What a comparing session reads, page by page. Lua: `comparison`."""

    pool: PoolState
    capacity: Capacity
    permits: Permits
    roster: Roster
    joining: Joins

    def whole(self, q: SyncRequest) -> Whole:
        session, policy = self.pool.sessions[q.sid], self.pool.policy
        ends = [s.expiry for s in self.pool.sessions.values()] + list(self.permits.lapsing.values())
        lapsing, more_lapsing = self._page(
            [(end, "|".join(map(str, permit))) for permit, end in self.permits.lapsing.items()],
            q.pages.get("lapsing"),
        )
        paused, more_paused = self._pauses(q.pages.get("pauses"))
        spent, told, more_spent = self._spent_since(q)
        carried = {"|".join(map(str, one)): of for one, of in self.permits.carried.items()}
        pages = {"spent": more_spent, "lapsing": more_lapsing, "pauses": more_paused}
        sends_policy = q.revision != self.pool.revision or self.joining.conflict == 1
        return Whole(
            now_ms=self.pool.now,
            held=[
                (ticket, held.seq, held.until)
                for ticket in q.asks
                if (held := session.held.get(ticket))
            ],
            lapsing=[
                (member, max(0, end - self.pool.now), write_charges(carried.get(member, {})))
                for end, member in lapsing
            ],
            next_event_ms=max(1, min(ends) - self.pool.now),
            conflict=self.joining.conflict,
            spent=spent,
            pauses=[
                (name, pause.until - self.pool.now, pause.ramp_ms, pause.reason)
                for name in paused
                if (pause := self.pool.pause_of(self.pool.limit(name)))
            ],
            policy=policy.pack() if policy and sends_policy else None,
            roster=self.roster.roster(q),
            told=told,
            pages={name: place for name, place in pages.items() if place},
            seq=self.pool.seq,
        )

    def paused(self) -> dict[str, int]:
        """Return when each pause is over, its ramp included."""
        pauses = {name: limit.pause for name, limit in self.pool.limits.items() if limit.pause}
        return {
            name: FOR_EVER if pause.gate else pause.until + pause.ramp_ms
            for name, pause in pauses.items()
        }

    def _pauses(self, place: Place | None) -> tuple[list[str], Place | None]:
        over = sorted((end, name) for name, end in self.paused().items() if end <= self.pool.now)
        for _, name in over[: self.pool.paces.looked_at]:
            self.pool.limit(name).pause = None
        page, rest = self._page([(end, name) for name, end in self.paused().items()], place)
        return [name for _, name in page], rest

    def _spent_since(self, q: SyncRequest) -> tuple[list[tuple[str, int]], int, Place | None]:
        """Return the rates that changed after `told`, as of then. The first page adds, as of
        now, those unchanged for the longest time, unless this call has more to do."""
        order = sorted((number, name) for name, (number, _) in self.joining.spending.items())
        most = self.pool.paces.on_page
        news = [(number, name) for number, name in order if number > q.told][:most]
        behind = len(news) == most
        told = news[-1][0] if behind else self.joining.changes
        found = {name: self.joining.spending[name][1] for _, name in news}
        is_first = not ("spent" in q.pages or self.joining.pump.more)
        for _, name in order[: self.pool.paces.looked_at if is_first else 0]:
            limit = self.pool.limit(name)
            found[name] = self.capacity.spent(limit) if limit.is_rate else 0
            if not found[name]:
                del self.joining.spending[name]
        return list(found.items()), told, (str(told), 0) if behind else None

    def _page(
        self, rows: list[tuple[int, str]], place: Place | None
    ) -> tuple[list[tuple[int, str]], Place | None]:
        """Return the rows from a place on, (score, how many of it were read), and the next
        place."""
        score, passed = place or ("", 0)
        first = passed + (sum(at < int(score) for at, _ in rows) if place else 0)
        page = sorted(rows)[first : first + self.pool.paces.on_page]
        if len(page) < self.pool.paces.on_page:
            return page, None
        last = page[-1][0]
        if page[0][0] < last:
            return page, (str(last), 0)
        return page, (str(last), self.pool.paces.on_page + (passed if score == str(last) else 0))


class PoolModel:
    """A pool: the scripts as methods, over parts that share one state. Times are the server's, in
    ms. Lua: `sync`, `tend`, `renew` and `admin`."""

    def __init__(self, paces: Paces | None = None) -> None:
        self.pool = PoolState(paces or Paces())
        capacity = self.capacity = Capacity(self.pool)
        queues = self.queues = Queues(self.pool, capacity)
        permits = self.permits = Permits(self.pool, capacity, queues)
        self.outlooks = Outlooks(self.pool, capacity, permits)
        self.positions = Positions(self.pool, capacity, self.outlooks)
        self.pump = Pump(self.pool, capacity, queues, permits, self.outlooks)
        self.roster = Roster(self.pool, self.pump)
        self.joining = Joins(self.pool, capacity, queues, permits, self.pump, self.roster)
        self.reports = Reports(self.pool, capacity, permits, self.roster, self.joining)
        self.run = ""
        self.clock = 0
        self.reap_at = 0

    def flush(self) -> None:
        """Forget everything: FLUSHALL, or a restart without data."""
        pool = self.pool
        vars(self).update(vars(PoolModel(pool.paces)))
        self.pool.subscribed, self.pool.pushed = pool.subscribed, pool.pushed

    def _begin(self, q: SyncRequest | None) -> None:
        for limit in self.pool.limits.values():
            limit.retry_at, limit.reserved = None, 0
        self.pool.resets = q.resets if q else {}
        self.pool.touched, self.pump.own, self.pump.granted = set(), None, []
        self.outlooks.firm = frozenset(q.firm if q else ())
        self.outlooks.barred, self.outlooks.waited = [], {}
        self.pump.given_to = defaultdict(list)
        self.pump.budget, self.pump.served = self.pool.paces.at_once, False
        self.pump.more = self.joining.conflict = 0

    def _end(self) -> None:
        self.pump.publish()
        self.clock = self.pool.now
        self.joining.forget_stamps()
        self.pool.forget_unnamed()
        self.joining.note_spenders()

    def sync(self, q: SyncRequest, wall: int) -> SyncReply:
        """Process an ordinary request. Declines, without any change, if more is to be done: the
        caller repeats the request by `tend`."""
        self._begin(q)
        self.pool.now = max(wall, self.clock)
        session = self.pool.sessions.get(q.sid)
        blocked = session is not None and session.blocked
        if self._in_doubt(q.run, wall) or q.epoch != self.pool.epoch or blocked:
            return self._reply(q, "tend", None)
        status = self._check(q)
        if status == "ok":
            assert session is not None
            self.pump.own = q.sid
        return self._finish(q, status, session)

    def tend(self, q: SyncRequest, wall: int) -> SyncReply:
        """Process any request, and do the upkeep of the pool."""
        self._begin(q)
        self._recover(q, wall)
        self._reap_expired(q.sid)
        self._reap_closed(q.sid)
        status = self.joining.join(q) if q.join else self._check(q)
        session = self.pool.sessions.get(q.sid)
        if status == "ok":
            assert session is not None
            self.pump.own = q.sid
            self.roster.acknowledge(q)
            session.expiry = self.pool.now + self.pool.lease_ms
            if session.blocked:
                self.pump.unblock(session)
        return self._finish(q, status, session, tending=True)

    def renew(self, q: Renewal, wall: int) -> RenewReply:
        """Keep a session alive; a session that is gone stays gone."""
        now, session = max(wall, self.clock), self.pool.sessions.get(q.sid)
        status: Status = "ok"
        set_back = self.clock - wall > self.pool.lease_ms / 2
        silent = wall - self.clock > self.pool.lease_ms / 2 and self._expired(wall)
        if self.run != q.run or q.epoch != self.pool.epoch or set_back or silent:
            status = "epoch"
        elif session is None or session.expiry <= now or session.gen != q.gen:
            status = "gone"
        else:
            session.expiry = now + self.pool.lease_ms
            self.clock = now
        quiet_ms = max(0, self.pool.recover_until - now)
        return RenewReply(status, self.pool.epoch, self.pool.lease_ms, quiet_ms, self.pool.revision)

    def position(self, sid: str, ticket: int, wall: int) -> list[Any]:
        """Return the position of a waiting ticket, without any change."""
        self.pool.now, self.pool.resets = max(wall, self.clock), {}
        return self.positions.of(sid, ticket)

    def pause(self, name: str, for_ms: int, ramp_ms: int, why: str, *, run: str, wall: int) -> int:
        """Admit no call under a limit. A shorter pause never ends a longer one."""
        in_doubt = self._begin_act(run, wall)
        limit, until, done = self.pool.limit(name), self.pool.now + for_ms, 0
        pause = self.pool.pause_of(limit)
        if pause is None or pause.until < until:
            limit.pause, done = Pause(until, ramp_ms, why), 1
            self.pump.timed[name] = until
            if pause is None:
                self._announce(in_doubt=in_doubt)
        self._end_act(in_doubt=in_doubt)
        return done

    def close(
        self, name: str, for_ms: int, most_ms: int, why: str, *, tried: bool, run: str, wall: int
    ) -> int:
        """Admit no call under a limit until it is opened, except one probe at a time: after
        `for_ms`, and while probes fail after twice the last time, up to `most_ms`."""
        in_doubt = self._begin_act(run, wall)
        limit, until = self.pool.limit(name), self.pool.now + for_ms
        pause = self.pool.pause_of(limit)
        gate = pause.gate if pause else None
        done = 1
        if pause and gate and most_ms <= gate.most_ms:
            done = int(tried)
            gate.rounds = min(gate.rounds + done, 30)
            until = self.pool.now + min(gate.most_ms, gate.every_ms * 2**gate.rounds)
            until = max(pause.until, until)
            gate.taker = None if tried else gate.taker
        elif pause and not gate and pause.until >= until:
            done = 0
        else:
            gate = PauseGate(for_ms, most_ms)
        if done:
            limit.pause = Pause(until, 0, why, gate=gate)
            self.pump.timed[name] = until
            self._announce(in_doubt=in_doubt)
        self._end_act(in_doubt=in_doubt)
        return done

    def open(self, name: str, ramp_ms: int, *, run: str, wall: int) -> int:
        """Open a gate that `close` closed; calls resume over `ramp_ms`."""
        in_doubt = self._begin_act(run, wall)
        limit, done = self.pool.limit(name), 0
        pause = self.pool.pause_of(limit)
        if pause and pause.gate:
            limit.pause, done = Pause(self.pool.now, ramp_ms, pause.reason), 1
            self.pump.timed[name] = self.pool.now + ramp_ms
            self.pool.touched.add(name)
            self._announce(in_doubt=in_doubt)
        self._end_act(in_doubt=in_doubt)
        return done

    def _announce(self, *, in_doubt: bool) -> None:
        if not in_doubt and self.pool.noted_sessions <= MOST_TO_ANNOUNCE:
            self.roster.notify_others("")

    def resume(self, name: str, *, run: str, wall: int) -> int:
        """End a pause."""
        in_doubt = self._begin_act(run, wall)
        limit = self.pool.limit(name)
        done = int(self.pool.pause_of(limit) is not None)
        if done:
            limit.pause = None
            self._announce(in_doubt=in_doubt)
        self.pump.timed.pop(name, None)
        self.pool.touched.add(name)
        self._end_act(in_doubt=in_doubt)
        return done

    def charge(
        self,
        name: str,
        amount: int,
        *,
        evenly: bool,
        bound: int | None,
        recorded: bool = False,
        run: str,
        wall: int,
    ) -> int:
        """Count use of a rate or quota by others outside of the pool as spent now, or `evenly`
        over the last window. bound: the bound that the amount is charged beside. recorded:
        the amount is the recorded total of a day, part of which may be counted already."""
        in_doubt = self._begin_act(run, wall)
        limit, done, now = self.pool.limit(name), 0, self.pool.now
        fits = limit.is_rate and (isinstance(limit.limit, Quota) or not recorded)
        if fits and not in_doubt and bound in (None, limit.limit.bound):
            spent, done = self.capacity.spent(limit), 1
            if recorded:
                done = int(amount > spent)
                limit.spending.add(limit.limit, done * (amount - spent), now)
                if limit.restored is not None:
                    limit.restored.base += done * (amount - spent)
                    limit.asserted = max(limit.restored.base, 1)
                limit.asserted = max(limit.asserted, done * amount)
            elif bound is not None:
                limit.spending.charge(limit.limit, amount, now, evenly=evenly)
            elif evenly:
                limit.spending.add_evenly(limit.limit, amount, now)
            else:
                limit.spending.add(limit.limit, amount, now)
        self._end_act(in_doubt=in_doubt)
        return done

    def hold(
        self,
        owner: str,
        lane: tuple[str, ...],
        amounts: list[int],
        for_ms: int,
        *,
        run: str,
        wall: int,
    ) -> int:
        """Count a call that outlives its process, under a name that is no session's."""
        in_doubt = self._begin_act(run, wall)
        if not in_doubt:
            permit = Lapsing(0, owner, " ".join(lane))
            if permit not in self.permits.lapsing:
                charges = {
                    position: charge
                    for position, name in enumerate(lane)
                    if (charge := self.permits.in_flight(self.pool.limit(name), amounts[position]))
                }
                self.permits.count(lane, owner, 0, charges)
                self.permits.carried |= {permit: charges} if charges else {}
            self.permits.lapsing[permit] = self.pool.now + for_ms
        self._end_act(in_doubt=in_doubt)
        return int(not in_doubt)

    def revoke(self, owner: str, *, run: str, wall: int) -> int:
        """Release all that a session holds, or held when it died; `owner` is its id or its name."""
        in_doubt = self._begin_act(run, wall)
        done = 0
        for sid, session in list(self.pool.sessions.items()):
            if owner in (sid, session.name):
                self.joining.reap(sid, hold=False)
                done += 1
        held_over = [permit for permit in self.permits.lapsing if permit.sid == owner]
        for permit in held_over:
            self.permits.free_lapsing(permit)
        done += bool(held_over)
        if not in_doubt:
            self._note_sessions()
        self._end_act(in_doubt=in_doubt)
        return done

    def _begin_act(self, run: str, wall: int) -> bool:
        """Begin an operator's request. If the past may be lost no call is admitted; `tend` will
        check."""
        self._begin(None)
        in_doubt = self._in_doubt(run, wall)
        set_back = self.clock - wall > self.pool.lease_ms / 2
        self.pool.now = wall if set_back else max(wall, self.clock)
        return in_doubt

    def _end_act(self, *, in_doubt: bool) -> None:
        if in_doubt:
            for name in self.pool.touched:
                self.pump.schedule_check(name, self.pool.now)
            self.joining.forget_stamps()
            self.pool.forget_unnamed()
        else:
            self.pump.pump()
            self._end()

    def _in_doubt(self, run: str, wall: int) -> bool:
        return self.run != run or wall < self.clock or wall >= self.reap_at

    def _check(self, q: SyncRequest) -> Status:
        session = self.pool.sessions.get(q.sid)
        if q.epoch != self.pool.epoch:
            return "epoch"
        if session is None or session.gen != q.gen:
            return "gone"
        if q.batch <= session.batch:
            return "stale"
        if session.full is not None and q.ack > session.acked:
            self.pool.touched.add(session.full[1])
            session.full = None
        session.batch, session.acked = q.batch, max(session.acked, q.ack)
        session.revision, session.closed_at = q.revision, None
        return "ok"

    def _finish(
        self, q: SyncRequest, status: Status, session: SessionState | None, *, tending: bool = False
    ) -> SyncReply:
        """Release first, then admit."""
        stamps: list[float] = []
        refused: list[int] = []
        if status == "ok":
            assert session is not None
            self.permits.apply_releases(q, session)
            self.pump.serve_starving()
            stamps, refused = self.pump.enqueue(q, session)
            self.permits.rehead_filled()
            if tending:
                self._last_words(q, session)
        self.pump.pump()
        outlook = self.outlooks.outlook() if self.pump.own else []
        self.pump.set_timers()  # a day may have been found to end earlier
        if tending:
            self._note_sessions()
            if self.pump.own and (q.full or q.join):
                self.permits.bound_owed(q.sid)
        self._end()
        reply = self._reply(q, status, session if status == "ok" else None)
        whole = self.reports.whole(q) if tending and self.pump.own and q.full else None
        return reply._replace(stamps=stamps, refused=refused, outlook=outlook, whole=whole)

    def _last_words(self, q: SyncRequest, session: SessionState) -> None:
        for number in q.looks:
            queue = session.queues.get(q.flows[number - 1])
            if queue is not None and queue.at is not None and queue.at != BLOCKED:
                self.pool.touched.add(queue.at)
                self.outlooks.note_progress(self.pool.limit(queue.at), queue.flow.band)
                self.outlooks.waited[number] = queue
        if q.leave:
            self.joining.reap(q.sid, hold=False)
            self.pump.own = None

    def _note_sessions(self) -> None:
        self.pool.noted_sessions = len(self.pool.sessions)
        self.reap_at = min((s.expiry for s in self.pool.sessions.values()), default=0)

    def _reply(self, q: SyncRequest, status: Status, session: SessionState | None) -> SyncReply:
        timed_at = min(self.pump.timed.values(), default=0)
        return SyncReply(
            status=status,
            epoch=self.pool.epoch,
            gen=session.gen if session else 0,
            lease_ms=self.pool.lease_ms,
            recovering_ms=max(0, self.pool.recover_until - self.pool.now),
            revision=self.pool.revision,
            sessions=self.pool.noted_sessions,
            sent=session.sent if session else 0,
            more=self.pump.more,
            parked=self.pool.parked,
            timed_ms=max(1, timed_at - self.pool.now) if timed_at else 0,
            grants=self.pump.granted,
            stamps=[],
            refused=[],
            hints=self.pump.hints(q) if status == "ok" else [],
            whole=None,
            barred=self.outlooks.barred,
            outlook=[],
        )

    def _expired(self, wall: int) -> bool:
        return any(session.expiry <= wall for session in self.pool.sessions.values())

    def _recover(self, q: SyncRequest, wall: int) -> None:
        """Begin an epoch if the past is lost: another or empty server, a clock that was set
        back, or half a lease without any request in which a session expired. In that last
        case the server or its clock stood still, not the session, so every session may still
        be running what it held."""
        jump_ms = max(self.pool.lease_ms, 1) / 2
        set_back = self.clock - wall > jump_ms
        self.pool.now = wall if set_back else max(wall, self.clock)
        ran_out = self._expired(wall) or (self.pool.noted_sessions > 0 and not self.pool.sessions)
        silent = self.pool.epoch > 0 and wall - self.clock > jump_ms and ran_out
        lost = self.pool.epoch == 0 or self.run != q.run or q.epoch > self.pool.epoch
        if lost or set_back or silent:
            by_ms = self.clock - wall if set_back else 0
            self.joining.begin_epoch(q)
            self.run = q.run
            if by_ms > 0:
                self._rewind(by_ms)

    def _rewind(self, by_ms: int) -> None:
        """Move all remembered times back after the clock was set back, so that ages stay the
        same."""
        named = self.pool.policy.limits if self.pool.policy else ()
        for limit in self.pool.limits.values():
            pause = self.pool.pause_of(limit)
            if limit.name in named:
                limit.rewind(by_ms)
            if isinstance(limit.limit, Rate):
                limit.spending.rewind(by_ms)
            if pause is not None:
                pause.until -= by_ms
        self.pump.timed = {name: at - by_ms for name, at in self.pump.timed.items()}
        lapsing = self.permits.lapsing
        self.permits.lapsing = {permit: until - by_ms for permit, until in lapsing.items()}

    def _reap_expired(self, own: str) -> None:
        """End some expired sessions and permits held over per call; each session as a whole, and
        that of the caller first."""
        now, most, ended = self.pool.now, self.pool.paces.ended_at_once, 0
        expired = [(sid != own, s.expiry, sid) for sid, s in self.pool.sessions.items()]
        for is_other, _, sid in sorted(one for one in expired if one[1] <= now):
            if is_other and ended >= most:
                self.pump.more = 1
                break
            session = self.pool.sessions[sid]
            ended += 1 + len(session.held) + len(session.queues)
            self.joining.reap(sid, hold=self.joining.hold)
        lapsing = self.permits.lapsing.items()
        over = sorted((at, "|".join(map(str, one)), one) for one, at in lapsing if at <= now)
        if len(over) >= most:
            self.pump.more = 1
        for _, _, permit in over[:most]:
            self.permits.free_lapsing(permit)

    def _reap_closed(self, but: str) -> None:
        """End sessions whose connection was closed for longer than the policy's grace period."""
        grace_ms = self.pool.policy.reap_closed_ms if self.pool.policy else 0
        if grace_ms == 0 or self.pool.quiet():
            return
        for sid, session in list(self.pool.sessions.items()):
            if sid == but:
                continue
            if sid in self.pool.subscribed:
                session.closed_at = None
                continue
            if session.closed_at is None:
                session.closed_at = self.pool.now
            if self.pool.now - session.closed_at >= grace_ms:
                self.joining.reap(sid, hold=self.joining.hold)
