"""What the limiter of a pool tells of itself, counted."""

from __future__ import annotations

from tidegate.limiter.observer import Observer, State
from tidegate.metrics.names import Metric
from tidegate.metrics.tally import Known, Tally

MOST_LIMITS = 200


class Limiting(Observer):
    """One for each pool."""

    def __init__(self, tally: Tally, pool: str) -> None:
        self._tally = tally
        self._pool = (pool,)
        self._limits = Known(MOST_LIMITS)
        # There from the start: of a series that begins with an event Prometheus sees no increase.
        tally.add(Metric.FENCED, self._pool, 0)

    def state_changed(self, old: State, new: State) -> None:
        self._tally.add(Metric.STATE_CHANGES, (*self._pool, new))

    def fenced(self, held: int) -> None:
        if held:
            self._tally.add(Metric.FENCED, self._pool, held)

    def refused(self, limit: str, code: str) -> None:
        self._tally.add(Metric.REFUSALS, (*self._pool, self._limits.of(limit, learns=True), code))

    def synced(self, took_ms: float, entries: int) -> None:
        self._tally.observe(Metric.SYNC, self._pool, took_ms / 1000)
        self._tally.add(Metric.ENTRIES, self._pool, entries)
