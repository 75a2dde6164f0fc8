"""Figures of a run, from the emulated provider's own books. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEARNING_CALLS = 50
DAY_S = 86_400.0
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


def limit_uses(readings: Sequence[Book], windows: int) -> list[LimitUse]:
    """Of one account's book, read again and again over `windows` windows and one more.

    A gateway that is full sends what a window gives in one burst, and the next burst a window
    later. The edge of a measurement can fall into a burst and cut off up to a whole one. So the use
    is averaged over measurements that begin at each reading of the first window and last as many
    windows.
    """
    apart = (len(readings) - 1) * windows // (windows + 1)
    spans = list(zip(readings, readings[apart:], strict=False))
    uses = []
    for number, limit in enumerate(readings[-1]["limits"]):
        used = given = 0.0
        for first, last in spans:
            start, end = first["limits"][number], last["limits"][number]
            used += end["counted"] - start["counted"]
            passed_s = (last["now_ns"] - first["now_ns"]) / 1e9
            given += limit["bound"] * passed_s / limit["window_s"]
        uses.append(LimitUse(limit["name"], round(used / len(spans)), given / len(spans)))
    return uses


def binding(uses: list[LimitUse]) -> dict[str, LimitUse]:
    """Of each class of models the limit that was used most, by the class; a day's, of which some
    minutes show nothing, is left out."""
    found: dict[str, LimitUse] = {}
    for use in uses:
        if use.name.endswith(f":{DAY_S:g}s"):
            continue
        models = use.name.split(":")[1]
        if models not in found or use.share > found[models].share:
            found[models] = use
    return found
