"""Taking jobs in: many in one commit, and at most one under an idempotency key.

Invariant: a key names one request of its tenant for as long as that request is kept, however many
processes are handed it at once; a key that is taken harms no other job of the same commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import asyncpg

from tidegate.errors import IdempotencyConflict, StoreUnavailable
from tidegate.store import rows
from tidegate.store.bell import UNSURE, Bell
from tidegate.store.connection import Connections
from tidegate.store.queries import sql
from tidegate.store.records import Earlier, NewJob
from tidegate.store.writer import GroupWriter

TIMEOUT_MS = 2_000

Outcome = Earlier | Exception | None
_Keyed = dict[tuple[str, str], asyncpg.Record]


class Submits:
    """Submits at the same time share one transaction."""

    def __init__(self, connections: Connections, bell: Bell) -> None:
        self._connections = connections
        self._bell = bell
        self._writer: GroupWriter[NewJob, Earlier | None] = GroupWriter(
            self._insert, lambda job: 1_000 + len(job.prompt)
        )

    async def submit(self, job: NewJob) -> Earlier | None:
        """See `Store.submit`."""
        try:
            async with asyncio.timeout(TIMEOUT_MS / 1000 + 0.5):
                return await self._writer.write(job)
        except TimeoutError:
            raise StoreUnavailable("PostgreSQL did not commit the job in time") from None

    async def earlier(self, job: NewJob) -> Earlier | None:
        """The request that has the job's key already. Raises IdempotencyConflict where it asked for
        something else, and StoreUnavailable."""
        if job.once is None:
            return None

        async def find(connection: asyncpg.Connection) -> _Keyed:
            return await _find(connection, [job])

        found = await self._connections.run(find, timeout_ms=TIMEOUT_MS)
        outcome = _outcome(job, found) if found else None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _insert(self, jobs: Sequence[NewJob]) -> list[Outcome]:
        # Two processes that insert the same keys wait for one another: in one order, lest they
        # wait in a circle.
        keyed = sorted((job for job in jobs if job.once is not None), key=_place)
        plain = [job for job in jobs if job.once is None]
        requests = rows.dumps(rows.job_row(job) for job in [*plain, *keyed])

        async def insert(connection: asyncpg.Connection) -> _Keyed:
            await connection.execute(sql("submit_requests"), requests)
            # A statement of its own: it sees what the other process has just committed.
            found = await _find(connection, keyed) if keyed else {}
            files = [file for job in jobs if _is_new(job, found) for file in rows.input_rows(job)]
            if files:
                await connection.execute(sql("add_files"), rows.dumps(files))
            return found

        found = await self._connections.run(insert, timeout_ms=TIMEOUT_MS)
        for lane, pools in _lanes(job for job in jobs if _is_new(job, found)).items():
            self._bell.work(pools, [lane])
        return [_outcome(job, found) for job in jobs]


async def _find(connection: asyncpg.Connection, keyed: Sequence[NewJob]) -> _Keyed:
    keys = [
        {"tenant_id": tenant_id, "idempotency_key": key} for tenant_id, key in map(_place, keyed)
    ]
    found = await connection.fetch(sql("get_keyed"), rows.dumps(keys))
    return {(row["tenant_id"], row["idempotency_key"]): row for row in found}


def _place(job: NewJob) -> tuple[str, str]:
    """Where the unique index has the job's key."""
    assert job.once is not None
    return rows.clean(job.tenant_id), rows.clean(job.once.key)


def _lanes(jobs: Iterable[NewJob]) -> dict[str, set[str]]:
    """The pools that have work in each lane."""
    lanes: dict[str, set[str]] = {}
    for job in jobs:
        lanes.setdefault(job.classification.kind or UNSURE, set()).add(job.pool)
    return lanes


def _is_new(job: NewJob, found: _Keyed) -> bool:
    if job.once is None:
        return True
    row = found.get(_place(job))
    return row is not None and row["id"] == job.request_id


def _outcome(job: NewJob, found: _Keyed) -> Outcome:
    if _is_new(job, found):
        return None
    assert job.once is not None
    row = found.get(_place(job))
    if row is None:  # the earlier one's time was up between the two statements
        return StoreUnavailable("the key was just set free; ask again")
    if row["digest"] != job.once.digest:
        return IdempotencyConflict("this key was used before, for a different request")
    return rows.earlier(row)
