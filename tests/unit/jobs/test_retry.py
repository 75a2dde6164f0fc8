"""When a failed attempt is tried again."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import (
    LONGEST_OF_FAULT_MS,
    BudgetExceeded,
    PromptBlocked,
    TidegateError,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamUnavailable,
)
from tidegate.jobs.calls import retry_wait_ms, uncounted_wait_ms
from tidegate.jobs.webhooks import webhook_wait_ms


@pytest.mark.parametrize(
    "error", [UpstreamRejected("no"), PromptBlocked("no", reason="SAFETY"), TidegateError("bug")]
)
def test_what_would_fail_again_is_not_tried_again(error: TidegateError) -> None:
    assert retry_wait_ms(error, 1, 5) is None


def test_what_no_period_of_a_budget_has_room_for_is_not_tried_again() -> None:
    allowed = "$1.00 a day of UTC"
    error = BudgetExceeded(
        "too dear", limit="day", allowed=allowed, retry_after_ms=None, never_fits=True
    )
    assert uncounted_wait_ms(error) is None
    assert retry_wait_ms(error, 1, 5) is None


def test_attempts_are_bounded() -> None:
    assert retry_wait_ms(UpstreamUnavailable("gone"), 4, 5) is not None
    assert retry_wait_ms(UpstreamUnavailable("gone"), 5, 5) is None


@given(st.integers(1, 1000), st.integers(0, 2**32))
def test_without_the_servers_word_the_wait_grows_with_jitter_up_to_a_minute(
    attempts: int, seed: int
) -> None:
    wait = retry_wait_ms(UpstreamUnavailable("gone"), attempts, 10_000, random.Random(seed))
    assert wait is not None
    assert 0 <= wait <= min(60_000, 500 * 2 ** (attempts - 1))


@given(st.integers(1, 80_000_000), st.integers(1, 9), st.integers(0, 2**32))
def test_it_is_never_earlier_than_the_server_directs(
    directed_ms: int, attempts: int, seed: int
) -> None:
    error = UpstreamThrottled("slow down", retry_after_ms=directed_ms)
    wait = retry_wait_ms(error, attempts, 10, random.Random(seed))
    assert wait is not None
    assert directed_ms <= wait <= directed_ms + 15_001


@pytest.mark.parametrize("status", [500, 503, 529, None])
def test_a_fault_is_not_waited_for_as_long_as_it_says(status: int | None) -> None:
    """The provider may be back hours before the time that its balancer names."""
    error = UpstreamUnavailable("gone", status=status, retry_after_ms=14_400_000)
    wait = retry_wait_ms(error, 1, 5, random.Random(1))
    assert wait is not None
    assert LONGEST_OF_FAULT_MS <= wait <= LONGEST_OF_FAULT_MS + 15_001


def test_a_webhook_waits_longer_each_time_with_jitter_and_is_given_up_in_the_end() -> None:
    rng = random.Random(1)
    seconds = [5, 30, 120, 600, 3_600, 21_600]
    for tries, expected in enumerate(seconds, start=1):
        waits = [webhook_wait_ms(tries, rng) for _ in range(100)]
        assert all(wait and 800 * expected <= wait <= 1200 * expected for wait in waits)
        assert len(set(waits)) > 50
    assert webhook_wait_ms(7) is None


@pytest.mark.parametrize(
    ("left_ms", "least_ms", "most_ms"),
    [
        (None, 30_000, 60_000),
        (3_600_000, 30_000, 60_000),
        (40_000, 10_000, 20_000),
        (900, 1, 1_000),
    ],
)
def test_a_job_that_a_budget_refused_is_retried_before_its_deadline(
    left_ms: int | None, least_ms: int, most_ms: int
) -> None:
    """The budget may be raised: a job with less than a minute left was not tried again."""
    spent = BudgetExceeded("spent", limit="day", allowed="", retry_after_ms=7_200_000)
    for seed in range(20):
        wait_ms = uncounted_wait_ms(spent, left_ms, random.Random(seed))
        assert wait_ms is not None
        assert least_ms <= wait_ms <= most_ms
    ended = BudgetExceeded("spent", limit="day", allowed="", retry_after_ms=400)
    assert uncounted_wait_ms(ended, left_ms, random.Random(1)) == 400
