"""What the limits promise besides a provider's quota, each measured by the benchmark or the test
that has it: money, the books, told times, early refusals, tiers and the cost of an admission.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import budgets, refusals, tiers, waits
from bench.environments import ROOT

Figures = dict[str, Any]
BUDGETS_S, BUDGETS_AT_ONCE = 5.0, 200
WAITS_S = 180.0
REFUSED_CALLS, REFUSED_AT_ONCE = 1_000, 2
JOBS = 1_000
# The last commit before limits could say more, which has no scenarios of the units.
BEFORE_UNITS, RUNS, RUN_S = "826151e", 9, 1.5
_SAID = 2_000
# Against the emulated provider's own book, with kills, cuts, forgeries and restarts.
_TESTS = {
    "budgets": "tests/integration/accounting/test_budget_truth.py",
    "books": "tests/integration/accounting/test_books.py",
}


def measure_durability() -> Figures:
    """What durability costs an admission: alone, and with many at once."""
    found = asyncio.run(budgets.costs(BUDGETS_S, BUDGETS_AT_ONCE, processes=(1,)))
    return {"costs": [one._asdict() for one in found]}


def measure_books() -> Figures:
    """Whether the tests of budgets and books hold, which count at the emulated provider."""
    return {name: _ran("-m", "pytest", "-q", "-n0", path) for name, path in _TESTS.items()}


def measure_waits() -> Figures:
    """By load, the share of waiters who were told a true time, and how many were told one."""
    found = asyncio.run(waits.measured(WAITS_S))
    return {
        "true": {name: told.true() for name, told in found.items()},
        "told": {name: len(told.pairs) for name, told in found.items()},
    }


def measure_refusals() -> Figures:
    async def all_of() -> list[Figures]:
        rows = refusals.measure(2, REFUSED_CALLS, REFUSED_AT_ONCE)
        return [asdict(one) async for one in rows]

    return {"rows": asyncio.run(all_of())}


def measure_tiers() -> Figures:
    found = ((group.name, tiers.run(group, JOBS)) for group in tiers.GROUPS)
    return {
        name: {"late": one.late, "share": one.share, "tiers": dict(one.tiers)}
        for name, one in found
    }


def measure_admission() -> Figures:
    """Processor time of admissions over that of the commit before limits could say more."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ratios.json"
        scenarios = ("--scenario", "units-usual", "--scenario", "units-all")
        runs = ("--runs", str(RUNS), "--seconds", str(RUN_S), "--json", str(file))
        said = _ran("-m", "bench.against", BEFORE_UNITS, "--same-benchmarks", *scenarios, *runs)
        if not file.exists():
            raise OSError(said)
        return {"ratios": json.loads(file.read_text())}


def _ran(*arguments: str) -> str:
    """The last line that Python printed with these arguments, or `failed` and its last ones."""
    done = subprocess.run(
        (sys.executable, *arguments), cwd=ROOT, check=False, capture_output=True, text=True
    )
    said = (done.stdout + done.stderr).strip()
    return f"failed: {said[-_SAID:]}" if done.returncode else said.rpartition("\n")[2]


MEASURED: dict[str, Callable[[], Figures]] = {
    "durability": measure_durability,
    "books": measure_books,
    "waits": measure_waits,
    "refusals": measure_refusals,
    "tiers": measure_tiers,
    "admission": measure_admission,
}
