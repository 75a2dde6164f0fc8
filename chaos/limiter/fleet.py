"""Starts, pauses and kills worker processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from chaos.limiter.worker import Orders

ROOT = Path(__file__).parents[2]


class Fleet:
    """Worker processes by name. Leave it to end them all."""

    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, orders: Orders) -> None:
        command = [sys.executable, "-m", "chaos.limiter.worker", json.dumps(asdict(orders))]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
        environment = {**os.environ, "PYTHONPATH": paths}
        self.processes[orders.name] = subprocess.Popen(command, cwd=ROOT, env=environment)

    def signal(self, name: str, what: signal.Signals) -> None:
        self.processes[name].send_signal(what)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    async def __aenter__(self) -> Fleet:
        return self

    async def __aexit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.kill(name)
        await asyncio.sleep(0)  # let the truth see that they have gone
