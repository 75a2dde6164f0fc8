"""How far a batch is, drawn for a terminal of any width."""

from __future__ import annotations

from datetime import timedelta

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tidegate.cli.batch_run import Tally

_QUIET = "bright_black"


def bar(name: str, tally: Tally) -> RenderableType:
    """Three lines: how much, how fast, and what holds it up."""
    whole = f"{tally.ended:,} of {tally.total:,}"
    share = tally.ended / tally.total if tally.total else 1.0
    top = Table.grid(padding=(0, 2), expand=True)
    top.add_column(no_wrap=True, overflow="ellipsis", max_width=24)
    top.add_column(ratio=1)
    top.add_column(justify="right", no_wrap=True)
    top.add_column(justify="right", no_wrap=True)
    top.add_row(
        Text(name, style="bold"),
        ProgressBar(total=max(1, tally.total), completed=tally.ended, complete_style="cyan"),
        whole,
        f"{share:4.0%}",
    )
    lines: list[RenderableType] = [top, _pace(tally)]
    if tally.ended < tally.total:
        lines.append(_waiting(tally))
    return Group(*lines)


def _pace(tally: Tally) -> Text:
    parts = Text(no_wrap=True, overflow="ellipsis")
    parts.append(f"{tally.per_second:.1f} a second", style="bold")
    parts.append(f"   {tally.done - tally.failed:,} succeeded", style="green")
    parts.append(f"   {tally.failed:,} failed", style="red" if tally.failed else _QUIET)
    if tally.earlier:
        parts.append(f"   {tally.earlier:,} before", style=_QUIET)
    if tally.left_s is not None and tally.ended < tally.total:
        parts.append(f"   {timedelta(seconds=round(tally.left_s))} left")
    return parts


def _waiting(tally: Tally) -> Text:
    words = f"{tally.handed_in} handed in"
    if tally.waiting:  # first, since a narrow terminal shows the beginning
        words = f"{tally.waiting}; {words}"
    return Text(words, style=_QUIET, no_wrap=True, overflow="ellipsis")
