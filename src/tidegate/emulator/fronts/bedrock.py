"""Bedrock's API: Converse and InvokeModel of Claude's models, whole and as streams.

    https://docs.aws.amazon.com/bedrock/latest/APIReference/API_Operations_Amazon_Bedrock_Runtime.html

Answers are those of Anthropic's front, converted. Invariants: errors name an exception in a header,
and have only a message; a stream has AWS's framing; its usage is in the last message, or in the
last chunk beside the model's own usage; a model in a body of InvokeModel is refused.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import orjson
from aiohttp import web

from tidegate.emulator.content import ModelRequest
from tidegate.emulator.delivery import AnswerScript, ScriptStep, Served
from tidegate.emulator.dialect import (
    EmulatedApi,
    ErrorResponse,
    Fault,
    FaultName,
    Json,
    LimitRefusal,
    Refused,
)
from tidegate.emulator.fronts.anthropic import read_messages, script
from tidegate.emulator.rate_limits import refused_in_bedrock
from tidegate.emulator.settings import Behaviour
from tidegate.record import EVENT_STREAM, frame

_NAMES = {
    400: "ValidationException",
    403: "AccessDeniedException",
    404: "ResourceNotFoundException",
    408: "ModelTimeoutException",
    424: "ModelErrorException",
    429: "ThrottlingException",
    503: "ServiceUnavailableException",
}
_METRICS = "amazon-bedrock-invocationMetrics"
_FAMILIES = {"image": "image", "document": "application"}


def error(status: int, message: str) -> ErrorResponse:
    name = _NAMES.get(status, "InternalServerException")
    if "security token" in message:
        name = "UnrecognizedClientException"
    return ErrorResponse(status, {"message": message}, {"x-amzn-errortype": f"{name}:http://aws"})


def _refused(_: LimitRefusal, __: str) -> ErrorResponse:
    return error(429, "Too many requests, please wait before trying again.")


def _throttled(fault: Fault, _: str) -> ErrorResponse | None:
    match fault.fault:
        case FaultName.THROTTLED | FaultName.THROTTLED_BARE:
            return error(429, "Too many requests, please wait before trying again.")
        case FaultName.DAY_QUOTA:
            return error(429, "Too many tokens per day, please wait before trying again.")
        case FaultName.ERROR_LIST:
            return error(429, "Too many requests, please wait before trying again.").listed
    return None


BEDROCK = EmulatedApi(
    name="bedrock",
    error=error,
    refused=_refused,
    faults={
        FaultName.UNAVAILABLE: (503, "Bedrock is unable to process your request."),
        FaultName.INTERNAL: (500, "The system encountered an unexpected error."),
        FaultName.UNAUTHORIZED: (403, "The security token included in the request is invalid."),
        FaultName.FORBIDDEN: (
            403,
            "Authentication failed: Please make sure your API Key is valid.",
        ),
    },
    throttled=_throttled,
    refused_by_account=refused_in_bedrock,
    stream_type=EVENT_STREAM.decode(),
)


def wants(request: web.BaseRequest) -> bool:
    """Return whether a request is for this API."""
    return request.path.startswith("/model/")


async def route(served: Served) -> web.StreamResponse:
    request = served.request
    if not request.headers.get("Authorization", "").startswith(("Bearer ", "AWS4-HMAC-SHA256 ")):
        raise Refused(403, "Missing Authentication Token")
    model, _, do = request.path.removeprefix("/model/").rpartition("/")
    body = await served.json(_MALFORMED)
    if request.method != "POST" or not model or not isinstance(body, dict):
        raise served.not_found()
    streamed = do.endswith("-stream")
    match do:
        case "converse" | "converse-stream":
            body, form = _of_converse(body), _converse
        case "invoke" | "invoke-with-response-stream":
            _check_invoked(body)
            form = _invoked
        case "count-tokens":
            parsed = read_messages({**_of_converse(body, "input", "converse"), "model": model})
            return await served.other("count", model, lambda: {"inputTokens": parsed.input_tokens})
        case _:
            raise served.not_found()
    parsed = read_messages({**body, "model": model, "stream": streamed})
    scripted = partial(_script, form, served.cached(parsed), served.behaviour)
    return await served.generate(served.cached(parsed), scripted)


def _check_invoked(body: Json) -> None:
    if not body.pop("anthropic_version", None):
        raise Refused(400, "anthropic_version: Field required")
    for name in ("model", "stream"):
        if name in body:
            raise Refused(400, f"Malformed input request: extraneous key [{name}] is not permitted")


# -- Converse's body, converted to one of messages


_MALFORMED = "Malformed input request, please reformat your input and try again."


def _of_converse(body: Any, *within: str) -> Json:
    """Convert a body of Converse. Raises Refused for one that has another shape."""
    try:
        for name in within:
            body = body[name]
        return _as_messages(body)
    except (AttributeError, KeyError, TypeError, StopIteration) as misshapen:
        raise Refused(400, _MALFORMED) from misshapen


def _as_messages(body: Json) -> Json:
    settings, tools = body.get("inferenceConfig") or {}, body.get("toolConfig") or {}
    named = next(iter(tools.get("toolChoice") or {"auto": {}}))
    choice = {"type": named, **(tools.get("toolChoice") or {}).get(named, {})}
    return {
        "max_tokens": settings.get("maxTokens", 4_096),
        "system": [{"type": "text", "text": one.get("text", "")} for one in body.get("system", [])],
        "messages": [
            {**turn, "content": [_block(one) for one in turn.get("content", [])]}
            for turn in body.get("messages", [])
        ],
        "tools": [
            {"name": one["name"], "input_schema": one["inputSchema"]["json"]}
            for one in (tool.get("toolSpec") for tool in tools.get("tools", []))
            if one
        ],
        "tool_choice": choice,
    }


def _block(block: Json) -> Json:
    for kind, family in _FAMILIES.items():
        if kind in block:
            mime = f"{family}/{block[kind].get('format')}"
            data = block[kind]["source"].get("bytes")
            source = {"type": "base64", "media_type": mime, "data": data}
            return {"type": kind, "source": source}
    if used := block.get("toolUse"):
        return {"type": "tool_use", "id": used["toolUseId"], "name": used["name"], "input": {}}
    if result := block.get("toolResult"):
        content = [
            {"type": "text", "text": one.get("text") or orjson.dumps(one).decode()}
            for one in result.get("content", [])
        ]
        return {"type": "tool_result", "tool_use_id": result["toolUseId"], "content": content}
    return {"type": "text", "text": block.get("text", "")}


# -- answers: each event of Anthropic's, converted to messages of this API

Form = Callable[[Json, Json], bytes]  # an event, and the usage of the message


def _script(
    form: Form, parsed: ModelRequest, behaviour: Behaviour, fault: Fault | None
) -> AnswerScript:
    converted = script(parsed, behaviour, fault)
    used: Json = {}
    steps = [replace(one, data=_step(form, one, used, parsed.streamed)) for one in converted.steps]
    return AnswerScript(
        steps,
        lambda _, fault: _broken(fault, parsed.streamed),
        converted.thoughts_tokens,
        {"x-amzn-requestid": "emulated"} | ({} if parsed.streamed else _counts(form, used)),
    )


def _counts(form: Form, used: Json) -> dict[str, str]:
    if form is not _invoked:
        return {}
    return {
        "x-amzn-bedrock-input-token-count": str(used.get("input_tokens", 0)),
        "x-amzn-bedrock-output-token-count": str(used.get("output_tokens", 0)),
    }


def _step(form: Form, step: ScriptStep, used: Json, streamed: bool) -> bytes:
    if not step.data:
        return b""
    if not streamed:
        message = orjson.loads(step.data)
        used |= message["usage"]
        return orjson.dumps(_whole(message) if form is _converse else message)
    return b"".join(form(event, used) for event in _events(step.data))


def _events(data: bytes) -> Iterator[Json]:
    for line in data.split(b"\n"):
        if line.startswith(b"data: "):
            yield orjson.loads(line[6:])


def _message(kind: str, value: Any, sort: str = "event") -> bytes:
    named = {f":{sort}-type": kind, ":content-type": "application/json", ":message-type": sort}
    return frame(named, orjson.dumps(value))


def _invoked(event: Json, used: Json) -> bytes:
    used |= event.get("message", {}).get("usage") or event.get("usage") or {}
    if event["type"] == "message_stop":
        counts = {
            "inputTokenCount": used["input_tokens"],
            "outputTokenCount": used["output_tokens"],
        }
        event = {**event, _METRICS: {**counts, "invocationLatency": 9, "firstByteLatency": 5}}
    return _message("chunk", {"bytes": b64encode(orjson.dumps(event)).decode(), "p": "abcd"})


def _converse(event: Json, used: Json) -> bytes:
    used |= event.get("message", {}).get("usage") or event.get("usage") or {}
    index = {"contentBlockIndex": event.get("index", 0)}
    match event["type"]:
        case "message_start":
            return _message("messageStart", {"role": "assistant"})
        case "content_block_start" if event["content_block"]["type"] == "tool_use":
            block = event["content_block"]
            opened = {"toolUse": {"toolUseId": block["id"], "name": block["name"]}}
            return _message("contentBlockStart", {**index, "start": opened})
        case "content_block_delta":
            return _message("contentBlockDelta", {**index, "delta": _delta(event["delta"])})
        case "content_block_stop":
            return _message("contentBlockStop", index)
        case "message_delta":
            end = _message("messageStop", {"stopReason": event["delta"]["stop_reason"]})
            counts = {"usage": _usage(used), "metrics": {"latencyMs": 9}}
            return end + _message("metadata", counts)
    return b""


def _delta(delta: Json) -> Json:
    match delta["type"]:
        case "text_delta":
            return {"text": delta["text"]}
        case "input_json_delta":
            return {"toolUse": {"input": delta["partial_json"]}}
        case "thinking_delta":
            return {"reasoningContent": {"text": delta["thinking"]}}
    return {"reasoningContent": {"signature": delta.get("signature", "")}}


def _usage(used: Json) -> Json:
    read, written = used["cache_read_input_tokens"], used["cache_creation_input_tokens"]
    fresh, made = used["input_tokens"], used["output_tokens"]
    return {
        "inputTokens": fresh,
        "outputTokens": made,
        "totalTokens": fresh + read + written + made,
        "cacheReadInputTokens": read,
        "cacheWriteInputTokens": written,
    }


def _whole(message: Json) -> Json:
    content: list[Json] = []
    for one in message["content"]:
        match one["type"]:
            case "text":
                content.append({"text": one["text"]})
            case "tool_use":
                used = {"toolUseId": one["id"], "name": one["name"], "input": one["input"]}
                content.append({"toolUse": used})
            case "thinking":
                thinking = {"text": one["thinking"], "signature": one["signature"]}
                content.append({"reasoningContent": {"reasoningText": thinking}})
    return {
        "output": {"message": {"role": "assistant", "content": content}},
        "stopReason": message["stop_reason"],
        "usage": _usage(message["usage"]),
        "metrics": {"latencyMs": 9},
    }


def _broken(fault: Fault, streamed: bool) -> bytes:
    if fault.fault is FaultName.GARBAGE:
        return frame({":event-type": "chunk"}, b"{}")[:-1] + b"?" if streamed else b'{"output": {'
    if not streamed:
        return orjson.dumps(error(fault.code, "The model has failed.").body)
    name = _NAMES.get(fault.code, "InternalServerException")
    message = {"message": "Too many tokens, please wait before trying again."}
    return _message(name[:1].lower() + name[1:], message, "exception")
