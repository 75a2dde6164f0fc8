"""The faults by name: on which stage, what is done, and what is promised of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from chaos.limiter import acts, network
from chaos.limiter.scene import Act, Scene, Way
from chaos.limiter.servers import Clock

# Never over; or over only by what a worker holds that stands still, while it does.
Promise = Literal["0 over", "only what stands still"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One sort of fault. Bars are in leases, without the slack; None where nothing is promised.

    recovery: until all permits are used again. grants: until a permit of a new epoch is in use.
    """

    what: str
    act: Act
    way: Way = "straight"
    orders: Mapping[str, Any] = field(default_factory=dict)
    promise: Promise = "0 over"
    recovery: float | None = None
    grants: float | None = None
    append_only: bool = False
    own_clock: bool = False
    rounds: int = 1  # at least: in each of them the act is another

    def missing(self) -> str:
        """Why this machine can't do it; empty where it can."""
        if self.way == "cables":
            return network.missing()
        return Clock.missing() if self.own_clock else ""


STALLED = {"stalled_s": 1.0, "block_ms": 3500.0}
# Longer than a worker stands still: only its being cancelled ends them when it goes on.
LONGER_CALLS = {"call_ms": 9000.0, "hard_ms": 12_000}
# Longer than a process that is cut off may believe in its lease.
LONG_CALLS = {"call_ms": 2000.0, "hard_ms": 5000}

FAULTS: dict[str, Fault] = {
    "calm": Fault("no fault", acts.nothing),
    "storm": Fault("half of all waits and calls cancelled", acts.nothing, orders={"storm": 0.5}),
    "kill": Fault("kill -9 of a worker", acts.kill, recovery=1.0),
    "stop-hold": Fault(
        "a worker stopped for 2.5 leases, hold",
        acts.stop,
        orders={"on_expiry": "hold", "hard_ms": 10_000},
    ),
    "stop-reuse": Fault(
        "a worker stopped for 2.5 leases, reuse",
        acts.stop_and_count_from_it,
        orders=LONGER_CALLS,
        promise="only what stands still",
        recovery=1.0,
    ),
    "block": Fault("an event loop blocked for 2.5 leases", acts.block, orders={"block_ms": 2500.0}),
    "stall": Fault(
        "an event loop stalled until its session is given up",
        acts.block,
        orders={**STALLED, **LONGER_CALLS},
        promise="only what stands still",
    ),
    "stall-hold": Fault(
        "the same, hold", acts.block, orders={**STALLED, "on_expiry": "hold", "hard_ms": 10_000}
    ),
    "restart-empty": Fault("Valkey restarts empty", acts.restart_empty, grants=1.0),
    "restart-stale": Fault(
        "Valkey restarts with an old append-only file",
        acts.restart_stale,
        grants=1.0,
        append_only=True,
    ),
    "pause-valkey": Fault("Valkey stands still", acts.pause_valkey, rounds=3),
    "promote": Fault(
        "the primary dies, its replica is promoted", acts.promote, "replica", grants=1.0
    ),
    "split": Fault("a replica is promoted beside the old primary", acts.split, "replica"),
    "lose-all": Fault("all connections half-open", acts.lose_all_connections, "proxies", rounds=2),
    "lose-one": Fault("one connection half-open", acts.lose_one_connection, "proxies"),
    "cut-off": Fault("one worker cut off", acts.cut_off, "proxies"),
    "cut-off-cancel": Fault(
        "one worker cut off in long calls, cancel",
        acts.cut_off,
        "proxies",
        {**LONG_CALLS, "on_lost": "cancel"},
    ),
    "cut-off-finish": Fault(
        "one worker cut off in long calls, finish",
        acts.cut_off_in_long_calls,
        "proxies",
        LONG_CALLS,
        promise="only what stands still",
    ),
    "slow": Fault("latency of 0 to 60 ms each way", acts.slow_network, "proxies"),
    "clock": Fault("Valkey's clock steps", acts.step_clock, own_clock=True, rounds=6),
    "partition": Fault("the network cable of workers pulled", acts.pull_cables, "cables", rounds=3),
}

# What can be done at the same time as anything else here.
_PARTS: tuple[Act, ...] = (
    acts.kill,
    acts.stop,
    acts.block,
    acts.restart_empty,
    acts.pause_valkey,
    acts.lose_all_connections,
    acts.lose_one_connection,
    acts.cut_off,
    acts.slow_network,
)


async def pair(scene: Scene, name: str, number: int) -> int:
    """Two different faults at once, the second up to a lease after the first, to two workers."""
    parts = [*_PARTS, acts.step_clock_far] if scene.clock is not None else list(_PARTS)
    first, second = scene.chance.sample(parts, 2)
    other = scene.chance.choice([one for one in scene.names if one != name])
    scene.deeds.append(f"{first.__name__}({name}) and {second.__name__}({other})")

    async def later() -> int:
        await asyncio.sleep(scene.chance.uniform(0.0, scene.lease_s))
        return await second(scene, other, scene.chance.randrange(3))

    async with asyncio.TaskGroup() as group:
        ends = [group.create_task(later())]
        ends.append(group.create_task(first(scene, name, number)))  # type: ignore[arg-type]
    return max(end.result() for end in ends)


FAULTS["pairs"] = Fault(
    "two of them at once, by chance",
    pair,
    "proxies",
    {"block_ms": 2500.0},
    promise="only what stands still",
    own_clock=Clock.missing() == "",
)
