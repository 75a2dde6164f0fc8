"""Who is there, and who knows of whom: what ends the quiet time after an empty restart early.

Only those who were there can name those who may hold a permit. Invariant: whoever is let in is
known to all others, or those who do not know may not vouch for anybody.
"""

from __future__ import annotations

from tidegate.limiter.model.pump import Pump
from tidegate.limiter.model.state import Session
from tidegate.limiter.wire import Push, SyncRequest

# Beyond so many sessions a newcomer is not announced, or nobody is named.
MOST_TO_ANNOUNCE = 64
# So many newcomers are looked at by one call.
MOST_AT_ONCE = 64
MOST_ON_ROSTER = 256


class Roster(Pump):
    """See the module. `version` grows with every change of who is there; `seen` is the version
    that each session knows; `expected` are those who are to come back; `empty` says that the
    server knew nothing, `vouched` that somebody has named who was there."""

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
        """Whoever comes back after an empty restart names those who were there."""
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
