"""`/admin/dead` and the list of webhooks given up: what waits for an operator's decision."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request

from tidegate.http.admin import Done
from tidegate.http.admin_gate import admit_admin
from tidegate.http.jobs import problem_responses
from tidegate.http.services import services_of
from tidegate.store.stuck import DeadJob, GivenUpWebhook
from tidegate.telemetry import Log, get_logger

router = APIRouter(
    prefix="/admin",
    tags=["admin"],
    dependencies=[Depends(admit_admin)],
    responses=problem_responses(400, 401, 403, 503),
)
Most = Annotated[int, Query(ge=1, le=1_000)]

log = get_logger()


@router.get("/dead", summary="Jobs that killed their workers three times, of all tenants")
async def dead(request: Request, most: Most = 100) -> list[DeadJob]:
    return await services_of(request).store.stuck.dead(most)


@router.post(
    "/dead/{request_id}/requeue",
    responses=problem_responses(404),
    summary="Give a dead job a fresh start",
)
async def requeue(request: Request, request_id: UUID) -> Done:
    await services_of(request).store.stuck.requeue(request_id)
    log.warning(Log.JOB_REQUEUED, request_id=str(request_id))
    return Done(done=True)


@router.post(
    "/dead/{request_id}/discard",
    responses=problem_responses(404),
    summary="Leave a dead job at that: it is cancelled, for good",
)
async def discard(request: Request, request_id: UUID) -> Done:
    await services_of(request).store.stuck.discard(request_id)
    log.warning(Log.JOB_DISCARDED, request_id=str(request_id))
    return Done(done=True)


@router.get("/webhooks", summary="Webhooks that were given up, of all tenants")
async def given_up(request: Request, most: Most = 100) -> list[GivenUpWebhook]:
    """`POST /admin/webhooks/{webhook_id}/redeliver` has one delivered again."""
    return await services_of(request).store.stuck.given_up(most)
