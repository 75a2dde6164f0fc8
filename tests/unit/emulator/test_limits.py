"""Exactness of the ways of counting, on a clock moved by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.emulator.limits import (
    Counter,
    FixedWindow,
    LimitGate,
    LimitRefusal,
    SlidingWindow,
    TokenBucket,
    counter_for,
)
from tidegate.emulator.settings import RateLimit

Arrivals = list[tuple[int, int]]
arrivals = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 6)), min_size=1, max_size=60
)  # ns since the last one, amount
limits = st.integers(1, 8)
windows = st.integers(1, 50)


def admitted(counter: Counter, steps: Arrivals) -> Arrivals:
    """Offer each arrival; returns (time, amount) of those let in."""
    now_ns, taken = 1_000, []
    for gap_ns, amount in steps:
        now_ns += gap_ns
        if counter.wait_ns(amount, now_ns) == 0:
            counter.take(amount, now_ns)
            taken.append((now_ns, amount))
    return taken


@given(arrivals, limits, windows)
def test_no_fixed_window_has_more_than_the_limit(
    steps: Arrivals, limit: int, window_ns: int
) -> None:
    used: dict[int, int] = {}
    for at_ns, amount in admitted(FixedWindow(limit, window_ns), steps):
        used[at_ns // window_ns] = used.get(at_ns // window_ns, 0) + amount
    assert all(amount <= limit for amount in used.values())


@given(arrivals, limits, windows)
def test_no_sliding_window_has_more_than_the_limit(
    steps: Arrivals, limit: int, window_ns: int
) -> None:
    taken = admitted(SlidingWindow(limit, window_ns), steps)
    for end_ns, _ in taken:
        inside = [amount for at_ns, amount in taken if end_ns - window_ns < at_ns <= end_ns]
        assert sum(inside) <= limit


@given(arrivals, limits, windows)
def test_no_span_has_more_of_a_token_bucket_than_its_size_and_refill(
    steps: Arrivals, limit: int, window_ns: int
) -> None:
    taken = admitted(TokenBucket(limit, window_ns), steps)
    for first, (start_ns, _) in enumerate(taken):
        spent = 0
        for at_ns, amount in taken[first:]:
            spent += amount
            assert spent * window_ns <= (limit * window_ns) + (at_ns - start_ns) * limit


@pytest.mark.parametrize("kind", [FixedWindow, SlidingWindow, TokenBucket])
@given(steps=arrivals, limit=limits, window_ns=windows)
def test_the_time_named_is_the_earliest_at_which_it_fits(
    kind: Any, steps: Arrivals, limit: int, window_ns: int
) -> None:
    """Neither too short nor longer than needed; and asking spends nothing."""
    counter: Counter = kind(limit, window_ns)
    now_ns = 1_000
    for gap_ns, amount in steps:
        now_ns += gap_ns
        wait_ns = counter.wait_ns(amount, now_ns)
        if amount > limit:
            assert wait_ns > 0
            continue
        if wait_ns:
            assert counter.wait_ns(amount, now_ns + wait_ns - 1) == 1
            now_ns += wait_ns
        assert counter.wait_ns(amount, now_ns) == 0
        counter.take(amount, now_ns)


@pytest.mark.parametrize("mode", ["fixed_window", "sliding_window", "token_bucket"])
def test_a_burst_gets_exactly_the_limit(mode: Any) -> None:
    counter = counter_for(RateLimit("total", 7, 60, mode))
    assert len(admitted(counter, [(0, 1)] * 20)) == 7


@pytest.mark.parametrize("mode", ["fixed_window", "sliding_window", "token_bucket"])
def test_a_limit_of_zero_lets_nothing_in(mode: Any) -> None:
    counter = counter_for(RateLimit("total", 0, 60, mode))
    assert admitted(counter, [(0, 1)] * 3) == []


def test_a_fixed_window_allows_twice_the_limit_across_its_edge() -> None:
    counter = FixedWindow(3, 100)
    steps = [(99, 1), (0, 1), (0, 1), (1, 1), (0, 1), (0, 1), (0, 1)]
    assert len(admitted(counter, steps)) == 6


def test_a_clock_that_steps_back_gives_nothing_twice() -> None:
    for counter in (FixedWindow(1, 100), SlidingWindow(1, 100), TokenBucket(1, 100)):
        assert counter.wait_ns(1, 1_000) == 0
        counter.take(1, 1_000)
        assert counter.wait_ns(1, 850) > 0
        assert counter.wait_ns(1, 1_050) > 0


MINE = RateLimit("text_only", 2, 60)
ALL = RateLimit("total", 3, 60, "fixed_window")
TOKENS = RateLimit("total", 100, 60, "token_bucket", "input_tokens")


def test_a_refused_demand_has_spent_nothing_of_any_limit() -> None:
    gate = LimitGate({}, [MINE, ALL, TOKENS])
    assert gate.spend("text_only", 101, 0) == LimitRefusal(TOKENS.name, 100, 60 * 10**9, TOKENS)
    assert gate.spend("text_only", 1, 0) is None
    assert gate.spend("text_only", 1, 0) is None
    refused = gate.spend("text_only", 1, 0)
    assert refused is not None
    assert refused.limit == MINE.name
    assert gate.spend("multi_modal", 98, 0) is None
    refused = gate.spend("multi_modal", 0, 0)
    assert refused is not None
    assert refused.limit == ALL.name


def test_calls_that_generate_nothing_are_outside_the_total() -> None:
    gate = LimitGate({"total": 1, "text_only": 5}, [RateLimit("total", 0, 60)])
    assert gate.spend("other", 0, 0) is None
    assert gate.full("other", 9, 9) is None
    full = gate.full("text_only", 0, 1)
    assert full is not None
    assert full.limit == "concurrency:total"
