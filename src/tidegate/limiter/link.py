"""The command connection to Valkey: one, on the loop, with a hard deadline on every call.

Invariant: a connection on which anything went wrong, cancellation included, is thrown away, so a
late answer can never be taken for the answer to another question; the next one asks anew where the
server is, so that a refusal by a replica or by a node that has lost our slot leads away from it.
Foreign errors become `LinkDown` or `ConfigError` here and nowhere else.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, RedisError, ResponseError

from tidegate.errors import ConfigError
from tidegate.limiter._compat import close_now
from tidegate.limiter.scripts import Script
from tidegate.limiter.servers import MIN_CONNECT_S, Server

# What a connection raises that is lost. uvloop answers a write to a transport that was reset while
# nobody looked with a plain RuntimeError, "unable to perform operation on <TCPTransport ...>".
LOST = (OSError, TimeoutError, RedisError, RuntimeError)


class LinkDown(Exception):
    """Valkey did not answer in time, or not at all; whether it heard us is not known."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself. `run` differs after every restart and on every replica."""

    run: str
    uptime_ms: int


def read_facts(info: bytes) -> ServerFacts:
    """Facts from the answer to INFO. Raises ConfigError for a server that may evict our keys."""
    lines = (line.partition(":") for line in info.decode().splitlines())
    values = {name: value for name, colon, value in lines if colon}
    policy, memory = values.get("maxmemory_policy", "noeviction"), values.get("maxmemory", "0")
    if policy != "noeviction" and memory != "0":
        raise ConfigError(
            "maxmemory-policy", policy, "Valkey must not evict permits: set noeviction"
        )
    return ServerFacts(values["run_id"], int(values["uptime_in_seconds"]) * 1000)


class Link:
    """See the module. Calls wait for each other; `server` is set while connected."""

    def __init__(self, url: str, key: str) -> None:
        self._servers = Server(url, key)
        self._connection: AbstractConnection | None = None
        self._lock = asyncio.Lock()
        self.server: ServerFacts | None = None

    async def connect(self, deadline_s: float) -> ServerFacts:
        """Connect if we are not, and return who the server is. Raises LinkDown, ConfigError."""
        async with self._lock:
            return await self._connect(deadline_s)

    async def _connect(self, deadline_s: float) -> ServerFacts:
        if self.server is not None:
            return self.server
        try:
            self._connection = await self._servers.connect(deadline_s)
        except LOST as error:
            raise LinkDown(str(error) or type(error).__name__) from error
        info = await self._exchange(("INFO", "server", "memory"), max(deadline_s, MIN_CONNECT_S))
        self.server = read_facts(info)
        return self.server

    async def run(
        self, script: Script, keys: tuple[str, ...], packed: bytes, deadline_s: float
    ) -> bytes:
        """Run a script; its reply as packed by it. Raises LinkDown, ConfigError."""
        async with self._lock:
            await self._connect(deadline_s)
            arguments = (len(keys), *keys, packed)
            try:
                answer = await self._exchange(("EVALSHA", script.sha, *arguments), deadline_s)
            except NoScriptError:
                answer = await self._exchange(("EVAL", script.source, *arguments), deadline_s)
        return bytes(answer)

    async def command(self, command: tuple[Any, ...], deadline_s: float) -> Any:
        """One plain command. Raises LinkDown, ConfigError."""
        async with self._lock:
            await self._connect(deadline_s)
            return await self._exchange(command, deadline_s)

    async def ping(self, deadline_s: float) -> None:
        """Raises LinkDown unless the server answers in time, waiting for our turn included."""
        try:
            async with asyncio.timeout(deadline_s), self._lock:
                await self._connect(deadline_s)
                await self._exchange(("PING",), deadline_s)
        except TimeoutError as error:
            raise LinkDown("no answer to a ping") from error

    async def _exchange(self, command: tuple[Any, ...], deadline_s: float) -> Any:
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
            raise LinkDown(str(error) or type(error).__name__) from error
        finally:
            if not settled:
                self._drop(connection)
        return answer

    def _drop(self, connection: AbstractConnection) -> None:
        """Forget a connection without waiting for anybody."""
        self._connection = None
        self.server = None
        close_now(connection)

    async def aclose(self) -> None:
        async with self._lock:
            if self._connection is not None:
                self._drop(self._connection)
