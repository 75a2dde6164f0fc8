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
from pathlib import Path

import orjson

from bench.machine import describe
from tidegate.call import CallCost, Caller, Charge, UsageState, new_id
from tidegate.embedded.servers import PostgresServer
from tidegate.store.budgets import Budget, Budgets
from tidegate.store.database import Connections, migrate

CALLER = Caller("acme")
COST = CallCost(800, 100, 400, 50)
TOLD = Charge(UsageState.TOLD, cost_micros=300)
BUDGETS = (
    Budget("all", "usd", 10**15, "month"),
    Budget("tenants", "usd", 10**15, "day", each=("tenant",)),
    Budget("tokens", "tokens", 10**15, "day", tenant="acme"),
)


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


async def table(seconds: float, at_once: int) -> None:
    print("\n".join(describe("", sys.argv)))
    print("| budgets | processes | at once | admissions/s | p50 ms | p99 ms |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        server = PostgresServer(Path(folder) / "postgres")
        server.start()
        try:
            url = server.url()
            await migrate(url)
            await rows(url, seconds, at_once)
        finally:
            server.stop()


async def rows(url: str, seconds: float, at_once: int) -> None:
    connections = Connections(url)
    records = Budgets(connections, instance_id="bench").records
    for count in (0, 1, 3):
        for budget in BUDGETS[:count]:
            await records.set(budget, by="bench")
        for processes in (1, 2):
            for each in sorted({1 * processes, at_once}):
                taken = await measured(url, processes, each, seconds)
                p50, p99 = taken[len(taken) // 2], taken[int(len(taken) * 0.99)]
                rate = len(taken) / seconds
                print(f"| {count} | {processes} | {each} | {rate:,.0f} | {p50:.3f} | {p99:.3f} |")
    await connections.aclose()


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
    asyncio.run(table(given.seconds, given.at_once))


if __name__ == "__main__":
    main()
