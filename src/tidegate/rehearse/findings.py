"""What a rehearsal comes to: waits, shares, refusals, use, and which limit binds. Pure.

Invariant: whatever is said of a group is of the calls in it, each counted once; a figure that
nothing stands behind is None, never 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tidegate.limiter.limits import Concurrency, PoolPolicy, Rate, as_limit
from tidegate.policy.words import in_words
from tidegate.rehearse.history import Event, shares
from tidegate.rehearse.tally import Call, Sample, Tally, Use

DAY_MS = 86_400_000
# Whoever binds holds up at least this part of all waiting.
BINDS = 0.05
# Shares are told of so much time, at the least, in which all tenants wanted more.
_TOGETHER_S = 1.0
_MOST_TENANTS = 40
_REASONS = {
    "deadline_exceeded": "deadline",
    "limit_used_up": "used up",
    "queue_full": "queue full",
    "impossible": "impossible",
}


@dataclass(frozen=True, slots=True)
class Waits:
    """From arrival to admission, in ms, of the calls that were let in; None where none was."""

    mean_ms: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    longest_ms: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """The calls of one tenant, or of one kind. `refused`: reason -> how many. `share` is the part
    that it had of the scarcest limit while all tenants wanted more, `ideal` that by its weight."""

    name: str
    calls: int
    admitted: int
    queued: int
    refused: dict[str, int]
    waits: Waits
    share: float | None = None
    ideal: float | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over all plays."""

    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class GroupSpread:
    """Of the calls of one tenant, or of all, whose name is empty. Waits are in ms; None where in
    some play no call was let in."""

    name: str
    mean_ms: Spread | None
    p95_ms: Spread | None
    refused: Spread


@dataclass(frozen=True, slots=True)
class LimitUse:
    """used: the part of it that was used while the load lasted. peak: the most at one moment.
    held_up: its part of all waiting. refused: calls that were refused while it held them up."""

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
class Findings:
    """One policy under one load.

    span_ms: from the first arrival to the last. end_ms: when the last call had ended.
    queued: calls that found no room and were let in later, each a 429 that nobody gets.
    shares_of: the limit on calls at once whose shares are told, that which holds up most; None
        where the tenants hardly ever wanted more of it together.
    samples: used and waiting over time. plays: how often it was played; spreads: over all plays,
        of all calls and then of each tenant's, where there was more than one.
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

    @property
    def binding(self) -> list[str]:
        """The limits that bind, the one that holds up most first."""
        found = [one for one in self.limits if one.binds]
        found.sort(key=lambda one: (-one.held_up, -one.refused, one.limit))
        return [one.limit for one in found]


def findings_of(name: str, tally: Tally) -> Findings:
    """What a tally comes to."""
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
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """By the nearest rank, of values in order."""
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def waits_of(waits_ms: Iterable[float]) -> Waits:
    ordered = sorted(waits_ms)
    if not ordered:
        return Waits(None, None, None, None, None)
    mean_ms = sum(ordered) / len(ordered)
    p50, p95, p99 = (percentile(ordered, one) for one in (50, 95, 99))
    return Waits(mean_ms, p50, p95, p99, ordered[-1])


def _groups(
    calls: Sequence[Call],
    name_of: Callable[[Call], str],
    parts: dict[str, tuple[float, float]],
) -> list[Group]:
    found: dict[str, list[Call]] = {}
    for call in calls:
        found.setdefault(name_of(call), []).append(call)
    return [_group(name, found[name], parts.get(name)) for name in sorted(found)]


def _group(name: str, calls: Sequence[Call], part: tuple[float, float] | None = None) -> Group:
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
        waits=waits_of(call.waited_ms for call in admitted),
        share=part[0] if part else None,
        ideal=part[1] if part else None,
    )


def _shares(
    calls: Sequence[Call], policy: PoolPolicy, limits: Sequence[LimitUse]
) -> tuple[str | None, dict[str, tuple[float, float]]]:
    """Which limit, and tenant -> (share, ideal)."""
    at_once = [one for one in limits if isinstance(policy.limit(one.limit), Concurrency)]
    scarce = max(at_once, key=lambda one: one.held_up, default=None)
    if scarce is None or not scarce.held_up:
        return None, {}
    theirs = [call for call in calls if scarce.limit in call.limits]
    tenants = sorted({call.arrival.tenant for call in theirs})
    if not 2 <= len(tenants) <= _MOST_TENANTS:
        return None, {}
    weights = {tenant: policy.weights.get(tenant, 1) for tenant in tenants}
    seen = shares(_events(theirs), weights)
    if seen.together_s < _TOGETHER_S:
        return None, {}
    whole = sum(weights.values())
    return scarce.limit, {one: (seen.shares[one], weights[one] / whole) for one in tenants}


def _events(calls: Sequence[Call]) -> list[Event]:
    """As an upstream would tell them that also sees who waits."""
    found = []
    for number, call in enumerate(calls):
        tenant = call.arrival.tenant

        def event(at_ms: float, what: str, number: int = number, tenant: str = tenant) -> Event:
            return Event(round(at_ms * 1e6), what, "", number, tenant)  # type: ignore[arg-type]

        found.append(event(call.asked_ms, "ask"))
        if call.began_ms is not None:
            found.append(event(call.began_ms, "begin"))
        if call.ended_ms is not None:
            found.append(event(call.ended_ms, "end" if call.began_ms is not None else "leave"))
    # What has no length keeps its order: the sort is stable.
    return sorted(found, key=lambda one: one.at_ns)


def _uses(tally: Tally) -> list[LimitUse]:
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
    """The part of what the limit gives in that time."""
    limit = policy.limit(name)
    assert limit is not None
    if limit.bound == 0:
        return 0.0
    if isinstance(limit, Concurrency):
        return use.area / (limit.bound * span_ms) if span_ms else 0.0
    window_ms = limit.window_ms if isinstance(limit, Rate) else DAY_MS
    # A load shorter than its window may use what a whole one gives.
    return use.area / (limit.bound * max(1.0, span_ms / window_ms))
