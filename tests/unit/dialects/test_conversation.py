"""Calls of one conversation are known by how it began, in every dialect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tidegate.dialects.requests import conversation_of

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
