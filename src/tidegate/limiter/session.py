"""Session of a process in its pool: its states, lease, recovery and local share. Does no I/O.

    away ──joined──> recovering ──one lease──> up
     ^                   │                      │
     └──── no answer ────┴──────────────────────┘

Invariants: each request has a higher batch number, so one that was overtaken has no effect; no
grant is accepted after the lease has lapsed; under a limit that is known to be paused, no permit is
passed on and none is taken from a local share; the lease counts from before the request was sent,
by a clock that includes suspended time; a lapse without a failed call means that this process was
suspended, and cancels what runs here; while Valkey is unavailable the local shares of all known
sessions never exceed the limits.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from secrets import token_hex
from typing import Generic, Literal, Protocol, TypeVar

from tidegate.errors import (
    AdmissionError,
    ConfigError,
    DeadlineExceeded,
    DemandImpossible,
    QueueFull,
)
from tidegate.limiter.flow import Flow, MessageBatch, Waiter
from tidegate.limiter.messages import (
    Barred,
    Join,
    Outlook,
    Push,
    SyncReply,
    SyncRequest,
    Whole,
    too_early,
)
from tidegate.limiter.policy import (
    Limit,
    PoolPolicy,
    Quota,
    Rate,
    next_midnight_ms,
)
from tidegate.limiter.queue import (
    LocalQueue,
    LocalShare,
    PoolUse,
    SpentHere,
    Traffic,
    compose,
)

State = Literal["up", "away", "recovering"]


class Observer:
    """Callbacks on the event loop, to override. They must not block; errors are logged."""

    def state_changed(self, old: State, new: State) -> None:
        """Valkey became unavailable or available, or the quiet time after a loss began or ended."""

    def fenced(self, held: int) -> None:
        """The session is gone: `held` running calls were cancelled."""

    def recovered(self, epoch: int) -> None:
        """This process joined a new epoch of the pool and reported what it holds."""

    def admitted(self, limit: str, waited_ms: float) -> None:
        """A waiter got its permit."""

    def refused(self, limit: str, code: str) -> None:
        """A waiter was refused; `code` is that of the error."""

    def synced(self, took_ms: float, entries: int) -> None:
        """One call of the script returned."""


# A new session is admitted after half a lease at the latest, even if not all others know of it.
VOUCH_SHARE = 0.4
# Comparisons from which the server's clock offset is taken: about one and a third leases.
OFFSETS_KEPT = 4


_DAY_MS = 86_400_000
T = TypeVar("T")


class _Reading(Generic[T]):
    """A list that may arrive in several pages.

    known: the last complete list, plus the pages read since. ended: whether the current comparison
    has read it to the end."""

    def __init__(self) -> None:
        self.known: dict[str, T] = {}
        self.ended = False
        self._coming: dict[str, T] = {}

    def take(self, page: dict[str, T], *, has_more: bool) -> bool:
        """Take a page; return True if the next page is to be read.

        While another list continues, the server sends this one from its beginning again. It is then
        not read again: two lists that restart each other would never end."""
        if has_more:
            self.known |= page
        if has_more and self.ended:
            return False
        self._coming |= page
        if not has_more:
            self.known, self._coming, self.ended = self._coming, {}, True
        return has_more


class Remembered:
    """What a process knows of the pool, to report it after a loss; ends by the lease's clock."""

    def __init__(self) -> None:
        # Permits held over for dead sessions: the end of each, and its charges.
        self._lapsing: _Reading[tuple[float, str]] = _Reading()
        # limit -> amount spent as last seen, and when that expires
        self._spent: dict[str, tuple[int, float]] = {}
        # limit -> end, ramp_ms (0 for a gate), reason
        self._paused: _Reading[tuple[float, int, str]] = _Reading()
        self.told = 0  # number of the last change of spent amounts that is known here
        # The last sequence number that known spent amounts include: of all, and of some limits.
        self._seq, self._seq_of = 0, dict[str, int]()
        self.pages: dict[str, tuple[str, int]] = {}  # where unfinished lists continue
        self._midnights: dict[str, int] = {}
        self._in_force: PoolPolicy | None = None  # as of the last comparison
        # Called when there are pauses.
        self.watchers: set[Callable[[], None]] = set()
        # The pool's sessions, the version of that list, and when it was confirmed.
        self.roster_version = 0
        self._roster: set[str] = set()
        self._confirmed_ms = float("-inf")
        # Upper bounds on how far the server's clock is ahead of the lease's, one per comparison;
        # each is too high by the time that the request took to arrive.
        self._offsets_ms: deque[float] = deque(maxlen=OFFSETS_KEPT)

    @property
    def pauses(self) -> dict[str, tuple[float, int, str]]:
        return self._paused.known

    def learn(
        self, whole: Whole, policy: PoolPolicy, sent_ms: float, at_ms: float, *, recovering: bool
    ) -> bool:
        """Take the server's answer to a comparison sent at `sent_ms`.

        Returns True if the server does not know yet that this process has the current list of
        sessions."""
        self._offsets_ms.append(whole.now_ms - sent_ms)
        self.told, self.pages = whole.told, dict(whole.pages)
        self._in_force = policy
        lapsing = {member: (at_ms + left, charges) for member, left, charges in whole.lapsing}
        if not self._lapsing.take(lapsing, has_more="lapsing" in whole.pages):
            self.pages.pop("lapsing", None)
        pauses = {name: (at_ms + left, ramp_ms, why) for name, left, ramp_ms, why in whole.pauses}
        if not self._paused.take(pauses, has_more="pauses" in whole.pages):
            self.pages.pop("pauses", None)
        if not self.pages:
            self._begin()
        if "spent" not in whole.pages:
            self._seq, self._seq_of = whole.seq, {}
        for name, amount in whole.spent:
            self._seq_of[name] = whole.seq
            if amount:
                counts_for_ms = self._counts_for(policy.limit(name), whole.now_ms)
                self._spent[name] = amount, at_ms + counts_for_ms
            else:
                self._spent.pop(name, None)
        self._notify()
        version, sids = whole.roster
        news = version != self.roster_version
        if sids is not None:
            # While the pool recovers, earlier sessions are still to join: keep them.
            self._roster = self._roster | set(sids) if recovering else set(sids)
        self.roster_version = version
        self._confirmed_ms = at_ms
        return news

    def _counts_for(self, limit: Limit | None, server_ms: float) -> float:
        """Return how long, in ms, an amount spent now counts at most."""
        if isinstance(limit, Rate):
            return (limit.window_ms + limit.slack + 1) * (1 + 1 / limit.buckets) + 1
        if isinstance(limit, Quota):
            return self._midnight_ms(limit.zone, server_ms) - server_ms
        return _DAY_MS

    def _midnight_ms(self, zone: str, server_ms: float) -> int:
        known_ms = self._midnights.get(zone, 0)
        if not server_ms < known_ms < server_ms + 1.1 * _DAY_MS:
            known_ms = self._midnights[zone] = next_midnight_ms(zone, server_ms)
        return known_ms

    def counts_for(self, limit: Rate | Quota, at_ms: float) -> float:
        """Return how long, in ms, an admission by the local share counts."""
        if isinstance(limit, Rate):
            return limit.window_ms + limit.slack
        return self._counts_for(limit, self._server_ms(at_ms))

    def spent_of(
        self, name: str, limit: Rate | Quota, here: SpentHere, at_ms: float, silent_ms: float
    ) -> tuple[int, int]:
        """Return what of a limit counts, as last seen, and what was admitted `here` since."""
        amount, until_ms = self._spent.get(name, (0, 0.0))
        since = 0
        if isinstance(limit, Quota) or silent_ms < limit.window_ms + limit.slack:
            since = here.amount(name)
        return amount if until_ms > at_ms else 0, since

    def forget_version(self) -> None:
        """Forget the versions and the clock offset of an earlier epoch."""
        self.roster_version = self.told = self._seq = 0
        self._seq_of = {}
        self.pages = {}
        self._begin()
        self._offsets_ms.clear()

    def _begin(self) -> None:
        self._lapsing.ended = self._paused.ended = False

    def places(self, *, begin: bool) -> dict[str, tuple[str, int]]:
        """Return where the next request continues reading.

        `begin`: complete lists may have changed and are read again."""
        if begin:
            self._begin()
        return dict(self.pages)

    @property
    def _ahead_ms(self) -> float | None:
        return min(self._offsets_ms, default=None)

    def roster(self, at_ms: float, lease_ms: int) -> list[str]:
        """Return the known sessions; none if the list may be too old to vouch for."""
        if at_ms - self._confirmed_ms > lease_ms * VOUCH_SHARE:
            return []
        return sorted(self._roster)

    def here(self, server_ms: float) -> float:
        """Return the earliest time on our clock of a moment of the server's; -inf if unknown."""
        ahead_ms = self._ahead_ms
        return float("-inf") if ahead_ms is None else server_ms - ahead_ms

    def lapsing(self, at_ms: float) -> list[tuple[str, int, str]]:
        """Return (member, left_ms, charges) of the permits held over."""
        found = self._lapsing.known.items()
        return [
            (member, int(end - at_ms), charges)
            for member, (end, charges) in found
            if end - at_ms >= 1
        ]

    def spent(
        self, here: SpentHere, epoch: int, at_ms: float
    ) -> list[tuple[str, int, int, list[int]]]:
        """Return (limit, amount last seen, its last sequence, admitted `here` since) of rates."""
        self._spent = {n: entry for n, entry in self._spent.items() if entry[1] > at_ms}
        names, seen, seqs = sorted({*self._spent, *here}), self._spent, self._seq_of
        return [
            (n, seen.get(n, (0, 0))[0], seqs.get(n, self._seq), here.since(n, epoch)) for n in names
        ]

    def pause(self, limit: str, end_ms: float, ramp_ms: int, reason: str) -> None:
        self.pauses[limit] = (end_ms, ramp_ms, reason)
        self._notify()

    def opened(self, limit: str, at_ms: float, ramp_ms: int) -> None:
        """Note that a gate was opened."""
        _, ramp, reason = self.pauses.get(limit, (0.0, 1, ""))
        if ramp == 0:
            self.pauses[limit] = (at_ms, ramp_ms, reason)

    def _notify(self) -> None:
        if self.pauses:
            for listener in tuple(self.watchers):
                listener()

    def paused(self, at_ms: float) -> list[tuple[str, int, int, str]]:
        """Return (limit, left_ms, ramp_ms, reason) of the pauses that continue."""
        return [
            (name, int(end - at_ms), ramp_ms, reason)
            for name, (end, ramp_ms, reason) in sorted(self.pauses.items())
            if ramp_ms == 0 or end + ramp_ms - at_ms >= 1
        ]

    def paused_of(self, limits: Sequence[str], at_ms: float) -> tuple[str, ...]:
        """Return those of these limits that are paused or still in their ramp."""
        paused = ((name, self.pauses[name]) for name in limits if name in self.pauses)
        return tuple(
            name for name, (end, ramp_ms, _) in paused if ramp_ms == 0 or end + ramp_ms > at_ms
        )

    def gate(self, limit: str, at_ms: float) -> tuple[int, str] | None:
        """Return how long a closed gate admits no probe, and its reason; None if it is open."""
        end, ramp_ms, reason = self.pauses.get(limit, (0.0, 1, ""))
        return None if ramp_ms else (max(0, int(end - at_ms)), reason)

    def paused_ms(self, limits: Sequence[str], at_ms: float) -> int:
        """Return for how long one of these limits is still paused; 0 if none is."""
        if not self.pauses:
            return 0
        left = [int(self.pauses[one][0] - at_ms) for one in limits if one in self.pauses]
        return max(0, *left, 0)

    def resets(self, quotas: Mapping[str, str], at_ms: float) -> dict[str, int]:
        """Return when each day quota (limit -> zone) resets, by the server's clock."""
        now_ms = self._server_ms(at_ms)
        return {name: self._midnight_ms(zone, now_ms) for name, zone in quotas.items()}

    def _server_ms(self, at_ms: float) -> float:
        ahead_ms = self._ahead_ms
        return time.time() * 1000 if ahead_ms is None else at_ms + ahead_ms

    def base_of(self, policy: PoolPolicy) -> PoolPolicy | None:
        """Return the policy in force before `policy`, if `policy` is newer, else None."""
        before = self._in_force
        return before if before is not None and before.revision < policy.revision else None


FENCE_SHARE = 0.8
# FENCE_SHARE plus the longest time between two renewals, 1.1 thirds of a lease, and a margin.
ALL_LAPSED_SHARE = 1.25

# CLOCK_BOOTTIME includes suspended time; other platforms use the best that they have.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now_ms() -> float:
    """Return the time in ms of a clock for durations that includes suspended time."""
    return time.clock_gettime(_CLOCK) * 1000


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity in the pool: an epoch of the pool and this session's generation in it."""

    epoch: int = 0
    gen: int = 0


class Lease:
    """The lease of this process's session."""

    __slots__ = ("_confirmed_ms", "identity", "lease_ms", "now_ms")

    def __init__(self, lease_ms: int, clock: Callable[[], float] = now_ms) -> None:
        self.now_ms = clock
        self.lease_ms = lease_ms
        self.identity = Identity()
        self._confirmed_ms = float("-inf")

    def renewed(self, sent_ms: float, lease_ms: int) -> None:
        """Extend the lease: the server confirmed a request that was sent at `sent_ms`."""
        self.lease_ms = lease_ms
        self._confirmed_ms = max(self._confirmed_ms, sent_ms)

    def silent_ms(self) -> float:
        """Return how long ago the last confirmed request was sent; infinite before the first."""
        return self.now_ms() - self._confirmed_ms

    def lapsed(self) -> bool:
        """Return True once this process must no longer rely on its session."""
        return self.silent_ms() > self.lease_ms * FENCE_SHARE

    def all_lapsed(self) -> bool:
        """Return True once the leases of all other sessions cut off with us have lapsed too.

        They may have been confirmed later than ours, by up to the time between two renewals."""
        return self.silent_ms() > self.lease_ms * ALL_LAPSED_SHARE

    def deadline_s(self) -> float:
        """Return the timeout of one call to the server, so that failures show within the lease."""
        return self.lease_ms / 3000


logger = logging.getLogger("tidegate.limiter")

# Pushed grants that are acknowledged without anything else to send: half of pump.lua's ACK_WINDOW.
ACK_EARLY = 4
# Most flows for which one request asks for hints.
MAX_WANTS = 16
# Most flows that the server looks at per request, or beside a comparison; most tickets asked after.
MAX_LOOKS, LOOKS_BESIDE, MAX_ASKS = 20, 10, 200


class Session:
    """The session's state machine: makes requests and interprets replies.

    wake: called when there is something to send. alarm(name, in_ms): called when there will be.
    accepted: whether the last reply was accepted within the lease. fatal: an error that no retry
    fixes. name: the process, for people."""

    def __init__(
        self,
        policy: PoolPolicy,
        queue: LocalQueue,
        observer: Observer,
        lease: Lease,
        *,
        name: str = "",
        wake: Callable[[], None],
        alarm: Callable[[str, float], None],
    ) -> None:
        self.sid = token_hex(8)
        self.name = name
        self.policy = policy
        self.policy_by = "deployment"
        self.lease = lease
        self.observer = observer
        self.state: State = "away"
        self.accepted = False
        self.fatal: ConfigError | None = None
        self.sessions = 0
        self.last_error = ""  # "" before the first error
        self.traffic = Traffic()
        self.remembered = Remembered()
        self._queue = queue
        self._wake = wake
        self._alarm = alarm
        self._batch = 0
        self._full = True
        self._tend = False
        self._must_join = True
        self._joining = False  # a join was sent that is not answered yet
        self.policy_due = False
        self._leaving = False
        self._failing = self._lapse_noted = True
        self._last_sent = self._acked = 0
        self._local = LocalShare()
        queue.is_paused = self._is_paused

    def _is_paused(self, limits: Sequence[str]) -> bool:
        return self.remembered.paused_ms(limits, self.lease.now_ms()) > 0

    def refresh(self) -> None:
        """Have the next request compare everything with the server."""
        self._full = True
        self._wake()

    def take_push(self, push: Push) -> None:
        """Accept pushed grants, made when other sessions released permits. A lost push is found by
        the next comparison."""
        identity = self.lease.identity
        self.traffic.pushes += len(push.grants) > 0
        # A join takes back what was pushed before it, and may have been processed already.
        unsure = self._must_join or self._joining
        if unsure or (push.epoch, push.gen) != (identity.epoch, identity.gen):
            return
        if self.check_lapse():
            return
        if not push.grants or push.sent - len(push.grants) > self._last_sent:
            self.refresh()
        self._last_sent = max(self._last_sent, push.sent)
        at = self.lease.now_ms()
        admitted_ms = self.remembered.here(push.at_ms)
        for ticket, seq in push.grants:
            self._queue.grant(ticket, push.epoch, seq, at, admitted_ms)
        if self._last_sent - self._acked >= ACK_EARLY or self._queue.urgent:
            self._wake()

    def check_lapse(self) -> bool:
        """Return True if the lease has lapsed, and react the first time. Cheap."""
        if not self.lease.lapsed():
            return False
        if not self._lapse_noted:
            self._lapse_noted = True
            self._must_join = True
            self._queue.recycling = False
            self._forget_hints()
            if not self._failing or self.policy.on_lost == "cancel":
                self._fence("paused" if not self._failing else "Valkey is unavailable")
            self.refresh()
        return True

    def set_policy(self, policy: PoolPolicy, by: str) -> None:
        """Join again with a newer policy; the session keeps what it holds."""
        if policy.fair_by != self.policy.fair_by:
            self._queue.forget_uses()
        self.policy, self.policy_by = policy, by
        self.policy_due = True
        self._refuse_impossible()
        self._forget_hints()
        self.refresh()

    def paused(self) -> None:
        """React to the heartbeat's report that this process was suspended for over a lease."""
        if not self._lapse_noted:
            self._failing = False
        self.check_lapse()

    def stop_handing_on(self) -> None:
        """Stop passing on permits because a limit was paused: the server grants the next ones."""
        self._forget_hints()
        self._full = True

    def _forget_hints(self) -> None:
        self._queue.note_idle(False)
        self._queue.forget_hints()

    def admit_locally(self) -> None:
        """Use the local share after a lease without Valkey, if the policy allows it."""
        if self.policy.when_away == "local" and self._failing and self.lease.all_lapsed():
            at, queue, remembered = self.lease.now_ms(), self._queue, self.remembered
            here, silent_ms = queue.spent_since, self.lease.silent_ms()
            use = PoolUse(
                self.sessions,
                queue.amount_held,
                lambda name, limit: remembered.spent_of(name, limit, here, at, silent_ms),
                lambda limit: remembered.counts_for(limit, at),
            )
            queue.admit_locally(
                lambda waiter: self._local.allows(waiter, use, at), self.lease.identity.epoch, at
            )

    def has_share(self, limits: Sequence[str]) -> bool:
        """Return whether this process has a local share of all these limits."""
        return 0 < self.sessions <= min(self.policy.bound_in_force(name) for name in limits)

    def leave(self) -> None:
        """End the session with the next request."""
        self._leaving = True
        self.refresh()

    # -- requests

    def is_request_urgent(self) -> bool:
        """Return True if a request must be sent without waiting for further messages."""
        return (
            self._queue.urgent
            or self._full
            or self._tend
            or self._must_join
            or self.policy_due
            or self._leaving
            or len(self._queue.looks) > 0
            or self._last_sent - self._acked >= ACK_EARLY
        )

    def is_request_due(self) -> bool:
        """Return True if a request is due."""
        return self.is_request_urgent() or self._queue.pending > 0

    def prepare(self, run: str, uptime_ms: int) -> tuple[MessageBatch, SyncRequest]:
        """Return the next request, for a server with this run and uptime.

        Pass the outcome to `answered`, `unanswered` or `failed`."""
        joining = self._must_join or self.policy_due
        self._joining |= joining
        at = self.lease.now_ms()
        queue, remembered, self._batch = self._queue, self.remembered, self._batch + 1
        if self._must_join:
            queue.forget_stamps()
        batch = queue.take_join() if joining else queue.take(inf if self._leaving else at)
        self.traffic.syncs += 1
        full = self._full or self._tend or joining
        if self._full or joining:
            queue.begin_rounds()
        looking = queue.flows_to_inspect(LOOKS_BESIDE if full else MAX_LOOKS)
        wanting, pauses = queue.flows_to_hint(MAX_WANTS), bool(remembered.pauses)
        fields = compose(batch, wanting, looking, at, pauses=pauses)
        held, quotas = fields.pop("held"), fields.pop("quotas")
        join = None
        if joining:
            join = Join(
                self.policy,
                self.policy_by,
                self.name,
                held,
                remembered.lapsing(at),
                remembered.spent(queue.spent_since, self.lease.identity.epoch, at),
                remembered.paused(at),
                remembered.roster(at, self.lease.lease_ms),
                self._local.unreported(at) if self._local.spent else [],
                remembered.base_of(self.policy),
            )
        request = SyncRequest(
            sid=self.sid,
            gen=self.lease.identity.gen,
            epoch=self.lease.identity.epoch,
            run=run,
            uptime_ms=uptime_ms,
            lease_ms=self.lease.lease_ms,
            revision=self.policy.revision,
            batch=self._batch,
            ack=self._last_sent,
            roster=remembered.roster_version,
            full=full,
            leave=self._leaving,
            resets=remembered.resets(quotas, at) if quotas else {},
            told=remembered.told if full else 0,
            pages=remembered.places(begin=self._full) if full else {},
            asks=queue.tickets_to_verify(MAX_ASKS) if full else [],
            join=join,
            uses=batch.uses() if self.policy.fair_by == "cost" else [],
            firsts=batch.firsts() if batch.releases else [],
            stamps=batch.stamps(),
            **fields,
        )
        self._full = self._tend = False
        return batch, request

    @staticmethod
    def is_ordinary(request: SyncRequest) -> bool:
        """Return True for a request that the quicker script can process."""
        return not (request.full or request.leave or request.join or request.looks)

    # -- replies

    def answered(
        self, batch: MessageBatch, request: SyncRequest, reply: SyncReply, sent_ms: float
    ) -> bool:
        """Process a reply to a request sent at `sent_ms`; return True if the session ended."""
        self.accepted = False
        self.observer.synced(self.lease.now_ms() - sent_ms, len(batch))
        if reply.status == "ok":
            self._accepted(batch, request, reply, sent_ms)
        else:
            self._queue.restore(batch)
            self._rejected(reply)
        return request.leave and reply.status != "stale"

    def unanswered(self, batch: MessageBatch) -> None:
        """Restore a batch of which it is unknown whether it arrived."""
        self._queue.restore(batch)
        self._full = True

    def _accepted(
        self, batch: MessageBatch, request: SyncRequest, reply: SyncReply, sent_ms: float
    ) -> None:
        if not self.is_ordinary(request):
            self.lease.renewed(sent_ms, reply.lease_ms)
        self._acked = max(self._acked, request.ack)
        self.sessions = reply.sessions
        if request.join is not None:
            self._joined(request.join, reply)
        queue, at = self._queue, self.lease.now_ms()
        if self.lease.lapsed():
            # The answer arrived after the lease had lapsed: this process was suspended meanwhile.
            queue.confirm(batch, reply.stamps)
            self._lapse_noted = False
            self._failing = False
            self.check_lapse()
            return
        self.accepted = True
        self._must_join = self._joining = False
        self._failing = False
        self._lapse_noted = False
        # A policy that was set while the request was in progress is still to be sent.
        if request.join is not None and request.join.policy == self.policy:
            self.policy_due = False
        recovering = reply.recovering_ms > 0
        self._set_state("recovering" if recovering else "up")
        queue.confirm(batch, reply.stamps)
        for ticket, seq in reply.grants:
            queue.grant(ticket, reply.epoch, seq, at, sent_ms)
        if reply.refused or reply.barred or reply.outlook:
            self._take_refusals(request, reply, sent_ms)
        for waiter in batch.enqueues:
            if waiter.once and waiter.ticket in queue.waiting:
                limit = waiter.flow.held_up_by or waiter.flow.limits[0]
                late = DeadlineExceeded("no permit is free", limit=limit, retry_after_ms=1000)
                self._refuse(waiter, late)
        if reply.whole is not None:
            self._compare(reply, reply.whole, sent_ms, at)
        queue.note_idle(not (reply.parked or reply.timed_ms or recovering))
        queue.take_hints({request.flows[h.flow - 1]: h for h in reply.hints}, sent_ms)
        # Return when the quiet time after a loss ends, or for a limit that only time frees.
        if recovering:
            self._alarm("recovered", reply.recovering_ms)
        if reply.timed_ms > 0 and queue.waiting:
            self._alarm("timed", reply.timed_ms)
        self._tend |= reply.more > 0
        if reply.more or queue.urgent or queue.looks:
            self._wake()

    def _take_refusals(self, request: SyncRequest, reply: SyncReply, sent_ms: float) -> None:
        """Process tickets that the server rejected, and the limits that flows wait for."""
        waiting = self._queue.waiting
        for ticket in reply.refused:
            if (waiter := waiting.get(ticket)) is not None:
                waiter.sent = False  # the server has it in no queue
                flow, most = waiter.flow, self.policy.queue_per_tenant
                limit = flow.held_up_by or flow.limits[0]
                message = f"{flow.tenant} has {most} waiters already"
                self._refuse(waiter, QueueFull(message, limit=limit, retry_after_ms=1000))
        for barred in reply.barred:
            if (waiter := waiting.get(barred.ticket)) is not None:
                waiter.sent = False
                self._refuse_early(waiter, barred)
        for outlook in reply.outlook:
            band, tenant, lane = request.flows[outlook.flow - 1].split("|", 2)
            flow = self._queue.flow(int(band), tenant, tuple(lane.split(" ")))
            self._foresee(flow, outlook, sent_ms)

    def _foresee(self, flow: Flow, outlook: Outlook, sent_ms: float) -> None:
        """Record what a flow waits for, and reject calls that are certain to be late."""
        if not flow.waiting:
            return
        room_ms = outlook.room_ms
        flow.held_up_by, flow.used = outlook.limit, outlook.used
        flow.room_at_ms = self.lease.now_ms() + room_ms if room_ms else 0.0
        flow.is_room_certain = outlook.firm == 1
        if room_ms and outlook.firm:
            for number, waiter in enumerate(list(flow.waiting.values())):
                # For a ticket not yet sent, the server knows better what comes before it.
                is_late = waiter.sent and waiter.deadline_ms <= sent_ms + room_ms
                if is_late and flow.amount_under(outlook.limit, waiter.amounts):
                    estimate = number or outlook.firm - 1
                    barred = Barred(
                        waiter.ticket, outlook.limit, room_ms, outlook.used, 0, estimate
                    )
                    self._refuse_early(waiter, barred)

    def _refuse_early(self, waiter: Waiter, barred: Barred) -> None:
        name = barred.limit
        amount = waiter.flow.amount_under(name, waiter.amounts)
        error = too_early(
            name,
            self.policy.limit(name),
            barred.room_ms,
            barred.used,
            amount,
            ahead=barred.ahead,
            is_estimate=bool(barred.is_estimate),
        )
        self._refuse(waiter, error)

    def _refuse_impossible(self) -> None:
        """Reject waiters that a changed policy can never admit."""
        for waiter in list(self._queue.waiting.values()):
            try:
                waiter.flow.refresh(self.policy)
                if waiter.flow.sized:
                    waiter.flow.check_amounts(waiter.amounts)
            except DemandImpossible as error:
                self._refuse(waiter, error)

    def _refuse(self, waiter: Waiter, error: AdmissionError) -> None:
        self.observer.refused(error.limit, error.code)
        self._queue.refuse(waiter, error, self.lease.now_ms())

    def _compare(self, reply: SyncReply, whole: Whole, sent_ms: float, at: float) -> None:
        queue, remembered = self._queue, self.remembered
        self._last_sent = max(self._last_sent, reply.sent)
        self._adopt(whole)
        recovering = reply.recovering_ms > 0
        news = remembered.learn(whole, self.policy, sent_ms, at, recovering=recovering)
        reported = [name for name, _ in whole.spent] if "spent" in whole.pages else None
        queue.reconcile(whole.held, reply.epoch, at, remembered.here, whole.seq, reported)
        if news or remembered.pages or queue.asks:
            # Others wait for us to confirm the list of sessions, or the server has more to report.
            self._tend = True
            self._wake()
        if 0 < whole.next_event_ms < reply.lease_ms and queue.waiting:
            self._alarm("next_event", whole.next_event_ms)

    def _joined(self, join: Join, reply: SyncReply) -> None:
        old = self.lease.identity
        self.lease.identity = Identity(reply.epoch, reply.gen)
        if join.own:
            self._local.reported(join.own)
        for name, amount, _ in join.own:
            # The server numbers a join as it numbers admissions.
            self._queue.spent_since.add(name, amount, reply.epoch, reply.gen)
        self._last_sent = self._acked = 0
        self.refresh()
        self.traffic.joins += 1
        if reply.epoch != old.epoch:
            self._queue.forget_stamps()
            self.remembered.forget_version()
            self.observer.recovered(reply.epoch)

    def _rejected(self, reply: SyncReply) -> None:
        """Handle a rejected request; the reason decides what happens to running calls."""
        if reply.status == "tend":
            self._tend = True
            self._wake()
            return
        self.check_lapse()
        if reply.status == "layout":
            self.fail(ConfigError("layout", "other", "another version of Tidegate uses this pool"))
            return
        if reply.status == "gone" and not self._failing:
            self._fence("the session was gone")
        if reply.status == "epoch" and not self._lapse_noted:
            # Only what we report again will count, so released permits are free, even if received.
            self._queue.start_recycling()
            self._queue.recycle_forgotten(self.lease.now_ms())
        self._must_join = True
        self._forget_hints()
        self.refresh()

    def _adopt(self, whole: Whole) -> None:
        """Adopt the pool's policy, the newest that any process brought."""
        if whole.policy is None:
            return
        newest = PoolPolicy.unpack(whole.policy)
        # Another version packs the same policy with more or fewer fields.
        if newest.revision < self.policy.revision or newest.pack() == self.policy.pack():
            return
        if whole.conflict:
            logger.warning("limiter: another policy of revision %d is in force", newest.revision)
        if newest.fair_by != self.policy.fair_by:
            self._queue.forget_uses()
        self.policy = newest
        self.policy_due = False
        self._refuse_impossible()
        self._forget_hints()
        self._queue.urgent = True  # so that the pool learns now that this process has it
        logger.info("limiter: policy revision %d is in force", self.policy.revision)

    def unanswered_command(self) -> None:
        """Note that any command on the link got no answer, so that a later lapse is Valkey's."""
        if not self._failing:
            self.check_lapse()  # nothing failed before: this process was suspended
            self._failing = True

    def failed(self, reason: str) -> None:
        """Handle a failed call: Valkey is unavailable."""
        self.traffic.failures += 1
        self.last_error = reason
        self._forget_hints()
        self.unanswered_command()
        if not self._lapse_noted:
            self._queue.start_recycling()
            self._queue.recycle_unsent(self.lease.now_ms())
        self._set_state("away", reason)

    def _fence(self, reason: str) -> None:
        if count := self._queue.fence():
            logger.warning("limiter: %s; %d running calls cancelled", reason, count)
        self.observer.fenced(count)

    def fail(self, error: ConfigError) -> None:
        """Stop because of an error that no retry fixes."""
        self.fatal = error
        logger.error("limiter: stopped: %s", error)

    def _set_state(self, new: State, why: str = "") -> None:
        old, self.state = self.state, new
        if new == "recovering":
            self._queue.start_recycling()
        elif new == "up":
            self._queue.recycling = False
        if old == new:
            return
        level = logging.WARNING if new == "away" else logging.INFO
        was = f", was {old}" if self.last_error else ""
        logger.log(level, "limiter: %s%s%s", new, was, f" ({why})" if why else "")
        self.observer.state_changed(old, new)


class Timer(Protocol):
    """A scheduled callback."""

    def cancel(self) -> None:
        """Cancel the callback."""


class Clock:
    """The machine's clock.

    `server_time` is Lua that defines `T.wall_clock_ms` in place of the server's clock; None in
    production."""

    server_time: str | None = None
    # Not a method, since it is called several times per request.
    now_ms = staticmethod(now_ms)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def call_later(self, seconds: float, call: Callable[..., object], *arguments: object) -> Timer:
        return asyncio.get_running_loop().call_later(seconds, call, *arguments)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """In a thread: wait for an event; return True once it is set, False after `seconds`."""
        return event.wait(seconds)
