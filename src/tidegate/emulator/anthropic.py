"""Anthropic's API: messages, token counting, models.

Invariants: errors have Anthropic's shape, an overload is a 529; the input usage is in the first
event of a stream, the output usage in the last but one; unknown fields and blocks are ignored; a
body that Anthropic refuses is an AnthropicError that names the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import orjson
from aiohttp import web

from tidegate.emulator import content as answers
from tidegate.emulator import conversation
from tidegate.emulator.content import SIGNATURE, Asked, Attached, Choice, Tool, new_response_id
from tidegate.emulator.conversation import (
    Called,
    Composed,
    Heard,
    Moment,
    Speaker,
    compose,
    named_event,
    stream_steps,
    whole_steps,
)
from tidegate.emulator.delivery import Script, Step, broken_object, deliver, deliver_other, ready
from tidegate.emulator.dialect import Dialect, Failure, Json, Refused, wait_s
from tidegate.emulator.limits import Fault, FaultName, Refusal
from tidegate.emulator.settings import Behaviour
from tidegate.emulator.state import State

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


def body(status: int, message: str) -> Json:
    inner = {"type": _TYPE_OF.get(status, "api_error"), "message": message}
    return {"type": "error", "error": inner, "request_id": f"req_{new_response_id()}"}


class AnthropicError(Refused):
    """A request that Anthropic would refuse."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(Failure(status, body(status, message)))


def throttled(measure: str, bound: int, retry_after_s: float, per: str = "minute") -> Failure:
    """429 that says when to come back. `measure` is `requests` or `input-tokens`."""
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
    return Failure(429, body(429, message), headers)


def refused(refusal: Refusal, model: str) -> Failure:
    """The 429 of a limit that the emulator really enforces."""
    wait = wait_s(refusal)
    if refusal.rate is None or wait is None:
        message = (
            f"Number of concurrent connections to {model} has exceeded your rate limit. "
            "Please try again later or contact sales."
        )
        return Failure(429, body(429, message))
    measure = "input-tokens" if refusal.rate.measure == "input_tokens" else "requests"
    return throttled(measure, refusal.bound, wait, "day" if refusal.rate.per_day else "minute")


def _throttled_on_order(fault: Fault, model: str) -> Failure | None:
    minute = throttled("requests", 10, fault.retry_after_s)
    match fault.fault:
        case FaultName.THROTTLED:
            return minute
        case FaultName.THROTTLED_BARE:
            return Failure(429, body(429, f"Rate limit of {model} reached."))
        case FaultName.DAY_QUOTA:
            return throttled("requests", 250, fault.retry_after_s, "day")
        case FaultName.ERROR_LIST:
            return Failure(429, [minute.body] if isinstance(minute.body, dict) else minute.body)
    return None


ANTHROPIC = Dialect(
    name="anthropic",
    error=lambda status, message: Failure(status, body(status, message)),
    refused=refused,
    plain={
        FaultName.UNAVAILABLE: (529, "Overloaded"),
        FaultName.INTERNAL: (500, "Internal server error"),
        FaultName.UNAUTHORIZED: (401, "invalid x-api-key"),
        FaultName.FORBIDDEN: (403, "Your API key has no permission to use this resource."),
    },
    throttled=_throttled_on_order,
    inside=body,
)


LEAST_BUDGET = 1024
_SPEAKERS: dict[str, Speaker] = {"user": "user", "assistant": "assistant", "system": "system"}
_FILES = {"image": "image/*", "document": "application/pdf"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """`asked` as in Gemini's dialect, and how the answer is to come."""

    asked: Asked
    streamed: bool


def read_messages(body: Any, *, counting: bool = False) -> Wanted:
    """Parse a body of messages, or of messages/count_tokens. Raises AnthropicError (400)."""
    if not isinstance(body, dict):
        raise AnthropicError(400, "The request body is not valid JSON.")
    model, messages, most = body.get("model"), body.get("messages"), body.get("max_tokens")
    if not isinstance(model, str) or not model:
        raise AnthropicError(400, "model: Field required")
    if not isinstance(messages, list) or not messages:
        raise AnthropicError(400, "messages: Field required")
    if not counting and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise AnthropicError(400, "max_tokens: Field required, an integer of at least 1")
    heard = Heard()
    for text, _ in _blocks(body.get("system"), "system"):
        heard.hear("system", text)
    for index, message in enumerate(messages):
        _hear(heard, message, f"messages.{index}")
    asked = heard.asked(
        model,
        schema=_schema(body),
        max_output_tokens=None if counting else most,
        thinks=_thinks(body.get("thinking"), most),
        called=_calls(heard, body),
    )
    return Wanted(replace(asked, shows_thoughts=_shows(body)), body.get("stream") is True)


def _thinks(thinking: Any, most: Any) -> bool:
    kind = thinking.get("type") if isinstance(thinking, dict) else "disabled"
    if kind == "enabled":
        budget = thinking.get("budget_tokens")
        if not isinstance(budget, int) or budget < LEAST_BUDGET:
            raise AnthropicError(
                400,
                "thinking.enabled.budget_tokens: Input should be greater than or equal to "
                f"{LEAST_BUDGET}",
            )
        if isinstance(most, int) and budget >= most:
            raise AnthropicError(400, "`max_tokens` must be greater than `thinking.budget_tokens`.")
    elif kind not in ("disabled", "adaptive"):
        raise AnthropicError(
            400, "thinking.type: Input should be 'enabled', 'disabled' or 'adaptive'"
        )
    return kind != "disabled"


def _shows(body: Json) -> bool:
    thinking = body.get("thinking")
    return isinstance(thinking, dict) and thinking.get("display") != "omitted"


def _hear(heard: Heard, message: Any, place: str) -> None:
    role = message.get("role") if isinstance(message, dict) else None
    speaker = _SPEAKERS.get(str(role))
    if speaker is None:
        raise AnthropicError(400, f"{place}.role: Input should be 'user', 'assistant' or 'system'")
    content = message.get("content")
    results = isinstance(content, list) and any(
        isinstance(block, dict) and block.get("type") == "tool_result" for block in content
    )
    heard.hear("tool" if results else speaker, None)
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") == "tool_use":
            heard.turn.called.append(str(block.get("name")))
    for text, file in _blocks(content, f"{place}.content"):
        heard.hear("tool" if results else speaker, text, file)


def _blocks(content: Any, place: str) -> Iterator[tuple[str | None, Attached | None]]:
    if content is None:
        return
    if isinstance(content, str):
        yield content, None
        return
    if not isinstance(content, list):
        raise AnthropicError(400, f"{place}: Input should be a valid string or list")
    for index, block in enumerate(content):
        if not isinstance(block, dict):
            raise AnthropicError(400, f"{place}.{index}: Input should be an object")
        yield from _read_block(block, f"{place}.{index}")


def _read_block(block: Json, place: str) -> Iterator[tuple[str | None, Attached | None]]:
    kind = block.get("type")
    if kind == "text":
        if not isinstance(block.get("text"), str):
            raise AnthropicError(400, f"{place}.text: Input should be a valid string")
        yield block["text"], None
    elif kind in _FILES:
        yield _file(block.get("source"), _FILES[kind], f"{place}.source")
    elif kind == "tool_result":
        yield from _blocks(block.get("content"), f"{place}.content")


def _file(source: Any, default: str, place: str) -> tuple[str | None, Attached | None]:
    source = source if isinstance(source, dict) else {}
    match source.get("type"):
        case "base64":
            data = source.get("data")
            if not isinstance(data, str) or len(data.rstrip("=")) % 4 == 1:
                raise AnthropicError(400, f"{place}.base64.data: Invalid base64 data")
            size = len(data.rstrip("=")) * 3 // 4
            return None, Attached(str(source.get("media_type") or default), size)
        case "text":
            return str(source.get("data") or ""), None
        case "url" | "file":
            uri = str(source.get("url") or source.get("file_id") or "")
            return None, Attached(default, None, uri)
    raise AnthropicError(400, f"{place}.type: Input should be 'base64', 'url', 'file' or 'text'")


def _schema(body: Json) -> Json | None:
    config = body.get("output_config")
    wanted = config.get("format") if isinstance(config, dict) else body.get("output_format")
    schema = wanted.get("schema") if isinstance(wanted, dict) else None
    return schema if isinstance(schema, dict) else None


def _calls(heard: Heard, body: Json) -> Sequence[Tool]:
    given = body.get("tools") or []
    if not isinstance(given, list):
        raise AnthropicError(400, "tools: Input should be a valid list")
    tools = [
        Tool(item["name"], item["input_schema"])
        for item in given
        if isinstance(item, dict)
        and isinstance(item.get("name"), str)
        and isinstance(item.get("input_schema"), dict)
    ]
    wanted = body.get("tool_choice")
    wanted = wanted if isinstance(wanted, dict) else {}
    choice: Choice | Tool = "auto"
    if wanted.get("type") in ("none", "any"):
        choice = "none" if wanted["type"] == "none" else "required"
    elif wanted.get("type") == "tool":
        named = [tool for tool in tools if tool.name == wanted.get("name")]
        if not named:
            raise AnthropicError(400, f"Tool '{wanted.get('name')}' not found in provided tools")
        choice = named[0]
    return heard.calls(tools, choice, several=wanted.get("disable_parallel_tool_use") is not True)


_GARBAGE = b'{"type": "content_block_delta", "del'
_STOP_REASON = {
    "stop": "end_turn",
    "length": "max_tokens",
    "calls": "tool_use",
    "blocked": "refusal",
    "unknown": "something_new",
}


def script(wanted: Wanted, behaviour: Behaviour, fault: Fault | None) -> Script:
    message = _Message(wanted, compose(wanted.asked, behaviour, fault))
    return conversation.script(
        wanted.asked,
        message.composed,
        message.stream() if wanted.streamed else message.whole(),
        streamed=wanted.streamed,
        broken=lambda _, fault: _broken(fault, wanted.streamed),
        headers={"request-id": f"req_{message.id}"},
    )


def _broken(fault: Fault, streamed: bool) -> bytes:
    data = broken_object(ANTHROPIC, _GARBAGE, fault)
    if not streamed:
        return data
    name = b"content_block_delta" if fault.fault is FaultName.GARBAGE else b"error"
    return b"event: %s\ndata: %s\n\n" % (name, data)


class _Message:
    """One answer in the shapes of this API."""

    def __init__(self, wanted: Wanted, composed: Composed) -> None:
        self.id = f"msg_{answers.new_response_id()}"
        self.wanted = wanted
        self.composed = composed

    def whole(self) -> list[Step]:
        composed = self.composed
        content = [_block(call, call.arguments) for call in composed.calls]
        if composed.text:
            content.insert(0, _block(None, composed.said or ""))
        if composed.thoughts_tokens:
            thinking = {"type": "thinking", "thinking": self._thoughts, "signature": SIGNATURE}
            content.insert(0, thinking)
        body = self._body(content, self._stop_reason, composed.output_tokens)
        return whole_steps(composed, body, composed.output_tokens)

    def stream(self) -> list[Step]:
        total = self.composed.output_tokens
        start = {"type": "message_start", "message": self._body([], None, min(1, total))}
        delta = {"stop_reason": self._stop_reason, "stop_sequence": None}
        usage = {"input_tokens": self.wanted.asked.input_tokens, "output_tokens": total}
        end = {"type": "message_delta", "delta": delta, "usage": usage}
        thoughts = self.composed.thoughts_tokens
        first = 1 if thoughts else 0
        pieces = [Step(self._thinking(), thoughts)] * first
        pieces += [
            Step(_piece(moment, moment.block + first), moment.output_tokens)
            for moment in self.composed.moments()
        ]
        return stream_steps(
            named_event(start) + named_event({"type": "ping"}),
            pieces or [Step(b"", total)],
            named_event(end) + named_event({"type": "message_stop"}),
        )

    @property
    def _thoughts(self) -> str:
        """As many words as are charged for, where they are to be shown."""
        words = answers.THOUGHTS.split()[: self.composed.thoughts_tokens]
        return " ".join(words) if self.wanted.asked.shows_thoughts else ""

    def _thinking(self) -> bytes:
        """The block of thoughts as events: the text, then its signature, then the end."""
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

    def _body(self, content: list[Json], stop_reason: str | None, output_tokens: int) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.wanted.asked.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": {
                "input_tokens": self.wanted.asked.input_tokens,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": output_tokens,
                "service_tier": "standard",
            },
        }


def _block(call: Called | None, said: str) -> Json:
    """A block of content; an input that a bound has cut off is no JSON, and left empty."""
    if call is None:
        return {"type": "text", "text": said}
    try:
        given = orjson.loads(said or "{}")
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
_PREFIX = "/v1/"


class AnthropicFront:
    """What comes for Anthropic's API."""

    dialect = ANTHROPIC

    def __init__(self, state: State) -> None:
        self.state = state

    def wants(self, request: web.BaseRequest) -> bool:
        """`/v1/models` is a path of all three: here it comes with a version in a header."""
        if not request.path.startswith(_PREFIX):
            return False
        name = request.path.removeprefix(_PREFIX)
        return name.partition("/")[0] == "messages" or "anthropic-version" in request.headers

    async def route(self, request: web.BaseRequest) -> web.StreamResponse:
        self._check_headers(request)
        match request.method, request.path.removeprefix(_PREFIX).rstrip("/").split("/"):
            case "POST", ["messages"]:
                wanted = read_messages(await _json(request))
                self._check_model(wanted.asked.model)
                scripted = partial(script, wanted, self.state.behaviour)
                method = "stream" if wanted.streamed else "generate"
                return await deliver(self.state, request, ANTHROPIC, wanted.asked, method, scripted)
            case "POST", ["messages", "count_tokens"]:
                asked = read_messages(await _json(request), counting=True).asked
                self._check_model(asked.model)
                counted = ready(lambda: {"input_tokens": asked.input_tokens})
                return await deliver_other(
                    self.state, request, ANTHROPIC, "count", asked.model, counted
                )
            case "GET", ["models"]:
                return await deliver_other(
                    self.state, request, ANTHROPIC, "models", "", ready(_list_models)
                )
            case "GET", ["models", model]:
                return await deliver_other(
                    self.state,
                    request,
                    ANTHROPIC,
                    "models",
                    model,
                    ready(lambda: self._model(model)),
                )
        raise AnthropicError(404, f"Not found: {request.method} {request.path}")

    @staticmethod
    def _check_headers(request: web.BaseRequest) -> None:
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        key = request.headers.get("x-api-key") or (bearer if scheme.lower() == "bearer" else "")
        if not key:
            raise AnthropicError(401, "x-api-key header is required")
        if key == "invalid-key":
            raise AnthropicError(401, "invalid x-api-key")
        if "anthropic-version" not in request.headers:
            raise AnthropicError(400, "anthropic-version: header is required")

    def _check_model(self, model: str) -> None:
        if self.state.behaviour.strict_models and model not in MODELS:
            raise AnthropicError(404, f"model: {model}")

    def _model(self, model: str) -> Json:
        self._check_model(model)
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


async def _json(request: web.BaseRequest) -> Any:
    try:
        return orjson.loads(await request.read())
    except orjson.JSONDecodeError:
        raise AnthropicError(400, "The request body is not valid JSON.") from None


__all__ = ["AnthropicFront"]
