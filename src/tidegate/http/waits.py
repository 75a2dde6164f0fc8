"""`GET /requests/{request_id}/why`: what a request waits for, told to its owner alone."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from tidegate.errors import NotFound
from tidegate.http.caller import Reader
from tidegate.http.jobs import problem_responses
from tidegate.http.services import Services, services_of
from tidegate.limiter import Snapshot
from tidegate.policy.waiting import waiting
from tidegate.store.states import Status

router = APIRouter(tags=["jobs"])


class WhyView(BaseModel):
    """What a request waits for, in words and as values."""

    request_id: str
    status: Status
    sentence: str = Field(description="Reads well after the request's name")
    place: int | None = Field(default=None, description="Place in the queue, 1 is next")
    limit: str | None = Field(default=None, description="The limit that it waits for")
    used: int | None = Field(default=None, description="Of that limit, by all its users together")
    bound: int | None = None
    paused_ms: int | None = Field(default=None, description="How long that limit stays paused")
    retry_in_ms: int | None = Field(default=None, description="Until it is tried again")


@router.get(
    "/requests/{request_id}/why",
    response_model=WhyView,
    response_model_exclude_none=True,
    responses=problem_responses(400, 401, 403, 404, 503),
    summary="What a request waits for",
)
async def why(request: Request, request_id: UUID, caller: Reader) -> WhyView:
    """The limit that holds it up, as it was within the last half second. Streams and native calls
    are on record only once they have ended: `/requests/running` says what they wait for."""
    services = services_of(request)
    record = await services.store.get(request_id, caller.tenant_id)
    found = await services.store.running_calls.whereabouts(request_id)
    if found.tenant_id != caller.tenant_id:
        raise NotFound(f"no request {request_id}")
    snapshot = await _look(services, found.pool) if found.status is Status.QUEUED else None
    reason = waiting(found, snapshot, datetime.now(UTC))
    return WhyView(
        request_id=str(request_id),
        status=found.status,
        sentence=reason.sentence,
        place=record.place,
        limit=reason.limit,
        used=reason.used,
        bound=reason.bound,
        paused_ms=reason.paused_ms,
        retry_in_ms=reason.retry_in_ms,
    )


async def _look(services: Services, pool: str) -> Snapshot | None:
    limiter = services.limiters.get(pool)
    return None if limiter is None else await services.looks.of(limiter)
