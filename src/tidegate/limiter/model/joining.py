"""How sessions enter a pool and leave it, what they bring along, and how a pool begins anew.

Invariant: what a process says it holds is the truth, and counts even above the limit, which then
drains; the highest revision of the policy wins.
"""

from __future__ import annotations

from tidegate.limiter.limits import PoolPolicy, as_limit
from tidegate.limiter.model.roster import Roster
from tidegate.limiter.model.state import (
    NO_LIMIT,
    Gate,
    Held,
    Lapsing,
    LimitState,
    Pause,
    Session,
    read_flow,
)
from tidegate.limiter.wire import Status, SyncRequest, band_shares, definition

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
        """With nobody left in a tenant's queues its stamps may begin anew."""
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
            # Nobody knows of this pool: those who might have seen it on an earlier run of the
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
        """The session begins anew with what it says that it holds."""
        assert q.join is not None
        before = self.sessions.get(q.sid)
        if before is not None and q.batch <= before.batch:
            return "stale"
        charges = {t: held.charges for t, held in before.held.items()} if before else {}
        self.reap(q.sid, hold=False, comes_back=True)
        self._merge(q.join.policy)
        lost = 0 < q.epoch < self.epoch
        if lost:
            # Whoever lived in an earlier epoch proves that there was one.
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
