"""What the feed tells of the past and of the record, each when it is due.

Invariant: a range is looked up only while somebody wants it, however many do; what one look can't
get is asked for again at the next.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Set
from datetime import UTC, datetime
from typing import Any, NamedTuple

from tidegate.dashboard.frame import Frame
from tidegate.dashboard.trends import RANGES, Trend
from tidegate.http.services import Services
from tidegate.store.usage import Total

RECORD_EVERY_S = 10.0
MOST_ROWS = 30
_NOW = "5m"  # the newest minute is in it


class Wanted(NamedTuple):
    """What a viewer has chosen to look at."""

    range: str
    pool: str


class Past:
    """What has been looked up for the viewers of this process."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._trends: dict[str, Trend] = {}
        self._due_at: dict[str, float] = {}
        self._told: set[Wanted] = set()

    async def due(self, wanted: Set[Wanted]) -> AsyncIterator[tuple[str, Wanted | None, Frame]]:
        """The events that it is time for, and whose they are (None: everybody's).

        Raises StoreUnavailable.
        """
        ranges = {one.range for one in wanted} | {_NOW}
        for name in [name for name in self._trends if name not in ranges]:
            del self._trends[name]
            self._told = {one for one in self._told if one.range != name}
        self._told &= wanted
        for name in sorted(ranges, key=list(RANGES).index):
            trend = self._trends.setdefault(name, Trend(self._services.store.history, RANGES[name]))
            looked = self._is_due(name, trend.every_s)
            if looked:
                await trend.look(time.time())
                self._put_off(name, trend.every_s)
            for one in wanted:
                if one.range == name and (looked or one not in self._told):
                    self._told.add(one)
                    yield "trend", one, {"range": name, **self._frame(trend, one.pool)}
            if looked and name == _NOW:
                yield "now", None, {pool: trend.now(pool) for pool in self._services.limiters}
        if self._is_due("record", RECORD_EVERY_S):
            frame = await self._record()
            self._put_off("record", RECORD_EVERY_S)
            yield "record", None, frame

    def _is_due(self, name: str, every_s: float) -> bool:
        return time.monotonic() >= self._due_at.get(name, 0.0)

    def _put_off(self, name: str, every_s: float) -> None:
        self._due_at[name] = time.monotonic() + every_s

    def _frame(self, trend: Trend, pool: str) -> Frame:
        return trend.frame(pool, self._services.limiters[pool].policy.weights)

    async def _record(self) -> Frame:
        """What was spent, by the record, and how much waits for a person."""
        store, today = self._services.store, datetime.now(UTC).date()
        spans = {"day": today, "month": today.replace(day=1)}
        spent: dict[str, Any] = {}
        for span, since in spans.items():
            tenants = await store.usage.totals(["tenant"], since, today)
            models = await store.usage.totals(["model"], since, today)
            spent[span] = {
                "since": since,
                "tenants": _largest(tenants, "tenant"),
                "models": _largest(models, "model"),
                "total": _sum(tenants),
            }
        dead_jobs, webhooks = await store.stuck.counts()
        return {"spent": spent, "dead_jobs": dead_jobs, "webhooks_given_up": webhooks}


def _largest(totals: list[Total], name: str) -> list[Frame]:
    ordered = sorted(totals, key=lambda one: (one.cost_micros, one.requests), reverse=True)
    return [{"name": getattr(one, name), **_sum([one])} for one in ordered[:MOST_ROWS]]


def _sum(totals: list[Total]) -> Frame:
    names = ("requests", "input_tokens", "output_tokens", "images", "cost_micros", "unpriced")
    return {name: sum(getattr(one, name) for one in totals) for name in names}
