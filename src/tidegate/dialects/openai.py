"""OpenAI's dialect, with those of compatible providers: chat, responses, images, audio, reranking.

Fields that only Azure, OpenRouter, xAI, Perplexity, Mistral, Groq, DeepSeek, Moonshot, Together,
Alibaba or LiteLLM use are read too. Pure.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Set, Sized
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from math import ceil
from typing import Any

import orjson

from tidegate.admission.estimator import USUAL_RULES, Rules, Size
from tidegate.call import UNKNOWN_USAGE, Status, Usage, UsageDetails
from tidegate.dialects.answers import (
    HEAD_BYTES,
    LONGEST_READ_BYTES,
    AnswerForm,
    count_of,
    last_events,
    matched_text,
    object_facts,
    object_of,
    objects_in,
    part_of,
    positive_of,
    scanned_facts,
    short_text,
    tier_of,
    whole_object,
    with_searches,
    with_tier,
)
from tidegate.dialects.anthropic import rules_of as rules_of_claude
from tidegate.dialects.gemini import rules_of as rules_of_gemini
from tidegate.dialects.headers import used_up
from tidegate.dialects.interactions import end_of
from tidegate.dialects.parsing import LARGE_BYTES, NOTHING_SHORTENED
from tidegate.dialects.requests import request_facts as facts_of_request
from tidegate.dialects.resources import Act, Making, Reference, path_of, use_in
from tidegate.dialects.sandboxes import MADE_BY_OPENAI, items_in, references_in
from tidegate.dialects.spec import (
    AnswerFacts,
    Dialect,
    DialectSpec,
    Endpoint,
    ErrorAnswer,
    JsonObject,
    ModelList,
    OngoingWork,
    Operation,
    OutputEvents,
    RefusalFacts,
    RequestFacts,
    listed_models,
)
from tidegate.errors import (
    BudgetExceeded,
    LimitPaused,
    NotFound,
    TidegateError,
    Unauthenticated,
)
from tidegate.policy.access import OF_DEPLOYMENTS
from tidegate.record import TAIL_BYTES

_CALLS = {
    f"/v1{path}": Endpoint(Dialect.OPENAI, operation, path)
    for path, operation in (
        ("/chat/completions", Operation.INFER),
        ("/completions", Operation.INFER),
        ("/responses", Operation.INFER),
        ("/responses/compact", Operation.INFER),
        ("/decisions", Operation.INFER),  # answers to questions about an input, of one model
        ("/responses/input_tokens", Operation.COUNT),
        ("/embeddings", Operation.EMBED),
        ("/images/generations", Operation.IMAGES),
        ("/audio/speech", Operation.SPEAK),
        ("/moderations", Operation.MODERATE),
        ("/rerank", Operation.RERANK),  # that of Cohere, Jina and vLLM; OpenAI has none
    )
} | {
    f"/v1{path}": Endpoint(Dialect.OPENAI, operation, path, takes_form=True)
    for path, operation in (
        ("/images/edits", Operation.IMAGES),
        ("/images/variations", Operation.IMAGES),
        ("/audio/transcriptions", Operation.TRANSCRIBE),
        ("/audio/translations", Operation.TRANSCRIBE),
    )
}
# Calls whose model is optional: a response may take that of a saved prompt; otherwise the provider
# rejects the call.
_WITH_DEFAULT_MODEL = frozenset(
    (
        *("/images/generations", "/images/edits", "/images/variations"),
        *("/moderations", "/responses", "/responses/input_tokens"),
    )
)


def _recognizes(path: str, headers: Set[bytes], query: bytes) -> bool:
    return True  # the default, after all other dialects


_RESOURCES = (
    path_of("GET", "/v1/responses/{id}", "response", Act.READ),
    path_of("DELETE", "/v1/responses/{id}", "response", Act.DELETE),
    path_of("POST", "/v1/responses/{id}/cancel", "response", Act.CANCEL),
    path_of("GET", "/v1/responses/{id}/input_items", "response", Act.READ),
    path_of("POST", "/v1/conversations", "conversation", Act.CREATE),
    path_of("GET", "/v1/conversations/{id}", "conversation", Act.READ),
    path_of("POST", "/v1/conversations/{id}", "conversation", Act.CHANGE),
    path_of("DELETE", "/v1/conversations/{id}", "conversation", Act.DELETE),
    path_of("GET", "/v1/conversations/{id}/items", "conversation", Act.READ),
    path_of("POST", "/v1/conversations/{id}/items", "conversation", Act.CHANGE),
    path_of("GET", "/v1/conversations/{id}/items/{any}", "conversation", Act.READ),
    path_of("DELETE", "/v1/conversations/{id}/items/{any}", "conversation", Act.CHANGE),
    path_of("GET", "/v1/chat/deferred-completion/{id}", "deferred", Act.READ),
    path_of("GET", "/v1/chat/completions", "completion", Act.LIST),
    path_of("GET", "/v1/chat/completions/{id}", "completion", Act.READ),
    path_of("POST", "/v1/chat/completions/{id}", "completion", Act.CHANGE),
    path_of("DELETE", "/v1/chat/completions/{id}", "completion", Act.DELETE),
    path_of("GET", "/v1/chat/completions/{id}/messages", "completion", Act.READ),
    path_of("GET", "/v1/files", "file", Act.LIST),
    path_of("POST", "/v1/files", "file", Act.CREATE),
    path_of("GET", "/v1/files/{id}", "file", Act.READ),
    path_of("GET", "/v1/files/{id}/content", "file", Act.READ),
    path_of("DELETE", "/v1/files/{id}", "file", Act.DELETE),
    path_of("POST", "/v1/uploads", "upload", Act.CREATE),
    path_of("POST", "/v1/uploads/{id}/parts", "upload", Act.CHANGE),
    path_of(
        "POST", "/v1/uploads/{id}/complete", "upload", Act.CHANGE, Making("file", within="file")
    ),
    path_of("POST", "/v1/uploads/{id}/cancel", "upload", Act.CANCEL),
    # Created elsewhere: Tidegate's own batches are answered before, and no known call creates a
    # tuned model.
    path_of("GET", "/v1/batches/{id}", "batch", Act.READ),
    path_of("POST", "/v1/batches/{id}/cancel", "batch", Act.CANCEL),
    path_of("DELETE", r"/v1/models/(?P<id>\w[\w.:\-]{0,199})", "model", Act.DELETE),
)
_STREAMED = re.compile(r"/v1/files|/v1/uploads/[^/]+/parts")  # POST with a form of any length
# What follows here is not the id of a stored response.
_NO_RESPONSES = ("/v1/responses/input_tokens", "/v1/responses/compact")
_RESPONSE = Making("response", within="response")
_COMPLETION = Making("completion")
_DEFERRED = Making("deferred", "request_id")


def _completed(body: JsonObject) -> Status | None:
    """Return how a deferred completion of xAI's has ended; None while only its id is known."""
    return Status.SUCCEEDED if "choices" in body else None


# Paths of the SDK for Azure; those without a deployment are read as `/v1/`.
_DEPLOYMENT = re.compile(
    r"/openai/deployments/(?P<name>[\w\-][\w.\-]{0,199})(?P<below>/.+)", re.ASCII
)


def endpoint_of(method: str, path: str) -> Endpoint | None:
    """Return the endpoint of a request, None for an unknown path."""
    if method == "POST" and (named := _DEPLOYMENT.fullmatch(path)) is not None:
        call = _CALLS.get(f"/v1{named['below']}")
        known = call is not None and named["below"] in OF_DEPLOYMENTS
        return replace(call, model=named["name"]) if call is not None and known else None
    if method == "GET" and (listed := listed_models(Dialect.OPENAI, path, "/v1")) is not None:
        return listed
    use = None if path in _NO_RESPONSES else use_in(_RESOURCES, method, path)
    if use is None:
        return None
    below = path.removeprefix("/v1")
    streamed = method == "POST" and _STREAMED.fullmatch(path) is not None
    operation = Operation.UPLOAD if streamed else Operation.RESOURCE
    return Endpoint(Dialect.OPENAI, operation, below, resource=use)


_REFERRING = frozenset(("previous_response_id", "conversation"))
# Tools that read nothing at the provider by an id.
_OF_CLIENTS = ("function", "custom")


def references(body: Mapping[str, Any], raw: bytes) -> list[Reference]:
    """Return the resources that a request refers to; first some cheap checks, since nearly none
    does. body: empty for a message, or a body that is not parsed. Raises InvalidRequest."""
    has_all = len(raw) > LARGE_BYTES or raw.find(b"\\u00") >= 0
    has_fields = has_all or raw.find(b"file_id") >= 0 or raw.find(b'"container') >= 0
    is_call = "messages" in body or "input" in body
    if not has_fields and (not is_call or _has_tools_of_provider(body)):
        has_fields = raw.find(b"vector_store_id") >= 0 or raw.find(b"skill_id") >= 0
    has_parts = has_all or (
        raw.find(b'"id"') >= 0 if "messages" not in body else _names_audio(body["messages"])
    )
    if not has_fields and not has_parts and _REFERRING.isdisjoint(body):
        return []
    return references_in(body, raw, has_fields=has_fields, has_parts=has_parts)


def _has_tools_of_provider(body: Mapping[str, Any]) -> bool:
    tools = body.get("tools")
    types = [one.get("type") for one in tools if type(one) is dict] if type(tools) is list else ()
    return any(one not in _OF_CLIENTS for one in types)


def _names_audio(messages: Any) -> bool:
    return type(messages) is list and any(type(one) is dict and "audio" in one for one in messages)


def made_by(path: str, body: Mapping[str, Any]) -> Making | None:
    """Return what a call creates: a response is stored unless the request declines, a chat
    completion only if the request says so."""
    if path == "/responses":
        is_stored = body.get("store") is not False or body.get("background") is True
        return _RESPONSE if is_stored else None
    if path == "/chat/completions" and body.get("deferred") is True:
        return _DEFERRED
    return _COMPLETION if path == "/chat/completions" and body.get("store") is True else None


def request_facts(
    endpoint: Endpoint, body: Mapping[str, Any], whole: Mapping[str, Sized] = NOTHING_SHORTENED
) -> RequestFacts:
    """Return the facts of a request. Raises InvalidRequest."""
    is_response = endpoint.path == "/responses"
    if endpoint.operation is Operation.SPEAK:
        body = _as_stream(body)
    return facts_of_request(
        endpoint,
        body,
        whole,
        rules_of=rules_of,
        has_default_model=endpoint.path in _WITH_DEFAULT_MODEL,
        may_draw=is_response and _may_draw(body.get("tools")),
        hides_usage=_hides_usage(endpoint, body),
    )


def _as_stream(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the body of a request for speech with `stream` set, if it requests a stream by its own
    field."""
    return {**body, "stream": True} if body.get("stream_format") == "sse" else body


def _tiles(base: float, tile: float) -> Callable[[Size], float]:
    """Return a function of the tokens of a picture, fitted into 2,048 pixels and its shorter side
    to 768: `base`, plus `tile` for each 512-pixel tile."""

    def tokens(size: Size) -> float:
        width, height = size or (1024, 1024)
        scale = min(1.0, 2048 / max(width, height))
        scale = min(scale, 768 / min(width, height))
        return base + tile * ceil(width * scale / 512) * ceil(height * scale / 512)

    return tokens


def _patches(each: float) -> Callable[[Size], float]:
    """Return a function of the tokens of a picture: `each` for a 32-pixel patch, at most 1,536
    patches."""

    def tokens(size: Size) -> float:
        width, height = size or (1024, 1024)
        return each * min(1536, ceil(width / 32) * ceil(height / 32))

    return tokens


_RULES = replace(USUAL_RULES, picture=_tiles(85, 170), audio_second=10, call=8, tools=40)
# The first entry that a model's name contains applies.
_RULES_OF_MODELS = (
    ("gpt-4o-mini", replace(_RULES, picture=_tiles(2833, 5667))),
    ("o4-mini", replace(_RULES, picture=_patches(1.72))),
    ("gpt-4.1-mini", replace(_RULES, picture=_patches(1.62))),
    ("gpt-5-mini", replace(_RULES, picture=_patches(1.62))),
    ("gpt-4.1-nano", replace(_RULES, picture=_patches(2.46))),
    ("gpt-5-nano", replace(_RULES, picture=_patches(2.46))),
    # Models with public weights: the tokens that their own templates add to each call and to its
    # tools: github.com/openai/harmony; llama.com/docs, page "llama3_1"; on huggingface.co those of
    # DeepSeek-V3.2, Qwen3 and GLM-4.6.
    ("gpt-oss", replace(_RULES, call=65, tools=50)),
    ("llama", replace(_RULES, call=36)),
    ("deepseek", replace(_RULES, tools=300)),
    ("qwen", replace(_RULES, tools=120)),
    ("glm", replace(_RULES, tools=120)),
)
# Models that count as in their own provider's dialect, at any host.
_OTHER_PROVIDERS = (("claude", rules_of_claude), ("gemini", rules_of_gemini))


@lru_cache(maxsize=512)
def rules_of(model: str) -> Rules:
    """Return the token counts of a model's files and of the overhead of its calls;
    platform.openai.com/docs/guides, pages "images-vision" and "audio"."""
    name = model.lower()
    for other, rules_of_other in _OTHER_PROVIDERS:
        if other in name:
            return rules_of_other(name)
    return next((rules for part, rules in _RULES_OF_MODELS if part in name), _RULES)


def _may_draw(tools: Any) -> bool:
    """Return whether a response's model may call the tool that generates images."""
    return any(one.get("type") == "image_generation" for one in objects_in(tools))


def _hides_usage(endpoint: Endpoint, body: Mapping[str, Any]) -> bool:
    """Return whether a chat completion streams no usage unless it is requested. Options of a wrong
    type are left to the provider."""
    if endpoint.path not in ("/chat/completions", "/completions"):
        return False
    options = body.get("stream_options")
    if options is None:
        return True
    return isinstance(options, Mapping) and options.get("include_usage") in (None, False)


_MOST_ITEMS = 10_000
_MOST_SECONDS = 1_000_000
_MICROS = 1_000_000
_TICKS_A_MICRO = 10_000  # xAI's ticks: 10^10 are a dollar
_MOST_DOLLARS = 1_000_000
_MOST_TICKS = _MOST_DOLLARS * _MICROS * _TICKS_A_MICRO
# Fields beside the token counts: an answer with one of these is read further.
_BESIDE_TOKENS = frozenset(
    (
        *("cost", "cost_in_usd_ticks", "server_tool_use", "server_tool_use_details"),
        *("server_side_tool_usage_details", "num_search_queries", "num_sources_used"),
        "cache_creation_input_tokens",
    )
)
_DETAILS = frozenset(
    (
        *("completion_tokens_details", "output_tokens_details"),
        *("prompt_tokens_details", "input_tokens_details", "input_token_details"),
    )
)
_CACHE_WRITES = ("cache_write_tokens", "cache_creation_tokens", "cache_creation_input_tokens")
_PARTS = ("audio_tokens", "image_tokens", "video_tokens", *_CACHE_WRITES)


def usage_of(raw: Mapping[str, Any]) -> Usage:
    """Return the usage that an answer reports. If its parts do not add up to its total, the total
    counts."""
    if raw.get("type") == "duration":  # a transcription that is charged by the minute
        return _of_duration(raw.get("seconds"))
    input_tokens = count_of(raw, "prompt_tokens", "input_tokens")
    output_tokens = count_of(raw, "completion_tokens", "output_tokens")
    total = count_of(raw, "total_tokens")
    thoughts = cached = None
    input_details: JsonObject = {}
    output_details: JsonObject = {}
    if not _DETAILS.isdisjoint(raw):
        output_details = part_of(raw, "completion_tokens_details", "output_tokens_details")
        thoughts = count_of(output_details, "reasoning_tokens") if output_details else None
        input_details = part_of(
            raw, "prompt_tokens_details", "input_tokens_details", "input_token_details"
        )
        cached = count_of(input_details, "cached_tokens") if input_details else None
    if cached is None:  # names of Moonshot and Together, Mistral, and DeepSeek
        cached = count_of(raw, "cached_tokens", "num_cached_tokens", "prompt_cache_hit_tokens")
    details = _usage_details(raw, input_details, output_details)
    if seconds := positive_of(raw, "prompt_audio_seconds"):  # Mistral's
        details = replace(details or UsageDetails(), input_audio_seconds=seconds)
    if (
        input_tokens is not None
        and total is not None
        and total > input_tokens + (output_tokens or 0)
    ):
        if output_tokens is not None and "prompt_audio_seconds" in raw:
            # Mistral's audio input, which has no count of its own.
            audio = total - output_tokens - input_tokens
            details = replace(details or UsageDetails(), input_audio_tokens=audio)
            input_tokens = total - output_tokens
        else:
            # All of an embedding's input; xAI excludes thoughts from the output, and Gemini reports
            # none in OpenAI's dialect.
            if thoughts is None and output_tokens is not None:
                thoughts = total - input_tokens - output_tokens
            output_tokens = total - input_tokens
    elif output_tokens is None and input_tokens is not None and total is not None:
        output_tokens = 0
    if output_tokens is not None and thoughts is not None:
        # The output includes the thoughts; in `Usage` they are separate.
        thoughts = min(thoughts, output_tokens)
        output_tokens -= thoughts
    usage = Usage(input_tokens, output_tokens, thoughts, cached, total, details)
    return with_tier(usage, tier_of(raw)) if "service_tier" in raw else usage


def _of_duration(seconds: Any) -> Usage:
    """Return the usage of a recording of so many seconds."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return UNKNOWN_USAGE
    if not 0 < seconds <= _MOST_SECONDS:  # also false for NaN
        return UNKNOWN_USAGE
    return Usage(details=UsageDetails(input_audio_seconds=ceil(seconds)))


def _usage_of_object(usage: Usage, whole: JsonObject) -> Usage:
    """Return the usage of a whole answer, with figures outside of its usage object: the length of a
    transcription, the searches of a rerank."""
    if whole.get("object") == "list":
        return _of_list(usage)
    if whole.get("object") is not None or "choices" in whole:
        return usage
    if usage == UNKNOWN_USAGE and type(whole.get("text")) is str and "duration" in whole:
        return _of_duration(whole["duration"])
    if type(whole.get("results")) is not list:
        return usage
    usage = _of_list(usage)
    billed = part_of(part_of(whole, "meta"), "billed_units")  # Cohere's
    searches = positive_of(billed, "search_units") or positive_of(billed, "searches")
    return with_searches(usage, searches) if searches else usage


def _of_list(usage: Usage) -> Usage:
    """Return the usage of embeddings or of a rerank: all of the tokens are input. Voyage reports
    the total alone."""
    taken = usage.total_tokens if usage.input_tokens is None else usage.input_tokens
    if taken is None or usage.output_tokens is not None:
        return usage
    return replace(usage, input_tokens=taken, output_tokens=0)


def _usage_details(
    raw: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> UsageDetails | None:
    """Return the details of a usage. `inputs` and `outputs` are the details of its input and its
    output."""
    has_more = not _BESIDE_TOKENS.isdisjoint(raw)
    if not (has_more or any(map(inputs.get, _PARTS)) or any(map(outputs.get, _PARTS))):
        return None  # the usual case
    written = positive_of(inputs, *_CACHE_WRITES)
    parts = (*_by_modality(inputs), *_by_modality(outputs))
    searches = cost = None
    if has_more:
        written = written or positive_of(raw, "cache_creation_input_tokens")
        searches, cost = _searches(raw), _cost_micros(raw)
    if written or searches or cost is not None or any(parts):
        return UsageDetails(written, None, None, *parts, searches, cost)
    return None


def _by_modality(side: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    if not side:
        return None, None, None
    audio, image = positive_of(side, "audio_tokens"), positive_of(side, "image_tokens")
    return audio, image, positive_of(side, "video_tokens")


def _searches(raw: Mapping[str, Any]) -> int | None:
    for name in ("server_tool_use", "server_tool_use_details"):  # of LiteLLM, of OpenRouter
        if count := positive_of(part_of(raw, name), "web_search_requests"):
            return count
    used = part_of(raw, "server_side_tool_usage_details")  # xAI's
    count = sum(positive_of(used, name) or 0 for name in ("web_search_calls", "x_search_calls"))
    return count or positive_of(raw, "num_search_queries", "num_sources_used")


def _cost_micros(raw: Mapping[str, Any]) -> int | None:
    ticks = raw.get("cost_in_usd_ticks")
    if type(ticks) is int and 0 <= ticks <= _MOST_TICKS:
        return (ticks + _TICKS_A_MICRO // 2) // _TICKS_A_MICRO
    cost = raw.get("cost")
    if type(cost) is dict:  # Perplexity's
        cost = cost.get("total_cost")
    micros = _micros_of(cost)
    if micros is not None and raw.get("is_byok") is True:  # OpenRouter's fee alone, by an own key
        own = part_of(raw, "cost_details").get("upstream_inference_cost")
        micros += _micros_of(own) or 0
    return micros


def _micros_of(dollars: Any) -> int | None:
    if isinstance(dollars, bool) or not isinstance(dollars, int | float):
        return None
    if not 0 <= dollars <= _MOST_DOLLARS:  # also false for NaN
        return None
    return int(dollars * _MICROS + 0.5)


def _event_usage(event: JsonObject) -> JsonObject:
    """Return the usage of an event, with the tier that stands beside it."""
    response = part_of(event, "response")
    if found := part_of(event, "usage") or part_of(response, "usage"):
        tier = event.get("service_tier") or response.get("service_tier")
        return found if tier is None else {**found, "service_tier": tier}
    choices = event.get("choices")  # places of Groq and of Moonshot
    last = choices[-1] if type(choices) is list and choices else None
    return part_of(part_of(event, "x_groq"), "usage") or part_of(last, "usage")


_FORM = AnswerForm(
    usage="usage",
    identity="id",
    version="model",
    finish="finish_reason",
    choices="choices",
    usage_of=usage_of,
    event_usage=_event_usage,
)
_LAST_RESPONSES = 2
_LIST = re.compile(rb'\{\s*"object"\s*:\s*"list"')
_SEARCH_CALL = b'_search_call"'
_ENDED = ("completed", "incomplete", "failed", "cancelled")
_RESPONSE_STATUS = re.compile(rb'"status"\s*:\s*"(completed|incomplete|failed|cancelled)"')


def answer_facts(
    answer: bytes,
    *,
    omitted: bool = False,
    cut: bool = False,
    parsed: JsonObject | None = None,
) -> AnswerFacts:
    """Return the facts of a chat completion or a response, whole or as a stream."""
    if (whole := whole_object(answer, parsed)) is not None:
        facts = object_facts(_FORM, whole)
        facts.usage = with_tier(_usage_of_object(facts.usage, whole), tier_of(whole))
        return _response_facts(facts.usage, whole) if whole.get("object") == "response" else facts
    facts = scanned_facts(_FORM, answer, omitted=omitted, cut=cut)
    if ended := _end_of_response(answer, omitted):
        return _response_facts(facts.usage, ended)
    if _LIST.match(answer):
        facts.usage = _of_list(facts.usage)
    elif answer.startswith(b"{"):
        if answer.find(_SEARCH_CALL) >= 0 and len(answer) <= LONGEST_READ_BYTES:
            # A response that is too long to parse for all facts, for example with images.
            with suppress(orjson.JSONDecodeError):  # cut off
                facts.usage = _with_searches(facts.usage, orjson.loads(answer))
        if facts.finish_reason is None:
            facts.finish_reason = matched_text(_RESPONSE_STATUS.search(answer, 0, HEAD_BYTES))
    return facts


def _response_facts(usage: Usage, response: JsonObject) -> AnswerFacts:
    status = response.get("status")
    reason = part_of(response, "incomplete_details").get("reason")
    return AnswerFacts(
        _with_searches(usage, response),
        short_text((reason or status) if status in _ENDED else None),
        short_text(response.get("id")),
        short_text(response.get("model")),
        items=items_in(response) if response.get("store") is not False else (),
    )


def _end_of_response(answer: bytes, omitted: bool) -> JsonObject | None:
    """Return the response that the last event of its stream repeats."""
    if answer.find(b'"response.', 0, HEAD_BYTES) < 0:
        return None
    floor = max(0, answer.find(b"\n", len(answer) - TAIL_BYTES)) if omitted else 0
    for event in islice(last_events(answer, floor), _LAST_RESPONSES):
        response = part_of(event, "response")
        if response.get("status") in _ENDED:
            return response
    return None


def _with_searches(usage: Usage, response: Mapping[str, Any]) -> Usage:
    """Add to a usage the web searches that a response reports, or else shows among its items, and
    its searches of stored files."""
    reported = positive_of(part_of(part_of(response, "tool_usage"), "web_search"), "num_requests")
    items = response.get("output")
    first_items = items[:_MOST_ITEMS] if type(items) is list else []
    files = sum(
        type(item) is dict and item.get("type") == "file_search_call" for item in first_items
    )
    return with_searches(usage, reported or sum(map(_is_search, first_items)), files)


def _is_search(item: Any) -> bool:
    """Return whether an item is a web search: opening a page, or searching in it, is none."""
    if type(item) is not dict or item.get("type") != "web_search_call":
        return False
    action = item.get("action")
    return type(action) is not dict or action.get("type") in (None, "search")


# An image that a response made by calling a tool; one or two earlier events repeat it.
_CALLED_IMAGE = re.compile(
    rb'"id"\s*:\s*"([^"\\]{1,200})"\s*,\s*"type"\s*:\s*"image_generation_call"'
    rb'[^{}]{0,2000}?"result"\s*:\s*"[^"]'
)
_IMAGE = re.compile(rb'"b64_json"\s*:\s*"|"url"\s*:\s*"')


def image_count(answer: bytes) -> int:
    """Return how many images a whole answer holds."""
    if answer.find(b'"image_generation_call"') >= 0:
        return len(set(_CALLED_IMAGE.findall(answer)))
    return len(_IMAGE.findall(answer))


def add_output(event: JsonObject, output: OutputEvents) -> None:
    """Collect the visible output of an event."""
    if type(event.get("type")) is str and event["type"].startswith("response."):
        _add_response(event, output)
    else:
        _add_chat(event, output)


def _add_response(event: JsonObject, output: OutputEvents) -> None:
    if type(event.get("delta")) is str and event["type"] != "response.audio.delta":
        output.texts.append(event["delta"])
    elif event["type"].endswith(".done"):
        output.repeated += [
            event[name]
            for name in ("text", "arguments", "refusal", "input", "code")
            if type(event.get(name)) is str
        ]
    item = object_of(event.get("item"))
    if "partial_image_b64" in event or (item.get("result") and "image" in str(item.get("type"))):
        output.images.add(str(event.get("item_id") or item.get("id")))


def _add_chat(event: JsonObject, output: OutputEvents) -> None:
    if event.get("type") == "transcript.text.delta":
        output.texts += _strings(event.get("delta"))
    for choice in objects_in(event.get("choices")):
        if type(choice.get("text")) is str:
            output.texts.append(choice["text"])
        delta = object_of(choice.get("delta") or choice.get("message"))
        output.texts += _strings(delta.get("content"))
        output.texts += _strings(delta.get("refusal"))
        # Some servers send the same text under both names.
        output.texts += _strings(delta.get("reasoning_content")) or _strings(delta.get("reasoning"))
        calls = objects_in(delta.get("tool_calls"))
        for call in (*calls, {"function": delta.get("function_call")}):
            for part in (object_of(call.get("function")), object_of(call.get("custom"))):
                output.texts += [
                    part[name]
                    for name in ("name", "arguments", "input")
                    if type(part.get(name)) is str
                ]
        output.texts += _strings(object_of(delta.get("audio")).get("transcript"))
        output.unnamed_images += len(objects_in(delta.get("images")))
    if "b64_json" in event:
        output.images.add(str(event.get("output_index")))


def _strings(value: Any) -> list[str]:
    """Return the texts of a value: a string, or at some providers a list of objects with texts."""
    if type(value) is str:
        return [value]
    found: list[str] = []
    for part in objects_in(value):
        for name in ("text", "thinking"):
            found += _strings(part.get(name))
    return found


_UNPAID = frozenset(
    {
        "insufficient_quota",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "billing_hard_limit_reached",
        "billing_not_active",
        "blocked_api_access",  # Groq's spend limit
        "exceeded_current_quota_error",  # Moonshot's empty account
        "Arrearage",  # Alibaba's unpaid bill
    }
)
# Anchored at the start: a provider that repeats a client's text does so later.
_NO_CREDITS = re.compile(
    r"(?:your|the|this) [\w ]{0,60}doesn't have any credits|insufficient (?:credits|balance)|"
    r"your [\w ]{0,40}credits? (?:is|are|has been|have been) exhausted|"
    r"your team [\w -]{0,80}\b(?:has|have) (?:either )?used all available credits|"
    r"(?:your )?account (?:\S{1,100} ){0,2}is suspended,? (?:possibly )?due to|"
    r"key limit exceeded\b|(?:sorry, )?your account balance is insufficient|"
    r"[\w ,]{0,60}\byour account has an overdue balance",
    re.IGNORECASE,
)
_STATUSES_UNPAID = (402, 403, 412, 429)  # 412: Fireworks
# OpenRouter's balance is too low for the bound of this call, and may be enough for others.
_TOO_EXPENSIVE = re.compile(
    r"this request requires more credits, or fewer max_tokens.{0,200}\bcan only afford [1-9]|"
    r"prompt tokens limit exceeded: \d{1,12} > [1-9]",
    re.IGNORECASE,
)
# Alibaba's rate of tokens, with the code of an account without money.
_ALLOCATED = re.compile(r"(?:workspace )?allocated quota exceeded", re.IGNORECASE)
# DeepSeek's code is `invalid_request_error`: within a stream nothing shows the 402.
_NOTHING_ELSE = re.compile(r"\s*insufficient (?:credits|balance)[\s.!]*", re.IGNORECASE)
_DEAD_KEYS = frozenset({"invalid_api_key", "organization_restricted"})  # the latter is Groq's
_DEAD_KEY = re.compile(
    r"(?:incorrect|invalid) api key|access denied due to invalid subscription key", re.IGNORECASE
)
_TOO_LARGE = re.compile(r"\brequest too large\b", re.IGNORECASE)
_LIMIT_AND_REQUESTED = re.compile(
    r"\bLimit:? (\d{1,12}), (?:Used:? \d{1,12}, )?Requested:? (\d{1,12})"
)
# By the error's type, by the limit's name, and in Azure's wording.
_UNITS = ("tokens", "requests")
_BY_NAME = re.compile(r"\b(token|request)s? per (?:second|min|minute|hour|day)\b", re.IGNORECASE)
_BY_RATE = re.compile(r"\b(token|request|call) rate limit\b", re.IGNORECASE)
_BY_LETTERS = re.compile(r"\b[RT]P[SMD]\b")
_PER_DAY = re.compile(r"\b(?i:(?:token|request)s? per day|[RT]PD)\b")


_TOO_FAST = frozenset({"rate_limit_exceeded", "slow_down"})
_NO_FLEX = 498  # Groq's "flex tier capacity exceeded"; OpenAI's is a 429 "Resource Unavailable"


def refusal(answer: ErrorAnswer) -> RefusalFacts | None:
    """Classify a refusal; None if its wording is not of this dialect."""
    if answer.status == 429 and _ALLOCATED.match(answer.message):
        return RefusalFacts("throttled", unit="tokens")
    if answer.status == 402 and _TOO_EXPENSIVE.match(answer.message):
        return RefusalFacts("too_expensive")
    no_credits = answer.status in _STATUSES_UNPAID and _NO_CREDITS.match(answer.message)
    no_credits = no_credits or _NOTHING_ELSE.fullmatch(answer.message)
    if no_credits or answer.words & _UNPAID:
        return RefusalFacts("unpaid")
    if answer.status in (400, 401, 403) and (
        answer.words & _DEAD_KEYS or _DEAD_KEY.match(answer.message)
    ):
        return RefusalFacts("key")
    if answer.status == _NO_FLEX:  # also calls that leave the tier to Groq
        return RefusalFacts("tier_busy" if answer.tier == "flex" else "busy")
    if answer.status != 429 and not (answer.status == 503 and "slow_down" in answer.words):
        return None
    if _is_too_large(answer.message):
        return RefusalFacts("never")
    spent = used_up(answer.headers, answer.now)
    unit = _unit_of(answer) or (spent.unit if spent else None)
    if answer.tier == "flex" and unit is None and not answer.words & _TOO_FAST:
        return RefusalFacts("tier_busy")
    of_day = spent is not None and spent.window == "day" and spent.unit == unit
    wait_ms = spent.reset_ms if spent else None
    per_day = of_day or bool(_PER_DAY.search(answer.message))
    return RefusalFacts("throttled", unit=unit, wait_ms=wait_ms, per_day=per_day)


def _unit_of(answer: ErrorAnswer) -> str | None:
    """Return the unit of the exceeded limit, by the words of the refusal."""
    if unit := next((unit for unit in _UNITS if unit in answer.words), None):
        return unit
    if found := _BY_NAME.search(answer.message) or _BY_RATE.search(answer.message):
        return "tokens" if found[1].lower() == "token" else "requests"
    letters = _BY_LETTERS.search(answer.message)
    return None if letters is None else "tokens" if letters[0][0] == "T" else "requests"


def _is_too_large(message: str) -> bool:
    """Return whether a single request exceeds the bound of the limit."""
    if _TOO_LARGE.search(message):
        return True
    found = _LIMIT_AND_REQUESTED.search(message)
    return found is not None and int(found[2]) > int(found[1])


_STATUSES = {
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "tokens": 429,
    "requests": 429,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "invalid_request_error": 400,
}
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_SPENT = "insufficient_quota"  # both type and code, as for an account without money
# The error of an account on a plan: on any other Retry-After Codex waits without a message, on this
# one it shows when the limit resets.
_LIMIT_REACHED = "usage_limit_reached"
_FAR_MS = 60_000


def problem(error: TidegateError, status: int, retry_after_ms: int | None) -> JsonObject:
    """Return the body of an answer with an error of ours."""
    kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = error.code
    if isinstance(error, BudgetExceeded):
        kind = code = _SPENT
    elif isinstance(error, Unauthenticated):
        code = "invalid_api_key"
    elif isinstance(error, NotFound) and error.field == "model":
        code = "model_not_found"
    elif isinstance(error, NotFound) and error.field == "previous_response_id":
        code = "previous_response_not_found"
    body: JsonObject = {
        "message": error.message_with_allowed,
        "type": kind,
        "param": getattr(error, "field", None),
        "code": code,
    }
    if status == 429 and retry_after_ms is None and isinstance(error, LimitPaused):
        body["type"] = _LIMIT_REACHED  # until a person resumes the limit
    elif status == 429 and retry_after_ms is not None and retry_after_ms > _FAR_MS:
        at = getattr(error, "resets_at", None)
        at_s = time.time() + retry_after_ms / 1000 if at is None else at.timestamp()
        body |= {"type": _LIMIT_REACHED, "resets_at": ceil(at_s)}
    limit = getattr(error, "limit", None)
    if limit:
        body["limit"] = limit
    if getattr(error, "is_estimate", False):
        body["is_estimate"] = True
    return {"error": body}


OPENAI = DialectSpec(
    name=Dialect.OPENAI,
    calls=_CALLS,
    endpoint_of=endpoint_of,
    references=references,
    made_by_tools=MADE_BY_OPENAI,
    made_by=made_by,
    works={
        "response": OngoingWork(
            Operation.INFER,
            "/responses",
            "/responses/{id}",
            "/responses/{id}/cancel",
            end_of,
        ),
        # https://docs.x.ai/docs/guides/deferred-chat-completions
        "deferred": OngoingWork(
            Operation.INFER,
            "/chat/completions",
            "/chat/deferred-completion/{id}",
            "",
            _completed,
            is_read_once=True,
        ),
    },
    recognizes=_recognizes,
    models=ModelList(
        "/models",
        "data",
        "id",
        lambda models: {"object": "list", "data": models},
        required=lambda _name, owner: {"object": "model", "created": 0, "owned_by": owner},
    ),
    rules_of=rules_of,
    request_facts=request_facts,
    answer_facts=answer_facts,
    add_output=add_output,
    image_count=image_count,
    statuses=_STATUSES,
    refusal=refusal,
    problem=problem,
)
