"""Commands on requests: `tidegate submit`, `status`, `requests` and `requeue`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.call import Kind, Status
from tidegate.cli.client import (
    GatewayClient,
    Progress,
    follow,
    save_pictures,
    show_answer,
    wait,
    with_gateway,
)
from tidegate.cli.limits import span_ms
from tidegate.cli.operate import show_state
from tidegate.cli.terminal import (
    Json,
    command_config,
    confirm,
    counted,
    given,
    is_short_id,
    show_json,
    show_result,
    show_table,
    terminal_width,
    who,
    whole_id,
)
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.store.jobs import RequeueReport

Output = Annotated[
    Path | None,
    typer.Option(help="Save images here: a folder, or the file name of a single image."),
]
Files = Annotated[
    list[Path] | None,
    typer.Option(
        help="A file to send with the prompt; may be repeated.",
        exists=True,
        dir_okay=False,
        readable=True,
    ),
]
ImageUri = Annotated[str | None, typer.Option(help="URL of a public image that Tidegate fetches.")]
Type = Annotated[
    Kind | None, typer.Option("--type", help="The type of the request; skips classification.")
]
Deadline = Annotated[
    str | None,
    typer.Option(help="Expire if it is not admitted within this time: 30s, 10m, 2h."),
]
Conversation = Annotated[
    str | None, typer.Option(help="The conversation that it belongs to, for budgets and limits.")
]
OnceKey = Annotated[
    str | None, typer.Option(help="Submitting again with the same key creates no second job.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the answer and print it.")]
FollowIt = Annotated[
    bool, typer.Option("--follow", help="As --wait, and print each change of state.")
]


def submit(
    text: Annotated[
        str, typer.Argument(help="The prompt; - reads it from standard input.", show_default=False)
    ] = "",
    file: Files = None,
    image_uri: ImageUri = None,
    type_: Type = None,
    model: Annotated[
        str | None, typer.Option(help="The model, instead of the one configured for the type.")
    ] = None,
    priority: Annotated[
        int | None, typer.Option(min=-100, max=100, help="Higher goes first. Default: 0.")
    ] = None,
    deadline: Deadline = None,
    tiers: Annotated[
        str | None, typer.Option(help="Processing tiers that it may use: live,flex,batch.")
    ] = None,
    idempotency_key: OnceKey = None,
    webhook_url: Annotated[
        str | None, typer.Option(help="URL that receives a signed webhook when the job ends.")
    ] = None,
    subject: Annotated[
        str | None, typer.Option(help="The person that it is about, by which it can be erased.")
    ] = None,
    conversation: Conversation = None,
    wait_: Wait = False,
    follow_: FollowIt = False,
    output: Output = None,
    json: Json = False,
) -> None:
    """Submit a request. Prints its id, or with --wait or --follow its answer."""
    text = _prompt_of_input() if text == "-" else text
    if idempotency_key is not None and not (
        idempotency_key.isascii() and idempotency_key.isprintable()
    ):
        raise ConfigError("--idempotency-key", ascii(idempotency_key), "must be printable ASCII")
    fields = given(
        data=text or None,
        image_uri=image_uri,
        type=type_ and type_.value,
        model=model,
        priority=priority,
        deadline_ms=None if deadline is None else span_ms("--deadline", deadline),
        webhook_url=webhook_url,
        subject=subject,
        tiers=None if tiers is None else [one.strip() for one in tiers.split(",")],
        conversation=conversation,
    )
    if not text and not file and not image_uri:
        raise ConfigError("prompt", None, "is missing: pass TEXT, --file or --image-uri")

    async def work(gateway: GatewayClient) -> int:
        accepted = await gateway.submit(fields, tuple(file or ()), idempotency_key)
        if not (wait_ or follow_ or output):
            _print_accepted(accepted, json)
            return 0
        return await _to_the_end(gateway, accepted["request_id"], follow_, output, json)

    raise typer.Exit(with_gateway(work))


def _prompt_of_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise ConfigError("TEXT", "-", "must be text in UTF-8") from None


def status(
    request_id: Annotated[
        str | None,
        typer.Argument(
            help="The id that `submit` printed, or its beginning or end among the newest; the "
            "whole deployment without one."
        ),
    ] = None,
    follow_: Annotated[
        bool,
        typer.Option("--follow", help="Print each change of state until the request has ended."),
    ] = False,
    output: Output = None,
    json: Json = False,
) -> None:
    """Show the state of the deployment and its problems; or the status and answer of one request.

    Exit code 1 if the request has failed, if the deployment is degraded or down, or if its blob
    store does not answer.
    """
    if request_id is None:
        if follow_ or output is not None:
            option = "--follow" if follow_ else "--output"
            raise ConfigError(option, None, "needs the id of a request")
        raise typer.Exit(with_gateway(lambda gateway: show_state(gateway, json)))
    id_text = request_id

    async def work(gateway: GatewayClient) -> int:
        whole = await _whole_id(gateway, id_text)
        if follow_:
            return await _to_the_end(gateway, whole, True, output, json)
        view = await gateway.get(f"/status/{whole}")
        if json:
            show_json(view)
        progress = Progress(silent=json)
        progress.state(view)
        await save_pictures(gateway, view, output, progress)
        if view["status"] in ("queued", "running"):
            return await _print_waiting(gateway, view, progress)
        return _code_of(view) if json else show_answer(view)

    raise typer.Exit(with_gateway(work))


async def _whole_id(gateway: GatewayClient, request_id: str) -> str:
    """Return a whole id; a part of one is looked up among the newest requests."""
    from uuid import UUID

    with suppress(ValueError):
        return str(UUID(request_id))
    if not is_short_id(request_id):
        allowed = "must be an id, or its beginning or end of 4 characters or more"
        raise ConfigError("REQUEST_ID", request_id, allowed)
    items, _ = await _listed({}, _PAGE, None, gateway)
    return whole_id(request_id, (one["request_id"] for one in items), f"the newest {_PAGE}")


async def _print_waiting(gateway: GatewayClient, view: dict[str, Any], progress: Progress) -> int:
    if view["status"] == "queued":
        why = await gateway.get(f"/requests/{view['request_id']}/why")
        progress.note(f"it {why['sentence']}")
    return 0


async def _to_the_end(
    gateway: GatewayClient, request_id: str, follows: bool, output: Path | None, json: bool
) -> int:
    """Wait until a request has ended and print its answer. Return the exit code."""
    progress = Progress(silent=json or not follows)
    try:
        if follows:
            with progress.shown():
                view = await follow(gateway, request_id, progress, as_json=json)
        else:
            view = await wait(gateway, request_id)
    except asyncio.CancelledError:  # Ctrl-C
        sys.stderr.write(
            f"tidegate: request {request_id} goes on without you; "
            f"tidegate status {request_id} --follow finds it again\n"
        )
        raise
    if json and not follows:
        show_json(view)
    saving = Progress(silent=json)
    await save_pictures(gateway, view, output, saving)
    return _code_of(view) if json else show_answer(view)


def _code_of(view: dict[str, Any]) -> int:
    return 0 if view["status"] in ("succeeded", "queued", "running") else 1


def _print_accepted(accepted: dict[str, Any], json: bool) -> None:
    if json:
        show_json(accepted)
        return
    typer.echo(accepted["request_id"])
    kind = accepted.get("type") or "of a type that is not certain yet"
    sys.stderr.write(
        f"tidegate: {accepted['status']}, {kind}; "
        f"tidegate status {accepted['request_id']} --follow shows the rest\n"
    )


_MOST_JOBS = 200
# Each column with the least width of a terminal on which it is shown.
_RUNNING_COLUMNS = (
    *(("request", 0), ("since", 0), ("state", 0), ("what", 90), ("type", 110), ("model", 130)),
)


def show_running(limit: int, json: bool) -> None:
    """Show at most `limit` running requests. Raises GatewayRefused, GatewayUnreachable."""
    items, complete = with_gateway(partial(_under_way, limit))
    if json:
        show_json({"items": items, "complete": complete})
        return
    now = datetime.now(UTC)
    rows = [_running_row(item, now) for item in items]
    _show(_RUNNING_COLUMNS, rows, "nothing is under way")
    if not complete:
        sys.stderr.write("tidegate: these are not all\n")


def _show(columns: Sequence[tuple[str, int]], rows: list[dict[str, str]], nothing: str) -> None:
    """Show as many columns as fit; ids stay whole, to be copied. `nothing` is shown without
    rows."""
    if not rows:
        sys.stderr.write(f"tidegate: {nothing}\n")
        return
    width = terminal_width()
    names = tuple(name for name, least in columns if least <= width)
    show_table("", names, [tuple(row[name] for name in names) for row in rows], whole=("request",))


async def _under_way(limit: int, gateway: GatewayClient) -> tuple[list[dict[str, Any]], bool]:
    """Return streams, native calls and jobs in progress, the oldest first, and whether these are
    all."""
    calls = await gateway.get("/requests/running")
    jobs = await gateway.get("/requests", status=Status.RUNNING.value, limit=str(_MOST_JOBS))
    items = sorted([*calls["items"], *jobs["items"]], key=lambda one: str(one["submitted_at"]))
    complete = calls["complete"] and jobs.get("next_cursor") is None and len(items) <= limit
    return items[:limit], complete


def _running_row(item: dict[str, Any], now: datetime) -> dict[str, str]:
    state = item["status"]
    if (limit := item.get("waits_for")) is not None:
        state += f" for {limit}"
    since = datetime.fromisoformat(item.get("admitted_at") or item["submitted_at"])
    return {
        "request": item["request_id"],
        "since": f"{max(0.0, (now - since).total_seconds()):.1f} s",
        "state": state,
        "what": item.get("endpoint") or item["source"],
        "type": item.get("type") or "",
        "model": item.get("model") or "",
    }


_PAGE = 200
_MOST_PAGES = 500
# Each column with the least width of a terminal on which it is shown.
_COLUMNS = (
    *(("request", 0), ("submitted (UTC)", 80), ("state", 0), ("type", 110), ("model", 130)),
    *(("waited", 90), ("took", 90), ("tokens", 140)),
)


class Source(StrEnum):
    JOB = "job"
    STREAM = "stream"
    RELAY = "relay"


Since = Annotated[
    str | None,
    typer.Option(
        help="Submitted at or after this time: 2026-01-31T12:00, or 2h for two hours ago."
    ),
]
Until = Annotated[str | None, typer.Option(help="Submitted before this time, in the same format.")]


def requests(
    status: Annotated[Status | None, typer.Option(help="Only requests in this state.")] = None,
    type_: Annotated[
        Kind | None, typer.Option("--type", help="Only requests of this type.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only requests to this model.")] = None,
    source: Annotated[
        Source | None, typer.Option(help="Only jobs, streams (/stream) or native calls (relay).")
    ] = None,
    conversation: Annotated[
        str | None, typer.Option(help="Only requests of this conversation.")
    ] = None,
    upstream: Annotated[str | None, typer.Option(help="Only requests to this upstream.")] = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Maximum number.")] = 20,
    cursor: Annotated[
        str | None, typer.Option(help="Continue after a page, with the cursor that it printed.")
    ] = None,
    running: Annotated[
        bool,
        typer.Option(
            "--running",
            help="Requests in progress, oldest first: streams and native calls that wait or run, "
            "and running jobs. Takes no other filter.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """List your requests, newest first."""
    first, last = _between(since, until)
    filters = given(
        status=status,
        type=type_,
        model=model,
        source=source,
        conversation=conversation,
        upstream=upstream,
        since=first and first.isoformat(),
        until=last and last.isoformat(),
    )
    query = {name: str(value) for name, value in filters.items()}
    if running:
        if query or cursor is not None:
            raise ConfigError("--running", None, "takes no other filter")
        show_running(limit, json)
        return
    items, after = with_gateway(partial(_listed, query, limit, cursor))
    if json:
        show_json({"items": items, "next_cursor": after})
        return
    _show(_COLUMNS, [_row(item) for item in items], "there are no such requests")
    if after is not None:
        sys.stderr.write(f"tidegate: there are more: --cursor {after}\n")


async def _listed(
    query: dict[str, str], limit: int, cursor: str | None, gateway: GatewayClient
) -> tuple[list[dict[str, Any]], str | None]:
    """Return the requested number of requests, page by page, and the cursor of the next ones."""
    items: list[dict[str, Any]] = []
    for _ in range(_MOST_PAGES):
        place = {} if cursor is None else {"cursor": cursor}
        most = str(min(_PAGE, limit - len(items)))
        page = await gateway.get("/requests", limit=most, **place, **query)
        items += page["items"]
        cursor = page.get("next_cursor")
        if cursor is None or len(items) >= limit:
            break
    return items, cursor


def time_of(option: str, text: str) -> datetime:
    """Parse a time in ISO 8601, in UTC without a zone, or a duration before now. Raises
    ConfigError."""
    try:
        at = datetime.fromisoformat(text)
        return at.astimezone(UTC) if at.tzinfo is not None else at.replace(tzinfo=UTC)
    except OverflowError:
        raise ConfigError(option, text, "must be in the years 1 to 9999 of UTC") from None
    except ValueError:
        pass  # then it must be a duration
    try:
        return datetime.now(UTC) - timedelta(milliseconds=span_ms(option, text))
    except (ConfigError, OverflowError):
        allowed = "must be a time such as 2026-01-31T12:00, or a span such as 2h"
        raise ConfigError(option, text, allowed) from None


def _between(since: str | None, until: str | None) -> tuple[datetime | None, datetime | None]:
    """Return both times. Raises ConfigError unless the first is before the second."""
    first = None if since is None else time_of("--since", since)
    last = None if until is None else time_of("--until", until)
    if first is not None and last is not None and first >= last:
        raise ConfigError("--until", until, f"must be later than --since {since}")
    return first, last


def _row(item: dict[str, Any]) -> dict[str, str]:
    state = item["status"]
    if (code := item.get("error_code")) is not None:
        state += f" ({code})"
    tokens = item.get("total_tokens")
    return {
        "request": item["request_id"],
        "submitted (UTC)": item["submitted_at"][:19].replace("T", " "),
        "state": state,
        "type": item.get("type") or "",
        "model": item.get("model") or "",
        "waited": _seconds(item.get("queue_ms")),
        "took": _seconds(item.get("upstream_ms")),
        "tokens": "" if tokens is None else str(tokens),
    }


def _seconds(span_ms_: float | None) -> str:
    return "" if span_ms_ is None else f"{span_ms_ / 1000:.1f} s"


class Ended(StrEnum):
    FAILED = "failed"
    DEAD = "dead"


def requeue(
    since: Annotated[
        str,
        typer.Option(
            help="Ended at or after this time: 2026-01-31T12:00, or 2h for two hours ago."
        ),
    ],
    until: Annotated[
        str | None, typer.Option(help="Ended before this time, in the same format.")
    ] = None,
    status: Annotated[
        list[Ended] | None, typer.Option(help="Jobs in this state; may be repeated.")
    ] = None,
    error_code: Annotated[
        str | None,
        typer.Option(help="Only jobs with this error code, such as upstream_unavailable."),
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Only those of this tenant.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Maximum number.")] = 1_000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    json: Json = False,
) -> None:
    """Queue failed jobs again, with the same ids; their webhooks are sent again.

    They start with all of their attempts and their whole deadline. Jobs that are queued already are
    not changed.
    """
    from tidegate.store.jobs import Requeue
    from tidegate.supervisor.maintenance import requeue as run

    first, last = _between(since, until)
    now = datetime.now(UTC)
    if first is None or first > now:
        raise ConfigError("--since", since, "must be in the past")
    order = Requeue(
        since=first,
        until=now if last is None else min(now, last),
        statuses=tuple(Status(one.value) for one in status or [Ended.FAILED]),
        tenant_id=tenant,
        error_code=error_code,
        limit=limit,
    )
    config = command_config("requeue", "warning")
    if dry_run:
        _show_requeued(run(config, order, by=None), json)
        return
    if not yes:
        report = run(config, order, by=None)
        if not report.matching:
            _show_requeued(report, json)
            return
        counts = ", ".join(f"{jobs} {code or '(none)'}" for code, jobs in report.by_code.items())
        more = f", the first {limit} of more" if report.has_more else ""
        confirm(f"Queue {counted(report.matching, 'job', 'jobs')} again ({counts}{more})?")
    _show_requeued(run(config, order, by=who()), json)


def _show_requeued(report: RequeueReport, json: bool) -> None:
    codes = "".join(f"{jobs:>8}  {code or '(none)'}\n" for code, jobs in report.by_code.items())
    more = "; there are more, repeat it" if report.has_more else ""
    text = f"{report.requeued} of {counted(report.matching, 'job', 'jobs')} queued again{more}"
    show_result(json, report, f"{codes}{text}")
