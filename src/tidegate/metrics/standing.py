"""What is true of the whole deployment, read when somebody asks: from Valkey and PostgreSQL.

Invariant: whatever they do, an answer is there within the deadline, with what could be read: a
store that does not answer is told as such, and what it would have told is left out, never stale.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from tidegate import __version__
from tidegate.errors import LimiterUnavailable, StoreUnavailable
from tidegate.limiter import Limiter, Snapshot
from tidegate.metrics.names import Metric, Spec
from tidegate.metrics.tally import MOST_TENANTS, OTHER
from tidegate.store.standing import MOST_QUEUES, Depths, QueueDepth, Standing
from tidegate.telemetry import Log, get_logger

MOST_LIMITS = 200
DEADLINE_S = 1.0

log = get_logger()


class Given(Collector):
    """The families of one answer."""

    def __init__(self) -> None:
        self._families: dict[Spec, GaugeMetricFamily] = {}

    def collect(self) -> Iterable[Family]:
        return self._families.values()

    def add(self, metric: Spec, value: float, *labels: str) -> None:
        family = self._families.get(metric)
        if family is None:
            family = GaugeMetricFamily(metric.name, metric.said, labels=metric.labels)
            self._families[metric] = family
        family.add_metric(labels, value)


async def read(limiters: Mapping[str, Limiter], standing: Standing) -> Given:
    """Ask both stores at once."""
    given = Given()
    given.add(Metric.BUILD, 1, __version__)
    pools, depths = await asyncio.gather(
        asyncio.gather(*(_snapshot(limiter) for limiter in limiters.values())),
        _depths(standing),
    )
    left_out: Counter[str] = Counter()
    for pool, snapshot in zip(limiters, pools, strict=True):
        given.add(Metric.VALKEY_UP, float(snapshot is not None), pool)
        if snapshot is not None:
            _tell_pool(given, pool, snapshot, left_out)
    given.add(Metric.POSTGRES_UP, float(depths is not None))
    if depths is not None:
        _tell_depths(given, depths, left_out)
    for what in ("limits", "tenants", "queues"):
        given.add(Metric.LEFT_OUT, left_out[what], what)
    return given


async def _snapshot(limiter: Limiter) -> Snapshot | None:
    try:
        async with asyncio.timeout(DEADLINE_S):
            return await limiter.snapshot()
    except (LimiterUnavailable, TimeoutError) as away:
        log.debug(Log.SCRAPE_INCOMPLETE, of=limiter.pool, detail=repr(away))
        return None
    except Exception:  # of one part, which must not take the rest with it
        log.exception(Log.INTERNAL_ERROR, where="metrics")
        return None


async def _depths(standing: Standing) -> Depths | None:
    try:
        async with asyncio.timeout(DEADLINE_S):
            return await standing.depths()
    except (StoreUnavailable, TimeoutError) as away:
        log.debug(Log.SCRAPE_INCOMPLETE, of="PostgreSQL", detail=repr(away))
        return None
    except Exception:  # of one part, which must not take the rest with it
        log.exception(Log.INTERNAL_ERROR, where="metrics")
        return None


def _tell_pool(given: Given, pool: str, snapshot: Snapshot, left_out: Counter[str]) -> None:
    given.add(Metric.SESSIONS, snapshot.sessions, pool)
    given.add(Metric.BLOCKED, sum(one.blocked for one in snapshot.processes), pool)
    given.add(Metric.RECOVERING, snapshot.recovering_ms / 1000, pool)
    given.add(Metric.EPOCH, snapshot.epoch, pool)
    given.add(Metric.REVISION, snapshot.revision, pool)
    views = list(snapshot.limits.values())
    # Where there are more than are shown, those that hold somebody up come first.
    views.sort(key=lambda view: (-view.waiting, view.limit))
    for view in views[:MOST_LIMITS]:
        where = (pool, view.limit)
        given.add(Metric.BOUND, view.bound, *where)
        given.add(Metric.CURRENT, view.current, *where)
        given.add(Metric.USED, view.used, *where)
        given.add(Metric.WAITING, view.waiting, *where)
        given.add(Metric.LAPSING, view.lapsing, *where)
        given.add(Metric.PAUSED, view.paused_ms / 1000, *where)
    left_out["limits"] += max(0, len(views) - MOST_LIMITS)
    tenants = sorted(snapshot.tenants, key=lambda one: (-one.waiting, one.tenant))
    for one in tenants[:MOST_TENANTS]:
        given.add(Metric.TENANT_WAITING, one.waiting, pool, one.tenant)
    if rest := tenants[MOST_TENANTS:]:
        given.add(Metric.TENANT_WAITING, sum(one.waiting for one in rest), pool, OTHER)
        left_out["tenants"] += len(rest)


def _tell_depths(given: Given, depths: Depths, left_out: Counter[str]) -> None:
    queues = sorted(depths.queues, key=lambda one: -one.jobs)
    shown = {one.tenant for one in queues}
    if len(shown) > MOST_TENANTS:
        shown = set(list(dict.fromkeys(one.tenant for one in queues))[:MOST_TENANTS])
    jobs: Counter[tuple[str, str, str]] = Counter()
    oldest: defaultdict[tuple[str, str], float] = defaultdict(float)
    for one in queues:
        tenant = one.tenant if one.tenant in shown else OTHER
        jobs[one.pool, one.lane, tenant] += one.jobs
        oldest[one.pool, one.lane] = max(oldest[one.pool, one.lane], one.oldest_s)
    for labels, count in jobs.items():
        given.add(Metric.QUEUED, count, *labels)
    for where, age_s in oldest.items():
        given.add(Metric.OLDEST, age_s, *where)
    left_out["queues"] += _perhaps_more(depths.queues)
    given.add(Metric.RETRYING, depths.retrying)
    given.add(Metric.CLAIMED, depths.claimed)
    given.add(Metric.RUNNING, depths.running)
    given.add(Metric.DEAD, depths.dead)
    given.add(Metric.WEBHOOKS, depths.webhooks)
    given.add(Metric.WEBHOOKS_OLDEST, depths.webhooks_oldest_s)
    given.add(Metric.WORKERS, depths.workers)


def _perhaps_more(queues: tuple[QueueDepth, ...]) -> int:
    """Nobody counts the queues beyond those that are looked at: 1 stands for some."""
    return int(len(queues) >= MOST_QUEUES)
