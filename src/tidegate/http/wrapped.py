"""A job that wraps a native call: `endpoint` and `body` instead of a prompt. Checks and keeps it.

Invariant: what is let in could be relayed at once: its endpoint asks a model for something, its
body names the model, and its answer comes in one piece. Of a large body the row has the head alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from tidegate.call import Attachment, new_id
from tidegate.config import Config
from tidegate.errors import InvalidRequest
from tidegate.http.fields import read_fields
from tidegate.http.forms import Submission
from tidegate.relay.detached import asked_by, endpoint_named
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.records import NewJob

ENDPOINT, BODY = "endpoint", "body"
MOST_IN_ROW_BYTES = 256 * 1024
_HEAD_CHARS = 2_000
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


async def body_apart(job: NewJob, blobs: Blobs) -> NewJob:
    """The job as it is stored: a large body of a call becomes its one file, and `prompt` the head
    of it. Raises StoreUnavailable; what a failure leaves behind goes with the other orphans."""
    if job.endpoint is None or len(job.prompt) <= MOST_IN_ROW_BYTES:
        return job
    now = datetime.now(UTC)
    data = job.prompt.encode()
    kept = Attachment(new_id(), "body.json", "application/json", len(data), new_key(now))
    await blobs.put(kept.blob_key, data)
    # What a person is shown. It must be no JSON: a worker of a version that knows of no such files
    # takes it for the body, and is to fail over it instead of asking for something else.
    return replace(job, prompt=job.prompt[:_HEAD_CHARS], attachments=(kept,))
