"""Leases of this process in PostgreSQL: whether it may judge others, and claims quickly enough."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from tidegate.errors import StoreUnavailable

_MOST_ASKS = 3


def _now() -> float:
    # Counts the time that the machine was suspended, where the platform does.
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


class Steadiness:
    """How long this process's heartbeats have reached PostgreSQL without a gap.

    Invariant: only a process whose own heartbeats have done so for a whole lease may take over the
    jobs of another. After an outage, when every worker looks dead, none may until all that live
    have had a lease's time to report.
    """

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
        """Whether the last heartbeat is within the lease."""
        return self._last is not None and _now() - self._last < self._lease_s * 2 / 3

    @property
    def may_judge(self) -> bool:
        return self.fresh and self._since is not None and _now() - self._since >= self._lease_s

    @staticmethod
    def clock() -> float:
        """Seconds on the clock that `beaten` takes."""
        return _now()


async def until_quick(ask: Callable[[], Awaitable[object]], lease_ms: int) -> None:
    """Repeat `ask` until its reply is read within a third of a lease: another process may have the
    claim of one that stood still meanwhile. Raises what `ask` raises, and StoreUnavailable after
    three slow replies."""
    for _ in range(_MOST_ASKS):
        asked_at = _now()
        await ask()
        if _now() - asked_at < lease_ms / 3000:
            return
    raise StoreUnavailable("PostgreSQL answers too slowly for the lease of a claim")
