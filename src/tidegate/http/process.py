"""`GET /admin/process`: what the process that answers is at, whatever the stores do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from tidegate.http.admin_gate import admit_admin
from tidegate.http.jobs import problem_responses
from tidegate.http.services import services_of

router = APIRouter(
    prefix="/admin",
    tags=["admin"],
    dependencies=[Depends(admit_admin)],
    responses=problem_responses(401, 403),
)


@router.get("/process", summary="What the process that answers is at")
async def process(request: Request) -> dict[str, Any]:
    """Its permits and waiters, its sessions, its tasks and memory, what went wrong lately. Asks
    neither Valkey nor PostgreSQL. SIGQUIT puts the same into the log of a process."""
    services = services_of(request)
    return {"draining": services.draining.is_set(), **services.state.shown()}
