"""Cost of budgets: reservations a second and their latency, on a PostgreSQL of its own.

    python -m bench.budgets [--seconds 5] [--at-once 200]

Each process reserves and settles in a loop, `--at-once` calls at a time over all processes, all of
one book. Without a budget a call asks `binding` and no more. PostgreSQL runs with its usual
durability: a reservation is on disk before it is granted.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import asyncpg
import orjson

from bench import grid
from bench.machine import describe
from tidegate.call import CallCost, Caller, Charge, UsageState, new_id
from tidegate.embedded.servers import PostgresServer
from tidegate.prices.budgets import Budget
from tidegate.store.budgets import Budgets
from tidegate.store.database import Connections, migrate

CALLER = Caller("acme")
COST = CallCost(800, 100, 400, 50)
TOLD = Charge(UsageState.TOLD, cost_micros=300)
BUDGETS = (
    Budget("all", "usd", 10**15, "month"),
    Budget("tenants", "usd", 10**15, "day", each=("tenant",)),
    Budget("tokens", "tokens", 10**15, "day", tenant="acme"),
)


class Cost(NamedTuple):
    """What admissions took; `budgets` is how many bound each of them."""

    budgets: str
    processes: int
    at_once: int
    per_second: float
    p50_ms: float
    p99_ms: float


async def load(url: str, at_once: int, seconds: float, warm: float) -> list[float]:
    """Milliseconds of each admission, of one process."""
    connections = Connections(url)
    budgets = Budgets(connections, instance_id=f"bench-{new_id()}")
    await budgets.refresh()
    running = asyncio.create_task(budgets.run())
    taken_ms: list[float] = []
    begin = time.perf_counter() + warm
    end = begin + seconds

    async def calls() -> None:
        while (now := time.perf_counter()) < end:
            bindings = budgets.binding(CALLER, "m")
            hold = None
            if bindings:
                hold = await budgets.reserve(bindings, new_id(), COST)
            if now >= begin:
                taken_ms.append((time.perf_counter() - now) * 1000)
            if hold is not None:
                budgets.settle(hold, TOLD)
            await asyncio.sleep(0)  # as a call would

    await asyncio.gather(*(calls() for _ in range(at_once)))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await connections.aclose()
    return taken_ms


async def measured(url: str, processes: int, at_once: int, seconds: float) -> list[float]:
    arguments = ["--child", url, "--at-once", str(at_once // processes), "--seconds", str(seconds)]
    children = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.budgets", *arguments), stdout=asyncio.subprocess.PIPE
        )
        for _ in range(processes)
    ]
    outputs = [(await child.communicate())[0] for child in children]
    return sorted(taken for output in outputs for taken in orjson.loads(output))


async def commits(url: str, seconds: float) -> list[float]:
    """Milliseconds of the commit of one row, which nothing durable can be faster than."""
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE IF NOT EXISTS bench_commits (at timestamptz)")
    taken_ms: list[float] = []
    end = time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        await connection.execute("INSERT INTO bench_commits VALUES (now())")
        taken_ms.append((time.perf_counter() - now) * 1000)
    await connection.close()
    return sorted(taken_ms)


async def costs(seconds: float, at_once: int, processes: Sequence[int] = (1, 2)) -> list[Cost]:
    """Of a commit of one row, and of admissions under none, one and three budgets."""
    with tempfile.TemporaryDirectory() as folder:
        server = PostgresServer(Path(folder) / "postgres")
        server.start()
        try:
            url = server.url()
            await migrate(url)
            found = [cost_of("a commit of one row", 1, 1, await commits(url, seconds), seconds)]
            return found + await admissions(url, seconds, at_once, processes)
        finally:
            server.stop()


async def admissions(
    url: str, seconds: float, at_once: int, processes: Sequence[int]
) -> list[Cost]:
    connections = Connections(url)
    records = Budgets(connections, instance_id="bench").records
    found = []
    for count in (0, 1, 3):
        for budget in BUDGETS[:count]:
            await records.set(budget, by="bench")
        for many in processes:
            for each in sorted({many, at_once}):
                taken = await measured(url, many, each, seconds)
                found.append(cost_of(str(count), many, each, taken, seconds))
    await connections.aclose()
    return found


def cost_of(
    budgets: str, processes: int, at_once: int, taken_ms: list[float], seconds: float
) -> Cost:
    """`taken_ms`: in order."""
    p50_ms, p99_ms = taken_ms[len(taken_ms) // 2], taken_ms[int(len(taken_ms) * 0.99)]
    return Cost(budgets, processes, at_once, len(taken_ms) / seconds, p50_ms, p99_ms)


HEADERS = ("budgets", "processes", "concurrent", "admissions/s", "p50 ms", "p99 ms")


def row_of(cost: Cost) -> list[str]:
    figures = f"{cost.per_second:,.0f}", f"{cost.p50_ms:.3f}", f"{cost.p99_ms:.3f}"
    return [cost.budgets, str(cost.processes), str(cost.at_once), *figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--at-once", type=int, default=200)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        taken = asyncio.run(load(given.child, given.at_once, given.seconds, warm=1.0))
        sys.stdout.buffer.write(orjson.dumps(taken))
        return
    found = asyncio.run(costs(given.seconds, given.at_once))
    print("\n".join(describe("", sys.argv)))
    grid.show([grid.Grid("Admissions under budgets", HEADERS, [row_of(one) for one in found])])


if __name__ == "__main__":
    main()
