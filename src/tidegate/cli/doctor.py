"""`tidegate doctor`: what is wrong with a deployment, and how to mend it."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tidegate.cli.exits import DONE, FAILED
from tidegate.cli.pool import Json, show, show_json

if TYPE_CHECKING:
    from tidegate.doctor import Finding

_MARKS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}
_SKIPPED = ("-", "bright_black")


def doctor(
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask neither providers nor the bucket.")
    ] = False,
    json: Json = False,
) -> None:
    """Check everything that could be wrong, and say how to mend it; change nothing.

    Exit code 1 if a check fails. Each provider is asked once for its models, to test the key.
    """
    from tidegate import telemetry
    from tidegate.doctor import State, examine

    telemetry.configure_logging("console", "error", process="command")
    found = asyncio.run(examine(online=not offline))
    failed = sum(one.state is State.FAIL for one in found)
    warned = sum(one.state is State.WARN for one in found)
    if json:
        show_json({"ok": not failed, "failed": failed, "warned": warned, "checks": found})
    else:
        _show(found)
        sys.stderr.write(f"\ntidegate: {_summary(failed, warned, len(found))}\n")
    raise typer.Exit(FAILED if failed else DONE)


def _summary(failed: int, warned: int, count: int) -> str:
    if not failed and not warned:
        return f"all {count} checks are well"
    parts = [f"{failed} fail"] * bool(failed) + [f"{warned} warn"] * bool(warned)
    return f"of {count} checks {' and '.join(parts)}"


def _show(found: list[Finding]) -> None:
    """A line for each check, by rooms; beneath those that are not well, how to mend them."""
    from rich.table import Table
    from rich.text import Text

    from tidegate.telemetry import redact

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    room = None
    for one in found:
        if room not in (None, one.room):
            table.add_row("", "", "")
        room = one.room
        word, style = _MARKS.get(one.state, _SKIPPED)
        said = Text(redact(one.found), style="bright_black" if word == "-" else "")
        if one.mend:
            said.append(f"\n-> {one.mend}", style="cyan")
        table.add_row(Text(word, style=style), one.check, said)
    show(table)
