"""A TCP proxy in front of a real PostgreSQL that loses the reply to one COMMIT.

The server has committed by then: its whole reply has arrived here, and is not forwarded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

COMMIT = b"COMMIT\x00"
_READY = b"Z\x00\x00\x00\x05"  # how each reply of the server ends


class LossyProxy:
    """`url`: the way to the database through here. `lost`: how many replies were not forwarded.
    `is_away`: nobody gets through."""

    def __init__(self, database_url: str) -> None:
        self._there = urlsplit(database_url)
        self.url = ""
        self.lost = 0
        self.is_away = False
        self._marks: list[bytes] = []

    def lose_commit_of(self, statement: str) -> None:
        """Cut the connection of the next transaction that runs `statement`, after its commit."""
        self._marks.append(statement.strip().encode())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_away:
            writer.transport.abort()
            return
        there, back = await asyncio.open_connection(self._there.hostname, self._there.port)
        cutting = asyncio.Event()
        replies = asyncio.create_task(self._replies(there, writer, cutting))
        is_marked = False
        try:
            while data := await reader.read(65_536):
                if not is_marked and (found := [one for one in self._marks if one in data]):
                    self._marks.remove(found[0])
                    is_marked = True
                if is_marked and COMMIT in data:
                    cutting.set()
                back.write(data)
                await back.drain()
        except ConnectionError:
            pass
        finally:
            back.close()
            await asyncio.gather(replies, return_exceptions=True)
            writer.transport.abort()

    async def _replies(
        self, there: asyncio.StreamReader, writer: asyncio.StreamWriter, cutting: asyncio.Event
    ) -> None:
        kept = b""
        while data := await there.read(65_536):
            if not cutting.is_set():
                writer.write(data)
                continue
            kept += data
            if _READY in kept:
                self.lost += 1
                writer.transport.abort()
                return
        writer.close()


@asynccontextmanager
async def lossy(database_url: str) -> AsyncIterator[LossyProxy]:
    proxy = LossyProxy(database_url)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    parts = urlsplit(database_url)
    user = parts.netloc.rpartition("@")[0]
    netloc = f"{user}@127.0.0.1:{port}" if user else f"127.0.0.1:{port}"
    proxy.url = urlunsplit(parts._replace(netloc=netloc))
    try:
        yield proxy
    finally:
        server.close()
