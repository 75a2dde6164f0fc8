"""What the store takes and gives: plain frozen records, no SQL and no I/O.

Times are aware datetimes in UTC; durations are in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from tidegate.call import (
    DEFAULT_POOL,
    DEFAULT_TENANT,
    UNKNOWN_CHARGE,
    Attachment,
    Charge,
    Classification,
    Usage,
)
from tidegate.errors import TidegateError
from tidegate.store.states import Status
from tidegate.tracing import Trail


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as it is recorded and shown. `message` is safe to show to a client."""

    code: str
    message: str
    retryable: bool = False
    retry_after_ms: int | None = None
    upstream_status: int | None = None

    @classmethod
    def of(cls, error: TidegateError) -> Failure:
        return cls(
            code=error.code,
            message=error.message,
            retryable=error.retryable,
            retry_after_ms=error.retry_after_ms,
            upstream_status=getattr(error, "status", None),
        )


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A caller's key, and the digest (SHA-256, hexadecimal) of all that was asked under it."""

    key: str
    digest: str


@dataclass(frozen=True, slots=True)
class NewJob:
    """A submitted request, before it is durable. `classification.kind` is None while unsure.

    endpoint: the native path that it wraps a call of; `prompt` is then the body, as JSON, or where
    there is an attachment, which is the body, the head of it.
    traceparent: of whoever asked, for the worker that will run it. trail: of a stream, which is
    not on record.
    """

    request_id: UUID
    created_at: datetime
    prompt: str
    classification: Classification
    attachments: tuple[Attachment, ...] = ()
    image_uri: str | None = None
    model: str | None = None
    priority: int = 0
    deadline_at: datetime | None = None
    tenant_id: str = DEFAULT_TENANT
    pool: str = DEFAULT_POOL
    once: Idempotency | None = None
    webhook_url: str | None = None
    subject: str | None = None
    endpoint: str | None = None
    traceparent: str | None = None
    trail: Trail | None = None


@dataclass(frozen=True, slots=True)
class Earlier:
    """The request that was submitted before under the same key, as it now stands."""

    request_id: UUID
    status: Status
    classification: Classification


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that this worker has claimed; every write to it is fenced by `claim`.

    `attempts` counts the upstream attempts begun before this claim, `was_called` tells of those
    too that do not count.
    """

    request_id: UUID
    claim: int
    attempts: int
    created_at: datetime
    prompt: str
    classification: Classification
    attachments: tuple[Attachment, ...]
    image_uri: str | None
    model: str | None
    priority: int
    deadline_at: datetime | None
    tenant_id: str
    pool: str
    endpoint: str | None = None
    traceparent: str | None = None
    was_called: bool = False


@dataclass(frozen=True, slots=True)
class FailedTry:
    """A call of a job that failed, while another upstream is tried under the same claim."""

    finished_at: datetime
    upstream_ms: float
    failure: Failure
    is_counted: bool


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A generated picture whose bytes are already in the blob store."""

    file_id: UUID
    mime_type: str
    size_bytes: int
    blob_key: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """How one attempt upstream ended. `fence` is the permit's (epoch, sequence); first_byte_ms:
    from sending the call to the first bytes of its answer. What was asked of whom (upstream,
    dialect, operation) is for those who count: it is not on record."""

    model: str
    fence: tuple[int, int]
    admitted_at: datetime
    finished_at: datetime
    queue_ms: float
    upstream_ms: float
    text: str = ""
    pictures: tuple[OutputFile, ...] = ()
    usage: Usage = field(default_factory=Usage)
    finish_reason: str | None = None
    model_version: str | None = None
    response_id: str | None = None
    failure: Failure | None = None
    charge: Charge = UNKNOWN_CHARGE
    first_byte_ms: float | None = None
    upstream: str | None = None
    dialect: str = "gemini"
    operation: str = "generate_content"
    trail: Trail | None = None


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """A finished `/stream` request, recorded once, whole. `result` is None if never admitted."""

    job: NewJob
    status: Status
    finished_at: datetime
    result: AttemptResult | None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A stored file as its owner may fetch it: an upload (`input`) or a picture (`output`)."""

    file_id: UUID
    request_id: UUID
    tenant_id: str
    role: str
    name: str
    mime_type: str
    size_bytes: int
    blob_key: str


@dataclass(frozen=True, slots=True)
class WebhookRecord:
    """What became of telling `webhook_url` of a request's end.

    state: `waiting` for the end, then `pending`, and at last `delivered` or `given_up`.
    """

    state: Literal["waiting", "pending", "delivered", "given_up"]
    webhook_id: UUID | None = None
    tries: int = 0
    due_at: datetime | None = None
    answer_status: int | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """Everything that `GET /status/{id}` shows. `place` is 1 for the next in its queue."""

    request_id: UUID
    tenant_id: str
    source: str  # job | stream
    status: Status
    classification: Classification
    model: str | None
    priority: int
    attempts: int
    created_at: datetime
    admitted_at: datetime | None
    finished_at: datetime | None
    not_before: datetime | None
    deadline_at: datetime | None
    queue_ms: float | None
    upstream_ms: float | None
    first_byte_ms: float | None
    text: str | None
    usage: Usage
    finish_reason: str | None
    failure: Failure | None
    place: int | None
    version: int  # grows with every change; what a long poll waits for
    files: tuple[FileRecord, ...] = ()
    webhook: WebhookRecord | None = None
    endpoint: str | None = None  # of a job that wraps a native call; `text` is the answer's body


@dataclass(frozen=True, slots=True)
class PolicyRecord:
    """A pool's policy as it was in force from `created_at` on, until the next revision.

    origin: `deployment` or `live`. `digest` is the same for the same policy.
    """

    revision: int
    origin: str
    digest: str
    policy: dict[str, Any]
    set_by: str
    reason: str = ""
    created_at: datetime | None = None  # None until it is on record


Json = dict[str, Any]
