"""The upstream of the chaos runs: counts the calls that are really open, over all processes.

A worker says `+` when a call begins and `-` when it is closed, and goes on when the byte comes
back: so what is counted never runs ahead of, or behind, what is so. A connection that the kernel
closes takes its worker's calls with it. `L` reports a lost lease.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field


@dataclass
class Truth:
    """What was seen. `reset_peak` starts a new measurement."""

    open_calls: int = 0
    peak: int = 0
    total: int = 0
    leases_lost: int = 0
    by_worker: dict[str, int] = field(default_factory=dict)
    port: int = 0
    # Integral of the open calls over time: what was really used of the permits.
    open_s: float = 0.0
    _changed_s: float = 0.0
    _server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()

    def reset_peak(self) -> None:
        self.peak = self.open_calls

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = (await reader.readline()).decode().strip()
        self.by_worker[name] = 0
        try:
            while data := await reader.read(4096):
                for byte in data:
                    self._count(name, chr(byte))
                writer.write(data)
        except ConnectionError:
            pass  # a killed worker: what it had open is gone, as below
        finally:
            self.open_calls -= self.by_worker.pop(name)
            writer.close()

    def used_s(self) -> float:
        """Permit-seconds used up to now."""
        now_s = time.monotonic()
        self.open_s += self.open_calls * (now_s - self._changed_s)
        self._changed_s = now_s
        return self.open_s

    def _count(self, name: str, what: str) -> None:
        self.used_s()
        if what == "+":
            self.open_calls += 1
            self.total += 1
            self.by_worker[name] += 1
            self.peak = max(self.peak, self.open_calls)
        elif what == "-":
            self.open_calls -= 1
            self.by_worker[name] -= 1
        else:
            self.leases_lost += 1


class Caller:
    """A worker's side: `say` returns when the truth has heard it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._heard: deque[asyncio.Future[None]] = deque()

    @classmethod
    async def connect(cls, port: int, name: str) -> Caller:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{name}\n".encode())
        return cls(reader, writer)

    async def listen(self) -> None:
        while data := await self._reader.read(4096):
            for _ in data:
                heard = self._heard.popleft()
                if not heard.done():
                    heard.set_result(None)

    async def say(self, what: str) -> None:
        heard = asyncio.get_running_loop().create_future()
        self._heard.append(heard)
        self._writer.write(what.encode())
        await heard
