"""OpenAI's API: chat completions, responses, completions, embeddings, images, models.

Invariants: errors have OpenAI's shape, except `error_list`, which is the list that Gemini's
compatible endpoint sends; a stream reports usage only if requested; every event of a response has
the next `sequence_number` and the last one is the whole response; unknown fields are ignored; a
body that OpenAI refuses is an OpenAIError that names the field; the size of a file is that of its
bytes.
"""

from __future__ import annotations

import math
import re
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from struct import pack
from typing import Any
from urllib.parse import unquote

import orjson
from aiohttp import web

from tidegate.emulator import content as answers
from tidegate.emulator import conversation
from tidegate.emulator import dialect as wire
from tidegate.emulator.content import (
    OUTPUT_PICTURE_TOKENS,
    Asked,
    Attached,
    Choice,
    Tool,
    count_by_modality,
    draw,
)
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

_TYPE_OF = {429: "requests", 500: "server_error", 503: "server_error", 529: "server_error"}
_CODE_OF = {401: "invalid_api_key", 403: "permission_denied", 429: "rate_limit_exceeded"}
_WRONG_KEY = (
    "Incorrect API key provided: inva***-key. You can find your API key at "
    "https://platform.openai.com/account/api-keys."
)
_NO_QUOTA = (
    "You exceeded your current quota, please check your plan and billing details. For more "
    "information on this error, read the docs: "
    "https://platform.openai.com/docs/guides/error-codes/api-errors."
)


def body(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    kind: str | None = None,
) -> Json:
    inner = {
        "message": message,
        "type": kind or _TYPE_OF.get(status, "invalid_request_error"),
        "param": param,
        "code": code or _CODE_OF.get(status),
    }
    return {"error": inner}


class OpenAIError(Refused):
    """A request that OpenAI would refuse."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(Failure(status, body(status, message, param=param, code=code)))


def wrong(param: str, message: str, code: str = "invalid_value") -> OpenAIError:
    """400 for one field."""
    return OpenAIError(400, message, param=param, code=code)


def key_missing() -> OpenAIError:
    return OpenAIError(
        401,
        "You didn't provide an API key. You need to provide your API key in an Authorization "
        "header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
    )


def key_invalid() -> OpenAIError:
    return OpenAIError(401, _WRONG_KEY)


def model_unknown(model: str) -> OpenAIError:
    return OpenAIError(
        404,
        f"The model `{model}` does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )


def duration(seconds: float) -> str:
    """As OpenAI writes it: `350ms`, `1.2s`, `6m0s`, `1h0m0s`."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{round(rest, 3):g}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def throttled(model: str, measure: str, bound: int, retry_after_s: float) -> Failure:
    """429 that says when to come back. `measure` is `requests` or `tokens`."""
    name = "tokens per min (TPM)" if measure == "tokens" else "requests per min (RPM)"
    wait = duration(retry_after_s)
    message = (
        f"Rate limit reached for {model} in organization org-emulated on {name}: Limit {bound}. "
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
    return Failure(429, body(429, message, kind=measure), headers)


def no_quota() -> Failure:
    kind = "insufficient_quota"
    return Failure(429, body(429, _NO_QUOTA, kind=kind, code=kind))


def refused(refusal: Refusal, model: str) -> Failure:
    """The 429 of a limit that the emulator really enforces."""
    wait = wait_s(refusal)
    if refusal.rate is None or wait is None:
        message = f"Too many concurrent requests for {model}: limit {refusal.bound}."
        return Failure(429, body(429, message))
    if refusal.rate.per_day:
        return no_quota()
    measure = "tokens" if refusal.rate.measure == "input_tokens" else "requests"
    return throttled(model, measure, refusal.bound, wait)


def _throttled_on_order(fault: Fault, model: str) -> Failure | None:
    match fault.fault:
        case FaultName.THROTTLED:
            return throttled(model, "requests", 10, fault.retry_after_s)
        case FaultName.THROTTLED_BARE:
            return Failure(429, body(429, "Rate limit reached."))
        case FaultName.DAY_QUOTA:
            return no_quota()
        case FaultName.ERROR_LIST:
            return wire.throttled_on_order(fault, model)
    return None


OPENAI = Dialect(
    name="openai",
    error=lambda status, message: Failure(status, body(status, message)),
    refused=refused,
    plain={
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
    inside=body,
)


_TEXT = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_ANYTHING = "application/octet-stream"


def read_content(content: Any, param: str) -> Iterator[tuple[str | None, Attached | None]]:
    """Each part of a message's content as a text or a file. Raises OpenAIError (400)."""
    if content is None:
        return
    if isinstance(content, str):
        yield content, None
        return
    if not isinstance(content, list):
        raise wrong(param, f"Invalid type for '{param}': expected a string or a list.")
    for index, part in enumerate(content):
        place = f"{param}[{index}]"
        if not isinstance(part, dict):
            raise wrong(place, f"Invalid type for '{place}': expected an object.", "invalid_type")
        yield _read_part(part, place)


def _read_part(part: Json, place: str) -> tuple[str | None, Attached | None]:
    kind = part.get("type")
    if kind in _TEXT:
        text = part.get(_TEXT[kind])
        if not isinstance(text, str):
            raise wrong(f"{place}.text", f"Invalid type for '{place}.text': expected a string.")
        return text, None
    match kind:
        case "image_url" | "input_image":
            return None, _picture(part, place)
        case "input_audio":
            sound = part.get("input_audio")
            if not isinstance(sound, dict):
                raise wrong(place, f"Missing required parameter: '{place}.input_audio'.")
            size = _size(sound.get("data"), f"{place}.input_audio.data")
            return None, Attached(f"audio/{sound.get('format') or 'wav'}", size)
        case "file" | "input_file":
            file = part.get("file") if kind == "file" else part
            if not isinstance(file, dict):
                raise wrong(place, f"Missing required parameter: '{place}.file'.")
            return None, _file(file, place)
    raise wrong(f"{place}.type", f"Invalid value: '{kind}'. It is none of the supported types.")


def _picture(part: Json, place: str) -> Attached:
    url = part.get("image_url")
    if isinstance(url, dict):
        url = url.get("url")
    if isinstance(url, str) and url:
        return _at(url, f"{place}.image_url", "image/*")
    if isinstance(part.get("file_id"), str):
        return Attached("image/*", None, part["file_id"])
    raise wrong(f"{place}.image_url", f"Missing required parameter: '{place}.image_url'.")


def _file(file: Json, place: str) -> Attached:
    data = file.get("file_data")
    if isinstance(data, str):
        if data.startswith("data:"):
            return _at(data, f"{place}.file_data", _ANYTHING)
        return Attached(_ANYTHING, _size(data, f"{place}.file_data"))
    for name in ("file_url", "file_id"):
        if isinstance(file.get(name), str):
            return Attached(_ANYTHING, None, file[name])
    raise wrong(f"{place}.file_data", f"Missing required parameter: '{place}.file_data'.")


def _at(url: str, place: str, mime_type: str) -> Attached:
    """What stands behind a URL: a `data:` URL holds it, any other only names it."""
    if not url.startswith("data:"):
        if not url.startswith(("http://", "https://")):
            raise wrong(place, f"Invalid '{place}'. Expected a valid URL.")
        return Attached(mime_type, None, url)
    head, comma, data = url[5:].partition(",")
    if not comma:
        raise wrong(place, f"Invalid '{place}'. Expected a base64-encoded data URL.")
    declared = head.partition(";")[0] or mime_type
    if head.endswith(";base64"):
        return Attached(declared, _size(data, place))
    return Attached(declared, len(unquote(data).encode("utf-8", "replace")))


def _size(data: Any, place: str) -> int:
    if not isinstance(data, str) or len(data.rstrip("=")) % 4 == 1:
        raise wrong(place, f"Invalid '{place}'. Expected base64-encoded data.")
    return len(data.rstrip("=")) * 3 // 4


MOST_CHOICES = 128
_THINKS = re.compile(r"^(models/)?(o\d|gpt-5)")
_NO_THOUGHTS = (None, "none", "minimal")
_SPEAKERS: dict[str, Speaker] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """`asked` as in Gemini's dialect, and how the answer is to come."""

    asked: Asked
    choices: int = 1
    streamed: bool = False
    with_usage: bool = False


def read_body(body: Any) -> tuple[Json, str]:
    """A body and the model that it names."""
    if not isinstance(body, dict):
        raise OpenAIError(400, "We could not parse the JSON body of your request.")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise wrong("model", "You must provide a model parameter.", "missing_required_parameter")
    return body, model


def read_chat(body: Json, model: str) -> Wanted:
    """Parse a body of chat/completions. Raises OpenAIError (400)."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        message = "Missing required parameter: 'messages'."
        raise wrong("messages", message, "missing_required_parameter")
    heard = Heard()
    for index, message in enumerate(messages):
        _hear(heard, message, f"messages[{index}]")
    options = body.get("stream_options")
    asked = heard.asked(
        model,
        schema=_schema_of(heard, body.get("response_format"), "response_format"),
        max_output_tokens=whole(body, "max_completion_tokens") or whole(body, "max_tokens"),
        thinks=_thinks(model, body.get("reasoning_effort")),
        called=_calls(heard, body),
    )
    choices = whole(body, "n") or 1
    if choices > MOST_CHOICES:
        raise wrong("n", f"Invalid 'n': integer above maximum value: {MOST_CHOICES}.")
    return Wanted(
        asked,
        choices,
        streamed=flag(body, "stream"),
        with_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


def read_responses(body: Json, model: str) -> Wanted:
    """Parse a body of responses. Raises OpenAIError (400)."""
    heard = Heard()
    heard.hear("system", str(body.get("instructions") or ""))
    given = body.get("input")
    if isinstance(given, str):
        heard.hear("user", given)
    elif isinstance(given, list) and given:
        for index, item in enumerate(given):
            _hear_item(heard, item, f"input[{index}]")
    else:
        raise wrong("input", "Missing required parameter: 'input'.", "missing_required_parameter")
    text, reasoning = body.get("text"), body.get("reasoning")
    wanted = text.get("format") if isinstance(text, dict) else None
    asked = heard.asked(
        model,
        schema=_schema_of(heard, wanted, "text.format"),
        max_output_tokens=whole(body, "max_output_tokens"),
        thinks=_thinks(model, reasoning.get("effort") if isinstance(reasoning, dict) else None),
        called=_calls(heard, body),
    )
    return Wanted(asked, streamed=flag(body, "stream"))


def _hear(heard: Heard, message: Any, place: str) -> None:
    if not isinstance(message, dict):
        raise wrong(place, f"Invalid type for '{place}': expected an object.", "invalid_type")
    speaker = _SPEAKERS.get(str(message.get("role")))
    if speaker is None:
        allowed = ", ".join(f"'{name}'" for name in _SPEAKERS)
        raise wrong(
            f"{place}.role",
            f"Invalid value: '{message.get('role')}'. Supported values are: {allowed}.",
        )
    heard.hear(speaker, None)
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            heard.turn.called.append(str(function.get("name")))
    for text, file in read_content(message.get("content"), f"{place}.content"):
        heard.hear(speaker, text, file)


def _hear_item(heard: Heard, item: Any, place: str) -> None:
    if isinstance(item, dict) and item.get("type") == "function_call_output":
        heard.hear("tool", None)
        for text, file in read_content(item.get("output"), f"{place}.output"):
            heard.hear("tool", text, file)
    elif isinstance(item, dict) and item.get("type") == "function_call":
        heard.turn.called.append(str(item.get("name")))
    elif not isinstance(item, dict) or item.get("type", "message") == "message":
        _hear(heard, item, place)


def _schema_of(heard: Heard, wanted: Any, param: str) -> Json | None:
    """The schema of a `response_format`, or of a `text.format`, which is flatter."""
    if not isinstance(wanted, dict):
        return None
    match wanted.get("type"):
        case "json_object":
            return heard.json_schema()
        case "json_schema":
            inner = wanted.get("json_schema", wanted)
            schema = inner.get("schema") if isinstance(inner, dict) else None
            if not isinstance(schema, dict):
                raise wrong(
                    param,
                    f"Missing required parameter: '{param}.schema'.",
                    "missing_required_parameter",
                )
            return schema
    return None


def _calls(heard: Heard, body: Json) -> Sequence[Tool]:
    given = body.get("tools") or []
    if not isinstance(given, list):
        raise wrong("tools", "Invalid type for 'tools': expected a list.", "invalid_type")
    tools = []
    for index, item in enumerate(given):
        if not isinstance(item, dict) or item.get("type") != "function":
            continue
        function = item.get("function", item)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            place = f"tools[{index}].function.name"
            raise wrong(
                place, f"Missing required parameter: '{place}'.", "missing_required_parameter"
            )
        schema = function.get("parameters")
        tools.append(Tool(function["name"], schema if isinstance(schema, dict) else {}))
    several = body.get("parallel_tool_calls") is not False
    return heard.calls(tools, _choice(body.get("tool_choice"), tools), several=several)


def _choice(choice: Any, tools: list[Tool]) -> Choice | Tool:
    if choice in ("none", "required"):
        return "none" if choice == "none" else "required"
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, dict) else None
        for tool in tools:
            if tool.name == name:
                return tool
        raise wrong("tool_choice", f"Tool choice '{name}' not found in 'tools' parameter.")
    return "auto"


def _thinks(model: str, effort: Any) -> bool:
    return effort not in _NO_THOUGHTS or (effort is None and bool(_THINKS.match(model)))


def flag(body: Json, name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise wrong(name, f"Invalid type for '{name}': expected a boolean.", "invalid_type")
    return bool(value)


def whole(body: Json, name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise wrong(name, f"Invalid '{name}': expected an integer of at least 1.")
    return value


_GARBAGE = b'{"id": "chatcmpl-emulated", "choices": [{"delta": {"con'
_DONE = b"data: [DONE]\n\n"
_FINISH = {
    "stop": "stop",
    "length": "length",
    "calls": "tool_calls",
    "blocked": "content_filter",
    "unknown": "something_new",
}


def script(wanted: Wanted, behaviour: Behaviour, fault: Fault | None) -> Script:
    chat = _Chat(wanted, compose(wanted.asked, behaviour, fault))
    return conversation.script(
        wanted.asked,
        chat.composed,
        chat.stream() if wanted.streamed else chat.whole(),
        streamed=wanted.streamed,
        broken=lambda _, fault: _framed(broken_object(OPENAI, _GARBAGE, fault), wanted.streamed),
        headers={"x-request-id": chat.id},
    )


def _framed(data: bytes, streamed: bool) -> bytes:
    return b"data: " + data + b"\n\n" if streamed else data


class _Chat:
    """One answer in the shapes of this API."""

    def __init__(self, wanted: Wanted, composed: Composed) -> None:
        self.wanted = wanted
        self.composed = composed
        self.id = f"chatcmpl-{answers.new_response_id()}"
        self._created = int(time.time())
        self._choices = range(0 if composed.finish == "nothing" else wanted.choices)

    def whole(self) -> list[Step]:
        message: Json = {"role": "assistant", "content": self.composed.said, "refusal": None}
        if self.composed.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.composed.calls
            ]
        choices = [
            {"index": index, "message": message, "logprobs": None, "finish_reason": self._finish}
            for index in self._choices
        ]
        body = self._body("chat.completion", choices) | {"usage": self._usage()}
        return whole_steps(self.composed, body, self._billed())

    def stream(self) -> list[Step]:
        content = None if self.composed.calls else ""
        head = self._deltas({"role": "assistant", "content": content, "refusal": None})
        tail = self._deltas({}, self._finish)
        if self.wanted.with_usage:
            tail += self._event([], self._usage())
        pieces = [
            Step(self._piece(moment), self._billed(moment.output_tokens))
            for moment in self.composed.moments()
        ]
        return stream_steps(head, pieces or [Step(b"", self._billed())], tail + _DONE)

    def _piece(self, moment: Moment) -> bytes:
        call = moment.call
        if call is None:
            return self._deltas({"content": moment.text})
        opening = b""
        if moment.opens:
            function = {"name": call.name, "arguments": ""}
            start = {"index": moment.block, "id": call.id, "type": "function", "function": function}
            opening = self._deltas({"tool_calls": [start]})
        more = {"index": moment.block, "function": {"arguments": moment.text}}
        return opening + self._deltas({"tool_calls": [more]})

    def _deltas(self, delta: Json, finish: str | None = None) -> bytes:
        """The same for each choice, in an event of its own."""
        return b"".join(
            self._event(
                [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}]
            )
            for index in self._choices
        )

    def _event(self, choices: list[Json], usage: Json | None = None) -> bytes:
        body = self._body("chat.completion.chunk", choices)
        if self.wanted.with_usage:
            body["usage"] = usage
        return _framed(orjson.dumps(body), True)

    @property
    def _finish(self) -> str:
        return _FINISH.get(self.composed.finish, "stop")

    def _body(self, name: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": name,
            "created": self._created,
            "model": self.wanted.asked.model,
            "service_tier": "default",
            "system_fingerprint": "fp_emulated",
            "choices": choices,
        }

    def _billed(self, output_tokens: int | None = None) -> int:
        """Every choice is charged for, the thoughts before them once."""
        thoughts = self.composed.thoughts_tokens
        one = self.composed.output_tokens if output_tokens is None else output_tokens
        return thoughts + len(self._choices) * (one - thoughts)

    def _usage(self) -> Json:
        prompt, completion = self.wanted.asked.input_tokens, self._billed()
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": self.composed.thoughts_tokens,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


MOST_PICTURES = 10
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
_PLAIN_GARBAGE = b'{"created": 1, "data": [{"b64_'


def check_model(model: str, behaviour: Behaviour) -> None:
    """Raises OpenAIError (404) when models are strict and this is none of them."""
    if behaviour.strict_models and model.removeprefix("models/") not in MODELS:
        raise model_unknown(model)


def list_models() -> Json:
    return {"object": "list", "data": [describe(name) for name in MODELS]}


def describe(model: str) -> Json:
    owner = MODELS.get(model.removeprefix("models/"), "tidegate-emulator")
    return {"id": model, "object": "model", "created": 1_700_000_000, "owned_by": owner}


@dataclass(frozen=True, slots=True)
class Embedded:
    """What is to be embedded, and how the vectors are to come."""

    model: str
    texts: tuple[str, ...]
    input_tokens: int
    dimensions: int
    base64: bool

    def answer(self) -> Json:
        vectors = [answers.embedding(text, self.dimensions) for text in self.texts]
        data = [
            {"object": "embedding", "index": index, "embedding": self._encoded(vector)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": self.input_tokens, "total_tokens": self.input_tokens}
        return {"object": "list", "data": data, "model": self.model, "usage": usage}

    def _encoded(self, vector: list[float]) -> list[float] | str:
        return b64encode(pack(f"<{len(vector)}f", *vector)).decode() if self.base64 else vector


def read_embeddings(body: Json, model: str) -> Embedded:
    """Parse a body of embeddings: texts, or lists of the numbers of LLM tokens."""
    given = body.get("input")
    if isinstance(given, str) or _are_numbers(given):
        given = [given]
    if not isinstance(given, list) or not given:
        raise wrong("input", "Missing required parameter: 'input'.", "missing_required_parameter")
    tokens = 0
    for item in given:
        numbers = _are_numbers(item)
        if not numbers and not (isinstance(item, str) and item):
            raise wrong("input", "'$.input' is invalid: expected texts, none of them empty.")
        tokens += len(item) if numbers else math.ceil(len(item) / 4)
    dimensions = body.get("dimensions") or _DIMENSIONS.get(model.removeprefix("models/"), 1536)
    if not _is_number(dimensions) or not 1 <= dimensions <= MOST_DIMENSIONS:
        raise wrong("dimensions", f"Invalid 'dimensions': from 1 to {MOST_DIMENSIONS}.")
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise wrong("encoding_format", "Supported values are: 'float' and 'base64'.")
    texts = tuple(item if isinstance(item, str) else str(item) for item in given)
    return Embedded(model, texts, tokens, dimensions, encoding == "base64")


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_number(item) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_pictures(body: Json, model: str) -> tuple[Asked, int]:
    """Parse a body of images/generations: what is asked, and how many pictures."""
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        message = "Missing required parameter: 'prompt'."
        raise wrong("prompt", message, "missing_required_parameter")
    wanted = body.get("n")
    wanted = 1 if wanted is None else wanted
    if not _is_number(wanted) or not 1 <= wanted <= MOST_PICTURES:
        raise wrong("n", f"Invalid 'n': from 1 to {MOST_PICTURES}.")
    if body.get("stream"):
        raise wrong("stream", "Pictures are not streamed here.", "unsupported_parameter")
    asked = Asked(
        kind="image_generation",
        model=model,
        prompt=prompt,
        last_text=prompt,
        attached=(),
        input_by_modality=count_by_modality(len(prompt), ()),
        wants_picture=True,
    )
    return asked, wanted


def pictures_script(asked: Asked, wanted: int, behaviour: Behaviour, fault: Fault | None) -> Script:
    empty = fault is not None and fault.fault in (FaultName.NO_IMAGE, FaultName.NO_CANDIDATES)
    count = 0 if empty else wanted
    # Pictures of one prompt differ by their number.
    pngs = [draw(f"{asked.prompt}\n{number}", behaviour.image_size) for number in range(count)]
    tokens = count * OUTPUT_PICTURE_TOKENS
    body = {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": "png",
        "data": [{"b64_json": b64encode(png).decode()} for png in pngs],
        "usage": {
            "input_tokens": asked.input_tokens,
            "input_tokens_details": {"text_tokens": asked.input_tokens, "image_tokens": 0},
            "output_tokens": tokens,
            "total_tokens": asked.input_tokens + tokens,
        },
    }
    return Script(
        [Step(orjson.dumps(body), tokens)],
        streamed=False,
        input_tokens=asked.input_tokens,
        broken=lambda _, fault: broken_object(OPENAI, _PLAIN_GARBAGE, fault),
    )


_RESPONSES_GARBAGE = b'{"type": "response.output_text.delta", "del'
_ECHOED: Json = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
}


def response_script(
    wanted: Wanted, body: Json, behaviour: Behaviour, fault: Fault | None
) -> Script:
    response = _Response(wanted, body, compose(wanted.asked, behaviour, fault))
    return conversation.script(
        wanted.asked,
        response.composed,
        response.stream() if wanted.streamed else response.whole(),
        streamed=wanted.streamed,
        broken=_broken_event if wanted.streamed else _broken_body,
        headers={"x-request-id": response.id},
    )


def _broken_body(_: int, fault: Fault) -> bytes:
    return broken_object(OPENAI, _RESPONSES_GARBAGE, fault)


def _broken_event(index: int, fault: Fault) -> bytes:
    """An `error` event is flat: the fields of the error object stand in it."""
    if fault.fault is FaultName.GARBAGE:
        return b"event: response.output_text.delta\ndata: " + _RESPONSES_GARBAGE + b"\n\n"
    error = orjson.loads(broken_object(OPENAI, _RESPONSES_GARBAGE, fault))["error"]
    named = error | {"type": "error", "code": error["code"] or error["type"]}
    return named_event(named | {"sequence_number": index})


class _Response:
    """One answer in the shapes of this API."""

    def __init__(self, wanted: Wanted, body: Json, composed: Composed) -> None:
        self.wanted = wanted
        self.composed = composed
        self.id = f"resp_{answers.new_response_id()}"
        self._body = body
        self._created = int(time.time())
        self._sequence = count()

    def whole(self) -> list[Step]:
        return whole_steps(self.composed, self._ended(), self.composed.output_tokens)

    def stream(self) -> list[Step]:
        begun = self._response("in_progress", [], None)
        head = self._event("response.created", response=begun)
        head += self._event("response.in_progress", response=begun)
        pieces = [
            Step(self._piece(moment), moment.output_tokens) for moment in self.composed.moments()
        ]
        ended = self._ended()
        tail = self._event(f"response.{ended['status']}", response=ended)
        return stream_steps(head, pieces or [Step(b"", self.composed.output_tokens)], tail)

    def _piece(self, moment: Moment) -> bytes:
        events = b""
        if moment.opens:
            events += self._opened(moment)
        place = {"item_id": self._item_id(moment.block), "output_index": moment.block}
        if moment.call is None:
            text = {**place, "content_index": 0, "delta": moment.text, "logprobs": []}
            events += self._event("response.output_text.delta", **text)
        else:
            name = "response.function_call_arguments.delta"
            events += self._event(name, **place, delta=moment.text)
        return events + (self._closed(moment) if moment.closes else b"")

    def _opened(self, moment: Moment) -> bytes:
        item = self._item(moment.block, moment.call, "in_progress")
        events = self._event("response.output_item.added", output_index=moment.block, item=item)
        if moment.call is None:
            events += self._event(
                "response.content_part.added", **self._content(moment), part=_text_part("")
            )
        return events

    def _closed(self, moment: Moment) -> bytes:
        if moment.call is None:
            text = self.composed.said or ""
            events = self._event(
                "response.output_text.done", **self._content(moment), text=text, logprobs=[]
            )
            events += self._event(
                "response.content_part.done", **self._content(moment), part=_text_part(text)
            )
        else:
            events = self._event(
                "response.function_call_arguments.done",
                item_id=self._item_id(moment.block),
                output_index=moment.block,
                name=moment.call.name,
                arguments=moment.call.arguments,
            )
        item = self._item(moment.block, moment.call, "completed")
        return events + self._event(
            "response.output_item.done", output_index=moment.block, item=item
        )

    def _content(self, moment: Moment) -> Json:
        item_id = self._item_id(moment.block)
        return {"item_id": item_id, "output_index": moment.block, "content_index": 0}

    def _item_id(self, block: int) -> str:
        return f"item_{self.id}_{block}"

    def _item(self, block: int, call: Called | None, status: str) -> Json:
        done = status == "completed"
        if call is not None:
            return {
                "id": self._item_id(block),
                "type": "function_call",
                "status": status,
                "call_id": call.id,
                "name": call.name,
                "arguments": call.arguments if done else "",
            }
        return {
            "id": self._item_id(block),
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [_text_part(self.composed.said or "")] if done else [],
        }

    def _ended(self) -> Json:
        reason = {"length": "max_output_tokens", "blocked": "content_filter"}.get(
            self.composed.finish
        )
        blocks: list[Called | None] = [*self.composed.calls]
        if self.composed.text:
            blocks.insert(0, None)
        output = [self._item(block, call, "completed") for block, call in enumerate(blocks)]
        status = "incomplete" if reason else "completed"
        ended = self._response(status, output, self._usage())
        return ended | {"incomplete_details": {"reason": reason} if reason else None}

    def _response(self, status: str, output: list[Json], usage: Json | None) -> Json:
        echoed = {name: self._body.get(name, value) for name, value in _ECHOED.items()}
        return echoed | {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.wanted.asked.model,
            "output": output,
            "usage": usage,
        }

    def _event(self, name: str, /, **fields: object) -> bytes:
        return named_event({"type": name, "sequence_number": next(self._sequence), **fields})

    def _usage(self) -> Json:
        read, wrote = self.wanted.asked.input_tokens, self.composed.output_tokens
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": wrote,
            "output_tokens_details": {"reasoning_tokens": self.composed.thoughts_tokens},
            "total_tokens": read + wrote,
        }


def _text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


DEFAULT_MOST_TOKENS = 16
_COMPLETIONS_GARBAGE = b'{"id": "cmpl-emulated", "choices": [{"te'
_COMPLETIONS_FINISH = {"length": "length", "blocked": "content_filter", "unknown": "something_new"}


def read_completions(body: Json, model: str) -> Wanted:
    """Parse a body of completions. Raises OpenAIError (400)."""
    prompts = _prompts(body.get("prompt"))
    heard = Heard()
    for prompt in prompts:
        heard.hear("user", prompt)
    asked = heard.asked(
        model,
        schema=None,
        max_output_tokens=whole(body, "max_tokens") or DEFAULT_MOST_TOKENS,
        thinks=False,
    )
    choices = (whole(body, "n") or 1) * len(prompts)
    if choices > MOST_CHOICES:
        raise wrong("n", f"Invalid 'n': more than {MOST_CHOICES} choices in all.")
    options = body.get("stream_options")
    return Wanted(
        asked,
        choices,
        streamed=flag(body, "stream"),
        with_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


def _prompts(given: Any) -> list[str]:
    """Texts, or the numbers of LLM tokens, one prompt or several."""
    one = isinstance(given, str) or (isinstance(given, list) and given[:1] and _number(given[0]))
    prompts = [given] if one else given
    if not isinstance(prompts, list) or not prompts:
        message = "Missing required parameter: 'prompt'."
        raise wrong("prompt", message, "missing_required_parameter")
    if not all(isinstance(prompt, str | list) for prompt in prompts):
        raise wrong("prompt", "Invalid type for 'prompt': expected texts or lists of numbers.")
    return [prompt if isinstance(prompt, str) else " ".join(map(str, prompt)) for prompt in prompts]


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def completion_script(wanted: Wanted, behaviour: Behaviour, fault: Fault | None) -> Script:
    composed = compose(wanted.asked, behaviour, fault)
    identity: Json = {
        "id": f"cmpl-{answers.new_response_id()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": wanted.asked.model,
    }
    finish = _COMPLETIONS_FINISH.get(composed.finish, "stop")
    choices = range(0 if composed.finish == "nothing" else wanted.choices)
    written = composed.output_tokens * len(choices)
    usage = {
        "prompt_tokens": wanted.asked.input_tokens,
        "completion_tokens": written,
        "total_tokens": wanted.asked.input_tokens + written,
    }

    def choice(index: int, text: str, reason: str | None) -> Json:
        return {"text": text, "index": index, "logprobs": None, "finish_reason": reason}

    def event(found: list[Json], told: Json | None = None) -> bytes:
        extra = {"usage": told} if wanted.with_usage else {}
        return b"data: " + orjson.dumps(identity | {"choices": found} | extra) + b"\n\n"

    def events(text: str, reason: str | None = None) -> bytes:
        return b"".join(event([choice(index, text, reason)]) for index in choices)

    if wanted.streamed:
        pieces = [
            Step(events(moment.text), moment.output_tokens * len(choices))
            for moment in composed.moments()
        ]
        tail = events("", finish) + (event([], usage) if wanted.with_usage else b"") + _DONE
        steps = stream_steps(b"", pieces or [Step(b"", written)], tail)
    else:
        found = [choice(index, composed.said or "", finish) for index in choices]
        steps = whole_steps(composed, identity | {"choices": found, "usage": usage}, written)
    return conversation.script(
        wanted.asked,
        composed,
        steps,
        streamed=wanted.streamed,
        broken=lambda _, fault: _framed_completion(
            broken_object(OPENAI, _COMPLETIONS_GARBAGE, fault), wanted.streamed
        ),
        headers={"x-request-id": identity["id"]},
    )


def _framed_completion(data: bytes, streamed: bool) -> bytes:
    return b"data: " + data + b"\n\n" if streamed else data


_PREFIXES = ("/v1beta/openai/", "/v1/")
_OWN = {"chat/completions", "completions", "responses", "embeddings", "images/generations"}


class OpenAIFront:
    """What comes for OpenAI's API."""

    dialect = OPENAI

    def __init__(self, state: State) -> None:
        self.state = state

    def wants(self, request: web.BaseRequest) -> bool:
        """`/v1/models` is Gemini's path too: only the way of sending the key tells them apart."""
        if request.path.startswith(_PREFIXES[0]):
            return True
        if not request.path.startswith(_PREFIXES[1]):
            return False
        googles = "x-goog-api-key" in request.headers or "key" in request.query
        return _name(request) in _OWN or (_key(request) is not None and not googles)

    async def route(self, request: web.BaseRequest) -> web.StreamResponse:
        key = _key(request)
        if not key:
            raise key_missing()
        if key == "invalid-key":
            raise key_invalid()
        name = _name(request)
        if request.method == "POST" and name in _OWN:
            body, model = read_body(await _json(request))
            check_model(model, self.state.behaviour)
            return await self._create(request, name, body, model)
        if request.method == "GET" and name == "models":
            return await deliver_other(
                self.state, request, OPENAI, "models", "", ready(list_models)
            )
        if request.method == "GET" and name.startswith("models/"):
            model = name.removeprefix("models/")
            return await deliver_other(
                self.state, request, OPENAI, "models", model, ready(partial(self._model, model))
            )
        raise OpenAIError(404, f"Invalid URL ({request.method} {request.path})")

    async def _create(
        self, request: web.BaseRequest, name: str, body: Json, model: str
    ) -> web.StreamResponse:
        behaviour = self.state.behaviour
        if name == "embeddings":
            embedded = read_embeddings(body, model)
            return await deliver_other(
                self.state,
                request,
                OPENAI,
                "embed",
                model,
                ready(embedded.answer),
                input_tokens=embedded.input_tokens,
            )
        if name == "images/generations":
            asked, count = read_pictures(body, model)
            pictures = partial(pictures_script, asked, count, behaviour)
            return await deliver(self.state, request, OPENAI, asked, "generate", pictures)
        if name == "responses":
            wanted = read_responses(body, model)
            scripted = partial(response_script, wanted, body, behaviour)
        elif name == "completions":
            wanted = read_completions(body, model)
            scripted = partial(completion_script, wanted, behaviour)
        else:
            wanted = read_chat(body, model)
            scripted = partial(script, wanted, behaviour)
        method = "stream" if wanted.streamed else "generate"
        return await deliver(self.state, request, OPENAI, wanted.asked, method, scripted)

    def _model(self, model: str) -> Json:
        check_model(model, self.state.behaviour)
        return describe(model)


def _name(request: web.BaseRequest) -> str:
    for prefix in _PREFIXES:
        if request.path.startswith(prefix):
            return request.path.removeprefix(prefix).rstrip("/")
    return ""


def _key(request: web.BaseRequest) -> str | None:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


async def _json(request: web.BaseRequest) -> Any:
    try:
        return orjson.loads(await request.read())
    except orjson.JSONDecodeError:
        raise OpenAIError(400, "We could not parse the JSON body of your request.") from None


__all__ = ["OpenAIFront"]
