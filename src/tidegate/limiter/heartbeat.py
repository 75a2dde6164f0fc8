"""Renews the session from a thread of its own: a busy event loop must not lose live leases.

Invariants: it renews only a session that is there, under the generation that the loop last
announced; it stops when the loop has shown no sign of life for `stalled_s`, since what a stalled
loop holds must come back; it never touches the ledger, only tells the loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

from redis.connection import ConnectionInterface
from redis.exceptions import NoScriptError, RedisError

from tidegate.errors import ConfigError
from tidegate.limiter.clock import Clock
from tidegate.limiter.keys import Keyspace
from tidegate.limiter.lease import Lease
from tidegate.limiter.link import ServerFacts, read_facts
from tidegate.limiter.scripts import load
from tidegate.limiter.servers import Server
from tidegate.limiter.wire import Renewal, RenewReply

logger = logging.getLogger("tidegate.limiter")

STALLED_S = 30.0


class Heartbeat:
    """`tell_changed` and `tell_paused` are called from the thread and must be safe for that."""

    def __init__(
        self,
        url: str,
        sid: str,
        keys: Keyspace,
        lease: Lease,
        clock: Clock,
        *,
        tell_changed: Callable[[], None],
        tell_paused: Callable[[], None],
        stalled_s: float = STALLED_S,
    ) -> None:
        self._servers = Server(url, keys.meta)
        self._sid = sid
        self._keys = (keys.meta, keys.layout)
        self._lease = lease
        self._tell_changed = tell_changed
        self._tell_paused = tell_paused
        self._stalled_ms = stalled_s * 1000
        self._clock = clock
        self._loop_seen_ms = clock.now_ms()
        self._script = load("renew", clock=clock.server_time)
        self._stop = threading.Event()
        self._connection: ConnectionInterface | None = None
        self._server: ServerFacts | None = None
        self._thread = threading.Thread(target=self._run, name="tidegate-heartbeat", daemon=True)
        self.renewals = 0

    def start(self) -> None:
        self._thread.start()

    def loop_is_alive(self) -> None:
        """The loop says so, at least once a lease."""
        self._loop_seen_ms = self._clock.now_ms()

    def stop(self) -> None:
        """Ask the thread to end; it does within one call's deadline."""
        self._stop.set()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        woke_ms = self._clock.now_ms()
        while not self._clock.wait(self._stop, self._lease.deadline_s()):
            before_ms, woke_ms = woke_ms, self._clock.now_ms()
            if woke_ms - before_ms > self._lease.lease_ms and self._lease.lapsed():
                self._tell_paused()
            if woke_ms - self._loop_seen_ms > self._stalled_ms:
                continue
            try:
                self._renew()
            except (OSError, RedisError, ConfigError) as error:
                logger.debug("limiter: heartbeat failed: %s", error)
                self._disconnect()
        self._disconnect()

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
        # Perhaps the pool lives elsewhere by now, and only this connection does not know.
        self._disconnect()
        if self._lease.identity == identity:
            self._tell_changed()

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


def tell_loop(loop: asyncio.AbstractEventLoop, call: object) -> None:
    """Call on the loop from the thread; a loop that has been closed needs no news."""
    assert callable(call)
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)
