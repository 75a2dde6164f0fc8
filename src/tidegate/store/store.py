"""Store: PostgreSQL as record and queue, and the blobs beside it. The only door to both.

Invariants: nothing waits longer than it says; every write may be repeated; what was promised to
be durable is on a disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from uuid import UUID

import asyncpg

from tidegate.call import Classification, Kind
from tidegate.errors import NotFound, StoreUnavailable
from tidegate.store import audit as entries
from tidegate.store import audit as observing
from tidegate.store import records as rows
from tidegate.store.audit import Recorder, RelayLog, Spending, UsageTotals
from tidegate.store.batches import Batches, BatchLines
from tidegate.store.blobs import Blobs
from tidegate.store.database import HEAD, Connections, ReadTurns, revision_of, sql
from tidegate.store.idempotency import NativeKeys
from tidegate.store.jobs import Cancels, Queued, Submits
from tidegate.store.notifications import Bell, Watch
from tidegate.store.outbox import Outbox, webhook_of
from tidegate.store.policies import Policies
from tidegate.store.queue import Claims, running_row
from tidegate.store.quotas import BudgetGate
from tidegate.store.records import (
    AttemptResult,
    ClaimedJob,
    Earlier,
    FailedTry,
    Failure,
    FileRecord,
    Json,
    NewJob,
    RequestRecord,
    StreamRecord,
)
from tidegate.store.requests import Dossiers, Listing, Places, Recorded, Running, Search, Stuck
from tidegate.store.retention import Eraser, EraseReport, PruneReport, Whose, keep_house, prune
from tidegate.store.spill import Spill
from tidegate.store.states import Status
from tidegate.store.statistics import History, Standing
from tidegate.store.tenants import SignIns, Tenants
from tidegate.telemetry.events import RETRIED, Observed, Observers

READ_TIMEOUT_MS, _READS_AT_ONCE = 2_000, 4
_CLOSE_TIMEOUT_MS = 6_000


class Store:
    """One per process. Made by `from_url`, then `start()`; `aclose()` at the end."""

    _house: asyncio.Future[tuple[None, None]] | None = None
    _schema_fitted = False

    def __init__(
        self,
        connections: Connections,
        spill: Spill,
        blobs: Blobs,
        *,
        instance_id: str,
        audit_full: Literal["block", "drop"],
        claim_lease_ms: int,
        observers: Observers | None = None,
    ) -> None:
        self.observers = observers or Observers()
        self.blobs = blobs
        self.instance_id = instance_id
        self._connections = connections
        self.spill = spill
        self.spending, self.usage = Spending(), UsageTotals(connections)
        self._bell = Bell(connections)
        self._watch = Watch(connections, self._bell)
        ringing = (connections, self._bell, self.observers)
        self._claims = Claims(*ringing, instance_id=instance_id, lease_ms=claim_lease_ms)
        self._recorder, self.relayed = self._written_behind(connections, audit_full)
        self.batches = Batches(connections, self._bell, self.relayed, instance_id)
        self.batch_lines = BatchLines(
            *(connections, self.relayed),
            instance_id=instance_id,
            lease_ms=claim_lease_ms,
            may_judge=lambda: self._claims.may_judge,
        )
        self.native_keys = NativeKeys(connections, self._recorder.keep, lease_ms=claim_lease_ms)
        self.policies, self.running_calls = Policies(connections), Running(connections)
        self.outbox = Outbox(connections)
        self.listing, self.search = Listing(connections), Search(connections)
        self.recorded, self.dossiers = Recorded(connections, blobs), Dossiers(connections)
        self.cancels = Cancels(*ringing, instance_id=instance_id)
        self.history, self.stuck = History(connections, instance_id), Stuck(connections, self._bell)
        self._submits = Submits(connections, self._bell)
        self.tenants, self.signins = Tenants(connections), SignIns(connections)
        self.budgets = BudgetGate(self.usage, self.spending, self.tenants)
        self.queued, self.standing = Queued(connections), Standing(connections)
        self._places, self._turns = Places(), ReadTurns(_READS_AT_ONCE)

    def _written_behind(
        self, connections: Connections, audit_full: Literal["block", "drop"]
    ) -> tuple[Recorder, RelayLog]:
        recorder = Recorder(
            *(connections, self._bell, self.spill),
            blobs=self.blobs,
            spending=self.spending,
            instance_id=self.instance_id,
            when_full=audit_full,
            observers=self.observers,
        )
        relayed = RelayLog(
            *(connections, recorder, self.blobs),
            instance_id=self.instance_id,
            when_full=audit_full,
            spending=self.spending,
            observers=self.observers,
        )
        return recorder, relayed

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        instance_id: str,
        blobs: Blobs,
        spill_dir: Path,
        spill_max_bytes: int,
        audit_full: Literal["block", "drop"],
        claim_lease_ms: int,
        observers: Observers | None = None,
    ) -> Store:
        """`instance_id` must be new with every start of a process: claims hang on it."""
        return cls(
            Connections(url),
            Spill(spill_dir, spill_max_bytes),
            blobs,
            instance_id=instance_id,
            audit_full=audit_full,
            claim_lease_ms=claim_lease_ms,
            observers=observers,
        )

    @property
    def away(self) -> bool:
        """Whether PostgreSQL is known not to answer at present."""
        return self._connections.away

    # Life

    async def start(self) -> None:
        """Begin to connect in the background: PostgreSQL may come later."""
        self._connections.start()
        self._recorder.start()
        self.relayed.start()
        self._house = asyncio.gather(keep_house(self._connections), self.budgets.run())

    async def aclose(self) -> None:
        """Write what is pending, or leave it on the disk, within about 10 s; then disconnect."""
        if self._house is not None:
            self._house.cancel()
            await asyncio.gather(self._house, return_exceptions=True)
        await self._watch.aclose()
        await self.relayed.aclose(_CLOSE_TIMEOUT_MS // 3)
        await self._recorder.aclose(_CLOSE_TIMEOUT_MS)
        await self.native_keys.aclose()
        await self._bell.aclose()
        await self._connections.aclose()

    async def ping(self, timeout_ms: int) -> None:
        """Ask PostgreSQL on a fresh connection; raises StoreUnavailable."""
        await self._connections.ping(timeout_ms)

    async def schema_fits(self) -> bool:
        """Whether the schema is the one that this code needs, or a later one.

        While PostgreSQL is away, what it last said counts: an outage changes no schema.
        """

        async def read(connection: asyncpg.Connection) -> str | None:
            return await revision_of(connection)

        try:
            revision = await self._connections.run(read, timeout_ms=READ_TIMEOUT_MS)
        except StoreUnavailable:
            return self._schema_fitted
        self._schema_fitted = revision is not None and revision >= HEAD
        return self._schema_fitted

    # The caller's side

    async def earlier(self, job: NewJob) -> Earlier | None:
        """The request that has the job's idempotency key already; raises as `submit` does."""
        return await self._submits.earlier(job)

    async def submit(self, job: NewJob) -> Earlier | None:
        """Return when the job is committed; submits at the same time share one transaction.

        None for a new job, else the one that was submitted under its key before; nothing of `job`
        is recorded then. Raises IdempotencyConflict, or StoreUnavailable within about 2 s, whatever
        PostgreSQL does. After a cancellation or StoreUnavailable the job may be there, whole, or
        not at all.
        """
        return await self._submits.submit(job)

    async def get(self, request_id: UUID, tenant_id: str) -> RequestRecord:
        """The request as it now stands; raises NotFound or StoreUnavailable."""

        async def read(connection: asyncpg.Connection) -> RequestRecord | None:
            row = await connection.fetchrow(sql("get_request"), request_id, tenant_id)
            if row is None:
                relayed = await connection.fetchrow(sql("get_relayed"), request_id, tenant_id)
                return None if relayed is None else rows.relayed_record(relayed)
            files = await connection.fetch(sql("get_request_files"), request_id)
            webhook = await webhook_of(connection, row)
            return rows.request_record(row, files, webhook, await self._places.of(connection, row))

        async with self._turns.turn(tenant_id, READ_TIMEOUT_MS):
            record = await self._connections.run(read, timeout_ms=READ_TIMEOUT_MS)
        if record is None:
            raise NotFound(f"no request {request_id}")
        return record

    async def wait_change(
        self, request_id: UUID, tenant_id: str, version: int, timeout_ms: int
    ) -> RequestRecord:
        """The request as soon as its version is not `version`, or after `timeout_ms`.

        With too many watchers in this process it answers at once. Cancellation leaves nothing.
        """
        deadline = asyncio.get_running_loop().time() + timeout_ms / 1000
        changed = self._watch.watch(request_id)
        if changed is None:
            return await self.get(request_id, tenant_id)
        try:
            while True:
                changed.clear()
                record = await self.get(request_id, tenant_id)
                self._watch.known(request_id, record.version)
                if record.version != version:
                    return record
                try:
                    async with asyncio.timeout_at(deadline):
                        await changed.wait()
                except TimeoutError:
                    return record
        finally:
            self._watch.unwatch(request_id, changed)

    async def file(self, file_id: UUID, tenant_id: str) -> FileRecord:
        """A stored file by its public id; raises NotFound or StoreUnavailable."""

        async def read(connection: asyncpg.Connection) -> asyncpg.Record | None:
            return await connection.fetchrow(sql("get_file"), file_id, tenant_id)

        row = await self._connections.run(read, timeout_ms=READ_TIMEOUT_MS)
        if row is None:
            raise NotFound(f"no file {file_id}")
        return rows.file_record(row)

    async def record_stream(self, record: StreamRecord) -> None:
        """Accept a finished stream's record, which is written soon; waits when the buffer is full
        and `audit_full` is `block`. A cancelled caller has recorded it whole or not at all."""
        self.observers.note(observing.event_of_stream(record))
        await self._recorder.enqueue(await entries.of_stream(record, self.blobs))

    # The worker's side

    async def heartbeat(self) -> None:
        """Say that this worker lives, every third of the claim lease; raises StoreUnavailable."""
        await self._claims.heartbeat()

    async def leave(self) -> None:
        """Say that this worker is going; its queued claims are free at once."""
        await self._claims.leave()

    async def claim(self, *, pool: str, kind: Kind | None, limit: int) -> list[ClaimedJob]:
        """Up to `limit` queued jobs of the kind, None for those still unsure; tenants in turn.

        Raises StoreUnavailable. A cancelled caller's claims are given back by the next heartbeat.
        """
        return await self._claims.claim(pool, kind, limit)

    def work_mark(self, lane: str | None = None) -> int:
        """Read before `claim`, given to `wait_work`: work that came in between then counts."""
        return self._watch.work_mark(lane)

    async def wait_work(
        self, timeout_ms: int, since: int | None = None, lane: str | None = None
    ) -> None:
        """Return when new work may be there, at the latest after `timeout_ms` or one second.

        A lane is a kind of jobs, `bell.UNSURE` or `bell.BATCHES`; None stands for all of them.
        """
        await self._watch.wait_work(timeout_ms, since, lane)

    async def tend_queues(self) -> None:
        """Keep up with what became ready, every second or so; raises StoreUnavailable."""
        await self._claims.tend()

    async def expire_due(self) -> int:
        """End queued jobs whose deadline has passed, at most 500; returns how many."""
        return await self._claims.expire_due()

    async def classified(self, job: ClaimedJob, classification: Classification) -> None:
        """Record a job's kind; raises ClaimLost or StoreUnavailable."""
        await self._claims.classified(job, classification)

    async def running(
        self,
        job: ClaimedJob,
        *,
        model: str,
        fence: tuple[int, int],
        queue_ms: float,
        failed: FailedTry | None = None,
    ) -> None:
        """Record that the job is admitted, before its call; `failed`: another one before, under the
        same claim. Raises ClaimLost, or StoreUnavailable, with which it may be recorded."""
        row = {**running_row(job, model, fence, queue_ms), "admitted_at": datetime.now(UTC)}
        claims = self._claims
        await (claims.running(row, job) if not failed else claims.another(row, job, failed))

    async def finish(self, job: ClaimedJob, status: Status, result: AttemptResult) -> None:
        """Record a job's end, on disk while PostgreSQL is away. Raises ClaimLost, StoreUnavailable
        when the spill is full. A cancelled caller's end is recorded all the same."""
        observed = observing.of_job(job, status.value, result, result.failure)
        await self._end(job, entries.of_end(job, status, result, self.blobs), observed)

    async def retry(
        self, job: ClaimedJob, result: AttemptResult, not_before: datetime, is_counted: bool = True
    ) -> None:
        """Record a failed attempt and queue the job again, not before then; as `finish` else."""
        observed = observing.of_job(job, RETRIED, result, result.failure)
        entry = entries.of_retry(job, result, not_before, is_counted=is_counted)
        await self._end(job, entry, observed)

    async def fail_unadmitted(self, job: ClaimedJob, status: Status, failure: Failure) -> None:
        """End a job that was never sent upstream; as `finish` else."""
        entry = entries.of_unadmitted(job, status, failure, self.blobs)
        await self._end(job, entry, observing.event_of_unadmitted(job, status.value, failure))

    async def hand_back(
        self,
        jobs: Sequence[ClaimedJob],
        waits_ms: Mapping[UUID, int] | None = None,
        failure: Failure | None = None,
    ) -> None:
        """Release claims, of jobs in `waits_ms` for so long, over `failure`; raises
        StoreUnavailable."""
        if jobs:
            await self._claims.hand_back(jobs, waits_ms or {}, failure)

    async def bring_back(self, claims: Mapping[UUID, int]) -> None:
        """See `Claims.bring_back`."""
        await self._claims.bring_back(claims)

    async def retake_lapsed(self) -> list[UUID]:
        """Return dead workers' jobs to the queue; their ids. See `Claims.retake_lapsed`."""
        return await self._claims.retake_lapsed()

    # The operator's side

    async def prune(self, retention_days: int) -> PruneReport:
        """Delete what ended more than `retention_days` ago, in small steps; safe to cut short."""
        return await prune(self._connections, self.blobs, retention_days)

    async def erase(self, whose: Whose, *, dry_run: bool, within_s: float) -> EraseReport:
        """Erase all of a subject or tenant; see `Eraser.run`."""
        eraser = Eraser(self._connections, self.blobs, self.spill.folder, whose)
        return await eraser.run(dry_run=dry_run, within_s=within_s)

    async def _end(self, job: ClaimedJob, entry: Awaitable[Json], observed: Observed) -> None:
        written = await self._recorder.record(entry, observed)
        if written:
            self._claims.settled(job)
