"""What an answer says that it cost. Pure.

A short answer that is one JSON object is parsed, which is cheaper than any search. Others, long or
in a stream, are not taken apart: a provider tells the usage in an object under one key, near the
end, and it is looked for from the end. Inside of a text the quotes of that key would be escaped, so
no answer can pretend to it. Invariant: what is not said stays unknown, never zero.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from tidegate.call import Usage
from tidegate.relay.paths import Dialect

HEAD_BYTES = 4_096
TAIL_BYTES = 65_536
_LONGEST_OBJECT = 16_384
_PARSED_BYTES = 32_768
_LONGEST_ID, _LONGEST_REASON = 200, 100
# Where an object says its usage and its id, where its choices are, and why one of them ended.
_PLACES: dict[Dialect, tuple[str, str, str | None, str]] = {
    Dialect.OPENAI: ("usage", "id", "choices", "finish_reason"),
    Dialect.ANTHROPIC: ("usage", "id", None, "stop_reason"),
    Dialect.GEMINI: ("usageMetadata", "responseId", "candidates", "finishReason"),
}
_DETAILS = frozenset(
    (
        *("completion_tokens_details", "output_tokens_details"),
        *("prompt_tokens_details", "input_tokens_details"),
    )
)
_DECODER = json.JSONDecoder()
_KEYS = {
    Dialect.OPENAI: re.compile(rb'"usage"\s*:\s*(?=\{)'),
    Dialect.ANTHROPIC: re.compile(rb'"usage"\s*:\s*(?=\{)'),
    Dialect.GEMINI: re.compile(rb'"usageMetadata"\s*:\s*(?=\{)'),
}
_ID = {
    Dialect.OPENAI: re.compile(rb'"id"\s*:\s*"([^"\\]{1,200})"'),
    Dialect.ANTHROPIC: re.compile(rb'"id"\s*:\s*"([^"\\]{1,200})"'),
    Dialect.GEMINI: re.compile(rb'"responseId"\s*:\s*"([^"\\]{1,200})"'),
}
_FINISH = {
    Dialect.OPENAI: re.compile(rb'"finish_reason"\s*:\s*"([^"\\]{1,100})"'),
    Dialect.ANTHROPIC: re.compile(rb'"stop_reason"\s*:\s*"([^"\\]{1,100})"'),
    Dialect.GEMINI: re.compile(rb'"finishReason"\s*:\s*"([^"\\]{1,100})"'),
}
_PICTURES = {
    Dialect.OPENAI: re.compile(rb'"b64_json"\s*:\s*"|"url"\s*:\s*"'),
    Dialect.GEMINI: re.compile(rb'"inlineData"\s*:\s*\{'),
}


@dataclass(frozen=True, slots=True)
class Told:
    """What an answer says of itself."""

    usage: Usage
    finish_reason: str | None = None
    response_id: str | None = None


NOTHING_TOLD = Told(Usage())


def told_in(dialect: Dialect, answer: bytes) -> Told:
    """What an answer says, whole or cut."""
    if len(answer) <= _PARSED_BYTES and answer.startswith(b"{"):
        try:
            told = _told_by_object(dialect, orjson.loads(answer))
        except orjson.JSONDecodeError:  # cut off
            told = None
        if told is not None:
            return told
    return told_by(dialect, answer[:HEAD_BYTES], answer[-TAIL_BYTES:])


def _told_by_object(dialect: Dialect, whole: dict[str, Any]) -> Told | None:
    """None where the usage is not at its usual place: it is searched for then."""
    usage_key, id_key, choices_key, finish_key = _PLACES[dialect]
    raw, identity = whole.get(usage_key), whole.get(id_key)
    if type(raw) is not dict:
        return None
    finish = None
    if choices_key is None:
        finish = whole.get(finish_key)
    elif type(choices := whole.get(choices_key)) is list and choices:
        last = choices[-1]
        finish = last.get(finish_key) if type(last) is dict else None
    return Told(
        usage_of(dialect, raw),
        finish if type(finish) is str and len(finish) <= _LONGEST_REASON else None,
        identity if type(identity) is str and len(identity) <= _LONGEST_ID else None,
    )


def told_by(dialect: Dialect, head: bytes, tail: bytes) -> Told:
    """What is in the first and the last bytes of an answer; both are all of a short one."""
    raw = _usage_in(dialect, tail, last=True)
    if dialect is Dialect.ANTHROPIC:
        # The input is told in the first event of a stream, the output in the last.
        raw = {**(_usage_in(dialect, head, last=False) or {}), **(raw or {})} or None
    identity = _ID[dialect].search(head)
    finish = None
    for finish in _FINISH[dialect].finditer(tail):  # noqa: B007 -- the last one counts
        pass
    return Told(
        usage=Usage() if raw is None else usage_of(dialect, raw),
        finish_reason=finish[1].decode("utf-8", "replace") if finish else None,
        response_id=identity[1].decode("utf-8", "replace") if identity else None,
    )


def _usage_in(dialect: Dialect, data: bytes, *, last: bool) -> dict[str, Any] | None:
    """The first or the last object under the dialect's key that is whole."""
    places = [found.end() for found in _KEYS[dialect].finditer(data)]
    for place in reversed(places) if last else places:
        text = data[place : place + _LONGEST_OBJECT].decode("utf-8", "replace")
        try:
            value, _ = _DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            continue  # cut off
        if isinstance(value, dict):
            return value
    return None


def pictures_in(dialect: Dialect, body: bytes) -> int:
    """How many pictures a whole answer holds."""
    pattern = _PICTURES.get(dialect)
    return 0 if pattern is None else len(pattern.findall(body))


def usage_of(dialect: Dialect, raw: Mapping[str, Any]) -> Usage:
    """The usage in a provider's own words."""
    if dialect is Dialect.GEMINI:
        return _gemini(raw)
    return _anthropic(raw) if dialect is Dialect.ANTHROPIC else _openai(raw)


def _openai(raw: Mapping[str, Any]) -> Usage:
    taken = _count(raw, "prompt_tokens", "input_tokens")
    given = _count(raw, "completion_tokens", "output_tokens")
    total = _count(raw, "total_tokens")
    thoughts = cached = None
    if not _DETAILS.isdisjoint(raw):
        details = _part(raw, "completion_tokens_details", "output_tokens_details")
        thoughts = _count(details, "reasoning_tokens") if details else None
        details = _part(raw, "prompt_tokens_details", "input_tokens_details")
        cached = _count(details, "cached_tokens") if details else None
    if given is None and taken is not None and total is not None:
        given = max(0, total - taken)  # an embedding says no more
    return Usage(
        input_tokens=taken,
        # The thoughts are in it; ours are apart.
        output_tokens=given if given is None or thoughts is None else max(0, given - thoughts),
        thoughts_tokens=thoughts,
        cached_tokens=cached,
        total_tokens=total,
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
    )


def _anthropic(raw: Mapping[str, Any]) -> Usage:
    fresh, given = _count(raw, "input_tokens"), _count(raw, "output_tokens")
    written = _count(raw, "cache_creation_input_tokens") or 0
    cached = _count(raw, "cache_read_input_tokens")
    taken = None if fresh is None else fresh + written + (cached or 0)
    total = None if taken is None or given is None else taken + given
    return Usage(taken, given, None, cached, total)


def _part(raw: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    for name in names:
        value = raw.get(name)
        if type(value) is dict:
            return value
    return {}


def _count(raw: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = raw.get(name)
        if type(value) is int and value >= 0:
            return value
    return None
