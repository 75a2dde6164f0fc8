"""The metrics of a process as prometheus-client keeps them, alone or together with others.

Under a supervisor the processes of a machine keep their values in files of one folder, each under
its own name: one that dies is followed by one of the same name, which goes on counting where it
stopped; gauges of a dead one are dropped. Invariant: a registry belongs to one composition.
"""

from __future__ import annotations

import os
from typing import cast

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from tidegate.metrics._compat import add_counts
from tidegate.metrics.names import ALL, NAMED, SHARED, Spec
from tidegate.metrics.tally import Labels, Tally

disable_created_metrics()  # type: ignore[no-untyped-call] # when each series began is half as much again to keep, and of no use


def share_by_name() -> None:
    """Where a supervisor has named this process: keep its values under that name. Call it before
    the first `Instruments`."""
    name = os.environ.get(NAMED)
    if name and SHARED in os.environ:
        values.ValueClass = values.MultiProcessValue(lambda: name)  # type: ignore[no-untyped-call]


def forget(name: str, folder: str) -> None:
    """A process of this name has died: what it held is no more; what it counted stays."""
    mark_process_dead(name, folder)  # type: ignore[no-untyped-call]


class Instruments:
    """One per process. `flush` what was tallied, then read `registry`."""

    def __init__(self) -> None:
        self.tally = Tally()
        self._own = CollectorRegistry()
        self._made: dict[Spec, Counter | Gauge | Histogram] = {
            metric: _made(metric, self._own) for metric in ALL if not metric.everywhere
        }
        self._children: dict[tuple[Spec, Labels], Counter | Gauge | Histogram] = {}
        self.registry = self._own
        if SHARED in os.environ:
            self.registry = CollectorRegistry()
            MultiProcessCollector(self.registry)  # type: ignore[no-untyped-call]

    def set(self, metric: Spec, labels: Labels, value: float) -> None:
        """A gauge."""
        cast(Gauge, self._child(metric, labels)).set(value)

    def flush(self) -> None:
        """Hand on what was tallied."""
        for metric, labels, amount in self.tally.take_counts():
            cast(Counter, self._child(metric, labels)).inc(amount)
        for metric, labels, counts, total in self.tally.take_spreads():
            add_counts(cast(Histogram, self._child(metric, labels)), counts, total)

    def also(self, collector: Collector) -> CollectorRegistry:
        """What the processes have seen, and what `collector` tells beside it."""
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
    """A registry as a part of another one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self):  # type: ignore[no-untyped-def] # as the library's own are
        return self._registry.collect()


def _made(spec: Spec, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if spec.sort == "counter":
        return Counter(spec.name, spec.said, spec.labels, registry=registry)
    if spec.sort == "histogram":
        return Histogram(spec.name, spec.said, spec.labels, registry=registry, buckets=spec.buckets)
    return Gauge(
        spec.name, spec.said, spec.labels, registry=registry, multiprocess_mode=spec.merge or "all"
    )
