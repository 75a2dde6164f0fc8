"""OpenAI's API: chat completions, responses, completions, embeddings, images, models.

Invariants: errors have OpenAI's shape, except `error_list`, which is the list that Gemini's
compatible endpoint sends; at that endpoint the thoughts of a Gemini model are part of the total
usage only; a stream reports usage only if requested; unknown fields are ignored; a body that OpenAI
refuses raises Refused with the field's name; the size of a file is that of its bytes.
"""

from __future__ import annotations

import math
import re
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from struct import pack
from typing import Any
from urllib.parse import unquote

import orjson
from aiohttp import web

from tidegate.emulator.account import AccountRefusal, AccountSpec
from tidegate.emulator.batches import LineAnswer, LineWork
from tidegate.emulator.content import (
    Attached,
    Choice,
    Composed,
    Conversation,
    ModelRequest,
    Moment,
    Speaker,
    Tool,
    base64_bytes,
    compose,
    embedding,
    gemini_thinks,
    new_response_id,
)
from tidegate.emulator.delivery import (
    AnswerScript,
    ScriptStep,
    Served,
    broken_object,
    data_event,
    line_work,
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
    wait_s,
)
from tidegate.emulator.fronts import openai_batches, openai_media, openai_stored
from tidegate.emulator.fronts.gemini import GEMINI
from tidegate.emulator.fronts.openai_stored import GARBAGE, response_script
from tidegate.emulator.rate_limits import check_admin_key, duration, openai_page, refused_in_openai
from tidegate.emulator.settings import Behaviour

_TYPE_OF = {429: "requests", 500: "server_error", 503: "server_error", 529: "server_error"}
_CODE_OF = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
_WRONG_KEY = (
    "Incorrect API key provided: inva***-key. You can find your API key at "
    "https://platform.openai.com/account/api-keys."
)
_NO_QUOTA = (
    "You exceeded your current quota, please check your plan and billing details. For more "
    "information on this error, read the docs: "
    "https://platform.openai.com/docs/guides/error-codes/api-errors."
)


def error(
    status: int,
    message: str,
    headers: Mapping[str, str] | None = None,
    *,
    param: str | None = None,
    code: str | None = None,
    kind: str | None = None,
) -> ErrorResponse:
    inner = {
        "message": message,
        "type": kind or _TYPE_OF.get(status, "invalid_request_error"),
        "param": param,
        "code": code or _CODE_OF.get(status),
    }
    return ErrorResponse(status, {"error": inner}, headers or {})


def invalid(param: str, message: str, code: str = "invalid_value") -> Refused:
    """Return the 400 for a wrong field."""
    return Refused(400, message, param=param, code=code)


def missing(param: str, place: str | None = None) -> Refused:
    """Return the 400 for a missing field, at `place`."""
    message = f"Missing required parameter: '{place or param}'."
    return invalid(param, message, "missing_required_parameter")


def throttled(model: str, measure: str, bound: int, retry_after_s: float) -> ErrorResponse:
    """Return a 429 with the time to retry. `measure` is `requests` or `tokens`."""
    name = "tokens per min (TPM)" if measure == "tokens" else "requests per min (RPM)"
    wait = duration(round(retry_after_s * 1e9))
    message = (
        f"Rate limit reached for {model} in organization org-emulated on {name}: Limit {bound}, "
        f"Used {bound}, Requested 1. "
        f"Please try again in {wait}. "
        "Visit https://platform.openai.com/account/rate-limits to learn more."
    )
    headers = {
        "retry-after": str(math.ceil(retry_after_s)),
        "retry-after-ms": str(math.ceil(retry_after_s * 1000)),
        f"x-ratelimit-limit-{measure}": str(bound),
        f"x-ratelimit-remaining-{measure}": "0",
        f"x-ratelimit-reset-{measure}": wait,
    }
    return error(429, message, headers, kind=measure)


def no_quota() -> ErrorResponse:
    kind = "insufficient_quota"
    return error(429, _NO_QUOTA, kind=kind, code=kind)


def refused(refusal: LimitRefusal, model: str) -> ErrorResponse:
    """Return the 429 of a limit that the emulator enforces."""
    wait = wait_s(refusal)
    if refusal.rate is None or wait is None:
        message = f"Too many concurrent requests for {model}: limit {refusal.bound}."
        return error(429, message)
    if refusal.rate.per_day:
        return no_quota()
    measure = "tokens" if refusal.rate.measure == "input_tokens" else "requests"
    return throttled(model, measure, refusal.bound, wait)


def _throttled_on_order(fault: Fault, model: str) -> ErrorResponse | None:
    match fault.fault:
        case FaultName.THROTTLED:
            return throttled(model, "requests", 10, fault.retry_after_s)
        case FaultName.THROTTLED_BARE:
            return error(429, "Rate limit reached.")
        case FaultName.DAY_QUOTA:
            return no_quota()
        case FaultName.ERROR_LIST:
            return GEMINI.throttled(fault, model)
    return None


def _refused_by_account(spec: AccountSpec, refusal: AccountRefusal, model: str) -> ErrorResponse:
    """Return the 429 of an account. Gemini's compatible endpoint sends Gemini's error in a list."""
    if spec.provider != "gemini":
        return refused_in_openai(spec, refusal, model)
    error = GEMINI.refused_by_account(spec, refusal, model)
    return error.listed


OPENAI = EmulatedApi(
    name="openai",
    error=error,
    refused=refused,
    faults={
        FaultName.UNAVAILABLE: (
            503,
            "The engine is currently overloaded, please try again later.",
        ),
        FaultName.INTERNAL: (
            500,
            "The server had an error while processing your request. Sorry about that!",
        ),
        FaultName.UNAUTHORIZED: (401, _WRONG_KEY),
        FaultName.FORBIDDEN: (403, "Your key has no access to this resource."),
    },
    throttled=_throttled_on_order,
    refused_by_account=_refused_by_account,
    no_capacity=error(
        429, "Resource Unavailable", kind="invalid_request_error", code="resource_unavailable"
    ),
)


_TEXT = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_ANYTHING = "application/octet-stream"


def read_content(content: Any, param: str) -> Iterator[tuple[str | None, Attached | None]]:
    """Yield each part of a message's content as a text or a file. Raises Refused (400)."""
    if content is None:
        return
    if isinstance(content, str):
        yield content, None
        return
    if not isinstance(content, list):
        raise invalid(param, f"Invalid type for '{param}': expected a string or a list.")
    for index, part in enumerate(content):
        place = f"{param}[{index}]"
        if not isinstance(part, dict):
            raise invalid(place, f"Invalid type for '{place}': expected an object.", "invalid_type")
        yield _read_part(part, place)


def _read_part(part: Json, place: str) -> tuple[str | None, Attached | None]:
    kind = part.get("type")
    if isinstance(kind, str) and kind in _TEXT:
        text = part.get(_TEXT[kind])
        if not isinstance(text, str):
            raise invalid(f"{place}.text", f"Invalid type for '{place}.text': expected a string.")
        return text, None
    match kind:
        case "image_url" | "input_image":
            return None, _picture(part, place)
        case "input_audio":
            sound = part.get("input_audio")
            if not isinstance(sound, dict):
                raise invalid(place, f"Missing required parameter: '{place}.input_audio'.")
            size = _size(sound.get("data"), f"{place}.input_audio.data")
            return None, Attached(f"audio/{sound.get('format') or 'wav'}", size)
        case "file" | "input_file":
            file = part.get("file") if kind == "file" else part
            if not isinstance(file, dict):
                raise invalid(place, f"Missing required parameter: '{place}.file'.")
            return None, _file(file, place)
    raise invalid(f"{place}.type", f"Invalid value: '{kind}'. It is none of the supported types.")


def _picture(part: Json, place: str) -> Attached:
    url = part.get("image_url")
    if isinstance(url, dict):
        url = url.get("url")
    if isinstance(url, str) and url:
        return _at(url, f"{place}.image_url", "image/*")
    if isinstance(part.get("file_id"), str):
        return Attached("image/*", None, part["file_id"])
    raise invalid(f"{place}.image_url", f"Missing required parameter: '{place}.image_url'.")


def _file(file: Json, place: str) -> Attached:
    data = file.get("file_data")
    if isinstance(data, str):
        if data.startswith("data:"):
            return _at(data, f"{place}.file_data", _ANYTHING)
        return Attached(_ANYTHING, _size(data, f"{place}.file_data"))
    for name in ("file_url", "file_id"):
        if isinstance(file.get(name), str):
            return Attached(_ANYTHING, None, file[name])
    raise invalid(f"{place}.file_data", f"Missing required parameter: '{place}.file_data'.")


def _at(url: str, place: str, mime_type: str) -> Attached:
    """Return the file of a URL: a `data:` URL contains it, any other only names it."""
    if not url.startswith("data:"):
        if not url.startswith(("http://", "https://")):
            raise invalid(place, f"Invalid '{place}'. Expected a valid URL.")
        return Attached(mime_type, None, url)
    head, comma, data = url[5:].partition(",")
    if not comma:
        raise invalid(place, f"Invalid '{place}'. Expected a base64-encoded data URL.")
    declared = head.partition(";")[0] or mime_type
    if head.endswith(";base64"):
        return Attached(declared, _size(data, place))
    return Attached(declared, len(unquote(data).encode("utf-8", "replace")))


def _size(data: Any, place: str) -> int:
    size = base64_bytes(data)
    if size is None:
        raise invalid(place, f"Invalid '{place}'. Expected base64-encoded data.")
    return size


_NOT_JSON = "We could not parse the JSON body of your request."
DEFAULT_MOST_TOKENS = 16
MOST_CHOICES = 128
_THINKS = re.compile(r"^(models/)?(o\d|gpt-5)")
_GEMINI = re.compile(r"(models/)?gemini")
_NO_THOUGHTS = (None, "none", "minimal")
_SPEAKERS: dict[str, Speaker] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def read_model(body: Any, usual: str | None = None) -> str:
    """Return the model that a body names, by default `usual`. Raises Refused (400)."""
    if not isinstance(body, dict):
        raise Refused(400, _NOT_JSON)
    model = body.get("model", usual)
    if not isinstance(model, str) or not model:
        raise invalid("model", "You must provide a model parameter.", "missing_required_parameter")
    return model


def read_chat(body: Json, model: str) -> ModelRequest:
    """Parse a body of chat/completions. Raises Refused (400)."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise missing("messages")
    conversation = Conversation()
    for index, message in enumerate(messages):
        _add_message(conversation, message, f"messages[{index}]")
    choices = whole(body, "n") or 1
    if choices > MOST_CHOICES:
        raise invalid("n", f"Invalid 'n': integer above maximum value: {MOST_CHOICES}.")
    return conversation.request(
        model,
        schema=_schema_of(conversation, body.get("response_format"), "response_format"),
        max_output_tokens=whole(body, "max_completion_tokens") or whole(body, "max_tokens"),
        thinks=_thinks(model, body.get("reasoning_effort")),
        called=_calls(conversation, body),
        choices=choices,
        **_streaming(body),
    )


def read_responses(body: Json, model: str) -> ModelRequest:
    """Parse a body of responses. Raises Refused (400)."""
    conversation = Conversation()
    conversation.add("system", str(body.get("instructions") or ""))
    given = body.get("input")
    if isinstance(given, str):
        conversation.add("user", given)
    elif isinstance(given, list) and given:
        for index, item in enumerate(given):
            _add_item(conversation, item, f"input[{index}]")
    else:
        raise missing("input")
    text, reasoning = body.get("text"), body.get("reasoning")
    form = text.get("format") if isinstance(text, dict) else None
    return conversation.request(
        model,
        schema=_schema_of(conversation, form, "text.format"),
        max_output_tokens=whole(body, "max_output_tokens"),
        thinks=_thinks(model, reasoning.get("effort") if isinstance(reasoning, dict) else None),
        called=_calls(conversation, body),
        streamed=flag(body, "stream"),
    )


def read_completions(body: Json, model: str) -> ModelRequest:
    """Parse a body of completions. Raises Refused (400)."""
    prompts = _prompts(body.get("prompt"))
    conversation = Conversation()
    for prompt in prompts:
        conversation.add("user", prompt)
    choices = (whole(body, "n") or 1) * len(prompts)
    if choices > MOST_CHOICES:
        raise invalid("n", f"Invalid 'n': more than {MOST_CHOICES} choices in all.")
    return conversation.request(
        model,
        schema=None,
        max_output_tokens=whole(body, "max_tokens") or DEFAULT_MOST_TOKENS,
        choices=choices,
        **_streaming(body),
    )


def _prompts(given: Any) -> list[str]:
    """Return the prompts of a field, given as texts or as lists of token numbers."""
    one = isinstance(given, str) or (isinstance(given, list) and given[:1] and _is_number(given[0]))
    prompts = [given] if one else given
    if not isinstance(prompts, list) or not prompts:
        raise missing("prompt")
    if not all(isinstance(prompt, str | list) for prompt in prompts):
        raise invalid("prompt", "Invalid type for 'prompt': expected texts or lists of numbers.")
    return [prompt if isinstance(prompt, str) else " ".join(map(str, prompt)) for prompt in prompts]


def _streaming(body: Json) -> Json:
    options = body.get("stream_options")
    with_usage = isinstance(options, dict) and options.get("include_usage") is True
    return {"streamed": flag(body, "stream"), "with_usage": with_usage}


def _add_message(conversation: Conversation, message: Any, place: str) -> None:
    if not isinstance(message, dict):
        raise invalid(place, f"Invalid type for '{place}': expected an object.", "invalid_type")
    speaker = _SPEAKERS.get(str(message.get("role")))
    if speaker is None:
        allowed = ", ".join(f"'{name}'" for name in _SPEAKERS)
        raise invalid(
            f"{place}.role",
            f"Invalid value: '{message.get('role')}'. Supported values are: {allowed}.",
        )
    conversation.add(speaker, None)
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            conversation.called.append(str(function.get("name")))
    for text, file in read_content(message.get("content"), f"{place}.content"):
        conversation.add(speaker, text, file)


def _add_item(conversation: Conversation, item: Any, place: str) -> None:
    if isinstance(item, dict) and item.get("type") == "function_call_output":
        conversation.add("tool", None)
        for text, file in read_content(item.get("output"), f"{place}.output"):
            conversation.add("tool", text, file)
    elif isinstance(item, dict) and item.get("type") == "function_call":
        conversation.called.append(str(item.get("name")))
    elif not isinstance(item, dict) or item.get("type", "message") == "message":
        _add_message(conversation, item, place)


def _schema_of(conversation: Conversation, form: Any, param: str) -> Json | None:
    """Return the schema of a `response_format`, or of a `text.format`, which has fewer levels."""
    if not isinstance(form, dict):
        return None
    match form.get("type"):
        case "json_object":
            return conversation.json_schema()
        case "json_schema":
            inner = form.get("json_schema", form)
            schema = inner.get("schema") if isinstance(inner, dict) else None
            if not isinstance(schema, dict):
                raise missing(param, f"{param}.schema")
            return schema
    return None


def _calls(conversation: Conversation, body: Json) -> Sequence[Tool]:
    given = body.get("tools") or []
    if not isinstance(given, list):
        raise invalid("tools", "Invalid type for 'tools': expected a list.", "invalid_type")
    tools = []
    for index, item in enumerate(given):
        if not isinstance(item, dict) or item.get("type") != "function":
            continue
        function = item.get("function", item)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise missing(f"tools[{index}].function.name")
        schema = function.get("parameters")
        tools.append(Tool(function["name"], schema if isinstance(schema, dict) else {}))
    several = body.get("parallel_tool_calls") is not False
    return conversation.calls(tools, _choice(body.get("tool_choice"), tools), several=several)


def _choice(choice: Any, tools: list[Tool]) -> Choice | Tool:
    if choice in ("none", "required"):
        return "none" if choice == "none" else "required"
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, dict) else None
        for tool in tools:
            if tool.name == name:
                return tool
        raise invalid("tool_choice", f"Tool choice '{name}' not found in 'tools' parameter.")
    return "auto"


def _thinks(model: str, effort: Any) -> bool:
    return effort not in _NO_THOUGHTS or (effort is None and bool(_THINKS.match(model)))


def flag(body: Json, name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise invalid(name, f"Invalid type for '{name}': expected a boolean.", "invalid_type")
    return bool(value)


def whole(body: Json, name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise invalid(name, f"Invalid '{name}': expected an integer of at least 1.")
    return value


_CHAT_GARBAGE = b'{"id": "chatcmpl-emulated", "choices": [{"delta": {"con'
_COMPLETIONS_GARBAGE = b'{"id": "cmpl-emulated", "choices": [{"te'
_FINISH = {
    "stop": "stop",
    "length": "length",
    "calls": "tool_calls",
    "blocked": "content_filter",
    "unknown": "something_new",
}


def choices_script(
    parsed: ModelRequest, behaviour: Behaviour, fault: Fault | None, *, chat: bool
) -> AnswerScript:
    """Return the answer of chat/completions, or of completions."""
    answer = _Choices(parsed, compose(parsed, behaviour, fault), chat=chat)
    garbage = _CHAT_GARBAGE if chat else _COMPLETIONS_GARBAGE

    def broken(_: int, fault: Fault) -> bytes:
        data = broken_object(OPENAI, garbage, fault)
        return data_event(data) if parsed.streamed else data

    return AnswerScript(
        answer.stream() if parsed.streamed else answer.whole(),
        broken,
        answer.composed.thoughts_tokens,
        {"x-request-id": answer.id},
    )


class _Choices:
    """An answer in the form of chat/completions or completions, the same for each choice."""

    def __init__(self, parsed: ModelRequest, composed: Composed, *, chat: bool) -> None:
        self.composed = composed
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{new_response_id()}"
        self._parsed = parsed
        self._chat = chat
        self._finish = _FINISH.get(composed.finish, "stop")
        self._choices = range(0 if composed.finish == "nothing" else parsed.choices)
        self._identity: Json = {
            "id": self.id,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": parsed.model,
        }
        self._empty: Json = {} if parsed.at_google else {"refusal": None}
        if chat and not parsed.at_google:
            tier = parsed.tier or "default"
            self._identity |= {"service_tier": tier, "system_fingerprint": "fp_emulated"}

    def whole(self) -> list[ScriptStep]:
        composed = self.composed
        message: Json = {"role": "assistant", "content": composed.whole_text, **self._empty}
        if composed.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in composed.calls
            ]
        content = {"message": message} if self._chat else {"text": composed.whole_text or ""}
        choices = [self._choice(index, content, self._finish) for index in self._choices]
        body = self._identity | {"choices": choices, "usage": self._usage()}
        return whole_steps(composed, body, self._billed())

    def stream(self) -> list[ScriptStep]:
        head = b""
        if self._chat:
            self._identity["object"] = "chat.completion.chunk"
            content = None if self.composed.calls else ""
            head = self._events({"role": "assistant", "content": content, **self._empty})
        tail = self._events({} if self._chat else "", self._finish)
        if self._parsed.with_usage:
            tail += self._event([], self._usage())
        pieces = [
            ScriptStep(self._piece(moment), self._billed(moment.output_tokens))
            for moment in self.composed.moments()
        ]
        tail += data_event(b"[DONE]")
        return stream_steps(head, pieces, tail, self._billed())

    def _piece(self, moment: Moment) -> bytes:
        call = moment.call
        if call is None:
            return self._events({"content": moment.text} if self._chat else moment.text)
        opening = b""
        if moment.opens:
            function = {"name": call.name, "arguments": ""}
            start = {"index": moment.block, "id": call.id, "type": "function", "function": function}
            opening = self._events({"tool_calls": [start]})
        more = {"index": moment.block, "function": {"arguments": moment.text}}
        return opening + self._events({"tool_calls": [more]})

    def _events(self, delta: Json | str, finish: str | None = None) -> bytes:
        """Return the same delta or text for each choice, in an event of its own."""
        content: Json = {"delta": delta} if self._chat else {"text": delta}
        return b"".join(
            self._event([self._choice(index, content, finish)]) for index in self._choices
        )

    def _event(self, choices: list[Json], usage: Json | None = None) -> bytes:
        more = {"usage": usage} if self._parsed.with_usage else {}
        return data_event(orjson.dumps(self._identity | {"choices": choices} | more))

    def _choice(self, index: int, content: Json, finish: str | None) -> Json:
        empty = {} if self._parsed.at_google else {"logprobs": None}
        return {"index": index, **content, **empty, "finish_reason": finish}

    def _billed(self, output_tokens: int | None = None) -> int:
        """Return the billed output: every choice is charged for, the thoughts before them once."""
        thoughts = self.composed.thoughts_tokens
        one = self.composed.output_tokens if output_tokens is None else output_tokens
        return thoughts + len(self._choices) * (one - thoughts)

    def _usage(self) -> Json:
        prompt, completion = self._parsed.input_tokens, self._billed()
        cached = self._parsed.cached_tokens
        usage: Json = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        if self._parsed.at_google:  # there thoughts are part of the total only
            usage["completion_tokens"] = completion - self.composed.thoughts_tokens
            if cached:
                usage["prompt_tokens_details"] = {"cached_tokens": cached}
        elif self._chat:
            usage["prompt_tokens_details"] = {"cached_tokens": cached, "audio_tokens": 0}
            usage["completion_tokens_details"] = {
                "reasoning_tokens": self.composed.thoughts_tokens,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            }
        return usage


MOST_DIMENSIONS = 4096
MODELS: Mapping[str, str] = {  # with their owners
    "gemini-2.5-flash": "google",
    "gemini-2.5-flash-image": "google",
    "gemini-2.5-flash-lite": "google",
    "gemini-2.5-pro": "google",
    "gemini-embedding-001": "google",
    "gpt-4o": "openai",
    "gpt-4o-mini": "openai",
    "gpt-5": "openai",
    "gpt-image-1": "openai",
    "text-embedding-3-large": "openai",
    "text-embedding-3-small": "openai",
}
_DIMENSIONS = {"gemini-embedding-001": 768, "text-embedding-3-large": 3072}


def check_model(model: str, behaviour: Behaviour) -> None:
    """Raise Refused (404) if models are strict and this is not one of them."""
    if behaviour.strict_models and model.removeprefix("models/") not in MODELS:
        raise Refused(
            404,
            f"The model `{model}` does not exist or you do not have access to it.",
            param="model",
            code="model_not_found",
        )


def list_models() -> Json:
    return {"object": "list", "data": [describe(name) for name in MODELS]}


def describe(model: str) -> Json:
    owner = MODELS.get(model.removeprefix("models/"), "tidegate-emulator")
    return {"id": model, "object": "model", "created": 1_700_000_000, "owned_by": owner}


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts to embed, and the encoding of their vectors."""

    model: str
    texts: tuple[str, ...]
    input_tokens: int
    dimensions: int
    base64: bool

    def answer(self) -> Json:
        vectors = [embedding(text, self.dimensions) for text in self.texts]
        data = [
            {"object": "embedding", "index": index, "embedding": self._encoded(vector)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": self.input_tokens, "total_tokens": self.input_tokens}
        return {"object": "list", "data": data, "model": self.model, "usage": usage}

    def _encoded(self, vector: list[float]) -> list[float] | str:
        return b64encode(pack(f"<{len(vector)}f", *vector)).decode() if self.base64 else vector


def read_embeddings(body: Json, model: str) -> EmbeddingRequest:
    """Parse a body of embeddings: texts, or lists of the numbers of tokens."""
    given = body.get("input")
    if isinstance(given, str) or _are_numbers(given):
        given = [given]
    if not isinstance(given, list) or not given:
        raise missing("input")
    tokens = 0
    for item in given:
        numbers = _are_numbers(item)
        if not numbers and not (isinstance(item, str) and item):
            raise invalid("input", "'$.input' is invalid: expected texts, none of them empty.")
        tokens += len(item) if numbers else math.ceil(len(item) / 4)
    dimensions = body.get("dimensions") or _DIMENSIONS.get(model.removeprefix("models/"), 1536)
    if not _is_number(dimensions) or not 1 <= dimensions <= MOST_DIMENSIONS:
        raise invalid("dimensions", f"Invalid 'dimensions': from 1 to {MOST_DIMENSIONS}.")
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise invalid("encoding_format", "Supported values are: 'float' and 'base64'.")
    texts = tuple(item if isinstance(item, str) else str(item) for item in given)
    return EmbeddingRequest(model, texts, tokens, dimensions, encoding == "base64")


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_number(item) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_PREFIXES = ("/v1beta/openai/", "/openai/v1/", "/v1/")
_RATE_LIMITS = re.compile(r"organization/projects/([^/]+)/rate_limits")
_PROJECT = {
    "object": "organization.project",
    "id": "proj_emulated",
    "name": "Emulated",
    "status": "active",
}
_PROJECTS = {"object": "list", "data": [_PROJECT], "has_more": False}
_CREATED = {"chat/completions", "completions", "responses", "embeddings", "images/generations"}


def wants(request: web.BaseRequest) -> bool:
    """Return whether a request is for this API.

    `/v1/models` is Gemini's path too: only the header of the key differs.
    """
    if request.path.startswith(_PREFIXES[:2]):
        return True
    if not request.path.startswith(_PREFIXES[2]):
        return False
    googles = "x-goog-api-key" in request.headers or "key" in request.query
    called = _CREATED | openai_media.PATHS
    return _name(request) in called or (_key(request) is not None and not googles)


async def route(served: Served) -> web.StreamResponse:
    request = served.request
    key = _key(request)
    if not key:
        raise Refused(
            401,
            "You didn't provide an API key. You need to provide your API key in an Authorization "
            "header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
        )
    if key == "invalid-key":
        raise Refused(401, _WRONG_KEY)
    name = _name(request)
    if request.method == "POST" and name in openai_media.PATHS:
        media = await openai_media.read(served, name)
        check_model(media.model, served.behaviour)
        return await openai_media.answer(served, media)
    if request.method == "POST" and name in _CREATED:
        body = await served.json(_NOT_JSON)
        model = read_model(body, _usual_model(name, body))
        check_model(model, served.behaviour)
        return await _create(served, name, body, model)
    if request.method == "GET" and name == "organization/projects":
        check_admin_key(key)
        return web.json_response(_PROJECTS)
    if request.method == "GET" and (found := _RATE_LIMITS.fullmatch(name)):
        check_admin_key(key)
        if not found[1].startswith("proj_"):
            raise Refused(404, f"No project found with id {found[1]}.")
        return served.rate_limits(partial(openai_page, known=MODELS, query=request.query))
    if name.partition("/")[0] in ("files", "uploads", "batches"):
        return await openai_batches.route(served, name, partial(_line_work, served.behaviour))
    if openai_stored.wants(request.method, name):
        return await openai_stored.route(served, name)
    if request.method == "GET" and name == "models":
        return await served.other("models", "", list_models)
    if request.method == "GET" and name.startswith("models/"):
        model = name.removeprefix("models/")
        return await served.other("models", model, lambda: _checked_model(served, model))
    raise Refused(404, f"Invalid URL ({request.method} {request.path})")


def _usual_model(name: str, body: Any) -> str | None:
    """Return the model of a request that may leave it out: for images, and of a saved prompt."""
    if name == "images/generations":
        return "gpt-image-1"
    saved = name == "responses" and isinstance(body, dict) and isinstance(body.get("prompt"), dict)
    return "gpt-5" if saved else None


async def _create(served: Served, name: str, body: Json, model: str) -> web.StreamResponse:
    behaviour = served.behaviour
    match name:
        case "embeddings":
            embedded = read_embeddings(body, model)
            return await served.other(
                "embed", model, embedded.answer, input_tokens=embedded.input_tokens
            )
        case "images/generations":
            parsed = openai_media.read_pictures(body, model)
            return await served.generate(
                parsed, partial(openai_media.pictures_script, parsed, served)
            )
        case "responses":
            parsed = served.cached(read_responses(body, model))
            parsed = served.in_tier(parsed, body.get("service_tier"))
            openai_stored.check_named(served, body)
            broken = partial(broken_object, OPENAI, GARBAGE)
            scripted = partial(response_script, broken, body, parsed, behaviour)
            if body.get("background") is True:
                return await openai_stored.in_background(served, body, parsed, scripted(None))
            return await served.generate(
                parsed,
                lambda fault: openai_stored.keep_response(served, body, scripted(fault), fault),
            )
    chat = name == "chat/completions"
    parsed = served.cached(read_chat(body, model) if chat else read_completions(body, model))
    parsed = served.in_tier(parsed, body.get("service_tier"))
    if chat and served.request.path.startswith(_PREFIXES[0]) and _GEMINI.match(model):
        thinks = parsed.thinks or (body.get("reasoning_effort") is None and gemini_thinks(model))
        parsed = replace(parsed, at_google=True, thinks=thinks)
    choices = partial(choices_script, parsed, behaviour, chat=chat)
    if not chat:
        return await served.generate(parsed, choices)
    if body.get("deferred") is True:
        return await openai_stored.defer(served, parsed, choices(None))
    return await served.generate(
        parsed, lambda fault: openai_stored.keep_completion(served, body, choices(fault))
    )


def _line_work(behaviour: Behaviour, endpoint: str, body: Json) -> LineWork:
    """Return the work of a batch's line. Raises Refused."""
    model = read_model(body)
    check_model(model, behaviour)
    match endpoint.removeprefix("/v1/"):
        case "embeddings":
            embedded = read_embeddings(body, model)
            tokens = embedded.input_tokens
            answer = LineAnswer(embedded.answer(), 0)
            return LineWork("other", model, endpoint, tokens, lambda: answer, "embed")
        case "responses":
            parsed = read_responses(body, model)
            broken = partial(broken_object, OPENAI, GARBAGE)
            return line_work(parsed, partial(response_script, broken, body, parsed, behaviour))
        case "completions":
            parsed = read_completions(body, model)
            return line_work(parsed, partial(choices_script, parsed, behaviour, chat=False))
    parsed = read_chat(body, model)
    return line_work(parsed, partial(choices_script, parsed, behaviour, chat=True))


def _checked_model(served: Served, model: str) -> Json:
    check_model(model, served.behaviour)
    return describe(model)


def _name(request: web.BaseRequest) -> str:
    for prefix in _PREFIXES:
        if request.path.startswith(prefix):
            return request.path.removeprefix(prefix).rstrip("/")
    return ""


def _key(request: web.BaseRequest) -> str | None:
    """Return the key from the header of OpenAI and compatible providers, or from Azure's."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return request.headers.get("api-key")
