"""Valkey away, killed, paused or cut off: what goes on, and what must not happen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import pytest
import uvloop

from tests.integration.limiter.hands import Hands
from tests.integration.limiter.makers import (
    LEASE_MS,
    LIMIT,
    Body,
    Maker,
    command,
    until_used,
    until_waiting,
    used,
)
from tests.waiting import wait_until
from tidegate.embedded.servers import ValkeyServer
from tidegate.errors import DeadlineExceeded, LeaseLost, LimiterUnavailable
from tidegate.limiter.limiter import Limiter
from tidegate.limiter.policy import PoolPolicy


async def until_state(limiter: Limiter, *states: str) -> None:
    await wait_until(lambda: limiter.local_state().state in states, what=f"state {states}")


@pytest.fixture
async def hands(own_valkey: ValkeyServer, pool: str) -> AsyncIterator[Hands]:
    """A clock that runs as fast as the processes and the server can follow."""
    clock = Hands(own_valkey.url, pool)
    running = asyncio.create_task(clock.run())
    yield clock
    running.cancel()
    await asyncio.wait({running})
    clock.close()
    assert running.cancelled()


async def until_lapsed(limiter: Limiter) -> None:
    await wait_until(lambda: limiter.local_state().silent_ms > LEASE_MS, what="a lapsed lease")


async def test_a_limiter_starts_while_valkey_is_away_and_lets_in_when_it_comes(
    maker: Maker, own_valkey: ValkeyServer
) -> None:
    own_valkey.stop()
    limiter = maker.cold(own_valkey.url)
    await limiter.start()
    assert limiter.local_state().state == "away"
    waiting = Body(limiter)
    own_valkey.start()
    await (await waiting.until_admitted()).end()
    await limiter.aclose()


async def test_permits_are_passed_on_in_order_while_valkey_is_away_within_the_lease(
    maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiter = await maker(own_valkey.url, 2, lease_ms=3000)
    holders = [await Body(limiter).until_admitted() for _ in range(2)]
    waiters = [Body(limiter) for _ in range(4)]
    own_valkey.pause()
    await until_state(limiter, "away")
    await holders[0].end()
    await waiters[0].until_admitted(0.5)
    assert limiter.local_state().held[LIMIT] == 2
    await holders[1].end()
    await waiters[1].until_admitted(0.5)
    await waiters[0].end()
    await waiters[2].until_admitted(0.5)
    assert not waiters[3].admitted.is_set()
    own_valkey.resume()
    await until_state(limiter, "up")
    assert await used(limiter) == 2
    await waiters[1].end()
    await waiters[3].until_admitted()
    for body in waiters[2:]:
        await body.end()
    await until_used(limiter, 0)
    assert limiter._queue.counts.recycled == 3


async def test_no_permit_is_passed_on_under_a_pause_while_valkey_is_away(
    maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiter = await maker(own_valkey.url, 1, lease_ms=3000)
    holder, waiter = await Body(limiter).until_admitted(), Body(limiter)
    await until_waiting(limiter, 1)
    await limiter.penalise(LIMIT, by="ann")
    own_valkey.pause()
    await until_state(limiter, "away")
    await holder.end()
    assert limiter.local_state().held[LIMIT] == 0
    own_valkey.resume()
    await until_state(limiter, "up")
    await until_used(limiter, 0)
    await limiter.resume(LIMIT)
    await (await waiter.until_admitted()).end()
    assert limiter._queue.counts.recycled == 0


async def test_a_pause_without_a_ramp_is_no_gate_and_is_over_after_an_empty_restart(
    maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiter = await maker(own_valkey.url, 1)
    await limiter.penalise(LIMIT, for_ms=1, by="ann", ramp_ms=0)
    assert limiter.gate(LIMIT) is None, "nothing that a person would have to open"
    await wait_until(lambda: not limiter.paused_of([LIMIT]), what="the pause is over")
    await limiter.close_gate(LIMIT, for_ms=1, most_ms=1, tried=False)
    await limiter.open_gate(LIMIT, ramp_ms=0)
    assert limiter.gate(LIMIT) is None
    await limiter.penalise(LIMIT, for_ms=1, by="ann", ramp_ms=0)
    own_valkey.stop()
    own_valkey.start()
    await (await Body(limiter).until_admitted()).end()


async def test_a_call_without_a_process_counts_through_an_empty_restart(
    maker: Maker, own_valkey: ValkeyServer
) -> None:
    maker_of_it, survivor = [await maker(own_valkey.url, 1) for _ in range(2)]
    await maker_of_it.hold("background-1", {LIMIT: 1}, 60_000)
    known = survivor._session.remembered
    await wait_until(lambda: known.lapsing(0.0), what="the survivor's knowledge of it")
    await maker_of_it.aclose()
    before = (await survivor.snapshot()).epoch
    own_valkey.stop()
    own_valkey.start()
    waiter = Body(survivor)

    async def recovered() -> bool:
        seen = await survivor.snapshot()
        is_new = seen.epoch not in (0, before) and not seen.recovering_ms
        return is_new and seen.limits[LIMIT].used == seen.limits[LIMIT].waiting == 1

    await wait_until(recovered, 20, "one counted, and one that waits")
    assert not waiter.admitted.is_set()
    assert await survivor.revoke("background-1") == 1
    await (await waiter.until_admitted()).end()


async def test_local_admits_no_call_under_a_pause(
    hands: Hands, maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiter = await maker(own_valkey.url, 2, when_away="local", clock=hands)
    await limiter.penalise(LIMIT, by="ann")
    own_valkey.stop()
    await until_lapsed(limiter)
    waiter = Body(limiter)
    silent_ms = limiter.local_state().silent_ms
    await wait_until(
        lambda: limiter.local_state().silent_ms > silent_ms + 2 * LEASE_MS, what="two more leases"
    )
    assert limiter._queue.counts.local == 0
    own_valkey.start()
    await until_state(limiter, "up")
    await limiter.resume(LIMIT)
    await (await waiter.until_admitted()).end()


async def test_closed_lets_nobody_in_after_the_lease_and_says_when_to_come_again(
    hands: Hands, maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiter = await maker(own_valkey.url, 2, clock=hands)
    running = await Body(limiter).until_admitted()
    own_valkey.stop()
    await until_lapsed(limiter)
    with pytest.raises(LimiterUnavailable) as caught:
        async with limiter.acquire(LIMIT, deadline_ms=100):
            pytest.fail("let in")
    assert caught.value.retry_after_ms is not None
    patient = Body(limiter)
    own_valkey.start()
    await patient.until_admitted()
    assert await used(limiter) == 2, "what ran through the outage is counted again"
    for body in (running, patient):
        await body.end()
    await until_used(limiter, 0)


async def test_local_uses_a_share_after_the_lease_and_tells_of_it_afterwards(
    hands: Hands, maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiters = [await maker(own_valkey.url, 5, when_away="local", clock=hands) for _ in range(2)]
    await wait_until(lambda: all(x.local_state().sessions == 2 for x in limiters))
    own_valkey.stop()
    for limiter in limiters:
        await until_lapsed(limiter)
    bodies = [Body(limiters[i % 2]) for i in range(6)]
    await wait_until(lambda: sum(x.local_state().held[LIMIT] for x in limiters) == 4)
    with pytest.raises(DeadlineExceeded):
        async with limiters[0].acquire(LIMIT, deadline_ms=100):
            pytest.fail("over the share of 2")
    own_valkey.start()
    for limiter in limiters:
        await until_state(limiter, "recovering", "up")
    assert await used(limiters[0]) == 4
    for limiter in limiters:
        await until_state(limiter, "up")
    await wait_until(lambda: sum(body.admitted.is_set() for body in bodies) == 5)
    for body in bodies:
        await body.end()


async def test_a_call_runs_on_while_another_command_waits_for_a_valkey_that_stands_still(
    maker: Maker, own_valkey: ValkeyServer
) -> None:
    """The exchange waits behind it, and first fails itself when the lease has lapsed."""
    limiter = await maker(own_valkey.url, 1, lease_ms=4000)
    body = await Body(limiter).until_admitted()
    third_ms = 4000 / 3

    def compares_soon() -> bool:
        return 0.8 * third_ms < limiter.local_state().silent_ms < 0.98 * third_ms

    await wait_until(compares_soon, 30, "a moment just before a comparison")
    own_valkey.pause()
    with pytest.raises(LimiterUnavailable):
        await limiter.snapshot()
    await wait_until(lambda: limiter.local_state().silent_ms > 4000, what="a lapsed lease")
    own_valkey.resume()
    await until_state(limiter, "up")
    assert limiter._queue.counts.fenced == 0
    await body.end()


async def test_with_cancel_the_bodies_end_before_the_lease_is_over(
    hands: Hands, maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiter = await maker(own_valkey.url, on_lost="cancel", clock=hands)
    body = await Body(limiter).until_admitted()
    own_valkey.stop()
    with pytest.raises(LeaseLost):
        await body.task
    assert 0.8 * LEASE_MS <= limiter.local_state().silent_ms < LEASE_MS
    own_valkey.start()
    await until_state(limiter, "up")
    await until_used(limiter, 0)


async def restarted_empty(
    hands: Hands, maker: Maker, valkey: ValkeyServer, *, one_is_missing: bool
) -> tuple[list[Limiter], list[Body], list[Body]]:
    """Two limiters with a running call and a waiter each, at a server that has forgotten all."""
    limiters = [
        await maker(valkey.url, 2, lease_ms=3000, hand_off=False, clock=hands) for _ in range(2)
    ]
    if one_is_missing:
        missing = await maker(valkey.url, 2, lease_ms=3000, hand_off=False, clock=hands)
    running = [await Body(limiter).until_admitted() for limiter in limiters]
    waiters = [Body(limiter) for limiter in limiters]
    everybody = 3 if one_is_missing else 2
    await wait_until(
        lambda: all(len(x._session.remembered._roster) == everybody for x in limiters),
        what="a complete roster",
    )
    if one_is_missing:
        await missing._stop()  # as if it was killed
    epoch = (await limiters[0].snapshot()).epoch
    valkey.kill()
    valkey.start()

    async def back() -> bool:
        joined = [limiter._session.lease.identity.epoch for limiter in limiters]
        return all(each > epoch for each in joined)

    await wait_until(back, 20, "both in the new epoch")
    return limiters, running, waiters


async def end_all(running: list[Body], waiters: list[Body]) -> None:
    for body in running:
        await body.end()
    for waiter in waiters:
        await (await waiter.until_admitted()).end()


async def test_after_an_empty_restart_it_goes_on_when_all_are_back_who_were_there(
    hands: Hands, maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiters, running, waiters = await restarted_empty(
        hands, maker, own_valkey, one_is_missing=False
    )
    for limiter in limiters:
        await until_state(limiter, "up")
    assert (await limiters[0].snapshot()).recovering_ms == 0
    assert await used(limiters[0]) == 2
    assert not any(waiter.admitted.is_set() for waiter in waiters)
    await end_all(running, waiters)
    assert all(limiter._queue.counts.fenced == 0 for limiter in limiters)
    fences = [body.fence for body in running + waiters if body.fence]
    assert max(fences[:2]) < min(fences[2:])


async def test_a_process_that_says_nothing_hears_at_once_that_its_server_was_another(
    own_valkey: ValkeyServer, pool: str
) -> None:
    policy = PoolPolicy({LIMIT: 1}, lease_ms=60_000)
    async with Limiter(own_valkey.url, pool=pool, policy=policy) as limiter:
        epoch = (await limiter.snapshot()).epoch
        await wait_until(
            lambda: limiter._listener is not None and limiter._listener.subscribed,
            what="a subscription",
        )
        own_valkey.kill()
        own_valkey.start()
        # Long before it would have compared all with the server, a third of a lease apart.
        await wait_until(
            lambda: limiter._session.lease.identity.epoch > epoch, what="the new epoch"
        )


async def test_after_an_empty_restart_nobody_comes_in_for_a_lease_while_one_is_missing(
    hands: Hands, maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiters, running, waiters = await restarted_empty(
        hands, maker, own_valkey, one_is_missing=True
    )
    assert (await limiters[0].snapshot()).recovering_ms > 0
    assert await used(limiters[0]) == 2
    for body in running:
        await body.end()
    for limiter in limiters:
        await until_state(limiter, "up")
    assert sum(limiter._queue.counts.recycled for limiter in limiters) == 2
    await end_all([], waiters)


async def test_no_permit_is_passed_on_under_a_pause_after_an_empty_restart(
    hands: Hands, maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiters, running, waiters = await restarted_empty(
        hands, maker, own_valkey, one_is_missing=True
    )
    for number, limiter in enumerate(limiters, 1):  # a later end each, so that each knows of it
        await limiter.penalise(LIMIT, for_ms=number * 600_000, by="ann")
    for body in running:
        await body.end()
    for limiter in limiters:
        await until_state(limiter, "up")
    assert not any(waiter.admitted.is_set() for waiter in waiters)
    assert sum(limiter._queue.counts.recycled for limiter in limiters) == 0
    await limiters[0].resume(LIMIT)
    await end_all([], waiters)


async def test_flushall_is_a_loss_like_any_other(maker: Maker, own_valkey: ValkeyServer) -> None:
    limiter = await maker(own_valkey.url, 2)
    body = await Body(limiter).until_admitted()
    epoch = (await limiter.snapshot()).epoch
    await command(own_valkey.url, "FLUSHALL")
    await wait_until(lambda: limiter._session.lease.identity.epoch > epoch, what="a new epoch")
    await until_state(limiter, "up")
    assert await used(limiter) == 1
    await body.end()


async def test_when_the_server_slept_longer_than_the_lease_nobody_is_let_in_too_early(
    maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiters = [await maker(own_valkey.url, 2) for _ in range(2)]
    running = [await Body(limiter).until_admitted() for limiter in limiters]
    waiter = Body(limiters[0])
    own_valkey.pause()
    for limiter in limiters:
        await until_lapsed(limiter)
    own_valkey.resume()
    for limiter in limiters:
        await until_state(limiter, "recovering", "up")
    assert await used(limiters[0]) == 2
    assert not waiter.admitted.is_set()
    await running[0].end()
    await (await waiter.until_admitted()).end()
    await running[1].end()


async def test_a_lost_subscription_costs_no_grant_and_comes_back(
    maker: Maker, valkey_url: str
) -> None:
    one, two = [await maker(valkey_url, 1) for _ in range(2)]
    holder = await Body(one).until_admitted()
    waiter = Body(two)
    await command(valkey_url, "CLIENT", "KILL", "TYPE", "pubsub")
    await holder.end()
    await waiter.until_admitted(1.0)
    assert two._listener is not None
    await wait_until(lambda: two._listener is not None and two._listener.subscribed)
    await waiter.end()


async def test_a_lost_command_connection_costs_no_permit(maker: Maker, valkey_url: str) -> None:
    limiter = await maker(valkey_url, 2)
    bodies = [await Body(limiter).until_admitted() for _ in range(2)]
    await command(valkey_url, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    for body in bodies:
        await body.end()

    async def all_are_released() -> bool:
        with suppress(LimiterUnavailable):  # until it is connected again
            return await used(limiter) == 0
        return False

    await wait_until(all_are_released, 20, "no permit in use")
    assert limiter._queue.counts.fenced == 0


async def test_a_server_that_may_evict_permits_is_unavailable_until_its_policy_is_fixed(
    maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiter = await maker(own_valkey.url, 1)
    body = await Body(limiter).until_admitted()
    await command(own_valkey.url, "CONFIG", "SET", "maxmemory", "100mb")
    await command(own_valkey.url, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    await command(own_valkey.url, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await wait_until(lambda: "noeviction" in limiter.last_error, what="the reason")
    assert limiter.state == "away"
    with pytest.raises(LimiterUnavailable, match="noeviction"):
        await limiter.snapshot()
    waiter = Body(limiter)
    await command(own_valkey.url, "CONFIG", "SET", "maxmemory-policy", "noeviction")
    await until_state(limiter, "up")
    await body.end()
    await (await waiter.until_admitted()).end()


class Heard(logging.Handler):
    """What the limiter's own logger says, whatever other tests have done to the root logger."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().split(" (")[0])


@pytest.fixture
def heard() -> Iterator[Heard]:
    logger, handler = logging.getLogger("tidegate.limiter"), Heard()
    before = logger.level, logger.disabled
    logger.setLevel(logging.INFO)
    logger.disabled = False
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before[0])
    logger.disabled = before[1]


async def test_a_change_of_state_is_one_line_and_a_request_is_none(
    maker: Maker, own_valkey: ValkeyServer, heard: Heard
) -> None:
    limiter = await maker(own_valkey.url)
    heard.lines.clear()
    own_valkey.stop()
    await until_lapsed(limiter)
    for _ in range(20):
        with pytest.raises(LimiterUnavailable, match=r"^Valkey is unavailable: ."):
            async with limiter.acquire(LIMIT, deadline_ms=1):
                pytest.fail("let in")
    for asked in (limiter.ping(100), limiter.snapshot()):
        with pytest.raises(LimiterUnavailable, match=r"^Valkey is unavailable: ."):
            await asked
    own_valkey.start()
    await until_state(limiter, "up")
    await asyncio.wait_for(limiter.ping(1000), 2)
    changes = [line.removeprefix("limiter: ").split(", was ") for line in heard.lines]
    before = ["up", *(now for now, _ in changes)]
    assert [was for _, was in changes] == before[:-1], "each is a change"
    # An answer that took too long in between is an outage of its own.
    assert changes[:2] == [["away", "up"], ["recovering", "away"]]
    assert changes[-1] == ["up", "recovering"]
    assert len(changes) <= 7, "of 20 requests none"


def test_a_connection_that_was_reset_is_a_lost_link_and_made_again_without_a_pause(
    valkey_url: str, pool: str, caplog: pytest.LogCaptureFixture
) -> None:
    """uvloop, which the product runs on, raises a RuntimeError of its own then."""

    async def lose_the_connection() -> None:
        policy = PoolPolicy({LIMIT: 1}, lease_ms=LEASE_MS)
        async with Limiter(valkey_url, pool=pool, policy=policy) as limiter:
            await until_state(limiter, "up")
            for _ in range(5):
                connection: Any = limiter._link._connection
                if connection is None:  # it is being made
                    await until_state(limiter, "up")
                    continue
                connection._writer.transport.abort()
                for _ in range(3):  # closed in a later turn of the loop
                    await asyncio.sleep(0)
                async with limiter.acquire(LIMIT):
                    assert limiter.state == "up"

    with caplog.at_level(logging.INFO, "tidegate.limiter"):
        uvloop.run(lose_the_connection())
    messages = [record.getMessage() for record in caplog.records]
    assert any("unable to perform operation on <" in message for message in messages)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []
