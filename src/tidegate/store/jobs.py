"""Jobs: submission in group commits, cancellation, copies, and caps on queued jobs.

Invariants: an idempotency key names one request of its tenant; after `cancel` returns no new
upstream call is made for the job; a copy shares nothing with its original; a cap is kept over all
processes, and may refuse a job until the next count notices a free place.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import DEFAULT_POOL, Attachment, Caller, Caps, Kind, new_id
from tidegate.errors import (
    AlreadyEnded,
    IdempotencyConflict,
    InvalidRequest,
    NotEnded,
    NotFound,
    QuotaExceeded,
    RequestCancelled,
    StoreUnavailable,
)
from tidegate.store import records as rows
from tidegate.store.audit import audit_unanswered, of_row
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.database import Connections, GroupWriter, sql
from tidegate.store.notifications import UNSURE, Bell
from tidegate.store.records import Earlier, Failure, FileRecord, NewJob
from tidegate.store.requests import Dossier
from tidegate.store.states import Status
from tidegate.telemetry.events import Observers

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


async def copy_of(dossier: Dossier, blobs: Blobs) -> NewJob:
    """A new job that is not submitted yet; the blobs of its files are there.

    Raises InvalidRequest for what was no job, NotEnded, NotFound where the bytes of a file are
    gone, and StoreUnavailable. What is left behind by a failure goes with the other orphans.
    """
    record, row = dossier.record, dossier.request
    if record.source != "job":
        said = f"this is no job, but of the source {record.source}: its caller has had the answer"
        raise InvalidRequest("request_id", said, allowed="a job")
    if not record.status.is_end:
        raise NotEnded(f"the request has not ended yet: {record.status}")
    now = datetime.now(UTC)
    inputs = [file for file in record.files if file.role == "input"]
    return NewJob(
        request_id=new_id(),
        created_at=now,
        prompt=row["prompt"],
        classification=record.classification,
        attachments=tuple([await _copied(file, blobs, now) for file in inputs]),
        image_uri=row["image_uri"],
        model=row["model"],
        priority=record.priority,
        deadline_at=_deadline(row, now),
        tenant_id=record.tenant_id,
        pool=dossier.pool,
        webhook_url=row["webhook_url"],
        subject=row["subject"],
        endpoint=record.endpoint,
    )


async def _copied(file: FileRecord, blobs: Blobs, now: datetime) -> Attachment:
    key = new_key(now)
    await blobs.put(key, await blobs.get(file.blob_key))
    return Attachment(
        file_id=new_id(),
        name=file.name,
        mime_type=file.mime_type,
        size_bytes=file.size_bytes,
        blob_key=key,
    )


def _deadline(row: Mapping[str, Any], now: datetime) -> datetime | None:
    if row["deadline_at"] is None:
        return None
    within = row["deadline_at"] - row["created_at"]
    return now + within if within.total_seconds() > 0 else None


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
