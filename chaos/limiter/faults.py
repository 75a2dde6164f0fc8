"""The faults by name: on which stage, what is done, and what is promised of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from chaos.limiter import acts, network
from chaos.limiter.scene import RATE, Act, Scene, Way
from chaos.limiter.servers import Clock
from chaos.limiter.worker import LIMIT

# Never over; or over only by the permits of a paused worker, while it is paused.
Promise = Literal["0 over", "paused processes only"]


class Bar(NamedTuple):
    """How long something may take: leases and seconds, added."""

    leases: float
    seconds: float


WITHIN_A_LEASE = Bar(1.0, 0.3)


@dataclass(frozen=True, slots=True)
class Fault:
    """One sort of fault. Bars are None where nothing is promised.

    recovery: until all permits are used again. grants: until a permit of a new epoch is in use.
    most_overtaken: by how many waiters that had asked before a call of the same process may come
    first. fair: how far from the weights shares may be.
    """

    what: str
    act: Act
    way: Way = "straight"
    orders: Mapping[str, Any] = field(default_factory=dict)
    promise: Promise = "0 over"
    recovery: Bar | None = None
    grants: Bar | None = None
    most_overtaken: int | None = None
    fair: float | None = None
    size: Mapping[str, Any] = field(default_factory=dict)
    append_only: bool = False
    own_clock: bool = False
    rounds: int = 1  # at least: in each of them the act is another

    def missing(self) -> str:
        """Why this machine can't do it; empty where it can."""
        if self.way == "cables":
            return network.missing()
        return Clock.missing() if self.own_clock else ""


WEIGHTS = {"a": 1, "b": 2, "c": 4}
IMAGE, TOTAL = "kind:image_generation", "pool:total"
# What the tasks of every scene ask for: two kinds of calls, of three tenants each, which share a
# third limit. There is room in it for both, so that `LIMIT` can be used up.
MIXED: dict[str, Any] = {
    "limits": {IMAGE: 6, TOTAL: 22},
    "demands": [
        {"limits": [limit, TOTAL], "tenant": tenant}
        for limit in (LIMIT, LIMIT, IMAGE)
        for tenant in ("a", "b", "c")
    ],
    "policy": {"weights": WEIGHTS},
}
# Calls as many as two rates let in, one of requests and one of tokens.
RATES: dict[str, Any] = {
    "call_ms": 20.0,
    "limits": {RATE: ["rate", 60, 2000, "requests"], "tpm:x": ["rate", 6000, 2000, "tokens"]},
    "demands": [
        {"limits": [LIMIT, RATE], "tenant": "a"},
        {"limits": [LIMIT, "tpm:x"], "tenant": "b", "tokens": 100},
        {"limits": [LIMIT, "tpm:x"], "tenant": "b", "tokens": 250},
    ],
}
FAIR: dict[str, Any] = {
    "limits": {},
    "demands": [{"limits": [LIMIT], "tenant": tenant} for tenant in WEIGHTS],
}
IN_ORDER: dict[str, Any] = {"policy": {"hand_off": False}}
REAPING: dict[str, Any] = {"policy": {"weights": WEIGHTS, "reap_closed_ms": 200}}
STALLED = {"stalled_s": 1.0, "block_ms": 3500.0}
# Longer than a worker is paused: they end only by cancellation when it resumes.
LONGER_CALLS = {"call_ms": 9000.0, "hard_ms": 12_000}
# Longer than a process that is cut off may believe in its lease.
LONG_CALLS = {"call_ms": 2000.0, "hard_ms": 5000}

FAULTS: dict[str, Fault] = {
    "calm": Fault("no fault", acts.nothing),
    "storm": Fault("half of all waits and calls cancelled", acts.nothing, orders={"storm": 0.5}),
    # A grant that is pushed and a later one in an answer come on two connections: they may cross.
    "order": Fault("no fault, hand-off off", acts.nothing, orders=IN_ORDER, most_overtaken=3),
    "fair": Fault("no fault, tenants of weights 1, 2 and 4", acts.rest, orders=FAIR, fair=0.05),
    "kill": Fault("kill -9 of a worker", acts.kill, recovery=WITHIN_A_LEASE),
    "kill-reap": Fault(
        "the same, closed connections reaped", acts.kill, orders=REAPING, recovery=Bar(0.0, 0.5)
    ),
    "stop-hold": Fault(
        "a worker stopped for 2.5 leases, hold",
        acts.stop,
        orders={"on_expiry": "hold", "hard_ms": 10_000},
    ),
    "stop-reuse": Fault(
        "a worker stopped for 2.5 leases, reuse",
        acts.stop_and_count_from_it,
        orders=LONGER_CALLS,
        promise="paused processes only",
        recovery=WITHIN_A_LEASE,
    ),
    "block": Fault("an event loop blocked for 2.5 leases", acts.block, orders={"block_ms": 2500.0}),
    "stall": Fault(
        "an event loop stalled until its session is given up",
        acts.block,
        orders={**STALLED, **LONGER_CALLS},
        promise="paused processes only",
    ),
    "stall-hold": Fault(
        "the same, hold", acts.block, orders={**STALLED, "on_expiry": "hold", "hard_ms": 10_000}
    ),
    "restart-empty": Fault("Valkey restarts empty", acts.restart_empty, grants=WITHIN_A_LEASE),
    "restart-roster": Fault(
        "the same, lease of 5 s, everybody back",
        acts.restart_empty,
        grants=Bar(0.0, 1.0),
        size={"lease_ms": 5000},
    ),
    "restart-stale": Fault(
        "Valkey restarts with an old append-only file",
        acts.restart_stale,
        grants=WITHIN_A_LEASE,
        append_only=True,
    ),
    "away": Fault("Valkey away for 2.5 leases, closed", acts.take_away),
    "away-local": Fault(
        "the same, local share", acts.take_away, orders={"when_away": "local", "on_lost": "cancel"}
    ),
    "pause-valkey": Fault("Valkey paused", acts.pause_valkey, rounds=3),
    "promote": Fault(
        "the primary dies, its replica is promoted", acts.promote, "replica", grants=WITHIN_A_LEASE
    ),
    "split": Fault("a replica is promoted beside the old primary", acts.split, "replica"),
    "lose-all": Fault("all connections half-open", acts.lose_all_connections, "proxies", rounds=2),
    "lose-one": Fault("one connection half-open", acts.lose_one_connection, "proxies"),
    "close": Fault(
        "all connections closed, closed ones reaped",
        acts.close_connections,
        "proxies",
        REAPING,
    ),
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
        promise="paused processes only",
    ),
    "slow": Fault("latency of 0 to 60 ms each way", acts.slow_network, "proxies"),
    "clock": Fault("Valkey's clock steps", acts.step_clock, own_clock=True, rounds=6),
    "rate": Fault("rates, no fault", acts.nothing, orders=RATES),
    "rate-kill": Fault("rates, kill -9 of a worker", acts.kill, orders=RATES),
    "rate-stop": Fault(
        "rates, a worker stopped", acts.stop, orders=RATES, promise="paused processes only"
    ),
    "rate-block": Fault(
        "rates, an event loop blocked", acts.block, orders={**RATES, "block_ms": 2500.0}
    ),
    "rate-restart": Fault("rates, Valkey restarts empty", acts.restart_empty, orders=RATES),
    "rate-pause": Fault("rates, Valkey paused", acts.pause_valkey, orders=RATES, rounds=3),
    "rate-clock": Fault(
        "rates, Valkey's clock steps",
        acts.step_clock_visibly,
        orders=RATES,
        own_clock=True,
        rounds=5,
    ),
    "rate-cut-off": Fault("rates, one worker cut off", acts.cut_off, "proxies", RATES),
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
    parts = [*_PARTS, acts.step_clock_some_seconds] if scene.clock is not None else list(_PARTS)
    first, second = scene.chance.sample(parts, 2)
    other = scene.chance.choice([one for one in scene.names if one != name])
    did = f"{first.__name__}({name}) and {second.__name__}({other})"
    scene.deeds.append((acts.now(), did))

    async def later() -> int:
        await asyncio.sleep(scene.chance.uniform(0.0, scene.lease_s))
        return await second(scene, other, scene.chance.randrange(3))

    async with asyncio.TaskGroup() as group:
        ends = [group.create_task(later())]
        ends.append(group.create_task(first(scene, name, number)))  # type: ignore[arg-type]
    return max(end.result() for end in ends)


_TWO = Fault(
    "two of them at once, by chance",
    pair,
    "proxies",
    {"block_ms": 2500.0},
    promise="paused processes only",
    own_clock=Clock.missing() == "",
)
FAULTS["pairs"] = _TWO
FAULTS["pairs-hold"] = replace(
    _TWO,
    what="the same, hold",
    orders={"block_ms": 2500.0, "on_expiry": "hold", "hard_ms": 10_000},
)
FAULTS["rate-pairs"] = replace(
    _TWO, what="rates, two of them at once", orders={"block_ms": 2500.0, **RATES}
)
