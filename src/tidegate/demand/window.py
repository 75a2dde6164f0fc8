"""The last figures of a sort, and how far up a share of them reaches. Pure; of bounded size."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

REMEMBERED = 64


class Window:
    """The last `REMEMBERED` figures, in order of time and of size."""

    __slots__ = ("_at", "_by_size", "_by_time")

    def __init__(self, figures: Iterable[float] = ()) -> None:
        self._by_time: list[float] = []
        self._by_size: list[float] = []
        self._at = 0  # of the oldest, once it is full
        for figure in figures:
            self.add(figure)

    def __len__(self) -> int:
        return len(self._by_time)

    def add(self, figure: float) -> None:
        by_time, by_size = self._by_time, self._by_size
        if len(by_time) < REMEMBERED:
            by_time.append(figure)
        else:
            del by_size[bisect_left(by_size, by_time[self._at])]
            by_time[self._at] = figure
            self._at = (self._at + 1) % REMEMBERED
        insort(by_size, figure)

    def upper(self, share: float) -> float:
        """What `share` of all figures are below, as far as these tell; of few, the largest."""
        by_size = self._by_size
        above = (1 - share) * (len(by_size) + 1)
        whole = max(1, int(above))
        part = max(0.0, above - whole)
        return by_size[-whole] * (1 - part) + by_size[-whole - 1] * part if part else by_size[-1]

    def ordered(self) -> list[float]:
        """From the oldest to the newest."""
        by_time = self._by_time
        return [*by_time[self._at :], *by_time[: self._at]]
