"""Starts, pauses and kills worker processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

from chaos.limiter.worker import Orders
from tests.forked import Forked, started

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
END_S = 10.0
# Asked to end before it knows how, a worker does so once it knows.
HELD_BACK = {signal.SIGTERM}


class Fleet:
    """Worker processes by name. Leave it to end them all. What they write goes to a file each in
    `logs`, or to where this process writes. With `forks` they are forked from a process that has
    imported all (`tests/forked.py`), where nothing runs them and they are of this source."""

    def __init__(self, logs: Path | None = None, *, forks: bool = False) -> None:
        self.processes: dict[str, subprocess.Popen[bytes] | Forked] = {}
        self._logs = logs
        self._forks = forks

    def start(self, orders: Orders, prefix: Sequence[str] = (), *, source: Path = SOURCE) -> None:
        """`prefix` is a command that runs the worker's: one that enters a namespace. `source` is
        where the worker has the product from."""
        module = ["chaos.limiter.worker", json.dumps(asdict(orders))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(source)])}
        with self._streams(orders.name) as (out, log):
            if self._forks and not prefix and source == SOURCE:
                self.processes[orders.name] = started(
                    module, cwd=ROOT, env=environment, stdout=out, stderr=log, held_back=HELD_BACK
                )
                return
            command = [*prefix, sys.executable, "-m", *module]
            # The mask is inherited.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
            try:
                self.processes[orders.name] = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=out, stderr=log
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @contextmanager
    def _streams(self, name: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        """Where a worker writes, and where it logs."""
        with open(os.dup(1), "wb") as out:
            if self._logs is None:
                with open(os.dup(2), "wb") as log:
                    yield out, log
            else:
                with self.log_of(name).open("ab") as log:
                    yield out, log

    def log_of(self, name: str) -> Path:
        assert self._logs is not None
        return self._logs / f"{name}.log"

    def signal(self, name: str, what: signal.Signals) -> None:
        self.processes[name].send_signal(what)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def ended(self) -> dict[str, int]:
        """Those that ended by themselves, with their exit status."""
        found = {name: process.poll() for name, process in self.processes.items()}
        return {name: status for name, status in found.items() if status is not None}

    async def end(self) -> dict[str, int]:
        """Ask all to end in good order; the exit status of each. One that does not is killed."""
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
        status = {}
        for name, process in list(self.processes.items()):
            try:
                status[name] = await asyncio.to_thread(process.wait, END_S)
                del self.processes[name]
            except subprocess.TimeoutExpired:
                self.kill(name)
                status[name] = -signal.SIGKILL
        return status

    async def __aenter__(self) -> Fleet:
        return self

    async def __aexit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.kill(name)
        await asyncio.sleep(0)  # let the truth see that they have gone
