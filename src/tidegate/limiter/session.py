"""What this process is to its pool and what each answer of Valkey means, decided without I/O.

    away ──joined──> recovering ──one lease──> up
      ^                  │                      │
      └── no answer ─────┴──────────────────────┘

Invariants: each request has a higher batch number, so that one which was delayed in the network and
overtaken does nothing; no grant is taken when the lease has lapsed; a lapse without any failed call
before it means that *we* were paused, and ends what runs here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_hex

from tidegate.errors import ConfigError, DemandImpossible
from tidegate.limiter.lease import Identity, Lease
from tidegate.limiter.ledger import Batch, Ledger, Waiter
from tidegate.limiter.limits import PoolPolicy, share_of
from tidegate.limiter.observer import Observer, State
from tidegate.limiter.wire import Join, Push, SyncReply, SyncRequest

logger = logging.getLogger("tidegate.limiter")

# How many grants may come by push before they are acknowledged without anything else to say:
# half of the server's window (`ACK_WINDOW` in pump.lua).
ACK_EARLY = 4


@dataclass(slots=True)
class Traffic:
    """Counts since the start."""

    syncs: int = 0
    failures: int = 0
    pushes: int = 0
    joins: int = 0


class Session:
    """See the module. `wake` is called when there is something to say, `alarm(name, in_ms)` when
    there will be. `fatal` is set by a fault that no retry mends; `joined` is called at every
    confirmed answer.
    """

    def __init__(
        self,
        policy: PoolPolicy,
        ledger: Ledger,
        observer: Observer,
        lease: Lease,
        *,
        wake: Callable[[], None],
        alarm: Callable[[str, float], None],
        settled: Callable[[], None],
    ) -> None:
        self.sid = token_hex(8)
        self.policy = policy
        self.lease = lease
        self.state: State = "away"
        self.fatal: ConfigError | None = None
        self.sessions = 0
        self.last_error = "no answer yet"
        self.traffic = Traffic()
        self._ledger = ledger
        self._observer = observer
        self._wake = wake
        self._alarm = alarm
        self._settled = settled
        self._batch = 0
        self._full = True
        self._must_join = True
        self._policy_due = False
        self._leaving = False
        self._failing = True
        self._lapse_seen = True
        self._sent_seen = 0
        self._acked = 0
        # Permits held over for dead sessions, with the end of each by our clock.
        self._lapsing: list[tuple[str, float]] = []

    def kick(self) -> None:
        """There is something to say."""
        self._wake()

    def refresh(self) -> None:
        """Compare all with the server, soon."""
        self._full = True
        self._wake()

    def take_push(self, push: Push) -> None:
        """Grants that others' releases made for us. A hint only: what is lost comes by `full`."""
        identity = self.lease.identity
        self.traffic.pushes += 1
        if self._must_join or (push.epoch, push.gen) != (identity.epoch, identity.gen):
            return
        if self.check_lapse():
            return
        if push.sent - len(push.grants) > self._sent_seen:
            self.refresh()
        self._sent_seen = max(self._sent_seen, push.sent)
        at = self.lease.now_ms()
        for ticket, seq in push.grants:
            self._ledger.grant(ticket, push.epoch, seq, at)
        if self._sent_seen - self._acked >= ACK_EARLY or self._ledger.unsaid():
            self.kick()

    def check_lapse(self) -> bool:
        """True if the lease has lapsed; acts on it the first time. Cheap: call it anywhere."""
        if not self.lease.lapsed():
            return False
        if not self._lapse_seen:
            self._lapse_seen = True
            self._must_join = True
            self._ledger.recycling = False
            if not self._failing or self.policy.on_lost == "cancel":
                self._fence("paused" if not self._failing else "Valkey is away")
            self.refresh()
        return True

    def set_policy(self, policy: PoolPolicy) -> None:
        """Join again with a newer policy; the session keeps what it holds."""
        self.policy = policy
        self._policy_due = True
        self.refresh()

    def paused(self) -> None:
        """The heartbeat saw that this process stood still for longer than its lease."""
        if not self._lapse_seen:
            self._failing = False
        self.check_lapse()

    def admit_locally(self) -> None:
        """Use our share when Valkey is away for longer than the lease and the policy says so."""
        if self.policy.when_away == "local" and self._failing and self.lease.over():
            shares = [(limit, self.share(limit)) for limit in self.policy.limits]
            self._ledger.admit_locally(shares, self.lease.identity.epoch, self.lease.now_ms())

    def share(self, limit: str) -> int:
        return share_of(self.policy.limits.get(limit, 0), self.sessions)

    @property
    def away(self) -> bool:
        return self.state == "away"

    def leave(self) -> None:
        """End the session with the next request."""
        self._leaving = True
        self.refresh()

    # -- what there is to say

    def prepare(self, run: str, uptime_ms: int) -> tuple[Batch, SyncRequest]:
        """The next request, for a server that says this of itself. Answer it by `answered`,
        `unanswered` or `failed`."""
        joining = self._must_join or self._policy_due
        batch = self._ledger.take_join() if joining else self._ledger.take()
        self.traffic.syncs += 1
        return batch, self._request(batch, run, uptime_ms)

    def answered(
        self, batch: Batch, request: SyncRequest, reply: SyncReply, sent_ms: float
    ) -> bool:
        """The server's answer to a request that was sent at `sent_ms`. True if we have left."""
        if reply.status == "ok":
            self._ledger.confirm(batch)
            self._accepted(batch, request, reply, sent_ms)
        else:
            self._ledger.restore(batch)
            self._rejected(reply)
        return request.leave and reply.status != "stale"

    def unanswered(self, batch: Batch) -> None:
        """Nobody knows whether the request arrived."""
        self._ledger.restore(batch)
        self._full = True

    def something_to_say(self) -> bool:
        """True if a request is due."""
        return (
            self._full
            or self._must_join
            or self._policy_due
            or self._leaving
            or self._ledger.unsaid() > 0
            or self._sent_seen - self._acked >= ACK_EARLY
        )

    def _request(self, batch: Batch, run: str, uptime_ms: int) -> SyncRequest:
        at = self.lease.now_ms()
        self._batch += 1
        request = SyncRequest(
            sid=self.sid,
            gen=self.lease.identity.gen,
            epoch=self.lease.identity.epoch,
            run=run,
            uptime_ms=uptime_ms,
            lease_ms=self.lease.lease_ms,
            revision=self.policy.revision,
            batch=self._batch,
            ack=self._sent_seen,
            full=self._full,
            leave=self._leaving,
            join=self._join(batch, at) if batch.joining else None,
            transfers=[
                (t.source, t.heir.ticket, t.heir.limit, t.heir.seq, t.heir.hard_left_ms(at))
                for t in batch.transfers
            ],
            releases=[
                (r.ticket, r.limit, r.outcome, -1 if r.tokens is None else r.tokens)
                for r in batch.releases
            ],
            cancels=batch.cancels,
            enqueues=[(w.ticket, w.limit, _left_ms(w, at), w.hard_ms) for w in batch.enqueues],
        )
        self._full = False
        return request

    def _join(self, batch: Batch, at: float) -> Join:
        held = [(h.ticket, h.limit, h.seq, h.hard_left_ms(at)) for h in batch.held]
        lapsing = [(member, int(end - at)) for member, end in self._lapsing if end - at >= 1]
        return Join(self.policy, held, lapsing)

    # -- what an answer means

    def _accepted(
        self, batch: Batch, request: SyncRequest, reply: SyncReply, sent_ms: float
    ) -> None:
        self.lease.renewed(sent_ms, reply.lease_ms)
        self._acked = max(self._acked, request.ack)
        self.sessions = reply.sessions
        if batch.joining:
            self._joined(reply)
        if self.lease.lapsed():
            # The answer is as old as the lease: we stood still while it came.
            self._lapse_seen = False
            self._failing = False
            self.check_lapse()
            return
        self._must_join = False
        self._failing = False
        self._lapse_seen = False
        # A policy that came while a request was under way is still to be said.
        if request.join is not None and request.join.policy == self.policy:
            self._policy_due = False
        self._adopt(reply)
        self._set_state("recovering" if reply.recovering_ms > 0 else "up")
        at = self.lease.now_ms()
        for ticket, seq in reply.grants:
            self._ledger.grant(ticket, reply.epoch, seq, at)
        if reply.held is not None:
            self._sent_seen = max(self._sent_seen, reply.sent)
            self._ledger.reconcile(reply.held, reply.epoch, at)
            self._lapsing = [(member, at + left_ms) for member, left_ms in reply.lapsing or ()]
        self._arm(reply)
        self._settled()
        if reply.more or self._ledger.unsaid():
            self.kick()

    def _joined(self, reply: SyncReply) -> None:
        old = self.lease.identity
        self.lease.identity = Identity(reply.epoch, reply.gen)
        self._sent_seen = self._acked = 0
        self._full = True
        self._wake()
        self.traffic.joins += 1
        if reply.epoch != old.epoch:
            self._observer.recovered(reply.epoch)
        if reply.conflict:
            logger.warning(
                "limiter: another policy with revision %d is in force",
                reply.revision,
            )

    def _rejected(self, reply: SyncReply) -> None:
        """The server does not know us. Whose fault it was decides what becomes of what runs."""
        self.check_lapse()
        if reply.status == "layout":
            self.die(ConfigError("layout", "other", "a newer Tidegate uses this pool"))
            return
        if reply.status == "gone" and not self._failing:
            self._fence("the session was gone")
        self._must_join = True
        self.refresh()

    def _adopt(self, reply: SyncReply) -> None:
        """The pool's policy is the newest that any process brought."""
        if reply.policy is None or reply.policy == self.policy.pack():
            return
        newest = PoolPolicy.unpack(reply.policy)
        if newest.revision < self.policy.revision:
            return  # ours is on its way
        self.policy = newest
        self._policy_due = False
        logger.info("limiter: policy revision %d is in force", self.policy.revision)
        for waiter in list(self._ledger.waiting.values()):
            if self.policy.limits.get(waiter.limit, 0) == 0:
                error = DemandImpossible(
                    f"{waiter.limit} lets nobody in any more", limit=waiter.limit
                )
                self._ledger.refuse(waiter, error, self.lease.now_ms())

    def failed(self, reason: str) -> None:
        """A call did not succeed: Valkey is away."""
        self.traffic.failures += 1
        self.last_error = reason
        if not self._failing:
            # Before anything failed: have we been asleep?
            self.check_lapse()
            self._failing = True
        if not self._lapse_seen:
            self._ledger.recycling = True
            self._ledger.recycle_unsent(self.lease.now_ms())
        self._set_state("away", reason)

    def _fence(self, reason: str) -> None:
        count = self._ledger.fence()
        if count:
            logger.warning("limiter: %s; %d running calls cancelled", reason, count)
        self._observer.fenced(count)

    def die(self, error: ConfigError) -> None:
        """No retry mends this."""
        self.fatal = error
        logger.error("limiter: stopped: %s", error)
        self._settled()

    def _set_state(self, new: State, why: str = "") -> None:
        old, self.state = self.state, new
        if new != "away":
            self._ledger.recycling = new == "recovering"
        if old == new:
            return
        level = logging.WARNING if new == "away" else logging.INFO
        logger.log(level, "limiter: %s, was %s%s", new, old, f" ({why})" if why else "")
        self._observer.state_changed(old, new)

    def _arm(self, reply: SyncReply) -> None:
        """Come back when a lease, a hold or the quiet time after a loss runs out."""
        if reply.recovering_ms > 0:
            self._alarm("recovered", reply.recovering_ms)
        if 0 < reply.next_event_ms < reply.lease_ms and self._ledger.waiting:
            self._alarm("next_event", reply.next_event_ms)


def _left_ms(waiter: Waiter, at: float) -> int:
    """Time to the deadline, at least 1; 0 means no deadline."""
    if waiter.deadline_ms == float("inf"):
        return 0
    return max(1, int(waiter.deadline_ms - at) + 1)
