"""Views: the JSON of `/submit` and `/status`, and the files of a request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import datetime
from typing import Any, Literal, TypeVar
from urllib.parse import quote
from uuid import UUID

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from tidegate.call import Classification, ClassifiedBy, Kind, Status, Tier, Usage
from tidegate.errors import NotFound
from tidegate.http.body import BodyBudget, in_slices
from tidegate.record import Failure, answer_within
from tidegate.store.blobs import Blobs
from tidegate.store.records import (
    USAGE_COLUMNS,
    Earlier,
    FileRecord,
    NewJob,
    RequestRecord,
    WebhookRecord,
)
from tidegate.store.requests import Listed

_EXAMPLE_ID = "019abf3e-7c1e-7b52-9f0e-0e1f5a3c2d4b"
_EXTENSIONS = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "image/gif": ".gif",
}
_INLINE_TYPES = tuple(_EXTENSIONS)
_AS_DATA = {
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}

ViewT = TypeVar("ViewT", bound=BaseModel)


class Classified(BaseModel):
    """The kind of a request, how it was decided, and why."""

    type: Kind | None = Field(
        default=None, description="Null or absent until the request is classified"
    )
    classified_by: ClassifiedBy | None = None
    classified_why: str | None = None


class Accepted(Classified):
    """The request is stored durably and will be processed."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "request_id": _EXAMPLE_ID,
                "status": "queued",
                "type": "text_only",
                "classified_by": "rules",
                "classified_why": "no file, and nothing asks for a picture",
                "status_url": f"/status/{_EXAMPLE_ID}",
            }
        }
    )

    request_id: str = Field(description="UUIDv7")
    status: Status
    status_url: str


class FileView(BaseModel):
    """A file of this server."""

    url: str
    mime_type: str
    size_bytes: int
    name: str = ""


class UsageView(BaseModel):
    """Usage as the provider reported it. Null or absent means unknown, not zero."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    thoughts_tokens: int | None = None
    cached_tokens: int | None = None
    total_tokens: int | None = None
    cache_write_tokens: int | None = Field(
        default=None, description="Input tokens that were written to the provider's cache"
    )
    cache_write_5m_tokens: int | None = Field(
        default=None, description="The part that was written for 5 minutes"
    )
    cache_write_1h_tokens: int | None = Field(
        default=None, description="The part that was written for an hour"
    )
    input_audio_tokens: int | None = None
    input_image_tokens: int | None = None
    input_video_tokens: int | None = None
    output_audio_tokens: int | None = None
    output_image_tokens: int | None = None
    output_video_tokens: int | None = None
    searches: int | None = Field(
        default=None,
        description="Web searches by the provider, or sources if it counts those",
    )
    file_searches: int | None = Field(
        default=None, description="Searches of stored files by the provider"
    )
    input_audio_seconds: int | None = Field(
        default=None, description="Length of the input's audio, if the provider charges by it"
    )
    input_characters: int | None = Field(
        default=None, description="Characters of a text that was converted to speech"
    )
    output_video_seconds: int | None = Field(
        default=None, description="Length of the videos in the output"
    )
    provider_cost_micros: int | None = Field(
        default=None,
        description="Charge that the provider reported itself, in millionths of a dollar",
    )

    tier: str | None = Field(
        default=None, description="Processing tier of the call, if it was not the usual one"
    )

    def of_event(self) -> dict[str, int | str | None]:
        """Return the fields of an event: unknown token counts as null, details only if known."""
        values: dict[str, int | str | None] = self.model_dump()
        return {
            name: value
            for name, value in values.items()
            if value is not None or name in USAGE_COLUMNS
        }


class ErrorView(BaseModel):
    """Why a request failed, or why its last attempt did."""

    code: str
    message: str
    retryable: bool
    retry_after_ms: int | None = None
    upstream_status: int | None = None


class WebhookView(BaseModel):
    """State of the webhook that reports the request's end."""

    id: str | None = Field(default=None, description="The id in the header `webhook-id`")
    state: Literal["waiting", "pending", "delivered", "given_up"]
    tries: int
    next_try_at: datetime | None = None
    answer_status: int | None = Field(default=None, description="HTTP status of the last answer")
    problem: str | None = None


class StatusView(Classified):
    """Status of a request."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "request_id": _EXAMPLE_ID,
                "source": "job",
                "status": "succeeded",
                "type": "text_only",
                "classified_by": "rules",
                "model": "gemini-2.5-flash",
                "priority": 0,
                "attempts": 1,
                "submitted_at": "2026-01-01T12:00:00Z",
                "admitted_at": "2026-01-01T12:00:00.020Z",
                "finished_at": "2026-01-01T12:00:01.400Z",
                "queue_ms": 20.1,
                "upstream_ms": 1380.4,
                "first_byte_ms": 212.7,
                "text": "Cybersecurity protects ...",
                "images": [],
                "files": [],
                "usage": {"input_tokens": 12, "output_tokens": 240, "total_tokens": 252},
                "finish_reason": "STOP",
            }
        }
    )

    request_id: str
    source: Literal["job", "stream", "relay"]
    status: Status
    place: int | None = Field(
        default=None,
        description="Place in the queue, 1 is next; only while queued, if known",
    )
    waits_for: str | None = Field(
        default=None, description="The limit that a queued request waits for, if any"
    )
    ahead: int | None = Field(
        default=None,
        description="Approximate number of calls of all tenants that are admitted before it",
    )
    wait_ms: int | None = Field(
        default=None,
        description="Estimated time until admission; only while queued, if known",
    )
    model: str | None = None
    tier: Tier | None = Field(
        default=None,
        description="The job's current processing tier, if it may use several",
    )
    tier_why: str | None = Field(default=None, description="Why that tier was chosen")
    priority: int
    attempts: int = Field(description="Calls made to the provider")
    submitted_at: datetime
    admitted_at: datetime | None = None
    finished_at: datetime | None = None
    deadline_at: datetime | None = None
    retry_at: datetime | None = Field(default=None, description="When a queued retry may start")
    queue_ms: float | None = Field(
        default=None,
        description="Time from submission to admission, or to an end without admission; for a "
        "retry from its claim on",
    )
    upstream_ms: float | None = Field(
        default=None, description="Duration of the call to the provider"
    )
    first_byte_ms: float | None = Field(
        default=None,
        description="Time from sending the call to the first byte of its answer's body",
    )
    text: str | None = None
    answer: Any = Field(
        default=None,
        description="The provider's answer to a job with an `endpoint`, verbatim; as text if it "
        "is not JSON, or may be nested more than 200 levels",
    )
    images: list[FileView] = []
    files: list[FileView] = Field(default=[], description="Uploaded files")
    usage: UsageView | None = None
    cost_micros: int | None = Field(
        default=None,
        description="Cost in micro-dollars, once it has ended, if price and usage are known: see "
        "docs/accounting.md",
    )
    finish_reason: str | None = None
    error: ErrorView | None = None
    webhook: WebhookView | None = None


class RequestItem(BaseModel):
    """A request in short."""

    request_id: str
    source: Literal["job", "stream", "relay"]
    status: Status
    type: Kind | None = None
    model: str | None = None
    priority: int
    attempts: int
    submitted_at: datetime
    admitted_at: datetime | None = None
    finished_at: datetime | None = None
    queue_ms: float | None = None
    upstream_ms: float | None = None
    total_tokens: int | None = None
    error_code: str | None = Field(
        default=None, description="Why it failed, or why its last attempt did"
    )
    status_url: str


class RequestPage(BaseModel):
    """Some of your requests, newest first."""

    items: list[RequestItem]
    next_cursor: str | None = Field(
        default=None, description="Pass it as `cursor` for the next page; absent on the last page"
    )


def accepted(request: NewJob | Earlier, prefix: str) -> Accepted:
    """Return the answer to a submission. `prefix` is the path before `/submit` as the client called
    it: empty or `/llm`."""
    return Accepted(
        request_id=str(request.request_id),
        status=request.status if isinstance(request, Earlier) else Status.QUEUED,
        status_url=f"{prefix}/status/{request.request_id}",
        type=request.classification.kind,
        classified_by=_decider(request.classification),
        classified_why=request.classification.reason,
    )


def status_view(record: RequestRecord, prefix: str, cost_micros: int | None = None) -> StatusView:
    """Return the record as shown to its owner."""
    return StatusView(**status_values(record, prefix), cost_micros=cost_micros)


def status_values(record: RequestRecord, prefix: str) -> dict[str, Any]:
    """Return the fields of `StatusView`; file URLs begin with `prefix`."""
    classification = record.classification
    is_put_off = record.status is Status.QUEUED and record.tier is not Tier.BATCH
    return {
        **{name: _json_value(getattr(record, name)) for name in _SAME_IN_STATUS},
        "submitted_at": record.created_at,
        "retry_at": record.not_before if is_put_off else None,
        "text": record.text if record.endpoint is None else None,
        "answer": _answer(record),
        "images": [_file(one, prefix) for one in record.files if one.role == "output"],
        "files": [_file(one, prefix) for one in record.files if one.role == "input"],
        "usage": usage_view(record.usage),
        "error": error_view(record.failure),
        "webhook": _webhook(record.webhook),
        "type": classification.kind,
        "classified_by": _decider(classification),
        "classified_why": classification.reason,
    }


_SAME_IN_STATUS = (
    *("request_id", "source", "status", "place", "model", "priority", "attempts", "admitted_at"),
    *("finished_at", "deadline_at", "queue_ms", "upstream_ms", "first_byte_ms", "finish_reason"),
    *("tier", "tier_why"),
)


def _answer(record: RequestRecord) -> Any:
    if record.endpoint is None or not record.text:
        return None
    return answer_within(record.text)


def item_view(listed: Listed, prefix: str) -> RequestItem:
    return view_of(
        RequestItem,
        listed,
        type=listed.kind,
        submitted_at=listed.created_at,
        error_code=listed.failure_code,
        status_url=f"{prefix}/status/{listed.request_id}",
    )


def usage_view(usage: Usage) -> UsageView | None:
    """Return the usage as JSON; None if the provider has reported nothing."""
    counts = {name: getattr(usage, name) for name in USAGE_COLUMNS}
    details = {} if usage.details is None else asdict(usage.details)
    view = UsageView(**counts, **details)
    return view if any(value is not None for value in view.model_dump().values()) else None


def error_view(failure: Failure | None) -> ErrorView | None:
    return None if failure is None else view_of(ErrorView, failure)


def view_of(view: type[ViewT], record: object, **named: Any) -> ViewT:
    """Return the view of a record: its fields of the same names, and those in `named`."""
    fields = view.model_fields.keys() - named.keys()
    return view(**{name: _json_value(getattr(record, name)) for name in fields}, **named)


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 1)
    return str(value) if isinstance(value, UUID) else value


def _decider(classification: Classification) -> ClassifiedBy | None:
    return classification.by if classification.kind else None


def _webhook(record: WebhookRecord | None) -> WebhookView | None:
    if record is None:
        return None
    webhook_id = _json_value(record.webhook_id)
    return view_of(WebhookView, record, id=webhook_id, next_try_at=record.due_at)


def _file(record: FileRecord, prefix: str) -> FileView:
    return view_of(FileView, record, url=f"{prefix}/files/{record.file_id}")


def prefix_of(request: Request) -> str:
    """Return `/llm` if the client used that prefix, otherwise nothing: links keep the prefix."""
    return "/llm" if request.scope["path"].startswith("/llm/") else ""


async def file_response(record: FileRecord, blobs: Blobs) -> Response:
    """Return the bytes of a file, with headers by which no browser executes them. Raises NotFound,
    StoreUnavailable."""
    file_id = record.file_id
    inline = record.mime_type in _INLINE_TYPES
    name = quote(record.name or f"{file_id}{_EXTENSIONS.get(record.mime_type, '')}", safe="")
    headers = {
        "Content-Length": str(record.size_bytes),
        "Content-Disposition": f"{'inline' if inline else 'attachment'}; filename*=UTF-8''{name}",
        "Cache-Control": "private, max-age=31536000, immutable",
    }
    missing = f"the content of file {file_id} is no longer stored"
    return await streamed(blobs.stream(record.blob_key), headers, missing, record.mime_type)


async def streamed(
    pieces: AsyncIterator[bytes], headers: dict[str, str], text: str, media_type: str | None = None
) -> Response:
    """Return bytes as a download, whatever their type is. Raises NotFound with the message `text`,
    and StoreUnavailable."""
    try:
        # Before the head is sent: a missing blob must not become a broken 200.
        first = await anext(pieces, b"")
    except NotFound:
        raise NotFound(text) from None

    async def whole() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return StreamingResponse(whole(), headers={**_AS_DATA, **headers}, media_type=media_type)


class HeldResponse(Response):
    """A large answer in JSON, which counts in the memory of its tenant until it is sent."""

    def __init__(self, content: bytes, hold: BodyBudget) -> None:
        """Raises QueueFull."""
        super().__init__(content, media_type="application/json")
        hold.occupy(len(content))
        self._hold = hold

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        try:
            await send({"type": "http.response.start", **head})
            for piece, more in in_slices(bytes(self.body)):
                await send({"type": "http.response.body", "body": piece, "more_body": more})
        finally:
            self._hold.release()
