"""`python -m bench.against COMMIT`: the figures of this checkout beside another commit's.

A clone of the commit is installed below `.bench`. Each run measures one, then the other, each with
the benchmarks that it has; with `--same-benchmarks` both by those of this checkout. The medians of
all runs are compared, so that a machine whose speed drifts does not decide. Exit status 1 where a
bar is missed, 2 where a figure is missing.

`--turns N` measures processor time more closely, of a relayed call at full speed and at 400 a
second, and of a stream: gateways of both run beside one another, and take N short loads in turns.
The two loads of a turn meet the same machine, so that the ratios of the turns, of which the median
counts, vary less than the figures. Two processes of the same code differ by some hundredths: both
are started again every ten turns, and the error is that of the mean of the starts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import grid, machine
from bench.environments import OURS_PYTHON
from bench.gateway.product import Product
from bench.gateway.programs import Upstream
from bench.profile.__main__ import LOADS, Stage

ROOT = Path(__file__).parents[1]
# Medians of work done may be so much more than the other commit's, tails so much.
MEDIAN_BAR, TAIL_BAR = 1.05, 1.20


@dataclass(frozen=True)
class Figure:
    """One number of a benchmark's JSON, smaller is better."""

    said: str
    benchmark: str
    scenario: str
    key: str
    bar: float = MEDIAN_BAR
    other_scenario: str = ""  # of the other commit, if not the same


FIGURES = (
    Figure("relay, 64 connections: gateway CPU, us a request", "gateway", "closed", "gateway_us"),
    Figure("the same: Valkey CPU, us", "gateway", "closed", "valkey_us"),
    Figure("the same: p50, ms", "gateway", "closed", "p50_ms"),
    Figure("the same: p99, ms", "gateway", "closed", "p99_ms", TAIL_BAR),
    Figure("relay, 50 ms upstream: gateway CPU, us a request", "gateway", "delayed", "gateway_us"),
    Figure("the same: p50, ms", "gateway", "delayed", "p50_ms"),
    Figure("the same: p99, ms", "gateway", "delayed", "p99_ms", TAIL_BAR),
    Figure("stream of 50: gateway CPU, us", "gateway", "streams", "gateway_us"),
    Figure("limiter, nobody else: us a permit", "limiter", "uncontended", "us"),
    Figure("limiter, 50 x 20 ms: Valkey CPU, us a permit", "limiter", "load-50-20", "valkey_us"),
    Figure("the same: clients' CPU, us a permit", "limiter", "load-50-20", "workers_us"),
    Figure("the same: wake-up p50, ms", "limiter", "load-50-20", "wake_p50_ms"),
    Figure("the same: wake-up p99, ms", "limiter", "load-50-20", "wake_p99_ms", TAIL_BAR),
    Figure("limiter, weights: Valkey CPU, us a permit", "limiter", "weights", "valkey_us"),
)
# A commit that doesn't have these scenarios is measured with `--same-benchmarks`.
_USUAL, _ALL = "limits of usual units", "limits of all units, against usual ones"
UNITS = (
    Figure(f"{_USUAL}: Valkey CPU, us a permit", "limiter", "units-usual", "valkey_us", 1.10),
    Figure(f"{_USUAL}: clients' CPU, us a permit", "limiter", "units-usual", "workers_us", 1.10),
    *(
        Figure(f"{_ALL}: {whose} CPU, us a permit", "limiter", "units-all", key, 1.5, "units-usual")
        for whose, key in (("Valkey", "valkey_us"), ("clients'", "workers_us"))
    ),
)
OURS = {"gateway": "tidegate", "limiter": "tidegate"}
ONLY = {"gateway": "tidegate", "limiter": "ours"}

SCENARIOS = tuple(dict.fromkeys(figure.scenario for figure in (*FIGURES, *UNITS)))

Found = dict[Figure, list[float]]
# Load and role -> microseconds of this checkout and of the other.
FoundInTurns = dict[tuple[str, str], tuple[list[float], list[float]]]


def checkout(commit: str) -> Path:
    """A clone that stands on the commit, with an environment of its own."""
    folder = ROOT / ".bench" / "against" / commit
    if not folder.exists():
        clone = ["git", "clone", "--quiet", "--shared", str(ROOT), str(folder)]
        subprocess.run(clone, check=True)
    subprocess.run(["git", "checkout", "--quiet", commit], cwd=folder, check=True)
    subprocess.run([folder / "scripts/bootstrap.sh", "dev"], cwd=folder, check=True)
    return folder


@dataclass(frozen=True)
class Side:
    """One of the two. root: whose code is measured. benchmarks: whose benchmarks run."""

    root: Path
    benchmarks: Path
    is_other: bool
    found: Found

    def scenario_of(self, figure: Figure) -> str:
        return (self.is_other and figure.other_scenario) or figure.scenario


def measure(side: Side, wanted: Sequence[Figure], seconds: float) -> None:
    """Run the benchmarks of these figures once, and add them."""
    for benchmark in dict.fromkeys(figure.benchmark for figure in wanted):
        ours = [figure for figure in wanted if figure.benchmark == benchmark]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "figures.json"
            command: list[str | Path] = [
                *(side.benchmarks / ".venv/bin/python", "-m", f"bench.{benchmark}"),
                *("--only", ONLY[benchmark], "--seconds", str(seconds), "--patience", "0"),
                *("--json", file),
            ]
            for scenario in dict.fromkeys(side.scenario_of(figure) for figure in ours):
                command += ["--scenario", scenario]
            env = {**os.environ, OURS_PYTHON: str(side.root / ".venv/bin/python")}
            done = subprocess.run(
                command, cwd=side.benchmarks, env=env, check=False, capture_output=True, text=True
            )
            if done.returncode not in (0, 1) or not file.exists():
                raise SystemExit(f"{benchmark} of {side.root} failed:\n{done.stderr[-2000:]}")
            figures = json.loads(file.read_text())[OURS[benchmark]]
        for figure in ours:
            value = figures.get(side.scenario_of(figure), {}).get(figure.key)
            if value is not None:
                side.found[figure].append(float(value))


TURNS_A_START = 10
IN_TURNS = ("call", "paced", "stream")
# Role -> what its row says; the gateway's is named by the load.
ROLES = {"serve": "", "valkey": "Valkey", "postgres": "PostgreSQL"}


@dataclass(frozen=True, slots=True)
class Turns:
    """Processor time of the gateways or of their servers, us a request, of both in each turn."""

    said: str
    here: Sequence[float]
    there: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        return [one / other for one, other in zip(self.here, self.there, strict=True)]

    @property
    def error(self) -> float | None:
        """The standard error of the mean of the starts, of which each counts by its median; None
        of one start."""
        ratios, starts = self.ratios, range(0, len(self.here), TURNS_A_START)
        each = [statistics.median(ratios[one : one + TURNS_A_START]) for one in starts]
        return statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None

    def row(self) -> list[str]:
        """The medians, the median ratio and its error."""
        here, there, ratio = map(statistics.median, (self.here, self.there, self.ratios))
        error = "-" if self.error is None else f"{self.error:.3f}"
        return [
            *(self.said, f"{there:.0f}", f"{here:.0f}", f"{ratio:.3f}", error),
            *(f"<= {MEDIAN_BAR:g}", "met" if ratio <= MEDIAN_BAR else "missed"),
        ]


def in_turns(other: Path, turns: int, seconds: float) -> list[Turns]:
    """Relayed calls and a stream at gateways of this checkout and the other, with limits and
    record on; each has its own Valkey and PostgreSQL, whose processor time counts apart."""
    found: FoundInTurns = {(load, role): ([], []) for load in IN_TURNS for role in ROLES}
    for begun in range(0, turns, TURNS_A_START):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            upstream = stack.enter_context(Upstream())
            stages = []
            for root in (ROOT, other):
                os.environ[OURS_PYTHON] = str(root / ".venv/bin/python")
                product = stack.enter_context(Product(upstream.url, apis=1, workers=1))
                stages.append(Stage(product, upstream, folder, seconds))
            for load in IN_TURNS:
                _take_turns(stages, load, min(TURNS_A_START, turns - begun), found)
        print(f"{min(begun + TURNS_A_START, turns)} of {turns} turns", flush=True)
    return [
        Turns(f"the same: {ROLES[role]}" if ROLES[role] else LOADS[load][0], *us)
        for (load, role), us in found.items()
    ]


def _take_turns(stages: Sequence[Stage], load: str, turns: int, found: FoundInTurns) -> None:
    for turn in range(-1, turns):  # the first only warms up
        for place in (0, 1) if turn % 2 else (1, 0):
            product = stages[place].product
            before_ns = product.cpu_ns()
            done = LOADS[load][1](stages[place])
            product.await_rest()
            after_ns = product.cpu_ns()
            for role in ROLES if turn >= 0 else ():
                took_ns = after_ns[role] - before_ns[role]
                found[load, role][place].append(took_ns / done / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.against", description=__doc__)
    parser.add_argument("commit", help="what to measure beside this checkout")
    parser.add_argument("--runs", type=int, default=9, help="of each, in turns")
    parser.add_argument("--seconds", type=float, default=3.0, help="measured in each load")
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="only this one")
    parser.add_argument(
        "--same-benchmarks",
        action="store_true",
        help="measure both with the benchmarks of this checkout",
    )
    parser.add_argument("--turns", type=int, default=0, help="gateways in turns, so many loads")
    parser.add_argument("--json", type=Path, help="put the ratio of each figure into this file")
    arguments = parser.parse_args()
    known = (*FIGURES, *UNITS) if arguments.same_benchmarks else FIGURES
    scenarios = arguments.scenario or {figure.scenario for figure in known}
    wanted = [figure for figure in (*FIGURES, *UNITS) if figure.scenario in scenarios]
    resolved = ["git", "rev-parse", "--short=12", arguments.commit]
    commit = subprocess.check_output(resolved, cwd=ROOT, text=True).strip()
    other = checkout(commit)
    command = ["python -m bench.against", *sys.argv[1:]]
    if arguments.turns:
        compared = in_turns(other, arguments.turns, arguments.seconds)
        heads = ["us a request", commit, "here", "median ratio", "its error", "bar", "verdict"]
        title = f"This checkout against {commit}, in turns"
        grid.show([grid.Grid(title, heads, [one.row() for one in compared])])
        print("\n".join(machine.describe(f"{arguments.turns} turns", command)))
        sys.exit(any(statistics.median(one.ratios) > MEDIAN_BAR for one in compared))
    ours: Found = defaultdict(list)
    theirs: Found = defaultdict(list)
    benchmarks = ROOT if arguments.same_benchmarks else other
    pair = [Side(ROOT, ROOT, False, ours), Side(other, benchmarks, True, theirs)]
    for run in range(arguments.runs):
        # The first of a pair may meet a colder machine.
        for side in pair if run % 2 else reversed(pair):
            measure(side, wanted, arguments.seconds)
        print(f"run {run + 1} of {arguments.runs}", flush=True)
    rows, missed, missing = [], 0, 0
    ratios: dict[str, float] = {}
    for figure in wanted:
        if not ours[figure] or not theirs[figure]:
            missing += 1
            rows.append([figure.said, "-", "-", "-", f"<= {figure.bar:g}", "not measured"])
            continue
        here, there = statistics.median(ours[figure]), statistics.median(theirs[figure])
        ratio = here / there if there else float("inf")
        ratios[figure.said] = ratio
        missed += ratio > figure.bar
        verdict = "met" if ratio <= figure.bar else "missed"
        rows.append(
            [
                figure.said,
                f"{there:.3g}",
                f"{here:.3g}",
                f"{ratio:.2f}",
                f"<= {figure.bar:g}",
                verdict,
            ]
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(ratios, indent=1))
    columns = ["figure", commit, "here", "ratio of medians", "bar", "verdict"]
    grid.show([grid.Grid(f"This checkout against {commit}", columns, rows)])
    print("\n".join(machine.describe(f"{arguments.runs} runs of each", command)))
    sys.exit(2 if missing else bool(missed))


if __name__ == "__main__":
    main()
