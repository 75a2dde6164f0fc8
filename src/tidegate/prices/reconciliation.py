"""Reconciliation of a day: our record against the provider's usage and cost, by model. Pure.

Complete answers carry the provider's own token counts. Whatever the provider counts beyond them
therefore belongs to calls of doubtful usage: cut off, estimated, unknown, or repeated after a
process died. A difference is explained if such calls account for it; their charges are then
corrected to the provider's.

Invariants: after the corrections of an explained difference our cost equals the provider's to the
micro-dollar; a charge is corrected only if the difference is explained.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from uuid import UUID

from tidegate.call import Usage, UsageDetails
from tidegate.prices.rates import Rates, cost_micros

Verdict = Literal["equal", "explained", "unexplained"]

_PRICE = "the tokens are equal and the cost is not: the price in force is not the provider's"
_FEWER = "the provider counts fewer {} than the complete answers had"
_COST_ALONE = "the provider reports only a cost, which differs from that of the calls"
_OTHERS = "the provider counts {} of calls that are not on record: other consumers of the account"
_NAMELESS = (
    "the provider reports no calls of this model, but calls of others that are not on record"
)
_DELETED = "{} calls of the day are no longer on record: they have expired or were erased"
_CUT = "the day has too many calls of uncertain usage: only the first of them were compared"
_BESIDE = "the provider's figures may include the calls of another upstream of the same account"
_ABSENT = "the provider reports no calls of this model, and its other figures may be incomplete"
# The suffix of a dated version of a model, such as -2025-08-07, -20250929 and -0125.
_DATE = re.compile(r"[-@](?:20\d\d-\d\d-\d\d|20\d{6}|\d{4})", re.ASCII)


@dataclass(frozen=True, slots=True)
class UsageSum:
    """The usage of one model on one day.

    input_tokens: all of the input, cached and cache-writing tokens included. output_tokens: with
    thoughts. requests: None if not counted. is_counted: whether there are counts besides the cost.
    """

    requests: int | None = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    searches: int = 0
    cost_micros: int = 0
    is_counted: bool = True

    def plus(self, other: UsageSum) -> UsageSum:
        counted = self.requests is not None and other.requests is not None
        requests = (self.requests or 0) + (other.requests or 0) if counted else None
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        return UsageSum(requests=requests, **sums)

    def minus(self, other: UsageSum) -> UsageSum:
        """Return this sum less `other`; negative where `other` has more."""
        negated = {name: -getattr(other, name) for name in _SUMMED}
        requests = None if other.requests is None else -other.requests
        return self.plus(UsageSum(requests=requests, **negated))


_COUNTED = ("input_tokens", "cached_tokens", "cache_write_tokens", "output_tokens", "searches")
_SUMMED = (*_COUNTED, "cost_micros")
NOTHING = UsageSum()


@dataclass(frozen=True, slots=True)
class DoubtfulCall:
    """A call whose usage the provider did not fully report.

    state: the usage state on record, or `repeated` for a call that another process had begun before
    it died. That first attempt may have cost something too, but is charged nothing: its
    `cost_micros` is 0.
    """

    request_id: UUID
    state: str
    input_tokens: int = 0
    output_tokens: int = 0
    cost_micros: int | None = None
    weight: int = 1

    @property
    def charged_micros(self) -> int:
        return self.cost_micros or 0


@dataclass(frozen=True, slots=True)
class ModelDay:
    """Our record of one model on one day.

    told: usage of complete answers. unpriced: how many of these have no cost. tiers: other than the
    usual one, in which some of these were served. is_cut: `doubtful` may lack some, since the day
    has too many of them to be read.
    """

    told: UsageSum = NOTHING
    doubtful: tuple[DoubtfulCall, ...] = ()
    unpriced: int = 0
    tiers: frozenset[str] = frozenset()
    is_cut: bool = False

    @property
    def cost_micros(self) -> int:
        return self.told.cost_micros + sum(call.charged_micros for call in self.doubtful)

    def plus(self, other: ModelDay) -> ModelDay:
        return ModelDay(
            self.told.plus(other.told),
            self.doubtful + other.doubtful,
            self.unpriced + other.unpriced,
            self.tiers | other.tiers,
            self.is_cut or other.is_cut,
        )


@dataclass(frozen=True, slots=True)
class Correction:
    """A call that explains a difference, and its cost by the provider's count."""

    call: DoubtfulCall
    cost_micros: int

    @property
    def delta_micros(self) -> int:
        return self.cost_micros - self.call.charged_micros


@dataclass(frozen=True, slots=True)
class ModelFinding:
    """The result for one model.

    reason: a sentence, empty if all is equal. corrections: the calls that explain the difference;
    empty if it is unexplained, or explained by rounding.
    """

    model: str
    ours: ModelDay
    theirs: UsageSum
    verdict: Verdict
    reason: str = ""
    corrections: tuple[Correction, ...] = ()

    @property
    def ours_micros(self) -> int:
        return self.ours.cost_micros

    @property
    def difference_micros(self) -> int:
        """How much more the provider charges than we did."""
        return self.theirs.cost_micros - self.ours_micros


def compared(
    own: Mapping[str, ModelDay],
    reported: Mapping[str, UsageSum],
    rates: Mapping[str, Rates | None],
    contexts: Mapping[str, int | None] | None = None,
    *,
    in_tiers: Mapping[str, Sequence[Rates]] | None = None,
    beside: Mapping[str, ModelDay] | None = None,
    deleted: int = 0,
) -> list[ModelFinding]:
    """Return a finding for each model of either side, ordered by name.

    `rates`: those in force, by the provider's model names. `contexts`: the most tokens of one call.
    `in_tiers`: rates of the day's other tiers, in which calls without a tier may have been served.
    `beside`: our record of the provider's other upstreams, which may be of the same account.
    `deleted`: calls of the day, of any model, that are no longer on record.
    """
    most = contexts or {}
    named, others = _by_name_there(own, reported), _by_name_there(beside or {}, reported)
    has_others = any(_has_others(named[model], found) for model, found in reported.items())
    findings = [
        ModelFinding(model, named[model], NOTHING, "unexplained", _NAMELESS)
        if has_others and model not in reported and named[model].doubtful
        else _finding(
            ModelFinding(model, named[model], reported.get(model, NOTHING), "unexplained"),
            [rates.get(model), *(in_tiers or {}).get(model, ())],
            most.get(model),
        )
        for model in sorted({*named, *reported})
    ]
    is_whole = bool(reported) and all(one.verdict != "unexplained" for one in findings)
    return [
        replace(one, verdict="unexplained", reason=_ABSENT, corrections=())
        if one.corrections and one.model not in reported and not is_whole
        else _doubted(one, others.get(one.model), deleted)
        for one in findings
    ]


def _by_name_there(
    own: Mapping[str, ModelDay], reported: Mapping[str, UsageSum]
) -> defaultdict[str, ModelDay]:
    named: defaultdict[str, ModelDay] = defaultdict(ModelDay)
    for model, day in own.items():
        named[_name_there(model, reported)] = named[_name_there(model, reported)].plus(day)
    return named


def _doubted(finding: ModelFinding, beside: ModelDay | None, deleted: int) -> ModelFinding:
    """Return the finding with other reasons that a difference may have: the cost of such calls is
    laid at no other call's door."""
    doubts = [_DELETED.format(deleted)] if deleted else []
    doubts += [_CUT] if finding.ours.is_cut else []
    left = finding.theirs.minus(finding.ours.told)
    if beside is not None and all(
        getattr(left, name) >= getattr(beside.told, name) for name in _COUNTED
    ):
        doubts.append(_BESIDE)
    if not doubts or (finding.verdict != "unexplained" and not finding.corrections):
        return finding
    reasons = [finding.reason, *doubts] if finding.verdict == "unexplained" else doubts
    return replace(finding, verdict="unexplained", reason="; ".join(reasons), corrections=())


def _has_others(own: ModelDay, reported: UsageSum) -> bool:
    """Return whether the provider counts more than the recorded calls by that name explain."""
    left = reported.minus(own.told)
    if not reported.is_counted:
        return False
    more = not own.doubtful and any(getattr(left, name) > 0 for name in _COUNTED)
    return more or (left.requests or 0) > len(own.doubtful)


def _name_there(model: str, reported: Mapping[str, UsageSum]) -> str:
    """Return the provider's name of a model.

    A call without an answer is recorded under the requested alias; the provider counts its dated
    version.
    """
    if model in reported:
        return model
    cut = len(model)
    dated = [one for one in reported if one.startswith(model) and _DATE.fullmatch(one, cut)]
    return dated[0] if len(dated) == 1 else model


def _finding(
    finding: ModelFinding, rates: Sequence[Rates | None], context: int | None
) -> ModelFinding:
    """Return the finding with its verdict."""
    own, reported = finding.ours, finding.theirs
    same = reported.cost_micros == own.cost_micros
    left = reported.minus(own.told)
    if not reported.is_counted:
        return _of_cost_alone(finding, left.cost_micros)
    # After an earlier correction the costs are equal, but the calls' tokens still differ.
    if same and (own.doubtful or not any(getattr(left, name) for name in _COUNTED)):
        return replace(finding, verdict="equal")
    fewer = [name for name in _COUNTED if getattr(left, name) < 0]
    if fewer or (left.requests or 0) < 0:
        unit = (fewer or ["requests"])[0].replace("_", " ")
        return replace(finding, reason=_FEWER.format(unit))
    if own.unpriced:
        reason = f"{own.unpriced} calls have no cost, since no price is known for the model"
        return replace(finding, reason=reason)
    rounding = ((own.told.requests or 0) + 1) // 2
    more = [name for name in _COUNTED if getattr(left, name)]
    if not more and abs(left.cost_micros) <= rounding and not own.doubtful:
        return _rounded(finding)
    if not own.doubtful:
        return replace(finding, reason=_unmatched(left) if more else _PRICE)
    others = (left.requests or 0) - len(own.doubtful)
    if others > 0:
        return replace(finding, reason=_OTHERS.format(f"{others} requests"))
    tokens = left.input_tokens + left.output_tokens
    if context is not None and tokens > context * sum(map(_most_tries, own.doubtful)):
        return replace(finding, reason=_OTHERS.format(f"{tokens} tokens"))
    margin = rounding + len(own.doubtful)
    if not _is_near(
        left.cost_micros, [cost for one in rates for cost in _costs(one, left)], margin
    ):
        return replace(finding, reason=_PRICE.replace("the tokens are equal and ", ""))
    corrections = _shared(own.doubtful, left.cost_micros)
    states = ", ".join(
        f"{sum(call.state == state for call in own.doubtful)} {state}"
        for state in dict.fromkeys(call.state for call in own.doubtful)
    )
    return replace(
        finding,
        verdict="explained",
        reason=f"calls whose usage was not reported whole: {states}",
        corrections=corrections,
    )


def _of_cost_alone(finding: ModelFinding, left_micros: int) -> ModelFinding:
    own = finding.ours
    if not finding.difference_micros:
        return replace(finding, verdict="equal")
    if abs(left_micros) <= ((own.told.requests or 0) + 1) // 2 and not own.doubtful:
        return _rounded(finding)
    return replace(finding, reason=_COST_ALONE)


def _rounded(finding: ModelFinding) -> ModelFinding:
    reason = f"each of {finding.ours.told.requests} calls is rounded to a whole micro-dollar"
    return replace(finding, verdict="explained", reason=reason)


def _most_tries(call: DoubtfulCall) -> int:
    """Return how often the call was made at most: a job is not repeated after its third worker
    dies.
    """
    return 3 if call.state == "repeated" else 1


def _unmatched(left: UsageSum) -> str:
    if left.requests:
        return _OTHERS.format(f"{left.requests} requests")
    return _OTHERS.format(f"{left.input_tokens + left.output_tokens} tokens")


def _costs(rates: Rates | None, total: UsageSum) -> list[int]:
    """Return the possible costs of a sum of calls; empty without a price.

    The sum does not show which inputs were long, nor how long written input stays in a cache.
    """
    if rates is None:
        return []
    usual, usage = replace(rates, above=None, long=None), _usage(total)
    assert usage.details is not None
    hour = replace(usage.details, cache_write_1h_tokens=total.cache_write_tokens)
    both = usage, replace(usage, details=hour)
    costs = [cost_micros(one, each, None) for one in (usual, rates.long or usual) for each in both]
    return [one for one in costs if one is not None]


def _is_near(cost: int, expected: Sequence[int], margin: int) -> bool:
    return not expected or min(expected) - margin <= cost <= max(expected) + margin


def _usage(total: UsageSum) -> Usage:
    details = UsageDetails(
        cache_write_tokens=total.cache_write_tokens or None, searches=total.searches or None
    )
    return Usage(
        total.input_tokens, total.output_tokens, cached_tokens=total.cached_tokens, details=details
    )


def _shared(calls: Sequence[DoubtfulCall], micros: int) -> tuple[Correction, ...]:
    """Return `micros` divided among the calls by weight; their sum is exact."""
    micros = max(0, micros)
    weights = [max(1, call.weight) for call in calls]  # a call of unknown weight has a share too
    total = sum(weights)
    shares = [micros * weight // total for weight in weights]
    for place in range(micros - sum(shares)):
        shares[place % len(shares)] += 1
    return tuple(Correction(call, share) for call, share in zip(calls, shares, strict=True))
