"""Routes `/v1/files` and `/v1/batches` in OpenAI's shape.

The input of a batch is a file stored here, and so are its results. A file of another purpose is
stored at a provider: its upload is forwarded, and the list shows both sorts; all other requests
that name such a file are native calls (`http/native.py`).

Invariants: everything belongs to the caller's tenant and does not exist for others; a batch in an
answer is in PostgreSQL; errors have the form that OpenAI's SDK parses; an upload is written to disk
as it arrives, is bounded, and leaves nothing behind if its form is invalid.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode
from uuid import UUID

import orjson
from anyio import to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidegate.call import Caller, Status, new_id
from tidegate.call import Scope as Right
from tidegate.dialects import DIALECTS, dialect_of, endpoint_of
from tidegate.dialects.parsing import parsed
from tidegate.dialects.resources import page_limit
from tidegate.dialects.spec import Dialect, Endpoint, Headers
from tidegate.errors import (
    AlreadyEnded,
    FilesFull,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    StoreUnavailable,
    TidegateError,
    UpstreamUnauthorized,
)
from tidegate.http.body import (
    WITH_ITS_HEAD_BYTES,
    BodyBudget,
    Incoming,
    Multipart,
    Part,
    PartHead,
    Spool,
    count_in,
    incoming_of,
)
from tidegate.http.guards import caller_of
from tidegate.http.idempotency import REPLAYED_HEADER, key_of
from tidegate.http.native import begin_record, call_of, check_content
from tidegate.http.problems import REQUEST_ID_HEADER, not_relayed, refusal
from tidegate.http.services import Services, check_target, services_of
from tidegate.http.views import streamed
from tidegate.record import CallRecord, Failure
from tidegate.spine.detached import endpoint_named
from tidegate.spine.run import CallFailed
from tidegate.store.batches import INPUT, OUTPUT, Batch, BatchFile
from tidegate.store.blobs import new_key
from tidegate.store.records import Idempotency
from tidegate.telemetry.logging import Log, get_logger

log = get_logger()

_TIMES = (
    *("created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at"),
    *("failed_at", "expired_at", "cancelling_at", "cancelled_at"),
)


def file_view(file: BatchFile) -> dict[str, Any]:
    return {
        "id": f"file-{file.file_id.hex}",
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at.timestamp()) if file.created_at else 0,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }


def batch_view(batch: Batch) -> dict[str, Any]:
    errors = None
    if batch.errors is not None:
        errors = {"object": "list", "data": batch.errors}
    return {
        "id": f"batch_{batch.batch_id.hex}",
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors,
        "input_file_id": _file_id(batch.input_file_id),
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": _file_id(batch.output_file_id),
        "error_file_id": _file_id(batch.error_file_id),
        **{
            name: int(batch.times[name].timestamp()) if name in batch.times else None
            for name in _TIMES
        },
        "request_counts": {
            "total": batch.total,
            "completed": batch.completed,
            "failed": batch.failed,
        },
        "metadata": batch.metadata,
    }


def page(found: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Return a list of at most `limit` entries; `found` has one more if there are more."""
    listed = found[:limit]
    return {
        "object": "list",
        "data": listed,
        "first_id": listed[0]["id"] if listed else None,
        "last_id": listed[-1]["id"] if listed else None,
        "has_more": 0 < limit < len(found),
    }


def _file_id(file_id: UUID | None) -> str | None:
    return None if file_id is None else f"file-{file_id.hex}"


MOST_BYTES = 200_000_000
OVERHEAD_BYTES = 65_536
FORM_BYTES = MOST_BYTES + OVERHEAD_BYTES
_LONGEST_VALUE_BYTES = 200
_EXPIRY = ("expires_after[anchor]", "expires_after[seconds]")
_FIELDS = ("purpose", "file", *_EXPIRY)


@dataclass(slots=True)
class Uploaded:
    """An uploaded file in `spool`. `close` removes it."""

    spool: Spool
    name: str = ""
    content_type: bytes = b"application/octet-stream"
    lines: int = 0
    values: dict[str, str] = field(default_factory=dict)
    has_file: bool = False
    ends_open: bool = False

    @property
    def all_lines(self) -> int:
        """Return the number of lines, with an incomplete last one."""
        return self.lines + self.ends_open

    async def take(self, data: bytes, hold: BodyBudget) -> None:
        """Append to the file. Raises PayloadTooLarge and StoreUnavailable."""
        if self.spool.size_bytes + len(data) > MOST_BYTES:
            raise PayloadTooLarge(
                "file",
                f"the file is larger than {MOST_BYTES} bytes",
                allowed=f"a file of at most {MOST_BYTES} bytes",
            )
        self.lines += data.count(b"\n")
        self.ends_open = not data.endswith(b"\n")
        await self.spool.write(data)
        hold.spool(self.spool.size_bytes)
        count_in(hold, self.spool.held_bytes, WITH_ITS_HEAD_BYTES)


async def read_upload(
    body: Incoming, content_types: list[str], uploaded: Uploaded, hold: BodyBudget
) -> None:
    """Read the form of an upload into `uploaded`, and count its bytes in memory in `hold`. Raises
    InvalidRequest or a related error, QueueFull and StoreUnavailable."""
    if len(content_types) > 1:
        message = "there is more than one Content-Type"
        raise InvalidRequest("Content-Type", message, allowed="one Content-Type")
    content_type = content_types[0] if content_types else ""
    if not content_type.lower().startswith("multipart/form-data"):
        raise InvalidRequest(
            "file", "the file must be sent as a form", allowed="multipart/form-data"
        )
    await Multipart(content_type).read(body, _UploadReader(uploaded, hold).take)
    if not uploaded.has_file:
        raise InvalidRequest("file", "there is no file", allowed="a file of JSON lines")
    await uploaded.spool.finish()


class _UploadReader:
    def __init__(self, uploaded: Uploaded, hold: BodyBudget) -> None:
        self._uploaded = uploaded
        self._hold = hold
        self._field = ""

    async def take(self, part: Part) -> None:
        if isinstance(part, PartHead):
            self._begin(part)
        elif part is not None and self._field == "file":
            await self._uploaded.take(part, self._hold)
        elif part is not None:
            text = self._uploaded.values[self._field] + part.decode("utf-8", "replace")
            if len(text) > _LONGEST_VALUE_BYTES:
                raise PayloadTooLarge(self._field, f"{self._field!r} is too long")
            self._uploaded.values[self._field] = text

    def _begin(self, head: PartHead) -> None:
        _, options = head.disposition()
        name = options.get(b"name", b"").decode("utf-8", "replace")
        uploaded = self._uploaded
        if name not in _FIELDS:
            label = ascii(name[:64])
            raise InvalidRequest(
                name[:64] or "body", f"there is no field {label} here", allowed=", ".join(_FIELDS)
            )
        if name in uploaded.values or (name == "file" and uploaded.has_file):
            raise InvalidRequest(name, f"{name!r} is given more than once")
        self._field = name
        if name == "file":
            uploaded.has_file = True
            given = options.get(b"filename", b"file.jsonl").decode("utf-8", "replace")
            uploaded.content_type = head.headers.get("content-type", uploaded.content_type)
            uploaded.name = Path(given.replace("\\", "/")).name[:200] or "file.jsonl"
        else:
            uploaded.values[name] = ""


BATCH_PATHS = ("/v1/files", "/v1/batches")  # beginnings of paths that are answered here
_PATH = re.compile(r"/v1/(?P<room>files|batches)(?:/(?P<id>[\w-]{1,80})(?:/(?P<do>\w+))?)?/?")
# Our ids are UUIDv7. Azure's files are UUIDs of version 4; the batches of OpenAI are hexadecimal,
# with an 8 in the place of the version.
_OUR_ID = "(?P<hex>[0-9a-f]{12}7[0-9a-f]{19})"
_FILE_ID, _BATCH_ID = re.compile(f"file-{_OUR_ID}"), re.compile(f"batch_{_OUR_ID}")
_WINDOW = "24h"
_CREATE_FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata")
_CREATE_BYTES = 65_536
_MOST_METADATA, _LONGEST_KEY, _LONGEST_VALUE = 16, 64, 512


class Asking(NamedTuple):
    """A request and its caller."""

    request: Request
    services: Services
    caller: Caller
    id: str

    @property
    def tenant(self) -> str:
        return self.caller.tenant_id


def is_batch_path(scope: Scope) -> bool:
    """Return whether a native path is answered here. Requests for Gemini's files carry Google's key
    header; a file or batch whose id is not of our form is stored at a provider."""
    path = scope["path"]
    found = _PATH.fullmatch(path)
    if found is None:
        return False
    form = _FILE_ID if found["room"] == "files" else _BATCH_ID
    if found["id"] is not None and form.fullmatch(found["id"]) is None:
        return False
    names = frozenset(name for name, _ in scope["headers"])
    return dialect_of(path, names, scope["query_string"]) is Dialect.OPENAI


def batch_methods(path: str) -> tuple[str, ...]:
    """Return the methods of a path."""
    if (found := _PATH.fullmatch(path)) is None:
        return ()
    place = (found["room"], found["id"] is not None, found["do"])
    return tuple(method for method, *where in _HANDLERS if tuple(where) == place)


async def batches(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request to a path of files or batches."""
    await respond(_answer, _refused, scope, receive, send)


async def respond(
    answer: Callable[[Request], Awaitable[Response]],
    refused: Callable[[TidegateError], Response],
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Send the answer to a request, or its error in the form of the API that it uses."""
    try:
        response = await answer(Request(scope, receive))
    except ClientDisconnect:
        return
    except TidegateError as error:
        response = refused(error)
    except Exception:  # the top of a request's task: logged only here
        log.exception(Log.INTERNAL_ERROR, method=scope["method"], path=scope["path"])
        response = refused(TidegateError("an internal error; it has been logged"))
    await response(scope, receive, send)


async def _answer(request: Request) -> Response:
    path = request.scope["path"]
    found = _PATH.fullmatch(path)
    assert found is not None
    place = (request.method, found["room"], found["id"] is not None, found["do"])
    handler = _HANDLERS.get(place)
    if handler is None:
        raise not_relayed(request.method, path, batch_methods(path))
    return await handler(await asking_of(request, found["id"] or ""))


async def asking_of(request: Request, named: str) -> Asking:
    """Return a request for `named`, with its caller. Raises as `caller_of` does,
    UnsupportedMedia for a compressed body, and InvalidRequest for two types of it."""
    caller = await caller_of(request, Right.READ if request.method == "GET" else Right.INFER)
    check_target(request.scope)
    check_content(request.scope["headers"])
    return Asking(request, services_of(request), caller, named)


def _refused(error: TidegateError) -> Response:
    status, headers, body = refusal(Dialect.OPENAI, error)
    if isinstance(error, NotFound):  # it is not about a model
        problem = DIALECTS[Dialect.OPENAI].problem(error, status, None)
        problem["error"]["code"] = error.code
        body = orjson.dumps(problem)
    fields = {name.decode(): value.decode() for name, value in headers if name != b"content-length"}
    return Response(body, status, fields)


def as_json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


# Files


async def _upload(asking: Asking) -> Response:
    services, config = asking.services, asking.services.config
    uploaded, hold = Uploaded(Spool(config.data_dir / "tmp")), services.hold(asking.caller)
    try:
        body = incoming_of(asking.request, config, max_bytes=FORM_BYTES)
        await _check_room(asking)
        await read_upload(body, asking.request.headers.getlist("content-type"), uploaded, hold)
        if uploaded.values.get("purpose") != INPUT:
            return await _send_on(asking, uploaded)
        if given := [name for name in _EXPIRY if name in uploaded.values]:
            message = "the input of a batch is kept as RETENTION_DAYS says"
            raise InvalidRequest(
                given[0], message, allowed=f"only with a purpose other than {INPUT}"
            )
        file = await _stored(asking, uploaded)
    finally:
        hold.release()
        await uploaded.spool.close()
    return as_json(file_view(file))


async def _stored(asking: Asking, uploaded: Uploaded) -> BatchFile:
    """Store the input of a batch. Raises FilesFull and StoreUnavailable."""
    services = asking.services
    file = BatchFile(
        file_id=new_id(),
        tenant_id=asking.tenant,
        purpose=INPUT,
        name=uploaded.name,
        size_bytes=uploaded.spool.size_bytes,
        lines=uploaded.all_lines,
        blob_key=new_key(datetime.now(UTC)),
        created_at=datetime.now(UTC),
    )
    if uploaded.spool.path is None:
        await services.blobs.put(file.blob_key, uploaded.spool.data)
    else:
        await services.blobs.put(file.blob_key, uploaded.spool.path)
    try:
        await services.store.batches.add_file(file, services.config.max_batch_files_bytes)
    except FilesFull:
        await delete_blob(services, file.blob_key)
        raise
    return file


async def _copied(asking: Asking, file_id: str) -> BatchFile | Response:
    """Copy the caller's own file from the provider, so that its lines are called under the limits;
    return the provider's refusal if it fails. Raises as `_upload`, and NotFound."""
    services, path = asking.services, f"{_FILES_PATH}/{file_id}/content"
    endpoint = endpoint_of("GET", path, Dialect.OPENAI)
    if endpoint is None:
        raise NotFound(f"there is no {file_id[:64]!a}", field="input_file_id")
    given: Headers = asking.request.scope["headers"]
    headers = [pair for pair in given if pair[0] not in _OF_A_BODY]
    scope = {**asking.request.scope, "method": "GET", "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "headers": [*headers, (b"accept-encoding", b"identity")]}
    hold = services.hold(asking.caller)
    uploaded = Uploaded(Spool(services.config.data_dir / "tmp"), f"{file_id}.jsonl")
    try:
        await _check_room(asking)
        out = _Whole(partial(uploaded.take, hold=hold))
        refused = await relayed(asking, endpoint, scope, on_record=True, out=out)
        if out.status != HTTPStatus.OK:
            return refused
        await uploaded.spool.finish()
        return await _stored(asking, uploaded)
    finally:
        hold.release()
        await uploaded.spool.close()


_OF_A_BODY = (b"accept-encoding", b"content-type", b"content-length", b"idempotency-key")


_MOST_PURPOSE_CHARS = 40
_FILES_PATH = "/v1/files"


async def _send_on(asking: Asking, uploaded: Uploaded) -> Response:
    """Upload a file to the provider that stores such files. Raises as `_upload`."""
    purpose = uploaded.values.get("purpose", "")
    if not purpose or not purpose.isprintable() or len(purpose) > _MOST_PURPOSE_CHARS:
        raise InvalidRequest("purpose", "purpose is missing or wrong", allowed=_PURPOSES)
    edge = f"tidegate-{new_id().hex}"
    content_type = f"multipart/form-data; boundary={edge}".encode()
    headers = [pair for pair in asking.request.scope["headers"] if pair[0] != b"content-type"]
    scope = {**asking.request.scope, "headers": [*headers, (b"content-type", content_type)]}
    return await _relayed(asking, scope, _form_of(uploaded, edge))


_PURPOSES = "batch, assistants, evals, fine-tune, user_data, vision"


async def _form_of(uploaded: Uploaded, edge: str) -> AsyncIterator[bytes]:
    """Yield the form composed from its stored content."""
    for name, value in uploaded.values.items():
        head = f'--{edge}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        yield head.encode()
    name = uploaded.name.replace("\\", "_").replace('"', "%22")
    part_head = f'--{edge}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n'
    yield part_head.encode() + b"content-type: %b\r\n\r\n" % uploaded.content_type
    if uploaded.spool.path is None:
        yield uploaded.spool.data
    else:
        with uploaded.spool.path.open("rb") as file:
            while piece := await to_thread.run_sync(file.read, _PIECE_BYTES):
                yield piece
    yield f"\r\n--{edge}--\r\n".encode()


_PIECE_BYTES = 262_144


async def _relayed(
    asking: Asking,
    scope: Mapping[str, Any],
    pieces: AsyncIterator[bytes] | None = None,
) -> Response:
    """Return the answer to a native call on files: an upload, which is recorded, or a list."""
    endpoint = endpoint_of(scope["method"], _FILES_PATH, Dialect.OPENAI)
    assert endpoint is not None
    return await relayed(asking, endpoint, scope, pieces, on_record=pieces is not None)


async def relayed(
    asking: Asking,
    endpoint: Endpoint,
    scope: Mapping[str, Any],
    pieces: AsyncIterator[bytes] | None = None,
    *,
    on_record: bool,
    out: _Whole | None = None,
) -> Response:
    """Make a native call and return its answer, which is short unless `out` takes it. Raises
    TidegateErrors of our own."""
    services, received = asking.services, (time.monotonic(), datetime.now(UTC))
    call = call_of(
        scope,
        endpoint,
        b"",
        asking.caller,
        request_id=new_id(),
        received=received,
        usual_wait_ms=services.config.stream_wait_ms,
        tracing=services.spine.tracing,
    )
    record, out = CallRecord("relay", asking.tenant, received[1]), out or _Whole()
    begin_record(record, call, scope)
    status, failure = Status.CANCELLED, Failure("client_left", "the client disconnected")
    try:
        if pieces is None:
            await services.relay.run(call, out, record)
        else:
            await services.relay.upload(call, pieces, str, out, record)
        status = Status.SUCCEEDED
    except (CallFailed, TidegateError) as failed:
        error = failed.error if isinstance(failed, CallFailed) else failed
        status, failure = Status.FAILED, Failure.of(error)
        status_code = failed.status if isinstance(failed, CallFailed) else 0
        if isinstance(error, UpstreamUnauthorized) and error.of_key:
            raise error.for_clients() from None
        if not status_code or not isinstance(failed, CallFailed):
            raise error from None
        out.status, out.headers, out.pieces = status_code, failed.headers, [failed.body]
    finally:
        record.end(status, None if status is Status.SUCCEEDED else failure)
        if on_record:
            services.store.audit.put(record)
        else:
            services.store.journal.leave(record)
    headers = {REQUEST_ID_HEADER: str(call.terms.request_id)}
    answer = Response(b"".join(out.pieces), out.status, headers, media_type="application/json")
    known = {name for name, _ in answer.raw_headers}
    answer.raw_headers += [pair for pair in out.headers if pair[0] not in known]
    return answer


def as_relayed(value: Any, answer: Response) -> Response:
    """Return a relayed answer with another body."""
    response = as_json(value)
    known = {name for name, _ in response.raw_headers}
    response.raw_headers += [pair for pair in answer.raw_headers if pair[0] not in known]
    return response


class _Whole:
    """Collects an answer, which is small, unless `take` is called with its pieces."""

    def __init__(self, take: Callable[[bytes], Awaitable[None]] | None = None) -> None:
        self.started = False
        self._take = take
        self.status = 0
        self.headers: Headers = []
        self.pieces: list[bytes] = []

    async def start(self, status: int, headers: Headers) -> None:
        self.started, self.status, self.headers = True, status, headers

    async def body(self, piece: bytes, more: bool) -> None:
        if self._take is None:
            self.pieces.append(piece)
        else:
            await self._take(piece)

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        await self.start(status, headers)
        await self.body(body, False)


async def _check_room(asking: Asking) -> None:
    """Check before reading whether a file of the announced size could be stored. Raises
    FilesFull."""
    announced = int(asking.request.headers.get("content-length", "0"))
    least_bytes = max(0, announced - OVERHEAD_BYTES)
    batches, most_bytes = (
        asking.services.store.batches,
        asking.services.config.max_batch_files_bytes,
    )
    await batches.check_room(asking.tenant, least_bytes, most_bytes)


async def delete_blob(services: Services, key: str) -> None:
    """Delete a blob that nothing refers to."""
    with suppress(StoreUnavailable):  # otherwise it is removed with other orphans
        await services.blobs.delete([key])


async def _files(asking: Asking) -> Response:
    """List the files of batches, which are stored here, then those at a provider."""
    query = asking.request.query_params
    limit, purpose = page_limit(query.get("limit"), "limit", 1_000, 10_000), query.get("purpose")
    order, after = query.get("order", "desc"), query.get("after")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order", "order is asc or desc", allowed="asc, desc")
    is_own_id = after is None or _FILE_ID.fullmatch(after) is not None
    files: list[dict[str, Any]] = []
    if is_own_id:
        found = await asking.services.store.batches.files(
            asking.tenant,
            after=None if after is None else _id(after, _FILE_ID),
            purpose=purpose,
            limit=limit + 1,
            upwards=order == "asc",
        )
        files = [file_view(one) for one in found]
    has_more = False
    upstreams = asking.services.spine.targets.upstreams_of(Dialect.OPENAI)
    if len(files) <= limit and purpose not in (INPUT, OUTPUT) and upstreams:
        parameters = {"limit": limit + 1 - len(files), "order": order}
        parameters |= {} if purpose is None else {"purpose": purpose}
        parameters |= {} if is_own_id else {"after": after}
        scope = {**asking.request.scope, "query_string": urlencode(parameters).encode()}
        answer = await _relayed(asking, scope)
        if answer.status_code != HTTPStatus.OK:
            return answer
        listed = orjson.loads(answer.body)
        files, has_more = [*files, *listed["data"]], listed["has_more"]
    body = page(files, limit)
    return as_json({**body, "has_more": body["has_more"] or has_more})


async def _file(asking: Asking) -> Response:
    return as_json(file_view(await _found_file(asking)))


async def _content(asking: Asking) -> Response:
    file = await _found_file(asking)
    headers = {
        "Content-Type": "application/jsonl",
        "Content-Length": str(file.size_bytes),
        "Content-Disposition": "attachment",
    }
    pieces = asking.services.blobs.stream(file.blob_key)
    return await streamed(pieces, headers, f"the content of {asking.id} is no longer stored")


async def _delete(asking: Asking) -> Response:
    store = asking.services.store
    key = await store.batches.delete_file(_id(asking.id, _FILE_ID), asking.tenant)
    if key is not None:
        await delete_blob(asking.services, key)
    return as_json({"id": asking.id, "object": "file", "deleted": True})


async def _found_file(asking: Asking) -> BatchFile:
    return await asking.services.store.batches.file(_id(asking.id, _FILE_ID), asking.tenant)


# Batches


async def _create(asking: Asking) -> Response:
    services, batches = asking.services, asking.services.store.batches
    key = key_of(asking.request)
    if key is None:
        await services.budgets.check(asking.caller)
    most_bytes = min(_CREATE_BYTES, services.config.max_body_bytes)
    body = incoming_of(asking.request, services.config, max_bytes=most_bytes, in_memory=True)
    order = _order(parsed(await body.whole()))
    once = None if key is None else Idempotency(key, order.digest)
    if once is not None:
        # First, since a repeat needs no budget, no room in the queue and no file.
        if (earlier := await batches.earlier(asking.tenant, once)) is not None:
            return _replayed(earlier)
        await services.budgets.check(asking.caller)
    if _FILE_ID.fullmatch(order.file_id) is None:
        file = await _copied(asking, order.file_id)
        if isinstance(file, Response):
            return file
    else:
        file = await batches.file(_id(order.file_id, _FILE_ID), asking.tenant)
    if file.purpose == OUTPUT:
        raise InvalidRequest(
            "input_file_id", "this file is the output of a batch", allowed="an input file"
        )
    batch_id = new_id()
    room = services.store.queue_caps.room(
        asking.caller, batch_id, jobs=file.lines, size_bytes=file.size_bytes
    )
    async with room:
        batch = await batches.add(
            batch_id, asking.caller, file, order.endpoint, order.metadata, once
        )
    return as_json(batch_view(batch)) if batch.batch_id == batch_id else _replayed(batch)


def _replayed(batch: Batch) -> Response:
    """Return the answer to a repeated request. Raises IdempotencyConflict."""
    if batch.is_of_messages:
        raise IdempotencyConflict("this idempotency key was used for a different request")
    answer = as_json(batch_view(batch))
    answer.headers[REPLAYED_HEADER] = "true"
    return answer


class _Order(NamedTuple):
    """The parameters of a new batch."""

    file_id: str
    endpoint: str
    metadata: dict[str, str] | None

    @property
    def digest(self) -> str:
        """Return the digest of the parameters, independent of their form. No native call has the
        same one."""
        canonical = orjson.dumps(
            ["/v1/batches", self.file_id.removeprefix("file-"), self.endpoint, self.metadata],
            option=orjson.OPT_SORT_KEYS,
        )
        return sha256(canonical).hexdigest()


def _order(values: dict[str, Any]) -> _Order:
    """Return the parameters of a body. Raises InvalidRequest."""
    for name in values:
        if name not in _CREATE_FIELDS:
            label = ascii(name[:64])
            allowed = ", ".join(_CREATE_FIELDS)
            raise InvalidRequest(name[:64], f"there is no field {label} here", allowed=allowed)
    if values.get("completion_window") != _WINDOW:
        raise InvalidRequest("completion_window", "unsupported completion_window", allowed=_WINDOW)
    path = values.get("endpoint")
    endpoint = endpoint_named(path)
    if endpoint.model is not None or not isinstance(path, str):
        allowed = "a path whose body names the model, such as /v1/chat/completions"
        raise InvalidRequest("endpoint", "unsupported endpoint", allowed=allowed)
    metadata = _metadata(values.get("metadata"))
    given = values.get("input_file_id")
    if not isinstance(given, str):
        raise InvalidRequest("input_file_id", "input_file_id is missing", allowed="file-...")
    return _Order(given, path, metadata)


async def _batches(asking: Asking) -> Response:
    query = asking.request.query_params
    limit, after = page_limit(query.get("limit"), "limit", 20, 100, least=0), query.get("after")
    if after is not None and _BATCH_ID.fullmatch(after) is None:
        return as_json(page([], limit))  # a cursor that is not in the list has no successors
    found = await asking.services.store.batches.listed(
        asking.tenant, after=None if after is None else _id(after, _BATCH_ID), limit=limit + 1
    )
    return as_json(page([batch_view(one) for one in found], limit))


async def _batch(asking: Asking) -> Response:
    return as_json(batch_view(await _found_batch(asking)))


async def _found_batch(asking: Asking) -> Batch:
    """Return a batch. Raises NotFound, also for one in Anthropic's form."""
    found = await asking.services.store.batches.get(_id(asking.id, _BATCH_ID), asking.tenant)
    if found.is_of_messages:
        raise NotFound(f"there is no batch {asking.id}")
    return found


async def _cancel(asking: Asking) -> Response:
    store = asking.services.store
    await _found_batch(asking)
    batch, done = await store.batches.cancel(_id(asking.id, _BATCH_ID), asking.tenant)
    if not done and not batch.status.startswith("cancel"):
        raise AlreadyEnded(f"this batch is {batch.status}: it can't be cancelled any more")
    return as_json(batch_view(batch))


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    sound = isinstance(value, dict) and len(value) <= _MOST_METADATA
    if sound:
        sound = all(
            len(key) <= _LONGEST_KEY
            and isinstance(text, str)
            and len(text) <= _LONGEST_VALUE
            and "\0" not in key + text
            for key, text in value.items()
        )
    if not sound:
        allowed = (
            f"at most {_MOST_METADATA} texts of at most {_LONGEST_VALUE} characters, by names of "
            f"at most {_LONGEST_KEY}, without NUL"
        )
        raise InvalidRequest("metadata", "invalid metadata", allowed=allowed)
    return dict(value)


def _id(text: str, shape: re.Pattern[str]) -> UUID:
    """Return the UUID of an id. Raises NotFound for a text that is not an id."""
    found = shape.fullmatch(text)
    if found is None:
        raise NotFound(f"there is no {text[:64]!a}")
    return UUID(hex=found["hex"])


_HANDLERS: dict[tuple[str, str, bool, str | None], Callable[[Asking], Awaitable[Response]]] = {
    ("POST", "files", False, None): _upload,
    ("GET", "files", False, None): _files,
    ("GET", "files", True, None): _file,
    ("GET", "files", True, "content"): _content,
    ("DELETE", "files", True, None): _delete,
    ("POST", "batches", False, None): _create,
    ("GET", "batches", False, None): _batches,
    ("GET", "batches", True, None): _batch,
    ("POST", "batches", True, "cancel"): _cancel,
}
