"""The life of a request as a list of steps, told from what is on record. Pure.

    handed in ─ classified ─ waiting ─ calling ─┬─ ended ─ webhook
                               ▲                │
                               └─── parked ◄────┘  to be tried again

Invariant: the steps are in the order in which they began; one without an end that is not a moment
still goes on. What the record does not know is left out, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from uuid import UUID

from tidegate.call import ClassifiedBy
from tidegate.store.dossier import AttemptRecord, DeliveryRecord, Dossier
from tidegate.store.records import Failure
from tidegate.store.states import Status

What = Literal[
    "submitted", "classified", "waiting", "calling", "parked", "cancelling", "ended", "webhook"
]


@dataclass(frozen=True, slots=True)
class Step:
    """A moment `at`, or a time from `at` to `until`.

    goes_on: it has not ended. words: the step in a sentence. attempt: which try it belongs to.
    first_byte_ms: of a call, from its beginning to the first byte of the answer. outcome, code: how
    it ended, and the error's name. process: that did it.
    """

    what: What
    words: str
    at: datetime
    until: datetime | None = None
    goes_on: bool = False
    attempt: int | None = None
    first_byte_ms: float | None = None
    outcome: str | None = None
    code: str | None = None
    process: str | None = None
    webhook_id: UUID | None = None


def timeline(dossier: Dossier, now: datetime) -> tuple[Step, ...]:
    """All steps so far."""
    record = dossier.record
    steps = [_submitted(dossier)]
    if record.classification.kind is not None:
        steps.append(_classified(dossier))
    steps += _tries(dossier, now) if dossier.attempts else _of_row(dossier)
    asked_at = dossier.of("cancel_asked_at")
    if asked_at is not None:
        steps.append(Step("cancelling", "asked to be cancelled", asked_at))
    if record.status.is_end and record.finished_at is not None:
        steps.append(_ended(dossier, record.finished_at))
    steps += [_delivery(one) for one in dossier.webhooks]
    return tuple(sorted(steps, key=lambda step: step.at))


def _submitted(dossier: Dossier) -> Step:
    record = dossier.record
    came = {
        "job": "handed in as a job",
        "stream": "asked for as a stream",
        "relay": f"called {dossier.of('endpoint')}",
        "batch": "handed in as a line of a batch",
    }[record.source]
    return Step("submitted", f"{came} by the tenant {record.tenant_id}", record.created_at)


_DECIDERS = {
    ClassifiedBy.CALLER: "its caller",
    ClassifiedBy.RULES: "the rules",
    ClassifiedBy.LLM: "the LLM",
    ClassifiedBy.KEYWORDS: "the keywords",
    ClassifiedBy.BODY: "what was called",
}


def _classified(dossier: Dossier) -> Step:
    """When is not on record, but it was before the first admission."""
    found = dossier.record.classification
    reason = f": {found.reason}" if found.reason else ""
    return Step(
        "classified",
        f"found to be {found.kind} by {_DECIDERS[found.by]}{reason}",
        dossier.record.created_at,
    )


def _tries(dossier: Dossier, now: datetime) -> list[Step]:
    """Waiting, calling and being parked, attempt by attempt, and what it does now."""
    steps: list[Step] = []
    record = dossier.record
    free_at: datetime | None = record.created_at
    failure: Failure | None = None
    for attempt in dossier.attempts:
        admitted_at = attempt.admitted_at
        if admitted_at is not None:
            waited = timedelta(milliseconds=attempt.queue_ms or 0)
            waiting_at = max(admitted_at - waited, record.created_at)
            steps += _parked(free_at, waiting_at, failure, attempt.number)
            steps.append(_waited(waiting_at, admitted_at, attempt.number))
        is_last = attempt is dossier.attempts[-1]
        steps.append(_called(attempt, goes_on=is_last and record.status is Status.RUNNING))
        free_at, failure = attempt.finished_at, attempt.failure
    if record.status is Status.QUEUED:
        steps += _now_queued(record.not_before, free_at, failure, now)
    return steps


def _of_row(dossier: Dossier) -> list[Step]:
    """The same where no attempt is on record: of what was never admitted, and of native calls,
    whose tries are only counted."""
    record = dossier.record
    if record.admitted_at is None:
        goes_on = not record.status.is_end
        words = "waits for admission" if goes_on else "waited, and was never admitted"
        until = None if goes_on else record.finished_at
        return [Step("waiting", words, record.created_at, until, goes_on=goes_on)]
    tries = f" in {record.attempts} tries" if record.attempts > 1 else ""
    waited = timedelta(milliseconds=record.queue_ms or 0)
    waiting_at = max(record.admitted_at - waited, record.created_at)
    return [
        _waited(waiting_at, record.admitted_at, None),
        Step(
            "calling",
            f"called {record.model or 'the provider'}{tries}",
            record.admitted_at,
            record.finished_at,
            goes_on=not record.status.is_end,
            first_byte_ms=record.first_byte_ms,
            outcome=record.status.value if record.status.is_end else None,
            code=None if record.failure is None else record.failure.code,
            process=dossier.process,
        ),
    ]


def _parked(
    free_at: datetime | None, until: datetime, failure: Failure | None, number: int
) -> list[Step]:
    if number == 1 or free_at is None or until <= free_at:
        return []
    after = f" after {failure.code}" if failure is not None else ""
    return [Step("parked", f"left alone before the next try{after}", free_at, until)]


def _waited(at: datetime, until: datetime, number: int | None) -> Step:
    return Step("waiting", "waited for admission", at, until, attempt=number)


def _called(attempt: AttemptRecord, *, goes_on: bool) -> Step:
    is_lost = attempt.outcome == "running" and not goes_on
    words = f"called {attempt.model}"
    if goes_on:
        words = f"calls {attempt.model}"
    elif is_lost:
        words += "; its worker was lost over it, and whether it was answered is not known"
    return Step(
        "calling",
        words,
        attempt.admitted_at or attempt.began_at,
        attempt.finished_at,
        goes_on=goes_on,
        attempt=attempt.number,
        first_byte_ms=attempt.first_byte_ms,
        outcome=None if goes_on else "lost" if is_lost else attempt.outcome,
        code=None if attempt.failure is None else attempt.failure.code,
        process=attempt.process,
    )


def _now_queued(
    not_before: datetime | None, free_at: datetime | None, failure: Failure | None, now: datetime
) -> list[Step]:
    """It is in the queue again: left alone until its time, then waiting."""
    after = f" after {failure.code}" if failure is not None else ""
    if not_before is not None and free_at is not None:
        words = f"left alone before the next try{after}"
        parked = Step("parked", words, free_at, not_before, goes_on=not_before > now)
        if parked.goes_on:
            return [parked]
        return [parked, Step("waiting", "waits for admission", not_before, goes_on=True)]
    return [Step("waiting", "waits for admission", free_at or now, goes_on=True)]


def _ended(dossier: Dossier, at: datetime) -> Step:
    record = dossier.record
    code = None if record.failure is None else record.failure.code
    words = record.status.value
    if record.status is Status.SUCCEEDED and record.finish_reason:
        words += f" ({record.finish_reason})"
    elif code and code != record.status.value:
        words += f": {code}"
    return Step("ended", words, at, outcome=record.status.value, code=code)


def _delivery(one: DeliveryRecord) -> Step:
    tries = "1 try" if one.tries == 1 else f"{one.tries} tries"
    said = f", answered {one.answer_status}" if one.answer_status is not None else ""
    if one.state == "delivered":
        words = f"webhook delivered in {tries}{said}"
    elif one.state == "given_up":
        words = f"webhook given up after {tries}{said}"
    else:
        words = f"webhook on its way, {tries} so far{said}"
    if one.problem is not None and one.state != "delivered":
        words += f": {one.problem}"
    return Step(
        "webhook",
        words,
        one.created_at,
        one.ended_at,
        goes_on=one.state == "pending",
        outcome=one.state,
        webhook_id=one.webhook_id,
    )
