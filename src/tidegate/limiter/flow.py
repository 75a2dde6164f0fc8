"""Flows of a process: their waiters and permits, and the fields of a request. Pure.

A flow is a band, a tenant and a set of limits: its waiters are interchangeable except for their
deadlines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import islice
from math import ceil, inf

from tidegate.errors import DemandImpossible
from tidegate.limiter.messages import Hint, format_unit
from tidegate.limiter.policy import (
    CALL_USE,
    MAX_BOUND,
    TENANT_NAME,
    UNKNOWN_USE,
    CallUse,
    Concurrency,
    Demand,
    FairBy,
    Limit,
    PoolPolicy,
    Quota,
    Rate,
    Tokens,
    amount_in_flight,
    amount_of,
    amount_to_reserve,
    check_tenant,
    implicit_limit,
    unknown_limit,
    use_by_cost,
    whole,
)

_UNKNOWN = CallUse()
# Assumed duration of a call before the first one of its flow has ended.
FIRST_COST_MS = 1000.0
_LEARN = 1 / 8
# Units of virtual time for one ms (or micro-dollar) of use by a tenant of weight 1.
VIRTUAL_UNITS = 100_000
# A call without a deadline is due this long after it came.
DUE_AFTER_MS = 600_000


def flow_of(band: int, tenant: str, limits: tuple[str, ...]) -> str:
    """Return the name of a flow; `band` counts from 1, the highest."""
    return f"{band}|{tenant}|{' '.join(limits)}"


@dataclass(slots=True, eq=False, repr=False)
class Flow:
    """A flow: its waiters, its permits and what is known of its calls.

    Set from the policy by `refresh`:

    quotas: (limit, zone). rates: whether any limit is not a concurrency limit. sized: whether calls
    take different amounts of any. by_latency: whether any adapts by latency. plain: whether its
    permits may be passed on in the process. slack_ms: how much later than admitted its calls may be
    sent. firm: limits that get nothing back when calls end, unless the server knows that itself.
    unnamed: the first limit that is not in the policy. fair_by: the measure of shares.

    Learned from calls and replies:

    cost_ms: the duration of its calls. cost: their cost in micro-dollars, if shares are in cost.
    rest_ms: the rounding error of the last duration. held_up_by: the limit that it waits for, of
    which `used` is used. room_at_ms: when there is room for its first waiter, 0 if unknown;
    is_room_certain: neither earlier nor later. hint: which permits may be passed on to it.
    """

    band: int
    tenant: str
    limits: tuple[str, ...]
    key: str = field(init=False)
    # Permits may be passed on between flows of the same lane.
    lane: tuple[int, tuple[str, ...]] = field(init=False)
    waiting: dict[int, Waiter] = field(default_factory=dict)
    held: int = 0
    dues: int = 0
    cost_ms: float = FIRST_COST_MS
    cost: float = UNKNOWN_USE
    rest_ms: float = 0.0
    hint: Hint | None = None
    held_up_by: str | None = None
    room_at_ms: float = 0.0
    is_room_certain: bool = False
    used: int = 0
    revision: int = -1
    rules: tuple[Limit, ...] = ()
    rates: bool = False
    sized: bool = False
    by_latency: bool = False
    plain: bool = False
    quotas: tuple[tuple[str, str], ...] = ()
    firm: tuple[str, ...] = ()
    slack_ms: float = inf
    unnamed: str | None = None
    weight: int = 1
    fair_by: FairBy = "seconds"

    def __post_init__(self) -> None:
        self.key = flow_of(self.band, self.tenant, self.limits)
        self.lane = (self.band, self.limits)

    def __repr__(self) -> str:
        return f"<Flow {self.key} waiting={len(self.waiting)} held={self.held}>"

    def refresh(self, policy: PoolPolicy, pool: str = "") -> None:
        """Read the policy.

        Raises DemandImpossible for a limit that admits no call, and ConfigError for an invalid
        tenant name.
        """
        if not isinstance(self.tenant, str) or not TENANT_NAME.fullmatch(self.tenant):
            check_tenant(self.tenant)
        rules: list[Limit] = []
        rated: dict[str, Rate | Quota] = {}
        self.unnamed = None
        self.plain, self.sized, self.by_latency = policy.hand_off, False, False
        for name in self.limits:
            limit = policy.rules.get(name)
            if limit is None:
                self.unnamed = self.unnamed or name
                limit = implicit_limit(name)
            if limit is None:
                raise DemandImpossible(unknown_limit(name, policy, pool), limit=name)
            if limit.bound == 0 and not limit.shadow:
                raise DemandImpossible(f"limit {name!r} is 0: it admits no call", limit=name)
            rules.append(limit)
            if not isinstance(limit, Concurrency):
                rated[name] = limit
                self.plain, self.sized = False, True
                continue
            if limit.unit != "calls":
                self.plain, self.sized = False, True
            if limit.adaptive is not None:
                self.plain = False
                self.by_latency = self.by_latency or limit.adaptive.by == "latency"
        self.rules = tuple(rules)
        self.rates = bool(rated)
        self.quotas = tuple((n, q.zone) for n, q in rated.items() if isinstance(q, Quota))
        self.firm = tuple(
            name
            for name, limit in rated.items()
            if limit.unit == "requests" and not (isinstance(limit, Rate) and limit.exact)
        )
        slacks = [limit.slack for limit in rated.values() if isinstance(limit, Rate)]
        self.slack_ms = min(slacks, default=inf)
        self.weight = policy.weights.get(self.tenant, 1)
        self.fair_by = policy.fair_by
        self.revision = policy.revision

    def amounts(self, demand: Demand) -> str:
        """Return what one call takes of each limit, in the wire format: "" for 1 of each.

        Amounts are clamped to the bound of the limit, in shadow mode to the largest possible bound:
        clients choose their bounds, and Lua counts exactly only up to 2^53. Raises ValueError if a
        limit counts something that the demand does not state, TypeError if that is not whole, and
        DemandImpossible for more tokens than may ever be in flight.
        """
        if not self.sized:
            return ""
        parts = []
        for name, limit in zip(self.limits, self.rules, strict=True):
            if isinstance(limit, Concurrency):
                amount = amount_in_flight(limit, demand)
            else:
                amount = amount_to_reserve(limit, demand)
            if amount is None:
                option = "cost_micros=" if limit.unit == "usd" else "tokens="
                raise ValueError(f"{name} counts {limit.unit}: say {option}")
            if type(amount) is not int:
                amount = whole(limit.unit, amount)
            if isinstance(limit, Concurrency):
                _check_in_flight(name, limit, amount)
            parts.append(str(max(0, min(amount, MAX_BOUND if limit.shadow else limit.bound))))
        return ",".join(parts)

    def check_amounts(self, amounts: str) -> None:
        """Raise DemandImpossible if a ticket takes more than may ever be in flight."""
        for name, limit, amount in self.taken(amounts):
            if isinstance(limit, Concurrency):
                _check_in_flight(name, limit, amount)

    def amount_under(self, name: str, amounts: str) -> int:
        """Return what a ticket takes of a limit."""
        return next((amount for one, _, amount in self.taken(amounts) if one == name), 1)

    def taken(self, amounts: str) -> list[tuple[str, Limit, int]]:
        """Return what a ticket takes of each limit.

        A ticket from before a change of the policy may have no amounts, or amounts where the limits
        now count calls: it takes 1 of each then, as on the server.
        """
        values = (
            [int(amount) for amount in amounts.split(",")] if amounts else [1] * len(self.rules)
        )
        return [
            (name, limit, 1 if isinstance(limit, Concurrency) and not limit.by_tokens else amount)
            for name, limit, amount in zip(self.limits, self.rules, values, strict=True)
        ]

    def actual(self, used: CallUse) -> str:
        """Return what a call used, `-` where unknown or not settled; "" if there is nothing to
        say.
        """
        if not self.rates or used == _UNKNOWN:
            return ""
        parts = []
        for limit in self.rules:
            amount = None
            if not isinstance(limit, Concurrency) and limit.settles and limit.unit != "requests":
                amount = amount_of(limit, used)
            parts.append("-" if amount is None else str(max(0, amount)))
        return ",".join(parts)

    def first_of(self, used: CallUse) -> tuple[int, int] | None:
        """Return the time to a call's first token, and the tokens that had to be read for it.

        None if the time is unknown or no limit adapts by it.
        """
        if not self.by_latency or used.first_ms is None:
            return None
        tokens = used.tokens or Tokens()
        return max(1, round(used.first_ms)), max(0, tokens.input - tokens.cached)

    def spends(self, amounts: str) -> Mapping[str, int]:
        """Return what an admission takes of the limits that are not concurrency limits."""
        if not self.rates:
            return {}
        taken = self.taken(amounts)
        return {name: each for name, limit, each in taken if not isinstance(limit, Concurrency)}

    @property
    def usual_use(self) -> int:
        """The probable use of one of its calls, in the measure of shares."""
        if self.fair_by == "seconds":
            return round(self.cost_ms)
        return CALL_USE if self.fair_by == "calls" else round(self.cost)

    def use_of(self, demand: Demand) -> int:
        """Return the probable use of a call."""
        if self.fair_by == "cost":
            use = use_by_cost(demand) or UNKNOWN_USE
            self.cost += (use - self.cost) * _LEARN
            return use
        return self.usual_use

    def cost_of(self, used: CallUse) -> int | None:
        """Return the cost of a call, if shares are measured in it; None if unknown."""
        return use_by_cost(used) if self.fair_by == "cost" else None

    def learn(self, took_ms: float) -> None:
        """Update the duration of calls by one that took `took_ms`."""
        if self.cost_ms == FIRST_COST_MS:
            self.cost_ms = max(1.0, took_ms)
        else:
            self.cost_ms += (max(1.0, took_ms) - self.cost_ms) * _LEARN

    def whole_ms(self, took_ms: float) -> int:
        """Return a duration in whole ms; the rounding error is carried over to the next one."""
        exact_ms = took_ms + self.rest_ms
        whole_ms = max(1, round(exact_ms))
        self.rest_ms = max(-1.0, exact_ms - whole_ms)
        return whole_ms

    def first(self) -> Waiter | None:
        """Return the first waiter whose task is not being cancelled at this moment."""
        for waiter in self.waiting.values():
            if not waiter.future.done():
                return waiter
        return None

    def first_due(self) -> Waiter | None:
        """Return the first waiter by deadline, for use without an order from the server."""
        if not self.dues:
            return self.first()
        waiting = (one for one in self.waiting.values() if not one.future.done())
        return min(waiting, key=lambda one: one.due_at_ms, default=None)

    def next_ones(self, most: int) -> Iterable[Waiter]:
        """Return the first waiters in the order of the server's stamps."""
        waiting = self.waiting.values()
        return nsmallest(most, waiting, key=_stamp_of) if self.dues else islice(waiting, most)

    def next_by_hint(self) -> tuple[float, Waiter | None] | None:
        """Return the virtual start of the first waiter, and the waiter if the hint allows it.

        None without a hint, or if the waiter has no stamp yet; no permit is then passed to the
        flow.
        """
        hint = self.hint
        waiter = None if hint is None else self.first()
        if hint is None or waiter is None or waiter.stamp == 0:
            return None
        start = hint.tag + (waiter.stamp - hint.head) * hint.step
        return start, waiter if waiter.stamp <= hint.horizon else None


@dataclass(slots=True, eq=False)
class Waiter:
    """A ticket in the queue.

    use: its probable use. deadline_ms, requested_ms: by the lease's clock. member: the ticket as
    the server stores it. stamp: its place there, 0 while unknown. once: it takes the first answer
    as final. by_estimate: it is refused early if an estimate says by a clear margin that it would
    not be admitted before its deadline. due: its deadline puts it before others of its tenant.
    """

    ticket: int
    flow: Flow
    member: str
    hard_ms: int
    use: int
    requested_ms: float
    deadline_ms: float
    future: asyncio.Future[Holding]
    once: bool = False
    by_estimate: bool = False
    due: bool = False
    sent: bool = False
    stamp: float = 0

    @property
    def due_at_ms(self) -> float:
        """The sort key of a flow's waiters."""
        return self.deadline_ms if self.due else self.requested_ms + DUE_AFTER_MS

    @property
    def amounts(self) -> str:
        return self.member.rpartition("|")[2]


def _check_in_flight(name: str, limit: Concurrency, amount: int) -> None:
    if amount > limit.bound and not limit.shadow:
        most = f"{limit.bound} {format_unit(limit)}"
        message = f"limit {name!r} admits {most} at a time: this call alone has up to {amount}"
        raise DemandImpossible(message, limit=name)


def _stamp_of(waiter: Waiter) -> float:
    return waiter.stamp


@dataclass(slots=True, eq=False)
class Holding:
    """A permit in use.

    use: its probable use, 0 if that is in another measure than shares are now. amounts: what it
    takes of each limit, "" for 1. admitted_ms: when the server admitted it, at the earliest.
    on_fence: cancels the body that uses it.
    """

    ticket: int
    flow: Flow
    epoch: int
    seq: int
    use: int
    held_from_ms: float
    admitted_ms: float
    hard_until_ms: float
    waited_ms: float
    amounts: str = ""
    fenced: bool = False
    on_fence: Callable[[], None] | None = None

    def hard_left_ms(self, now_ms: float) -> int:
        return max(1, int(self.hard_until_ms - now_ms))


@dataclass(slots=True)
class Release:
    """A released permit.

    use: the cost of the call, if known and the measure of shares. first: the time to its first
    token, and the tokens that had to be read, if a limit adapts by it. sent: it has been in a
    batch, which may have arrived. holding: the permit.
    """

    ticket: int
    flow: Flow
    epoch: int
    seq: int
    outcome: int
    took_ms: int
    actual: str
    use: int | None = None
    sent: bool = False
    first: tuple[int, int] | None = None
    holding: Holding | None = None


# Not frozen, unlike similar classes: one is created per call, and frozen ones cost more.
@dataclass(slots=True)
class Transfer:
    """A permit passed on inside the process: from the ticket `source` to `heir`. Never changed.

    The call before ended by `outcome` after `took_ms`, and used `use`.
    """

    source: int
    heir: Holding
    member: str
    outcome: int
    took_ms: int
    use: int | None = None


@dataclass(slots=True)
class MessageBatch:
    """The messages of one call of the script, kept until they are known to have arrived."""

    joining: bool = False
    held: list[Holding] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    settles: list[tuple[int, str]] = field(default_factory=list)
    cancels: list[tuple[int, Flow | None, str]] = field(default_factory=list)
    enqueues: list[Waiter] = field(default_factory=list)

    def __len__(self) -> int:
        count = len(self.transfers) + len(self.releases) + len(self.settles)
        return count + len(self.cancels) + len(self.enqueues)

    def uses(self) -> list[tuple[int, int]]:
        """Return the known costs of the calls that ended."""
        passed = [(one.source, one.use) for one in self.transfers if one.use is not None]
        return passed + [(one.ticket, one.use) for one in self.releases if one.use is not None]

    def firsts(self) -> list[tuple[int, int, int]]:
        """Return the known times to first tokens of the calls that ended."""
        return [(one.ticket, *one.first) for one in self.releases if one.first is not None]

    def dues(self, at_ms: float) -> list[int]:
        """Return the time to each enqueue's deadline, 0 without one; empty if all are 0."""
        dues = [max(1, ceil(w.deadline_ms - at_ms)) if w.due else 0 for w in self.enqueues]
        return dues if any(dues) else []

    def stamps(self) -> list[float]:
        """Return each enqueue's stamp from before the session joined again; empty if all are 0."""
        stamps = [w.stamp for w in self.enqueues]
        return stamps if any(stamps) else []

    def lefts(self, at_ms: float, *, pauses: bool) -> list[int]:
        """Return how long each enqueue may wait; empty if all are 0.

        Set if time alone may delay its turn, or if an estimate may refuse it; negative if none may.
        """
        lefts = [
            max(1, ceil(w.deadline_ms - at_ms)) * (1 if w.by_estimate else -1)
            if (w.flow.rates or pauses or w.by_estimate) and w.deadline_ms != inf and not w.once
            else 0
            for w in self.enqueues
        ]
        return lefts if any(lefts) else []
