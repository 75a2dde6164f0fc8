"""How much each tenant has queued, kept below its caps over all processes.

A tenant with a cap has one row that says what was queued when it was last counted and what was let
in since. Letting in adds to it under the row's lock; nobody takes away what has left the queue.
When the row says full it is counted again, at most every half second and a twentieth of the time.

Invariant: room is never given twice, so a cap is kept whatever the number of processes, but for
jobs that another process is committing in the very moment of a count. What has left the queue may
be noticed as late as the next count: then a job is refused that would have had room. Counted are
jobs that are ready to be taken up, not those that a worker has or that wait for their next try; and
lines of batches until they have ended, each as if it had an even part of the bytes of its batch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg

from tidegate.call import DEFAULT_POOL, Caller, Caps, Kind
from tidegate.errors import QuotaExceeded
from tidegate.store.connection import Connections
from tidegate.store.queries import sql
from tidegate.store.writer import GroupWriter

_TIMEOUT_MS = 2_000
_COUNT_EVERY_MS = 500
_COUNT_SHARE = 20
_COUNT_AFTER_MS = 3_600_000  # whatever it says; a row that was just made is older
_MOST_COUNTED = 1_000_000  # in each lane
_UNKNOWN = -1
_RETRY_AFTER_MS = 1_000
_MOST_WRITERS = 1_000
_LANES = [*(kind.value for kind in Kind), "unsure"]


@dataclass(frozen=True, slots=True)
class _Wanted:
    tenant_id: str
    caps: Caps
    jobs: int
    size_bytes: int


@dataclass(slots=True)
class _Room:
    """What is queued, and how long ago and with what effort that was counted.

    `size_bytes` is below zero while it is not known: it is only counted for those who need it.
    """

    jobs: int
    size_bytes: int
    age_ms: float
    count_ms: float

    def is_doubtful(self, caps: Caps) -> bool:
        unknown = caps.most_queued_bytes is not None and self.size_bytes < 0
        return unknown or self.age_ms > _COUNT_AFTER_MS

    @property
    def may_count(self) -> bool:
        return self.age_ms >= max(_COUNT_EVERY_MS, _COUNT_SHARE * self.count_ms)

    def take(self, one: _Wanted) -> None:
        self.jobs += one.jobs
        if self.size_bytes >= 0:
            self.size_bytes += one.size_bytes

    def refusal(self, one: _Wanted) -> QuotaExceeded | None:
        caps = one.caps
        if caps.most_queued_jobs is not None and self.jobs + one.jobs > caps.most_queued_jobs:
            return _refused(one, "most_queued_jobs", f"{caps.most_queued_jobs} queued jobs")
        most_bytes = caps.most_queued_bytes
        if most_bytes is not None and self.size_bytes + one.size_bytes > most_bytes:
            return _refused(one, "most_queued_bytes", f"{most_bytes} bytes of queued jobs")
        return None


class Queued:
    """Where jobs are let into the queue; nothing is asked of tenants without such caps."""

    def __init__(self, connections: Connections, pool: str = DEFAULT_POOL) -> None:
        self._connections = connections
        self._pool = pool
        self._writers: dict[str, GroupWriter[_Wanted, None]] = {}
        self._submitting: Counter[str] = Counter()
        self._submitting_bytes: Counter[str] = Counter()

    @asynccontextmanager
    async def room(self, caller: Caller, *, jobs: int, size_bytes: int) -> AsyncIterator[None]:
        """Submit inside of the block. Raises QuotaExceeded and StoreUnavailable before it."""
        if not caller.caps.on_queue:
            yield
            return
        tenant = caller.tenant_id
        await self._writer(tenant).write(_Wanted(tenant, caller.caps, jobs, size_bytes))
        self._submitting[tenant] += jobs
        self._submitting_bytes[tenant] += size_bytes
        try:
            yield
        finally:
            self._submitting[tenant] -= jobs
            self._submitting_bytes[tenant] -= size_bytes
            if not self._submitting[tenant]:
                del self._submitting[tenant], self._submitting_bytes[tenant]

    def _writer(self, tenant: str) -> GroupWriter[_Wanted, None]:
        """One for each tenant: counting the long queue of one holds up nobody else."""
        writer = self._writers.get(tenant)
        if writer is None:
            if len(self._writers) >= _MOST_WRITERS:
                self._writers = {name: one for name, one in self._writers.items() if one.waiting}
            writer = self._writers[tenant] = GroupWriter(self._let_in, lambda _one: 1)
        return writer

    async def _let_in(self, batch: Sequence[_Wanted]) -> Sequence[Exception | None]:
        async def work(connection: asyncpg.Connection) -> list[QuotaExceeded | None]:
            return await self._decide(connection, batch)

        return await self._connections.run(work, timeout_ms=_TIMEOUT_MS)

    async def _decide(
        self, connection: asyncpg.Connection, batch: Sequence[_Wanted]
    ) -> list[QuotaExceeded | None]:
        tenant = batch[0].tenant_id
        room = await self._locked(connection, tenant)
        counted_in_ms = None
        if room.is_doubtful(batch[0].caps) or (room.may_count and _any_refused(room, batch)):
            counted_in_ms = await self._count(connection, tenant, batch[0].caps, room)
        answers = []
        for one in batch:
            refusal = room.refusal(one)
            if refusal is None:
                room.take(one)
            answers.append(refusal)
        await connection.execute(
            sql("set_queued"), tenant, self._pool, room.jobs, room.size_bytes, counted_in_ms
        )
        return answers

    async def _locked(self, connection: asyncpg.Connection, tenant: str) -> _Room:
        row = await connection.fetchrow(sql("lock_queued"), tenant, self._pool)
        if row is None:
            await connection.execute(sql("begin_queued"), tenant, self._pool)
            row = await connection.fetchrow(sql("lock_queued"), tenant, self._pool)
        return _Room(row["jobs"], row["size_bytes"], row["age_ms"], row["count_ms"])

    async def _count(
        self, connection: asyncpg.Connection, tenant: str, caps: Caps, room: _Room
    ) -> float:
        """Set `room` to what is there now; returns how long that took."""
        began = time.monotonic()
        name = "count_queued" if caps.most_queued_bytes is None else "count_queued_bytes"
        row = await connection.fetchrow(sql(name), tenant, self._pool, _LANES, _MOST_COUNTED)
        # Those that this process is committing may be there already: they count twice then, until
        # the next count.
        lines = await connection.fetchrow(sql("queued_of_batches"), tenant)
        room.jobs = row["jobs"] + lines["jobs"] + self._submitting[tenant]
        room.size_bytes = _UNKNOWN
        if caps.most_queued_bytes is not None:
            in_all = row["size_bytes"] + lines["size_bytes"]
            room.size_bytes = in_all + self._submitting_bytes[tenant]
        return (time.monotonic() - began) * 1000


def _any_refused(room: _Room, batch: Sequence[_Wanted]) -> bool:
    whole = _Wanted(
        batch[0].tenant_id,
        batch[0].caps,
        sum(one.jobs for one in batch),
        sum(one.size_bytes for one in batch),
    )
    return room.refusal(whole) is not None


def _refused(one: _Wanted, limit: str, allowed: str) -> QuotaExceeded:
    return QuotaExceeded(
        f"tenant {one.tenant_id} has as much in the queue as it may",
        limit=limit,
        allowed=f"at most {allowed} at a time",
        retry_after_ms=_RETRY_AFTER_MS,
    )
