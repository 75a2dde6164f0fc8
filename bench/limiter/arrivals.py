"""Arrivals under a rate: what part of it they used, and what a provider would have refused. Pure.

Times are in nanoseconds and in order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence

# A provider's fixed windows may begin at any moment: so many are tried, and the worst one counts.
PHASES = 60


def rate_used(times_ns: Sequence[int], bound: int, window_ns: int, windows: int) -> float:
    """Arrivals over the possible ones, over that many whole windows' worth of arrivals: how long
    it took until the first one after them came. The open end counts when it did not come."""
    if not times_ns:
        return 0.0
    expected = bound * windows
    if len(times_ns) > expected:
        return expected / bound * window_ns / (times_ns[expected] - times_ns[0])
    return len(times_ns) / expected


def refusals(times_ns: Sequence[int], bound: int, window_ns: int) -> dict[str, int]:
    """How many a provider would have refused, for each of the ways in which providers count."""
    return {
        "fixed window": max(
            (
                _fixed(times_ns, bound, window_ns, phase * window_ns // PHASES)
                for phase in range(PHASES)
            ),
            default=0,
        ),
        "sliding window": _sliding(times_ns, bound, window_ns),
        "bucket": _bucket(times_ns, bound, window_ns),
    }


def most_in_window(times_ns: Sequence[int], window_ns: int) -> int:
    """The most in any window of that length, wherever it lies."""
    return max(
        (bisect_left(times_ns, at_ns + window_ns) - place for place, at_ns in enumerate(times_ns)),
        default=0,
    )


def _fixed(times_ns: Sequence[int], bound: int, window_ns: int, phase_ns: int) -> int:
    windows = Counter((at_ns - phase_ns) // window_ns for at_ns in times_ns)
    return sum(max(0, count - bound) for count in windows.values())


def _sliding(times_ns: Sequence[int], bound: int, window_ns: int) -> int:
    refused, let_in = 0, deque[int]()
    for at_ns in times_ns:
        while let_in and let_in[0] <= at_ns - window_ns:
            let_in.popleft()
        if len(let_in) < bound:
            let_in.append(at_ns)
        else:
            refused += 1
    return refused


def _bucket(times_ns: Sequence[int], bound: int, window_ns: int) -> int:
    refused, level, filled_ns = 0, float(bound), times_ns[0] if times_ns else 0
    for at_ns in times_ns:
        level = min(float(bound), level + (at_ns - filled_ns) * bound / window_ns)
        filled_ns = at_ns
        if level >= 1:
            level -= 1
        else:
            refused += 1
    return refused
