"""Errors on their way to a client."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import Any

import orjson
import pytest

from tidegate import errors
from tidegate.dialects.spec import Dialect
from tidegate.http.problems import not_relayed, problem, problem_response, refusal, status_of
from tidegate.record import Failure

EXAMPLES = {
    errors.InvalidRequest: (errors.InvalidRequest("data", "is empty", allowed="a text"), 400),
    errors.PayloadTooLarge: (errors.PayloadTooLarge("file", "too large"), 413),
    errors.FilesFull: (errors.FilesFull("file", "no room", allowed="9 bytes"), 413),
    errors.UnsupportedMedia: (errors.UnsupportedMedia("Content-Type", "no"), 415),
    errors.FetchRefused: (errors.FetchRefused("image_uri", "private"), 422),
    errors.FetchFailed: (errors.FetchFailed("image_uri", "no answer", retry_after_ms=9), 422),
    errors.RequestTimeout: (errors.RequestTimeout("slow"), 408),
    errors.Unauthenticated: (errors.Unauthenticated("no token"), 401),
    errors.Forbidden: (errors.Forbidden("not from there"), 403),
    errors.NotFound: (errors.NotFound("no such request"), 404),
    errors.IdempotencyConflict: (errors.IdempotencyConflict("another request"), 409),
    errors.PolicyChanged: (errors.PolicyChanged("limits.kind:text_only", 7), 409),
    errors.AlreadyEnded: (errors.AlreadyEnded("the request has ended: succeeded"), 409),
    errors.NotEnded: (errors.NotEnded("the request has not ended yet: running"), 409),
    errors.TooManyFollowers: (errors.TooManyFollowers("too many"), 503),
    errors.BudgetExceeded: (
        errors.BudgetExceeded("spent", limit="budget_day_tokens", allowed="9", retry_after_ms=9),
        429,
    ),
    errors.QuotaExceeded: (
        errors.QuotaExceeded("full", limit="most_streams", allowed="2", retry_after_ms=1_000),
        429,
    ),
    errors.DeadlineExceeded: (errors.DeadlineExceeded("late", limit="kind:text_only"), 504),
    errors.DemandImpossible: (errors.DemandImpossible("0", limit="kind:text_only"), 422),
    errors.QueueFull: (errors.QueueFull("full", limit="kind:text_only"), 503),
    errors.LimiterUnavailable: (errors.LimiterUnavailable("away", limit="kind:text_only"), 503),
    errors.UpstreamThrottled: (errors.UpstreamThrottled("429", retry_after_ms=47_200), 503),
    errors.UpstreamTimeout: (errors.UpstreamTimeout("slow", phase="idle"), 504),
    errors.UpstreamGarbled: (errors.UpstreamGarbled("not JSON"), 502),
    errors.UpstreamUnauthorized: (errors.UpstreamUnauthorized("key"), 502),
    errors.EmptyAnswer: (errors.EmptyAnswer("nothing", finish_reason="SAFETY"), 502),
    errors.StoreUnavailable: (errors.StoreUnavailable("away"), 503),
}


def _leaves(kind: type[errors.TidegateError]) -> Iterator[type[errors.TidegateError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _leaves(child)


@pytest.mark.parametrize(("error", "status"), EXAMPLES.values(), ids=lambda v: type(v).__name__)
def test_each_error_has_its_status(error: errors.TidegateError, status: int) -> None:
    body = problem(error)
    assert (status_of(error), body.status, body.code) == (status, status, error.code)


CONFLICT = errors.PolicyConflict("differs", pool="p", limit="openai", in_force="1", asked="2")
CONFIG = errors.ConfigError("PORT", "x", "a number")


@pytest.mark.parametrize(
    "error", [CONFLICT, CONFIG, *(error for error, _ in EXAMPLES.values())], ids=repr
)
def test_an_error_reaches_a_caller_in_another_process_as_it_is(error: errors.TidegateError) -> None:
    """Celery, Ray and pools of processes pickle what a task raises."""
    for found in (pickle.loads(pickle.dumps(error)), copy(error)):
        assert (type(found), found.args, vars(found)) == (type(error), error.args, vars(error))


def test_no_error_that_can_reach_a_client_falls_back_to_500() -> None:
    internal = {errors.ConfigError, errors.PolicyConflict, errors.ClaimLost, errors.AdmissionError}
    internal |= {errors.GatewayRefused, errors.GatewayUnreachable}  # those of a client
    # Of jobs and batch lines alone, which are made again.
    internal |= {errors.CallPreempted, errors.LastTryWaits}
    for kind in set(_leaves(errors.TidegateError)) - internal:
        found = next(each for each in kind.__mro__ if each in _statuses())
        assert found is not errors.TidegateError, kind


def _statuses() -> set[type]:
    from tidegate.http.problems import STATUS

    return set(STATUS)


def test_who_has_not_shown_who_he_is_is_told_how() -> None:
    response = problem_response(errors.Unauthenticated("no token"))
    assert response.headers["www-authenticate"] == "Bearer"
    assert "www-authenticate" not in problem_response(errors.Forbidden("no")).headers


def test_retry_after_is_whole_seconds_rounded_up() -> None:
    response = problem_response(errors.UpstreamThrottled("429", retry_after_ms=47_200))
    assert response.headers["retry-after"] == "48"
    assert orjson.loads(response.body)["retry_after_ms"] == 47_200


def test_a_quota_says_of_what_how_much_and_when_to_come_back() -> None:
    error = errors.QuotaExceeded("full", limit="most_streams", allowed="2", retry_after_ms=1_500)
    response = problem_response(error)
    body = orjson.loads(response.body)
    assert response.headers["retry-after"] == "2"
    assert (body["code"], body["limit"], body["allowed"]) == ("quota_exceeded", "most_streams", "2")


def test_a_problem_names_the_field_and_what_is_allowed() -> None:
    response = problem_response(errors.InvalidRequest("type", "unknown", allowed="text_only"))
    body = orjson.loads(response.body)
    assert response.headers["content-type"] == "application/problem+json"
    assert (body["field"], body["allowed"], body["title"]) == ("type", "text_only", "Bad Request")


def test_no_limit_is_named_where_none_refused() -> None:
    body = orjson.loads(problem_response(errors.LimiterUnavailable("away", limit="")).body)
    assert (body["code"], "limit" in body) == ("limiter_unavailable", False)


PAUSED = errors.BudgetPaused(
    "a person must resume it", limit="session", allowed="5 USD", retry_after_ms=None
)
TOO_SMALL = errors.BudgetExceeded(
    "it needs more than a whole period allows",
    limit="day",
    allowed="5 USD",
    retry_after_ms=None,
    never_fits=True,
)
FAR_MS = 7_200_000
FAR = errors.QuotaExceeded("full", limit="m", allowed="2", retry_after_ms=FAR_MS)
NEAR = errors.QuotaExceeded("full", limit="m", allowed="2", retry_after_ms=2_500)


def _refused(dialect: Dialect, error: errors.TidegateError) -> tuple[int, dict[str, str], Any]:
    status, headers, body = refusal(dialect, error)
    named = {name.decode(): value.decode() for name, value in headers}
    told = orjson.loads(body)
    return status, named, told.get("error", told)  # Bedrock has none about it


@pytest.mark.parametrize(
    ("refused", "dialect", "status"),
    [
        (PAUSED, Dialect.OPENAI, 403),
        (PAUSED, Dialect.GEMINI, 403),
        (PAUSED, Dialect.ANTHROPIC, 429),
        *((TOO_SMALL, dialect, 429) for dialect in Dialect),
    ],
)
def test_a_budget_that_no_time_helps_names_none(
    refused: errors.BudgetExceeded, dialect: Dialect, status: int
) -> None:
    told, headers, error = _refused(dialect, refused)
    assert (told, "retry-after" in headers) == (status, False)
    assert refused.message in error["message"]
    assert b"retryDelay" not in orjson.dumps(error)
    assert (headers.get("x-should-retry") == "false") == (dialect is not Dialect.GEMINI)


@pytest.mark.parametrize("dialect", [Dialect.OPENAI, Dialect.GEMINI, Dialect.ANTHROPIC])
def test_a_time_that_is_far_is_told_and_ends_retries(dialect: Dialect) -> None:
    status, headers, error = _refused(dialect, FAR)
    assert (status, headers["retry-after"]) == (429, "7200")
    told = headers.get("x-should-retry")
    assert told == ("false" if dialect is not Dialect.GEMINI else None)
    if dialect is Dialect.OPENAI:
        assert error["type"] == "usage_limit_reached"
        assert abs(error["resets_at"] - time.time() - FAR_MS / 1000) < 5
    status, headers, error = _refused(dialect, NEAR)
    assert (status, headers["retry-after"], "x-should-retry" in headers) == (429, "3", False)
    assert "resets_at" not in error


@pytest.mark.parametrize("dialect", list(Dialect))
def test_a_pause_until_a_person_resumes_it_states_no_time(dialect: Dialect) -> None:
    paused = errors.LimitPaused("until it is resumed", limit="kind:x", retry_after_ms=None)
    status, headers, error = _refused(dialect, paused)
    assert (status, "retry-after" in headers) == (429, False)
    assert not {b"resets_at", b"retryDelay"} & set(orjson.dumps(error).split(b'"'))
    assert (headers.get("x-should-retry") == "false") == (dialect is not Dialect.GEMINI)
    if dialect is Dialect.OPENAI:
        assert error["type"] == "usage_limit_reached"
    response = problem_response(paused)
    assert (response.status_code, "retry-after" in response.headers) == (503, False)
    assert "retry_after_ms" not in orjson.loads(response.body)


@pytest.mark.parametrize("dialect", [None, *Dialect])
@pytest.mark.parametrize(
    "kind", [errors.StoreUnavailable, partial(errors.LimiterUnavailable, limit="")]
)
def test_why_a_server_is_unavailable_is_told_to_operators_alone(
    kind: Callable[..., errors.TidegateError], dialect: Dialect | None
) -> None:
    """What it, or the network, says names hosts, users and tables."""
    why = 'password authentication failed for user "tidegate" at 10.0.3.17'
    error = kind("the server is away", reason=why)
    for one in (error, copy(error), pickle.loads(pickle.dumps(error))):
        assert str(one) == one.message == f"the server is away: {why}"
        assert Failure.of(one).message == "the server is away"  # as `/status` shows it
        body = problem_response(one).body if dialect is None else refusal(dialect, one)[2]
        assert b"the server is away" in body
        assert b"10.0.3.17" not in body
        assert b"password" not in body


@pytest.mark.parametrize("dialect", [None, *Dialect])
def test_a_lost_permit_is_told_without_words_for_operators(dialect: Dialect | None) -> None:
    lost = errors.LeaseLost("the session that held a permit of tenant:acme is gone")
    body = problem_response(lost).body if dialect is None else refusal(dialect, lost)[2]
    assert b"the gateway lost its right to make this call, and ended it: send it again" in body
    assert b"session" not in body


@pytest.mark.parametrize(
    ("path", "status", "why"),
    [
        ("/v1/live/sessions", 403, "past the limits here"),
        ("/v1/live/sessions/sess_1/accept", 403, "passthrough of an upstream opens it"),
        ("/v1/agents", 403, "run models at the provider"),
        ("/v1/agents/sessions/sess_1/events", 403, "run models at the provider"),
        ("/v1/vaults/vault_1/credentials", 403, "in one account"),
        ("/v1/compliance/review/cases", 404, "administers the provider's account"),
        ("/v1/organization/usage/completions", 404, "administers the provider's account"),
        ("/v1/organizations/api_keys", 404, "administers the provider's account"),
        ("/v1/agents-of-others", 404, "docs/gateway.md"),
        ("/v1/compliance-x", 404, "docs/gateway.md"),
    ],
)
def test_a_known_path_that_is_not_relayed_says_why(path: str, status: int, why: str) -> None:
    error = not_relayed("POST", path, ())
    assert status_of(error) == status
    assert why in error.message
