"""Breaker and budget."""

from __future__ import annotations

import pytest

from tidegate.errors import (
    UpstreamError,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnauthorized,
    UpstreamUnavailable,
)
from tidegate.relay.health import (
    DEAD_KEY_S,
    FAULTS,
    FAULTS_OF_ONE,
    FIRST_S,
    LONGEST_S,
    Health,
    RetryBudget,
    Suspect,
    can_be_provoked,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def out(clock: Clock) -> Health:
    health = Health(clock)
    for _ in range(FAULTS):
        health.failed("no")
    return health


def test_some_faults_in_a_row_put_it_out_and_a_success_between_does_not() -> None:
    clock = Clock()
    health = Health(clock)
    for _ in range(3):
        for _ in range(FAULTS - 1):
            assert not health.failed("no")
        assert health.admits()
        health.succeeded()
    assert health.state == "ok"
    assert out(clock).state == "out"
    assert not out(clock).admits()


def test_one_may_try_when_its_time_is_over() -> None:
    clock = Clock()
    health = out(clock)
    clock.now += FIRST_S
    assert health.state == "trying"
    assert [health.admits() for _ in range(3)] == [True, False, False]
    assert health.succeeded()
    assert all(health.admits() for _ in range(3))


def test_it_is_left_out_for_longer_each_time_up_to_a_bound() -> None:
    clock = Clock()
    health = out(clock)
    waits = []
    for _ in range(12):
        waits.append(health.back_in_ms() / 1000)
        clock.now = health.open_until
        assert health.admits()
        health.failed("still no")
    assert waits == sorted(waits)
    assert waits[0] == FIRST_S
    assert waits[-1] == LONGEST_S


def test_a_probe_that_never_ends_does_not_lock_it_out() -> None:
    clock = Clock()
    health = out(clock)
    clock.now += FIRST_S
    assert health.admits()
    clock.now += FIRST_S
    assert health.admits()


def test_a_refused_key_is_out_at_once_and_said_once() -> None:
    clock = Clock()
    health = Health(clock)
    assert health.failed("401", key_dead=True)
    assert not health.failed("401", key_dead=True)
    assert (health.state, health.key_dead) == ("out", True)
    clock.now += DEAD_KEY_S
    assert health.admits()
    assert health.succeeded()
    assert not health.key_dead


def test_one_request_that_fails_however_often_puts_nothing_out() -> None:
    health = Health(Clock())
    for _ in range(100):
        assert not health.failed("500", suspect=Suspect("a", 1))
    assert health.state == "ok"
    assert health.admits()


def test_one_tenants_requests_put_nothing_out_until_very_many_have_failed() -> None:
    health = Health(Clock())
    for request in range(FAULTS_OF_ONE - 1):
        assert not health.failed("500", suspect=Suspect("a", request))
    assert health.admits()
    assert health.failed("500", suspect=Suspect("a", FAULTS_OF_ONE))
    assert health.state == "out"


@pytest.mark.parametrize(
    "others", [[None], [Suspect("b", 1)], [Suspect("a", 1), Suspect("b", 1)]], ids=len
)
def test_anothers_fault_makes_them_enough(others: list[Suspect | None]) -> None:
    health = Health(Clock())
    for request in range(FAULTS - 1):
        assert not health.failed("500", suspect=Suspect("a", request))
    assert [health.failed("500", suspect=one) for one in others][-1]


def test_where_clients_cannot_be_told_apart_different_requests_are_enough() -> None:
    health = Health(Clock())
    said = [health.failed("500", suspect=Suspect(None, request)) for request in range(FAULTS)]
    assert said == [False] * (FAULTS - 1) + [True]


def test_a_success_makes_suspects_be_forgotten() -> None:
    health = Health(Clock())
    for _ in range(3):
        for request in range(FAULTS - 1):
            assert not health.failed("500", suspect=Suspect(None, request))
        health.succeeded()
    assert health.state == "ok"


def test_one_request_keeps_nothing_out_either() -> None:
    clock = Clock()
    health = out(clock)
    clock.now = health.open_until
    assert health.admits()
    health.failed("500", suspect=Suspect("a", 1))
    clock.now = health.open_until
    for _ in range(50):
        assert health.admits(), "the next may try at once"
        health.failed("500", suspect=Suspect("a", 1))
    assert health.admits()
    assert health.succeeded()


def test_what_is_known_of_suspects_is_bounded() -> None:
    clock = Clock()
    health = out(clock)
    for request in range(10 * FAULTS_OF_ONE):
        clock.now = health.open_until
        assert health.admits()
        health.failed("500", suspect=Suspect(str(request), request))
    assert len(health._suspects) <= FAULTS_OF_ONE


def test_a_403_that_may_be_about_one_call_alone_needs_others_beside_it() -> None:
    clock = Clock()
    health = Health(clock)
    for _ in range(20):
        assert not health.failed("403", key_dead=True, suspect=Suspect("a", 1))
    assert (health.state, health.key_dead) == ("ok", False)
    said = [health.failed("403", key_dead=True, suspect=Suspect(str(n), n)) for n in range(9)]
    assert sum(said) == 1
    assert health.key_dead
    assert health.back_in_ms() == DEAD_KEY_S * 1000


@pytest.mark.parametrize(
    ("error", "provoked"),
    [
        (UpstreamUnavailable("no connection", broke="connecting"), False),
        (UpstreamUnavailable("", status=502), False),
        (UpstreamUnavailable("", status=503), False),
        (UpstreamUnavailable("", status=529), False),
        (UpstreamTimeout("", phase="connect"), False),
        (UpstreamUnauthorized("", status=401), False),
        (UpstreamUnavailable("", status=500), True),
        (UpstreamUnavailable("a prompt that is too long", status=504), True),
        (UpstreamUnavailable("closed before", broke="unheard"), True),
        (UpstreamUnavailable("cut in mid-answer"), True),
        (UpstreamTimeout("", phase="first_byte"), True),
        (UpstreamTimeout("", phase="idle"), True),
        (UpstreamTimeout("", phase="total"), True),
        (UpstreamGarbled(""), True),
        (UpstreamUnauthorized("", status=403, of_key=False), True),
    ],
)
def test_what_a_request_can_bring_upon_itself(error: UpstreamError, provoked: bool) -> None:
    assert can_be_provoked(error) is provoked
    assert error.of_upstream is not provoked


@pytest.mark.parametrize(
    ("error", "of_upstream"),
    [
        (UpstreamThrottled("slow down"), True),
        (UpstreamThrottled("a day's quota is gone", day_quota=True), True),
        (UpstreamUnavailable("no upstream can be asked now", asked=False), True),
        (UpstreamRejected("no such model", status=404), False),
    ],
)
def test_whose_fault_a_refusal_is(error: UpstreamError, of_upstream: bool) -> None:
    assert error.of_upstream is of_upstream


def test_a_fifth_of_the_traffic_may_be_tried_again() -> None:
    budget = RetryBudget(saved=0)
    tried = 0
    for _ in range(1000):
        budget.earn()
        tried += budget.spend()
    assert 195 <= tried <= 200
