"""Sums of what happens, gathered at little cost until somebody takes them.

Invariant: adding costs no lock, and to a cell that is kept at hand hardly more than the addition;
the number of distinct tenants and models is bounded, whatever clients say.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from tidegate.metrics.names import Spec

MOST_TENANTS = 100
MOST_MODELS = 100
OTHER = "other"

Labels = tuple[str, ...]


class Known:
    """The first so many names; all later ones are `other`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._names: set[str] = set()

    def __len__(self) -> int:
        return len(self._names)

    def of(self, name: str, *, learns: bool) -> str:
        """The name as a label. learns: it is no invention of a client, and may take a place."""
        if name in self._names:
            return name
        if not learns or len(self._names) >= self._most:
            return OTHER
        self._names.add(name)
        return name


class Count:
    """What a counter has grown by since it was last taken."""

    __slots__ = ("amount", "told")

    def __init__(self) -> None:
        self.amount = 0.0
        self.told = False  # a counter is there from its first telling on, be it with zero

    def add(self, amount: float = 1) -> None:
        self.amount += amount


class Spread:
    """What a histogram has grown by since it was last taken: the counts in its buckets, those above
    the last one, and the sum of all."""

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

    def clear(self) -> None:
        self.counts = [0] * len(self.counts)
        self.total, self.is_new = 0.0, False


class Tally:
    """The cells of one process, for ever: `count` and `spread` give them to keep."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Spec, Labels], Count] = {}
        self._spreads: dict[tuple[Spec, Labels], Spread] = {}

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

    def take_counts(self) -> Iterator[tuple[Spec, Labels, float]]:
        """What has grown, and what is there for the first time; each begins anew."""
        for (metric, labels), cell in self._counts.items():
            if cell.amount or not cell.told:
                amount, cell.amount, cell.told = cell.amount, 0.0, True
                yield metric, labels, amount

    def take_spreads(self) -> Iterator[tuple[Spec, Labels, Sequence[int], float]]:
        """Of each that has grown: the counts of its buckets, and their sum."""
        for (metric, labels), cell in self._spreads.items():
            if cell.is_new:
                counts, total = cell.counts, cell.total
                cell.clear()
                yield metric, labels, counts, total
