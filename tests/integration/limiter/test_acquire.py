"""Acquiring and releasing over a healthy Valkey."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace

import pytest

from tests.integration.limiter.makers import (
    LIMIT,
    Body,
    Maker,
    command,
    quiet,
    until_used,
    until_waiting,
    used,
)
from tests.waiting import wait_until, work_for
from tidegate.embedded.servers import ValkeyServer
from tidegate.errors import (
    ConfigError,
    DeadlineExceeded,
    DemandImpossible,
    LeaseLost,
    QueueFull,
    ShuttingDown,
)
from tidegate.limiter.limiter import Limiter
from tidegate.limiter.messages import Keyspace
from tidegate.limiter.policy import PoolPolicy
from tidegate.limiter.session import now_ms


async def test_never_more_than_the_limit_are_let_in_over_two_limiters(
    maker: Maker, valkey_url: str
) -> None:
    limiters = [await maker(valkey_url, 3) for _ in range(2)]
    running = peak = done = 0

    async def call(limiter: Limiter) -> None:
        nonlocal running, peak, done
        async with limiter.acquire(LIMIT):
            running += 1
            peak = max(peak, running)
            await work_for(0.002)
            running -= 1
            done += 1

    await asyncio.gather(*(call(limiters[i % 2]) for i in range(200)))
    assert (peak, done) == (3, 200)
    await until_used(limiters[0], 0)


async def test_an_acquisition_is_entered_once_also_while_it_waits(
    maker: Maker, valkey_url: str
) -> None:
    """Of several permits it could return one only: the others stayed held for ever."""
    limiter = await maker(valkey_url, 3)
    acquisition = limiter.acquire(LIMIT)

    async def enter() -> None:
        async with acquisition:
            pass

    ended = await asyncio.gather(enter(), enter(), return_exceptions=True)
    assert [type(one) for one in ended] == [type(None), RuntimeError]
    assert limiter.permits_held == 0


async def test_a_freed_permit_reaches_the_waiter_of_another_process_by_push(
    maker: Maker, valkey_url: str
) -> None:
    one, two = [await maker(valkey_url, 1) for _ in range(2)]
    await quiet(one, two)
    holder = await Body(one).until_admitted()
    waiter = Body(two)

    await until_waiting(one, 1)
    before = two._session.traffic.syncs
    await holder.end()
    await waiter.until_admitted(1.0)
    assert two._session.traffic.pushes == 1
    assert two._session.traffic.syncs == before
    await waiter.end()


async def test_waiters_are_let_in_in_the_order_in_which_they_came_over_all_processes(
    maker: Maker, valkey_url: str
) -> None:
    limiters = [await maker(valkey_url, 1, hand_off=False) for _ in range(3)]
    holder = await Body(limiters[0]).until_admitted()
    order: list[int] = []

    async def call(number: int) -> None:
        async with limiters[number % 3].acquire(LIMIT):
            order.append(number)

    tasks = []
    for number in range(12):
        tasks.append(asyncio.create_task(call(number)))

        await until_waiting(limiters[0], number + 1)
    await holder.end()
    await asyncio.gather(*tasks)
    assert order == list(range(12))


@pytest.mark.parametrize("hand_off", [True, False])
async def test_the_earliest_deadline_of_a_tenant_is_let_in_first_over_all_processes(
    maker: Maker, valkey_url: str, hand_off: bool
) -> None:
    limiters = [await maker(valkey_url, 1, hand_off=hand_off) for _ in range(3)]
    holder = await Body(limiters[0], tenant="other").until_admitted()
    dues = (None, 90_000, 30_000, None, 60_000, 900_000, 30_000)
    order: list[int] = []

    async def call(number: int) -> None:
        limiter = limiters[number % 3]
        async with limiter.acquire(LIMIT, tenant="own", deadline_ms=dues[number]):
            order.append(number)

    tasks = []
    for number in range(len(dues)):
        tasks.append(asyncio.create_task(call(number)))
        await until_waiting(limiters[0], number + 1)
    await holder.end()
    await asyncio.gather(*tasks)
    # Those whose deadlines are within a quarter of a second of each other go in either order.
    assert (set(order[:2]), order[2:]) == ({2, 6}, [4, 1, 0, 3, 5])


async def test_what_shares_are_measured_in_changes_live_without_losing_a_waiter(
    maker: Maker, valkey_url: str
) -> None:
    limiters = [await maker(valkey_url, 2, lease_ms=3000) for _ in range(2)]
    counts: Counter[str] = Counter()
    used_ms: Counter[str] = Counter()
    over = asyncio.Event()

    async def calls(limiter: Limiter, tenant: str, lasts_s: float) -> None:
        while not over.is_set():
            async with limiter.acquire(LIMIT, tenant=tenant, deadline_ms=60_000):
                began_ms = now_ms()
                await work_for(lasts_s)
                counts[tenant] += 1
                used_ms[tenant] += round(now_ms() - began_ms)

    tasks = [
        asyncio.create_task(calls(limiter, tenant, lasts_s))
        for limiter in limiters
        for tenant, lasts_s in (("short", 0.01), ("long", 0.05))
        for _ in range(3)
    ]

    async def shared(measured: Counter[str]) -> None:
        """Equally, of what is measured."""
        counts.clear()
        used_ms.clear()
        await wait_until(lambda: counts["long"] >= 60, 60, "sixty calls")
        assert measured["short"] / measured["long"] == pytest.approx(1, rel=0.2)

    await shared(used_ms)
    assert counts["short"] > 2 * counts["long"]
    policy = limiters[0].policy
    await limiters[0].set_policy(replace(policy, fair_by="calls", revision=policy.revision + 1))
    await limiters[0].in_force()
    await shared(counts)
    over.set()
    await asyncio.gather(*tasks)
    await until_used(limiters[0], 0)


@pytest.mark.parametrize(("bound", "hand_off"), [(1, True), (2, False)])
async def test_fences_rise_from_one_permit_to_the_next(
    maker: Maker, valkey_url: str, bound: int, hand_off: bool
) -> None:
    limiters = [await maker(valkey_url, bound, hand_off=hand_off) for _ in range(2)]
    fences = []
    for number in range(10):
        async with limiters[number % 2].acquire(LIMIT) as permit:
            fences.append(permit.fence)
    assert fences == sorted(set(fences))


async def test_under_load_there_is_at_most_one_script_call_for_an_admission(
    maker: Maker, valkey_url: str
) -> None:
    limiters = [await maker(valkey_url, 5, lease_ms=3000) for _ in range(2)]

    async def call(limiter: Limiter) -> None:
        for _ in range(20):
            async with limiter.acquire(LIMIT):
                await work_for(0.001)

    before = sum(limiter._session.traffic.syncs for limiter in limiters)
    await asyncio.gather(*(call(limiters[i % 2]) for i in range(40)))
    syncs = sum(limiter._session.traffic.syncs for limiter in limiters) - before
    admitted = sum(limiter._queue.counts.admitted for limiter in limiters)
    assert admitted == 800
    assert syncs / admitted <= 1.0


async def test_a_waiter_is_told_within_50_ms_after_its_deadline(
    maker: Maker, valkey_url: str
) -> None:
    limiter = await maker(valkey_url, 1)
    holder = await Body(limiter).until_admitted()
    began = now_ms()
    with pytest.raises(DeadlineExceeded) as caught:
        async with limiter.acquire(LIMIT, deadline_ms=100):
            pytest.fail("let in over the limit")
    assert 99 <= now_ms() - began <= 150
    assert caught.value.limit == LIMIT
    assert caught.value.retry_after_ms is not None
    await holder.end()
    await until_used(limiter, 0)


async def test_what_can_never_be_is_refused_at_once(maker: Maker, valkey_url: str) -> None:
    limiter = await maker(valkey_url, 0)
    for limit in (LIMIT, "kind:unknown", "model:misspelt"):
        with pytest.raises(DemandImpossible) as caught:
            async with limiter.acquire(limit):
                pytest.fail("let in")
        assert caught.value.limit == limit


async def test_the_queue_of_a_process_is_bounded(maker: Maker, valkey_url: str) -> None:
    limiter = await maker(valkey_url, 1, max_waiters=2)
    holder = await Body(limiter).until_admitted()
    bodies = [Body(limiter), Body(limiter)]
    await wait_until(lambda: limiter.local_state().waiting[LIMIT] == 2)
    with pytest.raises(QueueFull):
        async with limiter.acquire(LIMIT):
            pytest.fail("let in")
    for body in [holder, *bodies]:
        await body.end()


async def test_a_storm_of_cancellations_leaks_nothing(maker: Maker, valkey_url: str) -> None:
    limiters = [await maker(valkey_url, 4) for _ in range(2)]
    chance = random.Random(7)
    running = peak = 0

    async def call(limiter: Limiter) -> None:
        nonlocal running, peak
        async with limiter.acquire(LIMIT):
            running += 1
            peak = max(peak, running)
            try:
                await work_for(chance.random() / 100)
            finally:
                running -= 1

    tasks = [asyncio.create_task(call(limiters[i % 2])) for i in range(1500)]
    loop = asyncio.get_running_loop()
    for task in tasks:
        loop.call_later(chance.random() * 0.8, task.cancel)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert peak <= 4
    await until_used(limiters[0], 0)
    await until_waiting(limiters[0], 0)
    assert all(not limiter._queue.held and not limiter._queue.waiting for limiter in limiters)


async def test_closing_frees_at_once_what_was_held_and_refuses_waiters(
    maker: Maker, valkey_url: str
) -> None:
    one, two = [await maker(valkey_url, 1) for _ in range(2)]
    await quiet(one, two)
    holder = await Body(one).until_admitted()
    refused = Body(one)
    waiter = Body(two)

    await until_waiting(two, 2)
    await one.aclose()
    await waiter.until_admitted(1.0)
    with pytest.raises(ShuttingDown):
        await refused.task
    with pytest.raises(Exception, match="is gone"):
        await holder.task
    with pytest.raises(ShuttingDown):
        async with one.acquire(LIMIT):
            pytest.fail("let in")
    await waiter.end()


async def test_a_cancellation_by_others_stays_a_cancellation(maker: Maker, valkey_url: str) -> None:
    limiter = await maker(valkey_url)
    body = await Body(limiter).until_admitted()
    body.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await body.task
    await until_used(limiter, 0)


async def test_the_highest_revision_is_in_force_for_all_and_a_start_overwrites_none(
    maker: Maker, valkey_url: str
) -> None:
    one, two = [await maker(valkey_url, 1) for _ in range(2)]
    await one.set_policy(PoolPolicy({LIMIT: 3}, lease_ms=600, revision=5))
    await wait_until(lambda: two.policy.revision == 5, 20, "the other knows")
    late = await maker(valkey_url, 1)
    await wait_until(lambda: late.policy.revision == 5)
    bodies = [await Body(late).until_admitted() for _ in range(3)]
    assert await used(one) == 3
    for body in bodies:
        await body.end()


async def test_a_policy_is_awaited_until_all_processes_know_it(
    maker: Maker, valkey_url: str
) -> None:
    one, two, three = [await maker(valkey_url, 1) for _ in range(3)]
    for revision in (5, 6, 7):
        await one.set_policy(PoolPolicy({LIMIT: 3}, lease_ms=15_000, revision=revision))
        async with asyncio.timeout(2):  # no process waits for its next renewal to say so
            await one.known_everywhere()
        assert [other.policy.revision for other in (two, three)] == [revision, revision]


async def test_a_lowered_limit_drains_and_revokes_nothing(maker: Maker, valkey_url: str) -> None:
    limiter = await maker(valkey_url, 3)
    bodies = [await Body(limiter).until_admitted() for _ in range(3)]
    await limiter.set_policy(PoolPolicy({LIMIT: 1}, lease_ms=600, revision=2))
    waiter = Body(limiter)

    async def queued() -> bool:
        view = (await limiter.snapshot()).limits[LIMIT]
        return (view.bound, view.used, view.waiting) == (1, 3, 1)

    await wait_until(queued)
    for left, body in zip((2, 1), bodies[:2], strict=True):
        await body.end()
        await until_used(limiter, left)
        assert not waiter.admitted.is_set()
    await bodies[2].end()
    await waiter.until_admitted()
    await waiter.end()


async def test_a_server_that_may_evict_permits_is_refused(
    maker: Maker, own_valkey: ValkeyServer
) -> None:
    await command(own_valkey.url, "CONFIG", "SET", "maxmemory", "100mb")
    await command(own_valkey.url, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with pytest.raises(ConfigError, match="maxmemory-policy"):
        await maker.cold(own_valkey.url, lease_ms=10_000).start()


async def test_a_pool_of_another_layout_is_refused(maker: Maker, own_valkey: ValkeyServer) -> None:
    await command(own_valkey.url, "SET", Keyspace(maker.pool).layout, "9")
    with pytest.raises(ConfigError, match="layout"):
        await maker.cold(own_valkey.url, lease_ms=10_000).start()


async def test_a_permit_can_be_given_back_when_the_memory_of_valkey_is_full(
    maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiter = await maker(own_valkey.url)
    body = await Body(limiter).until_admitted()
    await command(own_valkey.url, "CONFIG", "SET", "maxmemory", "1")
    await body.end()
    await until_used(limiter, 0)
    assert limiter._session.traffic.failures == 0


async def test_a_policy_that_comes_while_a_request_is_under_way_is_not_lost(
    maker: Maker, valkey_url: str
) -> None:
    limiter = await maker(valkey_url, 2)
    for bound in range(3, 40):
        changed = PoolPolicy({LIMIT: bound}, lease_ms=600, revision=limiter.policy.revision + 1)
        waiting = [asyncio.create_task(Body(limiter).until_admitted()) for _ in range(2)]
        await asyncio.sleep(0)  # the waiters' request is being sent
        await limiter.set_policy(changed)
        for body in await asyncio.gather(*waiting):
            await body.end()

        async def in_force(bound: int = bound) -> bool:
            return (await limiter.snapshot()).limits[LIMIT].bound == bound

        await wait_until(in_force, 20, f"a limit of {bound}")
        assert limiter.policy == changed


async def test_a_policy_is_awaited_until_valkey_has_it(
    maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiter = await maker(own_valkey.url, 2)
    await limiter.in_force()
    for bound in range(3, 20):
        changed = PoolPolicy({LIMIT: bound}, lease_ms=600, revision=limiter.policy.revision + 1)
        await limiter.set_policy(changed)
        await limiter.in_force()
        assert (await limiter.snapshot()).revision == changed.revision
    own_valkey.stop()
    await limiter.set_policy(PoolPolicy({LIMIT: 2}, lease_ms=600, revision=99))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(limiter.in_force(), 0.2)
    own_valkey.start()
    await asyncio.wait_for(limiter.in_force(), 20)
    assert (await limiter.snapshot()).revision == 99


async def test_a_permit_is_not_confirmed_once_its_process_has_stood_still_for_a_lease(
    maker: Maker, valkey_url: str
) -> None:
    limiter = await maker(valkey_url)
    lease, confirmed = limiter._session.lease, []
    clock = lease.now_ms

    async def stand_still_under_a_permit() -> None:
        async with limiter.acquire(LIMIT) as permit:
            await permit.confirm()
            confirmed.append("before")
            lease.now_ms = lambda: clock() + lease.lease_ms  # what a pause does to the clock
            await permit.confirm()
            confirmed.append("after")

    with pytest.raises(LeaseLost):
        await stand_still_under_a_permit()
    assert confirmed == ["before"]
    lease.now_ms = clock
    async with limiter.acquire(LIMIT) as permit:
        await permit.confirm()
