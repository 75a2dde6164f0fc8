"""Gemini's API: generateContent, streamGenerateContent, tokens, models, files and what is stored.

Invariants: every error is a google.rpc body; audio is 16-bit little-endian PCM with one channel.
"""

from __future__ import annotations

import math
from array import array
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from sys import byteorder
from typing import Any, Literal

import orjson
from aiohttp import web

from tidegate.emulator.account import DAY_S, AccountRefusal, AccountSpec
from tidegate.emulator.batches import LineAnswer, LineWork
from tidegate.emulator.content import (
    OUTPUT_PICTURE_TOKENS,
    SIGNATURE,
    THOUGHTS,
    Attached,
    Choice,
    Conversation,
    ModelRequest,
    Speaker,
    Tool,
    answer_text,
    arguments,
    base64_bytes,
    cut,
    draw,
    embedding,
    gemini_thinks,
    get,
    listed,
    new_response_id,
    quoted,
    thoughts_of,
)
from tidegate.emulator.delivery import (
    EMULATED,
    SSE_TYPE,
    AnswerScript,
    ScriptStep,
    Served,
    broken_object,
    json_response,
    line_work,
)
from tidegate.emulator.dialect import (
    BODIES,
    EmulatedApi,
    ErrorResponse,
    Fault,
    FaultName,
    Json,
    LimitRefusal,
    Refused,
    wait_s,
)
from tidegate.emulator.fronts import gemini_stored
from tidegate.emulator.settings import Behaviour

_TYPE = "type.googleapis.com/google.rpc."
_QUOTA_URL = "https://ai.google.dev/gemini-api/docs/rate-limits"
STATUS_OF = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    501: "UNIMPLEMENTED",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}


def error(code: int, message: str, details: Sequence[Json] = ()) -> ErrorResponse:
    inner: Json = {"code": code, "message": message, "status": STATUS_OF.get(code, "UNKNOWN")}
    if details:
        inner["details"] = list(details)
    return ErrorResponse(code, {"error": inner})


def check_key(request: web.BaseRequest) -> str:
    """Return the key of a request. Raises Refused, as Gemini does, without one."""
    key = request.headers.get("x-goog-api-key") or request.query.get("key")
    if not key:
        raise Refused(
            403,
            "Method doesn't allow unregistered callers (callers without established identity). "
            "Please use API Key or other form of API consumer identity to call this API.",
        )
    if key == "invalid-key":
        detail = {
            "@type": f"{_TYPE}ErrorInfo",
            "reason": "API_KEY_INVALID",
            "domain": "googleapis.com",
            "metadata": {"service": "generativelanguage.googleapis.com"},
        }
        message = "API key not valid. Please pass a valid API key."
        localized = {"@type": f"{_TYPE}LocalizedMessage", "locale": "en-US", "message": message}
        raise Refused(400, message, details=[detail, localized])
    return key


def throttled(
    model: str, *, quota_id: str, metric: str, value: int, retry_after_s: float | None
) -> ErrorResponse:
    """Return a 429 in Gemini's wording; without a time to retry there is no RetryInfo."""
    violation = {
        "quotaMetric": f"generativelanguage.googleapis.com/{metric}",
        "quotaId": quota_id,
        "quotaDimensions": {"location": "global", "model": model},
        "quotaValue": str(value),
    }
    details: list[Json] = [
        {
            "@type": f"{_TYPE}Help",
            "links": [{"description": "Learn more about Gemini API quotas", "url": _QUOTA_URL}],
        },
        {"@type": f"{_TYPE}QuotaFailure", "violations": [violation]},
    ]
    message = (
        "You exceeded your current quota, please check your plan and billing details. "
        f"For more information on this error, head to: {_QUOTA_URL}."
    )
    if retry_after_s is not None:
        message += f"\nPlease retry in {retry_after_s:.9g}s."
        details.append({"@type": f"{_TYPE}RetryInfo", "retryDelay": f"{retry_after_s:.9g}s"})
    return error(429, message, details)


def refused(refusal: LimitRefusal, model: str) -> ErrorResponse:
    """Return the 429 of a limit that the emulator enforces."""
    rate = refusal.rate
    if rate is None:
        quota_id, metric = "GenerateConcurrentRequestsPerProject", "generate_concurrent_requests"
    elif rate.measure == "input_tokens":
        per = "Day" if rate.per_day else "Minute"
        quota_id = f"GenerateContentInputTokensPerModelPer{per}-Emulated"
        metric = "generate_content_input_token_count"
    else:
        per = "Day" if rate.per_day else "Minute"
        quota_id = f"GenerateRequestsPer{per}PerProjectPerModel-Emulated"
        metric = "generate_requests"
    return throttled(
        model,
        quota_id=quota_id,
        metric=metric,
        value=refusal.bound,
        retry_after_s=wait_s(refusal),
    )


def refused_by_account(_spec: AccountSpec, refusal: AccountRefusal, model: str) -> ErrorResponse:
    """Return the 429 of a limit of an account; a call that can never fit gets no time to retry."""
    limit = refusal.limit
    per = "Day" if limit.window_s >= DAY_S else "Minute"
    if limit.unit == "requests":
        quota_id, metric = f"GenerateRequestsPer{per}PerProjectPerModel", "generate_requests"
    elif limit.unit == "images":
        quota_id, metric = f"GenerateImagesPer{per}PerProjectPerModel", "generate_images"
    else:
        quota_id = f"GenerateContentPaidTierInputTokensPerModelPer{per}"
        metric = "generate_content_paid_tier_input_token_count"
    wait_s = None if refusal.reason == "too_large" else -(-refusal.wait_ns // 10**6) / 1000
    return throttled(
        model, quota_id=quota_id, metric=metric, value=refusal.bound, retry_after_s=wait_s
    )


def throttled_on_order(fault: Fault, model: str) -> ErrorResponse | None:
    match fault.fault:
        case FaultName.THROTTLED:
            return _free_tier(model, "Minute", 10, fault.retry_after_s)
        case FaultName.THROTTLED_BARE:
            return error(429, "Resource has been exhausted (e.g. check quota).")
        case FaultName.DAY_QUOTA:
            return _free_tier(model, "Day", 250, fault.retry_after_s)
        case FaultName.ERROR_LIST:
            return _free_tier(model, "Minute", 10, fault.retry_after_s).listed
    return None


def _free_tier(model: str, per: str, value: int, retry_after_s: float) -> ErrorResponse:
    return throttled(
        model,
        quota_id=f"GenerateRequestsPer{per}PerProjectPerModel-FreeTier",
        metric="generate_content_free_tier_requests",
        value=value,
        retry_after_s=retry_after_s,
    )


GEMINI = EmulatedApi(
    name="gemini",
    error=error,
    refused=refused,
    faults={
        FaultName.UNAVAILABLE: (503, "The model is overloaded. Please try again later."),
        FaultName.INTERNAL: (500, "An internal error has occurred. Please retry."),
        FaultName.UNAUTHORIZED: (401, "Request had invalid authentication credentials."),
        FaultName.FORBIDDEN: (
            403,
            "Your API key was reported as leaked. Please use another API key.",
        ),
    },
    throttled=throttled_on_order,
    refused_by_account=refused_by_account,
    no_capacity=error(503, "The service is currently unavailable."),
    json_type="application/json; charset=UTF-8",
    stream_type=SSE_TYPE,
)


_CHOICES: Mapping[str, Choice] = {
    "AUTO": "auto",
    "MODE_UNSPECIFIED": "auto",
    "VALIDATED": "auto",
    "ANY": "required",
    "NONE": "none",
}
_BAD_CHOICE = "Invalid value at 'tool_config.function_calling_config"
_TYPE_OF_MODE = "type.googleapis.com/google.ai.generativelanguage.v1beta.FunctionCallingConfig.Mode"
_BAD_BODY = "Invalid JSON payload received. {}"
FileLookup = Callable[[str], Attached]


def read_generate(
    model: str, body: Any, lookup: FileLookup, *, streamed: bool = False
) -> ModelRequest:
    """Parse a body of generateContent, streamGenerateContent or countTokens.

    `lookup` returns the file of a URI, or raises Refused. Raises Refused (400).
    """
    if not isinstance(body, dict):
        raise Refused(400, "Invalid JSON payload received. Expected an object.")
    contents = get(body, "contents")
    if not isinstance(contents, list) or not contents:
        raise Refused(400, "* GenerateContentRequest.contents: contents is not specified\n")
    conversation = Conversation()
    for content in contents:
        _add_content(conversation, content, lookup)
    config = get(body, "generationConfig")
    config = {} if config is None else config
    if not isinstance(config, dict):
        raise Refused(400, "Invalid value at 'generation_config'")
    for part in _parts(get(body, "systemInstruction") or {}):
        conversation.add("system", _part(part, lookup)[0])
    parsed = _with_config(model, config, conversation)
    if parsed.schema is None and get(config, "responseMimeType") == "application/json":
        parsed = replace(parsed, schema=conversation.json_schema())
    tools, choice = _functions(body)
    return replace(parsed, called=conversation.calls(tools, choice), streamed=streamed)


def _add_content(conversation: Conversation, content: Any, lookup: FileLookup) -> None:
    parts = list(_parts(content))
    objects = [part for part in parts if isinstance(part, dict)]
    if content.get("role") == "model":
        speaker: Speaker = "assistant"
        calls = [get(part, "functionCall") for part in objects]
        conversation.called += [str(call.get("name")) for call in calls if isinstance(call, dict)]
    elif any(isinstance(get(part, "functionResponse"), dict) for part in objects):
        speaker = "tool"
    else:
        speaker = "user"
    conversation.add(speaker, None)
    for part in parts:
        conversation.add(speaker, *_part(part, lookup))


def _functions(body: Json) -> tuple[list[Tool], Choice]:
    """Return the offered functions, and whether one must be called."""
    given = get(body, "tools") or []
    items = [item for item in (given if isinstance(given, list) else [given]) if type(item) is dict]
    declarations = [get(item, "functionDeclarations") or [] for item in items]
    if not all(isinstance(declared, list) for declared in declarations):
        raise Refused(400, "Invalid value at 'tools[0].function_declarations'")
    tools = [_function(one) for declared in declarations for one in declared]
    config = get(body, "toolConfig")
    config = get(config, "functionCallingConfig") if isinstance(config, dict) else None
    config = config if isinstance(config, dict) else {}
    mode = str(get(config, "mode") or "AUTO").upper()
    if mode not in _CHOICES:
        raise Refused(400, f"{_BAD_CHOICE}.mode' ({_TYPE_OF_MODE}), {mode!r}")
    allowed = get(config, "allowedFunctionNames")
    if isinstance(allowed, list) and allowed:
        if unknown := set(map(str, allowed)) - {tool.name for tool in tools}:
            raise Refused(
                400, f"{_BAD_CHOICE}.allowed_function_names': {min(unknown)} is not declared"
            )
        tools = [tool for tool in tools if tool.name in allowed]
    return tools, _CHOICES[mode]


def _function(declared: Any) -> Tool:
    name = declared.get("name") if isinstance(declared, dict) else None
    if not isinstance(name, str) or not name:
        raise Refused(
            400,
            "* GenerateContentRequest.tools[0].function_declarations[0].name: Invalid function "
            "name. Must start with a letter or an underscore.",
        )
    schema = get(declared, "parametersJsonSchema") or get(declared, "parameters")
    return Tool(name, schema if isinstance(schema, dict) else {})


def _parts(content: Any) -> Iterator[Any]:
    if not isinstance(content, dict):
        raise Refused(400, "Invalid value at 'contents': expected an object")
    parts = content.get("parts") or ()
    if not isinstance(parts, list | tuple | dict):
        raise Refused(400, "Invalid value at 'contents[0].parts': expected a list")
    yield from [parts] if isinstance(parts, dict) else parts


def _part(part: Any, lookup: FileLookup) -> tuple[str | None, Attached | None]:
    if not isinstance(part, dict):
        raise Refused(400, "Invalid value at 'contents[0].parts[0]': expected an object")
    text = part.get("text")
    if text is not None and not isinstance(text, str):
        raise Refused(400, "Invalid value at 'contents[0].parts[0].text' (TYPE_STRING)")
    inline = get(part, "inlineData")
    if isinstance(inline, dict):
        size = base64_bytes(inline.get("data"))
        if size is None:
            raise Refused(400, "Invalid value at 'inline_data.data' (TYPE_BYTES), Base64 failed")
        mime = get(inline, "mimeType")
        if not mime:
            raise Refused(400, "Unable to process inline data: no mime type")
        return text, Attached(str(mime), size)
    file = get(part, "fileData")
    if isinstance(file, dict):
        found = lookup(str(get(file, "fileUri") or ""))
        mime = str(get(file, "mimeType") or found.mime_type)
        return text, Attached(mime, found.size_bytes, found.uri)
    result = get(part, "functionResponse")
    if isinstance(result, dict):
        return _result(get(result, "response")), None
    return text, None


def _result(response: Any) -> str:
    """Return the result of a function: its text if it is one, otherwise its JSON."""
    values = list(response.values()) if isinstance(response, dict) else [response]
    value = values[0] if len(values) == 1 else response
    return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()


def _with_config(model: str, config: Json, conversation: Conversation) -> ModelRequest:
    modalities = get(config, "responseModalities") or []
    if not isinstance(modalities, list):
        raise Refused(400, "Invalid value at 'generation_config.response_modalities'")
    kinds = [str(item).upper() for item in modalities]
    wants_picture = "IMAGE" in kinds or (not modalities and "image" in model)
    mime = get(config, "responseMimeType")
    schema = get(config, "responseJsonSchema") or get(config, "responseSchema")
    if not isinstance(schema, dict) or mime not in ("application/json", "text/x.enum"):
        schema = None
    most = get(config, "maxOutputTokens")
    thinking = get(config, "thinkingConfig")
    thinking = thinking if isinstance(thinking, dict) else {}
    budget = get(thinking, "thinkingBudget")
    thinks = bool(budget) or (budget is None and gemini_thinks(model))
    parsed = conversation.request(
        model,
        schema=schema,
        fences=False,
        plain_enum=mime == "text/x.enum",
        wants_sound="AUDIO" in kinds,
        max_output_tokens=most if isinstance(most, int) and most > 0 else None,
        thinks=thinks,
        shows_thoughts=thinks and get(thinking, "includeThoughts") is True,
    )
    if has_enum(schema):
        return replace(parsed, kind="classifier")
    return replace(parsed, kind="image_generation", wants_picture=True) if wants_picture else parsed


def has_enum(schema: Any) -> bool:
    """Return whether a schema has an enum at any depth."""
    if isinstance(schema, dict):
        if isinstance(schema.get("enum"), list):
            return True
        return any(has_enum(value) for value in schema.values())
    return isinstance(schema, list) and any(has_enum(value) for value in schema)


RATE_HZ = 24_000
MIME_TYPE = f"audio/L16;codec=pcm;rate={RATE_HZ}"
DURATION_MS = 400
TOKENS = 25 * DURATION_MS // 1000  # Gemini counts 25 a second


def hum(of: str) -> bytes:
    """Return a tone whose pitch depends on the text."""
    pitch_hz = 220 + sha256(of.encode("utf-8", "replace")).digest()[0]
    step = math.tau * pitch_hz / RATE_HZ
    samples = array(
        "h",
        (round(8000 * math.sin(step * index)) for index in range(RATE_HZ * DURATION_MS // 1000)),
    )
    if byteorder == "big":
        samples.byteswap()
    return samples.tobytes()


Framing = Literal["whole", "sse", "array"]
_GARBAGE = b'{"candidates": [{"content": {"parts": [{"te'
_FRAMED: dict[Framing, Callable[[int, bytes], bytes]] = {
    "whole": lambda index, data: data,
    "sse": lambda index, data: b"data: " + data + b"\r\n\r\n",
    "array": lambda index, data: (b"[" if index == 0 else b",\r\n") + data,
}


def media_part(mime_type: str, data: bytes) -> Json:
    return {"inlineData": {"mimeType": mime_type, "data": b64encode(data).decode()}}


class _GeminiAnswer:
    """An answer in the form of this API: parts with their tokens, and its finish. The bound of the
    output includes the thoughts."""

    def __init__(self, parsed: ModelRequest, behaviour: Behaviour) -> None:
        self._parsed = parsed
        self._id = new_response_id()
        most = parsed.max_output_tokens
        self.thoughts = thoughts_of(parsed) if most is None else min(thoughts_of(parsed), most)
        self._left = None if most is None else most - self.thoughts
        self._finish = "STOP"
        self._parts: list[tuple[Json, int]] = []
        if parsed.wants_picture:
            self._picture(behaviour)
        elif parsed.called:
            self._calls()
        elif parsed.wants_sound:
            self._parts = [(media_part(MIME_TYPE, hum(parsed.prompt)), TOKENS)]
        else:
            text = answer_text(parsed, behaviour)
            pieces, cut_short = cut(text, self._left, behaviour.chunks)
            self._finish = "MAX_TOKENS" if cut_short else self._finish
            self._parts = [({"text": piece}, tokens) for piece, tokens in pieces if tokens]
        if parsed.shows_thoughts:
            words = THOUGHTS.split()[: self.thoughts]
            self._parts.insert(0, ({"text": " ".join(words), "thought": True}, 0))

    def bodies(self, framing: Framing, fault: Fault | None) -> list[tuple[Json, int]]:
        """Return one body for each step, with the tokens sent by then."""
        tokens = sum(tokens for _, tokens in self._parts)
        if fault is not None and fault.fault in BODIES:
            written = tokens if fault.fault is FaultName.UNKNOWN_FINISH else 0
            return [(self._faulty(fault, written), written + self.thoughts)]
        if framing == "whole" or not self._parts:
            whole = self._whole(self._finish, tokens)
            return [({}, 0)] * (len(self._parts) - 1) + [(whole, tokens + self.thoughts)]
        sent = 0
        bodies = []
        for index, (part, part_tokens) in enumerate(self._parts):
            sent += part_tokens
            last = index == len(self._parts) - 1
            body = self._candidate(sent, [part], self._finish if last else None)
            bodies.append((body, sent + self.thoughts))
        return bodies

    def _whole(self, finish: str, tokens: int) -> Json:
        """Return the answer as one response: thoughts, the text of all chunks together, then the
        rest."""
        parts = [part for part, _ in self._parts if "thought" in part]
        text = "".join(part["text"] for part, _ in self._parts if part.keys() == {"text"})
        parts += [{"text": text}] if text else []
        parts += [part for part, _ in self._parts if "text" not in part]
        return self._candidate(tokens, parts, finish)

    def _faulty(self, fault: Fault, tokens: int) -> Json:
        match fault.fault:
            case FaultName.BLOCKED_PROMPT:
                return self._body(0, promptFeedback={"blockReason": fault.reason})
            case FaultName.UNKNOWN_FINISH:
                return self._whole("SOMETHING_NEW", tokens)
            case FaultName.SAFETY | FaultName.NO_IMAGE:
                return self._candidate(0, None, fault.fault.value.upper())
        return self._body(0, candidates=[])

    def _candidate(self, tokens: int, parts: list[Json] | None, finish: str | None) -> Json:
        """Return a whole response, or a chunk of a stream; `parts` of None mean no content. If the
        thoughts have used the whole bound, the content has only a role."""
        candidate: Json = {"index": 0}
        if parts is not None:
            candidate["content"] = {**({"parts": parts} if parts else {}), "role": "model"}
        if finish is not None:
            candidate["finishReason"] = finish
        return self._body(tokens, candidates=[candidate])

    def _body(self, output_tokens: int, **first: Any) -> Json:
        parsed = self._parsed
        usage: Json = {
            "promptTokenCount": parsed.input_tokens,
            "totalTokenCount": parsed.input_tokens + output_tokens + self.thoughts,
            "promptTokensDetails": _modalities(parsed),
        }
        if any(_is_elsewhere(file) for file in parsed.attached):
            usage = {}  # for these Google reports no input, and no total
        usage["serviceTier"] = parsed.tier or "standard"
        if parsed.cached_tokens:
            usage["cachedContentTokenCount"] = parsed.cached_tokens
        if output_tokens:
            usage["candidatesTokenCount"] = output_tokens
        if parsed.thinks:
            usage["thoughtsTokenCount"] = self.thoughts
        return {
            **first,
            "usageMetadata": usage,
            "modelVersion": parsed.model,
            "responseId": self._id,
        }

    def _picture(self, behaviour: Behaviour) -> None:
        parsed = self._parsed
        text = f"Here is an emulated picture for “{quoted(parsed.last_text)}”."
        if parsed.attached:
            text += f" With it came {listed(parsed.attached)}."
        png = draw(parsed.prompt, behaviour.image_size)
        self._parts = [
            ({"text": text}, len(text.split())),
            (media_part("image/png", png), OUTPUT_PICTURE_TOKENS),
        ]

    def _calls(self) -> None:
        """Add function calls, each whole, as many as the bound allows."""
        left = self._left
        for tool in self._parsed.called:
            given = arguments(self._parsed, tool.schema)
            tokens = len(orjson.dumps(given).split()) + 1
            if left is not None and tokens > left:
                self._finish = "MAX_TOKENS"
                return
            left = None if left is None else left - tokens
            part: Json = {"functionCall": {"name": tool.name, "args": given}}
            if self._parsed.thinks and not self._parts:  # a model that thinks signs its first call
                part["thoughtSignature"] = SIGNATURE
            self._parts.append((part, tokens))


def _is_elsewhere(file: Attached) -> bool:
    """Return whether a file is not at Google, which fetches it from its address."""
    return file.size_bytes is None and (file.uri or "").startswith(("https://", "http://"))


def _modalities(parsed: ModelRequest) -> list[Json]:
    counted = parsed.input_by_modality
    return [{"modality": name, "tokenCount": count} for name, count in counted.items()]


def _script(
    parsed: ModelRequest, behaviour: Behaviour, framing: Framing, fault: Fault | None
) -> AnswerScript:
    frame = _FRAMED[framing]
    answer = _GeminiAnswer(parsed, behaviour)
    steps = [
        ScriptStep(frame(index, orjson.dumps(body)), output_tokens)
        for index, (body, output_tokens) in enumerate(answer.bodies(framing, fault))
    ]
    if framing == "array":
        steps[-1] = ScriptStep(steps[-1].data + b"]", steps[-1].output_tokens)
    return AnswerScript(
        steps,
        broken=lambda index, fault: frame(index, broken_object(GEMINI, _GARBAGE, fault)),
        thoughts_tokens=answer.thoughts,
        headers={"x-gemini-service-tier": parsed.tier or "standard"},
    )


VERSIONS = ("v1", "v1alpha", "v1beta")
MODELS = {
    "gemini-2.5-flash": ("generateContent", "countTokens"),
    "gemini-2.5-flash-image": ("generateContent", "countTokens"),
    "gemini-2.5-flash-lite": ("generateContent", "countTokens"),
    "gemini-2.5-pro": ("generateContent", "countTokens"),
    "gemini-embedding-001": ("embedContent", "countTokens"),
}
EMBEDDING_DIMENSIONS = 768
_REPORTS = "gemini-embedding-2"  # the only embedding model whose answers have a usage


async def route(served: Served) -> web.StreamResponse:
    request = served.request
    steps = request.path.strip("/").split("/")
    upload = steps[0] == "upload"
    if steps[0] in ("upload", "download"):
        steps = steps[1:]
    if steps == [""]:
        return web.Response(text="Tidegate's emulator of Gemini's API.\n", headers=EMULATED)
    if len(steps) < 2 or steps[0] not in VERSIONS:
        raise Refused(404, f"Not found: {request.path}")
    if upload:
        return await _upload(served)
    check_key(request)
    files = served.state.files
    match request.method, steps[1:]:
        case "POST", ["models", call] if ":" in call:
            model, _, action = call.rpartition(":")
            return await _act(served, model, action)
        case "GET", ["models"]:
            return await served.other("models", "", _list_models)
        case _, ["models", model, "operations", *rest]:
            return await gemini_stored.operations(served, model, "/".join(rest))
        case "GET", ["models", name]:
            return await served.other("models", name, lambda: _checked_model(served, name))
        case "GET", ["files"]:
            return await served.other("files", "", lambda: _list_files(served))
        case _, ["interactions", *rest]:
            return await gemini_stored.interactions(served, rest)
        case _, ["fileSearchStores", *rest]:
            return await gemini_stored.file_search_stores(served, rest)
        case _, ["cachedContents", *rest]:
            return await gemini_stored.caches(served, rest)
        case _, ["batches", *rest]:
            return await gemini_stored.batches(served, rest)
        case "GET", ["files", name] if name.endswith(":download"):
            name = name.removesuffix(":download")
            found = await gemini_stored.video(served, name)
            return found or await gemini_stored.download(served, name)
        case "GET", ["files", name]:
            return await served.other("files", "", lambda: _show_file(served, name))
        case "DELETE", ["files", name]:
            return await served.other("files", "", lambda: files.delete(f"files/{name}"))
    raise served.not_found()


async def _act(served: Served, model: str, action: str) -> web.StreamResponse:
    _check_model(served.behaviour, model)
    body = await served.json(_BAD_BODY)
    match action:
        case "generateContent":
            return await _generate(served, model, body, "whole")
        case "streamGenerateContent":
            framing: Framing = "sse" if served.request.query.get("alt") == "sse" else "array"
            return await _generate(served, model, body, framing)
        case "batchGenerateContent":
            work = partial(_line_work, served)
            return await gemini_stored.create_batch(served, model, body, work)
        case "asyncBatchEmbedContent":
            return await gemini_stored.create_batch(served, model, body, _embedding_work)
        case "predictLongRunning":
            return await gemini_stored.begin_video(served, model, body)
        case "predict":
            return await served.other("predict", model, lambda: _drawn(body))
        case "countTokens":
            return await served.other("count", model, lambda: _count(served, model, body))
        case "embedContent":
            return await _embed(served, model, [body], {"embedding": _embedding(body)})
        case "batchEmbedContents":
            bodies = _bodies_of(body)
            return await _embed(
                served, model, bodies, {"embeddings": list(map(_embedding, bodies))}
            )
    raise Refused(404, f"Not found: {action}")


async def _generate(served: Served, model: str, body: Any, framing: Framing) -> web.StreamResponse:
    lookup = served.state.files.look_up
    parsed = served.cached(read_generate(model, body, lookup, streamed=framing != "whole"))
    parsed = served.in_tier(parsed, get(body, "serviceTier"))
    if (name := get(body, "cachedContent")) is not None:
        stored = gemini_stored.find_cache(served, str(name))["usageMetadata"]["totalTokenCount"]
        counted = {**parsed.input_by_modality, "TEXT": parsed.input_tokens + stored}
        parsed = replace(parsed, input_by_modality=counted, cached_tokens=stored)
    scripted = partial(_script, parsed, served.behaviour, framing)
    kind = GEMINI.stream_type if framing == "sse" else GEMINI.json_type
    return await served.generate(parsed, scripted, kind)


def _line_work(served: Served, model: str, body: Any) -> LineWork:
    """Return the work of a batch's line. Raises Refused."""
    parsed = read_generate(model, body, served.state.files.look_up)
    return line_work(parsed, partial(_script, parsed, served.behaviour, "whole"))


def _embedding_work(model: str, body: Any) -> LineWork:
    """Return the work of a line of an embedding batch. Raises Refused."""
    answer, texts = _embedding(body), _text_to_embed(body)
    tokens = max(1, math.ceil(len(texts) / 4))

    def answered() -> LineAnswer:
        return LineAnswer({"embedding": answer, "tokenCount": str(tokens)}, 0, 0)

    return LineWork("text_only", model, texts, tokens, answered, "embed")


def _drawn(body: Any) -> Json:
    """Return pictures of Imagen. Raises Refused."""
    if not isinstance(body, dict) or not isinstance(body.get("instances"), list):
        raise Refused(400, "Invalid JSON payload received. `instances` must be set.")
    count = gemini_stored.parameters_of(body).get("sampleCount", 4)
    if not isinstance(count, int):
        raise Refused(400, "Invalid JSON payload received. `sampleCount` must be a number.")
    picture = b64encode(draw(str(body["instances"]), 64)).decode()
    one = {"mimeType": "image/png", "bytesBase64Encoded": picture}
    return {"predictions": [one] * count}


def _show_file(served: Served, name: str) -> Json:
    results = gemini_stored.results_file(served, name)
    return results or served.state.files.find(f"files/{name}").to_json()


def _check_model(behaviour: Behaviour, model: str) -> None:
    if behaviour.strict_models and model not in MODELS:
        raise Refused(
            404,
            f"models/{model} is not found for API version v1beta, or is not supported for "
            "generateContent. Call ListModels to see the list of available models.",
        )


def _checked_model(served: Served, name: str) -> Json:
    _check_model(served.behaviour, name)
    return _model(name)


def _count(served: Served, model: str, body: Any) -> Json:
    inner = get(body, "generateContentRequest") if isinstance(body, dict) else None
    parsed = read_generate(model, inner or body, served.state.files.look_up)
    return {"totalTokens": parsed.input_tokens, "promptTokensDetails": _modalities(parsed)}


def _list_files(served: Served) -> Json:
    query = served.request.query
    size = get(query, "pageSize") or "10"
    if not size.isdecimal() or not 1 <= int(size) <= 100:
        raise Refused(400, "* ListFilesRequest.page_size: must be between 1 and 100")
    found, next_token = served.state.files.page(int(size), get(query, "pageToken") or "")
    body: Json = {"files": [file.to_json() for file in found]}
    return body | ({"nextPageToken": next_token} if next_token else {})


async def _upload(served: Served) -> web.StreamResponse:
    request = served.request
    if request.method not in ("POST", "PUT"):
        raise Refused(405, f"Not for uploads: {request.method}")
    upload_id = request.query.get("upload_id")
    if upload_id is None:
        key = check_key(request)
        return await served.other("upload", "", lambda: _upload_start(served, key))
    return await served.other("upload", "", lambda: _upload_piece(served, upload_id))


async def _upload_start(served: Served, key: str) -> web.Response:
    request = served.request
    body = await served.json(_BAD_BODY) if await request.read() else {}
    if (into := request.path.rpartition("/")[2]).endswith(":uploadToFileSearchStore"):
        gemini_stored.find_store(served, into.partition(":")[0])
        body = {"file": body}
    upload_id = served.state.files.begin(request.headers, body)
    # The real upload URL contains the key too: it must never be logged.
    url = f"http://{request.host}{request.path}?key={key}&upload_id={upload_id}"
    headers = {
        "X-Goog-Upload-Status": "active",
        "X-Goog-Upload-URL": f"{url}&upload_protocol=resumable",
    }
    return web.Response(text="", headers=EMULATED | headers)


async def _upload_piece(served: Served, upload_id: str) -> web.Response:
    request, wait_ms = served.request, served.behaviour.file_processing_ms
    pieces = request.content.iter_any()
    file = await served.state.files.receive(upload_id, request.headers, pieces, wait_ms)
    if file is None:
        return json_response(200, {}, {"X-Goog-Upload-Status": "active"})
    made: Json = {"file": file.to_json()}
    if (into := request.path.rpartition("/")[2]).endswith(":uploadToFileSearchStore"):
        made = gemini_stored.index(served, into.partition(":")[0], "upload/", file)
    return json_response(200, made, {"X-Goog-Upload-Status": "final"})


def _model(name: str) -> Json:
    return {
        "name": f"models/{name}",
        "version": "emulated",
        "displayName": f"{name} (emulated)",
        "description": "Answered by Tidegate's built-in emulator.",
        "inputTokenLimit": 1_048_576,
        "outputTokenLimit": 65_536,
        "supportedGenerationMethods": list(MODELS.get(name, ("generateContent", "countTokens"))),
    }


def _list_models() -> Json:
    return {"models": [_model(name) for name in MODELS]}


def _bodies_of(body: Any) -> list[Any]:
    requests = get(body, "requests") if isinstance(body, dict) else None
    if not isinstance(requests, list) or not requests:
        raise Refused(400, "* BatchEmbedContentsRequest.requests: must not be empty")
    return requests


async def _embed(
    served: Served, model: str, bodies: Sequence[Any], answer: Json
) -> web.StreamResponse:
    """Serve an embedding call and charge it; only some models report the usage."""
    tokens = sum(max(1, math.ceil(len(_text_to_embed(body)) / 4)) for body in bodies)
    if model == _REPORTS:
        details = [{"modality": "TEXT", "tokenCount": tokens}]
        answer["usageMetadata"] = {"promptTokenCount": tokens, "promptTokenDetails": details}
    return await served.other("embed", model, lambda: answer, input_tokens=tokens)


def _text_to_embed(body: Any) -> str:
    """Return the text of a body. Raises Refused."""
    content = get(body, "content") if isinstance(body, dict) else None
    parts = content.get("parts") if isinstance(content, dict) else None
    if not isinstance(parts, list):
        raise Refused(400, "* EmbedContentRequest.content: content is not specified")
    return "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _embedding(body: Any) -> Json:
    text = _text_to_embed(body)
    wanted = get(body, "outputDimensionality")
    config = get(body, "embedContentConfig")
    if wanted is None and isinstance(config, dict):
        wanted = get(config, "outputDimensionality")
    size = wanted if isinstance(wanted, int) and 1 <= wanted <= 3072 else EMBEDDING_DIMENSIONS
    return {"values": embedding(text, size)}
