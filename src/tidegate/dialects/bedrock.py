"""Bedrock's dialect: Converse and InvokeModel, whole and as streams of AWS's framing. Pure.

    https://docs.aws.amazon.com/bedrock/latest/APIReference/API_Operations_Amazon_Bedrock_Runtime.html

The model is in the path. Converse has one form for all models; InvokeModel uses the form of the
model's maker, whose bounds and usage are read where they are known. A stream has AWS's framing,
which `record` reads as events of text; its bytes are forwarded unchanged.

Invariant: the region, the account and the signature of a client are never forwarded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set, Sized
from functools import partial
from typing import Any

import orjson

from tidegate.admission.estimator import USUAL_RULES, Rules
from tidegate.call import UNKNOWN_USAGE, Usage, UsageDetails
from tidegate.dialects import anthropic
from tidegate.dialects.answers import (
    PARSED_BYTES,
    count_of,
    object_of,
    objects_in,
    part_of,
    short_text,
    whole_object,
    with_tier,
)
from tidegate.dialects.headers import OPTIMIZED
from tidegate.dialects.parsing import NOTHING_SHORTENED
from tidegate.dialects.requests import is_hosted_tool, request_facts
from tidegate.dialects.spec import (
    AnswerFacts,
    Dialect,
    DialectSpec,
    Endpoint,
    ErrorAnswer,
    Headers,
    JsonObject,
    ModelList,
    Operation,
    OutputEvents,
    RefusalFacts,
    RequestFacts,
)
from tidegate.errors import TidegateError
from tidegate.prices.rates import STANDARD_TIERS
from tidegate.record import EVENT_STREAM, frame, whole_frames

# A model's id, or the ARN of a model, a profile or a prompt; none begins with a dot.
_PATH = re.compile(
    r"/model/(?P<model>[A-Za-z0-9][\w.\-:/]{0,2047})"
    r"/(?P<do>converse|converse-stream|invoke|invoke-with-response-stream|count-tokens)",
    re.ASCII,
)


def endpoint_of(method: str, path: str) -> Endpoint | None:
    if method != "POST" or (named := _PATH.fullmatch(path)) is None or ".." in path:
        return None
    do = named["do"]
    operation = Operation.COUNT if do == "count-tokens" else Operation.INFER
    path = f"/model/{{model}}/{do}"
    return Endpoint(Dialect.BEDROCK, operation, path, named["model"], do.endswith("-stream"))


def _recognizes(path: str, _headers: Set[bytes], _query: bytes) -> bool:
    return path.startswith("/model/")


# -- requests

_ANTHROPIC = re.compile(r"(?:^|[./])anthropic\.")
# Fields in which makers of models bound the output, besides Converse's.
_BOUNDS = (
    "max_tokens",
    "max_tokens_to_sample",
    "max_completion_tokens",
    "max_gen_len",
    "maxTokens",
)
_BOUNDS_WITHIN = (
    ("inferenceConfig", ("maxTokens", "max_new_tokens")),
    ("textGenerationConfig", ("maxTokenCount",)),
    ("additionalModelRequestFields", _BOUNDS),
)
_FILES = {"image": "image", "document": "application", "video": "video", "audio": "audio"}


def rules_of(model: str) -> Rules:
    """Return the token counts of files: for Claude's models those of Anthropic."""
    return anthropic.rules_of(model) if _ANTHROPIC.search(model) else USUAL_RULES


def facts_of(
    endpoint: Endpoint, body: Mapping[str, Any], whole: Mapping[str, Sized] = NOTHING_SHORTENED
) -> RequestFacts:
    """Return the facts of a request. Raises InvalidRequest."""
    is_converse = "/converse" in endpoint.path
    if endpoint.operation is Operation.COUNT:
        body, is_converse = part_of(part_of(body, "input"), "converse"), True
    converted = _as_others(body) if is_converse else dict(body)
    converted.pop("stream", None)  # the path decides that
    facts = request_facts(
        endpoint,
        converted,
        whole,
        rules_of=rules_of,
        is_hosted=_is_hosted,
        settings={"max_tokens": bound} if (bound := _bound(body)) else {},
    )
    facts.tier = _tier_of(body)
    return facts


def _bound(body: Mapping[str, Any]) -> int:
    """Return the largest bound that a request names; 0 if it names none."""
    places = [(body, _BOUNDS), *((part_of(body, one), names) for one, names in _BOUNDS_WITHIN)]
    named = [place.get(name) for place, names in places for name in names]
    return max((one for one in named if type(one) is int), default=0)


def _as_others(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a body of Converse with its files and tools in the form of other dialects."""
    converted = dict(body)
    turns = converted.pop("messages", None)
    converted["messages"] = [
        {**turn, "content": [_block(one) for one in objects_in(turn.get("content"))]}
        for turn in objects_in(turns)
    ]
    tools = part_of(converted, "toolConfig").get("tools")
    if type(tools) is list:
        converted["tools"] = tools
        del converted["toolConfig"]
    return converted


def _block(block: JsonObject) -> JsonObject:
    for kind, family in _FILES.items():
        file = part_of(block, kind)
        if not (source := part_of(file, "source")):
            continue
        mime = f"{family}/{short_text(file.get('format')) or 'unknown'}"
        if type(data := source.get("bytes")) is str:
            return {"type": kind, "media_type": mime, "data": data}
        if uri := part_of(source, "s3Location").get("uri"):
            return {"type": kind, "media_type": mime, "uri": uri}
        return {kind: source}  # a document of texts
    result = part_of(block, "toolResult")
    if type(content := result.get("content")) is list:
        return {"toolResult": {**result, "content": [_block(one) for one in objects_in(content)]}}
    return block


def _is_hosted(tool: JsonObject) -> bool:
    return "systemTool" in tool or is_hosted_tool(tool)


def _tier_of(raw: Mapping[str, Any]) -> str:
    """Return the processing tier that a request or its answer names; empty for the usual one.
    Latency that is optimized has a price of its own, and counts as a tier:
    https://docs.aws.amazon.com/bedrock/latest/userguide/latency-optimized-inference.html"""
    if part_of(raw, "performanceConfig").get("latency") == OPTIMIZED:
        return OPTIMIZED
    tier = part_of(raw, "serviceTier").get("type")
    named = tier.lower() if type(tier) is str and len(tier) <= 40 else ""
    return "" if named in STANDARD_TIERS or named == "reserved" else named


# -- answers

_METRICS = "amazon-bedrock-invocationMetrics"
_FINISHES = ("stopReason", "stop_reason", "completionReason", "finish_reason", "finishReason")
_INPUT = (
    *("inputTokens", "input_tokens", "inputTokenCount", "prompt_tokens", "prompt_token_count"),
    "inputTextTokenCount",
)
_OUTPUT = (
    *("outputTokens", "output_tokens", "outputTokenCount", "completion_tokens"),
    *("generation_token_count", "totalOutputTextTokenCount"),
)
_READ = ("cacheReadInputTokens", "cacheReadInputTokenCount", "cache_read_input_tokens")
_WRITTEN = ("cacheWriteInputTokens", "cacheWriteInputTokenCount", "cache_creation_input_tokens")
_COUNTS = {
    *(*_INPUT, *_OUTPUT, *_READ, *_WRITTEN),
    *("cacheDetails", "cache_creation", "prompt_tokens_details"),
}
# Headers of InvokeModel's answers, in any form.
_HEADERS = {
    b"x-amzn-bedrock-input-token-count": "inputTokenCount",
    b"x-amzn-bedrock-output-token-count": "outputTokenCount",
    b"x-amzn-bedrock-cache-read-input-token-count": "cacheReadInputTokenCount",
    b"x-amzn-bedrock-cache-write-input-token-count": "cacheWriteInputTokenCount",
}


def usage_of(raw: Mapping[str, Any]) -> Usage:
    """Return the usage that an answer reports; its input is in three parts. OpenAI's form, which
    some models use, includes cached tokens in the input."""
    fresh, made = count_of(raw, *_INPUT), count_of(raw, *_OUTPUT)
    cached, written = count_of(raw, *_READ), count_of(raw, *_WRITTEN) or 0
    if cached is None and "prompt_tokens" in raw:
        cached = count_of(part_of(raw, "prompt_tokens_details"), "cached_tokens")
        taken = fresh
    else:
        taken = None if fresh is None else fresh + written + (cached or 0)
    total = None if taken is None or made is None else taken + made
    details = UsageDetails(written) if written else None
    # Claude's own form in InvokeModel, and Converse's.
    own = part_of(raw, "cache_creation")
    split = {ttl: count_of(own, f"ephemeral_{ttl}_input_tokens") for ttl in ("5m", "1h")}
    for one in objects_in(raw.get("cacheDetails")):
        if (ttl := short_text(one.get("ttl"))) in split:
            split[ttl] = count_of(one, "inputTokens")
    if details is not None:
        details = UsageDetails(written, split["5m"] or None, split["1h"] or None)
    return Usage(taken, made, None, cached, total, details)


def answer_facts(
    answer: bytes,
    *,
    omitted: bool = False,
    cut: bool = False,
    parsed: JsonObject | None = None,
) -> AnswerFacts:
    """Return the facts of an answer, whole or as a stream's events of text."""
    if answer[:1] == b"{":
        whole = whole_object(answer, parsed)
        if whole is None and not (cut or omitted):
            whole = _long_object(answer)
        return _facts_in([whole or {}])
    return _facts_in(_events(answer), cut=cut)


def _long_object(answer: bytes) -> JsonObject | None:
    try:
        return object_of(orjson.loads(answer)) if len(answer) > PARSED_BYTES else None
    except orjson.JSONDecodeError:
        return None


def _events(stream: bytes) -> Iterator[JsonObject]:
    for line in stream.split(b"\n"):
        if line.startswith(b"data:"):
            try:
                yield object_of(orjson.loads(line[5:]))
            except orjson.JSONDecodeError:  # not a known form
                continue


def _facts_in(objects: Any, *, cut: bool = False) -> AnswerFacts:
    """Return the facts of an answer that consists of these objects: later values replace earlier
    ones. The output with which a message begins is not that of a whole answer."""
    counts: JsonObject = {}
    facts, tier = AnswerFacts(UNKNOWN_USAGE), ""
    for one in objects:
        message = part_of(one, "message")
        held = part_of(one, "metadata", "messageStop", "message", "delta") or one
        begun = part_of(message, "usage")
        if not cut:
            begun = {name: count for name, count in begun.items() if name != "output_tokens"}
        of_held = begun if held is message else part_of(held, "usage")
        for raw in (one, begun, of_held, part_of(one, "usage")):
            raw = anthropic.of_all_rounds(raw)
            for name in _COUNTS.intersection(raw):
                counts[name] = raw[name] or counts.get(name, raw[name])
        if metrics := part_of(one, _METRICS):
            counts |= metrics
        tier = _tier_of(held) or tier
        last = (objects_in(one.get("choices")) or objects_in(one.get("results")) or [{}])[-1]
        found = [place.get(name) for place in (held, one, last) for name in _FINISHES]
        facts.finish_reason = next(filter(None, map(short_text, found)), facts.finish_reason)
        facts.response_id = facts.response_id or short_text(message.get("id") or one.get("id"))
        version = message.get("model") or one.get("model")
        facts.model_version = facts.model_version or short_text(version)
        if tokens := count_of(last, "tokenCount"):  # Titan's
            counts["outputTokenCount"] = tokens
    facts.usage = with_tier(usage_of(counts), tier or None) if counts else UNKNOWN_USAGE
    return facts


def usage_in(headers: Headers) -> Usage:
    """Return the usage that the headers of an answer report."""
    counts = {
        _HEADERS[name]: int(value)
        for raw, value in headers
        if (name := raw.lower()) in _HEADERS and value.isdigit() and len(value) < 13
    }
    return usage_of(counts) if counts else UNKNOWN_USAGE


def add_output(event: JsonObject, output: OutputEvents) -> None:
    """Collect the visible output of an event, of Converse or in the form of a model's maker."""
    delta = part_of(part_of(event, "contentBlockDelta"), "delta")
    if delta:
        for one in (delta, part_of(delta, "reasoningContent"), part_of(delta, "toolUse")):
            output.texts += [one[name] for name in ("text", "input") if type(one.get(name)) is str]
        return
    for name in ("outputText", "generation", "completion"):
        if type(text := event.get(name)) is str:
            output.texts.append(text)
    for one in (*objects_in(event.get("outputs")), *objects_in(event.get("choices"))):
        for text in (one.get("text"), part_of(one, "delta").get("content")):
            if type(text) is str:
                output.texts.append(text)
    anthropic.add_output(event, output)


def image_count(_answer: bytes) -> int:
    """Return 0: images are not counted, since each maker of models has its own form."""
    return 0


# -- errors

_STATUSES = {
    "ThrottlingException": 429,
    "ModelNotReadyException": 429,
    "ServiceQuotaExceededException": 400,
    "ValidationException": 400,
    "AccessDeniedException": 403,
    "ResourceNotFoundException": 404,
    "ModelTimeoutException": 408,
    "ModelErrorException": 424,
    "ModelStreamErrorException": 424,
    "InternalServerException": 500,
    "ServiceUnavailableException": 503,
}
_OF_KEY = frozenset(
    (
        *("ExpiredTokenException", "UnrecognizedClientException", "InvalidSignatureException"),
        *("IncompleteSignatureException", "MissingAuthenticationTokenException"),
        *("InvalidClientTokenId", "IncompleteSignature", "SignatureDoesNotMatch"),
    )
)
_TOO_MUCH = frozenset(("ThrottlingException", "ServiceQuotaExceededException"))
_FAILED = frozenset(("ModelErrorException", "ModelStreamErrorException", "ModelTimeoutException"))
_UNPAID = re.compile(r"INVALID_PAYMENT_INSTRUMENT|valid payment instrument", re.IGNORECASE)
_A_DAY = re.compile(r"\b(?:tokens|requests) per day\b", re.IGNORECASE)
_UNIT = re.compile(r"\btoo many (?P<unit>tokens|requests)\b", re.IGNORECASE)
_PLEASE_WAIT = re.compile(
    _UNIT.pattern + r"(?: per day)?, please wait before trying again", re.IGNORECASE
)


def error_name(answer: ErrorAnswer) -> str:
    """Return the name of an exception; empty if the answer names none."""
    named = answer.headers.get("x-amzn-errortype") or answer.error.get("__type") or ""
    return str(named).partition(":")[0].rpartition("#")[2]


def refusal(answer: ErrorAnswer) -> RefusalFacts | None:
    """Classify a refusal; None if its wording is not of this dialect."""
    name = error_name(answer)
    if name in _OF_KEY:
        return RefusalFacts("key")
    if name == "AccessDeniedException" and _UNPAID.search(answer.message):
        return RefusalFacts("unpaid")
    # Refusals in other dialects have no exception name.
    if name in _TOO_MUCH or (answer.status == 429 and _PLEASE_WAIT.search(answer.message)):
        unit = _UNIT.search(answer.message)
        return RefusalFacts(
            "throttled",
            unit=unit["unit"].lower() if unit else None,
            per_day=bool(_A_DAY.search(answer.message)),
        )
    return RefusalFacts("fault") if name in _FAILED else None


_NAMES = {
    400: "ValidationException",
    401: "AccessDeniedException",
    403: "AccessDeniedException",
    404: "ResourceNotFoundException",
    408: "ModelTimeoutException",
    413: "ValidationException",
    429: "ThrottlingException",
    503: "ServiceUnavailableException",
    504: "ModelTimeoutException",
}


def problem(found: TidegateError, status: int, _retry_after_ms: int | None) -> JsonObject:
    """Return the body of an answer with an error of ours."""
    usual = "InternalServerException" if status >= 500 else "ValidationException"
    return {"__type": _NAMES.get(status, usual), "message": found.message_with_allowed}


def error_frame(body: JsonObject) -> bytes:
    """Return the message in which a stream reports an error of ours."""
    name = str(body["__type"])
    headers = {
        ":exception-type": name[:1].lower() + name[1:],
        ":content-type": "application/json",
        ":message-type": "exception",
    }
    return frame(headers, orjson.dumps({"message": body["message"]}))


# An event that SDKs do not know, and ignore.
_WAITING = {
    ":event-type": "waiting",
    ":content-type": "application/json",
    ":message-type": "event",
}


def _ends_whole(piece: bytes) -> bool:
    return whole_frames(piece) == len(piece)


BEDROCK = DialectSpec(
    name=Dialect.BEDROCK,
    endpoint_of=endpoint_of,
    recognizes=_recognizes,
    # Not at the host of the calls, which answers 404.
    models=ModelList(
        "/foundation-models", "modelSummaries", "modelId", lambda models: {"modelSummaries": models}
    ),
    rules_of=rules_of,
    request_facts=facts_of,
    answer_facts=answer_facts,
    add_output=add_output,
    image_count=image_count,
    statuses=_STATUSES,
    refusal=refusal,
    problem=problem,
    stream_type=EVENT_STREAM,
    ends_whole=_ends_whole,
    usage_in=usage_in,
    error_frame=error_frame,
    keep_alive=frame(_WAITING, b"{}"),
    wait_event=partial(frame, _WAITING),
)
