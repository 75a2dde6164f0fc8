"""The header `Idempotency-Key`: what a caller asks for once, however often it has to ask.

Invariant: two requests have the same digest exactly when they ask for the same thing, whatever
encoding their bodies came in.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import orjson
from starlette.requests import Request

from tidegate.errors import InvalidRequest
from tidegate.http.forms import Submission
from tidegate.store.records import Idempotency

HEADER = "Idempotency-Key"
REPLAYED_HEADER = "idempotency-replayed"
LOST_HEADER = "idempotency-lost"
MOST_CHARS = 255
_ALLOWED = f"1 to {MOST_CHARS} printable characters of ASCII, such as a UUID"

PARAMETER: dict[str, Any] = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": MOST_CHARS},
    "description": "The same key with the same request gives the same `request_id` again, and "
    "one job; with a different request it is refused with 409. Kept as long as the request.",
}


def key_of(request: Request) -> str | None:
    """The caller's key, None without one. Raises InvalidRequest."""
    given = request.headers.getlist(HEADER)
    if not given:
        return None
    key = given[0]
    if len(given) > 1:
        raise InvalidRequest(HEADER, "there is more than one Idempotency-Key", allowed=_ALLOWED)
    if not is_key(key):
        raise InvalidRequest(HEADER, "this is not an idempotency key", allowed=_ALLOWED)
    return key


def is_key(text: str) -> bool:
    return 1 <= len(text) <= MOST_CHARS and text.isascii() and text.isprintable()


def idempotency_of(key: str | None, submission: Submission) -> Idempotency | None:
    """`key` with the digest of the submission, whose own `digests` must be there."""
    if key is None:
        return None
    asked = {
        "prompt": submission.prompt,
        "type": submission.kind,
        "model": submission.model,
        "image_uri": submission.image_uri,
        "priority": submission.priority,
        "deadline_ms": submission.deadline_ms,
        "webhook_url": submission.webhook_url,
        "subject": submission.subject,
        "endpoint": submission.endpoint,
        "files": [
            [file.name, file.mime_type, digest]
            for file, digest in zip(submission.attachments, submission.digests, strict=True)
        ],
    }
    # Without what was not given: a field that comes later leaves older digests as they are.
    given = {name: value for name, value in asked.items() if value is not None}
    return Idempotency(key, sha256(orjson.dumps(given)).hexdigest())
