"""The commands of those who use a gateway, run from elsewhere: they know its address and a key."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from tests.commands import Done, tidegate
from tests.forked import Forked, started
from tests.gateway import Gateway
from tests.waiting import wait_until


async def run(gateway: Gateway, *arguments: str, **settings: str) -> Done:
    return await tidegate(gateway, *arguments, **{"TIDEGATE_URL": gateway.url} | settings)


@dataclass(frozen=True, slots=True)
class Running:
    """A command under way, and what it has said so far."""

    process: Forked | Popen[bytes]
    folder: Path

    def said(self) -> str:
        return (self.folder / "stdout").read_text()

    def complained(self) -> str:
        return (self.folder / "stderr").read_text()

    async def ended(self) -> int:
        await wait_until(lambda: self.process.poll() is not None, 20, "the command's end")
        code = self.process.poll()
        assert code is not None
        return code


@contextmanager
def under_way(url: str, folder: Path, *arguments: str, **settings: Any) -> Iterator[Running]:
    with (folder / "stdout").open("wb") as said, (folder / "stderr").open("wb") as complained:
        process = started(
            ["tidegate", *arguments],
            cwd=folder,
            env={**os.environ, "TIDEGATE_URL": url, **settings},
            stdout=said,
            stderr=complained,
        )
        try:
            yield Running(process, folder)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)


@asynccontextmanager
async def forwarding(
    gateway: Gateway, on_port: int = 0
) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """Another way to the gateway, and a call that cuts all connections on it."""
    port = int(gateway.url.rpartition(":")[2])
    writers: list[asyncio.StreamWriter] = []
    tasks: set[asyncio.Task[None]] = set()

    async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            target.write(data)
        target.close()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection("127.0.0.1", port)
        writers.extend((writer, ours))
        for source, target in ((reader, ours), (theirs, writer)):
            tasks.add(asyncio.create_task(pass_on(source, target)))

    def cut() -> None:
        for writer in writers:
            writer.transport.abort()

    server = await asyncio.start_server(meet, "127.0.0.1", on_port)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", cut
        cut()
        await asyncio.gather(*tasks, return_exceptions=True)
