"""Calls of one conversation are known by how it began, and found by what was asked last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tidegate.dialects.requests import conversation_of, prompt_head

Body = dict[str, Any]


def chat(system: str, *turns: str) -> Body:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"model": "m", "messages": [{"role": "system", "content": system}, *messages]}


def messages(system: str, *turns: str) -> Body:
    return {"model": "m", "system": system, "messages": chat("", *turns)["messages"][1:]}


def responses(system: str, *turns: str) -> Body:
    return {"model": "m", "instructions": system, "input": chat("", *turns)["messages"][1:]}


def contents(system: str, *turns: str) -> Body:
    parts = [{"role": "user", "parts": [{"text": turn}]} for turn in turns]
    return {"systemInstruction": {"parts": [{"text": system}]}, "contents": parts}


DIALECTS = [chat, messages, responses, contents]


@pytest.mark.parametrize("make", DIALECTS)
def test_a_conversation_keeps_its_digests_as_it_grows(make: Callable[..., Body]) -> None:
    first = conversation_of(make("be brief", "hello"))
    assert first is not None
    assert conversation_of(make("be brief", "hello", "hi", "more")) == first
    assert first[0] != first[1]


@pytest.mark.parametrize("make", DIALECTS)
def test_another_conversation_has_the_opening_in_common(make: Callable[..., Body]) -> None:
    first, other = conversation_of(make("be brief", "a")), conversation_of(make("be brief", "b"))
    assert first is not None
    assert other is not None
    assert first[0] == other[0]
    assert first[1] != other[1]


@pytest.mark.parametrize("make", DIALECTS)
def test_another_opening_is_another_conversation(make: Callable[..., Body]) -> None:
    plain, tools = make("be brief", "a"), make("be brief", "a") | {"tools": [{"name": "t"}]}
    found = {conversation_of(body) for body in (plain, tools, make("be long", "a"))}
    assert len(found) == 3


@pytest.mark.parametrize("body", [{}, {"input": "text"}, {"messages": []}, {"contents": {"a": 1}}])
def test_a_body_without_messages_is_no_conversation(body: Body) -> None:
    assert conversation_of(body) is None


def test_what_is_no_message_is_taken_as_it_is() -> None:
    assert conversation_of({"input": ["a", 5]}) == conversation_of({"input": ["a", 6]})


@pytest.mark.parametrize("make", DIALECTS)
def test_a_call_is_found_by_what_its_user_said_last(make: Callable[..., Body]) -> None:
    body = make("be brief", "hello", "hi", "which tide?")
    assert prompt_head(body) == "which tide?"
    long = make("be brief", "a" * 501)
    assert prompt_head(long) == "a" * 500


def test_results_of_tools_are_no_prompt() -> None:
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which tide?"}]},
        {"role": "assistant", "content": "let me look"},
        {"role": "user", "content": [{"type": "tool_result", "content": "high"}]},
    ]
    assert prompt_head({"messages": turns}) == "which tide?"
    assert prompt_head({"messages": [{"role": "tool", "content": "high"}]}) == ""


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ({"input": "a"}, "a"),
        ({"prompt": "a picture"}, "a picture"),
        ({"input": ["a", "b"]}, "b"),
        ({}, ""),
        ({"messages": {"role": "user"}}, ""),
        ({"messages": [7, None, {"role": 7, "content": 7}, {"content": [7, {"text": 7}]}]}, ""),
    ],
)
def test_whatever_a_body_has_in_the_place_of_a_prompt_is_taken_as_it_is(
    body: Body, head: str
) -> None:
    assert prompt_head(body) == head
