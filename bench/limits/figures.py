"""Figures of a run, from the emulated provider's own books, and their bars. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEARNING_CALLS = 50
MOST_FIRST_REFUSALS, MOST_PER_THOUSAND = 3, 1.0
# Of the quota that a window gives, by whether it lasts a minute.
LEAST_USED, LEAST_USED_BELOW_A_MINUTE = 0.97, 0.90
# Times what passed of agents' cached conversations with the limits of 0.1.0 (`--at-first --window
# 60` before those could say more), over the bound.
LEAST_GAIN, ITPM_OF_BOUND_AT_FIRST = 8.0, 0.98
MOST_AFTER_A_CHANGE = 1.0  # refusals a window
MOST_OF_AN_IMPORT_S = 5.0
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
    """Of each class of models the limit that was used most, by the class."""
    found: dict[str, LimitUse] = {}
    for use in uses:
        models = use.name.split(":")[1]
        if models not in found or use.share > found[models].share:
            found[models] = use
    return found


def missed_bars(found: Mapping[str, Mapping[str, Any]], window_s: float) -> Iterator[str]:
    """Each bar that a run's figures miss, as a line; a measurement that failed misses its own."""
    for name, figures in found.items():
        if "failed" in figures:
            yield f"{name}: {figures['failed']}"
        elif name == "budgets":  # measured, without a bar
            continue
        elif name.startswith("changes"):
            yield from _missed_after_changes(figures)
        elif name.startswith("import"):
            yield from _missed_by_an_import(name, figures)
        else:
            yield from _missed_by_refusals(name, figures)
            if name == "conversation":
                yield from _missed_by_agents(figures)
            else:
                yield from _missed_by_use(name, figures, window_s)


def _missed_by_refusals(name: str, figures: Mapping[str, Any]) -> Iterator[str]:
    if figures["first"] > MOST_FIRST_REFUSALS:
        yield f"{name}: {figures['first']} of the first {LEARNING_CALLS} calls refused"
    if figures["per_thousand"] > MOST_PER_THOUSAND:
        yield f"{name}: {figures['per_thousand']:.1f} of 1,000 calls refused"


def _missed_by_use(name: str, figures: Mapping[str, Any], window_s: float) -> Iterator[str]:
    for limit, share in figures["used"].items():
        short = window_s < 60 or not limit.endswith(f":{window_s:g}s")
        if share < (LEAST_USED_BELOW_A_MINUTE if short else LEAST_USED):
            yield f"{name}: {share:.1%} of {limit} used"


def _missed_by_agents(figures: Mapping[str, Any]) -> Iterator[str]:
    gain = figures["itpm_of_bound"] / ITPM_OF_BOUND_AT_FIRST
    if gain < LEAST_GAIN:
        yield f"conversation: {gain:.1f} times what passed at first"


def _missed_by_an_import(name: str, figures: Mapping[str, Any]) -> Iterator[str]:
    if figures["took_s"] >= MOST_OF_AN_IMPORT_S:
        yield f"{name}: took {figures['took_s']:.1f} s"
    if figures["refused"]:
        yield f"{name}: {figures['refused']} of {figures['calls']} calls refused"


def _missed_after_changes(figures: Mapping[str, Any]) -> Iterator[str]:
    for name in ("others", "tier"):
        if figures[name]["later"] > MOST_AFTER_A_CHANGE:
            yield f"{name}: {figures[name]['later']:.1f} refusals a window after it was noticed"
