"""`tidegate requeue`: failed jobs of all tenants, queued again in bulk."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import typer

from tidegate.cli.pool import Json, show_json, who
from tidegate.cli.requests import time_of


class Ended(StrEnum):
    FAILED = "failed"
    DEAD = "dead"


def requeue(
    since: Annotated[
        str,
        typer.Option(help="Those that ended from this time on: 2026-01-31T12:00, or 2h ago: 2h."),
    ],
    until: Annotated[
        str | None, typer.Option(help="Those that ended before this time, in the same way.")
    ] = None,
    status: Annotated[
        list[Ended] | None, typer.Option(help="In this state; may be given twice.")
    ] = None,
    error_code: Annotated[
        str | None, typer.Option(help="Only with this error, such as upstream_unavailable.")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many at most.")] = 1_000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Queue failed jobs again, under their own ids; their webhooks are sent again.

    They get all their attempts and as long a deadline as they had. A repeat changes nothing for
    jobs that are queued already.
    """
    from tidegate import telemetry
    from tidegate.config import load
    from tidegate.store.requeues import Requeue
    from tidegate.store.states import Status
    from tidegate.supervisor.roles import requeue as run

    now = datetime.now(UTC)
    order = Requeue(
        since=time_of("--since", since),
        until=now if until is None else min(now, time_of("--until", until)),
        statuses=tuple(Status(one.value) for one in status or [Ended.FAILED]),
        tenant_id=tenant,
        error_code=error_code,
        limit=limit,
    )
    config = load()
    telemetry.configure_logging(config.log_format, "warning", process="requeue")
    if dry_run:
        _show(run(config, order, by=None), json)
        return
    if not yes:
        report = run(config, order, by=None)
        if not report.matching:
            _show(report, json)
            return
        counts = ", ".join(f"{jobs} {code or '(none)'}" for code, jobs in report.by_code.items())
        more = f", the first {limit} of more" if report.has_more else ""
        typer.confirm(f"Queue {report.matching} jobs again ({counts}{more})?", abort=True)
    _show(run(config, order, by=who()), json)


def _show(report: object, json: bool) -> None:
    from tidegate.store.requeues import RequeueReport

    assert isinstance(report, RequeueReport)
    if json:
        show_json(report)
        return
    for code, jobs in report.by_code.items():
        typer.echo(f"{jobs:>8}  {code or '(none)'}")
    more = "; there are more, repeat it" if report.has_more else ""
    typer.echo(f"{report.requeued} of {report.matching} jobs queued again{more}")
