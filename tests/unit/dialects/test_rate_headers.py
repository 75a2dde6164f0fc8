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
        (
            {  # Fireworks, all of a minute
                "x-ratelimit-limit-tokens-prompt": "7200000",
                "x-ratelimit-remaining-tokens-prompt": "7193993",
                "x-ratelimit-limit-tokens-generated": "72000",
                "x-ratelimit-remaining-tokens-generated": "69338",
                "x-ratelimit-limit-tokens-cache-adjusted-prompt": "1800000",
                "x-ratelimit-over-limit": "no",
            },
            [
                RateStatus("input_tokens", "minute", 7_200_000, 7_193_993),
                RateStatus("output_tokens", "minute", 72_000, 69_338),
            ],
        ),
        (
            {  # a second's or a minute's: not stated
                "x-ratelimit-limit-tokens-prompt": "60000",
                "x-ratelimit-limit-tokens-cache-adjusted-prompt": "15000",
                "x-ratelimit-limit-tokens-generated": "600",
            },
            [],
        ),
        (
            {  # the IETF's draft, up to its version 06
                "ratelimit-limit": "100, 100;w=60",
                "ratelimit-remaining": "50",
                "ratelimit-reset": "30",
            },
            [RateStatus("requests", None, 100, 50, 30_000)],
        ),
        (
            {"ratelimit": "limit=100, remaining=0, reset=30", "ratelimit-policy": "100;w=60"},
            [RateStatus("requests", None, 100, 0, 30_000)],  # version 07
        ),
        (
            {  # from version 08 on
                "ratelimit-policy": '"burst";q=100;w=60, "day" ; q=1000;w=86400;pk=:a3Q=:',
                "ratelimit": '"burst";r=5;t=12,"day";r=999',
            },
            [
                RateStatus("requests", "minute", 100, 5, 12_000),
                RateStatus("requests", "day", 1_000, 999),
            ],
        ),
        (
            {  # a window that no limit of ours has, and other units
                "ratelimit-policy": '"a";q=10;w=10, "b";q=9;qu="content-bytes";w=60, '
                '"c";q=8;qu="tokens";w=60',
                "ratelimit": '"a";r=0;t=7, "b";r=0;t=600, "c";r=2, "none";r=1, "a',
            },
            [
                RateStatus("requests", None, None, 0, 7_000),
                RateStatus("tokens", "minute", 8, 2),
                RateStatus("requests", None, None, 1),
            ],
        ),
        (
            {  # Kong sends both forms of one limit
                "x-ratelimit-limit-minute": "10",
                "x-ratelimit-remaining-minute": "9",
                "ratelimit-limit": "10",
                "ratelimit-remaining": "9",
                "ratelimit-reset": "42",
            },
            [RateStatus("requests", "minute", 10, 9)],
        ),
        ({"ratelimit": "x" * 20_000, "ratelimit-policy": '"' * 20_000}, []),
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
