"""What is left of the limits that a call falls under, as a header says it.

Invariant: nobody waits for it: it is at most some seconds old, and asked for behind the answers,
once a second while there are any.
"""

from __future__ import annotations

import asyncio
import time

from tidegate.errors import TidegateError
from tidegate.limiter import Limiter
from tidegate.limiter.limits import MAX_BOUND
from tidegate.telemetry import Log, get_logger

_FRESH_S = 1.0


class Remaining:
    """Of one pool."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._left: dict[str, int] = {}
        self._texts: dict[tuple[str, ...], bytes] = {}
        self._asked = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    def of(self, limits: tuple[str, ...]) -> bytes:
        """`kind:text_only=3, rpm:m=57`, as far as is known; empty while nothing is."""
        now = time.monotonic()
        if now - self._asked > _FRESH_S and self._asking is None:
            self._asked = now
            self._asking = asyncio.create_task(self._ask())
        text = self._texts.get(limits)
        if text is None:
            known = [f"{one}={self._left[one]}" for one in limits if one in self._left]
            text = self._texts[limits] = ", ".join(known).encode()
        return text

    async def _ask(self) -> None:
        try:
            snapshot = await self._limiter.snapshot()
        except TidegateError as away:
            get_logger().debug(Log.STORE_AWAY, detail=away.message)
            self._left = {}
        else:
            self._left = {
                name: max(0, view.current - view.used)
                for name, view in snapshot.limits.items()
                if view.bound < MAX_BOUND  # one that no policy names has none
            }
        finally:
            self._texts = {}
            self._asking = None
