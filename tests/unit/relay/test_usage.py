"""Usage as it is told, in whole answers and at the end of streams."""

from __future__ import annotations

import json

import pytest

from tidegate.call import Usage
from tidegate.relay.paths import Dialect
from tidegate.relay.usage import pictures_in, told_by

CHAT = {
    "id": "chatcmpl-1",
    "choices": [{"message": {"content": 'he said "usage": {"prompt_tokens": 9}'}}],
    "usage": {
        "prompt_tokens": 12,
        "completion_tokens": 30,
        "total_tokens": 42,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 10},
    },
}


def told(dialect: Dialect, *events: object) -> Usage:
    data = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events)
    return told_by(dialect, data[:4096], data[-65536:]).usage


def test_chat_completions() -> None:
    found = told_by(Dialect.OPENAI, *[json.dumps(CHAT).encode()] * 2)
    assert found.usage == Usage(12, 20, 10, 4, 42)
    assert found.response_id == "chatcmpl-1"


def test_the_last_word_of_a_stream_counts() -> None:
    first = {"usage": None, "choices": [{"delta": {"content": "x"}}]}
    partial = {"usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 1}}
    whole = {"usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 9}}
    assert told(Dialect.OPENAI, first, CHAT).output_tokens == 20
    assert told(Dialect.GEMINI, partial, whole).output_tokens == 9


def test_responses_and_embeddings() -> None:
    usage = {"input_tokens": 3, "output_tokens": 5, "total_tokens": 8}
    assert told(Dialect.OPENAI, {"response": {"usage": usage}}) == Usage(3, 5, None, None, 8)
    assert told(Dialect.OPENAI, {"usage": {"prompt_tokens": 7, "total_tokens": 7}}) == Usage(
        7, 0, None, None, 7
    )


def test_gemini_leaves_out_what_is_none() -> None:
    assert told(Dialect.GEMINI, {"usageMetadata": {"promptTokenCount": 5, "totalTokenCount": 5}})
    usage = {"promptTokenCount": 5, "totalTokenCount": 25, "thoughtsTokenCount": 8}
    assert told(Dialect.GEMINI, {"usageMetadata": usage}) == Usage(5, 12, 8, None, 25)


def test_anthropic_tells_input_first_and_output_last() -> None:
    begin = {"type": "message_start", "message": {"id": "msg_1", "usage": {"input_tokens": 10}}}
    cached = {"usage": {"input_tokens": 10, "cache_read_input_tokens": 90, "output_tokens": 4}}
    assert told(Dialect.ANTHROPIC, begin, {"usage": {"output_tokens": 4}}) == Usage(
        10, 4, None, None, 14
    )
    assert told(Dialect.ANTHROPIC, cached) == Usage(100, 4, None, 90, 104)


def test_what_is_not_told_is_unknown() -> None:
    assert told(Dialect.OPENAI, {"choices": []}) == Usage()
    assert told_by(Dialect.GEMINI, b"", b"").usage == Usage()
    assert told(Dialect.OPENAI, {"usage": {"prompt_tokens": "many"}}) == Usage()


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_an_answer_that_was_cut_is_read_as_far_as_it_goes(cut: int) -> None:
    data = json.dumps(CHAT).encode()[:-cut]
    assert told_by(Dialect.OPENAI, data, data).usage in (Usage(), Usage(12, 20, 10, 4, 42))


def test_a_model_cannot_pretend_to_a_usage() -> None:
    text = json.dumps({"usage": {"prompt_tokens": 1, "completion_tokens": 1}})
    assert told(Dialect.OPENAI, {"choices": [{"message": {"content": text}}]}) == Usage()


def test_pictures() -> None:
    two = {"data": [{"b64_json": "A"}, {"b64_json": "B"}]}
    assert pictures_in(Dialect.OPENAI, json.dumps(two).encode()) == 2
    one = {"candidates": [{"content": {"parts": [{"inlineData": {"data": "A"}}]}}]}
    assert pictures_in(Dialect.GEMINI, json.dumps(one).encode()) == 1
