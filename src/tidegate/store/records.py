"""Records of the store and their rows, and operators' actions. I/O only on a given connection.

Times are aware datetimes in UTC, durations milliseconds.

Invariants: text that PostgreSQL can't store (NUL, lone surrogates) is replaced before it can
spoil a batch; unknown usage is null, never zero.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Literal, Protocol, TypeVar
from uuid import UUID, uuid4

import asyncpg
import orjson

from tidegate.call import (
    DEFAULT_POOL,
    DEFAULT_TENANT,
    UNKNOWN_USAGE,
    Attachment,
    Charge,
    Classification,
    ClassifiedBy,
    Kind,
    Status,
    Tier,
    Usage,
    UsageDetails,
    UsageState,
    new_id,
)
from tidegate.errors import CallPreempted, FetchFailed, PolicyChanged
from tidegate.record import NO_LINEAGE, PROMPT_HEAD_CHARS, CallRecord, Failure, Lineage, OutputFile
from tidegate.store.database import Work, sql
from tidegate.telemetry.logging import FrequentLog, Log
from tidegate.telemetry.tracing import Tracing, Trail, parent_of


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A caller's key, and the digest (SHA-256, hexadecimal) of the request submitted under it."""

    key: str
    digest: str


@dataclass(frozen=True, slots=True)
class NewJob:
    """A submitted request, before it is durable. `classification.kind` is None while unsure.

    endpoint: the native path of a wrapped call; `prompt` is then its body, as JSON, or the
    beginning of a body that is the only attachment. traceparent: the caller's, for the worker that
    will run the job. trail: of a stream, not on record. tiers_allowed: tiers beside the live one.
    repeats: the request that the job replays; bound_upstream: the only one that it may go to.
    is_counted: a cap on its tenant's queue has admitted it.
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
    conversation: str | None = None
    key_id: str | None = None
    endpoint: str | None = None
    traceparent: str | None = None
    trail: Trail | None = None
    tiers_allowed: tuple[Tier, ...] = ()
    repeats: UUID | None = None
    bound_upstream: str | None = None
    is_counted: bool = False


@dataclass(frozen=True, slots=True)
class Earlier:
    """The request that was submitted before under the same key, as it is now."""

    request_id: UUID
    status: Status
    classification: Classification


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that this worker has claimed; every write to it is fenced by `claim`.

    `attempts`: upstream attempts begun before this claim; `preemptions`: calls that were preempted;
    `lapses`: calls whose worker died; `was_called`: also true after attempts that are not counted.
    tier: the last one chosen, None for none.
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
    subject: str | None = None
    conversation: str | None = None
    key_id: str | None = None
    was_called: bool = False
    tier: Tier | None = None
    tiers_allowed: tuple[Tier, ...] = ()
    tier_why: str | None = None
    revisit_at: datetime | None = None
    preemptions: int = 0
    lapses: int = 0
    bound_upstream: str | None = None


@dataclass(frozen=True, slots=True)
class FailedTry:
    """A failed attempt of a job while another upstream is tried under the same claim, as the
    attempt `next_id`."""

    next_id: UUID
    finished_at: datetime
    upstream_ms: float
    failure: Failure
    is_counted: bool


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A stored file as its owner may fetch it: an upload (`input`) or an image (`output`)."""

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
    """State of the webhook that reports a request's end.

    state: `waiting` for the end, then `pending`, and finally `delivered` or `given_up`.
    """

    state: Literal["waiting", "pending", "delivered", "given_up"]
    webhook_id: UUID | None = None
    tries: int = 0
    due_at: datetime | None = None
    answer_status: int | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """Everything that `GET /status/{id}` shows. `place`: 1 for the next in its queue."""

    request_id: UUID
    tenant_id: str
    source: str  # job | stream
    status: Status
    classification: Classification
    priority: int
    attempts: int
    created_at: datetime
    model: str | None = None
    admitted_at: datetime | None = None
    finished_at: datetime | None = None
    not_before: datetime | None = None
    deadline_at: datetime | None = None
    queue_ms: float | None = None
    upstream_ms: float | None = None
    first_byte_ms: float | None = None
    text: str | None = None
    usage: Usage = UNKNOWN_USAGE
    finish_reason: str | None = None
    failure: Failure | None = None
    place: int | None = None
    version: int = 1  # incremented by every change; a long poll waits for it
    files: tuple[FileRecord, ...] = ()
    webhook: WebhookRecord | None = None
    endpoint: str | None = None  # of a job that wraps a native call; `text` is the answer's body
    tier: Tier | None = None  # the last one chosen for a job; None for none
    tier_why: str | None = None


@dataclass(frozen=True, slots=True)
class PauseRecord:
    """A person's pause of a limit. left_ms: infinite if it lasts until it is resumed."""

    limit: str
    by: str
    reason: str
    left_ms: float


@dataclass(frozen=True, slots=True)
class PolicyRecord:
    """A pool's policy, in force from `created_at` until the next revision.

    origin: `deployment` or `live`. `digest`: equal for equal policies.
    """

    revision: int
    origin: str
    digest: str
    policy: dict[str, Any]
    set_by: str
    reason: str = ""
    created_at: datetime | None = None  # None until it is on record


Json = dict[str, Any]


class _HasFields(Protocol):
    """An instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Record = TypeVar("Record", bound=_HasFields)
T = TypeVar("T")


_PIECE_CHARS = 1_000_000
USAGE_COLUMNS = (
    "input_tokens",
    "output_tokens",
    "thoughts_tokens",
    "cached_tokens",
    "total_tokens",
)
LINEAGE_COLUMNS = Lineage._fields
_NO_LINEAGE: dict[str, Any] = dict.fromkeys(LINEAGE_COLUMNS)
DETAILS = tuple(one.name for one in fields(UsageDetails))


_MOST_COUNTED = 10**13  # tokens or micro-dollars of one call


def dumps(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the JSON array that a statement takes as $1."""
    return orjson.dumps(list(rows), default=str).decode()


_NEVER = datetime(9999, 1, 1, tzinfo=UTC)


# PostgreSQL locks each partition that a statement may touch, with its indexes, and has room for
# `max_locks_per_transaction` locks per connection: so statements name the days of their jobs.
def ends_of(attempts: Sequence[Mapping[str, Any]]) -> tuple[str, datetime, datetime]:
    """Return the values of `end_attempts`, for at least one attempt."""
    began = [attempt["created_at"] for attempt in attempts]
    return dumps(attempts), min(began), max(began)


def attempts_since(jobs: Iterable[Mapping[str, Any]], claims: int = 1) -> datetime:
    """Return the earliest possible start of a first attempt, among jobs that were claimed more
    often than `claims`. A day earlier, since a job's time is that of the accepting process, an
    attempt's that of PostgreSQL."""
    began = [job["created_at"] for job in jobs if job["claim"] > claims]
    return min(began, default=_NEVER) - timedelta(days=1)


def clean(text: str) -> str:
    """Return `text` in a form that PostgreSQL can store."""
    if text.isascii() and "\x00" not in text:
        return text
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def texts_of(texts: Sequence[str | None]) -> Sequence[str | None]:
    """Return several columns in such a form; nearly all are ASCII and are checked together."""
    together = "".join(filter(None, texts))
    if together.isascii() and "\x00" not in together:
        return texts
    return [text and clean(text) for text in texts]


def cleaned(value: Any) -> Any:
    """Return a row with every string in such a form."""
    if isinstance(value, str):
        return clean(str(value))
    if isinstance(value, dict):
        return {key: cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(item) for item in value]
    return value


def job_row(job: NewJob) -> Json:
    """Return the columns that a job or stream has from the start."""
    row = {
        "id": job.request_id,
        "tenant_id": job.tenant_id,
        "pool": job.pool,
        "kind": job.classification.kind,
        "classified_by": job.classification.by,
        "classified_reason": job.classification.reason,
        "prompt": job.prompt,
        "image_uri": job.image_uri,
        "model": job.model,
        "priority": job.priority,
        "created_at": job.created_at,
        "deadline_at": job.deadline_at,
    }
    if job.once is not None:
        row |= {"idempotency_key": job.once.key, "idempotency_digest": job.once.digest}
    names = ("endpoint", "webhook_url", "subject", "conversation", "key_id", "traceparent")
    for name in (*names, "repeats", "bound_upstream"):
        if (value := getattr(job, name)) is not None:
            row[name] = value
    if job.tiers_allowed:
        row["tiers_allowed"] = list(job.tiers_allowed)
    return {key: cleaned(value) for key, value in row.items()}


def input_rows(job: NewJob) -> list[Json]:
    return file_rows("input", job.request_id, job.tenant_id, job.attachments)


def file_rows(
    role: str, request_id: UUID, tenant_id: str, files: Iterable[Attachment | OutputFile]
) -> list[Json]:
    """Return the rows of a request's files, in order."""
    return [
        {
            "id": file.file_id,
            "request_id": request_id,
            "tenant_id": clean(tenant_id),
            "role": role,
            "position": position,
            "name": clean(file.name),
            "mime_type": clean(file.mime_type),
            "size_bytes": file.size_bytes,
            "blob_key": file.blob_key,
        }
        for position, file in enumerate(files)
    ]


def entry_of(
    op: str,
    row: Json,
    attempt: Json | None = None,
    files: Sequence[Json] = (),
    bodies: Sequence[Json] = (),
) -> Json:
    """Return what the audit writes, or keeps on disk: the row that `op` is about, and what belongs
    to it."""
    return {"op": op, "row": row, "attempt": attempt, "files": [*files], "bodies": [*bodies]}


def blobs_of(entry: Json) -> list[str]:
    """Return the blobs to delete with an entry that is not written: only the entry names them."""
    named = (one["blob_key"] for one in (*entry["files"], *entry["bodies"]))
    return [key for key in named if key is not None]


def stream_row(job: NewJob, record: CallRecord, attempt: Json | None) -> Json:
    """Return the columns of an ended stream."""
    return {
        **(attempt or {}),
        "used_model": None if attempt is None else attempt["model"],
        **job_row(job),
        "status": record.status,
        "finished_at": record.finished_at,
        "attempts": record.attempts,
        "failure": failure_row(record.failure),
        "claim": 0,
    }


def lost_stream(record: CallRecord) -> Json:
    """Return the entry of a stream whose process died: its prompt and its partial answer are
    lost."""
    kind = None if record.kind is None else Kind(record.kind)
    why = "not kept: the process that made this call died before its end"
    job = NewJob(
        record.id,
        record.received_at,
        "",
        Classification(kind, ClassifiedBy.RULES, why),
        model=record.model,
        priority=record.priority,
        tenant_id=record.tenant_id,
        subject=record.subject,
        key_id=record.key_id,
        conversation=record.lineage.conversation,
    )
    record.fence = record.fence or (0, 0)
    attempt = {**result_row(record), "result": None}
    return entry_of("stream", stream_row(job, record, attempt), attempt)


def outcome_of(entry: Json) -> str:
    """Return the outcome of the attempt that an entry ends."""
    if entry["op"] != "retry":
        return str(entry["row"]["status"])
    return CallPreempted.code if entry["row"].get("gave_way") else "failed"


def failure_row(failure: Failure | None) -> Json | None:
    return None if failure is None else cleaned(asdict(failure))


def unmade(failure: Failure | None) -> int:
    """Return how many attempts a failure before a call uses up."""
    return int(failure is not None and failure.code == FetchFailed.code)


def result_row(record: CallRecord) -> Json:
    """Return the columns that an attempt's end writes to its request, its attempt and its audit
    row."""
    answer, charge = record.answer, record.charge
    assert record.fence is not None
    row = {
        "model": record.model or "",
        "admitted_at": record.admitted_at,
        "finished_at": record.finished_at,
        "queue_ms": record.waited_ms,
        "upstream": record.upstream,
        "upstream_ms": record.upstream_ms or 0.0,
        "first_byte_ms": answer.first_byte_ms,
        "result": record.result,
        "finish_reason": answer.finish_reason,
        "model_version": answer.model_version,
        "response_id": answer.response_id,
        "fence_epoch": record.fence[0],
        "fence_sequence": record.fence[1],
        **usage_columns(answer.usage),
        **charge_columns(charge),
    }
    if charge.state in (UsageState.PARTIAL, UsageState.ESTIMATED):
        row["charged"] = usage_columns(charge.usage)
    if (details := details_row(charge.usage)) is not None:
        row["usage_details"] = details
    if record.lineage is not NO_LINEAGE:
        row["lineage"] = lineage_row(record.lineage)
    if record.prompt_head:
        row["prompt_head"] = record.prompt_head
    return {key: cleaned(value) for key, value in row.items()}


async def make_json(attempt: Json) -> None:
    """Convert a large result to JSON once for all rows, in pieces: 20 MB would block the event
    loop. `text_bytes` is then its length."""
    text = attempt["result"]
    if text is None or len(text) <= _PIECE_CHARS:
        return
    pieces = [b'"']
    for at in range(0, len(text), _PIECE_CHARS):
        pieces.append(orjson.dumps(text[at : at + _PIECE_CHARS])[1:-1])
        await asyncio.sleep(0)
    attempt["result"] = orjson.Fragment(b"".join((*pieces, b'"')))
    attempt["text_bytes"] = len(text)
    await asyncio.sleep(0)


def size_of(entry: Json) -> int:
    """Return about how many bytes of memory an entry takes."""
    row = entry["row"]
    texts = (row.get(name) for name in ("result", "prompt", "answer"))
    size_bytes = sum(len(one) for one in texts if isinstance(one, str | bytes))
    size_bytes += sum(len(body.get("data") or "") for body in entry["bodies"])
    return 1_000 + size_bytes + int(row.get("text_bytes", 0))


def usage_columns(usage: Usage) -> dict[str, int | None]:
    return {column: count_of(getattr(usage, column)) for column in USAGE_COLUMNS}


def charge_columns(charge: Charge) -> dict[str, Any]:
    return {
        "usage_state": charge.state.value,
        "cost_micros": count_of(charge.cost_micros),
        "images": charge.images,
    }


def lineage_row(lineage: Lineage) -> Json:
    return {name: cleaned(getattr(lineage, name)) for name in LINEAGE_COLUMNS}


def _prompt_head(ended: Mapping[str, Any], attempt: Mapping[str, Any]) -> str | None:
    """Return the beginning of the prompt; of a wrapped call as its last attempt has parsed it."""
    if ended["endpoint"] is None:
        return ended["prompt"][:PROMPT_HEAD_CHARS] or None
    head: str | None = attempt.get("prompt_head")
    return head


def _lineage_at_end(ended: Mapping[str, Any], attempt: Mapping[str, Any]) -> Json:
    """Return the lineage of a request's last call, else what its submission states."""
    if (found := attempt.get("lineage")) is not None:
        return {name: found.get(name) for name in LINEAGE_COLUMNS}
    if ended["traceparent"] is ended["conversation"] is None:
        return _NO_LINEAGE
    trail = Tracing().trail(ended["id"], parent_of(ended["traceparent"]))
    return lineage_row(Lineage.of(ended["conversation"], trail))


def details_row(usage: Usage) -> dict[str, int | str] | None:
    """Return the recorded details of a usage beside its tokens; None if there are none."""
    if (details := usage.details) is None:
        return None
    found: dict[str, int | str | None] = {
        name: count_of(getattr(details, name)) for name in DETAILS if name != "tier"
    }
    found["tier"] = details.tier and clean(details.tier)
    return {name: value for name, value in found.items() if value is not None} or None


def details_text(usage: Usage) -> str | None:
    row = details_row(usage)
    return None if row is None else orjson.dumps(row).decode()


def details_of(raw: str | None) -> UsageDetails | None:
    """Return the details from their column, as far as this version knows their names."""
    if raw is None:
        return None
    found = orjson.loads(raw)
    return UsageDetails(**{name: found[name] for name in DETAILS if name in found})


def count_of(tokens: int | None) -> int | None:
    """Return a provider's count, None for one out of range: it must not lose the answer, and sums
    must fit into their columns."""
    return tokens if tokens is not None and 0 <= tokens <= _MOST_COUNTED else None


def counts_of(amounts: Iterable[int | None]) -> list[int | None]:
    """Return several counts, as `count_of` does."""
    amounts = [*amounts]
    known = [*filter(None, amounts)]
    if not known or (min(known) > 0 and max(known) <= _MOST_COUNTED):  # the usual case
        return amounts
    return [
        amount if amount is not None and 0 <= amount <= _MOST_COUNTED else None
        for amount in amounts
    ]


def audit_row(
    ended: Mapping[str, Any], attempt: Mapping[str, Any], instance_id: str, failure: Json | None
) -> Json:
    """Return the audit row of an ended request, from its row as it is now and its last attempt."""
    columns = (
        *("tenant_id", "pool", "source", "status", "kind", "classified_by", "classified_reason"),
        *("priority", "attempts", "lapses", "admitted_at", "finished_at", "queue_ms"),
        *("upstream_ms", "first_byte_ms", "finish_reason", "key_id", "subject"),
    )
    # A request without an answer was never sent, unless workers died while calling it.
    lost = bool(attempt) or ended["status"] == Status.DEAD
    usual = UsageState.UNKNOWN if lost else UsageState.NONE
    charged = attempt.get("charged") or ended
    return {
        "id": new_id(),
        "request_id": ended["id"],
        "submitted_at": ended["created_at"],
        "model": ended["used_model"] or ended["model"],
        "model_version": attempt.get("model_version"),
        "response_id": attempt.get("response_id"),
        "instance_id": instance_id,
        "failure": failure,
        "usage_state": attempt.get("usage_state", usual.value),
        "cost_micros": attempt.get("cost_micros", None if lost else 0),
        "images": attempt.get("images"),
        "usage_details": attempt.get("usage_details"),
        "upstream": attempt.get("upstream") or ended["upstream"],
        "prompt_head": _prompt_head(ended, attempt),
        **{column: ended[column] for column in columns},
        **_lineage_at_end(ended, attempt),
        **{column: charged[column] for column in USAGE_COLUMNS},
    }


def record_of(cls: type[Record], row: Mapping[str, Any], /, **values: Any) -> Record:
    """Return a dataclass from a row: each field from `values`, else from the column of its name,
    else its default. UUIDs are converted as `uuid_of` does."""
    for name in cls.__dataclass_fields__:
        if name not in values and name in row:
            value = row[name]
            values[name] = uuid_of(value) if isinstance(value, UUID) else value
    return cls(**values)


def uuid_of(value: UUID) -> UUID:
    """Return the standard library's UUID: orjson and msgpack do not know asyncpg's subclass."""
    return UUID(int=value.int)


def kind_of(row: Mapping[str, Any]) -> Kind | None:
    return None if row["kind"] is None else Kind(row["kind"])


def classification_of(row: Mapping[str, Any]) -> Classification:
    by = ClassifiedBy(row["classified_by"])
    return Classification(kind=kind_of(row), by=by, reason=row["classified_reason"])


def usage_of(row: Mapping[str, Any]) -> Usage:
    return Usage(**{column: row[column] for column in USAGE_COLUMNS})


def relayed_record(row: Mapping[str, Any]) -> RequestRecord:
    """Return a native call's record, from its audit row; its answer is in its body."""
    details = details_of(row["usage_details"])
    # An estimate is for the charge only: the provider has reported no tokens.
    estimated = row["usage_state"] == UsageState.ESTIMATED
    return record_of(
        RequestRecord,
        row,
        status=Status(row["status"]),
        classification=Classification(kind_of(row), ClassifiedBy.BODY, row["endpoint"]),
        created_at=row["submitted_at"],
        usage=replace(Usage() if estimated else usage_of(row), details=details),
        failure=failure_of(row["failure"]),
        endpoint=None,
    )


def claimed_job(row: Mapping[str, Any], files: Iterable[Mapping[str, Any]]) -> ClaimedJob:
    return record_of(
        ClaimedJob,
        row,
        request_id=uuid_of(row["id"]),
        classification=classification_of(row),
        attachments=tuple(
            record_of(Attachment, file, file_id=uuid_of(file["id"])) for file in files
        ),
        was_called=row["attempt_at"] is not None,
        tier=tier_of(row["tier"]),
        tiers_allowed=tiers_of(row),
    )


def tiers_of(row: Mapping[str, Any]) -> tuple[Tier, ...]:
    """Return the tiers of a job's row beside the live one."""
    return tuple(filter(None, map(tier_of, row["tiers_allowed"] or ())))


def tier_of(name: str | None) -> Tier | None:
    """Return the tier in a column; None for none, or one of a later version."""
    return Tier(name) if name in set(Tier) else None


def request_record(
    row: Mapping[str, Any],
    files: Iterable[Mapping[str, Any]],
    webhook: WebhookRecord | None,
    place: int | None,
) -> RequestRecord:
    """Return the record of a request from its row and those of its files."""
    return record_of(
        RequestRecord,
        row,
        request_id=uuid_of(row["id"]),
        status=Status(row["status"]),
        classification=classification_of(row),
        tier=tier_of(row["tier"]),
        model=row["used_model"] or row["model"],
        text=row["result"],
        usage=usage_of(row),
        failure=failure_of(row["failure"]),
        place=place,
        files=tuple(file_record(file) for file in files),
        webhook=webhook,
    )


def file_record(row: Mapping[str, Any]) -> FileRecord:
    return record_of(FileRecord, row, file_id=uuid_of(row["id"]))


def failure_of(raw: str | None) -> Failure | None:
    """Return the failure in a column."""
    return None if raw is None else Failure(**orjson.loads(raw))


log_job = FrequentLog(Log.JOB_DONE)


def log_ended(ended: Iterable[Mapping[str, Any]], failure: Mapping[str, Any]) -> None:
    """Log each job that ended in the queue, from its row as it is now."""
    for row in ended:
        request_id, parent = uuid_of(row["id"]), parent_of(row["traceparent"])
        waited_ms = (row["finished_at"] - _queued_at(row)).total_seconds() * 1000
        log_job(
            {
                "request_id": str(request_id),
                "tenant": row["tenant_id"],
                **({"trace_id": Trail.of(request_id, parent).trace} if parent else {}),
                "type": row["kind"],
                "queue_ms": round(max(0.0, waited_ms), 1),
                "upstream_ms": round(row["upstream_ms"] or 0.0, 1),
                "code": failure["code"],
            }
        )


def _queued_at(row: Mapping[str, Any]) -> datetime:
    """Return when a job was last queued, according to its row."""
    times: list[datetime] = [row["created_at"]]
    if row["attempt_at"] is not None:
        times.append(row["attempt_at"] + timedelta(milliseconds=row["upstream_ms"] or 0.0))
    if row["given_ms"] is not None:  # it was requeued, with its original time to the deadline
        times.append(row["deadline_at"] - timedelta(milliseconds=row["given_ms"]))
    return max(times)


What = Literal[
    "alert.redeliver",
    "alert.test",
    "batch.cancel",
    "batch.pause",
    "batch.resume",
    "budget.remove",
    "budget.resume",
    "budget.set",
    "job.cancel",
    "job.discard",
    "job.requeue",
    "job.retry",
    "jobs.requeue",
    "key.create",
    "key.keep",
    "key.revoke",
    "limit.pause",
    "limit.resume",
    "limits.change",
    "permits.revoke",
    "sign_in",
    "subject.erase",
    "tenant.call",
    "tenant.remove",
    "tenant.set",
    "upstream.test",
    "upstreams.change",
    "webhook.redeliver",
]
LONGEST_TARGET = 500


@dataclass(slots=True)
class Acting:
    """The operator on whose behalf a request or a command runs."""

    operator: str
    role: str
    address: str
    action_id: UUID = field(default_factory=uuid4)
    is_over: bool = False


ACTING: ContextVar[Acting | None] = ContextVar("acting", default=None)


@contextmanager
def acting(operator: str, role: str, address: str) -> Iterator[None]:
    """Record changes within the block as this operator's."""
    now = Acting(operator, role, address)
    ACTING.set(now)
    try:
        yield
    finally:
        now.is_over = True  # also for tasks that were started within, which have a copy of it


async def record_action(
    connection: asyncpg.Connection,
    what: What,
    target: str,
    *,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    revision: int | None = None,
) -> None:
    """Record a change in its own transaction, if an operator makes it. A repeat of the transaction
    records it once."""
    now = ACTING.get()
    if now is None or now.is_over:
        return
    await connection.execute(
        sql("add_action"),
        now.action_id,
        clean(now.operator),
        now.role,
        clean(now.address),
        what,
        clean(target)[:LONGEST_TARGET],
        _action_json(before),
        _action_json(after),
        revision,
    )


def recorded(name: str, *values: Any, what: What, target: object) -> Work[asyncpg.Record | None]:
    """Return the work of one statement, which is recorded as an action if it returns a row."""

    async def work(connection: asyncpg.Connection) -> asyncpg.Record | None:
        row = await connection.fetchrow(sql(name), *values)
        if row is not None:
            await record_action(connection, what, str(target))
        return row

    return done_once(work)


async def with_files(
    connection: asyncpg.Connection, taken: list[asyncpg.Record]
) -> list[ClaimedJob]:
    files: dict[object, list[asyncpg.Record]] = {row["id"]: [] for row in taken}
    with_files = [row["id"] for row in taken if row["has_files"]]
    if with_files:
        for file in await connection.fetch(sql("get_input_files"), with_files):
            files[file["request_id"]].append(file)
    return [claimed_job(row, files[row["id"]]) for row in taken]


async def mark_ambiguous(connection: asyncpg.Connection, returned: list[asyncpg.Record]) -> None:
    """End the attempts of jobs that were running: their result at the provider is unknown."""
    attempts = [
        {"id": row["attempt_id"], "created_at": row["attempt_at"], "outcome": "ambiguous"}
        for row in returned
        if row["old_status"] == Status.RUNNING and row["attempt_id"] is not None
    ]
    if attempts:
        await connection.execute(sql("end_attempts"), *ends_of(attempts))


def done_once(work: Work[T | None]) -> Work[T | None]:
    """Return `work` so that it may be repeated, although it finds nothing to do once it is done:
    after a COMMIT with a lost reply, the repeat returns the result of the attempt before."""
    done: T | None = None

    async def found(connection: asyncpg.Connection) -> T | None:
        nonlocal done
        now = await work(connection)
        done = done if now is None else now
        return done

    return found


def changed_once(work: Work[T]) -> Work[T]:
    """Return `work` so that it may be repeated, although it raises PolicyChanged after its own
    change: after a COMMIT with a lost reply, the repeat returns the result of the attempt
    before."""
    done: list[T] = []

    async def changed(connection: asyncpg.Connection) -> T:
        try:
            done[:] = [await work(connection)]
        except PolicyChanged:
            if not done:
                raise
        return done[0]

    return changed


def _action_json(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else orjson.dumps(dict(value), default=str).decode()
