"""`POST /submit`, `GET /status/{request_id}` and `GET /files/{file_id}`.

Invariant: a 202 is sent only after the request's row is committed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from urllib.parse import quote
from uuid import UUID

import orjson
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from tidegate.call import Caller, Classification, ClassifiedBy, Scope, new_id
from tidegate.errors import (
    Forbidden,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    StoreUnavailable,
)
from tidegate.http.access import TRACE_IN_SCOPE
from tidegate.http.caller import Reader, caller_of, check_models, check_prompt, payer_of
from tidegate.http.charged import charged_view
from tidegate.http.following import until_changed
from tidegate.http.forms import Submission, Wrapping, discard, read_submission
from tidegate.http.idempotency import PARAMETER, REPLAYED_HEADER, idempotency_of, key_of
from tidegate.http.live import LIVE, live_status, wants_events
from tidegate.http.problems import REQUEST_ID_HEADER, Problem
from tidegate.http.services import Services, services_of
from tidegate.http.views import Accepted, StatusView, accepted
from tidegate.http.wrapped import body_apart, wrapped_submission
from tidegate.pipeline import Ask
from tidegate.relay.detached import LONGEST_BYTES, endpoint_named
from tidegate.relay.paths import dialect_of
from tidegate.relay.permission import check_body
from tidegate.store.blobs import Blobs
from tidegate.store.records import Earlier, FileRecord, NewJob
from tidegate.tracing import Parent, parent_in

_MAX_WAIT_S = 60
_EXTENSIONS = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "image/gif": ".gif",
}
_INLINE_TYPES = tuple(_EXTENSIONS)

router = APIRouter(tags=["jobs"])


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entry of problem JSON for each status."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"model": Problem, "content": content} for status in statuses}


_FIELDS: dict[str, Any] = {
    "data": {"type": "string", "description": "The prompt"},
    "text": {"type": "string", "description": "Another name for `data`"},
    "image_uri": {"type": "string", "format": "uri", "description": "A public picture to fetch"},
    "type": {
        "type": "string",
        "enum": ["text_only", "multi_modal", "image_generation"],
        "description": "Skips classification",
    },
    "model": {"type": "string", "description": "Instead of the model configured for the type"},
    "priority": {"type": "integer", "minimum": -100, "maximum": 100, "default": 0},
    "deadline_ms": {
        "type": "integer",
        "minimum": 1,
        "description": "From receipt to admission; later the request expires",
    },
    "subject": {
        "type": "string",
        "minLength": 1,
        "maxLength": 200,
        "description": "Whom it is about, so that it can be erased: see docs/accounting.md",
    },
}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}

_WEBHOOK: dict[str, Any] = {
    "webhook_url": {
        "type": "string",
        "format": "uri",
        "description": "Is told of the end, signed: see docs/jobs.md. Needs WEBHOOK_SECRET",
    },
}
_WRAPPED: dict[str, Any] = {
    "endpoint": {
        "type": "string",
        "description": "A native path, such as /v1/chat/completions, instead of a prompt",
    },
    "body": {"type": "object", "description": "What goes to `endpoint`; 20 MB at most"},
}
_EXAMPLES = {
    "text": {"value": {"data": "Explain the importance of cybersecurity."}},
    "image": {"value": {"data": "Generate an image of a futuristic city."}},
    "edit": {
        "value": {
            "data": "Make this picture a watercolour",
            "image_uri": "https://example.com/cat.png",
        }
    },
}


def _body_of(fields: dict[str, Any], only_json: dict[str, Any] | None = None) -> dict[str, Any]:
    values = {"type": "object", "properties": fields, "additionalProperties": False}
    as_json = {**values, "properties": {**fields, **(only_json or {})}}
    with_files = {**values, "properties": {**fields, "file": _FILES, "files": _FILES}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": as_json, "examples": _EXAMPLES},
                "multipart/form-data": {"schema": with_files},
                "application/x-www-form-urlencoded": {"schema": values},
            },
        }
    }


BODY = _body_of(_FIELDS)
_JOB_BODY = _body_of(_FIELDS | _WEBHOOK, _WRAPPED)


def prefix_of(request: Request) -> str:
    """`/llm` when the client used that prefix, else nothing: links keep to what it used."""
    return "/llm" if request.scope["path"].startswith("/llm/") else ""


def ask_of(submission: Submission, caller: Caller) -> Ask:
    return Ask(
        prompt=submission.prompt,
        attachments=submission.attachments,
        image_uri=submission.image_uri,
        kind=submission.kind,
        tenant_id=caller.tenant_id,
    )


@router.post(
    "/submit",
    status_code=202,
    response_model=Accepted,
    openapi_extra=_JOB_BODY | {"parameters": [PARAMETER]},
    responses=problem_responses(400, 401, 403, 408, 409, 413, 415, 422, 429, 503),
    summary="Hand in a request; a worker answers it",
)
async def submit(request: Request) -> Response:
    """Takes text, files and image prompts, as JSON or multipart. The answer means that the
    request is stored for good; follow it at `status_url`."""
    services = services_of(request)
    received = datetime.now(UTC)
    key = key_of(request)
    # What is known under a key may be told to who has nothing left to spend.
    caller = await (payer_of(request) if key is None else caller_of(request))
    hold = services.hold(caller)
    try:
        submission = await read_submission(
            request,
            services.config,
            services.blobs,
            as_job=True,
            digests=key is not None,
            wrapping=Wrapping(wrapped_submission, LONGEST_BYTES),
            hold=hold,
        )
        parent = parent_in(request.scope["headers"])
        job = _new_job(submission, services, received, caller, key, parent)
        if (trail := services.relay.tracing.trail(job.request_id, parent)) is not None:
            request.scope[TRACE_IN_SCOPE] = trail.trace
        taken = await _submitted(job, services, caller)
    finally:
        hold.give_back()
    body = accepted(taken, prefix_of(request)).model_dump_json()
    headers = {REQUEST_ID_HEADER: str(taken.request_id)}
    if isinstance(taken, Earlier):
        headers[REPLAYED_HEADER] = "true"
    return Response(body, 202, headers, media_type="application/json")


async def _submitted(job: NewJob, services: Services, caller: Caller) -> NewJob | Earlier:
    """The job, once it is committed, or the one that was before it under the same key."""
    try:
        check_models(caller, job.model, job.classification, services.config)
        if caller.models is not None and job.endpoint is not None:
            check_body(caller, endpoint_named(job.endpoint), orjson.loads(job.prompt))
        earlier = await services.store.earlier(job)
        if earlier is None:
            if job.endpoint is None:
                targets = services.relay.targets
                check_prompt(targets, job.model, job.classification, services.config)
            await services.budgets.let_in(caller)
            async with services.store.queued.room(caller, jobs=1, size_bytes=_size_of(job)):
                job = await body_apart(job, services.blobs)
                earlier = await services.store.submit(job)
    except (Forbidden, IdempotencyConflict, InvalidRequest, QuotaExceeded):
        await _forget(job, services)
        raise
    if earlier is None:
        return job
    await _forget(job, services)
    return earlier


async def _forget(job: NewJob, services: Services) -> None:
    # What is left behind while the blob store is away goes with the other orphans.
    with suppress(StoreUnavailable):
        await discard(job, services.blobs)


def _size_of(job: NewJob) -> int:
    """What a job adds to the bytes of a tenant's queue, as the store counts them."""
    files = sum(attachment.size_bytes for attachment in job.attachments)
    return len(job.prompt.encode("utf-8", "replace")) + files


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
        endpoint=submission.endpoint,
        traceparent=None if parent is None else parent.text,
    )


def _classified(submission: Submission, services: Services, caller: Caller) -> Classification:
    """The kind as far as it is known. Raises NotFound where nobody serves a native call."""
    if submission.endpoint is None:
        return services.pipeline.first_look(ask_of(submission, caller))
    dialect = dialect_of(submission.endpoint, frozenset(), b"")
    services.relay.targets.of(dialect, submission.model or "")
    return Classification(submission.kind, ClassifiedBy.BODY, submission.endpoint)


@router.get(
    "/status/{request_id}",
    response_model=StatusView,
    response_model_exclude_none=True,
    responses=problem_responses(400, 401, 403, 404, 429, 503) | LIVE,
    summary="Where a request stands, and its answer",
)
async def status(
    request: Request,
    request_id: UUID,
    caller: Reader,
    wait: Annotated[
        float,
        Query(ge=0, le=_MAX_WAIT_S, description="Seconds to wait for the status to change"),
    ] = 0,
) -> StatusView | Response:
    """With `wait`, answers as soon as the status changes or the time is up. A request that has
    ended answers at once. With `Accept: text/event-stream` every change is an event `status`, and
    the last event is `done`; `Last-Event-ID` goes on where a connection was lost."""
    services = services_of(request)
    record = await services.store.get(request_id, caller.tenant_id)
    if wants_events(request):
        return live_status(request, services, record, prefix_of(request), caller)
    if wait and not record.status.is_end:
        with services.openings.long_poll(caller):
            record = await until_changed(request, services, record, wait)
        await caller_of(request, Scope.READ)  # the key may have been revoked meanwhile
    return await charged_view(services, record, prefix_of(request))


@router.get(
    "/files/{file_id}",
    response_class=StreamingResponse,
    responses=problem_responses(400, 401, 403, 404, 503)
    | {200: {"content": {"image/png": {}}, "description": "The file's bytes"}},
    summary="A generated picture or an uploaded file",
)
async def file(request: Request, file_id: UUID, caller: Reader) -> Response:
    """Pictures may be shown in a page; everything else is offered for download."""
    services = services_of(request)
    return await file_response(await services.store.file(file_id, caller.tenant_id), services.blobs)


async def file_response(record: FileRecord, blobs: Blobs) -> Response:
    """The bytes of a file, in a way that no browser runs anything in it. Raises NotFound,
    StoreUnavailable."""
    file_id = record.file_id
    pieces = blobs.stream(record.blob_key)
    try:
        # Before the head goes out: a blob that is gone must not become a broken 200.
        first = await anext(pieces, b"")
    except NotFound:
        raise NotFound(f"the bytes of file {file_id} are not there any more") from None
    inline = record.mime_type in _INLINE_TYPES
    name = quote(record.name or f"{file_id}{_EXTENSIONS.get(record.mime_type, '')}", safe="")
    headers = {
        "Content-Length": str(record.size_bytes),
        "Content-Disposition": f"{'inline' if inline else 'attachment'}; filename*=UTF-8''{name}",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "private, max-age=31536000, immutable",
    }
    body = _after(first, pieces)
    return StreamingResponse(body, headers=headers, media_type=record.mime_type)


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece
