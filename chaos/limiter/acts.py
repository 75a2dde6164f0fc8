"""What can be done to workers, servers and the network between them.

Each act does one fault to one worker (or to what all share), and returns the time from which
recovery is counted: of a fault that happens in a moment that moment, of one that lasts its end.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time

from chaos.limiter.scene import Scene, follow, say

# How many leases a fault lasts that is to outlast them.
LONG = 2.5
# Pools keep what is counted for an hour or two: longer steps let it expire while it is in use.
CLOCK_STEPS_MS = (450, 10_000, -10_000, 4_000_000, -4_000_000, 8_000_000)


def now() -> int:
    return time.monotonic_ns()


async def nothing(scene: Scene, name: str, number: int) -> int:
    await asyncio.sleep(scene.lease_s)
    return now()


async def rest(scene: Scene, name: str, number: int) -> int:
    await asyncio.sleep(10.0)
    return now()


async def kill(scene: Scene, name: str, number: int) -> int:
    since = now()
    scene.fleet.kill(name)
    scene.launch(name)
    return since


async def stop(scene: Scene, name: str, number: int) -> int:
    """SIGSTOP for longer than the lease, then SIGCONT."""
    with scene.standing_still(name):
        process = scene.fleet.processes[name]
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(LONG * scene.lease_s)
        process.send_signal(signal.SIGCONT)
    return now()


async def stop_and_count_from_it(scene: Scene, name: str, number: int) -> int:
    """The same, but recovery is that of the others, from SIGSTOP."""
    since = now()
    await stop(scene, name, number)
    return since


async def block(scene: Scene, name: str, number: int) -> int:
    """The worker's event loop does nothing for its `block_ms`; its threads go on."""
    with scene.standing_still(name):
        scene.fleet.signal(name, signal.SIGUSR1)
        await asyncio.sleep(scene.orders["block_ms"] / 1000)
    return now()


async def restart_empty(scene: Scene, name: str, number: int) -> int:
    await asyncio.to_thread(scene.server.kill)
    await asyncio.to_thread(scene.server.start)
    return now()


async def take_away(scene: Scene, name: str, number: int) -> int:
    """Valkey is not there for longer than the lease, and comes back empty."""
    await asyncio.to_thread(scene.server.kill)
    await asyncio.sleep(LONG * scene.lease_s)
    await asyncio.to_thread(scene.server.start)
    return now()


async def restart_stale(scene: Scene, name: str, number: int) -> int:
    """Valkey comes back with what its append-only file held some leases ago."""
    await asyncio.to_thread(scene.server.copy_append_only)
    await asyncio.sleep(scene.chance.uniform(0.2, 2.0) * scene.lease_s)
    await asyncio.to_thread(scene.server.kill)
    await asyncio.to_thread(scene.server.put_back_copy)
    await asyncio.to_thread(scene.server.start)
    return now()


async def pause_valkey(scene: Scene, name: str, number: int) -> int:
    """Shorter than the lease, about as long, and longer."""
    scene.server.pause()
    await asyncio.sleep((0.5, 1.0, LONG)[number % 3] * scene.lease_s)
    scene.server.resume()
    return now()


async def promote(scene: Scene, name: str, number: int) -> int:
    """The primary dies, its replica takes its place; the dead one returns as a replica."""
    assert scene.replica is not None
    old, new = scene.server, scene.replica
    since = now()
    await asyncio.to_thread(old.kill)
    await _take_over(scene)
    for proxy in scene.proxies.values():
        proxy.switch(new.port)
    await asyncio.to_thread(old.start)
    await follow(scene)
    return since


async def split(scene: Scene, name: str, number: int) -> int:
    """The replica is promoted while the old primary lives, and half of the workers still use it."""
    assert scene.replica is not None
    new = scene.replica
    scene.links[0].swallow()
    # As long as the sentinels take to agree, and longer than the primary goes on writing.
    await asyncio.sleep(3.0)
    await _take_over(scene)
    behind = scene.chance.sample(scene.names, scene.size.workers // 2)
    for one in scene.names:
        if one not in behind:
            scene.proxies[one].switch(new.port)
    await asyncio.sleep(2 * scene.lease_s)
    for one in behind:
        scene.proxies[one].switch(new.port)
    since = now()
    scene.links[0].forward()
    await follow(scene)
    return since


async def _take_over(scene: Scene) -> None:
    assert scene.replica is not None
    scene.server, scene.replica = scene.replica, scene.server
    await say(scene.server, "REPLICAOF", "NO", "ONE")


async def lose_all_connections(scene: Scene, name: str, number: int) -> int:
    """Nobody's bytes arrive, and nobody is told; new connections get no answer either."""
    for proxy in scene.proxies.values():
        proxy.swallow()
    await asyncio.sleep((LONG, 0.5)[number % 2] * scene.lease_s)
    for proxy in scene.proxies.values():
        proxy.forward()
    return now()


async def lose_one_connection(scene: Scene, name: str, number: int) -> int:
    """One of the worker's connections goes silent; the others, and new ones, work."""
    since = now()
    scene.proxies[name].lose_one(scene.chance)
    return since


async def close_connections(scene: Scene, name: str, number: int) -> int:
    """Every connection is closed, as by a proxy that restarts; new ones work at once."""
    since = now()
    for proxy in scene.proxies.values():
        proxy.cut()
    return since


async def cut_off(scene: Scene, name: str, number: int) -> int:
    """One worker alone loses its way to Valkey for longer than the lease."""
    scene.proxies[name].swallow()
    await asyncio.sleep(LONG * scene.lease_s)
    scene.proxies[name].forward()
    return now()


async def cut_off_in_long_calls(scene: Scene, name: str, number: int) -> int:
    """The same; what it runs may go on until its calls end."""
    call_s = scene.orders["call_ms"] / 1000
    with scene.standing_still(name, longer_s=max(0.0, call_s - LONG * scene.lease_s)):
        return await cut_off(scene, name, number)


async def slow_network(scene: Scene, name: str, number: int) -> int:
    chance = random.Random(scene.chance.random())
    for proxy in scene.proxies.values():
        proxy.delay_s = lambda: chance.uniform(0.0, 0.06)
    await asyncio.sleep(2 * scene.lease_s)
    for proxy in scene.proxies.values():
        proxy.delay_s = None
    return now()


async def step_clock(scene: Scene, name: str, number: int) -> int:
    """Valkey's wall clock jumps, forward and back, by some ms, seconds and hours."""
    assert scene.clock is not None
    since = now()
    scene.clock.step_ms(CLOCK_STEPS_MS[number % len(CLOCK_STEPS_MS)])
    return since


async def step_clock_visibly(scene: Scene, name: str, number: int) -> int:
    """The same without the step of less than half a lease, which nobody can tell from waiting: it
    shortens the window of a rate."""
    return await step_clock(scene, name, 1 + number % (len(CLOCK_STEPS_MS) - 1))


async def step_clock_some_seconds(scene: Scene, name: str, number: int) -> int:
    assert scene.clock is not None
    since = now()
    scene.clock.step_ms(scene.chance.choice((10_000, -10_000)))
    return since


async def pull_cables(scene: Scene, name: str, number: int) -> int:
    """One worker, two, or all lose the network for longer than the lease."""
    first = scene.names.index(name)
    count = (1, 2, scene.size.workers)[number % 3]
    names = (scene.names[first:] + scene.names[:first])[:count]
    for one in names:
        await asyncio.to_thread(scene.cables[one].pull)
    await asyncio.sleep(LONG * scene.lease_s)
    for one in names:
        await asyncio.to_thread(scene.cables[one].put_back)
    return now()
