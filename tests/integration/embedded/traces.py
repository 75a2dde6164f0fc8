"""Which processes a test has caused, however far they went from it.

A variable in the environment marks them, inherited by all, detached or not. Valkey writes its title
over its environment; it is known by its working folder.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from uuid import uuid4

import pytest

from tests.waiting import wait_until
from tidegate.embedded import servers as process

VARIABLE = "TIDEGATE_TEST_MARK"


class Traces:
    """All living processes with one mark, or in one folder, apart from the test itself."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self._folder = folder
        self._mark = uuid4().hex
        patch.setenv(VARIABLE, self._mark)

    def pids(self, word: str = "") -> list[int]:
        """The marked processes that have `word` in their command line."""
        wanted = f"{VARIABLE}={self._mark}".encode()
        found = []
        place = f"{self._folder}/"
        for entry in os.listdir("/proc"):  # asked again and again, with no Path for each process
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            try:
                with open(f"/proc/{entry}/environ", "rb") as environment:
                    marked = wanted in environment.read().split(b"\0")
                marked = marked or f"{os.readlink(f'/proc/{entry}/cwd')}/".startswith(place)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if marked and word in process.command_of(int(entry)):
                found.append(int(entry))
        return sorted(found)

    def postgres(self) -> list[int]:
        """The marked PostgreSQL servers. What one has just forked has its command line for a
        moment, before it has a name of its own, and may be gone by now."""
        found = self.pids("postgres -D")
        return [pid for pid in found if _parent_of(pid) not in (0, *found)]

    def with_variable(self, name: str) -> list[int]:
        """The marked processes that were given a variable of this name."""
        start = f"{name}=".encode()
        return [
            pid
            for pid in self.pids()
            if any(
                one.startswith(start)
                for one in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            )
        ]

    def commands(self) -> list[str]:
        return [process.command_of(pid) for pid in self.pids()]

    async def none_left(self, timeout_s: float = 20) -> None:
        """Fail, and end what is there, when marked processes still live after `timeout_s`."""
        try:
            await wait_until(lambda: not self.pids(), timeout_s, "an end of all processes")
        except AssertionError:
            left = self.commands()
            told = [path.read_text() for path in self._folder.rglob("embedded/[ks]*.*")]
            for pid in self.pids():
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"left running: {left}; told: {told}") from None


def _parent_of(pid: int) -> int:
    """0 where the process is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat.rpartition(")")[2].split()[1])
