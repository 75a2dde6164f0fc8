"""What the routes need, in one frozen place; `app.py` fills it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.requests import HTTPConnection

from tidegate.config import Config
from tidegate.http.auth import Gate
from tidegate.http.budgets import BudgetGate
from tidegate.http.openings import Openings
from tidegate.limiter import Limiter
from tidegate.pipeline import Pipeline
from tidegate.policy import PolicyKeeper
from tidegate.relay.spine import Relay
from tidegate.store.blobs import Blobs
from tidegate.store.store import Store


@dataclass(frozen=True, slots=True)
class Services:
    """`draining` is set once the process is told to stop: long polls then answer at once.

    `limiters` and `keepers` are those of every pool; `limiter` and `keeper` of the pool `gemini`.
    `streams` are the tasks that answer streams: they end, and are recorded, before the rest closes.
    `followers` are those that stream the status of a request.
    """

    config: Config
    store: Store
    blobs: Blobs
    limiter: Limiter
    pipeline: Pipeline
    keeper: PolicyKeeper
    relay: Relay
    keepers: Mapping[str, PolicyKeeper]
    limiters: Mapping[str, Limiter]
    gate: Gate
    budgets: BudgetGate
    openings: Openings = field(default_factory=Openings)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    streams: set[asyncio.Task[Any]] = field(default_factory=set)
    followers: set[asyncio.Task[Any]] = field(default_factory=set)


def services_of(connection: HTTPConnection) -> Services:
    return cast(Services, connection.app.state.services)
