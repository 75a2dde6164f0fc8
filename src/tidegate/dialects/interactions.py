"""Interactions of Gemini's dialect: their requests, answers and events. Pure.

An interaction has steps instead of messages, names a model or an agent, and reports its usage in
its own form. Events of the earlier form, `content.delta`, are read like those of steps.

    https://ai.google.dev/gemini-api/docs/interactions
    google-genai 3.6.1, `google.genai.interactions`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sized
from typing import Any

from tidegate.admission.estimator import Rules
from tidegate.call import Status, Usage, UsageDetails
from tidegate.dialects.answers import (
    HEAD_BYTES,
    AnswerForm,
    as_text,
    count_of,
    last_events,
    object_facts,
    objects_in,
    part_of,
    positive_of,
    scanned_facts,
    tier_of,
    value_pattern,
    whole_object,
    with_searches,
    with_tier,
)
from tidegate.dialects.requests import is_hosted_tool
from tidegate.dialects.requests import request_facts as facts_of_request
from tidegate.dialects.spec import (
    AnswerFacts,
    Endpoint,
    JsonObject,
    OutputEvents,
    RequestFacts,
)
from tidegate.errors import InvalidRequest

# Final states of an interaction; `requires_action` waits for its client's function.
_ENDS = {
    "completed": Status.SUCCEEDED,
    "incomplete": Status.SUCCEEDED,
    "requires_action": Status.SUCCEEDED,
    "requires_continuation": Status.SUCCEEDED,
    "budget_exceeded": Status.FAILED,
    "failed": Status.FAILED,
    "expired": Status.FAILED,
    "cancelled": Status.CANCELLED,
}


def end_of(body: JsonObject) -> Status | None:
    """Return how an interaction, or a response of OpenAI's, has ended; None while it runs."""
    return _ENDS.get(str(body.get("status")))


_MODALITIES = ("audio", "image", "video")
_MOST_MODALITIES = 64


def request_facts(
    endpoint: Endpoint,
    body: Mapping[str, Any],
    whole: Mapping[str, Sized],
    rules_of: Callable[[str], Rules],
) -> RequestFacts:
    """Return the facts of a request. An agent counts as the model of that name. Raises
    InvalidRequest."""
    agent = body.get("agent")
    if agent is not None:
        if "model" in body:
            message = "an interaction names a model or an agent, not both"
            raise InvalidRequest("agent", message, allowed="model or agent")
        body = {"model": agent, **{name: body[name] for name in body if name != "agent"}}
    settings: dict[str, Any] = {}
    for config in _in_both(body, "generation_config", "generationConfig"):
        settings |= config if isinstance(config, Mapping) else {}
    settings["response_modalities"] = _modalities(body)
    return facts_of_request(
        endpoint,
        body,
        whole,
        rules_of=rules_of,
        is_hosted=is_hosted_tool,
        settings=settings,
    )


def _in_both(body: Mapping[str, Any], *names: str) -> list[Any]:
    """Return the values of a field in both spellings: Google accepts either."""
    return [body[name] for name in names if body.get(name) is not None]


def _modalities(body: Mapping[str, Any]) -> list[Any]:
    """Return the requested modalities of the answer, from either field that names them."""
    found: list[Any] = []
    for named in _in_both(body, "response_modalities", "responseModalities"):
        found += named if isinstance(named, list) else []
    for formats in _in_both(body, "response_format", "responseFormat"):
        some = formats if isinstance(formats, list) else [formats]
        found += [one.get("type") for one in some if isinstance(one, Mapping)]
    return found


def usage_of(raw: Mapping[str, Any]) -> Usage:
    """Return the usage that an interaction reports."""
    taken, tools = count_of(raw, "total_input_tokens"), count_of(raw, "total_tool_use_tokens")
    usage = Usage(
        input_tokens=taken if taken is None or tools is None else taken + tools,
        output_tokens=count_of(raw, "total_output_tokens"),
        thoughts_tokens=count_of(raw, "total_thought_tokens"),
        cached_tokens=count_of(raw, "total_cached_tokens"),
        total_tokens=count_of(raw, "total_tokens"),
        details=_details(raw),
    )
    counted = objects_in(raw.get("grounding_tool_count"))[:_MOST_MODALITIES]
    return with_searches(usage, sum(positive_of(one, "count") or 0 for one in counted))


def _details(raw: Mapping[str, Any]) -> UsageDetails | None:
    def of(modality: str, *names: str) -> int:
        rows = [row for name in names for row in objects_in(raw.get(name))[:_MOST_MODALITIES]]
        fit = [row for row in rows if str(row.get("modality")).lower() == modality]
        return sum(positive_of(row, "tokens") or 0 for row in fit)

    counts: dict[str, Any] = {}
    for one in _MODALITIES:
        taken = of(one, "input_tokens_by_modality", "tool_use_tokens_by_modality")
        # Tokens read from a cache have one price: they are not counted by modality.
        fresh = max(0, taken - of(one, "cached_tokens_by_modality"))
        counts[f"input_{one}_tokens"] = fresh or None
        counts[f"output_{one}_tokens"] = of(one, "output_tokens_by_modality") or None
    return UsageDetails(**counts) if any(counts.values()) else None


def _event_usage(event: JsonObject) -> JsonObject:
    return part_of(part_of(event, "interaction"), "usage") or part_of(event, "usage")


_FORM = AnswerForm(
    usage="usage",
    identity="id",
    version="model",
    finish="status",
    choices=None,
    usage_of=usage_of,
    event_usage=_event_usage,
)
_OUTPUT_IMAGE = re.compile(rb'"type"\s*:\s*"image"')
# The first field of an answer, or of its first event, which a client cannot influence.
_FIRST_FIELD = re.compile(
    rb'(?:(?:event|id|retry):[^\n]*+\n)*+\s*+(?:data:)?\s*+\[?\s*+\{\s*+"(\w++)"'
)
_OF_OTHERS = frozenset((b"candidates", b"promptFeedback", b"usageMetadata", b"error"))
_OF_EVENTS = frozenset((b"interaction", b"event_type", b"event_id", b"interaction_id", b"index"))


def is_interaction(answer: bytes, parsed: JsonObject | None = None) -> bool:
    """Return whether an answer is an interaction or its events. A name elsewhere in it proves
    nothing: a model writes arguments of a client's functions as objects. `parsed`: the answer, if
    it is an object that was parsed before."""
    found = _FIRST_FIELD.match(answer, 0, HEAD_BYTES)
    if found is None or found[1] in _OF_OTHERS:
        return False
    if not answer.startswith((b"{", b"[")):
        return found[1] in _OF_EVENTS
    whole = whole_object(answer, parsed)
    if whole is not None:
        return whole.get("object") == "interaction"
    return b'"interaction"' in answer[:HEAD_BYTES] or b'"interaction"' in answer[-HEAD_BYTES:]


def answer_facts(
    answer: bytes, whole: JsonObject | None, *, omitted: bool, cut: bool
) -> AnswerFacts:
    """Return the facts of an interaction, from the `whole` object or from a stream."""
    if whole is not None:
        facts, tier = object_facts(_FORM, whole), tier_of(whole)
    else:
        facts = scanned_facts(_FORM, answer, omitted=omitted, cut=cut)
        ended = (part_of(event, "interaction") for event in last_events(answer))
        tier = next((tier_of(one) for one in ended if one), None)
        if not answer.startswith(b"{"):
            facts.response_id = created_id(answer) or facts.response_id
    facts.usage = with_tier(facts.usage, tier)
    return facts


_ID = value_pattern("id")


def created_id(stream: bytes) -> str | None:
    """Return the id of an interaction from the first event of its stream."""
    found = _ID.search(stream, 0, HEAD_BYTES)
    return None if found is None else found[1].decode("utf-8", "replace")


def image_count(answer: bytes) -> int:
    """Return how many images a whole interaction holds."""
    return len(_OUTPUT_IMAGE.findall(answer))


def add_output(event: JsonObject, output: OutputEvents) -> None:
    """Collect the visible output of an event."""
    for part in (part_of(event, "delta"), part_of(event, "step"), part_of(event, "content")):
        _add_part(part, output)
        for content in objects_in(part.get("content")):
            _add_part(content, output)
        _add_part(part_of(part, "content"), output)


def _add_part(part: JsonObject, output: OutputEvents) -> None:
    if part.get("type") == "image" and (part.get("data") or part.get("uri")):
        output.unnamed_images += 1
        return
    for name in ("text", "arguments", "result", "summary"):
        value = part.get(name)
        if type(value) is str:
            output.texts.append(value)
        elif value:
            output.texts.append(as_text(value))


_BEGUN = ("interaction.created", "interaction.start", "interaction.status_update")


def has_no_output(event: JsonObject) -> bool:
    """Return whether an event precedes all output, and is not an end either."""
    kind = event.get("event_type")
    if kind in _BEGUN:
        return event.get("status") in (None, "in_progress", "queued")
    if kind != "step.start":
        return False
    step = part_of(event, "step")
    return step.get("type") in ("thought", "model_output") and not step.keys() & {
        *("content", "summary", "signature"),
    }
