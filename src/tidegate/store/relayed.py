"""The record of native calls: one audit row and two bodies each, written behind, by COPY.

Invariant: the hot path only appends to a bounded buffer. What COPY could not write goes, row by
row, to the recorder, which keeps it on the disk while PostgreSQL is away; a repeated row is left.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter, itemgetter
from typing import Any, Literal
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import NO_CHARGE, Charge
from tidegate.errors import StoreUnavailable
from tidegate.observed import Observed, Observers, Source
from tidegate.store import rows
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.bodies import INLINE_BYTES, WORTH_A_THREAD_BYTES, as_kept
from tidegate.store.connection import Connections
from tidegate.store.erased import Mark, erased_among
from tidegate.store.recorder import Recorder
from tidegate.store.records import Failure, Json
from tidegate.store.spending import Spending
from tidegate.store.states import Status
from tidegate.store.usage import READ, add_usage
from tidegate.telemetry import Log, get_logger
from tidegate.tracing import Trail

log = get_logger()

SOURCE: Source = "relay"
MAX_WAITING = 10_000
MAX_WAITING_BYTES = 64_000_000
_BATCH_ROWS = 200
_AT_ONCE = 8
_LINGER_S = 0.05
_SMALL_BYTES = 2_000  # compressing less costs more than it saves; PostgreSQL compresses none either
_BLOB_TIMEOUT_S = 5.0
_USAGE = rows.USAGE_COLUMNS
_of_usage = attrgetter(*_USAGE)
_AUDIT_COLUMNS = (
    *("id", "created_at", "request_id", "tenant_id", "pool", "source", "status", "kind"),
    *("classified_by", "classified_reason", "priority", "model", "model_version"),
    *("response_id", "attempts", "lapses", "instance_id", "submitted_at", "admitted_at"),
    *("finished_at", "queue_ms", "upstream_ms", *_USAGE, "finish_reason", "failure"),
    *("endpoint", "http_status", "streamed", "key_id", "subject"),
    *("usage_state", "cost_micros", "images", "first_byte_ms", "usage_details"),
)
_read_by_usage = itemgetter(*map(_AUDIT_COLUMNS.index, READ))
_BODY_COLUMNS = (
    *("id", "created_at", "role", "tenant_id", "pool", "encoding", "size_bytes", "data"),
    *("blob_key", "content_type", "omitted_bytes"),
)


# role, encoding, size_bytes, data, blob_key
_Packed = tuple[str, str, int, bytes | None, str | None]


@dataclass(slots=True)
class RelayRecord:
    """One native call as it ended. `request` and `response` are the bytes as they travelled."""

    request_id: UUID
    tenant_id: str
    pool: str
    endpoint: str
    status: Status
    http_status: int
    received_at: datetime
    finished_at: datetime
    request: bytes
    response: bytes
    kind: str | None = None
    model: str | None = None
    priority: int = 0
    tries: int = 0
    admitted_at: datetime | None = None
    queue_ms: float = 0.0
    upstream_ms: float = 0.0
    first_byte_ms: float | None = None
    charge: Charge = NO_CHARGE
    finish_reason: str | None = None
    response_id: str | None = None
    model_version: str | None = None
    failure: Failure | None = None
    streamed: bool = False
    key_id: str | None = None
    subject: str | None = None
    request_type: str | None = None  # content types, as they were told
    response_type: str | None = None
    omitted_bytes: int = 0  # of the answer's middle
    source: Source = SOURCE  # or `batch`, for a line of one
    upstream: str | None = None  # what follows is for those who count calls, and not on record
    dialect: str = ""
    operation: str = ""
    throttled: int = 0
    trail: Trail | None = None

    @property
    def size_bytes(self) -> int:
        return 1_000 + len(self.request) + len(self.response)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A record as it is written: its row, and its bodies."""

    record: RelayRecord
    audit: tuple[Any, ...]
    bodies: list[_Packed]


class RelayLog:
    """One per process. `start`, then `put` or `room`; `aclose` at the end. What has to be written
    with something else goes through `prepare`, `add` and `noted` instead of `put`."""

    def __init__(
        self,
        connections: Connections,
        recorder: Recorder,
        blobs: Blobs,
        *,
        instance_id: str,
        when_full: Literal["block", "drop"],
        spending: Spending,
        observers: Observers,
    ) -> None:
        self._connections = connections
        self._recorder = recorder
        self._spending = spending
        self._observers = observers
        self._blobs = blobs
        self._instance_id = instance_id
        self._when_full = when_full
        self._waiting: deque[RelayRecord] = deque()
        self._waiting_bytes = 0
        self._more = asyncio.Event()
        self._room = asyncio.Event()
        self._dropped = 0
        self._dropped_ever = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def aclose(self, timeout_ms: int) -> None:
        """Write what is waiting within `timeout_ms`."""
        if self._task is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_ms / 1000):
                while self._waiting_bytes:
                    self._more.set()
                    self._room.clear()
                    await self._room.wait()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def dropped(self) -> int:
        """How many records this process has left out since its start, for want of room."""
        return self._dropped_ever + self._recorder.dropped

    @property
    def waiting(self) -> int:
        """Records that are not written yet."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= MAX_WAITING or self._waiting_bytes >= MAX_WAITING_BYTES

    async def room(self) -> None:
        """Before a call: with `block`, wait while the record can't keep up."""
        while self._when_full == "block" and self.is_full:
            self._room.clear()
            await self._room.wait()

    async def room_within(self, wait_ms: float) -> None:
        """The same, no longer than a call may wait. Raises StoreUnavailable."""
        try:
            async with asyncio.timeout(max(0, wait_ms) / 1000):
                await self.room()
        except TimeoutError:
            raise StoreUnavailable("the record cannot keep up") from None

    def put(self, record: RelayRecord) -> None:
        """Take in the record of a call that has ended; with `drop`, not while it is full."""
        if self._when_full == "drop" and self.is_full:
            if not self._dropped:
                log.warning(Log.AUDIT_DROPPED, dropping=True)
            self._dropped += 1
            self._dropped_ever += 1
            self._observers.note(observed_of(record))
            return
        if self._dropped:
            log.warning(Log.AUDIT_DROPPED, dropping=False, dropped=self._dropped)
            self._dropped = 0
        self._waiting.append(record)
        self._waiting_bytes += record.size_bytes
        self._more.set()

    async def _run(self) -> None:
        while True:
            await self._more.wait()
            await asyncio.sleep(_LINGER_S)  # a batch costs as much as a row
            self._more.clear()
            while self._waiting:
                count = min(len(self._waiting), _BATCH_ROWS)
                batch = [self._waiting.popleft() for _ in range(count)]
                self._observers.tell([observed_of(record) for record in batch])
                try:
                    await self._write(batch)
                except Exception:  # the top of a task: logged, and it goes on
                    log.exception(Log.INTERNAL_ERROR, where="relay log")
                finally:
                    self._waiting_bytes -= sum(record.size_bytes for record in batch)
                    self._room.set()

    async def prepare(self, record: RelayRecord) -> Prepared:
        """The record as `add` takes it; a large body is in the blob store from now on."""
        return Prepared(record, self._audit_values(record), await self._packed(record))

    async def add(self, connection: asyncpg.Connection, given: Sequence[Prepared]) -> set[int]:
        """Write records in a transaction of the caller's. Returns the places of those that are left
        out, since their tenant or subject was erased."""
        marks = [
            Mark(one.record.tenant_id, one.record.subject, one.record.received_at) for one in given
        ]
        gone = await erased_among(connection, marks)
        kept = [one for place, one in enumerate(given) if place not in gone]
        await connection.copy_records_to_table(
            "audit",
            records=[one.audit for one in kept],
            columns=_AUDIT_COLUMNS,
            timeout=None,
        )
        bodies = [_body_values(one.record, *body) for one in kept for body in one.bodies]
        await connection.copy_records_to_table("bodies", records=bodies, columns=_BODY_COLUMNS)
        # A repeat after a commit whose reply was lost has failed by now, at the same ids.
        await add_usage(
            connection, [dict(zip(READ, _read_by_usage(one.audit), strict=True)) for one in kept]
        )
        return gone

    def noted(self, records: Iterable[RelayRecord]) -> None:
        """Tell those who count calls, and their costs, of records that `add` has written."""
        written = list(records)
        self._spending.written(record.request_id for record in written)
        self._observers.tell([observed_of(record) for record in written])

    async def _write(self, batch: list[RelayRecord]) -> None:
        given = []
        for number, record in enumerate(batch, 1):
            given.append(await self.prepare(record))
            if not number % _AT_ONCE:
                await asyncio.sleep(0)  # a whole batch would hold up everybody for milliseconds
        try:
            gone = await self._connections.run(lambda connection: self.add(connection, given))
            self._spending.written(record.request_id for record in batch)
            if gone:
                keys = [body[-1] for place in gone for body in given[place].bodies if body[-1]]
                with suppress(StoreUnavailable):
                    await self._blobs.delete(keys)
        except (StoreUnavailable, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as no:
            log.debug(Log.STORE_AWAY, detail=repr(no))
            for one in given:
                await self._recorder.enqueue(_entry(one.record, one.audit, one.bodies))

    def _audit_values(self, record: RelayRecord) -> tuple[Any, ...]:
        failure = rows.failure_row(record.failure)
        charge = record.charge
        usage = [rows.count_of(amount) for amount in _of_usage(charge.usage)]
        return (
            *(record.request_id, record.received_at, record.request_id, record.tenant_id),
            *(record.pool, record.source, record.status.value, record.kind, "body", ""),
            *(record.priority, _text(record.model), _text(record.model_version)),
            *(_text(record.response_id), record.tries, 0),
            *(self._instance_id, record.received_at, record.admitted_at, record.finished_at),
            *(record.queue_ms, record.upstream_ms, *usage, _text(record.finish_reason)),
            None if failure is None else orjson.dumps(failure).decode(),
            *(record.endpoint, record.http_status, record.streamed, record.key_id),
            *(_text(record.subject), charge.state.value, rows.count_of(charge.cost_micros)),
            *(charge.images, record.first_byte_ms),
            None if charge.usage.details is None else rows.details_text(charge.usage),
        )

    async def _packed(self, record: RelayRecord) -> list[_Packed]:
        both: list[_Packed] = []
        for role, raw in (("request", record.request), ("response", record.response)):
            size = len(raw)
            if size >= _SMALL_BYTES:
                both.append(await self._pack(role, raw))
            elif size:
                both.append((role, "raw", size, raw, None))
        return both

    async def _pack(self, role: str, raw: bytes) -> _Packed:
        size = len(raw)
        large = size > WORTH_A_THREAD_BYTES
        encoding, data = await asyncio.to_thread(as_kept, raw) if large else as_kept(raw)
        if len(data) > INLINE_BYTES:
            key = new_key(datetime.now(UTC))
            with suppress(StoreUnavailable, TimeoutError):  # then it stays in its row
                async with asyncio.timeout(_BLOB_TIMEOUT_S):
                    await self._blobs.put(key, data)
                return role, encoding, size, None, key
        return role, encoding, size, data, None


def observed_of(record: RelayRecord) -> Observed:
    """The same for those who count calls."""
    failure, charge, tried = record.failure, record.charge, record.tries > 0
    usage = charge.usage
    # By their order: names would double what so many fields cost.
    return Observed(
        record.source,
        record.status.value,
        record.tenant_id,
        record.finished_at,
        record.pool,
        record.kind,
        record.model,
        record.upstream,
        record.dialect,
        record.operation,
        record.streamed,
        record.http_status,
        None if failure is None else failure.code,
        record.queue_ms if tried else None,
        record.upstream_ms if tried else None,
        record.first_byte_ms,
        record.tries,
        record.throttled,
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_tokens,
        usage.thoughts_tokens,
        charge.cost_micros,
        record.request_id,
        record.received_at,
        record.response_id,
        record.finish_reason,
        record.trail,
        None if usage.details is None else usage.details.cache_write_tokens,
        record.model_version,
    )


def _body_values(
    record: RelayRecord,
    role: str,
    encoding: str,
    size_bytes: int,
    data: bytes | None,
    blob_key: str | None,
) -> tuple[Any, ...]:
    owner = (record.tenant_id, record.pool)
    place = (record.request_id, record.received_at, role)
    is_request = role == "request"
    said = record.request_type if is_request else record.response_type
    omitted_bytes = 0 if is_request else record.omitted_bytes
    return (*place, *owner, encoding, size_bytes, data, blob_key, _text(said), omitted_bytes)


def _entry(record: RelayRecord, values: tuple[Any, ...], both: list[_Packed]) -> Json:
    """The same for the recorder, as JSON."""
    row = dict(zip(_AUDIT_COLUMNS, values, strict=True))
    if row["failure"] is not None:
        row["failure"] = orjson.loads(row["failure"])
    if row["usage_details"] is not None:
        row["usage_details"] = orjson.loads(row["usage_details"])
    bodies = []
    for packed in both:
        body = dict(zip(_BODY_COLUMNS, _body_values(record, *packed), strict=True))
        if body["data"] is not None:
            body["data"] = b64encode(body["data"]).decode()
        bodies.append(body)
    return {"op": "relay", "row": row, "attempt": None, "files": [], "bodies": bodies}


def _text(text: str | None) -> str | None:
    return None if text is None else rows.clean(text)
