"""A clock whose hands the test moves, for processes and server alike.

Real are the network and the server; what lasts a lease, a pause or a window lasts as long as the
test moves the hands. They go on only while no process has anything under way, so that a slow
machine makes no lease lapse.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

import redis

from tests.waiting import wait_until, work_for
from tidegate.limiter.limiter import Limiter
from tidegate.limiter.messages import Keyspace
from tidegate.limiter.session import Clock

START_MS = 1_700_000_000_000
# How much the hands move in one go.
STEP_MS = 20.0


class Call:
    """A call that is to come."""

    def __init__(self, call: Callable[..., object], arguments: tuple[object, ...]) -> None:
        self._call = call
        self._arguments = arguments
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __call__(self) -> None:
        if not self.cancelled:
            self._call(*self._arguments)


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


class Hands(Clock):
    """See the module. One for all processes of a pool at the server of `url`."""

    server_time = """
function T.wall_clock_ms() return tonumber(call('GET', T.prefix .. 'testclock')) end
"""

    def __init__(self, url: str, pool: str) -> None:
        self._server: Any = redis.Redis.from_url(url, socket_timeout=1.0)
        self._key = f"{Keyspace(pool).prefix}testclock"
        self._at_ms = 0.0
        self._due: list[tuple[float, int, Call]] = []
        self._numbers = count()
        self.limiters: list[Limiter] = []
        self._moved = threading.Condition()
        self.now_ms = lambda: self._at_ms
        self.tell_server()

    def tell_server(self) -> None:
        """Also after a restart, which forgets it."""
        self._server.set(self._key, START_MS + int(self._at_ms))

    def close(self) -> None:
        self._server.delete(self._key)
        self._server.close()

    async def sleep(self, seconds: float) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.call_later(seconds, _wake, woken)
        await woken

    def call_later(self, seconds: float, call: Callable[..., object], *arguments: object) -> Call:
        timer = Call(call, arguments)
        due_ms = self._at_ms + seconds * 1000
        heapq.heappush(self._due, (due_ms, next(self._numbers), timer))
        return timer

    def wait(self, event: threading.Event, seconds: float) -> bool:
        until_ms = self._at_ms + seconds * 1000
        with self._moved:
            while self._at_ms < until_ms and not event.is_set():
                self._moved.wait(0.1)  # nobody tells when the event is set
        return event.is_set()

    async def run(self) -> None:
        """Move the hands for ever, as soon as all that was due has come to its end."""
        while True:
            with self._moved:
                self._at_ms += STEP_MS
                self._moved.notify_all()
            with suppress(redis.RedisError):  # it is stopped
                self.tell_server()
            while self._due and self._due[0][0] <= self._at_ms:
                heapq.heappop(self._due)[2]()
            await work_for(0.001)
            await wait_until(lambda: all(map(_is_still, self.limiters)), what="processes at rest")


def _is_still(limiter: Limiter) -> bool:
    """Nothing is under way, and nothing there is to say to a server that answers."""
    exchanges = limiter._exchanges
    asked = exchanges._wake.is_set() or exchanges.session.is_request_urgent()
    ended = limiter._exchanging is None or limiter._exchanging.done()
    return ended or (not limiter._link._lock.locked() and (limiter.state == "away" or not asked))
