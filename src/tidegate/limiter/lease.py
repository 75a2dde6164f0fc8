"""How long this process may still believe that its session is alive.

Invariant: measured from before the request was sent, by a clock that counts suspended time, so
that the process gives up before the server does. Read and written by the loop and the heartbeat
thread: each field is replaced as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

FENCE_SHARE = 0.8
# More than FENCE_SHARE and the third of a lease from one renewal to the next.
ALL_LAPSED_SHARE = 1.25

# CLOCK_BOOTTIME goes on while the machine is suspended; elsewhere the platform's best.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now_ms() -> float:
    """Milliseconds of a clock that only measures durations and counts suspended time."""
    return time.clock_gettime(_CLOCK) * 1000


@dataclass(frozen=True, slots=True)
class Identity:
    """Who we are in the pool: an epoch of the pool and our generation in it."""

    epoch: int = 0
    gen: int = 0


class Lease:
    """The lease of this process's session."""

    __slots__ = ("_confirmed_ms", "identity", "lease_ms", "now_ms")

    def __init__(self, lease_ms: int, clock: Callable[[], float] = now_ms) -> None:
        self.now_ms = clock
        self.lease_ms = lease_ms
        self.identity = Identity()
        self._confirmed_ms = float("-inf")

    def renewed(self, sent_ms: float, lease_ms: int) -> None:
        """The server confirmed a request that was sent at `sent_ms`."""
        self.lease_ms = lease_ms
        self._confirmed_ms = max(self._confirmed_ms, sent_ms)

    def silent_ms(self) -> float:
        """How long ago the last confirmed request was sent; infinite before the first."""
        return self.now_ms() - self._confirmed_ms

    def lapsed(self) -> bool:
        """True once we must no longer count on our session."""
        return self.silent_ms() > self.lease_ms * FENCE_SHARE

    def all_lapsed(self) -> bool:
        """True once the lease of every other session that was cut off with us has lapsed too: they
        may have been confirmed later, by as much as lies between two renewals."""
        return self.silent_ms() > self.lease_ms * ALL_LAPSED_SHARE

    def deadline_s(self) -> float:
        """How long one call to the server may take, so that trouble shows within the lease."""
        return self.lease_ms / 3000
