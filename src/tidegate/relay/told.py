"""What an answer tells of itself: its usage, why it ended, its id, and the model's version. Pure.

Invariant: only what stands at its known place is read, in the outermost object of a whole answer or
in an event of a stream; an answer that is too long to be parsed is read at its start and its end.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import orjson

from tidegate.call import UNKNOWN_USAGE, Usage
from tidegate.dialects.usage_details import queries_of, searches_of_response, with_searches
from tidegate.relay.paths import Dialect
from tidegate.relay.usage import (
    HEAD_BYTES,
    TAIL_BYTES,
    last_events,
    part_of,
    usage_at,
    usage_in,
    usage_of,
)

_PARSED_BYTES = 262_144
_LONGEST_TEXT = 200
_FIRST_EVENTS, _LAST_EVENTS = 4, 2
_LONGEST_EVENT_BYTES = 65_536
_LONGEST_READ_BYTES = 2_000_000
_SEARCHED = b'"webSearchQueries"'
_SEARCH_CALL = b'"web_search_call"'
# The names of an answer's id and version, where its choices are, and why one of them ended.
_PLACES: dict[Dialect, tuple[str, str, str | None, str]] = {
    Dialect.OPENAI: ("id", "model", "choices", "finish_reason"),
    Dialect.ANTHROPIC: ("id", "model", None, "stop_reason"),
    Dialect.GEMINI: ("responseId", "modelVersion", "candidates", "finishReason"),
}
_ENDED = frozenset({"completed", "incomplete", "failed", "cancelled"})


def _said(name: str) -> re.Pattern[bytes]:
    return re.compile(rb'"%b"\s*:\s*"([^"\\]{1,200})"' % name.encode())


_PATTERNS = {
    dialect: (_said(identity), _said(version), _said(finish))
    for dialect, (identity, version, _, finish) in _PLACES.items()
}
_BLOCKED = _said("blockReason")
_NUMBERED = re.compile(rb'"finishReason"\s*:\s*(\d{1,9})\b')
_STATUS = re.compile(rb'"status"\s*:\s*"(completed|incomplete|failed|cancelled)"')


# Not frozen, as all else of its kind: each call would pay for that.
@dataclass(slots=True, unsafe_hash=True)
class Told:
    """What an answer says of itself; nobody changes it. model_version: of the model that answered,
    which need not be the one that was asked for."""

    usage: Usage
    finish_reason: str | None = None
    response_id: str | None = None
    model_version: str | None = None


NOTHING_TOLD = Told(UNKNOWN_USAGE)


def told_in(dialect: Dialect, answer: bytes, *, omitted: bool = False, cut: bool = False) -> Told:
    """What an answer says. `omitted` and `cut` as in `usage_in`."""
    if len(answer) <= _PARSED_BYTES and answer.startswith(b"{"):
        with suppress(orjson.JSONDecodeError):  # cut off
            return _told_by_object(dialect, orjson.loads(answer), answer)
    raw = usage_in(dialect, answer, omitted, cut)
    usage = UNKNOWN_USAGE if raw is None else usage_of(dialect, raw)
    tail = max(0, len(answer) - TAIL_BYTES)
    if dialect is Dialect.OPENAI and (ended := _end_of_response(answer, omitted)):
        return Told(with_searches(usage, searches_of_response(ended)), *_of_response(ended))
    if dialect is Dialect.GEMINI and _SEARCHED in answer:
        usage = with_searches(usage, len(_queries_in(answer)))
    elif dialect is Dialect.OPENAI and _SEARCH_CALL in answer and answer.startswith(b"{"):
        usage = with_searches(usage, _searches_in(answer))
    identity, version, finish = _PATTERNS[dialect]
    ended_by = _last(finish, answer, tail)
    if ended_by is None and dialect is Dialect.GEMINI:
        ended_by = _last(_NUMBERED, answer, tail) or _last(_BLOCKED, answer, tail)
    if ended_by is None and dialect is Dialect.OPENAI and answer.startswith(b"{"):
        ended_by = _text_of(_STATUS.search(answer, 0, HEAD_BYTES))
    begun = _first_event(answer, _PLACES[dialect][0])
    return Told(
        usage,
        ended_by,
        _text(begun.get(_PLACES[dialect][0]))
        or _first(identity, answer)
        or _last(identity, answer, tail),
        _text(begun.get(_PLACES[dialect][1]))
        or _first(version, answer)
        or _last(version, answer, tail),
    )


def _told_by_object(dialect: Dialect, whole: dict[str, Any], answer: bytes) -> Told:
    usage = usage_at(dialect, whole)
    if dialect is Dialect.OPENAI and whole.get("object") == "response":
        return Told(with_searches(usage, searches_of_response(whole)), *_of_response(whole))
    if dialect is Dialect.GEMINI and _SEARCHED in answer:
        usage = with_searches(usage, len(queries_of(whole)))
    id_key, version_key, choices_key, finish_key = _PLACES[dialect]
    finish = None
    if choices_key is None:
        finish = whole.get(finish_key)
    elif type(choices := whole.get(choices_key)) is list and choices:
        last = choices[-1]
        finish = last.get(finish_key) if type(last) is dict else None
    if finish is None and dialect is Dialect.GEMINI:
        finish = part_of(whole, "promptFeedback").get("blockReason")
    return Told(usage, _text(finish), _text(whole.get(id_key)), _text(whole.get(version_key)))


def _of_response(response: dict[str, Any]) -> tuple[str | None, str | None, str | None]:
    """Why a response of OpenAI's ended, its id and its model."""
    status = response.get("status")
    reason = part_of(response, "incomplete_details").get("reason")
    finish = (reason or status) if status in _ENDED else None
    return _text(finish), _text(response.get("id")), _text(response.get("model"))


def _end_of_response(answer: bytes, omitted: bool) -> dict[str, Any] | None:
    """The response that the last event of its stream repeats."""
    if b'"response.' not in answer[:HEAD_BYTES]:
        return None
    floor = max(0, answer.find(b"\n", len(answer) - TAIL_BYTES)) if omitted else 0
    for event in islice(last_events(answer, floor), _LAST_EVENTS):
        response = part_of(event, "response")
        if response.get("status") in _ENDED:
            return response
    return None


def _searches_in(answer: bytes) -> int:
    """Those of a response that is too long to be parsed for all that it tells, as with pictures."""
    if len(answer) <= _LONGEST_READ_BYTES:
        with suppress(orjson.JSONDecodeError):  # cut off
            return searches_of_response(orjson.loads(answer))
    return 0


def _queries_in(answer: bytes) -> set[str]:
    """What was searched for by an answer in several pieces; a later one may repeat an earlier."""
    found: set[str] = set()
    if answer[:HEAD_BYTES].lstrip()[:1] in (b"[", b"{"):
        if len(answer) <= _LONGEST_READ_BYTES:
            with suppress(orjson.JSONDecodeError):  # cut off
                whole = orjson.loads(answer)
                for chunk in whole if type(whole) is list else (whole,):
                    found |= queries_of(chunk)
        return found
    end, read_bytes = 0, 0
    while (place := answer.find(_SEARCHED, end)) >= 0 and read_bytes < _LONGEST_READ_BYTES:
        start = answer.rfind(b"\n", 0, place) + 1
        end = answer.find(b"\n", place)
        line = answer[start:] if end < 0 else answer[start:end]
        read_bytes += len(line)
        if line.startswith(b"data:"):
            with suppress(orjson.JSONDecodeError):  # cut off
                found |= queries_of(orjson.loads(line[5:]))
        if end < 0:
            break
    return found


def _first_event(answer: bytes, identity: str) -> dict[str, Any]:
    """The first event of a stream that tells an id, or the message that it begins."""
    place = 0
    for _ in range(_FIRST_EVENTS):
        start = place if answer.startswith(b"data:", place) else answer.find(b"\ndata:", place) + 1
        end = answer.find(b"\n", start, start + _LONGEST_EVENT_BYTES)
        if end < 0 or not answer.startswith(b"data:", start):
            break
        place = end
        try:
            event = orjson.loads(answer[start + 5 : end])
        except orjson.JSONDecodeError:
            continue
        teller = part_of(event, "message") or event
        if type(teller) is dict and teller.get(identity):
            return teller
    return {}


def _first(pattern: re.Pattern[bytes], answer: bytes) -> str | None:
    return _text_of(pattern.search(answer, 0, HEAD_BYTES))


def _last(pattern: re.Pattern[bytes], answer: bytes, tail: int) -> str | None:
    found = None
    for found in pattern.finditer(answer, tail):  # noqa: B007 -- the last one counts
        pass
    return _text_of(found)


def _text_of(found: re.Match[bytes] | None) -> str | None:
    return found[1].decode("utf-8", "replace") if found else None


def _text(value: Any) -> str | None:
    """A short text; a number, as Google writes its enumerations where it is asked to, as one."""
    if type(value) is int:
        value = str(value)
    return value if type(value) is str and 0 < len(value) <= _LONGEST_TEXT else None
