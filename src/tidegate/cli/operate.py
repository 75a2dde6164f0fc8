"""Commands of an operator: `status`, `config check`, `doctor`, `verify`, `backup` and the like."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.call import DEFAULT_POOL
from tidegate.cli.terminal import (
    DONE,
    FAILED,
    Json,
    command_config,
    legible,
    show,
    show_json,
    show_result,
    show_table,
)
from tidegate.errors import ConfigError
from tidegate.prices.rates import dollars

if TYPE_CHECKING:
    from tidegate.cli.client import GatewayClient
    from tidegate.doctor.checks import Finding
    from tidegate.jobs.reconciliation import ReconcileReport
    from tidegate.limiter import PoolPolicy
    from tidegate.policy.deployment import Deployment
    from tidegate.settings import Config
    from tidegate.verify.plan import Report


class FileFormat(StrEnum):
    """Of exported files."""

    JSONL = "jsonl"
    PARQUET = "parquet"


File = Annotated[Path, typer.Argument(help="A dump in PostgreSQL's custom format.")]


def backup(file: File, json: Json = False) -> None:
    """Back up the database (requests, answers, tenants, keys, limits) to a new file.

    Files that were uploaded or generated are not in it: copy DATA_DIR/blobs, or the bucket, after.
    """
    from tidegate.settings import load
    from tidegate.supervisor.maintenance import back_up

    size_bytes = back_up(load(), file)
    text = f"wrote {size_bytes / 1_000_000:.1f} MB to {file}"
    show_result(json, {"file": str(file), "size_bytes": size_bytes}, text)


def restore(file: File, json: Json = False) -> None:
    """Restore a file of `tidegate backup` or pg_dump into an empty database."""
    from tidegate.settings import load
    from tidegate.supervisor.maintenance import restore as run

    run(load(), file)
    text = "restored; `tidegate migrate` brings it up to date, as every start does"
    show_result(json, {"file": str(file), "restored": True}, text)


def reconcile(
    provider: Annotated[str, typer.Argument(help="openai or anthropic.")],
    day: Annotated[str, typer.Option(help="A past day (UTC).")] = "yesterday",
    upstream: Annotated[
        str | None, typer.Option(help="The upstream's name, if the provider has several.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only compare; correct and store nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Compare a day's charges with the provider's own usage and costs.

    Estimated charges are corrected if recorded calls explain the difference. Other providers
    cannot be compared. Needs an admin key of the account: OPENAI_ADMIN_KEY or
    ANTHROPIC_ADMIN_KEY.
    """
    from tidegate.supervisor.maintenance import reconcile as run

    config = command_config("reconcile", "warning")
    report = run(config, provider, upstream, _day(day), dry_run=dry_run)
    if json:
        show_json(_reconciled_json(report))
    else:
        _show_reconciled(report, dry_run=dry_run)
    if report.verdict == "unexplained":
        sys.exit(FAILED)


def _day(text: str, option: str = "--day") -> date:
    today = datetime.now(UTC).date()
    if text == "yesterday":
        return today - timedelta(days=1)
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise ConfigError(option, text, "must be a day, such as 2026-11-24") from None
    if day >= today:
        raise ConfigError(option, text, "must be a past day (UTC)")
    return day


def _reconciled_json(report: ReconcileReport) -> dict[str, Any]:
    return {
        "upstream": report.upstream,
        "provider": report.provider,
        "day": f"{report.day}",
        "verdict": report.verdict,
        "ours_micros": report.ours_micros,
        "theirs_micros": report.theirs_micros,
        "difference_micros": report.theirs_micros - report.ours_micros,
        "corrected": report.corrected,
        "models": [
            {
                "model": one.model,
                "verdict": one.verdict,
                "ours_micros": one.ours_micros,
                "theirs_micros": one.theirs.cost_micros,
                "difference_micros": one.difference_micros,
                "reason": one.reason,
                "calls": [
                    {
                        "request_id": str(each.call.request_id),
                        "state": each.call.state,
                        "charged_micros": each.call.cost_micros,
                        "cost_micros": each.cost_micros,
                    }
                    for each in one.corrections
                ],
            }
            for one in report.findings
        ],
    }


_MOST_SHOWN = 20


def _show_reconciled(report: ReconcileReport, *, dry_run: bool) -> None:
    rows: list[tuple[str, ...]] = [
        (
            one.model or "(no model)",
            dollars(one.ours_micros),
            dollars(one.theirs.cost_micros),
            dollars(one.difference_micros),
            one.verdict,
        )
        for one in report.findings
    ]
    total = report.theirs_micros - report.ours_micros
    sums = (dollars(report.ours_micros), dollars(report.theirs_micros), dollars(total))
    rows.append(("total", *sums, report.verdict))
    title = f"{report.provider} ({report.upstream}) on {report.day}, in USD"
    show_table(title, ("model", "ours", "theirs", "difference", "verdict"), rows)
    for one in report.findings:
        if one.reason:
            typer.echo(f"{one.model or '(no model)'}: {one.reason}")
        for each in one.corrections[:_MOST_SHOWN]:
            typer.echo(
                f"  {each.call.request_id} {each.call.state}: charged "
                f"{dollars(each.call.cost_micros)}, costs {dollars(each.cost_micros)}"
            )
        if len(one.corrections) > _MOST_SHOWN:
            typer.echo(f"  and {len(one.corrections) - _MOST_SHOWN} more: --json names all")
    if not dry_run:
        typer.echo(f"{report.corrected} charges corrected")


export_app = typer.Typer(help="Export data to files for a data warehouse.", no_args_is_help=True)


@export_app.callback()
def _export() -> None:
    pass


@export_app.command("record")
def export_record(
    first: Annotated[
        str | None, typer.Option("--from", help="The first day (UTC), such as 2026-11-01.")
    ] = None,
    last: Annotated[
        str | None, typer.Option("--to", help="The last day (UTC). Default: yesterday.")
    ] = None,
    file_format: Annotated[
        FileFormat | None,
        typer.Option(
            "--format", help="jsonl (with gzip) or parquet. Default: RECORD_EXPORT, or jsonl."
        ),
    ] = None,
    bodies: Annotated[
        bool, typer.Option("--bodies", help="Include the recorded prompts and answers.")
    ] = False,
    json: Json = False,
) -> None:
    """Export the request record into the blob store, a file a day.

    Without --from each day that is over and has no file of this format, or changed after it was
    written. Files are exports/record/day=YYYY-MM-DD/calls.jsonl.gz or calls.parquet.
    """
    from tidegate.supervisor.maintenance import export_record as run

    if first is None and last is not None:
        raise ConfigError("--to", last, "needs --from")
    days = None
    if first is not None:
        days = _day(first, "--from"), _day(last or "yesterday", "--to")
        if days[0] > days[1]:
            raise ConfigError("--from", first, f"must be a day up to {days[1]}")
    config = command_config("export", "warning")
    usual = FileFormat.JSONL if config.record_export == "off" else FileFormat(config.record_export)
    files = run(config, days, (file_format or usual).value, with_bodies=bodies)
    if json:
        show_json([asdict(one) for one in files])
        return
    rows: list[tuple[str, ...]] = [
        (f"{one.day}", f"{one.calls}", f"{one.size_bytes / 1e6:.1f}", one.key) for one in files
    ]
    if rows:
        show_table("", ("day", "calls", "MB", "file"), rows)
    else:
        typer.echo("no day is to be exported")


_SIGNS = {"healthy": ("●", "green"), "degraded": ("▲", "yellow"), "down": ("■", "red")}


async def show_state(gateway: GatewayClient, json: bool) -> int:
    """Show the verdict on the whole deployment, with a command for each cause. Return the exit
    code."""
    found = await gateway.health()
    verdict = found.get("verdict")
    if verdict is None:
        await gateway.check_key()
    if json:
        show_json(verdict or found)
    elif verdict is None:
        _show_stores(found)
    else:
        _show_verdict(verdict)
    if verdict is not None and found["blobs"]["status"] != "ok":  # the verdict does not cover these
        typer.echo(f"The blob store does not answer: {found['blobs']['detail']}", err=True)
    is_well = found["status"] == "ok" and (verdict is None or verdict["health"] == "healthy")
    return DONE if is_well else FAILED


def _show_stores(found: dict[str, Any]) -> None:
    """Show the state that any caller may see: causes are shown only to operators."""
    for name in ("valkey", "postgresql", "blobs"):
        one = found[name]
        typer.echo(f"{name:<11} {one['status']}{': ' + one['detail'] if one['detail'] else ''}")
    typer.echo("The operator's key, or a key with a role, shows the rest.", err=True)


def _show_verdict(verdict: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    def sign(level: str) -> Text:
        mark, style = _SIGNS[level]
        return Text(mark, style=style)

    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    _, style = _SIGNS[verdict["health"]]
    table.add_row(sign(verdict["health"]), Text(verdict["sentence"], style=f"bold {style}"))
    for one in verdict["causes"]:
        words = Text(legible(one["words"]))
        if one["detail"]:
            words.append(f"\n{legible(one['detail'])}", style="bright_black")
        if one["command"]:
            words.append(f"\n-> {legible(one['command'])}", style="cyan")
        table.add_row(sign(one["level"]), words)
    if verdict["more"]:
        table.add_row("", Text(f"and {verdict['more']} more", style="bright_black"))
    show(table)


app = typer.Typer(help="Check and show the settings.", no_args_is_help=True)


@app.callback()
def _config() -> None:
    pass


def load_to_run(*, with_jobs: bool = True) -> Config:
    """Return the settings of a process that is to run. Raises ConfigError."""
    from tidegate.supervisor.services import load_to_run as load

    return load(with_jobs=with_jobs)


def check_daily(config: Config) -> None:
    """Raise ConfigError for a daily task of `tidegate up` that could not run."""
    if config.record_export == "parquet" and find_spec("pyarrow") is None:
        allowed = "needs pyarrow: pip install 'tidegate[export]', or use jsonl"
        raise ConfigError("RECORD_EXPORT", "parquet", allowed)


@app.command()
def check(
    defaults: Annotated[
        bool, typer.Option("--defaults", help="Include settings that have their default.")
    ] = False,
    json: Json = False,
) -> None:
    """Check the settings, and show the value of each and where it comes from."""
    from tidegate.policy.deployment import (
        deployed,
        deployed_upstreams,
        doubtful,
        policy_file,
        stated_settings,
    )
    from tidegate.supervisor.services import load_sound, warn_of_doubtful

    config = load_sound()
    policy, deployment = deployed(config), deployed_upstreams(config)
    stated = [one for one in stated_settings(config) if defaults or one.origin is not None]
    file = policy_file(config)
    if json:
        show_json(
            {
                "settings": {
                    one.name: {"value": one.value, "from": one.origin or _DEFAULT} for one in stated
                },
                "policy_file": None if file is None else str(file),
                "doubtful": {one.name: one.near for one in doubtful(config)},
                "upstreams": _plain(deployment, policy),
            }
        )
        return
    typer.echo("The settings are sound.")
    _print_summary(config)
    typer.echo(f"  limits              {file or 'RATE_LIMITS and the defaults; no tidegate.toml'}")
    _print_upstreams(config, deployment, policy)
    if stated:
        typer.echo()
        rows: list[tuple[str, ...]] = [
            (one.name, _NOT_SET if one.value is None else one.value, one.origin or _DEFAULT)
            for one in stated
        ]
        show_table("", ("setting", "value", "from"), rows)
    warn_of_doubtful(config)


_DEFAULT, _NOT_SET = "the default", "not set"


def _print_summary(config: Config) -> None:
    servers = "bundled, in DATA_DIR" if config.embedded else "yours"
    typer.echo(f"  listens on          {config.host} port {config.port}")
    typer.echo(f"  PostgreSQL, Valkey  {servers}")
    typer.echo(f"  account of Gemini   {_gemini(config)}")
    models = (config.text_model, config.multi_modal_model, config.image_model)
    typer.echo(f"  prompts             by {', '.join(dict.fromkeys(models))}")
    typer.echo(f"  API keys            {'asked for' if config.requires_keys else 'not asked for'}")


def _gemini(config: Config) -> str:
    from tidegate.policy.deployment import emulates

    if config.gemini_api_key is not None:
        return "yours"
    return "emulated" if emulates(config) else "none"


def _print_upstreams(config: Config, deployment: Deployment, policy: PoolPolicy) -> None:
    from tidegate.policy.format import in_words

    for upstream in deployment.upstreams:
        places = "; ".join(f"{one} at {url}" for one, url in upstream.base_urls.items())
        if config.emulated and upstream.name == DEFAULT_POOL:
            places = "the emulator"
        typer.echo(f"  upstream {upstream.name}: {', '.join(upstream.models)} ({places})")
        for name, limit in deployment.policies.get(upstream.name, policy).limits.items():
            typer.echo(f"    {name:<21} {in_words(limit)}")
    typer.echo("    (what was changed while running: tidegate upstreams list)")
    for route in deployment.routes:
        chain = ", then ".join(f"{name}/{model or route.model}" for name, model in route.targets)
        typer.echo(f"  route {route.model}: {chain}")


def _plain(deployment: Deployment, policy: PoolPolicy) -> list[dict[str, Any]]:
    from tidegate.policy.format import to_plain

    return [
        {
            "name": one.name,
            "models": one.models,
            "base_urls": dict(one.base_urls),
            "policy": to_plain(deployment.policies.get(one.name, policy)),
        }
        for one in deployment.upstreams
    ]


_MARKS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}
_SKIPPED = ("-", "bright_black")


def doctor(
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not call providers or the bucket.")
    ] = False,
    json: Json = False,
) -> None:
    """Diagnose the installation, and suggest a fix for each problem. Changes nothing.

    Exit code 1 if a check fails. Lists the models of each provider once, to test the key.
    """
    from tidegate.doctor import examine
    from tidegate.doctor.checks import State
    from tidegate.telemetry import logging as telemetry

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
        return f"all {count} checks passed"
    parts = [f"{failed} fail"] * bool(failed) + [f"{warned} warn"] * bool(warned)
    return f"of {count} checks {' and '.join(parts)}"


def _show(found: list[Finding]) -> None:
    """Show a line for each check, by group; below failed ones, how to fix them."""
    from rich.table import Table
    from rich.text import Text

    from tidegate.telemetry.logging import redact

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
        cell = Text(redact(one.found), style="bright_black" if word == "-" else "")
        if one.fix:
            cell.append(f"\n-> {one.fix}", style="cyan")
        table.add_row(Text(word, style=style), one.check, cell)
    show(table)


_STYLES = {"kept": "green", "BROKEN": "bold red", "skipped": "dim"}


def verify(
    quick: Annotated[
        bool, typer.Option("--quick", help="Run for 15 s instead of a minute.")
    ] = False,
    provider_limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Concurrent calls that the emulated provider allows. A value below the pool's "
            "limit shows what a broken promise looks like.",
        ),
    ] = None,
    restart_command: Annotated[
        str | None,
        typer.Option(
            help="A shell command that restarts Valkey without its data, for all of its clients. "
            "Default: that promise is skipped.",
        ),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the report to this file, for a runbook.")
    ] = None,
    json: Json = False,
) -> None:
    """Test the guarantees on this installation, with the emulator as the provider.

    It uses pools and a tenant of its own, which are removed afterwards. Exit code 1 if a guarantee
    is broken.
    """
    from tidegate.verify.run import Wishes, markdown_of
    from tidegate.verify.run import verify as run

    config = command_config("verify")
    if markdown is not None:
        place = markdown if markdown.exists() else markdown.parent
        if markdown.is_dir() or not os.access(place, os.W_OK):
            raise ConfigError("--markdown", str(markdown), "must be a file that can be written")
    wishes = Wishes(quick, provider_limit, restart_command)
    report = run(config, wishes, lambda what: typer.echo(f"tidegate: {what}", err=True))
    if markdown is not None:
        markdown.write_text(markdown_of(report), encoding="utf-8")
    if json:
        values = {"about": report.about, "results": report.results, "left": report.left}
        show_json({"sound": report.is_sound, **values})
    else:
        _show_report(report)
    raise typer.Exit(0 if report.is_sound else 1)


def _show_report(report: Report) -> None:
    from tidegate.cli.terminal import console, show_figures
    from tidegate.verify.run import sentence_of, table_of

    out = console()
    out.print()
    for name, text in report.about.items():
        out.print(f"{name:<22}", style="dim", end=" ")
        out.print(text, markup=False)
    out.print()
    show_figures(table_of(report), out, _STYLES)
    out.print()
    out.print(sentence_of(report), markup=False)
