"""What is put on record of a native call, from the call and its life."""

from __future__ import annotations

from datetime import UTC, datetime

from tidegate.relay.call import Life, NativeCall
from tidegate.store.records import Failure
from tidegate.store.relayed import SOURCE, RelayRecord
from tidegate.store.states import Status


def record_of(
    call: NativeCall,
    life: Life,
    path: str,
    status: Status,
    failure: Failure | None,
    *,
    http_status: int,
    request_type: str | None = None,
    response_type: str | None = None,
) -> RelayRecord:
    """`path` is the one that was asked; http_status: what the client was told, 0 while nothing; the
    types are those of the bodies, as they were told."""
    target, endpoint = life.target, call.endpoint
    upstream = None if target is None else target.upstream
    caller, charge, told = call.caller, life.charge, life.told
    # By their order: names would double what so many fields cost.
    return RelayRecord(
        call.request_id,
        caller.tenant_id,
        upstream.pool if upstream else "",
        path,
        status,
        http_status,
        call.received_at,
        life.finished_at or datetime.now(UTC),
        call.body,
        life.said or (life.answer if life.pieces else b""),
        life.kind.value if life.kind else None,
        (target.model if target else life.model) or None,
        call.priority,
        life.tries,
        life.admitted_at,
        life.queue_ms,
        life.upstream_ms,
        life.first_byte_ms,
        charge,
        told.finish_reason,
        told.response_id,
        told.model_version,
        failure,
        life.streams,
        caller.key_id,
        call.subject,
        request_type,
        response_type,
        life.omitted_bytes,
        SOURCE,
        upstream.name if upstream else None,
        endpoint.dialect.value,
        endpoint.name,
        life.throttled,
        life.trail,
    )
