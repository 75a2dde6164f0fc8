"""A program under test with all of its processes: started, watched and ended.

Invariant: leaving a `Program` ends every process that it is the ancestor of.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench import machine

_PROC = Path("/proc")
_STOP_S = 15.0
_REST_S, _LOOK_S = 10.0, 0.1
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def family(pid: int) -> list[int]:
    """A process and all that descend from it, alive now."""
    children = defaultdict(list)
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children[int(fields[1])].append(int(entry.name))
    found = [pid]
    for parent in found:
        found += children[parent]
    return [one for one in found if _stat(one)]


def cpu_ns(pids: Sequence[int]) -> int:
    """Processor time of processes, with that of their children that have ended."""
    total = 0
    for pid in pids:
        fields = _stat(pid)
        if fields:
            total += (int(fields[13]) + int(fields[14])) * _TICK_NS
            total += machine.cpu_ns(pid)
    return total


def await_rest(used_ns: Callable[[], int], sleep: Callable[[float], object] = time.sleep) -> None:
    """Wait until processes have done what a load left to do, such as a record that is written
    behind: its cost is that load's, and not the next one's. After ten seconds none waits longer.

    used_ns: their processor time up to now. At rest they use a twentieth of a core at most in two
    looks, each longer than a record waits for others of its batch.
    """
    calm, deadline_s = 0, time.monotonic() + _REST_S
    before_ns = used_ns()
    while calm < 2 and time.monotonic() < deadline_s:
        sleep(_LOOK_S)
        now_ns = used_ns()
        calm = calm + 1 if now_ns - before_ns <= _LOOK_S * 1e9 / 20 else 0
        before_ns = now_ns


def resident_bytes(pids: Sequence[int]) -> int:
    """Memory of processes; what they share counts in each."""
    total = 0
    for pid in pids:
        try:
            total += int((_PROC / str(pid) / "statm").read_text().split()[1]) * _PAGE_BYTES
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def proportional_bytes(pids: Sequence[int]) -> int:
    """Memory of processes (PSS); what they share is divided among those that share it."""
    total = 0
    for pid in pids:
        try:
            rollup = (_PROC / str(pid) / "smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += next(int(line.split()[1]) for line in rollup.splitlines() if "Pss:" in line) * 1024
    return total


def words_of(pid: int) -> list[str]:
    """The command line of a process; empty where it is gone."""
    try:
        raw = (_PROC / str(pid) / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return raw.decode(errors="replace").split("\0")


def _stat(pid: int) -> list[str]:
    """The fields of `/proc/PID/stat` from the state on; empty where the process is gone."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    fields = text.rpartition(")")[2].split()
    return [] if fields[0] in "ZX" else fields


class Program:
    """A program that was started; its output is in `log`."""

    def __init__(
        self, command: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str], log: Path
    ) -> None:
        self.log = log
        self.began_s = time.monotonic()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                cwd=cwd,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def pids(self, which: Callable[[list[str]], bool] = lambda _words: True) -> list[int]:
        """Those of its processes whose command line is wanted."""
        return [pid for pid in family(self._process.pid) if which(words_of(pid))]

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def said(self) -> str:
        """The last lines that it printed."""
        return " / ".join(self.log.read_text(errors="replace").strip().splitlines()[-3:])

    def stop(self) -> None:
        """In order, and after a while by force."""
        everyone = family(self._process.pid) if self.alive else []
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pid in everyone:
            if words_of(pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
