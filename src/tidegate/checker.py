"""Checker of a log of calls: counts over time and shares of tenants, against a policy. Pure.

A log is a sequence of `Event` in order of time, as seen by the called server. The limiter's state
is not used. Times are ns of any one clock; results named `_s` are seconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

NS = 1_000_000_000

# requested a permit; the call began; the call ended; the waiter left or was rejected
What = Literal["ask", "begin", "end", "leave"]


class Event(NamedTuple):
    """An event of a call. `call` is unique among the live calls of its worker.

    limits: every limit that the call needs. epoch: that of the permit's fence, on `begin`.
    """

    at_ns: int
    what: What
    worker: str
    call: int
    tenant: str = "default"
    limits: tuple[str, ...] = ()
    tokens: int = 0
    priority: str = ""
    epoch: int = 0


class Interruption(NamedTuple):
    """A time in which a worker was paused or cut off: its calls are judged separately."""

    worker: str
    from_ns: int
    to_ns: int

    def covers(self, at_ns: int) -> bool:
        return self.from_ns <= at_ns < self.to_ns


class Curve:
    """A count over time: `levels[i]` applies from `times[i]` on, and 0 before the first.

    Of several levels at the same ns the last one counts: the others had no duration.
    """

    def __init__(self, steps: Iterable[tuple[int, int]]) -> None:
        self.times: list[int] = []
        self.levels: list[int] = []
        self._areas: list[int] = []  # level x ns up to times[i]
        for at_ns, level in steps:
            if self.times and self.times[-1] == at_ns:
                self.levels[-1] = level
                continue
            last = self.levels[-1] * (at_ns - self.times[-1]) if self.times else 0
            self._areas.append((self._areas[-1] if self._areas else 0) + last)
            self.times.append(at_ns)
            self.levels.append(level)

    def at(self, at_ns: int) -> int:
        index = bisect_right(self.times, at_ns) - 1
        return self.levels[index] if index >= 0 else 0

    def mean(self, from_ns: int, to_ns: int) -> float:
        """Return the average level between two times, which must differ."""
        return (self._area_until(to_ns) - self._area_until(from_ns)) / (to_ns - from_ns)

    def _area_until(self, at_ns: int) -> int:
        index = bisect_right(self.times, at_ns) - 1
        if index < 0:
            return 0
        return self._areas[index] + self.levels[index] * (at_ns - self.times[index])

    def peak(self) -> int:
        return max(self.levels, default=0)

    def peak_at_once(self) -> tuple[int, int]:
        """Return the highest level, and the first time of it."""
        peak = self.peak()
        return (peak, self.times[self.levels.index(peak)]) if self.levels else (0, 0)

    def above_s(self, bound: int) -> float:
        """Return for how long the level was above `bound`."""
        pairs = zip(self.times, self.times[1:], self.levels, strict=False)
        return sum(end - begin for begin, end, level in pairs if level > bound) / NS

    def recovered_ns(
        self, bound: int, since_ns: int, known_ns: int, *, window_ns: int, share: float
    ) -> int | None:
        """Return the time from `since_ns` until the level was `bound` again and then averaged
        `share` of it for a window; None if it was not by `known_ns`, the end of the log."""
        last_ns = known_ns - window_ns
        starts = [since_ns] if self.at(since_ns) >= bound else []
        first = bisect_right(self.times, since_ns)
        for index in range(first, bisect_right(self.times, last_ns)):
            if self.levels[index] >= bound:
                starts.append(self.times[index])
        for start in starts:
            if start <= last_ns and self.mean(start, start + window_ns) >= share * bound:
                return start - since_ns
        return None


def in_flight(
    events: Iterable[Event], limit: str | None = None, *, without: Sequence[Interruption] = ()
) -> Curve:
    """Return the number of open calls of `limit` (or of any) over time, without those of a worker
    during its interruption."""
    marks: list[tuple[int, int, Event | None]] = [
        (event.at_ns, number, event)
        for number, event in enumerate(events, start=1)
        if event.what in ("begin", "end") and (limit is None or limit in event.limits)
    ]
    for span in without:
        marks += [(span.from_ns, 0, None), (span.to_ns, 0, None)]
    marks.sort(key=lambda mark: mark[:2])
    workers: Counter[str] = Counter()
    steps: list[tuple[int, int]] = []
    level = 0
    for at_ns, _, event in marks:
        change = 0 if event is None else 1 if event.what == "begin" else -1
        if event is not None:
            workers[event.worker] += change
        if without:
            excused = {span.worker for span in without if span.covers(at_ns)}
            level = sum(count for worker, count in workers.items() if worker not in excused)
        else:
            level += change
        steps.append((at_ns, level))
    return Curve(steps)


def first_of_new_epoch_s(events: Sequence[Event], since_ns: int) -> float | None:
    """Return the seconds from `since_ns` to the first call with a permit of a later epoch than all
    before."""
    before = max((e.epoch for e in events if e.what == "begin" and e.at_ns < since_ns), default=0)
    for event in events:
        if event.what == "begin" and event.at_ns >= since_ns and event.epoch > before:
            return (event.at_ns - since_ns) / NS
    return None


@dataclass(frozen=True, slots=True)
class Shares:
    """Permit-seconds of each tenant in the time in which all of them waited for more.

    off: the largest deviation from the ideal share, as a fraction of it: 0.05 is 5 %.
    """

    together_s: float
    shares: Mapping[str, float]
    off: float


def shares(events: Iterable[Event], weights: Mapping[str, int]) -> Shares:
    """Compare the shares with `weights`."""
    waiting: Counter[str] = Counter()
    running: Counter[str] = Counter()
    requested: set[tuple[str, int]] = set()
    total: Counter[str] = Counter()
    together_ns, last_ns = 0, 0
    for event in events:
        step_ns, last_ns = event.at_ns - last_ns, event.at_ns
        if all(waiting[tenant] > 0 for tenant in weights):
            together_ns += step_ns
            for tenant in weights:
                total[tenant] += running[tenant] * step_ns
        _follow(event, waiting, running, requested)
    whole = sum(total.values()) or 1
    parts = {tenant: total[tenant] / whole for tenant in weights}
    return Shares(together_ns / NS, parts, _off(total, weights))


def _follow(
    event: Event, waiting: Counter[str], running: Counter[str], requested: set[tuple[str, int]]
) -> None:
    key = (event.worker, event.call)
    if event.what == "ask":
        requested.add(key)
        waiting[event.tenant] += 1
        return
    if event.what != "end" and key in requested:
        requested.remove(key)
        waiting[event.tenant] -= 1
    if event.what == "begin":
        running[event.tenant] += 1
    elif event.what == "end":
        running[event.tenant] -= 1


def _off(had: Mapping[str, int], weights: Mapping[str, int]) -> float:
    whole, weight = sum(had.values()), sum(weights.values())
    if whole == 0:
        return 0.0
    ideal = {tenant: whole * share / weight for tenant, share in weights.items()}
    return max(abs(had[tenant] / ideal[tenant] - 1) for tenant in weights)
