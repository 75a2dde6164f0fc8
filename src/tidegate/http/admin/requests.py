"""Routes `/admin/requests`, `/admin/dead`, `/admin/webhooks`: requests of all tenants.

The life of a request is a list of steps from the record:

    submitted ─ classified ─ waiting ─ calling ─┬─ ended ─ webhook
                                ▲               │
                                └──── parked ◄──┘ until the retry

Invariants: every route requires an admin; bodies and files are sent as downloads, whatever their
declared type; every action is logged with its author and reason; steps are in the order of their
beginnings, and unknown ones are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal
from uuid import UUID

import orjson
from fastapi import Query, Request
from fastapi import Query as FromQuery
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from tidegate.call import ClassifiedBy, Kind, OperatorRole, Status
from tidegate.dialects.spec import Endpoint
from tidegate.errors import InvalidRequest, LimiterUnavailable, NotFound
from tidegate.http.admin.limits import Done, Signed, described, read_json, why_of
from tidegate.http.guards import admin_router, operator_of, reads_bodies
from tidegate.http.own_requests import BODY_RESPONSES, body_response, ended_by, in_utc
from tidegate.http.problems import advice, problem_responses
from tidegate.http.services import Services, services_of
from tidegate.http.submission import with_body_as_file
from tidegate.http.views import (
    Accepted,
    ErrorView,
    StatusView,
    UsageView,
    accepted,
    error_view,
    file_response,
    prefix_of,
    status_values,
    usage_view,
    view_of,
)
from tidegate.policy.inspection import Reason
from tidegate.record import Failure, dumped
from tidegate.spine.detached import endpoint_named, plain_path, wrapped_facts
from tidegate.spine.models import targets_for, targets_for_prompt
from tidegate.store.jobs import (
    MOST_REQUEUED,
    DeadJob,
    GivenUpWebhook,
    Requeue,
    RequeueReport,
    copy_of,
    replay_of,
)
from tidegate.store.records import details_of
from tidegate.store.requests import (
    END,
    AttemptRecord,
    Body,
    DeliveryRecord,
    FoundRequest,
    RequestDetail,
    Role,
    SearchFilter,
)
from tidegate.telemetry.logging import Log, get_logger

What = Literal[
    "submitted", "classified", "waiting", "calling", "parked", "cancelling", "ended", "webhook"
]


@dataclass(frozen=True, slots=True)
class StepView:
    """A step of a request: at one time, or from `at` to `until`."""

    what: What
    words: Annotated[str, Field(description="The step in a sentence")]
    at: datetime
    until: datetime | None = None
    goes_on: Annotated[bool, Field(description="Whether the step is still in progress")] = False
    attempt: Annotated[int | None, Field(description="Number of its attempt, from 1")] = None
    first_byte_ms: Annotated[
        float | None,
        Field(description="For a call: time to the first byte of the answer, if known"),
    ] = None
    outcome: str | None = None
    code: Annotated[str | None, Field(description="Code of the error that ended it")] = None
    process: Annotated[str | None, Field(description="The process that performed it")] = None
    webhook_id: str | None = None


def timeline(detail: RequestDetail, now: datetime) -> tuple[StepView, ...]:
    """Return all steps so far."""
    record = detail.record
    steps = [_submitted(detail)]
    if record.classification.kind is not None:
        steps.append(_classified(detail))
    steps += _tries(detail, now) if detail.attempts else _of_row(detail)
    if (requested_at := detail.of("cancel_asked_at")) is not None:
        steps.append(StepView("cancelling", "cancellation requested", requested_at))
    if record.status.is_end and record.finished_at is not None:
        steps.append(_ended(detail, record.finished_at))
    steps += [_delivery_step(one) for one in detail.webhooks]
    return tuple(sorted(steps, key=lambda step: step.at))


def _submitted(detail: RequestDetail) -> StepView:
    record = detail.record
    origin = {
        "job": "submitted as a job",
        "stream": "submitted as a stream",
        "relay": f"called {detail.of('endpoint')}",
        "batch": "submitted as a line of a batch",
    }[record.source]
    return StepView("submitted", f"{origin} by the tenant {record.tenant_id}", record.created_at)


_DECIDERS = {
    ClassifiedBy.CALLER: "the caller",
    ClassifiedBy.RULES: "the rules",
    ClassifiedBy.LLM: "the LLM",
    ClassifiedBy.KEYWORDS: "the keywords",
    ClassifiedBy.BODY: "the called path",
}


def _classified(detail: RequestDetail) -> StepView:
    """Return the step of the classification, whose time is not recorded."""
    found = detail.record.classification
    reason = f": {found.reason}" if found.reason else ""
    return StepView(
        "classified",
        f"classified as {found.kind} by {_DECIDERS[found.by]}{reason}",
        detail.record.created_at,
    )


def _tries(detail: RequestDetail, now: datetime) -> list[StepView]:
    """Return the waits, calls and pauses before retries of each attempt, and the current one."""
    steps: list[StepView] = []
    record = detail.record
    free_at: datetime | None = record.created_at
    failure: Failure | None = None
    for attempt in detail.attempts:
        admitted_at = attempt.admitted_at
        if admitted_at is not None:
            waited = timedelta(milliseconds=attempt.queue_ms or 0)
            waiting_at = max(admitted_at - waited, record.created_at)
            steps += _parked(free_at, waiting_at, failure, attempt.number)
            steps.append(_waited(waiting_at, admitted_at, attempt.number))
        is_last = attempt is detail.attempts[-1]
        steps.append(_called(attempt, goes_on=is_last and record.status is Status.RUNNING))
        free_at, failure = attempt.finished_at, attempt.failure
    if record.status is Status.QUEUED:
        steps += _now_queued(record.not_before, free_at, failure, now)
    return steps


def _of_row(detail: RequestDetail) -> list[StepView]:
    """Return these steps of a call that was never admitted, or whose attempts are only counted."""
    record = detail.record
    if record.admitted_at is None:
        in_progress = not record.status.is_end
        words = "waits for admission" if in_progress else "waited, and was never admitted"
        until = None if in_progress else record.finished_at
        return [StepView("waiting", words, record.created_at, until, goes_on=in_progress)]
    at = f" at {upstream}" if (upstream := detail.of("upstream")) else ""
    at += f" in {record.attempts} attempts" if record.attempts > 1 else ""
    waited_from = record.admitted_at - timedelta(milliseconds=record.queue_ms or 0)
    return [
        _waited(max(waited_from, record.created_at), record.admitted_at, None),
        StepView(
            "calling",
            f"called {record.model or 'the provider'}{at}",
            record.admitted_at,
            record.finished_at,
            goes_on=not record.status.is_end,
            first_byte_ms=record.first_byte_ms,
            outcome=record.status.value if record.status.is_end else None,
            code=None if record.failure is None else record.failure.code,
            process=detail.process,
        ),
    ]


def _parked(
    free_at: datetime | None, until: datetime, failure: Failure | None, number: int
) -> list[StepView]:
    if number == 1 or free_at is None or until <= free_at:
        return []
    after = f" after {failure.code}" if failure is not None else ""
    return [StepView("parked", f"waiting for retry{after}", free_at, until)]


def _waited(at: datetime, until: datetime, number: int | None) -> StepView:
    return StepView("waiting", "waited for admission", at, until, attempt=number)


def _called(attempt: AttemptRecord, *, goes_on: bool) -> StepView:
    is_lost = attempt.outcome == "running" and not goes_on
    words = f"{'calls' if goes_on else 'called'} {attempt.model}"
    words += f" at {attempt.upstream}" if attempt.upstream else ""
    if is_lost:
        words += "; its worker was lost, and it is unknown whether the provider answered"
    return StepView(
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
) -> list[StepView]:
    """Return the steps of a request in the queue: parked until its time, then waiting."""
    if not_before is not None and free_at is not None:
        words = "waiting for retry" + ("" if failure is None else f" after {failure.code}")
        parked = StepView("parked", words, free_at, not_before, goes_on=not_before > now)
        if parked.goes_on:
            return [parked]
        return [parked, StepView("waiting", "waits for admission", not_before, goes_on=True)]
    return [StepView("waiting", "waits for admission", free_at or now, goes_on=True)]


def _ended(detail: RequestDetail, at: datetime) -> StepView:
    record = detail.record
    code = None if record.failure is None else record.failure.code
    words = outcome = record.status.value
    if record.status is Status.SUCCEEDED and record.finish_reason:
        words += f" ({record.finish_reason})"
    elif code and code != outcome:
        words += f": {code}"
    return StepView("ended", words, at, outcome=outcome, code=code)


def _delivery_step(one: DeliveryRecord) -> StepView:
    tries = "1 attempt" if one.tries == 1 else f"{one.tries} attempts"
    answer = f", answered {one.answer_status}" if one.answer_status is not None else ""
    if one.state == "delivered":
        words = f"webhook delivered after {tries}{answer}"
    elif one.state == "given_up":
        words = f"webhook given up after {tries}{answer}"
    else:
        words = f"webhook pending after {tries}{answer}"
    if one.problem is not None and one.state != "delivered":
        words += f": {one.problem}"
    return StepView(
        "webhook",
        words,
        one.created_at,
        one.ended_at,
        goes_on=one.state == "pending",
        outcome=one.state,
        webhook_id=str(one.webhook_id),
    )


MOST_CHARS = 200_000
Source = Literal["job", "stream", "relay", "batch"]
Action = Literal["cancel", "retry", "replay", "requeue", "discard"]


class AdminItem(BaseModel):
    """A request in short, with its tenant."""

    request_id: str
    tenant: str
    pool: str = Field(description="Empty until an upstream was chosen")
    source: Source
    status: Status
    type: Kind | None = None
    model: str | None = None
    endpoint: str | None = Field(default=None, description="The native path of the call")
    subject: str | None = None
    key: str | None = Field(default=None, description="The prefix of the API key")
    prompt: str | None = Field(default=None, description="Its beginning, which `text` searches")
    conversation: str | None = Field(
        default=None,
        description="See `/admin/conversations`; without a name, of the call's beginning",
    )
    upstream: str | None = Field(default=None, description="The upstream of the last call")
    tier: str | None = Field(default=None, description="A job's last tier, otherwise the one used")
    priority: int
    attempts: int
    submitted_at: datetime
    admitted_at: datetime | None = None
    finished_at: datetime | None = None
    queue_ms: float | None = None
    upstream_ms: float | None = None
    total_tokens: int | None = None
    cost_micros: int | None = Field(default=None, description="Cost, as for a single request")
    error_code: str | None = Field(default=None, description="Of its end or of its last attempt")


class AdminPage(BaseModel):
    """Some of the requests, newest first."""

    items: list[AdminItem]
    next_cursor: str | None = Field(
        default=None, description="Pass it as `cursor` for the next page; absent on the last page"
    )


class AttemptView(BaseModel):
    """One attempt at an upstream."""

    number: int
    outcome: str = Field(
        description="running, failed, preempted (by a call of a higher band), or the final status "
        "of the request; stays running if its worker died"
    )
    process: str
    model: str
    upstream: str | None = None
    admitted_at: datetime | None = None
    finished_at: datetime | None = None
    queue_ms: float | None = None
    upstream_ms: float | None = None
    first_byte_ms: float | None = None
    usage: UsageView | None = None
    finish_reason: str | None = None
    response_id: str | None = Field(default=None, description="The provider's id of the answer")
    error: ErrorView | None = None


class DeliveryView(BaseModel):
    """A webhook that reports the request's end."""

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
    """A recorded body, at `/admin/requests/{request_id}/<role>`."""

    role: Literal["request", "response"]
    size_bytes: int
    content_type: str
    omitted_bytes: int = Field(description="Bytes in the middle of a long body that are not kept")


class AdminStatus(StatusView):
    """The status as shown to the owner, with the tenant."""

    model_config = ConfigDict(json_schema_extra=None)

    source: Source  # type: ignore[assignment]
    tenant: str
    pool: str = Field(description="The pool of the call; for a job the pool of its queue")
    upstream: str | None = Field(default=None, description="The upstream of the last call")
    endpoint: str | None = None
    streamed: bool | None = None
    http_status: int | None = Field(default=None, description="Status of a native call's answer")
    subject: str | None = None
    key: str | None = Field(default=None, description="The prefix of the API key")
    process: str | None = Field(default=None, description="Process that handles it, or did last")
    conversation: str | None = None
    trace_id: str | None = Field(default=None, description="Id of its trace")
    lapses: int = Field(default=0, description="How often a worker died while running it")
    repeats: str | None = Field(default=None, description="The request that it replays")
    bound_upstream: str | None = Field(default=None, description="Only this upstream is used")
    asked_model: str | None = Field(default=None, description="The model that the client requested")
    model_version: str | None = Field(
        default=None, description="The model that answered, as the provider names it"
    )
    prompt: str | None = None
    prompt_chars: int | None = Field(
        default=None, description=f"Of the whole prompt; at most {MOST_CHARS} are shown"
    )
    image_uri: str | None = None
    cost_micros: int | None = Field(
        default=None, description="Cost in millionths of a dollar, once it has ended"
    )
    usage_state: str | None = Field(
        default=None, description="told, partial, estimated, unknown or none"
    )


class RequestView(BaseModel):
    """The whole record of a request, and the reason of its current wait."""

    request: AdminStatus
    timeline: list[StepView]
    attempts: list[AttemptView]
    webhooks: list[DeliveryView]
    bodies: list[BodyView]
    waiting: Reason | None = Field(default=None, description="Only until the request has ended")
    advice: str | None = Field(default=None, description="Advice for its failure")
    actions: list[Action] = Field(
        description="Possible actions; requeue and discard are at `/admin/dead`"
    )
    now: datetime = Field(description="Current time of this process, to compare times with")


def admin_item(found: FoundRequest, *, reads_prompts: bool) -> AdminItem:
    listed, same = found.listed, ("pool", "endpoint", "subject", "conversation", "upstream", "tier")
    return view_of(
        AdminItem,
        listed,
        tenant=found.tenant_id,
        key=found.key_id,
        prompt=found.prompt_head or None if reads_prompts else None,
        cost_micros=found.cost_micros,
        type=listed.kind,
        submitted_at=listed.created_at,
        error_code=listed.failure_code,
        **{name: getattr(found, name) for name in same},
    )


def request_view(
    detail: RequestDetail, waiting: Reason | None, now: datetime, prefix: str
) -> RequestView:
    """Return the view of a request. `prefix`: the path before `/admin`, empty or `/llm`."""
    failure = detail.record.failure
    return RequestView(
        request=_status(detail, prefix),
        timeline=list(timeline(detail, now)),
        attempts=[_attempt(one) for one in detail.attempts],
        webhooks=[_delivery(one) for one in detail.webhooks],
        bodies=[view_of(BodyView, one) for one in detail.bodies],
        waiting=waiting,
        advice=None if failure is None else advice(failure.code),
        actions=actions_of(detail),
        now=now,
    )


def actions_of(detail: RequestDetail) -> list[Action]:
    """Return what an operator may do with a request now. Except for replay, only for jobs: any
    other request has a caller that waits for it, or a batch."""
    status = detail.record.status
    if detail.record.source != "job":
        return ["replay"] if status.is_end else []
    if not status.is_end:
        return ["cancel"]
    found: list[Action] = ["retry", "replay"]
    return ["requeue", "discard", *found] if status is Status.DEAD else found


def _status(detail: RequestDetail, prefix: str) -> AdminStatus:
    record = detail.record
    files = f"{prefix}/admin/requests/{record.request_id}"
    prompt: str | None = detail.request.get("prompt")
    usage = replace(record.usage, details=details_of(detail.of("usage_details")))
    return AdminStatus(
        **status_values(replace(record, usage=usage), files),
        tenant=record.tenant_id,
        pool=detail.pool,
        upstream=detail.of("upstream"),
        endpoint=detail.of("endpoint"),
        streamed=detail.of("streamed"),
        http_status=detail.of("http_status") or None,
        subject=detail.of("subject"),
        key=detail.of("key_id"),
        process=detail.process,
        conversation=detail.of("conversation"),
        trace_id=detail.of("trace_id") or _trace_id(detail.request.get("traceparent")),
        lapses=detail.of("lapses") or 0,
        repeats=str(repeats) if (repeats := detail.request.get("repeats")) else None,
        bound_upstream=detail.request.get("bound_upstream"),
        asked_model=detail.request.get("model"),
        model_version=detail.of("model_version"),
        prompt=None if prompt is None else prompt[:MOST_CHARS],
        prompt_chars=None if prompt is None else _chars(detail, prompt),
        image_uri=detail.request.get("image_uri"),
        cost_micros=detail.of("cost_micros"),
        usage_state=detail.of("usage_state"),
    )


def _chars(detail: RequestDetail, prompt: str) -> int:
    """Return the length of the whole prompt. For a large body of a call, `prompt` is only its
    beginning; the body is the file."""
    inputs = [file for file in detail.record.files if file.role == "input"]
    wraps = detail.record.endpoint is not None
    return inputs[0].size_bytes if wraps and inputs else len(prompt)


def _trace_id(traceparent: str | None) -> str | None:
    """Return the trace id of a W3C trace context."""
    return None if traceparent is None else traceparent.split("-")[1]


def _attempt(one: AttemptRecord) -> AttemptView:
    return view_of(AttemptView, one, usage=usage_view(one.usage), error=error_view(one.failure))


def _delivery(one: DeliveryRecord) -> DeliveryView:
    next_try_at = one.due_at if one.state == "pending" else None
    return view_of(DeliveryView, one, id=str(one.webhook_id), next_try_at=next_try_at)


_PREFIX = re.compile(r"[0-9a-fA-F]{1,32}")
_TEXT = Field(default=None, min_length=1, max_length=200)

log = get_logger()
router = admin_router(400, 503)


class SearchQuery(BaseModel):
    """Filters of a list of requests; without a filter all are listed."""

    model_config = ConfigDict(extra="forbid")

    status: list[Status] = Field(default=[], max_length=10, description="One or several states")
    tenant: str | None = _TEXT
    model: str | None = Field(default=None, min_length=1, max_length=128, description="The model")
    type: Kind | None = None
    source: Source | None = None
    error_code: str | None = Field(default=None, min_length=1, max_length=100)
    subject: str | None = _TEXT
    conversation: str | None = _TEXT
    upstream: str | None = Field(
        default=None, min_length=1, max_length=128, description="Of the last call, or a job's next"
    )
    id: str | None = Field(
        default=None, max_length=36, description="The beginning of an id, with or without dashes"
    )
    text: str | None = Field(
        default=None,
        min_length=2,
        max_length=200,
        description="Beginnings of words in the subject, the key and the first 500 characters of "
        "the last user message, for requests that have ended; or an id. Viewers who "
        "may not read prompts cannot search them",
    )
    since: datetime | None = Field(
        default=None, description="Submitted at or after this time; UTC without a time zone"
    )
    until: datetime | None = Field(default=None, description="Submitted before this time")
    limit: int = Field(default=50, ge=1, le=200)
    cursor: UUID | None = Field(default=None, description="`next_cursor` of the previous page")

    def search_filter(self, *, in_prompts: bool) -> SearchFilter:
        return SearchFilter(
            statuses=frozenset(self.status),
            tenant_id=self.tenant,
            model=self.model,
            kind=self.type,
            source=self.source,
            failure_code=self.error_code,
            subject=self.subject,
            conversation=self.conversation,
            upstream=self.upstream,
            prefix=_prefix_in(self.id or ""),
            text=self.text or "",
            in_prompts=in_prompts,
            since=in_utc("since", self.since),
            until=in_utc("until", self.until),
        )


@router.get(
    "/requests",
    response_model_exclude_none=True,
    summary="Requests of all tenants, newest first",
)
async def found(request: Request, query: Annotated[SearchQuery, FromQuery()]) -> AdminPage:
    """Jobs, streams and native calls that have ended, and batch lines that are claimed or have
    ended. Continue with `cursor` until there is no `next_cursor`: a page scans at most 20,000
    requests, so it may have fewer than `limit`, or none, while there are more."""
    services = services_of(request)
    reads = reads_bodies(request, await operator_of(request))
    criteria = query.search_filter(in_prompts=reads)
    page = await services.store.requests.search(criteria, query.limit, query.cursor or END)
    items = [one for one in page.items if services.may_call(one, query.upstream)]
    return AdminPage(
        items=[admin_item(item, reads_prompts=reads) for item in items],
        next_cursor=None if page.before is None else str(page.before),
    )


@router.get(
    "/requests/{request_id}",
    response_model_exclude_none=True,
    responses=problem_responses(404),
    summary="The whole record of one request, and what it waits for",
)
async def one(request: Request, request_id: UUID) -> RequestView:
    """A timeline with each attempt and webhook. `waiting` shows why the request has not ended; it
    is absent while Valkey is unavailable."""
    services = services_of(request)
    detail = await services.store.requests.detail(request_id)
    waiting = await _waiting(services, detail)
    view = request_view(detail, waiting, datetime.now(UTC), prefix_of(request))
    return view if reads_bodies(request, await operator_of(request)) else _without_text(view)


@router.get(
    "/requests/{request_id}/request",
    response_class=StreamingResponse,
    responses=BODY_RESPONSES,
    summary="Recorded request body",
)
async def asked(request: Request, request_id: UUID) -> Response:
    """Available once the request has ended."""
    return await _body(request, request_id, "request")


@router.get(
    "/requests/{request_id}/response",
    response_class=StreamingResponse,
    responses=BODY_RESPONSES,
    summary="Recorded response body",
)
async def answered(request: Request, request_id: UUID) -> Response:
    """Available once the request has ended."""
    return await _body(request, request_id, "response")


@router.get(
    "/requests/{request_id}/files/{file_id}",
    response_class=StreamingResponse,
    responses=problem_responses(404)
    | {200: {"content": {"image/png": {}}, "description": "The file's bytes"}},
    summary="An image or file of a request",
)
async def file(request: Request, request_id: UUID, file_id: UUID) -> Response:
    """Images can be displayed inline; all other files are sent as a download."""
    services = services_of(request)
    return await file_response(
        await services.store.requests.file_of_any(request_id, file_id), services.blobs
    )


@router.post(
    "/requests/{request_id}/cancel",
    response_model=StatusView,
    response_model_exclude_none=True,
    responses=problem_responses(404, 408, 409, 413, 415)
    | {202: {"model": StatusView, "description": "The worker that runs it has been notified"}},
    openapi_extra=described(Signed),
    summary="Cancel a job of any tenant",
)
async def cancel(request: Request, request_id: UUID) -> Response:
    """Like `DELETE /requests/{request_id}` by its owner."""
    signed = await read_json(request, Signed)
    detail = await services_of(request).store.requests.detail(request_id)
    answer = await ended_by(request, request_id, detail.record.tenant_id)
    _log(Log.REQUEST_CANCELLED, request_id, signed)
    return answer


@router.post(
    "/requests/{request_id}/retry",
    status_code=202,
    responses=problem_responses(404, 408, 409, 413, 415),
    openapi_extra=described(Signed),
    summary="Submit a job that has ended again, as a new job",
)
async def retry(request: Request, request_id: UUID) -> Accepted:
    """The same prompt and files, for the same tenant. Its caps and budgets count the new job but do
    not reject it. The first job is not changed."""
    signed = await read_json(request, Signed)
    services = services_of(request)
    detail, now = await services.store.requests.detail(request_id), services.clock.now()
    job = await copy_of(detail, services.blobs, now)
    after = {"retried_as": str(job.request_id), "reason": signed.reason}
    await services.store.tenants.actions.write("job.retry", str(request_id), after=after)
    await services.store.jobs.submit(job)
    _log(Log.REQUEST_RETRIED, request_id, signed, retried_as=str(job.request_id))
    return accepted(job, prefix_of(request))


class NewReplay(BaseModel):
    """The upstream of a repeated request; the author and the reason are recorded."""

    model_config = ConfigDict(extra="forbid")

    upstream: str = Field(min_length=1, max_length=128, description="The upstream's name")
    by: str = Field(default="admin", min_length=1, max_length=100)
    reason: str = Field(default="", max_length=500)


@router.post(
    "/requests/{request_id}/replay",
    status_code=202,
    responses=problem_responses(404, 408, 409, 413, 415),
    openapi_extra=described(NewReplay),
    summary="Repeat a request that has ended, at a chosen upstream",
)
async def replay(request: Request, request_id: UUID) -> Accepted:
    """A new job of the same tenant that only uses this upstream, for a request of any source.
    Streams become whole answers. Caps and budgets count it as for `retry`; no webhook is sent."""
    signed = await read_json(request, NewReplay)
    services, bound = services_of(request), signed.upstream
    detail = await services.store.requests.detail(request_id)
    record, row, targets = detail.record, detail.request, services.spine.targets
    if bound in targets.drained:
        rest = ", ".join(one for one in targets.upstreams if one not in targets.drained)
        message = f"the upstream {bound!r} is drained: it takes no new calls"
        raise InvalidRequest("upstream", message, allowed=rest or "none")
    path, kind, wrapped = detail.of("endpoint"), record.classification.kind, {}
    if path is None:
        files = [(one.mime_type, one.size_bytes) for one in record.files if one.role == "input"]
        model = row.get("model") or services.config.model_for(kind or "")
        targets_for_prompt(targets, bound, model, kind, files)
    else:
        endpoint, model = endpoint_named(plain_path(path), "request_id"), row.get("model") or ""
        if record.source != "job":
            body = await services.store.requests.body_of_any(request_id, "request")
            wrapped = await _wrapped(endpoint, plain_path(path), body)
            model = wrapped["model"] or ""
        targets_for(targets, bound, endpoint.dialect, endpoint.model or model)
    job = await replay_of(detail, services.blobs, bound, services.clock.now(), **wrapped)
    if record.source != "job":
        job = await with_body_as_file(job, services.blobs)
    after = {"retried_as": str(job.request_id), "upstream": bound, "reason": signed.reason}
    await services.store.tenants.actions.write("job.retry", str(request_id), after=after)
    await services.store.jobs.submit(job)
    _log(Log.REQUEST_RETRIED, request_id, signed, retried_as=str(job.request_id))
    return accepted(job, prefix_of(request))


async def _wrapped(endpoint: Endpoint, path: str, body: Body) -> dict[str, str | None]:
    """Return the recorded body of a native call as that of a job. Raises InvalidRequest."""
    data = b"".join([piece async for piece in body.pieces])
    try:
        found = None if body.omitted_bytes else orjson.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        message, allowed = (
            "its body is not on record in full, or is not JSON",
            "a call with a JSON body",
        )
        raise InvalidRequest("request_id", message, allowed=allowed)
    for name in ("stream", "stream_options"):
        found.pop(name, None)
    model = wrapped_facts(endpoint, found).model
    return {"endpoint": path, "body": dumped(found).decode(), "model": model or None}


def _without_text(view: RequestView) -> RequestView:
    """Return a view without the texts that a viewer may not read."""
    request = view.request.model_copy(
        update={"prompt": None, "text": None, "answer": None, "image_uri": None}
        | {"images": [], "files": []}
    )
    return view.model_copy(update={"request": request, "bodies": []})


async def _waiting(services: Services, detail: RequestDetail) -> Reason | None:
    """Return what a job waits for, as `tidegate why` does."""
    record = detail.record
    if record.status.is_end or record.source != "job":
        return None
    try:
        return await why_of(services, record.request_id)
    except (LimiterUnavailable, NotFound) as missing:
        log.debug(Log.STORE_AWAY, detail=missing.message)
        return None


async def _body(request: Request, request_id: UUID, role: Role) -> Response:
    body = await services_of(request).store.requests.body_of_any(request_id, role)
    return await body_response(body, request_id, role)


def _prefix_in(text: str) -> str:
    digits = text.strip().replace("-", "")
    if digits and _PREFIX.fullmatch(digits) is None:
        raise InvalidRequest("id", "not the beginning of an id", allowed="hexadecimal digits")
    return digits.lower()


def _log(event: Log, request_id: UUID, signed: Signed | NewReplay, **more: str) -> None:
    log.warning(event, request_id=str(request_id), by=signed.by, reason=signed.reason, **more)


Most = Annotated[int, Query(ge=1, le=1_000)]


@router.get("/dead", summary="Jobs that killed their workers three times, of all tenants")
async def dead(request: Request, most: Most = 100) -> list[DeadJob]:
    return await services_of(request).store.stuck.dead(most)


@router.post(
    "/dead/{request_id}/requeue",
    responses=problem_responses(404),
    summary="Queue a dead job again, with all its attempts",
)
async def requeue(request: Request, request_id: UUID) -> Done:
    await services_of(request).store.stuck.requeue(request_id)
    log.warning(Log.JOB_REQUEUED, request_id=str(request_id))
    return Done(done=True)


@router.post(
    "/dead/{request_id}/discard",
    responses=problem_responses(404),
    summary="Cancel a dead job permanently",
)
async def discard(request: Request, request_id: UUID) -> Done:
    await services_of(request).store.stuck.discard(request_id)
    log.warning(Log.JOB_DISCARDED, request_id=str(request_id))
    return Done(done=True)


@router.get("/webhooks", summary="Webhooks of all tenants whose delivery failed")
async def given_up(request: Request, most: Most = 100) -> list[GivenUpWebhook]:
    """`POST /admin/webhooks/{webhook_id}/redeliver` delivers one again."""
    return await services_of(request).store.stuck.given_up(most)


@router.post(
    "/webhooks/{webhook_id}/redeliver",
    responses=problem_responses(404),
    summary="Deliver a webhook again, whatever its state",
)
async def redeliver(request: Request, webhook_id: UUID) -> Done:
    """The webhook's id is in the request's status. It is sent immediately, with all of its
    retries."""
    await services_of(request).store.outbox.redeliver(webhook_id)
    return Done(done=True)


class NewRequeue(Signed):
    """The jobs to queue again. Without `"dry_run": false` they are only counted."""

    since: datetime = Field(description="The earliest end; a time without a zone is in UTC")
    until: datetime | None = Field(default=None, description="The first end that is too late")
    status: list[Literal["failed", "dead"]] = Field(default=["failed"], min_length=1, max_length=2)
    error_code: str | None = Field(
        default=None, max_length=100, description="One of `by_code`; empty: jobs without a code"
    )
    tenant: str | None = _TEXT
    limit: int = Field(default=1_000, ge=1, le=MOST_REQUEUED)
    dry_run: bool = Field(default=True, description="Only count, change nothing")

    def order(self) -> Requeue:
        now = datetime.now(UTC)
        since, until = in_utc("since", self.since), in_utc("until", self.until)
        assert since is not None
        if until is not None and until <= since:
            raise InvalidRequest("until", "until is not after since", allowed="a later time")
        return Requeue(
            since=since,
            until=min(until or now, now),  # jobs that fail meanwhile are not included
            statuses=tuple(Status(status) for status in self.status),
            tenant_id=self.tenant,
            error_code=self.error_code,
            limit=self.limit,
        )


@router.post(
    "/requests/requeue",
    operation_id="requeue_admin_requests_requeue_post",
    responses=problem_responses(408, 413, 415),
    openapi_extra=described(NewRequeue),
    summary="Queue failed jobs again, under their own ids",
)
async def requeue_failed(request: Request) -> RequeueReport:
    """Queues matching jobs, in the order in which they ended, with all their attempts and their
    whole deadline. Their webhooks are sent again when they end. Repeat the request while `has_more`
    is true; jobs that are queued already are not changed."""
    requested = await read_json(request, NewRequeue)
    stuck = services_of(request).store.stuck
    if requested.dry_run:
        return await stuck.preview(requested.order())
    (await operator_of(request)).check(OperatorRole.OPERATOR)
    report = await stuck.requeue_all(requested.order())
    log.warning(
        Log.JOBS_REQUEUED,
        jobs=report.requeued,
        by=requested.by,
        reason=requested.reason,
        filter=requested.model_dump(
            mode="json", exclude={"by", "reason", "dry_run"}, exclude_none=True
        ),
    )
    return report
