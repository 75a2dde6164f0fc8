"""Routes `/admin/batches`: batches of all tenants, their progress, pauses, and results.

Invariants: every route requires an operator; no list contains a body of a line; results are sent as
downloads, so that no browser renders them as a page.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import Path, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, Field

from tidegate.errors import AlreadyEnded, InvalidRequest, NotFound
from tidegate.http.admin.limits import Signed, described, read_json
from tidegate.http.guards import admin_router
from tidegate.http.problems import problem_responses
from tidegate.http.services import services_of
from tidegate.http.views import streamed
from tidegate.store.batches import BatchInList
from tidegate.telemetry.logging import Log, get_logger

log = get_logger()

_MOST = 200
_SHOWN_ERRORS = 5
_ID = re.compile(r"(?:batch_|msgbatch_)(?P<hex>[0-9a-f]{32})")
_ENDED = ("completed", "failed", "expired", "cancelled")

router = admin_router(400, 408, 413, 415, 503, tag="batches")
BatchId = Annotated[str, Path(description="As in the list: batch_... or msgbatch_...")]


class BatchPause(BaseModel):
    """A pause: no line starts until the batch is resumed."""

    at: datetime
    by: str
    reason: str


class BatchOverview(BaseModel):
    """A batch with the progress of its lines."""

    id: str
    tenant: str
    key: str | None = Field(description="The prefix of the API key that created it")
    form: Literal["openai", "anthropic"]
    endpoint: str
    status: str
    pause: BatchPause | None
    is_disabled: bool = Field(description="Its tenant is disabled: no line starts")
    total: int = Field(description="Number of lines; of the file's lines until they are counted")
    completed: int
    failed: int
    claimed: int = Field(description="Lines that wait for admission in a worker")
    calling: int = Field(description="Running lines")
    created_at: datetime
    in_progress_at: datetime | None
    expires_at: datetime
    ended_at: datetime | None
    metadata: dict[str, str] | None
    errors: list[str] = Field(description="Why its file was rejected: the first five errors")
    has_output: bool = Field(description="Whether there is a file of successful lines")
    has_errors: bool = Field(description="Whether there is a file of the other lines")


class BatchPage(BaseModel):
    items: list[BatchOverview]
    next_after: str | None = Field(
        description="Pass it as `after` for the next page; null on the last page"
    )


@router.get("/batches", summary="Batches of all tenants")
async def list_all(
    request: Request,
    tenant: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
    is_open: Annotated[bool, Query(alias="open", description="Only running batches")] = False,
    after: Annotated[str | None, Query(max_length=80, description="An id")] = None,
    limit: Annotated[int, Query(ge=1, le=_MOST)] = 50,
) -> BatchPage:
    """Newest first."""
    found = await services_of(request).store.batches.of_all(
        after=None if after is None else _after(after),
        tenant_id=None if tenant is None else tenant.replace("\0", ""),
        is_open=is_open,
        limit=limit + 1,
    )
    items = [_view(one) for one in found[:limit]]
    return BatchPage(items=items, next_after=items[-1].id if len(found) > limit else None)


@router.post(
    "/batches/{batch_id}/pause",
    responses=problem_responses(404, 409),
    openapi_extra=described(Signed),
    summary="Pause a batch",
)
async def pause(request: Request, batch_id: BatchId) -> BatchOverview:
    """Within two seconds no more lines start in any process. Running lines finish; the 24 hours
    continue to run."""
    signed, store = await read_json(request, Signed), services_of(request).store
    done = await store.batches.pause(_id(batch_id), by=signed.by, reason=signed.reason)
    found = await store.batches.any(_id(batch_id))
    if not done:
        raise AlreadyEnded(f"this batch is {found.batch.status}: it can't be paused any more")
    _note(Log.BATCH_PAUSED, batch_id, signed)
    return _view(found)


@router.post(
    "/batches/{batch_id}/resume",
    responses=problem_responses(404),
    openapi_extra=described(Signed),
    summary="End the pause of a batch",
)
async def resume(request: Request, batch_id: BatchId) -> BatchOverview:
    """A batch that is not paused is not changed."""
    signed, store = await read_json(request, Signed), services_of(request).store
    if await store.batches.resume(_id(batch_id)):
        _note(Log.BATCH_RESUMED, batch_id, signed)
    return _view(await store.batches.any(_id(batch_id)))


@router.post(
    "/batches/{batch_id}/cancel",
    responses=problem_responses(404, 409),
    openapi_extra=described(Signed),
    summary="Cancel a batch of any tenant",
)
async def cancel(request: Request, batch_id: BatchId) -> BatchOverview:
    """Running lines finish, no other starts, and the results so far can be fetched."""
    signed, store = await read_json(request, Signed), services_of(request).store
    found = await store.batches.any(_id(batch_id))
    _, done = await store.batches.cancel(found.batch.batch_id, found.batch.tenant_id)
    if not done:
        raise AlreadyEnded(f"this batch is {found.batch.status}: it can't be cancelled any more")
    _note(Log.BATCH_CANCELLED, batch_id, signed)
    return _view(await store.batches.any(_id(batch_id)))


@router.get(
    "/batches/{batch_id}/results/{which}",
    response_class=StreamingResponse,
    responses=problem_responses(404)
    | {200: {"content": {"application/jsonl": {}}, "description": "A line for each of its lines"}},
    summary="The results of a batch that has ended",
)
async def results(
    request: Request, batch_id: BatchId, which: Literal["output", "errors"]
) -> Response:
    """`output` has the lines that succeeded, `errors` the others."""
    services = services_of(request)
    batch = (await services.store.batches.any(_id(batch_id))).batch
    file_id = batch.output_file_id if which == "output" else batch.error_file_id
    if file_id is None:
        raise NotFound(f"this batch has no {which}")
    file = await services.store.batches.file(file_id, batch.tenant_id)
    headers = {
        "Content-Type": "application/jsonl",
        "Content-Length": str(file.size_bytes),
        "Content-Disposition": f'attachment; filename="{batch_id}-{which}.jsonl"',
    }
    pieces = services.blobs.stream(file.blob_key)
    return await streamed(pieces, headers, f"the {which} of this batch are no longer stored")


def _id(text: str) -> UUID:
    """Return the id of a batch. Raises NotFound for a text that is not an id."""
    found = _ID.fullmatch(text)
    if found is None:
        raise NotFound(f"there is no batch {text[:64]!a}")
    return UUID(hex=found["hex"])


def _after(text: str) -> UUID:
    """Return the id of a cursor. Raises InvalidRequest."""
    found = _ID.fullmatch(text)
    if found is None:
        allowed = "batch_ or msgbatch_ and 32 digits, as in the list"
        raise InvalidRequest(
            "after", f"after: {text[:64]!a} is not the id of a batch", allowed=allowed
        )
    return UUID(hex=found["hex"])


def _note(event: Log, batch_id: str, signed: Signed) -> None:
    log.warning(event, batch=batch_id, by=signed.by, reason=signed.reason)


def _view(one: BatchInList) -> BatchOverview:
    batch = one.batch
    paused = batch.paused_at is not None and batch.status in ("validating", "in_progress")
    return BatchOverview(
        id=f"{'msgbatch' if batch.is_of_messages else 'batch'}_{batch.batch_id.hex}",
        tenant=batch.tenant_id,
        key=batch.key_id,
        form="anthropic" if batch.is_of_messages else "openai",
        endpoint=batch.endpoint,
        status=batch.status,
        pause=BatchPause(
            at=batch.paused_at, by=batch.paused_by or "", reason=batch.pause_reason or ""
        )
        if paused and batch.paused_at is not None
        else None,
        is_disabled=one.is_disabled and batch.key_id is not None,
        total=batch.total,
        completed=batch.completed,
        failed=batch.failed,
        claimed=one.claimed,
        calling=one.calling,
        created_at=batch.times["created_at"],
        in_progress_at=batch.times.get("in_progress_at"),
        expires_at=batch.times["expires_at"],
        ended_at=next(
            (batch.times[f"{how}_at"] for how in _ENDED if f"{how}_at" in batch.times), None
        )
        if batch.status in _ENDED
        else None,
        metadata=batch.metadata,
        errors=[str(error.get("message", "")) for error in (batch.errors or [])[:_SHOWN_ERRORS]],
        has_output=batch.output_file_id is not None,
        has_errors=batch.error_file_id is not None,
    )
