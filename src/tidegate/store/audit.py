"""Audit record: ends of attempts, jobs and streams, native calls, bodies and usage totals.

Written behind, in batches, one transaction each; while PostgreSQL is unavailable entries wait on
disk. Bodies are compressed, inline if small, else in the blob store.

Invariants: an accepted entry is written exactly once, with its request, files, attempt and totals;
a job's end is fenced by its claim; a call's budget reservation is settled with its row; a record of
an erased tenant or subject is not written after the erasure.
"""

from __future__ import annotations

import asyncio
import zlib
from base64 import b64encode
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from operator import attrgetter, itemgetter
from time import monotonic
from typing import Any, Literal, NamedTuple
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import Status, new_id
from tidegate.errors import CallPreempted, ClaimLost, StoreUnavailable
from tidegate.record import CallListeners, CallRecord, Failure
from tidegate.store import records as rows
from tidegate.store.blobs import Blobs, as_kept, new_key
from tidegate.store.budgets import Budgets
from tidegate.store.database import Connections, GroupWriter, sql
from tidegate.store.idempotency import KEY_OPS, settle_keys
from tidegate.store.notifications import Notifications, next_beat_s
from tidegate.store.outbox import add_webhooks
from tidegate.store.provider.resources import NOTED, add_noted
from tidegate.store.records import ClaimedJob, Json, NewJob, audit_row, cleaned, dumps
from tidegate.store.spill import CallJournal, Spill, WaitingRows
from tidegate.store.statistics import READ, add_usage, moment_of
from tidegate.telemetry.logging import Log, get_logger
from tidegate.telemetry.tracing import Trail, parent_of

log = get_logger()

INLINE_BYTES, WORTH_A_THREAD_BYTES = 8192, 50_000
ENCODING = "zlib"
EVERY_TENANT = "*"  # in place of a tenant in `bodies_off`
# A window that fits a small body, with small tables: zlib's default prepares 256 KB each time,
# several times the work of a small body, for the same size.
_BODIES_SMALL_BYTES = 4096
_SMALL_WINDOW_BITS, _SMALL_TABLES = 12, 5


def body_of_job(job: NewJob | ClaimedJob) -> dict[str, Any]:
    files = [{name: getattr(file, name) for name in _ATTACHED} for file in job.attachments]
    if job.endpoint is not None:  # of a large body only the file, since `prompt` is a part of it
        return {"endpoint": job.endpoint} | ({"files": files} if files else {"body": job.prompt})
    return {name: getattr(job, name) for name in _ASKED} | {"files": files}


def body_of_answer(record: CallRecord, attempt: Json) -> dict[str, Any]:
    """Return the body of an answer. `attempt`: the columns of its end."""
    files = [
        {"file_id": one.file_id, "mime_type": cleaned(one.mime_type), "size_bytes": one.size_bytes}
        for one in record.files
    ]
    return {"text": attempt["result"], "files": files, "finish_reason": attempt["finish_reason"]}


def inline_row(role: str, body: dict[str, Any]) -> Json:
    """Return the row of a body of any size, inline, without its id and owner."""
    raw = orjson.dumps(cleaned(body))
    return _row(role, len(raw), _packed(raw), None)


async def row_of(role: str, body: dict[str, Any], blobs: Blobs) -> Json:
    """Return the row of a body without NUL; a large body is written to the blob store first."""
    raw = orjson.dumps(body)
    if len(raw) > WORTH_A_THREAD_BYTES:
        packed = await asyncio.to_thread(_packed, raw)
    else:
        packed = _packed(raw)
    return _row(role, len(raw), *await _placed(packed, blobs))


def _packed(raw: bytes) -> bytes:
    if len(raw) > _BODIES_SMALL_BYTES:
        return zlib.compress(raw)
    packer = zlib.compressobj(wbits=_SMALL_WINDOW_BITS, memLevel=_SMALL_TABLES)
    return packer.compress(raw) + packer.flush()


async def _placed(packed: bytes, blobs: Blobs) -> tuple[bytes | None, str | None]:
    """Return the bytes for the row, or the key of their blob if they are large; inline too while
    the blob store is unavailable."""
    if len(packed) > INLINE_BYTES:
        key = new_key(datetime.now(UTC))
        with suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(_BLOB_TIMEOUT_S):
                await blobs.put(key, packed)
            return None, key
    return packed, None


def _row(role: str, size_bytes: int, data: bytes | None, blob_key: str | None) -> Json:
    return {
        "role": role,
        "encoding": ENCODING,
        "size_bytes": size_bytes,
        "data": None if data is None else b64encode(data).decode(),
        "blob_key": blob_key,
    }


def unpack(encoding: str, packed: bytes) -> Any:
    """Return the JSON value of a stored body; a native one as its text."""
    if encoding == "raw":
        return packed.decode("utf-8", "replace")
    if encoding == "zlib-raw":
        return zlib.decompress(packed).decode("utf-8", "replace")
    if encoding != ENCODING:
        raise ValueError(f"a body in the unknown encoding {encoding!r}")
    return orjson.loads(zlib.decompress(packed))


class Mark(NamedTuple):
    """The owner of a record, and when the call was received, by the clock of a process."""

    tenant_id: str
    subject: str | None
    received_at: datetime | str


def digest_of(subject: str) -> bytes:
    return sha256(subject.encode()).digest()


async def erased_among(
    connection: asyncpg.Connection, marks: Sequence[Mark], *, of_this_host: bool = True
) -> set[int]:
    """Return the indexes of records that must not be written, since their owner was erased. Times
    `of_this_host` are corrected to PostgreSQL's clock, by which erasures are dated."""
    digests = {mark.subject: digest_of(mark.subject) for mark in marks if mark.subject is not None}
    tenants = list({mark.tenant_id for mark in marks})
    found = await connection.fetch(sql("get_erased"), tenants, list(digests.values()))
    ahead = datetime.now(UTC) - found[0]["now"] if found and of_this_host else timedelta()
    return set(_matching(marks, digests, found, ahead))


async def erased_entries(connection: asyncpg.Connection, entries: Sequence[Json]) -> list[Json]:
    """Return the recorder's entries whose tenant or subject was erased. Entries of jobs are not
    checked: the erased request's row does not exist any more."""
    whole = [entry for entry in entries if entry["op"] in ("stream", "relay", "answer", NOTED)]
    times = ("created_at" if entry["op"] == "stream" else "submitted_at" for entry in whole)
    named = [(entry["row"], time) for entry, time in zip(whole, times, strict=True)]
    marks = [Mark(row["tenant_id"], row.get("subject"), row[time]) for row, time in named]
    return [whole[place] for place in await erased_among(connection, marks)] if whole else []


def _matching(
    marks: Sequence[Mark], digests: Mapping[str, bytes], found: list[Any], ahead: timedelta
) -> Iterable[int]:
    for place, mark in enumerate(marks):
        owners, received_at = (None, mark.tenant_id), moment_of(mark.received_at) - ahead
        subjects = (None, None if mark.subject is None else digests[mark.subject])
        for row in found:
            is_meant = row["tenant_id"] in owners and row["subject_digest"] in subjects
            if is_meant and received_at <= row["erased_at"]:
                yield place
                break


_OTHER_OPS = (*KEY_OPS, NOTED)  # entries that are no calls
MAX_PENDING_STREAMS, MAX_PENDING_BYTES = 2_000, 64_000_000
_RETRY_MS, _REPLAY_EVERY_MS = 200, 5_000
# Rows with large bodies take as long as hundreds of others and wait apart. From the first bound in
# bytes on they delay calls with large bodies, from the second on all calls.
MAX_WAITING, MAX_WAITING_BYTES, MOST_WAITING_BYTES = 10_000, 64_000_000, 256_000_000
_LARGE_ROW_BYTES = 262_144
_BATCH_ROWS, _AT_ONCE, _AT_ONCE_BEHIND = 200, 8, 50
_SMALL_BYTES = 2_000  # compressing less costs more than it saves; PostgreSQL does not either
_BLOB_TIMEOUT_S = 5.0
_LOST = Failure("process_died", "the process that made this call died before its end")
_of_usage = attrgetter(*rows.USAGE_COLUMNS)
_AUDIT_COLUMNS = (
    *("id", "created_at", "request_id", "tenant_id", "pool", "source", "status", "kind"),
    *("classified_by", "classified_reason", "priority", "model", "model_version"),
    *("response_id", "attempts", "lapses", "instance_id", "submitted_at", "admitted_at"),
    *("finished_at", "queue_ms", "upstream_ms", *rows.USAGE_COLUMNS),
    *("finish_reason", "failure"),
    *("endpoint", "http_status", "streamed", "key_id", "subject"),
    *("usage_state", "cost_micros", "images", "first_byte_ms", "usage_details", "upstream"),
    *(*rows.LINEAGE_COLUMNS, "prompt_head"),
)
_read_by_usage = itemgetter(*map(_AUDIT_COLUMNS.index, READ))
_BODY_COLUMNS = (
    *("id", "created_at", "role", "tenant_id", "pool", "encoding", "size_bytes", "data"),
    *("blob_key", "content_type", "omitted_bytes"),
)
_ASKED, _ATTACHED = ("prompt", "image_uri", "model"), ("file_id", "name", "mime_type", "size_bytes")
_BLOB_KEY = _BODY_COLUMNS.index("blob_key")


@dataclass(slots=True, eq=False)  # not frozen, since frozen instances are slower to make
class Prepared:
    """A record ready to be written: its row, and the rows of its bodies."""

    record: CallRecord
    audit: tuple[Any, ...]
    bodies: list[tuple[Any, ...]]


@dataclass(slots=True)
class _Overflow:
    """Counts records dropped while a buffer is full; logs when that begins and ends."""

    count: int = 0
    ever: int = 0

    def add(self) -> None:
        if not self.count:
            log.warning(Log.AUDIT_DROPPED, dropping=True)
        self.count += 1
        self.ever += 1

    def end(self) -> None:
        if self.count:
            log.warning(Log.AUDIT_DROPPED, dropping=False, dropped=self.count)
            self.count = 0


class AuditLog:
    """Writes ended calls. One per process: `start` it, `aclose` it at the end.

    Native calls are rows, written by COPY: `put` buffers them, `room` waits for room in the buffer.
    Rows to be written within another transaction go through `prepare`, `add` and `noted`. Ends of
    jobs, streams and answers under keys are entries, which wait on disk while PostgreSQL is
    unavailable; so does a row that could not be written.
    """

    def __init__(
        self,
        connections: Connections,
        notifications: Notifications,
        spill: Spill,
        journal: CallJournal,
        blobs: Blobs,
        *,
        budgets: Budgets,
        listeners: CallListeners,
        instance_id: str,
        when_full: Literal["block", "drop"],
        bodies_off: Collection[str] = (),
    ) -> None:
        self._bodies_off = frozenset(bodies_off)
        self._connections = connections
        self._notifications = notifications
        self._spill = spill
        self._journal = journal
        self._blobs = blobs
        self._budgets = budgets
        self._listeners = listeners
        self._instance_id = instance_id
        self._when_full = when_full
        self._room = asyncio.Event()  # set when either buffer has become shorter
        self._small, self._large = self._rows = WaitingRows(_BATCH_ROWS), WaitingRows(1)
        self._rows_left_out = _Overflow()
        self._entry_writer: GroupWriter[Json, None] = GroupWriter(self._commit)
        self._tasks: set[asyncio.Task[bool]] = set()
        self._pending = 0
        self._pending_bytes = 0
        self._entries_left_out = _Overflow()
        self._replay_soon = asyncio.Event()
        self._replayer: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        for one in self._rows:
            one.writer = asyncio.create_task(self._write_rows(one))
        self._connections.on_back.append(self._replay_soon.set)
        self._replay_soon.set()
        self._replayer = asyncio.create_task(self._replay())

    async def aclose(self, timeout_ms: int) -> None:
        """Write pending records within `timeout_ms`, rows within a third of it; entries that cannot
        be written are on disk."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_ms / 3000):
                for one in self._rows:
                    one.hurry()
                while any(one.writer is not None and one.size_bytes for one in self._rows):
                    self._room.clear()
                    await self._room.wait()
        await _end_tasks([one.writer for one in self._rows])
        self._closing = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_ms / 1000)
        await _end_tasks([self._replayer, *self._tasks])
        self._spill.close()

    @property
    def dropped(self) -> int:
        """The number of records dropped since this process's start, as a buffer was full."""
        return self._rows_left_out.ever + self._entries_left_out.ever

    @property
    def waiting(self) -> int:
        """The number of rows that are not written yet."""
        return sum(len(one.waiting) for one in self._rows)

    def is_full_for(self, size_bytes: int = MAX_WAITING_BYTES) -> bool:
        """Return whether a call with a body of this size waits for the record, or is dropped."""
        most_bytes = MOST_WAITING_BYTES if size_bytes <= _LARGE_ROW_BYTES else MAX_WAITING_BYTES
        small, is_full = self._small, self._large.size_bytes >= most_bytes
        return is_full or len(small.waiting) >= MAX_WAITING or small.size_bytes >= MAX_WAITING_BYTES

    async def room(self, size_bytes: int, wait_ms: float) -> None:
        """Wait before a call with a body of this size while the record cannot keep up, if
        `when_full` is `block`, at most as long as the call may wait. Raises StoreUnavailable."""
        try:
            async with asyncio.timeout(max(0, wait_ms) / 1000):
                while self._when_full == "block" and self.is_full_for(size_bytes):
                    self._room.clear()
                    await self._room.wait()
        except TimeoutError:
            raise StoreUnavailable("the record cannot keep up") from None

    def put(self, record: CallRecord) -> None:
        """Buffer the record of an ended native call; a full buffer with `drop` drops it."""
        size_bytes = record.size_bytes
        if self._when_full == "drop" and self.is_full_for(size_bytes):
            self._rows_left_out.add()
            self._listeners.note(record)
            self._journal.leave(record)
            return
        if self._rows_left_out.count:
            self._rows_left_out.end()
        rows_left = self._small if size_bytes <= _LARGE_ROW_BYTES else self._large
        rows_left.add(record, size_bytes)

    async def _write_rows(self, rows_left: WaitingRows) -> None:
        while True:
            # Others may wait for what a call has not used of its budget.
            await rows_left.gather(is_urgent=lambda: self._budgets.is_settling)
            began_at = monotonic()
            while taken := rows_left.take():
                if len(rows_left.waiting) >= rows_left.batch_rows > 1:
                    batches = taken, rows_left.take()  # one is prepared while one is written
                    await asyncio.gather(*(self._write_taken(rows_left, one) for one in batches))
                else:
                    await self._write_taken(rows_left, taken)
                if not rows_left.has_many:
                    break
            rows_left.wrote(monotonic() - began_at)

    async def _write_taken(
        self, rows_left: WaitingRows, taken: list[tuple[CallRecord, int]]
    ) -> None:
        batch = [record for record, _ in taken]
        self._listeners.notify(batch)
        try:
            await self._write(batch)
        except Exception:  # the top of a task: logged, and the loop continues
            log.exception(Log.INTERNAL_ERROR, component="request log")
        finally:
            rows_left.size_bytes -= sum(size_bytes for _, size_bytes in taken)
            self._room.set()

    async def prepare(self, record: CallRecord) -> Prepared:
        """Return the record for `add`; a large body is in the blob store then."""
        kept = record
        if record.source == "relay" and self._hides(record.tenant_id):
            kept = replace(record, request=b"", pieces=[], prompt_head="")
        return Prepared(record, self._audit_values(kept), await self._bodies(kept))

    def _hides(self, tenant: str) -> bool:
        """Return whether prompts and answers of a tenant's calls are not recorded."""
        return not self._bodies_off.isdisjoint((tenant, EVERY_TENANT))

    async def add(self, connection: asyncpg.Connection, prepared: list[Prepared]) -> list[Prepared]:
        """Write records in the caller's transaction. Return those that are left out, since their
        tenant or subject was erased; the caller passes them to `forget_bodies`."""
        calls = [one.record for one in prepared]
        marks = [Mark(one.tenant_id, one.subject, one.received_at) for one in calls]
        erased = await erased_among(connection, marks)
        remaining = [one for place, one in enumerate(prepared) if place not in erased]
        audit = [one.audit for one in remaining]
        await connection.copy_records_to_table("audit", records=audit, columns=_AUDIT_COLUMNS)
        bodies = [body for one in remaining for body in one.bodies]
        await connection.copy_records_to_table("bodies", records=bodies, columns=_BODY_COLUMNS)
        # A repeat after a commit with a lost reply has failed above, at the same ids.
        await add_usage(
            connection,
            [dict(zip(READ, _read_by_usage(one.audit), strict=True)) for one in remaining],
        )
        await self._budgets.settle_in(connection, (one.id for one in calls))
        return [prepared[place] for place in erased]

    async def forget_bodies(self, prepared: Iterable[Prepared]) -> None:
        """Delete the large bodies of records that were left out."""
        keys = [key for one in prepared for body in one.bodies if (key := body[_BLOB_KEY])]
        if keys:
            with suppress(StoreUnavailable):
                await self._blobs.delete(keys)

    def noted(self, records: Iterable[CallRecord]) -> None:
        """Notify listeners of records that `add` has written, and calls that wait for a budget."""
        written = list(records)
        self._budgets.wake()
        self._listeners.notify(written)

    async def _write(self, batch: list[CallRecord]) -> None:
        # A whole batch would block the event loop for milliseconds. With more than one waiting, few
        # at a time would fall behind: each pause is a round of a busy loop.
        is_behind = len(self._small.waiting) >= _BATCH_ROWS
        prepared, at_once = [], _AT_ONCE_BEHIND if is_behind else _AT_ONCE
        for number, record in enumerate(batch, 1):
            prepared.append(await self.prepare(record))
            if not number % at_once:
                await asyncio.sleep(0)
        try:
            erased = await self._connections.run(lambda connection: self.add(connection, prepared))
            self._budgets.wake()
            for record in batch:
                self._journal.leave(record)
            await self.forget_bodies(erased)
        except (StoreUnavailable, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as no:
            log.debug(Log.STORE_AWAY, detail=repr(no))
            for one in prepared:
                await self._enqueue(_entry(one), one.record)

    def _audit_values(self, record: CallRecord) -> tuple[Any, ...]:
        charge, answer, lineage = record.charge, record.answer, record.lineage
        failure, details = rows.failure_row(record.failure), charge.usage.details
        *counts, cost_micros = rows.counts_of((*_of_usage(charge.usage), charge.cost_micros))
        model, version, response_id, finish_reason, subject, *lineage_texts = rows.texts_of(
            (
                *(record.model or None, answer.model_version, answer.response_id),
                *(answer.finish_reason, record.subject),
                *(lineage.conversation, lineage.opening, lineage.trace_id, lineage.parent_span),
                record.prompt_head or None,
            )
        )
        conversation, opening, trace_id, parent_span, prompt_head = lineage_texts
        return (
            *(record.request_id, record.received_at, record.request_id, record.tenant_id),
            *(record.pool, record.source, record.status, record.kind, "body", ""),
            *(record.priority, model, version),
            *(response_id, record.earlier_attempts + record.attempts),
            *(record.lapses, self._instance_id, record.received_at),
            *(record.admitted_at, record.finished_at),
            *(record.queue_ms or record.waited_ms, record.upstream_ms or 0.0),
            *(*counts, finish_reason),
            None if failure is None else orjson.dumps(failure).decode(),
            *(record.endpoint, record.http_status, record.streamed, record.key_id),
            *(subject, str(charge.state), cost_micros),
            *(charge.images, answer.first_byte_ms),
            None if details is None else rows.details_text(charge.usage),
            record.upstream,
            *(conversation, opening, lineage.parent_id, trace_id, parent_span, prompt_head),
        )

    async def _bodies(self, record: CallRecord) -> list[tuple[Any, ...]]:
        bodies = []
        for role, raw, content_type, omitted_bytes in (
            ("request", record.request, record.request_type, record.request_omitted_bytes),
            ("response", record.response, record.response_type, record.omitted_bytes),
        ):
            if not raw:
                continue
            encoding = "raw"
            placed: tuple[bytes | None, str | None] = (raw, None)
            if len(raw) >= _SMALL_BYTES:
                large = len(raw) > WORTH_A_THREAD_BYTES
                encoding, data = await asyncio.to_thread(as_kept, raw) if large else as_kept(raw)
                placed = await _placed(data, self._blobs)
            request_id, received_at, pool = record.request_id, record.received_at, record.pool
            owner = (request_id, received_at, role, record.tenant_id, pool, encoding, len(raw))
            bodies.append(owner + placed + (cleaned(content_type), omitted_bytes))
        return bodies

    async def end_job(self, job: ClaimedJob, record: CallRecord, *, called: bool = True) -> bool:
        """Record a job's end, or keep it on disk while PostgreSQL is unavailable; True if written.
        Listeners of calls are then notified.

        Raises ClaimLost, or StoreUnavailable when the spill is full too. If the caller is
        cancelled, the end is still written or kept.
        """
        return await self._record(_end_of(job, record, self._blobs, called=called), record)

    async def retry_job(
        self, job: ClaimedJob, record: CallRecord, not_before: datetime | None, *, is_counted: bool
    ) -> bool:
        """Record a failed attempt of a job that is queued again, otherwise as `end_job`."""
        return await self._record(_retry_of(job, record, not_before, is_counted), record)

    async def record_stream(self, job: NewJob, record: CallRecord) -> None:
        """Accept a finished stream, to be written soon; wait while the buffer is full if
        `audit_full` is `block`. A cancelled caller has recorded it in full or not at all."""
        self._listeners.note(record)
        hides = self._hides(job.tenant_id)
        await self._enqueue(await _stream_of(job, record, self._blobs, hides=hides), record)

    async def _record(self, entry: Json | Awaitable[Json], ended: CallRecord) -> bool:
        task = self.keep(entry)
        task.add_done_callback(lambda done: self._notify(done, ended))
        return await asyncio.shield(task)

    def _notify(self, done: asyncio.Task[bool], ended: CallRecord) -> None:
        if not done.cancelled() and done.exception() is None:
            self._listeners.note(ended)

    async def _enqueue(self, entry: Json, record: CallRecord) -> None:
        """Accept `entry` into the bounded buffer; `when_full` decides what a full buffer does. The
        journal's entry of `record` ends with it.

        A caller that is cancelled while it waits for room has recorded nothing.
        """
        size_bytes = rows.size_of(entry)
        while self._pending and (
            self._pending >= MAX_PENDING_STREAMS
            or self._pending_bytes + size_bytes > MAX_PENDING_BYTES
        ):
            if self._when_full == "drop":
                self._entries_left_out.add()
                self._journal.leave(record)
                return
            self._room.clear()
            await self._room.wait()
        self._entries_left_out.end()
        self._pending += 1
        self._pending_bytes += size_bytes
        task = self.keep(entry, patient=True)
        task.add_done_callback(lambda done: self._left(size_bytes, done, record))

    def _left(self, size_bytes: int, done: asyncio.Task[bool], record: CallRecord) -> None:
        if not done.cancelled() and done.exception() is None:
            self._journal.leave(record)
        self._pending -= 1
        self._pending_bytes -= size_bytes
        self._room.set()

    def keep(self, entry: Json | Awaitable[Json], *, patient: bool = False) -> asyncio.Task[bool]:
        """Write an entry (True), or keep it on disk until it can be written (False), or for an
        operator if PostgreSQL rejects it: then the error is raised. While the spill is full too, a
        `patient` entry waits; for others StoreUnavailable is raised."""
        task = asyncio.create_task(self._write_or_keep(entry, patient))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[bool]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ClaimLost | StoreUnavailable):
            log.error(Log.INTERNAL_ERROR, component="recorder", error=repr(error))

    async def _write_or_keep(self, pending: Json | Awaitable[Json], patient: bool) -> bool:
        entry = pending if isinstance(pending, dict) else await pending
        while True:
            try:
                await self._entry_writer.write(entry, rows.size_of(entry))
                return True
            except StoreUnavailable:
                try:
                    await self._spill.keep(entry)
                    # Nothing else notifies of the end of a short outage.
                    loop = asyncio.get_running_loop()
                    loop.call_later(_RETRY_MS / 1000, self._replay_soon.set)
                    return False
                except StoreUnavailable:
                    if not patient or self._closing:
                        raise
            except (asyncpg.PostgresError, ValueError) as refused:
                await self._spill.reject(entry, repr(refused))
                raise
            except asyncio.CancelledError:  # by `aclose`
                await self._spill.keep(entry)
                raise
            await asyncio.sleep(_RETRY_MS / 1000)

    async def _replay(self) -> None:
        while True:
            with suppress(TimeoutError):  # another process may have died and left its file
                async with asyncio.timeout(next_beat_s(_REPLAY_EVERY_MS / 1000)):
                    await self._replay_soon.wait()
            self._replay_soon.clear()
            if self._connections.unavailable:
                continue
            try:
                await self.replay()
                await self._journal.lost(self._record_lost)
            except StoreUnavailable:
                continue  # the connections' return wakes us
            except Exception as failed:  # noqa: BLE001 -- top of a task
                log.error(Log.INTERNAL_ERROR, component="replay", error=repr(failed))

    async def replay(self) -> None:
        """Write what dead processes have left on the disk. Raises StoreUnavailable."""
        await self._spill.replay(self._write_again)

    async def _record_lost(self, records: list[CallRecord]) -> None:
        """Record calls of a process that died: their usage is unknown, unless sessions have noted
        it. A call that is on record already is left as it is. Raises StoreUnavailable."""
        for record in records:
            record.finished_at = record.admitted_at or record.received_at
            record.end(Status.FAILED, _LOST)
            is_stream = record.source == "stream"
            lost = rows.lost_stream(record) if is_stream else _entry(await self.prepare(record))
            await self.keep(lost)
            self._listeners.note(record)

    async def _write_again(self, entries: list[Json]) -> None:
        results = await asyncio.gather(
            *(self._entry_writer.write(entry, rows.size_of(entry)) for entry in entries),
            return_exceptions=True,
        )
        for entry, result in zip(entries, results, strict=True):
            if isinstance(result, StoreUnavailable):
                raise result
            if isinstance(result, ClaimLost):
                log.warning(
                    Log.SPILL_REPLAYED, request_id=str(entry["row"]["id"]), refused=repr(result)
                )
            elif isinstance(result, BaseException):
                await self._spill.reject(entry, repr(result))
                log.error(Log.INTERNAL_ERROR, component="replay", error=repr(result))

    async def _commit(self, entries: Sequence[Json]) -> list[Exception | None]:
        keys = [entry for entry in entries if entry["op"] in _OTHER_OPS]
        calls = [entry for entry in entries if entry["op"] not in _OTHER_OPS]

        async def work(
            connection: asyncpg.Connection,
        ) -> tuple[list[Json], tuple[set[str], list[UUID], set[str]]]:
            gone = await erased_entries(connection, entries)
            ids = {id(entry) for entry in gone}
            if remaining := [entry for entry in keys if id(entry) not in ids]:
                await settle_keys(connection, remaining)
                await add_noted(connection, remaining)
            rest = [entry for entry in calls if id(entry) not in ids]
            written = await _write_entries(connection, rest, self._instance_id)
            await self._budgets.settle_in(connection, (entry["row"]["id"] for entry in calls))
            return gone, written

        removed, (written, changed, pools) = await self._connections.run(work)
        erased = {id(entry) for entry in removed}
        written |= {str(entry["row"]["id"]) for entry in calls if id(entry) in erased}
        self._budgets.wake()
        self._notifications.changed(changed)
        self._notifications.work(pools)
        lost = [entry for entry in calls if str(entry["row"]["id"]) not in written]
        await self._discard([*removed, *lost])
        ids = {id(entry) for entry in lost}
        return [
            ClaimLost(f"another worker has {entry['row']['id']} now") if id(entry) in ids else None
            for entry in entries
        ]

    async def _discard(self, entries: Sequence[Json]) -> None:
        """Delete the blobs of entries that will not be written."""
        keys = [key for entry in entries for key in rows.blobs_of(entry)]
        if keys:
            with suppress(StoreUnavailable):  # they are deleted with other orphans
                await self._blobs.delete(keys)


async def _end_of(job: ClaimedJob, record: CallRecord, blobs: Blobs, *, called: bool) -> Json:
    """Return the entry of a job's end, `called` or not."""
    attempt, files = rows.result_row(record) if called else None, list[Json]()
    if attempt is not None:
        await rows.make_json(attempt)
    bodies = [await row_of("request", body_of_job(job), blobs)]
    if attempt is not None:
        if record.files:
            files = rows.file_rows("output", job.request_id, job.tenant_id, record.files)
        bodies.append(await row_of("response", body_of_answer(record, attempt), blobs))
    row = {
        **(attempt or {"finished_at": record.finished_at}),
        "id": job.request_id,
        "claim": job.claim,
        "status": record.status,
        "unmade": rows.unmade(record.failure),
        "failure": rows.failure_row(record.failure),
    }
    return rows.entry_of("end", row, attempt, files, bodies)


async def _retry_of(
    job: ClaimedJob, record: CallRecord, not_before: datetime | None, is_counted: bool
) -> Json:
    row = {
        "id": job.request_id,
        "claim": job.claim,
        "status": Status.QUEUED,
        "not_before": not_before,
        "uncounted": 0 if is_counted else 1,
        **({} if job.tier is None else {"tier": job.tier, "tiers_allowed": job.tiers_allowed}),
        "gave_way": int(record.code == CallPreempted.code),
        "upstream_ms": record.upstream_ms or 0.0,
        "first_byte_ms": record.answer.first_byte_ms,
        "failure": rows.failure_row(record.failure),
    }
    return rows.entry_of("retry", row, rows.result_row(record))


async def _stream_of(job: NewJob, record: CallRecord, blobs: Blobs, *, hides: bool) -> Json:
    """Return the entry of an ended stream. hides: without its prompt and the text of its answer."""
    attempt, files = rows.result_row(record) if record.was_admitted else None, rows.input_rows(job)
    if hides:
        job, attempt = replace(job, prompt=""), attempt and {**attempt, "result": None}
    bodies = [] if hides else [await row_of("request", cleaned(body_of_job(job)), blobs)]
    if attempt is not None:
        await rows.make_json(attempt)
        files += rows.file_rows("output", job.request_id, job.tenant_id, record.files)
        if not hides:
            bodies.append(await row_of("response", body_of_answer(record, attempt), blobs))
    return rows.entry_of("stream", rows.stream_row(job, record, attempt), attempt, files, bodies)


async def _end_tasks(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    left = [task for task in tasks if task is not None]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def _write_entries(
    connection: asyncpg.Connection, entries: Sequence[Json], instance_id: str
) -> tuple[set[str], list[UUID], set[str]]:
    """Write one batch in one transaction.

    Return the ids that are written, now or before; the ids that changed; the pools with new work.
    """
    ops: dict[str, dict[str, Json]] = {"end": {}, "retry": {}, "stream": {}, "relay": {}}
    for entry in sorted(entries, key=lambda entry: str(entry["row"]["id"])):
        ops[entry["op"]][str(entry["row"]["id"])] = entry
    rows: dict[str, asyncpg.Record] = {}
    pools: set[str] = set()
    if ops["end"]:
        rows |= await _rows(connection, "end_requests", ops["end"])
    if ops["retry"]:
        retried = await _rows(connection, "retry_requests", ops["retry"])
        pools = {row["pool"] for row in retried.values()}
        rows |= retried
    if ops["stream"]:
        rows |= await _rows(connection, "add_streams", ops["stream"])
    relayed = []
    if ops["relay"]:
        relayed = await _add_relayed(connection, list(ops["relay"].values()))
    by_id = {key: entry for group in ops.values() for key, entry in group.items()}
    fresh = [(by_id[key], row) for key, row in rows.items()]
    if files := [file for entry, _ in fresh for file in entry["files"]]:
        await connection.execute(sql("add_files"), dumps(files))
    await _end_attempts(connection, fresh, instance_id)
    await add_audit(
        connection,
        [
            (row, entry["attempt"] or {}, entry["row"]["failure"], entry["bodies"])
            for entry, row in fresh
            if entry["op"] != "retry"
        ],
        instance_id,
        relayed,
    )
    written = set(rows) | set(ops["stream"]) | set(ops["relay"])
    missing = [
        {"id": key, "claim": entry["row"]["claim"], "status": entry["row"]["status"]}
        for key, entry in by_id.items()
        if key not in written
    ]
    if missing:
        found = await connection.fetch(sql("already_written"), dumps(missing))
        written |= {str(row["id"]) for row in found}
    return written, [UUID(key) for key in rows], pools


async def _rows(
    connection: asyncpg.Connection, name: str, entries: dict[str, Json]
) -> dict[str, asyncpg.Record]:
    payload = dumps([entry["row"] for entry in entries.values()])
    await asyncio.sleep(0)  # sending a large batch blocks as long again
    found = await connection.fetch(sql(name), payload)
    return {str(row["id"]): row for row in found}


async def _add_relayed(connection: asyncpg.Connection, entries: list[Json]) -> list[Json]:
    """Write rows of native calls; return those that did not exist before."""
    added = await connection.fetch(sql("add_relayed"), dumps(entry["row"] for entry in entries))
    found = [body for entry in entries for body in entry["bodies"]]
    if found:
        await connection.execute(sql("add_relayed_bodies"), dumps(found))
    ids = {str(row["id"]) for row in added}
    return [entry["row"] for entry in entries if str(entry["row"]["id"]) in ids]


async def _end_attempts(
    connection: asyncpg.Connection, fresh: list[tuple[Json, asyncpg.Record]], instance_id: str
) -> None:
    ended, whole = [], []
    for entry, row in fresh:
        # An attempt without a result may have begun too: by a mark whose reply was lost.
        attempt = entry["attempt"] or {"finished_at": row["finished_at"]}
        how = {"outcome": rows.outcome_of(entry), "failure": entry["row"]["failure"]}
        common = {**attempt, **how, "result": None}  # only the request's row has it
        if row["attempt_id"] is not None:
            ended.append({**common, "id": row["attempt_id"], "created_at": row["attempt_at"]})
        elif entry["attempt"] is not None:
            owner = {"tenant_id": row["tenant_id"], "pool": row["pool"], "kind": row["kind"]}
            place = {"id": new_id(), "request_id": row["id"], "number": 1, "claim": row["claim"]}
            whole.append({**common, **owner, **place, "instance_id": instance_id})
    if ended:
        await connection.execute(sql("end_attempts"), *rows.ends_of(ended))
    if whole:
        await connection.execute(sql("add_attempts"), dumps(whole))


async def add_audit(
    connection: asyncpg.Connection,
    ended: Sequence[tuple[asyncpg.Record, Json, Json | None, list[Json]]],
    instance_id: str,
    relayed: Sequence[Json] = (),
) -> None:
    """Append audit rows, bodies and webhooks for requests that ended in this transaction, and add
    them to the totals, with the `relayed` rows that were appended before.

    Each item of `ended` is (the row as it is now, its last attempt, its failure, its bodies).
    """
    audits, packed = [], []
    for row, attempt, failure, own_bodies in ended:
        audit = audit_row(row, attempt, instance_id, failure)
        audits.append(audit)
        for body in own_bodies:
            owner = {"id": audit["id"], "tenant_id": row["tenant_id"], "pool": row["pool"]}
            packed.append({**body, **owner})
    if audits:
        await connection.execute(sql("add_audit"), dumps(audits))
    await add_webhooks(connection, [row for row, *_ in ended])
    if packed:
        await connection.execute(sql("add_bodies"), dumps(packed))
    await add_usage(connection, [*audits, *relayed])


async def audit_unanswered(
    connection: asyncpg.Connection, ended: list[asyncpg.Record], failure: Json, instance_id: str
) -> None:
    """Append audit rows for requests that the database has ended, without a worker's answer."""
    files: dict[object, list[asyncpg.Record]] = {row["id"]: [] for row in ended}
    for file in await connection.fetch(sql("get_input_files"), list(files)):
        files[file["request_id"]].append(file)
    jobs = [rows.claimed_job(row, files[row["id"]]) for row in ended]
    requests = [inline_row("request", body_of_job(job)) for job in jobs]
    await add_audit(
        connection,
        [(row, {}, failure, [body]) for row, body in zip(ended, requests, strict=True)],
        instance_id,
    )


def _entry(call: Prepared) -> Json:
    """Return a prepared record as an entry."""
    row = dict(zip(_AUDIT_COLUMNS, call.audit, strict=True))
    if row["failure"] is not None:
        row["failure"] = orjson.loads(row["failure"])
    if row["usage_details"] is not None:
        row["usage_details"] = orjson.loads(row["usage_details"])
    bodies = []
    for values in call.bodies:
        body = dict(zip(_BODY_COLUMNS, values, strict=True))
        if body["data"] is not None:
            body["data"] = b64encode(body["data"]).decode()
        bodies.append(body)
    return rows.entry_of("relay", row, bodies=bodies)


def of_row(row: Mapping[str, Any], failure: Json) -> CallRecord:
    """Return the record of a job that ended in the database, from its row as it is now."""
    record = CallRecord("job", row["tenant_id"], row["created_at"])
    record.pool, record.kind, record.queue_ms = row["pool"], row["kind"], row["queue_ms"]
    record.model = row["used_model"] or row["model"]
    record.finished_at = row["finished_at"]
    record.end(row["status"], Failure(failure["code"], failure["message"]))
    if row["admitted_at"] is not None:  # an attempt was sent, whose span has this call as parent
        record.request_id = rows.uuid_of(row["id"])
        record.trail = Trail.of(record.request_id, parent_of(row["traceparent"]))
    return record
