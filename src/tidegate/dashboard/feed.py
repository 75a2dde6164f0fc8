"""Feed of the dashboard: data for all viewers of this process, read once and encoded once.

    sampling task ─┬─ live, every second ──────────────┐
                   └─ frame, trends, record, less often ┴─► each viewer: the newest of each event

Invariants: the task runs only while there are viewers, and queries Valkey and PostgreSQL equally
often for one viewer or many. A slow viewer gets the newest frame of each event; at most one frame
of each event waits for it. A frame is bounded: it contains the busiest limits, tenants and
processes, and the number of others. A time span that can no longer change is read once while it is
shown.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

import orjson
from fastapi import FastAPI

from tidegate.dashboard.changes import (
    MOST_REVISIONS,
    pause_events,
    policy_events,
    upstream_events,
)
from tidegate.dashboard.rollup import EVERY_POOL, FLUSH_EVERY_S, SAMPLE_EVERY_S, open_s
from tidegate.errors import ShuttingDown, StoreUnavailable, TooManyFollowers
from tidegate.http.services import Services
from tidegate.limiter import (
    Concurrency,
    LimitView,
    PoolPolicy,
    QueueView,
    Quota,
    Rate,
    SessionView,
    Snapshot,
)
from tidegate.metrics.process import Note
from tidegate.metrics.verdict import found_by, judge, waiting_by_limit
from tidegate.policy.format import caller_of, is_of_models, subject_of
from tidegate.policy.inspection import is_full, words_of
from tidegate.policy.learned import LearnedLimit
from tidegate.prices.budgets import Budget, scope_values, whom, window
from tidegate.spine.routing import DRAINED
from tidegate.store.budgets import BudgetBook
from tidegate.store.statistics import OTHERS, CallCounts, History, Total, percentiles
from tidegate.telemetry.logging import Log, get_logger

MOST_LIMITS = 100
MOST_TENANTS = 50
MOST_PROCESSES = 100
MOST_FOUND = 10
MOST_BUDGETS = 20
MOST_LEARNED = 20
MOST_WAITERS = 3
LIMITS_PAGE = 25
ALL = ""  # in place of a pool: all pools
NO_GROUP = "(none)"
Grouping = Literal["none", "model", "tenant", "kind"]
_SORTS = {"c": "concurrency", "r": "rate", "q": "quota"}
_LIMIT_FIELDS = (
    *("limit", "bound", "current", "used", "waiting", "lapsing", "reserved", "shadowed"),
    *("paused_ms", "paused_by", "room_in_ms"),
)

Frame = dict[str, Any]
Frames = Frame | list[Frame]


async def live_frame(services: Services) -> Frame:
    """Return the pools as in Valkey, the upstreams as in the processes, and the verdict."""
    deployment, loads = await asyncio.gather(
        services.standing.look(), services.upstreams.loads.get()
    )
    known = [one.snapshot for one in deployment.pools if one.snapshot is not None]
    return {
        "at": time.time(),
        "all_tenants": len({one.tenant for snapshot in known for one in snapshot.tenants}),
        "all_processes": len({one.name for snapshot in known for one in snapshot.processes}),
        "verdict": judge(deployment),
        "pools": [
            {"pool": one.pool, "problem": one.problem}
            if one.snapshot is None
            else pool_frame(one.pool, one.snapshot, one.policy, one.learned)
            for one in deployment.pools
        ],
        "postgresql_away": services.store.connections.unavailable,
        "upstreams": [
            upstream_frame(name, deployment.notes) | {"load": str(loads.get(name, ""))}
            for name in services.spine.health
        ],
    }


def upstream_frame(upstream: str, notes: Iterable[Note]) -> Frame:
    """Return the worst state of an upstream in any process.

    `found` lists the processes where it is not ok; `drained`: an operator is the reason in all.
    """
    by_process = found_by(upstream, notes)
    bad = [(process, one) for process, one in by_process if one.state != "ok" or one.key_refused]
    return {
        "upstream": upstream,
        "state": by_process[0][1].state,
        "key_refused": any(one.key_refused for _, one in by_process),
        "unpaid": any(one.unpaid for _, one in by_process),
        "detail": by_process[0][1].why,
        "processes": len(by_process),
        "out_in": len(bad),
        "drained": bool(bad) and all(one.why.endswith(DRAINED) for _, one in bad),
        "found": [
            {"process": process, "state": one.state, "detail": one.why}
            for process, one in bad[:MOST_FOUND]
        ],
    }


def pool_frame(
    pool: str, snapshot: Snapshot, policy: PoolPolicy, learned: Sequence[LearnedLimit] = ()
) -> Frame:
    """Return the frame of one pool; docs/dashboard.md describes how the page shows it."""
    limits = sorted(snapshot.limits.values(), key=_pressure, reverse=True)
    processes = sorted(snapshot.processes, key=lambda one: (-one.held, one.name))
    tenants = _tenants(snapshot)
    chosen = sorted(limits[:MOST_LIMITS], key=lambda one: one.limit)
    waiting_at = _by_process(snapshot.queues)
    others = {one.limit: one.others_share for one in learned}
    held_up = waiting_by_limit(snapshot)
    differing = [one for one in learned if one.drift != "same"]
    return {
        "pool": pool,
        "revision": snapshot.revision,
        "fair_by": policy.fair_by,
        "recovering_ms": snapshot.recovering_ms,
        "in_flight": sum(one.held for one in snapshot.processes),
        "waiting": sum(one.waiting for one in snapshot.tenants),
        "limits": [
            _limit(one, policy, others.get(one.limit, 0.0))
            | {"tenants": _most_waiting(one, held_up)}
            for one in chosen
        ],
        "all_limits": len(limits),
        "paused_limits": sum(one.paused_ms > 0 for one in limits),
        "learned": [_learned(one) for one in differing[:MOST_LEARNED]],
        "more_limits": len(limits) - len(chosen),
        "tenants": tenants[:MOST_TENANTS],
        "more_tenants": len(tenants[MOST_TENANTS:]),
        "processes": [_process(one, waiting_at) for one in processes[:MOST_PROCESSES]],
        "more_processes": len(processes[MOST_PROCESSES:]),
    }


def limits_page(
    pools: Iterable[tuple[str, Snapshot, PoolPolicy]], group: Grouping, search: str, offset: int
) -> Frame:
    """Return a page of the limits whose ids contain all words of `search`, by group and name.

    `groups` has the totals of all limits of each group.
    """
    words = search.lower().split()
    known = [
        (pool, snapshot, policy, waiting_by_limit(snapshot)) for pool, snapshot, policy in pools
    ]
    found = sorted(
        (
            (_group_of(view.limit, group), view.limit, pool, view, policy, held_up)
            for pool, snapshot, policy, held_up in known
            for view in snapshot.limits.values()
            if all(word in view.limit.lower() for word in words)
        ),
        key=lambda one: one[:3],
    )
    groups: dict[str, Frame] = {}
    for name, _, _, view, *_ in found:
        one = groups.setdefault(name, {"group": name, "limits": 0, "waiting": 0, "full": 0})
        one["limits"] += 1
        one["waiting"] += view.waiting
        one["full"] += is_full(view)
    page = found[offset : offset + LIMITS_PAGE]
    return {
        "total": len(found),
        "limits": [
            _limit(view, policy, 0.0)
            | {"pool": pool, "group": name, "tenants": _most_waiting(view, held_up)}
            for name, _, pool, view, policy, held_up in page
        ],
        "groups": [groups[name] for name in dict.fromkeys(one[0] for one in page)],
    }


def _most_waiting(view: LimitView, held_up: Mapping[str, Counter[str]]) -> list[tuple[str, int]]:
    """Return the tenants with most calls that wait for a limit."""
    return held_up[view.limit].most_common(MOST_WAITERS) if view.waiting else []


def _group_of(limit_id: str, group: Grouping) -> str:
    """Return the group of a limit; `(none)` if it does not bind what limits are grouped by."""
    whom = subject_of(limit_id)
    if group == "none" or whom is None:
        return "" if group == "none" else NO_GROUP
    if group == "model":
        return whom if is_of_models(whom) else NO_GROUP
    if group == "tenant" and (caller := caller_of(limit_id)) is not None:
        return caller[1] if caller[0] != "key" else NO_GROUP
    head, _, name = whom.partition("/")
    return name if head == group else NO_GROUP


def _pressure(view: LimitView) -> tuple[bool, int, float]:
    return view.paused_ms > 0, view.waiting, view.used / max(1, view.current)


def _learned(one: LearnedLimit) -> Frame:
    return {
        "limit": one.limit,
        "model": one.model,
        "bound": one.bound,
        "in_force": one.in_force,
        "drift": one.drift,
    }


def _limit(view: LimitView, policy: PoolPolicy, others_share: float) -> Frame:
    limit = policy.limit(view.limit)
    found: Frame = {
        **{name: getattr(view, name) for name in _LIMIT_FIELDS},
        "sort": _SORTS.get(view.sort, view.sort),
        "words": words_of(view, limit),
        "shadow": limit is not None and limit.shadow,
        "others_share": others_share,
    }
    if isinstance(limit, Rate | Quota):
        found["source"] = limit.source
    if isinstance(limit, Concurrency):
        found |= {"adaptive": limit.adaptive is not None, "unit": limit.unit}
    if isinstance(limit, Rate):
        found |= {"unit": limit.unit, "window_ms": limit.window_ms}
    if isinstance(limit, Quota):
        found |= {"unit": limit.unit, "zone": limit.zone}
    return found


def weights_in(policies: Sequence[PoolPolicy]) -> dict[str, int | None]:
    """Return the configured weights of tenants; None if a tenant's weight differs between pools."""
    named = {name for policy in policies for name in policy.weights}
    found = {name: {policy.weights.get(name, 1) for policy in policies} for name in named}
    return {name: min(one) if len(one) == 1 else None for name, one in found.items()}


def _tenants(snapshot: Snapshot) -> list[Frame]:
    """Return the waiting tenants, longest queue first, with the limit that blocks most calls of
    each.
    """
    held_up: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for queue in snapshot.queues:
        held_up[queue.tenant][queue.held_up_by or ""] += queue.waiting
    found = [
        {
            "tenant": one.tenant,
            "waiting": one.waiting,
            "weight": one.weight,
            "held_up_by": _largest(held_up[one.tenant]),
        }
        for one in snapshot.tenants
    ]
    return sorted(found, key=lambda one: (-one["waiting"], one["tenant"]))


def _largest(counted: Mapping[str, int]) -> str:
    """Return the limit with the most waiting calls; empty if there is none."""
    return max(counted, key=lambda limit: counted[limit], default="")


def _by_process(queues: Iterable[QueueView]) -> Mapping[str, int]:
    waiting: defaultdict[str, int] = defaultdict(int)
    for queue in queues:
        waiting[queue.sid] += queue.waiting
    return waiting


def _process(view: SessionView, waiting_at: Mapping[str, int]) -> Frame:
    return {
        "process": view.name,
        "session": view.sid,
        "left_ms": view.left_ms,
        "held": view.held,
        "waiting": waiting_at.get(view.sid, 0),
        "blocked": view.blocked,
    }


SHARES = (0.5, 0.95, 0.99)
MOST_NAMES = 30
NOW_S = 60
_MOST_ADDED = 1_000  # names that are counted separately when spans and processes are added up
_SINGLE = ("calls", "failed", "throttled", "told_429", "refused", "retried", "cost_micros")
MOST_STACKED = 6
MOST_SPARKS = 30
SPARK_POINTS = 30
_ROLLOUT_GAP_S = 300  # processes that start later are of another rollout
_PoolLimit = tuple[str, str]  # limits of different pools may have the same id


class Range(NamedTuple):
    """A number of time spans of one length, up to now. every_s: how often they are read."""

    step_s: int
    spans: int
    every_s: float


RANGES: dict[str, Range] = {
    "5m": Range(10, 30, 5.0),
    "1h": Range(60, 60, 15.0),
    "24h": Range(300, 288, 60.0),
}


class Trend:
    """The counts of all pools in one range. `look` reads what is new."""

    def __init__(self, history: History, span: Range) -> None:
        self._history = history
        self._span = span
        self._settled: dict[int, dict[str, CallCounts]] = {}
        self._open: dict[int, dict[str, CallCounts]] = {}
        self._settled_to = 0.0  # spans that begin earlier are in `_settled`, or empty
        self._now = 0.0

    @property
    def every_s(self) -> float:
        return self._span.every_s

    async def look(self, now: float) -> None:
        """Update it to `now` (seconds since 1970). Raises StoreUnavailable."""
        step_s = self._span.step_s
        oldest = (now // step_s - self._span.spans) * step_s
        since = max(oldest, self._settled_to)
        fresh: dict[int, dict[str, CallCounts]] = {}
        for span, tally in await self._history.read(step_s, since):
            fresh.setdefault(span.at, {}).setdefault(span.pool, CallCounts()).merge(
                tally, _MOST_ADDED
            )
        settled_to = (now - open_s(step_s) - 3 * FLUSH_EVERY_S) // step_s * step_s
        self._settled_to = max(since, settled_to)
        self._settled |= {at: pools for at, pools in fresh.items() if at < self._settled_to}
        self._settled = {at: pools for at, pools in self._settled.items() if at >= oldest}
        self._open = {at: pools for at, pools in fresh.items() if at >= self._settled_to}
        self._now = now

    def frame(self, pool: str, weights: Mapping[str, int | None]) -> dict[str, Any]:
        """Return the lines and tables of one pool, or of `ALL`.

        They cover completed spans, with rates per second and durations in ms. The upstreams are
        those of all pools. The tables have at most `MOST_NAMES` rows.
        """
        step_s = self._span.step_s
        last = int(self._now // step_s) * step_s  # this span has just begun
        begins = [last - step_s * back for back in range(self._span.spans, 0, -1)]
        counts = [self._of(at, pool) for at in begins]
        total = _merged(counts)
        return {
            "pool": pool,
            "step_s": step_s,
            "at": begins,
            **{name: [_rate(one, name, step_s) for one in counts] for name in _SINGLE},
            "waits": _lines([one.waits for one in counts]),
            "queue": _queue([self._queued_at(at, pool) for at in begins], step_s),
            "sparks": _sparks([self._queued_at(at, pool) for at in begins], step_s),
            "started": self._started(begins),
            "lengths": _lines([one.lengths for one in counts]),
            "totals": total.counts,
            "total_waits": percentiles(total.waits, SHARES),
            "total_lengths": percentiles(total.lengths, SHARES),
            "tenants": [
                {**row, "weight": weights.get(row["name"], 1)} for row in _table(total, "tenant")
            ],
            "models": _table(total, "model"),
            "upstreams": _table(self._upstreams_at(begins), "upstream"),
            "codes": [[name, row[0]] for name, row in _largest_rows(total, "code")],
        }

    def now(self, pool: str) -> dict[str, Any]:
        """Return the newest minute of a pool, as far as it is known."""
        step_s = self._span.step_s
        last = int(self._now // step_s) * step_s
        total = _merged([self._of(at, pool) for at in range(last - NOW_S, last, step_s)])
        return {
            "per_second": total.counts.get("calls", 0) / NOW_S,
            "failed": total.counts.get("failed", 0),
            "throttled": total.counts.get("throttled", 0),
            "told_429": total.counts.get("told_429", 0),
            "waits": percentiles(total.waits, SHARES),
            "lengths": percentiles(total.lengths, SHARES),
        }

    def _of(self, at: int, pool: str) -> CallCounts:
        if pool == ALL:
            return _merged(self._pools_at(at).values())
        return self._pools_at(at).get(pool) or CallCounts()

    def _pools_at(self, at: int) -> Mapping[str, CallCounts]:
        return self._open.get(at) or self._settled.get(at) or {}

    def _queued_at(self, at: int, pool: str) -> dict[_PoolLimit, int]:
        """Return the waiting calls of all samples of a span, by pool and blocking limit."""
        return {
            (one, name): row[0]
            for one, counts in self._pools_at(at).items()
            if pool in (ALL, one)
            for name, row in counts.by_group.get("limit", {}).items()
        }

    def _started(self, begins: Iterable[int]) -> list[Frame]:
        """Return when processes started, those of one rollout together, newest first."""
        found: list[Frame] = []
        last_at: dict[str, int] = {}
        for at in begins:
            counts = self._pools_at(at).get(EVERY_POOL) or CallCounts()
            for version, (amount, *_) in counts.by_group.get("started", {}).items():
                rollout = next((one for one in reversed(found) if one["version"] == version), None)
                if rollout is None or at - last_at[version] > _ROLLOUT_GAP_S:
                    rollout = {"at": at, "version": version, "processes": 0}
                    found.append(rollout)
                rollout["processes"] += amount
                last_at[version] = at
        return found[::-1]

    def _upstreams_at(self, begins: Sequence[int]) -> CallCounts:
        """Return the calls of each upstream in these spans, from all pools."""
        counts = [one for at in begins for one in self._pools_at(at).values()]
        called = [one.by_group.get("upstream", {}) for one in counts]
        return _merged([CallCounts(by_group={"upstream": one}) for one in called])


def _merged(counts: Iterable[CallCounts]) -> CallCounts:
    total = CallCounts()
    for one in counts:
        total.merge(one, _MOST_ADDED)
    return total


def _rate(counts: CallCounts, name: str, step_s: int) -> float:
    return round(counts.counts.get(name, 0) / step_s, 3)


def _lines(histograms: Sequence[int]) -> list[list[float | None]]:
    """Return a line for each of `SHARES`, with gaps where nothing has ended."""
    columns = [percentiles(one, SHARES) for one in histograms]
    return [[_rounded(column[line]) for column in columns] for line in range(len(SHARES))]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _queue(sampled: Sequence[Mapping[_PoolLimit, int]], step_s: int) -> list[Frame]:
    """Return the mean number of waiting calls by blocking limit.

    The largest ones come first, then all others together.
    """
    totals: Counter[_PoolLimit] = Counter()
    for span in sampled:
        totals.update(span)
    named = sorted(totals, key=lambda one: (-totals[one], one))
    named = [one for one in named if one[1] != OTHERS][:MOST_STACKED]
    lines = [
        {"pool": pool, "name": name, "line": _depths(sampled, {(pool, name)}, step_s)}
        for pool, name in named
    ]
    rest = totals.keys() - set(named)
    if rest:
        lines.append({"pool": ALL, "name": OTHERS, "line": _depths(sampled, rest, step_s)})
    return lines


def _sparks(sampled: Sequence[Mapping[_PoolLimit, int]], step_s: int) -> list[Frame]:
    """Return the mean number of waiting calls by blocking limit, in few points, for the limits that
    held up most calls.
    """
    totals: Counter[_PoolLimit] = Counter()
    for span in sampled:
        totals.update(span)
    largest = sorted(totals, key=lambda one: (-totals[one], one))[:MOST_SPARKS]
    spans = -(-len(sampled) // SPARK_POINTS)  # of a point
    lines = {one: [0] * -(-len(sampled) // spans) for one in largest if one[1] != OTHERS}
    for at, span in enumerate(sampled):
        for one in span.keys() & lines.keys():
            lines[one][at // spans] += span[one]
    samples = spans * step_s / SAMPLE_EVERY_S
    return [
        {"pool": pool, "name": name, "line": [round(waiting / samples, 1) for waiting in line]}
        for (pool, name), line in lines.items()
    ]


def _depths(
    sampled: Sequence[Mapping[_PoolLimit, int]], limits: Set[_PoolLimit], step_s: int
) -> list[float]:
    samples = step_s / SAMPLE_EVERY_S
    return [
        round(sum(waiting for one, waiting in span.items() if one in limits) / samples, 1)
        for span in sampled
    ]


def _largest_rows(total: CallCounts, dimension: str) -> list[tuple[str, list[int]]]:
    names = total.by_group.get(dimension, {})
    return sorted(names.items(), key=lambda one: (-one[1][0], one[0]))[:MOST_NAMES]


def _table(total: CallCounts, dimension: str) -> list[dict[str, Any]]:
    columns = ("calls", "failed", "throttled", "tokens", "cost_micros", "upstream_ms")
    return [
        {"name": name, **dict(zip(columns, row, strict=False))}
        for name, row in _largest_rows(total, dimension)
    ]


RECORD_EVERY_S = 10.0
EVENTS_EVERY_S = 5.0
MOST_EVENTS = 50
_LONGEST_SHOWN = timedelta(days=1)  # the time of the longest charts
BUDGETS_EVERY_S = 2.0
MOST_ROWS = 30
_NOW = "5m"  # contains the newest minute


class Viewing(NamedTuple):
    """What a viewer has selected."""

    range: str
    pool: str


class Past:
    """Charts and records for the viewers of this process, read when they are due."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._trends: dict[str, Trend] = {}
        self._due_at: dict[str, float] = {}
        self._sent: set[Viewing] = set()
        self._records: dict[str, Frame] = {}  # by the pool of the spend, or `ALL`
        self._sent_record: set[Viewing] = set()

    async def due(
        self, viewings: Set[Viewing]
    ) -> AsyncIterator[tuple[str, Viewing | None, Frame | list[Frame]]]:
        """Yield the events that are due, each with the selection it is for, None for all viewers.

        Raises StoreUnavailable.
        """
        ranges = {one.range for one in viewings} | {_NOW}
        for name in [name for name in self._trends if name not in ranges]:
            del self._trends[name]
            self._due_at.pop(name, None)  # otherwise it would be shown as empty until it is due
            self._sent = {one for one in self._sent if one.range != name}
        self._sent &= viewings
        for name in sorted(ranges, key=list(RANGES).index):
            trend = self._trends.setdefault(name, Trend(self._services.store.history, RANGES[name]))
            is_due = self._is_due(name, trend.every_s)
            if is_due:
                await trend.look(time.time())
                self._put_off(name, trend.every_s)
            for one in viewings:
                if one.range == name and (is_due or one not in self._sent):
                    self._sent.add(one)
                    yield "trend", one, {"range": name, **self._frame(trend, one.pool)}
            if is_due and name == _NOW:
                pools = (ALL, *self._services.limiters)
                yield "now", None, {pool: trend.now(pool) for pool in pools}
        if self._is_due("budgets", BUDGETS_EVERY_S):
            frame = await self._budgets()
            self._put_off("budgets", BUDGETS_EVERY_S)
            yield "budgets", None, frame
        if self._is_due("events", EVENTS_EVERY_S):
            events = await self._events()
            self._put_off("events", EVENTS_EVERY_S)
            yield "events", None, events
        self._sent_record &= viewings
        for pool in sorted({one.pool for one in viewings}):
            is_due = self._is_due(f"record {pool}", RECORD_EVERY_S)
            if is_due:
                self._records[pool] = await self._record(pool)
                self._put_off(f"record {pool}", RECORD_EVERY_S)
            for one in viewings:
                if one.pool == pool and (is_due or one not in self._sent_record):
                    self._sent_record.add(one)
                    yield "record", one, self._records[pool]

    def _is_due(self, name: str, every_s: float) -> bool:
        return time.monotonic() >= self._due_at.get(name, 0.0)

    def _put_off(self, name: str, every_s: float) -> None:
        self._due_at[name] = time.monotonic() + every_s

    def _frame(self, trend: Trend, pool: str) -> Frame:
        limiters = self._services.limiters
        chosen = limiters.values() if pool == ALL else [limiters[pool]] if pool in limiters else ()
        return trend.frame(pool, weights_in([limiter.policy for limiter in chosen]))

    async def _events(self) -> list[Frame]:
        """Return recent changes of limits and upstreams, and pauses, newest first."""
        services, since = self._services, datetime.now(UTC) - _LONGEST_SHOWN
        events = [
            event
            for pool, keeper in list(services.keepers.items())
            for event in policy_events(pool, await keeper.history(MOST_REVISIONS))
        ]
        events += pause_events(await services.store.tenants.actions.pauses(since, MOST_EVENTS))
        events += upstream_events(await services.upstreams.record.history(MOST_REVISIONS))
        return sorted(events, key=lambda one: -one["at"])[:MOST_EVENTS]

    async def _budgets(self) -> Frame:
        """Return the usage of budgets by book: paused ones first, then the most used."""
        records = self._services.budgets.records
        _, found = await records.all()
        books = await records.books() if found else []
        return budgets_frame(found, books)

    async def _record(self, pool: str) -> Frame:
        """Return the recorded spend at a pool's upstream, or at `ALL`, and the stuck work."""
        store, today = self._services.store, datetime.now(UTC).date()
        spans = {"day": today, "month": today.replace(day=1)}
        spent: dict[str, Any] = {}
        for span, since in spans.items():
            tenants = await store.usage.totals(["tenant"], since, today, upstream=pool or None)
            models = await store.usage.totals(["model"], since, today, upstream=pool or None)
            spent[span] = {
                "since": since,
                "tenants": _largest_span(tenants, "tenant"),
                "models": _largest_span(models, "model"),
                "total": _sum(tenants),
            }
        stuck = await store.stuck.counts()
        return {
            "pool": pool,
            "spent": spent,
            "dead_jobs": stuck.jobs,
            "webhooks_given_up": stuck.webhooks,
        }


def budgets_frame(budgets: Sequence[Budget], books: Sequence[BudgetBook]) -> Frame:
    """Return the frame of budgets. `books`: the most used first."""
    by_name = {one.name: one for one in budgets}
    known = [one for one in books if one.budget in by_name]
    paused = [one for one in known if one.paused_since is not None]
    listed = [*paused, *(one for one in known if one.paused_since is None)][:MOST_BUDGETS]
    return {
        "budgets": [_budget(by_name[one.budget], one) for one in listed],
        "paused": len(paused),
        "more": len(known) - len(listed),
    }


def _budget(budget: Budget, book: BudgetBook) -> Frame:
    binds = ", ".join(whom(budget)) or "all calls"
    same = ("unit", "amount", "spent", "estimated", "held", "reset_at", "paused_since")
    return {
        "name": budget.name,
        "scope": scope_values(book.scope),
        "each": budget.each,
        "words": f"{binds}, {window(budget)}",
        "fallback": budget.fallback,
        **{name: getattr(book, name) for name in same},
    }


def _largest_span(totals: list[Total], name: str) -> list[Frame]:
    ordered = sorted(totals, key=lambda one: (one.cost_micros, one.requests), reverse=True)
    return [{"name": getattr(one, name), **_sum([one])} for one in ordered[:MOST_ROWS]]


def _sum(totals: list[Total]) -> Frame:
    tokens = ("input_tokens", "output_tokens", "thoughts_tokens")
    names = ("requests", *tokens, "images", "cost_micros", "unpriced")
    return {name: sum(getattr(one, name) for one in totals) for name in names}


MOST_VIEWERS = 200
LIVE_EVERY_S = 1.0
PAST_EVERY_S = 1.0

log = get_logger()


class Viewer:
    """An open page. `take` waits for new frames."""

    __slots__ = ("_frames", "_ready", "has_left", "viewing")

    def __init__(self, viewing: Viewing) -> None:
        self.viewing = viewing
        self.has_left = False
        self._frames: dict[str, bytes] = {}
        self._ready = asyncio.Event()

    def offer(self, event: str, frame: bytes) -> None:
        """Add a frame, replacing an older frame of the event that was not taken."""
        self._frames[event] = frame
        self._ready.set()

    def leave(self) -> None:
        """End the viewer, because the client has disconnected or the process drains."""
        self.has_left = True
        self._ready.set()

    async def take(self) -> bytes:
        """Return the encoded newest frames since the last call; empty at the end."""
        await self._ready.wait()
        self._ready.clear()
        frames, self._frames = self._frames, {}
        return b"" if self.has_left else b"".join(frames.values())


class Feed:
    """The feed of an API process; see `feed_of`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._viewers: set[Viewer] = set()
        self._sampling: asyncio.Task[None] | None = None
        self._newest: dict[tuple[str, Viewing | None], bytes] = {}

    def __repr__(self) -> str:
        return f"<Feed viewers={len(self._viewers)} sampling={self._sampling is not None}>"

    @contextmanager
    def watched(self, viewing: Viewing) -> Iterator[Viewer]:
        """Yield a viewer for the duration of the block.

        Raises TooManyFollowers and ShuttingDown.
        """
        if self._services.draining.is_set():
            raise ShuttingDown("this process is stopping; retry")
        if len(self._viewers) >= MOST_VIEWERS:
            raise TooManyFollowers("too many dashboards are open at this process; retry later")
        viewer = Viewer(viewing)
        for (event, whose), frame in self._newest.items():
            if whose in (None, viewing):
                viewer.offer(event, frame)
        self._viewers.add(viewer)
        if self._sampling is None:
            self._sampling = asyncio.create_task(self._sample(), name="dashboard-feed")
        try:
            yield viewer
        finally:
            self._viewers.discard(viewer)
            if not self._viewers and self._sampling is not None:
                self._sampling.cancel()
                self._sampling = None
                self._newest.clear()

    async def _sample(self) -> None:
        past = Past(self._services)
        works = (
            self._repeat(LIVE_EVERY_S, self._send_live),
            self._repeat(PAST_EVERY_S, lambda: self._send_past(past)),
        )
        tasks = [asyncio.create_task(work) for work in works]
        try:
            await self._services.draining.wait()
        finally:
            for task in tasks:
                task.cancel()
            for viewer in self._viewers:
                viewer.leave()

    async def _repeat(self, every_s: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            started = time.monotonic()
            try:
                await work()
            except StoreUnavailable as unavailable:
                log.debug(Log.STORE_AWAY, detail=unavailable.message)
            except Exception:  # the top of a task: logged, and the loop continues
                log.exception(Log.INTERNAL_ERROR)
            took_s = time.monotonic() - started
            await asyncio.sleep(max(every_s - took_s, every_s / 4))

    async def _send_live(self) -> None:
        self._send("live", await live_frame(self._services))

    async def _send_past(self, past: Past) -> None:
        """Read what is due. Viewers that arrived since the last read are served by the next one."""
        viewings = {viewer.viewing for viewer in self._viewers}
        async for event, whose, frame in past.due(viewings):
            self._send(event, frame, whose)

    def _send(self, event: str, frame: Frames, whose: Viewing | None = None) -> None:
        encoded = b"event: %b\ndata: %b\n\n" % (event.encode(), orjson.dumps(frame))
        self._newest[event, whose] = encoded
        for viewer in self._viewers:
            if whose in (None, viewer.viewing):
                viewer.offer(event, encoded)


def feed_of(app: FastAPI) -> Feed:
    """Return the feed of an application, created with its first viewer."""
    feed: Feed | None = getattr(app.state, "dashboard_feed", None)
    if feed is None:
        feed = app.state.dashboard_feed = Feed(app.state.services)
    return feed
