"""Readings of limits from headers in each provider's spelling, as the emulator sends them."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.emulator.account import LimitReading
from tidegate.emulator.profiles import AccountLimit
from tidegate.emulator.rate_limits import rate_limit_headers
from tidegate.spine.learning import Announced, readings_of

NOW_S = 1_800_000_000


def read(family: Any, provider: str, *limits: tuple[str, int, float]) -> dict[str, tuple[int, int]]:
    """By scope the bound and what remains, of limits `(unit, bound, window_s)` of which a tenth is
    used."""
    views = [
        LimitReading(
            AccountLimit(unit, bound, window_s=window_s),  # type: ignore[arg-type]
            bound,
            bound - bound // 10,
            round(window_s * 1e8),
            0,
        )
        for unit, bound, window_s in limits
    ]
    headers = rate_limit_headers(family, views, NOW_S * 10**9)
    announced = Announced(clock=lambda: float(NOW_S))
    announced.note("m", [(name.encode(), value.encode()) for name, value in headers.items()])
    return {
        one.scope: (one.bound, one.remaining or 0)
        for each in announced.all()
        for one in readings_of(each, provider)
    }


@pytest.mark.parametrize(
    ("family", "provider", "limits", "found"),
    [
        (
            "openai",
            "openai",
            [("requests", 500, 60.0), ("tokens", 30_000, 60.0)],
            {"rpm": (500, 450), "tpm": (30_000, 27_000)},
        ),
        # Its `tokens` are those of input and output together.
        (
            "anthropic",
            "anthropic",
            [
                ("requests", 50, 60.0),
                ("uncached_input_tokens", 40_000, 60.0),
                ("output_tokens", 10_000, 60.0),
            ],
            {"rpm": (50, 45), "itpm": (40_000, 36_000), "otpm": (10_000, 9_000)},
        ),
        # The header counts ten seconds' worth.
        ("azure", "azure", [("requests", 120, 10.0)], {"rpm": (120, 108)}),
        # Its requests are a day's, also where only the time until they are unused says so.
        ("groq", "groq", [("requests", 14_400, 86_400.0)], {"rpd": (14_400, 12_960)}),
        ("groq", "", [("requests", 14_400, 86_400.0)], {"rpd": (14_400, 12_960)}),
        ("groq", "groq", [("tokens", 12_000, 60.0)], {"tpm": (12_000, 10_800)}),
        (
            "mistral",
            "",
            [("requests", 60, 60.0), ("tokens", 500_000, 60.0)],
            {"rpm": (60, 54), "tpm": (500_000, 450_000)},
        ),
        (
            "cerebras",
            "",
            [("requests", 14_400, 86_400.0), ("tokens", 60_000, 60.0)],
            {"rpd": (14_400, 12_960), "tpm": (60_000, 54_000)},
        ),
        ("openrouter", "", [("requests", 20, 60.0)], {"rpm": (20, 18)}),
        ("none", "gemini", [("requests", 20, 60.0)], {}),
    ],
)
def test_headers_are_read_as_limits_of_a_policy(
    family: str, provider: str, limits: list[Any], found: dict[str, Any]
) -> None:
    assert read(family, provider, *limits) == found
