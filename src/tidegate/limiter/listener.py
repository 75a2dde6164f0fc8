"""The subscription: hears which of our tickets others' releases let in.

Invariants: a hint only. Whatever is lost here is found by the next `full` sync; so every fresh
subscription asks for one. It is held at the server that the link speaks to: one that was demoted,
or has lost our slot, would keep the connection and never say a word.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from redis.asyncio.connection import AbstractConnection

from tidegate.errors import ConfigError
from tidegate.limiter._compat import close_now
from tidegate.limiter.clock import Clock
from tidegate.limiter.lease import Lease
from tidegate.limiter.link import LOST, ServerFacts, read_facts
from tidegate.limiter.servers import MIN_CONNECT_S, Server
from tidegate.limiter.wire import Push

logger = logging.getLogger("tidegate.limiter")


class Listener:
    """Keeps one connection subscribed to `channel` until its task is cancelled.

    `spoken_to` says which server the link is connected to, None when to none. `compare` has the
    session compare all with the server: pushes may be lost, or the server itself.
    """

    def __init__(
        self,
        url: str,
        channel: str,
        lease: Lease,
        on_push: Callable[[Push], None],
        compare: Callable[[], None],
        spoken_to: Callable[[], ServerFacts | None],
        clock: Clock,
    ) -> None:
        self._server = Server(url, channel)
        self._spoken_to = spoken_to
        self.run_id = ""
        self._channel = channel
        self._lease = lease
        self._clock = clock
        self._on_push = on_push
        self._compare = compare
        self.subscribed = False

    async def run(self) -> None:
        """Listen for ever, subscribing again after every fault."""
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
        spoken_to = self._spoken_to()
        if spoken_to is not None and spoken_to.run != self.run_id:
            # The link sees that its server is gone only when it speaks.
            self._compare()
            raise ConnectionError("subscribed at another server than the one we speak to")

    async def _listen(self, connection: AbstractConnection) -> None:
        """Read until something breaks; a silent connection is tested by a ping."""
        reading: asyncio.Task[Any] | None = None
        pinged = False
        try:
            while True:
                self._check_place()
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
                elif isinstance(message, list) and message[0] == b"sunsubscribe":
                    raise ConnectionError("the server has given our slot away")
        finally:
            if reading is not None:
                reading.cancel()
