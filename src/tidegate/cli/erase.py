"""`tidegate erase`: all that is on record of a subject or a tenant, gone for good."""

from __future__ import annotations

from typing import Annotated

import typer

from tidegate.cli.pool import Json, show_json


def erase(
    subject: Annotated[
        str | None, typer.Option(help="Whom requests are about, as they named it.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Only of this tenant; without --subject all of it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Erase requests, answers, files and bodies of a subject or a tenant; totals stay."""
    from tidegate import telemetry
    from tidegate.config import load
    from tidegate.store.erase import Whose
    from tidegate.supervisor.roles import erase as run

    whose = Whose(tenant, subject)
    named = " of ".join(
        [f"subject {subject}"] * (subject is not None) + [f"tenant {tenant}"] * (tenant is not None)
    )
    if not (yes or dry_run):
        typer.confirm(f"Erase all that is on record of {named}, for good?", abort=True)
    config = load()
    telemetry.configure_logging(config.log_format, "error", process="erase")
    report = run(config, whose, dry_run=dry_run)
    if json:
        show_json(report)
        return
    typer.echo(
        f"{'would erase' if dry_run else 'erased'} {report.requests} requests, "
        f"{report.calls} records of calls, {report.blobs} files, "
        f"{report.answers} kept answers, {report.batches} batches, "
        f"{report.spilled} entries on this disk"
    )
    if report.held:
        typer.echo(
            f"{report.held} files of entries are held by running processes, "
            "which drop what is erased when they write the rest"
        )
