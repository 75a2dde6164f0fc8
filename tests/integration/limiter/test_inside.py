"""What can be seen of a pool, and what people may do to it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.integration.limiter.makers import LIMIT, Body, Maker, until_used, until_waiting
from tests.waiting import wait_until
from tidegate.errors import DeadlineExceeded, LeaseLost
from tidegate.limiter import Concurrency, PoolPolicy, Quota
from tidegate.limiter.connection import LinkDown
from tidegate.limiter.limiter import Limiter
from tidegate.limiter.messages import Script, load


async def test_a_waiting_ticket_knows_its_place_and_what_holds_it_up(
    maker: Maker, valkey_url: str
) -> None:
    limiter = await maker(valkey_url, 1)
    holder = await Body(limiter).until_admitted()
    bodies = [Body(limiter) for _ in range(3)]
    await until_waiting(limiter, 3)
    snapshot = await limiter.snapshot()
    assert snapshot.tenants[0].waiting == 3
    (queue,) = snapshot.queues
    assert queue.held_up_by == LIMIT
    last = queue.first_ticket + 2
    assert queue.last_ticket == last
    place = await limiter.place(limiter.session, last)
    assert place is not None
    assert (place.ahead, place.held_up_by, place.tenant) == (2, LIMIT, "default")
    assert place.wait_ms is not None
    assert place.wait_ms > 0
    why = await limiter.why(limiter.session, last)
    assert why is not None
    assert [permit.tenant for permit in why.holders] == ["default"]
    assert await limiter.why(limiter.session, 10_000) is None
    for body in [holder, *bodies]:
        await body.end()
    assert await limiter.place(limiter.session, last) is None


async def test_a_pause_holds_everybody_up_and_says_who_made_it(
    maker: Maker, valkey_url: str
) -> None:
    limiters = [await maker(valkey_url, 2) for _ in range(2)]
    assert await limiters[0].penalise(LIMIT, for_ms=60_000, reason="429", by="gemini")
    waiter = Body(limiters[1])
    await until_waiting(limiters[0], 1)
    view = (await limiters[0].snapshot()).limits[LIMIT]
    assert view.paused_by == "gemini: 429"
    await wait_until(lambda: limiters[1].paused_ms([LIMIT]), 20, "the other has heard of it")
    for limiter in limiters:
        with pytest.raises(DeadlineExceeded) as late:
            async with limiter.acquire(LIMIT, deadline_ms=50):
                pytest.fail("let in during a pause")
        left_ms = late.value.retry_after_ms
        assert left_ms is not None
        assert 50_000 < left_ms <= 60_000
    assert await limiters[0].resume(LIMIT, by="ann")
    assert not await limiters[0].resume(LIMIT)
    await waiter.until_admitted()
    await waiter.end()


async def test_after_a_pause_calls_come_back_one_by_one(maker: Maker, valkey_url: str) -> None:
    limiter = await maker(valkey_url, 10)
    began = asyncio.get_running_loop().time()
    await limiter.penalise(LIMIT, for_ms=100, ramp_ms=1000)
    bodies = [Body(limiter) for _ in range(10)]
    await bodies[0].until_admitted()
    assert asyncio.get_running_loop().time() - began >= 0.1
    await asyncio.gather(*(body.until_admitted() for body in bodies))
    assert asyncio.get_running_loop().time() - began >= 0.9
    await asyncio.gather(*(body.end() for body in bodies))


async def test_a_revoked_process_gives_its_permits_back_and_cancels_its_calls(
    maker: Maker, valkey_url: str
) -> None:
    one, two = [await maker(valkey_url, 1) for _ in range(2)]
    body = await Body(one).until_admitted()
    waiter = Body(two)
    await until_waiting(two, 1)
    (permit,) = await two.permits()
    assert permit.limits == (LIMIT,)
    assert await two.revoke(permit.sid) == 1
    await waiter.until_admitted()
    with pytest.raises(LeaseLost):
        await body.task
    await waiter.end()


async def test_a_call_that_is_handed_over_counts_for_nobodys_next_one(
    maker: Maker, valkey_url: str
) -> None:
    """Its process has waiters, and the right to pass permits on to them; then it is gone."""
    one, two = [await maker(valkey_url, 1) for _ in range(2)]
    waiters: list[Body] = []
    async with one.acquire(LIMIT) as permit:
        waiters += [Body(one), Body(one)]
        await until_waiting(two, 2)
        await one.hold("background-1", {LIMIT: 1}, 60_000)
        permit.hand_over()
        await until_used(two, 1)
        assert one.permits_held == 0
    assert one.waiters == 2
    await one.hold("background-1", {LIMIT: 1}, 60_000)
    await until_used(two, 1)
    assert await two.revoke("background-1") == 1
    assert await two.revoke("background-1") == 0
    for waiter in waiters:
        await waiter.until_admitted()
        await waiter.end()
    await one.hold("background-2", {LIMIT: 1}, 60_000)
    await one.aclose()
    await until_used(two, 1)
    await two.revoke("background-2")
    await until_used(two, 0)


async def test_try_acquire_takes_what_is_free_and_waits_for_nothing(
    maker: Maker, valkey_url: str
) -> None:
    limiter = await maker(valkey_url, 1)
    async with limiter.try_acquire(LIMIT) as permit:
        assert permit is not None
        async with limiter.try_acquire(LIMIT) as second:
            assert second is None
        assert not permit.lost.is_set()
    await until_used(limiter, 0)


async def test_one_can_look_who_changed_the_policy(maker: Maker, valkey_url: str) -> None:
    limiter: Limiter = await maker(valkey_url, 1)
    changed = maker.cold(valkey_url, 3).policy
    await limiter.set_policy(type(changed)(changed.limits, lease_ms=600, revision=2), by="ann")

    async def there() -> bool:
        return len(await limiter.history()) == 2

    await wait_until(there, 20, "the second policy")
    newest, oldest = await limiter.history()
    assert (newest.revision, newest.by, newest.policy.bound(LIMIT)) == (2, "ann", 3)
    assert (oldest.revision, oldest.by) == (1, "deployment")


async def test_a_call_without_a_process_takes_its_tokens(maker: Maker, valkey_url: str) -> None:
    policy = PoolPolicy({LIMIT: Concurrency(5_000, unit="tokens_in_flight")})
    limiter = await maker(valkey_url, policy=policy)
    async with limiter.acquire(LIMIT, tokens=4_000) as permit:
        assert permit.in_flight == {LIMIT: 4_000}
        await limiter.hold("background-1", permit.in_flight, 60_000)
        permit.hand_over()
        await until_used(limiter, 4_000)
    await limiter.hold("background-1", {LIMIT: 1}, 60_000)  # a repeat extends its time alone
    await until_used(limiter, 4_000)
    await limiter.revoke("background-1")
    await until_used(limiter, 0)


@pytest.mark.parametrize("tried", [False, True])
async def test_what_is_repeated_after_a_lost_reply_is_done_once(
    tried: bool, maker: Maker, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter = await maker(valkey_url, policy=PoolPolicy({"rpd:x": Quota(100)}))
    run, replies = limiter._link.run, list[bytes]()

    async def without_the_first_reply(script: Script, *rest: Any) -> bytes:
        reply = await run(script, *rest)
        if script == load("admin"):
            replies.append(reply)
            if len(replies) % 2:
                raise LinkDown("the reply was lost")
        return reply

    monkeypatch.setattr(limiter._link, "run", without_the_first_reply)
    if tried:
        gate: dict[str, Any] = {"for_ms": 1_000, "most_ms": 60_000}
        assert await limiter.close_gate("upstream:x", **gate, tried=False)
        assert await limiter.close_gate("upstream:x", **gate, tried=True)
        assert (await limiter.snapshot()).limits["upstream:x"].paused_ms <= 2_000
        assert await limiter.open_gate("upstream:x")
        return
    assert await limiter.charge("rpd:x", 7)
    assert (await limiter.snapshot()).limits["rpd:x"].used == 7
    assert len(replies) == 2
