"""Interactions: what a request asks for, and what an answer and its events report."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tidegate.call import Kind, Usage, UsageDetails
from tidegate.dialects import DIALECTS, endpoint_of, interactions
from tidegate.dialects.answers import visible_output
from tidegate.dialects.spec import Dialect, Endpoint, RequestFacts
from tidegate.errors import InvalidRequest

GEMINI = DIALECTS[Dialect.GEMINI]
USAGE = {
    "total_tokens": 190,
    "total_input_tokens": 161,
    "input_tokens_by_modality": [
        {"modality": "text", "tokens": 121},
        {"modality": "image", "tokens": 40},
    ],
    "total_cached_tokens": 11,
    "cached_tokens_by_modality": [
        {"modality": "text", "tokens": 4},
        {"modality": "image", "tokens": 7},
    ],
    "total_output_tokens": 19,
    "total_tool_use_tokens": 7,
    "total_thought_tokens": 3,
    "grounding_tool_count": [{"type": "google_search", "count": 2}],
}
SEEN = Usage(168, 19, 3, 11, 190, UsageDetails(input_image_tokens=33, searches=2))
WHOLE = {
    "id": "v1_abc",
    "status": "completed",
    "usage": USAGE,
    "object": "interaction",
    "model": "gemini-2.5-flash",
    "steps": [{"type": "model_output", "content": [{"type": "text", "text": "Hello"}]}],
}


def endpoint() -> Endpoint:
    found = endpoint_of("POST", "/v1beta/interactions", Dialect.GEMINI)
    assert found is not None
    return found


def facts(**body: Any) -> RequestFacts:
    return GEMINI.request_facts(endpoint(), body)


def stream(*events: dict[str, Any]) -> bytes:
    return b"".join(
        b"event: %b\ndata: %b\n\n" % (event["event_type"].encode(), json.dumps(event).encode())
        for event in events
    )


CREATED = {
    "interaction": {"id": "v1_abc", "status": "in_progress", "object": "interaction"},
    "event_type": "interaction.created",
}
DELTA = {"index": 0, "delta": {"text": "Hello", "type": "text"}, "event_type": "step.delta"}
COMPLETED = {
    "interaction": {name: WHOLE[name] for name in ("id", "status", "usage", "object", "model")}
    | {"service_tier": "flex"},
    "event_type": "interaction.completed",
}


def test_a_model_or_an_agent_is_asked_with_a_bound_of_its_own() -> None:
    asked = facts(model="gemini-2.5-flash", input="Hi", generation_config={"max_output_tokens": 9})
    assert (asked.model, asked.kind, asked.max_output_tokens) == (
        *("gemini-2.5-flash", Kind.TEXT_ONLY, 9),
    )
    agent = facts(agent="deep-research", input="Hi")
    assert agent.model == "deep-research"
    assert facts(model="m", input="Hi", response_format={"type": "image"}).images == 1
    assert facts(model="m", input="Hi", responseFormat={"type": "image"}).images == 1
    drawing = facts(model="m", input="Hi", responseModalities=["IMAGE"])
    assert (drawing.images, drawing.kind) == (1, Kind.IMAGE_GENERATION)
    bound = facts(model="m", input="Hi", generationConfig={"maxOutputTokens": 9})
    assert bound.max_output_tokens == 9
    uri = {"type": "document", "uri": "https://x/v1beta/files/a", "mime_type": "application/pdf"}
    assert facts(model="m", input=[uri]).kind is Kind.MULTI_MODAL


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"agent": "a"}, "agent"),
        ({"background": 1}, "background"),
        ({"stream": 1}, "stream"),
    ],
)
def test_what_can_t_be_kept_is_refused_by_its_field(more: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        facts(model="m", input="Hi", **more)
    assert refused.value.field == field


def test_usage_is_read_of_a_whole_one_and_of_its_events() -> None:
    found = GEMINI.answer_facts(json.dumps(WHOLE).encode())
    assert found.usage == SEEN
    assert (found.response_id, found.finish_reason) == ("v1_abc", "completed")
    assert found.model_version == "gemini-2.5-flash"
    events = GEMINI.answer_facts(stream(CREATED, DELTA, COMPLETED))
    assert events.usage.output_tokens == 19
    assert events.usage.details is not None
    assert events.usage.details.tier == "flex"
    assert (events.response_id, events.finish_reason) == ("v1_abc", "completed")


def test_a_cut_stream_is_known_by_the_words_that_came() -> None:
    cut = stream(CREATED, DELTA, DELTA)
    assert GEMINI.answer_facts(cut, cut=True).usage.output_tokens is None
    assert visible_output(GEMINI, cut, len(cut)).tokens >= 2


def test_arguments_of_a_client_s_function_are_no_interaction() -> None:
    said = {"object": "interaction", "usage": {"total_input_tokens": 0, "total_output_tokens": 0}}
    answer = {
        "candidates": [{"content": {"parts": [{"functionCall": {"name": "f", "args": said}}]}}],
        "usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 8},
    }
    for text in (json.dumps(answer).encode(), b"data: " + json.dumps(answer).encode() + b"\n\n"):
        assert GEMINI.answer_facts(text).usage.output_tokens == 8
        long = text.replace(b'"name": "f"', b'"name": "f%b"' % (b"x" * 300_000))
        assert GEMINI.answer_facts(long).usage.output_tokens == 8


def test_only_events_before_any_output_are_held_back() -> None:
    assert interactions.has_no_output(CREATED)
    start = {"index": 0, "step": {"type": "model_output"}, "event_type": "step.start"}
    assert interactions.has_no_output(start)
    assert not interactions.has_no_output(DELTA)
    assert not interactions.has_no_output(COMPLETED)
