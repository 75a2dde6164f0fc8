"""Liveness of workers, and which worker may judge that others are dead.

Invariant: only a process whose own heartbeats have reached PostgreSQL for a whole lease without a
gap may take back the jobs of another. After an outage, when every worker looks dead, nobody may
until all that live have had a lease's time to say so.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

_MOST_ASKS = 3


def _now() -> float:
    # Counts the time that the machine was asleep, where the platform can tell.
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


class Steadiness:
    """How long this process has been heard by PostgreSQL without a gap."""

    def __init__(self, lease_ms: int) -> None:
        self._lease_s = lease_ms / 1000
        self._since: float | None = None
        self._last: float | None = None

    def beaten(self, sent_at: float) -> None:
        """A heartbeat sent at `sent_at` was committed."""
        if self._last is None or sent_at - self._last > self._lease_s * 2 / 3:
            self._since = sent_at
        self._last = sent_at

    def missed(self) -> None:
        self._since = self._last = None

    @property
    def fresh(self) -> bool:
        """Whether PostgreSQL has heard of us within the lease."""
        return self._last is not None and _now() - self._last < self._lease_s * 2 / 3

    @property
    def may_judge(self) -> bool:
        return self.fresh and self._since is not None and _now() - self._since >= self._lease_s

    @staticmethod
    def clock() -> float:
        """Seconds on the clock that `beaten` wants."""
        return _now()


async def until_quick(ask: Callable[[], Awaitable[object]], lease_ms: int) -> None:
    """Ask for what a claim is needed for, until the reply is read within a third of a lease, three
    times at most: of a process that stood still meanwhile another one may have the claim. What
    `ask` raises leaves."""
    for _ in range(_MOST_ASKS):
        asked_at = _now()
        await ask()
        if _now() - asked_at < lease_ms / 3000:
            return
