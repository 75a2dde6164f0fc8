"""The simulation of many processes, at a size that takes no time."""

from __future__ import annotations

import pytest

from bench.scale import Simulation, Size, report

TINY = Size(
    processes=12, tenants=9, waiters=180, limit=10, admissions=2000, spread=4, lease_ms=1000
)


def test_shares_follow_the_weights_and_all_permits_are_used() -> None:
    simulation = Simulation(TINY)
    seen = simulation.run()
    assert seen.most_open == TINY.limit
    assert seen.admissions.total() == TINY.admissions * 9 // 10
    for weight in (1, 2, 4):
        share = seen.permit_ms[weight] / seen.permit_ms.total()
        assert share == pytest.approx(weight / 7, rel=0.05)


def test_waits_are_of_a_cohort_that_was_let_in_whole() -> None:
    seen = Simulation(TINY).run()
    assert seen.left == 0
    middle = {weight: sorted(waits)[len(waits) // 2] for weight, waits in seen.waits_ms.items()}
    assert middle[1] / middle[4] == pytest.approx(4, rel=0.2)


def test_it_is_the_same_each_time_and_says_what_it_saw() -> None:
    one, other = Simulation(TINY), Simulation(TINY)
    lines = report(TINY, one, one.run())
    assert lines == report(TINY, other, other.run())
    assert lines[0].startswith("12 processes, 9 tenants, 180 waiters, limit 10")
    assert sum(line.startswith(("| 1 |", "| 2 |", "| 4 |")) for line in lines) == 3
