"""Exactness of the ways of counting, on a clock moved by hand."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.emulator.counting import (
    CallSize,
    Counter,
    CountingRule,
    FixedWindow,
    Growth,
    SlidingWindow,
    TokenBucket,
    TokenWeights,
    counter_of,
)
from tidegate.emulator.dialect import counter_for
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


KINDS: tuple[Any, ...] = (FixedWindow, SlidingWindow, TokenBucket)


@pytest.mark.parametrize("kind", KINDS)
@given(steps=arrivals, limit=limits, window_ns=windows)
def test_what_remains_fits_and_no_more(
    kind: Any, steps: Arrivals, limit: int, window_ns: int
) -> None:
    counter: Counter = kind(limit, window_ns)
    now_ns = 1_000
    for gap_ns, amount in steps:
        now_ns += gap_ns
        left = counter.remaining(now_ns)
        assert counter.wait_ns(left, now_ns) == 0
        assert counter.wait_ns(left + 1, now_ns) > 0
        if amount <= left:
            counter.take(amount, now_ns)


@pytest.mark.parametrize("kind", KINDS)
@given(steps=arrivals, limit=limits, window_ns=windows)
def test_the_whole_bound_is_free_after_the_time_named_and_not_before(
    kind: Any, steps: Arrivals, limit: int, window_ns: int
) -> None:
    counter: Counter = kind(limit, window_ns)
    admitted(counter, steps)
    now_ns = 1_000 + sum(gap_ns for gap_ns, _ in steps)
    wait_ns = counter.full_ns(now_ns)
    if wait_ns:
        assert counter.remaining(now_ns + wait_ns - 1) < limit
    assert counter.remaining(now_ns + wait_ns) == limit


@pytest.mark.parametrize("kind", KINDS)
@given(
    steps=arrivals,
    limit=st.integers(6, 40),
    window_ns=windows,
    lower=st.floats(0, 1),
    after_ns=st.integers(0, 60),
)
def test_what_is_settled_lower_is_never_given_twice(
    kind: Any, steps: Arrivals, limit: int, window_ns: int, lower: float, after_ns: int
) -> None:
    """No more remains than if the lower amount had been taken in the first place."""
    counter, other = kind(limit, window_ns), kind(limit, window_ns)
    now_ns = 1_000
    for gap_ns, amount in steps:
        now_ns += gap_ns
        less = int(amount * lower)
        if counter.wait_ns(amount, now_ns) == 0:
            other.take(less, now_ns)
            taken = counter.take(amount, now_ns)
            now_ns += after_ns
            counter.correct(taken, less, now_ns)
        assert counter.remaining(now_ns) <= other.remaining(now_ns)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_settled_higher_counts_from_then_on(kind: Any) -> None:
    counter: Counter = kind(10, 1_000)
    taken = counter.take(4, 1_000)
    counter.correct(taken, 12, 1_100)
    assert counter.remaining(1_100) == 0
    assert counter.wait_ns(1, 1_100) > 0
    assert taken.total == 12


def test_a_late_refund_gives_a_new_window_nothing() -> None:
    for counter in (FixedWindow(10, 100), SlidingWindow(10, 100)):
        taken = counter.take(8, 1_000)
        counter.take(5, 1_150)
        counter.correct(taken, 1, 1_160)
        assert counter.remaining(1_160) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_bound_keeps_what_is_used(kind: Any) -> None:
    counter: Counter = kind(10, 1_000)
    counter.take(4, 1_000)
    counter.resize(20, 1_000)
    assert counter.remaining(1_000) == 16
    counter.resize(3, 1_000)
    assert counter.remaining(1_000) == 0
    assert counter.remaining(5_000) == 3


@pytest.mark.parametrize(
    ("day", "hours"), [("2026-11-27", 24), ("2026-11-01", 25), ("2026-03-08", 23)]
)
def test_a_day_ends_at_midnight_of_its_zone(day: str, hours: int) -> None:
    zone = ZoneInfo("America/Los_Angeles")
    start = datetime.fromisoformat(day).replace(tzinfo=zone)
    start_ns = int(start.timestamp()) * 10**9
    counter = counter_of("calendar_day", 3, 0, "America/Los_Angeles")
    noon_ns = start_ns + 12 * 3600 * 10**9
    counter.take(3, noon_ns)
    assert counter.wait_ns(1, noon_ns) == (hours - 12) * 3600 * 10**9
    assert counter.remaining(start_ns + hours * 3600 * 10**9 - 1) == 0
    assert counter.remaining(start_ns + hours * 3600 * 10**9) == 3


SECOND = 10**9


def test_growth_allows_half_as_much_again_in_each_period() -> None:
    growth = Growth(100, 50, 60 * SECOND)
    taken = []
    for minute in range(4):
        now_ns, count = minute * 61 * SECOND, 0
        while growth.wait_ns(10, now_ns) == 0:
            growth.take(10, now_ns)
            count += 10
        taken.append(count)
    assert taken == [100, 150, 220, 330]


def test_growth_begins_again_after_an_idle_period() -> None:
    growth = Growth(100, 50, 60 * SECOND)
    growth.take(100, 0)
    assert growth.wait_ns(150, 61 * SECOND) == 0
    assert growth.wait_ns(150, 400 * SECOND) > 0
    assert growth.wait_ns(100, 400 * SECOND) == 0


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 60)), min_size=1, max_size=80))
def test_no_minute_has_more_than_growth_allows(steps: list[tuple[int, int]]) -> None:
    """By its definition: a minute has at most half as much again as one before it, or the start."""
    growth, now_ns = Growth(100, 50, 60 * SECOND), 0
    taken: list[tuple[int, int]] = []
    for gap_s, amount in steps:
        now_ns += gap_s * SECOND
        if growth.wait_ns(amount, now_ns) == 0:
            growth.take(amount, now_ns)
            taken.append((now_ns, amount))

    def minute(end_ns: int) -> int:
        return sum(amount for at, amount in taken if end_ns - 60 * SECOND < at <= end_ns)

    for at_ns, _ in taken:
        before = [minute(at) for at, _ in taken if at < at_ns]
        assert minute(at_ns) <= max(100, max(before, default=0) * 3 // 2)


SIZE = CallSize(uncached=100, cached=900, cache_write=50, most_output=400, choices=2)
CLAUDE = TokenWeights(cached=0, output=5)
UNCACHED = TokenWeights(cached=0, output=0)
OUTPUT = TokenWeights(uncached=0, cached=0, cache_write=0)


@pytest.mark.parametrize(
    ("rule", "at_start", "in_all"),
    [
        (CountingRule("requests", "max", "never"), 1, 1),
        (CountingRule("tokens", "max", "never"), 1050, 1050),
        (CountingRule("tokens", "sum", "end"), 1850, 1120),
        (CountingRule("tokens", "sum", "end", CLAUDE), 950, 500),
        (CountingRule("tokens", "input", "end"), 1050, 1120),
        (CountingRule("uncached_input_tokens", "input", "end", UNCACHED), 150, 150),
        (CountingRule("output_tokens", "input", "as_made", OUTPUT), 0, 70),
        (CountingRule("output_tokens", "sum", "end", OUTPUT), 800, 70),
        (CountingRule("images"), 0, 0),
    ],
)
def test_what_a_call_counts(rule: CountingRule, at_start: int, in_all: int) -> None:
    assert rule.at_start(SIZE) == at_start
    assert rule.in_all(SIZE, 70) == in_all


def test_a_call_that_names_no_bound_reserves_its_input() -> None:
    assert CountingRule("tokens", "max", "never").at_start(CallSize(uncached=9)) == 9
    assert CountingRule("tokens", "max", "never").at_start(CallSize(9, most_output=40)) == 40
