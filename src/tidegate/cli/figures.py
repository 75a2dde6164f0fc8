"""Tables of figures on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from tidegate.rehearse.tables import Table

_WITHOUT_A_TERMINAL = 160


def console() -> Console:
    """As wide as the terminal; without one wide enough for our tables."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _WITHOUT_A_TERMINAL)


def show_figures(table: Table, to: Console, styles: Mapping[str, str] | None = None) -> None:
    """Figures to the right. `styles`: of rows that end with a word."""
    from rich.table import Table as Shown
    from rich.text import Text

    shown = Shown(
        title=table.title or None,
        title_justify="left",
        title_style="bold",
        box=None,
        header_style="dim",
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for number, column in enumerate(table.columns):
        justify = "right" if table.holds_figures(number) else "left"
        shown.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in table.rows:
        style = (styles or {}).get(row[-1], "")
        cells = [*(Text(cell) for cell in row[:-1]), Text(row[-1], style=style)]
        shown.add_row(*cells, style="dim" if style == "dim" else "")
    to.print(shown)


def show_chart(chart: str, to: Console) -> None:
    """One that is drawn with blocks, under titles that begin their lines."""
    from rich.text import Text

    text = Text(chart)
    text.highlight_regex(r"[▁▂▃▄▅▆▇█]+", "cyan")
    text.highlight_regex(r"(?m)^\w.*$", "bold")
    to.print(text, no_wrap=True, overflow="crop")
