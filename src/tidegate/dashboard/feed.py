"""What all viewers of this process are shown, looked up once and encoded once.

    sampling task ─┬─ live, every second ──────────────┐
                   └─ now, trend, record, more seldom ─┴─► each viewer: the newest of each event

Invariants: the task runs only while somebody looks, and asks Valkey and PostgreSQL no more often
for many than for one. A viewer that is slow gets the newest of each event and misses those between:
what waits for it is at most one frame of each kind. All are let go when the process drains.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import orjson
from fastapi import FastAPI

from tidegate.dashboard.frame import Frame, live_frame
from tidegate.dashboard.past import Past, Wanted
from tidegate.errors import ShuttingDown, StoreUnavailable, TooManyFollowers
from tidegate.http.services import Services
from tidegate.telemetry import Log, get_logger

MOST_VIEWERS = 200
LIVE_EVERY_S = 1.0
PAST_EVERY_S = 1.0

log = get_logger()


class Viewer:
    """One open page. `take` waits for what is new."""

    __slots__ = ("_frames", "_ready", "gone", "wanted")

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.gone = False
        self._frames: dict[str, bytes] = {}
        self._ready = asyncio.Event()

    def offer(self, event: str, frame: bytes) -> None:
        """A new frame, in the place of an older one that was not taken."""
        self._frames[event] = frame
        self._ready.set()

    def leave(self) -> None:
        """Nothing more is taken: the client has gone, or the process drains."""
        self.gone = True
        self._ready.set()

    async def take(self) -> bytes:
        """The newest of each event since the last time, as they go out; empty at the end."""
        await self._ready.wait()
        self._ready.clear()
        frames, self._frames = self._frames, {}
        return b"" if self.gone else b"".join(frames.values())


class Feed:
    """One per API process: see `feed_of`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._viewers: set[Viewer] = set()
        self._sampling: asyncio.Task[None] | None = None
        self._newest: dict[tuple[str, Wanted | None], bytes] = {}

    def __repr__(self) -> str:
        return f"<Feed viewers={len(self._viewers)} sampling={self._sampling is not None}>"

    @contextmanager
    def watched(self, wanted: Wanted) -> Iterator[Viewer]:
        """A viewer, as long as the block lasts. Raises TooManyFollowers and ShuttingDown."""
        if self._services.draining.is_set():
            raise ShuttingDown("this process is stopping; ask again")
        if len(self._viewers) >= MOST_VIEWERS:
            raise TooManyFollowers("too many dashboards are open at this process; try again")
        viewer = Viewer(wanted)
        for (event, whose), frame in self._newest.items():
            if whose in (None, wanted):
                viewer.offer(event, frame)
        self._viewers.add(viewer)
        if self._sampling is None:
            self._sampling = asyncio.create_task(self._sample(), name="dashboard-feed")
        try:
            yield viewer
        finally:
            self._viewers.discard(viewer)
            if not self._viewers and self._sampling is not None:
                self._sampling.cancel()
                self._sampling = None
                self._newest.clear()

    async def _sample(self) -> None:
        past = Past(self._services)
        works = (
            self._repeat(LIVE_EVERY_S, self._tell_live),
            self._repeat(PAST_EVERY_S, lambda: self._tell_past(past)),
        )
        tasks = [asyncio.create_task(work) for work in works]
        try:
            await self._services.draining.wait()
        finally:
            for task in tasks:
                task.cancel()
            for viewer in self._viewers:
                viewer.leave()

    async def _repeat(self, every_s: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            started = time.monotonic()
            try:
                await work()
            except StoreUnavailable as away:
                log.debug(Log.STORE_AWAY, detail=away.message)
            except Exception:  # the top of a task: logged, and it goes on
                log.exception(Log.INTERNAL_ERROR)
            took_s = time.monotonic() - started
            await asyncio.sleep(max(every_s - took_s, every_s / 4))

    async def _tell_live(self) -> None:
        self._tell("live", await live_frame(self._services))

    async def _tell_past(self, past: Past) -> None:
        """Look at what is due; who has come since the last look is served by the next."""
        wanted = {viewer.wanted for viewer in self._viewers}
        async for event, whose, frame in past.due(wanted):
            self._tell(event, frame, whose)

    def _tell(self, event: str, frame: Frame, whose: Wanted | None = None) -> None:
        encoded = b"event: %b\ndata: %b\n\n" % (event.encode(), orjson.dumps(frame))
        self._newest[event, whose] = encoded
        for viewer in self._viewers:
            if whose in (None, viewer.wanted):
                viewer.offer(event, encoded)


def feed_of(app: FastAPI) -> Feed:
    """The feed of a running application; made with its first viewer."""
    feed: Feed | None = getattr(app.state, "dashboard_feed", None)
    if feed is None:
        feed = app.state.dashboard_feed = Feed(app.state.services)
    return feed
