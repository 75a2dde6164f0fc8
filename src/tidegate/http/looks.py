"""Looking at pools for those who ask what they wait for.

Invariant: however many ask, a pool is looked at once in `FRESH_MS` by each process.
"""

from __future__ import annotations

import asyncio
import time

from tidegate.errors import LimiterUnavailable
from tidegate.limiter import Limiter, Snapshot

FRESH_MS = 500


class Looks:
    """The last look at each pool, shared by all who ask."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, Snapshot | None]] = {}
        self._lock = asyncio.Lock()

    async def of(self, limiter: Limiter) -> Snapshot | None:
        """None while Valkey is away."""
        async with self._lock:
            at, found = self._found.get(limiter.pool, (0.0, None))
            if time.monotonic() - at > FRESH_MS / 1000:
                try:
                    found = await limiter.snapshot()
                except LimiterUnavailable:
                    found = None
                self._found[limiter.pool] = (time.monotonic(), found)
            return found
