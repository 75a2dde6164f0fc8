"""Batches and their lines: owners' views, claims, ends in group commits, abandoned lines.

A batch is in OpenAI's form or in Anthropic's, a message batch. They differ in how they are
submitted and shown. The input of a message batch is not listed as a file of its tenant.

Invariants: everything is read by tenant; validation and assembly are fenced by a claim; a line has
at most one valid claim, is marked before its call and ended once, in one transaction with its
batch's count and its record.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import DEFAULT_POOL, UNKNOWN_CHARGE, Caller, Status
from tidegate.errors import ClaimLost, FilesFull, IdempotencyConflict, NotFound, StoreUnavailable
from tidegate.record import CallRecord, Failure
from tidegate.store import records as rows
from tidegate.store.audit import AuditLog, Prepared
from tidegate.store.database import Connections, GroupWriter, sql
from tidegate.store.idempotency import KeyState, end_key, known_key, take_key
from tidegate.store.notifications import BATCHES, PULSED_MS, Lookback, Notifications, until_quick
from tidegate.store.queue import MAX_LAPSES
from tidegate.store.records import Idempotency, Json, done_once, recorded
from tidegate.telemetry.logging import Log, get_logger

AMBIGUOUS = "ambiguous"
PRIORITY = -100  # of all lines
_MESSAGE = (
    "its worker was lost while it was called, and its batch {}: whether the provider answered, "
    "and what it used, is not known"
)
_CALLED = "it was called, without success, before its batch {}"
_DIED = Failure(
    code="worker_lost",
    message=f"the workers that ran this died {MAX_LAPSES} times; it will not be tried again",
)
_OPEN_EVERY_S = _HELD_UP_EVERY_S = 1.0

log = get_logger()


def ambiguous_of(row: Mapping[str, Any], ended: str) -> Failure:
    """Return why a called line has no answer. ended: how its batch ended."""
    if row["lapses"]:
        return Failure(code=AMBIGUOUS, message=_MESSAGE.format(ended))
    return Failure(code=f"batch_{ended}", message=_CALLED.format(ended))


def record_of(row: Mapping[str, Any], *, status: Status, failure: Failure) -> CallRecord:
    """Return the record of a called line, from its row in PostgreSQL."""
    attempts = row["attempts"]
    record = CallRecord(
        "batch",
        row["tenant_id"],
        datetime.now(UTC),
        rows.uuid_of(row["id"]),
        endpoint=row["endpoint"],
        dialect="",
        operation="",
        request=row["body"].encode(),
        priority=PRIORITY,
        key_id=row["key_id"],
        model=row["model"] or _model_in(row["body"]),
        upstream=row["upstream"],
        attempts=min(1, attempts),
        earlier_attempts=max(0, attempts - 1),
        lapses=row["lapses"],
        charge=UNKNOWN_CHARGE,
    )
    record.end(status, failure)
    return record


def _model_in(body: str) -> str | None:
    found = orjson.loads(body).get("model")
    return found if isinstance(found, str) else None


INPUT, OUTPUT = "batch", "batch_output"
MOST_LINES, _BULK_TIMEOUT_MS = 50_000, 30_000
# The key in a message batch's `metadata` for its `call_headers`. A client's values are strings.
_MESSAGES = "messages"
_LEAST_BYTES = 4_096  # minimum size of a file in quotas: it also has a row, and a block on disk
_TIMES = (
    "created_at",
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)
_MOST_UNANSWERED = 5_000
_CUT_SHORT = {"cancelled": Status.CANCELLED, "expired": Status.EXPIRED}


@dataclass(frozen=True, slots=True)
class BatchFile:
    """A file. `purpose`: `batch` for an upload, `batch_output` for the output of a batch."""

    file_id: UUID
    tenant_id: str
    purpose: str
    name: str
    size_bytes: int
    lines: int
    blob_key: str
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch. `times`: those that have passed, by name. `claim` fences a worker's writes.
    `call_headers`: additional headers for the calls of a message batch; None for others."""

    batch_id: UUID
    tenant_id: str
    endpoint: str
    input_file_id: UUID
    input_blob: str
    completion_window: str
    status: str
    ends_as: str
    total: int
    completed: int
    failed: int
    metadata: dict[str, str] | None
    errors: list[Json] | None
    output_file_id: UUID | None
    error_file_id: UUID | None
    models: tuple[str, ...] | None
    times: dict[str, datetime]
    claim: int
    call_headers: dict[str, str] | None
    key_id: str | None = None
    paused_at: datetime | None = None
    paused_by: str | None = None
    pause_reason: str | None = None

    @property
    def is_of_messages(self) -> bool:
        """Whether the batch is in Anthropic's form."""
        return self.call_headers is not None


@dataclass(frozen=True, slots=True)
class BatchInList:
    """A batch as operators see it. claimed: its lines that a worker has and that wait for
    admission; calling: those being called."""

    batch: Batch
    is_disabled: bool
    claimed: int
    calling: int


@dataclass(frozen=True, slots=True)
class BatchStand:
    """The state of a batch. waiting: lines that were not called. body and the following fields: of
    the line that is called next; None if none waits."""

    batch_id: UUID
    tenant_id: str
    status: str
    endpoint: str
    total: int
    created_at: datetime
    finished_at: datetime | None
    waiting: int
    calling: int
    body: str | None
    claimed_by: str | None
    attempts: int
    not_before: datetime | None
    failure_code: str | None
    failure_message: str | None
    paused_by: str | None
    pause_reason: str | None
    lacks_tenant: bool  # the tenant is disabled or deleted
    key_id: str | None = None


async def batch_stand(connections: Connections, batch_id: UUID) -> BatchStand:
    """Return the state of any tenant's batch. Raises NotFound and StoreUnavailable."""
    row = await connections.row("get_batch_stand", batch_id)
    if row is None:
        raise NotFound(f"there is no batch batch_{batch_id.hex}")
    return rows.record_of(BatchStand, row)


class Batches:
    """Batches and their files. Every method raises StoreUnavailable."""

    def __init__(
        self,
        connections: Connections,
        notifications: Notifications,
        audit: AuditLog,
        instance_id: str,
    ) -> None:
        self._audit = audit
        self._connections = connections
        self._notifications = notifications
        self._instance_id = instance_id

    # Files

    async def add_file(self, file: BatchFile, most_bytes: int) -> None:
        """Store an upload. Raises FilesFull if its tenant would have more than `most_bytes` in
        uploads, over all processes."""
        tenant_id = file.tenant_id

        async def add(connection: asyncpg.Connection) -> int:
            await connection.execute(sql("lock_batch_files"), tenant_id)
            # A separate statement, which sees rows that were committed under the lock before.
            stored = await connection.fetchval(
                sql("kept_batch_files"), tenant_id, file.file_id, _LEAST_BYTES
            )
            if stored + max(file.size_bytes, _LEAST_BYTES) <= most_bytes:
                await _add_file(connection, file)
            return int(stored)

        kept_bytes = await self._connections.run(add)
        _check_room(tenant_id, kept_bytes, file.size_bytes, most_bytes)

    async def check_room(self, tenant_id: str, size_bytes: int, most_bytes: int) -> None:
        """Raises FilesFull if so many more bytes are too many now."""

        (row,) = await self._connections.rows("kept_batch_files", tenant_id, None, _LEAST_BYTES)
        _check_room(tenant_id, row[0], size_bytes, most_bytes)

    async def file(self, file_id: UUID, tenant_id: str) -> BatchFile:
        """Return a file. Raises NotFound."""
        row = await self._connections.row("get_batch_file", file_id, tenant_id)
        if row is None:
            raise NotFound(f"there is no file file-{file_id.hex}")
        return _file(row)

    async def files(
        self, tenant_id: str, *, after: UUID | None, purpose: str | None, limit: int, upwards: bool
    ) -> list[BatchFile]:
        name = "list_batch_files_upwards" if upwards else "list_batch_files"
        found = await self._connections.rows(name, tenant_id, after, purpose, limit)
        return [_file(row) for row in found]

    async def delete_file(self, file_id: UUID, tenant_id: str) -> str | None:
        """Delete a file's row; return its blob's key, None while a batch has yet to read it. Raises
        NotFound."""

        async def delete(connection: asyncpg.Connection) -> tuple[str, bool] | None:
            key = await connection.fetchval(sql("delete_batch_file"), file_id, tenant_id)
            used = await connection.fetchval(sql("uses_batch_blob"), key)
            return None if key is None else (key, bool(used))

        if (deleted := await self._connections.run(done_once(delete))) is None:
            raise NotFound(f"there is no file file-{file_id.hex}")
        return None if deleted[1] else deleted[0]

    async def needs_blob(self, key: str) -> bool:
        """Whether a file refers to the blob, or a batch has yet to read it."""

        async def read(connection: asyncpg.Connection) -> bool:
            names = ("names_batch_blob", "uses_batch_blob")
            return any([await connection.fetchval(sql(name), key) for name in names])

        return await self._connections.run(read)

    # Batches

    async def add(
        self,
        batch_id: UUID,
        caller: Caller,
        file: BatchFile,
        endpoint: str,
        metadata: Json | None,
        once: Idempotency | None = None,
    ) -> Batch:
        """Add a batch; return it, or the one submitted under the same key before, as it is now.
        Raises IdempotencyConflict if that was a different batch."""
        return await self._add(batch_id, caller, file, endpoint, metadata, once, None)

    async def add_messages(
        self,
        batch_id: UUID,
        caller: Caller,
        file: BatchFile,
        endpoint: str,
        call_headers: Json,
        once: Idempotency | None,
        most_bytes: int,
    ) -> Batch:
        """Add a message batch. Its `file` is not listed, counts for its tenant until it was read,
        and is then deleted. Raises what `add` raises, and FilesFull."""
        metadata = {_MESSAGES: call_headers}
        return await self._add(batch_id, caller, file, endpoint, metadata, once, most_bytes)

    async def _add(
        self,
        batch_id: UUID,
        caller: Caller,
        file: BatchFile,
        endpoint: str,
        metadata: Json | None,
        once: Idempotency | None,
        most_bytes: int | None,
    ) -> Batch:
        tenant_id = caller.tenant_id
        values = (
            batch_id,
            tenant_id,
            endpoint,
            file.file_id,
            file.blob_key,
            file.size_bytes,
            "24h",
            None if metadata is None else orjson.dumps(rows.cleaned(metadata)).decode(),
            None if caller.models is None else list(caller.models),
            caller.key_id,
            file.lines,
        )

        async def add(connection: asyncpg.Connection) -> asyncpg.Record:
            if caller.caps.on_queue:
                await connection.execute(sql("end_arrivals"), [batch_id])
            if once is not None:
                before = await take_key(connection, tenant_id, once, batch_id)
                if isinstance(before, KeyState):
                    return await _made_before(connection, tenant_id, once, before)
                made = KeyState(once.digest, batch_id, 200, "application/json", b"")
                await end_key(connection, tenant_id, once.key, made)
            if most_bytes is not None:
                await connection.execute(sql("lock_batch_files"), tenant_id)
                stored = await connection.fetchval(
                    sql("kept_batch_files"), tenant_id, None, _LEAST_BYTES
                )
                _check_room(tenant_id, stored, file.size_bytes, most_bytes)
            await connection.execute(sql("add_batch"), *values)
            return await connection.fetchrow(sql("get_batch"), batch_id, tenant_id)

        added = _batch(await self._connections.run(add))
        if added.batch_id == batch_id:
            self._notifications.work([DEFAULT_POOL], [BATCHES])
        return added

    async def earlier(self, tenant_id: str, once: Idempotency) -> Batch | None:
        """Return the batch of a key, if any. Raises IdempotencyConflict if it is another one."""

        async def find(connection: asyncpg.Connection) -> asyncpg.Record | None:
            before = await known_key(connection, tenant_id, once.key)
            if before is None:
                return None
            return await _made_before(connection, tenant_id, once, before)

        row = await self._connections.run(find)
        return None if row is None else _batch(row)

    async def get(self, batch_id: UUID, tenant_id: str) -> Batch:
        """Return a batch. Raises NotFound."""
        if (row := await self._connections.row("get_batch", batch_id, tenant_id)) is None:
            raise NotFound(f"there is no batch batch_{batch_id.hex}")
        return _batch(row)

    async def stand(self, batch_id: UUID) -> BatchStand:
        """Return the state of any tenant's batch. Raises NotFound."""
        return await batch_stand(self._connections, batch_id)

    async def listed(self, tenant_id: str, *, after: UUID | None, limit: int) -> list[Batch]:
        return [
            _batch(row)
            for row in await self._connections.rows("list_batches", tenant_id, after, limit)
        ]

    async def listed_messages(
        self, tenant_id: str, *, after: UUID | None, before: UUID | None, limit: int
    ) -> list[Batch]:
        """Return message batches, newest first: after one, just before one, or between two."""
        if before is None or after is not None:
            found = await self._connections.rows(
                "list_message_batches", tenant_id, after, before, limit
            )
        else:
            name = "list_message_batches_upwards"
            found = [*reversed(await self._connections.rows(name, tenant_id, before, limit))]
        return [_batch(row) for row in found]

    async def delete(self, batch_id: UUID, tenant_id: str) -> list[str] | None:
        """Delete an ended batch and its results; return their blobs' keys. None if it has not
        ended. Raises NotFound."""

        async def delete(connection: asyncpg.Connection) -> list[str] | None:
            row = await connection.fetchrow(sql("delete_ended_batch"), batch_id, tenant_id)
            if row is None:
                return None
            files = [row["output_file_id"], row["error_file_id"]]
            deleted = [
                await connection.fetchval(sql("delete_batch_file"), one, tenant_id) for one in files
            ]
            return [key for key in deleted if key is not None]

        keys = await self._connections.run(delete)
        if keys is None:
            await self.get(batch_id, tenant_id)
        return keys

    async def cancel(self, batch_id: UUID, tenant_id: str) -> tuple[Batch, bool]:
        """Cancel a batch; return it, and whether it could be cancelled. Raises NotFound."""
        work = recorded("cancel_batch", batch_id, tenant_id, what="batch.cancel", target=batch_id)
        is_done = await self._connections.run(work) is not None
        return await self.get(batch_id, tenant_id), is_done

    # For operators

    async def of_all(
        self, *, after: UUID | None, tenant_id: str | None, is_open: bool, limit: int
    ) -> list[BatchInList]:
        """Return batches of all tenants, or of one, newest first."""
        found = await self._connections.rows("list_all_batches", after, tenant_id, is_open, limit)
        return [rows.record_of(BatchInList, row, batch=_batch(row)) for row in found]

    async def any(self, batch_id: UUID) -> BatchInList:
        """Return any tenant's batch, without counts of lines in progress. Raises NotFound."""
        if (row := await self._connections.row("any_batch", batch_id)) is None:
            raise NotFound("there is no such batch")
        return rows.record_of(BatchInList, row, batch=_batch(row))

    async def pause(self, batch_id: UUID, *, by: str, reason: str) -> bool:
        """Begin no lines until the batch is resumed, in all processes within two seconds. False if
        it has ended or is about to. Lines being called end; its expiry is not postponed."""
        by, reason = rows.clean(by), rows.clean(reason)
        work = recorded("pause_batch", batch_id, by, reason, what="batch.pause", target=batch_id)
        return await self._connections.run(work) is not None

    async def resume(self, batch_id: UUID) -> bool:
        """Resume a batch; return whether it was paused."""
        work = recorded("resume_batch", batch_id, what="batch.resume", target=batch_id)
        return await self._connections.run(work) is not None

    # For workers

    async def take(self, but: Sequence[UUID] = ()) -> Batch | None:
        """Claim one batch to validate or assemble, except those in `but`."""
        row = await self._connections.row("take_batch", self._instance_id, list(but))
        return None if row is None else _batch(row)

    async def free(self, batch: Batch) -> None:
        await self._connections.row("free_batch", batch.batch_id, batch.claim)

    async def expire(self) -> None:
        await self._connections.row("expire_batches")

    async def add_lines(self, batch: Batch, lines: Sequence[Json]) -> None:
        """Add lines with `line`, `id`, `custom_id` and `body`, the last as JSON."""
        await self._connections.execute(
            "add_batch_lines",
            batch.batch_id,
            batch.tenant_id,
            rows.dumps(lines),
            timeout_ms=_BULK_TIMEOUT_MS,
        )

    async def begin(self, batch: Batch, total: int) -> None:
        await self._connections.row("begin_batch", batch.batch_id, batch.claim, total)
        self._notifications.work([DEFAULT_POOL], [BATCHES])

    async def refuse(self, batch: Batch, errors: Sequence[Json]) -> None:
        text = orjson.dumps(rows.cleaned(list(errors))).decode()

        async def refuse(connection: asyncpg.Connection) -> None:
            done = await connection.execute(sql("refuse_batch"), batch.batch_id, batch.claim, text)
            if done.endswith(" 1"):
                await connection.execute(sql("delete_batch_lines"), batch.batch_id)

        await self._connections.run(refuse, timeout_ms=_BULK_TIMEOUT_MS)

    async def lines_after(self, batch: Batch, line: int, limit: int) -> list[asyncpg.Record]:
        return await self._connections.rows("finished_batch_lines", batch.batch_id, line, limit)

    async def end(self, batch: Batch, output: BatchFile | None, error: BatchFile | None) -> None:
        """End a batch and delete its lines; lines that were called without an answer are recorded.
        Raises ClaimLost."""
        ids = [None if one is None else one.file_id for one in (output, error)]
        calls = [await self._audit.prepare(one) for one in await self._unanswered(batch)]

        async def end(connection: asyncpg.Connection) -> tuple[bool, list[Prepared]]:
            ended = await connection.fetchval(sql("end_batch"), batch.batch_id, batch.claim, *ids)
            if ended is None:
                row = await connection.fetchrow(sql("get_batch"), batch.batch_id, batch.tenant_id)
                if row is None:
                    return False, calls  # it was erased
                stored = [row["output_file_id"], row["error_file_id"]]
                return stored == ids and row["status"] == batch.ends_as, []  # a reply that was lost
            for file in (output, error):
                if file is not None:
                    await _add_file(connection, file)
            erased = await self._audit.add(connection, calls) if calls else []
            await connection.execute(sql("delete_batch_lines"), batch.batch_id)
            return True, erased

        is_claimed, erased = await self._connections.run(end, timeout_ms=_BULK_TIMEOUT_MS)
        await self._audit.forget_bodies(erased)
        if not is_claimed:
            raise ClaimLost(f"another worker has batch_{batch.batch_id.hex} now, or it was erased")
        self._audit.noted(call.record for call in calls)

    async def _unanswered(self, batch: Batch) -> list[CallRecord]:
        if batch.ends_as not in _CUT_SHORT:
            return []
        status, ended = _CUT_SHORT[batch.ends_as], batch.ends_as
        return [
            record_of(row, status=status, failure=ambiguous_of(row, ended))
            for row in await self._connections.rows(
                "unanswered_batch_lines", batch.batch_id, _MOST_UNANSWERED
            )
        ]


async def _add_file(connection: asyncpg.Connection, file: BatchFile) -> None:
    await connection.execute(
        sql("add_batch_file"),
        file.file_id,
        file.tenant_id,
        file.purpose,
        rows.clean(file.name),
        file.size_bytes,
        file.lines,
        file.blob_key,
    )


def _check_room(tenant_id: str, kept_bytes: int, size_bytes: int, most_bytes: int) -> None:
    size_bytes = max(size_bytes, _LEAST_BYTES)
    if kept_bytes + size_bytes > most_bytes:
        raise FilesFull(
            "file",
            f"tenant {tenant_id} keeps {kept_bytes} bytes in files for batches, which leaves no "
            f"room for {size_bytes} more: delete those that are not needed any more",
            allowed=f"at most {most_bytes} bytes in all files together",
        )


async def _made_before(
    connection: asyncpg.Connection, tenant_id: str, once: Idempotency, before: KeyState
) -> asyncpg.Record:
    if before.digest != once.digest:
        raise IdempotencyConflict("this idempotency key was used for a different request")
    row = await connection.fetchrow(sql("get_batch"), before.request_id, tenant_id)
    if row is None:
        raise NotFound(f"there is no batch batch_{before.request_id.hex} any more")
    return row


def _file(row: asyncpg.Record) -> BatchFile:
    return rows.record_of(BatchFile, row, file_id=rows.uuid_of(row["id"]))


def _batch(row: asyncpg.Record) -> Batch:
    metadata = _json(row["metadata"])
    return rows.record_of(
        Batch,
        row,
        batch_id=rows.uuid_of(row["id"]),
        metadata=None if (call_headers := _call_headers(metadata)) is not None else metadata,
        call_headers=call_headers,
        errors=_json(row["errors"]),
        models=_models(row),
        times={name: row[name] for name in _TIMES if row[name] is not None},
    )


def _json(column: str | None) -> Any:
    return None if column is None else orjson.loads(column)


def _call_headers(metadata: Json | None) -> dict[str, str] | None:
    found = None if metadata is None else metadata.get(_MESSAGES)
    return found if isinstance(found, dict) else None


def _models(row: asyncpg.Record) -> tuple[str, ...] | None:
    return None if row["models"] is None else tuple(row["models"])


class OpenBatches:
    """Whether there are open batches: read at most once a second, for all loops of a process, which
    have nothing else to look for without one.

    Another process's batch is noticed by its notification, or within a second without one.
    """

    def __init__(
        self,
        connections: Connections,
        notifications: Notifications,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connections = connections
        self._notifications = notifications
        self._clock = clock
        self._asking = asyncio.Lock()
        self._mark = 0
        self._read_at = -math.inf
        self._has_own = self._has_provider = False

    async def has_own(self) -> bool:
        """Whether a batch submitted to this deployment is open. Raises StoreUnavailable."""
        await self._refresh()
        return self._has_own

    async def has_provider(self) -> bool:
        """Whether a provider's batch is open or a job waits for one. Raises StoreUnavailable."""
        await self._refresh()
        return self._has_provider

    def changed(self) -> None:
        """Have the state read again, as there may be a batch now."""
        self._read_at = -math.inf

    async def _refresh(self) -> None:
        async with self._asking:
            now, mark = self._clock(), self._notifications.work_mark(BATCHES)
            is_idle = self._notifications.is_sure() and not (self._has_own or self._has_provider)
            every_s = PULSED_MS / 1000 if is_idle else _OPEN_EVERY_S
            if mark == self._mark and now - self._read_at < every_s:
                return
            self.changed()  # until the query has succeeded
            row = await self._connections.row("open_batches")
            assert row is not None
            self._has_own, self._has_provider = row["ours"], row["theirs"]
            self._mark, self._read_at = mark, now


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A claimed line. `id`: on the record; `attempts`: begun before this claim; `lapses`: those
    whose worker died; `preemptions`: preempted calls; `in_flex`: its tenant allows that tier."""

    batch_id: UUID
    line: int
    claim: int
    id: UUID
    tenant_id: str
    custom_id: str
    endpoint: str
    body: str
    models: tuple[str, ...] | None
    key_id: str | None
    attempts: int
    lapses: int
    preemptions: int
    expires_at: datetime
    call_headers: dict[str, str] | None
    in_flex: bool

    @property
    def key(self) -> Json:
        return {"batch_id": self.batch_id, "line": self.line, "claim": self.claim}


@dataclass(frozen=True, slots=True)
class _End:
    """A line's end, and the record of its call."""

    row: Json
    call: Prepared

    @property
    def key(self) -> tuple[int, int]:
        return self.row["batch_id"].int, self.row["line"]


class BatchLines:
    """Lines of batches. Every method raises StoreUnavailable. `may_judge`: whether this process's
    own heartbeats arrive."""

    def __init__(
        self,
        connections: Connections,
        audit: AuditLog,
        *,
        instance_id: str,
        lease_ms: int,
        may_judge: Callable[[], bool],
    ) -> None:
        self._audit = audit
        self._connections = connections
        self._instance_id = instance_id
        self._lease_ms = lease_ms
        self._may_judge = may_judge
        # Entries that left a queue or a worker stay in its index beside an old transaction.
        self._claims, self._strays, self._lapses = Lookback(), Lookback(), Lookback()
        self._held_up: frozenset[UUID] = frozenset()
        self._held_up_at = float("-inf")
        self._put_off: dict[UUID, float] = {}
        self._from: dict[UUID, int] = {}
        self._begins: GroupWriter[Json, None] = GroupWriter(self._begin)
        self._ends: GroupWriter[_End, None] = GroupWriter(self._end)

    async def claim(self, limit: int, most_bytes: int, without: Iterable[str]) -> list[BatchLine]:
        """Claim lines, none of the tenants and keys in `without`; requeued ones are found by the
        next search from the beginning at the latest."""
        scan = self._claims.begin()
        since = {} if scan.is_whole else {str(key): line for key, line in self._from.items()}
        claimed = await self._connections.rows(
            "claim_batch_lines",
            self._instance_id,
            limit,
            most_bytes,
            orjson.dumps(since).decode(),
            list(self._now_held_up()),
            list(without),
        )
        lines = [
            rows.record_of(
                BatchLine,
                row,
                models=_models(row),
                call_headers=_call_headers(_json(row["metadata"])),
            )
            for row in claimed
        ]
        self._claims.end(scan, complete=True)
        if scan.is_whole:
            self._from.clear()
        for line in sorted(lines, key=lambda line: line.line, reverse=True):
            self._from[line.batch_id] = line.line
        return lines

    async def held_up(self) -> frozenset[UUID]:
        """Return batches in progress of which no line may be claimed or begun now: paused, of a
        disabled or deleted tenant (read at most once a second), or with a spent budget."""
        now = time.monotonic()
        if now - self._held_up_at >= _HELD_UP_EVERY_S:
            found = await self._connections.rows("batches_held_up")
            self._held_up = frozenset(rows.uuid_of(row["id"]) for row in found)
            self._held_up_at = now
        return self._now_held_up()

    def hold_up(self, batch_id: UUID, for_ms: float) -> None:
        """Claim no line of a batch in this process for so long."""
        self._put_off[batch_id] = time.monotonic() + for_ms / 1000

    def _now_held_up(self) -> frozenset[UUID]:
        now = time.monotonic()
        self._put_off = {one: until for one, until in self._put_off.items() if now < until}
        return self._held_up.union(self._put_off)

    async def release_strays(self, held: Iterable[BatchLine]) -> None:
        """Release claims of this process that it does not know of, since their reply was lost."""
        scan = self._strays.begin()
        if not scan.is_whole:
            return
        ids = [line.id for line in held]
        await self._connections.execute("release_stray_lines", self._instance_id, ids)
        self._strays.end(scan, complete=True)

    async def over(self, batch_ids: Iterable[UUID]) -> frozenset[UUID]:
        """Return those of these batches of which no more lines may begin."""
        found = await self._connections.rows("batches_over", list(batch_ids))
        return frozenset(rows.uuid_of(row["id"]) for row in found)

    async def begin(self, line: BatchLine, upstream: str | None, model: str | None) -> None:
        """Mark a line as being called, as `JobQueue.running` does for jobs. Raises ClaimLost."""
        row = {**line.key, "upstream": upstream, "model": rows.cleaned(model)}
        await until_quick(partial(self._begins.write, row), self._lease_ms)

    async def end(
        self,
        line: BatchLine,
        call: Prepared,
        *,
        status_code: int | None,
        answer: str | None,
        failure: Failure | None,
    ) -> None:
        """Record a line's end and its call. An end under a lost claim changes nothing: the line's
        next claim, or the end of its batch, then records the call.

        A failure with the provider's own error body has both `answer` and `failure`.
        """
        row = {
            **line.key,
            "state": "succeeded" if failure is None else "failed",
            "status_code": status_code,
            "answer": None if answer is None else rows.clean(answer),
            "failure": rows.failure_row(failure),
        }
        await self._ends.write(_End(row, call), 200 + 2 * call.record.size_bytes)

    async def release(
        self,
        lines: Iterable[BatchLine],
        *,
        waits_ms: Mapping[UUID, float] | Mapping[UUID, int] | None = None,
        counted: Mapping[UUID, int] | None = None,
        gave_way: bool = False,
        failure: Failure | None = None,
    ) -> None:
        """Release claims on lines, those in `waits_ms` for so long. counted: attempts that the
        calls begun under these claims use up, else one; gave_way: the calls were preempted;
        failure: what the lines wait for."""
        waits, used = waits_ms or {}, counted or {}
        same = {"failure": rows.failure_row(failure), "gave_way": int(gave_way)}
        values = rows.dumps(
            {**one.key, **same, "after_ms": waits.get(one.id), "uncounted": 1 - used.get(one.id, 1)}
            for one in lines
        )
        await self._connections.execute("return_batch_lines", values)

    async def retake(self) -> None:
        """Release claims of dead workers."""
        if not (self._may_judge() and (scan := self._lapses.begin()).is_whole):
            return
        died = (MAX_LAPSES, orjson.dumps(asdict(_DIED)).decode())

        async def retake(connection: asyncpg.Connection) -> tuple[list[Prepared], list[Prepared]]:
            taken = await connection.fetch(sql("retake_batch_lines"), self._lease_ms, *died)
            if taken and not self._may_judge():  # see `require_judge`
                raise StoreUnavailable("PostgreSQL answers too slowly for the lease of a claim")
            failed = [row for row in taken if row["state"] == "failed"]
            await _count(connection, failed)
            records = [record_of(row, status=Status.FAILED, failure=_DIED) for row in failed]
            calls = [await self._audit.prepare(record) for record in records]
            return calls, await self._audit.add(connection, calls) if calls else []

        calls, erased = await self._connections.run(retake)
        await self._audit.forget_bodies(erased)
        self._audit.noted(call.record for call in calls)
        self._lapses.end(scan, complete=True)

    async def _begin(self, batch: Sequence[Json]) -> list[Exception | None]:
        calling = await self._connections.rows("begin_batch_lines", _ordered(batch))
        begun = {(row["batch_id"].int, row["line"]) for row in calling}
        return [
            None
            if (row["batch_id"].int, row["line"]) in begun
            else ClaimLost(f"another worker has line {row['line']} now")
            for row in batch
        ]

    async def _end(self, batch: Sequence[_End]) -> list[None]:
        lines = _ordered([end.row for end in batch])

        async def end(connection: asyncpg.Connection) -> list[Prepared]:
            ended = await connection.fetch(sql("end_batch_lines"), lines)
            await _count(connection, ended)
            keys = {(row["batch_id"].int, row["line"]) for row in ended}
            if not is_recorded:
                return []
            gone = await self._audit.add(connection, [one.call for one in batch if one.key in keys])
            if len(keys) < len(batch):
                ids = [one.row["batch_id"] for one in batch], [one.call.record.id for one in batch]
                erased = await connection.fetch(sql("erased_batch_calls"), *ids)
                gone += [batch[row["place"] - 1].call for row in erased]
            return gone

        is_recorded = True
        try:
            await self._audit.forget_bodies(await self._connections.run(end))
            self._audit.noted(one.call.record for one in batch)
        except (asyncpg.PostgresError, ValueError) as refused:
            if len(batch) > 1:
                raise  # each row is then written alone
            log.error(Log.INTERNAL_ERROR, component="batch line record", error=repr(refused))
            is_recorded = False  # recorded separately, or the line would never end
            await self._connections.run(end)
            self._audit.put(batch[0].call.record)
        return [None] * len(batch)


async def _count(connection: asyncpg.Connection, ended: Iterable[asyncpg.Record]) -> None:
    counts: dict[UUID, Counter[str]] = {}
    for row in ended:
        counts.setdefault(row["batch_id"], Counter())[row["state"]] += 1
    for batch_id in sorted(counts):  # one order in all processes, so that they do not deadlock
        of_it = counts[batch_id]
        await connection.execute(
            sql("count_batch_lines"), batch_id, of_it["succeeded"], of_it["failed"]
        )


def _ordered(batch: Sequence[Json]) -> str:
    return rows.dumps(sorted(batch, key=lambda row: (row["batch_id"].int, row["line"])))
