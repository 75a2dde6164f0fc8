"""`/v1/files` and `/v1/batches` in OpenAI's shape: ours, not relayed.

Invariant: everything belongs to the tenant of the caller and is not there for others; a batch that
was answered for is in PostgreSQL; errors are such as OpenAI's SDK knows.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, NamedTuple
from uuid import UUID

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tidegate.call import Caller, new_id
from tidegate.call import Scope as Right
from tidegate.errors import (
    AlreadyEnded,
    FilesFull,
    InvalidRequest,
    NotFound,
    StoreUnavailable,
    TidegateError,
)
from tidegate.http.batch_upload import FORM_BYTES, OVERHEAD_BYTES, Uploaded, read_upload
from tidegate.http.batch_views import batch_view, file_view, page
from tidegate.http.body import Body
from tidegate.http.caller import caller_of
from tidegate.http.dialects import body_of, not_relayed, refusal
from tidegate.http.idempotency import REPLAYED_HEADER, key_of
from tidegate.http.services import Services, services_of
from tidegate.http.spool import Spool
from tidegate.http.target import check_target
from tidegate.relay.asked import parsed
from tidegate.relay.detached import endpoint_named
from tidegate.relay.paths import Dialect, dialect_of
from tidegate.store.batches import INPUT, OUTPUT, Batch, BatchFile
from tidegate.store.blobs import new_key
from tidegate.store.records import Idempotency

_PATH = re.compile(r"/v1/(?P<room>files|batches)(?:/(?P<id>[\w-]{1,80})(?:/(?P<do>\w+))?)?/?")
_FILE_ID = re.compile(r"file-(?P<hex>[0-9a-f]{32})")
_BATCH_ID = re.compile(r"batch_(?P<hex>[0-9a-f]{32})")
_WINDOW = "24h"
_CREATE_FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata")
_CREATE_BYTES = 65_536
_MOST_METADATA, _LONGEST_KEY, _LONGEST_VALUE = 16, 64, 512


class Asking(NamedTuple):
    """One request, and who makes it."""

    request: Request
    services: Services
    caller: Caller
    id: str

    @property
    def tenant(self) -> str:
        return self.caller.tenant_id


def is_batch_path(scope: Scope) -> bool:
    """Whether a native path is one of ours. Gemini's files bear Google's key."""
    path = scope["path"]
    if not path.startswith(("/v1/files", "/v1/batches")) or _PATH.fullmatch(path) is None:
        return False
    names = frozenset(name for name, _ in scope["headers"])
    return dialect_of(path, names, scope["query_string"]) is Dialect.OPENAI


def batch_methods(path: str) -> tuple[str, ...]:
    """By which methods a path of ours is known."""
    if (found := _PATH.fullmatch(path)) is None:
        return ()
    place = (found["room"], found["id"] is not None, found["do"])
    return tuple(method for method, *where in _HANDLERS if tuple(where) == place)


async def batches(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request to one of our paths."""
    request = Request(scope, receive)
    try:
        response = await _answer(request)
    except ClientDisconnect:
        return
    except TidegateError as error:
        response = _refused(error)
    await response(scope, receive, send)


async def _answer(request: Request) -> Response:
    path = request.scope["path"]
    found = _PATH.fullmatch(path)
    assert found is not None
    method = request.method
    handler = _HANDLERS.get((method, found["room"], found["id"] is not None, found["do"]))
    if handler is None:
        raise not_relayed(method, path, batch_methods(path))
    caller = await caller_of(request, Right.READ if method == "GET" else Right.INFER)
    check_target(request.scope)
    return await handler(Asking(request, services_of(request), caller, found["id"] or ""))


def _refused(error: TidegateError) -> Response:
    status, headers, body = refusal(Dialect.OPENAI, error)
    if isinstance(error, NotFound):  # no model is meant here
        said = body_of(Dialect.OPENAI, error, status, None)
        said["error"]["code"] = error.code
        body = orjson.dumps(said)
    kept = {name.decode(): value.decode() for name, value in headers if name != b"content-length"}
    return Response(body, status, kept)


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


# Files


async def _upload(asking: Asking) -> Response:
    services, config = asking.services, asking.services.config
    uploaded, hold = Uploaded(Spool(config.data_dir / "tmp")), services.hold(asking.caller)
    try:
        body = Body(asking.request, config, max_bytes=FORM_BYTES)
        await _check_room(asking)
        await read_upload(body, asking.request.headers.get("content-type", ""), uploaded, hold)
        if uploaded.values.get("purpose") != INPUT:
            raise InvalidRequest("purpose", "only files of batches are kept here", allowed=INPUT)
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
            await services.blobs.put_file(file.blob_key, uploaded.spool.path)
        try:
            await services.store.batches.add_file(file, config.max_batch_files_bytes)
        except FilesFull:
            await _delete_blob(services, file.blob_key)
            raise
    finally:
        hold.give_back()
        await uploaded.spool.close()
    return _json(file_view(file))


async def _check_room(asking: Asking) -> None:
    """Before anything is read: whether a file as large as the form says could be kept. Raises
    FilesFull."""
    announced = int(asking.request.headers.get("content-length", "0"))
    least_bytes = max(0, announced - OVERHEAD_BYTES)
    batches, most_bytes = (
        asking.services.store.batches,
        asking.services.config.max_batch_files_bytes,
    )
    await batches.check_room(asking.tenant, least_bytes, most_bytes)


async def _delete_blob(services: Services, key: str) -> None:
    with suppress(StoreUnavailable):  # else it goes with the other orphans
        await services.blobs.delete([key])


async def _files(asking: Asking) -> Response:
    query = asking.request.query_params
    limit = _limit(query.get("limit"), 1_000, 10_000)
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order", "order is asc or desc", allowed="asc, desc")
    after = query.get("after")
    found = await asking.services.store.batches.files(
        asking.tenant,
        after=None if after is None else _id(after, _FILE_ID),
        purpose=query.get("purpose"),
        limit=limit + 1,
        upwards=order == "asc",
    )
    return _json(page([file_view(one) for one in found], limit))


async def _file(asking: Asking) -> Response:
    return _json(file_view(await _found_file(asking)))


async def _content(asking: Asking) -> Response:
    file = await _found_file(asking)
    pieces = asking.services.blobs.stream(file.blob_key)
    first = await anext(pieces, b"")  # before the head goes out: the bytes may be gone
    headers = {
        "content-length": str(file.size_bytes),
        "content-disposition": "attachment",
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(_after(first, pieces), headers=headers, media_type="application/jsonl")


async def _delete(asking: Asking) -> Response:
    store = asking.services.store
    key = await store.batches.delete_file(_id(asking.id, _FILE_ID), asking.tenant)
    if key is not None:
        await _delete_blob(asking.services, key)
    return _json({"id": asking.id, "object": "file", "deleted": True})


async def _found_file(asking: Asking) -> BatchFile:
    return await asking.services.store.batches.file(_id(asking.id, _FILE_ID), asking.tenant)


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


# Batches


async def _create(asking: Asking) -> Response:
    services, batches = asking.services, asking.services.store.batches
    key = key_of(asking.request)
    if key is None:
        await services.budgets.let_in(asking.caller)
    body = Body(asking.request, services.config)
    order = _order(parsed(await body.read(_CREATE_BYTES, field="body")))
    once = None if key is None else Idempotency(key, order.digest)
    if once is not None:
        # Before all that a repeat may be without: a budget, room in the queue, its file.
        if (earlier := await batches.earlier(asking.tenant, once)) is not None:
            return _replayed(earlier)
        await services.budgets.let_in(asking.caller)
    file = await batches.file(order.file_id, asking.tenant)
    if file.purpose == OUTPUT:
        raise InvalidRequest("input_file_id", "this is what a batch gave", allowed="an input file")
    batch_id = new_id()
    room = services.store.queued.room(asking.caller, jobs=file.lines, size_bytes=file.size_bytes)
    async with room:
        batch = await batches.add(
            batch_id, asking.caller, file, order.endpoint, order.metadata, once
        )
    return _json(batch_view(batch)) if batch.batch_id == batch_id else _replayed(batch)


def _replayed(batch: Batch) -> Response:
    answer = _json(batch_view(batch))
    answer.headers[REPLAYED_HEADER] = "true"
    return answer


class _Order(NamedTuple):
    """The batch that is wanted."""

    file_id: UUID
    endpoint: str
    metadata: dict[str, str] | None

    @property
    def digest(self) -> str:
        """Of all that is asked for, however it was written. No native call has the same."""
        asked = orjson.dumps(
            ["/v1/batches", self.file_id.hex, self.endpoint, self.metadata],
            option=orjson.OPT_SORT_KEYS,
        )
        return sha256(asked).hexdigest()


def _order(values: dict[str, Any]) -> _Order:
    """Raises InvalidRequest, and NotFound for a file that can't be."""
    for name in values:
        if name not in _CREATE_FIELDS:
            shown = ascii(name[:64])
            allowed = ", ".join(_CREATE_FIELDS)
            raise InvalidRequest(name[:64], f"there is no field {shown} here", allowed=allowed)
    if values.get("completion_window") != _WINDOW:
        raise InvalidRequest("completion_window", "there is one window", allowed=_WINDOW)
    path = values.get("endpoint")
    endpoint = endpoint_named(path)
    if endpoint.model is not None or not isinstance(path, str):
        allowed = "a path whose body names the model, such as /v1/chat/completions"
        raise InvalidRequest("endpoint", "batches have one endpoint for all", allowed=allowed)
    metadata = _metadata(values.get("metadata"))
    given = values.get("input_file_id")
    if not isinstance(given, str):
        raise InvalidRequest("input_file_id", "input_file_id is missing", allowed="file-...")
    return _Order(_id(given, _FILE_ID), path, metadata)


async def _batches(asking: Asking) -> Response:
    query = asking.request.query_params
    limit, after = _limit(query.get("limit"), 20, 100), query.get("after")
    found = await asking.services.store.batches.listed(
        asking.tenant, after=None if after is None else _id(after, _BATCH_ID), limit=limit + 1
    )
    return _json(page([batch_view(one) for one in found], limit))


async def _batch(asking: Asking) -> Response:
    store = asking.services.store
    return _json(batch_view(await store.batches.get(_id(asking.id, _BATCH_ID), asking.tenant)))


async def _cancel(asking: Asking) -> Response:
    store = asking.services.store
    batch, done = await store.batches.cancel(_id(asking.id, _BATCH_ID), asking.tenant)
    if not done and not batch.status.startswith("cancel"):
        raise AlreadyEnded(f"this batch is {batch.status}: it can't be cancelled any more")
    return _json(batch_view(batch))


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    sound = isinstance(value, dict) and len(value) <= _MOST_METADATA
    if sound:
        sound = all(
            len(key) <= _LONGEST_KEY
            and isinstance(said, str)
            and len(said) <= _LONGEST_VALUE
            and "\0" not in key + said
            for key, said in value.items()
        )
    if not sound:
        allowed = (
            f"at most {_MOST_METADATA} texts of at most {_LONGEST_VALUE} characters, by names of "
            f"at most {_LONGEST_KEY}, without NUL"
        )
        raise InvalidRequest("metadata", "this is not metadata", allowed=allowed)
    return dict(value)


def _id(text: str, shape: re.Pattern[str]) -> UUID:
    """Raises NotFound: what can't be an id names nothing."""
    found = shape.fullmatch(text)
    if found is None:
        raise NotFound(f"there is no {text[:64]!a}")
    return UUID(hex=found["hex"])


def _limit(text: str | None, usual: int, most: int) -> int:
    if text is None:
        return usual
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= most:
        allowed = f"a whole number from 1 to {most}"
        raise InvalidRequest("limit", f"limit must be {allowed}", allowed=allowed)
    return int(text)


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
