"""Waiters that go as soon as there is room, step by step, on the real Lua and the model: also where
nothing but time, or a call elsewhere, makes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.property.policies import LEASE_MS
from tests.property.server import Server
from tests.property.test_rates import LIMIT, MINUTE_MS, ROOM, Bench, policy
from tests.property.world import Client
from tidegate.limiter import Band, Concurrency, Limit, PoolPolicy, Quota, Ramp, Rate
from tidegate.limiter.simulation import DAY_MS

TOKENS = Rate(1000, MINUTE_MS, "tokens", slack_ms=0)
BANDS = (Band("high"), Band("low"))


@pytest.fixture
def bench(server: Server) -> Iterator[Bench]:
    made = Bench(server)
    made.say()
    yield made
    made.world.close()


def timer_in_ms(bench: Bench, limit: str = LIMIT) -> int:
    return bench.world.model.pump.timed[limit] - bench.world.model.pool.now


def test_waiters_of_a_resumed_limit_wait_for_the_end_of_its_ramp_at_most(bench: Bench) -> None:
    """Calls that are larger than what the ramp has given so far count beyond its end."""
    bench.put_in_force(Concurrency(1000, unit="tokens_in_flight"))
    bench.world.pause(LIMIT, 1000, 10_000)
    bench.wait(1000)
    bench.end(bench.ask(900), 0)
    large = bench.ask(900)
    assert timer_in_ms(bench) == 9000
    bench.wait(9000)
    bench.end(large, 0)
    bench.ask(1)
    assert timer_in_ms(bench) == 1000
    bench.wait(1000)
    assert bench.running == 1


def test_waiters_of_a_resumed_rate_wait_by_what_calls_used(bench: Bench) -> None:
    """Not by what they had reserved."""
    bench.put_in_force(TOKENS)
    bench.world.pause(LIMIT, 1000, 10_000)
    bench.wait(1000)
    bench.end(bench.ask(900), 100)
    large = bench.ask(800)
    assert timer_in_ms(bench) == 1000
    bench.wait(1000)
    assert large in bench.client.queue.held
    bench.end(large, 850)
    small = bench.ask(40)
    assert timer_in_ms(bench) == 8500
    bench.wait(8500)
    assert small in bench.client.queue.held


def test_a_small_call_behind_a_large_one_that_leaves_takes_tokens_in_flight(bench: Bench) -> None:
    bench.put_in_force(Concurrency(1000, unit="tokens_in_flight"))
    bench.ask(500)
    large, small = bench.ask(600), bench.ask(300)
    assert small not in bench.client.queue.held
    bench.client.queue.abandon(large, bench.world.local_ms)
    bench.say()
    assert small in bench.client.queue.held


@pytest.mark.parametrize("limit", [TOKENS, Concurrency(1000, unit="tokens_in_flight")])
def test_a_small_call_behind_a_large_one_of_a_process_that_ends_goes(
    bench: Bench, limit: Rate | Concurrency
) -> None:
    bench.put_in_force(limit)
    bench.ask(500)
    first, second = bench.client, bench.world.new_client()
    for client in (second, first, second, first):
        bench.client = client
        bench.say()
    bench.wait(20_000)
    bench.client = second
    bench.say()
    bench.ask(600, tenant="a")
    bench.client = first
    small = bench.ask(300, tenant="b")
    assert small not in first.queue.held
    bench.world.revoke(second.sid)
    for push in first.mailbox:
        first.session.take_push(push)
    assert small in first.queue.held


@pytest.mark.parametrize("shape", ["window", "bucket"])
def test_what_is_left_free_for_a_higher_band_is_free_a_window_after_its_last_call(
    bench: Bench, shape: str
) -> None:
    """However much its other waiters have taken since."""
    rate = Rate(1000, MINUTE_MS, "tokens", slack_ms=0, settles=False)
    bench.put_in_force(rate, BANDS)
    bench.ask(10)
    bench.wait(30_000)
    bench.ask(930, band=2)
    waits = bench.ask(30, band=2)
    assert 30_000 <= timer_in_ms(bench) <= 30_501
    bench.wait(timer_in_ms(bench))
    assert waits in bench.client.queue.held


def test_a_ramp_bounds_calls_of_a_bucket_of_any_size(bench: Bench) -> None:
    rate = Rate(1000, MINUTE_MS, "tokens", slack_ms=0, shape="bucket", ramp=Ramp(10, 100))
    bench.put_in_force(rate)
    bench.ask(90)
    bench.wait(50_000)
    for tokens in (900, 950):
        waits = bench.ask(tokens)
        assert waits not in bench.client.queue.held
        assert 10_000 < timer_in_ms(bench) <= 12_000
        bench.client.queue.abandon(waits, bench.world.local_ms)
        bench.say()


def test_a_tenant_whose_turn_comes_by_the_end_of_anothers_call_goes(bench: Bench) -> None:
    """Its call needs less of the rate than the one that was first until then."""
    bench.put_in_force(TOKENS)
    bench.ask(1000)
    earlier = [bench.ask(50, tenant=name) for name in ("u", "v")]
    bench.wait(MINUTE_MS + 2000)
    assert all(ticket in bench.client.queue.held for ticket in earlier)
    bench.ask(800)
    large, small = bench.ask(200, tenant="u"), bench.ask(50, tenant="v")
    bench.wait(1000)
    assert small not in bench.client.queue.held
    bench.wait(40_000)
    bench.end(earlier[0], 50)
    assert small in bench.client.queue.held
    assert large not in bench.client.queue.held


def test_a_tenant_whose_turn_comes_by_anothers_call_elsewhere_goes(bench: Bench) -> None:
    bench.put_in_force(Concurrency(1000, unit="tokens_in_flight"))
    rooms = [bench.ask(1, lane=(ROOM,)) for _ in range(9)]
    elsewhere = bench.ask(100, lane=(ROOM, LIMIT))
    bench.ask(800)
    large, small = bench.ask(300), bench.ask(50, tenant="u")
    assert small not in bench.client.queue.held
    bench.end(rooms[0], 1)
    assert elsewhere in bench.client.queue.held
    assert small in bench.client.queue.held
    assert large not in bench.client.queue.held


def test_a_low_band_goes_once_calls_of_a_higher_one_elsewhere_have_paid_for_it(
    bench: Bench,
) -> None:
    """Those wait for another limit, so nothing else happens at the rate."""
    bench.put_in_force(TOKENS)
    rooms = [bench.ask(1, lane=(ROOM,)) for _ in range(9)]
    for _ in range(2):
        bench.ask(1, lane=(ROOM, LIMIT))
    bench.ask(600)
    too_large = bench.ask(600)
    bench.client.queue.abandon(too_large, bench.world.local_ms)
    bench.say()
    low = bench.ask(1, band=2)
    assert low not in bench.client.queue.held
    for ticket in rooms[:2]:
        bench.wait(2000)
        bench.end(ticket, 1)
    assert low in bench.client.queue.held


def test_a_day_that_ends_sooner_than_was_known_has_its_timer_then(bench: Bench) -> None:
    """The first look at a new day knows of no end, as an operator's."""
    bench.put_in_force(Quota(1000, "tokens"))
    tickets = [bench.ask(400) for _ in range(5)]
    day = bench.world.model.pool.limit(LIMIT).spending
    ends_at = day.reset_at
    bench.wait(ends_at - bench.world.wall_ms - 1)
    bench.world.advance(5000)
    bench.world.renew([bench.client])
    bench.world.charge(LIMIT, 1)
    assert day.reset_at == bench.world.wall_ms + DAY_MS
    bench.end(tickets[0], 500)
    assert day.reset_at == ends_at + DAY_MS
    assert bench.world.model.pump.timed[LIMIT] == day.reset_at


def test_a_call_that_only_waits_reports_that_a_day_ends_sooner(bench: Bench) -> None:
    bench.put_in_force(Quota(1000, "tokens"))
    for _ in range(3):
        bench.ask(400)
    day = bench.world.model.pool.limit(LIMIT).spending
    ends_at = day.reset_at
    bench.wait(ends_at - bench.world.wall_ms - 1)
    bench.world.advance(5000)
    bench.world.renew([bench.client])
    bench.world.charge(LIMIT, 1000)
    assert day.reset_at == bench.world.wall_ms + DAY_MS
    bench.ask(400)
    assert day.reset_at == ends_at + DAY_MS
    assert bench.world.model.pump.timed[LIMIT] == day.reset_at


def test_a_low_band_that_is_owed_a_turn_has_it_for_a_call_that_waited_elsewhere(
    bench: Bench,
) -> None:
    """What is kept free of the band has room for that call, though not for its next one."""
    bands = (Band("high", headroom=0.4), Band("low", min_share=0.3))
    bench.put_in_force(Concurrency(1000, unit="tokens_in_flight"), bands)
    rooms = [bench.ask(1, lane=(ROOM,)) for _ in range(9)]
    elsewhere = bench.ask(200, band=2, lane=(LIMIT, ROOM))
    large = bench.ask(600)
    too_large = bench.ask(600, band=2)
    high = [bench.ask(500) for _ in range(5)]
    for ticket in (large, *high[:3]):
        bench.end(ticket, None)
    assert high[3] in bench.client.queue.held
    assert high[4] not in bench.client.queue.held
    for ticket in rooms[:5]:
        bench.end(ticket, 1)
    assert elsewhere in bench.client.queue.held
    assert too_large not in bench.client.queue.held


class Two:
    """Two processes, under one rate of LLM tokens and one of requests."""

    def __init__(self, bench: Bench, tokens: Rate, requests: Rate) -> None:
        self.bench, self.first, self.second = bench, bench.client, bench.world.new_client()
        limits = PoolPolicy({LIMIT: tokens, ROOM: requests}, lease_ms=LEASE_MS, revision=2)
        for bench.client in (self.first, self.second):
            bench.client.session.set_policy(limits, "somebody")
            bench.say()
        self.wait(0)

    def ask(self, client: Client, tokens: int, left_ms: float = float("inf")) -> int:
        self.bench.client = client
        return self.bench.ask(tokens, lane=(LIMIT, ROOM), left_ms=left_ms)

    def wait(self, ms: int) -> None:
        bench = self.bench
        bench.world.advance(ms)
        for bench.client in (self.first, self.second):
            bench.client.session.refresh()
            bench.say()


def test_a_call_that_takes_nothing_of_a_rate_may_pass_others_that_wait_for_it(
    bench: Bench,
) -> None:
    """It is not refused for their turns at another limit."""
    two = Two(bench, TOKENS, Rate(1, 10_000, slack_ms=0))
    bench.client = two.first
    bench.ask(1, lane=(ROOM,))
    before = two.ask(two.first, 500)
    bench.ask(1000, lane=(LIMIT,))
    ticket = two.ask(two.second, 0, left_ms=15_000)
    two.wait(10_001)
    assert ticket in two.second.queue.held
    assert before not in two.first.queue.held


def test_a_call_that_moved_too_often_passes_no_older_one_of_its_tenant(bench: Bench) -> None:
    two = Two(bench, Rate(100, 1000, "tokens", slack_ms=0), Rate(3, 9000, slack_ms=0))
    for _ in range(3):
        bench.client = two.first
        bench.ask(1, lane=(ROOM,))
        two.wait(3000)
    older = [two.ask(two.first, 100) for _ in range(12)]
    younger = two.ask(two.second, 100)
    for _ in range(60):
        two.wait(1000)
        if younger in two.second.queue.held:
            break
    assert all(ticket in two.first.queue.held for ticket in older)


def test_a_quota_whose_day_ends_sooner_than_was_known_becomes_a_rate(bench: Bench) -> None:
    """The request that changes the policy is the first to report the end of the day."""
    bench.put_in_force(Quota(6))
    for _ in range(6):
        bench.ask(0)
    first, second = bench.client, bench.world.new_client()

    def change(client: Client, limit: Limit, revision: int) -> None:
        bench.client = client
        client.session.set_policy(policy(limit, revision), "somebody")
        bench.say()

    change(second, Rate(6, MINUTE_MS), 3)
    for bench.client in (first, second, first):
        bench.client.session.refresh()
        bench.say()
    change(second, Quota(6), 4)  # whose day is not known yet
    for ticket in range(1, 7):
        first.queue.release(ticket, outcome="success", actual="", now_ms=bench.world.local_ms)
    change(first, Rate(6, MINUTE_MS), 5)
    assert bench.spent == 6


def test_a_call_that_takes_nothing_of_a_paused_rate_goes(bench: Bench) -> None:
    """Behind others that wait for it, too, and with a deadline before the end of the pause."""
    bench.put_in_force(TOKENS)
    bench.end(bench.ask(100), 100)
    bench.world.pause(LIMIT, 1000, 1)
    large = bench.ask(1000)
    assert bench.ask(0, tenant="b") in bench.client.queue.held
    assert bench.ask(0, tenant="b", left_ms=500) in bench.client.queue.held
    bench.wait(1001)
    assert large not in bench.client.queue.held
    assert bench.ask(0, tenant="b") in bench.client.queue.held


def test_a_call_that_takes_nothing_of_a_rate_is_no_probe_of_its_gate(bench: Bench) -> None:
    bench.put_in_force(TOKENS)
    bench.world.close_gate(LIMIT, 1000, 60_000, tried=False)
    assert bench.ask(0) in bench.client.queue.held
    bench.wait(1000)
    assert bench.ask(0) in bench.client.queue.held
    assert bench.ask(10) in bench.client.queue.held


def test_calls_that_take_nothing_of_a_rate_leave_the_ramp_after_a_pause_to_others(
    bench: Bench,
) -> None:
    bench.put_in_force(TOKENS)
    bench.world.pause(LIMIT, 1000, 10_000)
    bench.wait(1000)
    for _ in range(3):
        assert bench.ask(0) in bench.client.queue.held
    assert bench.ask(10) in bench.client.queue.held


def test_a_rate_behind_a_gate_admits_the_next_probe_when_one_has_ended(bench: Bench) -> None:
    bench.put_in_force(TOKENS)
    bench.world.close_gate(LIMIT, 1000, 60_000, tried=False)
    bench.wait(1000)
    probe, waits = bench.ask(10), bench.ask(10)
    assert probe in bench.client.queue.held
    bench.wait(1500)
    assert waits not in bench.client.queue.held
    bench.end(probe, 10)
    assert waits in bench.client.queue.held


def test_what_a_call_returns_after_its_window_speeds_up_no_even_flow(bench: Bench) -> None:
    """The flow has made up for it: what is left to make up for was taken by others."""
    bench.put_in_force(Rate(1000, 10_000, "tokens", slack_ms=0, pace_ms=1000))
    late = bench.ask(900)
    bench.wait(12_000)
    bench.end(bench.ask(400), 400)
    waits = bench.ask(400)
    assert waits not in bench.client.queue.held
    bench.end(late, 0)
    assert waits not in bench.client.queue.held
    bench.wait(4_100)
    assert waits in bench.client.queue.held
