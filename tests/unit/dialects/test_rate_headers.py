"""What providers' headers say of their rate limits."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tidegate.dialects.headers import RateStatus, rate_statuses, used_up

NOW = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)
NOW_S = int(NOW.timestamp())


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        (
            {  # OpenAI
                "x-ratelimit-limit-requests": "500",
                "x-ratelimit-remaining-requests": "499",
                "x-ratelimit-reset-requests": "120ms",
                "x-ratelimit-limit-input-images": "40",
            },
            [
                RateStatus("requests", None, 500, 499, 120),
                RateStatus("images", None, 40),
            ],
        ),
        (
            {  # Mistral
                "x-ratelimit-limit-req-minute": "60",
                "x-ratelimit-remaining-tokens-month": "7",
                "ratelimitbysize-remaining": "5",
                "ratelimitbysize-reset": "33",
                "x-ratelimit-tokens-query-cost": "32",
            },
            [
                RateStatus("requests", "minute", 60),
                RateStatus("tokens", "month", None, 7),
                RateStatus("tokens", None, None, 5, 33_000),
            ],
        ),
        (
            {  # Together, and OpenRouter with the ms since 1970
                "x-ratelimit-limit": "2",
                "x-ratelimit-reset": str((NOW_S + 9) * 1000),
            },
            [RateStatus("requests", None, 2, None, 9_000)],
        ),
        (
            {"x-ratelimit-reset-requests": str(NOW_S + 30)},
            [RateStatus("requests", None, None, None, 30_000)],
        ),
        (
            {  # Anthropic
                "anthropic-ratelimit-output-tokens-limit": "80000",
                "anthropic-ratelimit-output-tokens-reset": "2026-07-01T12:00:05Z",
            },
            [RateStatus("output_tokens", None, 80_000, None, 5_000)],
        ),
        ({"x-ratelimit-key": "m", "x-ratelimit-limit-tokens": "-1", "retry-after": "3"}, []),
        ({"x-ratelimit-limit-" + "a-" * 9_000: "1", "x-ratelimit-reset-tokens": "soon"}, []),
    ],
)
def test_every_provider_s_names_are_known(headers: dict[str, str], told: list[RateStatus]) -> None:
    assert rate_statuses(headers, NOW) == told


def test_the_narrowest_limit_of_which_nothing_remains() -> None:
    headers = {
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "2m0s",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "6s",
        "x-ratelimit-remaining-tokens-day": "1",
    }
    assert used_up(headers, NOW) == RateStatus("tokens", None, None, 0, 120_000)
    assert used_up({"x-ratelimit-remaining-tokens": "1"}, NOW) is None
