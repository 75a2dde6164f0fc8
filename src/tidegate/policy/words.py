"""Limits in words, for people at a terminal. Pure."""

from __future__ import annotations

import re

from tidegate.limiter.limits import Concurrency, Limit, Quota, as_limit

_SPAN = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h|d)")
_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_FOR_EVER_MS = 10 * 365 * 86_400_000
_WINDOWS = {1_000: "a second", 60_000: "a minute", 3_600_000: "an hour"}
_UNITS = {"input_tokens": "input tokens", "output_tokens": "output tokens"}


def in_words(limit: int | Limit) -> str:
    """`5 at once`, `60 requests a minute`, `1000000 input tokens a day (UTC)`."""
    limit = as_limit(limit)
    if isinstance(limit, Concurrency):
        said = f"{limit.bound} at once"
        if limit.adaptive is not None:
            said += f", adapts itself from {limit.adaptive.minimum}"
    else:
        unit = _UNITS.get(limit.unit, limit.unit)
        if isinstance(limit, Quota):
            said = f"{limit.bound} {unit} a day ({limit.zone})"
        else:
            window = _WINDOWS.get(limit.window_ms, f"in {limit.window_ms / 1000:g} s")
            said = f"{limit.bound} {unit} {window}"
    return f"{said}, only counted" if limit.shadow else said


def span_in_words(span_ms: float) -> str:
    """`850 ms`, `47 s`, `3 min 5 s`, `2 h 10 min`, `3 days`."""
    if span_ms < 1_000:
        return f"{round(span_ms)} ms"
    seconds = round(span_ms / 1000)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} days"


def ms_of(text: str) -> float | None:
    """`500ms`, `30s`, `10m`, `2h` or `1d` in milliseconds; None for anything else."""
    found = _SPAN.fullmatch(text.strip())
    return None if found is None else float(found["number"]) * _UNITS_MS[found["unit"]]


def pause_in_words(left_ms: float) -> str:
    """`for 47 s more`, or `until it is resumed` where nobody meant an end."""
    if left_ms > _FOR_EVER_MS:
        return "until it is resumed"
    return f"for {span_in_words(left_ms)} more"
