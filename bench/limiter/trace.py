"""Figures from the records of all workers. Pure: no clock, no I/O.

Invariant: a call is open from its BEGAN to its ENDED, or to the kill of its worker.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from bench.limiter.calllog import Kind, Record


@dataclass(frozen=True, slots=True)
class Trace:
    """The steps of the number of open calls: `times_ns[i]` brings it to `open_calls[i]`.

    `moves` are the same steps as (time, worker, +1 or -1); `starts` are the beginnings as (time,
    worker, task); `errors` counts what limiters raised.
    """

    times_ns: Sequence[int]
    open_calls: Sequence[int]
    moves: Sequence[tuple[int, int, int]]
    starts: Sequence[tuple[int, int, int]]
    errors: int

    @classmethod
    def of(cls, logs: Sequence[Iterable[Record]], killed_ns: Mapping[int, int]) -> Trace:
        """From each worker's records; `killed_ns` says when workers were killed."""
        moves: list[tuple[int, int, int]] = []
        starts: list[tuple[int, int, int]] = []
        errors = 0
        for worker, records in enumerate(logs):
            opened = 0
            for record in records:
                if record.kind == Kind.BEGAN:
                    opened += 1
                    moves.append((record.at_ns, worker, 1))
                    starts.append((record.at_ns, worker, record.task))
                elif record.kind == Kind.ENDED:
                    opened -= 1
                    moves.append((record.at_ns, worker, -1))
                elif record.kind == Kind.FAILED:
                    errors += 1
            if worker in killed_ns:
                moves += [(killed_ns[worker], worker, -1)] * opened
        # At the same instant ends come first: they do not overlap.
        moves.sort(key=lambda move: (move[0], move[2]))
        times_ns = [at_ns for at_ns, _, _ in moves]
        open_calls = list(accumulate(step for _, _, step in moves))
        return cls(times_ns, open_calls, moves, sorted(starts), errors)

    def peak(self, since_ns: int = 0, until_ns: int = 1 << 62) -> int:
        """The most calls that were open at once."""
        first = max(0, bisect_right(self.times_ns, since_ns) - 1)
        return max(self.open_calls[first : bisect_right(self.times_ns, until_ns)], default=0)

    def used_s(self, since_ns: int, until_ns: int) -> float:
        """Permit-seconds used."""
        return (
            sum(opened * length_ns for opened, length_ns in self._spans(since_ns, until_ns)) / 1e9
        )

    def over_s(self, bound: int, since_ns: int, until_ns: int) -> float:
        """For how long more than `bound` calls were open."""
        return sum(ns for opened, ns in self._spans(since_ns, until_ns) if opened > bound) / 1e9

    def _spans(self, since_ns: int, until_ns: int) -> Iterable[tuple[int, int]]:
        at_ns, opened = since_ns, 0
        for time_ns, now_open in zip(self.times_ns, self.open_calls, strict=True):
            if time_ns >= until_ns:
                break
            if time_ns > at_ns:
                yield opened, time_ns - at_ns
                at_ns = time_ns
            opened = now_open
        yield opened, until_ns - at_ns

    def admissions(self, since_ns: int, until_ns: int) -> list[tuple[int, int, int]]:
        return [start for start in self.starts if since_ns <= start[0] < until_ns]

    def wake_ups_ms(self, bound: int, since_ns: int, until_ns: int) -> list[float]:
        """From each end, while all permits were in use, to the beginning that took its place.

        Places are taken in the order in which they became free.
        """
        waits, freed, before = [], deque[int](), 0
        for time_ns, opened in zip(self.times_ns, self.open_calls, strict=True):
            if opened < before:
                if before >= bound or freed:
                    freed.append(time_ns)
            elif freed:
                free_ns = freed.popleft()
                if since_ns <= free_ns < until_ns:
                    waits.append((time_ns - free_ns) / 1e6)
            before = opened
        return sorted(waits)

    def first_full_ns(self, bound: int, since_ns: int) -> int | None:
        """When, after `since_ns`, all permits were in use at once."""
        for place in range(bisect_left(self.times_ns, since_ns), len(self.times_ns)):
            if self.open_calls[place] >= bound:
                return self.times_ns[place]
        return None

    def first_growth_ns(self, down_ns: int, up_ns: int) -> int | None:
        """When, after `up_ns`, a worker first had more calls open than at any time from `down_ns`
        to then: it was given a permit, and did not pass on one of its own."""
        opened, most = Counter[int](), Counter[int]()
        for at_ns, worker, step in self.moves:
            opened[worker] += step
            if at_ns <= down_ns:
                most[worker] = opened[worker]
            elif opened[worker] > most[worker]:
                most[worker] = opened[worker]
                if at_ns > up_ns:
                    return at_ns
        return None


def jain(counts: Sequence[int]) -> float:
    """Jain's index of fairness: 1 when all got the same, 1/n when one got all."""
    squares = sum(count * count for count in counts)
    return sum(counts) ** 2 / (len(counts) * squares) if squares else 0.0


def shares_off(by_tenant: Counter[str], weights: Mapping[str, int]) -> float:
    """How far the share of the tenant that is worst off, or best off, is from ideal."""
    total, all_weights = sum(by_tenant.values()), sum(weights.values())
    return max(
        abs(by_tenant[tenant] / total * all_weights / weight - 1)
        for tenant, weight in weights.items()
    )


def quantile(ordered: Sequence[float], part: float) -> float | None:
    """Of a sorted sequence; None when there is nothing."""
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else None
