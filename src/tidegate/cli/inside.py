"""`tidegate why` and `tidegate permits`: who waits for what, and who has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tidegate.cli.pool import AnyPool, Json, choose_pool, in_pool, show_json, show_table, who

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tidegate.policy.control import ShownPermit

app = typer.Typer(help="Look at the permits in use.", no_args_is_help=True)


def why(
    what: Annotated[str, typer.Argument(help="The id of a request, or a ticket: process/ticket.")],
    json: Json = False,
    pool: AnyPool = None,
) -> None:
    """Say why a request waits: for which limit, who has it, who paused it."""
    from tidegate.policy.why import why as ask

    choose_pool(pool)
    reason = in_pool(lambda control: ask(control, what))
    if json:
        show_json(reason)
        return
    typer.echo(f"{what} {reason.sentence}")
    if reason.holders:
        typer.echo()
        _show_permits("In use", reason.holders)


@app.command("list")
def list_(json: Json = False) -> None:
    """Show every permit in use, by process."""
    permits = in_pool(lambda control: control.permits())
    if json:
        show_json(permits)
    elif permits:
        _show_permits("", permits)
    else:
        typer.echo("no permit is in use")


@app.command()
def revoke(
    process: Annotated[str, typer.Argument(help="Its name or its session, as `list` shows it.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Take back all that a process holds whose death is certain.

    One that lives cancels its calls when it finds out, and until then the provider may see more
    calls than allowed.
    """
    if not yes:
        typer.confirm(f"Is {process} certainly dead?", abort=True)
    ended = in_pool(lambda control: control.revoke(process, by=who()))
    if json:
        show_json({"process": process, "sessions": ended})
        return
    typer.echo(f"{ended} session{'' if ended == 1 else 's'} of {process} ended")


def _show_permits(title: str, permits: Iterable[ShownPermit]) -> None:
    show_table(
        title,
        ("process", "ticket", "tenant", "limits", "since (UTC)", "request"),
        [
            (
                permit.process,
                str(permit.ticket),
                permit.tenant,
                " ".join(permit.limits),
                "" if permit.since is None else f"{permit.since:%H:%M:%S}",
                "" if permit.request_id is None else str(permit.request_id),
            )
            for permit in permits
        ],
    )
