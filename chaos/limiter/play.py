"""Plays one fault on its stage, over and over, and judges what the truth saw."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from chaos.limiter.faults import FAULTS, MIXED, Fault
from chaos.limiter.report import WAKE_S, Outcome, Round, judge, since_start
from chaos.limiter.scene import BACK_S, Scene, Size, open_scene
from tests.waiting import wait_until
from tidegate.checker import first_of_new_epoch_s


async def play(
    name: str,
    size: Size,
    seconds: float,
    chance: random.Random,
    *,
    rounds: int | None = None,
    forks: bool = False,
) -> Outcome:
    """Do the fault for `seconds`, and at least for its `rounds`, or those given; `forks` as of
    `Fleet`."""
    fault = FAULTS[name]
    size = replace(size, **fault.size)
    outcome = Outcome(name, fault.what, fault.promise, size.limit, left_out=fault.missing())
    if outcome.left_out:
        return outcome
    async with open_scene(
        fault.way,
        size,
        {**MIXED, **fault.orders},
        chance,
        append_only=fault.append_only,
        own_clock=fault.own_clock,
        forks=forks,
    ) as scene:
        try:
            await _rounds(scene, fault, seconds, rounds or fault.rounds, outcome)
            outcome.problems += await scene.finish()
        except AssertionError as error:
            outcome.problems.append(str(error))
        judge(fault, outcome, scene.truth.log, scene.frozen, size, scene.orders_of("w0"))
        if outcome.problems and scene.deeds:
            deeds = [f"{since_start(at, scene.truth.log)}: {did}" for at, did in scene.deeds]
            outcome.problems += deeds
    return outcome


async def _rounds(
    scene: Scene, fault: Fault, seconds: float, at_least: int, outcome: Outcome
) -> None:
    loop = asyncio.get_running_loop()
    end_s, number = loop.time() + seconds, 0
    while number < at_least or loop.time() < end_s:
        await asyncio.sleep(scene.chance.uniform(0.2, 0.2 + scene.lease_s / 2))
        since_ns = await fault.act(scene, scene.busiest(), number)
        if scene.frozen:
            # Seen long enough to tell whether what stood still has really ended its calls.
            await asyncio.sleep(2 * WAKE_S)
        recovery_s = await scene.recovered(since_ns)
        grants_s = await _granted_again(scene, fault, since_ns)
        outcome.rounds.append(Round(recovery_s, grants_s))
        number += 1


async def _granted_again(scene: Scene, fault: Fault, since_ns: int) -> float | None:
    """Seconds until a permit of a new epoch is in use, if the fault must lead to one."""
    if fault.grants is None:
        return None

    def granted() -> float | None:
        return first_of_new_epoch_s(scene.truth.log, since_ns)

    return float(await wait_until(granted, BACK_S, "a permit of a new epoch"))
