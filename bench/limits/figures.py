"""Figures of a run, from the emulated provider's own books. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEARNING_CALLS = 50
Book = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LimitUse:
    """How much of what a limit gave was used, in its own unit; `others` are not among it."""

    name: str
    used: int
    given: float

    @property
    def share(self) -> float:
        return self.used / self.given if self.given else 0.0


@dataclass(frozen=True, slots=True)
class RefusalCount:
    """Calls that the provider was asked for, and of them refused: first 50 calls apart."""

    calls: int
    first: int
    later: int

    @property
    def per_thousand(self) -> float:
        return 1000 * self.later / max(self.calls - LEARNING_CALLS, 1)


def refusals(book: Book) -> RefusalCount:
    """Of a whole run."""
    first = sum(number <= LEARNING_CALLS for number in book["refused_calls"])
    return RefusalCount(book["calls"], first, book["refused"] - first)


def limit_uses(before: Book, after: Book) -> list[LimitUse]:
    """Of the time between two readings of one account's book."""
    uses = []
    for start, end in zip(before["limits"], after["limits"], strict=True):
        passed_ns = after["now_ns"] - before["now_ns"]
        if end["mode"] == "token_bucket":
            used = end["counted"] - start["counted"]
            refilled = end["bound"] * passed_ns / (end["window_s"] * 1e9)
            # A burst that it keeps all the time is no part of the rate that it gives.
            drained = max(start["remaining"] - end["remaining"], 0)
            uses.append(LimitUse(end["name"], used, drained + refilled))
        else:
            uses.append(_by_whole_windows(end, before["now_ns"], after["now_ns"]))
    return uses


def _by_whole_windows(limit: Mapping[str, Any], since_ns: int, until_ns: int) -> LimitUse:
    """Windows that began after the first reading and ended before the last."""
    window_ns = round(limit["window_s"] * 1e9)
    first = -(-since_ns // window_ns)
    windows = until_ns // window_ns - first
    whole = range(first * window_ns, (first + windows) * window_ns, window_ns)
    used = sum(counted for start, counted in limit["windows"] if start in whole)
    return LimitUse(limit["name"], used, limit["bound"] * max(windows, 0))


def binding(uses: list[LimitUse]) -> dict[str, LimitUse]:
    """Of each class of models the limit that was used most, by the class."""
    found: dict[str, LimitUse] = {}
    for use in uses:
        models = use.name.split(":")[1]
        if models not in found or use.share > found[models].share:
            found[models] = use
    return found
