"""Several processes, some of which are killed or paused; the truth is counted at the far end."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from chaos.limiter.fleet import Fleet
from chaos.limiter.truth import Truth
from chaos.limiter.worker import Orders
from tests.integration.limiter.makers import LIMIT, Body, Maker
from tests.waiting import wait_until
from tidegate.embedded.servers import ValkeyServer
from tidegate.errors import LeaseLost
from tidegate.limiter.limiter import Limiter
from tidegate.limiter.policy import PoolPolicy
from tidegate.limiter.session import now_ms

BOUND = 5
LEASE_MS = 600


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet(forks=True) as fleet:
        yield fleet


async def launch(
    fleet: Fleet, truth: Truth, url: str, pool: str, count: int = 3, calls: int = 20, **options: Any
) -> None:
    """Start workers and wait until each makes calls."""
    options = {"limit": BOUND, "lease_ms": LEASE_MS, "tasks": 8} | options
    for number in range(count):
        fleet.start(Orders(url, pool, truth.port, f"w{number}", **options))
    await wait_until(lambda: len(truth.by_worker) == count, 30, "all workers are there")
    await wait_until(lambda: truth.total >= calls, 20, f"{calls} calls")


async def until_more(truth: Truth, count: int, timeout_s: float = 20.0) -> None:
    """Wait until so many more calls have been made."""
    goal = truth.total + count
    await wait_until(lambda: truth.total >= goal, timeout_s, f"{count} more calls")


async def finish(fleet: Fleet, maker: Maker, url: str) -> None:
    """End the workers, and wait until the pool has forgotten them."""
    watcher = await maker(url, BOUND, lease_ms=LEASE_MS)
    for name in list(fleet.processes):
        fleet.kill(name)

    async def forgotten() -> bool:
        snapshot = await watcher.snapshot()
        view = snapshot.limits[LIMIT]
        return snapshot.sessions == 1 and view.used == 0 and view.waiting == 0

    await wait_until(forgotten, 20, "the pool is empty")


async def test_three_processes_use_all_permits_and_never_more(
    fleet: Fleet, truth: Truth, maker: Maker, valkey_url: str, pool: str
) -> None:
    await launch(fleet, truth, valkey_url, pool, storm=0.3)
    await until_more(truth, 300)
    assert truth.peak == BOUND
    await finish(fleet, maker, valkey_url)


async def test_the_permits_of_a_killed_process_are_back_within_the_lease(
    fleet: Fleet, truth: Truth, maker: Maker, valkey_url: str, pool: str
) -> None:
    # The victim holds all permits in calls that never end.
    await launch(fleet, truth, valkey_url, pool, count=1, calls=BOUND, call_ms=600_000.0)
    survivor = await maker(valkey_url, BOUND, lease_ms=LEASE_MS)
    bodies = [Body(survivor) for _ in range(BOUND)]
    assert survivor.local_state().held[LIMIT] == 0
    killed = now_ms()
    fleet.kill("w0")
    for body in bodies:
        await body.until_admitted()
    assert now_ms() - killed <= LEASE_MS + 300
    for body in bodies:
        await body.end()


async def test_a_killed_process_with_waiters_does_not_swallow_permits(
    fleet: Fleet, truth: Truth, maker: Maker, valkey_url: str, pool: str
) -> None:
    await launch(fleet, truth, valkey_url, pool, tasks=40)
    fleet.kill("w0")
    await until_more(truth, 200)
    assert truth.peak == BOUND
    await finish(fleet, maker, valkey_url)


async def test_never_over_and_no_lease_lost_when_valkey_restarts_empty(
    fleet: Fleet, truth: Truth, maker: Maker, own_valkey: ValkeyServer, pool: str
) -> None:
    await launch(fleet, truth, own_valkey.url, pool, call_ms=100.0)
    for _ in range(2):
        own_valkey.kill()
        own_valkey.start()
        await until_more(truth, 40)
    assert truth.peak == BOUND
    assert truth.leases_lost == 0
    await finish(fleet, maker, own_valkey.url)


async def test_a_paused_process_with_hold_is_never_over_and_its_bodies_lose_their_lease(
    fleet: Fleet, truth: Truth, maker: Maker, valkey_url: str, pool: str
) -> None:
    await launch(fleet, truth, valkey_url, pool, on_expiry="hold", hard_ms=30_000)
    await wait_until(lambda: truth.by_worker["w0"] > 0)
    fleet.signal("w0", signal.SIGSTOP)
    stopped = now_ms()
    await wait_until(lambda: now_ms() - stopped > 2 * LEASE_MS)
    held_over = truth.by_worker["w0"]
    fleet.signal("w0", signal.SIGCONT)
    if held_over:
        await wait_until(lambda: truth.leases_lost >= held_over, what="the bodies were told")
    await until_more(truth, 100)
    assert truth.peak == BOUND
    await finish_hold(fleet, truth)


async def finish_hold(fleet: Fleet, truth: Truth) -> None:
    """Workers that end by themselves hold nothing over."""
    for name in list(fleet.processes):
        fleet.signal(name, signal.SIGTERM)
    await wait_until(lambda: not truth.by_worker, 20, "all workers have gone")


async def test_a_paused_process_with_reuse_is_over_only_while_it_is_paused(
    fleet: Fleet, truth: Truth, maker: Maker, valkey_url: str, pool: str
) -> None:
    await launch(fleet, truth, valkey_url, pool, call_ms=50.0)
    await wait_until(lambda: truth.by_worker["w0"] > 0)
    fleet.signal("w0", signal.SIGSTOP)
    stopped = now_ms()
    await wait_until(lambda: now_ms() - stopped > 2 * LEASE_MS)
    held = truth.by_worker["w0"]
    assert truth.peak <= BOUND + held
    fleet.signal("w0", signal.SIGCONT)
    await wait_until(lambda: truth.leases_lost >= held, what="the bodies were told")
    await wait_until(lambda: truth.open_calls <= BOUND)
    truth.reset_peak()
    await until_more(truth, 100)
    assert truth.peak == BOUND
    await finish(fleet, maker, valkey_url)


async def test_a_blocked_event_loop_keeps_its_permits(maker: Maker, valkey_url: str) -> None:
    limiter, other = [await maker(valkey_url, 1, lease_ms=LEASE_MS) for _ in range(2)]
    body = await Body(limiter).until_admitted()
    blocked_until = now_ms() + 2 * LEASE_MS
    while now_ms() < blocked_until:
        sum(range(1000))  # the loop is busy; the heartbeat's thread gets its turn
    assert limiter.local_state().silent_ms < LEASE_MS
    waiter = Body(other)
    await body.end()
    await (await waiter.until_admitted()).end()
    assert limiter._queue.counts.fenced == 0


async def test_a_stalled_event_loop_lets_its_session_lapse(
    maker: Maker, valkey_url: str, pool: str
) -> None:
    policy = PoolPolicy({LIMIT: 1}, lease_ms=LEASE_MS)
    async with Limiter(valkey_url, pool=pool, policy=policy, stalled_s=0.2) as limiter:
        body = await Body(limiter).until_admitted()
        blocked_until = now_ms() + 200 + 2 * LEASE_MS
        while now_ms() < blocked_until:
            sum(range(1000))
        with pytest.raises(LeaseLost):
            await body.task
