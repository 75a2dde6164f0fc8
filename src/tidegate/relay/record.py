"""What is put on record of a native call, from the call and its life."""

from __future__ import annotations

from datetime import UTC, datetime

from tidegate.relay.call import Life, NativeCall
from tidegate.store.records import Failure
from tidegate.store.relayed import RelayRecord
from tidegate.store.states import Status


def record_of(
    call: NativeCall,
    life: Life,
    path: str,
    status: Status,
    failure: Failure | None,
    *,
    http_status: int,
) -> RelayRecord:
    """`path` is the one that was asked; http_status: what the client was told, 0 while nothing."""
    target, endpoint = life.target, call.endpoint
    return RelayRecord(
        request_id=call.request_id,
        tenant_id=call.caller.tenant_id,
        pool=target.upstream.pool if target else "",
        endpoint=path,
        status=status,
        http_status=http_status,
        received_at=call.received_at,
        finished_at=life.finished_at or datetime.now(UTC),
        request=call.body,
        response=life.answer if life.pieces else b"",
        kind=life.kind.value if life.kind else None,
        model=target.model if target else life.model,
        priority=call.priority,
        tries=life.tries,
        admitted_at=life.admitted_at,
        queue_ms=life.queue_ms,
        upstream_ms=life.upstream_ms,
        first_byte_ms=life.first_byte_ms,
        charge=life.charge,
        finish_reason=life.told.finish_reason,
        response_id=life.told.response_id,
        failure=failure,
        streamed=life.streams,
        omitted_bytes=life.omitted_bytes,
        key_id=call.caller.key_id,
        subject=call.subject,
        upstream=target.upstream.name if target else None,
        dialect=endpoint.dialect.value,
        operation=endpoint.name,
        throttled=life.throttled,
        trail=life.trail,
    )
