"""Who can't be let in before his deadline is refused now, and nobody else is."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.limiter.hands import Hands
from tests.integration.limiter.makers import Maker
from tests.integration.limiter.test_demands import open_limiter, policy_of, used
from tests.waiting import wait_until, work_for
from tests.zones import ZONE
from tidegate.errors import AdmissionError, DeadlineExceeded, LimitPaused, LimitUsedUp
from tidegate.limiter.limiter import Limiter
from tidegate.limiter.policy import Demand, Limit, PoolPolicy, Quota, Rate

TEXT, TOTAL = "kind:text_only", "pool:total"
HOUR_MS = 3_600_000
MINUTE = Rate(1, window_ms=60_000)


async def take(
    limiter: Limiter, *limits: str, tokens: int | None = None, deadline_ms: int | None = None
) -> None:
    async with limiter.acquire(*limits, tokens=tokens, deadline_ms=deadline_ms):
        pass


async def refusal(
    limiter: Limiter, *limits: str, deadline_ms: int = 30_000, tokens: int | None = None
) -> AdmissionError:
    """What a call hears; the test's own time runs out where it waits for its deadline."""
    with pytest.raises(AdmissionError) as caught:
        await asyncio.wait_for(take(limiter, *limits, tokens=tokens, deadline_ms=deadline_ms), 15)
    return caught.value


async def test_a_day_quota_that_is_used_up_refuses_now_and_names_itself(
    maker: Maker, valkey_url: str
) -> None:
    limits = {TEXT: 5, "rpd:x": Quota(2, zone=ZONE), TOTAL: 5}
    limiter = await open_limiter(maker, valkey_url, policy_of(limits))
    for _ in range(2):
        await take(limiter, *limits)
    waits = asyncio.create_task(take(limiter, *limits))  # without a deadline it simply waits
    await wait_until(lambda: limiter.waiters == 1, what="the one that has time")
    # Behind it, in the same queue: it is due later than a call without a deadline.
    error = await refusal(limiter, *limits, deadline_ms=700_000)
    assert (type(error), error.limit) == (LimitUsedUp, "rpd:x")
    room_ms = (await limiter.snapshot()).limits["rpd:x"].room_in_ms
    assert 0 <= (error.retry_after_ms or 0) - room_ms < 60_000
    said = "Daily limit rpd:x is used up (2 of 2 requests), and 1 call comes before this one. "
    assert error.message.startswith(f"{said}It resets at 00:00 {ZONE}, in ")
    assert limiter.waiters == 1
    waits.cancel()


async def test_a_calls_that_run_give_no_request_of_a_day_back(
    maker: Maker, valkey_url: str
) -> None:
    limits = {"rpd:x": Quota(1, zone=ZONE), TOTAL: 5}
    limiter = await open_limiter(maker, valkey_url, policy_of(limits))
    async with limiter.acquire(*limits):
        assert (await refusal(limiter, *limits)).limit == "rpd:x"


async def test_a_window_that_ends_before_the_deadline_is_waited_for(
    maker: Maker, valkey_url: str
) -> None:
    short = Rate(1, window_ms=1_500, slack_ms=1_000)
    limits = {TEXT: 5, "rpm:x": MINUTE, "rps:x": short}
    limiter = await open_limiter(maker, valkey_url, policy_of(limits))
    await take(limiter, TEXT, "rpm:x", "rps:x")
    error = await refusal(limiter, TEXT, "rpm:x")
    said = "Limit rpm:x is used up (1 of 1 requests a minute). There is room in "
    assert (error.limit, error.message[: len(said)]) == ("rpm:x", said)
    await take(limiter, TEXT, "rps:x", deadline_ms=HOUR_MS)


async def test_what_a_call_that_runs_may_give_back_is_waited_for(
    maker: Maker, valkey_url: str
) -> None:
    limits = {"tpd:x": Quota(1000, unit="tokens", zone=ZONE), TOTAL: 5}
    limiter = await open_limiter(maker, valkey_url, policy_of(limits))
    async with limiter.acquire(*limits, tokens=900) as permit:
        waits = asyncio.create_task(
            take(limiter, *limits, tokens=300, deadline_ms=30_000),
        )
        await wait_until(lambda: limiter.waiters == 1, what="one that waits")
        permit.settle(tokens=600)
    await waits

    async def none_runs() -> bool:
        return await used(limiter) == {"tpd:x": 900, TOTAL: 0}

    await wait_until(none_runs, what="no call that could give the rest back")
    error = await refusal(limiter, *limits, tokens=101)
    said = "Daily limit tpd:x has no room for 101 tokens more (900 of 1000 are used)."
    assert error.message.startswith(said)


async def test_a_deadline_beside_calls_that_may_give_something_back_tells_an_estimate(
    maker: Maker, valkey_url: str
) -> None:
    limits = {"tpd:x": Quota(1000, unit="tokens", zone=ZONE)}
    limiter = await open_limiter(maker, valkey_url, policy_of(limits))
    async with limiter.acquire(*limits, tokens=900):
        error = await refusal(limiter, *limits, tokens=300, deadline_ms=300)
    assert (type(error), error.limit) == (LimitUsedUp, "tpd:x")
    assert getattr(error, "is_estimate", None) is True


async def test_usage_that_is_still_to_be_told_may_give_back_too(
    maker: Maker, valkey_url: str
) -> None:
    limits = {"tpd:x": Quota(1000, unit="tokens", zone=ZONE)}
    limiter = await open_limiter(maker, valkey_url, policy_of(limits))
    async with limiter.acquire(*limits, tokens=900) as late:
        late.usage_follows()
    await wait_until(lambda: limiter.permits_held == 0)
    async with asyncio.TaskGroup() as group:
        waits = group.create_task(take(limiter, *limits, tokens=300, deadline_ms=30_000))
        await wait_until(lambda: limiter.waiters == 1, what="one that waits")
        late.report_usage(tokens=100)
    assert waits.done()


async def test_who_waits_for_another_limit_hears_when_a_quota_is_used_up(
    maker: Maker, valkey_url: str
) -> None:
    limits = {TEXT: 1, "rpd:x": Quota(1, zone=ZONE)}
    limiter = await open_limiter(maker, valkey_url, policy_of(limits))
    async with limiter.acquire(TEXT):
        waits = asyncio.create_task(refusal(limiter, *limits))
        await wait_until(lambda: limiter.waiters == 1, what="one that waits for the first limit")
        await take(limiter, "rpd:x")
    assert (await waits).limit == "rpd:x"


async def test_who_comes_behind_others_hears_that_they_use_a_quota_up(
    maker: Maker, valkey_url: str
) -> None:
    limits = {TEXT: 1, "rpd:x": Quota(2, zone=ZONE)}
    limiter = await open_limiter(maker, valkey_url, policy_of(limits))
    async with limiter.acquire(TEXT):
        first = [asyncio.create_task(take(limiter, *limits, deadline_ms=30_000)) for _ in range(2)]
        await wait_until(lambda: limiter.waiters == 2, what="two that wait for the other limit")
        error = await refusal(limiter, *limits)
        assert (type(error), error.limit) == (LimitUsedUp, "rpd:x")
    await asyncio.gather(*first)


async def test_a_pause_that_outlasts_the_deadline_refuses_newcomers_and_those_that_wait(
    maker: Maker, valkey_url: str
) -> None:
    limiter = await open_limiter(maker, valkey_url, policy_of({TEXT: 1, TOTAL: 5}))
    async with limiter.acquire(TEXT):
        waits = asyncio.create_task(refusal(limiter, TEXT, TOTAL))
        await wait_until(lambda: limiter.waiters == 1, what="one that waits")
        await limiter.penalise(TEXT, for_ms=HOUR_MS)
        for error in (await waits, await refusal(limiter, TEXT, TOTAL)):
            assert (type(error), error.limit) == (LimitPaused, TEXT)
            assert HOUR_MS - 60_000 < (error.retry_after_ms or 0) <= HOUR_MS
            assert error.message.startswith("Limit kind:text_only is paused for ")
    await limiter.resume(TEXT)
    await take(limiter, TEXT, TOTAL)


async def test_a_wait_that_ends_names_the_limit_that_it_waited_for(
    maker: Maker, valkey_url: str
) -> None:
    limiter = await open_limiter(maker, valkey_url, policy_of({TEXT: 5, TOTAL: 1}))
    async with limiter.acquire(TOTAL):
        error = await refusal(limiter, TEXT, TOTAL, deadline_ms=60)
    assert (type(error), error.limit) == (DeadlineExceeded, TOTAL)
    said = (
        "Limit pool:total had no room for this call before its deadline. Calls have waited about "
    )
    assert error.message.startswith(said)
    assert error.message.endswith(" for it lately, which is an estimate.")
    assert isinstance(error, DeadlineExceeded)
    assert error.is_estimate


@pytest.mark.parametrize(
    ("limit", "calls"),
    [
        (Rate(4, window_ms=30_000), 4),
        (Rate(400, window_ms=30_000, unit="tokens"), 4),
        (Rate(12, window_ms=60_000, pace_ms=5_000), 1),
        (Rate(400, window_ms=30_000, unit="tokens", shape="bucket"), 4),
        (5, 0),
    ],
    ids=["requests", "tokens", "pace", "bucket", "pause"],
)
async def test_a_refused_call_is_told_when_there_is_room(
    maker: Maker, valkey_url: str, limit: int | Limit, calls: int
) -> None:
    """Within 2 % or a second, on a clock that the test moves."""
    clock = Hands(valkey_url, maker.pool)
    moving = asyncio.create_task(clock.run())
    try:
        policy = policy_of({"rpm:x": limit})
        limiter = await maker(valkey_url, policy=policy, clock=clock)
        if not calls:
            await limiter.penalise("rpm:x", for_ms=20_000)
        for _ in range(calls):
            async with limiter.acquire("rpm:x", tokens=100) as permit:
                permit.settle(tokens=100)
        began_ms = clock.now_ms()
        error = await refusal(limiter, "rpm:x", tokens=100, deadline_ms=500)
        assert isinstance(error, DeadlineExceeded)
        assert not error.is_estimate
        assert clock.now_ms() - began_ms < 500, "before its deadline"
        told_ms = error.retry_after_ms or 0
        asked_ms = clock.now_ms()
        await take(limiter, "rpm:x", tokens=100)
        waited_ms = clock.now_ms() - asked_ms
        assert abs(told_ms - waited_ms) <= max(1_000, 0.02 * waited_ms)
        assert waited_ms > 3_000
        await limiter.aclose()
    finally:
        moving.cancel()
        await asyncio.wait({moving})
        clock.close()


async def test_a_limit_that_is_raised_is_open_for_who_asks_next(
    maker: Maker, valkey_url: str
) -> None:
    limiter = await open_limiter(maker, valkey_url, policy_of({"rpm:x": MINUTE}))
    await take(limiter, "rpm:x")
    assert (await refusal(limiter, "rpm:x")).limit == "rpm:x"
    more: dict[str, int | Limit] = {"rpm:x": Rate(2, window_ms=60_000)}
    await limiter.set_policy(PoolPolicy(more, lease_ms=600, revision=3))
    await wait_until(lambda: limiter.policy.revision == 3, what="the new policy")
    await take(limiter, "rpm:x")


async def test_the_calls_that_wait_already_count(maker: Maker, valkey_url: str) -> None:
    """Two a minute, both used; four wait, the next one would wait for the third window."""
    limiter = await open_limiter(maker, valkey_url, policy_of({"rpm:x": Rate(2, 60_000)}))
    for _ in range(2):
        await take(limiter, "rpm:x")
    waiting = [asyncio.create_task(take(limiter, "rpm:x", deadline_ms=145_000)) for _ in range(4)]
    await wait_until(lambda: limiter.waiters == 4, what="four calls that wait")
    error = await refusal(limiter, "rpm:x", deadline_ms=150_000)
    assert isinstance(error, LimitUsedUp)
    assert error.message.startswith(
        "Limit rpm:x is used up (2 of 2 requests a minute), and 4 calls come before this one. "
        "There is room in 3 min"
    )
    assert 175_000 < (error.retry_after_ms or 0) <= 182_000
    assert not error.is_estimate
    last = asyncio.create_task(take(limiter, "rpm:x", deadline_ms=185_000))
    await wait_until(lambda: limiter.waiters == 5, what="one that has time")
    for one in (*waiting, last):
        one.cancel()


async def test_an_estimate_refuses_only_who_asks_for_it(maker: Maker, valkey_url: str) -> None:
    limiter = await open_limiter(maker, valkey_url, policy_of({TEXT: 1}))
    for _ in range(2):
        async with limiter.acquire(TEXT):
            await work_for(0.2)
    async with limiter.acquire(TEXT):
        waiting = [asyncio.create_task(take(limiter, TEXT)) for _ in range(30)]
        await wait_until(lambda: limiter.waiters == 30, what="thirty that wait")
        error = await refusal(limiter, TEXT, deadline_ms=50)
        assert type(error) is DeadlineExceeded
        behind = Demand((TEXT,), deadline_ms=1_000, by_estimate=True, has_usual_deadline=True)
        early = limiter.acquire_for(behind)
        with pytest.raises(LimitUsedUp) as caught:
            async with early:
                pass
        assert caught.value.is_estimate
        said = "Limit kind:text_only is in use (1 of 1 calls), and 30 calls come before this one. "
        assert caught.value.message.startswith(f"{said}There is room in about ")
        assert caught.value.message.endswith(", which is an estimate.")
        for one in waiting:
            one.cancel()
