"""Notifications between processes, and waits for them: LISTEN/NOTIFY with polling behind it.

NOTIFY is sent coalesced and outside its transaction, because it takes an instance-wide lock at
commit. Once a second, one statement on the listening connection, the pulse, checks everything that
the process's loops wait for. It proves that the connection works, so that an idle loop needs no
query of its own; loops only poll while there is no pulse. `Lookback` limits how far back a search
goes.

Invariants: a notification is a hint: without it a change is seen within `POLL_MS`, and work within
two seconds; waiters are bounded, and one query polls for all.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import UUID
from weakref import WeakValueDictionary

import asyncpg

from tidegate.call import Kind
from tidegate.errors import StoreUnavailable
from tidegate.store.database import Connections, DatabaseSession, row_alone
from tidegate.store.records import dumps, uuid_of

# Lanes of work beside the kinds of jobs: unclassified jobs, and batches.
UNSURE = "unsure"
BATCHES = "batches"
LANES = frozenset({*Kind, UNSURE, BATCHES})

WORK = "tidegate_work"
CHANGED = "tidegate_changed"
CANCEL = "tidegate_cancel"
BUDGETS = "tidegate_budgets"
UPSTREAMS = "tidegate_upstreams"
MOVED = "tidegate_moved"
POLL_MS = 500
WORK_POLL_MS = 1_000
# The longest wait of a loop that the pulse would wake.
PULSED_MS = 10_000
_PULSE_S = 1.0
_SURE_S = 3.0
Sign = Literal["ripe", "overdue", "cancelled", "background"]
_SIGNS: tuple[Sign, ...] = ("ripe", "overdue", "cancelled", "background")
MAX_WATCHERS = 10_000
_IDS_PER_MESSAGE = 200  # 37 bytes each; a payload holds 8,000
_MOVES_PER_MESSAGE, _MOST_MOVES = 50, 1_000  # of at most 130 bytes
_PHASE_S = random.random()  # so that the processes of a machine do not wake together
_RECONNECT_MS = 500
_LISTEN_TIMEOUT_MS = 2_000
_DRIFT = 2e-4  # of two clocks, in seconds per second
AGREE_S = 1.0  # more than a reading is late by, less than a deadline or a retry is exact to
# asyncpg raises the second if the connection's end was announced between two statements.
_CUT = (asyncpg.InterfaceError, asyncpg.InternalClientError)


def _now() -> float:
    # Includes time in which the machine was suspended, if the platform supports that.
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


class Steadiness:
    """How long this process's heartbeats have reached PostgreSQL without a gap.

    Invariant: only a process whose own heartbeats arrived for a whole lease may take over jobs of
    others. After an outage, when every worker looks dead, none may until all live ones had a
    lease's time to report.
    """

    def __init__(self, lease_ms: int) -> None:
        self.lease_ms = lease_ms
        self._lease_s = lease_ms / 1000
        self._since: float | None = None
        self._last: float | None = None

    def beaten(self, sent_at: float) -> None:
        """Record that a heartbeat sent at `sent_at` was committed."""
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


def require_judge(may_judge: bool) -> None:
    """Raise StoreUnavailable for a judgement that took long: before all claims of silent workers
    are returned, since in a stall of PostgreSQL or of the machine every worker falls silent."""
    if not may_judge:
        raise StoreUnavailable("PostgreSQL answers too slowly for the lease of a claim")


def next_beat_s(every_s: float) -> float:
    """Return the time until this process's next beat of `every_s`, at most a tenth longer. Idle
    loops wait for the same beats: ten of them wake a process once, not ten times."""
    left_s = every_s - (time.monotonic() - _PHASE_S) % every_s
    return left_s if left_s > every_s / 10 else left_s + every_s


class ServerClock:
    """PostgreSQL's clock, as last read by the pulse and a worker's heartbeats: a process's own
    clock may be wrong, or be set while it runs. While both agree to within `AGREE_S` the process's
    own clock is used: a reading is only as exact as a round trip is short, and times of one request
    that different clocks have stamped would be out of order. For the same reason a slow reading
    replaces no more exact one that it agrees with."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._clock, self._wall = clock, wall
        self._read: tuple[float, datetime] | None = None  # None while the clocks agree
        self._late_s = 0.0  # the possible error of `_read`

    def __repr__(self) -> str:
        return f"<ServerClock {self.now()}>"

    def begin(self) -> float:
        """Return the start time for `read`, before the query."""
        return self._clock()

    def read(self, begun: float, at: datetime) -> None:
        """Set the time `at` that PostgreSQL returned, for the middle of the query's duration."""
        ended = self._clock()
        middle, late_s = (begun + ended) / 2, (ended - begun) / 2
        offset_s = abs((at - self._wall()).total_seconds() + late_s)
        if offset_s <= AGREE_S + (late_s if self._read is None else 0.0):
            self._read = None
            return
        if self._read is not None:
            kept_s = self._late_s + (middle - self._read[0]) * _DRIFT
            differs_s = abs((at - self._at(middle, self._read)).total_seconds())
            if late_s > kept_s and differs_s <= late_s + kept_s:
                return
        self._read, self._late_s = (middle, at), late_s

    def now(self) -> datetime:
        """Return PostgreSQL's time, or this process's until it was read and while both agree."""
        if self._read is None:
            return self._wall()
        return self._at(self._clock(), self._read)

    @staticmethod
    def _at(clock_s: float, read: tuple[float, datetime]) -> datetime:
        return read[1] + timedelta(seconds=clock_s - read[0])


class Notifications:
    """Sends notifications to all processes, and listens once something waits. One per process."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self.clock = ServerClock()
        # Pending notifications.
        self._work: set[str] = set()
        self._changed: set[UUID] = set()
        self._cancelled: set[UUID] = set()
        self._moved: dict[str, str] = {}
        self._sending: asyncio.Task[None] | None = None
        # Waiters: events by request, with the version that the watcher has seen; events and counts
        # of notifications by lane; received cancellations, once a worker waits for them.
        self._watchers: dict[UUID, set[asyncio.Event]] = {}
        self._seen: dict[UUID, int] = {}
        self._idle: dict[str | None, asyncio.Event] = {}
        self._marks: dict[str | None, int] = {}
        self._received: set[UUID] | None = None
        self._cancel_received = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None
        self.on_budgets: list[Callable[[], None]] = []
        self.on_upstreams: list[Callable[[], None]] = []
        self.on_moved: list[Callable[[bytes, str, int], None]] = []
        self.pool: str | None = None  # whose jobs this process works on
        self._due: dict[Sign, asyncio.Event] = {}
        self._shown: frozenset[Sign] = frozenset()  # in the last pulse
        self._pulsed_at = -math.inf
        self._seen_transaction: int | None = None
        self._under_way: list[int] = []  # transactions in progress at the last pulse
        self._budgets = -1
        self._line: asyncpg.Connection | None = None
        self._poller: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return sum(len(events) for events in self._watchers.values())

    async def aclose(self) -> None:
        """Send pending notifications, then stop listening."""
        if self._sending is not None:
            await asyncio.wait({self._sending})
        tasks = [task for task in (self._poller, self._listening) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._line is not None:
            self._line.terminate()

    # Sending

    def work(self, pools: Iterable[str], lanes: Iterable[str] = ()) -> None:
        """Notify that these lanes of these pools may have work; all lanes if none is named."""
        ends = [f" {lane}" for lane in lanes] or [""]
        self._work.update(pool + end for pool in pools for end in ends)
        self._send_soon()

    def changed(self, ids: Iterable[UUID]) -> None:
        """Notify that these requests have changed."""
        self._changed.update(ids)
        self._send_soon()

    def cancel(self, ids: Iterable[UUID]) -> None:
        """Notify that these requests were cancelled by their owners."""
        self._cancelled.update(ids)
        self._send_soon()

    def moved(self, key: bytes, upstream: str, cached_tokens: int) -> None:
        """Notify that a conversation has moved to another upstream."""
        if len(self._moved) < _MOST_MOVES:
            self._moved[key.hex()] = f"{key.hex()} {cached_tokens} {upstream}"
            self._send_soon()

    def _send_soon(self) -> None:
        if self._sending is None and self._has_news():
            self._sending = asyncio.create_task(self._send())

    async def _send(self) -> None:
        try:
            while self._has_news():
                messages = dumps(
                    [{"channel": to, "payload": payload} for to, payload in self._messages()]
                )
                await self._connections.execute("notify", messages)
        except StoreUnavailable:
            self._messages()  # hints may be lost: every waiter polls too
        finally:
            self._sending = None

    def _has_news(self) -> bool:
        return bool(self._work or self._changed or self._cancelled or self._moved)

    def _messages(self) -> list[tuple[str, str]]:
        messages = [(WORK, where) for where in sorted(self._work)]
        self._work.clear()
        for channel, news in ((CHANGED, self._changed), (CANCEL, self._cancelled)):
            ids = [str(request_id) for request_id in news]
            news.clear()
            for start in range(0, len(ids), _IDS_PER_MESSAGE):
                messages.append((channel, ",".join(ids[start : start + _IDS_PER_MESSAGE])))
        moves = list(self._moved.values())
        self._moved.clear()
        for start in range(0, len(moves), _MOVES_PER_MESSAGE):
            messages.append((MOVED, "\n".join(moves[start : start + _MOVES_PER_MESSAGE])))
        return messages

    # Waiting

    def watch(self, request_id: UUID) -> asyncio.Event | None:
        """Return an event that is set when the request may have changed; None for too many
        watchers."""
        if len(self._watchers) >= MAX_WATCHERS:
            return None
        event = asyncio.Event()
        self._watchers.setdefault(request_id, set()).add(event)
        self.listen()
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll())
        return event

    def unwatch(self, request_id: UUID, event: asyncio.Event) -> None:
        events = self._watchers.get(request_id, set())
        events.discard(event)
        if not events:
            self._watchers.pop(request_id, None)
            self._seen.pop(request_id, None)

    def known(self, request_id: UUID, version: int) -> None:
        """Note that the watcher has seen `version`: only a different one wakes it."""
        if request_id in self._watchers:
            self._seen[request_id] = version

    def work_mark(self, lane: str | None = None) -> int:
        """Return the count of notifications in a lane, None for any. Read before a claim and passed
        to `wait_work`, so that work in between is noticed."""
        lanes = self._marks if lane is None else {lane, None}
        return sum(self._marks.get(one, 0) for one in lanes)

    async def wait_work(
        self, timeout_ms: int, since: int | None = None, lane: str | None = None
    ) -> None:
        """Return when work may have arrived since the mark `since`, at the latest after
        `timeout_ms`, and after one second without a pulse. A lane is a kind of jobs, `UNSURE` or
        `BATCHES`; None for all."""
        self.listen()
        if since is not None and since != self.work_mark(lane):
            return
        event = self._idle.setdefault(lane, asyncio.Event())
        with suppress(TimeoutError):
            most_ms = PULSED_MS if self.is_sure() else WORK_POLL_MS
            async with asyncio.timeout(min(timeout_ms, most_ms) / 1000):
                await event.wait()

    def is_sure(self) -> bool:
        """Whether the last pulse is recent."""
        return time.monotonic() - self._pulsed_at < _SURE_S

    async def due(self, sign: Sign, pace_s: float = 1.0) -> None:
        """Return when `sign` may need work: after `pace_s` while the pulse reports some, or without
        a pulse; else once it reports some, at the latest after `PULSED_MS`."""
        if not self.is_sure() or sign in self._shown:
            await asyncio.sleep(pace_s)
            return
        event = self._due.setdefault(sign, asyncio.Event())
        with suppress(TimeoutError):
            async with asyncio.timeout(PULSED_MS / 1000):
                await event.wait()

    def wake(self, sign: Sign) -> None:
        """End waits for `sign` in this process."""
        self._wake([sign])

    def found(self, lane: str) -> None:
        """End waits for work in a lane in this process."""
        self._work_arrived(lane)

    async def wait_cancels(self, timeout_ms: float) -> set[UUID]:
        """Return the notified requests when a cancellation is notified, or after the timeout.

        These are hints, for all workers' jobs; `Jobs.to_cancel` has the facts.
        """
        if self._received is None:
            self._received = set()
        self.listen()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_ms / 1000):
                await self._cancel_received.wait()
        self._cancel_received.clear()
        received, self._received = self._received, set()
        return received

    def listen(self) -> None:
        """Start listening, on a connection of its own; may be called often."""
        if self._listening is None:
            self._listening = asyncio.create_task(self._listen())

    def wake_all(self) -> None:
        """Wake all waiters, since notifications may have been missed."""
        self._work_arrived(None)
        self._wake(_SIGNS)
        self._requests_changed(list(self._watchers))

    async def _listen(self) -> None:
        while True:
            # The pool reports an outage; here only a reconnection is tried.
            with suppress(StoreUnavailable, OSError, asyncpg.PostgresError, *_CUT):
                await self._listen_until_closed()
            await asyncio.sleep(_RECONNECT_MS / 1000)

    async def _listen_until_closed(self) -> None:
        connection = await self._connections.dedicated()
        self._line = connection
        closed = asyncio.Event()
        loop = asyncio.get_running_loop()
        watchdog = loop.call_later(_LISTEN_TIMEOUT_MS / 1000, connection.terminate)
        try:
            connection.add_termination_listener(lambda _connection: closed.set())
            for channel in (WORK, CHANGED, CANCEL, BUDGETS, UPSTREAMS, MOVED):
                await connection.add_listener(channel, self._on_message)
            watchdog.cancel()
            self.wake_all()
            for notify in (*self.on_budgets, *self.on_upstreams):
                notify()
            while not closed.is_set():
                await self._pulse(connection)
                with suppress(TimeoutError):
                    async with asyncio.timeout(next_beat_s(_PULSE_S)):
                        await closed.wait()
        except AttributeError as failed:
            if connection.is_closed():  # within a statement
                raise asyncpg.InterfaceError("the connection was cut off") from failed
            raise
        finally:
            watchdog.cancel()
            connection.terminate()
            self._pulsed_at, self._seen_transaction = -math.inf, None
            self.wake_all()  # loops poll from now on

    async def _pulse(self, connection: DatabaseSession) -> None:
        args = (self.pool, self._seen_transaction, sorted(LANES), self._under_way)
        begun = self.clock.begin()
        try:
            async with asyncio.timeout(_LISTEN_TIMEOUT_MS / 1000):
                row = await row_alone(connection, "pulse", *args, timeout_ms=_LISTEN_TIMEOUT_MS)
        except asyncpg.PostgresError:  # such as for a schema without its tables
            await connection.execute("ROLLBACK")
            return
        self.clock.read(begun, row["server_time"])
        self._seen_transaction, self._pulsed_at = row["seen"], time.monotonic()
        self._under_way = row["under_way"]
        self._shown = frozenset(sign for sign in _SIGNS if row[sign])
        self._wake(self._shown)
        if row["ready"]:
            self._work_arrived(None)
        elif row["batches"]:
            self._work_arrived(BATCHES)
        if row["budgets"] != self._budgets:
            self._budgets = row["budgets"]
            for notify in self.on_budgets:
                notify()

    def _wake(self, signs: Iterable[Sign]) -> None:
        for sign in signs:
            if (event := self._due.pop(sign, None)) is not None:
                event.set()

    def _on_message(self, _connection: object, _pid: int, channel: str, payload: object) -> None:
        if channel in (BUDGETS, UPSTREAMS):
            for notify in self.on_budgets if channel == BUDGETS else self.on_upstreams:
                notify()
            return
        if channel == MOVED:
            for key, tokens, upstream in map(str.split, str(payload).splitlines()):
                for note in self.on_moved:
                    note(bytes.fromhex(key), upstream, int(tokens))
            return
        if channel == WORK:
            lane = str(payload).partition(" ")[2]
            self._work_arrived(lane if lane in LANES else None)
            return
        # Parsed only if something waits: thousands may arrive per second.
        ids = (UUID(word) for word in str(payload).split(",") if word)
        if channel == CHANGED:
            self._requests_changed(ids)
        elif self._received is not None:
            self._received.update(ids)
            self._cancel_received.set()

    def _work_arrived(self, lane: str | None) -> None:
        self._marks[lane] = self._marks.get(lane, 0) + 1
        for waiting in list(self._idle) if lane is None else (lane, None):
            if (event := self._idle.pop(waiting, None)) is not None:
                event.set()

    def _requests_changed(self, ids: Iterable[UUID]) -> None:
        if not self._watchers:
            return
        for request_id in ids:
            for event in self._watchers.get(request_id, ()):
                event.set()

    async def _poll(self) -> None:
        try:
            while self._watchers:
                await asyncio.sleep(POLL_MS / 1000)
                ids = list(self._watchers)
                try:
                    rows = await self._connections.rows("get_versions", ids)
                except StoreUnavailable:
                    continue
                now = {uuid_of(row["id"]): row["version"] for row in rows}
                # A deleted request has changed too.
                self._requests_changed(
                    request_id
                    for request_id in ids
                    if now.get(request_id) != self._seen.get(request_id)
                )
        finally:
            self._poller = None


class ReadTurns:
    """Limits each tenant to `most` concurrent reads of single requests in this process: however
    many clients poll, the other connections are left for other tenants."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._of: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, tenant_id: str, timeout_ms: int) -> AsyncIterator[None]:
        """Wait for a turn, at most `timeout_ms`. Raises StoreUnavailable."""
        turns = self._of.get(tenant_id)
        if turns is None:
            turns = self._of[tenant_id] = asyncio.Semaphore(self._most)
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await turns.acquire()
        except TimeoutError:
            raise StoreUnavailable(f"too many reads of tenant {tenant_id} wait here") from None
        try:
            yield
        finally:
            turns.release()


_MOST_ASKS = 3


async def until_quick(run: Callable[[], Awaitable[object]], lease_ms: int) -> None:
    """Repeat `run` until its reply is read within a third of a lease: after a stall another process
    may have the claim. Raises what `run` raises, and StoreUnavailable after three slow replies."""
    for _ in range(_MOST_ASKS):
        started_at = Steadiness.clock()
        await run()
        if Steadiness.clock() - started_at < lease_ms / 3000:
            return
    raise StoreUnavailable("PostgreSQL answers too slowly for the lease of a claim")


MARGIN_S = 15.0  # longer than any transaction here and any difference of clocks
ALL_S = 1e9
AT_ONCE = 500  # the most that one search finds
_WHOLE_EVERY_S = 1.0
_SHARE = 50
_HURRIED_S = 0.005
_UNKNOWN_S = 5.0


@dataclass(frozen=True, slots=True)
class Scan:
    """One search, of the last `back_s` seconds."""

    back_s: float
    began: float
    is_whole: bool


class Lookback:
    """Scan window for one kind of search in a process; searches may overlap."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._done: float | None = None
        self._whole_at = 0.0  # when the last full search began
        self._whole_took_s = 0.0

    def begin(self, *, hurried: bool = False) -> Scan:
        """Begin a search; a `hurried` one is only full if the last full search was quick."""
        now = self._clock()
        due = now - self._whole_at >= max(_WHOLE_EVERY_S, _SHARE * self._whole_took_s)
        if self._done is None or (due and not (hurried and self._whole_took_s > _HURRIED_S)):
            # A full search counts as slow until it succeeds, so that a failure is not retried
            # immediately.
            self._whole_at, self._whole_took_s = now, _UNKNOWN_S
            return Scan(ALL_S, now, True)
        return Scan(now - self._done + MARGIN_S, now, False)

    def end(self, scan: Scan, *, complete: bool) -> None:
        """Record a successful search; `complete`: there was no more to find."""
        if scan.is_whole:
            self._whole_took_s = self._clock() - scan.began
        if complete and (self._done is None or scan.began > self._done):
            self._done = scan.began
