"""The scenarios of a whole deployment at full size: two API processes, two workers."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from chaos.history import from_emulator
from tests import scenarios
from tests.fleet import LIMITS, Fleet
from tests.load import Load
from tidegate.checker import in_flight

Fault = Callable[[Fleet], Awaitable[None]]


def say(line: str) -> None:
    sys.stdout.write(f"\n  {line}\n")


async def test_200_submits_and_20_streams_at_once(tmp_path: Path) -> None:
    async with Fleet(tmp_path) as fleet:
        await scenarios.mixed_load(fleet, submits=200, streams=20)
        # The emulator's log, judged call by call, says what its counters say.
        events, truth = from_emulator(await fleet.control.calls()), await fleet.truth()
        for kind, limit in LIMITS.items():
            peak = in_flight(events, f"kind:{kind}").peak()
            assert peak == truth[kind].max_in_flight == limit


async def test_kill_9_of_a_worker_and_an_api(tmp_path: Path) -> None:
    async with Fleet(tmp_path) as fleet:
        await scenarios.kill_worker_and_api(fleet, submits=200, streams=20)


async def test_valkey_killed_and_restarted_empty(tmp_path: Path) -> None:
    async with Fleet(tmp_path) as fleet:
        await scenarios.valkey_restarts_empty(fleet, submits=200, streams=20)


async def test_valkey_stopped_for_20_s_closed(tmp_path: Path) -> None:
    async with Fleet(tmp_path) as fleet:
        await scenarios.valkey_away_closed(fleet, submits=200, away_s=20)


async def test_valkey_stopped_for_20_s_local(tmp_path: Path) -> None:
    async with Fleet(tmp_path, settings={"WHEN_VALKEY_AWAY": "local"}) as fleet:
        await scenarios.valkey_away_local(fleet, submits=400, away_s=20)


async def test_postgres_stopped_for_20_s(tmp_path: Path) -> None:
    async with Fleet(tmp_path) as fleet:
        await scenarios.postgres_away(fleet, submits=200, away_s=20)


async def test_1000_streams_cancelled_at_random_moments(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    say(f"seed {seed}")
    async with Fleet(tmp_path, workers=0) as fleet:
        took_ms = await scenarios.cancelled_streams(fleet, streams=1000, seed=seed)
    say(f"provider idle {took_ms:.0f} ms after the last client left")
    assert took_ms <= 100


async def test_sigterm_of_a_worker_and_an_api_under_load(tmp_path: Path) -> None:
    async with Fleet(tmp_path) as fleet:
        await scenarios.sigterm_under_load(fleet, submits=200, streams=20)


async def _kill_worker(fleet: Fleet) -> None:
    fleet.workers.pop(0).kill()
    fleet.start_worker()


async def _restart_valkey(fleet: Fleet) -> None:
    await asyncio.to_thread(fleet.valkey.kill)
    await asyncio.to_thread(fleet.valkey.start)


async def _restart_postgres(fleet: Fleet) -> None:
    await asyncio.to_thread(fleet.postgres.kill)
    await asyncio.to_thread(fleet.postgres.start)


async def _pause_valkey(fleet: Fleet) -> None:
    fleet.valkey.pause()
    await asyncio.sleep(2)
    fleet.valkey.resume()


FAULTS: dict[str, Fault] = {
    "a worker killed": _kill_worker,
    "Valkey restarted empty": _restart_valkey,
    "PostgreSQL crashed": _restart_postgres,
    "Valkey frozen for 2 s": _pause_valkey,
}


@pytest.mark.parametrize("rounds", [6])
async def test_random_pairs_of_faults_lose_no_job(tmp_path: Path, rounds: int) -> None:
    """Two faults close together. Never over; every job ends; a repeat only after a kill."""
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    say(f"seed {seed}")
    async with Fleet(tmp_path) as fleet:
        await fleet.control.set_behaviour(**scenarios.SLOW)
        killed_at_ns: list[int] = []
        for number in range(rounds):
            pair = rng.sample(sorted(FAULTS), 2)
            say(" and ".join(pair))
            load = Load(fleet, f"r{number}x")
            await load.submit(60)
            for name in pair:
                await asyncio.sleep(rng.uniform(0.1, 1.0))
                await FAULTS[name](fleet)
                if FAULTS[name] is _kill_worker:
                    killed_at_ns.append(time.time_ns())
            await load.assert_all_succeeded()
            await fleet.assert_never_over()
            await load.assert_called_once(killed_at_ns=killed_at_ns)


@pytest.mark.parametrize("on_expiry", ["hold", "reuse"])
async def test_a_worker_frozen_for_10_s(tmp_path: Path, on_expiry: str) -> None:
    async with Fleet(tmp_path, settings={"ON_EXPIRY": on_expiry}) as fleet:
        await scenarios.paused_worker(fleet, submits=400, paused_s=10, over=on_expiry == "reuse")
