"""Processes under test: started, paused and killed; a permit probe and a job worker.

    python -m tidegate.verify.processes probe|worker

Orders come as one line of JSON on stdin, because they hold URLs with passwords. The probe prints
one line per event, immediately: MONOTONIC_NS WHAT CALL TENANT EPOCH, where WHAT is ask, begin,
end, leave, lost (a lease), over (refused by the provider) or failed. SIGTERM or the end of stdin
ends the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, get_args

from tidegate.checker import Event, What
from tidegate.verify.plan import finish

_END_S = 10.0
_WHATS = set(get_args(What))


class Family:
    """`async with Family("tidegate.verify.probe") as family`. `events` are in order of time once
    asked for; `seen` counts what is no event, by process and word."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._events: list[Event] = []
        self._open: dict[tuple[str, int], Event] = {}
        self.seen: Counter[tuple[str, str]] = Counter()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # All of it: what is removed next is theirs.
        await finish(self._end_all())

    @property
    def names(self) -> Sequence[str]:
        return list(self._processes)

    async def start(self, name: str, orders: Mapping[str, Any], env: Mapping[str, str]) -> None:
        """In a session of its own: Ctrl-C is for us, who end it in order."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", self._module),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **env},
            start_new_session=True,
        )
        self._processes[name] = process
        self._reading[name] = asyncio.create_task(self._hear(name, process))
        assert process.stdin is not None
        process.stdin.write(json.dumps(orders).encode() + b"\n")
        await process.stdin.drain()

    def signal(self, name: str, how: signal.Signals) -> None:
        self._processes[name].send_signal(how)

    async def kill(self, name: str) -> int:
        """kill -9; the moment at which its connections were closed, in monotonic ns."""
        process = self._processes[name]
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        at_ns = time.monotonic_ns()
        await asyncio.shield(self._reading[name])
        # Only now: where this was cancelled before, the end of the block does it again.
        del self._processes[name], self._reading[name]
        self._gone(name, at_ns)
        return at_ns

    async def end(self, name: str) -> int | None:
        """SIGTERM; its exit status, None where it had to be killed."""
        process = self._processes[name]
        for how in (signal.SIGCONT, signal.SIGTERM):
            with suppress(ProcessLookupError):  # it has ended by itself
                process.send_signal(how)
        try:
            async with asyncio.timeout(_END_S):
                status = await process.wait()
        except TimeoutError:
            status = None
        await self.kill(name)
        return status

    async def _end_all(self) -> None:
        await asyncio.gather(*(self.end(name) for name in self.names))

    def ended(self) -> list[str]:
        """Those that ended by themselves."""
        return [name for name, one in self._processes.items() if one.returncode is not None]

    def events(self) -> list[Event]:
        """All that was told up to now."""
        return sorted(self._events, key=lambda event: event.at_ns)

    def has_told(self, name: str) -> bool:
        """Whether a process is up."""
        return any(event.worker == name for event in self._events)

    def told(self, what: str, name: str = "") -> int:
        """How often a word was told, by one process or by all."""
        return sum(n for (who, word), n in self.seen.items() if word == what and name in ("", who))

    async def _hear(self, name: str, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            at, what, number, tenant, epoch = line.decode().split()
            if what not in _WHATS:
                self.seen[name, what] += 1
                continue
            event = Event(
                *(int(at), what, name, int(number), tenant, ("",)),  # type: ignore[arg-type]
                epoch=int(epoch),
            )
            self._events.append(event)
            if what in ("ask", "begin"):
                self._open[name, event.call] = event
            else:
                self._open.pop((name, event.call), None)

    def _gone(self, name: str, at_ns: int) -> None:
        """What it had open has ended, and who waited has left."""
        for key, event in [one for one in self._open.items() if one[0][0] == name]:
            what: What = "end" if event.what == "begin" else "leave"
            self._events.append(event._replace(at_ns=at_ns, what=what))
            del self._open[key]


_STDIN = 0
_AT_ONCE = 65_536


def read_orders() -> dict[str, Any]:
    """The first line of stdin, and nothing after it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(_STDIN, 1)
        if not byte:
            raise EOFError("no orders came")
        line += byte
    found: dict[str, Any] = json.loads(line)
    return found


def on_end(stop: Callable[[], object]) -> None:
    """Call `stop` on SIGTERM, and when stdin ends."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop)

    def look() -> None:
        if not os.read(_STDIN, _AT_ONCE):
            loop.remove_reader(_STDIN)
            stop()

    loop.add_reader(_STDIN, look)
