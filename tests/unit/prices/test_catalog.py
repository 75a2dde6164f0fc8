"""The public prices: each row is sound, and the one of a call's day, model and tier is found."""

from __future__ import annotations

from datetime import UTC, date, datetime
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tidegate.call import Usage, UsageDetails
from tidegate.errors import ConfigError
from tidegate.prices.rates import (
    AMOUNTS,
    Catalog,
    ModelPrice,
    Price,
    Rates,
    catalog,
    cost_micros,
    price_of,
    provider_of,
)

TODAY = date(2026, 12, 1)
ROWS = [row for provider in catalog().providers for row in catalog().rows(provider)]
M = 1_000_000


def cost(provider: str, model: str, usage: Usage, tier: str = "", day: date = TODAY) -> int | None:
    price = catalog().find(provider, model, day, tier)
    return None if price is None else cost_micros(Rates.of(price, is_public=True), usage, None)


@pytest.mark.parametrize("tier", ["default", "auto", "standard"])
def test_a_stated_tier_cannot_have_a_name_of_the_usual_one(tier: str) -> None:
    """Its price would never apply."""
    with pytest.raises(ConfigError, match="the model's own price") as refused:
        price_of("prices.m", {"input": 2, "tiers": {"flex": {"share": 0.5}, tier: {"share": 2}}})
    assert (refused.value.variable, refused.value.value) == ("prices.m.tiers", tier)


@pytest.mark.parametrize(
    ("provider", "model", "tier", "usage", "micros"),
    [
        # Anthropic: 100 fresh at $5, 300 cached at $0.50, 200 written for 5 minutes at $6.25 and
        # 400 for an hour at $10, 50 of output at $25, two searches at $10 a thousand.
        ("anthropic", "claude-opus-5", "", Usage(1_000, 50, None, 300, None, UsageDetails(
            600, 200, 400, searches=2)), 500 + 150 + 1_250 + 4_000 + 1_250 + 20_000),
        ("anthropic", "claude-opus-5", "batch", Usage(1_000, 50), 2_500 + 625),
        ("anthropic", "claude-opus-5", "fast", Usage(1_000, 50), 10_000 + 2_500),
        # a prompt of 100,000 tokens is not a long one, the next token makes it one
        ("anthropic", "claude-haiku-5-5", "", Usage(100_000, 1_000), 10_000 + 500),
        ("anthropic", "claude-haiku-5-5", "", Usage(100_001, 1_000), 50_001 + 2_500),  # 50,000.5
        # OpenAI: cached, written, long
        ("openai", "gpt-6.2-sol", "", Usage(1_000, 100, None, 400, None, UsageDetails(500)),
         200 + 40 + 1_250 + 1_000),
        ("openai", "gpt-6.2-sol", "priority", Usage(1_000, 100), 4_000 + 2_000),
        ("openai", "gpt-6.2-sol", "", Usage(272_001, 100), 1_088_004 + 1_500),
        ("openai", "gpt-6.2-sol", "flex", Usage(272_001, 100), 544_002 + 750),
        ("openai", "gpt-5.5", "priority", Usage(M // 10, 1_000), 1_250_000 + 75_000),
        ("openai", "gpt-4.1", "priority", Usage(1_000, 1_000, None, 1_000), 875 + 14_000),
        ("openai", "text-embedding-3-small", "", Usage(M, 0), 20_000),
        # Gemini: audio of its own price, more than 200,000 tokens of prompt
        ("gemini", "gemini-2.5-flash", "", Usage(1_000, 10, details=UsageDetails(
            input_audio_tokens=600)), 120 + 600 + 25),
        ("gemini", "models/gemini-2.5-pro", "", Usage(200_001, 1_000), 500_003 + 15_000),  # 2.5
        ("gemini", "gemini-3-pro-image-preview", "", Usage(0, 1_120, details=UsageDetails(
            output_image_tokens=1_120)), 134_400),  # $0.134 for 1K
        # Gemini Live: text, audio, pictures and video; then audio, text and thoughts.
        ("gemini", "gemini-3.8-live", "", Usage(1_000, 300, 50, details=UsageDetails(
            input_audio_tokens=200, input_image_tokens=300, input_video_tokens=400,
            output_audio_tokens=250)), 75 + 600 + 300 + 400 + 3_000 + 225 + 225),
        ("gemini", "models/gemini-2.5-flash-native-audio-preview-12-2025", "", Usage(
            1_000, 100, details=UsageDetails(input_audio_tokens=400, input_video_tokens=100,
            output_audio_tokens=60)), 250 + 1_200 + 300 + 720 + 80),
        ("xai", "grok-4.3", "", Usage(1_000, 0, details=UsageDetails(searches=3)), 1_250 + 15_000),
        # Two searches of stored files at $2.50 a thousand; at Azure their price is not known.
        ("openai", "gpt-5", "", Usage(1_000, 0, details=UsageDetails(file_searches=2)),
         1_250 + 5_000),
        ("openai", "gpt-5", "batch", Usage(1_000, 0, details=UsageDetails(file_searches=2)),
         625 + 5_000),
        # 100 of text, 900 of a picture, and a picture.
        ("openai", "gpt-image-2.5-flare", "", Usage(1_000, 4_160, details=UsageDetails(
            input_image_tokens=900)), 500 + 7_200 + 124_800),
        ("openai", "gpt-image-2-2026-04-21", "", Usage(100, 272), 500 + 8_160),
        ("openai", "gpt-image-1.5-2025-12-16", "", Usage(1_000, 4_160, details=UsageDetails(
            input_image_tokens=900)), 500 + 7_200 + 133_120),  # $0.133 for a high one
        ("openai", "gpt-4o-transcribe", "", Usage(1_000, 100), 2_500 + 1_000),
        # a minute of sound
        ("openai", "gpt-transcribe", "", Usage(0, 0, details=UsageDetails(
            input_audio_seconds=60)), 4_500),
        ("openai", "gpt-live-transcribe", "", Usage(0, 0, details=UsageDetails(
            input_audio_seconds=60)), 17_000),
        ("azure", "gpt-5", "", Usage(1, 1, details=UsageDetails(file_searches=1)), None),
        ("openrouter", "anthropic/claude-sonnet-4.5", "", Usage(200_001, 0), 1_200_006),
        # A search of a provider whose price for it is not known makes the cost unknown.
        ("groq", "openai/gpt-oss-120b", "", Usage(1_000, 1_000), 150 + 600),
        ("groq", "openai/gpt-oss-120b", "", Usage(1, 1, details=UsageDetails(searches=1)), None),
        # So does a tier.
        ("anthropic", "claude-opus-5", "priority", Usage(1, 1), None),
        ("openai", "gpt-99", "", Usage(1, 1), None),
        ("nobody", "gpt-5", "", Usage(1, 1), None),
    ],
)  # fmt: skip
def test_costs_by_the_published_prices(
    provider: str, model: str, tier: str, usage: Usage, micros: int | None
) -> None:
    assert cost(provider, model, usage, tier) == micros


@pytest.mark.parametrize(
    ("model", "day", "micros"),
    [
        ("gpt-5.6-luna", date(2026, 7, 8), None),  # before there was one
        ("gpt-5.6-luna", date(2026, 7, 29), M),
        ("gpt-5.6-luna", date(2026, 7, 30), 200_000),
        ("gpt-5.6-sol", date(2026, 8, 2), 5 * M),
        ("gpt-5.6-sol", date(2026, 8, 3), None),  # confirmed by nobody
        ("gpt-5.6-sol", date(2026, 9, 22), 4 * M),
    ],
)
def test_a_call_costs_what_its_day_says(model: str, day: date, micros: int | None) -> None:
    price = catalog().find("openai", model, day)
    assert (price and price.input and round(price.input * M)) == micros


def test_at_deepseeks_peak_hours_a_call_costs_twice_as_much() -> None:
    price = catalog().find("deepseek", "deepseek-v4-pro", date(2026, 11, 27))  # a Friday
    assert price is not None
    begin = datetime(2026, 11, 27, tzinfo=UTC).timestamp() // 3_600
    inputs = [price.in_hour(int(begin) + hour).input for hour in range(72)]
    friday = [1.32 if hour in (1, 2, 3, 6, 7, 8, 9) else 0.66 for hour in range(24)]
    assert inputs == friday + [0.66] * 48
    assert price.in_hour(None).output == 3.96


def test_of_the_models_that_share_a_beginning_each_has_its_own_price() -> None:
    found = [
        catalog().find("openai", model, TODAY)
        for model in ("gpt-5", "gpt-5-2025-08-07", "gpt-5-mini", "gpt-5-nano", "gpt-5-pro")
    ]
    assert [price and price.input for price in found] == [1.25, 1.25, 0.25, 0.05, 15.0]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.provider}:{row.models[0]}")
def test_rows_are_sound(row: ModelPrice) -> None:
    assert row.source.startswith("https://")
    assert date(2025, 1, 1) < row.checked <= TODAY
    assert row.first_day <= row.last_day
    assert (row.price.input is None) == (row.price.output is None)
    measures = (row.price.audio_minute, row.price.characters, row.price.video_second)
    by_measure = any(one is not None for one in measures)
    assert not by_measure or row.price.input is None
    assert by_measure or row.price.input is not None or row.price.image is not None
    for price in (row.price, *row.price.tiers.values()):
        cached, fresh = price.cached, price.input
        assert cached is None or fresh is None or cached <= fresh
        assert (price.above is None) == (price.long is None)
    assert row.most_output_tokens is None or row.most_output_tokens > 0


@pytest.mark.parametrize("provider", catalog().providers)
def test_no_model_has_two_prices_on_one_day(provider: str) -> None:
    for one, other in combinations(catalog().rows(provider), 2):
        if set(one.models) & set(other.models):
            apart = one.first_day != other.first_day
            assert apart, one.models
            if one.last_day >= other.first_day and other.last_day >= one.first_day:
                early = min(one, other, key=lambda row: row.first_day)
                # Open ends are ended by the next row.
                assert early.last_day == date.max or early.last_day < TODAY, one.models


tokens = st.integers(0, 3 * M)


BY_TOKENS = [row for row in ROWS if row.price.input is not None or row.price.output is not None]
BY_OTHER = [row for row in ROWS if row not in BY_TOKENS and row.price.image is None]


@given(st.sampled_from(BY_OTHER), st.integers(0, 10**6), st.integers(0, 10**7), tokens)
def test_costs_without_a_price_of_tokens_grow_with_what_is_priced(
    row: ModelPrice, seconds: int, characters: int, taken: int
) -> None:
    rates = Rates.of(row.price)
    costs = [
        cost_micros(
            rates,
            Usage(
                taken,
                details=UsageDetails(
                    input_audio_seconds=seconds + more,
                    input_characters=characters + more,
                    output_video_seconds=seconds + more,
                ),
            ),
            None,
        )
        for more in (1, 1_000)
    ]
    assert costs[0] is not None
    assert 0 <= costs[0] <= (costs[1] or 0)


def is_cheaper_when_long(price: Price) -> bool:
    """Whether anything has a lower price in a call with a long input than in others."""
    return price.long is not None and any(
        (getattr(price.long, name) or 0) < (getattr(price, name) or 0) for name in AMOUNTS
    )


def test_long_inputs_are_cheaper_only_where_a_note_says_why() -> None:
    cheaper = {
        (row.models[0], tier): row.note
        for row in ROWS
        for tier, price in (("", row.price), *row.price.tiers.items())
        if is_cheaper_when_long(price)
    }
    unpriced = {("gpt-5.5", "priority"), ("gpt-5.4", "priority")}
    assert {*cheaper} == {*unpriced, ("grok-4.20-multi-agent*", "")}
    assert all("long" in note for note in cheaper.values())


OF_PRIORITY = next(
    row for row in BY_TOKENS if is_cheaper_when_long(row.price.tiers.get("priority", row.price))
)


@given(
    st.sampled_from(BY_TOKENS), tokens, tokens, tokens, tokens, st.integers(0, 50), st.booleans()
)
@example(OF_PRIORITY, 0, 333_334, 0, 0, 0, True)
def test_costs_are_never_negative_and_grow_with_the_usage(
    row: ModelPrice, taken: int, given_: int, cached: int, written: int, searches: int, long: bool
) -> None:
    details = UsageDetails(min(written, taken), searches=searches)
    for price in (row.price, *row.price.tiers.values()):
        rates = Rates.of(price)
        usage = Usage(taken, given_, None, min(cached, taken), None, details)
        now = cost_micros(rates, usage, None)
        assert now is not None
        assert now >= 0
        longer = taken + 1 + long * M
        if is_cheaper_when_long(price) and taken <= (price.above or 0) < longer:
            longer = taken
        more = [
            Usage(longer, given_, None, usage.cached_tokens, None, details),
            Usage(taken, given_ + 1, None, usage.cached_tokens, None, details),
            Usage(taken, given_, None, usage.cached_tokens, None, UsageDetails(
                details.cache_write_tokens, searches=searches + 1)),
        ]  # fmt: skip
        assert all((cost_micros(rates, one, None) or 0) >= now for one in more)


@given(st.sampled_from(ROWS), st.lists(st.tuples(tokens, tokens), min_size=1, max_size=9))
def test_costs_are_rounded_once_a_call(row: ModelPrice, calls: list[tuple[int, int]]) -> None:
    rates = Rates.of(row.price)
    for taken, given_ in calls:
        side = rates.long if rates.above is not None and taken > rates.above else rates
        assert side is not None
        exact = taken * (side.input or 0) + given_ * (side.output or 0)
        assert abs((cost_micros(rates, Usage(taken, given_), None) or 0) * M - exact) <= M // 2


def test_providers_are_known_by_their_hosts() -> None:
    assert provider_of("https://api.openai.com/v1") == "openai"
    assert provider_of("https://mine.openai.azure.com/openai/v1") == "azure"
    assert provider_of("https://generativelanguage.googleapis.com") == "gemini"
    assert provider_of("https://europe-west4-aiplatform.googleapis.com") == "vertex"
    assert provider_of("https://openrouter.ai/api/v1") == "openrouter"
    assert provider_of("http://127.0.0.1:8000/v1") is None
    assert provider_of("https://api.openai.com.example.org/v1") is None


ROW = """
source = "https://example.org"
[[model]]
models = ["m"]
input = 1
output = 2
checked = 2026-11-28
evidence = "map"
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("input = 1\n", "input = -1\n"),
        ('evidence = "map"', 'evidence = "hearsay"'),
        ("checked = 2026-11-28", 'checked = "today"'),
        ("output = 2\n", "output = 2\nouptut = 2\n"),
        ("output = 2\n", "output = 2\nlong_context = { input = 2 }\n"),
        ("output = 2\n", "output = 2\ntiers = { flex = 0.5 }\n"),
        ("output = 2\n", "long_context = { above = 9 }\ntiers = { x = { input = 1 } }\n"),
        ('source = "https', 'url = "x"\nsource = "https'),
        ("output = 2\n", "output = 2\npeak = { hours = [[1, 4]] }\n"),
        ("output = 2\n", "output = 2\npeak = { share = 2, hours = [[4, 1]] }\n"),
        ("output = 2\n", "output = 2\npeak = { share = 2, hours = [[1, 4]], days = [0] }\n"),
    ],
)  # fmt: skip
def test_mistakes_name_their_key(tmp_path: Path, change: str, said: str) -> None:
    (tmp_path / "p.toml").write_text(ROW)
    assert Catalog(tmp_path).find("p", "m", TODAY) == Price(input=1.0, output=2.0)
    (tmp_path / "p.toml").write_text(ROW.replace(change, said))
    with pytest.raises(ConfigError, match=r"p\.toml: "):
        Catalog(tmp_path).rows("p")
