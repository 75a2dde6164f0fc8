"""A process that uses nothing costs little, and keeps its lease all the same."""

from __future__ import annotations

import os
import time

import redis.asyncio

from tests.integration.limiter.makers import LEASE_MS, Body, Maker
from tests.waiting import wait_until
from tidegate.embedded.servers import ValkeyServer
from tidegate.limiter.limiter import Limiter


def renewals(limiter: Limiter) -> int:
    assert limiter._heartbeat is not None
    return limiter._heartbeat.renewals


async def test_a_lease_that_comparisons_renew_is_renewed_by_few_heartbeats(
    own_valkey: ValkeyServer, maker: Maker
) -> None:
    limiter = await maker(own_valkey.url)
    traffic = limiter._session.traffic
    async with redis.asyncio.Redis.from_url(own_valkey.url) as client:

        async def pings() -> int:
            stats = await client.info("commandstats")
            return int(stats.get("cmdstat_ping", {"calls": 0})["calls"])

        syncs, renewed, pinged = traffic.syncs, renewals(limiter), await pings()
        await wait_until(lambda: traffic.syncs - syncs >= 20, what="comparisons")
        # One in five, one in three, and those that a busy machine makes due.
        assert renewals(limiter) - renewed <= 10
        assert await pings() - pinged <= 10
    await wait_until(lambda: renewals(limiter) > renewed, what="one that need not be")


async def test_heartbeats_keep_the_lease_of_a_loop_that_stands_still(
    own_valkey: ValkeyServer, maker: Maker
) -> None:
    limiter = await maker(own_valkey.url)
    body = await Body(limiter).until_admitted()
    _stand_still(limiter)
    assert not limiter._session.lease.lapsed()
    await body.end()


def _stand_still(limiter: Limiter) -> None:
    """For two leases at least."""
    before, until_s = renewals(limiter), time.monotonic() + 20
    while renewals(limiter) < before + 6:
        assert time.monotonic() < until_s
        assert limiter._session.lease.silent_ms() < LEASE_MS
        os.sched_yield()
