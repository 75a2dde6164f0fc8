"""The subscription: hears which of our tickets others' releases let in.

Invariant: a hint only. Whatever is lost here is found by the next `full` sync; so every fresh
subscription asks for one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tidegate.limiter.lease import Lease
from tidegate.limiter.link import MIN_CONNECT_S
from tidegate.limiter.wire import Push

logger = logging.getLogger("tidegate.limiter")


class Listener:
    """Keeps one connection subscribed to `channel` until its task is cancelled."""

    def __init__(
        self,
        url: str,
        channel: str,
        lease: Lease,
        on_push: Callable[[Push], None],
        on_subscribed: Callable[[], None],
    ) -> None:
        self._pool = ConnectionPool.from_url(
            url, protocol=2, retry=Retry(NoBackoff(), 0), decode_responses=False
        )
        self._channel = channel
        self._lease = lease
        self._on_push = on_push
        self._on_subscribed = on_subscribed
        self.subscribed = False

    async def run(self) -> None:
        """Listen for ever, subscribing again after every fault."""
        retry_s = 0.0
        while True:
            connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                await self._subscribe(connection)
                retry_s = 0.0
                await self._listen(connection)
            except (OSError, TimeoutError, RedisError) as error:
                logger.debug("limiter: subscription lost: %s", error)
            finally:
                self.subscribed = False
                connection._close()  # without an await, which a cancelled task must not do
            retry_s = min(max(retry_s * 2, 0.01), self._lease.lease_ms / 6000)
            await asyncio.sleep(retry_s)

    async def _subscribe(self, connection: AbstractConnection) -> None:
        async with asyncio.timeout(max(self._lease.deadline_s(), MIN_CONNECT_S)):
            await connection.connect()  # type: ignore[no-untyped-call]
            await connection.send_command("SSUBSCRIBE", self._channel, check_health=False)
            await connection.read_response()
        self.subscribed = True
        self._on_subscribed()

    async def _listen(self, connection: AbstractConnection) -> None:
        """Read until something breaks; a silent connection is tested by a ping."""
        reading: asyncio.Task[Any] | None = None
        pinged = False
        try:
            while True:
                if reading is None:
                    reading = asyncio.ensure_future(connection.read_response())
                done, _ = await asyncio.wait({reading}, timeout=self._lease.deadline_s())
                if not done:
                    if pinged:
                        raise TimeoutError("no answer to a ping")
                    pinged = True
                    await connection.send_command("PING", check_health=False)
                    continue
                message, reading, pinged = reading.result(), None, False
                if isinstance(message, list) and message[0] == b"smessage":
                    self._on_push(Push.unpack(message[2]))
        finally:
            if reading is not None:
                reading.cancel()
