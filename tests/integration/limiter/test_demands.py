"""Calls that need several limits, rates, tokens, tenants with weights, and priorities."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest

from tests.integration.limiter.makers import LIMIT, Body, Maker, quiet, until_waiting
from tests.waiting import wait_until, work_for
from tests.zones import ZONE
from tidegate.errors import DeadlineExceeded, DemandImpossible, QueueFull
from tidegate.limiter.limiter import Limiter
from tidegate.limiter.policy import Adaptive, Band, Concurrency, PoolPolicy, Quota, Rate, Tokens
from tidegate.limiter.session import now_ms

TEXT, IMAGE, TOTAL = "kind:text_only", "kind:image_generation", "pool:total"


async def open_limiter(maker: Maker, url: str, policy: PoolPolicy) -> Limiter:
    limiter = await maker(url, policy=policy)
    await wait_until(lambda: limiter.policy.pack() == policy.pack(), what="the policy")
    return limiter


def policy_of(limits: Mapping[str, object], **fields: object) -> PoolPolicy:
    return PoolPolicy(limits, lease_ms=600, revision=2, **fields)  # type: ignore[arg-type]


async def used(limiter: Limiter) -> dict[str, int]:
    limits = (await limiter.snapshot()).limits
    return {name: view.used for name, view in limits.items()}


async def test_a_call_takes_all_its_limits_or_none(maker: Maker, valkey_url: str) -> None:
    limiter = await open_limiter(maker, valkey_url, policy_of({TEXT: 1, IMAGE: 5, TOTAL: 5}))
    async with limiter.acquire(TEXT, TOTAL):
        assert await used(limiter) == {TEXT: 1, IMAGE: 0, TOTAL: 1}
        with pytest.raises(DeadlineExceeded):
            async with limiter.acquire(TOTAL, TEXT, deadline_ms=60):
                pytest.fail("let in over the limit")
        assert (await used(limiter))[TOTAL] == 1
        # A full limit never holds up calls that do not need it.
        async with limiter.acquire(IMAGE, TOTAL, deadline_ms=5000) as permit:
            assert permit.limits == (IMAGE, TOTAL)


async def test_what_no_waiting_can_bring_is_refused_at_once(maker: Maker, valkey_url: str) -> None:
    limiter = await open_limiter(maker, valkey_url, policy_of({TEXT: 1, IMAGE: 0}))
    for limits in ((IMAGE,), (TEXT, IMAGE), ("kind:unknown",)):
        with pytest.raises(DemandImpossible) as caught:
            async with limiter.acquire(*limits):
                pytest.fail("let in")
        assert caught.value.limit == limits[-1]


async def test_a_rate_is_kept_in_every_sliding_window(maker: Maker, valkey_url: str) -> None:
    rate = Rate(10, window_ms=400, slack_ms=20)
    limiters = [
        await open_limiter(maker, valkey_url, policy_of({"rpm:x": rate, TOTAL: 50}))
        for _ in range(2)
    ]
    admitted: list[float] = []

    async def call(limiter: Limiter) -> None:
        async with limiter.acquire("rpm:x", TOTAL):
            admitted.append(now_ms())

    await asyncio.gather(*(call(limiters[number % 2]) for number in range(35)))
    admitted.sort()
    spans = [later - first for first, later in zip(admitted, admitted[10:], strict=False)]
    assert min(spans) >= 400
    assert admitted[-1] - admitted[0] < 3000


async def test_tokens_are_reserved_before_and_settled_after(maker: Maker, valkey_url: str) -> None:
    limits = {
        "tpm:x": Rate(1000, window_ms=60_000, unit="tokens"),
        "itpm:x": Rate(5000, window_ms=60_000, unit="input_tokens"),
        "tpd:x": Quota(2000, unit="tokens", zone=ZONE),
    }
    limiter = await open_limiter(maker, valkey_url, policy_of(limits))
    names = tuple(limits)
    async with limiter.acquire(*names, tokens=Tokens(input=300, output=500)) as permit:
        assert await used(limiter) == {"tpm:x": 800, "itpm:x": 300, "tpd:x": 800}
        with pytest.raises(DeadlineExceeded):
            async with limiter.acquire("tpm:x", tokens=300, deadline_ms=60):
                pytest.fail("let in over the limit")
        permit.settle(tokens=Tokens(input=200, output=100))

    async def settled() -> bool:
        return await used(limiter) == {"tpm:x": 300, "itpm:x": 200, "tpd:x": 300}

    await wait_until(settled, 20, "the settlement")
    with pytest.raises(ValueError, match="tpm:x"):
        async with limiter.acquire("tpm:x"):
            pytest.fail("nobody said how many")


async def test_the_ramp_of_a_pause_counts_what_calls_used(maker: Maker, valkey_url: str) -> None:
    """Counted as reserved, a call that used a sixtieth of it held up the next ones for 30 s."""
    name = "tpm:gemini-2.5-flash"
    policy = policy_of({name: Rate(60_000, 60_000, "tokens")})
    limiter = await open_limiter(maker, valkey_url, policy)
    await limiter.penalise(name, for_ms=1, ramp_ms=60_000)
    for _ in range(3):
        async with limiter.acquire(name, tokens=Tokens(30_000), timeout=15) as permit:
            permit.settle(tokens=Tokens(500))

    async def is_settled() -> bool:
        return await used(limiter) == {name: 1_500}

    await wait_until(is_settled, what="the usage of all three")


@pytest.mark.parametrize("way", ["acquire", "try_acquire"])
async def test_a_call_that_can_last_for_no_time_has_not_the_usual_bound(
    maker: Maker, valkey_url: str, way: str
) -> None:
    limiter = await open_limiter(maker, valkey_url, policy_of({TEXT: 1}, on_expiry="hold"))
    async with getattr(limiter, way)(TEXT, hard_ms=0):
        (permit,) = (await limiter.snapshot(permits=True)).permits
        assert permit.left_ms <= 1


async def test_unknown_usage_keeps_the_reservation_and_may_be_told_later(
    maker: Maker, valkey_url: str
) -> None:
    rate = Rate(1000, window_ms=60_000, unit="tokens")
    limiter = await open_limiter(maker, valkey_url, policy_of({"tpm:x": rate, TOTAL: 5}))
    async with limiter.acquire("tpm:x", TOTAL, tokens=400):
        pass
    async with limiter.acquire("tpm:x", TOTAL, tokens=300) as late:
        late.usage_follows()

    async def spent(tokens: int) -> bool:
        return await used(limiter) == {"tpm:x": tokens, TOTAL: 0}

    await wait_until(lambda: spent(700), 20, "both given back")
    late.report_usage(tokens=50)
    await wait_until(lambda: spent(450), 20, "the late settlement")


async def test_a_demand_of_more_than_a_limit_can_give_takes_all_of_it(
    maker: Maker, valkey_url: str
) -> None:
    rate = Rate(100, window_ms=60_000, unit="tokens")
    limiter = await open_limiter(maker, valkey_url, policy_of({"tpm:x": rate}))
    async with limiter.acquire("tpm:x", tokens=5000, deadline_ms=2000) as permit:
        assert await used(limiter) == {"tpm:x": 100}
        permit.settle(tokens=0)


async def shares(limiters: list[Limiter], per_task: dict[str, str], calls: int) -> Counter[str]:
    """Who was let in, of the first `calls` while everybody waits for one permit after the other."""
    order: list[str] = []

    async def call(limiter: Limiter, tenant: str, priority: str) -> None:
        while len(order) < calls:
            async with limiter.acquire(TEXT, tenant=tenant, priority=priority):
                order.append(tenant)
                await work_for(0.002)

    await asyncio.gather(
        *(
            call(limiter, tenant, priority)
            for limiter in limiters
            for tenant, priority in per_task.items()
            for _ in range(12)
        )
    )
    return Counter(order[calls // 5 : calls])


async def in_force(limiter: Limiter, policy: PoolPolicy) -> None:
    await limiter.set_policy(policy)
    await limiter.in_force()


async def test_tokens_in_flight_are_taken_until_a_call_ends(maker: Maker, valkey_url: str) -> None:
    by_tokens = policy_of({TOTAL: Concurrency(5000, unit="tokens_in_flight"), TEXT: 9})
    one = await open_limiter(maker, valkey_url, by_tokens)
    other = await open_limiter(maker, valkey_url, by_tokens)
    with pytest.raises(DemandImpossible, match="5000 tokens in flight"):
        async with one.acquire(TEXT, TOTAL, tokens=5001):
            pytest.fail("let in")
    async with one.acquire(TEXT, TOTAL, tokens=Tokens(2900, 100)):
        assert await used(other) == {TEXT: 1, TOTAL: 3000}
        with pytest.raises(DeadlineExceeded):
            async with other.acquire(TEXT, TOTAL, tokens=2001, deadline_ms=60):
                pytest.fail("let in over the limit")
        async with other.acquire(TEXT, TOTAL, tokens=2000, deadline_ms=5000):
            assert await used(one) == {TEXT: 2, TOTAL: 5000}
            await in_force(one, replace(by_tokens, limits={TOTAL: 7, TEXT: 9}, revision=3))
            assert await used(one) == {TEXT: 2, TOTAL: 2}, "counted again, as calls"
            await in_force(one, replace(by_tokens, revision=4))
            assert await used(one) == {TEXT: 2, TOTAL: 5000}, "counted again, as tokens"
    for limiter in (one, other):
        async with limiter.acquire(TEXT, TOTAL, tokens=5000, deadline_ms=5000):
            assert await used(other) == {TEXT: 1, TOTAL: 5000}


async def test_tenants_share_by_their_weights(maker: Maker, valkey_url: str) -> None:
    policy = policy_of({TEXT: 2}, weights={"b": 2, "c": 5})
    limiters = [await open_limiter(maker, valkey_url, policy) for _ in range(2)]
    count = await shares(limiters, {"a": "normal", "b": "normal", "c": "normal"}, 1500)
    total = sum(count.values())
    for tenant, weight in (("a", 1), ("b", 2), ("c", 5)):
        assert abs(count[tenant] / total - weight / 8) < 0.05, count


async def test_a_low_priority_gets_its_least_share_and_no_more(
    maker: Maker, valkey_url: str
) -> None:
    bands = (Band("high"), Band("normal", min_share=0.2))
    policy = policy_of({TEXT: 2}, bands=bands)
    limiters = [await open_limiter(maker, valkey_url, policy) for _ in range(2)]
    count = await shares(limiters, {"a": "high", "b": "normal"}, 400)
    assert 0.1 < count["b"] / sum(count.values()) < 0.3, count


async def test_a_process_passes_no_permit_on_where_a_higher_band_has_come_since(
    maker: Maker, valkey_url: str
) -> None:
    """It was told that it may before that: nobody tells it that somebody came."""
    bands = (Band("high"), Band("normal"))
    policy = policy_of({LIMIT: 1}, bands=bands)
    low, high = [await open_limiter(maker, valkey_url, policy) for _ in range(2)]
    await quiet(low, high)
    running = await Body(low, priority="normal").until_admitted()
    waiting = Body(low, priority="normal")
    await wait_until(lambda: bool(low._queue._hinted), what="leave to pass the permit on")
    higher = Body(high, priority="high")
    await until_waiting(high, 2)
    await wait_until(lambda: now_ms() > low._queue._hinted_until_ms, what="an old hint")
    await running.end()
    await (await higher.until_admitted()).end()
    assert low._queue.counts.handed_on == 0
    await (await waiting.until_admitted()).end()


async def test_headroom_keeps_permits_free_for_the_band_above(
    maker: Maker, valkey_url: str
) -> None:
    bands = (Band("high", headroom=0.5), Band("normal"))
    limiter = await open_limiter(maker, valkey_url, policy_of({TEXT: 2}, bands=bands))
    async with limiter.acquire(TEXT, priority="normal"):
        with pytest.raises(DeadlineExceeded):
            async with limiter.acquire(TEXT, priority="normal", deadline_ms=60):
                pytest.fail("let in to what is kept free")
        async with limiter.acquire(TEXT, priority="high", deadline_ms=2000):
            pass


async def test_a_tenant_may_have_so_many_waiters_over_all_processes(
    maker: Maker, valkey_url: str
) -> None:
    policy = policy_of({TEXT: 1}, queue_per_tenant=3)
    limiters = [await open_limiter(maker, valkey_url, policy) for _ in range(2)]

    async def wait(limiter: Limiter, tenant: str) -> str:
        try:
            async with limiter.acquire(TEXT, tenant=tenant, deadline_ms=1000):
                return "in"
        except (QueueFull, DeadlineExceeded) as error:
            return error.code

    async with limiters[0].acquire(TEXT):
        waits = [wait(limiters[number % 2], "greedy") for number in range(8)]
        ending = asyncio.gather(*waits, wait(limiters[0], "modest"))
        await wait_until(lambda: sum(limiter.waiters for limiter in limiters) == 4)
        async with limiters[1].try_acquire(TEXT, tenant="greedy") as permit:
            assert permit is None
        ends = await ending
    assert Counter(ends[:8]) == {"queue_full": 5, "deadline_exceeded": 3}
    assert ends[8] == "deadline_exceeded"


async def test_calls_keep_their_places_when_their_process_changes_the_policy(
    maker: Maker, valkey_url: str
) -> None:
    policy = policy_of({LIMIT: 1}, hand_off=False)
    one, other = [await open_limiter(maker, valkey_url, policy) for _ in range(2)]
    running = await Body(other).until_admitted()
    waiting = []
    for limiter, deadline_ms in ((one, None), (other, None), (one, None), (one, 300_000)):
        waiting.append(Body(limiter, deadline_ms=deadline_ms))
        await until_waiting(other, len(waiting))
    await one.set_policy(replace(policy, revision=3, fair_by="calls"))
    await one.in_force()
    waiting.append(Body(one))
    await until_waiting(other, len(waiting))
    await running.end()
    for number in (3, 0, 1, 2, 4):  # the only deadline first
        await waiting[number].until_admitted()
        assert [body.admitted.is_set() for body in waiting].count(True) == 1
        await waiting[number].end()
        waiting[number].admitted.clear()


async def test_shadow_counts_what_it_would_have_held_up(maker: Maker, valkey_url: str) -> None:
    shadow = Concurrency(1, shadow=True)
    limiter = await open_limiter(maker, valkey_url, policy_of({TEXT: 5, "model:x": shadow}))
    async with limiter.acquire(TEXT, "model:x"), limiter.acquire(TEXT, "model:x", deadline_ms=2000):
        view = (await limiter.snapshot()).limits["model:x"]
        assert (view.used, view.shadowed, view.shadow) == (2, 1, True)


async def test_a_limit_that_finds_its_own_way_falls_at_a_dropped_call(
    maker: Maker, valkey_url: str
) -> None:
    adaptive = Concurrency(10, adaptive=Adaptive(minimum=2))
    limiter = await open_limiter(maker, valkey_url, policy_of({"model:x": adaptive}))
    async with limiter.acquire("model:x") as permit:
        permit.settle("dropped")  # while others would have had room: it says little

    async def fallen() -> bool:
        return (await limiter.snapshot()).limits["model:x"].current == 7

    await wait_until(fallen, 20, "70 % of the limit")


async def test_what_a_limit_has_found_gives_way_to_its_new_minimum_and_to_0(
    maker: Maker, valkey_url: str
) -> None:
    adaptive = Concurrency(10, adaptive=Adaptive(minimum=1))
    policy = policy_of({"model:x": adaptive})
    limiter = await open_limiter(maker, valkey_url, policy)

    async def found() -> int:
        return (await limiter.snapshot()).limits["model:x"].current

    async def fallen() -> bool:
        return await found() == 7

    async def change(revision: int, limit: Concurrency) -> None:
        limits = {"model:x": limit}
        await limiter.set_policy(replace(policy, limits=limits, revision=revision))
        await limiter.in_force()

    async with limiter.acquire("model:x") as permit:
        permit.settle("dropped")
    await wait_until(fallen, 20, "70 % of the limit")
    await change(3, replace(adaptive, adaptive=Adaptive(minimum=9)))
    assert await found() == 9
    await change(4, replace(adaptive, bound=0))
    await change(5, adaptive)
    assert await found() == 10
    async with limiter.acquire("model:x", deadline_ms=20_000):
        pass


async def test_a_limit_that_finds_its_own_way_has_hardly_a_call_refused(
    maker: Maker, valkey_url: str
) -> None:
    adaptive = Concurrency(40, adaptive=Adaptive(minimum=2))
    limiter = await open_limiter(maker, valkey_url, policy_of({"model:x": adaptive}))
    taken, most, refused = 0, 10, [0]  # the provider, and how many it refused by the calls answered

    async def caller() -> None:
        nonlocal taken
        while len(refused) < 1_500:
            async with limiter.acquire("model:x") as permit:
                if taken >= most:
                    refused[-1] += 1
                    permit.settle("dropped")
                    continue  # straight back in line
                taken += 1
                await work_for(0.005)
                taken -= 1
                refused.append(0)

    await asyncio.gather(*(caller() for _ in range(60)))
    assert sum(refused[500:]) <= 0.05 * 1_000
    assert sum(refused[:500]) <= 100, "it learned quickly"
    assert (await limiter.snapshot()).limits["model:x"].current in range(8, 13)


async def test_a_day_quota_waits_for_midnight_in_its_zone(maker: Maker, valkey_url: str) -> None:
    quota = Quota(2, zone=ZONE)
    limiter = await open_limiter(maker, valkey_url, policy_of({"rpd:x": quota}))
    for _ in range(2):
        async with limiter.acquire("rpd:x"):
            pass
    with pytest.raises(DeadlineExceeded):
        async with limiter.acquire("rpd:x", deadline_ms=100):
            pytest.fail("let in over the quota")
    view = (await limiter.snapshot()).limits["rpd:x"]
    assert view.used == 2
    assert 0 < view.room_in_ms <= 25 * 3_600_000


async def test_a_call_that_would_arrive_too_late_after_its_admission_asks_again(
    maker: Maker, valkey_url: str
) -> None:
    rate = Rate(5, window_ms=60_000, slack_ms=50)
    limiter = await open_limiter(maker, valkey_url, policy_of({"rpm:x": rate, TOTAL: 5}))
    async with limiter.acquire("rpm:x", TOTAL) as permit:
        first, began = permit.fence, now_ms()
        await permit.confirm()
        assert permit.fence == first
        while now_ms() - began < 80:
            pass  # the event loop stands still
        await permit.confirm()
        assert permit.fence > first
        assert await used(limiter) == {"rpm:x": 2, TOTAL: 1}
    async with limiter.acquire(TOTAL) as permit:
        first, began = permit.fence, now_ms()
        while now_ms() - began < 80:
            pass
        await permit.confirm()
        assert permit.fence == first
