"""Session of a process in its pool: its states, lease, recovery and local share. Does no I/O.

    away ──joined──> recovering ──one lease──> up
     ^                   │                      │
     └──── no answer ────┴──────────────────────┘

Invariants: each request has a higher batch number, so an overtaken one does nothing; no grant is
accepted after the lease has lapsed; no permit is passed on, nor one of a local share taken, under a
limit that is known to be paused; the lease is measured from before the request was sent, by a
clock that counts suspended time; a lapse without a failed call means that this process was
suspended, and ends what runs here; while Valkey is unavailable the local shares of all known
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
from typing import Any, Generic, Literal, Protocol, TypeVar

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
from tidegate.limiter.queue import LocalQueue, LocalShare, Traffic

State = Literal["up", "away", "recovering"]


class Observer:
    """Callbacks on the event loop, which must not block: override those that you need. What they
    raise is logged."""

    def state_changed(self, old: State, new: State) -> None:
        """Valkey became unavailable or available, or is quiet for a lease after a loss."""

    def fenced(self, held: int) -> None:
        """Our session is gone: `held` running calls were cancelled."""

    def recovered(self, epoch: int) -> None:
        """We joined a new epoch of the pool and reported what we hold."""

    def admitted(self, limit: str, waited_ms: float) -> None:
        """A waiter got its permit."""

    def refused(self, limit: str, code: str) -> None:
        """A waiter was refused; `code` is that of the error."""

    def synced(self, took_ms: float, entries: int) -> None:
        """One call of the script returned."""


# A new session is admitted after half a lease at the latest, whether all others know of it or not.
VOUCH_SHARE = 0.4
# How many comparisons tell how far ahead the server's clock is: about one and a third leases.
AHEAD_KEPT = 4


_DAY_MS = 86_400_000
T = TypeVar("T")


class _Reading(Generic[T]):
    """A list that may come in several pages: `known` has all that was read to the end, and what is
    being read now. `ended`: this comparison has read it to the end."""

    def __init__(self) -> None:
        self.known: dict[str, T] = {}
        self.ended = False
        self._coming: dict[str, T] = {}

    def take(self, page: dict[str, T], *, goes_on: bool) -> bool:
        """True if the next page is to be read. While another list goes on the server tells this one
        from its beginning again: two lists, each begun again by the other, would never end."""
        if goes_on:
            self.known |= page
        if goes_on and self.ended:
            return False
        self._coming |= page
        if not goes_on:
            self.known, self._coming, self.ended = self._coming, {}, True
        return goes_on


class Remembered:
    """See the module. Ends are by the lease's clock."""

    def __init__(self) -> None:
        # Permits held over for dead sessions, with the end of each, and what it takes of limits.
        self._lapsing: _Reading[tuple[float, str]] = _Reading()
        # limit -> spent as last seen, and when that counts no more
        self._spent: dict[str, tuple[int, float]] = {}
        # limit -> end, ramp_ms (0 for a gate), said
        self._paused: _Reading[tuple[float, int, str]] = _Reading()
        self.told = 0  # the last change of what is spent that we know of
        self.pages: dict[str, tuple[str, int]] = {}  # where the lists go on that are not read yet
        self._midnights: dict[str, int] = {}
        self._in_force: PoolPolicy | None = None  # when all was compared last
        # Called when there is one.
        self.watchers: set[Callable[[], None]] = set()
        # The sessions that are there, and the version of that list; when it was confirmed.
        self.roster_version = 0
        self._roster: set[str] = set()
        self._confirmed_ms = float("-inf")
        # By how much the server's clock is ahead of the lease's, at the most: as each of the last
        # comparisons saw it, too much by the time that the question was under way.
        self._seen_ahead_ms: deque[float] = deque(maxlen=AHEAD_KEPT)

    @property
    def pauses(self) -> dict[str, tuple[float, int, str]]:
        return self._paused.known

    def learn(
        self, whole: Whole, policy: PoolPolicy, sent_ms: float, at_ms: float, *, recovering: bool
    ) -> bool:
        """The server told what we asked for at `sent_ms`. True if it has not heard yet which
        sessions we know now."""
        self._seen_ahead_ms.append(whole.now_ms - sent_ms)
        self.told, self.pages = whole.told, dict(whole.pages)
        self._in_force = policy
        lapsing = {member: (at_ms + left, charges) for member, left, charges in whole.lapsing}
        if not self._lapsing.take(lapsing, goes_on="lapsing" in whole.pages):
            self.pages.pop("lapsing", None)
        pauses = {name: (at_ms + left, ramp_ms, said) for name, left, ramp_ms, said in whole.pauses}
        if not self._paused.take(pauses, goes_on="pauses" in whole.pages):
            self.pages.pop("pauses", None)
        if not self.pages:
            self._begin()
        for name, amount in whole.spent:
            if amount:
                counts_for_ms = self._counts_for(policy.limit(name), whole.now_ms)
                self._spent[name] = amount, at_ms + counts_for_ms
            else:
                self._spent.pop(name, None)
        self._tell()
        version, sids = whole.roster
        news = version != self.roster_version
        if sids is not None:
            # While it recovers, those that were there before are still to come.
            self._roster = self._roster | set(sids) if recovering else set(sids)
        self.roster_version = version
        self._confirmed_ms = at_ms
        return news

    def _counts_for(self, limit: Limit | None, server_ms: float) -> float:
        """How long at most what is spent of a limit counts, in ms."""
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

    def forget_version(self) -> None:
        """Another epoch: its versions are others, and its clock may be."""
        self.roster_version = self.told = 0
        self.pages = {}
        self._begin()
        self._seen_ahead_ms.clear()

    def _begin(self) -> None:
        self._lapsing.ended = self._paused.ended = False

    def places(self, *, begin: bool) -> dict[str, tuple[str, int]]:
        """Where the next request reads on. `begin`: lists that were read to the end may have
        changed, and are read once more."""
        if begin:
            self._begin()
        return dict(self.pages)

    @property
    def _ahead_ms(self) -> float | None:
        return min(self._seen_ahead_ms, default=None)

    def roster(self, at_ms: float, lease_ms: int) -> list[str]:
        """The sessions that were there; nobody if what we know may be too old to vouch for."""
        if at_ms - self._confirmed_ms > lease_ms * VOUCH_SHARE:
            return []
        return sorted(self._roster)

    def here(self, server_ms: float) -> float:
        """A moment of the server's by our clock, at the earliest; minus infinity if not known."""
        ahead_ms = self._ahead_ms
        return float("-inf") if ahead_ms is None else server_ms - ahead_ms

    def lapsing(self, at_ms: float) -> list[tuple[str, int, str]]:
        """(member, left_ms, charges) of the permits held over."""
        found = self._lapsing.known.items()
        return [
            (member, int(end - at_ms), charges)
            for member, (end, charges) in found
            if end - at_ms >= 1
        ]

    def spent(self, since: Mapping[str, int], at_ms: float) -> list[tuple[str, int, int]]:
        """(limit, as last seen, admitted here `since`) of the rates and quotas."""
        self._spent = {n: seen for n, seen in self._spent.items() if seen[1] > at_ms}
        names = sorted({*self._spent, *since})
        return [(name, self._spent.get(name, (0, 0))[0], since.get(name, 0)) for name in names]

    def pause(self, limit: str, end_ms: float, ramp_ms: int, said: str) -> None:
        self.pauses[limit] = (end_ms, ramp_ms, said)
        self._tell()

    def opened(self, limit: str, at_ms: float, ramp_ms: int) -> None:
        """A gate was opened."""
        _, ramp, said = self.pauses.get(limit, (0.0, 1, ""))
        if ramp == 0:
            self.pauses[limit] = (at_ms, ramp_ms, said)

    def _tell(self) -> None:
        if self.pauses:
            for told in tuple(self.watchers):
                told()

    def paused(self, at_ms: float) -> list[tuple[str, int, int, str]]:
        """(limit, left_ms, ramp_ms, said) of the pauses that go on."""
        return [
            (name, int(end - at_ms), ramp_ms, said)
            for name, (end, ramp_ms, said) in sorted(self.pauses.items())
            if ramp_ms == 0 or end + ramp_ms - at_ms >= 1
        ]

    def paused_of(self, limits: Sequence[str], at_ms: float) -> tuple[str, ...]:
        """Those of these limits that are paused, the time included over which calls come back."""
        paused = ((name, self.pauses[name]) for name in limits if name in self.pauses)
        return tuple(
            name for name, (end, ramp_ms, _) in paused if ramp_ms == 0 or end + ramp_ms > at_ms
        )

    def gate(self, limit: str, at_ms: float) -> tuple[int, str] | None:
        """For how long a gate admits no try, and its reason; None where it is open."""
        end, ramp_ms, said = self.pauses.get(limit, (0.0, 1, ""))
        return None if ramp_ms else (max(0, int(end - at_ms)), said)

    def paused_ms(self, limits: Sequence[str], at_ms: float) -> int:
        """For how long still one of these limits is paused; 0 where none is."""
        if not self.pauses:
            return 0
        left = [int(self.pauses[one][0] - at_ms) for one in limits if one in self.pauses]
        return max(0, *left, 0)

    def resets(self, quotas: Mapping[str, str], at_ms: float) -> dict[str, int]:
        """When each of these day quotas, limit -> zone, begins again, by the server's clock."""
        ahead_ms = self._ahead_ms
        now_ms = time.time() * 1000 if ahead_ms is None else at_ms + ahead_ms
        return {name: self._midnight_ms(zone, now_ms) for name, zone in quotas.items()}

    def base_of(self, policy: PoolPolicy) -> PoolPolicy | None:
        """The policy that was in force before, where `policy` is newer."""
        before = self._in_force
        return before if before is not None and before.revision < policy.revision else None


FENCE_SHARE = 0.8
# More than FENCE_SHARE and what may lie between two renewals, 1.1 thirds of a lease.
ALL_LAPSED_SHARE = 1.25

# CLOCK_BOOTTIME goes on while the machine is suspended; elsewhere the platform's best.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now_ms() -> float:
    """Milliseconds of a clock that only measures durations and counts suspended time."""
    return time.clock_gettime(_CLOCK) * 1000


@dataclass(frozen=True, slots=True)
class Identity:
    """Who we are in the pool: an epoch of the pool and our generation in it."""

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
        """The server confirmed a request that was sent at `sent_ms`."""
        self.lease_ms = lease_ms
        self._confirmed_ms = max(self._confirmed_ms, sent_ms)

    def silent_ms(self) -> float:
        """How long ago the last confirmed request was sent; infinite before the first."""
        return self.now_ms() - self._confirmed_ms

    def lapsed(self) -> bool:
        """True once we must no longer count on our session."""
        return self.silent_ms() > self.lease_ms * FENCE_SHARE

    def all_lapsed(self) -> bool:
        """True once the lease of every other session that was cut off with us has lapsed too: they
        may have been confirmed later, by as much as lies between two renewals."""
        return self.silent_ms() > self.lease_ms * ALL_LAPSED_SHARE

    def deadline_s(self) -> float:
        """How long one call to the server may take, so that trouble shows within the lease."""
        return self.lease_ms / 3000


def compose(
    batch: MessageBatch,
    wanting: Sequence[Flow],
    looking: Sequence[Flow],
    at_ms: float,
    *,
    pauses: bool = False,
) -> dict[str, Any]:
    """The fields of a `SyncRequest` that a batch fills; `wanting` are the flows to be hinted at,
    `looking` those to be looked at; `pauses`: some limit is paused.

    `held` is of the join; `quotas` are the zones of the day quotas that the flows need. The
    answer's hints count flows in the order of `flows`, from 1.
    """
    numbers: dict[str, int] = {}
    quotas: dict[str, str] = {}
    firm: set[str] = set()

    def number(flow: Flow | None) -> int:
        if flow is None:
            return 0
        if flow.quotas:
            quotas.update(flow.quotas)
        if flow.firm:
            firm.update(flow.firm)
        return numbers.setdefault(flow.key, len(numbers) + 1)

    return {
        "held": [
            (h.ticket, number(h.flow), h.seq, h.hard_left_ms(at_ms), h.use, h.amounts)
            for h in batch.held
        ],
        "transfers": [
            (
                t.source,
                t.heir.ticket,
                t.heir.seq,
                t.heir.hard_left_ms(at_ms),
                number(t.heir.flow),
                t.member,
                t.outcome,
                t.took_ms,
            )
            for t in batch.transfers
        ],
        "releases": [
            (r.ticket, number(r.flow), r.outcome, r.took_ms, r.actual) for r in batch.releases
        ],
        "settles": batch.settles,
        "cancels": [(ticket, number(flow), member) for ticket, flow, member in batch.cancels],
        "enqueues": [(number(w.flow), w.member) for w in batch.enqueues],
        "wants": [(number(flow), round(flow.cost_ms), flow.usual_use) for flow in wanting],
        "looks": [number(flow) for flow in looking],
        "lefts": batch.lefts(at_ms, pauses=pauses),
        "dues": batch.dues(at_ms),
        "flows": list(numbers),
        "quotas": quotas,
        "firm": sorted(firm),
    }


logger = logging.getLogger("tidegate.limiter")

# How many grants may come by push before they are acknowledged without anything else to say:
# half of the server's window (`ACK_WINDOW` in pump.lua).
ACK_EARLY = 4
# How many flows one request asks to be hinted at.
MAX_WANTS = 16
# At how many flows one request has the server look; one that compares besides, and asks after.
MAX_LOOKS, LOOKS_BESIDE, MAX_ASKS = 20, 10, 200


class Session:
    """See the module. `wake` is called when there is something to send, `alarm(name, in_ms)` when
    there will be. `accepted`: the last reply was, within the lease. `fatal` is set by a fault that
    no retry fixes. `name` is the process, for people."""

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
        self.last_error = ""  # while there has been none
        self.traffic = Traffic()
        self.remembered = Remembered()
        self._queue = queue
        self._wake = wake
        self._alarm = alarm
        self._batch = 0
        self._full = True
        self._tend = False
        self._must_join = True
        self.policy_due = False
        self._leaving = False
        self._failing = True
        self._lapse_seen = True
        self._sent_seen = self._acked = 0
        self._local = LocalShare()
        queue.is_paused = self._is_paused

    def _is_paused(self, limits: Sequence[str]) -> bool:
        return self.remembered.paused_ms(limits, self.lease.now_ms()) > 0

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
            self._queue.grant(ticket, push.epoch, seq, at, admitted_ms)
        if self._sent_seen - self._acked >= ACK_EARLY or self._queue.urgent:
            self._wake()

    def check_lapse(self) -> bool:
        """True if the lease has lapsed; acts on it the first time. Cheap: call it anywhere."""
        if not self.lease.lapsed():
            return False
        if not self._lapse_seen:
            self._lapse_seen = True
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
        """The heartbeat saw that this process was suspended for longer than its lease."""
        if not self._lapse_seen:
            self._failing = False
        self.check_lapse()

    def stop_handing_on(self) -> None:
        """A limit was paused here: the next permits are the server's to give."""
        self._forget_hints()
        self._full = True

    def _forget_hints(self) -> None:
        self._queue.note_idle(False)
        self._queue.forget_hints()

    def admit_locally(self) -> None:
        """Use our share once Valkey is unavailable for more than a lease, if the policy says so."""
        if self.policy.when_away == "local" and self._failing and self.lease.all_lapsed():
            at = self.lease.now_ms()
            sessions, held = self.sessions, self._queue.amount_held
            self._queue.admit_locally(
                lambda waiter: self._local.allows(waiter, sessions, held, at),
                self.lease.identity.epoch,
                at,
            )

    def has_share(self, limits: Sequence[str]) -> bool:
        """Whether this process may use any of these limits alone, while Valkey is unavailable."""
        return 0 < self.sessions <= min(self.policy.bound_in_force(name) for name in limits)

    def leave(self) -> None:
        """End the session with the next request."""
        self._leaving = True
        self.refresh()

    # -- requests

    def something_urgent(self) -> bool:
        """True if a request must not wait for others to come along."""
        return (
            self._queue.urgent
            or self._full
            or self._tend
            or self._must_join
            or self.policy_due
            or self._leaving
            or len(self._queue.looks) > 0
            or self._sent_seen - self._acked >= ACK_EARLY
        )

    def something_to_say(self) -> bool:
        """True if a request is due."""
        return self.something_urgent() or self._queue.pending > 0

    def prepare(self, run: str, uptime_ms: int) -> tuple[MessageBatch, SyncRequest]:
        """The next request, for a server that says this of itself. Answer it by `answered`,
        `unanswered` or `failed`."""
        joining = self._must_join or self.policy_due
        at = self.lease.now_ms()
        queue, remembered, self._batch = self._queue, self.remembered, self._batch + 1
        if self._must_join:
            queue.forget_stamps()
        batch = queue.take_join() if joining else queue.take(inf if self._leaving else at)
        self.traffic.syncs += 1
        full = self._full or self._tend or joining
        if self._full or joining:
            queue.begin_rounds()
        looking = queue.flows_to_look_at(LOOKS_BESIDE if full else MAX_LOOKS)
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
                remembered.spent(queue.spent_since, at),
                remembered.paused(at),
                remembered.roster(at, self.lease.lease_ms),
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
            ack=self._sent_seen,
            roster=remembered.roster_version,
            full=full,
            leave=self._leaving,
            resets=remembered.resets(quotas, at) if quotas else {},
            told=remembered.told if full else 0,
            pages=remembered.places(begin=self._full) if full else {},
            asks=queue.tickets_to_ask_after(MAX_ASKS) if full else [],
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
        """True for what the quicker script can do."""
        return not (request.full or request.leave or request.join or request.looks)

    # -- what a reply means

    def answered(
        self, batch: MessageBatch, request: SyncRequest, reply: SyncReply, sent_ms: float
    ) -> bool:
        """The server's answer to a request that was sent at `sent_ms`. True if we have left."""
        self.accepted = False
        self.observer.synced(self.lease.now_ms() - sent_ms, len(batch))
        if reply.status == "ok":
            self._accepted(batch, request, reply, sent_ms)
        else:
            self._queue.restore(batch)
            self._rejected(reply)
        return request.leave and reply.status != "stale"

    def unanswered(self, batch: MessageBatch) -> None:
        """Whether the request arrived is not known."""
        self._queue.restore(batch)
        self._full = True

    def _accepted(
        self, batch: MessageBatch, request: SyncRequest, reply: SyncReply, sent_ms: float
    ) -> None:
        if not self.is_ordinary(request):
            self.lease.renewed(sent_ms, reply.lease_ms)
        self._acked = max(self._acked, request.ack)
        self.sessions = reply.sessions
        if batch.joining:
            self._joined(reply)
        queue, at = self._queue, self.lease.now_ms()
        if self.lease.lapsed():
            # The answer is as old as the lease: we were suspended while it came.
            queue.confirm(batch, reply.stamps)
            self._lapse_seen = False
            self._failing = False
            self.check_lapse()
            return
        self.accepted = True
        self._must_join = False
        self._failing = False
        self._lapse_seen = False
        # A policy that came while a request was in progress is still to be sent.
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
                self._refuse(
                    waiter,
                    DeadlineExceeded("no permit is free", limit=limit, retry_after_ms=1000),
                )
        if reply.whole is not None:
            self._compare(reply, reply.whole, sent_ms, at)
        queue.note_idle(not (reply.parked or reply.timed_ms or recovering))
        queue.take_hints({request.flows[h.flow - 1]: h for h in reply.hints}, sent_ms)
        # Come back when the quiet time after a loss ends, or at a limit that only time frees.
        if recovering:
            self._alarm("recovered", reply.recovering_ms)
        if reply.timed_ms > 0 and queue.waiting:
            self._alarm("timed", reply.timed_ms)
        self._tend |= reply.more > 0
        if reply.more or queue.urgent or queue.looks:
            self._wake()

    def _take_refusals(self, request: SyncRequest, reply: SyncReply, sent_ms: float) -> None:
        """Tickets that the server did not take, and what the flows of others wait for."""
        waiting = self._queue.waiting
        for ticket in reply.refused:
            if (waiter := waiting.get(ticket)) is not None:
                waiter.sent = False  # it is in no queue
                flow, most = waiter.flow, self.policy.queue_per_tenant
                limit = flow.held_up_by or flow.limits[0]
                said = f"{flow.tenant} has {most} waiters already"
                self._refuse(waiter, QueueFull(said, limit=limit, retry_after_ms=1000))
        for barred in reply.barred:
            if (waiter := waiting.get(barred.ticket)) is not None:
                waiter.sent = False
                self._refuse_early(waiter, barred)
        for outlook in reply.outlook:
            band, tenant, lane = request.flows[outlook.flow - 1].split("|", 2)
            flow = self._queue.flow(int(band), tenant, tuple(lane.split(" ")))
            self._foresee(flow, outlook, sent_ms)

    def _foresee(self, flow: Flow, outlook: Outlook, sent_ms: float) -> None:
        """What a flow waits for. No call waits longer for what is certain to come too late."""
        if not flow.waiting:
            return
        room_ms = outlook.room_ms
        flow.held_up_by, flow.used = outlook.limit, outlook.used
        flow.room_at_ms = self.lease.now_ms() + room_ms if room_ms else 0.0
        if room_ms and outlook.firm:
            for number, waiter in enumerate(list(flow.waiting.values())):
                # Of one that was not sent yet the server knows better what is before it.
                if waiter.sent and waiter.deadline_ms <= sent_ms + room_ms:
                    barred = Barred(waiter.ticket, outlook.limit, room_ms, outlook.used, 0, number)
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
        """The policy changed: some may wait for what no waiting will bring."""
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
        self._sent_seen = max(self._sent_seen, reply.sent)
        self._adopt(whole)
        recovering = reply.recovering_ms > 0
        news = remembered.learn(whole, self.policy, sent_ms, at, recovering=recovering)
        told = [name for name, _ in whole.spent] if "spent" in whole.pages else None
        queue.reconcile(whole.held, reply.epoch, at, remembered.here, told)
        if news or remembered.pages or queue.asks:
            # The others wait to hear that we know, or the server has more to report.
            self._tend = True
            self._wake()
        if 0 < whole.next_event_ms < reply.lease_ms and queue.waiting:
            self._alarm("next_event", whole.next_event_ms)

    def _joined(self, reply: SyncReply) -> None:
        old = self.lease.identity
        self.lease.identity = Identity(reply.epoch, reply.gen)
        self._sent_seen = self._acked = 0
        self.refresh()
        self.traffic.joins += 1
        if reply.epoch != old.epoch:
            self._queue.forget_stamps()
            self.remembered.forget_version()
            self.observer.recovered(reply.epoch)

    def _rejected(self, reply: SyncReply) -> None:
        """The server does not know us. Whose fault it was decides what becomes of what runs."""
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
        if reply.status == "epoch" and not self._lapse_seen:
            # Only what we assert will count: what was released is free, even if it was received.
            self._queue.start_recycling()
            self._queue.recycle_forgotten(self.lease.now_ms())
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
        if newest.fair_by != self.policy.fair_by:
            self._queue.forget_uses()
        self.policy = newest
        self.policy_due = False
        self._refuse_impossible()
        self._forget_hints()
        self._queue.urgent = True  # the pool learns without delay that this process knows it
        logger.info("limiter: policy revision %d is in force", self.policy.revision)

    def failed(self, reason: str) -> None:
        """A call did not succeed: Valkey is unavailable."""
        self.traffic.failures += 1
        self.last_error = reason
        self._forget_hints()
        if not self._failing:
            # Before anything failed: were we suspended?
            self.check_lapse()
            self._failing = True
        if not self._lapse_seen:
            self._queue.start_recycling()
            self._queue.recycle_unsent(self.lease.now_ms())
        self._set_state("away", reason)

    def _fence(self, reason: str) -> None:
        if count := self._queue.fence():
            logger.warning("limiter: %s; %d running calls cancelled", reason, count)
        self.observer.fenced(count)

    def fail(self, error: ConfigError) -> None:
        """No retry fixes this."""
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
    """A call that is to come."""

    def cancel(self) -> None:
        """It is not to come any more."""


class Clock:
    """The machine's. `server_time` is Lua that defines `T.wall_clock_ms` in the place of the
    server's clock; None in the product."""

    server_time: str | None = None
    # No method: it is called several times a request.
    now_ms = staticmethod(now_ms)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def call_later(self, seconds: float, call: Callable[..., object], *arguments: object) -> Timer:
        return asyncio.get_running_loop().call_later(seconds, call, *arguments)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """In a thread: True once the event is set, False after so long."""
        return event.wait(seconds)
