"""A pool as the scripts must treat it: `sync`, `tend`, `renew` and `act`.

Invariants: the server's clock never goes back within an epoch; whoever may have lost the past lets
nobody in for a lease; a request that was overtaken by a later one does nothing.
"""

from __future__ import annotations

from collections import defaultdict

from tidegate.limiter.limits import Rate
from tidegate.limiter.model.roster import MOST_TO_ANNOUNCE
from tidegate.limiter.model.state import BLOCKED, Gate, Pause, Session
from tidegate.limiter.model.telling import Telling
from tidegate.limiter.wire import Renewal, RenewReply, Status, SyncReply, SyncRequest


class PoolModel(Telling):
    """A pool. Times handed in are the server's, in ms."""

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
        """Let nobody in under a limit. A shorter pause never ends a longer one."""
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
        """Where the past may be lost nobody is let in, and `tend` is to find it out."""
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
        """Frees first, lets in last."""
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
