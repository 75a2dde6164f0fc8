"""Prometheus metrics: names, labels, counters, and the registry of a process.

Under a supervisor the processes of a machine share one folder of values, so a restarted process
continues the counters of its predecessor; gauges of dead processes are removed. See
docs/observability.md.

Invariants: no label contains a request id or text of a client; the numbers of tenants and models
are bounded; adding to a counter takes no lock. Base units: seconds, bytes.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    values,
)
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from tidegate.errors import CallPreempted
from tidegate.limiter import Observer, State
from tidegate.metrics._compat import add_counts
from tidegate.record import JUDGE, RETRIED, CallRecord
from tidegate.telemetry.logging import NAMED, SHARED

Sort = Literal["counter", "gauge", "histogram"]
# How the values of several processes on one machine are combined. `livesum`, `livemax` and
# `livemostrecent` combine those of living processes only.
Merge = Literal["", "livesum", "livemax", "livemostrecent"]

_WAITS_S = (
    0.001,
    0.005,
    0.02,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
    1800.0,
)
_QUICK_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
# Buckets of OpenTelemetry's conventions for generative AI.
CALL_BUCKETS_S = tuple(0.01 * 2**step for step in range(14))
TOKEN_BUCKETS = tuple(float(4**step) for step in range(14))
# window: second, minute, hour, day or month; empty if not stated, which usually means a minute.
_ANNOUNCED = "upstream model unit window"
_GEN_AI = "gen_ai_operation_name gen_ai_provider_name gen_ai_request_model"


@dataclass(frozen=True, slots=True, eq=False)
class Spec:
    """A metric.

    labels: in order. everywhere: the value is true of the whole deployment and the same in every
    process; otherwise it covers the processes of one machine.
    """

    name: str
    sort: Sort
    help_text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: Merge = ""
    everywhere: bool = False


def _counter(name: str, help_text: str, labels: str = "") -> Spec:
    return Spec(name, "counter", help_text, tuple(labels.split()))


def _histogram(name: str, help_text: str, buckets: tuple[float, ...], labels: str) -> Spec:
    return Spec(name, "histogram", help_text, tuple(labels.split()), buckets)


def _own(name: str, help_text: str, labels: str = "", *, merge: Merge = "livesum") -> Spec:
    return Spec(name, "gauge", help_text, tuple(labels.split()), merge=merge)


def _of_all(name: str, help_text: str, labels: str = "") -> Spec:
    return Spec(name, "gauge", help_text, tuple(labels.split()), everywhere=True)


class Metric:
    """All metrics."""

    CALLS = _counter(
        "tidegate_calls_total",
        "Calls that have ended. status: succeeded, failed, cancelled, expired, dead, refused, or "
        "retried for an attempt that returns to its queue. source: relay, stream, job, batch, or "
        "judge for a call of the classifier, which is not a request",
        "source kind pool model status",
    )
    FAILURES = _counter(
        "tidegate_failures_total",
        "Calls that failed, by error code",
        "source pool code",
    )
    TENANT_CALLS = _counter(
        "tidegate_tenant_calls_total", "Calls that have ended, by tenant", "tenant status"
    )
    TENANT_TOKENS = _counter(
        "tidegate_tenant_tokens_total", "Charged tokens, by tenant", "tenant type"
    )
    TENANT_COST = _counter("tidegate_tenant_cost_total", "Cost in US dollars, by tenant", "tenant")
    TENANT_QUEUE = _counter(
        "tidegate_tenant_queue_seconds_total",
        "Time in the queue, of admitted calls, by tenant",
        "tenant",
    )
    TOKENS = _counter(
        "tidegate_tokens_total",
        "Charged tokens, and those of the classifier's calls. cached is a part of input, "
        "thoughts is not a part of output",
        "pool model type",
    )
    COST = _counter(
        "tidegate_cost_total",
        "Cost in US dollars, the classifier's calls included",
        "pool model",
    )
    ATTEMPTS = _counter(
        "tidegate_attempts_total", "Calls to upstreams, retries included", "source pool"
    )
    THROTTLED = _counter(
        "tidegate_throttled_total", "Calls to upstreams that were answered with 429", "source pool"
    )
    PREEMPTED = _counter(
        "tidegate_preempted_total",
        "Calls of jobs and batch lines that were preempted by a higher band, and are made again",
        "source pool",
    )
    RETRIES = _counter(
        "tidegate_retries_total",
        "Retries: calls to upstreams after the first of a request",
        "source pool",
    )
    QUEUE = _histogram(
        "tidegate_queue_seconds",
        "Time from receipt to admission, of admitted calls",
        _WAITS_S,
        "source kind pool",
    )
    FIRST_BYTE = _histogram(
        "tidegate_first_byte_seconds",
        "Time from sending a call to the first byte of its answer, of calls that succeeded",
        CALL_BUCKETS_S,
        "source pool",
    )
    GEN_AI_DURATION = _histogram(
        "gen_ai_client_operation_duration_seconds",
        "Duration of a request's last call upstream; gen_ai.client.operation.duration",
        CALL_BUCKETS_S,
        f"{_GEN_AI} error_type pool",
    )
    GEN_AI_TOKENS = _histogram(
        "gen_ai_client_token_usage",
        "Tokens of a call; gen_ai.client.token.usage of OpenTelemetry",
        TOKEN_BUCKETS,
        f"{_GEN_AI} gen_ai_token_type",
    )
    GEN_AI_FIRST_CHUNK = _histogram(
        "gen_ai_client_operation_time_to_first_chunk_seconds",
        "Time to the first chunk of a stream; gen_ai.client.operation.time_to_first_chunk",
        CALL_BUCKETS_S,
        _GEN_AI,
    )
    HTTP = _counter("tidegate_http_requests_total", "Answered HTTP requests", "route status")
    HTTP_SECONDS = _counter(
        "tidegate_http_request_seconds_total",
        "Time from receipt to the end of the answer, in total",
        "route",
    )
    SYNC = _histogram(
        "tidegate_limiter_sync_seconds",
        "Round trips of the limiter's script to Valkey",
        _QUICK_S,
        "pool",
    )
    ENTRIES = _counter(
        "tidegate_limiter_entries_total",
        "Entries (a release, a new waiter, a cancellation) that those round trips carried",
        "pool",
    )
    REFUSALS = _counter(
        "tidegate_limiter_refusals_total", "Waiters that were rejected", "pool limit code"
    )
    FENCED = _counter(
        "tidegate_limiter_fenced_permits_total",
        "Running calls that were cancelled because this process had lost its session",
        "pool",
    )
    STATE_CHANGES = _counter(
        "tidegate_limiter_state_changes_total",
        "Transitions of a limiter into a state",
        "pool state",
    )
    STATE = _own(
        "tidegate_limiter_processes", "Processes by the state of their limiter", "pool state"
    )
    HELD = _own("tidegate_permits_held", "Permits in use, by process", "pool process")
    WAITERS = _own("tidegate_waiters", "Calls that wait for admission, by process", "pool process")
    UPSTREAM_OUT = _own(
        "tidegate_upstream_out",
        "Processes for which an upstream is out of service after failures",
        "upstream",
    )
    KEY_REFUSED = _own(
        "tidegate_upstream_key_refused",
        "Processes whose key an upstream has rejected, or whose account there has no credit",
        "upstream",
    )
    ANNOUNCED_BOUND = _own(
        "tidegate_upstream_announced_limit",
        "The upstream's own rate limit, as its last answer reported it",
        _ANNOUNCED,
        merge="livemostrecent",
    )
    ANNOUNCED_LEFT = _own(
        "tidegate_upstream_announced_remaining",
        "The remainder of that limit, as the last answer reported it",
        _ANNOUNCED,
        merge="livemostrecent",
    )
    ANNOUNCED_RESET = _own(
        "tidegate_upstream_announced_reset_timestamp_seconds",
        "When that limit resets, as the last answer reported it; Unix time",
        _ANNOUNCED,
        merge="livemostrecent",
    )
    POSTGRES_AWAY = _own("tidegate_postgres_away", "Processes for which PostgreSQL is unavailable")
    BLOBS_AWAY = _own("tidegate_blobs_away", "Processes for which the blob store is unavailable")
    PROBLEMS = _counter(
        "tidegate_problems_total",
        "Log lines of level warning or higher, by event; those of other libraries are `other`",
        "event",
    )
    SPILL = _own(
        "tidegate_spill_bytes", "Records on disk that PostgreSQL could not accept", merge="livemax"
    )
    UNWRITTEN = _own(
        "tidegate_record_waiting", "Records of native calls that are not yet written", "process"
    )
    DROPPED = _counter(
        "tidegate_record_dropped_total", "Records dropped because the buffer was full"
    )
    LOOP_LAG = _histogram(
        "tidegate_event_loop_lag_seconds",
        "Delay of a timer of the event loop, measured four times a second",
        _QUICK_S,
        "process",
    )
    MEMORY = _own("tidegate_process_resident_memory_bytes", "Resident memory", "process")
    CPU = _counter("tidegate_process_cpu_seconds_total", "CPU time used", "process")
    STARTED = _own(
        "tidegate_process_start_time_seconds", "Start of a process; Unix time", "process"
    )

    BUILD = _of_all("tidegate_build_info", "1, with the version as a label", "version")
    VALKEY_UP = _of_all("tidegate_valkey_up", "1 if Valkey has answered for the pool", "pool")
    POSTGRES_UP = _of_all("tidegate_postgres_up", "1 if PostgreSQL has answered and accepts writes")
    BOUND = _of_all("tidegate_limit_bound", "Bound of a limit in force", "pool limit")
    CURRENT = _of_all(
        "tidegate_limit_current",
        "Current bound of an adaptive limit; of other limits the bound",
        "pool limit",
    )
    USED = _of_all(
        "tidegate_limit_used",
        "Permits in use; of a rate, the reserved and used amount in its window",
        "pool limit",
    )
    WAITING = _of_all("tidegate_limit_waiting", "Calls that wait for a limit", "pool limit")
    LAPSING = _of_all(
        "tidegate_limit_lapsing", "Permits in use that belong to expired sessions", "pool limit"
    )
    PAUSED = _of_all(
        "tidegate_limit_paused_seconds",
        "Remaining time of a pause; 0: not paused",
        "pool limit",
    )
    LEARNED = _of_all(
        "tidegate_limit_learned_bound",
        "Bound of a limit, as the provider's answers report it",
        "pool limit",
    )
    DRIFT = _of_all(
        "tidegate_limit_drift",
        "Reported bound less the bound in force; 0 if no limit is set",
        "pool limit",
    )
    OTHERS = _of_all(
        "tidegate_limit_others_ratio",
        "Share of a limit that others on the same account use",
        "pool limit",
    )
    SESSIONS = _of_all("tidegate_sessions", "Processes in the pool", "pool")
    BLOCKED = _of_all(
        "tidegate_sessions_blocked", "Processes in the pool that are paused or unreachable", "pool"
    )
    RECOVERING = _of_all(
        "tidegate_pool_recovering_seconds",
        "Remaining quiet time after Valkey lost its data, in which no call is admitted",
        "pool",
    )
    EPOCH = _of_all(
        "tidegate_pool_epoch", "Epoch of the pool; it grows when Valkey has lost its data", "pool"
    )
    REVISION = _of_all("tidegate_policy_revision", "Revision of the policy in force", "pool")
    TENANT_WAITING = _of_all(
        "tidegate_tenant_waiting", "Calls that wait for admission, by tenant", "pool tenant"
    )
    QUEUED = _of_all(
        "tidegate_queue_jobs",
        "Jobs ready to be claimed, at most 10,000 of a queue. lane: their type, or unsure",
        "pool lane tenant",
    )
    OLDEST = _of_all(
        "tidegate_queue_oldest_seconds",
        "Age of the oldest job that is ready to be claimed",
        "pool lane",
    )
    RETRYING = _of_all("tidegate_jobs_retrying", "Jobs that wait for a retry, up to 10,000")
    CLAIMED = _of_all(
        "tidegate_jobs_claimed", "Claimed jobs that wait for admission in workers, up to 10,000"
    )
    RUNNING = _of_all("tidegate_jobs_running", "Running jobs, up to 10,000")
    DEAD = _of_all("tidegate_jobs_dead", "Dead jobs that need an operator, up to 10,000")
    WEBHOOKS = _of_all("tidegate_webhooks_pending", "Webhooks that wait for delivery, up to 10,000")
    WEBHOOKS_OLDEST = _of_all(
        "tidegate_webhooks_oldest_seconds", "Time since the oldest waiting webhook was due"
    )
    WORKERS = _of_all("tidegate_workers", "Workers heard of within a minute")
    BUDGET_USED = _of_all(
        "tidegate_budget_used_ratio",
        "Share of a budget that is spent and reserved in its period; not of those with `each`",
        "budget",
    )
    BUDGET_PAUSED = _of_all(
        "tidegate_budget_paused", "Paused ledgers of a budget, to be resumed", "budget"
    )
    SERVER_RUNNING = _of_all(
        "tidegate_server_running", "Requests that a self-hosted server is processing", "upstream"
    )
    SERVER_WAITING = _of_all(
        "tidegate_server_waiting", "Requests in a server's own queue", "upstream"
    )
    SERVER_SLOTS = _of_all(
        "tidegate_server_slots", "Requests that a server can work on at a time", "upstream"
    )
    SERVER_KV_USED = _of_all(
        "tidegate_server_kv_cache_used_ratio", "Share of a server's KV cache in use", "upstream"
    )
    SERVER_KV_TOKENS = _of_all(
        "tidegate_server_kv_cache_tokens",
        "Capacity of a server's KV cache, in tokens",
        "upstream",
    )
    LEFT_OUT = _of_all(
        "tidegate_metrics_left_out", "Limits, tenants or queues beyond those that are shown", "what"
    )


ALL: tuple[Spec, ...] = tuple(one for one in vars(Metric).values() if isinstance(one, Spec))


MOST_TENANTS = 100
MOST_MODELS = 100
OTHER = "other"

Labels = tuple[str, ...]


class Known:
    """A bounded set of names: the first `most` names are kept, all later ones become `other`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._names: set[str] = set()

    def __len__(self) -> int:
        return len(self._names)

    def of(self, name: str, *, learns: bool) -> str:
        """Return the name as a label. `learns`: it is no client's invention and may be kept."""
        if name in self._names:
            return name
        if not learns or len(self._names) >= self._most:
            return OTHER
        self._names.add(name)
        return name


class Count:
    """The growth of a counter since it was last taken."""

    __slots__ = ("amount", "told")

    def __init__(self) -> None:
        self.amount = 0.0
        self.told = False  # a counter is exported from the first time on, even if it is zero

    def add(self, amount: float = 1) -> None:
        self.amount += amount


class Spread:
    """The growth of a histogram since it was last taken.

    counts: per bucket; the last one is unbounded. total: the sum of the values.
    """

    __slots__ = ("_bounds", "counts", "is_new", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.is_new = False

    def add(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value
        self.is_new = True

    def extend(self, values: Collection[float], scale: int = 1) -> None:
        """Add values that are `scale` times as large as they should be."""
        ordered, counts, below = sorted(values), self.counts, 0
        for place, bound in enumerate(self._bounds):
            up_to = bisect_right(ordered, bound * scale)
            counts[place] += up_to - below
            below = up_to
        counts[-1] += len(ordered) - below
        self.total += sum(ordered) / scale
        self.is_new = True

    def clear(self) -> None:
        self.counts = [0] * len(self.counts)
        self.total, self.is_new = 0.0, False


class Tally:
    """The counters and histograms of one process. Callers may keep those that they get."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Spec, Labels], Count] = {}
        self._spreads: dict[tuple[Spec, Labels], Spread] = {}
        self._answers: dict[tuple[str, int], tuple[Count, Count]] = {}
        self._sources: list[Callable[[], None]] = []

    def also(self, settle: Callable[[], None]) -> None:
        """Call `settle`, which adds what its owner has summed up, before anything is taken."""
        self._sources.append(settle)

    def _settle(self) -> None:
        for settle in self._sources:
            settle()

    def count(self, metric: Spec, labels: Labels) -> Count:
        cell = self._counts.get((metric, labels))
        if cell is None:
            cell = self._counts[metric, labels] = Count()
        return cell

    def spread(self, metric: Spec, labels: Labels) -> Spread:
        cell = self._spreads.get((metric, labels))
        if cell is None:
            cell = self._spreads[metric, labels] = Spread(metric.buckets)
        return cell

    def add(self, metric: Spec, labels: Labels, amount: float = 1) -> None:
        self.count(metric, labels).add(amount)

    def observe(self, metric: Spec, labels: Labels, value: float) -> None:
        self.spread(metric, labels).add(value)

    def answered(self, route: str, status: int, took_s: float) -> None:
        """Count an answered HTTP request; status 0: its client disconnected before."""
        cells = self._answers.get((route, status))
        if cells is None:
            cells = self._answers[route, status] = (
                self.count(Metric.HTTP, (route, str(status))),
                self.count(Metric.HTTP_SECONDS, (route,)),
            )
        cells[0].amount += 1
        cells[1].amount += took_s

    def take_counts(self) -> Iterator[tuple[Spec, Labels, float]]:
        """Yield and reset the counters that have grown or are new."""
        self._settle()
        for (metric, labels), cell in self._counts.items():
            if cell.amount or not cell.told:
                amount, cell.amount, cell.told = cell.amount, 0.0, True
                yield metric, labels, amount

    def take_spreads(self) -> Iterator[tuple[Spec, Labels, Sequence[int], float]]:
        """Yield and reset the histograms that have grown: the counts of the buckets, the sum."""
        self._settle()
        for (metric, labels), cell in self._spreads.items():
            if cell.is_new:
                counts, total = cell.counts, cell.total
                cell.clear()
                yield metric, labels, counts, total


PROVIDERS = {"gemini": "gcp.gemini"}  # other providers have the name of their dialect
_MICROS = 1_000_000
_MOST_SORTS = 5_000
_MOST_UNSETTLED = 1_000
# Source, kind, pool, model and tenant; operation, dialect, status and code of a failure.
_Sort = tuple[tuple[str, str | None, str, str | None, str], tuple[str, str, str, str]]


class Calls:
    """Counters of ended calls. Listens to `CallListeners`.

    Calls that are alike add to the same `_Cells`, which are settled before the tally is taken.
    """

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._tenants = Known(MOST_TENANTS)
        self._models = Known(MOST_MODELS)
        self._cells: dict[_Sort, _Cells] = {}  # by what is on record, if that is what is shown
        self._shown: dict[_Sort, _Cells] = {}  # by the labels
        self._unsettled: list[_Cells] = []
        tally.also(self.settle)

    def take(self, batch: Sequence[CallRecord]) -> None:
        """Count ended calls."""
        for one in batch:
            # A call that was not admitted waited in the pool of `waits_for`.
            sort = (
                (one.source, one.kind, one.pool or one.waits_for[0], one.model, one.tenant_id),
                (one.operation, one.dialect, one.status, one.code or ""),
            )
            cells = self._cells.get(sort)
            if cells is None:
                cells = self._found(sort, has_attempts=one.attempts > 0)
            if not cells.calls:
                self._unsettled.append(cells)
            elif cells.calls >= _MOST_UNSETTLED:
                cells.settle()
            cells.add(one)

    def settle(self) -> None:
        """Add what the calls since the last time came to."""
        unsettled, self._unsettled = self._unsettled, []
        for cells in unsettled:
            cells.settle()

    def _found(self, sort: _Sort, *, has_attempts: bool) -> _Cells:
        # Only the model of a successful call is certainly not a client's invention.
        (source, kind, pool, model, tenant), called = sort
        status = called[2]
        shown_model = self._models.of(model, learns=status == "succeeded") if model else ""
        shown_tenant = self._tenants.of(tenant, learns=has_attempts)
        shown = (source, kind, pool, shown_model, shown_tenant), called
        cells = self._shown.get(shown)
        if cells is None:
            if len(self._shown) >= _MOST_SORTS:  # the tally keeps the values
                self.settle()
                self._shown.clear()
                self._cells.clear()
            cells = self._shown[shown] = _Cells(self._tally, shown)
        if (shown_model, shown_tenant) == (model or "", tenant):
            self._cells[sort] = cells
        return cells


class _Cells:
    """Counters of calls with the same labels. Calls of the classifier count for no tenant.

    calls, attempts, retries, cost_micros, the tokens and the lists of seconds are what is not
    settled yet.
    """

    def __init__(self, tally: Tally, shown: _Sort) -> None:
        (source, kind, pool, model, tenant), (operation, dialect, status, code) = shown
        worked = status == "succeeded"
        self._failed = "" if worked else code or status
        self._tally = tally
        self._where = (pool, model or "")
        self._source = source
        self._is_retried = status == RETRIED

        def of_tenant(metric: Spec, *labels: str) -> Count:
            return Count() if source == JUDGE else tally.count(metric, (tenant, *labels))

        model_labels = (operation, PROVIDERS.get(dialect, dialect), model or "")
        self._calls = tally.count(Metric.CALLS, (source, kind or "", pool, model or "", status))
        self._of_tenant = of_tenant(Metric.TENANT_CALLS, status)
        self._failures = None
        if self._failed == CallPreempted.code:
            self._failures = tally.count(Metric.PREEMPTED, (source, pool))
        elif self._failed:
            self._failures = tally.count(Metric.FAILURES, (source, pool, self._failed))
        self._attempts = tally.count(Metric.ATTEMPTS, (source, pool))
        self._queue = tally.spread(Metric.QUEUE, (source, kind or "", pool))
        self._tenant_queue = of_tenant(Metric.TENANT_QUEUE)
        self._duration = tally.spread(Metric.GEN_AI_DURATION, (*model_labels, self._failed, pool))
        self._first_byte = tally.spread(Metric.FIRST_BYTE, (source, pool))
        self._first_chunk = tally.spread(Metric.GEN_AI_FIRST_CHUNK, model_labels)
        self._cost = tally.count(Metric.COST, self._where)
        self._tenant_cost = of_tenant(Metric.TENANT_COST)
        self._tokens = {
            name: (
                tally.count(Metric.TOKENS, (*self._where, name)),
                of_tenant(Metric.TENANT_TOKENS, name),
            )
            for name in ("input", "output", "cached", "thoughts")
        }
        self._of_a_call = {
            name: tally.spread(Metric.GEN_AI_TOKENS, (*model_labels, name))
            for name in ("input", "output")
        }
        self._clear()

    def _clear(self) -> None:
        self.calls = self.attempts = self.retries = self.cost_micros = 0
        self.cached_tokens = self.thoughts_tokens = 0
        self.input_tokens: list[int] = []
        self.output_tokens: list[int] = []
        self.queue_ms: list[float] = []
        self.upstream_ms: list[float] = []
        self.first_byte_ms: list[float] = []
        self.first_chunk_ms: list[float] = []

    def add(self, one: CallRecord) -> None:
        """Add one ended call."""
        self.calls += 1
        if attempts := one.attempts:
            self._add_attempts(one, attempts)
        charge = one.charge
        usage = charge.usage
        if amount := charge.cost_micros:
            self.cost_micros += amount
        if amount := usage.input_tokens:
            self.input_tokens.append(amount)
        if amount := usage.output_tokens:
            self.output_tokens.append(amount)
        if amount := usage.cached_tokens:
            self.cached_tokens += amount
        if amount := usage.thoughts_tokens:
            self.thoughts_tokens += amount

    def _add_attempts(self, one: CallRecord, attempts: int) -> None:
        self.attempts += attempts
        self.retries += attempts - 1 + self._is_retried
        if one.tries_elsewhere is not None:
            for pool, count in one.tries_elsewhere.items():
                self._tally.add(Metric.ATTEMPTS, (self._source, pool), count)
                self.attempts -= count
        if one.throttled_by is not None:
            for (_, pool), count in one.throttled_by.items():
                self._tally.add(Metric.THROTTLED, (self._source, pool), count)
        if one.queue_ms is not None:
            self.queue_ms.append(one.queue_ms)
        if one.upstream_ms is None:
            return
        self.upstream_ms.append(one.upstream_ms)
        first_byte_ms = one.answer.first_byte_ms
        if first_byte_ms is not None and not self._failed:
            self.first_byte_ms.append(first_byte_ms)
            if one.streamed:
                self.first_chunk_ms.append(first_byte_ms)

    def settle(self) -> None:
        """Add what is not settled yet to the tally."""
        self._calls.amount += self.calls
        self._of_tenant.amount += self.calls
        if self._failures is not None:
            self._failures.amount += self.calls
        self._attempts.amount += self.attempts
        if self.retries:
            self._tally.add(Metric.RETRIES, (self._source, self._where[0]), self.retries)
        self._cost.amount += self.cost_micros / _MICROS
        self._tenant_cost.amount += self.cost_micros / _MICROS
        self._tenant_queue.amount += sum(self.queue_ms) / 1000
        for lengths_ms, spread in (
            *((self.queue_ms, self._queue), (self.upstream_ms, self._duration)),
            *((self.first_byte_ms, self._first_byte), (self.first_chunk_ms, self._first_chunk)),
        ):
            if lengths_ms:
                spread.extend(lengths_ms, scale=1000)
        for name, of_calls in (("input", self.input_tokens), ("output", self.output_tokens)):
            if of_calls:
                self._of_a_call[name].extend(of_calls)
        for name, amount in (
            *(("input", sum(self.input_tokens)), ("output", sum(self.output_tokens))),
            *(("cached", self.cached_tokens), ("thoughts", self.thoughts_tokens)),
        ):
            of_all, of_tenant = self._tokens[name]
            of_all.amount += amount
            of_tenant.amount += amount
        self._clear()


MOST_LIMITS = 200


class Limiting(Observer):
    """Metrics of the limiter, one per pool."""

    def __init__(self, tally: Tally, pool: str) -> None:
        self._tally = tally
        self._pool = (pool,)
        self._limits = Known(MOST_LIMITS)
        # Exported from the start: no increase is seen in a series that begins with an event.
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


disable_created_metrics()  # type: ignore[no-untyped-call] # creation times would add half to the size, and are not used


_RESERVED_BYTES = 1 << 20  # the size with which prometheus_client creates a file


def share_by_name() -> None:
    """Share values under the name of this process, if a supervisor has given it one.

    Call it before the first `Instruments`.
    """
    name = os.environ.get(NAMED)
    if name and SHARED in os.environ:
        _reserve(name, Path(os.environ[SHARED]))
        values.ValueClass = values.MultiProcessValue(lambda: name)  # type: ignore[no-untyped-call]


def _reserve(name: str, folder: Path) -> None:
    """Create the files of a process's values with all their blocks, if there is room: writing to a
    mapped page for which a full disk has no room would kill the process."""
    if sys.platform != "linux":
        return
    sorts = {
        f"gauge_{one.merge or 'all'}" if one.sort == "gauge" else one.sort
        for one in ALL
        if not one.everywhere
    }
    for sort in sorts:
        with (folder / f"{sort}_{name}.db").open("ab") as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, _RESERVED_BYTES)


def forget(name: str, folder: str) -> None:
    """Remove the gauges of a process that has died; its counters stay."""
    mark_process_dead(name, folder)  # type: ignore[no-untyped-call]


def count_problem(event: str, name: str, folder: str) -> None:
    """Count a log line of a process without instruments, in the values of `folder`."""
    metric, file = Metric.PROBLEMS, MmapedDict(str(Path(folder) / f"counter_{name}.db"))  # type: ignore[no-untyped-call]
    series = metric.name.removesuffix("_total")
    key = mmap_key(series, metric.name, [*metric.labels], [event], metric.help_text)
    try:
        before, at = file.read_value(key)  # type: ignore[no-untyped-call]
        file.write_value(key, before + 1, at)  # type: ignore[no-untyped-call]
    finally:
        file.close()  # type: ignore[no-untyped-call]


class Instruments:
    """The metrics of a process: call `flush`, then read `registry`."""

    def __init__(self) -> None:
        self.tally = Tally()
        self._own = CollectorRegistry()
        self._made: dict[Spec, Counter | Gauge | Histogram] = {
            metric: _made(metric, self._own) for metric in ALL if not metric.everywhere
        }
        self._children: dict[tuple[Spec, Labels], Counter | Gauge | Histogram] = {}
        self._last: dict[tuple[Spec, Labels], float] = {}  # the values of gauges
        self.registry = self._own
        if SHARED in os.environ:
            self.registry = CollectorRegistry()
            MultiProcessCollector(self.registry)  # type: ignore[no-untyped-call]

    def set(self, metric: Spec, labels: Labels, value: float) -> None:
        """Set a gauge."""
        if metric.merge == "livemostrecent" or self._last.get((metric, labels)) != value:
            self._last[metric, labels] = value
            cast(Gauge, self._child(metric, labels)).set(value)

    def forget(self, label: str, value: str) -> None:
        """Remove the gauges with a label's value that no longer exists.

        If processes share their values they become 0, because the files of others cannot be
        changed.
        """
        for metric, labels in list(self._children):
            made = self._made[metric]
            if (
                isinstance(made, Gauge)
                and dict(zip(metric.labels, labels, strict=True)).get(label) == value
            ):
                cast(Gauge, self._children.pop((metric, labels))).set(0)
                self._last.pop((metric, labels), None)
                if SHARED not in os.environ:
                    made.remove(*labels)

    def flush(self) -> None:
        """Move the counts of the tally to the registry."""
        for metric, labels, amount in self.tally.take_counts():
            cast(Counter, self._child(metric, labels)).inc(amount)
        for metric, labels, counts, total in self.tally.take_spreads():
            add_counts(cast(Histogram, self._child(metric, labels)), counts, total)

    def also(self, collector: Collector) -> CollectorRegistry:
        """Return a registry with the metrics of the processes and those of `collector`."""
        both = CollectorRegistry()
        both.register(_All(self.registry))
        both.register(collector)
        return both

    def _child(self, metric: Spec, labels: Labels) -> Counter | Gauge | Histogram:
        child = self._children.get((metric, labels))
        if child is None:
            made = self._made[metric]
            child = made.labels(*labels) if labels else made
            self._children[metric, labels] = child
        return child


class _All(Collector):
    """A registry as part of another one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self):  # type: ignore[no-untyped-def] # as the library's own are
        return self._registry.collect()


def _made(spec: Spec, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if spec.sort == "counter":
        return Counter(spec.name, spec.help_text, spec.labels, registry=registry)
    if spec.sort == "histogram":
        return Histogram(
            spec.name, spec.help_text, spec.labels, registry=registry, buckets=spec.buckets
        )
    return Gauge(
        spec.name,
        spec.help_text,
        spec.labels,
        registry=registry,
        multiprocess_mode=spec.merge or "all",
    )
