"""Answered requests, counted by the class of their path."""

from __future__ import annotations

from tidegate.metrics.names import Metric
from tidegate.metrics.tally import Tally

NATIVE = "native"
# The first part of a path, as a label: what a client makes up is none.
_ROUTES = {
    *("submit", "stream", "status", "files", "requests", "usage", "health", "admin", "dashboard"),
    *("metrics", "docs", "static"),
}
_BATCHES = ("/v1/batches", "/v1/files")


def route_of(path: str) -> str:
    """The class of a path that is not a native call's."""
    if path.startswith(_BATCHES):
        return "batches"
    first = path.removeprefix("/llm").lstrip("/").partition("/")[0]
    return first if first in _ROUTES else "other"


def count_answer(tally: Tally, route: str, status: int, took_s: float) -> None:
    """An HTTP request that has been answered; status 0: its client went before it was."""
    tally.add(Metric.HTTP, (route, str(status)))
    tally.add(Metric.HTTP_SECONDS, (route,), took_s)
