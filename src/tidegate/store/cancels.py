"""Ending jobs for their owners, before they have come to their own end.

Invariant: once `cancel` has returned, no new upstream call is made for the job. A queued one is
ended here and now; a running one by the worker that has it, and if that worker dies, or the job
comes back into the queue by whatever way, by the next one that looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import asdict
from uuid import UUID

import asyncpg
import orjson

from tidegate.errors import AlreadyEnded, NotFound, RequestCancelled
from tidegate.observed import Observers
from tidegate.store.bell import Bell
from tidegate.store.connection import Connections
from tidegate.store.observing import of_row
from tidegate.store.queries import sql
from tidegate.store.recorder import audit_unanswered
from tidegate.store.records import Failure
from tidegate.store.states import Status

CANCELLED = RequestCancelled("its owner cancelled it")
_FAILURE = asdict(Failure.of(CANCELLED))
_TIMEOUT_MS = 2_000


class Cancels:
    """Both sides of it: the owner's and the worker's. Every method raises StoreUnavailable."""

    def __init__(
        self, connections: Connections, bell: Bell, observers: Observers, *, instance_id: str
    ) -> None:
        self._observers = observers
        self._connections = connections
        self._bell = bell
        self._instance_id = instance_id
        self._heard: set[UUID] = set()
        self._rung = asyncio.Event()
        bell.on_cancel = self._on_cancel

    async def cancel(self, request_id: UUID, tenant_id: str) -> Status:
        """End a job, or ask the worker that runs it to; returns what the job was before.

        Raises NotFound, or AlreadyEnded unless it is cancelled already.
        """

        ended: list[asyncpg.Record] = []

        async def cancel(connection: asyncpg.Connection) -> asyncpg.Record | None:
            nonlocal ended
            ended = []
            found = await connection.fetchrow(sql("lock_owned"), request_id, tenant_id)
            if found is None:
                return None
            if found["status"] == Status.QUEUED:
                failure = orjson.dumps(_FAILURE).decode()
                ended = await connection.fetch(sql("cancel_queued"), request_id, failure)
                await audit_unanswered(connection, ended, _FAILURE, self._instance_id)
            elif found["status"] == Status.RUNNING:
                await connection.execute(sql("ask_to_cancel"), request_id)
            return found

        found = await self._connections.run(cancel, timeout_ms=_TIMEOUT_MS)
        if found is None:
            raise NotFound(f"no request {request_id}")
        self._observers.tell([of_row(row, _FAILURE) for row in ended])
        before = Status(found["status"])
        if before.is_end and before is not Status.CANCELLED:
            raise AlreadyEnded(f"the request has ended: {before}")
        if before is Status.QUEUED:
            self._bell.changed([request_id])
        if found["claimed_by"] is not None:
            self._bell.cancel([request_id])
        return before

    async def wait(self, timeout_ms: int) -> set[UUID]:
        """Return when somebody asks for the end of a job, or after the time: the jobs heard of.

        Only a hint, of all workers' jobs; `asked` knows.
        """
        self._bell.hear()
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await self._rung.wait()
        except TimeoutError:
            pass
        self._rung.clear()
        heard, self._heard = self._heard, set()
        return heard

    async def asked(self, heard: Iterable[UUID]) -> set[UUID]:
        """Which jobs this worker is to give up; of its waiting ones only those that were `heard`.

        Waiting ones hold no permit, and are told at the latest when they are admitted.
        """

        async def read(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            rows: list[asyncpg.Record] = await connection.fetch(
                sql("asked_of_worker"), self._instance_id, list(heard)
            )
            return rows

        return {UUID(int=row["id"].int) for row in await self._connections.run(read)}

    async def cancel_returned(self) -> int:
        """End jobs that are in the queue again though their end was asked for, at most 500."""

        async def cancel(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            failure = orjson.dumps(_FAILURE).decode()
            ended: list[asyncpg.Record] = await connection.fetch(sql("cancel_returned"), failure)
            await audit_unanswered(connection, ended, _FAILURE, self._instance_id)
            return ended

        ended = await self._connections.run(cancel)
        self._observers.tell([of_row(row, _FAILURE) for row in ended])
        self._bell.changed(UUID(int=row["id"].int) for row in ended)
        return len(ended)

    def _on_cancel(self, ids: Iterable[UUID]) -> None:
        self._heard.update(ids)
        self._rung.set()
