"""What an upstream's answer tells the limiter."""

from __future__ import annotations

import gzip
import json
import logging
from datetime import UTC, datetime
from typing import Any

import pytest

from tidegate.errors import LeaseLost, UpstreamTimeout
from tidegate.integrations.exchange import (
    MAX_KEPT_BYTES,
    Review,
    demand_of,
    outcome_of_error,
    outcome_of_status,
    penalised_by,
    retry_after_ms,
    retry_info_ms,
)
from tidegate.limiter import Demand, Tokens

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
IN_20_S = "Tue, 24 Nov 2026 12:00:20 GMT"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "30"}, 30_000),
        ({"retry-after": " 1.5 "}, 1_500),
        ({"retry-after": "0.0001"}, 1),
        ({"retry-after": "0"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "999999999"}, 86_400_000),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after": IN_20_S}, 20_000),
        ({"retry-after": "Tue, 24 Nov 2026 11:00:00 GMT"}, None),
        ({"retry-after": "Tue, 24 Nov 2026 12:00:20"}, None),
        ({"retry-after": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}, None),
        ({"retry-after": IN_20_S, "date": "Tue, 24 Nov 2026 11:50:20 GMT"}, 600_000),
        ({"retry-after": IN_20_S, "date": "Tue, 24 Nov 2026 12:10:00 GMT"}, None),
        ({"retry-after": IN_20_S, "date": "yesterday"}, 20_000),
        ({"retry-after-ms": "250", "retry-after": "30"}, 250),
        ({"retry-after-ms": "0", "retry-after": "30"}, 30_000),
        ({"retry-after-ms": "0"}, None),
    ],
)
def test_how_long_the_headers_say_to_stay_away(
    headers: dict[str, str], expected: int | None
) -> None:
    assert retry_after_ms(headers, NOW) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"details": [{"retryDelay": "47s"}]}', 47_000),
        (b'{"details": [{"retryDelay" : "0.25s"}]}', 250),
        (b'{"details": [{"retryDelay": "47"}]}', None),
        (b'{"details": [{"retryDelay": ""}]}', None),
        (b"", None),
    ],
)
def test_how_long_googles_error_says_to_stay_away(body: bytes, expected: int | None) -> None:
    assert retry_info_ms(body) == expected


def test_only_overload_is_a_dropped_call() -> None:
    assert {status: outcome_of_status(status) for status in (200, 400, 404, 500)} == dict.fromkeys(
        (200, 400, 404, 500), "success"
    )
    assert {outcome_of_status(status) for status in (429, 503, 529)} == {"dropped"}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (OSError(), "dropped"),
        (ConnectionResetError(), "dropped"),
        (UpstreamTimeout("overdue", phase="total"), "dropped"),
        (LeaseLost("gone"), "ignored"),
        (ValueError(), "ignored"),
        (KeyboardInterrupt(), "ignored"),
    ],
    ids=repr,
)
def test_only_errors_that_speak_of_overload_are_dropped_calls(
    error: BaseException, outcome: str
) -> None:
    assert outcome_of_error(error, (OSError,)) == outcome


def review(status: int, **options: Any) -> Review:
    defaults: dict[str, Any] = {"usage": None, "pauses": True, "decode": bytes}
    return Review(status, options.pop("headers", {}), now=NOW, **(defaults | options))


def total_tokens(body: bytes) -> int:
    total: int = json.loads(body)["total"]
    return total


def test_the_usage_is_read_from_the_whole_decoded_body() -> None:
    seen = review(200, usage=total_tokens, decode=bytes.lower)
    for chunk in (b'{"TOT', b'AL": 7}'):
        seen.take(chunk)
    assert seen.end() == 7


@pytest.mark.parametrize("status", [429, 500, 302])
def test_the_usage_of_an_answer_that_is_no_success_is_unknown(status: int) -> None:
    seen = review(status, usage=total_tokens, pauses=False)
    assert not seen.wants_body
    seen.take(b'{"total": 7}')
    assert seen.end() is None


def test_the_usage_of_an_answer_that_is_too_large_is_unknown() -> None:
    seen = review(200, usage=len)
    for _ in range(3):
        seen.take(b"x" * (MAX_KEPT_BYTES // 2))
    assert seen.end() is None


def test_a_reader_of_the_usage_that_fails_is_logged_and_costs_nobody_an_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen = review(200, usage=total_tokens)
    seen.take(b'{"other": 1}')
    with caplog.at_level(logging.ERROR, "tidegate.integrations"):
        assert seen.end() is None
    assert "KeyError" in caplog.text


@pytest.mark.parametrize("usage", [12.0, "12", Tokens(output=2.5)], ids=str)  # type: ignore[arg-type]
def test_usage_that_cannot_be_counted_is_unknown(
    usage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    seen = review(200, usage=lambda _: usage)
    seen.take(b"{}")
    with caplog.at_level(logging.ERROR, "tidegate.integrations"):
        assert seen.end() is None
    assert "whole numbers" in caplog.text


def test_a_429_pauses_by_its_header_or_else_by_its_body() -> None:
    by_header = review(429, headers={"retry-after": "3"})
    assert (by_header.pause_ms, by_header.wants_body) == (3_000, False)
    by_body = review(429)
    assert (by_body.pause_ms, by_body.wants_body) == (None, True)
    by_body.take(b'{"retryDelay": "2s"}')
    assert (by_body.end(), by_body.pause_ms) == (None, 2_000)


def test_nothing_is_paused_unless_the_demand_wants_it_and_it_is_a_429() -> None:
    for seen in (
        review(429, headers={"retry-after": "3"}, pauses=False),
        review(503, headers={"retry-after": "3"}),
    ):
        assert (seen.pause_ms, seen.wants_body) == (None, False)


def test_a_demand_may_depend_on_the_request() -> None:
    one = Demand(("kind:a",))
    assert demand_of(one, "any") is one
    assert demand_of(lambda request: one if request else None, "some") is one
    assert demand_of(lambda request: one if request else None, "") is None


def test_limits_that_are_one_string_are_a_mistake() -> None:
    with pytest.raises(TypeError, match="kind:a"):
        demand_of(Demand("kind:a"), "any")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["kind:a", ("kind:a",), None, lambda _: "kind:a", lambda _: 5])
def test_what_is_no_demand_is_explained(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"a demand is a Demand, such as Demand\(\('openai',\)\)"):
        demand_of(wrong, "any")


def test_what_a_429_pauses_may_depend_on_the_demand() -> None:
    one = Demand(("kind:a", "rpm:b"))
    assert penalised_by(None, one) is None
    assert penalised_by("rpm:x", one) == "rpm:x"
    assert penalised_by(lambda demand: demand.limits[-1], one) == "rpm:b"


def test_an_answer_in_a_broken_coding_costs_nobody_the_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Who reads the raw bytes never undoes their coding."""
    seen = review(200, usage=total_tokens, decode=gzip.decompress)
    seen.take(b"no gzip")
    with caplog.at_level(logging.ERROR, "tidegate.integrations"):
        assert seen.end() is None
    assert "its reservation is kept" in caplog.text
