"""What was promised, what was measured, and whether it was kept. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

# Is told what is being done.
Say = Callable[[str], None]


class Verdict(StrEnum):
    KEPT = "kept"
    BROKEN = "broken"
    SKIPPED = "skipped"
    MEASURED = "measured"  # a figure that nothing is promised of


@dataclass(frozen=True, slots=True)
class Result:
    """One promise. `why`: of a skipped one the reason, of a broken one what was seen."""

    promise: str
    bar: str
    measured: str
    verdict: Verdict
    why: str = ""


@dataclass(slots=True)
class Report:
    """All results, in the order in which they were found. `about` is what they hold of: versions,
    load, how long it took. `left` names what could not be removed."""

    about: dict[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def kept(self, promise: str, bar: str, measured: str, is_kept: bool, why: str = "") -> None:
        """Note a promise that was put to the test."""
        verdict = Verdict.KEPT if is_kept else Verdict.BROKEN
        self.results.append(Result(promise, bar, measured, verdict, "" if is_kept else why))

    def measured(self, what: str, figure: str) -> None:
        self.results.append(Result(what, "", figure, Verdict.MEASURED))

    def skipped(self, promise: str, why: str) -> None:
        self.results.append(Result(promise, "", "", Verdict.SKIPPED, why))

    @property
    def broken(self) -> list[Result]:
        return [one for one in self.results if one.verdict is Verdict.BROKEN]

    @property
    def is_sound(self) -> bool:
        """Nothing broken, and nothing left behind."""
        return not (self.broken or self.left)
