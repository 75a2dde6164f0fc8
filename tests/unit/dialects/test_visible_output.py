"""What visibly came of answers, in each dialect, whole and cut."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tidegate.admission.estimator import PICTURE_TOKENS
from tidegate.dialects import DIALECTS
from tidegate.dialects.answers import visible_output
from tidegate.dialects.spec import Dialect

SAID = "x" * 400  # about a hundred tokens


def stream(*events: object, end: bytes = b"") -> bytes:
    return b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events) + end


def tokens(dialect: Dialect, answer: bytes) -> int:
    return visible_output(DIALECTS[dialect], answer, len(answer)).tokens


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields}]}


def part(**fields: Any) -> dict[str, Any]:
    return {"candidates": [{"content": {"parts": [fields]}}]}


@pytest.mark.parametrize(
    ("dialect", "event"),
    [
        (Dialect.OPENAI, delta(content=SAID)),
        (Dialect.OPENAI, delta(reasoning_content=SAID)),
        (Dialect.OPENAI, delta(reasoning=SAID, reasoning_content=SAID)),
        (Dialect.OPENAI, delta(refusal=SAID)),
        (Dialect.OPENAI, delta(content=[{"type": "thinking", "thinking": [{"text": SAID}]}])),
        (Dialect.OPENAI, delta(tool_calls=[{"index": 0, "function": {"arguments": SAID}}])),
        (Dialect.OPENAI, {"choices": [{"text": SAID}]}),
        (Dialect.OPENAI, {"type": "response.output_text.delta", "delta": SAID}),
        (Dialect.OPENAI, {"type": "response.function_call_arguments.delta", "delta": SAID}),
        (Dialect.ANTHROPIC, {"type": "content_block_delta", "delta": {"text": SAID}}),
        (Dialect.ANTHROPIC, {"type": "content_block_delta", "delta": {"thinking": SAID}}),
        (Dialect.ANTHROPIC, {"type": "content_block_delta", "delta": {"partial_json": SAID}}),
        (Dialect.GEMINI, part(text=SAID)),
        (Dialect.GEMINI, part(text=SAID, thought=True)),
        (Dialect.GEMINI, part(functionCall={"name": "f", "args": {"a": SAID[:374]}})),
    ],
)
def test_what_a_stream_shows_counts(dialect: Dialect, event: dict[str, Any]) -> None:
    assert 100 <= tokens(dialect, stream(event)) <= 104
    assert 300 <= tokens(dialect, stream(event, event, event)) <= 312
    # Cut within the last event, in the middle of its text.
    cut = stream(event, event)[:-200]
    assert tokens(dialect, cut) >= 100 + 30


def test_what_a_stream_of_responses_repeats_counts_once() -> None:
    pieces = [{"type": "response.output_text.delta", "delta": "word "} for _ in range(80)]
    done = {"type": "response.output_text.done", "text": "word " * 80}
    item = {"type": "response.output_item.done", "item": {"content": [{"text": "word " * 80}]}}
    echoed = {"type": "response.created", "response": {"tools": [{"description": "x" * 9_000}]}}
    assert tokens(Dialect.OPENAI, stream(echoed, *pieces)) == 100
    assert tokens(Dialect.OPENAI, stream(echoed, *pieces, done, item)) == 100


@pytest.mark.parametrize("length", [100, 30_000])
def test_all_of_a_long_stream_counts(length: int) -> None:
    events = [delta(content="four", padding="p" * 100) for _ in range(length)]
    answer = stream(*events)
    assert tokens(Dialect.OPENAI, answer) == pytest.approx(length, rel=0.02)
    # Of one whose middle was not kept, what was kept stands for the rest.
    assert visible_output(
        DIALECTS[Dialect.OPENAI], answer, 2 * len(answer)
    ).tokens == pytest.approx(2 * length, rel=0.02)


def test_a_whole_answer_that_was_cut_in_a_text_counts_up_to_there() -> None:
    chat = json.dumps({"choices": [{"message": {"content": "x" * 4_000}}]}).encode()
    assert tokens(Dialect.OPENAI, chat) == 1_000
    assert tokens(Dialect.OPENAI, chat[:2_040]) == pytest.approx(500, rel=0.05)
    called = {"content": [{"type": "tool_use", "input": {"a": "x" * 4_000}}]}
    assert tokens(Dialect.ANTHROPIC, json.dumps(called).encode()[:2_040]) >= 490
    assert tokens(Dialect.OPENAI, b"") == tokens(Dialect.GEMINI, b"{") == 0


def test_pictures_count() -> None:
    shown = visible_output(DIALECTS[Dialect.GEMINI], stream(part(inlineData={"data": "A"})), 100)
    assert (shown.images, shown.tokens) == (1, PICTURE_TOKENS)
    partial = {"type": "response.image_generation_call.partial_image", "item_id": "i"}
    events = [{**partial, "partial_image_b64": "A"}] * 3
    assert visible_output(DIALECTS[Dialect.OPENAI], stream(*events), 100).images == 1
    whole = json.dumps({"data": [{"b64_json": "A"}]}).encode()
    assert visible_output(DIALECTS[Dialect.OPENAI], whole, len(whole)).images == 1


def test_what_is_no_stream_of_a_known_shape_hurts_nothing() -> None:
    odd = stream([], 1, None, {"choices": 3}, {"choices": [{"delta": {"tool_calls": [None]}}]})
    for dialect in Dialect:
        assert tokens(dialect, odd + b"data: \xff\xfe\n\n: comment\n\ndata: [DONE]\n\n") == 0


@pytest.mark.parametrize(
    "answer", [b"\x0a\x90\x03" + b"x" * 397, b"// API callback\nf(" + b"x" * 382]
)
def test_an_answer_in_a_form_that_is_not_read_counts_by_its_size(answer: bytes) -> None:
    assert visible_output(DIALECTS[Dialect.GEMINI], answer, len(answer)).tokens == 100
    assert visible_output(DIALECTS[Dialect.GEMINI], answer, 4 * len(answer)).tokens == 400


@pytest.mark.parametrize(
    "start", [b": hello\n\n", b"event: ping\n", b"\xef\xbb\xbfdata: {}\n\n", b"\n\n:"]
)
def test_events_that_say_nothing_are_no_answer(start: bytes) -> None:
    assert visible_output(DIALECTS[Dialect.OPENAI], start, len(start)).tokens == 0
