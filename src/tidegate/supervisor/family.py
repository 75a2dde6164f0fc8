"""Several processes that are kept running: started, started again when they die, stopped.

Invariant: when `run` returns, none of the children is left, and a child that outlives a killed
supervisor learns of it by the end of its lifeline (a pipe of which only the supervisor has the
other end).
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tidegate.supervisor.ground import LIFELINE
from tidegate.telemetry import Log, get_logger

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SETTLED_S = 10.0
_MARGIN_S = 5.0
_TOO_OFTEN = 5
_WRONG_CONFIG = 2


@dataclass(frozen=True, slots=True)
class Child:
    """One process: `argv` holds no secret, since anybody on the machine can read it."""

    name: str
    argv: tuple[str, ...]


class Family:
    """The children of one supervisor."""

    def __init__(
        self,
        children: Sequence[Child],
        *,
        environment: Mapping[str, str],
        pass_fds: Sequence[int] = (),
        grace_s: float = 20.0,
        on_stopping: Callable[[], None] = lambda: None,
    ) -> None:
        self._children = children
        self._environment = environment
        self._pass_fds = pass_fds
        self._grace_s = grace_s
        self._on_stopping = on_stopping
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._stop = asyncio.Event()
        self._hasten = asyncio.Event()
        self._settled = False
        self.failure: str | None = None

    @property
    def pids(self) -> dict[str, int]:
        """The processes that run now, by their children's names."""
        return {name: process.pid for name, process in self._running.items()}

    def settled(self) -> None:
        """All is well: from now on a child that dies is started again without end."""
        self._settled = True

    def stop(self) -> None:
        """Begin the end; asked for a second time, do not wait any longer."""
        if self._stop.is_set():
            self._hasten.set()
            return
        self._stop.set()
        self._on_stopping()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    async def run(self) -> None:
        """Keep the children running until `stop`, a signal, or a failure to start at all.

        `failure` then says what failed, or is None. Cancellation stops the children in order.
        """
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.stop)
        hears, holds = os.pipe()
        try:
            async with asyncio.TaskGroup() as tasks:
                for child in self._children:
                    tasks.create_task(self._keep(child, hears))
        finally:
            os.close(hears)
            os.close(holds)
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    async def _keep(self, child: Child, lifeline: int) -> None:
        deaths = 0
        while not self.stopping:
            born = time.monotonic()
            process = await self._start(child, lifeline)
            try:
                code = await self._ended_or_stop(process)
            finally:
                await self._end(process)
                self._running.pop(child.name, None)
            if code is None:
                return
            deaths = 1 if time.monotonic() - born > _SETTLED_S else deaths + 1
            get_logger().error(
                Log.CHILD_DIED, child=child.name, pid=process.pid, exit_code=code, deaths=deaths
            )
            if not self._settled and (code == _WRONG_CONFIG or deaths >= _TOO_OFTEN):
                self.failure = f"the {child.name} process ended with exit code {code} at its start"
                self.stop()
                return
            await self._pause(_BACKOFF_S[min(deaths, len(_BACKOFF_S)) - 1])

    async def _start(self, child: Child, lifeline: int) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *child.argv,
            stdin=asyncio.subprocess.DEVNULL,
            env={**self._environment, LIFELINE: str(lifeline)},
            pass_fds=[*self._pass_fds, lifeline],
            # In a session of its own: a terminal's Ctrl-C is for the supervisor alone, who tells.
            start_new_session=True,
        )
        self._running[child.name] = process
        get_logger().debug(Log.CHILD_STARTED, child=child.name, pid=process.pid)
        return process

    async def _ended_or_stop(self, process: asyncio.subprocess.Process) -> int | None:
        """The exit code of a process that died by itself; None when it is to be stopped."""
        ended = asyncio.create_task(process.wait())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({ended, stop}, return_when=asyncio.FIRST_COMPLETED)
            return None if self.stopping else process.returncode
        finally:
            ended.cancel()
            stop.cancel()

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is not None:
            return
        process.terminate()
        ended = asyncio.create_task(process.wait())
        hasten = asyncio.create_task(self._hasten.wait())
        await asyncio.wait(
            {ended, hasten},
            timeout=self._grace_s + _MARGIN_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
        hasten.cancel()
        if not ended.done():
            process.kill()
        await ended

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return
