"""What is done to the deployment, one thing after the other in an order left to chance.

Invariant: after each the same number of processes is up as before. One API and one worker, the
oldest, are never killed: they are those whose memory is watched.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable

from tests.fleet import Fleet
from tests.waiting import work_for

Fault = Callable[[Fleet, random.Random], Awaitable[None]]
PAUSE_S = 1.5  # less than the lease: who is away for longer is over by what it held, as documented
OUTAGE_S = 3.0


class Kills:
    """When each API was killed, by its URL."""

    def __init__(self) -> None:
        self.at_s: dict[str, float] = {}


KILLS = Kills()


async def kill_worker(fleet: Fleet, chance: random.Random) -> None:
    victim = chance.choice(fleet.workers[1:])
    fleet.workers.remove(victim)
    victim.kill()
    fleet.start_worker()


async def _another_api(fleet: Fleet) -> None:
    """Offered to clients once it is ready, as a balancer would."""
    url = fleet.start_api()
    child = fleet.apis.pop(url)
    await fleet.ready(url, child)
    fleet.apis[url] = child


async def kill_api(fleet: Fleet, chance: random.Random) -> None:
    url = chance.choice(list(fleet.apis)[1:])
    KILLS.at_s[url] = time.monotonic()
    fleet.apis.pop(url).kill()
    await _another_api(fleet)


async def end_api(fleet: Fleet, chance: random.Random) -> None:
    """SIGTERM: what runs is finished, so that no client notices."""
    url = chance.choice(list(fleet.apis)[1:])
    await _another_api(fleet)
    leaving = fleet.apis.pop(url)
    leaving.signal(signal.SIGTERM)
    await leaving.ended()


async def pause_api(fleet: Fleet, chance: random.Random) -> None:
    paused = chance.choice(list(fleet.apis.values()))
    paused.signal(signal.SIGSTOP)
    await work_for(PAUSE_S)
    paused.signal(signal.SIGCONT)


async def pause_worker(fleet: Fleet, chance: random.Random) -> None:
    paused = chance.choice(fleet.workers)
    paused.signal(signal.SIGSTOP)
    await work_for(PAUSE_S)
    paused.signal(signal.SIGCONT)


async def valkey_restarts_empty(fleet: Fleet, _chance: random.Random) -> None:
    await asyncio.to_thread(fleet.valkey.kill)
    await asyncio.to_thread(fleet.valkey.start)


async def valkey_away(fleet: Fleet, _chance: random.Random) -> None:
    await asyncio.to_thread(fleet.valkey.stop)
    await work_for(OUTAGE_S)
    await asyncio.to_thread(fleet.valkey.start)


async def postgres_away(fleet: Fleet, _chance: random.Random) -> None:
    await asyncio.to_thread(fleet.postgres.stop)
    await work_for(OUTAGE_S)
    await asyncio.to_thread(fleet.postgres.start)


async def provider_fails(fleet: Fleet, _chance: random.Random) -> None:
    for fault in ("unavailable", "throttled", "cut_mid_stream", "garbage"):
        await fleet.control.set_fault(fault, count=5)


async def provider_is_slow(fleet: Fleet, _chance: random.Random) -> None:
    await fleet.control.set_fault("slow_first_token", count=20)


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        *(kill_worker, kill_api, end_api, pause_api, pause_worker, valkey_restarts_empty),
        *(valkey_away, postgres_away, provider_fails, provider_is_slow),
    )
}
