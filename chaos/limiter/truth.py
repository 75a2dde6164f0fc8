"""The upstream of the chaos runs: counts the calls that are really open, over all processes.

A worker says that a call begins and that it is closed, and goes on when a byte comes back: so what
is counted never runs ahead of, or behind, what is so. A connection that the kernel closes takes its
worker's calls with it.

The first line that a worker sends is its name. In the plain protocol each byte after it is a
message: `+` begins a call, `-` ends one, `L` reports a lost lease. Where the name is followed by
` history`, each line is a message, and what happened is kept in `log` for `rehearse.history`:

    ?CALL TENANT TOKENS PRIORITY LIMIT,LIMIT    asks for a permit (- for no priority)
    +CALL EPOCH                                 the call begins, with a permit of that epoch
    -CALL                                       the call has ended
    !CALL                                       the waiter gave up or was refused
    L                                           a lease was lost

Every message is answered by one byte, its first.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from tidegate.checker import Event, What

WITH_HISTORY = "history"
_MEANING: dict[str, What] = {"?": "ask", "+": "begin", "-": "end", "!": "leave"}


@dataclass
class Truth:
    """What was seen. `reset_peak` starts a new measurement; times in `log` are monotonic."""

    open_calls: int = 0
    peak: int = 0
    total: int = 0
    leases_lost: int = 0
    by_worker: dict[str, int] = field(default_factory=dict)
    port: int = 0
    log: list[Event] = field(default_factory=list)
    # Integral of the open calls over time: what was really used of the permits.
    open_s: float = 0.0
    _changed_s: float = 0.0
    _servers: list[asyncio.Server] = field(default_factory=list)
    _connections: dict[asyncio.Task[None], asyncio.StreamWriter] = field(default_factory=dict)

    async def start(self, path: Path | None = None) -> None:
        """Listen on a port of loopback, and on a Unix socket too: that is reached from every
        network namespace."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._servers = [server]
        if path is not None:
            self._servers.append(await asyncio.start_unix_server(self._serve, path))

    async def stop(self) -> None:
        for server in self._servers:
            server.close()
        for writer in self._connections.values():
            writer.transport.abort()
        if self._connections:
            await asyncio.wait(self._connections)

    def reset_peak(self) -> None:
        self.peak = self.open_calls

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        me = asyncio.current_task()
        assert me is not None
        self._connections[me] = writer
        me.add_done_callback(self._connections.pop)
        # A connection that breaks is a killed worker: what it had open is gone.
        with contextlib.suppress(ConnectionError):
            name, _, mode = (await reader.readline()).decode().strip().partition(" ")
            self.by_worker[name] = 0
            try:
                if mode == WITH_HISTORY:
                    await self._hear_lines(name, reader, writer)
                else:
                    await self._hear_bytes(name, reader, writer)
            finally:
                self.used_s()
                self.open_calls -= self.by_worker.pop(name)
        writer.close()

    async def _hear_bytes(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(4096):
            for byte in data:
                self._count(name, chr(byte))
            _answer(writer, data)

    async def _hear_lines(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        told = _Teller(name)
        try:
            while (line := (await reader.readline()).decode()).endswith("\n"):
                self._count(name, line[0])
                told.hear(line, self.log)
                _answer(writer, line[:1].encode())
        finally:
            told.has_gone(self.log)

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
        elif what == "L":
            self.leases_lost += 1


def _answer(writer: asyncio.StreamWriter, data: bytes) -> None:
    if not writer.transport.is_closing():  # a killed worker: what it had said still counts
        writer.write(data)


class _Teller:
    """One connection of a worker that tells its history: what of it has not ended yet."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._alive: dict[int, Event] = {}

    def hear(self, line: str, log: list[Event]) -> None:
        what = _MEANING.get(line[0])
        if what is None:
            return
        number, *words = line[1:].split()
        call, at_ns = int(number), time.monotonic_ns()
        if what == "ask":
            tenant, tokens, priority, limits = words
            event = Event(
                at_ns,
                what,
                self._worker,
                call,
                tenant,
                tuple(limits.split(",")),
                int(tokens),
                priority.removeprefix("-"),
            )
        else:
            event = self._alive[call]._replace(at_ns=at_ns, what=what)
        if what == "begin":
            event = event._replace(epoch=int(words[0]))
        log.append(event)
        if what in ("ask", "begin"):
            self._alive[call] = event
        else:
            del self._alive[call]

    def has_gone(self, log: list[Event]) -> None:
        """The worker is dead: its calls have ended, its waiters have left."""
        at_ns = time.monotonic_ns()
        for event in self._alive.values():
            log.append(
                event._replace(at_ns=at_ns, what="end" if event.what == "begin" else "leave")
            )
        self._alive.clear()


class Caller:
    """A worker's side: `say` returns when the truth has heard it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._heard: deque[asyncio.Future[None]] = deque()

    @classmethod
    async def connect(cls, where: int | str, name: str, *, history: bool = False) -> Caller:
        """To a port of loopback, or to the path of a Unix socket."""
        if isinstance(where, int):
            reader, writer = await asyncio.open_connection("127.0.0.1", where)
        else:
            reader, writer = await asyncio.open_unix_connection(where)
        writer.write(f"{name} {WITH_HISTORY}\n".encode() if history else f"{name}\n".encode())
        return cls(reader, writer)

    async def listen(self) -> None:
        while data := await self._reader.read(4096):
            for _ in data:
                heard = self._heard.popleft()
                if not heard.done():
                    heard.set_result(None)

    def tell(self, what: str) -> asyncio.Future[None]:
        """Send it now; the future is done when the truth has heard it."""
        heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._heard.append(heard)
        self._writer.write(what.encode())
        return heard

    async def say(self, what: str) -> None:
        await self.tell(what)
