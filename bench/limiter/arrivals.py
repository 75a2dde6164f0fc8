"""Arrivals under a rate: what part of it they used, and what a provider would have refused. Pure.

An arrival is (time in ns, amount), in order of time; the amount is 1 where requests are counted.
The emulator's own counters say no, so that nothing is refused here that it would let in.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from tidegate.emulator.counting import Counter, FixedWindow, SlidingWindow, TokenBucket

Arrivals = Sequence[tuple[int, int]]
# A provider's fixed windows may begin at any moment: so many are tried, and the worst one counts.
PHASES = 60


def rate_used(arrivals: Arrivals, bound: int, window_ns: int, windows: int) -> float:
    """What was used over what is possible, by the time until that many whole windows' worth had
    arrived and the next came; when they did not come, the part of them that did."""
    expected = bound * windows
    sums = list(accumulate(amount for _, amount in arrivals))
    full = bisect_left(sums, expected)
    if full + 1 >= len(arrivals):
        return (sums[-1] if sums else 0) / expected
    took_ns = arrivals[full + 1][0] - arrivals[0][0]
    return sums[full] / bound * window_ns / took_ns


def refusals(arrivals: Arrivals, bound: int, window_ns: int) -> dict[str, int]:
    """How many would have been refused, for each of the ways in which providers count."""
    phases = [phase * window_ns // PHASES for phase in range(PHASES)]
    return {
        "fixed window": max(
            _refused(FixedWindow(bound, window_ns), arrivals, phase) for phase in phases
        ),
        "sliding window": _refused(SlidingWindow(bound, window_ns), arrivals, 0),
        "bucket": _refused(TokenBucket(bound, window_ns), arrivals, 0),
    }


def most_in_window(arrivals: Arrivals, window_ns: int) -> int:
    """The largest amount in any window of that length, wherever it lies."""
    times = [at_ns for at_ns, _ in arrivals]
    sums = [0, *accumulate(amount for _, amount in arrivals)]
    return max(
        (
            sums[bisect_left(times, at_ns + window_ns)] - sums[place]
            for place, at_ns in enumerate(times)
        ),
        default=0,
    )


def _refused(counter: Counter, arrivals: Arrivals, shift_ns: int) -> int:
    refused = 0
    for at_ns, amount in arrivals:
        if counter.wait_ns(amount, at_ns + shift_ns):
            refused += 1
        else:
            counter.take(amount, at_ns + shift_ns)
    return refused
