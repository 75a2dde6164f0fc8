"""Notifications: who waits for a change or for work is woken at once, when NOTIFY works.

Invariant: a notification is only a hint. Everything that waits also polls, so that a lost one, or
PgBouncer in transaction mode, costs half a second and nothing else. NOTIFY is sent coalesced and
outside the transaction it speaks of: it takes an instance-wide lock at commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from uuid import UUID

import asyncpg

from tidegate.call import Kind
from tidegate.errors import StoreUnavailable
from tidegate.store.connection import Connections
from tidegate.store.queries import sql
from tidegate.store.rows import dumps

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

                async def send(connection: asyncpg.Connection, messages: str = messages) -> None:
                    await connection.execute(sql("notify"), messages)

                await self._connections.run(send)
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
