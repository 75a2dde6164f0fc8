"""The life of a request as steps: in order, without gaps, and nothing that is not on record."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from tidegate import errors
from tidegate.call import Classification, ClassifiedBy, Kind, Status, Usage
from tidegate.http.admin.requests import StepView, timeline
from tidegate.http.problems import advice
from tidegate.record import Failure
from tidegate.store.records import RequestRecord
from tidegate.store.requests import AttemptRecord, DeliveryRecord, RequestDetail

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
ID = UUID(int=1)
THROTTLED = Failure("upstream_throttled", "slow down", retryable=True)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def attempt(number: int, admitted: float, finished: float | None, **more: Any) -> AttemptRecord:
    values: dict[str, Any] = {
        "number": number,
        "outcome": "succeeded" if finished is not None else "running",
        "process": "worker-1",
        "model": "gemini-test",
        "upstream": None,
        "began_at": at(admitted),
        "admitted_at": at(admitted),
        "finished_at": None if finished is None else at(finished),
        "queue_ms": 1_000.0,
        "upstream_ms": None,
        "first_byte_ms": None,
        "usage": Usage(),
        "finish_reason": None,
        "failure": None,
        "response_id": None,
    }
    return AttemptRecord(**{**values, **more})


def detail(
    status: Status,
    attempts: tuple[AttemptRecord, ...] = (),
    webhooks: tuple[DeliveryRecord, ...] = (),
    request: dict[str, Any] | None = None,
    **more: Any,
) -> RequestDetail:
    values: dict[str, Any] = {
        "request_id": ID,
        "tenant_id": "acme",
        "source": "job",
        "status": status,
        "classification": Classification(Kind.TEXT_ONLY, ClassifiedBy.RULES, "plain words"),
        "model": "gemini-test",
        "priority": 0,
        "attempts": len(attempts),
        "created_at": START,
        "admitted_at": None,
        "finished_at": None,
        "not_before": None,
        "deadline_at": None,
        "queue_ms": None,
        "upstream_ms": None,
        "first_byte_ms": None,
        "text": None,
        "usage": Usage(),
        "finish_reason": None,
        "failure": None,
        "place": None,
        "version": 1,
    }
    record = RequestRecord(**{**values, **more})
    return RequestDetail(record, "gemini", "worker-1", attempts, webhooks, (), request or {}, {})


def told(steps: tuple[StepView, ...]) -> list[tuple[str, float, float | None]]:
    """What, when, and until when, in seconds since the start."""

    def seconds(time: datetime | None) -> float | None:
        return None if time is None else (time - START).total_seconds()

    return [(step.what, seconds(step.at) or 0.0, seconds(step.until)) for step in steps]


def test_one_that_was_retried_is_told_whole() -> None:
    steps = timeline(
        detail(
            Status.SUCCEEDED,
            (
                attempt(1, 1, 2, outcome="failed", failure=THROTTLED),
                attempt(2, 8, 9, first_byte_ms=300.0),
            ),
            finished_at=at(9),
            finish_reason="STOP",
        ),
        at(60),
    )
    assert told(steps) == [
        ("submitted", 0, None),
        ("classified", 0, None),
        ("waiting", 0, 1),
        ("calling", 1, 2),
        ("parked", 2, 7),
        ("waiting", 7, 8),
        ("calling", 8, 9),
        ("ended", 9, None),
    ]
    assert steps[1].words == "classified as text_only by the rules: plain words"
    assert (steps[3].outcome, steps[3].code) == ("failed", "upstream_throttled")
    assert steps[4].words == "waiting for retry after upstream_throttled"
    assert (steps[6].attempt, steps[6].first_byte_ms) == (2, 300.0)
    assert steps[7].words == "succeeded (STOP)"
    assert not any(step.goes_on for step in steps)


def test_what_goes_on_has_no_end_and_says_so() -> None:
    queued = timeline(detail(Status.QUEUED), at(5))
    assert (told(queued)[-1], queued[-1].goes_on) == (("waiting", 0, None), True)
    running = timeline(detail(Status.RUNNING, (attempt(1, 1, None),)), at(5))
    assert (told(running)[-1], running[-1].goes_on) == (("calling", 1, None), True)
    assert running[-1].words == "calls gemini-test"
    called = timeline(detail(Status.FAILED, (attempt(1, 1, 2, upstream="eu"),)), at(5))[-1]
    assert called.words == "called gemini-test at eu"


@pytest.mark.parametrize(("now", "last"), [(3, ("parked", 2, 7)), (9, ("waiting", 7, None))])
def test_one_that_is_to_be_tried_again_is_left_alone_until_its_time(
    now: float, last: tuple[str, float, float | None]
) -> None:
    tried = attempt(1, 1, 2, outcome="failed", failure=THROTTLED)
    steps = timeline(detail(Status.QUEUED, (tried,), not_before=at(7), failure=THROTTLED), at(now))
    assert told(steps)[-1] == last
    assert steps[-1].goes_on


def test_an_attempt_whose_worker_was_lost_is_not_said_to_run() -> None:
    steps = timeline(
        detail(
            Status.DEAD,
            (attempt(1, 1, None),),
            finished_at=at(9),
            failure=Failure("worker_died", "gone"),
        ),
        at(10),
    )
    lost = steps[3]
    assert (lost.what, lost.outcome, lost.until, lost.goes_on) == ("calling", "lost", None, False)
    assert "unknown" in lost.words
    assert steps[-1].words == "dead: worker_died"


def test_one_that_was_never_admitted_only_waited() -> None:
    steps = timeline(
        detail(
            Status.CANCELLED,
            request={"cancel_asked_at": at(1)},
            finished_at=at(2),
            failure=Failure("cancelled", "its owner cancelled it"),
        ),
        at(3),
    )
    assert told(steps)[2:] == [("waiting", 0, 2), ("cancelling", 1, None), ("ended", 2, None)]


def test_a_native_call_has_its_tries_counted() -> None:
    steps = timeline(
        detail(
            Status.SUCCEEDED,
            request={"endpoint": "/v1/chat/completions", "upstream": "eu"},
            source="relay",
            admitted_at=at(1),
            finished_at=at(2),
            queue_ms=1_000.0,
            attempts=(),
        ),
        at(3),
    )
    assert [step.what for step in steps] == [
        "submitted",
        "classified",
        "waiting",
        "calling",
        "ended",
    ]
    assert steps[0].words == "called /v1/chat/completions by the tenant acme"
    assert steps[3].words == "called gemini-test at eu"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("delivered", "webhook delivered after 2 attempts, answered 204"),
        ("given_up", "webhook given up after 2 attempts, answered 204: refused"),
        ("pending", "webhook pending after 2 attempts, answered 204: refused"),
    ],
)
def test_webhooks_are_part_of_it(state: str, words: str) -> None:
    one = DeliveryRecord(
        *(ID, "request.succeeded", "https://example.com", state, 2, at(9), 204),
        *(None if state == "delivered" else "refused", at(3), None),
    )
    steps = timeline(detail(Status.SUCCEEDED, webhooks=(one,), finished_at=at(2)), at(10))
    assert (steps[-1].words, steps[-1].webhook_id) == (words, str(ID))
    assert steps[-1].goes_on == (state == "pending")


def test_there_is_advice_for_every_error_that_can_be_on_record() -> None:
    def codes(kind: type[errors.TidegateError]) -> set[str]:
        return {kind.code}.union(*(codes(one) for one in kind.__subclasses__()))

    of_our_own = {"client_left", "client_stalled", "worker_died", "worker_lost"}
    for code in codes(errors.TidegateError) | of_our_own:
        assert (advice(code) or "").endswith("."), code
    assert advice("unheard_of") is None
