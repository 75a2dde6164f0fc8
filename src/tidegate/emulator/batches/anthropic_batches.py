"""Anthropic's Message Batches API: /v1/messages/batches.

    https://platform.claude.com/docs/en/build-with-claude/batch-processing

Invariants: the parameters of a request are checked as it is worked off, only its id at the start;
results come when the batch has ended, and not in the order of the requests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import orjson
from aiohttp import web

from tidegate.emulator.batches.store import ENDED, LineWork, ProviderBatch, ProviderBatchLine
from tidegate.emulator.delivery import EMULATED, Served, json_response
from tidegate.emulator.dialect import Json, Refused

MOST_REQUESTS = 100_000
WINDOW_S = 24 * 3600.0
_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NOT_JSON = "The request body is not valid JSON: {}"

Work = Callable[[Any], LineWork]  # the parameters of a message; raises Refused


async def route(served: Served, steps: Sequence[str], work: Work) -> web.StreamResponse:
    """Serve what follows `messages/batches` in the path. Raises Refused."""
    request, label = served.request, f"{served.request.method} {served.request.path}"
    answer: Callable[[], Any]
    match request.method, steps:
        case "POST", []:
            answer = partial(_create, served, work)
        case "GET", []:
            answer = partial(_list, served)
        case "GET", [batch_id]:
            answer = partial(_show_one, served, batch_id)
        case "DELETE", [batch_id]:
            answer = partial(_delete, served, batch_id)
        case "POST", [batch_id, "cancel"]:
            answer = partial(_cancel, served, batch_id)
        case "GET", [batch_id, "results"]:
            answer = partial(_results, served, batch_id)
        case _:
            raise Refused(404, f"Not found: {request.method} {request.path}")
    return await served.other("batches", "", answer, label=label)


async def _create(served: Served, work: Work) -> web.Response:
    body = await served.json(_NOT_JSON)
    requests = body.get("requests") if isinstance(body, dict) else None
    if not isinstance(requests, list) or not requests:
        raise Refused(400, "requests: Field required")
    if len(requests) > MOST_REQUESTS:
        raise Refused(400, f"requests: List should have at most {MOST_REQUESTS} items")
    lines: dict[str, ProviderBatchLine] = {}
    for index, given in enumerate(requests):
        custom_id = given.get("custom_id") if isinstance(given, dict) else None
        if not isinstance(custom_id, str) or not _CUSTOM_ID.fullmatch(custom_id):
            raise Refused(
                400,
                f"requests.{index}.custom_id: String should match pattern "
                "'^[a-zA-Z0-9_-]{1,64}$'",
            )
        if custom_id in lines:
            raise Refused(400, f"requests.{index}.custom_id: must be unique: {custom_id}")
        lines[custom_id] = _line(custom_id, given.get("params"), work)
    pace, batches = served.behaviour.batches, served.state.batches
    queued = sum(len(batch.lines) for batch in batches.open("anthropic"))
    if pace.enqueued_requests is not None and queued + len(lines) > pace.enqueued_requests:
        raise Refused(
            429,
            "This request would exceed your organization's limit of "
            f"{pace.enqueued_requests} batch requests in the processing queue.",
        )
    batch = batches.create("msgbatch_", "anthropic", "", list(lines.values()), pace, WINDOW_S, {})
    batches.advance()
    return json_response(200, _show(served, batch))


def _line(custom_id: str, params: Any, work: Work) -> ProviderBatchLine:
    def parsed() -> LineWork:
        if isinstance(params, dict) and params.get("stream"):
            raise Refused(400, "stream: streaming is not supported in a batch")
        return work(params)

    return ProviderBatchLine.of(custom_id, parsed)


def _found(served: Served, batch_id: str) -> ProviderBatch:
    missing = f"Message Batch not found: {batch_id}"
    return served.state.batches.find(batch_id, "anthropic", missing)


def _show_one(served: Served, batch_id: str) -> Json:
    return _show(served, _found(served, batch_id))


def _show(served: Served, batch: ProviderBatch) -> Json:
    ended = batch.state in ENDED
    status = "ended" if ended else "canceling" if batch.cancel_ns else "in_progress"
    # The counts are those of a batch that has ended: until then all requests are processing.
    counts = {
        state: batch.count(state) if ended else 0
        for state in ("succeeded", "errored", "canceled", "expired")
    }
    counts["processing"] = 0 if ended else len(batch.lines)
    path = f"/v1/messages/batches/{batch.id}/results"
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": status,
        "request_counts": counts,
        "created_at": _time(batch.created_ns),
        "expires_at": _time(batch.expires_ns),
        "ended_at": _time(batch.ended_ns),
        "cancel_initiated_at": _time(batch.cancel_ns),
        "archived_at": None,
        "results_url": f"http://{served.request.host}{path}" if ended else None,
    }


def _time(at_ns: int) -> str | None:
    if not at_ns:
        return None
    return datetime.fromtimestamp(at_ns / 1e9, UTC).isoformat().replace("+00:00", "Z")


def _list(served: Served) -> Json:
    query = served.request.query
    limit, after, before = query.get("limit", "20"), query.get("after_id"), query.get("before_id")
    if not limit.isdecimal() or not 1 <= int(limit) <= 1000:
        raise Refused(400, "limit: Input should be from 1 to 1000")
    batches = served.state.batches.newest("anthropic")
    ids = [batch.id for batch in batches]
    if (named := after or before) and named not in ids:
        raise Refused(400, f"after_id or before_id: not found: {named}")
    if after:
        batches = batches[ids.index(after) + 1 :]
    elif before:
        batches = batches[: ids.index(before)][-int(limit) :]
    data = [_show(served, batch) for batch in batches[: int(limit)]]
    return {
        "data": data,
        "has_more": len(batches) > len(data),
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


def _cancel(served: Served, batch_id: str) -> Json:
    batch = _found(served, batch_id)
    if batch.state in ENDED:
        raise Refused(400, f"Message Batch {batch_id} has ended and can't be canceled")
    served.state.batches.cancel(batch)
    return _show(served, batch)


def _delete(served: Served, batch_id: str) -> Json:
    batch = _found(served, batch_id)
    if batch.state not in ENDED:
        raise Refused(400, f"Message Batch {batch_id} is still processing: cancel it first")
    served.state.batches.delete(batch)
    return {"id": batch_id, "type": "message_batch_deleted"}


async def _results(served: Served, batch_id: str) -> web.Response:
    batch = _found(served, batch_id)
    if batch.state not in ENDED:
        raise Refused(404, f"Message Batch {batch_id} has no results yet")
    lines = (_result(served, line) for line in reversed(batch.lines))
    data = b"".join(orjson.dumps(line) + b"\n" for line in lines)
    return web.Response(body=data, headers=EMULATED | {"Content-Type": "application/x-jsonl"})


def _result(served: Served, line: ProviderBatchLine) -> Json:
    result: Json = {"type": line.state}
    if line.answered is not None:
        message = line.answered.body
        usage = message["usage"] | {"service_tier": "batch"}
        result["message"] = message | {"usage": usage}
    elif line.state == "errored" and line.refused is not None:
        error = served.api.error(line.refused.status, line.refused.message)
        result["error"] = error.body
    return {"custom_id": line.custom_id, "result": result}
