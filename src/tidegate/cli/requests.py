"""`tidegate requests`: what was asked of a Tidegate under one's own key."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

import typer

from tidegate.call import Kind
from tidegate.cli.client import Gateway, calling
from tidegate.cli.limits import span_ms
from tidegate.cli.pool import Json, show_json, show_table, terminal_width
from tidegate.cli.running import show_running
from tidegate.errors import ConfigError
from tidegate.store.states import Status

_PAGE = 200
_MOST_PAGES = 500
# Each with the least width of a terminal on which it is shown.
_COLUMNS = (
    *(("request", 0), ("submitted (UTC)", 80), ("state", 0), ("type", 110), ("model", 130)),
    *(("waited", 90), ("took", 90), ("tokens", 140)),
)


class Source(StrEnum):
    JOB = "job"
    STREAM = "stream"
    RELAY = "relay"


def requests(
    status: Annotated[Status | None, typer.Option(help="Only in this state.")] = None,
    type_: Annotated[Kind | None, typer.Option("--type", help="Only of this type.")] = None,
    model: Annotated[str | None, typer.Option(help="Only by this model.")] = None,
    source: Annotated[Source | None, typer.Option(help="Only that came this way.")] = None,
    since: Annotated[
        str | None,
        typer.Option(help="From this time on: 2026-01-31T12:00, or 2h for the last two hours."),
    ] = None,
    until: Annotated[str | None, typer.Option(help="Before this time, in the same way.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most.")] = 20,
    cursor: Annotated[
        str | None, typer.Option(help="Go on after the last page: it was told there.")
    ] = None,
    running: Annotated[
        bool,
        typer.Option(
            "--running",
            help="What is under way now, the oldest first: streams and native calls that wait or "
            "run, which come into the list once they have ended, and jobs that run. Takes no "
            "other filter.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """List your requests, the newest first."""
    given = {
        "status": status,
        "type": type_,
        "model": model,
        "source": source,
        "since": None if since is None else time_of("--since", since).isoformat(),
        "until": None if until is None else time_of("--until", until).isoformat(),
    }
    query = {name: str(value) for name, value in given.items() if value is not None}
    if running:
        if query or cursor is not None:
            raise ConfigError("--running", "", "takes no other filter")
        show_running(limit, json)
        return
    items, after = calling(_listed(query, limit, cursor))
    if json:
        show_json({"items": items, "next_cursor": after})
        return
    if items:
        _show(items)
    else:
        sys.stderr.write("tidegate: there are no such requests\n")
    if after is not None:
        sys.stderr.write(f"tidegate: there are more: --cursor {after}\n")


def _show(items: list[dict[str, Any]]) -> None:
    """As many columns as fit; ids stay whole, to be copied."""
    width = terminal_width()
    columns = [column for column in _COLUMNS if column[1] <= width]
    rows = [_row(item) for item in items]
    show_table(
        "",
        tuple(name for name, _ in columns),
        [tuple(row[name] for name, _ in columns) for row in rows],
        whole=("request",),
    )


async def _listed(
    query: dict[str, str], limit: int, cursor: str | None
) -> tuple[list[dict[str, Any]], str | None]:
    """As many as wanted, page by page, and where the next would begin."""
    from tidegate.config import load_client

    items: list[dict[str, Any]] = []
    async with Gateway(load_client()) as gateway:
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
    """A time of ISO 8601, without a zone in UTC, or one so long ago. Raises ConfigError."""
    try:
        at = datetime.fromisoformat(text)
        return at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    except ValueError:
        pass  # then it must be a span
    try:
        return datetime.now(UTC) - timedelta(milliseconds=span_ms(option, text))
    except (ConfigError, OverflowError):
        allowed = "must be a time such as 2026-01-31T12:00, or a span such as 2h"
        raise ConfigError(option, text, allowed) from None


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
