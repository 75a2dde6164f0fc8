"""What an answer tells of itself beside its usage."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from tidegate.dialects import DIALECTS
from tidegate.dialects.spec import Dialect

Said = tuple[str | None, str | None, str | None]


def said(dialect: Dialect, data: bytes, *, cut: bool = False) -> Said:
    told = DIALECTS[dialect].answer_facts(data, cut=cut)
    return told.finish_reason, told.response_id, told.model_version


def stream(*events: Mapping[str, object]) -> bytes:
    return b"".join(b"data: %b\n\n" % json.dumps(one).encode() for one in events)


def response(status: str, **more: object) -> dict[str, object]:
    said = {"id": "resp_1", "object": "response", "status": status, "model": "gpt-5-nano-1"}
    return said | {"output": [], "usage": {"input_tokens": 3, "output_tokens": 5}} | more


@pytest.mark.parametrize(
    ("whole", "finish"),
    [
        (response("completed"), "completed"),
        (response("incomplete", incomplete_details={"reason": "max_output_tokens"}),
         "max_output_tokens"),
        (response("failed", error={"code": "server_error"}), "failed"),
        (response("in_progress"), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("padding", [0, 100_000])
def test_a_response_tells_why_it_ended(
    whole: dict[str, object], finish: str | None, padding: int
) -> None:
    whole = {**whole, "instructions": "x" * padding}
    wanted = finish, "resp_1", "gpt-5-nano-1"
    assert said(Dialect.OPENAI, json.dumps(whole).encode()) == wanted
    begun = {"type": "response.created", "response": {**whole, "status": "in_progress"}}
    ended = {"type": f"response.{whole['status']}", "response": whole}
    if finish is not None:
        assert said(Dialect.OPENAI, stream(begun, ended)) == wanted
        assert said(Dialect.OPENAI, stream(begun, ended) + b"data: [DONE]\n\n") == wanted
        assert said(Dialect.OPENAI, stream(begun, ended)[:-20], cut=True)[0] is None


@pytest.mark.parametrize("status", [{"of": "an object"}, ["a list"], 7, None])
def test_a_status_that_is_no_text_hides_no_usage(status: object) -> None:
    odd = response("completed") | {"status": status}
    for data in (json.dumps(odd).encode(), stream({"type": "response.completed", "response": odd})):
        facts = DIALECTS[Dialect.OPENAI].answer_facts(data)
        assert (facts.usage.input_tokens, facts.finish_reason) == (3, None)


@pytest.mark.parametrize("padding", [0, 400_000])
def test_a_chat_completion(padding: int) -> None:
    end = {"choices": [{"index": 0, "finish_reason": "stop"}], "padding": "x" * padding}
    whole = {"id": "c-1", "model": "gpt-4o-2", **end}
    wanted = "stop", "c-1", "gpt-4o-2"
    if not padding:
        assert said(Dialect.OPENAI, json.dumps(whole).encode()) == wanted
    begun = {"id": "c-1", "model": "gpt-4o-2", "choices": [{"delta": {"content": "x" * padding}}]}
    assert said(Dialect.OPENAI, stream(begun, {"choices": [{"finish_reason": "stop"}]})) == wanted


def test_the_id_is_that_of_the_answer_and_not_of_a_call_in_it() -> None:
    call = {"tool_calls": [{"id": "call_1", "function": {"name": "f"}}]}
    first = {"choices": [], "id": "", "prompt_filter_results": []}  # as Azure begins
    second = {"choices": [{"delta": call}], "model": "gpt-4o-2", "id": "c-1"}
    assert said(Dialect.OPENAI, stream(first, second)) == (None, "c-1", "gpt-4o-2")


def test_anthropic() -> None:
    begun = {"type": "message_start", "message": {"id": "msg_1", "model": "claude-1"}}
    ended = {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}}
    assert said(Dialect.ANTHROPIC, stream(begun, ended)) == ("max_tokens", "msg_1", "claude-1")
    whole = {"id": "msg_1", "model": "claude-1", "stop_reason": "end_turn"}
    assert said(Dialect.ANTHROPIC, json.dumps(whole).encode()) == ("end_turn", "msg_1", "claude-1")


@pytest.mark.parametrize("padding", [0, 400_000])
def test_gemini_tells_it_at_the_end(padding: int) -> None:
    parts = [{"text": "x" * padding}]
    whole = {
        "candidates": [{"content": {"parts": parts}, "finishReason": "STOP"}],
        "modelVersion": "gemini-1",
        "responseId": "r-1",
    }
    wanted = "STOP", "r-1", "gemini-1"
    assert said(Dialect.GEMINI, json.dumps(whole).encode()) == wanted
    assert said(Dialect.GEMINI, json.dumps([whole, whole]).encode()) == wanted
    assert said(Dialect.GEMINI, stream(whole)) == wanted


def test_gemini_s_numbers_and_blocked_prompts() -> None:
    numbered = {"candidates": [{"finishReason": 2}]}
    assert said(Dialect.GEMINI, json.dumps(numbered).encode())[0] == "2"
    assert said(Dialect.GEMINI, json.dumps([numbered]).encode())[0] == "2"
    blocked = {"promptFeedback": {"blockReason": "SAFETY"}}
    assert said(Dialect.GEMINI, json.dumps(blocked).encode())[0] == "SAFETY"
    assert said(Dialect.GEMINI, stream(blocked))[0] == "SAFETY"
