"""The usage that a provider tells of an answer. Pure.

Invariant: usage is read at its known place alone: the outermost object of a whole answer, or an
event of a stream (`usage`, `response.usage`, `message.usage`, `usageMetadata`). Whatever else an
answer repeats of its request, or a model writes, is never taken for it. What is not told stays
unknown, never zero.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import orjson

from tidegate.call import UNKNOWN_USAGE, Usage
from tidegate.dialects.usage_details import (
    MOST_TOKENS,
    anthropic_details,
    audio_in,
    gemini_details,
    openai_details,
)
from tidegate.relay.paths import Dialect

HEAD_BYTES = 4_096
TAIL_BYTES = 65_536
_LONGEST_LIST_BYTES = 2_000_000
# Of a stream: the usage stands in one of its last events, where it is told at all.
_LAST_EVENTS = 8
_FIRST_EVENTS = 4
_MOST_CANDIDATES = 64
_PLACES = {
    Dialect.OPENAI: "usage",
    Dialect.ANTHROPIC: "usage",
    Dialect.GEMINI: "usageMetadata",
}
_DETAILS = frozenset(
    (
        *("completion_tokens_details", "output_tokens_details"),
        *("prompt_tokens_details", "input_tokens_details"),
    )
)
_DECODER = json.JSONDecoder()
_BETWEEN = re.compile(r"[\s,]*")  # the objects of a list
_KEYS = {
    Dialect.OPENAI: re.compile(rb'"usage"\s*:\s*\{'),
    Dialect.ANTHROPIC: re.compile(rb'"usage"\s*:\s*\{'),
    Dialect.GEMINI: re.compile(rb'"usageMetadata"\s*:\s*\{'),
}
# One that a response made by calling a tool; an event or two before repeat it.
_CALLED_PICTURE = re.compile(
    rb'"id"\s*:\s*"([^"\\]{1,200})"\s*,\s*"type"\s*:\s*"image_generation_call"'
    rb'[^{}]{0,2000}?"result"\s*:\s*"[^"]'
)
_PICTURES = {
    Dialect.OPENAI: re.compile(rb'"b64_json"\s*:\s*"|"url"\s*:\s*"'),
    Dialect.GEMINI: re.compile(rb'"inlineData"\s*:\s*\{'),
}


def usage_in(dialect: Dialect, answer: bytes, omitted: bool, cut: bool) -> dict[str, Any] | None:
    """The usage of an answer in the provider's words; None where it tells none. `omitted`: its
    middle is missing; its last `TAIL_BYTES` are in one piece. `cut`: it may not have come to its
    end, so that an object of its inside may be the last that came."""
    start = answer[:HEAD_BYTES].lstrip()[:1]
    if start == b"{":
        return None if cut else _of_outermost(dialect, answer[-TAIL_BYTES:])
    if start == b"[":
        tail = answer[-TAIL_BYTES:].rstrip()
        ended = tail.endswith(b"]") and not cut
        found = _of_outermost(dialect, tail[:-1]) if ended else None
        return _of_list(dialect, answer) if found is None and not omitted else found
    floor = answer.find(b"\n", len(answer) - TAIL_BYTES) if omitted else 0
    raw = None
    for event in last_events(answer, max(0, floor)):
        if (raw := _of_event(dialect, event)) is not None:
            break
    if dialect is Dialect.ANTHROPIC:
        # The input is told in the first event of a stream, the output in the last.
        begun = _of_start(answer)
        return _merged(begun, raw) if begun and raw else raw or begun
    return raw


def _of_outermost(dialect: Dialect, tail: bytes) -> dict[str, Any] | None:
    """The usage of an object that has come to its end, of which these are the last bytes.

    What follows a key closes as many objects and lists as the key is in. So only of a key of the
    outermost object the rest is an object once more when a brace is put before it.
    """
    key = _PLACES[dialect]
    places = [found.start() for found in _KEYS[dialect].finditer(tail)]
    for place in reversed(places[-_MOST_CANDIDATES:]):
        try:
            found = orjson.loads(b"{" + tail[place:])[key]
        except orjson.JSONDecodeError:
            continue
        if type(found) is dict:
            return found
    return None


def _of_list(dialect: Dialect, answer: bytes) -> dict[str, Any] | None:
    """The last usage that a whole object of a list tells; the list may be cut."""
    if len(answer) > _LONGEST_LIST_BYTES:
        return None
    text = answer.decode("utf-8", "replace")
    place, raw = text.index("[") + 1, None
    while (gap := _BETWEEN.match(text, place)) is not None:
        try:
            value, place = _DECODER.raw_decode(text, gap.end())
        except (ValueError, RecursionError):
            break
        if type(value) is dict and type(told := value.get(_PLACES[dialect])) is dict:
            raw = told
    return raw


def last_events(answer: bytes, floor: int = 0) -> Iterator[Any]:
    """The last events of a stream that hold a usage, each parsed, the last one first.

    Inside of JSON line ends are escaped, so a line that begins with `data:` is one of the stream.
    """
    end = len(answer)
    for _ in range(_LAST_EVENTS):
        place = answer.rfind(b"\ndata:", floor, end)
        begin = place + 6
        if place < 0:
            if floor or not answer.startswith(b"data:"):
                return
            begin = 5
        line_end = answer.find(b"\n", begin)
        line = answer[begin : line_end if line_end >= 0 else len(answer)]
        if b'"usage' in line:
            with suppress(orjson.JSONDecodeError):  # cut off
                yield orjson.loads(line)
        if place < 0:
            return
        end = place


def _merged(begun: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """A later figure counts, but for one that is null."""
    return begun | {name: value for name, value in raw.items() if value is not None}


def _of_start(answer: bytes) -> dict[str, Any] | None:
    """The usage that `message_start` tells, among the first events of a stream."""
    for line in answer[:TAIL_BYTES].split(b"\n", 4 * _FIRST_EVENTS):
        if line.startswith(b"data:") and b'"message_start"' in line:
            try:
                message = part_of(orjson.loads(line[5:]), "message")
            except (orjson.JSONDecodeError, AttributeError):
                return None
            return part_of(message, "usage") or None
    return None


def _of_event(dialect: Dialect, event: Any) -> dict[str, Any] | None:
    """The usage of one event of a stream, at the places where providers tell it."""
    if type(event) is not dict:
        return None
    if dialect is Dialect.GEMINI:
        return part_of(event, "usageMetadata") or None
    if dialect is Dialect.ANTHROPIC:
        return part_of(event, "usage") or None
    if found := part_of(event, "usage") or part_of(part_of(event, "response"), "usage"):
        return found
    choices = event.get("choices")  # Groq's place, and Moonshot's
    last = choices[-1] if type(choices) is list and choices else None
    return part_of(part_of(event, "x_groq"), "usage") or part_of(last, "usage") or None


def pictures_in(dialect: Dialect, body: bytes) -> int:
    """How many pictures a whole answer holds."""
    if dialect is Dialect.OPENAI and b'"image_generation_call"' in body:
        return len(set(_CALLED_PICTURE.findall(body)))
    pattern = _PICTURES.get(dialect)
    return 0 if pattern is None else len(pattern.findall(body))


def usage_at(dialect: Dialect, whole: dict[str, Any]) -> Usage:
    """The usage of a whole answer that was parsed."""
    raw = whole.get(_PLACES[dialect])
    return usage_of(dialect, raw) if type(raw) is dict else UNKNOWN_USAGE


def usage_of(dialect: Dialect, raw: Mapping[str, Any]) -> Usage:
    """The usage in a provider's own words. Where they do not add up, their total counts."""
    if dialect is Dialect.GEMINI:
        return _gemini(raw)
    return _anthropic(raw) if dialect is Dialect.ANTHROPIC else _openai(raw)


def _openai(raw: Mapping[str, Any]) -> Usage:
    taken = _count(raw, "prompt_tokens", "input_tokens")
    given = _count(raw, "completion_tokens", "output_tokens")
    total = _count(raw, "total_tokens")
    thoughts = cached = None
    of_taken: dict[str, Any] = {}
    of_given: dict[str, Any] = {}
    if not _DETAILS.isdisjoint(raw):
        of_given = part_of(raw, "completion_tokens_details", "output_tokens_details")
        thoughts = _count(of_given, "reasoning_tokens") if of_given else None
        of_taken = part_of(raw, "prompt_tokens_details", "input_tokens_details")
        cached = _count(of_taken, "cached_tokens") if of_taken else None
    if cached is None:  # Moonshot's and Together's name, Mistral's; DeepSeek's
        cached = _count(raw, "cached_tokens", "num_cached_tokens")
        cached = _count(raw, "prompt_cache_hit_tokens") if cached is None else cached
    details = openai_details(raw, of_taken, of_given)
    if taken is not None and total is not None and total > taken + (given or 0):
        if given is not None and "prompt_audio_seconds" in raw:
            # Mistral's input beside the text.
            details = audio_in(details, total - given - taken)
            taken = total - given
        else:
            # An embedding's input is all; xAI leaves the thoughts out of the output, and Gemini
            # tells in OpenAI's dialect of none.
            if thoughts is None and given is not None:
                thoughts = total - taken - given
            given = total - taken
    elif given is None and taken is not None and total is not None:
        given = 0
    if given is not None and thoughts is not None:
        # They are in it; ours are apart.
        thoughts = min(thoughts, given)
        given -= thoughts
    return Usage(
        input_tokens=taken,
        output_tokens=given,
        thoughts_tokens=thoughts,
        cached_tokens=cached,
        total_tokens=total,
        details=details,
    )


def _gemini(raw: Mapping[str, Any]) -> Usage:
    taken, total = _count(raw, "promptTokenCount"), _count(raw, "totalTokenCount")
    tools = _count(raw, "toolUsePromptTokenCount")
    given, thoughts = _count(raw, "candidatesTokenCount"), _count(raw, "thoughtsTokenCount")
    if given is None and total is not None and taken is not None:
        # It leaves out what is 0.
        given = max(0, total - taken - (thoughts or 0) - (tools or 0))
    return Usage(
        input_tokens=taken if taken is None or tools is None else taken + tools,
        output_tokens=given,
        thoughts_tokens=thoughts,
        cached_tokens=_count(raw, "cachedContentTokenCount"),
        total_tokens=total,
        details=gemini_details(raw),
    )


def _anthropic(raw: Mapping[str, Any]) -> Usage:
    fresh, given = _count(raw, "input_tokens"), _count(raw, "output_tokens")
    written = _count(raw, "cache_creation_input_tokens") or 0
    cached = _count(raw, "cache_read_input_tokens")
    taken = None if fresh is None else fresh + written + (cached or 0)
    total = None if taken is None or given is None else taken + given
    thoughts = _count(part_of(raw, "output_tokens_details"), "thinking_tokens")
    if given is not None and thoughts is not None:
        thoughts = min(thoughts, given)
        given -= thoughts
    return Usage(taken, given, thoughts, cached, total, anthropic_details(raw))


def part_of(raw: Any, *names: str) -> dict[str, Any]:
    """The first of these members that is an object; empty where there is none."""
    if type(raw) is dict:
        for name in names:
            value = raw.get(name)
            if type(value) is dict:
                return value
    return {}


def _count(raw: Mapping[str, Any], name: str, other: str | None = None) -> int | None:
    value = raw.get(name)
    if type(value) is int and 0 <= value <= MOST_TOKENS:
        return value
    return None if other is None else _count(raw, other)
