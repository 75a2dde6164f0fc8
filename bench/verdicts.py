"""Bars, and what the figures of a run say to each. Pure.

A bar whose scenario was not run, or gave nothing, is `not measured`, never `ok`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from bench.grid import Grid

R = TypeVar("R")
# What was measured, as shown, and whether it holds the bar; raises KeyError for a missing figure.
Judge = Callable[[R], tuple[str, bool]]
MISSED = "missed"


@dataclass(frozen=True, slots=True)
class Bar(Generic[R]):
    figure: str
    bar: str
    judge: Judge[R]


@dataclass(frozen=True, slots=True)
class Verdict:
    figure: str
    bar: str
    ours: str
    verdict: str


def judged(bars: Iterable[Bar[R]], results: R) -> list[Verdict]:
    """A verdict of each bar: `ok`, `missed` or `not measured`."""
    found = []
    for bar in bars:
        try:
            shown, kept = bar.judge(results)
        except KeyError:
            shown, kept = "-", None
        word = "not measured" if kept is None else "ok" if kept else MISSED
        found.append(Verdict(bar.figure, bar.bar, shown, word))
    return found


def table(title: str, verdicts: Iterable[Verdict], ours: str = "ours") -> Grid:
    rows = [(one.figure, one.bar, one.ours, one.verdict) for one in verdicts]
    return Grid(title, ("figure", "bar", ours, "verdict"), rows)
