"""Process state and scrapes: this process, all processes, and the whole deployment.

Each process publishes a note in Valkey every second; any process can report the notes of all.

Invariants: the state of a process is read only from its memory, without prompts, answers or keys;
an answer meets its deadline, without the data of a store that did not answer; the stores are
queried once a second, whatever the number of scrapes.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from functools import cache
from typing import Any, Generic, TypeVar

import orjson
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from tidegate import __version__
from tidegate.errors import LimiterUnavailable, StoreUnavailable
from tidegate.limiter import Limiter, Snapshot
from tidegate.metrics.instruments import (
    MOST_MODELS,
    MOST_TENANTS,
    OTHER,
    Instruments,
    Known,
    Metric,
    Spec,
)
from tidegate.policy.learned import LearnedLimit, shared_limits
from tidegate.policy.rollout import PolicyKeeper
from tidegate.record import ActiveCall, ActiveCalls, CallRecord
from tidegate.spine.learning import Announcement
from tidegate.spine.routing import Gate, State
from tidegate.store.notifications import next_beat_s
from tidegate.store.statistics import MOST_QUEUES, Depths, QueueDepth, QueueDepths
from tidegate.store.store import Store
from tidegate.telemetry.logging import (
    UPKEEP_FAILURES,
    Log,
    get_logger,
    problem_counts,
    recent_problems,
)
from tidegate.upstream.server_load import ServerLoad, ServerLoads

EVERY_S = 0.25
GAUGES_EVERY_S = 1.0
_IDLE_USE_EVERY_S = 4.5
_STATES = ("up", "away", "recovering")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4_096


T = TypeVar("T")


class Recent(Generic[T]):
    """A cached answer for all callers, requested again only if it is older than `fresh_s`."""

    def __init__(self, fresh_s: float, source: Callable[[], Awaitable[T]]) -> None:
        self._fresh_s = fresh_s
        self._source = source
        self._answers: list[tuple[float, T]] = []
        self._asking = asyncio.Lock()

    async def get(self) -> T:
        """Return the answer. Raises what the request raises."""
        async with self._asking:
            if not self._answers or time.monotonic() - self._answers[0][0] > self._fresh_s:
                answer = await self._source()
                self._answers[:] = [(time.monotonic(), answer)]
            return self._answers[0][1]


class Watch:
    """Updates the gauges of a process. `name` identifies it among the processes of this machine."""

    def __init__(
        self,
        instruments: Instruments,
        name: str,
        *,
        limiters: Mapping[str, Limiter],
        store: Store,
        health: Mapping[str, Gate],
    ) -> None:
        self._instruments = instruments
        self._name = (name,)
        self.limiters = limiters
        self.store = store
        self.health = health
        self._cpu_s = 0.0
        self._dropped = 0
        self._problems: Counter[str] = Counter()
        for event in UPKEEP_FAILURES:  # no increase is seen in a series that begins with an event
            instruments.tally.add(Metric.PROBLEMS, (event,), 0)
        self._models = Known(MOST_MODELS)
        self._announced_at: dict[tuple[str, str], float] = {}
        self._reported: set[tuple[str, str]] = set()  # pools and upstreams
        self.lag_s = 0.0  # maximum of the last second

    async def run(self) -> None:
        """Update the metrics until cancelled."""
        self._instruments.set(Metric.STARTED, self._name, time.time())
        loop, lag_s, checked_at, measured_at = asyncio.get_running_loop(), 0.0, 0.0, 0.0
        while True:
            is_idle = not any(one.permits_held or one.waiters for one in self.limiters.values())
            every_s = next_beat_s(GAUGES_EVERY_S) if is_idle else EVERY_S
            due = loop.time() + every_s
            await asyncio.sleep(every_s)
            late_s = max(0.0, loop.time() - due)
            self._instruments.tally.observe(Metric.LOOP_LAG, self._name, late_s)
            lag_s = max(lag_s, late_s)
            if is_idle or loop.time() - checked_at >= GAUGES_EVERY_S:
                checked_at = loop.time()
                self.lag_s, lag_s = lag_s, 0.0
                is_due = not is_idle or checked_at - measured_at > _IDLE_USE_EVERY_S
                measured_at = checked_at if is_due else measured_at
                self.look(measures=is_due)

    def look(self, *, measures: bool = True) -> None:
        """Set all gauges and flush the counters.

        measures: also memory and CPU time, which take longer than all others.
        """
        made, name = self._instruments, self._name
        there = {("pool", one) for one in self.limiters} | {
            ("upstream", one) for one in self.health
        }
        for absent in self._reported - there:
            made.forget(*absent)
        self._reported = there
        for pool, limiter in self.limiters.items():
            made.set(Metric.HELD, (pool, *name), limiter.permits_held)
            made.set(Metric.WAITERS, (pool, *name), limiter.waiters)
            for one in _STATES:
                made.set(Metric.STATE, (pool, one), float(limiter.state == one))
        for upstream, health in self.health.items():
            is_out = health.state != "ok" and not health.drained
            made.set(Metric.UPSTREAM_OUT, (upstream,), float(is_out))
            made.set(Metric.KEY_REFUSED, (upstream,), float(health.key_dead))
            for announcement in health.announced.all():
                self._announce(
                    upstream, announcement, served=announcement.model in health.announced
                )
        made.set(Metric.POSTGRES_AWAY, (), float(self.store.connections.unavailable))
        blobs = self.store.blobs
        made.set(Metric.BLOBS_AWAY, (), float(blobs.unavailable or blobs.is_silent))
        self._count_problems()
        made.set(Metric.SPILL, (), self.store.spill.used_bytes)
        made.set(Metric.UNWRITTEN, name, self.store.audit.waiting)
        dropped = self.store.audit.dropped
        if dropped > self._dropped:
            made.tally.add(Metric.DROPPED, (), dropped - self._dropped)
            self._dropped = dropped
        if measures:
            made.set(Metric.MEMORY, name, resident_bytes())
            cpu_s = time.process_time()
            made.tally.add(Metric.CPU, name, cpu_s - self._cpu_s)
            self._cpu_s = cpu_s
        made.flush()

    def _count_problems(self) -> None:
        logged = problem_counts()
        for event, amount in (logged - self._problems).items():
            self._instruments.tally.add(Metric.PROBLEMS, (event,), amount)
        self._problems = logged

    def _announce(self, upstream: str, one: Announcement, *, served: bool) -> None:
        """Set the gauges of an announcement once: among processes, the last one to receive it
        counts.
        """
        known_at = self._announced_at.get((upstream, one.model))
        model = self._models.of(one.model, learns=served)
        if known_at == one.at or model != one.model:
            return
        self._announced_at[upstream, model] = one.at
        for limit in one.limits:
            labels = (upstream, model, limit.unit, limit.window or "")
            if limit.limit is not None:
                self._instruments.set(Metric.ANNOUNCED_BOUND, labels, limit.limit)
            if limit.remaining is not None:
                self._instruments.set(Metric.ANNOUNCED_LEFT, labels, limit.remaining)
            if limit.reset_ms is not None:
                resets_at = one.at + limit.reset_ms / 1000
                self._instruments.set(Metric.ANNOUNCED_RESET, labels, resets_at)


def resident_bytes() -> int:
    """Return the memory in use by this process; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0


MOST_PERMITS = 200
MOST_LOCAL_QUEUES = 100
MOST_FAILURES = 50
MOST_TASKS = 30


class ProcessState:
    """The state of a process, for operators. Listens to `CallListeners` for failed calls."""

    def __init__(self, instance_id: str, watch: Watch) -> None:
        self._instance_id = instance_id
        self._watch = watch
        self._began = time.monotonic()
        self._failures: deque[dict[str, Any]] = deque(maxlen=MOST_FAILURES)

    def take(self, batch: Sequence[CallRecord]) -> None:
        """Keep the failed calls."""
        for one in batch:
            if one.status == "succeeded":
                continue
            facts = {
                "at": one.ended_at.isoformat(),
                "request_id": None if one.request_id is None else str(one.request_id),
                **{name: getattr(one, name) for name in ("source", "status", "code", "pool")},
                "tenant": one.tenant_id,
                "model": one.model,
                "upstream": one.upstream,
                "attempts": one.attempts,
            }
            self._failures.append({name: value for name, value in facts.items() if value})

    def shown(self) -> dict[str, Any]:
        """Return the state as plain values."""
        watch, store = self._watch, self._watch.store
        return {
            "instance_id": self._instance_id,
            "version": __version__,
            "pid": os.getpid(),
            "up_s": round(time.monotonic() - self._began, 1),
            "memory_bytes": resident_bytes(),
            "cpu_s": round(time.process_time(), 2),
            "loop_lag_ms": round(watch.lag_s * 1000, 2),
            "threads": threading.active_count(),
            "pools": {name: self._pool(name) for name in watch.limiters},
            "upstreams": {
                name: {
                    "state": one.state,
                    "key_refused": one.key_dead,
                    "why": one.why,
                    "announced": [announcement.shown() for announcement in one.announced.all()],
                }
                for name, one in watch.health.items()
            },
            "record": {
                "postgresql": "away" if store.connections.unavailable else "up",
                "waiting": store.audit.waiting,
                "spilled_bytes": store.spill.used_bytes,
                "dropped": store.audit.dropped,
            },
            "tasks": _tasks(),
            "failed_calls": list(self._failures),
            "problems": recent_problems(),
        }

    def _pool(self, name: str) -> dict[str, Any]:
        limiter = self._watch.limiters[name]
        state = limiter.local_state()
        return {
            "valkey": state.state,
            "last_error": limiter.last_error if state.state == "away" else None,
            "session": limiter.session,
            "silent_ms": None if math.isinf(state.silent_ms) else round(state.silent_ms),
            "sessions": state.sessions,
            "revision": state.revision,
            "held": state.permits,
            "waiting": state.waiters,
            "permits": [asdict(one) for one in limiter.local_permits(MOST_PERMITS)],
            "queues": [asdict(one) for one in limiter.local_queues(MOST_LOCAL_QUEUES)],
        }


def _tasks() -> dict[str, int]:
    """Return the most frequent coroutines of the event loop's tasks, with the number of tasks."""
    names: Counter[str] = Counter()
    for task in asyncio.all_tasks():
        names[getattr(task.get_coro(), "__qualname__", "?")] += 1
    return dict(names.most_common(MOST_TASKS))


MOST_LIMITS = 200
DEADLINE_S = 1.0

log = get_logger()


class Gauges(Collector):
    """The metrics of one scrape."""

    def __init__(self) -> None:
        self._families: dict[Spec, GaugeMetricFamily] = {}

    def collect(self) -> Iterable[Family]:
        return self._families.values()

    def add(self, metric: Spec, value: float, *labels: str) -> None:
        family = self._families.get(metric)
        if family is None:
            family = GaugeMetricFamily(metric.name, metric.help_text, labels=metric.labels)
            self._families[metric] = family
        family.add_metric(labels, value)


async def read(
    keepers: Mapping[str, PolicyKeeper], standing: QueueDepths, servers: ServerLoads
) -> Gauges:
    """Read both stores and the load of self-hosted servers concurrently."""
    gauges = Gauges()
    gauges.add(Metric.BUILD, 1, __version__)
    limiters = [one.limiter for one in keepers.values()]
    snapshots = (_read_or_none(one.pool, one.snapshot()) for one in limiters)
    learned = (
        _read_or_none(one.limiter.pool, shared_limits(one.limiter, one.provider))
        for one in keepers.values()
    )
    pools, found, depths, loads = await asyncio.gather(
        asyncio.gather(*snapshots),
        asyncio.gather(*learned),
        _read_or_none("PostgreSQL", standing.depths()),
        servers.get(),
    )
    _add_loads(gauges, loads)
    left_out: Counter[str] = Counter()
    for pool, limits in zip(keepers, found, strict=True):
        _add_learned(gauges, pool, limits or ())
    for pool, snapshot in zip(keepers, pools, strict=True):
        gauges.add(Metric.VALKEY_UP, float(snapshot is not None), pool)
        if snapshot is not None:
            _add_pool(gauges, pool, snapshot, left_out)
    gauges.add(Metric.POSTGRES_UP, float(depths is not None))
    if depths is not None:
        _add_depths(gauges, depths, left_out)
    for part in ("limits", "tenants", "queues"):
        gauges.add(Metric.LEFT_OUT, left_out[part], part)
    return gauges


async def _read_or_none(of: str, work: Awaitable[T]) -> T | None:
    """Return the answer of a store, or None if it does not answer in time."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            return await work
    except (LimiterUnavailable, StoreUnavailable, TimeoutError) as error:
        log.debug(Log.SCRAPE_INCOMPLETE, missing=of, detail=repr(error))
        return None
    except Exception:  # logged: one part of a scrape must not fail the others
        log.exception(Log.INTERNAL_ERROR, component="metrics")
        return None


def _add_loads(gauges: Gauges, loads: Mapping[str, ServerLoad]) -> None:
    for upstream, load in loads.items():
        amounts = {
            Metric.SERVER_RUNNING: load.running,
            Metric.SERVER_WAITING: load.waiting,
            Metric.SERVER_SLOTS: load.slots,
            Metric.SERVER_KV_USED: load.kv_used,
            Metric.SERVER_KV_TOKENS: load.kv_tokens,
        }
        for metric, value in amounts.items():
            if value is not None:
                gauges.add(metric, value, upstream)


def _add_learned(gauges: Gauges, pool: str, limits: Iterable[LearnedLimit]) -> None:
    for one in list(limits)[:MOST_LIMITS]:
        gauges.add(Metric.OTHERS, one.others_share, pool, one.limit)
        if not one.model:  # not reported in headers
            continue
        gauges.add(Metric.LEARNED, one.bound, pool, one.limit)
        drifts = one.drift in ("rose", "fell")
        gauges.add(Metric.DRIFT, one.bound - (one.in_force or 0) if drifts else 0, pool, one.limit)


def _add_pool(gauges: Gauges, pool: str, snapshot: Snapshot, left_out: Counter[str]) -> None:
    gauges.add(Metric.SESSIONS, snapshot.sessions, pool)
    gauges.add(Metric.BLOCKED, sum(one.blocked for one in snapshot.processes), pool)
    gauges.add(Metric.RECOVERING, snapshot.recovering_ms / 1000, pool)
    gauges.add(Metric.EPOCH, snapshot.epoch, pool)
    gauges.add(Metric.REVISION, snapshot.revision, pool)
    views = list(snapshot.limits.values())
    # The limits with the most waiting calls come first, since the number is bounded.
    views.sort(key=lambda view: (-view.waiting, view.limit))
    for view in views[:MOST_LIMITS]:
        where = (pool, view.limit)
        gauges.add(Metric.BOUND, view.bound, *where)
        gauges.add(Metric.CURRENT, view.current, *where)
        gauges.add(Metric.USED, view.used, *where)
        gauges.add(Metric.WAITING, view.waiting, *where)
        gauges.add(Metric.LAPSING, view.lapsing, *where)
        gauges.add(Metric.PAUSED, view.paused_ms / 1000, *where)
    left_out["limits"] += max(0, len(views) - MOST_LIMITS)
    tenants = sorted(snapshot.tenants, key=lambda one: (-one.waiting, one.tenant))
    for one in tenants[:MOST_TENANTS]:
        gauges.add(Metric.TENANT_WAITING, one.waiting, pool, one.tenant)
    if rest := tenants[MOST_TENANTS:]:
        gauges.add(Metric.TENANT_WAITING, sum(one.waiting for one in rest), pool, OTHER)
        left_out["tenants"] += len(rest)


def _add_depths(gauges: Gauges, depths: Depths, left_out: Counter[str]) -> None:
    queues = sorted(depths.queues, key=lambda one: -one.jobs)
    listed = {one.tenant for one in queues}
    if len(listed) > MOST_TENANTS:
        listed = set(list(dict.fromkeys(one.tenant for one in queues))[:MOST_TENANTS])
    jobs: Counter[tuple[str, str, str]] = Counter()
    oldest: defaultdict[tuple[str, str], float] = defaultdict(float)
    for one in queues:
        tenant = one.tenant if one.tenant in listed else OTHER
        jobs[one.pool, one.lane, tenant] += one.jobs
        oldest[one.pool, one.lane] = max(oldest[one.pool, one.lane], one.oldest_s)
    for labels, count in jobs.items():
        gauges.add(Metric.QUEUED, count, *labels)
    for where, age_s in oldest.items():
        gauges.add(Metric.OLDEST, age_s, *where)
    left_out["queues"] += _perhaps_more(depths.queues)
    gauges.add(Metric.RETRYING, depths.retrying)
    gauges.add(Metric.CLAIMED, depths.claimed)
    gauges.add(Metric.RUNNING, depths.running)
    gauges.add(Metric.DEAD, depths.dead)
    gauges.add(Metric.WEBHOOKS, depths.webhooks)
    gauges.add(Metric.WEBHOOKS_OLDEST, depths.webhooks_oldest_s)
    gauges.add(Metric.WORKERS, depths.workers)
    for budget in depths.budgets:
        if budget.used_ratio is not None:
            gauges.add(Metric.BUDGET_USED, budget.used_ratio, budget.name)
        gauges.add(Metric.BUDGET_PAUSED, budget.paused, budget.name)


def _perhaps_more(queues: tuple[QueueDepth, ...]) -> int:
    """Return 1 if there may be more queues than were scanned, else 0."""
    return int(len(queues) >= MOST_QUEUES)


BEAT_EVERY_S = 1.0
SAME_EVERY_S = 2.5  # if nothing has changed
KEEP_MS = 5_000
FRESH_S = 0.5
READ_WITHIN_S = 1.0
MOST_CALLS = 200
MOST_PROCESSES = 100


@dataclass(frozen=True, slots=True)
class UpstreamFound:
    """The state of an upstream in one process; see `Gate`.

    unpaid: the account has no money left, but the key is valid.
    """

    state: State
    key_refused: bool = False
    faults: int = 0
    why: str = ""
    unpaid: bool = False


@dataclass(frozen=True, slots=True)
class Note:
    """What a process publishes. `calls` are the oldest of the `under_way` calls in progress."""

    process: str
    under_way: int = 0
    calls: tuple[ActiveCall, ...] = ()
    upstreams: Mapping[str, UpstreamFound] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Notes:
    """The notes of all processes. reached: whether Valkey returned those of the other processes."""

    notes: list[Note]
    reached: bool

    @property
    def whole(self) -> bool:
        """Whether the notes contain every call in progress."""
        return self.reached and all(len(one.calls) >= one.under_way for one in self.notes)


class Board:
    """Publishes the note of this process, and reads the others. All share the pool of `limiter`."""

    def __init__(
        self,
        limiter: Limiter,
        instance_id: str,
        active_calls: ActiveCalls,
        health: Mapping[str, Gate],
    ) -> None:
        self.active_calls = active_calls
        self.process = instance_id
        self._limiter = limiter
        self._health = health
        self._others = Recent(FRESH_S, self._read)
        self._more: Mapping[str, Any] = {}

    async def run(self) -> None:
        """Publish the note until cancelled."""
        sent, sent_at = b"", -math.inf
        while True:
            try:
                note, now = packed(self.own(), self._more), time.monotonic()
                if self._is_unavailable():
                    sent_at = -math.inf
                elif note != sent or now - sent_at >= SAME_EVERY_S:
                    await self._limiter.tell(note, KEEP_MS)
                    sent, sent_at = note, now
            except LimiterUnavailable as error:
                log.debug(Log.SCRAPE_INCOMPLETE, missing="processes", detail=error.message)
            except Exception:  # the top of a task: logged, and the loop continues
                log.exception(Log.INTERNAL_ERROR, component="board")
            await asyncio.sleep(next_beat_s(BEAT_EVERY_S))

    def _is_unavailable(self) -> bool:
        return self._limiter.state == "away"

    async def share(self, more: Mapping[str, Any]) -> None:
        """Add fields to the note of this process from now on: a process has one note per pool."""
        self._more = more

    def own(self) -> Note:
        """Return the current note of this process."""
        return Note(
            self.process,
            len(self.active_calls),
            tuple(self.active_calls.oldest(MOST_CALLS)),
            {
                name: UpstreamFound(one.state, one.key_dead, one.faults, one.why, one.unpaid)
                for name, one in self._health.items()
            },
        )

    async def notes(self) -> Notes:
        """Return the notes of all processes, those of others as of one or two seconds ago."""
        others = await self._others.get()
        return Notes([self.own(), *(others or ())], others is not None)

    async def _read(self) -> list[Note] | None:
        """Return the notes of other processes, or None if Valkey does not answer."""
        if self._is_unavailable():
            return None
        try:
            async with asyncio.timeout(READ_WITHIN_S):
                raw_notes = await self._limiter.told(MOST_PROCESSES)
        except (LimiterUnavailable, TimeoutError) as error:
            log.debug(Log.SCRAPE_INCOMPLETE, missing="processes", detail=repr(error))
            return None
        notes = [unpacked(each) for each in raw_notes.values()]
        return sorted(
            (one for one in notes if one.process != self.process), key=lambda one: one.process
        )


def packed(note: Note, more: Mapping[str, Any] | None = None) -> bytes:
    return orjson.dumps({name: getattr(note, name) for name in _names(Note)} | dict(more or {}))


def unpacked(raw: bytes) -> Note:
    """Return a note. Fields added by another version are ignored."""
    values: dict[str, Any] = orjson.loads(raw)
    upstreams = {
        name: UpstreamFound(**_known(UpstreamFound, one))
        for name, one in values["upstreams"].items()
    }
    calls = tuple(_call(one) for one in values["calls"])
    return Note(values["process"], values["under_way"], calls, upstreams)


def _call(row: dict[str, Any]) -> ActiveCall:
    known = _known(ActiveCall, row)
    for name in ("received_at", "admitted_at"):
        if known.get(name) is not None:
            known[name] = datetime.fromisoformat(known[name])
    known["limits"] = tuple(known.get("limits", ()))
    return ActiveCall(**known)


def _known(kind: type, row: dict[str, Any]) -> dict[str, Any]:
    names = _names(kind)
    return row if row.keys() <= names else {name: row[name] for name in row.keys() & names}


@cache
def _names(kind: Any) -> frozenset[str]:
    return frozenset(each.name for each in fields(kind))


EXPOSITION_FRESH_S = 1.0


class Exposition:
    """The metrics endpoint of a process."""

    def __init__(
        self,
        instruments: Instruments,
        watch: Watch,
        keepers: Mapping[str, PolicyKeeper],
        depths: QueueDepths,
        servers: ServerLoads,
    ) -> None:
        self._instruments = instruments
        self._watch = watch
        self._keepers = keepers
        self._depths = depths
        self._servers = servers
        self._answers: dict[str, tuple[float, bytes, str]] = {}
        self._making = asyncio.Lock()

    async def text(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics as OpenMetrics if `accept` requests it, else as Prometheus text; their
        type.

        Only one version of each is used, because answers are shared, and the library fails on a
        version that is not a number.
        """
        sort = "application/openmetrics-text" if "openmetrics" in accept else "text/plain"
        async with self._making:
            made_at, body, media_type = self._answers.get(sort, (float("-inf"), b"", ""))
            if time.monotonic() - made_at > EXPOSITION_FRESH_S:
                self._watch.look()
                gauges = await read(self._keepers, self._depths, self._servers)
                encode, media_type = choose_encoder(sort)
                body = await asyncio.to_thread(encode, self._instruments.also(gauges))
                self._answers[sort] = (time.monotonic(), body, media_type)
        return body, media_type
