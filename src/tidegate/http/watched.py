"""What a worker answers to those who watch it: its metrics, its state and its health, no calls.

It is ready while it takes jobs. Other than an API it asks the stores: nobody's request meets a
closed door where a worker is taken for sick, and a rollout should not go on with new ones that can
take nothing.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from tidegate.http import health, metrics, problems, process
from tidegate.http.access import AccessLog
from tidegate.http.foreign import NoForeignPages
from tidegate.http.services import Services, services_of

# Less than those who probe wait themselves (deploy/), so that they hear the reason.
DEADLINE_MS = 1_000

readiness = APIRouter()


@readiness.get("/health/ready")
async def ready(request: Request) -> JSONResponse:
    return health.readiness(await _why_not(services_of(request)))


async def _why_not(services: Services) -> str | None:
    """Why this worker takes no jobs; None where it does."""
    if services.leaving.is_set():
        return "draining"
    valkey, postgresql = await asyncio.gather(
        health.probe(services.limiter.ping(DEADLINE_MS), DEADLINE_MS),
        health.probe(services.store.ping(DEADLINE_MS), DEADLINE_MS),
    )
    if postgresql.detail is not None:
        return f"PostgreSQL: {postgresql.detail}"
    if valkey.detail is not None and services.limiter.policy.when_away == "closed":
        return f"Valkey: {valkey.detail}"
    return None if await services.store.schema_fits() else health.UNFIT


def watched_app(services: Services) -> FastAPI:
    """The application of a process that is open already."""
    app = FastAPI(title="Tidegate: a worker", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(readiness)  # goes before the one of `health`, which is an API's
    for room in (health, metrics, process):
        app.include_router(room.router)
    problems.install(app)
    app.add_middleware(NoForeignPages)
    app.add_middleware(AccessLog)
    app.state.services = services
    return app
