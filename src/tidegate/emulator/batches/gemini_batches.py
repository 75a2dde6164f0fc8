"""Gemini's batch API: models/*:batchGenerateContent, and the operations under batches/.

    https://ai.google.dev/api/batch-api

Invariants: requests come inline or as an uploaded file of JSON lines, and their results come in
the same way, in the order of the requests; a batch that expires has no results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from secrets import token_hex
from typing import Any

import orjson
from aiohttp import web

from tidegate.emulator.batches.store import (
    ENDED,
    BatchState,
    JsonLinesFile,
    LineWork,
    ProviderBatch,
    ProviderBatchLine,
)
from tidegate.emulator.content import get
from tidegate.emulator.delivery import EMULATED, Served, json_response
from tidegate.emulator.dialect import Json, Refused

WINDOW_S = 48 * 3600.0
MOST_INLINE_BYTES = 20 * 1024 * 1024
_TYPE = "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch"
_STATES: dict[BatchState, str] = {
    "validating": "BATCH_STATE_PENDING",
    "in_progress": "BATCH_STATE_RUNNING",
    "cancelling": "BATCH_STATE_RUNNING",
    "finalizing": "BATCH_STATE_RUNNING",
    "completed": "BATCH_STATE_SUCCEEDED",
    "failed": "BATCH_STATE_FAILED",
    "cancelled": "BATCH_STATE_CANCELLED",
    "expired": "BATCH_STATE_EXPIRED",
}
_INPUT = "* BatchGenerateContentRequest.batch.input_config"

Work = Callable[[str, Any], LineWork]  # a model and a request; raises Refused


async def create(served: Served, model: str, body: Any, work: Work) -> web.StreamResponse:
    """Serve batchGenerateContent. Raises Refused."""
    label = f"{served.request.method} {served.request.path}"
    return await served.other(
        "batches", model, partial(_create, served, model, body, work), label=label
    )


async def route(served: Served, steps: Sequence[str]) -> web.StreamResponse:
    """Serve what follows `batches` in the path. Raises Refused."""
    request, label = served.request, f"{served.request.method} {served.request.path}"
    answer: Callable[[], Json]
    match request.method, steps:
        case "GET", []:
            answer = partial(_list, served)
        case "POST", [call] if call.endswith(":cancel"):
            answer = partial(_cancel, served, call.removesuffix(":cancel"))
        case "GET", [name]:
            answer = partial(_show_one, served, name)
        case "DELETE", [name]:
            answer = partial(_delete, served, name)
        case _:
            raise Refused(404, f"Not found: {request.method} {request.path}")
    return await served.other("batches", "", answer, label=label)


async def download(served: Served, name: str) -> web.StreamResponse:
    """Serve the content of a file of results. Raises Refused."""
    label = f"{served.request.method} {served.request.path}"
    return await served.other("files", "", partial(_download, served, name), label=label)


def results_file(served: Served, name: str) -> Json | None:
    """A file of results as the Files API shows it."""
    file = served.state.batches.file(f"files/{name}")
    if file is None:
        return None
    return {
        "name": file.id,
        "displayName": file.filename,
        "mimeType": "application/jsonl",
        "sizeBytes": str(len(file.data)),
        "createTime": _time(file.created_ns),
        "state": "ACTIVE",
        "source": "GENERATED",
        "downloadUri": f"http://{served.request.host}/v1beta/{file.id}:download?alt=media",
    }


async def _download(served: Served, name: str) -> web.Response:
    file = served.state.batches.file(f"files/{name}")
    if file is None:
        raise Refused(
            403, f"You do not have permission to access the File {name} or it may not exist."
        )
    return web.Response(body=file.data, headers=EMULATED | {"Content-Type": "application/jsonl"})


async def _create(served: Served, model: str, body: Any, work: Work) -> web.Response:
    batch = get(body, "batch") if isinstance(body, dict) else None
    batch = batch if isinstance(batch, dict) else {}
    name, source = get(batch, "displayName"), get(batch, "inputConfig")
    if not isinstance(source, dict):
        raise Refused(400, f"{_INPUT}: must be set")
    file_name, inline = get(source, "fileName"), get(source, "requests")
    if isinstance(file_name, str):
        given: Any = list(_of_file(served, file_name))
    else:
        given = get(inline, "requests") if isinstance(inline, dict) else None
        if not isinstance(given, list) or not given:
            raise Refused(400, f"{_INPUT}: requests or a file name must be set")
        if len(await served.request.read()) > MOST_INLINE_BYTES:
            raise Refused(400, "Request payload size exceeds the limit: 20971520 bytes.")
    lines = [_line(index, item, model, work) for index, item in enumerate(given)]
    _check_room(served, model, lines)
    facts = {"displayName": str(name or ""), "fileName": file_name}
    created = served.state.batches.create(
        "batches/", "gemini", model, lines, served.behaviour.batches, WINDOW_S, facts
    )
    served.state.batches.advance()
    return json_response(200, _show(served, created))


def _of_file(served: Served, name: str) -> Iterator[Any]:
    data = served.state.files.find(name).content
    if data is None:
        raise Refused(400, f"{_INPUT}.file_name: {name} is not of the type application/jsonl")
    for number, text in enumerate(data.splitlines(), 1):
        if not text.strip():
            continue
        try:
            yield orjson.loads(text)
        except orjson.JSONDecodeError as broken:
            raise Refused(400, f"Invalid JSON in line {number} of {name}: {broken}") from None


def _line(index: int, item: Any, model: str, work: Work) -> ProviderBatchLine:
    item = item if isinstance(item, dict) else {}
    metadata = item.get("metadata")
    key = str(item.get("key") or index)
    kept = metadata if isinstance(metadata, dict) else None
    return ProviderBatchLine.of(key, partial(work, model, item.get("request")), kept)


def _check_room(served: Served, model: str, lines: Sequence[ProviderBatchLine]) -> None:
    """Raises Refused (429) where a limit of batches has no room."""
    pace = served.behaviour.batches
    open_batches = list(served.state.batches.open("gemini"))
    tokens = sum(batch.enqueued_tokens(model) for batch in open_batches)
    tokens += sum(line.input_tokens for line in lines)
    full = pace.open_batches is not None and len(open_batches) >= pace.open_batches
    if full or (pace.enqueued_tokens is not None and tokens > pace.enqueued_tokens):
        raise Refused(429, "Resource has been exhausted (e.g. check quota).")


def _found(served: Served, name: str) -> ProviderBatch:
    missing = "Requested entity was not found."
    return served.state.batches.find(f"batches/{name}", "gemini", missing)


def _show_one(served: Served, name: str) -> Json:
    return _show(served, _found(served, name))


def _list(served: Served) -> Json:
    query = served.request.query
    size, token = get(query, "pageSize") or "50", get(query, "pageToken") or "0"
    if not size.isdecimal() or not token.isdecimal() or int(size) < 1:
        raise Refused(400, "* ListBatchesRequest: page_size or page_token is invalid")
    batches = served.state.batches.newest("gemini")
    begin, end = int(token), int(token) + int(size)
    page: Json = {"operations": [_show(served, batch) for batch in batches[begin:end]]}
    return page | ({"nextPageToken": str(end)} if end < len(batches) else {})


def _cancel(served: Served, name: str) -> Json:
    served.state.batches.cancel(_found(served, name))
    return {}


def _delete(served: Served, name: str) -> Json:
    served.state.batches.delete(_found(served, name))
    return {}


def _show(served: Served, batch: ProviderBatch) -> Json:
    ended = batch.state in ENDED
    metadata: Json = {
        "@type": _TYPE,
        "name": batch.id,
        "model": f"models/{batch.model}",
        "displayName": batch.facts["displayName"],
        "state": _STATES[batch.state],
        "createTime": _time(batch.created_ns),
        "updateTime": _time(batch.ended_ns or batch.processed_ns or batch.created_ns),
        "batchStats": _stats(batch),
    }
    if file_name := batch.facts["fileName"]:
        metadata["inputConfig"] = {"fileName": file_name}
    operation: Json = {"name": batch.id, "metadata": metadata}
    if not ended:
        return operation
    operation["done"] = True
    metadata["endTime"] = _time(batch.ended_ns)
    if batch.state == "completed":
        metadata["output"] = _output(served, batch)
        operation["response"] = metadata["output"] | {"@type": f"{_TYPE}Output"}
    else:
        said = {"cancelled": "The batch was cancelled.", "expired": "The batch has expired."}
        code = 1 if batch.state == "cancelled" else 4
        operation["error"] = {"code": code, "message": said[batch.state]}
    return operation


def _stats(batch: ProviderBatch) -> Json:
    """Counts as the API writes them: texts, and none that is zero."""
    counts = {
        "requestCount": len(batch.lines),
        "successfulRequestCount": batch.count("succeeded"),
        "failedRequestCount": batch.count("errored", "expired", "canceled"),
        "pendingRequestCount": batch.count("processing"),
    }
    return {name: str(count) for name, count in counts.items() if count}


def _output(served: Served, batch: ProviderBatch) -> Json:
    if not batch.facts["fileName"]:
        inlined = [_result(served, line) for line in batch.lines]
        embeds = any(line.work is not None and line.work.method == "embed" for line in batch.lines)
        name = "inlinedEmbedContentResponses" if embeds else "inlinedResponses"
        return {name: {"inlinedResponses": inlined}}
    if "output" not in batch.files:
        results = ({"key": line.custom_id} | _result(served, line) for line in batch.lines)
        data = b"".join(orjson.dumps(result) + b"\n" for result in results)
        file_id = f"files/batch-{token_hex(8)}"
        shown = f"{batch.id.removeprefix('batches/')}.jsonl"
        served.state.batches.keep(
            JsonLinesFile(file_id, shown, "batch_output", data, batch.ended_ns)
        )
        batch.files["output"] = file_id
    return {"responsesFile": batch.files["output"]}


def _result(served: Served, line: ProviderBatchLine) -> Json:
    result: Json = {} if line.metadata is None else {"metadata": line.metadata}
    if line.answered is not None:
        return result | {"response": line.answered.body}
    assert line.refused is not None  # no other line of a completed batch is without an answer
    code = 3 if line.refused.status == 400 else 13  # INVALID_ARGUMENT, INTERNAL
    return result | {"error": {"code": code, "message": line.refused.message}}


def _time(at_ns: int) -> str:
    return datetime.fromtimestamp(at_ns / 1e9, UTC).isoformat().replace("+00:00", "Z")
