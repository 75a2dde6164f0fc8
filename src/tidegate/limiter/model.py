"""The specification of a pool, executable: what `sync` and `renew` must do, in plain Python.

Pure. The property tests step it beside the real Lua and compare every reply, every push and the
state. Where the Lua counts, the model derives: `used` here *is* what is held plus what is held
over. Times are in ms of the server's clock, handed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tidegate.limiter.limits import PoolPolicy
from tidegate.limiter.wire import Push, Renewal, RenewReply, Status, SyncReply, SyncRequest

ACK_WINDOW = 8


@dataclass(slots=True)
class Held:
    seq: int
    until: int
    limit: str


@dataclass(slots=True)
class Waiting:
    lane: str
    stamp: int
    deadline: int
    hard_ms: int


@dataclass(slots=True)
class SessionModel:
    gen: int
    batch: int
    expiry: int
    sent: int = 0
    acked: int = 0
    blocked: bool = False
    lanes: set[str] = field(default_factory=set)
    held: dict[int, Held] = field(default_factory=dict)
    waiting: dict[int, Waiting] = field(default_factory=dict)

    def first_in(self, lane: str) -> int | None:
        """The ticket that waits longest in a lane."""
        tickets = [ticket for ticket, w in self.waiting.items() if w.lane == lane]
        return min(tickets, key=lambda ticket: self.waiting[ticket].stamp, default=None)


@dataclass(slots=True)
class PoolModel:
    """A pool. `subscribed` says whose channel somebody listens to; `pushed` collects messages."""

    run: str = ""
    epoch: int = 0
    began: int = 0
    recover_until: int = 0
    clock: int = 0
    seq: int = 0
    policy: PoolPolicy | None = None
    sessions: dict[str, SessionModel] = field(default_factory=dict)
    # (ticket, session, limit) -> hard deadline
    lapsing: dict[tuple[int, str, str], int] = field(default_factory=dict)
    subscribed: set[str] = field(default_factory=set)
    pushed: list[tuple[str, Push]] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)

    # -- what holds at every moment

    def used(self, limit: str) -> int:
        held = sum(h.limit == limit for s in self.sessions.values() for h in s.held.values())
        return held + sum(key[2] == limit for key in self.lapsing)

    def bound(self, limit: str) -> int:
        return self.policy.limits.get(limit, 0) if self.policy else 0

    @property
    def lease_ms(self) -> int:
        return self.policy.lease_ms if self.policy else 0

    @property
    def hold(self) -> bool:
        return self.policy is not None and self.policy.on_expiry == "hold"

    @property
    def revision(self) -> int:
        return self.policy.revision if self.policy else 0

    def next_seq(self) -> int:
        self.seq += 1
        return self.seq

    # -- the scripts

    def flush(self) -> None:
        """FLUSHALL, or a restart without data."""
        fresh = PoolModel(subscribed=self.subscribed, pushed=self.pushed)
        for name in self.__slots__:
            setattr(self, name, getattr(fresh, name))

    def renew(self, q: Renewal, wall: int) -> RenewReply:
        self.touched = set()
        self._recover(q, wall)
        session = self.sessions.get(q.sid)
        status: Status = "ok"
        if q.epoch != self.epoch:
            status = "epoch"
        elif session is None or session.expiry <= self.clock or session.gen != q.gen:
            status = "gone"
        else:
            session.expiry = self.clock + self.lease_ms
        quiet = max(0, self.recover_until - self.clock)
        return RenewReply(status, self.epoch, self.lease_ms, quiet, self.revision)

    def sync(self, q: SyncRequest, wall: int) -> SyncReply:
        self.touched = set()
        self._recover(q, wall)
        self._reap_expired()
        status, conflict = self._check_session(q)
        granted: list[tuple[int, int]] = []
        session = self.sessions.get(q.sid)
        gen, sent = (session.gen, session.sent) if session and status == "ok" else (0, 0)
        own: str | None = None
        if session is not None and status == "ok":
            own = q.sid
            self._apply(q, session, granted)
            if q.leave:
                self._reap(q.sid, hold=False)
                own = None
        self._pump(own, granted)
        return self._reply(q, status, conflict, gen, sent, granted)

    # -- loss and time

    def _recover(self, q: SyncRequest | Renewal, wall: int) -> None:
        jump = max(self.lease_ms, 1) / 2
        set_back = self.clock - wall > jump
        expired = any(s.expiry <= wall for s in self.sessions.values())
        silent = self.epoch > 0 and wall - self.clock > jump and expired
        self.clock = wall if set_back else max(wall, self.clock)
        lost = self.epoch == 0 or self.run != q.run or q.epoch > self.epoch
        if lost or set_back or silent:
            self._begin_epoch(q)

    def _begin_epoch(self, q: SyncRequest | Renewal) -> None:
        known = self.epoch > 0 or q.epoch > 0
        for sid in list(self.sessions):
            self._reap(sid, hold=self.hold)
        quiet = max(self.lease_ms, q.lease_ms)
        if not known:
            quiet = max(0, quiet - q.uptime_ms)
        self.epoch = max(self.clock, self.epoch + 1, q.epoch + 1)
        self.run, self.began, self.recover_until = q.run, self.clock, self.clock + quiet

    def _reap(self, sid: str, *, hold: bool) -> None:
        session = self.sessions.pop(sid, None)
        for ticket, held in session.held.items() if session else ():
            if hold and held.until > self.clock:
                self.lapsing[ticket, sid, held.limit] = held.until
            else:
                self.touched.add(held.limit)

    def _reap_expired(self) -> None:
        for sid in [sid for sid, s in self.sessions.items() if s.expiry <= self.clock]:
            self._reap(sid, hold=self.hold)
        for key in [key for key, until in self.lapsing.items() if until <= self.clock]:
            self._free_lapsing(key)

    def _free_lapsing(self, key: tuple[int, str, str]) -> bool:
        if self.lapsing.pop(key, None) is None:
            return False
        self.touched.add(key[2])
        return True

    # -- sessions

    def _check_session(self, q: SyncRequest) -> tuple[Status, int]:
        session = self.sessions.get(q.sid)
        if q.join is not None:
            if session is not None and q.batch <= session.batch:
                return "stale", 0
            return "ok", self._join(q)
        if q.epoch != self.epoch:
            return "epoch", 0
        if session is None or session.gen != q.gen:
            return "gone", 0
        if q.batch <= session.batch:
            return "stale", 0
        session.expiry, session.batch = self.clock + self.lease_ms, q.batch
        session.acked = max(session.acked, q.ack)
        if session.blocked or q.full:
            self.touched |= session.lanes
        session.blocked = False
        return "ok", 0

    def _join(self, q: SyncRequest) -> int:
        assert q.join is not None
        self._reap(q.sid, hold=False)
        conflict = self._merge(q.join.policy)
        if 0 < q.epoch < self.epoch:
            quiet = max(self.lease_ms, q.lease_ms)
            self.recover_until = max(self.recover_until, self.began + quiet)
        session = SessionModel(self.next_seq(), q.batch, self.clock + self.lease_ms)
        self.sessions[q.sid] = session
        for ticket, limit, seq, hard_ms in q.join.held:
            self.lapsing.pop((ticket, q.sid, limit), None)
            session.held[ticket] = Held(seq, self.clock + hard_ms, limit)
        for key in [key for key in self.lapsing if key[1] == q.sid]:
            self._free_lapsing(key)
        for member, left_ms in q.join.lapsing:
            ticket_text, sid, limit = member.split("|", 2)
            if sid not in self.sessions:
                self.lapsing.setdefault((int(ticket_text), sid, limit), self.clock + left_ms)
        return conflict

    def _merge(self, policy: PoolPolicy) -> int:
        if policy.revision > self.revision:
            self.policy = policy
            self.touched |= set(policy.limits)
            return 0
        return int(policy.revision == self.revision and policy != self.policy)

    # -- entries

    def _apply(self, q: SyncRequest, session: SessionModel, granted: list[tuple[int, int]]) -> None:
        for source, to, limit, seq, hard_ms in q.transfers:
            self._give_up(session, source)
            session.waiting.pop(to, None)
            session.held[to] = Held(seq, self.clock + hard_ms, limit)
        for ticket, limit, _outcome, _tokens in q.releases:
            if not self._give_up(session, ticket):
                self._free_lapsing((ticket, q.sid, limit))
        for ticket in q.cancels:
            if session.waiting.pop(ticket, None) is None:
                self._give_up(session, ticket)
        queued: set[str] = set()
        for ticket, lane, left_ms, hard_ms in q.enqueues:
            deadline = self.clock + left_ms if left_ms > 0 else 0
            if not q.full and lane not in queued and self._has_room(lane):
                granted.append((ticket, self._grant(session, ticket, lane, hard_ms)))
                continue
            queued.add(lane)
            if (q.full and ticket in session.held) or ticket in session.waiting:
                continue
            self.touched.add(lane)
            session.lanes.add(lane)
            session.waiting[ticket] = Waiting(lane, 0, deadline, hard_ms)
            # Those who are let in straight away come first in the sequence.
        for ticket, *_ in q.enqueues:
            waiting = session.waiting.get(ticket)
            if waiting is not None and waiting.stamp == 0:
                waiting.stamp = self.next_seq()

    def _give_up(self, session: SessionModel, ticket: int) -> bool:
        held = session.held.pop(ticket, None)
        if held is None:
            return False
        self.touched.add(held.limit)
        return True

    def _has_room(self, lane: str) -> bool:
        """Somebody new may go straight in: there is room, nobody waits, and nothing was lost."""
        waits = any(w.lane == lane for s in self.sessions.values() for w in s.waiting.values())
        return self._quiet_is_over() and self.used(lane) < self.bound(lane) and not waits

    def _quiet_is_over(self) -> bool:
        return self.clock >= self.recover_until

    def _grant(self, session: SessionModel, ticket: int, lane: str, hard_ms: int) -> int:
        seq = self.next_seq()
        session.held[ticket] = Held(seq, self.clock + hard_ms, lane)
        return seq

    # -- letting in

    def _pump(self, own: str | None, granted: list[tuple[int, int]]) -> None:
        if not self._quiet_is_over():
            return
        outbox: dict[str, list[tuple[int, int]]] = {}
        for lane in sorted(self.touched):
            while self.used(lane) < self.bound(lane):
                sid = self._next_session(lane, own)
                if sid is None:
                    break
                session = self.sessions[sid]
                ticket = session.first_in(lane)
                assert ticket is not None
                waiting = session.waiting.pop(ticket)
                if 0 < waiting.deadline <= self.clock:
                    continue
                grant = (ticket, self._grant(session, ticket, lane, waiting.hard_ms))
                if sid == own:
                    granted.append(grant)
                else:
                    session.sent += 1
                    outbox.setdefault(sid, []).append(grant)
        for sid, grants in outbox.items():
            session = self.sessions[sid]
            self.pushed.append((sid, Push(self.epoch, session.gen, session.sent, grants)))

    def _next_session(self, lane: str, own: str | None) -> str | None:
        """Whose first ticket has waited longest, of those who will surely hear of a grant."""
        heads = [
            (s.waiting[ticket].stamp, sid)
            for sid, s in self.sessions.items()
            if (ticket := s.first_in(lane)) is not None
        ]
        for _, sid in sorted(heads):
            session = self.sessions[sid]
            reachable = sid in self.subscribed and session.sent - session.acked < ACK_WINDOW
            if sid == own or reachable:
                return sid
            session.blocked = True
        return None

    def _reply(
        self,
        q: SyncRequest,
        status: Status,
        conflict: int,
        gen: int,
        sent: int,
        granted: list[tuple[int, int]],
    ) -> SyncReply:
        full = q.full and status == "ok"
        session = self.sessions.get(q.sid)
        held = [(t, h.seq) for t, h in session.held.items()] if session else []
        lapsing = sorted((f"{k[0]}|{k[1]}|{k[2]}", u - self.clock) for k, u in self.lapsing.items())
        ends = [s.expiry for s in self.sessions.values()] + list(self.lapsing.values())
        tell_policy = status == "ok" and (q.revision != self.revision or conflict)
        return SyncReply(
            status=status,
            epoch=self.epoch,
            gen=gen,
            lease_ms=self.lease_ms,
            recovering_ms=max(0, self.recover_until - self.clock),
            revision=self.revision,
            sessions=len(self.sessions),
            sent=sent,
            more=0,
            conflict=conflict,
            grants=granted,
            held=sorted(held) if full else None,
            lapsing=lapsing if full and self.hold else None,
            next_event_ms=max(1, min(ends) - self.clock) if full and ends else 0,
            policy=self.policy.pack() if tell_policy and self.policy else None,
        )
