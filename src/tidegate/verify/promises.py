"""What was promised, what was measured, and whether it was kept. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
    """One promise. `why`: of a skipped one the reason, of a broken one what was seen. `lasting`:
    what was seen can't be the doing of a busy machine."""

    promise: str
    bar: str
    measured: str
    verdict: Verdict
    why: str = ""
    lasting: bool = False


@dataclass(slots=True)
class Report:
    """All results, in the order in which they were found. `about` is what they hold of: versions,
    load, how long it took. `left` names what could not be removed."""

    about: dict[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def kept(
        self,
        promise: str,
        bar: str,
        measured: str,
        is_kept: bool,
        why: str = "",
        *,
        lasting: bool = False,
    ) -> None:
        """Note a promise that was put to the test."""
        verdict = Verdict.KEPT if is_kept else Verdict.BROKEN
        result = Result(promise, bar, measured, verdict, "" if is_kept else why, lasting)
        self.results.append(result)

    def measured(self, what: str, figure: str) -> None:
        self.results.append(Result(what, "", figure, Verdict.MEASURED))

    def skipped(self, promise: str, why: str) -> None:
        self.results.append(Result(promise, "", "", Verdict.SKIPPED, why))

    @property
    def broken(self) -> list[Result]:
        return [one for one in self.results if one.verdict is Verdict.BROKEN]

    @property
    def in_doubt(self) -> list[Result]:
        """Broken ones that a busy machine may have broken: they are put to the test once more."""
        return [one for one in self.broken if not one.lasting]

    def repeated(self, again: Report) -> Report:
        """What holds after a second run: of what was in doubt the second result, of everything else
        the first one, unless the second run broke it in a way that no load explains."""
        doubtful = {one.promise for one in self.in_doubt}
        second = {one.promise: one for one in again.results}
        lasting = {one.promise for one in again.broken if one.lasting}
        results = []
        for one in self.results:
            new = second.get(one.promise)
            if one.promise not in doubtful:
                results.append(second[one.promise] if one.promise in lasting else one)
            elif new is not None:
                note = f"at the second try; at the first {one.measured}"
                results.append(replace(new, why=f"{new.why}, {note}" if new.why else note))
        known = {one.promise for one in self.results}
        results += [one for one in again.broken if one.promise not in known]
        return Report({**again.about}, results, [*self.left, *again.left])

    @property
    def is_sound(self) -> bool:
        """Nothing broken, and nothing left behind."""
        return not (self.broken or self.left)
