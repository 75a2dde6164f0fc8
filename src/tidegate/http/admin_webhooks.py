"""`/admin/webhooks`: what an operator may do for a webhook that did not arrive."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Depends, Request

from tidegate.http.admin import Done
from tidegate.http.admin_gate import admit_admin
from tidegate.http.jobs import problem_responses
from tidegate.http.services import services_of

router = APIRouter(
    prefix="/admin/webhooks",
    tags=["admin"],
    dependencies=[Depends(admit_admin)],
    responses=problem_responses(400, 401, 403, 503),
)


@router.post(
    "/{webhook_id}/redeliver",
    responses=problem_responses(404),
    summary="Deliver a webhook again, whatever became of it",
)
async def redeliver(request: Request, webhook_id: UUID) -> Done:
    """Its id is in the request's status; it is tried at once, and as often as a new one."""
    await services_of(request).store.outbox.redeliver(webhook_id)
    return Done(done=True)
