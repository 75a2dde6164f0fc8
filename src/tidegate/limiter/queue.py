"""Local queue of a process: waiters, flows, grants, and messages that are unsent or unconfirmed.

Does no I/O. A flow is a band, a tenant and a set of limits: its waiters are interchangeable.

Invariants: a ticket is waiting, held or gone, and is granted or abandoned once; a permit that
passes from one call to the next within the process is never also returned; an unconfirmed batch
is repeated in the same order before anything newer; every waiting flow has its turn in each round
of comparison.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import count, islice
from math import inf
from typing import TypeVar

from tidegate.errors import DemandImpossible
from tidegate.limiter.messages import OUTCOMES, USAGE_LATER, Hint, flow_of
from tidegate.limiter.policy import (
    DEFAULT_HARD_MS,
    Concurrency,
    Limit,
    PoolPolicy,
    Quota,
    Rate,
    Unit,
)

# What a call is taken to last before the first one of its flow has ended.
FIRST_COST_MS = 1000.0
_LEARN = 1 / 8
# Of how many limits the names are shown to a caller who asks for one that is unknown.
_KNOWN_SHOWN = 8
# Of virtual time in a ms of use by a tenant of weight 1.
VIRTUAL_UNITS = 100_000


@dataclass(frozen=True, slots=True)
class Tokens:
    """LLM tokens of a call: an estimate before it, or what it used."""

    input: int = 0
    output: int = 0

    @property
    def total(self) -> int:
        return self.input + self.output


def tokens_of(tokens: int | Tokens) -> Tokens:
    """A number is a total whose parts are not known: it counts as input."""
    return Tokens(tokens) if isinstance(tokens, int) else tokens


def amount_of(unit: Unit, tokens: Tokens | None, images: int | None) -> int | None:
    """How much of a unit a call takes or used; None where that is not known."""
    if unit == "requests":
        return 1
    if unit == "images":
        return images
    if tokens is None:
        return None
    if unit == "tokens":
        return tokens.total
    return tokens.input if unit == "input_tokens" else tokens.output


def unknown_limit(name: str, policy: PoolPolicy, pool: str = "") -> str:
    """What is wrong with a demand for a limit that a policy does not name."""
    known = sorted(policy.limits)
    more = f" and {len(known) - _KNOWN_SHOWN} more" if len(known) > _KNOWN_SHOWN else ""
    names = ", ".join(known[:_KNOWN_SHOWN]) + more
    where = f" of pool {pool!r}" if pool else ""
    return f"limit {name!r} is not in the policy{where} (known: {names})"


class Flow:
    """See the module. `cost_ms` is how long its calls last, as far as is known; `hint` is set while
    the server lets us pass permits on in it. `quotas` are (limit, zone). `slack_ms` is how much
    later than admitted its calls may be sent; `rest_ms` is what was rounded off the length of its
    last call. `firm` are those of its limits that get nothing back when calls end, where the server
    does not know. `held_up_by` is the limit that it waits for, as the server said last, of which
    so much is `used`; `room_at_ms` when there is room for its first waiter, 0 while not known."""

    __slots__ = (
        "band",
        "cost_ms",
        "firm",
        "held",
        "held_up_by",
        "hint",
        "key",
        "lane",
        "limits",
        "list",
        "plain",
        "quotas",
        "rates",
        "rest_ms",
        "revision",
        "room_at_ms",
        "slack_ms",
        "tenant",
        "unnamed",
        "used",
        "waiting",
        "weight",
    )

    def __init__(self, band: int, tenant: str, limits: tuple[str, ...]) -> None:
        self.band = band
        self.tenant = tenant
        self.limits = limits
        self.key = flow_of(band, tenant, limits)
        # Permits may be passed on between flows of one lane and band.
        self.lane = (band, limits)
        self.waiting: dict[int, Waiter] = {}
        self.held = 0
        self.cost_ms = FIRST_COST_MS
        self.hint: Hint | None = None
        self.held_up_by: str | None = None
        self.room_at_ms = 0.0
        self.used = 0
        self.firm: tuple[str, ...] = ()
        self.rest_ms = 0.0
        self.revision = -1
        self.list: tuple[Limit, ...] = ()
        self.rates = False
        self.plain = False
        self.quotas: tuple[tuple[str, str], ...] = ()
        self.slack_ms = float("inf")
        self.unnamed: str | None = None  # the first limit that the policy does not name
        self.weight = 1

    def __repr__(self) -> str:
        return f"<Flow {self.key} waiting={len(self.waiting)} held={self.held}>"

    def refresh(self, policy: PoolPolicy, pool: str = "") -> None:
        """Read what the policy says. Raises DemandImpossible for a limit that lets nobody in."""
        found = [policy.binding(name) for name in self.limits]
        for name, limit in zip(self.limits, found, strict=True):
            if limit is None:
                raise DemandImpossible(unknown_limit(name, policy, pool), limit=name)
            if limit.bound == 0:
                raise DemandImpossible(f"limit {name!r} is 0: it admits no call", limit=name)
        self.list = tuple(limit for limit in found if limit is not None)
        named = policy.limits
        self.unnamed = next((name for name in self.limits if name not in named), None)
        self.rates = any(not isinstance(limit, Concurrency) for limit in self.list)
        self.plain = policy.hand_off and not any(
            not isinstance(limit, Concurrency) or limit.adaptive for limit in self.list
        )
        self.quotas = tuple((n, q.zone) for n, q in zip(self.limits, self.list, strict=True)
                            if isinstance(q, Quota))  # fmt: skip
        self.firm = tuple(n for n, x in zip(self.limits, self.list, strict=True)
                          if not isinstance(x, Concurrency) and x.unit == "requests"
                          and not (isinstance(x, Rate) and x.exact))  # fmt: skip
        slacks = [limit.slack for limit in self.list if isinstance(limit, Rate)]
        self.slack_ms = min(slacks, default=float("inf"))
        self.weight = policy.weights.get(self.tenant, 1)
        self.revision = policy.revision

    def amounts(self, tokens: Tokens | None, images: int) -> str:
        """What one call takes of each limit, as the wire says it: empty where it is 1 of each.

        Clamped to what a limit can ever give. Raises ValueError where a limit counts tokens and
        nobody said how many.
        """
        if not self.rates:
            return ""
        parts = []
        for name, limit in zip(self.limits, self.list, strict=True):
            amount: int | None = 1
            if not isinstance(limit, Concurrency):
                amount = amount_of(limit.unit, tokens, images)
                if amount is None:
                    raise ValueError(f"{name} counts {limit.unit}: say tokens=")
                amount = min(max(0, amount), limit.bound)
            parts.append(str(amount))
        return ",".join(parts)

    def actual(self, tokens: Tokens | None, images: int | None) -> str:
        """What a call really used, `-` where it is not known: empty where nothing is to be said."""
        if not self.rates or (tokens is None and images is None):
            return ""
        parts = []
        for limit in self.list:
            amount = None
            if not isinstance(limit, Concurrency) and limit.unit != "requests":
                amount = amount_of(limit.unit, tokens, images)
            parts.append("-" if amount is None else str(max(0, amount)))
        return ",".join(parts)

    def spends(self, amounts: str) -> Mapping[str, int]:
        """What an admission takes of the limits that are not concurrencies. Asked for before one
        of them became a rate it may say nothing of amounts: 1 of each, as the server takes it."""
        if not self.rates:
            return {}
        said = [int(amount) for amount in amounts.split(",")] if amounts else [1] * len(self.list)
        found = zip(self.limits, self.list, said, strict=True)
        return {name: amount for name, limit, amount in found
                if not isinstance(limit, Concurrency)}  # fmt: skip

    def learn(self, took_ms: float) -> None:
        """A call of this flow lasted so long."""
        if self.cost_ms == FIRST_COST_MS:
            self.cost_ms = max(1.0, took_ms)
        else:
            self.cost_ms += (max(1.0, took_ms) - self.cost_ms) * _LEARN

    def whole_ms(self, took_ms: float) -> int:
        """How long a call lasted, in whole ms: what is rounded off counts for the next one."""
        exact_ms = took_ms + self.rest_ms
        whole_ms = max(1, round(exact_ms))
        self.rest_ms = max(-1.0, exact_ms - whole_ms)
        return whole_ms

    def nobody_waits(self) -> None:
        """What was known of its wait is over."""
        self.hint, self.held_up_by, self.room_at_ms = None, None, 0.0

    def first(self) -> Waiter | None:
        """The first waiter whose task has not been cancelled in this very moment."""
        for waiter in self.waiting.values():
            if not waiter.future.done():
                return waiter
        return None

    def next_by_hint(self) -> tuple[int, Waiter | None] | None:
        """The virtual start of the first waiter, and the waiter if a permit of ours may let it in:
        not one that comes too late for that. None where there is no hint, or the place of the
        waiter is not known yet: its tenant keeps its own, and is asked again when it is."""
        hint = self.hint
        waiter = None if hint is None else self.first()
        if hint is None or waiter is None or waiter.stamp == 0:
            return None
        start = hint.tag + (waiter.stamp - hint.head) * hint.step
        return start, waiter if waiter.stamp <= hint.horizon else None


@dataclass(slots=True, eq=False)
class Waiter:
    """A ticket in the queue. `deadline_ms` and `asked_ms` are of the lease's clock; `member` is the
    ticket as the server keeps it; `stamp` its place there, 0 while unknown. `once`: it takes the
    first answer for its last."""

    ticket: int
    flow: Flow
    member: str
    hard_ms: int
    cost_ms: int
    asked_ms: float
    deadline_ms: float
    future: asyncio.Future[Holding]
    once: bool = False
    sent: bool = False
    stamp: int = 0

    @property
    def amounts(self) -> str:
        return self.member.rpartition("|")[2]


@dataclass(slots=True, eq=False)
class Holding:
    """A permit in use. `admitted_ms` is when the server let it in, at the earliest; `on_fence`
    cancels the body that uses it."""

    ticket: int
    flow: Flow
    epoch: int
    seq: int
    cost_ms: int
    held_from_ms: float
    admitted_ms: float
    hard_until_ms: float
    waited_ms: float
    fenced: bool = False
    on_fence: Callable[[], None] | None = None

    def hard_left_ms(self, now_ms: float) -> int:
        return max(1, int(self.hard_until_ms - now_ms))


@dataclass(slots=True)
class Release:
    """A permit given back. `sent` once it has been in a batch, which may have arrived."""

    ticket: int
    flow: Flow
    epoch: int
    seq: int
    outcome: int
    took_ms: int
    actual: str
    sent: bool = False


# Not frozen, as all else of its kind: each call would pay for that.
@dataclass(slots=True)
class Transfer:
    """A permit passed on inside the process: what the server counts under `source` is `heir`'s.
    The call before ended by `outcome` after `took_ms`. Nobody changes it."""

    source: int
    heir: Holding
    member: str
    outcome: int
    took_ms: int


@dataclass(slots=True)
class Batch:
    """What one call of the script carries; kept until it is known to have arrived."""

    joining: bool = False
    held: list[Holding] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    settles: list[tuple[int, str]] = field(default_factory=list)
    cancels: list[tuple[int, Flow | None, str]] = field(default_factory=list)
    enqueues: list[Waiter] = field(default_factory=list)

    def __len__(self) -> int:
        said = len(self.transfers) + len(self.releases) + len(self.settles)
        return said + len(self.cancels) + len(self.enqueues)


@dataclass(slots=True)
class Counts:
    """How often things happened since the start; the tests' and benchmarks' ground."""

    admitted: int = 0
    handed_on: int = 0
    recycled: int = 0
    local: int = 0
    strays: int = 0
    fenced: int = 0


@dataclass(slots=True)
class Traffic:
    """Counts since the start."""

    syncs: int = 0
    failures: int = 0
    pushes: int = 0
    joins: int = 0


MAX_ENTRIES = 500
# Each flow costs the server a look at all of its limits.
OUTBOX_MAX_FLOWS = 15
# A permit that was freed while nobody waits is kept for the next one here no longer than this.
SPARE_MS = 5.0


E = TypeVar("E", Waiter, Release)


def _some(entries: Iterable[E]) -> list[E]:
    """As many as one call may carry, in their order."""
    taken: list[E] = []
    flows: set[Flow] = set()
    for entry in islice(entries, MAX_ENTRIES):
        flows.add(entry.flow)
        if len(flows) > OUTBOX_MAX_FLOWS:
            break
        taken.append(entry)
    return taken


class Outbox:
    """See the module. `urgent` is set by what somebody may be waiting for; `parting` are tickets
    given up or passed on, until the server is known to have heard of it."""

    def __init__(self) -> None:
        self.urgent = False
        self.parting: set[int] = set()
        self._enqueues: dict[int, Waiter] = {}
        self._cancels: list[tuple[int, Flow | None, str]] = []
        self._settles: list[tuple[int, str]] = []
        self._releases: dict[int, Release] = {}
        self._transfers: list[Transfer] = []
        # Permits that were just freed while nobody waited, and since when, by their flow's key: the
        # next one who asks may have them.
        self._spare: dict[str, dict[int, float]] = {}

    def __len__(self) -> int:
        said_back = len(self._releases) + len(self._transfers) + len(self._settles)
        return len(self._enqueues) + len(self._cancels) + said_back

    def enqueue(self, waiter: Waiter) -> None:
        self._enqueues[waiter.ticket] = waiter

    def unqueue(self, ticket: int) -> None:
        """The ticket has not been said, or will not be said again."""
        self._enqueues.pop(ticket, None)

    def cancel(self, ticket: int, flow: Flow | None, member: str) -> None:
        self._cancels.append((ticket, flow, member))
        self.parting.add(ticket)

    def settle(self, ticket: int, actual: str) -> None:
        self._settles.append((ticket, actual))

    def give(self, release: Release, *, spare_since_ms: float | None) -> None:
        """Give a permit back; one that is spare may be taken out again until it is said."""
        self._releases[release.ticket] = release
        if spare_since_ms is not None:
            self._spare.setdefault(release.flow.key, {})[release.ticket] = spare_since_ms

    def take_spare(self, flow: Flow) -> Release | None:
        """A permit of this flow that was freed and not yet said."""
        spare = self._spare.get(flow.key)
        return self._releases.pop(spare.popitem()[0]) if spare else None

    def forget_spare(self) -> None:
        """From now on what was freed stays given back, and is said without delay."""
        if self._spare:
            self._spare.clear()
            self.urgent = self.urgent or len(self._releases) > 0

    def unsent(self) -> list[Release]:
        """Permits given back that nobody has heard of."""
        self._spare.clear()
        return [release for release in self._releases.values() if not release.sent]

    def unsay_releases(self) -> None:
        """Whoever heard of them has forgotten it."""
        for release in self._releases.values():
            release.sent = False

    def keep(self, release: Release) -> None:
        """It was passed on instead."""
        del self._releases[release.ticket]

    def transfer(self, transfer: Transfer) -> None:
        self._transfers.append(transfer)

    # -- batches

    def take(self, now_ms: float = inf) -> Batch:
        """The next batch to send, at most `MAX_ENTRIES` of each sort, of `MAX_FLOWS` flows. What
        has been spare for less than `SPARE_MS` is kept back: many that call again in the same
        moment would each find nothing else."""
        kept = self._fresh(now_ms)
        enqueues = _some(self._enqueues.values())
        for waiter in enqueues:
            waiter.sent = True
            del self._enqueues[waiter.ticket]
        batch = Batch(
            transfers=self._transfers[:MAX_ENTRIES],
            cancels=self._cancels[:MAX_ENTRIES],
            enqueues=enqueues,
        )
        del self._transfers[:MAX_ENTRIES]
        # A permit may only be given back once the server has heard how it came to its holder.
        if not self._transfers:
            said = (one for one in self._releases.values() if one.ticket not in kept)
            batch.releases = _some(said)
        for release in batch.releases:
            release.sent = True
            del self._releases[release.ticket]
        # The usage of a call may only be told once the server has heard that it ended.
        if len(self._releases) == len(kept):
            ready = [one for one in self._settles if one[0] not in kept]
            batch.settles = ready[:MAX_ENTRIES]
            self._settles = ready[MAX_ENTRIES:] + [one for one in self._settles if one[0] in kept]
        del self._cancels[:MAX_ENTRIES]
        held_back = len(kept) + sum(ticket in kept for ticket, _ in self._settles)
        self.urgent = len(self) > held_back
        return batch

    def _fresh(self, now_ms: float) -> set[int]:
        """The permits that are still kept for the next one who asks; the others are no more."""
        if not self._spare:
            return set()
        self._spare = {
            key: fresh
            for key, spare in self._spare.items()
            if (fresh := {one: at for one, at in spare.items() if now_ms - at < SPARE_MS})
        }
        return {ticket for spare in self._spare.values() for ticket in spare}

    def take_join(self, waiting: Mapping[int, Waiter], held: Iterable[Holding]) -> Batch:
        """A batch that tells a server which knows nothing of us all that we hold and wait for.

        The server forgets what it had of this session, so cancels and transfers have no object
        any more; releases still have: the permit may be held over.
        """
        self.parting.difference_update(ticket for ticket, _, _ in self._cancels)
        self.parting.difference_update(t.source for t in self._transfers)
        self._cancels.clear()
        self._transfers.clear()
        self._enqueues = dict(waiting)
        batch = self.take()
        batch.joining = True
        batch.held = list(held)
        return batch

    def confirm(self, batch: Batch) -> None:
        """The server has done what the batch said."""
        self.parting.difference_update(ticket for ticket, _, _ in batch.cancels)
        self.parting.difference_update(release.ticket for release in batch.releases)
        self.parting.difference_update(transfer.source for transfer in batch.transfers)

    def restore(self, batch: Batch, waiting: Mapping[int, Waiter]) -> None:
        """The batch may or may not have arrived."""
        self._transfers[:0] = batch.transfers
        self._releases = {r.ticket: r for r in batch.releases} | self._releases
        self._settles[:0] = batch.settles
        self._cancels[:0] = batch.cancels
        again = {w.ticket: w for w in batch.enqueues if w.ticket in waiting}
        self._enqueues = again | self._enqueues
        self.urgent = True


Lanes = Mapping[tuple[int, tuple[str, ...]], Mapping[str, Flow]]


def _take(left: dict[str, Flow], most: int) -> list[Flow]:
    """The next ones, of those that still wait."""
    if not left:
        return []
    taken = [left.pop(key) for key in list(islice(left, most))]
    return [flow for flow in taken if flow.waiting]


class Rounds:
    """See the module. In one round the server looks whether anybody could be admitted under the
    limits of a flow; in the other it says which of the first tickets of a flow it has admitted
    already: the news of that may have been lost. It admits each flow's in their order. `looks` and
    `asks` are the flows that are still to come, by their key."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self.looks: dict[str, Flow] = {}
        self.asks: dict[str, Flow] = {}

    def begin(self) -> None:
        """Another round of both."""
        for lane in self._lanes.values():
            self.looks |= lane
            self.asks |= lane

    def flows_to_look_at(self, most: int) -> list[Flow]:
        return _take(self.looks, most)

    def tickets_to_ask_after(self, most: int) -> list[int]:
        """The first tickets of the next flows: the fewer flows there are, the more of each."""
        each = max(1, most // max(1, len(self.asks)))
        return [
            waiter.ticket
            for flow in _take(self.asks, most)
            for waiter in islice(flow.waiting.values(), each)
            if waiter.sent
        ]

    def ask_again(self, flow: Flow) -> None:
        """One of its tickets was admitted: perhaps the next one too."""
        self.asks[flow.key] = flow


# Fences of one permit that is passed on inside a process; the server's are this far apart.
CHAIN = 1000
MAX_FLOWS = 10_000


def _count_down(counter: Counter[str], names: Iterable[str]) -> None:
    for name in names:
        left = counter[name] - 1
        if left:
            counter[name] = left
        else:
            del counter[name]


def _new_future() -> asyncio.Future[Holding]:
    return asyncio.get_running_loop().create_future()


class Ledger:
    """See the module. `recycling` is set while a freed permit may be passed on in the process
    whatever the server says, since it says nothing; `idle` while nobody waits in the whole pool.
    """

    def __init__(self, new_future: Callable[[], asyncio.Future[Holding]] | None = None) -> None:
        self._new_future = new_future or _new_future
        self.waiting: dict[int, Waiter] = {}
        self.held: dict[int, Holding] = {}
        self.held_of: Counter[str] = Counter()  # by limit, without those that have none
        self.waiting_of: Counter[str] = Counter()
        self.spent_since: Counter[str] = Counter()
        self.counts = Counts()
        self.recycling = False
        self.idle = False
        self.outbox = Outbox()
        self._tickets = count(1)
        self._flows: dict[tuple[int, str, tuple[str, ...]], Flow] = {}
        self._lanes: dict[tuple[int, tuple[str, ...]], dict[str, Flow]] = {}
        self._local_tags: Counter[str] = Counter()
        # Those that the last request asked hints for, and those that have one.
        self._wanting, self._hinted = list[Flow](), list[Flow]()
        self.rounds = Rounds(self._lanes)

    def __repr__(self) -> str:
        counts = f"waiting={len(self.waiting)} held={len(self.held)} unsaid={len(self.outbox)}"
        return f"<Ledger {counts}>"

    def flow(self, band: int, tenant: str, limits: tuple[str, ...]) -> Flow:
        """The flow of that name, one object for all that ask for it."""
        name = (band, tenant, limits)
        flow = self._flows.get(name)
        if flow is None:
            if len(self._flows) >= MAX_FLOWS:
                self._flows = {n: f for n, f in self._flows.items() if f.waiting or f.held}
            flow = self._flows[name] = Flow(band, tenant, limits)
        return flow

    def longest_queues(self, most: int) -> list[Flow]:
        """The flows with the most waiters here."""
        flows = (flow for lane in self._lanes.values() for flow in lane.values())
        return nlargest(most, flows, key=lambda flow: len(flow.waiting))

    # -- waiting

    def ask(
        self,
        flow: Flow,
        *,
        amounts: str = "",
        hard_ms: int,
        now_ms: float,
        deadline_ms: float,
        once: bool = False,
    ) -> Waiter:
        """A new waiter at the end of its flow; let in at once by a permit that is spare."""
        ticket, cost_ms = next(self._tickets), round(flow.cost_ms)
        member = f"{ticket}|{hard_ms}|{cost_ms}|{amounts}"
        waiter = Waiter(
            ticket, flow, member, hard_ms, cost_ms, now_ms, deadline_ms, self._new_future(), once
        )
        if not flow.waiting and self._take_spare(waiter, now_ms):
            return waiter
        if self.idle or not flow.waiting:
            self.outbox.urgent = True
        self.waiting[ticket] = waiter
        if not flow.waiting:
            self._lanes.setdefault(flow.lane, {})[flow.key] = flow
        flow.waiting[ticket] = waiter
        for name in flow.limits:
            self.waiting_of[name] += 1
        self.outbox.enqueue(waiter)
        return waiter

    def _take_spare(self, waiter: Waiter, now_ms: float) -> bool:
        release = self.outbox.take_spare(waiter.flow) if self.idle else None
        if release is None:
            return False
        heir = self._hold(waiter, release.epoch, release.seq + 1, now_ms)
        self.outbox.transfer(Transfer(release.ticket, heir, "", release.outcome, release.took_ms))
        self.counts.handed_on += 1
        return True

    def abandon(self, ticket: int, now_ms: float) -> None:
        """The waiter gave up. A grant that reached it already, or crosses this, is given back."""
        waiter = self._forget(ticket)
        if waiter is None:
            if ticket in self.held:
                self.release(ticket, outcome="ignored", actual="", now_ms=now_ms)
        elif waiter.sent:
            self.outbox.cancel(ticket, waiter.flow, waiter.member)

    def _forget(self, ticket: int) -> Waiter | None:
        waiter = self.waiting.pop(ticket, None)
        if waiter is not None:
            flow = waiter.flow
            del flow.waiting[ticket]
            _count_down(self.waiting_of, flow.limits)
            if not flow.waiting:
                flow.nobody_waits()
                lane = self._lanes[flow.lane]
                del lane[flow.key]
                if not lane:
                    del self._lanes[flow.lane]
            self.outbox.unqueue(ticket)
        return waiter

    def refuse(self, waiter: Waiter, error: Exception, now_ms: float) -> None:
        """End a wait with an error."""
        self.abandon(waiter.ticket, now_ms)
        if not waiter.future.done():
            waiter.future.set_exception(error)

    def refused(self, ticket: int) -> Waiter | None:
        """The server did not take a ticket: it is in no queue."""
        return self._forget(ticket)

    # -- giving back and passing on

    def release(
        self, ticket: int, *, outcome: str, actual: str, now_ms: float, usage_later: bool = False
    ) -> None:
        """Give a permit back, or pass it on to the next waiter here where that is fair."""
        holding = self.held.pop(ticket, None)
        if holding is None:
            return
        flow = holding.flow
        flow.held -= 1
        _count_down(self.held_of, flow.limits)
        took_ms = now_ms - holding.held_from_ms
        if outcome == "success":
            flow.learn(took_ms)
        said_ms = flow.whole_ms(took_ms)
        later = USAGE_LATER if usage_later else 0
        release = Release(
            ticket, flow, holding.epoch, holding.seq, OUTCOMES[outcome] + later, said_ms, actual
        )
        self.outbox.parting.add(ticket)
        if holding.fenced or not self._pass_on(release, now_ms):
            chain_goes_on = flow.plain and release.seq % CHAIN < CHAIN - 1
            spare = self.idle and chain_goes_on and not holding.fenced
            self.outbox.give(release, spare_since_ms=now_ms if spare else None)
            if not self.idle:
                self.outbox.urgent = True

    def _pass_on(self, release: Release, now_ms: float) -> bool:
        flow, heir = release.flow, None
        if release.seq % CHAIN < CHAIN - 1:  # else its fence would be the next permit's
            if self.recycling:
                heir = self._next_anyhow(flow)
            elif flow.plain:
                heir = self._next_by_hint(flow.lane)
        if heir is None:
            return False
        holding = self._hold(heir, release.epoch, release.seq + 1, now_ms)
        member = heir.member if heir.sent else ""  # in no queue yet
        self.outbox.transfer(
            Transfer(release.ticket, holding, member, release.outcome, release.took_ms)
        )
        if self.recycling:
            self.counts.recycled += 1
        else:
            self.counts.handed_on += 1
            # The last one that we know of: ask who comes next.
            if self._next_by_hint(flow.lane) is None:
                self.outbox.urgent = True
        return True

    def _next_by_hint(self, lane: tuple[int, tuple[str, ...]]) -> Waiter | None:
        """Whose turn it is; nobody is passed over whom only the server can let in."""
        best: tuple[int, Waiter | None] | None = None
        for flow in self._lanes.get(lane, {}).values():
            found = flow.next_by_hint()
            if found is not None and (best is None or found[0] < best[0]):
                best = found
        return best[1] if best else None

    def _next_anyhow(self, flow: Flow) -> Waiter | None:
        """Nobody can be asked: the fair order among our own waiters for the same limits."""
        if flow.rates:
            return None
        found = [
            (other.band, self._local_tags[other.tenant], waiter.asked_ms, waiter.ticket, waiter)
            for (_, limits), lane in self._lanes.items()
            if limits == flow.limits
            for other in lane.values()
            if (waiter := other.first()) is not None
        ]
        if not found:
            return None
        waiter = min(found)[4]
        chosen = waiter.flow
        self._local_tags[chosen.tenant] += waiter.cost_ms * VIRTUAL_UNITS // chosen.weight
        return waiter

    def recycle_unsent(self, now_ms: float) -> None:
        """Valkey is away: pass on what was freed but never said."""
        for release in self.outbox.unsent():
            if self._pass_on(release, now_ms):
                self.outbox.keep(release)

    def recycle_forgotten(self, now_ms: float) -> None:
        """The server lost its past: what it may have heard of counts as never said."""
        self.outbox.unsay_releases()
        self.recycle_unsent(now_ms)

    def start_recycling(self) -> None:
        """From now on the order of waiters is ours."""
        if not self.recycling:
            self._local_tags.clear()
        self.recycling = True

    def note_idle(self, idle: bool) -> None:
        """Whether anybody waits in the whole pool, as the server says."""
        self.idle = idle
        if not idle:
            self.outbox.forget_spare()

    def settle_later(self, ticket: int, actual: str) -> None:
        """The usage of a call whose permit was given back as `usage_later`."""
        self.outbox.settle(ticket, actual)

    # -- being let in

    def admit_locally(self, allows: Callable[[Waiter], bool], epoch: int, now_ms: float) -> None:
        """Valkey is away for longer than the lease: let in whom `allows` lets."""
        flows = [flow for lane in self._lanes.values() for flow in lane.values()]
        for flow in sorted(flows, key=lambda flow: flow.band):
            while (waiter := flow.first()) is not None and allows(waiter):
                self._hold(waiter, epoch, 0, now_ms)
                self.counts.local += 1

    def grant(
        self, ticket: int, epoch: int, seq: int, now_ms: float, admitted_ms: float | None = None
    ) -> None:
        """The server let a ticket in, not before `admitted_ms`. One that nobody waits for any more
        is given back."""
        waiter = self.waiting.get(ticket)
        if waiter is not None:
            self._hold(waiter, epoch, seq, now_ms, admitted_ms)
            return
        if ticket not in self.held and ticket not in self.outbox.parting:
            self.counts.strays += 1
            self.outbox.cancel(ticket, None, "")
        # Else it was let in here in the same moment: the server's permit is free when it hears so.
        self.outbox.urgent = True

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
            waiter.cost_ms,
            now_ms,
            now_ms if admitted_ms is None else admitted_ms,
            now_ms + waiter.hard_ms,
            now_ms - waiter.asked_ms,
        )
        self.held[waiter.ticket] = holding
        flow.held += 1
        for name in flow.limits:
            self.held_of[name] += 1
        if flow.rates:
            self.spent_since.update(flow.spends(waiter.amounts))
        self.counts.admitted += 1
        # A future that is done belongs to a task that is being cancelled: it will abandon.
        if not waiter.future.done():
            waiter.future.set_result(holding)
        return holding

    def stamp(self, waiters: Iterable[Waiter], stamps: Iterable[int]) -> None:
        """Where the server put the tickets of a batch."""
        for waiter, stamp in zip(waiters, stamps, strict=False):
            waiter.stamp = stamp

    def fence(self) -> int:
        """Our session is gone: cancel every body. They stay in the ledger until they have ended."""
        fenced = [holding for holding in self.held.values() if not holding.fenced]
        for holding in fenced:
            holding.fenced = True
            if holding.on_fence is not None:
                holding.on_fence()
        self.counts.fenced += len(fenced)
        self.outbox.forget_spare()
        return len(fenced)

    # -- batches

    def flows_to_hint(self, most: int) -> list[Flow]:
        """Flows that wait for what this process holds permits of, of those that may hand on."""
        held = {holding.flow.lane for holding in self.held.values() if holding.flow.plain}
        lanes = (self._lanes[lane] for lane in held if lane in self._lanes)
        self._wanting = list(islice((flow for lane in lanes for flow in lane.values()), most))
        return self._wanting

    def rounds_of(self, *, begin: bool) -> Rounds:
        """The rounds through all that waits; `begin` another."""
        if begin:
            self.rounds.begin()
        return self.rounds

    def take_hints(self, hints: Mapping[str, Hint]) -> None:
        """What the server lets us pass on from now on, of what `flows_to_hint` named last, by the
        key of the flow; nothing else."""
        for flow in self._hinted:
            flow.hint = None
        self._hinted = [flow for flow in self._wanting if flow.key in hints and flow.waiting]
        for flow in self._hinted:
            flow.hint = hints[flow.key]

    def drop_hints(self) -> None:
        self.take_hints({})

    def take(self, now_ms: float = inf) -> Batch:
        """The next batch to send."""
        return self.outbox.take(now_ms)

    def take_join(self) -> Batch:
        """The batch of a session that joins."""
        self.drop_hints()
        return self.outbox.take_join(self.waiting, self.held.values())

    def restore(self, batch: Batch) -> None:
        """The batch may or may not have arrived: say it again, before anything newer."""
        self.outbox.restore(batch, self.waiting)

    def reconcile(
        self,
        held: Iterable[tuple[int, int, int]],
        epoch: int,
        now_ms: float,
        here: Callable[[float], float],
        told: Collection[str] | None = None,
    ) -> None:
        """Take what the server says we hold, of the tickets asked after: grants whose push was
        lost, or is still to be read. `here` tells a moment of the server's by our clock, at the
        earliest. What we spent until now is in what it told: of the limits `told`, or of all."""
        for ticket, seq, until_ms in held:
            if ticket in self.held or ticket in self.outbox.parting:
                continue
            waiter = self.waiting.get(ticket)
            admitted_ms = here(until_ms - waiter.hard_ms) if waiter else None
            self.grant(ticket, epoch, seq, now_ms, admitted_ms)
            if waiter is not None and waiter.flow.waiting:
                self.rounds.ask_again(waiter.flow)
        if told is None:
            self.spent_since.clear()
        else:
            for name in told:
                self.spent_since.pop(name, None)


# Not frozen, as all else of its kind: each call would pay for that.
@dataclass(slots=True)
class Demand:
    """All of `limits` or none; nobody changes it.

    tenant: whose share it is. priority: the name of a band, None for the usual one. tokens, images:
    an estimate, for limits that count them. deadline_ms: how long it may wait, None for as long as
    needed. hard_ms: the longest that the call can last. once: take the first answer for the last.
    implicit: limits that the policy does not name are allowed where their scope is implicit; a
    misspelt name would otherwise be a limit without a bound.
    """

    limits: tuple[str, ...]
    tenant: str = "default"
    priority: str | None = None
    tokens: Tokens | None = None
    images: int = 0
    deadline_ms: int | None = None
    hard_ms: int = DEFAULT_HARD_MS
    once: bool = False
    implicit: bool = False
