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
from collections.abc import Callable, Sequence
from secrets import token_hex

from tidegate.errors import ConfigError
from tidegate.limiter.answers import Answers
from tidegate.limiter.compose import compose
from tidegate.limiter.entries import Batch, Traffic
from tidegate.limiter.lease import Identity, Lease
from tidegate.limiter.ledger import Ledger
from tidegate.limiter.limits import PoolPolicy
from tidegate.limiter.local import LocalShare
from tidegate.limiter.observer import Observer, State
from tidegate.limiter.remembered import Remembered
from tidegate.limiter.wire import Join, Push, SyncReply, SyncRequest, Whole

logger = logging.getLogger("tidegate.limiter")

# How many grants may come by push before they are acknowledged without anything else to say:
# half of the server's window (`ACK_WINDOW` in pump.lua).
ACK_EARLY = 4
# How many flows one request asks to be hinted at.
MAX_WANTS = 16
# At how many flows one request has the server look; one that compares besides, and asks after.
MAX_LOOKS, LOOKS_BESIDE, MAX_ASKS = 20, 10, 200


class Session:
    """See the module. `wake` is called when there is something to say, `alarm(name, in_ms)` when
    there will be. `fatal` is set by a fault that no retry mends; `joined` is called at every
    confirmed answer. `name` is the process, for people."""

    def __init__(
        self,
        policy: PoolPolicy,
        ledger: Ledger,
        observer: Observer,
        lease: Lease,
        *,
        name: str = "",
        wake: Callable[[], None],
        alarm: Callable[[str, float], None],
        settled: Callable[[], None],
    ) -> None:
        self.sid = token_hex(8)
        self.name = name
        self.policy = policy
        self.policy_by = "deployment"
        self.lease = lease
        self.state: State = "away"
        self.fatal: ConfigError | None = None
        self.sessions = 0
        self.last_error = ""  # while there has been none
        self.traffic = Traffic()
        self.remembered = Remembered()
        self._ledger = ledger
        self._observer = observer
        self._wake = wake
        self._alarm = alarm
        self._settled = settled
        self._batch = 0
        self._full = True
        self._tend = False
        self._must_join = True
        self._policy_due = False
        self._leaving = False
        self._failing = True
        self._lapse_seen = True
        self._sent_seen = self._acked = 0
        self._local = LocalShare()
        self._answers = Answers(ledger, observer)

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
        self.traffic.pushes += len(push.grants) > 0
        if self._must_join or (push.epoch, push.gen) != (identity.epoch, identity.gen):
            return
        if self.check_lapse():
            return
        if not push.grants or push.sent - len(push.grants) > self._sent_seen:
            self.refresh()
        self._sent_seen = max(self._sent_seen, push.sent)
        at = self.lease.now_ms()
        admitted_ms = self.remembered.here(push.at_ms)
        for ticket, seq in push.grants:
            self._ledger.grant(ticket, push.epoch, seq, at, admitted_ms)
        if self._sent_seen - self._acked >= ACK_EARLY or self._ledger.outbox.urgent:
            self.kick()

    def check_lapse(self) -> bool:
        """True if the lease has lapsed; acts on it the first time. Cheap: call it anywhere."""
        if not self.lease.lapsed():
            return False
        if not self._lapse_seen:
            self._lapse_seen = True
            self._must_join = True
            self._ledger.recycling = False
            self._forget_hints()
            if not self._failing or self.policy.on_lost == "cancel":
                self._fence("paused" if not self._failing else "Valkey is away")
            self.refresh()
        return True

    def set_policy(self, policy: PoolPolicy, by: str) -> None:
        """Join again with a newer policy; the session keeps what it holds."""
        self.policy, self.policy_by = policy, by
        self._policy_due = True
        self._forget_hints()
        self._answers.refuse_impossible(policy, self.lease.now_ms())
        self.refresh()

    def paused(self) -> None:
        """The heartbeat saw that this process stood still for longer than its lease."""
        if not self._lapse_seen:
            self._failing = False
        self.check_lapse()

    def stop_handing_on(self) -> None:
        """A limit was paused here: the next permits are the server's to give."""
        self._forget_hints()
        self._full = True

    def _forget_hints(self) -> None:
        self._ledger.note_idle(False)
        self._ledger.drop_hints()

    def admit_locally(self) -> None:
        """Use our share when Valkey is away for longer than the lease and the policy says so."""
        if self.policy.when_away == "local" and self._failing and self.lease.all_lapsed():
            at = self.lease.now_ms()
            self._local.set(self.policy, self.sessions, self._ledger.held_of)
            self._ledger.admit_locally(
                lambda waiter: self._local.allows(waiter, at), self.lease.identity.epoch, at
            )

    def has_share(self, limits: Sequence[str]) -> bool:
        """Whether this process may use any of these limits alone, while Valkey is away."""
        return 0 < self.sessions <= min(self.policy.bound_in_force(name) for name in limits)

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
        at = float("inf") if self._leaving else self.lease.now_ms()
        batch = self._ledger.take_join() if joining else self._ledger.take(at)
        self.traffic.syncs += 1
        return batch, self._request(batch, run, uptime_ms)

    def answered(
        self, batch: Batch, request: SyncRequest, reply: SyncReply, sent_ms: float
    ) -> bool:
        """The server's answer to a request that was sent at `sent_ms`. True if we have left."""
        if reply.status == "ok":
            self._ledger.outbox.confirm(batch)
            self._ledger.stamp(batch.enqueues, reply.stamps)
            self._accepted(batch, request, reply, sent_ms)
        else:
            self._ledger.restore(batch)
            self._rejected(reply)
        return request.leave and reply.status != "stale"

    def unanswered(self, batch: Batch) -> None:
        """Nobody knows whether the request arrived."""
        self._ledger.restore(batch)
        self._full = True

    def something_urgent(self) -> bool:
        """True if a request must not wait for others to come along."""
        return (
            self._ledger.outbox.urgent
            or self._full
            or self._tend
            or self._must_join
            or self._policy_due
            or self._leaving
            or len(self._ledger.rounds.looks) > 0
            or self._sent_seen - self._acked >= ACK_EARLY
        )

    def something_to_say(self) -> bool:
        """True if a request is due."""
        return self.something_urgent() or len(self._ledger.outbox) > 0

    @staticmethod
    def is_ordinary(request: SyncRequest) -> bool:
        """True for what the quicker script can do."""
        return not (request.full or request.leave or request.join or request.looks)

    def _request(self, batch: Batch, run: str, uptime_ms: int) -> SyncRequest:
        at = self.lease.now_ms()
        self._batch += 1
        full = self._full or self._tend or batch.joining
        rounds = self._ledger.rounds_of(begin=self._full or batch.joining)
        looking = rounds.flows_to_look_at(LOOKS_BESIDE if full else MAX_LOOKS)
        wanting, pauses = self._ledger.flows_to_hint(MAX_WANTS), bool(self.remembered.pauses)
        fields = compose(batch, wanting, looking, at, pauses=pauses)
        held, quotas = fields.pop("held"), fields.pop("quotas")
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
            roster=self.remembered.roster_version,
            full=full,
            leave=self._leaving,
            resets=self.remembered.resets(quotas, at) if quotas else {},
            told=self.remembered.told if full else 0,
            pages=self.remembered.places(begin=self._full) if full else {},
            asks=rounds.tickets_to_ask_after(MAX_ASKS) if full else [],
            join=self._join(held, at) if batch.joining else None,
            **fields,
        )
        self._full = self._tend = False
        return request

    def _join(self, held: list[tuple[int, int, int, int, int]], at: float) -> Join:
        policy, lease_ms = (self.policy, self.policy_by, self.name), self.lease.lease_ms
        return self.remembered.join(*policy, held, self._ledger.spent_since, at, lease_ms)

    # -- what an answer means

    def _accepted(
        self, batch: Batch, request: SyncRequest, reply: SyncReply, sent_ms: float
    ) -> None:
        if not self.is_ordinary(request):
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
        self._set_state("recovering" if reply.recovering_ms > 0 else "up")
        at = self.lease.now_ms()
        self._answers.take(batch, request, reply, self.policy, sent_ms, at)
        if reply.whole is not None:
            self._compare(reply, reply.whole, sent_ms, at)
        self._ledger.note_idle(not (reply.parked or reply.timed_ms or reply.recovering_ms > 0))
        self._ledger.take_hints({request.flows[h.flow - 1]: h for h in reply.hints})
        self._arm(reply)
        self._settled()
        self._tend |= reply.more > 0
        if reply.more or self._ledger.outbox.urgent or self._ledger.rounds.looks:
            self.kick()

    def _compare(self, reply: SyncReply, whole: Whole, sent_ms: float, at: float) -> None:
        self._sent_seen = max(self._sent_seen, reply.sent)
        self._adopt(whole)
        recovering = reply.recovering_ms > 0
        news = self.remembered.learn(whole, self.policy, sent_ms, at, recovering=recovering)
        told = [name for name, _ in whole.spent] if "spent" in whole.pages else None
        self._ledger.reconcile(whole.held, reply.epoch, at, self.remembered.here, told)
        if news or self.remembered.pages or self._ledger.rounds.asks:
            # The others wait to hear that we know, or the server has more to tell.
            self._tend = True
            self._wake()
        if 0 < whole.next_event_ms < reply.lease_ms and self._ledger.waiting:
            self._alarm("next_event", whole.next_event_ms)

    def _joined(self, reply: SyncReply) -> None:
        old = self.lease.identity
        self.lease.identity = Identity(reply.epoch, reply.gen)
        self._sent_seen = self._acked = 0
        self._full = True
        self._wake()
        self.traffic.joins += 1
        if reply.epoch != old.epoch:
            self.remembered.forget_version()
            self._observer.recovered(reply.epoch)

    def _rejected(self, reply: SyncReply) -> None:
        """The server does not know us. Whose fault it was decides what becomes of what runs."""
        if reply.status == "tend":
            self._tend = True
            self._wake()
            return
        self.check_lapse()
        if reply.status == "layout":
            self.die(ConfigError("layout", "other", "another version of Tidegate uses this pool"))
            return
        if reply.status == "gone" and not self._failing:
            self._fence("the session was gone")
        if reply.status == "epoch" and not self._lapse_seen:
            # Only what we assert will count: what was given back is free, whoever heard of it.
            self._ledger.start_recycling()
            self._ledger.recycle_forgotten(self.lease.now_ms())
        self._must_join = True
        self._forget_hints()
        self.refresh()

    def _adopt(self, whole: Whole) -> None:
        """The pool's policy is the newest that any process brought."""
        if whole.policy is None:
            return
        newest = PoolPolicy.unpack(whole.policy)
        # Another version of us packs the same policy with more fields, or fewer.
        if newest.revision < self.policy.revision or newest.pack() == self.policy.pack():
            return
        if whole.conflict:
            logger.warning("limiter: another policy of revision %d is in force", newest.revision)
        self.policy = newest
        self._policy_due = False
        self._forget_hints()
        logger.info("limiter: policy revision %d is in force", self.policy.revision)
        self._answers.refuse_impossible(self.policy, self.lease.now_ms())

    def failed(self, reason: str) -> None:
        """A call did not succeed: Valkey is away."""
        self.traffic.failures += 1
        self.last_error = reason
        self._forget_hints()
        if not self._failing:
            # Before anything failed: have we been asleep?
            self.check_lapse()
            self._failing = True
        if not self._lapse_seen:
            self._ledger.start_recycling()
            self._ledger.recycle_unsent(self.lease.now_ms())
        self._set_state("away", reason)

    def _fence(self, reason: str) -> None:
        if count := self._ledger.fence():
            logger.warning("limiter: %s; %d running calls cancelled", reason, count)
        self._observer.fenced(count)

    def die(self, error: ConfigError) -> None:
        """No retry mends this."""
        self.fatal = error
        logger.error("limiter: stopped: %s", error)
        self._settled()

    def _set_state(self, new: State, why: str = "") -> None:
        old, self.state = self.state, new
        if new == "recovering":
            self._ledger.start_recycling()
        elif new == "up":
            self._ledger.recycling = False
        if old == new:
            return
        level = logging.WARNING if new == "away" else logging.INFO
        was = f", was {old}" if self.last_error else ""
        logger.log(level, "limiter: %s%s%s", new, was, f" ({why})" if why else "")
        self._observer.state_changed(old, new)

    def _arm(self, reply: SyncReply) -> None:
        """Come back when the quiet time after a loss ends, or a limit that only time frees."""
        if reply.recovering_ms > 0:
            self._alarm("recovered", reply.recovering_ms)
        if reply.timed_ms > 0 and self._ledger.waiting:
            self._alarm("timed", reply.timed_ms)
