"""`/admin/requests`: an operator finds a request of any tenant, sees its whole life, and acts.

Invariant: every route is behind `admit_admin`; bodies and files are sent as data, whatever they
say they are; what is done to a request leaves a line in the log that says who did it and why.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from fastapi import Query as FromQuery
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from tidegate.call import Kind
from tidegate.errors import (
    InvalidRequest,
    LimiterUnavailable,
    NotFound,
)
from tidegate.http.admin import Signed, control_in
from tidegate.http.admin_body import described, read_json
from tidegate.http.admin_gate import admit_admin
from tidegate.http.admin_request_views import (
    AdminPage,
    RequestView,
    Source,
    admin_item,
    request_view,
)
from tidegate.http.jobs import file_response, prefix_of, problem_responses
from tidegate.http.recorded import BODY_RESPONSES, body_response
from tidegate.http.requests import ended_by, in_utc
from tidegate.http.services import Services, services_of
from tidegate.http.views import Accepted, StatusView, accepted
from tidegate.policy.why import Reason, why
from tidegate.store.copies import copy_of
from tidegate.store.dossier import Dossier
from tidegate.store.recorded import Role
from tidegate.store.search import END, Wanted
from tidegate.store.states import Status
from tidegate.telemetry import Log, get_logger

_PREFIX = re.compile(r"[0-9a-fA-F]{1,32}")
_TEXT = Field(default=None, min_length=1, max_length=200)

log = get_logger()
router = APIRouter(
    prefix="/admin/requests",
    tags=["admin"],
    dependencies=[Depends(admit_admin)],
    responses=problem_responses(400, 401, 403, 503),
)


class Query(BaseModel):
    """Which requests to list; what is left out means all."""

    model_config = ConfigDict(extra="forbid")

    status: list[Status] = Field(default=[], max_length=10, description="One or several")
    tenant: str | None = _TEXT
    model: str | None = Field(default=None, min_length=1, max_length=128, description="Its name")
    type: Kind | None = None
    source: Source | None = None
    error_code: str | None = Field(default=None, min_length=1, max_length=100)
    subject: str | None = _TEXT
    id: str | None = Field(
        default=None, max_length=36, description="How its id begins, with dashes or without"
    )
    since: datetime | None = Field(
        default=None, description="The earliest time of submission; without a zone it is in UTC"
    )
    until: datetime | None = Field(
        default=None, description="The first time of submission that is too late"
    )
    limit: int = Field(default=50, ge=1, le=200)
    cursor: UUID | None = Field(default=None, description="`next_cursor` of the page before")

    def wanted(self) -> Wanted:
        return Wanted(
            statuses=frozenset(self.status),
            tenant_id=self.tenant,
            model=self.model,
            kind=self.type,
            source=self.source,
            failure_code=self.error_code,
            subject=self.subject,
            prefix=_prefix_in(self.id or ""),
            since=in_utc("since", self.since),
            until=in_utc("until", self.until),
        )


@router.get(
    "",
    response_model_exclude_none=True,
    summary="Requests of all tenants, newest first",
)
async def found(request: Request, query: Annotated[Query, FromQuery()]) -> AdminPage:
    """Jobs, streams and native calls that have ended, and lines of batches that a worker has now or
    that have ended. Go on with `cursor` until there is no `next_cursor`: each page looks at 20,000
    requests at most, so it may hold fewer than `limit`, even none, while there are more."""
    search = services_of(request).store.search
    page = await search.page(query.wanted(), query.limit, query.cursor or END)
    return AdminPage(
        items=[admin_item(item) for item in page.items],
        next_cursor=None if page.before is None else str(page.before),
    )


@router.get(
    "/{request_id}",
    response_model_exclude_none=True,
    responses=problem_responses(404),
    summary="All that is on record of one request, and what it waits for",
)
async def one(request: Request, request_id: UUID) -> RequestView:
    """Its life as a timeline, with each attempt and webhook. `waiting` says why it has not ended;
    it is not there while Valkey is away."""
    services = services_of(request)
    dossier = await services.store.dossiers.of(request_id)
    waiting = await _waiting(services, dossier)
    return request_view(dossier, waiting, datetime.now(UTC), prefix_of(request))


@router.get(
    "/{request_id}/request",
    response_class=StreamingResponse,
    responses=BODY_RESPONSES,
    summary="What was asked, as it is in the record",
)
async def asked(request: Request, request_id: UUID) -> Response:
    """Once the request has ended."""
    return await _body(request, request_id, "request")


@router.get(
    "/{request_id}/response",
    response_class=StreamingResponse,
    responses=BODY_RESPONSES,
    summary="What was answered, as it is in the record",
)
async def answered(request: Request, request_id: UUID) -> Response:
    """Once the request has ended."""
    return await _body(request, request_id, "response")


@router.get(
    "/{request_id}/files/{file_id}",
    response_class=StreamingResponse,
    responses=problem_responses(404)
    | {200: {"content": {"image/png": {}}, "description": "The file's bytes"}},
    summary="A picture or file of a request",
)
async def file(request: Request, request_id: UUID, file_id: UUID) -> Response:
    """Pictures may be shown in a page; everything else is offered for download."""
    services = services_of(request)
    return await file_response(
        await services.store.dossiers.file(request_id, file_id), services.blobs
    )


@router.post(
    "/{request_id}/cancel",
    response_model=StatusView,
    response_model_exclude_none=True,
    responses=problem_responses(404, 408, 409, 413, 415)
    | {202: {"model": StatusView, "description": "The worker that runs it has been told"}},
    openapi_extra=described(Signed),
    summary="Cancel a job of any tenant",
)
async def cancel(request: Request, request_id: UUID) -> Response:
    """As its owner may, by `DELETE /requests/{request_id}`."""
    signed = await read_json(request, Signed)
    dossier = await services_of(request).store.dossiers.of(request_id)
    answer = await ended_by(request, request_id, dossier.record.tenant_id)
    _log(Log.REQUEST_CANCELLED, request_id, signed)
    return answer


@router.post(
    "/{request_id}/retry",
    status_code=202,
    responses=problem_responses(404, 408, 409, 413, 415),
    openapi_extra=described(Signed),
    summary="Hand a job that has ended in anew, as a job of its own",
)
async def retry(request: Request, request_id: UUID) -> Accepted:
    """The same prompt and files, for the same tenant, whatever its caps and budgets are: they count
    it, but do not refuse it. The first job stays as it is."""
    signed = await read_json(request, Signed)
    services = services_of(request)
    job = await copy_of(await services.store.dossiers.of(request_id), services.blobs)
    await services.store.submit(job)
    _log(Log.REQUEST_RETRIED, request_id, signed, anew=str(job.request_id))
    return accepted(job, prefix_of(request))


async def _waiting(services: Services, dossier: Dossier) -> Reason | None:
    """Of a job, what `tidegate why` says of it."""
    record = dossier.record
    if record.status.is_end or record.source != "job" or dossier.pool not in services.limiters:
        return None
    try:
        return await why(control_in(services, dossier.pool), str(record.request_id))
    except (LimiterUnavailable, NotFound) as missing:
        log.debug(Log.STORE_AWAY, detail=missing.message)
        return None


async def _body(request: Request, request_id: UUID, role: Role) -> Response:
    body = await services_of(request).store.recorded.body_of_any(request_id, role)
    return await body_response(body, request_id, role)


def _prefix_in(shown: str) -> str:
    digits = shown.strip().replace("-", "")
    if digits and _PREFIX.fullmatch(digits) is None:
        raise InvalidRequest("id", "that is no beginning of an id", allowed="hexadecimal digits")
    return digits.lower()


def _log(event: Log, request_id: UUID, signed: Signed, **more: str) -> None:
    log.warning(event, request_id=str(request_id), by=signed.by, reason=signed.reason, **more)
