"""The proxy does to connections what it says, and to no others."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from chaos.limiter.proxy import Proxy
from tests.waiting import wait_until


class Echo:
    """A server that answers each line by itself with its mark before."""

    def __init__(self, mark: str) -> None:
        self._mark = mark.encode()
        self.heard: list[bytes] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def start(self) -> int:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        while line := await reader.readline():
            self.heard.append(line)
            writer.write(self._mark + line)

    def stop(self) -> None:
        self.server.close()
        for writer in self.writers:
            writer.close()


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, proxy: Proxy) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", proxy.port))

    async def ask(self, line: str) -> str:
        """The answer; empty if the connection is closed instead."""
        self.writer.write(f"{line}\n".encode())
        try:
            return (await self._reader.readline()).decode().strip()
        except ConnectionError:
            return ""

    async def is_silent(self) -> bool:
        """Open, and nothing comes."""
        self.writer.write(b"anybody there?\n")
        try:
            async with asyncio.timeout(0.1):
                await self._reader.read(1)
        except TimeoutError:
            return True
        return False


@pytest.fixture
async def one() -> AsyncIterator[tuple[Echo, Proxy]]:
    echo = Echo("one:")
    proxy = await Proxy(await echo.start()).start()
    yield echo, proxy
    await proxy.stop()
    echo.stop()


async def test_it_forwards(one: tuple[Echo, Proxy]) -> None:
    client = await Client.connect(one[1])
    assert await client.ask("hello") == "one:hello"


async def test_what_is_swallowed_is_lost_for_good_and_nobody_is_told(
    one: tuple[Echo, Proxy],
) -> None:
    echo, proxy = one
    old = await Client.connect(proxy)
    assert await old.ask("before") == "one:before"
    proxy.swallow()
    new = await Client.connect(proxy)
    assert await old.is_silent()
    assert await new.is_silent()
    proxy.forward()
    assert await old.is_silent()
    assert await new.is_silent()
    assert echo.heard == [b"before\n"]
    assert await (await Client.connect(proxy)).ask("after") == "one:after"


async def test_one_connection_is_lost_and_the_others_work(one: tuple[Echo, Proxy]) -> None:
    clients = [await Client.connect(one[1]) for _ in range(3)]
    for client in clients:
        assert await client.ask("x") == "one:x"
    one[1].lose_one(random.Random(1))
    assert sum([await client.is_silent() for client in clients]) == 1


async def test_a_switch_closes_and_leads_elsewhere(one: tuple[Echo, Proxy]) -> None:
    other = Echo("two:")
    client = await Client.connect(one[1])
    assert await client.ask("x") == "one:x"
    one[1].switch(await other.start())
    assert await client.ask("x") == ""
    assert await (await Client.connect(one[1])).ask("x") == "two:x"
    other.stop()


async def test_delays_keep_the_order(one: tuple[Echo, Proxy]) -> None:
    delays = iter([0.05, 0.0, 0.03, 0.0] * 10)
    one[1].delay_s = lambda: next(delays)
    client = await Client.connect(one[1])
    for number in range(4):
        client.writer.write(f"{number}\n".encode())
        await client.writer.drain()
        await asyncio.sleep(0)
    await wait_until(lambda: len(one[0].heard) == 4)
    assert one[0].heard == [b"0\n", b"1\n", b"2\n", b"3\n"]


async def test_a_server_that_is_not_there_ends_the_connection(one: tuple[Echo, Proxy]) -> None:
    one[0].server.close()
    await one[0].server.wait_closed()
    client = await Client.connect(one[1])
    assert await client.ask("x") == ""
