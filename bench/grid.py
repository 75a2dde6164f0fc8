"""A table of figures, for the terminal and for a document between two markers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.environments import ROOT

DOCUMENT = ROOT / "docs" / "benchmarks.md"


@dataclass(frozen=True, slots=True)
class Grid:
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", _line(self.headers), _line(["---"] * len(self.headers))]
        return "\n".join([*lines, *map(_line, self.rows)]) + "\n"


def show(tables: Sequence[Grid]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 230)
    for grid in tables:
        table = Table(title=grid.title, title_justify="left")
        for header in grid.headers:
            table.add_column(header, overflow="fold")
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)


def write(name: str, tables: Sequence[Grid], about: Sequence[str], file: Path = DOCUMENT) -> None:
    """Put the tables into `file`, in place of what is between the markers of `name` there."""
    begin, end = f"<!-- {name}: written by the benchmark -->", f"<!-- {name}: end -->"
    before, rest = file.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    lines = "\n".join(f"- {line}" for line in about)
    body = "\n".join(grid.markdown() for grid in tables)
    file.write_text(f"{before}{begin}\n\n{lines}\n\n{body}\n{end}{after}", encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
