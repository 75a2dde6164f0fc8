"""A TCP proxy between the workers and Valkey that can do what networks do.

Invariant: bytes of a connection arrive in order or not at all. A connection that has lost a byte
never works again, as one whose way is gone: it stays open and silent on both sides.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable


class _Pair:
    """One connection of a client, and ours to the server behind it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter | None) -> None:
        self.writers = [client] if server is None else [client, server]
        self.lost = server is None

    def cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class Proxy:
    """Forwards `127.0.0.1:port` to `target`, another port of loopback.

    delay_s: called for each piece of data, how long it is kept; None for not at all.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.delay_s: Callable[[], float] | None = None
        self._swallowing = False
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def cut(self) -> None:
        """Close every connection, as a server does that ends."""
        for pair in list(self._pairs):
            pair.cut()

    def switch(self, target: int) -> None:
        """Send new connections elsewhere, and close those that are there."""
        self.target = target
        self.cut()

    def swallow(self) -> None:
        """From now on nothing arrives, new connections included; nobody is told."""
        self._swallowing = True
        for pair in self._pairs:
            pair.lost = True

    def forward(self) -> None:
        """New connections work again; those that have lost something stay silent."""
        self._swallowing = False

    def lose_one(self, chance: random.Random) -> None:
        """Let one connection that is open now go silent."""
        alive = [pair for pair in self._pairs if not pair.lost]
        if alive:
            chance.choice(alive).lost = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        me = asyncio.current_task()
        assert me is not None
        self._tasks.add(me)
        me.add_done_callback(self._tasks.discard)
        if self._swallowing:
            pair = _Pair(writer, None)
            pumps = [self._pump(reader, writer, pair)]
        else:
            try:
                there, back = await asyncio.open_connection("127.0.0.1", self.target)
            except OSError:
                writer.transport.abort()
                return
            for one in (writer, back):
                one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = _Pair(writer, back)
            pumps = [self._pump(reader, back, pair), self._pump(there, writer, pair)]
        self._pairs.add(pair)
        try:
            await asyncio.gather(*pumps)
        finally:
            self._pairs.discard(pair)
            pair.cut()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pair: _Pair
    ) -> None:
        """Carry one direction. Late data is kept in a queue, so that delays do not add up."""
        loop = asyncio.get_running_loop()
        last_s = 0.0
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if pair.lost:
                    continue
                if self.delay_s is None and last_s <= loop.time():
                    writer.write(data)
                    continue
                late_s = self.delay_s() if self.delay_s is not None else 0.0
                last_s = max(loop.time() + late_s, last_s)
                loop.call_at(last_s, _write, writer, data, pair)
        if not pair.lost:
            pair.cut()


def _write(writer: asyncio.StreamWriter, data: bytes, pair: _Pair) -> None:
    if not pair.lost and not writer.transport.is_closing():
        writer.write(data)
