"""Anthropic's dialect: messages. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import replace
from functools import partial
from typing import Any

from tidegate.admission.estimator import USUAL_RULES, Rules, Size
from tidegate.call import Usage, UsageDetails
from tidegate.dialects.answers import (
    AnswerForm,
    as_text,
    count_of,
    object_facts,
    objects_in,
    part_of,
    positive_of,
    scanned_facts,
    tier_of,
    whole_object,
    with_tier,
)
from tidegate.dialects.headers import spent_windows, until_date_ms, used_up
from tidegate.dialects.requests import request_facts
from tidegate.dialects.resources import (
    Act,
    Reference,
    anthropic_page,
    may_name,
    named_values,
    path_of,
    use_in,
)
from tidegate.dialects.sandboxes import MADE_BY_CLAUDE, OUTPUTS, claudes_container
from tidegate.dialects.spec import (
    AnswerFacts,
    Dialect,
    DialectSpec,
    Endpoint,
    ErrorAnswer,
    JsonObject,
    ModelList,
    Operation,
    OutputEvents,
    RefusalFacts,
    listed_models,
)
from tidegate.errors import TidegateError

_CALLS = {
    path: Endpoint(Dialect.ANTHROPIC, operation, path)
    for path, operation in (
        ("/v1/messages", Operation.INFER),
        ("/v1/messages/count_tokens", Operation.COUNT),
    )
}


def _recognizes(path: str, headers: Set[bytes], query: bytes) -> bool:
    if b"anthropic-version" in headers or path.startswith("/v1/messages"):
        return True
    return "/publishers/anthropic/" in path


# Paths in Vertex's form; its token counting is read as `/v1/messages/count_tokens`.
_PREDICT = re.compile(
    r"/v1/projects/[^/]{1,100}/locations/[^/]{1,100}/publishers/anthropic/models"
    r"/(?P<model>[\w\-][\w.\-@]{0,199}):(?P<do>rawPredict|streamRawPredict)",
    re.ASCII,
)


_RESOURCES = (
    path_of("GET", "/v1/files", "file", Act.LIST),
    path_of("POST", "/v1/files", "file", Act.CREATE),
    path_of("GET", "/v1/files/{id}", "file", Act.READ),
    path_of("GET", "/v1/files/{id}/content", "file", Act.READ),
    path_of("DELETE", "/v1/files/{id}", "file", Act.DELETE),
    # Of batches created at the provider itself; the gateway's own are not relayed.
    path_of("GET", "/v1/messages/batches/{id}", "message_batch", Act.READ),
    path_of("GET", "/v1/messages/batches/{id}/results", "message_batch", Act.READ),
    path_of("POST", "/v1/messages/batches/{id}/cancel", "message_batch", Act.CANCEL),
    path_of("DELETE", "/v1/messages/batches/{id}", "message_batch", Act.DELETE),
)


def endpoint_of(method: str, path: str) -> Endpoint | None:
    """Return the endpoint of a request, None for an unknown path."""
    if method == "POST" and (named := _PREDICT.fullmatch(path)) is not None:
        return Endpoint(
            Dialect.ANTHROPIC,
            Operation.INFER,
            "/v1/messages",
            model=named["model"],
            streams=named["do"] == "streamRawPredict",
        )
    if method == "GET" and (listed := listed_models(Dialect.ANTHROPIC, path)) is not None:
        return listed
    use = use_in(_RESOURCES, method, path)
    if use is None:
        return None
    operation = Operation.UPLOAD if use.act is Act.CREATE else Operation.RESOURCE
    return Endpoint(Dialect.ANTHROPIC, operation, path, resource=use)


_FILE_FIELDS = frozenset(("file_id",))
# Arguments of calls of a client's tool, and descriptions of tools.
_OF_TOOLS = frozenset(("input", "input_schema"))


def references(body: Mapping[str, Any], raw: bytes) -> list[Reference]:
    """Return the files that a request names, at any depth, and its container. Raises
    InvalidRequest."""
    found = claudes_container(body, raw) if "container" in body else []
    if not may_name(raw, b'"file_id"'):
        return found
    named = named_values(raw, _FILE_FIELDS, _OF_TOOLS, OUTPUTS)
    ids = dict.fromkeys(one.value for one in named)
    return [*found, *(Reference("file", one, "file_id") for one in ids)]


def _picture(size: Size) -> float:
    """Return the tokens of a picture: one for 750 pixels, after fitting its longer side into 1,568;
    at most 1,600."""
    width, height = size or (1568, 1568)
    scale = min(1.0, 1568 / max(width, height))
    return max(1.0, min(1600.0, width * scale * height * scale / 750))


# The text of a page, 1,500 to 3,000 tokens, includes its picture. The prompt for tools has 159 to
# 804 tokens, by model and choice of tool.
_RULES = replace(USUAL_RULES, picture=_picture, page=2_250, call=8, tools=500)


def rules_of(_model: str) -> Rules:
    """Return the token counts of files; platform.claude.com/docs, pages "vision", "pdf-support" and
    "tool-use"."""
    return _RULES


# Rounds of a call, `usage.iterations`, that the figures beside them do not include.
_APART = ("compaction", "advisor_message")
_COUNTS = (
    *("input_tokens", "output_tokens"),
    *("cache_creation_input_tokens", "cache_read_input_tokens"),
)
_INPUTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
_NO_REGION = ("global", "not_available")  # of other clouds and older models
_SPLIT = ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")
_MOST_ROUNDS = 1_000


def of_all_rounds(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add the tokens of compactions and of an advisor to a usage: they are billed too."""
    if "iterations" not in raw:
        return raw
    rounds = objects_in(raw["iterations"])[:_MOST_ROUNDS]
    separate = [one for one in rounds if one.get("type") in _APART]
    if not separate or None in (count_of(raw, "input_tokens"), count_of(raw, "output_tokens")):
        return raw
    every = [raw, *separate]
    sums = {name: sum(count_of(one, name) or 0 for one in every) for name in _COUNTS}
    splits = [part_of(one, "cache_creation") for one in every]
    split = {name: sum(count_of(one, name) or 0 for one in splits) for name in _SPLIT}
    return {**raw, **sums, "cache_creation": split}


def usage_of(raw: Mapping[str, Any]) -> Usage:
    """Return the usage that an answer reports; its input is in three parts."""
    raw = of_all_rounds(raw)
    fresh, output_tokens = count_of(raw, "input_tokens"), count_of(raw, "output_tokens")
    written = count_of(raw, "cache_creation_input_tokens") or 0
    cached = count_of(raw, "cache_read_input_tokens")
    input_tokens = None if fresh is None else fresh + written + (cached or 0)
    total = None if input_tokens is None or output_tokens is None else input_tokens + output_tokens
    thoughts = count_of(part_of(raw, "output_tokens_details"), "thinking_tokens")
    if output_tokens is not None and thoughts is not None:
        thoughts = min(thoughts, output_tokens)
        output_tokens -= thoughts
    usage = Usage(
        input_tokens, output_tokens, thoughts, cached, total, _usage_details(raw, written)
    )
    # Fast mode has its own price, whatever the tier, and so has a region, also that of a workspace.
    tier = "fast" if raw.get("speed") == "fast" else tier_of(raw)
    return with_tier(usage, " ".join(filter(None, (tier, _region_of(raw)))) or None)


def _region_of(raw: Mapping[str, Any]) -> str | None:
    region = tier_of({"service_tier": raw.get("inference_geo")})
    return None if region in _NO_REGION else region


def _usage_details(raw: Mapping[str, Any], written: int) -> UsageDetails | None:
    searches = positive_of(part_of(raw, "server_tool_use"), "web_search_requests")
    if not written and not searches:
        return None
    split = part_of(raw, "cache_creation") if written else {}
    return UsageDetails(
        written or None,
        positive_of(split, "ephemeral_5m_input_tokens"),
        positive_of(split, "ephemeral_1h_input_tokens"),
        searches=searches,
    )


def _event_usage(event: JsonObject) -> JsonObject:
    return part_of(event, "usage")


def _joined(first: JsonObject, last: JsonObject, cut: bool) -> JsonObject:
    """Return the usage of a stream from those of `message_start` and `message_delta`. The output in
    the first is that of a stream that has just begun; an input of 0 in the last is not reported."""
    last = {name: value for name, value in last.items() if value is not None}
    if not any(positive_of(last, name) for name in _INPUTS):
        last = {name: value for name, value in last.items() if name not in _INPUTS}
    if not cut:
        first = {name: value for name, value in first.items() if name != "output_tokens"}
    return first | last


_FORM = AnswerForm(
    usage="usage",
    identity="id",
    version="model",
    finish="stop_reason",
    choices=None,
    usage_of=usage_of,
    event_usage=_event_usage,
    joined=_joined,
)


def answer_facts(
    answer: bytes,
    *,
    omitted: bool = False,
    cut: bool = False,
    parsed: JsonObject | None = None,
) -> AnswerFacts:
    """Return the facts of a message, whole or as a stream."""
    if (whole := whole_object(answer, parsed)) is not None:
        return object_facts(_FORM, whole)
    return scanned_facts(_FORM, answer, omitted=omitted, cut=cut)


def image_count(_answer: bytes) -> int:
    """Return 0: no model of this dialect generates images."""
    return 0


def add_output(event: JsonObject, output: OutputEvents) -> None:
    """Collect the visible output of an event."""
    block = part_of(event, "content_block")
    for part in (part_of(event, "delta"), block):
        for name in ("text", "thinking", "partial_json"):
            if type(part.get(name)) is str:
                output.texts.append(part[name])
    if block.get("input"):
        output.texts.append(as_text(block["input"]))


# Anchored at the start: a provider that repeats a client's text does so later.
_NO_MONEY = re.compile(
    r"your credit balance is too low|you have reached your specified (?:\w+ )?api usage limits",
    re.IGNORECASE,
)
_DISABLED = re.compile(r"this organization has been disabled", re.IGNORECASE)
_NEVER = re.compile(r"extra usage is required", re.IGNORECASE)
_BY_NAME = re.compile(
    r"\b(?P<unit>input tokens|output tokens|tokens|requests) "
    r"per (?P<window>second|minute|hour|day)\b",
    re.IGNORECASE,
)


def refusal(answer: ErrorAnswer) -> RefusalFacts | None:
    """Classify a refusal; None if its wording is not of this dialect."""
    details = answer.error.get("details")
    code = details.get("error_code") if isinstance(details, dict) else None
    spent = code == "enforced_spend_limit_reached" or "billing_error" in answer.words
    if spent or _NO_MONEY.match(answer.message):
        return RefusalFacts("unpaid", wait_ms=until_date_ms(answer.message, answer.now))
    if "authentication_error" in answer.words and answer.status == 401:
        return RefusalFacts("key")
    if answer.status == 400 and _DISABLED.match(answer.message):
        return RefusalFacts("key")
    if answer.status == 429 and _NEVER.match(answer.message):
        return RefusalFacts("never")
    if answer.status != 429:
        return None
    if (windows := spent_windows(answer.headers, answer.now)) is not None:
        of_account = windows.of_account
        return RefusalFacts("throttled", wait_ms=windows.reset_ms, of_account=of_account)
    spent, named = used_up(answer.headers, answer.now), _BY_NAME.search(answer.message)
    if spent is not None:
        return RefusalFacts("throttled", unit=spent.unit, wait_ms=spent.reset_ms)
    if named is not None:
        unit, per_day = named["unit"].lower().replace(" ", "_"), named["window"].lower() == "day"
        return RefusalFacts("throttled", unit=unit, per_day=per_day)
    return None


_STATUSES = {
    "overloaded_error": 529,
    "rate_limit_error": 429,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "invalid_request_error": 400,
    "request_too_large": 413,
    "timeout_error": 504,
}
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_type(status: int) -> str:
    """Return the error type that belongs to a status."""
    return _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")


def problem(error: TidegateError, status: int, _retry_after_ms: int | None) -> JsonObject:
    """Return the body of an answer with an error of ours."""
    return {
        "type": "error",
        "error": {"type": error_type(status), "message": error.message_with_allowed},
    }


def _listed_models(models: list[JsonObject]) -> JsonObject:
    first, last = (models[0]["id"], models[-1]["id"]) if models else (None, None)
    return {"data": models, "has_more": False, "first_id": first, "last_id": last}


def _required(name: str, _owner: str) -> JsonObject:
    """Return required fields of a model: Anthropic documents the beginning of 1970 for an unknown
    release date."""
    never = "1970-01-01T00:00:00Z"
    return {"type": "model", "display_name": name, "created_at": never, "lifecycle": "active"}


ANTHROPIC = DialectSpec(
    name=Dialect.ANTHROPIC,
    paused_status=429,  # Claude Code takes a 403 for a failed sign-in
    calls=_CALLS,
    endpoint_of=endpoint_of,
    recognizes=_recognizes,
    models=ModelList(
        "/v1/models", "data", "id", _listed_models, query="limit=1000", required=_required
    ),
    # Anthropic rejects a call without a version; its SDKs all send this one.
    headers=((b"anthropic-version", b"2023-06-01"),),
    rules_of=rules_of,
    request_facts=partial(request_facts, rules_of=rules_of),
    answer_facts=answer_facts,
    add_output=add_output,
    image_count=image_count,
    references=references,
    made_by_tools=MADE_BY_CLAUDE,
    page=anthropic_page,
    statuses=_STATUSES,
    refusal=refusal,
    problem=problem,
    error_event=b"event: error\n",
)
