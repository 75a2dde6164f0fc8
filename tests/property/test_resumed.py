"""Calls that come while a limit resumes gradually after a pause: which are refused, until when."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.property.policies import LEASE_MS
from tests.property.server import Server
from tests.property.world import Client, World
from tidegate.errors import DeadlineExceeded, LimitPaused, LimitUsedUp
from tidegate.limiter import Concurrency, Demand, Limit, PoolPolicy, Ramp, Rate, Tokens
from tidegate.limiter.simulation import Paces, Waiter

LIMIT, MODEL = "some:limit", "model:m"
MINUTE_MS = 60_000
# After a pause of a second, one call a second: 60 in a minute.
PAUSE_MS, RAMP_MS = 1000, MINUTE_MS


class Bench:
    """One process, under a limit that was paused."""

    def __init__(
        self, server: Server, limit: Limit, name: str = LIMIT, *, paused: bool = True
    ) -> None:
        policy = PoolPolicy({LIMIT: limit}, lease_ms=LEASE_MS, revision=1)
        self.name = name
        self.world = World(server, policy, Paces())
        self.client: Client = self.world.new_client()
        self.say()
        if paused:
            self.world.pause(name, PAUSE_MS, RAMP_MS)
        self.refresh()

    def say(self) -> None:
        while self.client.session.is_request_due():
            self.world.exchange(self.client, "ok")

    def refresh(self) -> None:
        self.client.session.refresh()
        self.say()

    def ask(
        self,
        left_ms: float = float("inf"),
        *,
        tokens: int = 1,
        tenant: str = "t",
        by_estimate: bool = True,
    ) -> Waiter:
        at, lane = self.world.local_ms, (self.name,)
        flow = self.client.queue.flow(1, tenant, lane)
        flow.refresh(self.client.session.policy)
        waiter = self.client.queue.ask(
            flow,
            amounts=flow.amounts(Demand(lane, tokens=Tokens(tokens))),
            hard_ms=1_000_000,
            now_ms=at,
            deadline_ms=at + left_ms,
            by_estimate=by_estimate and left_ms < float("inf"),
        )
        self.say()
        return waiter

    def pass_until(self, is_over: Callable[[], bool]) -> float:
        """The time until something, in steps of 100 ms."""
        began_ms = self.world.local_ms
        while not is_over():
            self.world.advance(100)
            self.refresh()
        return self.world.local_ms - began_ms


Made = Callable[..., Bench]


@pytest.fixture
def made(server: Server) -> Iterator[Made]:
    found: list[Bench] = []

    def make(limit: Limit, name: str = LIMIT, *, paused: bool = True) -> Bench:
        found.append(Bench(server, limit, name, paused=paused))
        return found[-1]

    yield make
    for one in found:
        one.world.close()


def refusal(waiter: Waiter) -> DeadlineExceeded:
    error = waiter.future.exception()
    assert isinstance(error, DeadlineExceeded)
    assert error.retry_after_ms is not None
    return error


@pytest.mark.parametrize("when", ["during the pause", "after it"])
@pytest.mark.parametrize("limit", [Rate(60, MINUTE_MS), Concurrency(60)], ids=["rate", "calls"])
def test_a_call_behind_others_of_its_flow_is_told_when_the_ramp_reaches_it(
    made: Made, limit: Limit, when: str
) -> None:
    bench = made(limit)
    if when == "after it":
        bench.world.advance(PAUSE_MS)
        first = bench.ask()
        assert first.ticket in bench.client.queue.held
    ahead = 4 if when == "after it" else 5
    for _ in range(ahead):
        bench.ask()
    late = bench.ask(left_ms=3000)
    error = refusal(late)
    assert isinstance(error, LimitPaused)
    assert not error.is_estimate
    assert str(error) == (
        f"Limit {LIMIT} resumes gradually after a pause, and {ahead} calls come before this one. "
        f"There is room in {(error.retry_after_ms or 0) // 1000} s."
    )
    last = bench.ask()
    real_ms = bench.pass_until(lambda: last.ticket in bench.client.queue.held)
    assert error.retry_after_ms == pytest.approx(real_ms, abs=100)


def test_a_call_that_the_ramp_reaches_in_time_waits(made: Made) -> None:
    bench = made(Rate(60, MINUTE_MS))
    bench.world.advance(PAUSE_MS)
    for _ in range(4):
        bench.ask()
    assert bench.ask(left_ms=4100).ticket in bench.client.queue.waiting


def test_a_model_without_a_limit_resumes_like_one_of_64(made: Made) -> None:
    bench = made(Rate(60, MINUTE_MS), MODEL)
    bench.world.advance(PAUSE_MS)
    for _ in range(9):
        bench.ask()
    error = refusal(bench.ask(left_ms=8000))
    assert error.retry_after_ms == -(-9 * RAMP_MS // 64)
    assert error.limit == MODEL


def test_behind_other_tenants_it_is_an_estimate(made: Made) -> None:
    bench = made(Rate(60, MINUTE_MS))
    bench.world.advance(PAUSE_MS)
    for tenant in ["other"] * 20 + ["t"] * 10:
        bench.ask(tenant=tenant)
    # Ten calls of its own come first for certain, and probably as many of the other tenant.
    assert bench.ask(left_ms=25_000).ticket in bench.client.queue.waiting
    error = refusal(bench.ask(left_ms=14_000))
    assert error.is_estimate
    assert error.retry_after_ms in range(20_000, 25_000)
    assert "which is an estimate" in str(error)


def test_tokens_that_may_be_returned_make_it_an_estimate_with_half_of_them(made: Made) -> None:
    bench = made(Rate(6000, MINUTE_MS, "tokens"))
    bench.world.advance(PAUSE_MS)
    for _ in range(11):
        bench.ask(tokens=500)  # five seconds each
    assert bench.ask(left_ms=29_000, tokens=500).ticket in bench.client.queue.waiting
    error = refusal(bench.ask(left_ms=20_000, tokens=500))
    assert error.is_estimate
    assert (error.retry_after_ms or 0) >= 50_000


def test_a_library_call_is_refused_only_for_certain(made: Made) -> None:
    bench = made(Rate(60, MINUTE_MS))
    bench.world.advance(PAUSE_MS)
    for tenant in ["other"] * 20 + ["t"] * 10:
        bench.ask(tenant=tenant)
    waiter = bench.ask(left_ms=14_000, by_estimate=False)
    assert waiter.ticket in bench.client.queue.waiting


@pytest.mark.parametrize("by_estimate", [True, False])
def test_a_ramp_alone_refuses_calls_only_by_an_estimate(made: Made, by_estimate: bool) -> None:
    """What expires and what others take may let the bound grow sooner than it does now."""
    bench = made(Rate(100, MINUTE_MS, slack_ms=0, ramp=Ramp(1, 4)), paused=False)
    for _ in range(4):
        bench.ask()
        bench.world.advance(10_000)
        bench.refresh()
    late = bench.ask(left_ms=15_000, by_estimate=by_estimate)
    if not by_estimate:
        assert late.ticket in bench.client.queue.waiting
        return
    error = refusal(late)
    assert error.is_estimate
    assert error.retry_after_ms in range(20_000, 20_100)  # when the first call has expired
    assert bench.ask(left_ms=25_000).ticket in bench.client.queue.waiting


def test_the_window_of_a_ramp_that_has_grown_refuses_for_certain(made: Made) -> None:
    bench = made(Rate(4, MINUTE_MS, slack_ms=0, ramp=Ramp(1, 4)), paused=False)
    for _ in range(4):
        bench.ask()
    error = refusal(bench.ask(left_ms=15_000, by_estimate=False))
    assert not error.is_estimate


GROWING = Rate(600, MINUTE_MS, ramp=Ramp(100, start=10))


def growing(made: Made, limit: Rate = GROWING, tokens: int = 1) -> Bench:
    """Under a limit whose ramp began 90 s ago, and which has been full since then."""
    bench = made(limit, paused=False)
    for _ in range(400):
        bench.ask(tokens=tokens)
    began_ms = bench.world.local_ms
    bench.pass_until(lambda: bench.world.local_ms - began_ms >= 90_000)
    assert bench.client.queue.waiting
    return bench


@pytest.mark.parametrize("seconds", [5, 40, 100])
def test_a_call_that_a_growing_limit_does_not_reach_in_time_is_refused_by_an_estimate(
    made: Made, seconds: int
) -> None:
    bench = growing(made)
    waiting = list(bench.client.queue.waiting.values())
    for waiter in waiting[{5: 8, 40: 20, 100: 60}[seconds] :]:
        bench.client.queue.abandon(waiter.ticket, bench.world.local_ms)
    bench.say()
    error = refusal(bench.ask(left_ms=seconds * 1000 / 3))
    assert isinstance(error, LimitUsedUp)
    assert error.is_estimate
    last = bench.ask()
    real_ms = bench.pass_until(lambda: last.ticket in bench.client.queue.held)
    assert error.retry_after_ms == pytest.approx(real_ms, rel=0.02, abs=1000)


def test_the_next_call_of_a_growing_limit_is_told_when_it_has_grown(made: Made) -> None:
    bench = made(Rate(600, MINUTE_MS, ramp=Ramp(60, start=10)), paused=False)
    while not bench.client.queue.waiting:
        bench.ask()
    [waiter] = bench.client.queue.waiting.values()
    bench.client.queue.abandon(waiter.ticket, bench.world.local_ms)
    bench.say()
    error = refusal(bench.ask(left_ms=1000))
    assert error.retry_after_ms in range(10_000, 10_100)  # 6 a minute more
    assert bench.ask(left_ms=11_000).ticket in bench.client.queue.waiting
