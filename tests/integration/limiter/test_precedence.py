"""Programs that start with another policy than their pool has in force."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.limiter.makers import LIMIT, Body, Maker
from tests.waiting import wait_until
from tidegate.embedded.servers import ValkeyServer
from tidegate.errors import DemandImpossible, PolicyConflict
from tidegate.limiter import Limiter
from tidegate.limiter.policy import PoolPolicy


async def test_an_edited_policy_is_in_force_in_all_processes(valkey_url: str, maker: Maker) -> None:
    old = await maker(valkey_url, 1, on_conflict="raise")
    new = await maker(valkey_url, 10, on_conflict="raise")
    assert new.policy.limits == {LIMIT: 10}
    await wait_until(lambda: old.policy.limits == {LIMIT: 10}, what="the old process follows")
    assert [change.policy.limits for change in await new.history()] == [{LIMIT: 10}, {LIMIT: 1}]


async def test_what_was_replaced_or_set_live_is_a_conflict_unless_it_is_asked_for(
    valkey_url: str, maker: Maker
) -> None:
    first = await maker(valkey_url, 1)  # as the gateway
    with pytest.raises(PolicyConflict, match="set by a deployment"):
        await maker(valkey_url, 3, on_conflict="raise")
    await first.set_policy(PoolPolicy({LIMIT: 4}, lease_ms=600, revision=2), by="ann")
    await wait_until(lambda: first.policy.revision == 2)
    with pytest.raises(PolicyConflict, match="set live by ann"):
        await maker(valkey_url, 1, on_conflict="raise")
    kept = await maker(valkey_url, 1, on_conflict="keep")
    assert kept.policy.limits == {LIMIT: 4}
    replaced = await maker(valkey_url, 1, on_conflict="replace")
    assert (replaced.policy.limits, replaced.policy.revision) == ({LIMIT: 1}, 3)


async def test_processes_that_start_together_run_under_one_policy(
    valkey_url: str, maker: Maker
) -> None:
    one, other = await asyncio.gather(
        *(maker(valkey_url, bound, on_conflict="raise") for bound in (3, 4))
    )
    await wait_until(lambda: one.policy == other.policy, what="one policy")
    bounds = [change.policy.bound(LIMIT) for change in await one.history()]
    assert sorted(bounds) == [3, 4]  # each won once
    assert one.policy.limits == {LIMIT: bounds[0]}


async def test_a_caller_that_waits_is_told_of_a_conflict_that_is_found_late(
    own_valkey: ValkeyServer, maker: Maker
) -> None:
    first = await maker(own_valkey.url, 1)
    await first.set_policy(PoolPolicy({LIMIT: 4}, lease_ms=600, revision=2), by="ann")
    await wait_until(lambda: first.policy.revision == 2)
    own_valkey.pause()
    late = maker.cold(own_valkey.url, 1, on_conflict="raise")
    await late.start()
    waiting = Body(late)
    own_valkey.resume()
    with pytest.raises(PolicyConflict, match="set live by ann"):
        await waiting.task
    lengths = [await traceback_of_refusal(late) for _ in range(3)]
    assert len(set(lengths)) == 1  # a process that runs on for days holds no more with each call
    await late.aclose()


async def traceback_of_refusal(limiter: Limiter) -> int:
    with pytest.raises(PolicyConflict) as refused:
        async with limiter.acquire(LIMIT):
            pytest.fail("admitted")
    return len(refused.traceback)


async def test_a_limit_that_the_policy_does_not_name_is_said_to_be_unknown(
    valkey_url: str, maker: Maker
) -> None:
    limiter = await maker(valkey_url, 1)
    with pytest.raises(DemandImpossible) as raised:
        async with limiter.acquire("pool:total"):
            pass
    message = f"limit 'pool:total' is not in the policy of pool '{maker.pool}' (known: {LIMIT})"
    assert str(raised.value) == message
    with pytest.raises(DemandImpossible, match=f"limit '{LIMIT}' is 0: it admits no call"):
        async with (await maker(valkey_url, 0, on_conflict="replace")).acquire(LIMIT):
            pass
