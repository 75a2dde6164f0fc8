"""What the simulation of regions counts as used, and of what."""

from __future__ import annotations

from bench.regions import LeaseTerms, Provider, moving


def test_calls_in_flight_count_over_time_of_what_is_wanted() -> None:
    provider = Provider(LeaseTerms(2, ("a", "b")))
    provider.change_demand(3, 0)
    provider.begin(0)
    provider.begin(1_000)
    provider.end(3_000)
    provider.change_demand(-2, 3_000)
    provider.pass_time(5_000)
    assert (provider.used, provider.wanted, provider.most) == (7_000, 8_000, 2)


def test_calls_of_the_last_minute_count_over_time() -> None:
    provider = Provider(LeaseTerms(2, ("a", "b"), "a minute"))
    provider.change_demand(1, 0)
    provider.begin(0)
    provider.begin(30_000)
    provider.pass_time(100_000)
    assert (provider.used, provider.wanted, provider.most) == (120_000, 200_000, 2)


def test_demand_that_moves_is_always_more_than_the_limits_of_the_cases() -> None:
    turns = moving()
    assert len({max(tasks, key=tasks.__getitem__) for _, tasks in turns}) == 4
    assert all(sum(tasks.values()) > 60 for _, tasks in turns)
