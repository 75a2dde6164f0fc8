"""Presets of providers: how each counts what its limits page names.

`docs/decisions/0018-how-providers-count.md` has the facts with their sources. A preset fills in
what a limit does not say itself; the policy on record says all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate.policy.format import MEASURES

_REFILLS = {"shape": "bucket"}
# Of a minute. Short spans are checked too: 60 a minute may be 10 in 10 s, and one a second after
# these.
_SMOOTHED = {**_REFILLS, "pace_ms": 10_000}
# A window of its own: 60 a minute are at most 10 in any 10 s.
_CHECKED_MS = 10_000
_MINUTE_MS = 60_000
_AT_THE_START = {"reserve": "larger", "settles": False}

# By what a limit's scope counts.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "openai": {"requests": _SMOOTHED, "tokens": {**_AT_THE_START, **_REFILLS}},
    "azure": {"requests": {"window_ms": _CHECKED_MS}, "tokens": _AT_THE_START},
    "anthropic": {
        "requests": _SMOOTHED,
        "input_tokens": {"unit": "uncached_input_tokens", **_REFILLS},
        "output_tokens": _REFILLS,
    },
    "bedrock": {"tokens": {"reserve": "max_tokens", "weights": {"cached": 0, "output": 5}}},
    "gemini": {},
    "groq": {"tokens": {"weights": {"cached": 0}, **_REFILLS}},
}


def filled(
    limits: Mapping[str, Any], provider: str, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`limits` by id, with what the preset of `provider` says of each that is new or changed since
    `before`. One that names its unit says itself how it counts, and so does one that was a plain
    number."""
    preset, old = PRESETS.get(provider, {}), before or {}
    return {
        name: value
        if name in old and (old[name] == value or not isinstance(old[name], Mapping))
        else _filled(preset, name, value)
        for name, value in limits.items()
    }


def _filled(preset: Mapping[str, Mapping[str, Any]], limit_id: str, value: Any) -> Any:
    measure = MEASURES.get(limit_id.partition(":")[0])
    usual = preset.get(measure.unit) if measure else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if measure is None or not usual or not (is_number or isinstance(value, Mapping)):
        return value
    table = {"bound": value} if is_number else value
    if "unit" in table or "type" in table:
        return value
    window_ms, bound = table.get("window_ms", measure.window_ms), table.get("bound")
    of_rates = ("pace_ms", "window_ms", "shape")
    counting = {key: one for key, one in usual.items() if key not in of_rates}
    if not isinstance(window_ms, int) or not isinstance(bound, int):
        return {**counting, **table} if counting else value  # such as a day of the calendar
    if "shape" in usual:
        counting["shape"] = usual["shape"]
    if "pace_ms" in usual:
        counting["pace_ms"] = max(1, usual["pace_ms"] * window_ms // _MINUTE_MS)
    if "window_ms" in usual and "window_ms" not in table:
        checked_ms = usual["window_ms"] * window_ms // _MINUTE_MS
        table = {**table, "bound": bound and max(1, bound * checked_ms // window_ms)}
        counting["window_ms"] = checked_ms
    return {**counting, **table} if counting else value
