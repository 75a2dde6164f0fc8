"""Jobs: submission in group commits, cancellation, copies, caps, and jobs without a worker.

Invariants: an idempotency key names one request of its tenant; after `cancel` returns no new
upstream call is made for the job; a copy shares nothing with its original; a cap holds over all
processes, and may reject a job until the next count notices a free place; requeued jobs are failed
or dead ones, at most as many as requested, under their own ids.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import DEFAULT_POOL, Attachment, Caller, Caps, Kind, Status, new_id
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
from tidegate.record import CallListeners, Failure
from tidegate.store import records as rows
from tidegate.store.audit import AuditLog, audit_unanswered, of_row
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.database import Connections, GroupWriter, sql
from tidegate.store.notifications import (
    AT_ONCE,
    UNSURE,
    Lookback,
    Notifications,
    Scan,
    Steadiness,
    require_judge,
)
from tidegate.store.operator_actions import OperatorActions
from tidegate.store.records import (
    ClaimedJob,
    Earlier,
    FileRecord,
    Json,
    NewJob,
    record_action,
    record_of,
    recorded,
)
from tidegate.store.requests import RequestDetail
from tidegate.telemetry.logging import Log, get_logger

TIMEOUT_MS = 2_000
CANCELLED = RequestCancelled("its owner cancelled it")
CANCELLED_FAILURE = asdict(Failure.of(CANCELLED))

Outcome = Earlier | Exception | None
_Keyed = dict[tuple[str, str], asyncpg.Record]


class Jobs:
    """Submission and cancellation of jobs. Methods that query PostgreSQL raise StoreUnavailable."""

    def __init__(
        self,
        connections: Connections,
        notifications: Notifications,
        listeners: CallListeners,
        *,
        instance_id: str,
    ) -> None:
        self._connections = connections
        self._notifications = notifications
        self._listeners = listeners
        self._instance_id = instance_id
        self._writer: GroupWriter[NewJob, Earlier | None] = GroupWriter(self._insert)
        self._tiers: GroupWriter[ClaimedJob, None] = GroupWriter(self._set_tiers)

    async def submit(self, job: NewJob) -> Earlier | None:
        """Return once the job is committed; concurrent submissions share one transaction.

        Returns None for a new job, else the one submitted under its key before; nothing of `job` is
        then recorded. Raises IdempotencyConflict, or StoreUnavailable within about 2 s in any case.
        After a cancellation or StoreUnavailable the job may exist, complete or not at all.
        """
        try:
            async with asyncio.timeout(TIMEOUT_MS / 1000 + 0.5):
                return await self._writer.write(job, 1_000 + len(job.prompt))
        except TimeoutError:
            raise StoreUnavailable("PostgreSQL did not commit the job in time") from None

    async def earlier(self, job: NewJob) -> Earlier | None:
        """Return the request that has the job's idempotency key already, None for none. Raises
        IdempotencyConflict if that was a different request."""
        if job.once is None:
            return None
        found = await self._connections.run(
            lambda connection: _find(connection, [job]), timeout_ms=TIMEOUT_MS
        )
        outcome = _outcome(job, found) if found else None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def cancel(self, request_id: UUID, tenant_id: str) -> Status:
        """Cancel a job, or have its worker cancel it; return its status before.

        Raises NotFound, or AlreadyEnded unless it is cancelled already.
        """
        ended: list[asyncpg.Record] = []

        async def cancel(connection: asyncpg.Connection) -> asyncpg.Record | None:
            nonlocal ended
            ended = []
            row = await connection.fetchrow(sql("lock_owned"), request_id, tenant_id)
            if row is None:
                return None
            if row["status"] == Status.QUEUED:
                failure = orjson.dumps(CANCELLED_FAILURE).decode()
                ended = await connection.fetch(sql("cancel_queued"), request_id, failure)
                await audit_unanswered(connection, ended, CANCELLED_FAILURE, self._instance_id)
            elif row["status"] == Status.RUNNING:
                await connection.execute(sql("request_cancel"), request_id)
            await record_action(connection, "job.cancel", str(request_id))
            return row

        row = await self._connections.run(cancel, timeout_ms=TIMEOUT_MS)
        if row is None:
            raise NotFound(f"no request {request_id}")
        rows.log_ended(ended, CANCELLED_FAILURE)
        self._listeners.notify([of_row(job, CANCELLED_FAILURE) for job in ended])
        before = Status(row["status"])
        if before.is_end and before is not Status.CANCELLED:
            raise AlreadyEnded(f"the request has ended: {before}")
        if before is Status.QUEUED:
            self._notifications.changed([request_id])
        if row["claimed_by"] is not None:
            self._notifications.cancel([request_id])
        return before

    async def to_cancel(self, notified: Iterable[UUID]) -> set[UUID]:
        """Return the jobs that this worker must cancel; of its waiting ones only those in
        `notified`.

        Waiting jobs hold no permit, and are cancelled at admission at the latest.
        """
        jobs = await self._connections.rows(
            "cancelled_of_worker", self._instance_id, list(notified)
        )
        return {rows.uuid_of(job["id"]) for job in jobs}

    async def placed(self, job: ClaimedJob) -> None:
        """Record the processing tier of a claimed job that is not admitted yet, for its status. A
        job of another claim keeps its own."""
        await self._tiers.write(job)

    async def _set_tiers(self, jobs: Sequence[ClaimedJob]) -> list[None]:
        names = ("claim", "tier", "tier_why")
        placed = rows.dumps(
            {"id": job.request_id} | {name: getattr(job, name) for name in names} for job in jobs
        )
        found = await self._connections.rows("set_tiers", placed)
        self._notifications.changed(rows.uuid_of(row["id"]) for row in found)
        return [None] * len(jobs)

    async def _insert(self, jobs: Sequence[NewJob]) -> list[Outcome]:
        # Processes that insert the same keys wait for one another: one order prevents deadlocks.
        keyed = sorted((job for job in jobs if job.once is not None), key=_place)
        plain = [job for job in jobs if job.once is None]
        requests = rows.dumps([rows.job_row(job) for job in [*plain, *keyed]])

        counted = [job.request_id for job in jobs if job.is_counted]

        async def insert(connection: asyncpg.Connection) -> _Keyed:
            await connection.execute(sql("submit_requests"), requests)
            if counted:
                await connection.execute(sql("end_arrivals"), counted)
            # A separate statement, which sees what the other process has just committed.
            found = await _find(connection, keyed) if keyed else {}
            files = [file for job in jobs if _is_new(job, found) for file in rows.input_rows(job)]
            if files:
                await connection.execute(sql("add_files"), rows.dumps(files))
            return found

        found = await self._connections.run(insert, timeout_ms=TIMEOUT_MS)
        lanes: dict[str, set[str]] = {}
        for job in jobs:
            if _is_new(job, found):
                lanes.setdefault(job.classification.kind or UNSURE, set()).add(job.pool)
        for lane, pools in lanes.items():
            self._notifications.work(pools, [lane])
        return [_outcome(job, found) for job in jobs]


async def _find(connection: asyncpg.Connection, keyed: Sequence[NewJob]) -> _Keyed:
    keys = [
        {"tenant_id": tenant_id, "idempotency_key": key} for tenant_id, key in map(_place, keyed)
    ]
    found = await connection.fetch(sql("get_keyed"), rows.dumps(keys))
    return {(row["tenant_id"], row["idempotency_key"]): row for row in found}


def _place(job: NewJob) -> tuple[str, str]:
    """Return the job's key in the unique index."""
    assert job.once is not None
    return rows.clean(job.tenant_id), rows.clean(job.once.key)


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
    if row is None:  # the earlier one expired between the two statements
        return StoreUnavailable("the idempotency key was just released; retry")
    if row["digest"] != job.once.digest:
        return IdempotencyConflict("this idempotency key was used for a different request")
    return Earlier(rows.uuid_of(row["id"]), Status(row["status"]), rows.classification_of(row))


async def copy_of(dossier: RequestDetail, blobs: Blobs, now: datetime) -> NewJob:
    """Return a new job, not submitted yet, with copies of its files' blobs.

    Raises InvalidRequest for a request that was no job, NotEnded, NotFound for a file that was
    deleted, and StoreUnavailable. Copies left after a failure are deleted with other orphans.
    """
    record, row = dossier.record, dossier.request
    if record.source != "job":
        why = f"only jobs can be retried: the source of this request is {record.source}"
        raise InvalidRequest("request_id", why, allowed="a job")
    if not record.status.is_end:
        raise NotEnded(f"the request has not ended yet: {record.status}")
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
        conversation=row["conversation"],
        key_id=row["key_id"],
        endpoint=record.endpoint,
        tiers_allowed=rows.tiers_of(row),
    )


async def replay_of(
    dossier: RequestDetail,
    blobs: Blobs,
    upstream: str,
    now: datetime,
    *,
    endpoint: str | None = None,
    body: str | None = None,
    model: str | None = None,
) -> NewJob:
    """Return a job, not submitted yet, that repeats a request of any source at one upstream.
    endpoint, body and model: of a native call.

    Raises what `copy_of` raises, and InvalidRequest for a prompt that is not on record.
    """
    record, row = dossier.record, dossier.request
    if record.source == "job":
        copy = await copy_of(dossier, blobs, now)
        # The answer is for the person who replays the request: immediately, and without a webhook.
        copy = replace(copy, webhook_url=None, tiers_allowed=())
        return replace(copy, repeats=record.request_id, bound_upstream=upstream)
    if not record.status.is_end:
        raise NotEnded(f"the request has not ended yet: {record.status}")
    if body is None and (not row.get("prompt") or record.files):
        allowed = "a request whose prompt is on record, and that had no files"
        raise InvalidRequest("request_id", "there is nothing on record to send", allowed=allowed)
    return NewJob(
        request_id=new_id(),
        created_at=now,
        prompt=row["prompt"] if body is None else body,
        classification=record.classification,
        image_uri=None if body is not None else row.get("image_uri"),
        model=row.get("model") if body is None else model,
        priority=record.priority,
        tenant_id=record.tenant_id,
        subject=dossier.of("subject"),
        conversation=dossier.of("conversation"),
        key_id=dossier.of("key_id"),
        endpoint=endpoint,
        repeats=record.request_id,
        bound_upstream=upstream,
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
    if (given_ms := row["given_ms"]) is not None:  # before it was requeued
        within = timedelta(milliseconds=given_ms)
    return now + within if within.total_seconds() > 0 else None


_COUNT_EVERY_MS = 500
_COUNT_SHARE = 20
_COUNT_AFTER_MS = 3_600_000  # regardless of its content; a new row is older
_MOST_COUNTED = 1_000_000  # in each lane
_UNKNOWN = -1
_RETRY_AFTER_MS = 1_000
_MOST_WRITERS = 1_000
_LANES = [*(kind.value for kind in Kind), "unsure"]


@dataclass(frozen=True, slots=True)
class _Arrival:
    """Jobs that may be stored: one under its own id, or the lines of a batch under the batch's."""

    id: UUID
    tenant_id: str
    caps: Caps
    jobs: int
    size_bytes: int


@dataclass(slots=True)
class _Room:
    """The queued jobs of a tenant, and how long ago and in what time they were counted.

    `size_bytes`: negative while unknown; only counted if a cap needs it.
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

    def take(self, one: _Arrival) -> None:
        self.jobs += one.jobs
        if self.size_bytes >= 0:
            self.size_bytes += one.size_bytes

    def refusal(self, one: _Arrival) -> QuotaExceeded | None:
        caps = one.caps
        if caps.most_queued_jobs is not None and self.jobs + one.jobs > caps.most_queued_jobs:
            return _refused(one, "most_queued_jobs", f"{caps.most_queued_jobs} queued jobs")
        most_bytes = caps.most_queued_bytes
        if most_bytes is not None and self.size_bytes + one.size_bytes > most_bytes:
            return _refused(one, "most_queued_bytes", f"{most_bytes} bytes of queued jobs")
        return None


class QueueCaps:
    """Caps on the queued jobs of a tenant; costs nothing without a cap."""

    def __init__(self, connections: Connections, pool: str = DEFAULT_POOL) -> None:
        self._connections = connections
        self._pool = pool
        self._writers: dict[str, GroupWriter[_Arrival, None]] = {}
        # Arrivals by tenant that could not be stored, until the next one of the tenant.
        self._failed: dict[str, list[UUID]] = {}

    @asynccontextmanager
    async def room(
        self, caller: Caller, arrival: UUID, *, jobs: int, size_bytes: int
    ) -> AsyncIterator[None]:
        """Store the jobs within the block, in a transaction that also ends the arrival. Raises
        QuotaExceeded and StoreUnavailable before it."""
        if not caller.caps.on_queue:
            yield
            return
        tenant = caller.tenant_id
        await self._writer(tenant).write(_Arrival(arrival, tenant, caller.caps, jobs, size_bytes))
        try:
            yield
        except BaseException:  # a lost reply or a cancelled task: they may have been stored
            self._failed.setdefault(tenant, []).append(arrival)
            raise

    def _writer(self, tenant: str) -> GroupWriter[_Arrival, None]:
        """Return a tenant's own writer: counting a long queue does not block other tenants."""
        writer = self._writers.get(tenant)
        if writer is None:
            if len(self._writers) >= _MOST_WRITERS:
                self._writers = {name: one for name, one in self._writers.items() if one.waiting}
            writer = self._writers[tenant] = GroupWriter(self._admit)
        return writer

    async def _admit(self, batch: Sequence[_Arrival]) -> Sequence[Exception | None]:
        failed = self._failed.pop(batch[0].tenant_id, [])
        try:
            return await self._connections.run(
                lambda connection: self._decide(connection, batch, failed), timeout_ms=TIMEOUT_MS
            )
        except StoreUnavailable:
            self._failed.setdefault(batch[0].tenant_id, []).extend(failed)
            raise

    async def _decide(
        self, connection: asyncpg.Connection, batch: Sequence[_Arrival], failed: Sequence[UUID]
    ) -> list[QuotaExceeded | None]:
        tenant = batch[0].tenant_id
        room = await self._locked(connection, tenant)
        if failed:
            await connection.execute(sql("fail_arrivals"), failed)
        counted_in_ms = None
        if room.is_doubtful(batch[0].caps) or (room.may_count and _any_refused(room, batch)):
            counted_in_ms = await self._count(connection, tenant, batch[0].caps, room)
        answers: list[QuotaExceeded | None] = []
        for one in batch:
            answers.append(room.refusal(one))
            if answers[-1] is None:
                room.take(one)
        await connection.execute(
            sql("set_queued"), tenant, self._pool, room.jobs, room.size_bytes, counted_in_ms
        )
        admitted = [
            {"id": one.id, "jobs": one.jobs, "size_bytes": one.size_bytes}
            for one, answer in zip(batch, answers, strict=True)
            if answer is None
        ]
        if admitted:
            await connection.execute(sql("add_arrivals"), tenant, self._pool, rows.dumps(admitted))
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
        """Set `room` to the current counts; return how long the count took."""
        began = time.monotonic()
        # First, since a job that is stored meanwhile is then counted twice, and not left out.
        coming = await connection.fetchrow(sql("count_arrivals"), tenant, self._pool)
        name = "count_queued" if caps.most_queued_bytes is None else "count_queued_bytes"
        row = await connection.fetchrow(sql(name), tenant, self._pool, _LANES, _MOST_COUNTED)
        lines = await connection.fetchrow(sql("queued_of_batches"), tenant)
        batched = await connection.fetchrow(sql("count_batched"), tenant, self._pool)
        counted = [coming, row, lines, batched]
        room.jobs = sum(one["jobs"] for one in counted)
        room.size_bytes = _UNKNOWN
        if caps.most_queued_bytes is not None:
            room.size_bytes = sum(one["size_bytes"] for one in counted)
        return (time.monotonic() - began) * 1000


def _any_refused(room: _Room, batch: Sequence[_Arrival]) -> bool:
    whole = _Arrival(
        batch[0].id,
        batch[0].tenant_id,
        batch[0].caps,
        sum(one.jobs for one in batch),
        sum(one.size_bytes for one in batch),
    )
    return room.refusal(whole) is not None


def _refused(one: _Arrival, limit: str, allowed: str) -> QuotaExceeded:
    return QuotaExceeded(
        f"tenant {one.tenant_id} has reached its limit on the queue",
        limit=limit,
        allowed=f"at most {allowed} at a time",
        retry_after_ms=_RETRY_AFTER_MS,
    )


MOST_REQUEUED = 10_000
REQUEUED_FROM = (Status.FAILED, Status.DEAD)
_STEP, _WITHIN_S, _STUCK_TIMEOUT_MS = 500, 20.0, 3_000


@dataclass(frozen=True, slots=True)
class Requeue:
    """Selects jobs to requeue: ended in [since, until), of one tenant and error code if set."""

    since: datetime
    until: datetime
    statuses: tuple[Status, ...] = (Status.FAILED,)
    tenant_id: str | None = None
    error_code: str | None = None
    limit: int = 1_000

    def __post_init__(self) -> None:
        assert set(self.statuses) <= set(REQUEUED_FROM)
        assert 1 <= self.limit <= MOST_REQUEUED


@dataclass(frozen=True, slots=True)
class RequeueReport:
    """Result of a requeue. `matching`: selected jobs, by error code, within the limit. `requeued`:
    those queued again. `has_more`: the same order would select more."""

    matching: int
    requeued: int = 0
    has_more: bool = False
    by_code: Mapping[str, int] = field(default_factory=dict)


MOST_STUCK = 1_000
_LEASE_MS = 60_000.0  # default lease of workers


@dataclass(frozen=True, slots=True)
class StuckCounts:
    """Dead jobs, since when, and undelivered webhooks. ready: jobs that a worker could claim now.
    workers: those that reported within their claims' lease. alerts: given up within a day, since
    the last one that was posted. retrying: jobs that wait for the time of their next attempt."""

    jobs: int
    dead_since: datetime | None
    webhooks: int
    ready: int
    workers: int
    alerts: int = 0
    retrying: int = 0


@dataclass(frozen=True, slots=True)
class DeadJob:
    """A job whose workers died so often that it is not retried."""

    request_id: UUID
    tenant: str
    pool: str
    type: Kind | None
    model: str | None
    attempts: int
    lapses: int
    submitted_at: datetime
    died_at: datetime
    problem: str | None


@dataclass(frozen=True, slots=True)
class GivenUpWebhook:
    """A webhook whose deliveries all failed. `answer_status`, `problem`: of the last attempt."""

    webhook_id: UUID
    request_id: UUID
    tenant: str
    event: str
    url: str
    tries: int
    answer_status: int | None
    problem: str | None
    given_up_at: datetime


async def stuck_counts(connections: Connections, lease_ms: float = _LEASE_MS) -> StuckCounts:
    """Return counts, each up to `MOST_STUCK`. lease_ms: CLAIM_LEASE_MS; workers report three times
    per lease. Raises StoreUnavailable."""
    args = (MOST_STUCK, float(lease_ms))
    (row,) = await connections.rows("count_stuck", *args, timeout_ms=_STUCK_TIMEOUT_MS)
    return record_of(StuckCounts, row)


class StuckWork:
    """Work that needs an operator: dead jobs, failed jobs to requeue, undelivered webhooks. Every
    method raises StoreUnavailable."""

    def __init__(
        self, connections: Connections, notifications: Notifications, lease_ms: float = _LEASE_MS
    ) -> None:
        self._connections = connections
        self._notifications = notifications
        self._lease_ms = lease_ms

    async def counts(self) -> StuckCounts:
        return await stuck_counts(self._connections, self._lease_ms)

    async def dead(self, most: int) -> list[DeadJob]:
        """Return the last jobs that died, newest first."""
        return [
            record_of(DeadJob, row, type=None if row["type"] is None else Kind(row["type"]))
            for row in await self._connections.rows("list_dead", most, timeout_ms=_STUCK_TIMEOUT_MS)
        ]

    async def given_up(self, most: int) -> list[GivenUpWebhook]:
        """Return the last webhooks that were given up, newest first."""
        return [
            record_of(GivenUpWebhook, row)
            for row in await self._connections.rows(
                "list_given_up", most, timeout_ms=_STUCK_TIMEOUT_MS
            )
        ]

    async def discard(self, request_id: UUID) -> None:
        """Cancel a dead job permanently. Raises NotFound for any other."""
        work = recorded("discard_dead", request_id, what="job.discard", target=request_id)
        if await self._connections.run(work) is None:
            raise NotFound(f"no dead job {request_id}")
        self._notifications.changed([request_id])

    async def requeue(self, request_id: UUID) -> None:
        """Queue a dead job again. Raises NotFound for any other."""
        work = recorded("requeue_dead", request_id, what="job.requeue", target=request_id)
        if (row := await self._connections.run(work)) is None:
            raise NotFound(f"no dead job {request_id}")
        self._notifications.changed([request_id])
        self._notifications.work([row["pool"]])

    async def preview(self, order: Requeue) -> RequeueReport:
        """Return what `requeue_all` would do."""
        found = await self._connections.rows(
            "count_requeues", *_requeued_by(order), order.limit + 1
        )
        by_code = Counter({row["code"]: row["jobs"] for row in found})
        matching = by_code.total()
        return RequeueReport(
            matching=min(matching, order.limit),
            has_more=matching > order.limit,
            by_code=dict(by_code),
        )

    async def requeue_all(self, order: Requeue) -> RequeueReport:
        """Queue the jobs again in steps, for at most about 20 s. After StoreUnavailable, some may
        be queued again: repeat the order."""
        before = await self.preview(order)
        await OperatorActions(self._connections).write("jobs.requeue", "", after=asdict(order))
        loop = asyncio.get_running_loop()
        until = loop.time() + _WITHIN_S
        requeued = 0
        while requeued < order.limit and loop.time() < until:
            step = min(_STEP, order.limit - requeued)
            # A repeat would requeue other jobs, beyond the limit.
            found = await self._connections.rows(
                "requeue_ended", *_requeued_by(order), step, repeatable=False
            )
            requeued += len(found)
            self._notifications.changed(rows.uuid_of(row["id"]) for row in found)
            self._notifications.work({row["pool"] for row in found})
            if len(found) < step:
                break
        left = before.matching - requeued
        return RequeueReport(before.matching, requeued, before.has_more or left > 0, before.by_code)


def _requeued_by(order: Requeue) -> tuple[list[str], datetime, datetime, str | None, str | None]:
    statuses = [status.value for status in order.statuses]
    return statuses, order.since, order.until, order.tenant_id, order.error_code


_WORKER_DIED = "the workers that ran this died {} times; it will not be tried again"
_EXPIRED = Failure(code="deadline_exceeded", message="its deadline came while it was queued")


class UnattendedJobs:
    """Jobs that change without a worker's answer: those of silent workers return to the queue,
    queued ones end at their deadlines or by a cancellation. Raises StoreUnavailable.

    most_lapses: workers that die while they call a job before the job is dead.
    """

    def __init__(
        self,
        connections: Connections,
        notifications: Notifications,
        listeners: CallListeners,
        audit: AuditLog,
        steadiness: Steadiness,
        instance_id: str,
        most_lapses: int,
    ) -> None:
        self._connections = connections
        self._notifications = notifications
        self._listeners = listeners
        self._audit = audit
        self._instance_id = instance_id
        self._steadiness = steadiness
        self._lease_ms = steadiness.lease_ms
        self._most_lapses = most_lapses
        self._lapses, self._expiring = Lookback(), Lookback()
        self._last_silent: dict[str, datetime] = {}  # silent ones, with their last heartbeat
        self._silent: dict[str, datetime] = {}

    async def retake(self) -> list[UUID]:
        """Return silent workers' jobs to the queue, at most 500, and their ids; none while this
        process may not judge."""
        if not self._steadiness.may_judge:
            return []
        died = _WORKER_DIED.format(self._most_lapses)
        failure = asdict(Failure(code="worker_died", message=died))
        scan = self._lapses.begin()
        holders = await self._holders(scan)
        if holders:  # a result that waits on the disk is not to be computed again
            await self._audit.replay()

        async def retake(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            lapsed = await connection.fetch(sql("lock_lapsed"), holders, self._lease_ms)
            if not lapsed:
                return []
            require_judge(self._steadiness.may_judge)
            locked = [row["id"] for row in lapsed]
            retaken: list[asyncpg.Record] = await connection.fetch(
                sql("retake"), locked, self._most_lapses, orjson.dumps(failure).decode()
            )
            await rows.mark_ambiguous(connection, retaken)
            dead = [row for row in retaken if row["status"] == Status.DEAD]
            await audit_unanswered(connection, dead, failure, self._instance_id)
            return retaken

        retaken = await self._connections.run(retake) if holders else []
        if len(retaken) < AT_ONCE:
            self._last_silent = self._silent
        self._lapses.end(scan, complete=len(retaken) < AT_ONCE)
        ids = [rows.uuid_of(row["id"]) for row in retaken]
        if retaken:
            get_logger().warning(Log.JOBS_RETAKEN, jobs=len(ids))
            for row in retaken:
                if row["status"] == Status.DEAD:
                    self._listeners.note(of_row(row, failure))
                    get_logger().error(Log.JOB_DEAD, request_id=str(row["id"]))
            self._notifications.changed(ids)
            self._notifications.work(row["pool"] for row in retaken)
        return ids

    async def expire_due(self) -> int:
        """End queued jobs whose deadline has passed, at most 500; return how many."""
        scan = self._expiring.begin()
        expired = await self._end_queued("expire_due", asdict(_EXPIRED), scan.back_s)
        self._expiring.end(scan, complete=expired < AT_ONCE)
        return expired

    async def cancel_returned(self) -> int:
        """End jobs that were cancelled and returned to the queue, at most 500."""
        return await self._end_queued("cancel_returned", CANCELLED_FAILURE)

    async def _end_queued(self, name: str, failure: Json, *values: float) -> int:
        async def end(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            why = orjson.dumps(failure).decode()
            ended: list[asyncpg.Record] = await connection.fetch(sql(name), why, *values)
            if ended:
                await audit_unanswered(connection, ended, failure, self._instance_id)
            return ended

        ended = await self._connections.run(end)
        rows.log_ended(ended, failure)
        self._listeners.notify([of_row(row, failure) for row in ended])
        self._notifications.changed(rows.uuid_of(row["id"]) for row in ended)
        return len(ended)

    async def _holders(self, scan: Scan) -> list[str]:
        """Return workers whose claims are to be returned."""
        found = await self._connections.rows("silent_workers", self._lease_ms)
        self._silent = {row["instance_id"]: row["seen_at"] for row in found}
        names = [
            name
            for name, seen_at in self._silent.items()
            if scan.is_whole or self._last_silent.get(name) != seen_at
        ]
        if scan.is_whole:
            unknown = await self._connections.rows("unknown_holders", self._lease_ms)
            names += [row["claimed_by"] for row in unknown]
        return names
