"""A report in words: as tables, and as Markdown for a runbook. Pure."""

from __future__ import annotations

from tidegate.rehearse.tables import Table
from tidegate.verify.promises import Report, Result, Verdict

_COLUMNS = ("promise", "bar", "measured", "")


def table_of(report: Report) -> Table:
    """Broken ones first: they are what is looked for."""
    order = [Verdict.BROKEN, Verdict.KEPT, Verdict.MEASURED, Verdict.SKIPPED]
    results = sorted(report.results, key=lambda one: order.index(one.verdict))
    return Table("", _COLUMNS, [_row(one) for one in results], right_from=len(_COLUMNS))


def sentence_of(report: Report) -> str:
    """How it ended."""
    counts = dict.fromkeys(Verdict, 0)
    for one in report.results:
        counts[one.verdict] += 1
    said = [f"{counts[Verdict.KEPT]} promises kept"]
    if counts[Verdict.BROKEN]:
        said.append(f"{counts[Verdict.BROKEN]} BROKEN")
    if counts[Verdict.SKIPPED]:
        said.append(f"{counts[Verdict.SKIPPED]} skipped")
    left = "nothing is left behind"
    if report.left:
        left = f"could not be removed: {'; '.join(report.left)}"
    return f"{', '.join(said)}; {left}."


def markdown_of(report: Report) -> str:
    """A section for a runbook."""
    lines = ["# Tidegate: promises verified", "", sentence_of(report), ""]
    lines += [f"- {name}: {text}" for name, text in report.about.items()]
    lines += ["", f"| {' | '.join(_COLUMNS)} |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in table_of(report).rows]
    return "\n".join([*lines, ""])


def _row(one: Result) -> tuple[str, ...]:
    if one.verdict is Verdict.SKIPPED:
        return one.promise, "", one.why, "skipped"
    measured = f"{one.measured} ({one.why})" if one.why else one.measured
    verdict = "" if one.verdict is Verdict.MEASURED else one.verdict.value
    return one.promise, one.bar, measured, verdict.upper() if verdict == "broken" else verdict


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
