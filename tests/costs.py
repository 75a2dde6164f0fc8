"""`--costs FILE`: the processor time of each test, its fixtures and all that it started included.

Unlike `--durations` it says the same on a busy machine as on an idle one. A line of JSON for each
test is appended to the file, and the dearest files of tests are printed at the end. Processes of
pytest-xdist append to one file. What a shared server does late counts for the next test.

    .venv/bin/python -m pytest -p tests.costs --costs /tmp/costs.jsonl -n0 tests/integration/store
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

_PRINTED = 60
_TICKS = os.sysconf("SC_CLK_TCK")
# In /proc/<pid>/stat, after the name: a process's own time, and that of its children that ended.
_PARENT, _OWN, _ENDED = 1, slice(11, 13), slice(13, 15)


class Costs:
    """Appends what each test cost to a file, and prints where the time went."""

    def __init__(self, path: Path, *, prints: bool, counts: bool) -> None:
        self._path = path
        self._prints = prints
        self._counts = counts
        self._spent_s = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._note("before and between tests")
        try:
            return (yield)
        finally:
            self._note(item.nodeid)

    def pytest_sessionfinish(self) -> None:
        if self._counts:
            self._note("at the end")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._prints:
            terminalreporter.section("processor time")
            for line in dearest(self._path):
                terminalreporter.write_line(line)

    def _note(self, of: str) -> None:
        until_s, self._spent_s = self._spent_s, spent_s(_root())
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"of": of, "cpu_s": round(self._spent_s - until_s, 3)}) + "\n")


def spent_s(root: int) -> float:
    """Processor time of all that runs below a process, and of what has ended there."""
    stats: dict[int, list[str]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stats[int(name)] = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
    below: dict[int, list[int]] = defaultdict(list)
    for pid, stat in stats.items():
        below[int(stat[_PARENT])].append(pid)
    ticks = sum(map(int, stats[root][_OWN] + stats[root][_ENDED]))
    left = [root]
    while left:
        for pid in below[left.pop()]:
            ticks += sum(map(int, stats[pid][_OWN] + stats[pid][_ENDED]))
            left.append(pid)
    return ticks / _TICKS


def dearest(path: Path) -> list[str]:
    """The files of tests that cost most, with their number of tests, and the sum of all."""
    costs_s: dict[str, list[float]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        note = json.loads(line)
        costs_s[note["of"].partition("::")[0]].append(note["cpu_s"])
    ranked = sorted(costs_s.items(), key=lambda one: -sum(one[1]))
    lines = [f"{sum(each):8.2f} s  {len(each):5}  {name}" for name, each in ranked[:_PRINTED]]
    whole_s = sum(sum(each) for each in costs_s.values())
    return [*lines, f"{whole_s:8.2f} s  {sum(map(len, costs_s.values())):5}  all"]


def _root() -> int:
    """The watcher of this process, which adopts what loses its parent; or this process."""
    parent = os.getppid()
    name = Path(f"/proc/{parent}/comm").read_text().strip()
    return parent if name == "watcher" else os.getpid()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--costs", type=Path, help="append a line of JSON for each test's CPU time")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--costs")
    if path is not None:
        prints = not hasattr(config, "workerinput")
        if prints:
            path.unlink(missing_ok=True)
        # Of processes beside others each counts what is below it, and the first one prints.
        counts = not config.getoption("tx", [])
        config.pluginmanager.register(Costs(path, prints=prints, counts=counts))
