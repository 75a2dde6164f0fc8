"""Routes `/v1/messages/batches`: Message Batches in Anthropic's shape.

    POST ──► spool ──► one line a request ──► blob ──► batch, processed like OpenAI's
    GET .../results ──► the two files of the batch, each line as a result

A batch whose id is not ours was created at the provider itself: it is read and cancelled there, and
its results are relayed.

Invariants: everything belongs to the caller's tenant and does not exist for others; a batch in an
answer is in PostgreSQL, and each of its requests has one result; a request that cannot be executed
is rejected before the batch is created, with its number and field; a body is written to disk as it
arrives, and one request of it is parsed at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from io import BytesIO
from mmap import ACCESS_READ, mmap
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any
from uuid import UUID

import orjson
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidegate.call import new_id
from tidegate.dialects import endpoint_of
from tidegate.dialects.anthropic import error_type
from tidegate.dialects.parsing import MOST_PARTS, has_too_many_parts
from tidegate.dialects.resources import page_limit
from tidegate.dialects.spec import Dialect
from tidegate.errors import (
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    StoreUnavailable,
    TidegateError,
)
from tidegate.http.batches import (
    Asking,
    as_json,
    as_relayed,
    asking_of,
    delete_blob,
    relayed,
    respond,
)
from tidegate.http.body import PREFIX, WITH_ITS_HEAD_BYTES, BodyBudget, Spool, count_in, incoming_of
from tidegate.http.guards import own_origin
from tidegate.http.idempotency import REPLAYED_HEADER, key_of
from tidegate.http.problems import not_relayed, refusal, status_of_code
from tidegate.http.views import streamed
from tidegate.record import dumped
from tidegate.spine.detached import LONGEST_BYTES, endpoint_named, wrapped_facts
from tidegate.store.batches import INPUT, MOST_LINES, Batch, BatchFile
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.records import Idempotency

PATH = "/v1/messages/batches"
MOST_BYTES = 200_000_000
_MESSAGES = "/v1/messages"
_PATH = re.compile(rf"{PATH}(?:/(?P<id>[\w-]{{1,200}})(?:/(?P<do>\w+))?)?", re.ASCII)
_ID = re.compile(r"msgbatch_(?P<hex>[0-9a-f]{32})")
_OPEN = ("validating", "in_progress", "finalizing")


def view(batch: Batch, origin: str) -> dict[str, Any]:
    """Return a batch in Anthropic's form. All its requests are processing until it has ended."""
    public_id, has_ended = _public_id(batch.batch_id), batch.status not in (*_OPEN, "cancelling")
    status = "canceling" if batch.status == "cancelling" else "in_progress"
    left = batch.total - batch.completed - batch.failed
    counts = {
        "succeeded": batch.completed,
        "errored": batch.failed,
        "canceled": left if batch.status == "cancelled" else 0,
        "expired": left if batch.status == "expired" else 0,
    }
    return {
        "id": public_id,
        "type": "message_batch",
        "processing_status": "ended" if has_ended else status,
        "request_counts": {
            "processing": 0 if has_ended else batch.total,
            **(counts if has_ended else dict.fromkeys(counts, 0)),
        },
        "created_at": _time(batch, "created_at"),
        "expires_at": _time(batch, "expires_at"),
        "ended_at": _time(batch, "completed_at", "failed_at", "expired_at", "cancelled_at"),
        "cancel_initiated_at": _time(batch, "cancelling_at"),
        "archived_at": None,
        "results_url": f"{origin}{PATH}/{public_id}/results" if has_ended else None,
    }


def _public_id(batch_id: UUID) -> str:
    return f"msgbatch_{batch_id.hex}"


def _time(batch: Batch, *names: str) -> str | None:
    found = next((batch.times[name] for name in names if name in batch.times), None)
    return None if found is None else found.astimezone(UTC).isoformat().replace("+00:00", "Z")


# The body of a new batch

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)
_QUOTE, _COMMA = ord('"'), ord(",")
_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_REQUESTS = "a list of objects with custom_id and params"
_MOST_REST_BYTES = 65_536


@dataclass(slots=True)
class _Array:
    """The list `requests` in a body: where it begins and ends; -1 if it does not."""

    begins: int = -1
    ends: int = -1


def _slices(data: bytes | mmap, array: _Array) -> Iterator[tuple[int, int]]:
    """Yield where each value in the list `requests` begins and ends. For a body that is not JSON
    the slices are not JSON either. Raises InvalidRequest."""
    depth, start, is_named = 0, 0, False
    for token in _TOKEN.finditer(data):
        at = token.start()
        sign = data[at]
        if sign == _QUOTE:
            is_named = depth == 1 and token[0] == b'"requests"'
            continue
        is_within = array.begins >= 0 > array.ends
        if sign in b"[{":
            depth += 1
            if is_named and sign == b"["[0]:
                if array.begins >= 0:
                    raise InvalidRequest("requests", "requests is given more than once")
                array.begins = start = token.end()
        elif sign == _COMMA:
            if depth == 2 and is_within:
                yield start, at
                start = token.end()
        else:
            if depth == 2 and is_within:
                array.ends = at
                if start != array.begins or data[start:at].strip():
                    yield start, at
            depth -= 1
        is_named = False


@dataclass(slots=True)
class RequestLines:
    """Checks the requests of a new batch and writes them as the lines of its file."""

    count: int = 0
    size_bytes: int = 0
    _digest: Any = field(default_factory=sha256)
    _ids: set[str] = field(default_factory=set)

    def digest(self, call_headers: dict[str, str]) -> str:
        """Return the digest of the whole request. No native call has the same one."""
        self._digest.update(orjson.dumps([PATH, call_headers], option=orjson.OPT_SORT_KEYS))
        return str(self._digest.hexdigest())

    def fill(self, source: bytes | Path, sink: IO[bytes]) -> None:
        """Write the lines of a body to `sink`. Raises InvalidRequest."""
        if isinstance(source, bytes):
            self._fill(source, sink)
            return
        with source.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            self._fill(data, sink)

    def _fill(self, data: bytes | mmap, sink: IO[bytes]) -> None:
        array = _Array()
        for begin, end in _slices(data, array):
            line = self._line(f"requests.{self.count}", data, begin, end)
            self._digest.update(line)
            sink.write(line)
            self.count += 1
            self.size_bytes += len(line)
        _check_rest(data, array)
        if not self.count:
            raise InvalidRequest("requests", "requests is missing or empty", allowed=_REQUESTS)

    def _line(self, place: str, data: bytes | mmap, begin: int, end: int) -> bytes:
        if self.count >= MOST_LINES:
            message = f"a batch has at most {MOST_LINES} requests"
            raise InvalidRequest("requests", message, allowed=f"1 to {MOST_LINES} requests")
        if end - begin >= LONGEST_BYTES - WITH_ITS_HEAD_BYTES:
            message = f"{place} is larger than {LONGEST_BYTES - WITH_ITS_HEAD_BYTES} bytes"
            raise PayloadTooLarge(place, message)
        raw = data[begin:end]
        if has_too_many_parts(raw):
            message = f"{place} holds too many values"
            raise PayloadTooLarge(place, message, allowed=f"at most {MOST_PARTS} values")
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError as broken:
            raise InvalidRequest(place, f"{place} is not JSON: {broken}") from None
        custom_id, params = self._checked(place, value)
        line = {"custom_id": custom_id, "method": "POST", "url": _MESSAGES, "body": params}
        try:
            return orjson.dumps(line) + b"\n"
        except orjson.JSONEncodeError:
            message = f"{place}.params is nested too deeply"
            raise InvalidRequest(f"{place}.params", message) from None

    def _checked(self, place: str, value: Any) -> tuple[str, dict[str, Any]]:
        if not isinstance(value, dict):
            raise InvalidRequest(place, f"{place} is not an object", allowed=_REQUESTS)
        for name in value:
            if name not in ("custom_id", "params"):
                label = f"{place}.{name[:64]}"
                message = f"there is no field {label!a} here"
                raise InvalidRequest(label, message, allowed="custom_id, params")
        custom_id, params = value.get("custom_id"), value.get("params")
        where = f"{place}.custom_id"
        if not isinstance(custom_id, str) or not _CUSTOM_ID.fullmatch(custom_id):
            allowed = "1 to 64 letters, digits, - and _"
            raise InvalidRequest(where, f"{where} is missing or wrong", allowed=allowed)
        if custom_id in self._ids:
            message = f"the custom_id {custom_id!r} is there already"
            raise InvalidRequest(where, message, allowed="one that no other request has")
        self._ids.add(custom_id)
        if not isinstance(params, dict):
            where = f"{place}.params"
            raise InvalidRequest(where, f"{where} is not an object", allowed="a message's body")
        try:
            wrapped_facts(endpoint_named(_MESSAGES), params)
        except InvalidRequest as invalid:
            where = f"{place}.params.{invalid.field.removeprefix('body.')}"
            raise InvalidRequest(
                where, f"{where}: {invalid.message}", allowed=invalid.allowed
            ) from None
        return custom_id, params


def _check_rest(data: bytes | mmap, array: _Array) -> None:
    """Check a body without the content of the list `requests`. Raises InvalidRequest."""
    begin, end = (array.begins, array.ends) if array.ends >= 0 else (len(data), len(data))
    if begin + len(data) - end > _MOST_REST_BYTES:
        raise InvalidRequest("requests", "requests is missing", allowed=_REQUESTS)
    try:
        rest = orjson.loads(data[:begin] + data[end:])
    except orjson.JSONDecodeError as broken:
        raise InvalidRequest("body", f"the body is not JSON: {broken}") from None
    if not isinstance(rest, dict) or not isinstance(rest.get("requests"), list):
        raise InvalidRequest("requests", "requests is missing or wrong", allowed=_REQUESTS)
    for name in rest:
        if name != "requests":
            label = ascii(name[:64])
            raise InvalidRequest(name[:64], f"there is no field {label} here", allowed="requests")


_MOST_HEADERS_BYTES = 4_096


def _call_headers(scope: Scope) -> dict[str, str]:
    """Return the headers of a new batch that apply to its calls: betas, versions and the like.
    Raises InvalidRequest."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        if name.startswith(b"anthropic-"):
            key, text = name.decode("latin-1"), value.decode("latin-1")
            if not text.isascii() or not text.isprintable():
                raise InvalidRequest(key, f"{key} is no such header", allowed="printable ASCII")
            found[key] = f"{found[key]},{text}" if key in found else text
    if sum(len(key) + len(text) for key, text in found.items()) > _MOST_HEADERS_BYTES:
        allowed = f"at most {_MOST_HEADERS_BYTES} bytes in all"
        raise InvalidRequest("anthropic-beta", "the headers are too long", allowed=allowed)
    return found


# Requests


def is_served_here(scope: Scope) -> bool:
    """Return whether a path below `PATH` is answered here; other paths of batches that are not ours
    are native calls."""
    found = _PATH.fullmatch(scope["path"])
    if found is None or found["id"] is None or _ID.fullmatch(found["id"]) is not None:
        return True
    return (scope["method"], found["do"]) in _ELSEWHERE


def message_batch_methods(path: str) -> tuple[str, ...]:
    """Return the methods of a path."""
    found = _PATH.fullmatch(path)
    place = None if found is None else (found["id"] is not None, found["do"])
    return tuple(method for method, *where in _HANDLERS if tuple(where) == place)


async def message_batches(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request to a path of message batches."""
    await respond(_answer, _refused, scope, receive, send)


def _refused(error: TidegateError) -> Response:
    status, headers, body = refusal(Dialect.ANTHROPIC, error)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


async def _answer(request: Request) -> Response:
    path, method = request.scope["path"], request.method
    found = _PATH.fullmatch(path)
    handler = (
        None if found is None else _HANDLERS.get((method, found["id"] is not None, found["do"]))
    )
    if found is None or handler is None:
        raise not_relayed(method, path, message_batch_methods(path))
    asking = await asking_of(request, found["id"] or "")
    if asking.id and _ID.fullmatch(asking.id) is None:
        return await _elsewhere(asking)
    return await handler(asking)


def _batch_response(asking: Asking, batch: Batch) -> Response:
    return as_json(view(batch, own_origin(asking.request.scope)))


async def _create(asking: Asking) -> Response:
    services, config, key = asking.services, asking.services.config, key_of(asking.request)
    if key is None:
        await services.budgets.check(asking.caller)
    call_headers = _call_headers(asking.request.scope)
    hold, spool = services.hold(asking.caller), Spool(config.data_dir / "tmp")
    lines, batch_id = RequestLines(), new_id()
    try:
        body = incoming_of(asking.request, config, max_bytes=MOST_BYTES)
        async for piece in body.pieces():
            await spool.write(piece)
            hold.spool(spool.size_bytes)
            count_in(hold, spool.held_bytes, WITH_ITS_HEAD_BYTES)
        await spool.finish()
        blob_key = await _stored(spool, lines, hold, services.blobs, config.data_dir / "tmp")
    finally:
        hold.release()
        await spool.close()
    file = BatchFile(
        file_id=new_id(),
        tenant_id=asking.tenant,
        purpose=INPUT,
        name=f"{_public_id(batch_id)}.jsonl",
        size_bytes=lines.size_bytes,
        lines=lines.count,
        blob_key=blob_key,
    )
    once = None if key is None else Idempotency(key, lines.digest(call_headers))
    try:
        batch = await _added(asking, batch_id, file, call_headers, once)
    except StoreUnavailable:
        raise  # it may have been added: a file without a batch is removed with other orphans
    except TidegateError:
        await delete_blob(services, blob_key)
        raise
    if batch.batch_id == batch_id:
        return _batch_response(asking, batch)
    await delete_blob(services, blob_key)
    return _replayed(asking, batch)


async def _added(
    asking: Asking,
    batch_id: UUID,
    file: BatchFile,
    call_headers: dict[str, str],
    once: Idempotency | None,
) -> Batch:
    """Add the batch and return it, or return the earlier one with the same idempotency key."""
    services, batches = asking.services, asking.services.store.batches
    if once is not None:
        # First, since a repeat needs neither budget nor room in the queue.
        if (earlier := await batches.earlier(asking.tenant, once)) is not None:
            return earlier
        await services.budgets.check(asking.caller)
    room = services.store.queue_caps.room(
        asking.caller, batch_id, jobs=file.lines, size_bytes=file.size_bytes
    )
    async with room:
        return await batches.add_messages(
            batch_id,
            asking.caller,
            file,
            _MESSAGES,
            call_headers,
            once,
            services.config.max_batch_files_bytes,
        )


def _replayed(asking: Asking, batch: Batch) -> Response:
    if not batch.is_of_messages:
        raise IdempotencyConflict("this idempotency key was used for a different request")
    answer = _batch_response(asking, batch)
    answer.headers[REPLAYED_HEADER] = "true"
    return answer


async def _stored(
    spool: Spool, lines: RequestLines, hold: BodyBudget, blobs: Blobs, folder: Path
) -> str:
    """Write the lines of a body to a new blob and return its key."""
    key = new_key(datetime.now(UTC))
    if spool.path is None:
        sink = BytesIO()
        async with hold.turn:
            await to_thread.run_sync(lines.fill, spool.data, sink)
        await blobs.put(key, sink.getvalue())
        return key
    try:
        with NamedTemporaryFile(prefix=PREFIX, dir=folder) as file:
            async with hold.turn:
                await to_thread.run_sync(lines.fill, spool.path, file.file)
            file.flush()
            await blobs.put(key, Path(file.name))
    except OSError as full:
        raise StoreUnavailable(f"a batch could not be kept: {full.strerror}") from full
    return key


async def _list(asking: Asking) -> Response:
    query = asking.request.query_params
    limit = page_limit(query.get("limit"), "limit", 20, 1_000)
    named = [query.get(name) or None for name in ("after_id", "before_id")]
    after, before = [_ID.fullmatch(one) if one else None for one in named]
    found: list[Batch] = []
    if (after is None, before is None) == (named[0] is None, named[1] is None):
        found = await asking.services.store.batches.listed_messages(
            asking.tenant,
            after=UUID(hex=after["hex"]) if after else None,
            before=UUID(hex=before["hex"]) if before else None,
            limit=limit + 1,
        )
    # A cursor that is not a batch of ours has no neighbours.
    listed = found[-limit:] if before and not after else found[:limit]
    origin = own_origin(asking.request.scope)
    return as_json(
        {
            "data": [view(one, origin) for one in listed],
            "has_more": len(found) > limit,
            "first_id": _public_id(listed[0].batch_id) if listed else None,
            "last_id": _public_id(listed[-1].batch_id) if listed else None,
        }
    )


async def _found(asking: Asking) -> Batch:
    try:
        batch = await asking.services.store.batches.get(_id(asking.id), asking.tenant)
    except NotFound:
        raise _missing(asking.id) from None  # with the id in this API's form
    if not batch.is_of_messages:
        raise _missing(asking.id)
    return batch


async def _retrieve(asking: Asking) -> Response:
    return _batch_response(asking, await _found(asking))


async def _cancel(asking: Asking) -> Response:
    await _found(asking)
    batch, done = await asking.services.store.batches.cancel(_id(asking.id), asking.tenant)
    if not done and not batch.status.startswith("cancel"):
        # Not 409, which Anthropic's SDKs would retry.
        message = f"the batch {asking.id} has ended and can't be canceled any more"
        if batch.status in _OPEN:  # its results are being written
            message = f"the batch {asking.id} has no request left to cancel"
        raise InvalidRequest("message_batch_id", message)
    return _batch_response(asking, batch)


async def _delete(asking: Asking) -> Response:
    await _found(asking)
    keys = await asking.services.store.batches.delete(_id(asking.id), asking.tenant)
    if keys is None:
        message = f"the batch {asking.id} is still processing"
        raise InvalidRequest(
            "message_batch_id", message, allowed="a batch that has ended: cancel it"
        )
    for key in keys:
        await delete_blob(asking.services, key)
    return as_json({"id": asking.id, "type": "message_batch_deleted"})


async def _results(asking: Asking) -> Response:
    batch, store = await _found(asking), asking.services.store.batches
    if batch.status in _OPEN or batch.status == "cancelling":
        raise NotFound(f"the batch {asking.id} has no results before it has ended")
    if batch.errors:  # its input was lost before it began
        raise NotFound(f"the batch {asking.id} has no results: {batch.errors[0]['message']}")
    ids = [one for one in (batch.output_file_id, batch.error_file_id) if one is not None]
    keys = [(await store.file(one, asking.tenant)).blob_key for one in ids]
    return await streamed(
        _result_lines(asking.services.blobs, keys),
        {"Content-Disposition": "attachment"},
        f"the results of {asking.id} are no longer stored",
        "application/x-jsonl",
    )


async def _result_lines(blobs: Blobs, keys: list[str]) -> AsyncIterator[bytes]:
    for key in keys:
        begun: list[bytes] = []
        async for piece in blobs.stream(key):
            *ends, rest = piece.split(b"\n")
            whole: list[bytes] = []
            for end in ends:
                whole.append(result_line(b"".join((*begun, end))))
                begun = []
            if rest:
                begun.append(rest)
            if whole:
                yield b"".join(whole)


_CUT_SHORT = {"batch_cancelled": "canceled", "batch_expired": "expired"}


def result_line(line: bytes) -> bytes:
    """Convert a line of a batch's files to a result of Anthropic's."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:  # the answer is nested as deeply as orjson reads
        row = json.loads(line)
    response, error = row["response"], row["error"]
    result: dict[str, Any]
    if response is not None and response["status_code"] == 200:
        result = {"type": "succeeded", "message": response["body"]}
    elif response is not None:
        result = {"type": "errored", "error": _error(response["status_code"], response["body"])}
    elif (cut_short := _CUT_SHORT.get(error["code"])) is not None:
        result = {"type": cut_short}
    else:
        kind = error_type(status_of_code(error["code"]))
        result = {"type": "errored", "error": _wrapped(kind, error["message"])}
    return dumped({"custom_id": row["custom_id"], "result": result}) + b"\n"


def _error(status: int, body: Any) -> Any:
    """Return the provider's error in Anthropic's form, whatever the upstream."""
    inner = body.get("error") if isinstance(body, dict) else None
    if isinstance(inner, dict) and body.get("type") == "error":
        return body
    message = inner.get("message") if isinstance(inner, dict) else None
    return _wrapped(error_type(status), message if isinstance(message, str) else str(body)[:1_000])


def _wrapped(kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}}


def _missing(text: str) -> NotFound:
    return NotFound(f"there is no batch {text[:64]!a}")


def _id(text: str) -> UUID:
    """Return the UUID of a batch id. Raises NotFound for a text that is not an id."""
    if (found := _ID.fullmatch(text)) is None:
        raise _missing(text)
    return UUID(hex=found["hex"])


async def _elsewhere(asking: Asking) -> Response:
    """Return a batch that was created at the provider, with the URL of its results changed to ours:
    a client would send its key of ours to the provider's."""
    scope = asking.request.scope
    endpoint = endpoint_of(scope["method"], scope["path"], Dialect.ANTHROPIC)
    assert endpoint is not None
    answer = await relayed(asking, endpoint, scope, on_record=True)
    if answer.status_code != 200:
        return answer
    batch = orjson.loads(answer.body)
    if isinstance(batch, dict) and batch.get("results_url"):
        batch["results_url"] = f"{own_origin(scope)}{PATH}/{asking.id}/results"
    return as_relayed(batch, answer)


_HANDLERS: dict[tuple[str, bool, str | None], Callable[[Asking], Awaitable[Response]]] = {
    ("POST", False, None): _create,
    ("GET", False, None): _list,
    ("GET", True, None): _retrieve,
    ("DELETE", True, None): _delete,
    ("POST", True, "cancel"): _cancel,
    ("GET", True, "results"): _results,
}
_ELSEWHERE = (("GET", None), ("POST", "cancel"))
