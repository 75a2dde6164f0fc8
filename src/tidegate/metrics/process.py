"""What a process says of itself: looked at a few times a second, apart from any call.

Invariant: what is looked at is in this process's memory: neither Valkey nor PostgreSQL is asked.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping

from tidegate.limiter import Limiter
from tidegate.metrics.instruments import Instruments
from tidegate.metrics.names import Metric
from tidegate.metrics.tally import MOST_MODELS, Known
from tidegate.spine.announced import Announcement
from tidegate.spine.routing import Gate
from tidegate.store.store import Store

EVERY_S = 0.25
_GAUGES_EVERY = 4
_STATES = ("up", "away", "recovering")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4_096


class Watch:
    """Looks after one process. `name` tells it from others on this machine."""

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
        self._models = Known(MOST_MODELS)
        self._heard: dict[tuple[str, str], float] = {}
        self.lag_s = 0.0  # of the last second, the longest

    async def run(self) -> None:
        """Look, for ever."""
        self._instruments.set(Metric.STARTED, self._name, time.time())
        loop, turn, lag_s = asyncio.get_running_loop(), 0, 0.0
        while True:
            due = loop.time() + EVERY_S
            await asyncio.sleep(EVERY_S)
            late_s = max(0.0, loop.time() - due)
            self._instruments.tally.observe(Metric.LOOP_LAG, self._name, late_s)
            turn, lag_s = turn + 1, max(lag_s, late_s)
            if turn % _GAUGES_EVERY == 0:
                self.lag_s, lag_s = lag_s, 0.0
                self.look()

    def look(self) -> None:
        """Set all gauges, and hand on what was counted."""
        made, name = self._instruments, self._name
        for pool, limiter in self.limiters.items():
            made.set(Metric.HELD, (pool, *name), limiter.permits_held)
            made.set(Metric.WAITERS, (pool, *name), limiter.waiters)
            for one in _STATES:
                made.set(Metric.STATE, (pool, one), float(limiter.state == one))
        for upstream, health in self.health.items():
            made.set(Metric.UPSTREAM_OUT, (upstream,), float(health.state != "ok"))
            made.set(Metric.KEY_REFUSED, (upstream,), float(health.key_dead))
            for said in health.announced.all():
                self._announce(upstream, said)
        made.set(Metric.POSTGRES_AWAY, (), float(self.store.away))
        made.set(Metric.SPILL, (), self.store.spill.used_bytes)
        made.set(Metric.UNWRITTEN, name, self.store.relayed.waiting)
        dropped = self.store.relayed.dropped
        if dropped > self._dropped:
            made.tally.add(Metric.DROPPED, (), dropped - self._dropped)
            self._dropped = dropped
        made.set(Metric.MEMORY, name, resident_bytes())
        cpu_s = time.process_time()
        made.tally.add(Metric.CPU, name, cpu_s - self._cpu_s)
        self._cpu_s = cpu_s
        made.flush()

    def _announce(self, upstream: str, one: Announcement) -> None:
        """Once each, so that of several processes the one that heard it last counts."""
        heard = self._heard.get((upstream, one.model))
        model = self._models.of(one.model, learns=True)
        if heard == one.at or model != one.model:
            return
        self._heard[upstream, model] = one.at
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
    """The memory that this process has in use; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0
