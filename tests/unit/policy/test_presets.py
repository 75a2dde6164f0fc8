"""Each provider's preset counts as its limits page means it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, get_args

import pytest
from openai.types import AudioModel, EmbeddingModel, ImageModel, ModerationModel
from openai.types.audio import SpeechModel
from openai.types.shared import AllModels

from tidegate.limiter import Rate, Weights
from tidegate.policy.format import of_plain, to_plain
from tidegate.policy.providers import PRESETS, filled, keeps, own_models


def rate(provider: str, limit_id: str, value: Any = 30_000) -> Rate:
    limit = of_plain({"limits": filled({limit_id: value}, provider)}).limit(limit_id)
    assert isinstance(limit, Rate)
    return limit


@pytest.mark.parametrize("provider", ["openai", "azure"])
def test_openai_counts_the_larger_of_input_and_max_tokens_and_gives_nothing_back(
    provider: str,
) -> None:
    limit = rate(provider, "tpm:gpt-4o*")
    assert (limit.unit, limit.reserve, limit.settles) == ("tokens", "larger", False)


def test_anthropic_counts_no_input_that_its_cache_had() -> None:
    assert rate("anthropic", "itpm:claude-opus-4*").unit == "uncached_input_tokens"
    output = rate("anthropic", "otpm:claude-opus-4*")
    assert output == Rate(30_000, 60_000, "output_tokens", shape="bucket")


@pytest.mark.parametrize(
    ("provider", "limits", "shape"),
    [
        ("anthropic", ("rpm:m", "itpm:m", "otpm:m"), "bucket"),
        ("openai", ("rpm:m", "tpm:m"), "bucket"),
        ("groq", ("tpm:m",), "bucket"),
        ("groq", ("rpm:m",), "window"),
        ("cerebras", ("rpm:m", "tpm:m"), "bucket"),
        ("xai", ("rpm:m", "tpm:m"), "window"),
        ("gemini", ("rpm:m", "itpm:m"), "window"),
        ("azure", ("rpm:m", "tpm:m"), "window"),
        ("bedrock", ("rpm:m", "tpm:m"), "window"),
    ],
)
def test_a_limit_is_a_bucket_where_that_is_documented_or_recorded(
    provider: str, limits: tuple[str, ...], shape: str
) -> None:
    assert {rate(provider, name).shape for name in limits} == {shape}
    assert rate(provider, limits[0], {"bound": 9, "shape": "window"}).shape == "window"
    assert "shape" not in str(filled({"rpd:m": 9}, provider))


def test_bedrock_counts_output_five_times_and_max_tokens_first() -> None:
    limit = rate("bedrock", "tpm:claude*")
    assert (limit.reserve, limit.settles, limit.weights) == (
        "max_tokens",
        True,
        Weights(1, 0, 1, 5),
    )


def test_cerebras_counts_all_that_a_call_may_use_until_it_has_ended() -> None:
    limit = rate("cerebras", "tpm:gpt-oss*")
    assert (limit.reserve, limit.settles) == ("bound", True)


def test_moonshot_counts_what_a_call_may_use_and_returns_nothing() -> None:
    limit = rate("moonshot", "tpm:kimi*")
    assert (limit.reserve, limit.settles) == ("bound", False)


def test_xai_admits_the_sixtieth_part_of_a_minutes_requests_in_a_second() -> None:
    assert rate("xai", "rpm:grok*", 480).pace_ms == 1_000


def test_cached_tokens_are_free_at_groq() -> None:
    assert rate("groq", "tpm:llama*").weights == Weights(1, 0, 1, 1)


def test_requests_a_minute_are_checked_over_shorter_spans_by_providers_that_say_so() -> None:
    assert rate("anthropic", "rpm:claude*", 60).pace_ms == 10_000
    assert rate("anthropic", "rpm:claude*", {"bound": 6, "window_ms": 6_000}).pace_ms == 1_000
    assert "pace_ms" not in str(filled({"rpd:claude*": 9}, "anthropic"))
    assert rate("gemini", "rpm:gemini*", 60).pace_ms is None


def test_azure_checks_requests_over_ten_seconds() -> None:
    assert rate("azure", "rpm:gpt-4o", 720) == Rate(120, 10_000)
    assert rate("azure", "rpm:gpt-4o", 3) == Rate(1, 10_000)
    assert rate("azure", "rpm:gpt-4o", 0) == Rate(0, 10_000)
    assert rate("azure", "rpm:gpt-4o", {"bound": 720, "shadow": True}).shadow


def test_a_limit_that_says_how_it_counts_is_left_as_it_is() -> None:
    said = {"bound": 30_000, "unit": "input_tokens"}
    assert rate("anthropic", "itpm:claude*", said).unit == "input_tokens"
    own = {"bound": 9, "weights": {"output": 2}}
    assert rate("bedrock", "tpm:claude*", own).weights == Weights(1, 1, 1, 2)


@pytest.mark.parametrize("provider", PRESETS)
def test_limits_of_tenants_keys_and_users_are_no_limits_of_a_provider(provider: str) -> None:
    whose = ("tenant/acme", "key/3fk9x2m1qa", "user/acme/ann", "conversation/acme/c1")
    limits = {f"{scope}:{one}": 3 for scope in ("rpm", "tpm", "itpm", "otpm") for one in whose}
    assert filled(limits, provider) == limits
    before = {name: {"bound": 3, "shape": "bucket", "pace_ms": 10_000} for name in limits}
    assert filled(limits, provider, before) == limits


def test_what_is_on_record_says_all_of_it_and_is_filled_once() -> None:
    for provider in PRESETS:
        limits = {"rpm:m*": 60, "itpm:m*": 7, "otpm:m*": 7, "tpm:m*": 7, "rpd:m*": 7, "model:m": 3}
        plain = to_plain(of_plain({"limits": filled(limits, provider)}))
        assert of_plain(plain) == of_plain({"limits": filled(plain["limits"], provider)})


def test_a_live_change_fills_in_what_is_new_and_leaves_plain_numbers_plain() -> None:
    before = {"itpm:old": 5, "itpm:table": {"bound": 5, "unit": "uncached_input_tokens"}}
    after = filled({"itpm:old": 6, "itpm:table": 6, "itpm:new": 6}, "anthropic", before)
    counted = {"unit": "uncached_input_tokens", "shape": "bucket", "bound": 6}
    assert after == {"itpm:old": 6, "itpm:table": counted, "itpm:new": counted}


@pytest.mark.parametrize(
    ("provider", "limit_id", "value"),
    [
        # As an import has them of models whose cache reads count.
        ("anthropic", "itpm:m", {"unit": "input_tokens", "shape": "bucket", "source": "imported"}),
        ("anthropic", "itpm:m", {"unit": "input_tokens", "shadow": True}),
        ("openai", "tpm:m", {"reserve": "predicted", "settles": True}),
        ("openai", "rpm:m", {"shape": "window"}),
        ("azure", "rpm:m", {"window_ms": 60_000, "slack_ms": 100}),
        ("bedrock", "tpm:m", {"weights": {"cached": 1, "output": 1}, "reserve": "bound"}),
    ],
)
def test_another_bound_changes_nothing_of_how_a_limit_counts(
    provider: str, limit_id: str, value: dict[str, Any]
) -> None:
    """What is as usual is not on record, so that the table that is sent back lacks it."""
    first = to_plain(of_plain({"limits": filled({limit_id: {"bound": 90, **value}}, provider)}))
    before = first["limits"]
    assert isinstance(before[limit_id], dict)
    after = filled({limit_id: {**before[limit_id], "bound": 60}}, provider, before)
    assert after == {limit_id: {**before[limit_id], "bound": 60}}


def test_conversations_are_kept_where_no_model_answers_in_them() -> None:
    assert keeps("conversation", "openai", ["https://api.openai.com/v1"])
    assert keeps("conversation", None, ["http://localhost:8000/v1"])
    assert keeps("file", "mistral", ["https://api.mistral.ai/v1"])
    assert not keeps("conversation", "mistral", ["https://proxy.example.com/v1"])
    assert not keeps("conversation", None, ["https://api.mistral.ai/v1"])


def test_a_key_of_openai_alone_reaches_each_model_that_its_sdk_names() -> None:
    named = (AllModels, AudioModel, EmbeddingModel, ImageModel, ModerationModel, SpeechModel)
    literals = [one for alias in named for part in get_args(alias) for one in get_args(part)]
    models = {*literals, *(one for alias in named for one in get_args(alias))}
    models |= {"gpt-3.5-turbo-instruct", "davinci-002", "babbage-002"}  # of its completions
    models = {one for one in models if isinstance(one, str)}
    assert len(models) > 50
    own = own_models("openai")
    assert [one for one in sorted(models) if not any(fnmatchcase(one, each) for each in own)] == []
    assert any(fnmatchcase("perplexity/sonar", each) for each in own_models("perplexity"))
    assert any(fnmatchcase("labs-devstral-small-2512", each) for each in own_models("mistral"))
