"""`tidegate requests --running`: what is under way at this moment under one's own key."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any

from tidegate.cli.client import Gateway, calling
from tidegate.cli.pool import show_json, show_table, terminal_width
from tidegate.store.states import Status

_MOST_JOBS = 200
# Each with the least width of a terminal on which it is shown.
_COLUMNS = (
    *(("request", 0), ("since", 0), ("state", 0), ("what", 90), ("type", 110), ("model", 130)),
)


def show_running(limit: int, json: bool) -> None:
    """At most `limit` of them. Raises GatewayRefused, GatewayUnreachable."""
    items, complete = calling(_under_way(limit))
    if json:
        show_json({"items": items, "complete": complete})
        return
    if items:
        width, now = terminal_width(), datetime.now(UTC)
        columns = [name for name, least in _COLUMNS if least <= width]
        rows = [tuple(_row(item, now)[name] for name in columns) for item in items]
        show_table("", tuple(columns), rows, whole=("request",))
    else:
        sys.stderr.write("tidegate: nothing is under way\n")
    if not complete:
        sys.stderr.write("tidegate: these are not all\n")


async def _under_way(limit: int) -> tuple[list[dict[str, Any]], bool]:
    """Streams, native calls and jobs, the oldest first, and whether these are all."""
    from tidegate.config import load_client

    async with Gateway(load_client()) as gateway:
        calls = await gateway.get("/requests/running")
        jobs = await gateway.get("/requests", status=Status.RUNNING.value, limit=str(_MOST_JOBS))
    items = sorted([*calls["items"], *jobs["items"]], key=lambda one: str(one["submitted_at"]))
    complete = calls["complete"] and jobs.get("next_cursor") is None and len(items) <= limit
    return items[:limit], complete


def _row(item: dict[str, Any], now: datetime) -> dict[str, str]:
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
