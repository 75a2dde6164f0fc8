"""The most telling faults of `python -m chaos.limiter`, once each and in a small size."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.limiter import network
from chaos.limiter.play import play
from chaos.limiter.scene import SMALL

ROOT = Path(__file__).parents[3]
PARTITION = [
    "-m",
    "chaos.limiter",
    "--small",
    "--fault",
    "partition",
    "--seconds",
    "0",
    "--seed",
    "1",
]


async def kept(name: str) -> None:
    outcome = await play(name, SMALL, 0.0, random.Random(name), rounds=1, forks=True)
    assert outcome.problems == []
    assert outcome.peak == SMALL.limit
    assert len(outcome.rounds) == 1


@pytest.mark.parametrize("name", ["kill", "stop-hold", "restart-empty", "lose-all"])
async def test_the_promise_is_kept(name: str) -> None:
    await kept(name)


async def test_the_promise_is_kept_when_a_cable_is_pulled() -> None:
    if network.missing_apart():
        await kept("cut-off")  # the same by a proxy, where namespaces are not to be had
        return
    command = network.apart([sys.executable, *PARTITION])
    run = asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True)
    done = await run
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{SMALL.limit}/{SMALL.limit}" in done.stdout, done.stdout
