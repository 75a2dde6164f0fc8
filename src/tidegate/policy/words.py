"""Limits in words, for people at a terminal. Pure."""

from __future__ import annotations

import re

from tidegate.limiter.limits import Concurrency, Limit, Quota, as_limit
from tidegate.limiter.outlook import (
    pause_in_words,
    span_in_words,
    unit_in_words,
    window_in_words,
)

__all__ = ["in_words", "ms_of", "pause_in_words", "span_in_words"]

_SPAN = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h|d)")
_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def in_words(limit: int | Limit) -> str:
    """`5 at once`, `60 requests a minute`, `1000000 input tokens a day (UTC)`."""
    limit = as_limit(limit)
    if isinstance(limit, Concurrency):
        said = f"{limit.bound} at once"
        if limit.adaptive is not None:
            said += f", adapts itself from {limit.adaptive.minimum}"
    else:
        said = f"{limit.bound} {unit_in_words(limit)} {window_in_words(limit)}"
        if isinstance(limit, Quota):
            said += f" ({limit.zone})"
    return f"{said}, only counted" if limit.shadow else said


def ms_of(text: str) -> float | None:
    """`500ms`, `30s`, `10m`, `2h` or `1d` in milliseconds; None for anything else."""
    found = _SPAN.fullmatch(text.strip())
    return None if found is None else float(found["number"]) * _UNITS_MS[found["unit"]]
