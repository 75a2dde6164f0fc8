"""Native calls that nobody waits for on a connection: those that jobs and batch lines wrap.

Invariant: a call goes through the spine as one of a client would, under the same limits; its
answer is kept whole and verbatim, or it counts as failed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from tidegate.call import Caller
from tidegate.errors import InvalidRequest, NotFound, UpstreamGarbled
from tidegate.relay.asked import Asked, asked_of
from tidegate.relay.call import KEPT_BYTES, MOST_TRIES, Life, NativeCall, Out
from tidegate.relay.headers import Headers
from tidegate.relay.paths import Dialect, Endpoint, dialect_of, endpoint_of
from tidegate.relay.spine import Relay
from tidegate.relay.work import Begun
from tidegate.tracing import Trail

# Of the JSON that holds one: a line of a batch, or what is handed in as a job.
LONGEST_BYTES = 20_000_000
_NO_DEADLINE_MS = 30 * 86_400_000
_JSON = (b"content-type", b"application/json")
# Without a version Anthropic refuses; its SDKs all say this one.
_HEADERS = {Dialect.ANTHROPIC: [_JSON, (b"anthropic-version", b"2023-06-01")]}
_ALLOWED = (
    "a native path that asks a model, such as /v1/chat/completions, /v1/responses, /v1/messages "
    "or /v1beta/models/<model>:generateContent"
)


def endpoint_named(path: object, field: str = "endpoint") -> Endpoint:
    """The endpoint of a path, which must ask a model for something, in one piece. Raises
    InvalidRequest."""
    endpoint = None
    if isinstance(path, str):
        endpoint = endpoint_of("POST", path, dialect_of(path, frozenset(), b""))
    if endpoint is None or not endpoint.is_counted:
        raise InvalidRequest(field, "there is no such endpoint to wait for", allowed=_ALLOWED)
    if endpoint.streams:
        raise InvalidRequest(
            field, "an answer that is waited for does not stream", allowed=_ALLOWED
        )
    return endpoint


def asked_by(endpoint: Endpoint, body: Mapping[str, Any]) -> Asked:
    """What a body asks for. Raises InvalidRequest, for a stream too, and for a model that can't be
    put on record."""
    if body.get("stream"):
        raise InvalidRequest(
            "body.stream", "an answer that is waited for does not stream", allowed="false"
        )
    asked = asked_of(endpoint, body)
    if not asked.model.isprintable():  # neither NUL nor half of a surrogate pair is
        raise InvalidRequest("body.model", "this is not the name of a model", allowed="a name")
    return asked


def detached_call(
    *,
    request_id: UUID,
    path: str,
    body: bytes,
    caller: Caller,
    priority: int,
    deadline_ms: int | None,
    trail: Trail | None = None,
    most_tries: int = MOST_TRIES,
) -> NativeCall:
    """The call as if a client made it now. `deadline_ms`: from now to admission. Raises NotFound
    for a path that another version took in."""
    try:
        endpoint = endpoint_named(path)
    except InvalidRequest as unknown:
        raise NotFound(f"{unknown.message}: {path}") from None
    return NativeCall(
        request_id=request_id,
        endpoint=endpoint,
        method="POST",
        query="",
        headers=_HEADERS.get(endpoint.dialect, [_JSON]),
        body=body,
        caller=caller,
        received=time.monotonic(),
        received_at=datetime.now(UTC),
        wait_ms=_NO_DEADLINE_MS if deadline_ms is None else deadline_ms,
        priority=priority,
        trail=trail,
        repeats=False,
        most_tries=max(1, min(most_tries, MOST_TRIES)),
    )


async def collected(relay: Relay, call: NativeCall, life: Life, admitted: Begun) -> None:
    """Make the call; `life.said` is then the whole answer. Raises what `Relay.run` raises, and
    UpstreamGarbled for an answer that is too long to keep, or compressed so that nobody reads it.
    """
    await relay.run(call, _Nobody(), life, admitted)
    if life.answer_bytes > KEPT_BYTES:
        raise UpstreamGarbled(f"the answer is longer than {KEPT_BYTES} bytes")
    if life.coding and not life.said:
        raise UpstreamGarbled(f"the answer is compressed ({life.coding[:20].decode('latin-1')})")


class _Nobody(Out):
    """Nobody is told while it comes: the spine keeps it in the call's `Life`."""

    async def start(self, status: int, headers: Headers) -> None:
        pass

    async def body(self, piece: bytes, more: bool) -> None:
        pass
