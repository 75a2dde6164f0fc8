"""Limits and spans as a terminal shows them."""

from __future__ import annotations

import pytest

from tidegate.limiter import (
    Adaptive,
    Concurrency,
    Limit,
    LimitView,
    Quota,
    Ramp,
    Rate,
    Weights,
    format_pause,
    format_span,
)
from tidegate.policy.format import in_words, pause_in_words, usage_in_words


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (5, "5 concurrent"),
        (Concurrency(5, shadow=True), "5 concurrent, only counted"),
        (Concurrency(9, adaptive=Adaptive(2)), "9 concurrent, adapts itself from 2"),
        (
            Concurrency(900, unit="tokens_in_flight", reserve="bound"),
            "900 tokens in flight, all that it may use at the start",
        ),
        (Concurrency(1_500), "1,500 concurrent"),
        (Concurrency(9_000, unit="tokens_in_flight"), "9,000 tokens in flight"),
        (Rate(60, 60_000), "60 requests a minute"),
        (Rate(1_000_000, 60_000, "input_tokens"), "1,000,000 input tokens a minute"),
        (Rate(9, 1_000, "input_tokens"), "9 input tokens a second"),
        (Rate(9, 90_000, "images", shadow=True), "9 images in 90 s, only counted"),
        (Quota(7, "tokens", "UTC"), "7 tokens a day (UTC)"),
        (Rate(10_500_000, 600_000, "usd"), "$10.50 in 600 s"),
        (
            Rate(9, 60_000, "tokens", reserve="larger", settles=False),
            "9 tokens a minute, input or max_tokens at the start, nothing returned",
        ),
        (
            Rate(9, 60_000, "tokens", weights=Weights(1, 0, 1, 5), reserve="max_tokens"),
            "9 tokens a minute, cached x 0, output x 5, max_tokens at the start",
        ),
        (
            Rate(60, 60_000, pace_ms=10_000, shape="bucket"),
            "60 requests a minute, refilled evenly, evenly over 10 s",
        ),
        (
            Rate(60, 60_000, pace_ms=1_000, ramp=Ramp(50, 10)),
            "60 requests a minute, evenly over 1 s, from 10 up by 50 % a minute",
        ),
    ],
)
def test_a_limit_in_words(limit: int | Limit, said: str) -> None:
    assert in_words(limit) == said


@pytest.mark.parametrize(
    ("span_ms", "said"),
    [
        (0, "0 ms"),
        (850.4, "850 ms"),
        (47_000, "47 s"),
        (59_700, "1 min"),
        (185_000, "3 min 5 s"),
        (7_800_000, "2 h 10 min"),
        (86_400_000, "24 h"),
        (300_000_000, "3 days"),
    ],
)
def test_a_span_in_words(span_ms: float, said: str) -> None:
    assert format_span(span_ms) == said


@pytest.mark.parametrize(
    ("paused_by", "paused_ms", "said"),
    [
        ("ann", 600_000, "paused by ann, for 10 min more"),
        ("", 600_000, "paused for 10 min more"),
        ("openai: see https://example.com/rate-limits. ", 47_000, None),
        ("gemini", 1, "paused by gemini, until a call there is answered"),
    ],
)
def test_a_pause_in_words(paused_by: str, paused_ms: int, said: str | None) -> None:
    of_provider = "paused by openai: see https://example.com/rate-limits, for 47 s more"
    assert pause_in_words(paused_by, paused_ms) == (said or of_provider)


@pytest.mark.parametrize(
    ("limit", "sort", "used", "said"),
    [
        ("kind:text_only", "c", 1_200, "kind:text_only: 1,200 of 2,000 are in use"),
        ("itpm:m", "r", 1_200, "itpm:m: 1,200 of 2,000 are spent, room in 3 s"),
        ("usdpm:m", "r", 1_990_000, "usdpm:m: $1.99 of $0.00 are spent, room in 3 s"),
    ],
)
def test_usage_in_words(limit: str, sort: str, used: int, said: str) -> None:
    view = LimitView(limit, sort, 2_000, used, 3, 0, 2_000, 0, 0, "", 3_000)
    assert usage_in_words(view) == said


def test_a_pause_without_an_end_is_not_told_in_days() -> None:
    assert format_pause(47_000) == "for 47 s more"
    assert format_pause(100 * 365 * 86_400_000) == "until it is resumed"
