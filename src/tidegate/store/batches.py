"""Batches and their files, as their owners see them; and what a worker does to a batch as a whole.

Invariant: everything is asked for by its tenant, so that another's is not there; a batch is
validated and assembled under a claim, and a worker that lost it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import DEFAULT_POOL, Caller
from tidegate.errors import ClaimLost, FilesFull, IdempotencyConflict, NotFound
from tidegate.store import rows
from tidegate.store.bell import BATCHES, Bell
from tidegate.store.connection import Connections
from tidegate.store.line_records import ambiguous_of, record_of
from tidegate.store.native_keys import Given, end_key, known_key, take_key
from tidegate.store.queries import sql
from tidegate.store.records import Idempotency, Json
from tidegate.store.relayed import RelayLog, RelayRecord
from tidegate.store.states import Status

INPUT, OUTPUT = "batch", "batch_output"
_TIMEOUT_MS = 5_000
_BULK_TIMEOUT_MS = 30_000
_LEAST_BYTES = 4_096  # that a file counts for: it also is a row, and a block on the disk
_TIMES = (
    *("created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at"),
    *("failed_at", "expired_at", "cancelling_at", "cancelled_at"),
)
_MOST_UNANSWERED = 5_000
_CUT_SHORT = {"cancelled": Status.CANCELLED, "expired": Status.EXPIRED}


@dataclass(frozen=True, slots=True)
class BatchFile:
    """`purpose` is `batch` for what was uploaded, `batch_output` for what a batch made."""

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
    """`times` has those that have come, by name. `claim` fences what a worker does to it."""

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


class Batches:
    """Every method raises StoreUnavailable."""

    def __init__(
        self, connections: Connections, bell: Bell, relayed: RelayLog, instance_id: str
    ) -> None:
        self._relayed = relayed
        self._connections = connections
        self._bell = bell
        self._instance_id = instance_id

    # Files

    async def add_file(self, file: BatchFile, most_bytes: int) -> None:
        """Keep an upload. Raises FilesFull where its tenant would have more than `most_bytes` in
        uploads, whichever processes take them in."""
        tenant_id = file.tenant_id

        async def add(connection: asyncpg.Connection) -> int:
            await connection.execute(sql("lock_batch_files"), tenant_id)
            # A statement of its own: it sees what the one before us under the lock has added.
            kept = await connection.fetchval(
                sql("kept_batch_files"), tenant_id, file.file_id, _LEAST_BYTES
            )
            if kept + max(file.size_bytes, _LEAST_BYTES) <= most_bytes:
                await _add_file(connection, file)
            return int(kept)

        kept_bytes = await self._connections.run(add, timeout_ms=_TIMEOUT_MS)
        _check_room(tenant_id, kept_bytes, file.size_bytes, most_bytes)

    async def check_room(self, tenant_id: str, size_bytes: int, most_bytes: int) -> None:
        """Raises FilesFull where so much more is too much already now."""

        async def read(connection: asyncpg.Connection) -> int:
            return int(
                await connection.fetchval(sql("kept_batch_files"), tenant_id, None, _LEAST_BYTES)
            )

        kept_bytes = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        _check_room(tenant_id, kept_bytes, size_bytes, most_bytes)

    async def file(self, file_id: UUID, tenant_id: str) -> BatchFile:
        """Raises NotFound."""
        row = await self._row("get_batch_file", file_id, tenant_id)
        if row is None:
            raise NotFound(f"there is no file file-{file_id.hex}")
        return _file(row)

    async def files(
        self, tenant_id: str, *, after: UUID | None, purpose: str | None, limit: int, upwards: bool
    ) -> list[BatchFile]:
        name = "list_batch_files_upwards" if upwards else "list_batch_files"
        found = await self._rows(name, tenant_id, after, purpose, limit)
        return [_file(row) for row in found]

    async def delete_file(self, file_id: UUID, tenant_id: str) -> str | None:
        """Forget a file; its blob's key, or None while a batch has yet to read it. Raises
        NotFound."""

        async def delete(connection: asyncpg.Connection) -> tuple[str | None, bool]:
            key = await connection.fetchval(sql("delete_batch_file"), file_id, tenant_id)
            return key, bool(await connection.fetchval(sql("uses_batch_blob"), key))

        key, used = await self._connections.run(delete, timeout_ms=_TIMEOUT_MS)
        if key is None:
            raise NotFound(f"there is no file file-{file_id.hex}")
        return None if used else key

    async def needs_blob(self, key: str) -> bool:
        """Whether a file is kept in the blob, or a batch has yet to read it."""

        async def read(connection: asyncpg.Connection) -> bool:
            names = ("names_batch_blob", "uses_batch_blob")
            return any([await connection.fetchval(sql(name), key) for name in names])

        return await self._connections.run(read, timeout_ms=_TIMEOUT_MS)

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
        """The new batch, or the one that was made before it under the same key, as it now stands.
        Raises IdempotencyConflict where something else was asked for under the key."""
        tenant_id = caller.tenant_id
        given = (
            *(batch_id, tenant_id, endpoint, file.file_id, file.blob_key, file.size_bytes),
            *("24h", None if metadata is None else orjson.dumps(rows.cleaned(metadata)).decode()),
            *(None if caller.models is None else list(caller.models), caller.key_id, file.lines),
        )

        async def add(connection: asyncpg.Connection) -> asyncpg.Record:
            if once is not None:
                before = await take_key(connection, tenant_id, once, batch_id)
                if isinstance(before, Given):
                    return await _made_before(connection, tenant_id, once, before)
                made = Given(once.digest, batch_id, 200, "application/json", b"")
                await end_key(connection, tenant_id, once.key, made)
            await connection.execute(sql("add_batch"), *given)
            return await connection.fetchrow(sql("get_batch"), batch_id, tenant_id)

        added = _batch(await self._connections.run(add, timeout_ms=_TIMEOUT_MS))
        if added.batch_id == batch_id:
            self._bell.work([DEFAULT_POOL], [BATCHES])
        return added

    async def earlier(self, tenant_id: str, once: Idempotency) -> Batch | None:
        """The batch that was made under the key. Raises IdempotencyConflict where something else
        was asked for under it."""

        async def find(connection: asyncpg.Connection) -> asyncpg.Record | None:
            before = await known_key(connection, tenant_id, once.key)
            if before is None:
                return None
            return await _made_before(connection, tenant_id, once, before)

        row = await self._connections.run(find, timeout_ms=_TIMEOUT_MS)
        return None if row is None else _batch(row)

    async def get(self, batch_id: UUID, tenant_id: str) -> Batch:
        """Raises NotFound."""
        row = await self._row("get_batch", batch_id, tenant_id)
        if row is None:
            raise NotFound(f"there is no batch batch_{batch_id.hex}")
        return _batch(row)

    async def listed(self, tenant_id: str, *, after: UUID | None, limit: int) -> list[Batch]:
        return [_batch(row) for row in await self._rows("list_batches", tenant_id, after, limit)]

    async def cancel(self, batch_id: UUID, tenant_id: str) -> tuple[Batch, bool]:
        """The batch, and whether it could be cancelled now. Raises NotFound."""
        row = await self._row("cancel_batch", batch_id, tenant_id)
        return await self.get(batch_id, tenant_id), row is not None

    # The worker's side

    async def take(self) -> Batch | None:
        """One batch that is to be validated or assembled, if there is any."""
        row = await self._row("take_batch", self._instance_id)
        return None if row is None else _batch(row)

    async def free(self, batch: Batch) -> None:
        await self._row("free_batch", batch.batch_id, batch.claim)

    async def expire(self) -> None:
        await self._row("expire_batches")

    async def add_lines(self, batch: Batch, lines: Sequence[Json]) -> None:
        """Lines have `line`, `id`, `custom_id` and `body`, the last as JSON."""

        async def add(connection: asyncpg.Connection) -> None:
            await connection.execute(
                sql("add_batch_lines"), batch.batch_id, batch.tenant_id, rows.dumps(lines)
            )

        await self._connections.run(add, timeout_ms=_BULK_TIMEOUT_MS)

    async def begin(self, batch: Batch, total: int) -> None:
        await self._row("begin_batch", batch.batch_id, batch.claim, total)
        self._bell.work([DEFAULT_POOL], [BATCHES])

    async def refuse(self, batch: Batch, errors: Sequence[Json]) -> None:
        said = orjson.dumps(rows.cleaned(list(errors))).decode()

        async def refuse(connection: asyncpg.Connection) -> None:
            done = await connection.execute(sql("refuse_batch"), batch.batch_id, batch.claim, said)
            if done.endswith(" 1"):
                await connection.execute(sql("delete_batch_lines"), batch.batch_id)

        await self._connections.run(refuse, timeout_ms=_BULK_TIMEOUT_MS)

    async def lines_after(self, batch: Batch, line: int, limit: int) -> list[asyncpg.Record]:
        return await self._rows("finished_batch_lines", batch.batch_id, line, limit)

    async def end(self, batch: Batch, output: BatchFile | None, error: BatchFile | None) -> None:
        """With it go its lines; of those that were called without an answer the record tells.
        Raises ClaimLost."""
        ids = [None if one is None else one.file_id for one in (output, error)]
        calls = [await self._relayed.prepare(one) for one in await self._unanswered(batch)]

        async def end(connection: asyncpg.Connection) -> bool:
            ended = await connection.fetchval(sql("end_batch"), batch.batch_id, batch.claim, *ids)
            if ended is None:
                row = await connection.fetchrow(sql("get_batch"), batch.batch_id, batch.tenant_id)
                ours = [None if one is None else UUID(int=one.int) for one in _files_of(row)]
                return ours == ids and row["status"] == batch.ends_as  # a reply that was lost
            for file in (output, error):
                if file is not None:
                    await _add_file(connection, file)
            if calls:
                await self._relayed.add(connection, calls)
            await connection.execute(sql("delete_batch_lines"), batch.batch_id)
            return True

        if not await self._connections.run(end, timeout_ms=_BULK_TIMEOUT_MS):
            raise ClaimLost(f"another worker has batch_{batch.batch_id.hex} now")
        self._relayed.noted(call.record for call in calls)

    async def _unanswered(self, batch: Batch) -> list[RelayRecord]:
        if batch.ends_as not in _CUT_SHORT:
            return []
        status, ended = _CUT_SHORT[batch.ends_as], batch.ends_as
        return [
            record_of(row, status=status, failure=ambiguous_of(row, ended))
            for row in await self._rows("unanswered_batch_lines", batch.batch_id, _MOST_UNANSWERED)
        ]

    async def _row(self, name: str, *given: Any) -> asyncpg.Record | None:
        async def read(connection: asyncpg.Connection) -> asyncpg.Record | None:
            return await connection.fetchrow(sql(name), *given)

        return await self._connections.run(read, timeout_ms=_TIMEOUT_MS)

    async def _rows(self, name: str, *given: Any) -> list[asyncpg.Record]:
        async def read(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            found: list[asyncpg.Record] = await connection.fetch(sql(name), *given)
            return found

        return await self._connections.run(read, timeout_ms=_TIMEOUT_MS)


async def _add_file(connection: asyncpg.Connection, file: BatchFile) -> None:
    await connection.execute(
        sql("add_batch_file"),
        *(file.file_id, file.tenant_id, file.purpose, rows.clean(file.name)),
        *(file.size_bytes, file.lines, file.blob_key),
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
    connection: asyncpg.Connection, tenant_id: str, once: Idempotency, before: Given
) -> asyncpg.Record:
    if before.digest != once.digest:
        raise IdempotencyConflict("the key was used for another request")
    row = await connection.fetchrow(sql("get_batch"), before.request_id, tenant_id)
    if row is None:
        raise NotFound(f"there is no batch batch_{before.request_id.hex} any more")
    return row


def _files_of(row: asyncpg.Record) -> tuple[UUID | None, UUID | None]:
    return row["output_file_id"], row["error_file_id"]


def _file(row: asyncpg.Record) -> BatchFile:
    return BatchFile(
        file_id=UUID(int=row["id"].int),
        tenant_id=row["tenant_id"],
        purpose=row["purpose"],
        name=row["name"],
        size_bytes=row["size_bytes"],
        lines=row["lines"],
        blob_key=row["blob_key"],
        created_at=row["created_at"],
    )


def _batch(row: asyncpg.Record) -> Batch:
    metadata, errors = row["metadata"], row["errors"]
    return Batch(
        batch_id=UUID(int=row["id"].int),
        tenant_id=row["tenant_id"],
        endpoint=row["endpoint"],
        input_file_id=UUID(int=row["input_file_id"].int),
        input_blob=row["input_blob"],
        completion_window=row["completion_window"],
        status=row["status"],
        ends_as=row["ends_as"],
        total=row["total"],
        completed=row["completed"],
        failed=row["failed"],
        metadata=None if metadata is None else orjson.loads(metadata),
        errors=None if errors is None else orjson.loads(errors),
        output_file_id=row["output_file_id"],
        error_file_id=row["error_file_id"],
        models=None if row["models"] is None else tuple(row["models"]),
        times={name: row[name] for name in _TIMES if row[name] is not None},
        claim=row["claim"],
    )
