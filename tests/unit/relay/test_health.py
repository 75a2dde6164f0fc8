"""Breaker and budget."""

from __future__ import annotations

from tidegate.relay.health import DEAD_KEY_S, FAULTS, FIRST_S, LONGEST_S, Health, RetryBudget


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


def test_a_fifth_of_the_traffic_may_be_tried_again() -> None:
    budget = RetryBudget(saved=0)
    tried = 0
    for _ in range(1000):
        budget.earn()
        tried += budget.spend()
    assert 195 <= tried <= 200
