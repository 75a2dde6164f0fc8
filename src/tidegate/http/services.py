"""What the routes need, in one frozen place; `app.py` fills it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import SecretStr
from starlette.requests import HTTPConnection
from starlette.types import Scope

from tidegate.call import DEFAULT_POOL, Caller
from tidegate.config import Config
from tidegate.http.auth import Gate
from tidegate.http.incoming import Bodies, Hold, Room
from tidegate.http.looks import Looks
from tidegate.http.openings import Openings
from tidegate.http.origins import Origins
from tidegate.limiter import Limiter
from tidegate.metrics.board import Board
from tidegate.metrics.exposition import Exposition
from tidegate.metrics.state import State
from tidegate.metrics.tally import Tally
from tidegate.observed import Observers
from tidegate.pipeline import Pipeline
from tidegate.policy import PolicyKeeper
from tidegate.relay.spine import Relay
from tidegate.relay.under_way import UnderWay
from tidegate.store.blobs import Blobs
from tidegate.store.budgets import BudgetGate
from tidegate.store.store import Store


@dataclass(frozen=True, slots=True)
class Services:
    """`leaving` is set once the process is told to stop: it is not ready any more. `draining` is
    set when it takes no more requests: long polls then answer at once.

    `limiters` and `keepers` are those of every pool; `limiter` and `keeper` of the pool `gemini`.
    `streams` are the tasks that answer streams: they end, and are recorded, before the rest closes.
    `followers` are those that stream the status of a request.
    `observers` are told of every call that has ended, with whatever `observers.listen` was given.
    `under_way` has the streams and native calls of this process, `board` tells the other processes
    of them, and this one of theirs.
    `tally` counts what is answered, `exposition` answers scrapes, and `state` says what this
    process is at.
    """

    config: Config
    observers: Observers
    tally: Tally
    exposition: Exposition
    state: State
    board: Board
    store: Store
    blobs: Blobs
    limiter: Limiter
    pipeline: Pipeline
    keeper: PolicyKeeper
    relay: Relay
    keepers: Mapping[str, PolicyKeeper]
    limiters: Mapping[str, Limiter]
    gate: Gate
    operator_key: SecretStr
    origins: Origins
    budgets: BudgetGate
    openings: Openings = field(default_factory=Openings)
    bodies: Bodies = field(default_factory=Bodies)
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    looks: Looks = field(default_factory=Looks)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    streams: set[asyncio.Task[Any]] = field(default_factory=set)
    followers: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def usual_pool(self) -> str:
        """The pool that a request is about which names none: Gemini's, or the first upstream's."""
        upstreams = self.relay.targets.upstreams
        return DEFAULT_POOL if DEFAULT_POOL in upstreams else next(iter(upstreams))

    def turn_waiters_away(self) -> None:
        """Answer calls that wait for a permit now, with 503, so that their clients ask another
        process; those that have a permit go on."""
        for limiter in self.limiters.values():
            limiter.turn_away()

    def hold(self, caller: Caller) -> Hold:
        """For the body of one more request. Where a caller shows no key its tenant is what it says,
        and a share would bind nobody."""
        config = self.config
        most_bytes = max(config.max_held_bytes, config.max_body_bytes)
        room = Room(most_bytes, config.max_body_bytes, shared=caller.key_id is not None)
        return Hold(self.bodies, room, caller.tenant_id)

    @property
    def under_way(self) -> UnderWay:
        return self.board.under_way


def services_of(connection: HTTPConnection) -> Services:
    return cast(Services, connection.app.state.services)


def services_of_scope(scope: Scope) -> Services:
    return cast(Services, scope["app"].state.services)
