"""`GET /metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from tidegate.http.admin_gate import admit_admin
from tidegate.http.jobs import problem_responses
from tidegate.http.services import services_of

PATH = "/metrics"
router = APIRouter()


@router.get(
    PATH,
    tags=["health"],
    dependencies=[Depends(admit_admin)],
    response_class=Response,
    responses=problem_responses(401, 403)
    | {
        200: {
            "description": "In the text format of Prometheus, or OpenMetrics",
            "content": {"text/plain": {}},
        }
    },
    summary="Metrics for Prometheus",
)
async def metrics(request: Request) -> Response:
    """What this process and its siblings under one supervisor have seen, and the state of all
    limits and queues. Opens as `/admin` does: show ADMIN_TOKEN or a key of the scope `admin`."""
    exposition = services_of(request).exposition
    body, media_type = await exposition.text(request.headers.get("accept", ""))
    return Response(body, media_type=media_type)
