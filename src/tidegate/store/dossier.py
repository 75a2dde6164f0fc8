"""All that is on record of one request, whoever owns it: for an operator.

A job is there from its submission on, a stream or a native call once it has ended, a line of a
batch while a worker has it and once it has ended. Invariant: read only, by keys, bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg

from tidegate.call import Classification, ClassifiedBy, Usage
from tidegate.errors import NotFound
from tidegate.store import rows
from tidegate.store.connection import Connections
from tidegate.store.outbox import webhook_of
from tidegate.store.places import Places
from tidegate.store.queries import sql
from tidegate.store.records import Failure, FileRecord, RequestRecord
from tidegate.store.states import Status

_TIMEOUT_MS = 3_000


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One try upstream. `outcome` is `running` while it goes on, and for ever where its worker
    died over it; else `failed`, or what the request became."""

    number: int
    outcome: str
    process: str
    model: str
    began_at: datetime
    admitted_at: datetime | None
    finished_at: datetime | None
    queue_ms: float | None
    upstream_ms: float | None
    first_byte_ms: float | None
    usage: Usage
    finish_reason: str | None
    failure: Failure | None
    response_id: str | None


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """A webhook. `ended_at` is when it was delivered or given up."""

    webhook_id: UUID
    event: str
    url: str
    state: str
    tries: int
    due_at: datetime
    answer_status: int | None
    problem: str | None
    created_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class BodyRecord:
    """Of a body that is kept: `omitted_bytes` of its middle are not."""

    role: str
    size_bytes: int
    content_type: str
    omitted_bytes: int


@dataclass(frozen=True, slots=True)
class Dossier:
    """A request. `asked_model` is the one that its caller named; `process` has it, or had it last.

    `request` and `ended` are its rows of `requests` and `audit`, where it has any.
    """

    record: RequestRecord
    pool: str
    process: str | None
    attempts: tuple[AttemptRecord, ...]
    webhooks: tuple[DeliveryRecord, ...]
    bodies: tuple[BodyRecord, ...]
    request: Mapping[str, Any]
    ended: Mapping[str, Any]

    def of(self, column: str) -> Any:
        """What either row has there, that of its end first; None where neither has it."""
        value = self.ended.get(column)
        return self.request.get(column) if value is None else value


class Dossiers:
    """Every method raises StoreUnavailable and NotFound."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._places = Places()

    async def of(self, request_id: UUID) -> Dossier:
        """All of one request."""

        async def read(connection: asyncpg.Connection) -> Dossier | None:
            request = await connection.fetchrow(sql("dossier_request"), request_id)
            ended = await connection.fetchrow(sql("dossier_audit"), request_id)
            if request is None and ended is None:
                line = await connection.fetchrow(sql("dossier_line"), request_id)
                return None if line is None else _of_line(line)
            return await self._read(connection, request_id, request, ended)

        found = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        if found is None:
            raise NotFound(f"no request {request_id} is on record")
        return found

    async def file(self, request_id: UUID, file_id: UUID) -> FileRecord:
        """A file of a request."""

        async def read(connection: asyncpg.Connection) -> asyncpg.Record | None:
            return await connection.fetchrow(sql("dossier_file"), file_id, request_id)

        row = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        if row is None:
            raise NotFound(f"no file {file_id} of request {request_id}")
        return rows.file_record(row)

    async def _read(
        self,
        connection: asyncpg.Connection,
        request_id: UUID,
        request: asyncpg.Record | None,
        ended: asyncpg.Record | None,
    ) -> Dossier:
        attempts = await connection.fetch(sql("dossier_attempts"), request_id)
        webhooks = await connection.fetch(sql("dossier_webhooks"), request_id)
        bodies: list[asyncpg.Record] = []
        if ended is not None:
            key = (ended["id"], ended["created_at"])
            bodies = await connection.fetch(sql("dossier_bodies"), *key)
        if request is not None:
            files = await connection.fetch(sql("get_request_files"), request_id)
            webhook = await webhook_of(connection, request)
            place = await self._places.of(connection, request)
            record = rows.request_record(request, files, webhook, place)
            if not record.status.is_end:
                ended = None  # a dead job that was requeued: that was its end before
        else:
            assert ended is not None
            record = rows.relayed_record(ended)
        first, last = dict(request or {}), dict(ended or {})
        return Dossier(
            record=record,
            pool=(first or last)["pool"],
            process=first.get("claimed_by") or last.get("instance_id"),
            attempts=tuple(_attempt(row) for row in reversed(attempts)),
            webhooks=tuple(_delivery(row) for row in reversed(webhooks)),
            bodies=tuple(_body(row) for row in bodies),
            request=first,
            ended=last,
        )


def _attempt(row: asyncpg.Record) -> AttemptRecord:
    return AttemptRecord(
        number=row["number"],
        outcome=row["outcome"],
        process=row["instance_id"],
        model=row["model"],
        began_at=row["created_at"],
        admitted_at=row["admitted_at"],
        finished_at=row["finished_at"],
        queue_ms=row["queue_ms"],
        upstream_ms=row["upstream_ms"],
        first_byte_ms=row["first_byte_ms"],
        usage=Usage(**{column: row[column] for column in rows.USAGE_COLUMNS}),
        finish_reason=row["finish_reason"],
        failure=rows.failure_of(row["failure"]),
        response_id=row["response_id"],
    )


def _delivery(row: asyncpg.Record) -> DeliveryRecord:
    return DeliveryRecord(
        webhook_id=UUID(int=row["id"].int),
        event=row["event"],
        url=row["url"],
        state=row["state"],
        tries=row["tries"],
        due_at=row["due_at"],
        answer_status=row["answer_status"],
        problem=row["problem"],
        created_at=row["created_at"],
        ended_at=row["ended_at"],
    )


def _body(row: asyncpg.Record) -> BodyRecord:
    content_type = row["content_type"] or "application/json"
    return BodyRecord(row["role"], row["size_bytes"], content_type, row["omitted_bytes"])


def _of_line(row: asyncpg.Record) -> Dossier:
    """A line of a batch that has not ended: it has no row of its own anywhere else."""
    made_at = datetime.fromtimestamp((row["id"].int >> 80) / 1000, UTC)
    record = RequestRecord(
        request_id=UUID(int=row["id"].int),
        tenant_id=row["tenant_id"],
        source="batch",
        status=Status.RUNNING if row["state"] == "calling" else Status.QUEUED,
        classification=Classification(None, ClassifiedBy.BODY, row["endpoint"]),
        model=None,
        priority=-100,
        attempts=row["attempts"],
        created_at=made_at,
        admitted_at=None,
        finished_at=None,
        not_before=None,
        deadline_at=row["expires_at"],
        queue_ms=None,
        upstream_ms=None,
        first_byte_ms=None,
        text=None,
        usage=Usage(),
        finish_reason=None,
        failure=None,
        place=None,
        version=1,
    )
    request = {"prompt": row["body"], "lapses": row["lapses"], "endpoint": row["endpoint"]}
    request |= {"key_id": row["key_id"], "batch_id": row["batch_id"]}
    return Dossier(record, "", row["claimed_by"], (), (), (), request, {})
