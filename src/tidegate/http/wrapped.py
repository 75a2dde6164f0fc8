"""A job that wraps a native call: `endpoint` and `body` instead of a prompt. Checks it.

Invariant: what is let in could be relayed at once: its endpoint asks a model for something, its
body names the model, and its answer comes in one piece.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tidegate.config import Config
from tidegate.errors import InvalidRequest
from tidegate.http.fields import read_fields
from tidegate.http.forms import Submission
from tidegate.relay.detached import asked_by, endpoint_named

ENDPOINT, BODY = "endpoint", "body"
_BESIDE = ("priority", "deadline_ms", "webhook_url", "subject")


def wrapped_submission(values: Mapping[str, Any], config: Config) -> Submission:
    """Raises InvalidRequest."""
    for name in values:
        if name not in (ENDPOINT, BODY, *_BESIDE):
            raise InvalidRequest(
                name[:64],
                f"{name[:64]!a} does not go together with 'endpoint'",
                allowed=", ".join((ENDPOINT, BODY, *_BESIDE)),
            )
    path, body = values.get(ENDPOINT), values.get(BODY)
    if not isinstance(body, dict):
        raise InvalidRequest(BODY, "'body' must be an object", allowed="the body of the call")
    asked = asked_by(endpoint_named(path), body)
    fields = read_fields({name: values.get(name) for name in _BESIDE}, config)
    return Submission(
        # Only ASCII: whatever a text holds, PostgreSQL can hold it.
        prompt=json.dumps(body, separators=(",", ":")),
        attachments=(),
        image_uri=None,
        kind=asked.kind,
        model=asked.model,
        priority=fields.priority,
        deadline_ms=fields.deadline_ms,
        webhook_url=fields.webhook_url,
        subject=fields.subject,
        endpoint=path,
    )
