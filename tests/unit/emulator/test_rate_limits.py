"""Headers, refusals and pages of the rate-limit APIs, in each provider's spelling."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from tests.unit.emulator.test_account import START, Clock, limit, opened
from tidegate.emulator.account import AccountLimitReached, AccountSpec, ProviderAccount
from tidegate.emulator.counting import CallSize
from tidegate.emulator.dialect import Refused
from tidegate.emulator.rate_limits import (
    anthropic_page,
    check_admin_key,
    duration,
    openai_page,
    rate_limit_headers,
    refused_in_anthropic,
    refused_in_openai,
    retry_headers,
)


def headers(account: ProviderAccount, size: CallSize) -> dict[str, str]:
    charge = account.admit("m", size)
    views = account.views("m", charge)
    return rate_limit_headers(account.spec.headers, views, account.now_ns())


@pytest.mark.parametrize(
    ("wait_ns", "text"),
    [
        (999_999, "0s"),
        (20_400_000, "20ms"),
        (1_200_000_000, "1.2s"),
        (6_000_000_000, "6s"),
        (578_016_000_000, "9m38.016s"),
        (3_600_000_000_000, "1h0m0s"),
    ],
)
def test_durations_as_openai_writes_them(wait_ns: int, text: str) -> None:
    assert duration(wait_ns) == text


def test_openais_headers_after_one_request() -> None:
    """The recorded ones: 3,000 requests and 250,000 tokens a minute."""
    limits = [limit("requests", 3_000), limit("tokens", 250_000)]
    account = opened(Clock(), provider="openai", limits=limits)
    assert headers(account, CallSize(17)) == {
        "x-ratelimit-limit-requests": "3000",
        "x-ratelimit-remaining-requests": "2999",
        "x-ratelimit-reset-requests": "20ms",
        "x-ratelimit-limit-tokens": "250000",
        "x-ratelimit-remaining-tokens": "249983",
        "x-ratelimit-reset-tokens": "4ms",
    }


def test_anthropics_headers_round_tokens_and_sum_both() -> None:
    limits = [
        limit("requests", 4_000),
        limit("uncached_input_tokens", 400_000),
        limit("output_tokens", 80_000),
    ]
    account = opened(Clock(), provider="anthropic", limits=limits)
    found = headers(account, CallSize(40_400))
    assert found["anthropic-ratelimit-input-tokens-limit"] == "400000"
    assert found["anthropic-ratelimit-input-tokens-remaining"] == "360000"
    assert found["anthropic-ratelimit-output-tokens-remaining"] == "80000"
    assert found["anthropic-ratelimit-tokens-limit"] == "480000"
    assert found["anthropic-ratelimit-tokens-remaining"] == "440000"
    assert found["anthropic-ratelimit-requests-remaining"] == "3999"
    # 40,400 of 400,000 a minute are back in 6.06 seconds.
    assert found["anthropic-ratelimit-input-tokens-reset"] == "2027-01-15T08:00:06Z"


def test_groqs_requests_are_a_days() -> None:
    """The recorded ones: a day's 14,400 refill in six seconds."""
    limits = [limit("requests", 14_400, window_s=86_400), limit("tokens", 30_000)]
    limits.append(limit("requests", 30))
    found = headers(opened(Clock(), provider="groq", limits=limits), CallSize(13))
    assert found["x-ratelimit-limit-requests"] == "14400"
    assert found["x-ratelimit-remaining-requests"] == "14399"
    assert found["x-ratelimit-reset-requests"] == "6s"
    assert found["x-ratelimit-reset-tokens"] == "26ms"


def test_azures_headers_are_whole_seconds_of_a_renewal_period() -> None:
    limits = [limit("requests", 120), limit("tokens", 120_000)]
    found = headers(opened(Clock(), provider="azure", limits=limits), CallSize(16))
    assert found["x-ratelimit-remaining-requests"] == "119"
    assert found["x-ratelimit-remaining-tokens"] == "119984"
    assert found["x-ratelimit-renewalperiod-requests"] == "10"
    assert found["x-ratelimit-reset-tokens"] == str(60 - START // 10**9 % 60)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("none", {}),
        (
            "mistral",
            {
                "x-ratelimit-limit-req-minute": "60",
                "x-ratelimit-remaining-req-minute": "59",
                "x-ratelimit-limit-tokens-minute": "6000",
                "x-ratelimit-remaining-tokens-minute": "5900",
                "x-ratelimit-tokens-query-cost": "100",
                "x-ratelimit-limit-tokens-month": "1000000",
                "x-ratelimit-remaining-tokens-month": "999900",
            },
        ),
        (
            "cerebras",
            {
                "x-ratelimit-limit-requests-day": "8640",
                "x-ratelimit-remaining-requests-day": "8639",
                "x-ratelimit-reset-requests-day": "10.000",
                "x-ratelimit-limit-tokens-minute": "6000",
                "x-ratelimit-remaining-tokens-minute": "5900",
                "x-ratelimit-reset-tokens-minute": "1.000",
            },
        ),
        (
            "openrouter",
            {
                "X-RateLimit-Limit": "60",
                "X-RateLimit-Remaining": "59",
                "X-RateLimit-Reset": str(START // 10**6 + 1000),
            },
        ),
        (
            "together",
            {"x-ratelimit-limit": "60", "x-ratelimit-remaining": "59", "x-ratelimit-reset": "1"},
        ),
    ],
)
def test_other_families(family: str, expected: dict[str, str]) -> None:
    limits = [
        limit("requests", 60),
        limit("tokens", 6_000, reserve="input"),
        limit("requests", 8_640, window_s=86_400),
        limit("tokens", 1_000_000, window_s=30 * 86_400),
    ]
    account = opened(Clock(), provider="openai", limits=limits, headers=family)
    assert headers(account, CallSize(100)) == expected


def refused(provider: str, size: CallSize, **fields: Any) -> AccountLimitReached:
    """The second call's refusal; the first one's where it alone is too large."""
    account = opened(Clock(), provider=provider, **fields)
    with suppress(AccountLimitReached):
        account.admit("gpt-4o", size)
    with pytest.raises(AccountLimitReached) as caught:
        account.admit("gpt-4o", size)
    return caught.value


TOKENS = {"limits": [limit("tokens", 1_000)]}


@pytest.mark.parametrize(
    ("provider", "size", "status", "kind", "words"),
    [
        ("openai", 600, 429, "tokens", "on tokens per min (TPM): Limit 1000, Used 600, Requested"),
        ("openai", 1_200, 429, "tokens", "Request too large for gpt-4o"),
        ("groq", 600, 429, "tokens", "for model `gpt-4o`"),
        ("groq", 1_200, 413, "tokens", "Limit 1000, Requested 1200"),
        ("bedrock", 600, 429, "rate_limit_error", "Too many tokens, please wait"),
    ],
)
def test_refusals_in_openais_dialect(
    provider: str, size: int, status: int, kind: str, words: str
) -> None:
    reached = refused(provider, CallSize(size), **TOKENS)
    spec = AccountSpec.parse({"provider": provider, **TOKENS})
    assert spec is not None
    error = refused_in_openai(spec, reached.refusal, reached.model)
    assert error.status == status
    assert isinstance(error.body, dict)
    assert error.body["error"]["type"] == kind
    assert words in error.body["error"]["message"].replace(
        "Rate limit reached for `", "for model `"
    )


def test_azure_tells_the_time_in_words() -> None:
    reached = refused("azure", CallSize(600), **TOKENS)
    spec = AccountSpec.parse("azure")
    assert spec is not None
    error = refused_in_openai(spec, reached.refusal, "gpt-4o")
    assert isinstance(error.body, dict)
    assert error.body["error"]["code"] == "429"
    assert "token rate limit" in error.body["error"]["message"]
    assert "Please retry after" in error.body["error"]["message"]
    assert retry_headers(spec, reached.refusal).keys() == {"retry-after", "retry-after-ms"}


def test_too_fast_a_rise_is_slow_down_or_an_acceleration_limit() -> None:
    growing = {"limits": [limit("requests", 100, growth={"start": 1})]}
    reached = refused("openai", CallSize(1), **growing)
    spec = AccountSpec.parse("openai")
    assert spec is not None
    body = refused_in_openai(spec, reached.refusal, "m").body
    assert isinstance(body, dict)
    assert (body["error"]["type"], body["error"]["code"]) == ("rate_limit_error", "slow_down")
    spec = AccountSpec.parse("anthropic")
    assert spec is not None
    body = refused_in_anthropic(spec, reached.refusal, "m").body
    assert isinstance(body, dict)
    assert "acceleration" in body["error"]["message"]


@pytest.mark.parametrize("provider", ["bedrock", "gemini"])
def test_some_name_no_time_in_a_header(provider: str) -> None:
    reached = refused(provider, CallSize(1), limits=[limit("requests", 1)])
    spec = AccountSpec.parse(provider)
    assert spec is not None
    assert retry_headers(spec, reached.refusal) == {}


def spec_of(provider: str, *limits: dict[str, Any], **fields: Any) -> AccountSpec:
    spec = AccountSpec.parse({"provider": provider, "limits": list(limits), **fields})
    assert spec is not None
    return spec


MODELS = ("gpt-4o", "gpt-4o-mini", "gpt-5")


def test_openais_api_lists_each_model_in_pages() -> None:
    spec = spec_of(
        "openai",
        limit("requests", 500, models="gpt-*"),
        limit("tokens", 30_000, models="gpt-*"),
        limit("tokens", 20_000, models="gpt-4o"),
        limit("requests", 9_000, models="gpt-5", window_s=86_400),
        limit("images", 5, models="dall-e-3"),
        tier=2,
    )
    page = openai_page(spec, MODELS, {"limit": "2"})
    assert [item["model"] for item in page["data"]] == ["dall-e-3", "gpt-4o"]
    assert page["data"][0]["max_images_per_1_minute"] == 10
    assert page["data"][1] == {
        "object": "project.rate_limit",
        "id": "rl-gpt-4o",
        "model": "gpt-4o",
        "max_requests_per_1_minute": 1_000,
        "max_tokens_per_1_minute": 40_000,
    }
    assert (page["has_more"], page["last_id"]) == (True, "rl-gpt-4o")
    rest = openai_page(spec, MODELS, {"after": page["last_id"]})
    assert [item["model"] for item in rest["data"]] == ["gpt-4o-mini", "gpt-5"]
    assert rest["data"][1]["max_requests_per_1_day"] == 18_000
    assert rest["has_more"] is False


CLAUDES = ("claude-haiku-5-5", "claude-opus-5-5", "claude-sonnet-5-5")


def test_anthropics_api_lists_each_class() -> None:
    spec = spec_of(
        "anthropic",
        limit("requests", 1_000, models="claude-[os]*"),
        limit("uncached_input_tokens", 400_000, models="claude-[os]*"),
        limit("output_tokens", 80_000, models="claude-[os]*"),
        limit("input_tokens", 50_000, models="claude-haiku-*"),
        workspaces={"wrkspc_1": 0.25},
    )
    first = anthropic_page(spec, CLAUDES, {"limit": "1"})
    assert first["data"] == [
        {
            "type": "rate_limit",
            "group_type": "model_group",
            "models": ["claude-opus-5-5", "claude-sonnet-5-5"],
            "limits": [
                {"type": "requests_per_minute", "value": 1_000},
                {"type": "input_tokens_per_minute_cache_aware", "value": 400_000},
                {"type": "output_tokens_per_minute", "value": 80_000},
            ],
        }
    ]
    second = anthropic_page(spec, CLAUDES, {"page": first["next_page"]})
    assert second["data"][0]["limits"] == [{"type": "input_tokens_per_minute", "value": 50_000}]
    assert second["next_page"] is None
    named = anthropic_page(spec, CLAUDES, {"model": "claude-haiku-5-5"})
    assert named["data"] == second["data"]
    workspace = anthropic_page(spec, CLAUDES, {}, "wrkspc_1")["data"][0]
    assert workspace["type"] == "workspace_rate_limit"
    assert workspace["limits"][0] == {
        "type": "requests_per_minute",
        "value": 250,
        "org_limit": 1_000,
    }
    assert anthropic_page(spec, CLAUDES, {"group_type": "batch"})["data"] == []


@pytest.mark.parametrize(
    ("query", "workspace", "status"),
    [
        ({"model": "gpt-4o"}, None, 404),
        ({}, "wrkspc_2", 404),
        ({"limit": "0"}, None, 400),
        ({"page": "x"}, None, 400),
    ],
)
def test_pages_that_are_not_there(query: Any, workspace: str | None, status: int) -> None:
    spec = spec_of("anthropic", limit("requests", 1, models="claude-*"))
    with pytest.raises(Refused) as refusal:
        anthropic_page(spec, CLAUDES, query, workspace)
    assert refusal.value.status == status


@pytest.mark.parametrize(("key", "status"), [("", 401), (None, 401), ("sk-other", 403)])
def test_an_admin_key_is_needed(key: str | None, status: int) -> None:
    with pytest.raises(Refused) as refusal:
        check_admin_key(key)
    assert refusal.value.status == status
    check_admin_key("sk-admin-1")
    check_admin_key("sk-ant-admin-1")
