"""Routes `POST /submit`, `GET /status/{request_id}` and `GET /files/{file_id}`, polled or live.

The live status is a stream of server-sent events: `status` at each change, then `done`.

Invariants: a 202 is sent only after the request's row is committed; a client that reconnects gets
the newest version that it has not seen; followers are bounded in number, and end with a revoked
key, a disconnected client or a stopping process.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated, Any, Literal
from uuid import UUID

import orjson
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Send
from starlette.types import Scope as StarletteScope

from tidegate.call import Call, Caller, Classification, ClassifiedBy, Scope, Status, new_id
from tidegate.call import Scope as Right
from tidegate.dialects import dialect_of
from tidegate.errors import (
    Forbidden,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    QueueFull,
    QuotaExceeded,
    StoreUnavailable,
    TidegateError,
    TooManyFollowers,
    UpstreamMissing,
)
from tidegate.http.body import WITH_ITS_HEAD_BYTES
from tidegate.http.guards import Reader, caller_of, check_models, check_prompt
from tidegate.http.idempotency import PARAMETER, REPLAYED_HEADER, idempotency_of, key_of
from tidegate.http.problems import REQUEST_ID_HEADER, problem_response, problem_responses
from tidegate.http.services import TRACE_IN_SCOPE, Services, services_of
from tidegate.http.sse import ClientStalled, EventWriter, abort, disconnected
from tidegate.http.submission import (
    JOB_BODY,
    Submission,
    ask_of,
    discard,
    read_submission,
    with_body_as_file,
)
from tidegate.http.views import (
    Accepted,
    HeldResponse,
    StatusView,
    accepted,
    file_response,
    prefix_of,
    status_view,
)
from tidegate.spine.bodies import aside
from tidegate.spine.detached import check_bounded, detached_call, endpoint_named
from tidegate.spine.models import check_body, check_model
from tidegate.spine.prompt import files_known
from tidegate.spine.run import Terms
from tidegate.store.records import Earlier, NewJob, RequestRecord
from tidegate.telemetry.logging import Log, get_logger
from tidegate.telemetry.tracing import Parent, parent_in

log = get_logger()


async def charged_view(services: Services, record: RequestRecord, prefix: str) -> StatusView:
    """Return the record as shown to its owner; a request that has not ended has no cost yet."""
    cost_micros = None
    if record.status is Status.QUEUED:
        return await _queued_view(services, status_view(record, prefix), record.request_id)
    if record.status.is_end and record.finished_at is not None:
        try:
            cost_micros, details = await services.store.requests.charged(
                record.request_id, record.tenant_id, record.finished_at
            )
            record = replace(record, usage=replace(record.usage, details=details))
        except StoreUnavailable as unavailable:  # an answer without the cost is better than none
            log.debug(Log.STORE_AWAY, detail=unavailable.message)
    return status_view(record, prefix, cost_micros)


async def _queued_view(services: Services, view: StatusView, request_id: UUID) -> StatusView:
    """Return the view with what the request waits for, and an estimate of how long, if known."""
    try:
        found = await services.store.running_calls.whereabouts(request_id)
        reason = await services.waiting_of(found, datetime.now(UTC))
    except (NotFound, StoreUnavailable) as unavailable:  # the status is valid without these
        log.debug(Log.STORE_AWAY, detail=unavailable.message)
        return view
    place = {"waits_for": reason.limit, "ahead": reason.ahead, "wait_ms": reason.wait_ms}
    return view.model_copy(update=place)


MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE_S = 15.0
_RECONNECT_AFTER_MS = 1_000
_PAUSE_S = 1.0
_EVENT_ID = re.compile(r"(?P<version>[0-9]{1,18})(?P<done>-done)?")


# The OpenAPI entries of the live status, besides JSON.
LIVE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The status; or events `status` at each change, and then `done`",
        "content": {
            MEDIA_TYPE: {"example": 'id: 1\nevent: status\ndata: {"status": "queued"}\n\n'}
        },
    },
    204: {"description": "You have seen all of its events"},
}


def wants_events(request: Request) -> bool:
    return MEDIA_TYPE in request.headers.get("accept", "")


def live_status(
    request: Request, services: Services, record: RequestRecord, prefix: str, caller: Caller
) -> Response:
    """Return the response that follows `record`. Raises InvalidRequest.

    A client that has received all events gets 204: browsers reconnect until then.
    """
    last = request.headers.get("last-event-id")
    event_id = None if last is None else _EVENT_ID.fullmatch(last)
    if last is not None and event_id is None:
        raise InvalidRequest(
            "Last-Event-ID", "no event has this id", allowed="the id of the last event received"
        )
    version = None if event_id is None else int(event_id["version"])
    if event_id and event_id["done"] and record.status.is_end and version == record.version:
        return Response(status_code=204)
    return LiveStatus(request, services, record, prefix, version, caller)


class LiveStatus(Response):
    """Follows a request until it ends, its client disconnects, or the process drains."""

    def __init__(
        self,
        request: Request,
        services: Services,
        record: RequestRecord,
        prefix: str,
        version: int | None,
        caller: Caller,
    ) -> None:
        super().__init__()
        self._request = request
        self._services = services
        self._record = record
        self._prefix = prefix
        self._sent_version = version
        self._caller = caller
        self._hold = services.hold(caller)
        self._written_at = time.monotonic()

    async def __call__(self, scope: StarletteScope, receive: Receive, send: Send) -> None:
        followers, task = self._services.followers, asyncio.current_task()
        assert task is not None
        try:
            opening = self._services.openings.follower(self._caller)
        except (QuotaExceeded, TooManyFollowers) as many:
            await problem_response(many)(scope, receive, send)
            return
        followers.add(task)
        writer = EventWriter(
            send, plain_text=False, stalled_ms=self._services.config.stalled_reader_ms
        )
        try:
            async with _ends(self._services, receive) as ends:
                await writer.start({REQUEST_ID_HEADER: str(self._record.request_id)})
                await writer.send_retry(_RECONNECT_AFTER_MS)
                await self._follow(writer, ends)
                await writer.end()
        except ClientStalled:
            abort(scope)
        finally:
            followers.discard(task)
            opening.close()
            self._hold.release()

    async def _follow(self, writer: EventWriter, ends: Ends) -> None:
        while True:
            record = self._record
            if record.version != self._sent_version:
                view = await charged_view(self._services, record, self._prefix)
                data = view.model_dump_json(exclude_none=True).encode()
                try:
                    self._hold.occupy(len(data))
                except QueueFull:
                    return  # it reconnects
                await writer.status("status", data, str(record.version))
                self._sent_version, self._written_at = record.version, time.monotonic()
            if record.status.is_end:
                last = {"request_id": str(record.request_id), "status": record.status}
                await writer.status("done", orjson.dumps(last), f"{record.version}-done")
                return
            if not await self._changed(ends) or not await self._may_go_on():
                return
            if time.monotonic() - self._written_at >= KEEP_ALIVE_S:
                await writer.keep_alive()
                self._written_at = time.monotonic()

    async def _may_go_on(self) -> bool:
        """Return whether the key of the request is still valid: it may have been revoked
        meanwhile."""
        try:
            await caller_of(self._request, Right.READ)
        except TidegateError:  # the client gets the error when it reconnects
            return False
        return True

    async def _changed(self, ends: Ends) -> bool:
        """Wait for a change, at most until the next keep-alive. Return False if the stream is to
        end."""
        record, began = self._record, time.monotonic()
        silent_s = began - self._written_at
        wait_ms = max(1, round((KEEP_ALIVE_S - silent_s) * 1000))
        try:
            self._record = await _next(self._services, record, wait_ms, ends)
        except NotFound:
            return False  # it was deleted, since its retention is over
        except StoreUnavailable:
            pass  # read again in the next round
        if self._record.version == record.version and time.monotonic() - began < _PAUSE_S:
            # The store returned immediately: it is unavailable, or has too many waiters.
            await asyncio.wait(ends, timeout=_PAUSE_S, return_when=asyncio.FIRST_COMPLETED)
        return not any(each.done() for each in ends)


Ends = set[asyncio.Task[Any]]


@asynccontextmanager
async def _ends(services: Services, receive: Receive) -> AsyncIterator[Ends]:
    """Yield tasks, one of which ends when the waiting is to end: the process drains, or the client
    has disconnected."""
    ends: Ends = {
        asyncio.ensure_future(services.draining.wait()),
        asyncio.ensure_future(disconnected(receive)),
    }
    try:
        yield ends
    finally:
        for each in ends:
            each.cancel()


async def _next(
    services: Services, record: RequestRecord, wait_ms: int, ends: Ends
) -> RequestRecord:
    """Return the record at its next change, or unchanged after `wait_ms` or one of `ends`. Raises
    NotFound and StoreUnavailable."""
    change: asyncio.Task[RequestRecord] = asyncio.ensure_future(
        services.store.requests.wait_change(
            record.request_id, record.tenant_id, record.version, wait_ms
        )
    )
    try:
        await asyncio.wait({change, *ends}, return_when=asyncio.FIRST_COMPLETED)
        return change.result() if change.done() else record
    finally:
        change.cancel()


Until = Literal["end", "change"]


async def wait_until(
    until: Until, request: Request, services: Services, record: RequestRecord, wait_s: float
) -> RequestRecord:
    """Follow the record until the request has ended or its status changes, or the waiting is to
    end: the time is over, the process drains, or the client has disconnected. Return the record."""
    over_at = time.monotonic() + wait_s
    first: Status = record.status
    async with _ends(services, request.receive) as ends:
        while (left_s := over_at - time.monotonic()) > 0:
            if record.status.is_end or (until == "change" and record.status is not first):
                break
            record = await _next(services, record, round(left_s * 1000), ends)
            if any(each.done() for each in ends):
                break
    return record


_MAX_WAIT_S = 60

router = APIRouter(tags=["jobs"])


@router.post(
    "/submit",
    status_code=202,
    response_model=Accepted,
    openapi_extra=JOB_BODY | {"parameters": [PARAMETER]},
    responses=problem_responses(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503),
    summary="Submit a request; a worker answers it",
)
async def submit(request: Request) -> Response:
    """Accepts text, files and image prompts, as JSON or multipart. The response means that the
    request is stored durably; follow it at `status_url`."""
    services = services_of(request)
    received = services.clock.now()
    key = key_of(request)
    caller = await caller_of(request)
    # A repeat of an earlier request is answered even if the tenant's budget is spent.
    if key is None:
        await services.budgets.check(caller)
    hold = services.hold(caller)
    try:
        submission = await read_submission(
            request,
            services.config,
            services.blobs,
            as_job=True,
            digests=key is not None,
            hold=hold,
        )
        parent = parent_in(request.scope["headers"])
        job = _new_job(submission, services, received, caller, key, parent)
        if (trail := services.spine.tracing.trail(job.request_id, parent)) is not None:
            request.scope[TRACE_IN_SCOPE] = trail.trace
        taken = await _submitted(job, services, caller)
    finally:
        hold.release()
    body = accepted(taken, prefix_of(request)).model_dump_json()
    headers = {REQUEST_ID_HEADER: str(taken.request_id)}
    if isinstance(taken, Earlier):
        headers[REPLAYED_HEADER] = "true"
    return Response(body, 202, headers, media_type="application/json")


async def _submitted(job: NewJob, services: Services, caller: Caller) -> NewJob | Earlier:
    """Commit a job and return it, or return the earlier one with the same idempotency key."""
    try:
        if job.endpoint is None:
            check_models(caller, job.model, job.classification, services.config)
        elif caller.models is not None:
            check_model(caller, job.model or "")  # without one the provider chooses
            body = await aside(len(job.prompt), partial(orjson.loads, job.prompt))
            check_body(caller, endpoint_named(job.endpoint), body)
        earlier = await services.store.jobs.earlier(job)
        if earlier is None:
            if job.endpoint is None:
                targets = services.spine.targets
                files = files_known(job.attachments, job.image_uri)
                known = job.classification
                check_prompt(targets, job.model, known, services.config, files, is_queued=True)
            budgets, model = services.budgets, job.model or ""
            await budgets.check(caller, model, job.subject, job.conversation)
            if budgets.any:
                with suppress(UpstreamMissing):
                    await _check_bounded(job, services, caller)
            room = services.store.queue_caps.room(
                caller, job.request_id, jobs=1, size_bytes=_size_of(job)
            )
            async with room:
                job = await with_body_as_file(job, services.blobs)
                earlier = await services.store.jobs.submit(job)
    except (Forbidden, IdempotencyConflict, InvalidRequest, QuotaExceeded):
        await _forget(job, services)
        raise
    if earlier is None:
        return job
    await _forget(job, services)
    return earlier


async def _check_bounded(job: NewJob, services: Services, caller: Caller) -> None:
    """Raise BudgetUnbounded if a budget would reject the job's call, as far as known: not for a
    prompt with files, nor before its kind is decided. Such a job would wait for a person."""
    if job.endpoint is not None:
        wrapped = detached_call(
            request_id=job.request_id,
            path=job.endpoint,
            body=await aside(len(job.prompt), job.prompt.encode),
            caller=caller,
            priority=job.priority,
            deadline_ms=None,
        )
        wrapped.terms.subject, wrapped.terms.conversation = job.subject, job.conversation
        await check_bounded(services.relay, wrapped)
        return
    kind = job.classification.kind
    if kind is None or job.attachments or job.image_uri is not None:
        return
    model = job.model or services.config.model_for(kind)
    call = Call(job.request_id, job.prompt, kind, model, tenant_id=job.tenant_id)
    terms = Terms(job.request_id, caller, time.monotonic())
    terms.subject, terms.conversation = job.subject, job.conversation
    services.prompts.check_bounded(call, terms)


async def _forget(job: NewJob, services: Services) -> None:
    # Files left behind while the blob store is unavailable are removed with other orphans.
    with suppress(StoreUnavailable):
        await discard(job, services.blobs)


def _size_of(job: NewJob) -> int:
    """Return the bytes that a job adds to a tenant's queue, as the store counts them."""
    files = sum(attachment.size_bytes for attachment in job.attachments)
    prompt = job.prompt
    chars = len(prompt) if prompt.isascii() else len(prompt.encode("utf-8", "replace"))
    return chars + files


def _new_job(
    submission: Submission,
    services: Services,
    received: datetime,
    caller: Caller,
    key: str | None,
    parent: Parent | None,
) -> NewJob:
    deadline_ms = submission.deadline_ms or services.config.job_deadline_ms
    return NewJob(
        request_id=new_id(),
        created_at=received,
        prompt=submission.prompt,
        classification=_classified(submission, services, caller),
        attachments=submission.attachments,
        image_uri=submission.image_uri,
        model=submission.model,
        priority=min(submission.priority, caller.most_priority),
        deadline_at=received + timedelta(milliseconds=deadline_ms) if deadline_ms else None,
        tenant_id=caller.tenant_id,
        once=idempotency_of(key, submission),
        webhook_url=submission.webhook_url,
        subject=submission.subject,
        conversation=submission.conversation,
        key_id=caller.key_id,
        endpoint=submission.endpoint,
        tiers_allowed=caller.tiers if submission.tiers is None else submission.tiers,
        traceparent=None if parent is None else parent.text,
        is_counted=caller.caps.on_queue,
    )


def _classified(submission: Submission, services: Services, caller: Caller) -> Classification:
    """Return the kind as far as known. Raises NotFound if no upstream serves a native call."""
    if submission.endpoint is None:
        return services.prompts.classify_by_rules(ask_of(submission, caller))
    dialect = dialect_of(submission.endpoint, frozenset(), b"")
    with suppress(UpstreamMissing):  # a worker that can reach the upstream claims it
        services.spine.targets.of(dialect, submission.model or "")
    return Classification(submission.kind, ClassifiedBy.BODY, submission.endpoint)


@router.get(
    "/status/{request_id}",
    response_model=StatusView,
    response_model_exclude_none=True,
    responses=problem_responses(400, 401, 403, 404, 429, 503) | LIVE,
    summary="Status of a request, and its answer",
)
async def status(
    request: Request,
    request_id: UUID,
    caller: Reader,
    wait: Annotated[
        float,
        Query(ge=0, le=_MAX_WAIT_S, description="Seconds to wait for the end of the request"),
    ] = 0,
    until: Annotated[
        Until, Query(description="Whether `wait` waits for the end, or for any change of status")
    ] = "end",
) -> StatusView | Response:
    """With `wait` the response comes when the request has ended or the time is up, whichever is
    first; with `until=change` as soon as its status changes. With `Accept: text/event-stream` each
    change is an event `status`, and the last event is `done`; `Last-Event-ID` resumes a lost
    connection."""
    services = services_of(request)
    record = await services.store.requests.get(request_id, caller.tenant_id)
    if wants_events(request):
        return live_status(request, services, record, prefix_of(request), caller)
    if wait and not record.status.is_end:
        with services.openings.long_poll(caller):
            record = await wait_until(until, request, services, record, wait)
        await caller_of(request, Scope.READ)  # the key may have been revoked meanwhile
    view = await charged_view(services, record, prefix_of(request))
    if len(record.text or "") <= WITH_ITS_HEAD_BYTES:
        return view
    content = view.model_dump_json(exclude_none=True).encode()
    return HeldResponse(content, services.hold(caller))


@router.get(
    "/files/{file_id}",
    response_class=StreamingResponse,
    responses=problem_responses(400, 401, 403, 404, 503)
    | {200: {"content": {"image/png": {}}, "description": "The file's bytes"}},
    summary="A generated picture or an uploaded file",
)
async def file(request: Request, file_id: UUID, caller: Reader) -> Response:
    """Images can be displayed inline; all other files are sent as a download."""
    services = services_of(request)
    return await file_response(
        await services.store.requests.file(file_id, caller.tenant_id), services.blobs
    )
