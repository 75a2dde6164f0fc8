"""Every refusal that the providers word, as what it means."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tidegate.dialects.headers import until_date_ms, until_ms
from tidegate.dialects.refusals import upstream_error
from tidegate.errors import (
    StatedBound,
    UpstreamError,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTierBusy,
    UpstreamUnauthorized,
    UpstreamUnavailable,
    UpstreamUnpaid,
)

Headers = dict[str, str]


def classified(
    dialect: str,
    status: int,
    error: dict[str, Any],
    headers: Headers | None = None,
    tier: str = "",
) -> UpstreamError:
    return upstream_error(status, error, headers or {}, secret="", dialect=dialect, tier=tier)


def quota(*ids: str) -> list[dict[str, Any]]:
    failure = "type.googleapis.com/google.rpc.QuotaFailure"
    return [{"@type": failure, "violations": [{"quotaId": one} for one in ids]}]


UNPAID: list[tuple[str, int, dict[str, Any]]] = [
    *(
        ("openai", 429, {"type": "insufficient_quota", "code": code, "message": "Quota exceeded"})
        for code in (
            *("credit_balance_exhausted", "organization_spend_limit_exceeded"),
            *("project_spend_limit_exceeded", "organization_usage_limit_exceeded"),
            "insufficient_quota",
        )
    ),
    ("openai", 402, {"message": "Insufficient Balance", "type": "unknown_error"}),  # DeepSeek
    # As it is within a stream.
    ("openai", 400, {"message": "Insufficient Balance", "code": "invalid_request_error"}),
    ("openai", 402, {"code": 402, "message": "This request requires more credits"}),  # OpenRouter
    ("openai", 403, {"message": "Your newly created team doesn't have any credits yet."}),  # xAI
    ("openai", 429, {"message": "Your team 0a1b-2c has either used all available credits or "
                                "reached its monthly spending limit."}),  # xAI
    ("anthropic", 400, {"type": "invalid_request_error",
                        "message": "Your credit balance is too low to reach the API."}),
    ("anthropic", 400, {"type": "invalid_request_error",
                        "message": "You have reached your specified API usage limits. You will "
                                   "regain access on 2099-12-01 at 00:00 UTC."}),
    ("anthropic", 429, {"type": "rate_limit_error", "message": "This workspace is at its cap",
                        "details": {"error_code": "enforced_spend_limit_reached"}}),
    ("anthropic", 402, {"type": "billing_error", "message": "Payment is due"}),
    ("gemini", 429, {"status": "RESOURCE_EXHAUSTED",
                     "message": "Your prepayment credits are depleted. Buy more."}),
    ("gemini", 429, {"status": "RESOURCE_EXHAUSTED",
                     "message": "Your billing account has exceeded its monthly spending cap."}),
    ("gemini", 403, {"message": "This method requires billing. Enable it on project 7.",
                     "details": [{"reason": "BILLING_DISABLED"}]}),  # Vertex
    ("openai", 412, {"code": "PRECONDITION_FAILED", "type": "error",
                     "message": "Account acme-1 is suspended, possibly due to reaching the monthly "
                                "spending limit or failure to pay past invoices."}),  # Fireworks
    ("openai", 429, {"type": "exceeded_current_quota_error", "message": "Your account org-1 <ak-2> "
                     "is suspended due to insufficient balance, please recharge"}),  # Moonshot
    ("openai", 403, {"type": "exceeded_current_quota_error",
                     "message": "Your account org-1 is not active"}),
    ("openai", 400, {"code": "Arrearage", "message": "Access denied"}),  # Alibaba
    ("openai", 400, {"code": "blocked_api_access", "type": "invalid_request_error",
                     "message": "The spend limit has been reached"}),  # Groq
    ("openai", 403, {"code": 403, "message": "Key limit exceeded (monthly limit)."}),  # OpenRouter
    ("openai", 403, {"code": 30001,
                     "message": "Sorry, your account balance is insufficient"}),  # SiliconFlow
    ("openai", 403, {"code": "AccountOverdueError", "message": "The request failed because your "
                     "account has an overdue balance."}),  # Volcengine
    ("openai", 402, {"code": 402, "message": "This request requires more credits, or fewer "
                     "max_tokens. You requested up to 900 tokens, but can only afford 0."}),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "status", "error"), UNPAID)
def test_an_account_without_money_puts_the_upstream_out(
    dialect: str, status: int, error: dict[str, Any]
) -> None:
    found = classified(dialect, status, error)
    assert isinstance(found, UpstreamUnpaid)
    assert found.of_upstream
    assert not found.retryable


@pytest.mark.parametrize(
    "message",
    [
        "This request requires more credits, or fewer max_tokens. You requested up to 65536 "
        "tokens, but can only afford 10492. To increase, buy more.",
        "Prompt tokens limit exceeded: 230799 > 91442. To increase, buy more.",
    ],
)
def test_a_call_that_costs_more_than_is_left_puts_no_upstream_out_for_others(message: str) -> None:
    found = classified("openai", 402, {"code": 402, "message": message})  # OpenRouter
    assert isinstance(found, UpstreamUnpaid)
    assert not found.of_upstream
    assert not found.retryable


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_what_openrouter_refuses_is_read_by_the_limit_that_it_names(dialect: str) -> None:
    def named(status: int, source: str, **more: Any) -> UpstreamError:
        metadata = {"limit_source": f"openrouter_{source}"} | more
        error = {"code": status, "message": "Payment required", "metadata": metadata}
        return classified(dialect, status, error, {"retry-after": "3"} if source[0] == "i" else {})

    running = named(402, "in_flight_budget")
    assert isinstance(running, UpstreamThrottled)
    assert (running.retry_after_ms, running.of_account) == (3_000, True)
    for status, source in (
        (403, "guardrail_budget"),
        (403, "workspace_budget"),
        (402, "key_limit"),
    ):
        spent = named(status, source)
        assert isinstance(spent, UpstreamUnpaid)
        assert spent.of_upstream
    heavy = named(402, "credits", reason="weight_exceeds_budget")
    assert isinstance(heavy, UpstreamUnpaid)
    assert not heavy.of_upstream
    assert named(402, "credits").of_upstream


@pytest.mark.parametrize(
    ("dialect", "status", "error"),
    [
        ("openai", 400, {"message": "Incorrect API key provided: xa***yz."}),  # xAI
        ("openai", 400, {"code": "organization_restricted", "message": "Restricted."}),  # Groq
        (
            "anthropic",
            400,
            {"type": "invalid_request_error", "message": "This organization has been disabled."},
        ),
        ("openai", 401, {"code": "invalid_api_key", "message": "Incorrect API key provided"}),
        (
            "openai",  # Azure
            401,
            {
                "code": "401",
                "message": "Access denied due to invalid subscription key or wrong API endpoint. "
                "Make sure to provide a valid key for your resource.",
            },
        ),
        ("anthropic", 401, {"type": "authentication_error", "message": "invalid x-api-key"}),
        ("gemini", 400, {"message": "API key not valid. Please pass a valid API key."}),
        ("gemini", 400, {"message": "no", "details": [{"reason": "API_KEY_INVALID"}]}),
        ("gemini", 403, {"message": "Your project has been suspended"}),
    ],
)
def test_a_dead_key_is_known_by_its_words(dialect: str, status: int, error: dict[str, Any]) -> None:
    found = classified(dialect, status, error)
    assert isinstance(found, UpstreamUnauthorized)
    assert not isinstance(found, UpstreamUnpaid)
    assert found.of_key


@pytest.mark.parametrize(
    ("dialect", "message"),
    [
        (
            "openai",
            "Request too large for model-x in organization org-1 on tokens per min (TPM): "
            "Limit 30000, Requested 31538.",
        ),
        ("openai", "Rate limit on tokens: Limit 30000, Used 1, Requested 31538."),
        ("anthropic", "Extra usage is required for long context requests."),
    ],
)
def test_a_request_that_is_too_large_for_its_limit_is_not_tried_again(
    dialect: str, message: str
) -> None:
    found = classified(dialect, 429, {"message": message, "type": "tokens"})
    assert isinstance(found, UpstreamRejected)
    assert not found.retryable
    assert not found.of_upstream


@pytest.mark.parametrize(
    ("error", "unit", "wait_ms"),
    [
        ({"message": "Limit 30000, Used 29990, Requested 20. Please try again in 6m0s.",
          "type": "tokens"}, "tokens", 360_000),
        ({"message": "Rate limit reached on requests per day (RPD). Please try again in 8.64s"},
         "requests", 8_640),
        ({"message": "Please retry after 60 seconds."}, None, 60_000),  # Azure, in the text alone
        ({"message": "Calls have exceeded the token rate limit of your tier."}, "tokens", None),
        ({"message": "Calls have exceeded the call rate limit of your tier."}, "requests", None),
        ({"message": "slow down", "code": "slow_down"}, None, None),
        ({"message": "Workspace allocated quota exceeded, please increase your quota limit.",
          "code": "insufficient_quota"}, "tokens", None),  # Alibaba's rate of tokens
        ({"message": "Your account org-1 request reached organization max RPM: 3, please try "
          "again after 1 seconds"}, "requests", 1_000),  # Moonshot
        ({"message": "Your account org-1 request reached organization TPM rate limit, current: 4, "
          "limit: 3"}, "tokens", None),
        ({"message": "Rate limit of 10 per 60s exceeded for UserByModelByMinute. Please wait 42 "
          "seconds before retrying."}, None, 42_000),  # GitHub
    ],
)  # fmt: skip
def test_openai_says_what_there_was_too_much_of_and_until_when(
    error: dict[str, Any], unit: str | None, wait_ms: int | None
) -> None:
    found = classified("openai", 429, error)
    assert isinstance(found, UpstreamThrottled)
    assert (found.unit, found.retry_after_ms, found.of_account) == (unit, wait_ms, False)


@pytest.mark.parametrize(
    ("message", "headers", "unit"),
    [
        ("Rate limit reached for `m` on tokens per day (TPD): Limit 9, Used 8, Requested 3. "
         "Please try again in 9m38.016s.", {}, "tokens"),  # Groq
        ("Rate limit reached on requests per day (RPD): Limit 9, Used 9, Requested 1.",
         {}, "requests"),
        ("Your account org-1 request reached organization TPD rate limit, current: 4, limit: 3, "
         "per day", {}, "tokens"),  # Moonshot
        ("Too many requests", {"x-ratelimit-remaining-requests-day": "0",  # Cerebras
                               "x-ratelimit-reset-requests-day": "3600"}, "requests"),
    ],
)  # fmt: skip
def test_a_limit_of_a_day_is_told_from_one_of_a_minute(
    message: str, headers: Headers, unit: str
) -> None:
    found = classified("openai", 429, {"message": message}, headers)
    assert isinstance(found, UpstreamThrottled)
    assert (found.unit, found.per_day, found.day_quota) == (unit, True, False)
    of_minute = classified(
        "openai", 429, {"message": message.replace("day", "min").replace("PD", "PM")}
    )
    assert isinstance(of_minute, UpstreamThrottled)
    assert not of_minute.per_day


def test_openrouter_states_in_the_error_when_a_limit_resets() -> None:
    at_ms = round((datetime.now(UTC).timestamp() + 3_600) * 1000)
    named = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(at_ms), "Other": 1}
    error = {"code": 429, "message": "Rate limit exceeded: free", "metadata": {"headers": named}}
    found = classified("openai", 429, error)
    assert isinstance(found, UpstreamThrottled)
    assert found.unit == "requests"
    assert found.retry_after_ms == pytest.approx(3_600_000, abs=60_000)


@pytest.mark.parametrize("metadata", [None, 5, {"headers": [1]}, {"headers": {"a": None}}])
def test_metadata_in_another_form_leaves_a_429_one(metadata: object) -> None:
    found = classified("openai", 429, {"message": "Rate limit", "metadata": metadata})
    assert isinstance(found, UpstreamThrottled)
    assert (found.unit, found.retry_after_ms) == (None, None)


def test_openai_asks_to_slow_down_with_a_503() -> None:
    found = classified("openai", 503, {"message": "Slow down", "code": "slow_down"})
    assert isinstance(found, UpstreamThrottled)
    assert not found.of_account


def test_anthropic_names_it_in_its_text_where_no_header_does() -> None:
    message = "This request would exceed your limit of 200,000 input tokens per minute."
    found = classified("anthropic", 429, {"type": "rate_limit_error", "message": message})
    assert isinstance(found, UpstreamThrottled)
    assert found.unit == "input_tokens"


def test_anthropic_says_it_in_its_headers() -> None:
    headers = {
        "anthropic-ratelimit-requests-remaining": "40",
        "anthropic-ratelimit-input-tokens-remaining": "0",
        "anthropic-ratelimit-input-tokens-reset": "2099-01-01T00:00:00Z",
    }
    found = classified("anthropic", 429, {"type": "rate_limit_error", "message": "no"}, headers)
    assert isinstance(found, UpstreamThrottled)
    assert (found.unit, found.retry_after_ms) == ("input_tokens", 86_400_000)


IN_HALF_AN_HOUR, IN_TWO_HOURS = 1_800, 7_200  # seconds


@pytest.mark.parametrize(
    ("headers", "wait_s", "of_account"),
    [
        ({"status": "rejected", "reset": IN_HALF_AN_HOUR}, 1_800, True),
        (
            {
                "status": "rejected",
                "reset": IN_HALF_AN_HOUR,
                "5h-status": "rejected",
                "5h-reset": IN_HALF_AN_HOUR,
                "7d-status": "rejected",
                "7d-reset": IN_TWO_HOURS,
                "7d-utilization": "1.01",
            },
            7_200,
            True,
        ),
        (
            {
                "status": "rejected",
                "5h-status": "allowed",
                "5h-reset": IN_HALF_AN_HOUR,
                "7d_opus-status": "rejected",
                "7d_opus-reset": IN_TWO_HOURS,
            },
            7_200,
            False,
        ),
        ({"status": "rejected", "reset": "soon"}, None, True),
        ({"status": "allowed", "reset": IN_TWO_HOURS}, None, False),
    ],
)
def test_anthropic_names_the_windows_of_a_subscription_in_headers(
    headers: dict[str, str | int], wait_s: int | None, of_account: bool
) -> None:
    now_s = int(time.time())
    named = {
        f"anthropic-ratelimit-unified-{name}": value
        if isinstance(value, str)
        else f"{now_s + value}"
        for name, value in headers.items()
    }
    error = classified("anthropic", 429, {"type": "rate_limit_error", "message": "no"}, named)
    assert isinstance(error, UpstreamThrottled)
    assert error.of_account is of_account
    if wait_s is None:
        assert error.retry_after_ms is None
    else:
        assert error.retry_after_ms == pytest.approx(wait_s * 1_000, abs=60_000)
    exact = classified("anthropic", 429, {}, {**named, "retry-after": "9"})
    assert exact.retry_after_ms == 9_000


def test_zai_states_in_its_words_when_a_limit_resets() -> None:
    at = datetime.now(UTC) + timedelta(hours=10)  # by the clock of Beijing
    words = "Usage limit reached for 5 hour. Your limit will reset at "
    error = {"code": "1308", "message": f"{words}{at:%Y-%m-%d %H:%M:%S}"}
    found = classified("openai", 429, error)
    assert isinstance(found, UpstreamThrottled)
    assert found.retry_after_ms == pytest.approx(7_200_000, abs=60_000)
    for odd in ("2026-13-45 00:00:00", "tomorrow", "2020-01-01 00:00:00"):
        found = classified("openai", 429, {"code": "1308", "message": words + odd})
        assert isinstance(found, UpstreamThrottled)
        assert not found.retry_after_ms


@pytest.mark.parametrize(
    ("ids", "unit", "day", "account"),
    [
        (["GenerateRequestsPerDayPerProjectPerModel-FreeTier"], "requests", True, False),
        (["GenerateContentPaidTierInputTokensPerModelPerMinute"], "input_tokens", False, False),
        (["GenerateRequestsPerMinutePerProject"], "requests", False, True),
        (["GenerateRequestsPerMinutePerProject", "RequestsPerModelPerMinute"], "requests", False,
         False),
        (["GenerateContentInputTokensPerModelPerMinute-FreeTier",
          "GenerateRequestsPerDayPerProjectPerModel-FreeTier"], "requests", True, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dialect", ["gemini", "openai"])
def test_gemini_names_a_model_s_quota_or_the_project_s(
    dialect: str, ids: list[str], unit: str, day: bool, account: bool
) -> None:
    found = classified(dialect, 429, {"message": "Quota exceeded", "details": quota(*ids)})
    assert isinstance(found, UpstreamThrottled)
    assert (found.unit, found.day_quota, found.of_account) == (unit, day, account)


@pytest.mark.parametrize("dialect", ["gemini", "openai"])
def test_gemini_states_the_bounds_of_a_model_s_quotas(dialect: str) -> None:
    values = {
        "GenerateRequestsPerMinutePerProjectPerModel-FreeTier": "10",
        "GenerateContentInputTokensPerModelPerMinute-FreeTier": "250000",
        "GenerateRequestsPerDayPerProjectPerModel-FreeTier": "250",
        "GenerateRequestsPerMinutePerProject": "3000",  # not of the model
        "GenerateRequestsPerModelPerRegion": "3000",  # of no known window
        "GenerateContentTokensPerModelPerMinute": "-1",
        "GenerateContentTokensPerModelPerDay": "9" * 20,
    }
    violations = [{"quotaId": one, "quotaValue": value} for one, value in values.items()]
    details = [{"violations": [*violations, {"quotaId": "RequestsPerModelPerMinute"}]}]
    found = classified(dialect, 429, {"message": "Quota exceeded", "details": details})
    assert isinstance(found, UpstreamThrottled)
    assert found.stated == (
        StatedBound("requests", "minute", 10),
        StatedBound("input_tokens", "minute", 250_000),
        StatedBound("requests", "day", 250),
    )


@pytest.mark.parametrize("odd", [5, "text", {"quotaId": "x"}, [5]])
def test_quotas_in_another_form_leave_a_429_one(odd: object) -> None:
    found = classified("gemini", 429, {"message": "Quota", "details": [{"violations": odd}]})
    assert isinstance(found, UpstreamThrottled)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (503, "server busy, please try again. maximum pending requests exceeded"),  # Ollama
        (503, "Loading model"),  # llama.cpp
        (503, "no slot available"),
        (503, "The request queue is full"),
    ],
)
def test_a_server_of_ones_own_that_is_busy_is_no_fault(status: int, message: str) -> None:
    found = classified("openai", status, {"message": message})
    assert isinstance(found, UpstreamThrottled)
    assert found.retryable


OWN = [
    (503, {"message": "all hands are full", "type": "ServiceUnavailableError", "code": 503}, True),
    (429, {"message": "Model is overloaded"}, True),  # TGI
    (503, {}, False),  # of a proxy before it
    (500, {"message": "CUDA error: out of memory", "type": "server_error", "code": 500}, False),
]


@pytest.mark.parametrize(("status", "error", "busy"), OWN)
def test_a_server_of_ones_own_is_busy_in_whatever_words(
    status: int, error: dict[str, Any], busy: bool
) -> None:
    found = upstream_error(status, error, {}, secret="", dialect="openai", is_own=True)
    assert isinstance(found, UpstreamThrottled if busy else UpstreamUnavailable)
    assert found.retryable


@pytest.mark.parametrize(
    "message",
    [
        "[json.exception.parse_error.101] parse error at line 1, column 2",
        "[json.exception.out_of_range.406] number overflow parsing '1e400'",
        "Failed to parse tools: Unsupported tool type: {}",
        "Failed to parse messages: Missing 'role' in message: {}",
        "image input is not supported - hint: you may need to provide the mmproj",
        "Unknown reasoning format: x",
    ],
)
def test_what_llama_says_500_of_is_the_requests_own_fault(message: str) -> None:
    error = {"code": 500, "message": message, "type": "server_error"}
    found = upstream_error(500, error, {}, secret="", dialect="openai", is_own=True)
    assert isinstance(found, UpstreamRejected)
    hosted = upstream_error(500, error, {}, secret="", dialect="openai")
    assert isinstance(hosted, UpstreamUnavailable), "a provider's own is a fault"


@pytest.mark.parametrize(
    ("dialect", "status", "error"),
    [
        ("openai", 503, {"code": "server_is_overloaded", "message": "Overloaded"}),
        ("anthropic", 529, {"type": "overloaded_error", "message": "Overloaded"}),
        ("gemini", 503, {"status": "UNAVAILABLE", "message": "The model is overloaded."}),
    ],
)
def test_a_provider_that_is_overloaded_fails(
    dialect: str, status: int, error: dict[str, Any]
) -> None:
    found = classified(dialect, status, error)
    assert isinstance(found, UpstreamUnavailable)
    assert found.of_upstream


ECHOED = (
    "Your credit balance is too low",
    "You have reached your specified API usage limits",
    "Incorrect API key provided",
    "API key not valid",
    "Your team doesn't have any credits",
    "Your prepayment credits are depleted",
    "Access denied due to invalid subscription key",
)


@pytest.mark.parametrize("dialect", ["openai", "anthropic", "gemini"])
@pytest.mark.parametrize("words", ECHOED)
def test_a_client_s_text_in_a_refusal_is_no_word_of_the_provider(dialect: str, words: str) -> None:
    error = {"type": "invalid_request_error", "message": f"Invalid value: '{words}'"}
    assert isinstance(classified(dialect, 400, error), UpstreamRejected)


@pytest.mark.parametrize("dialect", ["gemini", "openai"])
def test_a_place_that_gemini_does_not_serve_is_no_fault_of_the_request(dialect: str) -> None:
    words = "User location is not supported for the API use"
    for more in (".", " without a billing account linked."):
        error = {"code": 400, "status": "FAILED_PRECONDITION", "message": words + more}
        found = classified(dialect, 400, error)
        assert type(found) is UpstreamUnauthorized, "another upstream is asked"
        assert not found.of_key, "it may be of this model alone"
    of_client = {"code": 400, "message": f"The tool {words} is unknown"}
    assert type(classified(dialect, 400, of_client)) is UpstreamRejected


def test_other_400_are_of_the_request_alone() -> None:
    error = {"code": "context_length_exceeded", "message": "This model's maximum context is 8"}
    found = classified("openai", 400, error)
    assert isinstance(found, UpstreamRejected)
    assert not found.of_upstream


def test_the_day_from_which_an_account_may_spend_again() -> None:
    now = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)
    text = "You will regain access on 2026-12-01 at 00:00 UTC."
    assert until_date_ms(text, now) == 12 * 3_600_000
    assert until_date_ms("You will regain access on 2026-13-99.", now) is None
    assert until_ms("2026-11-30T12:00:30Z", now) == 30_000
    assert until_ms("soon", now) is None


@pytest.mark.timeout(10)
@pytest.mark.parametrize("dialect", ["openai", "anthropic", "gemini"])
def test_no_text_takes_long_to_read(dialect: str) -> None:
    for text in ("a " * 100_000, "Limit " * 60_000, "your " * 60_000, "retry after " * 20_000):
        error = {"message": text, "details": [{}] * 1_000}
        assert isinstance(classified(dialect, 429, error), UpstreamError)


NO_FLEX: list[tuple[str, int, dict[str, Any]]] = [
    ("openai", 429, {"message": "Resource Unavailable", "type": "invalid_request_error",
                     "code": "resource_unavailable"}),
    ("openai", 429, {"message": "Resource Unavailable"}),
    ("openai", 498, {"message": "Flex tier capacity exceeded"}),  # Groq
    ("gemini", 503, {"status": "UNAVAILABLE", "message": "The service is unavailable."}),
    ("gemini", 429, {"status": "RESOURCE_EXHAUSTED", "message": "Resource has been exhausted"}),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "status", "error"), NO_FLEX)
def test_a_tier_without_capacity_is_no_fault_of_the_model(
    dialect: str, status: int, error: dict[str, Any]
) -> None:
    found = classified(dialect, status, error, {"retry-after": "3"}, tier="flex")
    assert type(found) is UpstreamTierBusy
    assert (found.retryable, found.is_answer, found.of_upstream) == (True, True, False)
    assert found.retry_after_ms == 3_000
    plain = classified(dialect, status, error)
    assert type(plain) is not UpstreamTierBusy
    assert plain.retryable or status == 429, "a call without the tier goes elsewhere"


@pytest.mark.parametrize(
    ("dialect", "error"),
    [
        ("openai", {"message": "Rate limit reached for gpt-5 on requests per min (RPM): Limit 3",
                    "type": "requests", "code": "rate_limit_exceeded"}),
        ("openai", {"message": "Rate limit reached.", "code": "rate_limit_exceeded"}),
        ("openai", {"message": "slow down", "code": "slow_down"}),
        ("gemini", {"message": "Quota exceeded",
                    "details": quota("GenerateRequestsPerMinutePerProject")}),
    ],
)  # fmt: skip
def test_a_limit_of_the_account_is_one_in_flex_too(dialect: str, error: dict[str, Any]) -> None:
    assert type(classified(dialect, 429, error, tier="flex")) is UpstreamThrottled


def test_a_generation_that_a_server_of_ones_own_failed_is_its_fault() -> None:
    """Of TGI's router, whose model server ran out of memory or died."""
    error = {"message": "Request failed during generation: Server error: transport error"}
    found = upstream_error(424, error, {}, secret="", dialect="openai", is_own=True)
    assert type(found) is UpstreamUnavailable
    connector = {"message": "Error retrieving tool list", "code": "external_connector_error"}
    found = upstream_error(424, connector, {}, secret="", dialect="openai")
    assert type(found) is UpstreamRejected
