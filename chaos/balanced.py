"""Two API processes behind HAProxy, each of which can be replaced, by other code too.

The balancer reads the file that `deploy/` has for it. The processes are started by `python -m`,
with the code of the folder that is named: of this one, or of an older checkout.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp

from tests.fleet import ROOT, Fleet
from tests.waiting import wait_until
from tidegate.embedded.servers import free_port

_LEAVE_MS = 2_500


class Balanced:
    """`slots`: the API processes by their places behind the balancer."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.port = free_port()
        self.ports = (free_port(), free_port())
        self.slots: dict[int, subprocess.Popen[bytes]] = {}
        self.workers: list[subprocess.Popen[bytes]] = []
        self._started = 0
        self._balancer: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start_balancer(self) -> None:
        places = {f"API_{n}": f"127.0.0.1:{port}" for n, port in enumerate(self.ports, start=1)}
        env = {**os.environ, "LISTEN": f"127.0.0.1:{self.port}", **places}
        env["PATH"] = f"{env['PATH']}:/usr/sbin"
        command = ["haproxy", "-db", "-f", str(ROOT / "deploy/haproxy/haproxy.cfg")]
        with (self.fleet.folder / "haproxy.log").open("wb") as log:
            self._balancer = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    async def start_api(self, slot: int, code: Path) -> None:
        """In a place that is free; returns when the balancer sends it requests."""
        port = self.ports[slot]
        url = f"http://127.0.0.1:{port}"
        process = self.slots[slot] = self._start("serve", code, PORT=str(port))

        async def is_ready() -> bool:
            assert process.poll() is None, f"{url} ended: {process.returncode}"
            return await self._is_ready(url)

        await wait_until(is_ready, 30, f"{url} ready")

    async def replace_api(self, slot: int, code: Path) -> None:
        """As an operator does: SIGTERM, its end, and the next one in its place."""
        await self._end(self.slots.pop(slot))
        await self.start_api(slot, code)

    def start_worker(self, code: Path) -> None:
        self.workers.append(self._start("worker", code))

    async def replace_worker(self, code: Path) -> None:
        self.start_worker(code)
        await self._end(self.workers.pop(0))

    async def answers(self) -> None:
        await wait_until(lambda: self._is_ready(self.url), 30, "an answer through the balancer")

    async def _is_ready(self, url: str) -> bool:
        with suppress(aiohttp.ClientError):
            async with self.fleet.http.get(f"{url}/health/ready") as answer:
                return answer.status == 200
        return False

    def stop(self) -> None:
        for process in (*self.slots.values(), *self.workers, self._balancer):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait(10)

    async def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        await wait_until(lambda: process.poll() is not None, 40, "the end of a process")
        assert process.returncode == 0

    def _start(self, command: str, code: Path, **settings: str) -> subprocess.Popen[bytes]:
        self._started += 1
        env = self.fleet.environment() | settings
        env |= {
            "PYTHONPATH": str(code / "src"),
            "LEAVE_MS": str(_LEAVE_MS),
            "MIGRATE_AT_START": "0",
        }
        with (self.fleet.folder / f"{command}-{self._started}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tidegate", command],
                cwd=self.fleet.folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


@asynccontextmanager
async def balanced(folder: Path) -> AsyncIterator[Balanced]:
    """The stores, without a schema, and the provider are there; nothing of ours runs yet."""
    async with Fleet(folder, apis=0, workers=0, migrated=False) as fleet:
        both = Balanced(fleet)
        try:
            both.start_balancer()
            yield both
        finally:
            both.stop()


def checkout_before(path: str, folder: Path) -> Path:
    """The newest commit that did not have the file yet, checked out in `folder`."""

    def git(*words: str) -> str:
        done = subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    added = git("log", "--diff-filter=A", "--format=%H", "-1", "--", path)
    git("worktree", "add", "--quiet", "--detach", str(folder), f"{added}~1")
    return folder


def forget_checkout(folder: Path) -> None:
    subprocess.run(
        ("git", "worktree", "remove", "--force", str(folder)), cwd=ROOT, check=True, timeout=60
    )
