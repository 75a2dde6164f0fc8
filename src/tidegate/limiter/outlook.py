"""What the server says of room to come, and what a call hears for which it comes too late. Pure.

Invariant: a refusal names the limit that the call would wait for, and when there is room under it.
"""

from __future__ import annotations

from typing import NamedTuple

from tidegate.errors import DeadlineExceeded, LimitPaused, LimitUsedUp
from tidegate.limiter.limits import Concurrency, Limit, Quota

_FOR_EVER_MS = 10 * 365 * 86_400_000
_WINDOWS = {1_000: "a second", 60_000: "a minute", 3_600_000: "an hour", 86_400_000: "in 24 h"}
_UNITS = {"input_tokens": "input tokens", "output_tokens": "output tokens"}


class Barred(NamedTuple):
    """A ticket that could not be let in before its deadline. `room_ms` is when there is room under
    `limit`, of which so much is `used`; -1 where it is paused."""

    ticket: int
    limit: str
    room_ms: int
    used: int


class Outlook(NamedTuple):
    """What `flow` waits for. `room_ms` is when there is room for its first ticket if nothing is
    given back, 0 where that is not known; `firm`: for none of its tickets there is any before."""

    flow: int
    limit: str
    room_ms: int
    used: int
    firm: int


def too_early(
    name: str, limit: Limit | None, room_ms: float, used: int, amount: int = 1
) -> DeadlineExceeded:
    """There is room under a limit only after the deadline; `used` is -1 where it is paused."""
    after_ms = max(1, round(room_ms))
    if used < 0 or limit is None or isinstance(limit, Concurrency):
        return paused(name, after_ms)
    daily, unit, bound = isinstance(limit, Quota), unit_in_words(limit), limit.bound
    state = f"is used up ({used} of {bound} {unit}{'' if daily else f' {window_in_words(limit)}'})"
    if used < bound:
        state = f"has no room for {amount} {unit} more ({used} of {bound} are used)"
    span = span_in_words(after_ms)
    when = f"There is room in {span}."
    if isinstance(limit, Quota):
        when = f"It resets at 00:00 {limit.zone}, in {span}."
    said = f"{'Daily limit' if daily else 'Limit'} {name} {state}. {when}"
    return LimitUsedUp(said, limit=name, retry_after_ms=after_ms)


def paused(name: str, for_ms: int) -> LimitPaused:
    """A limit is paused for longer than a call may wait."""
    said = f"Limit {name} is paused {pause_in_words(for_ms)}, longer than this call may wait."
    return LimitPaused(said, limit=name, retry_after_ms=for_ms)


def too_late(
    name: str, limit: Limit | None, retry_ms: int, room_ms: float, used: int, amount: int = 1
) -> DeadlineExceeded:
    """The deadline came while a call waited for a limit."""
    if room_ms >= 1:
        return too_early(name, limit, room_ms, used, amount)
    said = f"Limit {name} had no room for this call before its deadline."
    return DeadlineExceeded(said, limit=name, retry_after_ms=retry_ms)


def unit_in_words(limit: Limit) -> str:
    unit = "calls" if isinstance(limit, Concurrency) else limit.unit
    return _UNITS.get(unit, unit)


def window_in_words(limit: Limit) -> str:
    """`a minute`, `in 90 s`; `at a time` where none counts."""
    if isinstance(limit, Concurrency):
        return "at a time"
    if isinstance(limit, Quota):
        return "a day"
    return _WINDOWS.get(limit.window_ms, f"in {limit.window_ms / 1000:g} s")


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


def pause_in_words(left_ms: float) -> str:
    """`for 47 s more`, or `until it is resumed` where nobody meant an end."""
    if left_ms > _FOR_EVER_MS:
        return "until it is resumed"
    return f"for {span_in_words(left_ms)} more"
