"""Connections of the limiter: commands, subscription, heartbeat and the exchange loop. All its I/O.

While an exchange is in progress the next batch accumulates. The heartbeat renews the session from a
thread, so that a busy event loop does not lose the lease, and stops when the loop has stalled.

Invariants: a connection on which anything failed, cancellation included, is discarded, so that a
late answer is never taken for another; one exchange runs at a time; a notification is only a hint:
a lost one is found by the next full sync.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from copy import copy
from dataclasses import InitVar, dataclass, field, fields
from itertools import chain
from typing import Any

import hiredis
import msgpack
from redis.asyncio.connection import AbstractConnection
from redis.connection import ConnectionInterface
from redis.exceptions import NoScriptError, RedisError, ResponseError

from tidegate.errors import ConfigError
from tidegate.limiter._compat import close_now
from tidegate.limiter.messages import (
    Barred,
    Hint,
    Keyspace,
    Outlook,
    Push,
    Renewal,
    RenewReply,
    Script,
    SyncReply,
    SyncRequest,
    Whole,
    load,
)
from tidegate.limiter.policy import WRITTEN_BY, WrittenPolicy, read_change
from tidegate.limiter.queue import SPARE_MS, LocalQueue
from tidegate.limiter.session import Clock, Lease, Observer, Session, Timer
from tidegate.limiter.topology import MIN_CONNECT_S, Server

logger = logging.getLogger("tidegate.limiter")

# Errors of a lost connection. uvloop raises a plain RuntimeError, "unable to perform operation on
# <TCPTransport ...>", for a write to a transport that was reset unnoticed.
LOST = (OSError, TimeoutError, RedisError, RuntimeError)


class LinkDown(Exception):
    """Valkey did not answer in time or at all; whether it received the request is unknown."""


def _words_of(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return str(error) or "no answer in time"
    return str(error) or type(error).__name__


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server reports about itself. `run` differs after every restart and on every
    replica.
    """

    run: str
    uptime_ms: int


def read_facts(info: bytes) -> ServerFacts:
    """Return the facts in an INFO reply. Raises ConfigError for a server that may evict our
    keys.
    """
    lines = (line.partition(":") for line in info.decode().splitlines())
    values = {name: value for name, colon, value in lines if colon}
    policy, memory = values.get("maxmemory_policy", "noeviction"), values.get("maxmemory", "0")
    if policy != "noeviction" and memory != "0":
        raise ConfigError(
            "maxmemory-policy", policy, "Valkey must not evict permits: set noeviction"
        )
    return ServerFacts(values["run_id"], int(values["uptime_in_seconds"]) * 1000)


class Link:
    """A connection for commands, one at a time. `server` is set while connected. `on_unanswered` is
    called for each command without an answer."""

    def __init__(self, url: str, key: str) -> None:
        self.on_unanswered: Callable[[], None] = lambda: None
        self._servers = Server(url, key)
        self._connection: AbstractConnection | None = None
        self._lock = asyncio.Lock()
        self._unfit: str | None = None  # why the server is unusable; None before the first use
        self.server: ServerFacts | None = None

    async def connect(self, deadline_s: float) -> ServerFacts:
        """Connect if necessary, and return who the server is.

        Raises LinkDown, and ConfigError for a server that may evict our keys. Once a suitable
        server has served us it raises LinkDown instead, since an operator can fix that meanwhile.
        """
        async with self._lock:
            return await self._connect(deadline_s)

    async def _connect(self, deadline_s: float) -> ServerFacts:
        if self.server is not None:
            return self.server
        try:
            self._connection = await self._servers.connect(deadline_s)
        except LOST as error:
            self.on_unanswered()
            raise LinkDown(_words_of(error)) from error
        info = await self._exchange(("INFO", "server", "memory"), max(deadline_s, MIN_CONNECT_S))
        try:
            self.server = read_facts(info)
        except ConfigError as error:
            assert self._connection is not None
            self._drop(self._connection)
            if self._unfit is None:
                raise
            if error.message != self._unfit:  # log once, not at each try
                logger.error("limiter: %s", error.message)
            self._unfit = error.message
            raise LinkDown(error.message) from error
        self._unfit = ""
        return self.server

    async def run(
        self, script: Script, keys: tuple[str, ...], packed: bytes, deadline_s: float
    ) -> bytes:
        """Run a script and return its packed reply. Raises LinkDown, ConfigError."""
        async with self._lock:
            await self._connect(deadline_s)
            arguments = (len(keys), *keys, packed)
            try:
                answer = await self._exchange(("EVALSHA", script.sha, *arguments), deadline_s)
            except NoScriptError:
                answer = await self._exchange(("EVAL", script.source, *arguments), deadline_s)
        return bytes(answer)

    async def command(self, command: tuple[Any, ...], deadline_s: float) -> Any:
        """Run one command. Raises LinkDown, ConfigError."""
        async with self._lock:
            await self._connect(deadline_s)
            return await self._exchange(command, deadline_s)

    async def ping(self, deadline_s: float) -> None:
        """Raise LinkDown unless the server answers in time, including the wait for other calls."""
        try:
            async with asyncio.timeout(deadline_s), self._lock:
                await self._connect(deadline_s)
                await self._exchange(("PING",), deadline_s, is_trial=True)
        except TimeoutError as error:
            raise LinkDown("no answer to a ping") from error

    async def _exchange(
        self, command: tuple[Any, ...], deadline_s: float, *, is_trial: bool = False
    ) -> Any:
        connection = self._connection
        if connection is None:
            raise LinkDown("not connected")
        settled = False
        try:
            async with asyncio.timeout(deadline_s):
                packed = hiredis.pack_command(command)
                await connection.send_packed_command(packed, check_health=False)
                answer = await connection.read_response()
            settled = True
        except NoScriptError:
            settled = True
            raise
        except ResponseError as error:
            raise LinkDown(f"Valkey refused: {error}") from error
        except LOST as error:
            if not is_trial:  # a probe of health may wait for less long than an answer may take
                self.on_unanswered()
            raise LinkDown(_words_of(error)) from error
        finally:
            if not settled:
                self._drop(connection)
        return answer

    def _drop(self, connection: AbstractConnection) -> None:
        """Discard a connection without waiting."""
        self._connection = None
        self.server = None
        close_now(connection)

    async def aclose(self) -> None:
        async with self._lock:
            if self._connection is not None:
                self._drop(self._connection)


@dataclass(slots=True, eq=False, repr=False)
class Listener:
    """A subscription to `channel` that is kept until its task is cancelled.

    `_linked_to` returns the server of the link, or None. `compare` has the session compare with the
    server, since pushes or the server itself may be lost. An idle process misses no push, so a
    silent connection is then tested only once per lease.
    """

    url: InitVar[str]
    _channel: str
    _lease: Lease
    _on_push: Callable[[Push], None]
    _compare: Callable[[], None]
    _linked_to: Callable[[], ServerFacts | None]
    _clock: Clock
    _is_idle: Callable[[], bool] = lambda: False
    run_id: str = ""
    subscribed: bool = False
    _server: Server = field(init=False)

    def __post_init__(self, url: str) -> None:
        self._server = Server(url, self._channel)

    async def run(self) -> None:
        """Listen for ever, and subscribe again after every failure."""
        retry_s = 0.0
        while True:
            connection: AbstractConnection | None = None
            try:
                connection = await self._server.connect(self._lease.deadline_s())
                await self._subscribe(connection)
                retry_s = 0.0
                await self._listen(connection)
            except (*LOST, ConfigError) as error:
                logger.debug("limiter: subscription lost: %s", error)
                if self.subscribed:
                    self._compare()
            finally:
                self.subscribed = False
                if connection is not None:
                    close_now(connection)
            retry_s = min(max(retry_s * 2, 0.01), self._lease.lease_ms / 6000)
            await self._clock.sleep(retry_s)

    async def _subscribe(self, connection: AbstractConnection) -> None:
        async with asyncio.timeout(max(self._lease.deadline_s(), MIN_CONNECT_S)):
            await connection.send_command("INFO", "server", "memory", check_health=False)
            self.run_id = read_facts(await connection.read_response()).run
            self._check_place()
            await connection.send_command("SSUBSCRIBE", self._channel, check_health=False)
            await connection.read_response()
        self.subscribed = True
        self._compare()

    def _check_place(self) -> None:
        server = self._linked_to()
        if server is not None and server.run != self.run_id:
            # The link notices the loss of its server only when it sends.
            self._compare()
            raise ConnectionError("the subscription is at another server than the connection")

    async def _listen(self, connection: AbstractConnection) -> None:
        """Read until a failure; test a silent connection by a ping."""
        reading: asyncio.Task[Any] | None = None
        pinged = False
        try:
            while True:
                self._check_place()
                if reading is None:
                    reading = asyncio.ensure_future(connection.read_response())
                silence_s = self._lease.deadline_s()
                if self._is_idle() and not pinged:
                    silence_s = self._lease.lease_ms / 1000
                done, _ = await asyncio.wait({reading}, timeout=silence_s)
                if not done:
                    if pinged:
                        raise TimeoutError("no answer to a ping")
                    pinged = True
                    await connection.send_command("PING", check_health=False)
                    continue
                message, reading, pinged = reading.result(), None, False
                if isinstance(message, list) and message[0] == b"smessage":
                    self._on_push(Push.unpack(message[2]))
                elif isinstance(message, list) and message[0] == b"sunsubscribe":
                    raise ConnectionError("the slot of the pool has moved to another server")
        finally:
            if reading is not None:
                reading.cancel()


STALLED_S = 30.0
# The event loop compares once in a third of a lease, which renews it too. If it is a little late,
# the thread renews instead, and also once in a while without need, to keep its connection working.
_OVERDUE_SHARE = 1.1
_MOST_LEFT_OUT = 4


class Heartbeat:
    """A thread that renews the lease.

    `on_changed` and `on_paused` are called from the thread and must be thread-safe.
    """

    def __init__(
        self,
        url: str,
        sid: str,
        keys: Keyspace,
        lease: Lease,
        clock: Clock,
        *,
        on_changed: Callable[[], None],
        on_paused: Callable[[], None],
        stalled_s: float = STALLED_S,
    ) -> None:
        self._servers = Server(url, keys.meta)
        self._sid = sid
        self._keys = (keys.meta, keys.layout)
        self._lease = lease
        self._on_changed = on_changed
        self._on_paused = on_paused
        self._stalled_ms = stalled_s * 1000
        self._clock = clock
        self._loop_seen_ms = clock.now_ms()
        self._script = load("renew", clock=clock.server_time)
        self._stop = threading.Event()
        self._connection: ConnectionInterface | None = None
        self._server: ServerFacts | None = None
        self._thread = threading.Thread(target=self._run, name="tidegate-heartbeat", daemon=True)
        self._left_out = 0  # consecutive renewals left out
        self.renewals = 0

    def start(self) -> None:
        self._thread.start()

    def loop_is_alive(self) -> None:
        """Record that the event loop runs; to be called at least once per lease."""
        self._loop_seen_ms = self._clock.now_ms()

    def stop(self) -> None:
        """Ask the thread to end, which it does within one call's deadline."""
        self._stop.set()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        woke_ms = self._clock.now_ms()
        while not self._clock.wait(self._stop, self._wait_s()):
            before_ms, woke_ms = woke_ms, self._clock.now_ms()
            if woke_ms - before_ms > self._lease.lease_ms and self._lease.lapsed():
                self._on_paused()
            if woke_ms - self._loop_seen_ms > self._stalled_ms or self._is_renewed():
                continue
            try:
                self._renew()
            except (OSError, RedisError, ConfigError) as error:
                logger.debug("limiter: heartbeat failed: %s", error)
                self._disconnect()
        self._disconnect()

    def _wait_s(self) -> float:
        """Return the time until a renewal is overdue, or after a failed one the usual interval."""
        left_s = _OVERDUE_SHARE * self._lease.deadline_s() - self._lease.silent_ms() / 1000
        return left_s if left_s > 0 else self._lease.deadline_s()

    def _is_renewed(self) -> bool:
        """Return whether the event loop has renewed the lease while the thread waited."""
        is_renewed = self._lease.silent_ms() < _OVERDUE_SHARE * self._lease.deadline_s() * 1000
        self._left_out = self._left_out + 1 if is_renewed else 0
        if self._left_out > _MOST_LEFT_OUT:
            self._left_out = 0
        return self._left_out > 0

    def _renew(self) -> None:
        identity = self._lease.identity
        if identity.gen == 0:
            return
        server = self._connected()
        request = Renewal(self._sid, identity.gen, identity.epoch, server.run)
        sent_ms = self._clock.now_ms()
        reply = RenewReply.unpack(self._evaluate(request.pack()))
        self.renewals += 1
        if reply.status == "ok":
            self._lease.renewed(sent_ms, reply.lease_ms)
            return
        # The pool may have moved to another server, unnoticed by this connection.
        self._disconnect()
        if self._lease.identity == identity:
            self._on_changed()

    def _connected(self) -> ServerFacts:
        if self._server is None:
            self._connection = self._servers.connect_blocking(self._lease.deadline_s())
            self._server = read_facts(self._exchange("INFO", "server", "memory"))
        return self._server

    def _evaluate(self, packed: bytes) -> bytes:
        arguments = (len(self._keys), *self._keys, packed)
        try:
            return bytes(self._exchange("EVALSHA", self._script.sha, *arguments))
        except NoScriptError:
            return bytes(self._exchange("EVAL", self._script.source, *arguments))

    def _exchange(self, *command: Any) -> Any:
        assert self._connection is not None
        self._connection.send_command(*command, check_health=False)  # type: ignore[no-untyped-call]
        return self._connection.read_response()

    def _disconnect(self) -> None:
        connection, self._connection, self._server = self._connection, None, None
        if connection is not None:
            connection.disconnect()  # type: ignore[no-untyped-call]


def call_on_loop(loop: asyncio.AbstractEventLoop, call: object) -> None:
    """Call on the loop from a thread; does nothing if the loop is closed."""
    assert callable(call)
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)


# Flattened into one list: scripts take longer to unpack many small ones.
FLAT = ("transfers", "releases", "enqueues", "uses", "firsts")
_SYNC_FIELDS = tuple(f.name for f in fields(SyncRequest))


def pack_request(request: SyncRequest) -> bytes:
    """Return a request as the scripts read it, without empty fields."""
    packed: dict[str, Any] = {}
    for name in _SYNC_FIELDS:
        if value := getattr(request, name):
            packed[name] = list(chain.from_iterable(value)) if name in FLAT else value
    if request.join is not None:
        packed["join"] = request.join.as_fields()
    return bytes(msgpack.packb(packed, use_bin_type=False))


def unpack_reply(raw: bytes) -> SyncReply:
    """Return the reply of `sync` or `tend`.

    Lua has one type for lists and maps, so an empty one may arrive as either. Rows of later
    versions may have more columns.
    """
    values = msgpack.unpackb(raw, raw=True, use_list=False)
    whole = values[15]
    return SyncReply._make(
        (
            values[0].decode(),
            *values[1:11],
            _pairs(values[11]),
            values[12] or (),
            values[13] or (),
            [Hint(*hint[:5]) for hint in values[14] or ()],
            _unpack_whole(whole) if whole else None,
            [Barred(row[0], row[1].decode(), *row[2:6]) for row in values[16] or ()],
            [Outlook(row[0], row[1].decode(), *row[2:5]) for row in values[17] or ()],
        )
    )


def _pairs(rows: Any) -> Any:
    return tuple(row[:2] for row in rows or ())


def _unpack_whole(values: Any) -> Whole:
    now_ms, held, lapsing, next_event_ms, conflict, spent, pauses, policy, roster = values[:9]
    told, pages, seq = values[9:12]
    version, sids = roster[:2]
    return Whole(
        now_ms,
        [tuple(row[:3]) for row in held or ()],
        [(row[0].decode(), row[1], row[2].decode()) for row in lapsing or ()],
        next_event_ms,
        conflict,
        [(name.decode(), amount) for name, amount in _pairs(spent)],
        [(p[0].decode(), p[1], p[2], p[3].decode()) for p in pauses or ()],
        policy or None,
        (version, None if sids is False else [sid.decode() for sid in sids or ()]),
        told,
        {name.decode(): (place[0].decode(), place[1]) for name, place in dict(pages or ()).items()},
        seq,
    )


# How long a message waits for others to join it: usually, if no call waits in the pool, and if the
# answer may refuse a call that a client waits for.
LINGER_S = 0.03
LINGER_IDLE_S = SPARE_MS / 1000
LINGER_HURRIED_S = 0.002


class ExchangeLoop:
    """The exchange loop: sends what the local queue has, and passes replies to the session.

    joined: set once the pool has answered, with the written policy in force unless what is in
    force is to be kept; or once it never will.
    """

    def __init__(
        self,
        link: Link,
        keys: Keyspace,
        written: WrittenPolicy,
        queue: LocalQueue,
        observer: Observer,
        name: str,
        clock: Clock,
    ) -> None:
        self.joined = asyncio.Event()
        self._wake = asyncio.Event()
        self._link = link
        self._keys = (keys.meta, keys.layout)
        self._history = f"{keys.prefix}history"
        # Set until this process has joined with it for the first time.
        self._written = None if written.on_conflict == "keep" else written
        self._sync = load("sync", clock=clock.server_time)
        self._tend = load("tend", clock=clock.server_time)
        self._clock = clock
        self._queue = queue
        self._timers: dict[str, Timer] = {}
        self._linger: Timer | None = None
        self._linger_s = LINGER_S
        self.session = Session(
            written.policy,
            queue,
            observer,
            Lease(written.policy.lease_ms, clock.now_ms),
            name=name,
            wake=self.wake,
            alarm=self._set_alarm,
        )
        if self._written is not None:
            self.session.policy_by = WRITTEN_BY

    def wake(self) -> None:
        """Send what is pending: now if it is urgent, otherwise after a short wait for more."""
        if self._wake.is_set():
            return
        if self.session.is_request_urgent():
            self._wake.set()
            return
        delay_s = LINGER_IDLE_S if self._queue.idle else LINGER_S
        if self._queue.hurried:
            delay_s = LINGER_HURRIED_S
        if self._linger is not None:
            if self._linger_s <= delay_s:
                return
            self._linger.cancel()
        self._linger_s = delay_s
        self._linger = self._clock.call_later(delay_s, self._end_linger)

    def _end_linger(self) -> None:
        self._linger = None
        self._wake.set()

    async def run(self) -> None:
        """Exchange until cancelled, the session has left, or an error that no retry fixes."""
        session, retry_s = self.session, 0.0
        while session.fatal is None:
            await self._wake.wait()
            self._wake.clear()
            try:
                if await self._exchange():
                    return
                retry_s = 0.0
                continue
            except ConfigError as error:
                session.fail(error)
                continue
            except LinkDown as error:
                session.failed(str(error))
                retry_s = min(max(retry_s * 2, 0.01), session.lease.lease_ms / 6000)
            except Exception as fault:
                # A bug of ours: log and retry, since waiters depend on this loop.
                logger.exception("limiter: internal error")
                session.failed(f"{type(fault).__name__}: {fault}")
                retry_s = session.lease.lease_ms / 6000
            await self._clock.sleep(retry_s)
            session.refresh()
        self.joined.set()
        for waiter in list(self._queue.waiting.values()):
            self._queue.refuse(waiter, copy(session.fatal), session.lease.now_ms())

    async def _exchange(self) -> bool:
        """Make one call if there is something to send; return True if it ended the session."""
        session = self.session
        if not session.is_request_due():
            return False
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        deadline_s = session.lease.deadline_s()
        server = self._link.server or await self._link.connect(deadline_s)
        if self._written is not None:
            rows = await self._link.command(("LRANGE", self._history, "0", "-1"), deadline_s)
            session.policy = self._written.among([read_change(row) for row in rows])
        batch, request = session.prepare(server.run, server.uptime_ms)
        script = self._sync if session.is_ordinary(request) else self._tend
        sent_ms = session.lease.now_ms()
        try:
            raw = await self._link.run(script, self._keys, pack_request(request), deadline_s)
        except BaseException:  # on cancellation too, Valkey may have applied the batch
            session.unanswered(batch)
            raise
        left = session.answered(batch, request, unpack_reply(raw), sent_ms)
        if not self.joined.is_set():
            self._check_joined()
        if not left and self._queue.pending:
            self.wake()  # schedule what was kept back
        return left

    def _check_joined(self) -> None:
        session = self.session
        if not session.fatal and (session.policy_due or not session.accepted):
            return
        if self._written is None or session.fatal or self._written.is_in(session.policy):
            self._written = None
            self.joined.set()
        else:
            # Another process was faster: decide against its policy, and join again.
            session.set_policy(session.policy, session.policy_by)

    def _set_alarm(self, name: str, in_ms: float) -> None:
        """Compare when a lease, a hold, a rate or the quiet time after a loss ends."""
        old = self._timers.get(name)
        if old is not None:
            old.cancel()
        delay_s = (in_ms + 1) / 1000
        self._timers[name] = self._clock.call_later(delay_s, self.session.refresh)

    def stop_timers(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._linger is not None:
            self._linger.cancel()
