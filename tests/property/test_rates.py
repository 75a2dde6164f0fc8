"""Rates, quotas and their settlement step by step, on the real Lua and the model: what a random
walk seldom comes by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest

from tests.property.policies import LEASE_MS
from tests.property.server import Server
from tests.property.world import Client, World
from tidegate.limiter import (
    DEFAULT_BANDS,
    Band,
    CallUse,
    Concurrency,
    Demand,
    Limit,
    PoolPolicy,
    Quota,
    Ramp,
    Rate,
    Tokens,
)
from tidegate.limiter.simulation import DAY_MS, Barred, Paces, SyncReply, SyncRequest

LIMIT, ROOM = "some:limit", "kind:b"
MINUTE_MS = 60_000
NOT_KNOWN = None


def policy(limit: Limit, revision: int = 1, bands: tuple[Band, ...] = DEFAULT_BANDS) -> PoolPolicy:
    limits = {LIMIT: limit, ROOM: 9}
    return PoolPolicy(limits, lease_ms=LEASE_MS, revision=revision, bands=bands)


class Bench:
    """One process in a pool with one limit, beside a concurrency that has room."""

    def __init__(self, server: Server) -> None:
        self.world = World(server, policy(Rate(1000, MINUTE_MS, "tokens")), Paces())
        self.client: Client = self.world.new_client()

    def say(self) -> None:
        """Until there is nothing left to say: both worlds agree in each answer."""
        while self.client.session.is_request_due():
            self.world.exchange(self.client, "ok")

    def put_in_force(self, limit: Limit, bands: tuple[Band, ...] = DEFAULT_BANDS) -> None:
        revision = self.client.session.policy.revision + 1
        self.client.session.set_policy(policy(limit, revision, bands), "somebody")
        self.say()

    def ask(
        self,
        tokens: int,
        band: int = 1,
        tenant: str = "t",
        lane: tuple[str, ...] = (LIMIT,),
        left_ms: float = float("inf"),
    ) -> int:
        """The ticket of a call, let in or not."""
        client, at = self.client, self.world.local_ms
        flow = client.queue.flow(band, tenant, lane)
        flow.refresh(client.session.policy)
        waiter = client.queue.ask(
            flow,
            amounts=flow.amounts(Demand(lane, tokens=Tokens(tokens), images=1)),
            hard_ms=1_000_000,
            now_ms=at,
            deadline_ms=at + left_ms,
            by_estimate=left_ms < float("inf"),
        )
        self.say()
        return waiter.ticket

    def end(self, ticket: int, used: int | None, *, unaware: bool = False) -> None:
        """`unaware`: its usage is told as it was before the policy changed."""
        flow = self.client.queue.held[ticket].flow
        if not unaware:
            flow.refresh(self.client.session.policy)
        actual = flow.actual(CallUse(None if used is None else Tokens(used)))
        self.client.queue.release(
            ticket, outcome="success", actual=actual, now_ms=self.world.local_ms
        )
        self.say()

    def wait(self, ms: int) -> None:
        """Time passes while all is well."""
        for passed in range(0, ms, LEASE_MS // 2):
            self.world.advance(min(LEASE_MS // 2, ms - passed))
            self.world.renew([self.client])
        self.client.session.refresh()
        self.say()

    @property
    def spent(self) -> int:
        return self.world.model.capacity.spent(self.world.model.pool.limit(LIMIT))

    @property
    def running(self) -> int:
        return len(self.client.queue.held)


@pytest.fixture
def bench(server: Server) -> Iterator[Bench]:
    made = Bench(server)
    made.say()
    yield made
    made.world.close()


def test_tokens_are_reserved_and_corrected_by_what_was_used(bench: Bench) -> None:
    first, second = bench.ask(400), bench.ask(400)
    assert (bench.spent, bench.running) == (800, 2)
    bench.end(first, 100)
    assert bench.spent == 500
    bench.end(second, 700)
    assert bench.spent == 800
    bench.ask(300)
    assert bench.running == 0  # 800 + 300 is more than there is


def test_unknown_usage_keeps_the_reservation(bench: Bench) -> None:
    bench.end(bench.ask(400), NOT_KNOWN)
    assert bench.spent == 400


def test_more_than_a_limit_can_give_waits_for_all_of_it(bench: Bench) -> None:
    first, great = bench.ask(100), bench.ask(5000)
    bench.end(first, 100)
    assert great not in bench.client.queue.held
    bench.wait(MINUTE_MS + 2000)
    assert great in bench.client.queue.held
    assert bench.spent == 1000


def test_a_late_settlement_never_credits_a_later_window(bench: Bench) -> None:
    late = bench.ask(900)
    bench.wait(MINUTE_MS + 2000)
    bench.ask(900)
    assert bench.spent == 900
    bench.end(late, 0)
    assert bench.spent == 900


def test_what_was_used_on_top_counts_however_late(bench: Bench) -> None:
    late = bench.ask(100)
    bench.wait(MINUTE_MS + 2000)
    bench.end(late, 600)
    assert bench.spent == 500


@pytest.mark.parametrize("limit", [Rate(5, MINUTE_MS), Rate(1000, 2 * MINUTE_MS, "tokens")])
def test_a_limit_that_is_counted_otherwise_meanwhile_loses_nothing(
    bench: Bench, limit: Rate
) -> None:
    call = bench.ask(700)
    bench.put_in_force(limit)
    assert bench.spent == 700
    bench.end(call, 100, unaware=True)
    assert bench.spent == (700 if limit.exact else 100)


def test_a_limit_that_was_a_concurrency_meanwhile_loses_nothing(bench: Bench) -> None:
    call = bench.ask(700)
    bench.put_in_force(Concurrency(1))
    assert bench.world.model.pool.limit(LIMIT).used == 1
    bench.ask(1)
    assert bench.running == 1
    bench.put_in_force(Rate(800, MINUTE_MS, "tokens"))
    assert bench.spent == 701  # the waiter of before takes 1
    bench.end(call, 300)
    assert bench.spent == 301


def test_usage_told_of_a_limit_that_is_none_of_tokens_any_more_changes_nothing(
    bench: Bench,
) -> None:
    call = bench.ask(700)
    bench.put_in_force(Concurrency(1))
    bench.end(call, 100, unaware=True)
    assert bench.world.model.pool.limit(LIMIT).used == 0


def test_a_quota_begins_anew_at_its_midnight_and_not_before(bench: Bench) -> None:
    bench.put_in_force(Quota(2))
    bench.ask(1)
    bench.ask(1)
    third = bench.ask(1)
    assert third not in bench.client.queue.held
    state = bench.world.model.pool.limit(LIMIT).spending
    left_ms = state.reset_at - bench.world.wall_ms
    assert 0 < left_ms <= DAY_MS
    bench.wait(left_ms - 1000)
    assert third not in bench.client.queue.held
    bench.wait(2000)
    assert third in bench.client.queue.held
    assert bench.spent == 1


def test_a_settlement_of_yesterday_never_credits_today(bench: Bench) -> None:
    bench.put_in_force(Quota(1000, unit="tokens"))
    yesterday = bench.ask(900)
    bench.wait(bench.world.model.pool.limit(LIMIT).spending.reset_at - bench.world.wall_ms + 1000)
    today = bench.ask(500)
    assert bench.spent == 500
    bench.end(yesterday, 0)
    assert bench.spent == 500
    bench.end(today, 200)
    assert bench.spent == 200


def test_a_live_change_of_the_policy_keeps_what_is_still_to_be_settled(bench: Bench) -> None:
    call = bench.ask(700)
    bench.put_in_force(Rate(2000, MINUTE_MS, "tokens"))
    bench.end(call, 100)
    assert bench.spent == 100


def test_what_takes_nothing_of_a_rate_waits_for_nobody_behind_its_last_one(bench: Bench) -> None:
    bench.ask(700, tenant="before")
    first = bench.ask(400, lane=(ROOM, LIMIT))
    nothing = bench.ask(0, lane=(ROOM, LIMIT))
    bench.ask(900, tenant="zeta")
    assert bench.running == 1
    bench.wait(MINUTE_MS + 2000)
    assert first in bench.client.queue.held
    assert nothing in bench.client.queue.held


def test_what_takes_nothing_of_a_rate_waits_for_nobody_when_one_gives_up(bench: Bench) -> None:
    bench.ask(700)
    bench.ask(900, tenant="other")
    first = bench.ask(400, lane=(ROOM, LIMIT))
    nothing = bench.ask(0, lane=(ROOM, LIMIT))
    assert bench.running == 1
    bench.client.queue.abandon(first, bench.world.local_ms)
    bench.say()
    assert nothing in bench.client.queue.held


@pytest.mark.parametrize(("low", "great"), [(100, 1000), (200, 100), (700, 300), (1000, 100)])
def test_bands_share_a_rate_in_both_worlds(bench: Bench, low: int, great: int) -> None:
    """Each answer, and all that is kept, is compared on the way."""
    bench.put_in_force(Rate(1000, 2000, "tokens"))
    high_calls = 0
    for number in range(150):
        if len(bench.client.queue.waiting) < 6:
            bench.ask(great if number % 10 == 0 else 60, band=1)
            bench.ask(low, band=3)
            bench.ask(50, band=2 + number % 2)
        bench.wait(110)
        for ticket, holding in list(bench.client.queue.held.items()):
            high_calls += holding.flow.band == 1
            bench.end(ticket, None if number % 3 else 40)
        waiting = list(bench.client.queue.waiting)
        if waiting and number % 7 == 0:
            bench.client.queue.abandon(waiting[-1], bench.world.local_ms)
    assert high_calls > 10


def test_a_paced_rate_admits_an_even_flow(bench: Bench) -> None:
    """60 a minute as 1 a second: what the first takes more the next one waits for."""
    bench.put_in_force(Rate(60, MINUTE_MS, slack_ms=0, pace_ms=1000))
    tickets = [bench.ask(1) for _ in range(5)]
    admitted = []
    for _ in range(6):
        admitted.append(sum(ticket in bench.client.queue.held for ticket in tickets))
        bench.wait(1001)
    assert admitted == [1, 2, 3, 4, 5, 5]


def test_a_call_larger_than_the_pace_is_made_up_for(bench: Bench) -> None:
    bench.put_in_force(Rate(6000, MINUTE_MS, "tokens", slack_ms=0, pace_ms=1000))
    large, next_one = bench.ask(1000), bench.ask(100)
    assert (large in bench.client.queue.held, bench.running) == (True, 1)
    bench.wait(
        9_000
    )  # 1000 take 10 s; of which the next one may come a second earlier, with its own
    assert bench.running == 1
    bench.wait(1_100)
    assert next_one in bench.client.queue.held


def test_what_a_call_gives_back_a_paced_rate_gives_on(bench: Bench) -> None:
    bench.put_in_force(Rate(6000, MINUTE_MS, "tokens", slack_ms=0, pace_ms=1000))
    large, next_one = bench.ask(1000), bench.ask(40)
    assert bench.running == 1
    bench.end(large, 50)
    assert next_one in bench.client.queue.held


BUCKET = Rate(6000, MINUTE_MS, "tokens", slack_ms=0, shape="bucket")


def test_a_bucket_refills_evenly(bench: Bench) -> None:
    """100 a second: the next 200 fit a part of the window and two seconds after all was taken."""
    bench.put_in_force(BUCKET)
    first, next_one = bench.ask(6000), bench.ask(200)
    assert (first in bench.client.queue.held, bench.running) == (True, 1)
    bench.wait(1_900)
    assert bench.running == 1
    bench.wait(1_300)
    assert next_one in bench.client.queue.held


def test_what_a_call_returns_to_a_bucket_is_no_room_in_what_others_took_since(
    bench: Bench,
) -> None:
    bench.put_in_force(BUCKET)
    first = bench.ask(6000)
    bench.wait(MINUTE_MS - 2_000)  # it is full again, but for what the last two seconds refill
    second, third = bench.ask(5_500), bench.ask(5_000)
    assert second in bench.client.queue.held
    bench.end(first, 100)
    assert third not in bench.client.queue.held
    bench.end(second, 100)
    assert third in bench.client.queue.held


def test_a_limit_becomes_a_bucket_and_a_window_again_and_loses_nothing(bench: Bench) -> None:
    bench.put_in_force(replace(BUCKET, shape="window"))
    call = bench.ask(3_000)
    bench.wait(30_000)
    bench.put_in_force(BUCKET)
    assert bench.spent == 3_000  # as full as what its last window took
    bench.end(call, 1_000)
    assert bench.spent == 1_000
    bench.put_in_force(replace(BUCKET, bound=12_000))
    bench.ask(7_000)
    assert 7_900 <= bench.spent <= 8_000
    bench.put_in_force(replace(BUCKET, shape="window", bound=12_000))
    assert bench.spent == 8_000
    bench.put_in_force(Rate(9, MINUTE_MS, shape="bucket"))
    assert bench.spent == 18  # never more than twice the bound
    bench.put_in_force(Rate(9, MINUTE_MS))
    assert bench.spent == 18


def test_a_call_behind_others_of_a_bucket_is_told_when_all_have_refilled(bench: Bench) -> None:
    """Both worlds refuse the same calls early, by the same moment."""
    bench.put_in_force(replace(BUCKET, settles=False))
    bench.ask(6_000)
    for tokens in (100, 2_000, 400):
        bench.ask(tokens)
    for _ in range(30):
        for ticket in list(bench.client.queue.waiting):
            bench.world.look(bench.client, ticket)
        bench.wait(1_000)
    assert not bench.client.queue.waiting


def test_a_ramp_lets_use_grow_no_faster_than_it_says(bench: Bench) -> None:
    bench.put_in_force(Rate(1000, 10_000, "tokens", slack_ms=0, ramp=Ramp(100, 10)))
    taken = []
    for number in range(18):
        while len(bench.client.queue.waiting) < 6:
            bench.ask(5)
        taken.append(0)
        for _ in range(5):
            bench.wait(2_000)
            for ticket in list(bench.client.queue.held):
                bench.end(ticket, 5)
                taken[number] += 5
                bench.ask(5)
    assert max(taken[:3]) <= 25
    assert taken[-1] > 2 * taken[0]
    for before, after in zip(taken, taken[6:], strict=False):
        assert after <= 2 * max(10, before) + 20


RAMP = Ramp(10, 100)


@pytest.mark.parametrize(
    "rate",
    [
        Rate(1000, MINUTE_MS, "tokens", slack_ms=0, settles=False, ramp=RAMP),
        Rate(1000, MINUTE_MS, "tokens", slack_ms=0, settles=False, ramp=RAMP, shape="bucket"),
    ],
)
def test_a_ramp_has_room_as_soon_as_calls_of_its_window_expire(bench: Bench, rate: Rate) -> None:
    """Its bound grows by ten a minute, so what expires makes room first."""
    bench.put_in_force(rate)
    bench.end(bench.ask(50), 50)
    bench.wait(30_000)
    bench.end(bench.ask(50), 50)
    bench.ask(40)
    assert bench.running == 0
    at = bench.world.model.pump.timed[LIMIT] - bench.world.model.pool.now
    assert 30_000 <= at <= 31_500
    bench.wait(at - 1)
    assert bench.running == 0
    bench.wait(1)
    assert bench.running == 1


def test_a_ramp_of_requests_has_room_as_soon_as_one_of_them_expires(bench: Bench) -> None:
    bench.put_in_force(Rate(100, MINUTE_MS, slack_ms=0, ramp=Ramp(1, 4)))
    for _ in range(4):
        bench.end(bench.ask(0), None)
        bench.wait(10_000)
    bench.ask(0)
    at = bench.world.model.pump.timed[LIMIT] - bench.world.model.pool.now
    assert at == 20_001
    bench.wait(at)
    assert bench.running == 1


def test_waiters_of_a_rate_keep_their_turn_until_their_process_has_acknowledged(
    bench: Bench,
) -> None:
    bench.put_in_force(Rate(20, 10_000, slack_ms=0))
    clients = [bench.client, bench.world.new_client()]

    def say() -> None:
        for bench.client in clients:
            for push in bench.client.mailbox:
                bench.client.session.take_push(push)
            bench.client.mailbox.clear()
            bench.say()

    def pass_time(ms: int) -> None:
        for _ in range(ms // 500):
            bench.world.advance(500)
            bench.world.renew(clients)

    say()
    pass_time(LEASE_MS)  # all know the new process
    for one in clients:
        one.session.refresh()
    say()
    for _ in range(20):
        bench.client = clients[0]
        bench.ask(0)
    waiting = []
    for number in range(40):
        bench.client = clients[number % 2]
        waiting.append((number % 2, bench.ask(0)))
    pass_time(10_500)
    bench.client = clients[0]
    bench.client.session.refresh()
    bench.say()
    assert len(clients[1].mailbox) > 0
    model = bench.world.model.pool.sessions[clients[1].sid]
    assert model.full is not None
    say()
    say()
    admitted = [(who, t) for who, t in waiting if t not in clients[who].queue.waiting]
    assert admitted == waiting[:20]
    assert model.full is None


def test_a_quota_restarts_though_a_process_took_its_midnight_for_past(bench: Bench) -> None:
    """A process reckons the server's time from its own clock and asks a moment before midnight."""
    bench.put_in_force(Quota(1))
    bench.ask(1)
    state = bench.world.model.pool.limit(LIMIT).spending
    bench.wait(state.reset_at - bench.world.wall_ms - 500)
    bench.world.local_ms += 600
    second = bench.ask(1)
    assert second not in bench.client.queue.held
    bench.wait(1000)
    assert second in bench.client.queue.held
    assert bench.spent == 1


def test_what_a_paced_rate_took_in_shadow_delays_calls_for_a_window_at_most(bench: Bench) -> None:
    paced = Rate(60, MINUTE_MS, slack_ms=0, pace_ms=1000)
    bench.put_in_force(replace(paced, shadow=True))
    for _ in range(300):
        bench.ask(1)
    assert bench.running == 300
    bench.put_in_force(paced)
    bench.wait(MINUTE_MS + 1000)
    bench.ask(1)
    assert bench.running == 301


@pytest.mark.parametrize(
    "limit", [Concurrency(5, shadow=True), Rate(1000, MINUTE_MS, "tokens", shadow=True)]
)
def test_a_pause_holds_calls_at_a_limit_in_shadow_too(bench: Bench, limit: Limit) -> None:
    bench.put_in_force(limit)
    bench.world.pause(LIMIT, 10_000, 1)
    call = bench.ask(1)
    assert call not in bench.client.queue.held
    bench.wait(11_000)
    assert call in bench.client.queue.held


def test_a_band_that_waited_for_its_pace_alone_keeps_no_lower_one_waiting(bench: Bench) -> None:
    """An even flow that pauses for a second is no rate that is used up for a window."""
    bench.put_in_force(Rate(60, MINUTE_MS, slack_ms=0, pace_ms=1000))
    bench.ask(1, band=1)
    high = bench.ask(1, band=1)
    assert high not in bench.client.queue.held
    bench.wait(1100)
    assert high in bench.client.queue.held
    low = bench.ask(1, band=3)
    bench.wait(1100)
    assert low in bench.client.queue.held


def test_a_bucket_that_was_overfull_under_a_higher_bound_is_due_for_two_windows(
    bench: Bench,
) -> None:
    """As after a charge for what others have used, or in shadow."""
    higher = Rate(1000, MINUTE_MS, "tokens", slack_ms=0, shape="bucket")
    bench.put_in_force(higher)
    bench.world.charge(LIMIT, 5000)
    bench.wait(MINUTE_MS + 2000)
    bench.put_in_force(replace(higher, bound=10))
    bench.wait(2 * MINUTE_MS)
    call = bench.ask(5)
    assert call in bench.client.queue.held


@pytest.mark.parametrize("waits_ms", [0, 1_000, 20_000])
def test_a_bucket_owes_under_a_lower_bound_what_calls_took_before(
    bench: Bench, waits_ms: int
) -> None:
    """Two of the lower bound at most, as of the change, and not as of when it was taken."""
    bench.put_in_force(BUCKET)
    bench.end(bench.ask(4_000), 4_000)
    bench.wait(30_000)
    due = bench.spent
    assert 1_000 <= due <= 1_200
    bench.put_in_force(replace(BUCKET, bound=600))
    assert bench.spent == due
    bench.wait(waits_ms)
    assert abs(bench.spent - (due - waits_ms // 100)) <= 10


def test_a_bound_that_is_lowered_and_raised_again_leaves_a_bucket_as_it_was(
    bench: Bench,
) -> None:
    """What refilled before the first of two changes of a minute stays refilled too."""
    bench.put_in_force(BUCKET)
    bench.end(bench.ask(3_000), 3_000)
    bench.wait(40_000)
    assert bench.spent == 0
    bench.put_in_force(replace(BUCKET, bound=600))
    bench.wait(1_000)
    bench.put_in_force(BUCKET)
    assert bench.spent == 0
    call = bench.ask(6_000)
    assert call in bench.client.queue.held


@pytest.mark.parametrize(
    "limit",
    [
        Concurrency(0, shadow=True, unit="tokens_in_flight"),
        Rate(0, MINUTE_MS, shadow=True),
        Rate(0, MINUTE_MS, "tokens", shadow=True, pace_ms=1000, ramp=Ramp(50, 1)),
        Rate(0, MINUTE_MS, "tokens", shadow=True, shape="bucket"),
        Quota(0, shadow=True),
    ],
)
def test_a_limit_of_0_in_shadow_counts_and_admits(bench: Bench, limit: Limit) -> None:
    bench.put_in_force(limit)
    first = bench.ask(100, band=3)
    bench.wait(MINUTE_MS + 2000)
    bench.ask(100)
    bench.end(first, 700)
    assert bench.running == 1
    assert bench.world.model.pool.limit(LIMIT).shadowed == 2


@pytest.mark.parametrize(
    "limit",
    [
        Concurrency(1000, shadow=True, unit="tokens_in_flight"),
        Rate(1000, MINUTE_MS, "tokens", shadow=True, pace_ms=1000, ramp=Ramp(50, 1)),
        Rate(1000, MINUTE_MS, "tokens", shadow=True, shape="bucket"),
        Quota(1000, "tokens", shadow=True),
    ],
)
def test_a_limit_in_shadow_outlives_a_call_that_names_any_bound(bench: Bench, limit: Limit) -> None:
    """Lua's whole numbers end at 2^53, and what it writes at 2^63 is negative."""
    bench.put_in_force(limit)
    great = bench.ask(10**20)
    bench.wait(1000)
    bench.ask(100)
    bench.end(great, 700)
    bench.ask(100)
    assert bench.running == 2


def test_a_bucket_of_0_in_shadow_that_never_refills_stays_countable(bench: Bench) -> None:
    bench.put_in_force(Rate(0, MINUTE_MS, "tokens", shadow=True, shape="bucket"))
    for _ in range(2):
        first = bench.ask(10**10)
        bench.end(first, 4 * 10**14)
        bench.wait(MINUTE_MS + 4000)
    bench.ask(100)
    assert bench.running == 1


@pytest.mark.parametrize(
    "limit",
    [
        Rate(1000, MINUTE_MS, "tokens"),
        replace(BUCKET, bound=1_000),
        Rate(100, MINUTE_MS, slack_ms=0),
        Quota(1_000, unit="tokens"),
    ],
)
def test_what_was_taken_lately_is_found_by_its_time(bench: Bench, limit: Limit) -> None:
    bench.put_in_force(limit)
    is_log, is_day = isinstance(limit, Rate) and limit.exact, isinstance(limit, Quota)
    for tokens in (100, 200, 300):
        bench.end(bench.ask(tokens), tokens)
        bench.wait(10_000)
    for age_ms, calls in ((9_000, 0), (15_000, 1), (25_000, 2), (35_000, 3)):
        lately = [300, 200, 100][: 3 if is_day else calls]
        assert bench.world.look_back(LIMIT, age_ms) == (calls if is_log else sum(lately))
    bench.wait(45_000)
    assert bench.world.look_back(LIMIT, 90_000) == (1 if is_log else 600 if is_day else 300)


HEADROOM = (Band("high"), Band("normal", min_share=0.2, headroom=0.3), Band("low", min_share=0.1))


@pytest.mark.parametrize(
    ("limit", "bands", "shares"),
    [
        (Concurrency(1), DEFAULT_BANDS, (100, 50)),
        # Calls of 100 behind some of 875: a tenth of the admissions, and a twentieth.
        (Concurrency(2000, unit="tokens_in_flight"), DEFAULT_BANDS, (12, 5)),
        (Concurrency(2), HEADROOM, (200, 100)),
        (Concurrency(2000, unit="tokens_in_flight"), HEADROOM, (27, 12)),
    ],
)
def test_a_place_tells_what_a_band_gets_of_a_limit_behind_higher_ones(
    bench: Bench, limit: Concurrency, bands: tuple[Band, ...], shares: tuple[int, int]
) -> None:
    bench.put_in_force(limit, bands)
    for _ in range(2):
        bench.ask(2000)
    bench.ask(900)
    bench.ask(300, tenant="u")
    for band, share in enumerate(shares, 2):
        ticket = bench.ask(100, band)
        bench.world.look(bench.client, ticket)
        *_, line = bench.world.model.position(bench.client.sid, ticket, bench.world.wall_ms)
        assert line[9] == share


@pytest.mark.parametrize(
    ("limit", "room_ms"),
    [(Concurrency(1), 110_000), (Concurrency(1, unit="tokens_in_flight"), 308_000)],
)
def test_behind_a_higher_band_both_worlds_refuse_by_the_least_share(
    bench: Bench, limit: Concurrency, room_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second each, and a tenth of the admissions: 11 of them are 110 of all, however few there
    were of late. Of tokens in flight it is not known here what others take."""
    bench.put_in_force(limit)
    for band, calls in ((1, 4), (2, 12)):
        for _ in range(calls):
            bench.ask(1, band)
    for _ in range(29):
        bench.wait(1_000)
        bench.end(next(iter(bench.client.queue.held)), 1)
        bench.ask(1)
    told = list[Barred]()
    hear = bench.world.call

    def call(request: SyncRequest, *, tend: bool) -> SyncReply:
        reply = hear(request, tend=tend)
        told.extend(reply.barred)
        return reply

    monkeypatch.setattr(bench.world, "call", call)
    bench.ask(1, 2, left_ms=1_000)
    assert [(one.ahead, one.room_ms) for one in told] == [(10, room_ms)]


def test_a_band_that_waited_for_its_room_until_now_has_it_before_lower_ones(bench: Bench) -> None:
    """Nothing looked whether it had any from when it found none until time gave it some."""
    for tokens in (500, 500, 100):
        bench.ask(tokens)
    bench.wait(MINUTE_MS + 2_000)
    assert bench.running == 3
    low = bench.ask(100, band=3)
    assert low in bench.client.queue.waiting
    bench.wait(MINUTE_MS + 2_000)
    assert low in bench.client.queue.held


@pytest.mark.parametrize("unit", ["requests", "tokens"])
def test_what_is_charged_evenly_ceases_to_count_evenly(
    bench: Bench, unit: Literal["requests", "tokens"]
) -> None:
    """Charged at one moment it would free room for all that waits at one moment too."""
    bench.put_in_force(Rate(100, MINUTE_MS, unit, slack_ms=0))
    bench.ask(1)
    bench.world.charge(LIMIT, 60, evenly=True)
    assert bench.spent == 61
    for seconds in range(10, 60, 10):
        bench.wait(10_000)
        assert abs(bench.spent - (61 - seconds)) <= 2
    bench.wait(10_000)
    assert bench.spent <= 2


CHARGED = [
    Rate(20_000, MINUTE_MS, "tokens", slack_ms=0),
    Rate(500, MINUTE_MS, slack_ms=0),
    Rate(20_000, MINUTE_MS, "tokens", slack_ms=0, shape="bucket"),
    Rate(500, MINUTE_MS, slack_ms=0, shape="bucket"),
    Quota(500, "requests"),
    Quota(20_000, "tokens"),
]


def make_calls(bench: Bench, count: int, tokens: int = 10) -> None:
    for _ in range(count):
        bench.end(bench.ask(tokens), tokens)


def amount_of_calls(limit: Rate | Quota, count: int, tokens: int = 10) -> int:
    return count if limit.unit == "requests" else count * tokens


@pytest.mark.parametrize("evenly", [False, True])
@pytest.mark.parametrize("limit", CHARGED)
def test_a_lower_bound_ends_what_was_charged_for_the_difference(
    bench: Bench, limit: Rate | Quota, evenly: bool
) -> None:
    """Calls between the charges and among them count on."""
    bench.put_in_force(limit)
    fell, others, calls = limit.bound * 3 // 4, limit.bound // 20, amount_of_calls(limit, 3)
    make_calls(bench, 2)
    bench.world.charge(LIMIT, fell + others, evenly=evenly, bound=limit.bound)
    make_calls(bench, 1)
    assert bench.spent == fell + others + calls
    bench.put_in_force(replace(limit, bound=limit.bound - fell))
    assert bench.spent == others + calls
    waits = bench.ask(10)
    assert waits in bench.client.queue.held
    bench.put_in_force(limit)
    bench.put_in_force(replace(limit, bound=limit.bound - fell))
    # The rest was for a difference that ended too, but for what ends within a moment.
    assert 0 <= bench.spent - amount_of_calls(limit, 4) <= 5


@pytest.mark.parametrize("evenly", [False, True])
@pytest.mark.parametrize("limit", CHARGED)
def test_a_lower_bound_frees_nothing_that_calls_have_spent(
    bench: Bench, limit: Rate | Quota, evenly: bool
) -> None:
    """Nor what was charged for calls themselves, as of a realtime session."""
    bench.put_in_force(limit)
    make_calls(bench, 5)
    bench.world.charge(LIMIT, 7, evenly=evenly)
    bench.world.charge(LIMIT, 20, evenly=evenly, bound=limit.bound)
    by_calls = amount_of_calls(limit, 5) + 7
    assert bench.spent == by_calls + 20
    bench.put_in_force(replace(limit, bound=limit.bound - 12))
    assert bench.spent == by_calls + 8
    for bound in (300, limit.bound, 200):
        bench.put_in_force(replace(limit, bound=bound))
        assert bench.spent == by_calls


@pytest.mark.parametrize("limit", CHARGED)
def test_a_charge_beside_another_bound_than_the_one_in_force_is_not_made(
    bench: Bench, limit: Rate | Quota
) -> None:
    """It comes late: what it is for has ended."""
    bench.put_in_force(limit)
    bench.world.charge(LIMIT, 100, bound=limit.bound + 1)
    assert bench.spent == 0


@pytest.mark.parametrize(
    "other",
    [
        Rate(200, 2 * MINUTE_MS, "tokens", slack_ms=0),
        Rate(200, MINUTE_MS, slack_ms=0),
        Quota(200, "tokens"),
    ],
)
def test_what_is_counted_otherwise_from_now_on_keeps_what_was_charged(
    bench: Bench, other: Rate | Quota
) -> None:
    limit = Rate(300, MINUTE_MS, "tokens", slack_ms=0)
    is_longer = isinstance(other, Rate) and other.window_ms != limit.window_ms
    bench.put_in_force(limit)
    bench.world.charge(LIMIT, 180, bound=300)
    bench.put_in_force(other)
    charged = 180 if is_longer or isinstance(other, Quota) else 80
    assert bench.spent == charged
    bench.put_in_force(replace(other, bound=50))
    assert bench.spent == charged


def test_of_a_charge_that_ended_nothing_is_freed(bench: Bench) -> None:
    limit = Rate(500, MINUTE_MS, slack_ms=0)
    bench.put_in_force(limit)
    bench.world.charge(LIMIT, 380, evenly=True, bound=500)
    bench.wait(MINUTE_MS + 2_000)
    make_calls(bench, 200)
    bench.put_in_force(replace(limit, bound=120))
    assert bench.spent == 200


def test_a_bucket_that_a_charge_held_at_the_accounts_level_has_it_under_the_lower_bound(
    bench: Bench,
) -> None:
    """The account refills 2 a second, the limit 8: charged each second, the difference is the same
    for longer than a window."""
    limit = Rate(480, MINUTE_MS, slack_ms=0, shape="bucket")
    bench.put_in_force(limit)
    make_calls(bench, 60)
    bench.world.charge(LIMIT, 360, bound=480)
    for _ in range(90):
        bench.wait(1_000)
        make_calls(bench, 2)
        bench.world.charge(LIMIT, 420 - bench.spent, bound=480)
    bench.put_in_force(replace(limit, bound=120))
    assert 60 <= bench.spent <= 68


@pytest.mark.parametrize("limit", [Quota(1000), Quota(100_000, "tokens")])
def test_what_is_on_record_of_a_day_is_counted_at_least(bench: Bench, limit: Quota) -> None:
    """What is counted already is a part of it, whichever comes first after a loss."""
    bench.put_in_force(limit)
    bench.end(bench.ask(1), 1)
    for recorded, spent in ((40, 40), (40, 40), (30, 40), (50, 50)):
        bench.world.charge(LIMIT, recorded, recorded=True)
        assert bench.spent == spent
    bench.end(bench.ask(1), 1)
    assert bench.spent == 51
    bench.world.flush()
    bench.wait(10_000)
    seen = bench.spent
    assert seen >= 1, "processes report what they have seen"
    bench.world.charge(LIMIT, 51, recorded=True)
    assert bench.spent == max(seen, 51)


def test_what_is_on_record_is_charged_to_days_alone(bench: Bench) -> None:
    bench.put_in_force(Rate(100, MINUTE_MS))
    bench.world.charge(LIMIT, 40, recorded=True)
    assert bench.spent == 0


_SHAPES = (
    Rate(3, MINUTE_MS, slack_ms=0),
    Rate(3, MINUTE_MS, slack_ms=0, shape="bucket"),
    Quota(3),
    Rate(3, MINUTE_MS, "images", slack_ms=0),
)


@pytest.mark.parametrize("before", _SHAPES)
@pytest.mark.parametrize("between", _SHAPES)
def test_a_lower_bound_of_another_shape_takes_along_all_that_was_admitted(
    bench: Bench, before: Rate | Quota, between: Rate | Quota
) -> None:
    """Once the bound is raised again, what was admitted before still counts."""
    bench.put_in_force(before)
    for _ in range(3):
        assert bench.ask(1) in bench.client.queue.held
    bench.put_in_force(replace(between, bound=1))
    bench.put_in_force(before)
    assert bench.ask(1) not in bench.client.queue.held
