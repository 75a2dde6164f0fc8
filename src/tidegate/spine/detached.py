"""Detached calls: native calls of jobs and batch lines, without a waiting client.

A detached call is JSON that is checked at submission and sent later, by any worker; the answer is
kept in its `CallRecord`.

Invariant: a detached call is one call of a model, whose answer is text and is not streamed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import UUID

import orjson

from tidegate.call import DEFAULT_POOL, Caller, Status
from tidegate.dialects import DIALECTS, endpoint_in
from tidegate.dialects.requests import refuse_to_go_on
from tidegate.dialects.spec import GOING_ON, Endpoint, Operation, RequestFacts
from tidegate.errors import InvalidRequest, NotFound, UpstreamGarbled
from tidegate.record import KEPT_BYTES, CallRecord
from tidegate.spine.bodies import NativeCall, aside
from tidegate.spine.models import unchecked_facts
from tidegate.spine.native import NativeExchange, Relay
from tidegate.spine.out import NothingOut
from tidegate.spine.run import MOST_TRIES, OnAdmitted, Terms
from tidegate.store.batches import BatchStand
from tidegate.store.requests import Whereabouts
from tidegate.telemetry.tracing import Trail

# Of the JSON of one call: a line of a batch, or a job.
LONGEST_BYTES = 20_000_000
_JSON = (b"content-type", b"application/json")
_ALLOWED = (
    "a native path that asks a model for JSON, such as /v1/chat/completions, /v1/responses, "
    "/v1/messages or /v1beta/models/<model>:generateContent"
)


def endpoint_named(path: object, field: str = "endpoint") -> Endpoint:
    """Return the endpoint of a path, which must call a model without streaming. Raises
    InvalidRequest."""
    endpoint = None
    if isinstance(path, str):
        endpoint, _ = endpoint_in("POST", path, (), b"")
    if endpoint is None or not endpoint.is_counted:
        raise InvalidRequest(field, "unknown endpoint", allowed=_ALLOWED)
    if endpoint.streams:
        raise InvalidRequest(field, "jobs and batches do not support streaming", allowed=_ALLOWED)
    if endpoint.operation in GOING_ON:
        message = "jobs and batches do not support background work"
        raise InvalidRequest(field, message, allowed=_ALLOWED)
    if endpoint.operation is Operation.SPEAK:  # results are kept as text
        raise InvalidRequest(
            field, "jobs and batches do not support audio output", allowed=_ALLOWED
        )
    return endpoint


def plain_path(path: str) -> str:
    """Return the path of the same call without streaming."""
    return path.replace(":streamGenerateContent", ":generateContent")


def wrapped_facts(endpoint: Endpoint, body: Mapping[str, Any]) -> RequestFacts:
    """Return the facts of a body. Raises InvalidRequest, also for a stream, and for a model name
    that cannot be stored."""
    if body.get("stream"):
        raise InvalidRequest(
            "body.stream", "jobs and batches do not support streaming", allowed="false"
        )
    facts = DIALECTS[endpoint.dialect].request_facts(endpoint, body)
    if facts.runs_in_background:
        refuse_to_go_on(body)
    if not facts.model.isprintable():  # PostgreSQL stores neither NUL nor a lone surrogate
        raise InvalidRequest("body.model", "invalid model name", allowed="a name")
    return facts


def detached_call(
    *,
    request_id: UUID,
    path: str = "",
    endpoint: Endpoint | None = None,
    body: bytes,
    caller: Caller,
    priority: int,
    deadline_ms: int | None,
    trail: Trail | None = None,
    most_tries: int = MOST_TRIES,
    preempted: int | None = None,
    has_own_deadline: bool = False,
    headers: Mapping[str, str] | None = None,
) -> NativeCall:
    """Return the call as if a client sent it now. `deadline_ms`: from now, the other options as in
    `Terms`; `headers` add to the dialect's usual ones or replace them. Raises NotFound for a path
    that only another version accepts."""
    if endpoint is None:
        try:
            endpoint = endpoint_named(path)
        except InvalidRequest as unknown:
            raise NotFound(f"{unknown.message}: {path}") from None
    terms = Terms(
        request_id=request_id,
        caller=caller,
        received=time.monotonic(),
        wait_ms=deadline_ms,
        priority=priority,
        trail=trail,
        repeats=False,
        most_tries=max(1, min(most_tries, MOST_TRIES)),
        preempted=preempted,
        has_own_deadline=has_own_deadline,
    )
    sent = dict((_JSON, *DIALECTS[endpoint.dialect].headers))
    sent |= {name.encode(): value.encode() for name, value in (headers or {}).items()}
    return NativeCall(terms, endpoint, "POST", "", [*sent.items()], body, datetime.now(UTC))


def next_line(stand: BatchStand) -> Whereabouts | None:
    """Return the next line of a batch as a waiting job; None if no line waits, or the batch is
    paused."""
    if stand.body is None or stand.status != "in_progress":
        return None
    if stand.paused_by is not None or stand.lacks_tenant:
        return None
    facts = wrapped_facts(endpoint_named(stand.endpoint), orjson.loads(stand.body))
    return Whereabouts(
        request_id=stand.batch_id,
        tenant_id=stand.tenant_id,
        pool=DEFAULT_POOL,
        status=Status.QUEUED,
        kind=str(facts.kind),
        model=facts.model or None,
        claimed_by=stand.claimed_by,
        attempts=stand.attempts,
        created_at=stand.created_at,
        not_before=stand.not_before,
        admitted_at=None,
        finished_at=None,
        failure_code=stand.failure_code,
        failure_message=stand.failure_message,
        is_line=True,
        key_id=stand.key_id,
    )


async def collected(
    relay: Relay, call: NativeCall, record: CallRecord, admitted: OnAdmitted
) -> None:
    """Make the call and collect the whole answer in `record.text`. Raises what `Relay.run` raises,
    and UpstreamGarbled for an answer that is too long to keep or in an unreadable compression."""
    await relay.run(call, NothingOut(), record, admitted)
    if record.answer_bytes > KEPT_BYTES:
        raise UpstreamGarbled(f"the answer is longer than {KEPT_BYTES} bytes")
    if record.coding and not record.text:
        raise UpstreamGarbled(f"the answer is compressed ({record.coding[:20].decode('latin-1')})")


async def check_bounded(relay: Relay, call: NativeCall) -> None:
    """Raises BudgetUnbounded if making the call could only do so; NotFound if no upstream serves
    it, InvalidRequest for a body that is invalid in its dialect."""
    spine, endpoint = relay.spine, call.endpoint
    body, facts = await aside(len(call.body), partial(unchecked_facts, endpoint, call.body))
    record = CallRecord("job", call.terms.caller.tenant_id, call.received_at)
    exchange = NativeExchange(relay.wire, spine.timeouts, call, body, facts, NothingOut(), record)
    targets = spine.targets.of(endpoint.dialect, facts.model)
    spine.check_bounded(exchange, targets)
