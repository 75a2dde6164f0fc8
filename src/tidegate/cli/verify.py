"""`tidegate verify`: the promises, put to the test where they are to hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidegate.cli.pool import Json, show_json

if TYPE_CHECKING:
    from tidegate.verify.promises import Report

_STYLES = {"kept": "green", "BROKEN": "bold red", "skipped": "dim"}


def verify(
    quick: Annotated[bool, typer.Option("--quick", help="15 s instead of a minute.")] = False,
    provider_limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="What the emulated provider allows at once. Lower than the pool's limit it shows "
            "what a broken promise looks like.",
        ),
    ] = None,
    restart_command: Annotated[
        str | None,
        typer.Option(
            help="Restarts Valkey without its data, for all who use it; without one that promise "
            "is skipped.",
        ),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the report there, for a runbook.")
    ] = None,
    json: Json = False,
) -> None:
    """Check the promises against this installation, with the emulator for a provider.

    In pools and of a tenant that are made for it and removed after it. Ends with 1 if a promise is
    broken.
    """
    from tidegate import telemetry
    from tidegate.config import load
    from tidegate.verify.run import Wishes
    from tidegate.verify.run import verify as run
    from tidegate.verify.words import markdown_of

    config = load()
    telemetry.configure_logging(config.log_format, "error", process="verify")
    wishes = Wishes(quick, provider_limit, restart_command)
    report = run(config, wishes, lambda what: typer.echo(f"tidegate: {what}", err=True))
    if markdown is not None:
        markdown.write_text(markdown_of(report), encoding="utf-8")
    if json:
        show_json({"sound": report.is_sound, **_plain(report)})
    else:
        _show(report)
    raise typer.Exit(0 if report.is_sound else 1)


def _plain(report: Report) -> dict[str, object]:
    return {"about": report.about, "results": report.results, "left": report.left}


def _show(report: Report) -> None:
    from tidegate.cli.figures import console, show_figures
    from tidegate.verify.words import sentence_of, table_of

    shown = console()
    shown.print()
    for name, text in report.about.items():
        shown.print(f"{name:<22}", style="dim", end=" ")
        shown.print(text, markup=False)
    shown.print()
    show_figures(table_of(report), shown, _STYLES)
    shown.print()
    shown.print(sentence_of(report), markup=False)
