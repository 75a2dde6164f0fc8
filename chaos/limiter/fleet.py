"""Starts, pauses and kills worker processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from chaos.limiter.worker import Orders

ROOT = Path(__file__).parents[2]
END_S = 10.0


class Fleet:
    """Worker processes by name. Leave it to end them all. What they write goes to a file each in
    `logs`, or to where this process writes."""

    def __init__(self, logs: Path | None = None) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logs = logs

    def start(
        self, orders: Orders, prefix: Sequence[str] = (), *, source: Path = ROOT / "src"
    ) -> None:
        """`prefix` is a command that runs the worker's: one that enters a namespace. `source` is
        where the worker has the product from."""
        python = [sys.executable, "-m", "chaos.limiter.worker", json.dumps(asdict(orders))]
        paths = os.pathsep.join([str(ROOT), str(source)])
        environment = {**os.environ, "PYTHONPATH": paths}
        command = [*prefix, *python]
        # Asked to end before it knows how, it does so once it knows: the mask is inherited.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            if self._logs is None:
                process = subprocess.Popen(command, cwd=ROOT, env=environment)
            else:
                with self.log_of(orders.name).open("ab") as log:
                    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.processes[orders.name] = process

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
