"""`python -m chaos.soak --minutes 30`: half of the measured capacity, and a fault every 20 s.

Two APIs and two workers on servers of their own; the emulated provider's own log is the truth.
Ends with a table, and with 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from chaos.soak.clients import Clients
from chaos.soak.faults import FAULTS
from chaos.soak.judge import Served, problems, settle
from chaos.soak.watch import Watch
from tests.fleet import Fleet

LIMITS = {"text_only": 24, "multi_modal": 6, "image_generation": 2}
PACE = {"first_byte_ms": {"*": {"uniform": [30, 90]}}, "between_ms": 5, "chunks": 6}
_SETTINGS = {
    "RATE_LIMITS": '{"text_only": 24, "multi_modal": 6, "image_generation": 2}',
    "SEMAPHORE_TIMEOUT": "3",
    "CLASSIFIER": "keywords",
    "LOG_LEVEL": "warning",
}
_AT_ONCE = 48
_MEASURED_S = 20.0
_FAULT_EVERY_S = 20.0


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, help="calls a second, instead of half the capacity")
    parser.add_argument("--seed", type=int, help="of what is left to chance")
    return parser.parse_args()


async def capacity(clients: Clients) -> float:
    """Calls a second of as many clients as keep everything busy."""
    until = time.monotonic() + _MEASURED_S
    before = len(clients.calls)

    async def client() -> None:
        while time.monotonic() < until:
            await clients.one()

    await asyncio.gather(*(client() for _ in range(_AT_ONCE)))
    return (len(clients.calls) - before) / _MEASURED_S


async def steadily(clients: Clients, rate: float, until_s: float) -> None:
    """An open loop: calls begin at chance moments, whatever becomes of the earlier ones."""
    under_way: set[asyncio.Task[object]] = set()
    due = time.monotonic()
    while due < until_s:
        due += clients.chance.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(clients.one())
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)


async def one_fault_after_another(fleet: Fleet, chance: random.Random, done: Counter[str]) -> None:
    order: list[str] = []
    while True:
        await asyncio.sleep(_FAULT_EVERY_S)
        order = order or chance.sample(list(FAULTS), len(FAULTS))
        name = order.pop()
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        await FAULTS[name](fleet, chance)
        done[name] += 1


async def main() -> int:
    arguments = read_arguments()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        async with Fleet(Path(folder), apis=2, workers=2, settings=_SETTINGS) as fleet:
            return await soak(fleet, arguments, random.Random(seed))


async def soak(fleet: Fleet, arguments: argparse.Namespace, chance: random.Random) -> int:
    await fleet.control.set_behaviour(**PACE)
    clients, watch, served = Clients(fleet, chance), Watch(fleet), Served(fleet)
    reading = asyncio.create_task(served.run())
    most = await capacity(clients)
    rate = arguments.rate or most / 2
    print(f"{most:.0f} calls a second at most; {rate:.0f} for {arguments.minutes:g} minutes")
    done: Counter[str] = Counter()
    until_s = time.monotonic() + arguments.minutes * 60
    beside = [
        asyncio.create_task(watch.run()),
        asyncio.create_task(one_fault_after_another(fleet, chance, done)),
    ]
    await steadily(clients, rate, until_s)
    for task in (*beside, reading):
        task.cancel()
    ended = await asyncio.gather(*beside, reading, return_exceptions=True)
    found = [f"a task of the soak failed: {one!r}" for one in ended if isinstance(one, Exception)]
    await settle(fleet)
    found += await problems(fleet, clients, served, watch, LIMITS)
    _tell(clients, watch, done, found)
    return 1 if found else 0


def _tell(clients: Clients, watch: Watch, done: Counter[str], found: list[str]) -> None:
    print("\ncalls     ", ", ".join(f"{end} {count}" for end, count in clients.ends().items()))
    print("jobs      ", len(clients.jobs))
    print("faults    ", ", ".join(f"{name} {count}" for name, count in done.items()))
    for name, seen in watch.seen.items():
        before, after = seen.growth()
        print(f"{name:26} {before:7.0f} -> {after:7.0f}")
    for problem in found[:50]:
        print("BROKEN", problem)
    print(f"{len(found)} promises broken" if found else "every promise kept", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(asyncio.run(main()))
