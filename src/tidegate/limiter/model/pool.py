"""Executable specification of a pool: what the scripts must do, in plain Python. Pure.

The property tests step it beside the real Lua and compare every reply, every push and the state.
Where the Lua counts, the model derives: usage of a limit *is* the permits under it, waiters *are*
the queues.

Invariants: the server's clock never goes back within an epoch; after a loss nobody is admitted
for a lease; an overtaken request does nothing; what a process reports to hold counts, even above
the limit, which then drains; the highest revision of the policy wins; a reported spent amount is
never less than the true one.
"""

from __future__ import annotations

from collections import defaultdict

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
from tidegate.limiter.model.scheduler import (
    ACK_WINDOW,
    BLOCKED,
    NO_LIMIT,
    Gate,
    Held,
    Lapsing,
    LimitState,
    Pause,
    Pump,
    Session,
    read_flow,
)
from tidegate.limiter.policy import PoolPolicy, Rate, as_limit

# Beyond so many sessions a newcomer is not announced, or nobody is named.
MOST_TO_ANNOUNCE = 64
# So many newcomers are looked at by one call.
MOST_AT_ONCE = 64
MOST_ON_ROSTER = 256


class Roster(Pump):
    """See the module. `version` grows with every change of who is there; `seen` is the version
    that each session knows; `expected` are the sessions that are to come back; `empty` says that
    the server knew nothing, `vouched` that somebody has named who was there."""

    def __init__(self) -> None:
        super().__init__()
        self.version = 0
        self.seen: dict[str, int] = {}
        self.expected: set[str] = set()
        self.empty = False
        self.vouched = False
        self.began = 0

    def forget_roster(self, *, empty: bool) -> None:
        """Another epoch."""
        self.seen, self.fresh, self.expected = {}, {}, set()
        self.empty, self.vouched = empty, False

    def call_up(self, sid: str) -> None:
        """A message without grants: compare everything."""
        session = self.sessions.get(sid)
        if session and session.expiry > self.now and sid in self.subscribed:
            self.pushed.append((sid, Push(self.epoch, session.gen, session.sent, [], self.now)))

    def call_up_others(self, but: str) -> None:
        for sid in self.sessions:
            if sid != but:
                self.call_up(sid)

    def enter_roster(self, sid: str, session: Session, before: Session | None) -> None:
        """One that was there joins again only to say something new."""
        if before is not None:
            session.since = before.since
            return
        self.version += 1
        session.since = self.seen[sid] = self.version
        if len(self.sessions) > 1:
            lease_ms = self.policy.lease_ms if self.policy else 0
            self.fresh[sid] = self.now + lease_ms // 2
            if not self.quiet() and len(self.sessions) <= MOST_TO_ANNOUNCE:
                self.call_up_others(sid)

    def leave_roster(self, sid: str) -> None:
        self.version += 1
        self.seen.pop(sid, None)
        self.fresh.pop(sid, None)

    def acknowledge(self, q: SyncRequest) -> None:
        """What a session knows, and who is known to all by that."""
        self.seen[q.sid] = max(self.seen[q.sid], q.roster)
        least = min(self.seen.values())
        eldest = sorted(self.fresh.items(), key=lambda each: (each[1], each[0]))
        for sid, until in eldest[:MOST_AT_ONCE]:
            if until <= self.now or self.sessions[sid].since <= least:
                del self.fresh[sid]
                if sid != q.sid:
                    self.call_up(sid)

    def vouch(self, q: SyncRequest) -> None:
        """A session that returns after an empty restart names the sessions before it."""
        assert q.join is not None
        if not self.empty or not self.quiet():
            return
        self.expected |= {sid for sid in q.join.roster if sid not in self.sessions}
        self.expected.discard(q.sid)
        self.vouched |= bool(q.join.roster)
        if self.vouched and not self.expected:
            lease_ms = self.policy.lease_ms if self.policy else 0
            self.began, self.recover_until = self.now - max(lease_ms, q.lease_ms), self.now
            self.call_up_others(q.sid)

    def roster(self, q: SyncRequest) -> tuple[int, list[str] | None]:
        """Its version, and who is there, for a session that does not know it yet."""
        if len(self.sessions) > MOST_ON_ROSTER:
            return 0, []
        return self.version, None if q.roster == self.version else list(self.sessions)


# What a gate is taken for whose record was lost.
GATE_MS = 1000


class Joining(Roster):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.conflict = 0
        self.changes = 0
        # limit -> the number of its last change, and what was spent then
        self.spending: dict[str, tuple[int, int]] = {}

    @property
    def lease_ms(self) -> int:
        return self.policy.lease_ms if self.policy else 0

    @property
    def hold(self) -> bool:
        return self.policy is not None and self.policy.on_expiry == "hold"

    @property
    def revision(self) -> int:
        return self.policy.revision if self.policy else 0

    def forget_stamps(self) -> None:
        """With nobody left in a tenant's queues its stamps may start again."""
        for tenant in self.left:
            if not self.queues_of[tenant]:
                self.stamps.pop(tenant, None)
        self.left.clear()

    def note_spenders(self) -> None:
        """Each change of what is spent has a number."""
        for name, limit in sorted(self.limits.items()):
            if limit.spending.anew:
                limit.spending.anew = False
                self.changes += 1
                self.spending[name] = self.changes, self.spent(limit)

    def begin_epoch(self, q: SyncRequest) -> None:
        known = self.epoch > 0 or q.epoch > 0
        for sid in list(self.sessions):
            self.reap(sid, hold=self.hold)
        for limit in self.limits.values():
            limit.asserted = 0
        self.forget_roster(empty=self.epoch == 0)
        quiet_ms = max(self.lease_ms, q.lease_ms)
        if not known:
            # Nobody knows of this pool: sessions that might have seen it on an earlier run of the
            # server have had since its start to come back.
            quiet_ms = max(0, quiet_ms - q.uptime_ms)
        self.epoch = max(self.now, self.epoch + 1, q.epoch + 1)
        self.began, self.recover_until = self.now, self.now + quiet_ms

    def reap(self, sid: str, *, hold: bool, comes_back: bool = False) -> None:
        """End a session. With `hold` its permits stay counted until the hard deadline of their
        calls; with `comes_back` what it is still to tell of calls that ended stays known."""
        session = self.sessions.get(sid)
        if session is not None:
            for ticket, held in session.held.items():
                lane = read_flow(held.flow).lane
                if hold and held.until > self.now:
                    self.lapsing[Lapsing(ticket, sid, " ".join(lane))] = held.until
                else:
                    self.uncount(lane, sid, ticket)
            for queue in list(session.queues.values()):
                self.vacate(queue)
            del self.sessions[sid]
        if not comes_back:
            self.owed.pop(sid, None)
            self.leave_roster(sid)

    def join(self, q: SyncRequest) -> Status:
        """The session restarts with what it says that it holds."""
        assert q.join is not None
        before = self.sessions.get(q.sid)
        if before is not None and q.batch <= before.batch:
            return "stale"
        charges = {t: held.charges for t, held in before.held.items()} if before else {}
        self.reap(q.sid, hold=False, comes_back=True)
        self._merge(q.join.policy)
        lost = 0 < q.epoch < self.epoch
        if lost:
            # A session of an earlier epoch proves that there was one.
            quiet_ms = max(self.lease_ms, q.lease_ms)
            self.recover_until = max(self.recover_until, self.began + quiet_ms)
        session = Session(self.next_seq(), q.batch, self.now + self.lease_ms, q.join.name)
        self.sessions[q.sid] = session
        self.enter_roster(q.sid, session, before)
        for ticket, number, seq, hard_ms, cost_ms in q.join.held:
            key = q.flows[number - 1]
            lane = read_flow(key).lane
            self.lapsing.pop(Lapsing(ticket, q.sid, " ".join(lane)), None)
            self.count(lane, q.sid, ticket)
            until = self.now + hard_ms
            session.held[ticket] = Held(seq, until, cost_ms, charges.get(ticket, {}), key)
        # What else was held over for it is free: it says itself what it holds.
        for permit in [permit for permit in self.lapsing if permit.sid == q.sid]:
            self.free_lapsing(permit)
        if lost:
            self._remember(q)
        return "ok"

    def _remember(self, q: SyncRequest) -> None:
        """What the server lost and the session has seen."""
        assert q.join is not None
        for member, left_ms in q.join.lapsing:
            ticket, sid, lane = member.split("|", 2)
            permit = Lapsing(int(ticket), sid, lane)
            if sid not in self.sessions and permit not in self.lapsing:
                self.lapsing[permit] = self.now + left_ms
                self.count(tuple(lane.split(" ")), sid, int(ticket))
        for name, seen, since in q.join.spent:
            self._assert_spent(name, seen, since)
        for name, left_ms, ramp_ms, said in q.join.pauses:
            pause = self.pause_of(self.limit(name))
            if pause is None or pause.until < self.now + left_ms:
                self._assert_pause(self.limit(name), self.now + left_ms, ramp_ms, said)
        self.vouch(q)

    def _assert_pause(self, limit: LimitState, until: int, ramp_ms: int, said: str) -> None:
        gate = None
        if ramp_ms == 0:
            before = limit.pause.gate if limit.pause else None
            gate = before or Gate(GATE_MS, GATE_MS)
        limit.pause = Pause(until, ramp_ms, said, gate=gate)
        if limit.is_implicit:
            self.look_again(limit.name, until)

    def _assert_spent(self, name: str, seen: int, since: int) -> None:
        """Rates after a loss: the most that anybody had seen spent, and what each has admitted
        since."""
        limit = self.limit(name)
        if not limit.is_rate:
            return
        base = limit.asserted
        known = max(base, self.spent(limit) if base == 0 else 0)
        self.spent(limit)
        limit.spending.add(limit.limit, max(0, seen - known) + since, self.now)
        limit.asserted = max(base, seen, 1)

    def _merge(self, policy: PoolPolicy) -> None:
        """The highest revision wins; a start-up never overwrites a newer one."""
        if policy.revision == self.revision and self.policy and policy.pack() != self.policy.pack():
            self.conflict = 1
        if policy.revision <= self.revision:
            return
        self.forget_stamps()
        self.forget_unnamed()
        before, self.policy = self.policy, policy
        changed = [
            name
            for name, limit in policy.limits.items()
            if not before
            or (old := before.limit(name)) is None
            or definition(old) != definition(as_limit(limit))
        ]
        for name in {*self.limits, *policy.limits}:
            limit = self.limit(name)
            limit.limit = policy.binding(name) or NO_LIMIT
            limit.retry_at = None
            if name not in policy.limits:
                limit.cost_ms = limit.shadowed = limit.asserted = 0
            if not limit.is_rate:
                self.spending.pop(name, None)
            if not limit.minimum:
                limit.current, limit.dropped_at = None, 0
            elif limit.current is not None:
                limit.current = min(limit.current, limit.limit.bound * 1000)
        self.forget_unnamed()
        same = before is not None and band_shares(before.bands) == band_shares(policy.bands)
        concerned = changed if same else policy.limits
        self.touched |= {name for name in concerned if self.limit(name).waits}
        # In a new record nothing was counted in any way.
        for limit in map(self.limit, changed if before else ()):
            if limit.is_rate:
                self.spent(limit)
                limit.spending.take_along(limit.limit, self.now)


# What one call tells of each list, and of how many rates it sees what is spent now.
ON_PAGE = 100
LOOKED_AT = 50
# When a pause ends that lasts until it is ended.
FOR_EVER = 9007199254740991
Place = tuple[str, int]


class Telling(Joining):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.on_page, self.looked_at = ON_PAGE, LOOKED_AT

    def whole(self, q: SyncRequest) -> Whole:
        session, policy = self.sessions[q.sid], self.policy
        ends = [s.expiry for s in self.sessions.values()] + list(self.lapsing.values())
        lapsing, more_lapsing = self._page(
            [(end, "|".join(map(str, permit))) for permit, end in self.lapsing.items()]
            if self.hold
            else [],
            q.pages.get("lapsing"),
        )
        paused, more_paused = self._pauses(q.pages.get("pauses"))
        spent, told, more_spent = self._spent_since(q)
        pages = {"spent": more_spent, "lapsing": more_lapsing, "pauses": more_paused}
        tell = policy is not None and (q.revision != self.revision or self.conflict == 1)
        return Whole(
            now_ms=self.now,
            held=[
                (ticket, held.seq, held.until)
                for ticket in q.asks
                if (held := session.held.get(ticket))
            ],
            lapsing=[(member, max(0, end - self.now)) for end, member in lapsing],
            next_event_ms=max(1, min(ends) - self.now),
            conflict=self.conflict,
            spent=spent,
            pauses=[
                (name, pause.until - self.now, pause.ramp_ms, pause.said)
                for name in paused
                if (pause := self.pause_of(self.limit(name)))
            ],
            policy=policy.pack() if policy and tell else None,
            roster=self.roster(q),
            told=told,
            pages={name: place for name, place in pages.items() if place},
        )

    def paused(self) -> dict[str, int]:
        """When nothing is left of each pause."""
        pauses = {name: limit.pause for name, limit in self.limits.items() if limit.pause}
        return {
            name: FOR_EVER if pause.gate else pause.until + pause.ramp_ms
            for name, pause in pauses.items()
        }

    def _pauses(self, place: Place | None) -> tuple[list[str], Place | None]:
        over = sorted((end, name) for name, end in self.paused().items() if end <= self.now)
        for _, name in over[: self.looked_at]:
            self.limit(name).pause = None
        page, rest = self._page([(end, name) for name, end in self.paused().items()], place)
        return [name for _, name in page], rest

    def _spent_since(self, q: SyncRequest) -> tuple[list[tuple[str, int]], int, Place | None]:
        """What is spent of the rates that changed after `told`, as of then; with the first page, of
        those that did not for the longest time as of now."""
        order = sorted((number, name) for name, (number, _) in self.spending.items())
        news = [(number, name) for number, name in order if number > q.told][: self.on_page]
        behind = len(news) == self.on_page
        told = news[-1][0] if behind else self.changes
        found = {name: self.spending[name][1] for _, name in news}
        for _, name in order[: 0 if "spent" in q.pages else self.looked_at]:
            limit = self.limit(name)
            found[name] = self.spent(limit) if limit.is_rate else 0
            if not found[name]:
                del self.spending[name]
        return list(found.items()), told, (str(told), 0) if behind else None

    def _page(
        self, rows: list[tuple[int, str]], place: Place | None
    ) -> tuple[list[tuple[int, str]], Place | None]:
        """The rows that begin at a place, (score, how many of it were read), and the next place."""
        score, passed = place or ("", 0)
        first = passed + (sum(at < int(score) for at, _ in rows) if place else 0)
        page = sorted(rows)[first : first + self.on_page]
        if len(page) < self.on_page:
            return page, None
        last = page[-1][0]
        if page[0][0] < last:
            return page, (str(last), 0)
        return page, (str(last), self.on_page + (passed if score == str(last) else 0))


class PoolModel(Telling):
    """A pool. Times passed in are the server's, in ms."""

    def __init__(self) -> None:
        super().__init__()
        self.run = ""
        self.clock = 0
        # As of the last `tend` that was answered: how many sessions, and when the first runs out.
        self.noted_sessions = 0
        self.reap_at = 0

    def flush(self) -> None:
        """FLUSHALL, or a restart without data."""
        paces = ("at_once", "ahead_ms", "starves", "longest", "on_page", "looked_at", "most_owed")
        kept = ("subscribed", "pushed", *paces)
        vars(self).update(vars(PoolModel()) | {name: vars(self)[name] for name in kept})

    def _begin(self, q: SyncRequest | None) -> None:
        for limit in self.limits.values():
            limit.retry_at, limit.reserved = None, 0
        self.resets = q.resets if q else {}
        self.touched, self.own, self.granted = set(), None, []
        self.firm, self.barred, self.waited = frozenset(q.firm if q else ()), [], {}
        self.given_to = defaultdict(list)
        self.budget, self.served, self.more, self.conflict = self.at_once, False, 0, 0

    def _end(self) -> None:
        self.publish()
        self.clock = self.now
        self.forget_stamps()
        self.forget_unnamed()
        self.note_spenders()

    # -- the scripts

    def sync(self, q: SyncRequest, wall: int) -> SyncReply:
        """What a process has to say in passing. Declines, changing nothing, where there is more to
        do than that: the caller asks again by `tend`."""
        self._begin(q)
        self.now = max(wall, self.clock)
        session = self.sessions.get(q.sid)
        if self._in_doubt(q.run, wall) or q.epoch != self.epoch or (session and session.blocked):
            return self._reply(q, "tend", None)
        status = self._check(q)
        if status == "ok":
            assert session is not None
            self.own = q.sid
        return self._finish(q, status, session)

    def tend(self, q: SyncRequest, wall: int) -> SyncReply:
        """The same, and all that is out of the ordinary."""
        self._begin(q)
        self._recover(q, wall)
        self._reap_expired()
        self._reap_closed(q.sid)
        status = self.join(q) if q.join else self._check(q)
        session = self.sessions.get(q.sid)
        if status == "ok":
            assert session is not None
            self.own = q.sid
            self.acknowledge(q)
            session.expiry = self.now + self.lease_ms
            if session.blocked:
                self.unblock(session)
        return self._finish(q, status, session, tending=True)

    def renew(self, q: Renewal, wall: int) -> RenewReply:
        """Keeps a session alive; never brings one back that is gone."""
        now, session = max(wall, self.clock), self.sessions.get(q.sid)
        status: Status = "ok"
        set_back = self.clock - wall > self.lease_ms / 2
        silent = wall - self.clock > self.lease_ms / 2 and self._ran_out(wall)
        if self.run != q.run or q.epoch != self.epoch or set_back or silent:
            status = "epoch"
        elif session is None or session.expiry <= now or session.gen != q.gen:
            status = "gone"
        else:
            session.expiry = now + self.lease_ms
            self.clock = now
        quiet_ms = max(0, self.recover_until - now)
        return RenewReply(status, self.epoch, self.lease_ms, quiet_ms, self.revision)

    def pause(self, name: str, for_ms: int, ramp_ms: int, said: str, *, run: str, wall: int) -> int:
        """Admit no call under a limit. A shorter pause never ends a longer one."""
        in_doubt = self._begin_act(run, wall)
        limit, until, done = self.limit(name), self.now + for_ms, 0
        pause = self.pause_of(limit)
        if pause is None or pause.until < until:
            limit.pause, done = Pause(until, ramp_ms, said), 1
            self.timed[name] = until
            if pause is None:
                self._announce(in_doubt=in_doubt)
        self._end_act(in_doubt=in_doubt)
        return done

    def close(
        self, name: str, for_ms: int, most_ms: int, said: str, *, tried: bool, run: str, wall: int
    ) -> int:
        """Admit nobody under a limit until it is opened, but one call at a time that tries: after
        `for_ms`, and for as long as tries fail after twice the last time, up to `most_ms`."""
        in_doubt = self._begin_act(run, wall)
        limit, until = self.limit(name), self.now + for_ms
        pause = self.pause_of(limit)
        gate = pause.gate if pause else None
        done = 1
        if pause and gate and most_ms <= gate.most_ms:
            done = int(tried)
            gate.rounds = min(gate.rounds + done, 30)
            until = self.now + min(gate.most_ms, gate.every_ms * 2**gate.rounds)
            until = max(pause.until, until)
            gate.taker = None if tried else gate.taker
        elif pause and not gate and pause.until >= until:
            done = 0
        else:
            gate = Gate(for_ms, most_ms)
        if done:
            limit.pause = Pause(until, 0, said, gate=gate)
            self.timed[name] = until
            self._announce(in_doubt=in_doubt)
        self._end_act(in_doubt=in_doubt)
        return done

    def open(self, name: str, ramp_ms: int, *, run: str, wall: int) -> int:
        """End what `close` began; calls come back over `ramp_ms`."""
        in_doubt = self._begin_act(run, wall)
        limit, done = self.limit(name), 0
        pause = self.pause_of(limit)
        if pause and pause.gate:
            limit.pause, done = Pause(self.now, ramp_ms, pause.said), 1
            self.timed[name] = self.now + ramp_ms
            self.touched.add(name)
            self._announce(in_doubt=in_doubt)
        self._end_act(in_doubt=in_doubt)
        return done

    def _announce(self, *, in_doubt: bool) -> None:
        if not in_doubt and self.noted_sessions <= MOST_TO_ANNOUNCE:
            self.call_up_others("")

    def resume(self, name: str, *, run: str, wall: int) -> int:
        """End a pause."""
        in_doubt = self._begin_act(run, wall)
        limit = self.limit(name)
        done = int(self.pause_of(limit) is not None)
        if done:
            limit.pause = None
            self._announce(in_doubt=in_doubt)
        self.timed.pop(name, None)
        self.touched.add(name)
        self._end_act(in_doubt=in_doubt)
        return done

    def revoke(self, who: str, *, run: str, wall: int) -> int:
        """Take back all that a session holds, or held when it died; `who` is its id or its name."""
        in_doubt = self._begin_act(run, wall)
        done = 0
        for sid, session in list(self.sessions.items()):
            if who in (sid, session.name):
                self.reap(sid, hold=False)
                done += 1
        held_over = [permit for permit in self.lapsing if permit.sid == who]
        for permit in held_over:
            self.free_lapsing(permit)
        done += bool(held_over)
        if not in_doubt:
            self._note_sessions()
        self._end_act(in_doubt=in_doubt)
        return done

    # -- parts of them

    def _begin_act(self, run: str, wall: int) -> bool:
        """Where the past may be lost nobody is admitted, and `tend` is to find it out."""
        self._begin(None)
        in_doubt = self._in_doubt(run, wall)
        self.now = wall if self.clock - wall > self.lease_ms / 2 else max(wall, self.clock)
        return in_doubt

    def _end_act(self, *, in_doubt: bool) -> None:
        if in_doubt:
            for name in self.touched:
                self.look_again(name, self.now)
            self.forget_stamps()
            self.forget_unnamed()
        else:
            self.pump()
            self._end()

    def _in_doubt(self, run: str, wall: int) -> bool:
        return self.run != run or wall < self.clock or wall >= self.reap_at

    def _check(self, q: SyncRequest) -> Status:
        session = self.sessions.get(q.sid)
        if q.epoch != self.epoch:
            return "epoch"
        if session is None or session.gen != q.gen:
            return "gone"
        if q.batch <= session.batch:
            return "stale"
        session.batch, session.acked = q.batch, max(session.acked, q.ack)
        session.closed_at = None
        return "ok"

    def _finish(
        self, q: SyncRequest, status: Status, session: Session | None, *, tending: bool = False
    ) -> SyncReply:
        """Frees first, admits last."""
        stamps: list[int] = []
        refused: list[int] = []
        if status == "ok":
            assert session is not None
            self.say_back(q, session)
            self.serve_starving()
            stamps, refused = self.ask(q, session)
            self.rehead_filled()
            if tending:
                self._last_words(q, session)
        self.pump()
        outlook = self.outlook() if self.own else []
        if tending:
            self._note_sessions()
            if self.own and (q.full or q.join):
                self.bound_owed(q.sid)
        self._end()
        reply = self._reply(q, status, session if status == "ok" else None)
        whole = self.whole(q) if tending and self.own and q.full else None
        return reply._replace(stamps=stamps, refused=refused, outlook=outlook, whole=whole)

    def _last_words(self, q: SyncRequest, session: Session) -> None:
        for number in q.looks:
            queue = session.queues.get(q.flows[number - 1])
            if queue is not None and queue.at is not None and queue.at != BLOCKED:
                self.touched.add(queue.at)
                self.waited[number] = queue
        if q.leave:
            self.reap(q.sid, hold=False)
            self.own = None

    def _note_sessions(self) -> None:
        self.noted_sessions = len(self.sessions)
        self.reap_at = min((s.expiry for s in self.sessions.values()), default=0)

    def _reply(self, q: SyncRequest, status: Status, session: Session | None) -> SyncReply:
        timed_at = min(self.timed.values(), default=0)
        return SyncReply(
            status=status,
            epoch=self.epoch,
            gen=session.gen if session else 0,
            lease_ms=self.lease_ms,
            recovering_ms=max(0, self.recover_until - self.now),
            revision=self.revision,
            sessions=self.noted_sessions,
            sent=session.sent if session else 0,
            more=self.more,
            parked=self.parked,
            timed_ms=max(1, timed_at - self.now) if timed_at else 0,
            grants=self.granted,
            stamps=[],
            refused=[],
            hints=self.hints(q) if status == "ok" else [],
            whole=None,
            barred=self.barred,
            outlook=[],
        )

    # -- loss and time

    def _ran_out(self, wall: int) -> bool:
        return any(session.expiry <= wall for session in self.sessions.values())

    def _recover(self, q: SyncRequest, wall: int) -> None:
        """The past is lost when the server is another one or empty; when its clock was set back; or
        when nobody spoke to it for half a lease and a session ran out meanwhile: then the server or
        its clock was away, not the session, and everybody may still be running what he held."""
        jump_ms = max(self.lease_ms, 1) / 2
        set_back = self.clock - wall > jump_ms
        self.now = wall if set_back else max(wall, self.clock)
        ran_out = self._ran_out(wall) or (self.noted_sessions > 0 and not self.sessions)
        silent = self.epoch > 0 and wall - self.clock > jump_ms and ran_out
        lost = self.epoch == 0 or self.run != q.run or q.epoch > self.epoch
        if lost or set_back or silent:
            by_ms = self.clock - wall if set_back else 0
            self.begin_epoch(q)
            self.run = q.run
            if by_ms > 0:
                self._rewind(by_ms)

    def _rewind(self, by_ms: int) -> None:
        """The clock was set back: what is remembered by its time is as old as before."""
        for limit in self.limits.values():
            pause = self.pause_of(limit)
            if isinstance(limit.limit, Rate):
                limit.spending.rewind(by_ms)
            if pause is not None:
                pause.until -= by_ms
        self.timed = {name: at - by_ms for name, at in self.timed.items()}
        self.lapsing = {permit: until - by_ms for permit, until in self.lapsing.items()}

    def _reap_expired(self) -> None:
        for sid in [sid for sid, s in self.sessions.items() if s.expiry <= self.now]:
            self.reap(sid, hold=self.hold)
        for permit in [permit for permit, until in self.lapsing.items() if until <= self.now]:
            self.free_lapsing(permit)

    def _reap_closed(self, but: str) -> None:
        """Where the policy says so, a process whose connection was closed is taken for dead when
        it has not come back within the grace."""
        grace_ms = self.policy.reap_closed_ms if self.policy else 0
        if grace_ms == 0 or self.quiet():
            return
        for sid, session in list(self.sessions.items()):
            if sid == but:
                continue
            if sid in self.subscribed:
                session.closed_at = None
                continue
            if session.closed_at is None:
                session.closed_at = self.now
            if self.now - session.closed_at >= grace_ms:
                self.reap(sid, hold=self.hold)


__all__ = ["ACK_WINDOW", "PoolModel"]
