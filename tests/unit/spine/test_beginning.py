"""What of a stream has no output."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.dialects.refusals import Prelude

WITHOUT_OUTPUT: list[dict[str, object]] = [
    {"type": "response.created", "response": {"error": None, "instructions": "x" * 9_000}},
    {"type": "response.output_item.added", "item": {"type": "reasoning", "summary": []}},
    {"type": "response.reasoning_part.added", "part": {"type": "reasoning_text", "text": ""}},
    {"type": "message_start", "message": {"usage": {"input_tokens": 8}}},
    {"type": "ping"},
    {"type": "content_block_start", "content_block": {"type": "thinking", "thinking": ""}},
    {"choices": [], "prompt_filter_results": [{"prompt_index": 0}]},
    {"choices": [{"delta": {"role": "assistant", "content": "", "refusal": None}}], "usage": None},
    {"choices": [{"text": "", "finish_reason": None}]},
    {"usageMetadata": {"promptTokenCount": 7}, "modelVersion": "m"},
]
WITH_OUTPUT: list[dict[str, object]] = [
    {"type": "response.output_text.delta", "delta": ""},
    {"type": "response.output_item.added", "item": {"type": "function_call", "name": "f"}},
    {"type": "content_block_start", "content_block": {"type": "tool_use", "name": "f"}},
    {"type": "content_block_start", "content_block": {"type": "text", "text": "Hi"}},
    {"choices": [{"delta": {"content": "Hi"}}]},
    {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]},
    {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"total_tokens": 3}},
    {"candidates": [{"content": {"parts": [{"text": "Hi"}]}}]},
    {"candidates": [{"finishReason": "STOP"}], "usageMetadata": {"totalTokenCount": 9}},
    {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 7}},
    {"choices": ["odd"]},
    {"anything": "else"},
    {"event_type": ["odd"]},
]
BEFORE = b": hello\r\nretry: 3000\n\nevent: some\nid: 7\n"


def line(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@pytest.mark.parametrize("value", WITHOUT_OUTPUT)
def test_what_only_says_that_it_has_begun_is_held(value: dict[str, object]) -> None:
    prelude = Prelude()
    assert prelude.holds(BEFORE + line(value), at_end=False)
    assert not prelude.holds(line(WITH_OUTPUT[0]), at_end=False)
    assert prelude.error is None


@pytest.mark.parametrize("value", WITH_OUTPUT)
def test_output_is_not_held(value: dict[str, object]) -> None:
    prelude = Prelude()
    assert not prelude.holds(line(value), at_end=False)
    assert prelude.error is None
    assert prelude.is_events


@pytest.mark.parametrize(
    "data", [b"data: [DONE]\n\n", b"data: {broken\n\n", b"data: 7\n\n", b'data: ["a"]\n\n']
)
def test_what_nobody_understands_is_not_held(data: bytes) -> None:
    prelude = Prelude()
    assert not prelude.holds(data, at_end=False)
    assert prelude.error is None


@pytest.mark.parametrize("data", [b'[{"candidates": []}\n', b'{"error": "no"}\n', b"<html>\n"])
def test_what_is_no_stream_of_events_is_seen(data: bytes) -> None:
    prelude = Prelude()
    assert not prelude.holds(data, at_end=True)
    assert not prelude.is_events


@given(
    st.lists(st.sampled_from(WITHOUT_OUTPUT), max_size=4),
    st.sampled_from([{"error": {"message": "no"}}, WITH_OUTPUT[4]]),
    st.integers(1, 200),
)
def test_it_is_the_same_however_the_stream_arrives(
    before: list[dict[str, object]], last: dict[str, object], size: int
) -> None:
    stream = b"".join(map(line, [*before, last]))
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    prelude, held = Prelude(), 0
    while pieces and prelude.holds(pieces.pop(0), at_end=not pieces):
        held += 1
    assert prelude.error == (last if "error" in last else None)
    assert held * size >= sum(len(line(one)) for one in before) - size
