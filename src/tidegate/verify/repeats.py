"""Calls of jobs that were made more than once, and whether they had to be. Pure.

A call is made again where its worker was killed before the result was on record, whether the
provider had answered by then or not. On a busy machine results take longer to record, so that more
calls are repeated after a kill than were open at that moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Repeats:
    """Calls beyond the first of each job. of_killed: after an attempt of the killed worker that
    came to no result. others: after one of another worker, such as one that stood still for longer
    than its lease. unexplained: of `others`, those after no such attempt at all."""

    of_killed: int
    others: int
    unexplained: int


def repeats(calls: Sequence[int], cut_short: Sequence[Mapping[str, int]], killed: str) -> Repeats:
    """`calls`: how often each job called the provider; `cut_short`: how many attempts at it came to
    no result, by worker."""
    of_killed = others = unexplained = 0
    for made, by_worker in zip(calls, cut_short, strict=True):
        repeated = max(0, made - 1)
        explained = min(repeated, by_worker.get(killed, 0))
        of_killed += explained
        others += repeated - explained
        unexplained += max(0, repeated - sum(by_worker.values()))
    return Repeats(of_killed, others, unexplained)
