"""Anthropic's API: messages and their batches, token counting, models and files.

    https://platform.claude.com/docs/en/build-with-claude/batch-processing

Invariants: errors have Anthropic's shape, an overload is a 529; the input usage is in the first
event of a stream, the output usage in the last but one; unknown fields and blocks are ignored; a
body that Anthropic refuses raises Refused with the field's name; an uploaded file can be named in
messages but not downloaded; the parameters of a request in a batch are checked when it is
processed, only its id at the start; results are available once the batch has ended, and not in the
order of requests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from secrets import token_hex
from typing import Any

import orjson
from aiohttp import web

from tidegate.emulator.batches import ENDED, LineWork, ProviderBatch, ProviderBatchLine
from tidegate.emulator.content import (
    SIGNATURE,
    THOUGHTS,
    Attached,
    CalledFunction,
    Choice,
    Composed,
    Conversation,
    ModelRequest,
    Moment,
    Speaker,
    Tool,
    base64_bytes,
    compose,
    new_response_id,
)
from tidegate.emulator.delivery import (
    EMULATED,
    AnswerScript,
    ScriptStep,
    Served,
    broken_object,
    json_response,
    line_work,
    moment_steps,
    named_event,
    stream_steps,
    whole_steps,
)
from tidegate.emulator.dialect import (
    EmulatedApi,
    ErrorResponse,
    Fault,
    FaultName,
    Json,
    LimitRefusal,
    Refused,
    listing,
    rfc3339,
    wait_s,
)
from tidegate.emulator.rate_limits import anthropic_page, check_admin_key, refused_in_anthropic
from tidegate.emulator.settings import Behaviour
from tidegate.emulator.state import EmulatorState

_TYPE_OF = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def error(status: int, message: str, headers: Mapping[str, str] | None = None) -> ErrorResponse:
    inner = {"type": _TYPE_OF.get(status, "api_error"), "message": message}
    body = {"type": "error", "error": inner, "request_id": f"req_{new_response_id()}"}
    return ErrorResponse(status, body, headers or {})


def throttled(measure: str, bound: int, retry_after_s: float, per: str = "minute") -> ErrorResponse:
    """Return a 429 with the time to retry. `measure` is `requests` or `input-tokens`."""
    message = (
        f"This request would exceed your organization's rate limit of {bound} "
        f"{measure.replace('-', ' ')} per {per}."
    )
    name = f"anthropic-ratelimit-{measure}"
    reset = datetime.now(UTC) + timedelta(seconds=retry_after_s)
    headers = {
        "retry-after": str(math.ceil(retry_after_s)),
        f"{name}-limit": str(bound),
        f"{name}-remaining": "0",
        f"{name}-reset": reset.isoformat(timespec="seconds").replace("+00:00", "Z"),
    }
    return error(429, message, headers)


def refused(refusal: LimitRefusal, model: str) -> ErrorResponse:
    """Return the 429 of a limit that the emulator enforces."""
    wait = wait_s(refusal)
    if refusal.rate is None or wait is None:
        message = (
            f"Number of concurrent connections to {model} has exceeded your rate limit. "
            "Please try again later or contact sales."
        )
        return error(429, message)
    measure = "input-tokens" if refusal.rate.measure == "input_tokens" else "requests"
    return throttled(measure, refusal.bound, wait, "day" if refusal.rate.per_day else "minute")


def _throttled_on_order(fault: Fault, model: str) -> ErrorResponse | None:
    minute = throttled("requests", 10, fault.retry_after_s)
    match fault.fault:
        case FaultName.THROTTLED:
            return minute
        case FaultName.THROTTLED_BARE:
            return error(429, f"Rate limit of {model} reached.")
        case FaultName.DAY_QUOTA:
            return throttled("requests", 250, fault.retry_after_s, "day")
        case FaultName.ERROR_LIST:
            return minute.listed
    return None


ANTHROPIC = EmulatedApi(
    name="anthropic",
    error=error,
    refused=refused,
    faults={
        FaultName.UNAVAILABLE: (529, "Overloaded"),
        FaultName.INTERNAL: (500, "Internal server error"),
        FaultName.UNAUTHORIZED: (401, "invalid x-api-key"),
        FaultName.FORBIDDEN: (403, "Your API key has no permission to use this resource."),
    },
    throttled=_throttled_on_order,
    refused_by_account=refused_in_anthropic,
)


LEAST_BUDGET = 1024
_SPEAKERS: dict[str, Speaker] = {"user": "user", "assistant": "assistant", "system": "system"}
_FILES = {"image": "image/*", "document": "application/pdf"}


_NOT_JSON = "The request body is not valid JSON."


def read_messages(body: Any, *, counting: bool = False) -> ModelRequest:
    """Parse a body of messages, or of messages/count_tokens. Raises Refused (400)."""
    if not isinstance(body, dict):
        raise Refused(400, _NOT_JSON)
    model, messages, most = body.get("model"), body.get("messages"), body.get("max_tokens")
    if not isinstance(model, str) or not model:
        raise Refused(400, "model: Field required")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages: Field required")
    if not counting and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise Refused(400, "max_tokens: Field required, an integer of at least 1")
    thinking = body.get("thinking")
    conversation = Conversation()
    for text, _ in _blocks(body.get("system"), "system"):
        conversation.add("system", text)
    for index, message in enumerate(messages):
        _add_message(conversation, message, f"messages.{index}")
    return conversation.request(
        model,
        schema=_schema(body),
        max_output_tokens=None if counting else most,
        thinks=_thinks(thinking, most),
        called=_calls(conversation, body),
        shows_thoughts=isinstance(thinking, dict) and thinking.get("display") != "omitted",
        streamed=body.get("stream") is True,
    )


def _thinks(thinking: Any, most: Any) -> bool:
    kind = thinking.get("type") if isinstance(thinking, dict) else "disabled"
    if kind == "enabled":
        budget = thinking.get("budget_tokens")
        if not isinstance(budget, int) or budget < LEAST_BUDGET:
            raise Refused(
                400,
                "thinking.enabled.budget_tokens: Input should be greater than or equal to "
                f"{LEAST_BUDGET}",
            )
        if isinstance(most, int) and budget >= most:
            raise Refused(400, "`max_tokens` must be greater than `thinking.budget_tokens`.")
    elif kind not in ("disabled", "adaptive"):
        raise Refused(400, "thinking.type: Input should be 'enabled', 'disabled' or 'adaptive'")
    return kind != "disabled"


def _add_message(conversation: Conversation, message: Any, place: str) -> None:
    role = message.get("role") if isinstance(message, dict) else None
    speaker = _SPEAKERS.get(str(role))
    if speaker is None:
        raise Refused(400, f"{place}.role: Input should be 'user', 'assistant' or 'system'")
    content = message.get("content")
    results = isinstance(content, list) and any(
        isinstance(block, dict) and block.get("type") == "tool_result" for block in content
    )
    conversation.add("tool" if results else speaker, None)
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") == "tool_use":
            conversation.called.append(str(block.get("name")))
    for text, file in _blocks(content, f"{place}.content"):
        conversation.add("tool" if results else speaker, text, file)


def _blocks(content: Any, place: str) -> Iterator[tuple[str | None, Attached | None]]:
    if content is None:
        return
    if isinstance(content, str):
        yield content, None
        return
    if not isinstance(content, list):
        raise Refused(400, f"{place}: Input should be a valid string or list")
    for index, block in enumerate(content):
        if not isinstance(block, dict):
            raise Refused(400, f"{place}.{index}: Input should be an object")
        yield from _read_block(block, f"{place}.{index}")


def _read_block(block: Json, place: str) -> Iterator[tuple[str | None, Attached | None]]:
    kind = block.get("type")
    if not isinstance(kind, str):
        raise Refused(400, f"{place}.type: Input should be a valid string")
    if kind == "text":
        if not isinstance(block.get("text"), str):
            raise Refused(400, f"{place}.text: Input should be a valid string")
        yield block["text"], None
    elif kind in _FILES:
        yield _file(block.get("source"), _FILES[kind], f"{place}.source")
    elif kind == "tool_result":
        yield from _blocks(block.get("content"), f"{place}.content")


def _file(source: Any, default: str, place: str) -> tuple[str | None, Attached | None]:
    source = source if isinstance(source, dict) else {}
    match source.get("type"):
        case "base64":
            size = base64_bytes(source.get("data"))
            if size is None:
                raise Refused(400, f"{place}.base64.data: Invalid base64 data")
            return None, Attached(str(source.get("media_type") or default), size)
        case "text":
            return str(source.get("data") or ""), None
        case "url" | "file":
            uri = str(source.get("url") or source.get("file_id") or "")
            return None, Attached(default, None, uri)
    raise Refused(400, f"{place}.type: Input should be 'base64', 'url', 'file' or 'text'")


def _schema(body: Json) -> Json | None:
    config = body.get("output_config")
    form = config.get("format") if isinstance(config, dict) else body.get("output_format")
    schema = form.get("schema") if isinstance(form, dict) else None
    return schema if isinstance(schema, dict) else None


def _calls(conversation: Conversation, body: Json) -> Sequence[Tool]:
    given = body.get("tools") or []
    if not isinstance(given, list):
        raise Refused(400, "tools: Input should be a valid list")
    tools = [
        Tool(item["name"], item["input_schema"])
        for item in given
        if isinstance(item, dict)
        and isinstance(item.get("name"), str)
        and isinstance(item.get("input_schema"), dict)
    ]
    chosen = body.get("tool_choice")
    chosen = chosen if isinstance(chosen, dict) else {}
    choice: Choice | Tool = "auto"
    if chosen.get("type") in ("none", "any"):
        choice = "none" if chosen["type"] == "none" else "required"
    elif chosen.get("type") == "tool":
        named = [tool for tool in tools if tool.name == chosen.get("name")]
        if not named:
            raise Refused(400, f"Tool '{chosen.get('name')}' not found in provided tools")
        choice = named[0]
    return conversation.calls(
        tools, choice, several=chosen.get("disable_parallel_tool_use") is not True
    )


_GARBAGE = b'{"type": "content_block_delta", "del'
_STOP_REASON = {
    "stop": "end_turn",
    "length": "max_tokens",
    "calls": "tool_use",
    "blocked": "refusal",
    "unknown": "something_new",
}


def script(parsed: ModelRequest, behaviour: Behaviour, fault: Fault | None) -> AnswerScript:
    message = _Message(parsed, compose(parsed, behaviour, fault))
    return AnswerScript(
        message.stream() if parsed.streamed else message.whole(),
        lambda _, fault: _broken(fault, parsed.streamed),
        message.composed.thoughts_tokens,
        {"request-id": f"req_{message.id}"},
    )


def _broken(fault: Fault, streamed: bool) -> bytes:
    data = broken_object(ANTHROPIC, _GARBAGE, fault)
    if not streamed:
        return data
    name = b"content_block_delta" if fault.fault is FaultName.GARBAGE else b"error"
    return b"event: %s\ndata: %s\n\n" % (name, data)


class _Message:
    """An answer in the form of this API."""

    def __init__(self, parsed: ModelRequest, composed: Composed) -> None:
        self.id = f"msg_{new_response_id()}"
        self._parsed = parsed
        self.composed = composed

    def whole(self) -> list[ScriptStep]:
        composed = self.composed
        content = [
            _block(call, (composed.whole_text or "") if call is None else call.arguments)
            for call in composed.blocks
        ]
        if composed.thoughts_tokens:
            thinking = {"type": "thinking", "thinking": self._thoughts, "signature": SIGNATURE}
            content.insert(0, thinking)
        body = self._body(content, self._stop_reason, self._ended())
        return whole_steps(composed, body, composed.output_tokens)

    def stream(self) -> list[ScriptStep]:
        total = self.composed.output_tokens
        begun = self._body([], None, self._counts(min(1, total)))
        start = {"type": "message_start", "message": begun}
        delta = {"stop_reason": self._stop_reason, "stop_sequence": None}
        end = {"type": "message_delta", "delta": delta, "usage": self._ended()}
        thoughts = self.composed.thoughts_tokens
        first = 1 if thoughts else 0
        pieces = [ScriptStep(self._thinking(), thoughts)] * first
        pieces += moment_steps(self.composed, lambda one: _piece(one, one.block + first))
        return stream_steps(
            named_event(start) + named_event({"type": "ping"}),
            pieces,
            named_event(end) + named_event({"type": "message_stop"}),
            total,
        )

    @property
    def _thoughts(self) -> str:
        """Return as many words as there are billed thoughts, if thoughts are to be shown."""
        words = THOUGHTS.split()[: self.composed.thoughts_tokens]
        return " ".join(words) if self._parsed.shows_thoughts else ""

    def _thinking(self) -> bytes:
        """Return the block of thoughts as events: the text, then its signature, then the end."""
        block = {"type": "thinking", "thinking": "", "signature": ""}
        deltas: list[Json] = [{"type": "signature_delta", "signature": SIGNATURE}]
        if self._thoughts:
            deltas.insert(0, {"type": "thinking_delta", "thinking": self._thoughts})
        events = [{"type": "content_block_start", "index": 0, "content_block": block}]
        events += [{"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas]
        return b"".join(map(named_event, [*events, {"type": "content_block_stop", "index": 0}]))

    @property
    def _stop_reason(self) -> str:
        return _STOP_REASON.get(self.composed.finish, "end_turn")

    def _body(self, content: list[Json], stop_reason: str | None, counts: Json) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._parsed.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": {
                **counts,
                "cache_creation": {
                    "ephemeral_5m_input_tokens": self._parsed.cache_write_tokens,
                    "ephemeral_1h_input_tokens": 0,
                },
                "service_tier": "standard",
            },
        }

    def _ended(self) -> Json:
        thoughts = {"thinking_tokens": self.composed.thoughts_tokens}
        return self._counts(self.composed.output_tokens) | {"output_tokens_details": thoughts}

    def _counts(self, output_tokens: int) -> Json:
        """Return the usage that a stream reports at its beginning, and again at its end."""
        return {
            "input_tokens": self._parsed.uncached_tokens,
            "cache_creation_input_tokens": self._parsed.cache_write_tokens,
            "cache_read_input_tokens": self._parsed.cached_tokens,
            "output_tokens": output_tokens,
        }


def _block(call: CalledFunction | None, text: str) -> Json:
    """Return a block of content. An input that a bound has cut is not JSON, and is left empty."""
    if call is None:
        return {"type": "text", "text": text}
    try:
        given = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        given = {}
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": given}


def _piece(moment: Moment, index: int) -> bytes:
    events = b""
    if moment.opens:
        block = _block(moment.call, "")
        opened = {"type": "content_block_start", "index": index, "content_block": block}
        events = named_event(opened)
    delta = (
        {"type": "text_delta", "text": moment.text}
        if moment.call is None
        else {"type": "input_json_delta", "partial_json": moment.text}
    )
    events += named_event({"type": "content_block_delta", "index": index, "delta": delta})
    if moment.closes:
        events += named_event({"type": "content_block_stop", "index": index})
    return events


MODELS = ("claude-haiku-5-5", "claude-opus-5-5", "claude-sonnet-5-5")
_PREFIXES = ("/anthropic/v1/", "/v1/")  # the first is Bedrock's


def wants(request: web.BaseRequest) -> bool:
    """Return whether a request is for this API.

    `/v1/models` is a path of all three: this API's requests have a version in a header.
    """
    if not request.path.startswith(_PREFIXES):
        return False
    name = _name(request)
    return (
        name.partition("/")[0] in ("messages", "organizations")
        or "anthropic-version" in request.headers
    )


async def route(served: Served) -> web.StreamResponse:
    request, behaviour = served.request, served.behaviour
    _check_headers(request)
    match request.method, _name(request).split("/"):
        case "POST", ["messages"]:
            parsed = served.cached(read_messages(await served.json(_NOT_JSON)))
            for file in parsed.attached:
                if file.uri is not None and file.uri.startswith("file_"):
                    _find_file(served.state, file.uri)
            _check_model(behaviour, parsed.model)
            return await served.generate(parsed, partial(script, parsed, served.behaviour))
        case "POST", ["messages", "count_tokens"]:
            parsed = read_messages(await served.json(_NOT_JSON), counting=True)
            _check_model(behaviour, parsed.model)
            counted = {"input_tokens": parsed.input_tokens}
            return await served.other("count", parsed.model, lambda: counted)
        case _, ["files", *steps]:
            return await _files(served, steps)
        case _, ["messages", "batches", *steps]:
            return await _batches(served, steps, partial(_line_work, behaviour))
        case "GET", ["organizations", "rate_limits"]:
            check_admin_key(_key(request))
            return served.rate_limits(partial(anthropic_page, known=MODELS, query=request.query))
        case "GET", ["organizations", "workspaces", workspace, "rate_limits"]:
            check_admin_key(_key(request))
            page = partial(anthropic_page, known=MODELS, query=request.query, workspace=workspace)
            return served.rate_limits(page)
        case "GET", ["models"]:
            return await served.other("models", "", _list_models)
        case "GET", ["models", model]:
            return await served.other("models", model, lambda: _model(served.behaviour, model))
    raise served.not_found()


def _line_work(behaviour: Behaviour, params: Any) -> LineWork:
    """Return the work of a batch's line. Raises Refused."""
    parsed = read_messages(params)
    _check_model(behaviour, parsed.model)
    return line_work(parsed, partial(script, parsed, behaviour))


def _name(request: web.BaseRequest) -> str:
    return request.path.removeprefix("/anthropic").removeprefix("/v1/").rstrip("/")


def _key(request: web.BaseRequest) -> str:
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    return request.headers.get("x-api-key") or (bearer if scheme.lower() == "bearer" else "")


_BETA = re.compile(r"[a-z0-9-]+-\d{4}-?\d{2}-?\d{2}")  # the name of a feature, and its date


def _check_headers(request: web.BaseRequest) -> None:
    key = _key(request)
    if not key:
        raise Refused(401, "x-api-key header is required")
    if key == "invalid-key":
        raise Refused(401, "invalid x-api-key")
    if "anthropic-version" not in request.headers:
        raise Refused(400, "anthropic-version: header is required")
    betas = ascii(",".join(request.headers.getall("anthropic-beta", ())))[1:-1]
    for beta in filter(None, (one.strip() for one in betas.split(","))):
        if not _BETA.fullmatch(beta):
            raise Refused(
                400,
                f"Unexpected value(s) `{beta}` for the `anthropic-beta` header. Please consult our "
                "documentation at docs.anthropic.com or try again without the header.",
            )


def _check_model(behaviour: Behaviour, model: str) -> None:
    if behaviour.strict_models and model not in MODELS:
        raise Refused(404, f"model: {model}")


def _model(behaviour: Behaviour, model: str) -> Json:
    _check_model(behaviour, model)
    return _describe(model)


def _describe(model: str) -> Json:
    return {
        "type": "model",
        "id": model,
        "display_name": f"{model} (emulated)",
        "created_at": "2025-01-01T00:00:00Z",
        "lifecycle": "active",
    }


def _list_models() -> Json:
    data = [_describe(name) for name in MODELS]
    return {"data": data, "has_more": False, "first_id": MODELS[0], "last_id": MODELS[-1]}


_STORED = "anthropic_files"
_MOST_LISTED = 1_000


async def _files(served: Served, steps: Sequence[str]) -> web.StreamResponse:
    """Serve what follows `files` in the path. Raises Refused."""
    answer: Any
    match served.request.method, steps:
        case "POST", []:
            answer = partial(_upload_file, served)
        case "GET", []:
            answer = partial(_list_files, served)
        case "GET", [file_id]:
            answer = partial(_find_file, served.state, file_id)
        case "GET", [file_id, "content"]:
            answer = partial(_content_of, served, file_id)
        case "DELETE", [file_id]:
            answer = partial(_delete_file, served, file_id)
        case _:
            raise served.not_found()
    return await served.other("files", "", answer)


def _find_file(state: EmulatorState, file_id: str) -> Json:
    """Return a file by its id. Raises Refused (404)."""
    found = state.stored[_STORED].get(file_id)
    if found is None:
        raise Refused(404, f"File not found: {file_id}")
    return found


async def _upload_file(served: Served) -> web.Response:
    form = await served.form()
    file = form.get("file")
    if not isinstance(file, web.FileField):
        raise Refused(400, "file: Field required")
    file_id = f"file_01{token_hex(11)}"
    made = {
        "type": "file",
        "id": file_id,
        "size_bytes": len(file.file.read()),
        "created_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "Z",
        "filename": file.filename,
        "mime_type": file.content_type,
        "downloadable": False,
    }
    served.state.stored[_STORED][file_id] = made
    return json_response(200, made)


def _list_files(served: Served) -> Json:
    query, files = served.request.query, list(served.state.stored[_STORED].values())[::-1]
    limit = query.get("limit", "20")
    if not limit.isdecimal() or not 1 <= int(limit) <= _MOST_LISTED:
        raise Refused(400, f"limit: Input should be from 1 to {_MOST_LISTED}")
    after = query.get("after_id") or query.get("page", "").removeprefix("page_")
    ids = [one["id"] for one in files]
    if after:
        _find_file(served.state, after)
        files = files[ids.index(after) + 1 :]
    page = listing(files, int(limit))
    return page | {"next_page": f"page_{page['last_id']}" if page["has_more"] else None}


def _content_of(served: Served, file_id: str) -> Json:
    _find_file(served.state, file_id)
    raise Refused(400, f"File '{file_id}' is not downloadable")


def _delete_file(served: Served, file_id: str) -> Json:
    del served.state.stored[_STORED][_find_file(served.state, file_id)["id"]]
    return {"id": file_id, "type": "file_deleted"}


MOST_REQUESTS = 100_000
WINDOW_S = 24 * 3600.0
_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NOT_JSON = "The request body is not valid JSON: {}"

LineParser = Callable[[Any], LineWork]  # the parameters of a message; raises Refused


async def _batches(served: Served, steps: Sequence[str], work: LineParser) -> web.StreamResponse:
    """Serve what follows `messages/batches` in the path. Raises Refused."""
    answer: Callable[[], Any]
    match served.request.method, steps:
        case "POST", []:
            answer = partial(_create_batch, served, work)
        case "GET", []:
            answer = partial(_list_batches, served)
        case "GET", [batch_id]:
            answer = partial(_retrieve_batch, served, batch_id)
        case "DELETE", [batch_id]:
            answer = partial(_delete_batch, served, batch_id)
        case "POST", [batch_id, "cancel"]:
            answer = partial(_cancel_batch, served, batch_id)
        case "GET", [batch_id, "results"]:
            answer = partial(_results, served, batch_id)
        case _:
            raise served.not_found()
    return await served.other("batches", "", answer, label=served.called)


async def _create_batch(served: Served, work: LineParser) -> web.Response:
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
        lines[custom_id] = _line_of(custom_id, given.get("params"), work)
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
    return json_response(200, _show_batch(served, batch))


def _line_of(custom_id: str, params: Any, work: LineParser) -> ProviderBatchLine:
    def read_line() -> LineWork:
        if isinstance(params, dict) and params.get("stream"):
            raise Refused(400, "stream: streaming is not supported in a batch")
        return work(params)

    return ProviderBatchLine.of(custom_id, read_line)


def _found_batch(served: Served, batch_id: str) -> ProviderBatch:
    missing = f"Message Batch not found: {batch_id}"
    return served.state.batches.find(batch_id, "anthropic", missing)


def _retrieve_batch(served: Served, batch_id: str) -> Json:
    return _show_batch(served, _found_batch(served, batch_id))


def _show_batch(served: Served, batch: ProviderBatch) -> Json:
    ended = batch.state in ENDED
    status = "ended" if ended else "canceling" if batch.cancel_ns else "in_progress"
    # The counts of an ended batch: until then all requests are processing.
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
        "created_at": rfc3339(batch.created_ns),
        "expires_at": rfc3339(batch.expires_ns),
        "ended_at": rfc3339(batch.ended_ns) if batch.ended_ns else None,
        "cancel_initiated_at": rfc3339(batch.cancel_ns) if batch.cancel_ns else None,
        "archived_at": None,
        "results_url": f"http://{served.request.host}{path}" if ended else None,
    }


def _list_batches(served: Served) -> Json:
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
    return listing([_show_batch(served, batch) for batch in batches], int(limit))


def _cancel_batch(served: Served, batch_id: str) -> Json:
    batch = _found_batch(served, batch_id)
    if batch.state in ENDED:
        raise Refused(400, f"Message Batch {batch_id} has ended and can't be canceled")
    served.state.batches.cancel(batch)
    return _show_batch(served, batch)


def _delete_batch(served: Served, batch_id: str) -> Json:
    batch = _found_batch(served, batch_id)
    if batch.state not in ENDED:
        raise Refused(400, f"Message Batch {batch_id} is still processing: cancel it first")
    served.state.batches.delete(batch)
    return {"id": batch_id, "type": "message_batch_deleted"}


async def _results(served: Served, batch_id: str) -> web.Response:
    batch = _found_batch(served, batch_id)
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
