"""`python -m chaos.limiter --seconds 60`: faults one after another, and the truth after each.

Each scene runs its own Valkey and workers, and prints one line: what was done, how many calls were
made, the most that were open at once, and whether that was promised. Ends with 1 if a promise was
broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from chaos.limiter.fleet import Fleet
from chaos.limiter.truth import Truth
from chaos.limiter.worker import Orders
from tidegate.embedded.valkey import ValkeyServer

WORKERS = 4
LIMIT = 16
LEASE_MS = 600


@dataclass
class Scene:
    """One run: the server, the workers, the truth, and how long it may take."""

    valkey: ValkeyServer
    fleet: Fleet
    truth: Truth
    seconds: float
    orders: dict[str, Any]
    pool: str

    def launch(self, name: str) -> None:
        self.fleet.start(Orders(self.valkey.url, self.pool, self.truth.port, name, **self.orders))

    async def rounds(self, fault: Callable[[int], Awaitable[None]]) -> None:
        """Do the fault again and again until the time is over."""
        loop = asyncio.get_running_loop()
        end, number = loop.time() + self.seconds, 0
        while loop.time() < end:
            await asyncio.sleep(1.0)
            await fault(number)
            number += 1


async def calm(scene: Scene) -> None:
    await scene.rounds(lambda _: asyncio.sleep(0))


async def kill_workers(scene: Scene) -> None:
    async def fault(number: int) -> None:
        name = f"w{number % WORKERS}"
        scene.fleet.kill(name)
        scene.launch(name)

    await scene.rounds(fault)


async def restart_empty(scene: Scene) -> None:
    async def fault(_: int) -> None:
        await asyncio.to_thread(scene.valkey.kill)
        await asyncio.to_thread(scene.valkey.start)

    await scene.rounds(fault)


async def pause_valkey(scene: Scene) -> None:
    async def fault(number: int) -> None:
        scene.valkey.pause()
        await asyncio.sleep((0.3, 0.55, 2.0)[number % 3] * LEASE_MS / 300)
        scene.valkey.resume()

    await scene.rounds(fault)


async def pause_workers(scene: Scene) -> None:
    async def fault(number: int) -> None:
        name = f"w{number % WORKERS}"
        scene.fleet.signal(name, signal.SIGSTOP)
        await asyncio.sleep(2 * LEASE_MS / 1000)
        scene.fleet.signal(name, signal.SIGCONT)

    await scene.rounds(fault)


async def kill_and_restart(scene: Scene) -> None:
    async def fault(number: int) -> None:
        name = f"w{number % WORKERS}"
        scene.fleet.kill(name)
        await asyncio.to_thread(scene.valkey.kill)
        await asyncio.to_thread(scene.valkey.start)
        scene.launch(name)

    await scene.rounds(fault)


SCENES: dict[str, tuple[Callable[[Scene], Awaitable[None]], dict[str, Any]]] = {
    "no fault": (calm, {}),
    "a storm of cancellations": (calm, {"storm": 0.5}),
    "kill -9 of workers": (kill_workers, {}),
    "Valkey restarts empty": (restart_empty, {}),
    "Valkey stands still": (pause_valkey, {}),
    "workers stand still, hold": (pause_workers, {"on_expiry": "hold", "hard_ms": 10_000}),
    "kill -9 of workers and Valkey restarts empty": (kill_and_restart, {}),
}


async def play(name: str, seconds: float) -> bool:
    act, options = SCENES[name]
    orders = {"limit": LIMIT, "lease_ms": LEASE_MS, "tasks": 50, "call_ms": 50.0} | options
    truth = Truth()
    await truth.start()
    with tempfile.TemporaryDirectory() as folder:
        valkey = ValkeyServer(Path(folder))
        await asyncio.to_thread(valkey.start)
        try:
            async with Fleet() as fleet:
                scene = Scene(valkey, fleet, truth, seconds, orders, f"chaos-{uuid4().hex[:8]}")
                for number in range(WORKERS):
                    scene.launch(f"w{number}")
                await act(scene)
        finally:
            valkey.resume()
            await asyncio.to_thread(valkey.stop)
            await truth.stop()
    kept = truth.peak <= LIMIT and truth.total > 0
    print(
        f"{'kept  ' if kept else 'BROKEN'} {name}: {truth.total} calls, at most {truth.peak} "
        f"of {LIMIT} at once, {truth.leases_lost} leases lost"
    )
    return kept


async def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos.limiter", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all scenes together")
    parser.add_argument("--scene", choices=SCENES, help="one scene only")
    arguments = parser.parse_args()
    names = [arguments.scene] if arguments.scene else list(SCENES)
    results = [await play(name, arguments.seconds / len(names)) for name in names]
    return 0 if all(results) else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(asyncio.run(main()))
