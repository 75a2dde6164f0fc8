"""The past of all processes, added up for the charts and tables of one range of time.

Invariant: a span that can no longer change is read once, as long as somebody looks: what a look
costs does not grow with the range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tidegate.dashboard.rollup import FLUSH_EVERY_S, open_s
from tidegate.store.histogram import percentiles
from tidegate.store.history import History, Tally

SHARES = (0.5, 0.95, 0.99)
MOST_NAMES = 30
NOW_S = 60
_MOST_ADDED = 1_000  # names that are told apart while spans and processes are added up
_SINGLE = ("calls", "failed", "throttled", "told_429", "refused", "retried")


class Range(NamedTuple):
    """So many spans of one length, up to now. `every_s`: how often it is worth a look."""

    step_s: int
    spans: int
    every_s: float


RANGES: dict[str, Range] = {
    "5m": Range(10, 30, 5.0),
    "1h": Range(60, 60, 15.0),
    "24h": Range(300, 288, 60.0),
}


class Trend:
    """One range, of all pools. `look` reads what is new."""

    def __init__(self, history: History, wanted: Range) -> None:
        self._history = history
        self._wanted = wanted
        self._settled: dict[int, dict[str, Tally]] = {}
        self._open: dict[int, dict[str, Tally]] = {}
        self._settled_to = 0.0  # spans that begin before this are in `_settled`, or empty
        self._now = 0.0

    @property
    def every_s(self) -> float:
        return self._wanted.every_s

    async def look(self, now: float) -> None:
        """Bring it up to `now` (seconds since 1970). Raises StoreUnavailable."""
        step_s = self._wanted.step_s
        oldest = (now // step_s - self._wanted.spans) * step_s
        since = max(oldest, self._settled_to)
        fresh: dict[int, dict[str, Tally]] = {}
        for span, tally in await self._history.read(step_s, since):
            fresh.setdefault(span.at, {}).setdefault(span.pool, Tally()).merge(tally, _MOST_ADDED)
        settled_to = (now - open_s(step_s) - 3 * FLUSH_EVERY_S) // step_s * step_s
        self._settled_to = max(since, settled_to)
        self._settled |= {at: pools for at, pools in fresh.items() if at < self._settled_to}
        self._settled = {at: pools for at, pools in self._settled.items() if at >= oldest}
        self._open = {at: pools for at, pools in fresh.items() if at >= self._settled_to}
        self._now = now

    def frame(self, pool: str, weights: Mapping[str, int]) -> dict[str, Any]:
        """Lines and tables of one pool: spans that are over, rates by the second, lengths in ms.
        The upstreams are those of all pools.

        The tables have at most `MOST_NAMES` rows; `more` says how many names are left out.
        """
        step_s = self._wanted.step_s
        last = int(self._now // step_s) * step_s  # has only begun
        begins = [last - step_s * back for back in range(self._wanted.spans, 0, -1)]
        tallies = [self._of(at, pool) for at in begins]
        total = Tally()
        for tally in tallies:
            if tally is not None:
                total.merge(tally, _MOST_ADDED)
        return {
            "pool": pool,
            "step_s": step_s,
            "at": begins,
            **{name: [_rate(one, name, step_s) for one in tallies] for name in _SINGLE},
            "waits": _lines([None if one is None else one.waits for one in tallies]),
            "lengths": _lines([None if one is None else one.lengths for one in tallies]),
            "totals": total.counts,
            "total_waits": percentiles(total.waits, SHARES),
            "total_lengths": percentiles(total.lengths, SHARES),
            "tenants": [
                {**row, "weight": weights.get(row["name"], 1)} for row in _table(total, "tenant")
            ],
            "models": _table(total, "model"),
            "upstreams": _table(self._upstreams_at(begins), "upstream"),
            "codes": [[name, row[0]] for name, row in _largest(total, "code")],
        }

    def now(self, pool: str) -> dict[str, Any]:
        """The newest minute of a pool, as far as it is told."""
        step_s = self._wanted.step_s
        last = int(self._now // step_s) * step_s
        total = Tally()
        for at in range(last - NOW_S, last, step_s):
            tally = self._of(at, pool)
            if tally is not None:
                total.merge(tally, _MOST_ADDED)
        return {
            "per_second": total.counts.get("calls", 0) / NOW_S,
            "failed": total.counts.get("failed", 0),
            "throttled": total.counts.get("throttled", 0),
            "told_429": total.counts.get("told_429", 0),
            "waits": percentiles(total.waits, SHARES),
            "lengths": percentiles(total.lengths, SHARES),
        }

    def _of(self, at: int, pool: str) -> Tally | None:
        return self._pools_at(at).get(pool)

    def _pools_at(self, at: int) -> Mapping[str, Tally]:
        return self._open.get(at) or self._settled.get(at) or {}

    def _upstreams_at(self, begins: Sequence[int]) -> Tally:
        """What each upstream was called in these spans, whichever pool its calls were in."""
        total = Tally()
        for at in begins:
            for tally in self._pools_at(at).values():
                called = tally.apart.get("upstream", {})
                total.merge(Tally(apart={"upstream": called}), _MOST_ADDED)
        return total


def _rate(tally: Tally | None, name: str, step_s: int) -> float:
    return 0.0 if tally is None else round(tally.counts.get(name, 0) / step_s, 3)


def _lines(histograms: Sequence[int | None]) -> list[list[float | None]]:
    """A line for each of `SHARES`; a gap where nothing has ended."""
    columns = [percentiles(one or 0, SHARES) for one in histograms]
    return [[_rounded(column[line]) for column in columns] for line in range(len(SHARES))]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _largest(total: Tally, dimension: str) -> list[tuple[str, list[int]]]:
    names = total.apart.get(dimension, {})
    return sorted(names.items(), key=lambda one: (-one[1][0], one[0]))[:MOST_NAMES]


def _table(total: Tally, dimension: str) -> list[dict[str, Any]]:
    columns = ("calls", "failed", "throttled", "tokens", "cost_micros", "upstream_ms")
    return [
        {"name": name, **dict(zip(columns, row, strict=False))}
        for name, row in _largest(total, dimension)
    ]
