"""Agents' conversations in virtual time: the bars of stickiness, by the product's own choices."""

from __future__ import annotations

import pytest

from bench.simulated_stays import CASES, LEAST_CACHED, MOST_WAIT, UNNOTICED_MS, Case, simulated

SEEDS = 5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conversations_stay_cached_and_wait_no_longer_than_without(case: Case) -> None:
    runs = [simulated(case, seed) for seed in range(SEEDS)]
    cached = sum(sticky.cached / one.cached for one, sticky, _ in runs) / SEEDS
    assert cached >= LEAST_CACHED
    for _, sticky, without in runs:
        assert max(sticky.waits_ms) <= max(MOST_WAIT * max(without.waits_ms), UNNOTICED_MS)
