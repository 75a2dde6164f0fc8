"""Report of a rehearsal: waits, shares, refusals, utilisation, the binding limit. Pure.

Invariant: each call counts once in its group; a figure without data is None, never 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, NamedTuple, TypeVar, cast

from tidegate.admission.demand import CallDemand
from tidegate.call import Tier
from tidegate.checker import Event, What, shares
from tidegate.limiter import CallUse, Concurrency, PoolPolicy, Rate, as_limit, format_span
from tidegate.limiter.simulation import PoolModel, Waiter, amount_of
from tidegate.policy.format import in_words
from tidegate.prices.budgets import Unit, amount_text
from tidegate.prices.rates import dollars
from tidegate.rehearse.budgets import BudgetOutcome
from tidegate.rehearse.load import Arrival

T = TypeVar("T")


class LostRun(NamedTuple):
    """A run of a call that ended without an answer.

    why: the call gave way to a higher band, flex had no capacity (`busy`), or flex took too long.
    """

    asked_ms: float
    began_ms: float
    ended_ms: float
    why: Literal["gave way", "busy", "given up"]


@dataclass(slots=True, eq=False)
class LoadCall:
    """One call of a load.

    initial: the call as it arrived. arrival: the call with the model that it is made with. refused:
    the code of the refusal. at: the limit that blocked it then. due_ms: the latest admission, for a
    job its due time. lost: its runs without an answer. tier: of a job that allows tiers. made: the
    call at the cost of the usual tier, once the budgets admitted it. All other fields describe its
    last run.
    """

    initial: Arrival
    arrival: Arrival
    asked_ms: float
    limits: tuple[str, ...]
    demand: CallDemand | None = None
    waiter: Waiter | None = None
    began_ms: float | None = None
    ended_ms: float | None = None
    amounts: str = ""
    refused: str | None = None
    at: str | None = None
    due_ms: float | None = None
    lost: list[LostRun] = field(default_factory=list)
    tier: Tier | None = None
    made: Arrival | None = None
    is_late: bool = False

    @property
    def gave_way(self) -> int:
        return sum(one.why == "gave way" for one in self.lost)

    @property
    def waited_ms(self) -> float:
        return 0.0 if self.began_ms is None else self.began_ms - self.asked_ms

    @property
    def queued(self) -> bool:
        """Whether the call was not admitted on arrival."""
        return self.waiter is not None and self.waiter.stamp > 0


@dataclass(frozen=True, slots=True)
class Sample:
    """The pool at one moment: use by limit, and waiters by tenant and by blocking limit."""

    at_ms: float
    used: Mapping[str, int]
    waiting: Mapping[str, int]
    held_up: Mapping[str, int]


@dataclass(slots=True)
class Use:
    """Utilisation of one limit while the load lasted.

    area: open calls (or their tokens) times ms, or the amount used of a rate.
    """

    open: int = 0
    peak: int = 0
    area: float = 0.0
    since_ms: float = 0.0


def _in_flight(limit: Concurrency, name: str, call: LoadCall) -> int:
    """Return how much of a concurrency limit a call takes while it is open."""
    if not limit.by_tokens or not call.amounts:
        return 1
    return int(call.amounts.split(",")[sorted(call.limits).index(name)])


@dataclass(slots=True)
class LoadTally:
    """The results of one rehearsed policy, collected while it runs."""

    policy: PoolPolicy
    span_ms: float = 0.0
    since_ms: float = 0.0
    end_ms: float = 0.0
    calls: list[LoadCall] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    uses: dict[str, Use] = field(default_factory=dict)
    budgets: list[BudgetOutcome] = field(default_factory=list)

    def begin(self, span_ms: float) -> None:
        """Begin the load, which lasts `span_ms`."""
        self.span_ms = span_ms
        self.uses = {name: Use() for name in self.policy.limits}

    def end(self, now_ms: float) -> None:
        self.end_ms = now_ms - self.since_ms
        for use in self.uses.values():
            self._to(use, self.end_ms)

    def asked(self, call: LoadCall) -> None:
        call.asked_ms -= self.since_ms
        self.calls.append(call)

    def refused(self, call: LoadCall, now_ms: float, code: str, at: str | None) -> None:
        call.refused, call.at = code, at
        call.ended_ms = now_ms - self.since_ms

    def began(self, call: LoadCall, now_ms: float) -> None:
        call.began_ms = now_ms - self.since_ms
        arrival = call.arrival
        for name in call.limits:
            use, limit = self.uses[name], self.policy.rules[name]
            if isinstance(limit, Concurrency):
                self._to(use, call.began_ms)
                use.open += _in_flight(limit, name, call)
                use.peak = max(use.peak, use.open)
            elif call.began_ms <= self.span_ms:
                use.area += amount_of(limit, arrival.use) or 0

    def ended(self, call: LoadCall, now_ms: float) -> None:
        call.ended_ms = now_ms - self.since_ms
        call.is_late = call.due_ms is not None and now_ms > call.due_ms
        for name in call.limits:
            limit = self.policy.rules[name]
            if isinstance(limit, Concurrency):
                use = self.uses[name]
                self._to(use, call.ended_ms)
                use.open -= _in_flight(limit, name, call)

    def lost(
        self,
        call: LoadCall,
        now_ms: float,
        cut: CallUse,
        why: Literal["gave way", "busy", "given up"],
    ) -> None:
        """Record a run that ended without an answer; `cut`: what it used of limits."""
        assert call.began_ms is not None
        use_of_whole, began_ms = call.arrival.use, call.began_ms
        self.ended(call, now_ms)
        assert call.ended_ms is not None
        for name in call.limits:
            limit = self.policy.rules[name]
            if not isinstance(limit, Concurrency) and began_ms <= self.span_ms:
                unused = (amount_of(limit, use_of_whole) or 0) - (amount_of(limit, cut) or 0)
                self.uses[name].area -= unused
        queued_ms = call.lost[-1].ended_ms if call.lost else call.asked_ms
        call.lost.append(LostRun(queued_ms, began_ms, call.ended_ms, why))
        call.began_ms = call.ended_ms = call.waiter = None

    def left(self, call: LoadCall, now_ms: float) -> None:
        """Record that a job left the queue for flex before it began."""
        at_ms = now_ms - self.since_ms
        queued_ms = call.lost[-1].ended_ms if call.lost else call.asked_ms
        call.lost.append(LostRun(queued_ms, at_ms, at_ms, "given up"))
        call.waiter = None

    def take_sample(self, now_ms: float, model: PoolModel, wall_ms: int) -> None:
        """Take a sample of the pool."""
        model.pool.now = max(model.pool.now, wall_ms)
        used, waiting, held_up = {}, Counter[str](), Counter[str]()
        for name in self.policy.limits:
            limit = model.pool.limit(name)
            used[name] = model.capacity.spent(limit) if limit.is_rate else limit.used
            if limit.is_rate:
                use = self.uses[name]
                use.peak = max(use.peak, used[name])
        for session in model.pool.sessions.values():
            for queue in session.queues.values():
                waiting[queue.flow.tenant] += len(queue.tickets)
                if queue.at is not None:
                    held_up[queue.at] += len(queue.tickets)
        self.samples.append(Sample(now_ms - self.since_ms, used, waiting, held_up))

    def _to(self, use: Use, at_ms: float) -> None:
        """Add open calls up to `at_ms`, or to the end of the load if that is earlier."""
        until_ms = min(at_ms, self.span_ms)
        if until_ms > use.since_ms:
            use.area += use.open * (until_ms - use.since_ms)
            use.since_ms = until_ms


DAY_MS = 86_400_000
# A limit binds if it blocks at least this share of all waiting.
BINDS = 0.05
# Shares are reported only if all tenants waited together for at least this long.
_TOGETHER_S = 1.0
_MOST_TENANTS = 40
# A longer wait of one tenant is mentioned from this difference on.
_NOTICED_MS = 100
_REASONS = {
    "deadline_exceeded": "deadline",
    "limit_used_up": "used up",
    "queue_full": "queue full",
    "impossible": "impossible",
    "budget_exceeded": "budget spent",
    "budget_paused": "budget paused",
    "budget_unbounded": "cost unknown",
}


@dataclass(frozen=True, slots=True)
class Waits:
    """Waits from arrival to admission of the admitted calls, in ms; None if there were none.

    A call that gave way counts up to its last admission. A job in a provider's batch takes no
    permit and does not count.
    """

    mean_ms: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    longest_ms: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """The calls of one tenant or of one kind.

    refused: reason -> count. share: the tenant's share of the scarcest limit while all tenants
    wanted more. ideal: the share by its weight. gave_way: how often its calls gave way.
    """

    name: str
    calls: int
    admitted: int
    queued: int
    refused: dict[str, int]
    waits: Waits
    share: float | None = None
    ideal: float | None = None
    gave_way: int = 0


@dataclass(frozen=True, slots=True)
class PlayRange:
    """One figure over all plays."""

    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class GroupSpread:
    """The spread over plays for one tenant, or for all calls (with an empty name).

    Waits are in ms; None if no call was admitted in some play.
    """

    name: str
    mean_ms: PlayRange | None
    p95_ms: PlayRange | None
    refused: PlayRange


@dataclass(frozen=True, slots=True)
class LimitUse:
    """Utilisation of one limit.

    used: the fraction used while the load lasted. peak: the most at one moment. held_up: its share
    of all waiting. refused: calls that were refused while it blocked them.
    """

    limit: str
    words: str
    bound: int
    used: float
    peak: int
    held_up: float
    refused: int

    @property
    def binds(self) -> bool:
        return self.held_up >= BINDS or self.refused > 0


@dataclass(frozen=True, slots=True)
class TierUse:
    """The jobs that ran in a tier.

    late: answered after they were due. took: from submission to answer. busy: how often flex had no
    capacity. given_up: how often a job left flex because it was too slow for the deadline.
    """

    tier: str
    jobs: int
    late: int
    cost_micros: int
    took: Waits
    busy: int = 0
    given_up: int = 0


@dataclass(frozen=True, slots=True)
class Findings:
    """The results of one policy under one load.

    span_ms: from the first arrival to the last. end_ms: when the last call had ended.
    queued: calls that were admitted later than on arrival, each an avoided 429.
    shares_of: the concurrency limit whose shares are reported, the one that blocks most; None
        if the tenants hardly ever waited together.
    cost_micros: the cost of the calls that were made, as in the trace, or at the price of the
        cheaper model that a budget chose. budgets: the outcome of each.
    gave_way: how often calls gave way to others. lost_ms: how long these calls ran until then.
    tiers: of the jobs that allowed tiers.
    samples: use and waiters over time. plays: the number of plays. spreads: over all plays, of all
        calls, then of each tenant, if there was more than one play.
    """

    name: str
    calls: int
    admitted: int
    queued: int
    span_ms: float
    end_ms: float
    refused: dict[str, int]
    waits: Waits
    tenants: list[Group]
    kinds: list[Group]
    limits: list[LimitUse]
    shares_of: str | None
    samples: list[Sample]
    plays: int = 1
    spreads: list[GroupSpread] = field(default_factory=list)
    cost_micros: int = 0
    budgets: list[BudgetOutcome] = field(default_factory=list)
    gave_way: int = 0
    lost_ms: float = 0.0
    tiers: list[TierUse] = field(default_factory=list)

    @property
    def binding(self) -> list[str]:
        """The limits that bind, the one that blocks most first, then the budgets that refuse."""
        found = [one for one in self.limits if one.binds]
        found.sort(key=lambda one: (-one.held_up, -one.refused, one.limit))
        refusing = [f"budget {one.budget}" for one in self.budgets if one.refused]
        return [*(one.limit for one in found), *refusing]


def findings_of(name: str, tally: LoadTally) -> Findings:
    """Return the findings of a tally."""
    calls, policy = tally.calls, tally.policy
    whole = _group("", calls)
    limits = _uses(tally)
    shares_of, parts = _shares(calls, policy, limits)
    return Findings(
        name=name,
        calls=len(calls),
        admitted=whole.admitted,
        queued=whole.queued,
        span_ms=tally.span_ms,
        end_ms=tally.end_ms,
        refused=whole.refused,
        waits=whole.waits,
        tenants=_groups(calls, lambda call: call.arrival.tenant, parts),
        kinds=_groups(calls, lambda call: call.arrival.kind, {}),
        limits=limits,
        shares_of=shares_of,
        samples=tally.samples,
        cost_micros=sum(
            call.arrival.use.cost_micros or 0 for call in calls if call.began_ms is not None
        ),
        budgets=tally.budgets,
        gave_way=whole.gave_way,
        lost_ms=sum(
            one.ended_ms - one.began_ms
            for call in calls
            for one in call.lost
            if one.why == "gave way"
        ),
        tiers=_tiers(calls),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of sorted values, by the nearest rank."""
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def waits_of(waits_ms: Iterable[float]) -> Waits:
    ordered = sorted(waits_ms)
    if not ordered:
        return Waits(None, None, None, None, None)
    mean_ms = sum(ordered) / len(ordered)
    p50, p95, p99 = (percentile(ordered, one) for one in (50, 95, 99))
    return Waits(mean_ms, p50, p95, p99, ordered[-1])


def _tiers(calls: Sequence[LoadCall]) -> list[TierUse]:
    jobs = [call for call in calls if call.initial.tiers]
    why = Counter(one.why for call in jobs for one in call.lost)
    found = []
    for tier in Tier:
        there = [call for call in jobs if call.tier is tier and call.began_ms is not None]
        is_flex = tier is Tier.FLEX
        busy, given_up = (why[one] if is_flex else 0 for one in ("busy", "given up"))
        if there or busy or given_up:
            took_ms = [(call.ended_ms or 0.0) - call.asked_ms for call in there]
            late = sum(call.is_late for call in there)
            cost_micros = sum(call.arrival.use.cost_micros or 0 for call in there)
            use = TierUse(tier, len(there), late, cost_micros, waits_of(took_ms), busy, given_up)
            found.append(use)
    return found


def _groups(
    calls: Sequence[LoadCall],
    name_of: Callable[[LoadCall], str],
    parts: dict[str, tuple[float, float]],
) -> list[Group]:
    found: dict[str, list[LoadCall]] = {}
    for call in calls:
        found.setdefault(name_of(call), []).append(call)
    return [_group(name, found[name], parts.get(name)) for name in sorted(found)]


def _group(name: str, calls: Sequence[LoadCall], part: tuple[float, float] | None = None) -> Group:
    admitted = [call for call in calls if call.began_ms is not None]
    refused = Counter(
        _REASONS.get(call.refused, call.refused) for call in calls if call.refused is not None
    )
    return Group(
        name=name,
        calls=len(calls),
        admitted=len(admitted),
        queued=sum(call.queued for call in admitted),
        refused=dict(sorted(refused.items())),
        waits=waits_of(call.waited_ms for call in admitted if call.tier is not Tier.BATCH),
        share=part[0] if part else None,
        ideal=part[1] if part else None,
        gave_way=sum(call.gave_way for call in calls),
    )


def _shares(
    calls: Sequence[LoadCall], policy: PoolPolicy, limits: Sequence[LimitUse]
) -> tuple[str | None, dict[str, tuple[float, float]]]:
    """Return the scarcest concurrency limit, and tenant -> (share, ideal)."""
    at_once = [one for one in limits if isinstance(policy.limit(one.limit), Concurrency)]
    scarce = max(at_once, key=lambda one: one.held_up, default=None)
    if scarce is None or not scarce.held_up:
        return None, {}
    limited = [call for call in calls if scarce.limit in call.limits]
    tenants = sorted({call.arrival.tenant for call in limited})
    if not 2 <= len(tenants) <= _MOST_TENANTS:
        return None, {}
    weights = {tenant: policy.weights.get(tenant, 1) for tenant in tenants}
    received = shares(_events(limited), weights)
    if received.together_s < _TOGETHER_S:
        return None, {}
    whole = sum(weights.values())
    return scarce.limit, {one: (received.shares[one], weights[one] / whole) for one in tenants}


def _events(calls: Sequence[LoadCall]) -> list[Event]:
    """Return the events as an upstream would log them if it also saw waiters."""
    found, numbers = [], count()
    for call in calls:
        queued_ms = call.lost[-1].ended_ms if call.lost else call.asked_ms
        lost = (one[:3] for one in call.lost)
        for queued, began, over in (*lost, (queued_ms, call.began_ms, call.ended_ms)):
            number, ended = next(numbers), "leave" if began is None else "end"
            moments = ((queued, "ask"), (began, "begin"), (over, ended))
            for at_ms, what in moments:
                if at_ms is not None:
                    tenant, kind = call.arrival.tenant, cast(What, what)
                    found.append(Event(round(at_ms * 1e6), kind, "", number, tenant))
    # The sort is stable: events of one moment keep their order.
    return sorted(found, key=lambda one: one.at_ns)


def _uses(tally: LoadTally) -> list[LimitUse]:
    held_up: Counter[str] = Counter()
    for sample in tally.samples:
        held_up.update(sample.held_up)
    refused = Counter(call.at for call in tally.calls if call.refused is not None)
    everything = held_up.total() or 1
    return [
        LimitUse(
            limit=name,
            words=in_words(limit),
            bound=as_limit(limit).bound,
            used=_used(tally.policy, name, tally.uses[name], tally.span_ms),
            peak=tally.uses[name].peak,
            held_up=held_up[name] / everything,
            refused=refused[name],
        )
        for name, limit in tally.policy.limits.items()
    ]


def _used(policy: PoolPolicy, name: str, use: Use, span_ms: float) -> float:
    """Return the fraction of the limit's capacity that was used during the load."""
    limit = policy.limit(name)
    assert limit is not None
    if limit.bound == 0:
        return 0.0
    if isinstance(limit, Concurrency):
        return use.area / (limit.bound * span_ms) if span_ms else 0.0
    window_ms = limit.window_ms if isinstance(limit, Rate) else DAY_MS
    windows = span_ms / window_ms
    if isinstance(limit, Rate) and limit.shape == "bucket":
        return use.area / (limit.bound * (1 + windows))  # the bucket is full at first
    # A load shorter than the window may use a whole window's capacity.
    return use.area / (limit.bound * max(1.0, windows))


_FIGURE = re.compile(r"-|[\d.,]+( ?(ms|s|min|h|%|days?))?( \d+ (s|min))?")


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a report. right_from: the first right-aligned column; None: by the cells."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    right_from: int | None = None

    def holds_figures(self, number: int) -> bool:
        """Return whether a column is to be right-aligned; all are from `right_from` on."""
        if self.right_from is not None:
            return number >= self.right_from
        cells = [row[number] for row in self.rows]
        return any(cells) and all(not cell or _FIGURE.fullmatch(cell) for cell in cells)


def tables_of(found: Sequence[Findings]) -> list[Table]:
    """Return the tables of one policy, or the differences of several."""
    if len(found) == 1:
        [one] = found
        return [
            _limits(one),
            _group_tables("Tenants", "tenant", one.tenants, shares=one.shares_of),
            _group_tables("Kinds", "kind", one.kinds),
            *([_tier_table(one)] if one.tiers else []),
            *([_budgets(one)] if one.budgets else []),
            *([_spreads(one)] if one.spreads else []),
        ]
    return [_side_by_side(found)]


def sentence_of(found: Findings) -> str:
    """Return a summary in one sentence."""
    parts = [title_of(found)]
    if found.refused:
        refused = sum(found.refused.values())
        why = ", ".join(f"{many:,} {reason}" for reason, many in found.refused.items())
        parts.append(f"{refused:,} refused ({why})")
    if found.queued:
        parts.append(f"{found.queued:,} queued (would have been 429s)")
    else:
        parts.append("none queued")
    binding = found.binding
    if binding:
        parts.append(f"bottleneck{'s' if len(binding) > 1 else ''}: {', '.join(binding)}")
    else:
        parts.append("no limit is a bottleneck")
    parts += [_became(one) for one in found.budgets if one.refused or one.fell_back]
    if found.gave_way:
        lost = milliseconds(found.lost_ms)
        parts.append(f"calls gave way {_times(found.gave_way)} ({lost} of work lost)")
    if found.tiers:
        parts.append(f"jobs: {_by_tier(found)}")
    late_ms = found.end_ms - found.span_ms
    if late_ms > 0.2 * found.span_ms and found.queued:
        parts.append(f"the queue is empty {format_span(late_ms)} after the last arrival")
    return "; ".join(parts) + "."


def difference_of(now: Findings, changed: Findings) -> str:
    """Return in one or two sentences what a change would have done."""
    calls = f"{changed.queued:,} of {changed.calls:,} calls would have waited"
    parts = [
        f"With {changed.name}, {calls}{_before(changed.queued, now.queued, '{:,}'.format)}",
        f"the 99th percentile of the wait would be {milliseconds(changed.waits.p99_ms)}"
        f"{_before(changed.waits.p99_ms, now.waits.p99_ms, milliseconds)}",
    ]
    refused, before = (sum(one.refused.values()) for one in (changed, now))
    if refused or before:
        compared = _before(refused, before, "{:,}".format)
        parts.append(f"{refused:,} would have been refused{compared}")
    binding, bound = (", ".join(one.binding) or "none" for one in (changed, now))
    parts.append(f"the bottleneck would be {binding}{_before(binding, bound, str)}")
    if changed.gave_way or now.gave_way:
        compared = _before(changed.gave_way, now.gave_way, _times)
        parts.append(f"calls would have given way {_times(changed.gave_way)}{compared}")
    if changed.tiers or now.tiers:
        jobs, before_jobs = _by_tier(changed), _by_tier(now)
        parts.append(f"jobs would have been {jobs}{_before(jobs, before_jobs, str)}")
    if (worse := _worse_off(now, changed)) is not None:
        parts.append(worse)
    return "; ".join(parts) + "."


def _by_tier(found: Findings) -> str:
    """Return text such as `7 in flex, 13 in batch, of which 2 late`."""
    each = ", ".join(f"{one.jobs:,} in {one.tier}" for one in found.tiers if one.jobs)
    late = sum(one.late for one in found.tiers)
    return (each or "none") + (f", of which {late:,} late" if late else "")


def _times(number: int) -> str:
    return {0: "never", 1: "once"}.get(number, f"{number:,} times")


def _before(value: T, before: T, as_text: Callable[[T], str]) -> str:
    return (
        ", as it is now" if as_text(value) == as_text(before) else f" instead of {as_text(before)}"
    )


def _worse_off(now: Findings, changed: Findings) -> str | None:
    """Return a text about the tenant that a change delays most, if noticeably."""
    before = {one.name: one.waits.p99_ms or 0 for one in now.tenants}
    longer = [
        ((one.waits.p99_ms or 0) - before[one.name], one.name, one.waits.p99_ms or 0)
        for one in changed.tenants
        if one.name in before
    ]
    more_ms, tenant, p99_ms = max(longer, default=(0.0, "", 0.0))
    if more_ms < max(_NOTICED_MS, before.get(tenant, 0) / 10):
        return None
    return (
        f"but {tenant} would wait longer: {milliseconds(p99_ms)} at its 99th percentile "
        f"instead of {milliseconds(before[tenant])}"
    )


def title_of(found: Findings) -> str:
    """Return a title: the size of the load."""
    return f"{found.calls:,} calls in {format_span(found.span_ms)}"


def milliseconds(value: float | None) -> str:
    """Return a duration as `0`, `12 ms`, `3.4 s` or `2 min 5 s`."""
    if value is None:
        return "-"
    if 1000 <= value < 60_000:
        return f"{value / 1000:.1f} s"
    return "0" if value < 2 else format_span(value)


def _limits(found: Findings) -> Table:
    columns = ("limit", "", "used", "peak", "held up", "refused", "")
    ordered = sorted(found.limits, key=lambda one: -one.held_up)
    return Table("Limits", columns, [_limit_row(one) for one in ordered])


def _limit_row(one: LimitUse) -> tuple[str, ...]:
    return (
        one.limit,
        one.words,
        f"{one.used:.0%}",
        f"{one.peak:,}",
        f"{one.held_up:.0%}" if one.held_up else "",
        f"{one.refused:,}" if one.refused else "",
        "binds" if one.binds else "",
    )


def _tier_table(found: Findings) -> Table:
    columns = ("tier", "jobs", "late", "cost", "p50", "p95", "longest", "busy", "given up")
    rows = [
        (
            one.tier,
            f"{one.jobs:,}",
            f"{one.late:,}" if one.late else "",
            dollars(one.cost_micros),
            *map(milliseconds, (one.took.p50_ms, one.took.p95_ms, one.took.longest_ms)),
            *(f"{many:,}" if many else "" for many in (one.busy, one.given_up)),
        )
        for one in found.tiers
    ]
    return Table("Tiers", columns, rows, right_from=1)


def _became(use: BudgetOutcome) -> str:
    """Return text such as `budget acme is spent after 3 h 5 min`."""
    at_ms = use.first_ms if use.paused_ms is None else use.paused_ms
    how = "paused" if use.paused else "spent"
    return f"budget {use.budget} is {how} after {format_span(at_ms or 0)}"


def _budgets(found: Findings) -> Table:
    columns = ("budget", "", "spent", "fullest", "of", "refused", "fell back", "first after", "")
    rows = [_budget_row(one) for one in found.budgets]
    return Table("Budgets", columns, rows, right_from=2)


def _budget_row(one: BudgetOutcome) -> tuple[str, ...]:
    unit: Unit = "usd" if one.unit == "usd" else "tokens"
    return (
        one.budget,
        one.words,
        *(amount_text(unit, amount) for amount in (one.spent, one.fullest, one.amount)),
        f"{one.refused:,}" if one.refused else "",
        f"{one.fell_back:,}" if one.fell_back else "",
        "" if one.first_ms is None else format_span(one.first_ms),
        "paused" if one.paused else "",
    )


def _group_tables(
    title: str, column: str, groups: Sequence[Group], shares: str | None = None
) -> Table:
    columns: tuple[str, ...] = (
        column,
        "calls",
        "waited",
        "refused",
        "p50",
        "p95",
        "p99",
        "longest",
    )
    rows: list[tuple[str, ...]] = [_group_row(one) for one in groups]
    if any(one.gave_way for one in groups):
        columns += ("gave way",)
        rows = [(*row, f"{one.gave_way:,}") for row, one in zip(rows, groups, strict=True)]
    if shares:
        columns += (f"share of {shares}", "by weight")
        rows = [
            (*row, _part(one.share), _part(one.ideal))
            for row, one in zip(rows, groups, strict=True)
        ]
    return Table(title, columns, rows)


def _group_row(one: Group) -> tuple[str, ...]:
    waits = one.waits
    return (
        one.name,
        f"{one.calls:,}",
        f"{one.queued:,}",
        f"{sum(one.refused.values()):,}",
        *map(milliseconds, (waits.p50_ms, waits.p95_ms, waits.p99_ms, waits.longest_ms)),
    )


def _spreads(found: Findings) -> Table:
    columns = ("tenant", "mean wait", "from", "to", "p95", "from", "to", "refused", "from", "to")
    rows: list[tuple[str, ...]] = [
        (
            spread.name or "(all)",
            *_spread(spread.mean_ms, milliseconds),
            *_spread(spread.p95_ms, milliseconds),
            *_spread(spread.refused, "{:,.0f}".format),
        )
        for spread in found.spreads
    ]
    return Table(f"Over {found.plays} plays, with each call shifted slightly", columns, rows)


def _spread(one: PlayRange | None, as_text: Callable[[float], str]) -> tuple[str, str, str]:
    return (
        ("-",) * 3
        if one is None
        else (as_text(one.mean), as_text(one.lowest), as_text(one.highest))
    )


def _side_by_side(found: Sequence[Findings]) -> Table:
    rows = [
        ("refused", *(f"{sum(one.refused.values()):,}" for one in found)),
        ("waited", *(f"{one.queued:,}" for one in found)),
        *(
            (f"wait {name}", *(milliseconds(getattr(one.waits, field)) for one in found))
            for name, field in (("p50", "p50_ms"), ("p95", "p95_ms"), ("p99", "p99_ms"))
        ),
    ]
    if any(one.gave_way for one in found):
        rows.append(("gave way", *(f"{one.gave_way:,}" for one in found)))
        rows.append(("work lost by it", *(milliseconds(one.lost_ms) for one in found)))
    for what, of in (("tenant", "tenants"), ("kind", "kinds")):
        groups: list[list[Group]] = [getattr(one, of) for one in found]
        if len(groups[0]) < 2:
            continue
        for number, group in enumerate(groups[0]):
            cells = (milliseconds(some[number].waits.p95_ms) for some in groups)
            rows.append((f"wait p95, {what} {group.name}", *cells))
            if what == "tenant" and found[0].spreads:
                ranges = (_range(some.spreads[number + 1].p95_ms) for some in found)
                rows.append((f"  over {found[0].plays} plays", *ranges))
            if any(some[number].refused for some in groups):
                refused = (f"{sum(some[number].refused.values()):,}" for some in groups)
                rows.append((f"refused, {what} {group.name}", *refused))
    names = list(dict.fromkeys(limit.limit for one in found for limit in one.limits))
    for name in names:
        uses = [{limit.limit: limit for limit in one.limits}.get(name) for one in found]
        if any(use and use.used for use in uses):
            rows.append((f"used of {name}", *(_part(use.used if use else None) for use in uses)))
    if any(one.cost_micros for one in found):
        rows.append(("cost", *(dollars(one.cost_micros) for one in found)))
    rows += _tier_rows(found)
    for name in dict.fromkeys(use.budget for one in found for use in one.budgets):
        budgets = [{use.budget: use for use in one.budgets}.get(name) for one in found]
        rows.append((f"refused by budget {name}", *(_first(use, "refused") for use in budgets)))
        if any(use and use.fell_back for use in budgets):
            cells = (_first(use, "fell_back") for use in budgets)
            rows.append((f"to a cheaper model by budget {name}", *cells))
    rows.append(("binds", *("\n".join(one.binding) or "nothing" for one in found)))
    return Table(title_of(found[0]), ("", *(one.name for one in found)), rows, right_from=1)


def _tier_rows(found: Sequence[Findings]) -> list[tuple[str, ...]]:
    each = [{use.tier: use for use in one.tiers} for one in found]
    rows: list[tuple[str, ...]] = []
    for tier in Tier:
        uses = [one.get(tier) for one in each]
        if any(use and use.jobs for use in uses):
            rows.append((f"jobs in {tier}", *(f"{use.jobs:,}" if use else "0" for use in uses)))
            costs = (dollars(use.cost_micros if use else 0) for use in uses)
            rows.append((f"cost of {tier}", *costs))
    if rows:
        late = (sum(use.late for use in one.tiers) for one in found)
        rows.append(("late jobs", *(f"{many:,}" for many in late)))
    return rows


def _first(use: BudgetOutcome | None, what: Literal["refused", "fell_back"]) -> str:
    if use is None:
        return "-"
    many: int = getattr(use, what)
    return f"{many:,}, from {format_span(use.first_ms or 0)} on" if many else "0"


def _range(one: PlayRange | None) -> str:
    return "-" if one is None else f"{milliseconds(one.lowest)} to {milliseconds(one.highest)}"


def _part(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
