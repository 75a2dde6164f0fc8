"""The time of one process in a pool: how it is read, and how something waits for it.

Invariant: leases, pauses, deadlines and windows of a limiter are measured and waited for by its one
`Clock`, so that a test can hand in time of its own. Only the deadline of a single exchange with
the server is real, since the network is.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Protocol

from tidegate.limiter.lease import now_ms


class Timer(Protocol):
    """A call that is to come."""

    def cancel(self) -> None:
        """It is not to come any more."""


class Clock:
    """The machine's. `server_time` is Lua that defines `T.wall_clock_ms` in the place of the
    server's clock; None in the product."""

    server_time: str | None = None
    # No method: it is called several times a request.
    now_ms = staticmethod(now_ms)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def call_later(self, seconds: float, call: Callable[..., object], *arguments: object) -> Timer:
        return asyncio.get_running_loop().call_later(seconds, call, *arguments)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """In a thread: True once the event is set, False after so long."""
        return event.wait(seconds)
