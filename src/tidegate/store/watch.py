"""Waiting: for a request to change, and for work to come.

Invariant: whatever happens to notifications, a change is seen within `POLL_MS`; a waiter that is
cancelled leaves nothing behind; the number of waiters is bounded, and one query polls for all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from uuid import UUID

import asyncpg

from tidegate.errors import StoreUnavailable
from tidegate.store.bell import Bell
from tidegate.store.connection import Connections
from tidegate.store.queries import sql

POLL_MS = 500
WORK_POLL_MS = 1_000
MAX_WATCHERS = 10_000


class Watch:
    """Who waits for which request, at which version."""

    def __init__(self, connections: Connections, bell: Bell) -> None:
        self._connections = connections
        self._bell = bell
        self._waiting: dict[UUID, set[asyncio.Event]] = {}
        self._seen: dict[UUID, int] = {}
        self._poller: asyncio.Task[None] | None = None
        self._work: dict[str | None, asyncio.Event] = {}
        self._rung: dict[str | None, int] = {}
        bell.on_work = self._on_work
        bell.on_changed = self._on_changed
        bell.on_connected = self._wake_all

    def __len__(self) -> int:
        return sum(len(events) for events in self._waiting.values())

    def watch(self, request_id: UUID) -> asyncio.Event | None:
        """An event that is set when the request may have changed; None when there are too many."""
        if len(self._waiting) >= MAX_WATCHERS:
            return None
        event = asyncio.Event()
        self._waiting.setdefault(request_id, set()).add(event)
        self._bell.hear()
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll())
        return event

    def unwatch(self, request_id: UUID, event: asyncio.Event) -> None:
        events = self._waiting.get(request_id, set())
        events.discard(event)
        if not events:
            self._waiting.pop(request_id, None)
            self._seen.pop(request_id, None)

    def known(self, request_id: UUID, version: int) -> None:
        """The watcher has seen `version`: only a different one wakes it."""
        if request_id in self._waiting:
            self._seen[request_id] = version

    def work_mark(self, lane: str | None) -> int:
        """How often there was news of work in the lane; None for any."""
        heard = self._rung if lane is None else {lane, None}
        return sum(self._rung.get(one, 0) for one in heard)

    async def wait_work(self, timeout_ms: int, since: int | None, lane: str | None) -> None:
        """Return when work may have come since the mark `since`, or after the time at most."""
        self._bell.hear()
        if since is not None and since != self.work_mark(lane):
            return
        event = self._work.setdefault(lane, asyncio.Event())
        try:
            async with asyncio.timeout(min(timeout_ms, WORK_POLL_MS) / 1000):
                await event.wait()
        except TimeoutError:
            return

    async def aclose(self) -> None:
        self._wake_all()
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)

    def _on_work(self, lane: str | None) -> None:
        self._rung[lane] = self._rung.get(lane, 0) + 1
        for waiting in list(self._work) if lane is None else (lane, None):
            if (event := self._work.pop(waiting, None)) is not None:
                event.set()

    def _on_changed(self, ids: Iterable[UUID]) -> None:
        if not self._waiting:
            return
        for request_id in ids:
            for event in self._waiting.get(request_id, ()):
                event.set()

    def _wake_all(self) -> None:
        # Notifications may have been missed before this moment.
        self._on_work(None)
        self._on_changed(list(self._waiting))

    async def _poll(self) -> None:
        try:
            while self._waiting:
                await asyncio.sleep(POLL_MS / 1000)
                ids = list(self._waiting)

                async def versions(
                    connection: asyncpg.Connection, ids: list[UUID] = ids
                ) -> list[asyncpg.Record]:
                    found: list[asyncpg.Record] = await connection.fetch(sql("get_versions"), ids)
                    return found

                try:
                    rows = await self._connections.run(versions)
                except StoreUnavailable:
                    continue
                now = {UUID(int=row["id"].int): row["version"] for row in rows}
                # One that is gone has changed too.
                self._on_changed(
                    request_id
                    for request_id in ids
                    if now.get(request_id) != self._seen.get(request_id)
                )
        finally:
            self._poller = None
