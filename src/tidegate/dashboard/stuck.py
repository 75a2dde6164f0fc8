"""How much waits for a person, which the navigation of every page tells.

Invariant: however many pages ask, PostgreSQL is asked once a second.
"""

from __future__ import annotations

import asyncio
import time

from fastapi import FastAPI
from pydantic import BaseModel

from tidegate.errors import StoreUnavailable
from tidegate.http.services import Services
from tidegate.telemetry import Log, get_logger

FRESH_S = 1.0

log = get_logger()


class Waiting(BaseModel):
    """Both are None while PostgreSQL is away."""

    dead_jobs: int | None = None
    webhooks_given_up: int | None = None


class Stuck:
    """One per API process: see `stuck_of`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._found = (float("-inf"), Waiting())
        self._looking = asyncio.Lock()

    async def waiting(self) -> Waiting:
        async with self._looking:
            at, found = self._found
            if time.monotonic() - at > FRESH_S:
                found = await self._look()
                self._found = (time.monotonic(), found)
            return found

    async def _look(self) -> Waiting:
        try:
            jobs, webhooks = await self._services.store.stuck.counts()
        except StoreUnavailable as away:
            log.debug(Log.STORE_AWAY, detail=away.message)
            return Waiting()
        return Waiting(dead_jobs=jobs, webhooks_given_up=webhooks)


def stuck_of(app: FastAPI) -> Stuck:
    """That of a running application; made when it is first asked."""
    stuck: Stuck | None = getattr(app.state, "dashboard_stuck", None)
    if stuck is None:
        stuck = app.state.dashboard_stuck = Stuck(app.state.services)
    return stuck
