"""Notifications and waits: LISTEN/NOTIFY with polling behind it.

NOTIFY is sent coalesced and outside its transaction, because it takes an instance-wide lock at
commit.

Invariants: a notification is a hint: a change is seen within `POLL_MS` without it; waiters are
bounded, and one query polls for all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from uuid import UUID

import asyncpg

from tidegate.call import Kind
from tidegate.errors import StoreUnavailable
from tidegate.store.database import Connections
from tidegate.store.records import dumps, uuid_of

# What work is for, beside a kind of jobs: jobs whose kind is unsure, and batches.
UNSURE = "unsure"
BATCHES = "batches"
LANES = frozenset({*Kind, UNSURE, BATCHES})

WORK = "tidegate_work"
CHANGED = "tidegate_changed"
CANCEL = "tidegate_cancel"
_IDS_PER_MESSAGE = 200  # 37 bytes each; a payload holds 8,000
_RECONNECT_MS = 500
_LISTEN_TIMEOUT_MS = 2_000


class Bell:
    """Rings to all processes, and hears them."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._work: set[str] = set()
        self._ids: set[UUID] = set()
        self._cancelled: set[UUID] = set()
        self._ringing: asyncio.Task[None] | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._line: asyncpg.Connection | None = None
        self.on_work: Callable[[str | None], None] = lambda _lane: None
        self.on_changed: Callable[[Iterable[UUID]], None] = lambda _ids: None
        self.on_cancel: Callable[[Iterable[UUID]], None] = lambda _ids: None
        self.on_connected: Callable[[], None] = lambda: None

    def work(self, pools: Iterable[str], lanes: Iterable[str] = ()) -> None:
        """There may be work in these lanes of these pools; without any, in all of them."""
        ends = [f" {lane}" for lane in lanes] or [""]
        self._work.update(pool + end for pool in pools for end in ends)
        self._ring()

    def changed(self, ids: Iterable[UUID]) -> None:
        """These requests have changed."""
        self._ids.update(ids)
        self._ring()

    def cancel(self, ids: Iterable[UUID]) -> None:
        """Their owners want these requests ended."""
        self._cancelled.update(ids)
        self._ring()

    def hear(self) -> None:
        """Begin to listen, on a connection of its own; safe to call often."""
        if self._hearing is None:
            self._hearing = asyncio.create_task(self._hear())

    async def aclose(self) -> None:
        if self._ringing is not None:
            await asyncio.wait({self._ringing})
        if self._hearing is not None:
            self._hearing.cancel()
            await asyncio.gather(self._hearing, return_exceptions=True)
        if self._line is not None:
            self._line.terminate()

    def _ring(self) -> None:
        if self._ringing is None and self._has_news():
            self._ringing = asyncio.create_task(self._send())

    async def _send(self) -> None:
        try:
            while self._has_news():
                messages = dumps({"channel": to, "payload": said} for to, said in self._messages())
                await self._connections.execute("notify", messages)
        except StoreUnavailable:
            # Only hints are lost: whoever waits polls as well.
            self._messages()
        finally:
            self._ringing = None

    def _has_news(self) -> bool:
        return bool(self._work or self._ids or self._cancelled)

    def _messages(self) -> list[tuple[str, str]]:
        messages = [(WORK, where) for where in sorted(self._work)]
        self._work.clear()
        for channel, news in ((CHANGED, self._ids), (CANCEL, self._cancelled)):
            ids = [str(request_id) for request_id in news]
            news.clear()
            for start in range(0, len(ids), _IDS_PER_MESSAGE):
                messages.append((channel, ",".join(ids[start : start + _IDS_PER_MESSAGE])))
        return messages

    async def _hear(self) -> None:
        while True:
            # The pool reports an outage; here we only come back when it is over.
            with suppress(StoreUnavailable, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await self._hear_until_closed()
            await asyncio.sleep(_RECONNECT_MS / 1000)

    async def _hear_until_closed(self) -> None:
        connection = await self._connections.dedicated()
        self._line = connection
        closed = asyncio.Event()
        loop = asyncio.get_running_loop()
        watchdog = loop.call_later(_LISTEN_TIMEOUT_MS / 1000, connection.terminate)
        try:
            connection.add_termination_listener(lambda _connection: closed.set())
            for channel in (WORK, CHANGED, CANCEL):
                await connection.add_listener(channel, self._heard)
            watchdog.cancel()
            self.on_connected()
            await closed.wait()
        finally:
            watchdog.cancel()
            connection.terminate()

    def _heard(self, _connection: object, _pid: int, channel: str, payload: object) -> None:
        if channel == WORK:
            lane = str(payload).partition(" ")[2]
            self.on_work(lane if lane in LANES else None)
            return
        # Read only where somebody waits: thousands a second pass by.
        ids = (UUID(word) for word in str(payload).split(",") if word)
        (self.on_cancel if channel == CANCEL else self.on_changed)(ids)


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

    def work_mark(self, lane: str | None = None) -> int:
        """How often there was news of work in the lane; None for any. Read before a claim and given
        to `wait_work`: work that came in between then counts."""
        heard = self._rung if lane is None else {lane, None}
        return sum(self._rung.get(one, 0) for one in heard)

    async def wait_work(
        self, timeout_ms: int, since: int | None = None, lane: str | None = None
    ) -> None:
        """Return when work may have come since the mark `since`, at the latest after `timeout_ms`
        or one second. A lane is a kind of jobs, `UNSURE` or `BATCHES`; None stands for all."""
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

                try:
                    rows = await self._connections.rows("get_versions", ids)
                except StoreUnavailable:
                    continue
                now = {uuid_of(row["id"]): row["version"] for row in rows}
                # One that is gone has changed too.
                self._on_changed(
                    request_id
                    for request_id in ids
                    if now.get(request_id) != self._seen.get(request_id)
                )
        finally:
            self._poller = None
