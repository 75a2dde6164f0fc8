"""Routes `/requests` and `/usage`: own requests; for operators usage and latency of all.

Invariants: a caller sees and cancels only its own requests; bodies are sent as downloads, so that
no browser renders one as a page; amounts are whole micro-dollars.
"""

from __future__ import annotations

import struct
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi import Query as FromQuery
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from tidegate.call import Kind, Status
from tidegate.errors import AlreadyEnded, InvalidRequest, NotFound
from tidegate.http.guards import Reader, RecordReader, admin_router, admit_admin, caller_of
from tidegate.http.jobs import charged_view, wait_until
from tidegate.http.problems import REQUEST_ID_HEADER, problem_responses
from tidegate.http.services import Services, services_of
from tidegate.http.views import (
    RequestPage,
    StatusView,
    item_view,
    prefix_of,
    streamed,
    view_of,
)
from tidegate.limiter import Snapshot
from tidegate.metrics.process import Notes
from tidegate.record import OF_BUDGETS, ActiveCall
from tidegate.store.requests import START, Body, Filter, ListCursor, Role
from tidegate.store.statistics import MOST_PARTS, MOST_TOTALS, latency_by_hour

_CONFIRMED_WITHIN_S = 2.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_CURSOR = struct.Struct("!q16s")

router = APIRouter(tags=["jobs"])
admin_running = admin_router()


class ListQuery(BaseModel):
    """Filters of a list of the caller's requests."""

    model_config = ConfigDict(extra="forbid")

    status: Status | None = None
    type: Kind | None = None
    model: str | None = Field(
        default=None, min_length=1, max_length=128, description="Only requests to this model"
    )
    source: Literal["job", "stream", "relay"] | None = None
    conversation: str | None = Field(
        default=None, min_length=1, max_length=200, description="Only calls of this conversation"
    )
    upstream: str | None = Field(
        default=None, min_length=1, max_length=128, description="Of the last call"
    )
    since: datetime | None = Field(
        default=None, description="Submitted at or after this time; UTC without a time zone"
    )
    until: datetime | None = Field(default=None, description="Submitted before this time")
    limit: int = Field(default=50, ge=1, le=200)
    cursor: str | None = Field(
        default=None, max_length=100, description="`next_cursor` of the previous page"
    )

    def filter(self) -> Filter:
        return Filter(
            status=self.status,
            kind=self.type,
            model=self.model,
            source=self.source,
            conversation=self.conversation,
            upstream=self.upstream,
            since=in_utc("since", self.since),
            until=in_utc("until", self.until),
        )


@router.get(
    "/requests",
    response_model_exclude_none=True,
    responses=problem_responses(400, 401, 403, 503),
    summary="Your requests, newest first",
)
async def listed(
    request: Request, caller: RecordReader, query: Annotated[ListQuery, FromQuery()]
) -> RequestPage:
    """Jobs, and streams and native calls that have ended (running ones are at `/requests/running`),
    without their texts. Continue with `cursor` until there is no `next_cursor`: a page may have
    fewer than `limit` requests, or none, while there are more. New submissions do not shift the
    pages."""
    place = START if query.cursor is None else _place_of(query.cursor)
    page = await services_of(request).store.requests.page(
        caller.tenant_id, query.filter(), query.limit, place
    )
    prefix = prefix_of(request)
    return RequestPage(
        items=[item_view(item, prefix) for item in page.items],
        next_cursor=None if page.after is None else _cursor_of(page.after),
    )


@router.delete(
    "/requests/{request_id}",
    response_model=StatusView,
    response_model_exclude_none=True,
    responses=problem_responses(400, 401, 403, 404, 409, 503)
    | {
        202: {
            "model": StatusView,
            "description": "The worker that runs it has been notified, and has "
            "not confirmed yet that it has stopped",
        }
    },
    summary="Cancel a request that is queued or running",
)
async def cancel(request: Request, request_id: UUID) -> Response:
    """A queued request ends immediately. The call of a running request is aborted, and its partial
    output is kept. Cancelling again changes nothing. A request that has ended otherwise returns
    409."""
    caller = await caller_of(request)
    return await ended_by(request, request_id, caller.tenant_id)


async def ended_by(request: Request, request_id: UUID, tenant_id: str) -> Response:
    """Cancel a request of a tenant. The answer has its status: 202 if it has not ended yet."""
    services = services_of(request)
    before = await services.store.jobs.cancel(request_id, tenant_id)
    record = await services.store.requests.get(request_id, tenant_id)
    if before is Status.RUNNING and record.status is Status.RUNNING:
        record = await wait_until("change", request, services, record, _CONFIRMED_WITHIN_S)
    if record.status.is_end and record.status is not Status.CANCELLED:
        raise AlreadyEnded(f"the request has ended: {record.status}")
    view = await charged_view(services, record, prefix_of(request))
    return Response(
        view.model_dump_json(exclude_none=True),
        200 if record.status.is_end else 202,
        {REQUEST_ID_HEADER: str(request_id)},
        media_type="application/json",
    )


def in_utc(field: str, time: datetime | None) -> datetime | None:
    """Return the time of `field` in UTC; a time without a zone counts as UTC. Raises
    InvalidRequest."""
    if time is None or time.tzinfo is None:
        return None if time is None else time.replace(tzinfo=UTC)
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise InvalidRequest(field, f"{field} is out of range") from None


def _cursor_of(place: ListCursor) -> str:
    since = place.created_at - _EPOCH
    raw = _CURSOR.pack(since // _MICROSECOND, place.request_id.bytes)
    return urlsafe_b64encode(raw).decode()


def _place_of(cursor: str) -> ListCursor:
    try:
        microseconds, raw = _CURSOR.unpack(b64decode(cursor, altchars=b"-_", validate=True))
        return ListCursor(_EPOCH + microseconds * _MICROSECOND, UUID(bytes=raw))
    except (ValueError, OverflowError, struct.error):
        raise InvalidRequest(
            "cursor", "invalid cursor", allowed="the `next_cursor` of a page"
        ) from None


OMITTED_HEADER = "X-Tidegate-Omitted-Bytes"
BODY_RESPONSES: dict[int | str, dict[str, Any]] = {
    **problem_responses(400, 401, 403, 404, 503),
    200: {
        "content": {"*/*": {}},  # the recorded type
        "description": "The body, with the content type that it came with",
        "headers": {
            OMITTED_HEADER: {
                "description": "How much of the middle of a long answer is not in the record",
                "schema": {"type": "integer"},
            }
        },
    },
}


@router.get(
    "/requests/{request_id}/request",
    response_class=StreamingResponse,
    responses=BODY_RESPONSES,
    summary="Recorded request body",
)
async def asked(request: Request, request_id: UUID, caller: RecordReader) -> Response:
    """The body of a native call as it was sent; of a job or a stream the recorded fields, as JSON.
    404 if it is not kept, not yet recorded, or erased."""
    return await _body(request, request_id, caller.tenant_id, "request")


@router.get(
    "/requests/{request_id}/response",
    response_class=StreamingResponse,
    responses=BODY_RESPONSES,
    summary="Recorded response body",
)
async def answered(request: Request, request_id: UUID, caller: RecordReader) -> Response:
    """As for `/request`. Of a stream that was cut off, the part that was received."""
    return await _body(request, request_id, caller.tenant_id, "response")


async def _body(request: Request, request_id: UUID, tenant_id: str, role: Role) -> Response:
    body = await services_of(request).store.requests.body(request_id, tenant_id, role)
    return await body_response(body, request_id, role)


async def body_response(body: Body, request_id: UUID, role: Role) -> Response:
    """Return a body as a download, whatever its declared type. Raises NotFound,
    StoreUnavailable."""
    headers = {
        "Content-Type": body.content_type,
        "Content-Length": str(body.size_bytes),
        "Content-Disposition": f'attachment; filename="{request_id}-{role}"',
        "Cache-Control": "private, no-store",
    }
    if body.omitted_bytes:
        headers[OMITTED_HEADER] = str(body.omitted_bytes)
    return await streamed(body.pieces, headers, f"no {role} body of request {request_id} is kept")


class WhyView(BaseModel):
    """What a request waits for, as a sentence and as values."""

    request_id: str
    status: Status
    sentence: str = Field(description="A sentence whose subject is the request")
    place: int | None = Field(default=None, description="Place in the queue, 1 is next")
    limit: str | None = Field(default=None, description="The limit that it waits for")
    used: int | None = Field(default=None, description="Usage of that limit by all of its callers")
    bound: int | None = None
    paused_ms: int | None = Field(default=None, description="Remaining time of that limit's pause")
    retry_in_ms: int | None = Field(default=None, description="Time until it is retried")
    ahead: int | None = Field(
        default=None,
        description="Approximate number of calls of all tenants that are admitted before it",
    )
    wait_ms: int | None = Field(
        default=None, description="Estimated time until admission, if known"
    )
    is_certain: bool = Field(
        default=False,
        description="True if `wait_ms` is the end of a window, a quota or a pause; false for an "
        "estimate by the limit's throughput",
    )


@router.get(
    "/requests/{request_id}/why",
    response_model=WhyView,
    response_model_exclude_none=True,
    responses=problem_responses(400, 401, 403, 404, 503),
    summary="What a request waits for",
)
async def why(request: Request, request_id: UUID, caller: Reader) -> WhyView:
    """The limit that the request waits for, at most half a second old. Streams and native calls are
    recorded once they have ended: `/requests/running` shows what they wait for."""
    services = services_of(request)
    record = await services.store.requests.get(request_id, caller.tenant_id)
    found = await services.store.running_calls.whereabouts(request_id)
    if found.tenant_id != caller.tenant_id:
        raise NotFound(f"no request {request_id}")
    reason = await services.waiting_of(found, datetime.now(UTC))
    return view_of(
        WhyView, reason, request_id=str(request_id), status=found.status, place=record.place
    )


MOST_SHOWN = 500


class RunningItem(BaseModel):
    """A stream or a native call that has not ended."""

    request_id: str
    source: Literal["stream", "relay"]
    status: Literal["queued", "running"] = Field(
        description="queued: it waits for its first attempt or for a retry"
    )
    type: Kind | None = None
    model: str | None = None
    endpoint: str | None = Field(default=None, description="The native path of the call")
    submitted_at: datetime
    admitted_at: datetime | None = None
    waits_for: str | None = Field(
        default=None,
        description="The limit that it waits for, if any; or `budget:` and the name of a budget "
        "whose rest is reserved for running calls",
    )


class AdminRunningItem(RunningItem):
    """A request in progress, of any tenant."""

    tenant: str
    process: str = Field(description="The process that handles it")
    pool: str = Field(description="Empty until an upstream was chosen")
    upstream: str | None = None


class RunningPage(BaseModel):
    """Your requests in progress, oldest first."""

    items: list[RunningItem]
    complete: bool = Field(
        description="Whether these are all. At most the 500 oldest are listed, and of each "
        "process its 200 oldest; while Valkey is unavailable only those of the "
        "process that answers"
    )


class AdminRunningPage(BaseModel):
    """Requests in progress of all tenants, oldest first."""

    items: list[AdminRunningItem]
    complete: bool = Field(description="As in /requests/running")
    under_way: int = Field(description="Total number, listed or not")


@router.get(
    "/requests/running",
    response_model_exclude_none=True,
    responses=problem_responses(401, 403, 503),
    summary="Your streams and native calls in progress",
)
async def running(request: Request, caller: RecordReader) -> RunningPage:
    """Requests are in `/requests` once they have ended. The list is a second or two old. Jobs are
    in `/requests` from their submission on."""
    services = services_of(request)
    notes = await services.board.notes()
    items = await _items(services, notes, caller.tenant_id)
    return RunningPage(
        items=[RunningItem(**one.model_dump(include=_OWN)) for one in items[:MOST_SHOWN]],
        complete=notes.whole and len(items) <= MOST_SHOWN,
    )


@admin_running.get(
    "/requests/running",
    response_model_exclude_none=True,
    summary="Streams and native calls of all tenants in progress",
)
async def all_running(request: Request) -> AdminRunningPage:
    """Requests are in `/admin/requests` once they have ended. The list is a second or two old. Jobs
    are there from their submission on."""
    services = services_of(request)
    notes = await services.board.notes()
    items = await _items(services, notes, None)
    return AdminRunningPage(
        items=items[:MOST_SHOWN],
        complete=notes.whole and len(items) <= MOST_SHOWN,
        under_way=sum(one.under_way for one in notes.notes),
    )


_OWN = set(RunningItem.model_fields)


async def _items(services: Services, notes: Notes, tenant_id: str | None) -> list[AdminRunningItem]:
    """Return the oldest calls of a tenant, or of all, with what each waits for; one more than is
    shown, if there are more."""
    found = [
        (note.process, call)
        for note in notes.notes
        for call in note.calls
        if tenant_id is None or call.tenant == tenant_id
    ]
    found.sort(key=lambda each: (each[1].received_at, each[1].request_id))
    del found[MOST_SHOWN + 1 :]
    waiting = {call.pool for _, call in found if call.admitted_at is None}
    snapshots = {
        pool: await services.recent_reads.of(services.limiters[pool])
        for pool in waiting & services.limiters.keys()
    }
    return [_item(process, call, snapshots.get(call.pool)) for process, call in found]


def _item(process: str, call: ActiveCall, snapshot: Snapshot | None) -> AdminRunningItem:
    waits = call.admitted_at is None
    return view_of(
        AdminRunningItem,
        call,
        status="queued" if waits else "running",
        type=Kind(call.kind) if call.kind in _KINDS else None,
        submitted_at=call.received_at,
        waits_for=_held_up_by(process, call, snapshot) if waits and snapshot is not None else None,
        process=process,
    )


_KINDS = {kind.value for kind in Kind}


def _held_up_by(process: str, call: ActiveCall, snapshot: Snapshot) -> str | None:
    """Return the limit that holds up the queue of a call."""
    if not call.limits:
        return None
    if call.limits[0].startswith(OF_BUDGETS):
        return call.limits[0]
    for queue in snapshot.queues:
        is_own = queue.process == process and queue.tenant == call.tenant
        if is_own and set(call.limits) <= set(queue.limits):
            return queue.held_up_by
    return None


_DIMENSIONS = ("tenant", "model", "day", "key", "upstream")
_LOGGED = frozenset(("key", "upstream"))
_MOST_LOGGED_DAYS = 31

usage_router = APIRouter(tags=["usage"])
By = Annotated[
    str,
    Query(
        max_length=100,
        description="Group by, separated by commas: tenant, model, day; key or upstream: at most "
        f"{_MOST_LOGGED_DAYS} days, from the request log, as far back as it is kept",
    ),
]
CalledAt = Annotated[
    str | None,
    Query(min_length=1, max_length=128, description="The upstream that was called; all if absent"),
]
Since = Annotated[
    date | None, Query(description="The first day (UTC). Default: the first of the month")
]
Until = Annotated[date | None, Query(description="The last day (UTC). Default: today")]
_COMPARED_DAYS = 31
ComparedSince = Annotated[
    date | None,
    Query(description=f"The first day, of UTC; else {_COMPARED_DAYS} days before the last"),
]


class Amounts(BaseModel):
    """Requests that ended, with their usage. Unknown usage counts as 0."""

    requests: int
    input_tokens: int = Field(description="Including cached tokens")
    output_tokens: int = Field(description="Without thinking tokens")
    cached_tokens: int
    thoughts_tokens: int
    images: int = Field(description="Generated images, if they were counted")
    cost_micros: int = Field(description="In millionths of a dollar")
    unpriced: int = Field(description="Requests without a price, which count as 0 in the cost")
    partial: int = Field(
        description="Requests that were cut off, charged by the usage reported until then"
    )
    estimated: int = Field(
        description="Requests that were cut off, charged by an estimate of the received output"
    )
    unknown: int = Field(description="Requests of unknown usage, which count as 0")
    cache_write_tokens: int = Field(
        description="Input tokens that were written to the provider's cache"
    )
    input_audio_tokens: int = Field(description="This and the fields below: if reported")
    input_image_tokens: int
    input_video_tokens: int
    output_audio_tokens: int
    output_image_tokens: int
    output_video_tokens: int
    searches: int = Field(description="Web searches by the provider")
    provider_cost_micros: int = Field(
        description="Charges that providers reported themselves, in millionths of a dollar"
    )


class UsageRow(Amounts):
    tenant: str | None = None
    model: str | None = Field(default=None, description="Empty if no upstream was chosen")
    day: date | None = None
    key: str | None = Field(
        default=None,
        description="The prefix of the API key; empty if there was none; for calls that an "
        "operator made as the tenant `operator:` and a name, in `/usage` only `operator`",
    )
    upstream: str | None = Field(default=None, description="Upstream of the calls")


class TotalsView(BaseModel):
    """Totals from the day `since` to the day `until`, both included."""

    since: date
    until: date
    rows: list[UsageRow]
    total: Amounts = Field(description="Total of the rows that are shown")
    cut: bool = Field(description=f"Whether more than {MOST_TOTALS} rows exist")


@usage_router.get(
    "/usage",
    response_model=TotalsView,
    responses=problem_responses(400, 401, 403, 503),
    summary="Your usage and its cost",
)
async def own_usage(
    request: Request,
    caller: RecordReader,
    by: By = "model,day",
    since: Since = None,
    until: Until = None,
) -> Response:
    """Requests count on the day (UTC) on which they ended, once they are recorded."""
    return await _view(request, by, since, until, caller.tenant_id, names_operators=False)


@usage_router.get(
    "/admin/usage",
    dependencies=[Depends(admit_admin)],
    response_model=TotalsView,
    responses=problem_responses(400, 401, 403, 503),
    summary="Usage of all tenants and its cost",
)
async def usage(
    request: Request,
    by: By = "tenant,model,day",
    since: Since = None,
    until: Until = None,
    tenant: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
    upstream: CalledAt = None,
) -> Response:
    return await _view(request, by, since, until, tenant, upstream)


_MOST_LATENCY = timedelta(hours=49)  # a day in every zone, including the day that DST ends


class Percentiles(BaseModel):
    """Half of the requests, and 95 % of them, took no longer."""

    p50: float
    p95: float


class LatencyPartView(BaseModel):
    """Requests of an hour with a common value, such as a tenant, and their times in total."""

    of: Literal["tenant", "model", "upstream", "type", "error"]
    name: str
    requests: int
    waited_sum_ms: float
    called_sum_ms: float


class LatencyHour(BaseModel):
    """The requests that were submitted in an hour and have ended. Lines of batches are left out.
    Counts and sums of a sample are estimates of the whole."""

    at: datetime = Field(description="Start of the hour")
    sampled: int = Field(description="Requests in the sample; all of them if `one_in` is 1")
    requests: int
    failed: int = Field(description="Requests that failed, expired or are dead")
    waited_ms: Percentiles = Field(
        description="Wait for admission; without admission until the end"
    )
    called_ms: Percentiles = Field(description="Time at upstreams")
    took_ms: Percentiles = Field(description="Time from submission to end")
    waited_sum_ms: float
    called_sum_ms: float
    between_sum_ms: float = Field(
        description="Time neither waiting nor at an upstream: before retries"
    )
    parts: list[LatencyPartView] = Field(description=f"The {MOST_PARTS} slowest of each dimension")


class LatencyView(BaseModel):
    """Latency by the hour. Hours without requests are left out."""

    since: datetime
    until: datetime
    one_in: int = Field(
        description="1 for all requests; n if a sample of one in n pages of the request log was "
        "read"
    )
    hours: list[LatencyHour]


@usage_router.get(
    "/admin/latency",
    dependencies=[Depends(admit_admin)],
    responses=problem_responses(400, 401, 403, 503),
    summary="Latency by the hour: waits and durations, by tenant, upstream, model and type",
)
async def latency(
    request: Request,
    since: Annotated[
        datetime | None,
        Query(
            description="Start of the first hour. Default: 24 hours ago; UTC without a time zone"
        ),
    ] = None,
    until: Annotated[
        datetime | None, Query(description="End of the last hour. Default: a day after `since`")
    ] = None,
    tenant: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
    upstream: CalledAt = None,
) -> LatencyView:
    """From the request log, as far back as it is kept; at most 49 hours. Requests that ended more
    than a day after `until` are not counted. Of more than some ten thousand requests a sample is
    read, evenly spread over the time."""
    now = datetime.now(UTC)
    first = in_utc("since", since) or now - timedelta(days=1)
    try:
        last, most = in_utc("until", until) or first + timedelta(days=1), first + _MOST_LATENCY
    except OverflowError:
        raise InvalidRequest("since", "since is out of range", allowed="a day on record") from None
    if not first < last <= most:
        allowed = "a time after since, by 49 hours at most"
        raise InvalidRequest("until", "until does not fit since", allowed=allowed)
    _check_no_nul(tenant=tenant, upstream=upstream)
    connections = services_of(request).store.connections
    found = await latency_by_hour(connections, first, last, tenant, upstream)
    hours = [
        view_of(
            LatencyHour,
            one,
            waited_ms=_percentiles(one.waited_ms),
            called_ms=_percentiles(one.called_ms),
            took_ms=_percentiles(one.took_ms),
            parts=[
                LatencyPartView.model_validate(part, from_attributes=True) for part in one.parts
            ],
        )
        for one in found
    ]
    one_in = max((one.one_in for one in found), default=1)
    return LatencyView(since=first, until=last, one_in=one_in, hours=hours)


def _check_no_nul(**given: str | None) -> None:
    """Raise InvalidRequest for a NUL, which PostgreSQL cannot store."""
    for name, value in given.items():
        if value is not None and "\0" in value:
            raise InvalidRequest(name, f"{name} has a NUL character")


def _percentiles(pair: Sequence[float]) -> Percentiles:
    return Percentiles(p50=pair[0], p95=pair[1])


class ExplainingCall(BaseModel):
    """A call that explains a difference."""

    request_id: UUID
    state: str
    charged_micros: int | None = Field(
        description="Charge before the correction; null if it had no cost"
    )
    cost_micros: int = Field(description="Cost by the provider's usage")


class ReconciliationView(BaseModel):
    """Result of the last comparison of a day with a provider, for one model. Amounts are in
    millionths of a dollar."""

    upstream: str
    provider: str
    day: date
    model: str
    ours_micros: int
    theirs_micros: int
    difference_micros: int
    verdict: Literal["equal", "explained", "unexplained"]
    reason: str
    calls: list[ExplainingCall] = Field(
        description="The first hundred calls that explain the difference"
    )
    reconciled_at: datetime


class ReconciliationList(BaseModel):
    items: list[ReconciliationView]


@usage_router.get(
    "/admin/reconciliations",
    dependencies=[Depends(admit_admin)],
    responses=problem_responses(400, 401, 403, 503),
    summary="Comparisons of the record with the providers' own usage and costs",
)
async def reconciliations(
    request: Request,
    since: ComparedSince = None,
    until: Until = None,
    upstream: CalledAt = None,
) -> ReconciliationList:
    """For the days that `tidegate reconcile` or RECONCILE has compared, newest first. Only
    upstreams of OpenAI and Anthropic can be compared."""
    # A day is compared after its end: the last day of a month is compared in the next month.
    span, last = timedelta(days=_COMPARED_DAYS), until or datetime.now(UTC).date()
    first, last = _span(since or max(last, date.min + span) - span, until)
    found = await services_of(request).store.reconciliations.found(first, last)
    chosen = [one for one in found if upstream in (None, one.upstream)]
    return ReconciliationList(
        items=[ReconciliationView.model_validate(one, from_attributes=True) for one in chosen]
    )


def _span(since: date | None, until: date | None) -> tuple[date, date]:
    """Return the days to show, by default from the first of the month until today. Raises
    InvalidRequest."""
    last = until or datetime.now(UTC).date()
    first = since or last.replace(day=1)
    if first > last:
        raise InvalidRequest("since", "since is after until", allowed=f"a day up to {last}")
    return first, last


async def _view(
    request: Request,
    by: str,
    since: date | None,
    until: date | None,
    tenant: str | None,
    upstream: str | None = None,
    *,
    names_operators: bool = True,
) -> Response:
    """Return a `TotalsView` as JSON, whose rows PostgreSQL renders: its model would take 300 ms for
    10,000 rows."""
    dimensions = [name.strip() for name in by.split(",") if name.strip()]
    allowed = ", ".join(_DIMENSIONS)
    for name in dimensions:
        if name not in _DIMENSIONS:
            raise InvalidRequest("by", f"by: {name[:50]!a} is not known", allowed=allowed)
    first, last = _span(since, until)
    if _LOGGED.intersection(dimensions) and (last - first).days >= _MOST_LOGGED_DAYS:
        allowed = f"a day from {last - timedelta(days=_MOST_LOGGED_DAYS - 1)} on"
        raise InvalidRequest("since", "by key or upstream over too many days", allowed=allowed)
    _check_no_nul(tenant=tenant, upstream=upstream)
    table = await services_of(request).store.usage.table(
        dimensions, first, last, tenant, upstream, names_operators=names_operators
    )
    head = orjson.dumps({"since": first, "until": last, "total": table.total, "cut": table.cut})
    body = b'%s,"rows":%s}' % (head[:-1], table.rows.encode())
    return Response(body, media_type="application/json")
