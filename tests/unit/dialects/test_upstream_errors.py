"""The table from Gemini's error bodies to our errors."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.dialects import refusals
from tidegate.errors import (
    UpstreamError,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamUnauthorized,
    UpstreamUnavailable,
)

RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"
QUOTA = "type.googleapis.com/google.rpc.QuotaFailure"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "code", "status", "message", "details", "violations"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def mapped(status: int, headers: dict[str, str] | None = None, **error: Any) -> UpstreamError:
    return refusals.upstream_error(status, error, headers or {}, secret="s3cret")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, UpstreamRejected),
        (401, UpstreamUnauthorized),
        (403, UpstreamUnauthorized),
        (404, UpstreamRejected),
        (408, UpstreamUnavailable),
        (413, UpstreamRejected),
        (429, UpstreamThrottled),
        (499, UpstreamUnavailable),
        (500, UpstreamUnavailable),
        (504, UpstreamUnavailable),
        (301, UpstreamGarbled),
        (204, UpstreamGarbled),
    ],
)
def test_each_status_has_its_error(status: int, kind: type[UpstreamError]) -> None:
    error = mapped(status)
    assert type(error) is kind
    assert error.status == status


@pytest.mark.parametrize("status", [403, 404, 405, 407])
def test_where_no_api_answers_a_model_call_the_provider_is_not_there(status: int) -> None:
    """Such as a proxy or a balancer whose servers are being replaced."""
    page = refusals.upstream_error(status, {}, {}, secret="s3cret", calls_model=True)
    assert type(page) is UpstreamGarbled
    assert page.message == f"the provider answered {status} without an error of its API"
    stated = {"error": {"message": "no such model"}}
    for error, calls_model in (({}, False), ({"message": "no such model"}, True), (stated, True)):
        found = refusals.upstream_error(status, error, {}, secret="", calls_model=calls_model)
        assert type(found) in (UpstreamRejected, UpstreamUnauthorized)


@pytest.mark.parametrize("status", [400, 413, 414, 431])
def test_a_page_of_another_server_is_no_refusal_of_the_request(status: int) -> None:
    page = {"content-type": "text/html; charset=utf-8"}
    found = refusals.upstream_error(status, {}, page, secret="s3cret", calls_model=True)
    assert type(found) is UpstreamGarbled
    assert found.retryable
    assert found.message.startswith(f"the provider answered {status} without an error of its API")
    assert ("a body of this size" in found.message) is (status == 413)
    stated = {"message": "too much"}
    for error, headers, calls_model in (
        (stated, page, True),
        ({}, page, False),
        ({}, {"content-type": "text/plain"}, True),  # a self-hosted server's own
        ({}, {}, True),
    ):
        found = refusals.upstream_error(
            status, error, headers, secret="s3cret", calls_model=calls_model
        )
        assert type(found) is UpstreamRejected


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (
            "You do not have permission to access the File x1 or it may not exist.",
            UpstreamRejected,
        ),
        ("Project `p` does not have access to model `gpt-x`", UpstreamRejected),
        ("Your API key was reported as leaked. Please use another API key.", UpstreamUnauthorized),
        ("Consumer has been suspended.", UpstreamUnauthorized),
    ],
)
def test_a_403_on_a_thing_that_was_asked_for_says_nothing_of_the_key(
    message: str, kind: type[UpstreamError]
) -> None:
    assert type(mapped(403, message=message)) is kind


@pytest.mark.parametrize(
    ("status", "message", "reason", "of_key"),
    [
        (401, "Incorrect API key provided: sk-x.", None, True),
        (401, "", None, True),
        (
            401,
            "Insufficient permissions. Missing scopes: api.responses.write",
            None,
            False,
        ),
        (403, "The caller does not have permission", None, False),
        (403, "Your API key does not have permission to use the specified resource.", None, False),
        (403, "", None, False),
        (403, "Your API key was reported as leaked. Please use another API key.", None, True),
        (403, "Consumer has been suspended.", None, True),
        (403, "Permission denied on resource project p.", "CONSUMER_INVALID", True),
        (403, "Your project has been denied access.", None, True),
    ],
)
def test_what_a_refusal_says_of_the_key_is_told_from_what_it_says_of_a_call(
    status: int, message: str, reason: str | None, of_key: bool
) -> None:
    details = [{"@type": "x/google.rpc.ErrorInfo", "reason": reason}] if reason else []
    error = mapped(status, message=message, details=details)
    assert isinstance(error, UpstreamUnauthorized)
    assert error.of_key is of_key


@pytest.mark.parametrize(
    ("message", "delay", "header", "expected_ms"),
    [
        ("Please retry in 53.0s.", "47s", "9", 47_000),
        ("Please retry in 53.25s.", None, "9", 53_250),
        ("Please retry in 640.5ms.", None, None, 640),
        ("Slow down", None, "9", 9_000),
        ("Slow down", "0.5s", None, 500),
        ("Slow down", "soon", None, None),
        ("Slow down", "-3s", None, None),
        ("Slow down", "999999999s", None, 86_400_000),
        ("Slow down", None, "nan", None),
        ("Slow down", None, None, None),
    ],
)
def test_how_long_to_wait_is_read_from_retry_info_then_the_message_then_the_header(
    message: str, delay: str | None, header: str | None, expected_ms: int | None
) -> None:
    details = [{"@type": RETRY_INFO, "retryDelay": delay}] if delay else []
    headers = {"retry-after": header} if header else {}
    error = mapped(429, headers, message=message, details=details)
    assert error.retry_after_ms == expected_ms


DAY_MS = 86_400_000


@pytest.mark.parametrize(
    ("message", "headers", "expected_ms"),
    [
        ("Please try again in 20s. Visit https://x", {}, 20_000),
        ("Please try again in 6m0s.", {}, 360_000),
        ("Please try again in 1h2m3s.", {}, 3_723_000),
        ("Please try again in 120ms.", {}, 120),
        ("Please try again in 1.25s.", {"retry-after": "9"}, 1_250),
        ("Try again in a while", {"retry-after": "9"}, 9_000),
        ("", {"retry-after-ms": "250", "retry-after": "1"}, 250),
        ("", {"retry-after-ms": "0"}, 0),
        ("", {"retry-after-ms": "0", "retry-after": "1"}, 1_000),
        ("", {"retry-after-ms": "-5", "retry-after": "2"}, 2_000),
        ("", {"retry-after-ms": "999999999"}, DAY_MS),
        ("", {"retry-after": "0"}, 0),
        ("", {"retry-after": "-1"}, None),
        ("", {"retry-after": "1.5"}, 1_500),
        ("", {"retry-after": "99999999999999999999"}, None),
        ("", {"retry-after": "Fri, 31 Dec 99999 23:59:59 GMT"}, None),
        ("", {"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, DAY_MS),
        ("", {"retry-after": "Mon, 01 Jan 0001 00:00:00 +2359"}, 0),
        ("", {"x-ratelimit-reset-tokens": "6m0s", "x-ratelimit-remaining-tokens": "0"}, 360_000),
        ("", {"x-ratelimit-reset-tokens": "6m0s", "x-ratelimit-remaining-tokens": "7"}, None),
        ("", {"x-ratelimit-reset-requests": "59ms", "x-ratelimit-remaining-requests": "0"}, 59),
        # That is when the bucket is full, not when a call fits.
        (
            "Please try again in 120ms.",
            {"x-ratelimit-reset-requests": "1m0s", "x-ratelimit-remaining-requests": "0"},
            120,
        ),
        (
            "",
            {
                "retry-after": "3",
                "anthropic-ratelimit-input-tokens-remaining": "0",
                "anthropic-ratelimit-input-tokens-reset": "2099-01-01T00:00:00Z",
            },
            3_000,
        ),
        (
            "",
            {
                "retry-after-ms": "0",
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-remaining-tokens": "0",
            },
            360_000,
        ),
        ("", {"x-ratelimit-reset-requests": "-1s", "x-ratelimit-remaining-requests": "0"}, None),
        (
            "",
            {"x-ratelimit-reset-requests": "999999h", "x-ratelimit-remaining-requests": "0"},
            DAY_MS,
        ),
    ],
)
def test_the_other_ways_to_say_how_long_are_read_too_and_bounded(
    message: str, headers: dict[str, str], expected_ms: int | None
) -> None:
    assert mapped(429, headers, message=message).retry_after_ms == expected_ms


@given(
    st.text(max_size=30),
    st.sampled_from(["retry-after", "retry-after-ms", "x-ratelimit-reset-tokens"]),
    st.sampled_from(["", "Please try again in "]),
)
def test_no_words_on_how_long_break_it_or_are_longer_than_a_day(
    said: str, name: str, before: str
) -> None:
    headers = {name: said, "x-ratelimit-remaining-tokens": "0"}
    found_ms = mapped(429, headers, message=before + said).retry_after_ms
    assert found_ms is None or 0 <= found_ms <= DAY_MS


@pytest.mark.parametrize(
    ("said", "unit"), [("tokens", "tokens"), ("requests", "requests"), ("rate_limit_error", None)]
)
def test_openai_says_in_the_type_what_there_was_too_much_of(said: str, unit: str | None) -> None:
    error = mapped(429, type=said, code="rate_limit_exceeded")
    assert isinstance(error, UpstreamThrottled)
    assert error.unit == unit


def test_a_retry_after_header_may_be_a_date() -> None:
    at = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    found = mapped(503, {"retry-after": at}).retry_after_ms
    assert found is not None
    assert 55_000 < found <= 60_000
    assert mapped(503, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}).retry_after_ms == 0


@pytest.mark.parametrize(
    ("kind", "expected_ms"),
    [("overloaded_error", None), ("api_error", None), ("rate_limit_error", 58_000)],
)
def test_a_good_answer_s_wait_is_for_its_limit_alone(kind: str, expected_ms: int | None) -> None:
    headers = [(b"Retry-After", b"58"), (b"request-id", b"req_1")]
    event = {"type": "error", "error": {"type": kind, "message": "Try later"}}
    error = refusals.stream_error(event, headers, secret="s3cret", dialect="anthropic")
    assert error.retry_after_ms == expected_ms
    kept = dict(refusals.own_headers([(b"retry-after", b"58"), (b"request-id", b"req_1")], event))
    assert kept.pop(b"retry-after", None) == (b"58" if expected_ms else None)
    assert kept == {b"content-type": b"application/json", b"request-id": b"req_1"}


def test_a_date_is_read_by_the_clock_of_the_server_that_names_it() -> None:
    named = {
        "date": "Wed, 21 Oct 2015 07:28:00 GMT",
        "retry-after": "Wed, 21 Oct 2015 07:28:30 GMT",
    }
    assert mapped(503, named).retry_after_ms == 30_000
    wrong = ("", "yesterday", "Wed, 99 Oct 2015 07:28:00 GMT")
    assert all(mapped(503, named | {"date": each}).retry_after_ms == 0 for each in wrong)


@pytest.mark.parametrize(
    ("quota_id", "day", "unit"),
    [
        ("GenerateRequestsPerDayPerProjectPerModel-FreeTier", True, "requests"),
        ("GenerateRequestsPerMinutePerProjectPerModel-FreeTier", False, "requests"),
        ("GenerateContentInputTokensPerModelPerMinute-PaidTier1", False, "input_tokens"),
        ("GenerateContentInputTokensPerModelPerDay", True, "input_tokens"),
        (None, False, None),
    ],
)
def test_a_quota_is_told_by_its_name(quota_id: str | None, day: bool, unit: str | None) -> None:
    details = [{"@type": QUOTA, "violations": [7, {"quotaId": quota_id}]}]
    error = mapped(429, details=details)
    assert isinstance(error, UpstreamThrottled)
    assert (error.day_quota, error.unit) == (day, unit)


@pytest.mark.parametrize(
    "error",
    [
        {"details": [{"reason": "API_KEY_INVALID"}]},
        {"message": "API key not valid. Please pass a valid API key."},
        {"message": "API key expired. Please renew the API key."},
    ],
)
def test_a_400_about_the_key_means_that_the_key_is_dead(error: dict[str, Any]) -> None:
    assert type(mapped(400, **error)) is UpstreamUnauthorized


@pytest.mark.parametrize("field", ["code", "status"])
def test_the_code_of_an_error_object_is_its_number_or_its_word(field: str) -> None:
    assert refusals.status_of({"code": 429, "status": "RESOURCE_EXHAUSTED"}) == 429
    assert refusals.status_of({"code": "503"}) == 503
    assert refusals.status_of({"status": "PERMISSION_DENIED"}) == 403
    assert refusals.status_of({field: None}) == 500
    assert refusals.status_of({"code": 200}) == 500


@pytest.mark.parametrize(
    ("tail", "code"),
    [
        (b'{"error": {"code": 1}}', 1),
        (b'[{\n "error": {\n "code": 2}}\n]\n', 2),
        (b'data: {"a": 1}\r\n\r\ndata: {"error": {"code": 3}}\r\n\r\n', 3),
        (b'cut off"}\n\ndata: [{"error":\ndata: {"code": 4}}]', 4),
        (b'data:{"error": {"code": 5}}\n\ndata: {"b": 1}\n\n', 5),
    ],
)
def test_an_error_object_is_found_in_the_last_bytes(tail: bytes, code: int) -> None:
    found = refusals.error_event_in(tail)
    assert found is not None
    assert (refusals.error_object(found) or {})["code"] == code


@pytest.mark.parametrize(
    "tail", [b"", b"\xff\xfe", b'data: {"text": "\\"error\\" is a word"}\n\n', b'{"error": null}']
)
def test_no_error_object_is_found_where_there_is_none(tail: bytes) -> None:
    assert refusals.error_event_in(tail) is None


def test_messages_are_one_bounded_line_without_keys() -> None:
    key = "AIzaSy" + "k" * 33
    text = f"s3cret and {key}\n at https://u:pw@h/x?key=abc&upload_id=def " + "y" * 2_000
    message = refusals.clean(text, "s3cret")
    for hidden in ("s3cret", key, "pw", "abc", "def", "\n"):
        assert hidden not in message
    assert len(message) < 510


def test_a_key_that_the_provider_has_masked_itself_is_not_told_either() -> None:
    said = "Incorrect API key provided: sk-proj-**********wxyz. You can find your key at h"
    assert refusals.clean(said, "s3cret") == (
        "Incorrect API key provided: *** You can find your key at h"
    )
    assert len(refusals.clean("*** " + "y" * 1_000_000, "s3cret")) < 510


@given(JSON, st.integers(100, 599))
def test_no_error_body_of_any_shape_breaks_the_table(body: Any, status: int) -> None:
    error = body if isinstance(body, dict) else {"details": body, "message": body}
    assert isinstance(refusals.upstream_error(status, error, {}, secret=""), UpstreamError)
    assert 400 <= refusals.status_of(error) <= 599


@given(st.binary(max_size=200))
def test_no_bytes_break_the_search_for_an_error_object(tail: bytes) -> None:
    refusals.error_event_in(b'data: {"error": ' + tail)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"object": "error", "message": "Rate limit exceeded", "code": "1300"}', "Rate limit"),
        (b'{"detail": "the model is not loaded"}', "the model is"),
        (b'{"error": {"message": "inner"}, "message": "outer"}', "inner"),
        (b'{"detail": [{"loc": ["body"]}]}', ""),
        (b'["message"]', ""),
        (b"<html>message</html>", ""),
    ],
)
def test_a_refusal_whose_body_is_flat_is_read_too(body: bytes, message: str) -> None:
    found = refusals.error_of_refusal_in(body)
    assert str(found.get("message", "")).startswith(message)
    assert bool(found) == bool(message)
