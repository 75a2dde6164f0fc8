"""`Idempotency-Key`: one effect of a request, however often it is sent.

On native paths a repeat (same path, query and body) gets the same answer, and waits while the first
one is in progress. Failures, and answers that are too long to keep, are not kept: a repeat is then
a new call. A call that continues in the background after its client has disconnected is not a
failure. If the process of the first call was lost before the answer was stored, the provider may
have been called; the header `idempotency-lost` of the new answer names that call.

Invariant: two requests have the same digest exactly if they request the same, whatever the encoding
of their bodies.
"""

from __future__ import annotations

from functools import partial
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qsl
from uuid import UUID

import orjson
from starlette.requests import Request

from tidegate.dialects.answers import WithoutUsageEvent
from tidegate.errors import IdempotencyConflict, InvalidRequest
from tidegate.http.body import in_slices
from tidegate.http.submission import Submission
from tidegate.record import FRAMED, KEPT_BYTES, CallRecord
from tidegate.spine.bodies import NativeCall, aside
from tidegate.spine.models import unchecked_facts
from tidegate.spine.out import Out
from tidegate.store.idempotency import KeyState, NativeKeys, Owner, Taken
from tidegate.store.records import Idempotency
from tidegate.telemetry.logging import Log, get_logger

HEADER = "Idempotency-Key"
_NAME = HEADER.lower().encode()
REPLAYED_HEADER = "idempotency-replayed"
LOST_HEADER = "idempotency-lost"
MOST_CHARS = 255
_ALLOWED = f"1 to {MOST_CHARS} printable characters of ASCII, such as a UUID"

PARAMETER: dict[str, Any] = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": MOST_CHARS},
    "description": "A repeated request with the same key returns the same `request_id` and "
    "creates no second job; a different request with the same key is rejected with "
    "409. The key is kept as long as the request.",
}


def key_of(request: Request) -> str | None:
    """Return the caller's key; None without one. Raises InvalidRequest."""
    return _key_in(request.scope["headers"])


def _key_in(headers: list[tuple[bytes, bytes]]) -> str | None:
    keys = [value.decode("latin-1") for name, value in headers if name == _NAME]
    if not keys:
        return None
    if len(keys) > 1:
        raise InvalidRequest(HEADER, "there is more than one Idempotency-Key", allowed=_ALLOWED)
    (key,) = keys
    if not (1 <= len(key) <= MOST_CHARS and key.isascii() and key.isprintable()):
        raise InvalidRequest(HEADER, "this idempotency key is not valid", allowed=_ALLOWED)
    return key


def idempotency_of(key: str | None, submission: Submission) -> Idempotency | None:
    """Return `key` with the digest of the submission, which must contain its files' `digests`."""
    if key is None:
        return None
    fields = {
        "prompt": submission.prompt,
        "type": submission.kind,
        "model": submission.model,
        "image_uri": submission.image_uri,
        "priority": submission.priority,
        "deadline_ms": submission.deadline_ms,
        "webhook_url": submission.webhook_url,
        "subject": submission.subject,
        "conversation": submission.conversation,
        "endpoint": submission.endpoint,
        "tiers": submission.tiers if submission.endpoint is None else submission.tiers or None,
        "files": [
            [file.name, file.mime_type, digest]
            for file, digest in zip(submission.attachments, submission.digests, strict=True)
        ],
    }
    # Absent fields are left out, so that a field added later does not change older digests.
    given = {name: value for name, value in fields.items() if value is not None}
    return Idempotency(key, sha256(orjson.dumps(given)).hexdigest())


_RETRY_AFTER_MS = 1_000

log = get_logger()


def has_key(headers: list[tuple[bytes, bytes]]) -> bool:
    """Return whether a request has a key."""
    return any(name == _NAME for name, _ in headers)


async def idempotency_in(
    call: NativeCall, headers: list[tuple[bytes, bytes]]
) -> Idempotency | None:
    """Return the key of a request with the digest of its content; None without a key. Raises
    InvalidRequest."""
    key = _key_in(headers) if call.endpoint.is_counted else None
    if key is None:
        return None
    body = call.body if call.form is None else call.form.form.digest
    digest = sha256(b"%b\0" % _target_of(call).encode())
    await aside(len(body), partial(digest.update, body))
    return Idempotency(key, digest.hexdigest())


def _target_of(call: NativeCall) -> str:
    """Return the requested target without the body. The order of query fields does not matter."""
    endpoint = call.endpoint
    path = endpoint.path_for(endpoint.model or "")
    if endpoint.model is not None and not endpoint.model_in_path:
        path = f"{path} of {endpoint.model}"
    if not call.query:
        return path
    pairs = parse_qsl(call.query, keep_blank_values=True, errors="surrogateescape")
    return f"{path}?{sorted(pairs)!a}"


class Once:
    """A request with a key. `lost`: an earlier request whose answer was lost, if any."""

    def __init__(self, keys: NativeKeys, call: NativeCall, idempotency: Idempotency) -> None:
        self._keys = keys
        self._call = call
        self._idempotency = idempotency
        self.lost: UUID | None = None
        self._owner = Owner(
            tenant_id=call.terms.caller.tenant_id,
            key=idempotency.key,
            request_id=call.terms.request_id,
            subject=call.terms.subject,
            received_at=call.received_at,
        )

    async def take(self) -> Taken | KeyState:
        """Take the key for this request, or return its stored answer. Raises StoreUnavailable, and
        IdempotencyConflict, also if the first request is not answered before our deadline."""
        call = self._call
        taken = await self._keys.take(self._owner, self._idempotency)
        while isinstance(taken, KeyState):
            if taken.digest != self._idempotency.digest:
                raise IdempotencyConflict("this idempotency key was used for a different request")
            if taken.answer is not None:
                return taken
            if call.terms.left_ms() <= 0:
                raise IdempotencyConflict(
                    "the first request with this idempotency key is still in progress",
                    retry_after_ms=_RETRY_AFTER_MS,
                )
            known = await self._keys.poll(call.terms.caller.tenant_id, self._idempotency.key)
            if known is None or known.lapsed:
                taken = await self._keys.take(self._owner, self._idempotency)
            else:
                taken = known
        self.lost = taken.lost
        if taken.lost is not None:
            request_id = str(call.terms.request_id)
            log.warning(Log.KEY_LAPSED, request_id=request_id, lost_request_id=str(taken.lost))
        return taken

    async def replay(self, given: KeyState, out: Out) -> None:
        """Answer with a stored answer."""
        assert given.answer is not None
        answer, raw = given.answer, self._call.body
        # A form has no JSON, and no field that requests the usage of a stream.
        if raw and given.content_type.lower().startswith("text/event-stream"):
            reading = partial(unchecked_facts, self._call.endpoint, raw)
            _, facts = await aside(len(raw), reading)
            if facts.wants_usage:
                without = WithoutUsageEvent()
                answer = without.take(answer) + without.rest()
        headers = [
            (b"content-type", given.content_type.encode("latin-1")),
            (b"content-length", str(len(answer)).encode()),
            (REPLAYED_HEADER.encode(), b"true"),
        ]
        await out.start(given.http_status, headers)
        for piece, more in in_slices(answer):
            await out.body(piece, more)

    def ended(self, record: CallRecord, content_type: str) -> None:
        """Keep the answer after it was sent, decoded: a repeat requests no encoding."""
        if record.answer_bytes > KEPT_BYTES or (record.coding and not record.text):
            self.failed()  # it is incomplete
        else:
            answer = record.body if record.coding == FRAMED else record.text
            self._keys.end(self._owner, record.http_status, content_type, answer)

    def failed(self) -> None:
        """Free the key, so that the next request with it makes a call."""
        self._keys.free(self._owner)
