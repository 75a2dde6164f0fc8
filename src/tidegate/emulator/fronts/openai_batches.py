"""OpenAI's files and batch API: /v1/files, /v1/uploads and /v1/batches.

    https://platform.openai.com/docs/api-reference/batch

Invariants: an invalid file fails its batch in validation, an invalid body only its own line; lines
of results are not in the order of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from secrets import token_hex
from typing import Any

import orjson
from aiohttp import web

from tidegate.emulator.batches import (
    ENDED,
    JsonLinesFile,
    LineWork,
    ProviderBatch,
    ProviderBatchLine,
)
from tidegate.emulator.delivery import EMULATED, Served, json_response
from tidegate.emulator.dialect import Json, Refused, listing

MOST_LINES = 50_000
MOST_BYTES = 200 * 1024 * 1024
WINDOW_S = 24 * 3600.0
_S = 1_000_000_000
_NOT_JSON = "We could not parse the JSON body of your request."
_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
_PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
_EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}
_CANCELLED = {
    "code": "batch_cancelled",
    "message": "This request was not executed because the batch was cancelled.",
}

Work = Callable[[str, Json], LineWork]  # an endpoint and a body; raises Refused


async def route(served: Served, name: str, work: Work) -> web.StreamResponse:
    """Serve `files...` or `batches...`; `work` parses the request of a line. Raises Refused."""
    request = served.request
    answer: Callable[[], Any]
    match request.method, name.split("/"):
        case "POST", ["files"]:
            answer = partial(_upload, served)
        case "GET", ["files"]:
            answer = partial(_list_files, served)
        case "GET", ["files", file_id]:
            answer = partial(_show_file, served, file_id)
        case "GET", ["files", file_id, "content"]:
            answer = partial(_content, served, file_id)
        case "DELETE", ["files", file_id]:
            answer = partial(_delete_file, served, file_id)
        case "POST", ["uploads", *steps]:
            answer = partial(_upload_in_parts, served, steps)
        case "POST", ["batches"]:
            answer = partial(_create, served, work)
        case "GET", ["batches"]:
            answer = partial(_list, served)
        case "GET", ["batches", batch_id]:
            answer = partial(_show_one, served, batch_id)
        case "POST", ["batches", batch_id, "cancel"]:
            answer = partial(_cancel, served, batch_id)
        case _:
            raise Refused(404, f"Invalid URL ({request.method} {request.path})")
    return await served.other("batches", "", answer, label=served.called)


async def _upload(served: Served) -> web.Response:
    form = await served.form()
    purpose, file = form.get("purpose"), form.get("file")
    if purpose not in _PURPOSES:
        raise Refused(400, f"Invalid 'purpose': {str(purpose)[:40]}.", param="purpose")
    if not isinstance(file, web.FileField):
        raise Refused(400, "Missing required parameter: 'file'.", param="file")
    data = file.file.read()
    if len(data) > MOST_BYTES:
        raise Refused(400, "The file is larger than 200 MB.", param="file")
    batches = served.state.batches
    after_s = form.get("expires_after[seconds]")
    uploaded = JsonLinesFile(
        f"file-{token_hex(12)}",
        file.filename,
        str(purpose),
        data,
        batches.now_ns(),
        int(after_s) if isinstance(after_s, str) and after_s.isdigit() else None,
    )
    batches.keep(uploaded)
    return json_response(200, _file(uploaded))


async def _upload_in_parts(served: Served, steps: Sequence[str]) -> web.Response:
    uploads = served.state.stored["uploads"]
    if not steps:
        body = await _object(served)
        upload_id = f"upload_{token_hex(12)}"
        begun = {"id": upload_id, "object": "upload", "status": "pending", "expires_at": 2**31}
        named = {name: body.get(name) for name in ("bytes", "filename", "purpose")}
        uploads[upload_id] = begun | named | {"created_at": 0, "file": None}
        served.state.stored["parts"][upload_id] = {}
        return json_response(200, uploads[upload_id])
    if steps[0] not in uploads:
        raise Refused(404, f"No such Upload object: {steps[0]}", param="upload_id")
    upload, parts = uploads[steps[0]], served.state.stored["parts"][steps[0]]
    match steps[1:]:
        case ["parts"]:
            data = (await served.form()).get("data")
            if not isinstance(data, web.FileField):
                raise Refused(400, "Missing required parameter: 'data'.", param="data")
            part_id = f"part_{token_hex(8)}"
            parts[part_id] = data.file.read()
            part = {"id": part_id, "object": "upload.part", "created_at": 0}
            return json_response(200, part | {"upload_id": steps[0]})
        case ["complete"]:
            ids = (await _object(served)).get("part_ids")
            if not isinstance(ids, list) or not all(str(one) in parts for one in ids):
                raise Refused(400, "Invalid 'part_ids'.", param="part_ids", code="invalid_value")
            whole = b"".join(parts[one] for one in ids)
            made = JsonLinesFile(
                f"file-{token_hex(11)}",
                upload["filename"],
                upload["purpose"],
                whole,
                served.state.batches.now_ns(),
            )
            served.state.batches.keep(made)
            upload |= {"status": "completed", "file": _file(made)}
        case ["cancel"]:
            upload["status"] = "cancelled"
    return json_response(200, upload)


async def _object(served: Served) -> Json:
    """Return the body, which must be an object. Raises Refused (400)."""
    body = await served.json(_NOT_JSON)
    if not isinstance(body, dict):
        raise Refused(400, "The body of your request is not an object.")
    return body


def _file(file: JsonLinesFile) -> Json:
    return {
        "id": file.id,
        "object": "file",
        "bytes": len(file.data),
        "created_at": file.created_ns // _S,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "expires_at": _expires_at(file),
        "status_details": None,
    }


def _expires_at(file: JsonLinesFile) -> int | None:
    after_s = file.expires_after_s
    return None if after_s is None else file.created_ns // _S + after_s


def _found_file(served: Served, file_id: str) -> JsonLinesFile:
    file = served.state.batches.file(file_id)
    if file is None:
        raise Refused(404, f"No such File object: {file_id}", param="id")
    return file


def _show_file(served: Served, file_id: str) -> Json:
    return _file(_found_file(served, file_id))


async def _content(served: Served, file_id: str) -> web.Response:
    headers = EMULATED | {"Content-Type": "application/octet-stream"}
    return web.Response(body=_found_file(served, file_id).data, headers=headers)


def _delete_file(served: Served, file_id: str) -> Json:
    served.state.batches.forget_file(_found_file(served, file_id).id)
    return {"id": file_id, "object": "file", "deleted": True}


def _list_files(served: Served) -> Json:
    purpose = served.request.query.get("purpose")
    files = [file for file in served.state.batches.files() if purpose in (None, file.purpose)]
    return _page(served, [_file(file) for file in files], most=10_000)


def _page(served: Served, items: Sequence[Json], *, most: int) -> Json:
    """Return at most `limit` items after the one named by `after`."""
    query = served.request.query
    limit, after = query.get("limit", str(min(20, most))), query.get("after")
    if not limit.isdecimal() or not 1 <= int(limit) <= most:
        raise Refused(400, f"Invalid 'limit': expected 1 to {most}.", param="limit")
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise Refused(404, f"No such object: {after}", param="after")
    later = items[ids.index(after) + 1 :] if after is not None else items
    return {"object": "list", **listing(later, int(limit))}


async def _create(served: Served, work: Work) -> web.Response:
    body = await served.json(_NOT_JSON)
    if not isinstance(body, dict):
        raise Refused(400, _NOT_JSON)
    endpoint, file_id = body.get("endpoint"), body.get("input_file_id")
    if not isinstance(file_id, str):
        raise Refused(400, "Missing required parameter: 'input_file_id'.", param="input_file_id")
    if endpoint not in _ENDPOINTS:
        supported = ", ".join(f"'{name}'" for name in _ENDPOINTS)
        message = f"Invalid value: '{endpoint}'. Supported values are: {supported}."
        raise Refused(400, message, param="endpoint")
    if body.get("completion_window") != "24h":
        message = "Invalid value: 'completion_window'. Supported values are: '24h'."
        raise Refused(400, message, param="completion_window")
    metadata = _metadata(body.get("metadata"))
    file = _found_file(served, file_id)
    lines: list[ProviderBatchLine] = []
    errors = list(_read(file.data, str(endpoint), work, lines))
    models = {line.work.model for line in lines if line.work is not None}
    model = min(models, default="")
    if len(models) > 1 and not errors:
        errors = [_problem("mismatched_model", "All requests must be for the same model.")]
    errors = errors or _over(served, model, lines)
    facts = {"endpoint": endpoint, "input_file_id": file_id, "metadata": metadata}
    batch = served.state.batches.create(
        "batch_", "openai", model, lines, served.behaviour.batches, WINDOW_S, facts, errors
    )
    served.state.batches.advance()
    return json_response(200, _show(served, batch))


def _metadata(given: Any) -> Mapping[str, str] | None:
    """Return metadata of up to 16 pairs of texts, of at most 64 and 512 characters."""
    if given is None:
        return None
    if isinstance(given, dict) and len(given) <= 16:
        texts = {name: value for name, value in given.items() if isinstance(value, str)}
        sound = all(len(name) <= 64 and len(value) <= 512 for name, value in texts.items())
        if sound and len(texts) == len(given):
            return texts
    message = "Invalid 'metadata': expected up to 16 pairs of texts of 64 and 512 characters."
    raise Refused(400, message, param="metadata")


def _problem(code: str, message: str, line: int | None = None, param: str | None = None) -> Json:
    return {"code": code, "message": message, "line": line, "param": param}


def _read(data: bytes, endpoint: str, work: Work, lines: list[ProviderBatchLine]) -> Iterator[Json]:
    """Parse the lines of a file into `lines`; yield the errors that make the file invalid."""
    texts = [text for text in data.splitlines() if text.strip()]
    if not texts:
        yield _problem("empty_file", "The input file is empty.")
    if len(texts) > MOST_LINES:
        yield _problem("too_many_tasks", f"A batch has at most {MOST_LINES} requests.")
        return
    seen: set[str] = set()
    for number, text in enumerate(texts, 1):
        try:
            given = orjson.loads(text)
        except orjson.JSONDecodeError:
            given = None
        if not isinstance(given, dict):
            yield _problem("invalid_json_line", "This line is not parseable as valid JSON.", number)
            continue
        custom_id, body = given.get("custom_id"), given.get("body")
        if not isinstance(custom_id, str) or not isinstance(body, dict):
            name = "body" if isinstance(custom_id, str) else "custom_id"
            message = f"Missing required parameter: '{name}'."
            yield _problem("missing_required_parameter", message, number, name)
            continue
        if custom_id in seen:
            message = f"The custom_id '{custom_id}' is not unique in this file."
            yield _problem("duplicate_custom_id", message, number, "custom_id")
        if given.get("method") != "POST" or given.get("url") != endpoint:
            message = f"The url and method of each request must be POST {endpoint}."
            yield _problem("invalid_url", message, number, "url")
        seen.add(custom_id)
        parsed = partial(work, endpoint, body | {"stream": False})
        lines.append(ProviderBatchLine.of(custom_id, parsed))


def _over(served: Served, model: str, lines: Sequence[ProviderBatchLine]) -> list[Json]:
    """Return the error of a batch that does not fit into its model's queue."""
    bound = served.behaviour.batches.enqueued_tokens
    if bound is None:
        return []
    others = served.state.batches.open("openai")
    queued = sum(batch.enqueued_tokens(model) for batch in others)
    if queued + sum(line.input_tokens for line in lines) <= bound:
        return []
    message = (
        f"Enqueued token limit reached for {model} in organization org-emulated. Limit: {bound:,} "
        "enqueued tokens. Please try again once some in_progress batches have been completed."
    )
    return [_problem("token_limit_exceeded", message)]


def _found(served: Served, batch_id: str) -> ProviderBatch:
    missing = f"No batch found with id '{batch_id}'."
    return served.state.batches.find(batch_id, "openai", missing)


def _show_one(served: Served, batch_id: str) -> Json:
    return _show(served, _found(served, batch_id))


def _list(served: Served) -> Json:
    batches = served.state.batches.newest("openai")
    return _page(served, [_show(served, batch) for batch in batches], most=100)


def _cancel(served: Served, batch_id: str) -> Json:
    batch = _found(served, batch_id)
    if batch.state in ENDED:
        raise Refused(409, f"Cannot cancel a batch with status '{batch.state}'.")
    served.state.batches.cancel(batch)
    return _show(served, batch)


def _show(served: Served, batch: ProviderBatch) -> Json:
    _write_results(served, batch)
    total = 0 if batch.state in ("validating", "failed") else len(batch.lines)
    done = [line for line in batch.lines if line.state == "succeeded"]
    failed = batch.count("errored", "expired", "canceled")
    errors = {"object": "list", "data": list(batch.errors)} if batch.state == "failed" else None
    return {
        "id": batch.id,
        "object": "batch",
        "model": batch.model,
        "completion_window": "24h",
        "status": batch.state,
        "errors": errors,
        "output_file_id": batch.files.get("output"),
        "error_file_id": batch.files.get("error"),
        "request_counts": {"total": total, "completed": len(done), "failed": failed},
        "usage": _usage(done),
        **batch.facts,
        **_times(batch),
    }


def _usage(done: Sequence[ProviderBatchLine]) -> Json:
    read = sum(line.input_tokens for line in done)
    written = sum(line.answered.output_tokens for line in done if line.answered)
    thoughts = sum(line.answered.thoughts_tokens for line in done if line.answered)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": thoughts},
        "total_tokens": read + written,
    }


def _times(batch: ProviderBatch) -> Json:
    worked = batch.state not in ("validating", "failed")
    all_done = batch.done == len(batch.lines) and batch.state in ("finalizing", "completed")
    ended = {f"{state}_at": batch.ended_ns if batch.state == state else 0 for state in ENDED}
    times = {
        "created_at": batch.created_ns,
        "expires_at": batch.expires_ns,
        "in_progress_at": batch.validated_ns if worked else 0,
        "finalizing_at": batch.processed_ns if all_done else 0,
        "cancelling_at": batch.cancel_ns,
        **ended,
    }
    return {name: at_ns // _S if at_ns else None for name, at_ns in times.items()}


def _write_results(served: Served, batch: ProviderBatch) -> None:
    """Store the results of an ended batch, once: answers and errors in separate files.

    Without lines there is no file.
    """
    if batch.state not in ENDED or batch.files or batch.state == "failed":
        return
    for use, states in (("output", ("succeeded",)), ("error", ("errored", "expired", "canceled"))):
        chosen = [line for line in reversed(batch.lines) if line.state in states]
        if not chosen:
            continue
        data = b"".join(orjson.dumps(_result(served, line)) + b"\n" for line in chosen)
        name = f"{batch.id}_{use}.jsonl"
        file = JsonLinesFile(f"file-{token_hex(12)}", name, "batch_output", data, batch.ended_ns)
        served.state.batches.keep(file)
        batch.files[use] = file.id


def _result(served: Served, line: ProviderBatchLine) -> Json:
    response: Json | None = None
    problem: Json | None = None
    if line.answered is not None:
        response = {"status_code": 200, "body": line.answered.body}
    elif line.state == "errored" and line.refused is not None:
        refused = line.refused
        error = served.api.error(refused.status, refused.message, **refused.facts)
        response = {"status_code": error.status, "body": error.body}
    else:
        problem = _EXPIRED if line.state == "expired" else _CANCELLED
    if response is not None:
        response["request_id"] = token_hex(16)
    return {
        "id": f"batch_req_{token_hex(12)}",
        "custom_id": line.custom_id,
        "response": response,
        "error": problem,
    }
