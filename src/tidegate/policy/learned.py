"""Limits learned from headers of answers, beside those in force.

A reading is what the last answer for a model reported of one rate. Processes share their readings
as notes; the note of one process, the leader, also contains what others use of the same account.
Learned limits are proposals: they change no limit that a person set.

Pure except for `shared_limits`. Invariant: the newest reading of a limit counts, whichever process
has it.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import orjson

from tidegate.limiter import Limiter, PoolPolicy, Quota, Rate
from tidegate.policy.format import (
    MEASURES,
    binds_model,
    is_in_group,
    plain_limit,
    source_of,
    subject_of,
)

MOST_READERS = 100
# Answers this soon after a refusal began before it, maybe under another bound.
REFUSED_S = 1.0
_EQUIVALENT: Mapping[str, str] = {"uncached_input_tokens": "input_tokens"}
# Azure's request header covers 10 s; a limit per minute is six times as much.
AZURE_SPANS, _AZURE_MS = 6, 10_000

Drift = Literal["new", "rose", "fell", "same"]


@dataclass(frozen=True, slots=True)
class HeaderReading:
    """One rate of a model, as headers report it.

    scope: such as `tpm`. at: the time that it describes, in seconds since 1970. heard_at: when the
    answer arrived, if later. window_ms: the window that the time until the rate is unused implies,
    if known. reset_ms: for a rate known to reset, the time until then; window_ms is then the time
    from one reset to the next.
    """

    model: str
    scope: str
    bound: int
    remaining: int | None
    at: float
    window_ms: float | None = None
    reset_ms: float | None = None
    heard_at: float | None = None

    @property
    def received_at(self) -> float:
        return self.at if self.heard_at is None else self.heard_at


@dataclass(frozen=True, slots=True)
class OthersUse:
    """Others' use of a limit per window, and how much of the limit is kept free.

    If no answer reports the limit, they are assumed to use what is kept free after refusals. bound:
    the account's bound as the day's bound of the same calls implies it, if that has changed.
    """

    limit: str
    amount: int
    kept: int
    bound: int | None = None


@dataclass(frozen=True, slots=True)
class RefusedLimit:
    """A limit in force for which the provider refused a call.

    at: in seconds since 1970. reset_s: seconds until there is room, as the refusal stated.
    """

    limit: str
    at: float
    reset_s: float | None = None


@dataclass(frozen=True, slots=True)
class LearnedNote:
    """What a process shares. `others` come from the leader; `refusals` has the last of each
    limit.
    """

    readings: tuple[HeaderReading, ...] = ()
    others: tuple[OthersUse, ...] = ()
    refusals: tuple[RefusedLimit, ...] = ()


@dataclass(frozen=True, slots=True)
class LearnedLimit:
    """A limit as the provider reports it.

    bound: in the window of the limit in force, if there is one. in_force: the bound in force.
    others_share: others' use as a fraction of the bound. model: empty if no answer reports the
    limit itself; the bound is then the one in force, or follows a change of the day's bound.
    """

    limit: str
    model: str
    bound: int
    in_force: int | None
    drift: Drift
    source: str
    others_share: float
    at: str


_Part = TypeVar("_Part", HeaderReading, OthersUse, RefusedLimit)


def unpacked_note(raw: bytes) -> LearnedNote:
    """Return a process's note; an empty one if it shares only other things.

    Fields that another version has added are ignored.
    """
    note = orjson.loads(raw)
    if "readings" not in note:
        return LearnedNote()
    return LearnedNote(
        _unpacked(HeaderReading, note["readings"]),
        _unpacked(OthersUse, note["others"]),
        _unpacked(RefusedLimit, note.get("refusals", ())),
    )


def _unpacked(kind: type[_Part], rows: Iterable[Mapping[str, Any]]) -> tuple[_Part, ...]:
    names = {one.name for one in fields(kind)}
    return tuple(kind(**{name: one[name] for name in one.keys() & names}) for one in rows)


class LimitMatch:
    """A match of readings to the limits of one policy."""

    def __init__(self, policy: PoolPolicy, provider: str) -> None:
        self.policy = policy
        self._provider = provider
        self._found: dict[tuple[str, str], str | None] = {}

    def of(self, reading: HeaderReading) -> str | None:
        """Return the limit in force that a reading is about, or None.

        Of several: first one that the provider reported rather than a cap that a person set, then
        the one that names the model most narrowly, then one of the same window, then the lowest.
        """
        key = reading.model, reading.scope
        if key not in self._found:
            self._found[key] = self._nearest(*key)
        return self._found[key]

    def _nearest(self, model: str, scope: str) -> str | None:
        measure, found = MEASURES[scope], []
        for name in self.policy.limits:
            own, subject = MEASURES.get(name.partition(":")[0]), subject_of(name)
            limit = self.policy.limit(name)
            if own is None or not isinstance(limit, Rate | Quota) or limit.shadow:
                continue
            is_same = _EQUIVALENT.get(limit.unit, limit.unit) == _EQUIVALENT.get(
                measure.unit, measure.unit
            )
            same_day = (own.window_ms is None) == (measure.window_ms is None)
            if is_same and same_day and subject is not None and binds_model(subject, model):
                other_window = own.window_ms != measure.window_ms
                rank = limit.source == "set", _width(subject, model), other_window, limit.bound
                found.append((rank, name))
        return min(found)[1] if found else None

    def bound_for(self, reading: HeaderReading, name: str) -> int | None:
        """Return the bound of a reading in the window of the limit in force.

        None if that is uncertain: headers seldom name their window.
        """
        limit = self.policy.limit(name)
        usual_ms = MEASURES[reading.scope].window_ms
        if self._provider == "azure" and reading.scope == "rpm":
            usual_ms = _AZURE_MS
        if not isinstance(limit, Rate) or usual_ms is None or limit.window_ms == usual_ms:
            return reading.bound
        if reading.window_ms is None:
            return None
        own, usual = limit.window_ms / reading.window_ms, usual_ms / reading.window_ms
        if max(own, 1 / own) <= max(usual, 1 / usual):
            return reading.bound
        return max(1, round(reading.bound * limit.window_ms / usual_ms))


def _width(subject: str, model: str) -> tuple[int, int]:
    """Return a sort key for how widely a limit names a model: alone, in a list, or by a pattern.

    Of patterns the longest is the narrowest.
    """
    names = subject.split(",")
    if model in names:
        return int(len(names) > 1), len(names)
    return 2, -max(len(one) for one in names if is_in_group(model, one))


def newest(notes: Iterable[LearnedNote], match: LimitMatch) -> dict[str, HeaderReading]:
    """Return the newest reading of each limit, by the id of the limit in force, else of a new one.

    A reading with nothing remaining takes precedence for `REFUSED_S`.
    """
    found: dict[str, HeaderReading] = {}
    for note in notes:
        for one in note.readings:
            if one.scope not in MEASURES or one.bound <= 0:
                continue
            name = match.of(one) or f"{one.scope}:{one.model}"
            if name not in found or _stands_until(found[name]) < _stands_until(one):
                found[name] = one
    return found


def readings_of_days(
    notes: Iterable[LearnedNote], match: LimitMatch, told: Container[str]
) -> dict[str, HeaderReading]:
    """Return the newest reading of daily requests, by the rate in force on the same calls.

    Rates that answers have `told` themselves are left out. So are rates of several reported models:
    these may have one day's bound or several.
    """
    found: dict[str, dict[str, HeaderReading]] = {}
    for note in notes:
        for one in note.readings:
            if one.scope != "rpd" or one.bound <= 0:
                continue
            name = match.of(replace(one, scope="rpm"))
            if name is None or name in told:
                continue
            of_models = found.setdefault(name, {})
            if one.model not in of_models or of_models[one.model].at < one.at:
                of_models[one.model] = one
    return {name: one for name, each in found.items() if len(each) == 1 for one in each.values()}


def _stands_until(reading: HeaderReading) -> float:
    return reading.at + (REFUSED_S if reading.remaining == 0 else 0.0)


def learned_limits(notes: Collection[LearnedNote], match: LimitMatch) -> list[LearnedLimit]:
    """Return the limits that all processes have learned, beside the policy in force."""
    others = {one.limit: one for note in notes for one in note.others}
    found, readings = _untold_limits(notes, match), newest(notes, match)
    for name, reading in sorted(readings.items()):
        limit = match.policy.limit(name)
        bound = reading.bound if limit is None else match.bound_for(reading, name)
        if bound is None:
            continue
        in_force = None if limit is None else limit.bound
        share = others[name].amount / bound if name in others else 0.0
        source = "set" if limit is None else source_of(plain_limit(name, limit))
        drift = _drift(bound, in_force)
        found[name] = LearnedLimit(
            name,
            reading.model,
            bound,
            in_force,
            drift,
            source,
            _share(share),
            _iso_time(reading.at),
        )
    return [found[name] for name in sorted(found)]


def _untold_limits(notes: Collection[LearnedNote], match: LimitMatch) -> dict[str, LearnedLimit]:
    """Return the limits in force for which only refusals or the day's bound show others."""
    refusals = sorted((one for note in notes for one in note.refusals), key=lambda one: one.at)
    days = readings_of_days(notes, match, ())
    last = {name: one.at for name, one in days.items()} | {one.limit: one.at for one in refusals}
    found = {}
    for one in (each for note in notes for each in note.others):
        name, limit = one.limit, match.policy.limit(one.limit)
        if limit is None or not limit.bound or name not in last:
            continue
        bound, source = one.bound or limit.bound, source_of(plain_limit(name, limit))
        share, at, drift = (
            _share(one.amount / bound),
            _iso_time(last[name]),
            _drift(bound, limit.bound),
        )
        found[name] = LearnedLimit(name, "", bound, limit.bound, drift, source, share, at)
    return found


def _share(share: float) -> float:
    return round(min(share, 1.0), 3)


def _iso_time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def kept_free(learned: Iterable[LearnedLimit], limit: str) -> list[str]:
    """Return why part of a limit is kept free, which counts as spent; a sentence for each reason,
    without a full stop."""
    found = [one for one in learned if one.limit == limit]
    sentences = [
        f"Others on the account take {one.others_share:.0%}, which is kept free for them and "
        "counts as spent"
        for one in found
        if one.others_share
    ]
    return sentences + [
        f"The provider reports a bound of {one.bound:,}: the rest is kept free and counts as spent"
        for one in found
        if one.drift == "fell"
    ]


async def shared_limits(limiter: Limiter, provider: str) -> list[LearnedLimit]:
    """Return what all processes of a pool have learned. Raises LimiterUnavailable."""
    notes = [unpacked_note(raw) for raw in (await limiter.told(MOST_READERS)).values()]
    return learned_limits(notes, LimitMatch(limiter.policy, provider))


def _drift(bound: int, in_force: int | None) -> Drift:
    if in_force is None:
        return "new"
    if bound == in_force:
        return "same"
    return "rose" if bound > in_force else "fell"
