"""The JSON that `/admin/requests` answers with: a request in short, and all of one."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from tidegate.call import Kind
from tidegate.http.advice import advice
from tidegate.http.timeline import What, timeline
from tidegate.http.views import (
    ErrorView,
    StatusView,
    UsageView,
    error_view,
    status_values,
    usage_view,
)
from tidegate.policy.why import Reason
from tidegate.store.dossier import AttemptRecord, BodyRecord, DeliveryRecord, Dossier
from tidegate.store.rows import details_of
from tidegate.store.search import Found
from tidegate.store.states import Status

MOST_CHARS = 200_000
Source = Literal["job", "stream", "relay", "batch"]
Action = Literal["cancel", "retry", "requeue", "discard"]


class AdminItem(BaseModel):
    """A request in short, and whose it is."""

    request_id: str
    tenant: str
    pool: str = Field(description="Empty while no upstream was chosen for it")
    source: Source
    status: Status
    type: Kind | None = None
    model: str | None = None
    endpoint: str | None = Field(default=None, description="The native path that was called")
    subject: str | None = None
    priority: int
    attempts: int
    submitted_at: datetime
    admitted_at: datetime | None = None
    finished_at: datetime | None = None
    queue_ms: float | None = None
    upstream_ms: float | None = None
    total_tokens: int | None = None
    error_code: str | None = Field(
        default=None, description="Why it failed, or why its last attempt did"
    )


class AdminPage(BaseModel):
    """Some of the requests, newest first."""

    items: list[AdminItem]
    next_cursor: str | None = Field(
        default=None, description="Give it as `cursor` for the next page; not there on the last"
    )


class StepView(BaseModel):
    """A moment of a request's life, or a time from `at` to `until`."""

    what: What
    words: str = Field(description="The step in a sentence")
    at: datetime
    until: datetime | None = None
    goes_on: bool = Field(default=False, description="It has not ended")
    attempt: int | None = Field(default=None, description="Which try it belongs to, from 1")
    first_byte_ms: float | None = Field(
        default=None, description="Of a call: until the first byte of the answer, where known"
    )
    outcome: str | None = None
    code: str | None = Field(default=None, description="Of the error that it ended with")
    process: str | None = Field(default=None, description="The process that did it")
    webhook_id: str | None = None


class AttemptView(BaseModel):
    """One try upstream."""

    number: int
    outcome: str = Field(
        description="running, failed, or what the request became; running for ever where the "
        "worker was lost"
    )
    process: str
    model: str
    admitted_at: datetime | None = None
    finished_at: datetime | None = None
    queue_ms: float | None = None
    upstream_ms: float | None = None
    first_byte_ms: float | None = None
    usage: UsageView | None = None
    finish_reason: str | None = None
    response_id: str | None = Field(default=None, description="As the provider names its answer")
    error: ErrorView | None = None


class DeliveryView(BaseModel):
    """A webhook that tells of the request's end."""

    id: str
    event: str
    url: str
    state: Literal["pending", "delivered", "given_up"]
    tries: int
    next_try_at: datetime | None = None
    answer_status: int | None = None
    problem: str | None = None
    created_at: datetime
    ended_at: datetime | None = None


class BodyView(BaseModel):
    """A body in the record, at `/admin/requests/{request_id}/<role>`."""

    role: Literal["request", "response"]
    size_bytes: int
    content_type: str
    omitted_bytes: int = Field(description="How much of the middle of a long one is not kept")


class AdminStatus(StatusView):
    """What its owner sees of it, and whose it is."""

    model_config = ConfigDict(json_schema_extra=None)

    source: Source  # type: ignore[assignment]
    tenant: str
    pool: str
    endpoint: str | None = None
    streamed: bool | None = None
    http_status: int | None = Field(default=None, description="Of the answer to a native call")
    subject: str | None = None
    key: str | None = Field(default=None, description="The prefix of the API key that was shown")
    process: str | None = Field(default=None, description="That has it, or had it last")
    trace_id: str | None = Field(default=None, description="Of the trace that it is part of")
    lapses: int = Field(default=0, description="How often its workers died over it")
    asked_model: str | None = Field(default=None, description="The model that its caller named")
    model_version: str | None = Field(
        default=None, description="The model that answered, as the provider names it"
    )
    prompt: str | None = None
    prompt_chars: int | None = Field(
        default=None, description=f"Of the whole prompt; at most {MOST_CHARS} of them are shown"
    )
    image_uri: str | None = None
    cost_micros: int | None = Field(
        default=None, description="In millionths of the currency of the prices; once it has ended"
    )
    usage_state: str | None = Field(
        default=None, description="told, partial, estimated, unknown or none"
    )


class RequestView(BaseModel):
    """All that is on record of one request, and what it waits for now."""

    request: AdminStatus
    timeline: list[StepView]
    attempts: list[AttemptView]
    webhooks: list[DeliveryView]
    bodies: list[BodyView]
    waiting: Reason | None = Field(default=None, description="While it has not ended")
    advice: str | None = Field(default=None, description="What can be done about its failure")
    actions: list[Action] = Field(
        description="What can be done with it now; requeue and discard at `/admin/dead`"
    )
    now: datetime = Field(description="The clock of this process, against which its times are")


def admin_item(found: Found) -> AdminItem:
    listed = found.listed
    return AdminItem(
        request_id=str(listed.request_id),
        tenant=found.tenant_id,
        pool=found.pool,
        source=cast(Source, listed.source),
        status=listed.status,
        type=listed.kind,
        model=listed.model,
        endpoint=found.endpoint,
        subject=found.subject,
        priority=listed.priority,
        attempts=listed.attempts,
        submitted_at=listed.created_at,
        admitted_at=listed.admitted_at,
        finished_at=listed.finished_at,
        queue_ms=_rounded(listed.queue_ms),
        upstream_ms=_rounded(listed.upstream_ms),
        total_tokens=listed.total_tokens,
        error_code=listed.failure_code,
    )


def request_view(
    dossier: Dossier, waiting: Reason | None, now: datetime, prefix: str
) -> RequestView:
    """`prefix` is the path before `/admin` as the client called it: empty or `/llm`."""
    failure = dossier.record.failure
    steps = [
        StepView.model_validate(
            {
                **{name: getattr(step, name) for name in StepView.model_fields},
                "webhook_id": None if step.webhook_id is None else str(step.webhook_id),
            }
        )
        for step in timeline(dossier, now)
    ]
    return RequestView(
        request=_status(dossier, prefix),
        timeline=steps,
        attempts=[_attempt(one) for one in dossier.attempts],
        webhooks=[_delivery(one) for one in dossier.webhooks],
        bodies=[_body(one) for one in dossier.bodies],
        waiting=waiting,
        advice=None if failure is None else advice(failure.code),
        actions=actions_of(dossier),
        now=now,
    )


def actions_of(dossier: Dossier) -> list[Action]:
    """What an operator may do with it now: of jobs alone, since what else there is has a caller
    who waits for it, or a batch."""
    status = dossier.record.status
    if dossier.record.source != "job":
        return []
    if not status.is_end:
        return ["cancel"]
    return ["requeue", "discard", "retry"] if status is Status.DEAD else ["retry"]


def _status(dossier: Dossier, prefix: str) -> AdminStatus:
    record = dossier.record
    files = f"{prefix}/admin/requests/{record.request_id}"
    prompt: str | None = dossier.request.get("prompt")
    told = replace(record.usage, details=details_of(dossier.of("usage_details")))
    return AdminStatus(
        **status_values(replace(record, usage=told), files),
        tenant=record.tenant_id,
        pool=dossier.pool,
        endpoint=dossier.of("endpoint"),
        streamed=dossier.of("streamed"),
        http_status=dossier.of("http_status") or None,
        subject=dossier.of("subject"),
        key=dossier.of("key_id"),
        process=dossier.process,
        trace_id=_trace_id(dossier.request.get("traceparent")),
        lapses=dossier.of("lapses") or 0,
        asked_model=dossier.request.get("model"),
        model_version=dossier.of("model_version"),
        prompt=None if prompt is None else prompt[:MOST_CHARS],
        prompt_chars=None if prompt is None else _chars(dossier, prompt),
        image_uri=dossier.request.get("image_uri"),
        cost_micros=dossier.of("cost_micros"),
        usage_state=dossier.of("usage_state"),
    )


def _chars(dossier: Dossier, prompt: str) -> int:
    """Of the whole prompt. Of a large body of a call it is the head; the body is the file."""
    inputs = [file for file in dossier.record.files if file.role == "input"]
    wraps = dossier.record.endpoint is not None
    return inputs[0].size_bytes if wraps and inputs else len(prompt)


def _trace_id(traceparent: str | None) -> str | None:
    """The second part of a W3C trace context."""
    return None if traceparent is None else traceparent.split("-")[1]


def _attempt(one: AttemptRecord) -> AttemptView:
    return AttemptView(
        number=one.number,
        outcome=one.outcome,
        process=one.process,
        model=one.model,
        admitted_at=one.admitted_at,
        finished_at=one.finished_at,
        queue_ms=_rounded(one.queue_ms),
        upstream_ms=_rounded(one.upstream_ms),
        first_byte_ms=_rounded(one.first_byte_ms),
        usage=usage_view(one.usage),
        finish_reason=one.finish_reason,
        response_id=one.response_id,
        error=error_view(one.failure),
    )


def _delivery(one: DeliveryRecord) -> DeliveryView:
    return DeliveryView(
        id=str(one.webhook_id),
        event=one.event,
        url=one.url,
        state=cast(Literal["pending", "delivered", "given_up"], one.state),
        tries=one.tries,
        next_try_at=one.due_at if one.state == "pending" else None,
        answer_status=one.answer_status,
        problem=one.problem,
        created_at=one.created_at,
        ended_at=one.ended_at,
    )


def _body(one: BodyRecord) -> BodyView:
    role = cast(Literal["request", "response"], one.role)
    return BodyView(
        role=role,
        size_bytes=one.size_bytes,
        content_type=one.content_type,
        omitted_bytes=one.omitted_bytes,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
