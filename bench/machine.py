"""Where the figures come from, and who uses the machine while they are taken."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path

from bench.environments import ROOT

STAT = Path("/proc/stat")
QUIET = 0.1
LOOK_S = 0.4
LONGEST_WAIT_S = 20.0


def describe(versions: str, command: list[str]) -> list[str]:
    """The machine, the versions, the day and the command, a line each."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return [
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()) + f", load average before: {load}",
        f"{_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        f"Python {platform.python_version()}, {versions}, all on loopback",
        f"commit {_commit()}",
        f"`{' '.join(command)}`",
    ]


def busy_ns() -> int:
    """Processor time that all cores have spent on anything; 0 where it cannot be known."""
    if not STAT.exists():
        return 0
    user, nice, system, _, _, irq, softirq, *_ = map(int, STAT.read_text().split()[1:9])
    return (user + nice + system + irq + softirq) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def cpu_ns(pid: int) -> int:
    """Processor time of another process with all of its threads: clock_getcpuclockid(3)."""
    return time.clock_gettime_ns((~pid << 3) | 2)


class Patience:
    """So many seconds, in a whole run, for waiting until others leave the machine alone and for
    measuring again what they disturbed."""

    def __init__(self, left_s: float) -> None:
        self.left_s = left_s

    def await_quiet(self) -> None:
        began_s = time.monotonic()
        while time.monotonic() - began_s < min(self.left_s, LONGEST_WAIT_S):
            before_ns, looked_s = busy_ns(), time.monotonic()
            time.sleep(LOOK_S)
            possible_ns = (time.monotonic() - looked_s) * 1e9 * (os.cpu_count() or 1)
            if (busy_ns() - before_ns) / possible_ns < QUIET:
                break
        self.spend(time.monotonic() - began_s)

    def spend(self, seconds: float) -> None:
        self.left_s = max(0.0, self.left_s - seconds)


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
