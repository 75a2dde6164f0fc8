"""Routes of health, `/metrics` and `/admin/process`.

Readiness does not depend on Valkey or PostgreSQL: if it did, an outage of either would take every
process out of the balancer, and none could answer 503 or use its local share.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.responses import Response

from tidegate.errors import TidegateError
from tidegate.http.guards import admin_router, admit_admin, is_admitted
from tidegate.http.problems import problem_responses
from tidegate.http.services import Services, services_of

UNFIT = "the database's schema does not fit this version, or was never seen"
_DEADLINE_MS = 2_000

router = APIRouter(tags=["health"])
process_router = admin_router()


class Liveness(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """`reason` says why a process takes no traffic."""

    status: Literal["ready", "not_ready"]
    reason: str | None = None


class Dependency(BaseModel):
    status: Literal["ok", "failed"]
    took_ms: float
    detail: str | None = None


class UpstreamHealth(BaseModel):
    """How native calls of this process find an upstream: `ok`, `out` after some faults in a row, or
    `trying` again. `key_refused`: it takes our key for wrong. `detail` is the last fault,
    without the provider's own words: they may be about somebody's request."""

    status: Literal["ok", "out", "trying"]
    key_refused: bool = False
    detail: str | None = None


class Dependencies(BaseModel):
    status: Literal["ok", "failed"]
    valkey: Dependency
    postgresql: Dependency
    blobs: Dependency
    limiter: str
    upstreams: dict[str, UpstreamHealth] | None = Field(
        default=None, description="Only for who shows the operator's key or an admin key"
    )


@router.get("/health/live", response_model=Liveness, summary="The process runs")
async def live() -> Liveness:
    return Liveness()


@router.get(
    "/health/ready",
    response_model=Readiness,
    response_model_exclude_none=True,
    responses={503: {"model": Readiness}},
    summary="The process takes traffic",
)
async def ready(request: Request) -> JSONResponse:
    services = services_of(request)
    reason = None
    if services.draining.is_set():
        reason = "draining"
    elif services.leaving.is_set():
        reason = "leaving"
    elif not await services.store.schema_fits():
        reason = UNFIT
    return readiness(reason)


def readiness(reason: str | None) -> JSONResponse:
    """Ready, unless there is a reason why not."""
    body = Readiness(status="not_ready" if reason else "ready", reason=reason)
    return JSONResponse(body.model_dump(exclude_none=True), 503 if reason else 200)


@router.get(
    "/health/dependencies",
    response_model=Dependencies,
    responses={503: {"model": Dependencies}},
    summary="Valkey, PostgreSQL and the store of files, asked now, with a deadline",
)
async def dependencies(request: Request) -> JSONResponse:
    services = services_of(request)
    valkey, postgresql, blobs = await asyncio.gather(
        probe(services.limiter.ping(_DEADLINE_MS)),
        probe(services.store.connections.ping(_DEADLINE_MS)),
        probe(services.blobs.ping()),
    )
    failed = "failed" in (valkey.status, postgresql.status, blobs.status)
    body = Dependencies(
        status="failed" if failed else "ok",
        valkey=valkey,
        postgresql=postgresql,
        blobs=blobs,
        limiter=services.limiter.state,
        upstreams=_upstreams(services) if await is_admitted(request) else None,
    )
    shown = body.model_dump(exclude={"upstreams"} if body.upstreams is None else None)
    return JSONResponse(shown, 503 if failed else 200)


def _upstreams(services: Services) -> dict[str, UpstreamHealth]:
    return {
        name: UpstreamHealth(
            status=health.state, key_refused=health.key_dead, detail=health.in_short or None
        )
        for name, health in services.spine.health.items()
    }


async def probe(ping: Awaitable[None], deadline_ms: int = _DEADLINE_MS) -> Dependency:
    """Whether it answers in time, and what is wrong where it does not."""
    started = time.monotonic()
    detail = None
    try:
        async with asyncio.timeout(deadline_ms / 1000):
            await ping
    except TidegateError as error:
        detail = error.message
    except TimeoutError:
        detail = f"no answer within {deadline_ms} ms"
    took_ms = round((time.monotonic() - started) * 1000, 1)
    return Dependency(status="failed" if detail else "ok", took_ms=took_ms, detail=detail)


@router.get(
    "/metrics",
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


@process_router.get("/process", summary="What the process that answers is at")
async def process(request: Request) -> dict[str, Any]:
    """Its permits and waiters, its sessions, its tasks and memory, what went wrong lately. Asks
    neither Valkey nor PostgreSQL. SIGQUIT puts the same into the log of a process."""
    services = services_of(request)
    return {"draining": services.draining.is_set(), **services.state.shown()}
