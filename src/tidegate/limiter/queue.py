"""Local queue of a process: waiters, flows, grants, and messages that are unsent or unconfirmed.

Does no I/O. A flow is a band, a tenant and a set of limits: its waiters are interchangeable.

Invariants: a ticket is waiting, held or gone, and is granted or abandoned once; a permit that is
passed from one call to the next within the process is never also returned; an unconfirmed batch is
repeated in the same order before anything newer; every waiting flow has its turn in each round of
comparison.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import chain, count, islice, zip_longest
from math import inf
from typing import Any, TypeVar

from tidegate.limiter.flow import (
    VIRTUAL_UNITS,
    Flow,
    Holding,
    MessageBatch,
    Release,
    Transfer,
    Waiter,
)
from tidegate.limiter.messages import OUTCOMES, USAGE_LATER, Hint
from tidegate.limiter.policy import Concurrency, Limit, Quota, Rate, share_of


@dataclass(slots=True)
class Counts:
    """Counters of events since the start, for tests and benchmarks."""

    admitted: int = 0
    handed_on: int = 0
    recycled: int = 0
    local: int = 0
    strays: int = 0
    fenced: int = 0


@dataclass(slots=True)
class Traffic:
    """Counters of messages since the start."""

    syncs: int = 0
    failures: int = 0
    pushes: int = 0
    joins: int = 0


MAX_ENTRIES = 500
# Each flow has the server check all of its limits. The most flows of one request: for each sort of
# entry, and in all.
MAX_FLOWS = 15
MAX_FLOWS_IN_ALL = 20
# How long a permit that was freed while no call waits is kept for the next call of this process.
SPARE_MS = 5.0
# How long a hint is used: callers of a higher band or of other tenants may have arrived since. The
# server plans this far ahead (`T.AHEAD_MS` in Lua).
HINT_MS = 150.0
# Sequence numbers for a permit that is passed on inside a process; the server's are this far apart.
CHAIN = 1000
_FLOWS_KEPT = 10_000
# Admissions under a limit that are kept apart between two comparisons; more are merged in pairs.
_ADMISSIONS_KEPT = 256


E = TypeVar("E", Waiter, Release, Transfer)


class SpentHere:
    """What this process's calls took of rates and quotas since the server last reported them.

    Ordered by the fences of the admissions, so that it is known which of them a report of any
    process includes. Without those by the local share, of which the server does not know.
    """

    def __init__(self) -> None:
        # limit -> (epoch, sequence, amount) of each admission
        self._taken: dict[str, list[tuple[int, int, int]]] = {}

    def __bool__(self) -> bool:
        return bool(self._taken)

    def __iter__(self) -> Iterator[str]:
        return iter(self._taken)

    def add(self, name: str, amount: int, epoch: int, seq: int) -> None:
        taken = self._taken.setdefault(name, [])
        taken.append((epoch, seq, amount))
        if len(taken) > _ADMISSIONS_KEPT:
            self._taken[name] = self._merged(taken)

    @staticmethod
    def _merged(taken: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Return pairs of neighbours as one each, which a report includes only as a whole."""
        known, merged = sorted(taken), list[tuple[int, int, int]]()
        for first, last in zip_longest(known[::2], known[1::2]):
            merged.append(first if last is None else (*last[:2], first[2] + last[2]))
        return merged

    def reported(self, names: Collection[str] | None, epoch: int, seq: int) -> None:
        """Forget what the server has reported with the sequence `seq`: for all limits, or some."""
        for name in list(self._taken) if names is None else names:
            left = [one for one in self._taken.get(name, ()) if one[:2] > (epoch, seq)]
            if left:
                self._taken[name] = left
            else:
                self._taken.pop(name, None)

    def since(self, name: str, epoch: int) -> list[int]:
        """Return sequence and amount, alternating; the sequence is 0 in another epoch."""
        found = self._taken.get(name, ())
        unknown = sum(amount for of, _, amount in found if of != epoch)
        known = ((seq, amount) for of, seq, amount in found if of == epoch)
        return [*([0, unknown] if unknown else []), *chain.from_iterable(known)]

    def amount(self, name: str) -> int:
        return sum(each for *_, each in self._taken.get(name, ()))

    def totals(self) -> dict[str, int]:
        """Return the amount by limit."""
        return {name: sum(each for *_, each in taken) for name, taken in self._taken.items()}


def _some(entries: Iterable[E], flow_of: Callable[[E], Flow], flows: set[Flow]) -> list[E]:
    """Return as many entries as one request may carry, in order; `flows`: those of the request."""
    taken: list[E] = []
    own: set[Flow] = set()
    for entry in islice(entries, MAX_ENTRIES):
        flow = flow_of(entry)
        own.add(flow)
        if len(own) > MAX_FLOWS or (flow not in flows and len(flows) >= MAX_FLOWS_IN_ALL):
            break
        flows.add(flow)
        taken.append(entry)
    return taken


def _next_flows(left: dict[str, Flow], most: int) -> list[Flow]:
    """Take the next flows of a round, and return those that still wait."""
    if not left:
        return []
    taken = [left.pop(key) for key in list(islice(left, most))]
    return [flow for flow in taken if flow.waiting]


def _count_down(counter: Counter[str], names: Iterable[str]) -> None:
    for name in names:
        left = counter[name] - 1
        if left:
            counter[name] = left
        else:
            del counter[name]


def _new_future() -> asyncio.Future[Holding]:
    return asyncio.get_running_loop().create_future()


@dataclass(slots=True)
class PoolUse:
    """What a process knows of the pool's use of limits while Valkey is unavailable.

    held: returns what this process's permits take of a concurrency limit. spent: returns what of a
    rate or quota still counts, as last seen, and what was admitted here since. counts_for: returns
    for how many ms an admission by a rate or quota counts from now on.
    """

    sessions: int
    held: Callable[[str, Concurrency], int]
    spent: Callable[[str, Rate | Quota], tuple[int, int]]
    counts_for: Callable[[Rate | Quota], float]


class LocalShare:
    """The process's share of limits while Valkey is unavailable, and its use of rates."""

    def __init__(self) -> None:
        # limit -> (ms at which it expires, amount) of each admission here that no join has reported
        self.spent: dict[str, deque[tuple[float, int]]] = {}
        self._totals: Counter[str] = Counter()  # of all time
        # limit -> ms at which an even flow has caught up with what a paced rate admitted here
        self._even: dict[str, float] = {}

    def allows(self, waiter: Waiter, use: PoolUse, at_ms: float) -> bool:
        """Return whether the local share of every limit has room, and record the use of rates."""
        taken = waiter.flow.taken(waiter.amounts)
        for name, limit, amount in taken:
            if limit.shadow:
                continue
            if isinstance(limit, Concurrency):
                bound, used = limit.bound, use.held(name, limit)
            else:
                seen, since = use.spent(name, limit)
                bound, used = limit.bound, since + self._used(name, at_ms)
                if isinstance(limit, Rate) and limit.ramp is not None:
                    bound = min(bound, max(limit.ramp.start, seen))
                bound = max(0, bound - seen)
            if used + amount > share_of(bound, use.sessions):
                return False
            if at_ms < self._even.get(name, at_ms) - self._ahead_ms(limit, amount, use.sessions):
                return False
        for name, limit, amount in taken:
            if not isinstance(limit, Concurrency):
                entry = at_ms + use.counts_for(limit), amount
                self.spent.setdefault(name, deque()).append(entry)
                self._totals[name] += amount
            if isinstance(limit, Rate) and limit.pace_ms is not None:
                even_ms = max(self._even.get(name, at_ms), at_ms)
                self._even[name] = even_ms + amount * self._each_ms(limit, use.sessions)
        return True

    @staticmethod
    def _each_ms(limit: Rate, sessions: int) -> float:
        return limit.window_ms / max(1, share_of(limit.bound, sessions))

    def _ahead_ms(self, limit: Limit, amount: int, sessions: int) -> float:
        """Return how far ahead of an even flow a call of a paced rate may come."""
        if not isinstance(limit, Rate) or limit.pace_ms is None:
            return 0.0
        return max(0.0, limit.pace_ms - amount * self._each_ms(limit, sessions))

    def _used(self, name: str, at_ms: float) -> int:
        spent = self.spent.get(name, deque())
        while spent and spent[0][0] <= at_ms:
            spent.popleft()
        return sum(each for _, each in spent)

    def unreported(self, at_ms: float) -> list[tuple[str, int, int]]:
        """Return (limit, amount that still counts, total of all time) for the next join."""
        used = [(name, self._used(name, at_ms), self._totals[name]) for name in self.spent]
        return [entry for entry in used if entry[1]]

    def reported(self, own: Iterable[tuple[str, int, int]]) -> None:
        """Forget what a join has reported, except what was admitted after it was sent."""
        for name, _, total in own:
            later = self._totals[name] - total
            kept = deque[tuple[float, int]]()
            for entry in reversed(self.spent.pop(name, ())):
                if later <= 0:
                    break
                kept.appendleft(entry)
                later -= entry[1]
            if kept:
                self.spent[name] = kept


class LocalQueue:
    """The local queue of a process.

    recycling: a freed permit may be passed on without a hint, because the server cannot give any.
    idle: no call waits in the whole pool. urgent: a pending message must not wait for others.
    hurried: it must not wait long, since the answer may refuse a call. parting: tickets that were
    abandoned, released or passed on, until the server has confirmed it. looks, asks: flows still to
    come in two rounds, by key. In the first the server checks whether a call of a flow could be
    admitted. In the second it reports which of the flow's first tickets it has admitted, in case
    that push was lost.
    """

    def __init__(self, new_future: Callable[[], asyncio.Future[Holding]] = _new_future) -> None:
        self._new_future = new_future
        self.waiting: dict[int, Waiter] = {}
        self.held: dict[int, Holding] = {}
        self.held_of: Counter[str] = Counter()  # by limit; limits without permits are missing
        self.waiting_of: Counter[str] = Counter()
        self.spent_since = SpentHere()
        self.counts = Counts()
        self.recycling = False
        self.is_paused: Callable[[Sequence[str]], bool] = lambda _: False  # set by the session
        self.idle = False
        self.urgent = False
        self.hurried = False
        self.parting: set[int] = set()
        self.looks: dict[str, Flow] = {}
        self.asks: dict[str, Flow] = {}
        self._tickets = count(1)
        self.flows: dict[tuple[int, str, tuple[str, ...]], Flow] = {}
        self._lanes: dict[tuple[int, tuple[str, ...]], dict[str, Flow]] = {}
        self._local_tags: Counter[str] = Counter()
        # The flows of the last request for hints, and those that have a hint.
        self._wanting, self._hinted = list[Flow](), list[Flow]()
        self._hinted_until_ms = 0.0
        # Pending messages.
        self._enqueues: dict[int, Waiter] = {}
        self._cancels: list[tuple[int, Flow | None, str]] = []
        self._settles: list[tuple[int, str]] = []
        self._releases: dict[int, Release] = {}
        self._transfers: list[Transfer] = []
        # Permits freed while no call waited, with the time, by flow key: the next call of the flow
        # may have them.
        self._spare: dict[str, dict[int, float]] = {}

    def __repr__(self) -> str:
        counts = f"waiting={len(self.waiting)} held={len(self.held)} pending={self.pending}"
        return f"<LocalQueue {counts}>"

    @property
    def pending(self) -> int:
        """The number of messages still to be sent."""
        ended = len(self._releases) + len(self._transfers) + len(self._settles)
        return len(self._enqueues) + len(self._cancels) + ended

    def amount_held(self, name: str, limit: Concurrency) -> int:
        """Return what this process's permits take of a concurrency limit."""
        if not limit.by_tokens:
            return self.held_of[name]
        holdings = (one for one in self.held.values() if name in one.flow.limits)
        return sum(one.flow.amount_under(name, one.amounts) for one in holdings)

    def flow(self, band: int, tenant: str, limits: tuple[str, ...]) -> Flow:
        """Return the flow of that name, always the same object."""
        name = (band, tenant, limits)
        flow = self.flows.get(name)
        if flow is None:
            if len(self.flows) >= _FLOWS_KEPT:
                self.flows = {n: f for n, f in self.flows.items() if f.waiting or f.held}
            flow = self.flows[name] = Flow(band, tenant, limits)
        return flow

    def longest_queues(self, most: int) -> list[Flow]:
        """Return the flows with the most waiters here."""
        flows = (flow for lane in self._lanes.values() for flow in lane.values())
        return nlargest(most, flows, key=lambda flow: len(flow.waiting))

    def first_since(
        self, tenant: str, limits: tuple[str, ...], requested_ms: float
    ) -> Waiter | None:
        """Return a tenant's first waiter for these limits, in any band, since `requested_ms`."""
        flows = (
            flow
            for (_, named), lane in self._lanes.items()
            if named == limits
            for flow in lane.values()
            if flow.tenant == tenant
        )
        found = (
            next((one for one in flow.waiting.values() if one.requested_ms >= requested_ms), None)
            for flow in flows
        )
        waiters = [one for one in found if one is not None]
        return min(waiters, key=lambda one: one.requested_ms, default=None)

    # -- waiting

    def ask(
        self,
        flow: Flow,
        *,
        amounts: str = "",
        use: int = 0,
        hard_ms: int,
        now_ms: float,
        deadline_ms: float,
        once: bool = False,
        by_estimate: bool = False,
        due: bool = False,
    ) -> Waiter:
        """Return a new waiter at the end of its flow; a spare permit admits it immediately.

        `use`: its probable use; 0 for as long as the last calls took. `due`: its deadline puts it
        before others of its tenant.
        """
        ticket, use = next(self._tickets), use or round(flow.cost_ms)
        member = f"{ticket}|{hard_ms}|{use}|{amounts}"
        future = self._new_future()
        waiter = Waiter(
            ticket, flow, member, hard_ms, use, now_ms, deadline_ms, future, once, by_estimate, due
        )
        if not flow.waiting and self.idle and self._take_spare(waiter, now_ms):
            return waiter
        if self.idle or not flow.waiting:
            self.urgent = True
        if (by_estimate or flow.rates) and deadline_ms != inf:
            self.hurried = True
        self.waiting[ticket] = waiter
        if not flow.waiting:
            self._lanes.setdefault(flow.lane, {})[flow.key] = flow
        flow.waiting[ticket] = waiter
        flow.dues += due
        for name in flow.limits:
            self.waiting_of[name] += 1
        self._enqueues[ticket] = waiter
        return waiter

    def _take_spare(self, waiter: Waiter, now_ms: float) -> bool:
        """Take a freed permit of this flow whose release the server has not received."""
        spare = self._spare.get(waiter.flow.key)
        if not spare:
            return False
        release = self._releases.pop(spare.popitem()[0])
        heir = self._hold(waiter, release.epoch, release.seq + 1, now_ms)
        self._transfers.append(
            Transfer(release.ticket, heir, "", release.outcome, release.took_ms, release.use)
        )
        self.counts.handed_on += 1
        return True

    def abandon(self, ticket: int, now_ms: float) -> None:
        """Remove a ticket. A grant that already reached it, or that crosses this, is returned."""
        waiter = self._forget(ticket)
        if waiter is None:
            if ticket in self.held:
                self.release(ticket, outcome="ignored", actual="", now_ms=now_ms)
        elif waiter.sent:
            self._cancel(ticket, waiter.flow, waiter.member)

    def _cancel(self, ticket: int, flow: Flow | None, member: str) -> None:
        self._cancels.append((ticket, flow, member))
        self.parting.add(ticket)

    def _forget(self, ticket: int) -> Waiter | None:
        waiter = self.waiting.pop(ticket, None)
        if waiter is not None:
            flow = waiter.flow
            del flow.waiting[ticket]
            flow.dues -= waiter.due
            _count_down(self.waiting_of, flow.limits)
            if not flow.waiting:
                flow.hint, flow.held_up_by, flow.room_at_ms = None, None, 0.0
                lane = self._lanes[flow.lane]
                del lane[flow.key]
                if not lane:
                    del self._lanes[flow.lane]
            self._enqueues.pop(ticket, None)
        return waiter

    def refuse(self, waiter: Waiter, error: Exception, now_ms: float) -> None:
        """End a wait with an error."""
        self.abandon(waiter.ticket, now_ms)
        if not waiter.future.done():
            waiter.future.set_exception(error)

    # -- releasing and passing on

    def release(
        self,
        ticket: int,
        *,
        outcome: str,
        actual: str,
        now_ms: float,
        usage_later: bool = False,
        use: int | None = None,
        first: tuple[int, int] | None = None,
    ) -> None:
        """Return a permit, or pass it on to the next waiter here if that is fair."""
        holding = self.held.pop(ticket, None)
        if holding is None:
            return
        flow = holding.flow
        flow.held -= 1
        _count_down(self.held_of, flow.limits)
        took_ms = now_ms - holding.held_from_ms
        if outcome == "success":
            flow.learn(took_ms)
        whole_ms = flow.whole_ms(took_ms)
        later = USAGE_LATER if usage_later else 0
        ended = OUTCOMES[outcome] + later
        release = Release(ticket, flow, holding.epoch, holding.seq, ended, whole_ms, actual, use)
        release.first, release.holding = first, holding
        self.parting.add(ticket)
        if holding.fenced or not self._pass_on(release, now_ms):
            self._releases[ticket] = release
            if not self.idle:
                self.urgent = True
            elif flow.plain and release.seq % CHAIN < CHAIN - 1 and not holding.fenced:
                self._spare.setdefault(flow.key, {})[ticket] = now_ms

    def settle_later(self, ticket: int, actual: str) -> None:
        """Report the usage of a call whose permit was released as `usage_later`."""
        self._settles.append((ticket, actual))

    def _pass_on(self, release: Release, now_ms: float) -> bool:
        flow, heir = release.flow, None
        if release.seq % CHAIN < CHAIN - 1:  # otherwise its fence would be another permit's
            if self.recycling:
                heir = self._next_anyhow(flow)
            elif flow.plain and now_ms <= self._hinted_until_ms:
                heir = self._next_by_hint(flow.lane)
        if heir is None:
            return False
        holding = self._hold(heir, release.epoch, release.seq + 1, now_ms)
        member = heir.member if heir.sent else ""  # not in the server's queue yet
        self._transfers.append(
            Transfer(release.ticket, holding, member, release.outcome, release.took_ms, release.use)
        )
        if self.recycling:
            self.counts.recycled += 1
        else:
            self.counts.handed_on += 1
            # The last waiter with a hint: request the next hints now.
            if self._next_by_hint(flow.lane) is None:
                self.urgent = True
        return True

    def _next_by_hint(self, lane: tuple[int, tuple[str, ...]]) -> Waiter | None:
        """Return the next waiter; waiters that only the server can admit are not overtaken."""
        best: tuple[float, Waiter | None] | None = None
        for flow in self._lanes.get(lane, {}).values():
            found = flow.next_by_hint()
            if found is not None and (best is None or found[0] < best[0]):
                best = found
        return best[1] if best else None

    def _next_anyhow(self, flow: Flow) -> Waiter | None:
        """Return the next waiter in fair order among this process's own, without a server."""
        if flow.sized or self.is_paused(flow.limits):
            return None
        found = [
            (other.band, self._local_tags[other.tenant], waiter.requested_ms, waiter.ticket, waiter)
            for (_, limits), lane in self._lanes.items()
            if limits == flow.limits
            for other in lane.values()
            if (waiter := other.first_due()) is not None
        ]
        if not found:
            return None
        waiter = min(found)[4]
        chosen = waiter.flow
        self._local_tags[chosen.tenant] += waiter.use * VIRTUAL_UNITS // chosen.weight
        return waiter

    def recycle_unsent(self, now_ms: float) -> None:
        """Pass on permits that were freed but never sent, because Valkey is unavailable."""
        self._spare.clear()
        for release in [one for one in self._releases.values() if not one.sent]:
            if self._pass_on(release, now_ms):
                del self._releases[release.ticket]

    def recycle_forgotten(self, now_ms: float) -> None:
        """Treat all releases as never sent, because the server lost its data, and pass them on."""
        for release in self._releases.values():
            release.sent = False
        self.recycle_unsent(now_ms)

    def start_recycling(self) -> None:
        """Begin to decide the order of waiters in this process."""
        if not self.recycling:
            self._local_tags.clear()
        self.recycling = True

    def note_idle(self, idle: bool) -> None:
        """Record whether no call waits in the whole pool, as the server reports."""
        self.idle = idle
        if not idle:
            self._forget_spare()

    def _forget_spare(self) -> None:
        """Keep no freed permits for later calls: send their releases now."""
        if self._spare:
            self._spare.clear()
            self.urgent = self.urgent or len(self._releases) > 0

    # -- admission

    def admit_locally(self, allows: Callable[[Waiter], bool], epoch: int, now_ms: float) -> None:
        """Admit the waiters that `allows`, after more than a lease without Valkey."""
        flows = [flow for lane in self._lanes.values() for flow in lane.values()]
        for flow in sorted(flows, key=lambda flow: flow.band):
            if self.is_paused(flow.limits):
                continue
            while (waiter := flow.first_due()) is not None and allows(waiter):
                self._hold(waiter, epoch, 0, now_ms)
                self.counts.local += 1

    def grant(
        self, ticket: int, epoch: int, seq: int, now_ms: float, admitted_ms: float | None = None
    ) -> None:
        """Take the server's admission of a ticket, which was not before `admitted_ms`.

        A grant of a ticket that no longer waits is returned.
        """
        waiter = self.waiting.get(ticket)
        if waiter is not None:
            self._hold(waiter, epoch, seq, now_ms, admitted_ms)
            return
        if ticket not in self.held and ticket not in self.parting:
            self.counts.strays += 1
            self._cancel(ticket, None, "")
        # Otherwise it was admitted here at the same moment: the server frees its own permit when it
        # receives that message.
        self.urgent = True

    def _hold(
        self,
        waiter: Waiter,
        epoch: int,
        seq: int,
        now_ms: float,
        admitted_ms: float | None = None,
    ) -> Holding:
        self._forget(waiter.ticket)
        flow = waiter.flow
        holding = Holding(
            waiter.ticket,
            flow,
            epoch,
            seq,
            waiter.use,
            now_ms,
            now_ms if admitted_ms is None else admitted_ms,
            now_ms + waiter.hard_ms,
            now_ms - waiter.requested_ms,
            waiter.amounts if flow.sized else "",
        )
        self.held[waiter.ticket] = holding
        flow.held += 1
        for name in flow.limits:
            self.held_of[name] += 1
        if flow.rates and seq:
            for name, amount in flow.spends(waiter.amounts).items():
                self.spent_since.add(name, amount, epoch, seq)
        self.counts.admitted += 1
        # A finished future is that of a task that is being cancelled, which abandons the ticket.
        if not waiter.future.done():
            waiter.future.set_result(holding)
        return holding

    def forget_uses(self) -> None:
        """Discard the use of held permits, because the measure of shares has changed."""
        for holding in self.held.values():
            holding.use = 0

    def fence(self) -> int:
        """Cancel every body because the session is gone; return how many.

        The permits stay here until their bodies have ended.
        """
        fenced = [holding for holding in self.held.values() if not holding.fenced]
        for holding in fenced:
            holding.fenced = True
            if holding.on_fence is not None:
                holding.on_fence()
        self.counts.fenced += len(fenced)
        self._forget_spare()
        return len(fenced)

    # -- messages

    def take(self, now_ms: float = inf) -> MessageBatch:
        """Return the next batch to send: `MAX_ENTRIES` of each sort and `MAX_FLOWS` flows at most.

        Permits spare for less than `SPARE_MS` are kept back: many callers that call again at the
        same moment would find none otherwise.
        """
        retained = self._fresh(now_ms) if self._spare else frozenset[int]()
        flows: set[Flow] = set()
        transfers = _some(self._transfers, lambda one: one.heir.flow, flows)
        enqueues = _some(self._enqueues.values(), lambda one: one.flow, flows)
        for waiter in enqueues:
            waiter.sent = True
            del self._enqueues[waiter.ticket]
        self.hurried = self.hurried and len(self._enqueues) > 0
        batch = MessageBatch(
            transfers=transfers,
            cancels=self._cancels[:MAX_ENTRIES],
            enqueues=enqueues,
        )
        del self._transfers[: len(transfers)]
        # The server must learn how a permit came to its holder before its release.
        if self._releases and not self._transfers:
            ended = (one for one in self._releases.values() if one.ticket not in retained)
            batch.releases = _some(ended, lambda one: one.flow, flows)
        for release in batch.releases:
            release.sent = True
            del self._releases[release.ticket]
        # The server must learn of the end of a call before its usage.
        if self._settles and len(self._releases) == len(retained):
            ready = [one for one in self._settles if one[0] not in retained]
            batch.settles = ready[:MAX_ENTRIES]
            self._settles = ready[MAX_ENTRIES:] + [
                one for one in self._settles if one[0] in retained
            ]
        del self._cancels[:MAX_ENTRIES]
        held_back = len(retained) + sum(ticket in retained for ticket, _ in self._settles)
        self.urgent = self.pending > held_back
        return batch

    def _fresh(self, now_ms: float) -> frozenset[int]:
        """Return the permits that are still kept for later calls, and forget the others."""
        self._spare = {
            key: fresh
            for key, spare in self._spare.items()
            if (fresh := {one: at for one, at in spare.items() if now_ms - at < SPARE_MS})
        }
        return frozenset(ticket for spare in self._spare.values() for ticket in spare)

    def forget_stamps(self) -> None:
        """Discard stamps, because the server no longer has an order of our waiters."""
        for waiter in self.waiting.values():
            waiter.stamp = 0

    def take_join(self) -> MessageBatch:
        """Return the batch of a joining session: everything that it holds and waits for.

        The server forgets what it knew of this session, so cancels and transfers are obsolete.
        Releases are not: the permit may be held over.
        """
        self.forget_hints()
        self.parting.difference_update(ticket for ticket, _, _ in self._cancels)
        self.parting.difference_update(t.source for t in self._transfers)
        self._cancels.clear()
        self._transfers.clear()
        self._enqueues = dict(self.waiting)
        batch = self.take()
        batch.joining = True
        batch.held = list(self.held.values())
        return batch

    def confirm(self, batch: MessageBatch, stamps: Iterable[float] = ()) -> None:
        """Record that the server has processed a batch, and the stamps of its tickets."""
        self.parting.difference_update(ticket for ticket, _, _ in batch.cancels)
        self.parting.difference_update(release.ticket for release in batch.releases)
        self.parting.difference_update(transfer.source for transfer in batch.transfers)
        for waiter, stamp in zip(batch.enqueues, stamps, strict=False):
            waiter.stamp = stamp

    def restore(self, batch: MessageBatch) -> None:
        """Queue a batch again that may not have arrived, before anything newer."""
        self._transfers[:0] = batch.transfers
        self._releases = {r.ticket: r for r in batch.releases} | self._releases
        self._settles[:0] = batch.settles
        self._cancels[:0] = batch.cancels
        again = {w.ticket: w for w in batch.enqueues if w.ticket in self.waiting}
        self._enqueues = again | self._enqueues
        self.urgent = True

    # -- hints and rounds

    def flows_to_hint(self, most: int) -> list[Flow]:
        """Return flows that wait for limits of held permits which may be passed on."""
        held = {holding.flow.lane for holding in self.held.values() if holding.flow.plain}
        lanes = (self._lanes[lane] for lane in held if lane in self._lanes)
        self._wanting = list(islice((flow for lane in lanes for flow in lane.values()), most))
        return self._wanting

    def forget_hints(self) -> None:
        """Pass on no permit until the server allows it again."""
        self.take_hints({}, 0.0)

    def take_hints(self, hints: Mapping[str, Hint], requested_ms: float) -> None:
        """Replace all hints by those for the flows of the last `flows_to_hint`, by flow key.

        `requested_ms`: the earliest time of the request.
        """
        self._hinted_until_ms = requested_ms + HINT_MS
        for flow in self._hinted:
            flow.hint = None
        self._hinted = [flow for flow in self._wanting if flow.key in hints and flow.waiting]
        for flow in self._hinted:
            flow.hint = hints[flow.key]

    def begin_rounds(self) -> None:
        """Begin another round of both kinds."""
        for lane in self._lanes.values():
            self.looks |= lane
            self.asks |= lane

    def flows_to_inspect(self, most: int) -> list[Flow]:
        return _next_flows(self.looks, most)

    def tickets_to_verify(self, most: int) -> list[int]:
        """Return the first tickets of the next flows: the fewer flows, the more of each."""
        each = max(1, most // max(1, len(self.asks)))
        return [
            waiter.ticket
            for flow in _next_flows(self.asks, most)
            for waiter in flow.next_ones(each)
            if waiter.sent
        ]

    def reconcile(
        self,
        held: Iterable[tuple[int, int, int]],
        epoch: int,
        now_ms: float,
        here: Callable[[float], float],
        seq: int,
        reported: Collection[str] | None = None,
    ) -> None:
        """Take what the server reports as held, of the tickets asked after.

        These are grants whose push was lost or is still to be read. `here` converts a time of the
        server's to the earliest on our clock. What the server reported of the limits `reported`, or
        of all, includes the amounts spent here up to the sequence `seq`.
        """
        for ticket, seq, until_ms in held:
            if ticket in self.held or ticket in self.parting:
                continue
            waiter = self.waiting.get(ticket)
            admitted_ms = here(until_ms - waiter.hard_ms) if waiter else None
            self.grant(ticket, epoch, seq, now_ms, admitted_ms)
            if waiter is not None and waiter.flow.waiting:
                self.asks[waiter.flow.key] = waiter.flow  # the next ticket may be granted too
        self.spent_since.reported(reported, epoch, seq)


def compose(
    batch: MessageBatch,
    wanting: Sequence[Flow],
    looking: Sequence[Flow],
    at_ms: float,
    *,
    pauses: bool = False,
) -> dict[str, Any]:
    """Return the fields of a `SyncRequest` that a batch fills.

    `wanting`: flows for which hints are requested. `looking`: flows that the server is to look at.
    `pauses`: some limit is paused. In the result, `held` belongs to the join and `quotas` has the
    time zones of the day quotas that the flows need. The reply's hints count flows in the order of
    `flows`, from 1."""
    numbers: dict[str, int] = {}
    quotas: dict[str, str] = {}
    firm: set[str] = set()
    released = batch.releases if batch.joining else ()
    ended = {one.ticket: one.holding for one in released if one.holding is not None}

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
            (*_held(h, number(h.flow), at_ms), int(h.ticket in ended))
            for h in [*batch.held, *ended.values()]
        ],
        "transfers": [_transferred(t, number(t.heir.flow), at_ms) for t in batch.transfers],
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


def _held(held: Holding, number: int, at_ms: float) -> tuple[Any, ...]:
    return held.ticket, number, held.seq, held.hard_left_ms(at_ms), held.use, held.amounts


def _transferred(one: Transfer, number: int, at_ms: float) -> tuple[Any, ...]:
    heir = one.heir
    placed = heir.ticket, heir.seq, heir.hard_left_ms(at_ms), number
    return one.source, *placed, one.member, one.outcome, one.took_ms
