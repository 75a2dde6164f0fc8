"""`DELETE /requests/{request_id}`.

Invariant: a caller sees and ends nobody's requests but its own.
"""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tidegate.call import DEFAULT_TENANT
from tidegate.errors import AlreadyEnded
from tidegate.http.following import until_changed
from tidegate.http.jobs import prefix_of, problem_responses
from tidegate.http.problems import REQUEST_ID_HEADER
from tidegate.http.services import services_of
from tidegate.http.views import StatusView, status_view
from tidegate.store.states import Status

_CONFIRMED_WITHIN_S = 2.0

router = APIRouter(tags=["jobs"])


@router.delete(
    "/requests/{request_id}",
    response_model=StatusView,
    response_model_exclude_none=True,
    responses=problem_responses(400, 404, 409, 503)
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
    services, tenant_id = services_of(request), DEFAULT_TENANT
    before = await services.store.cancels.cancel(request_id, tenant_id)
    record = await services.store.get(request_id, tenant_id)
    if before is Status.RUNNING and record.status is Status.RUNNING:
        record = await until_changed(request, services, record, _CONFIRMED_WITHIN_S)
    if record.status.is_end and record.status is not Status.CANCELLED:
        raise AlreadyEnded(f"the request has ended: {record.status}")
    view = status_view(record, prefix_of(request))
    return Response(
        view.model_dump_json(exclude_none=True),
        200 if record.status.is_end else 202,
        {REQUEST_ID_HEADER: str(request_id)},
        media_type="application/json",
    )
