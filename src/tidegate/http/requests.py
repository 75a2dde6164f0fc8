"""`GET /requests` and `DELETE /requests/{request_id}`.

Invariant: a caller sees and ends nobody's requests but its own.
"""

from __future__ import annotations

import struct
from base64 import b64decode, urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi import Query as FromQuery
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from tidegate.call import Kind
from tidegate.errors import AlreadyEnded, InvalidRequest
from tidegate.http.admin_gate import RecordReader
from tidegate.http.caller import caller_of
from tidegate.http.charged import charged_view
from tidegate.http.following import until_changed
from tidegate.http.jobs import prefix_of, problem_responses
from tidegate.http.problems import REQUEST_ID_HEADER
from tidegate.http.services import services_of
from tidegate.http.views import RequestPage, StatusView, item_view
from tidegate.store.listing import START, Filter, Place
from tidegate.store.states import Status

_CONFIRMED_WITHIN_S = 2.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_CURSOR = struct.Struct("!q16s")

router = APIRouter(tags=["jobs"])


class Query(BaseModel):
    """Which of the caller's requests to list."""

    model_config = ConfigDict(extra="forbid")

    status: Status | None = None
    type: Kind | None = None
    model: str | None = Field(default=None, min_length=1, max_length=128, description="Its name")
    source: Literal["job", "stream", "relay"] | None = None
    since: datetime | None = Field(
        default=None, description="The earliest time of submission; without a zone it is in UTC"
    )
    until: datetime | None = Field(
        default=None, description="The first time of submission that is too late"
    )
    limit: int = Field(default=50, ge=1, le=200)
    cursor: str | None = Field(
        default=None, max_length=100, description="`next_cursor` of the page before"
    )

    def filter(self) -> Filter:
        return Filter(
            status=self.status,
            kind=self.type,
            model=self.model,
            source=self.source,
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
    request: Request, caller: RecordReader, query: Annotated[Query, FromQuery()]
) -> RequestPage:
    """Jobs, and streams and native calls that have ended (those under way are at
    `/requests/running`), without their texts. Go on with `cursor` until there is
    no `next_cursor`: a page may hold fewer than `limit`, even none, while there are more. What is
    submitted meanwhile does not move the pages."""
    place = START if query.cursor is None else _place_of(query.cursor)
    page = await services_of(request).store.listing.page(
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
            "description": "The worker that runs it has been told, and has not said yet that it "
            "has stopped",
        }
    },
    summary="Cancel a request that is queued or running",
)
async def cancel(request: Request, request_id: UUID) -> Response:
    """A queued request is ended at once; of a running one the call to the provider is closed, and
    what had come is kept. Cancelling again changes nothing. What has ended otherwise is 409."""
    caller = await caller_of(request)
    return await ended_by(request, request_id, caller.tenant_id)


async def ended_by(request: Request, request_id: UUID, tenant_id: str) -> Response:
    """Cancel it for its owner; the answer says how it stands then, 202 while it still ends."""
    services = services_of(request)
    before = await services.store.cancels.cancel(request_id, tenant_id)
    record = await services.store.get(request_id, tenant_id)
    if before is Status.RUNNING and record.status is Status.RUNNING:
        record = await until_changed(request, services, record, _CONFIRMED_WITHIN_S)
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
    """A time that came in `field`, one without a zone being in UTC. Raises InvalidRequest."""
    if time is None or time.tzinfo is None:
        return None if time is None else time.replace(tzinfo=UTC)
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise InvalidRequest(field, f"{field} is out of range") from None


def _cursor_of(place: Place) -> str:
    since = place.created_at - _EPOCH
    raw = _CURSOR.pack(since // _MICROSECOND, place.request_id.bytes)
    return urlsafe_b64encode(raw).decode()


def _place_of(cursor: str) -> Place:
    try:
        microseconds, raw = _CURSOR.unpack(b64decode(cursor, altchars=b"-_", validate=True))
        return Place(_EPOCH + microseconds * _MICROSECOND, UUID(bytes=raw))
    except (ValueError, OverflowError, struct.error):
        raise InvalidRequest(
            "cursor", "this is not a cursor", allowed="the `next_cursor` of a page"
        ) from None
