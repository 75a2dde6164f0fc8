"""Response facts: errors within a 200 stream, finish reasons, ids, model versions, visible output.
Pure.

Read are only known places: the outermost object of a whole answer, or an event of a stream. An
answer that is too long to parse is read at its start and end. The visible output is counted also
for answers that were cut; text that a stream repeats at its end counts once.

Invariants: a model's text can't imitate an event, because quotes and line ends in it are escaped;
bytes are forwarded as they came.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import orjson

from tidegate.admission.demand import came_tokens
from tidegate.call import UNKNOWN_USAGE, Usage
from tidegate.dialects import faults
from tidegate.dialects.routes import Dialect, Headers
from tidegate.dialects.usage import (
    HEAD_BYTES,
    TAIL_BYTES,
    last_events,
    part_of,
    pictures_in,
    queries_of,
    searches_of_response,
    usage_at,
    usage_in,
    usage_of,
    with_searches,
)
from tidegate.errors import UpstreamError

# The first that is no comment: an error, in an event, in a list or alone.
_BEGINS = re.compile(
    rb"(?:\s+|:[^\n]*\n|(?:event|id|retry):[^\n]*\n)*(?:data:)?\s*\[?\s*\{\s*"
    rb'(?:"error"\s*:\s*[{"]|"type"\s*:\s*"error"|"type"\s*:\s*"response\.failed")'
)
# A first piece that is shorter may be half of a line that says so.
SHORTEST_BYTES = 64
LONGEST_BYTES = 65_536
_HEAD_BYTES = 160
_TAIL_BYTES = 16_384
_ENOUGH_BYTES, _MOST_TAIL_BYTES = 2_048, 4_000_000
# The start of an event that says something, and what all say that tell an error.
_EVENT = re.compile(rb"(?:^|\n)data:(?!\s*\[DONE\])")
_MAY_TELL = re.compile(rb'"error"\s*:\s*[{"]|"type"\s*:\s*"(?:error|response\.failed)"')
_IN_LIST = re.compile(rb'[\[,]\s*(?=\{\s*"error"\s*:\s*\{)')
_DECODER = json.JSONDecoder()
_STATUSES = {
    "overloaded_error": 529,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "tokens": 429,
    "requests": 429,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "invalid_request_error": 400,
    "request_too_large": 413,
    "timeout_error": 504,
}


def is_too_short(first: bytes) -> bool:
    """Whether the first bytes of a stream may be half of a line that tells an error."""
    if len(first) >= SHORTEST_BYTES or first.endswith((b"\n\n", b"\r\n\r\n")):
        return False
    return not first.endswith(b"\n") or first.lstrip()[:6] in (b"", b"event:")


def tail_of(pieces: list[bytes]) -> bytes:
    """The last bytes of an answer, enough for an error: with the whole of its last event, which
    repeats what was asked for and may be long."""
    start, size_bytes = len(pieces), 0
    is_whole = bool(pieces) and pieces[0].lstrip()[:1] in (b"[", b"{")  # no events
    while start and (size_bytes < _ENOUGH_BYTES or not is_whole):
        start -= 1
        size_bytes += len(pieces[start])
        is_whole = is_whole or size_bytes > _MOST_TAIL_BYTES or bool(_EVENT.search(pieces[start]))
    return b"".join(pieces[start:])


def may_begin_with_error(first: bytes) -> bool:
    """Of the first bytes of an answer."""
    head = first[:_HEAD_BYTES]  # nearly all are seen to be none at a glance
    if b"error" not in head and b"response.failed" not in head:
        return False
    return _BEGINS.match(first) is not None


def error_in(data: bytes) -> dict[str, Any] | None:
    """The object that tells an error, in the first or the last bytes of an answer."""
    if _MAY_TELL.search(data) is None:
        return None
    for line in reversed(data.splitlines()):
        told = line.startswith(b"data:") and _MAY_TELL.search(line) and _telling(line[5:])
        if told:
            return told
    if (found := _telling(data)) is not None:
        return found
    tail = data[-_TAIL_BYTES:]
    places = [one.end() for one in _IN_LIST.finditer(tail)]
    return _telling(tail[places[-1] :], at_start=True) if places else None


def _telling(text: bytes, *, at_start: bool = False) -> dict[str, Any] | None:
    """`at_start`: something may follow the object."""
    said = text.decode("utf-8", "replace").strip()
    try:
        value = _DECODER.raw_decode(said)[0] if at_start else json.loads(said)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    return value if isinstance(value, dict) and _error_of(value) else None


def _error_of(value: dict[str, Any]) -> dict[str, Any] | None:
    if value.get("type") == "response.failed" and isinstance(value.get("response"), dict):
        value = value["response"]
    error = value.get("error")
    if isinstance(error, str):
        return {"message": error}
    if isinstance(error, dict):
        return error
    return value if value.get("type") == "error" else None


def tells_error(value: dict[str, Any]) -> bool:
    """Whether an event of a stream, or an object of a list, tells an error."""
    return _error_of(value) is not None


def body_of(value: dict[str, Any]) -> dict[str, Any]:
    """The body of an answer that tells the error from the start, as clients read it."""
    if value.get("type") == "response.failed":
        return {"error": _error_of(value)}
    return value


def status_of(value: dict[str, Any]) -> int:
    """The HTTP status that the error would have had."""
    error = _error_of(value) or {}
    for word in ("code", "type"):
        if (status := _STATUSES.get(str(error.get(word)))) is not None:
            return status
    return faults.code_of(error)


def error_of(
    value: dict[str, Any], headers: Iterable[tuple[bytes, bytes]], *, secret: str
) -> UpstreamError:
    """What the error is to us."""
    named = {name.decode("latin-1").lower(): said.decode("latin-1") for name, said in headers}
    return faults.from_status(status_of(value), _error_of(value) or {}, named, secret=secret)


def own_headers(headers: Headers) -> Headers:
    """Those of the answer that an error of its own may bear."""
    framing = (b"content-type", b"content-length", b"cache-control")
    kept = [pair for pair in headers if pair[0] not in framing]
    return [(b"content-type", b"application/json"), *kept]


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


# A longer stream is read in places spread evenly over it, and what they hold stands for the rest.
_READ_BYTES = 2_000_000
_CAME_PLACES = 16
# The fields in which the dialects put what a model says, thinks, or calls tools with, where an
# answer can't be parsed; a text that was cut goes up to where it was.
_SAID = re.compile(
    rb'"(?:content|text|delta|thinking|reasoning|reasoning_content|refusal|arguments|partial_json'
    rb'|code)"\s*:\s*("(?:[^"\\]|\\.)*+"?)',
    re.DOTALL,
)
# How a stream of events begins, whatever its first line says.
_EVENTS = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:data|event|id|retry)?:")
_BYTES_A_TOKEN = 4
_CALLED = re.compile(rb'"(?:input|args)"\s*:\s*(?=\{)')
_MOST_OBJECTS, _LONGEST_OBJECT_BYTES = 64, 65_536


@dataclass(slots=True)
class Came:
    """About how many LLM tokens came, pictures among them, and how many pictures."""

    tokens: int = 0
    pictures: int = 0


@dataclass(slots=True)
class _Heard:
    """What the events so far have shown. `again`: texts that repeat earlier pieces as a whole."""

    texts: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    pictures: set[str] = field(default_factory=set)
    unnamed_pictures: int = 0


def came_in(dialect: Dialect, answer: bytes, answer_bytes: int) -> Came:
    """What came of an answer. `answer` is what was kept of `answer_bytes`."""
    if not answer:
        return Came()
    if answer[:256].lstrip()[:1] in (b"{", b"["):
        pictures = pictures_in(dialect, answer)
        texts, scale = "".join(_texts_in(answer)), answer_bytes / len(answer)
        return Came(came_tokens(texts, scale=scale, images=pictures), pictures)
    if _EVENTS.match(answer) is None:  # in a form that nobody here reads: as much as it is
        return Came(-(-answer_bytes // _BYTES_A_TOKEN))
    heard, read_bytes = _Heard(), 0
    for part in _parts(answer):
        read_bytes += len(part)
        for line in part.split(b"\n"):
            if line.startswith(b"data:"):
                _hear(dialect, line[5:], heard)
    texts = max("".join(heard.texts), "".join(heard.again), key=len)
    pictures = heard.unnamed_pictures + len(heard.pictures)
    scale = answer_bytes / max(1, read_bytes)
    return Came(came_tokens(texts, scale=scale, images=pictures), pictures)


def _parts(stream: bytes) -> Iterator[bytes]:
    """The stream, or places of it that begin and end with whole lines."""
    if len(stream) <= _READ_BYTES:
        yield stream
        return
    end = 0
    for number in range(_CAME_PLACES):
        start = stream.rfind(b"\ndata:", 0, number * len(stream) // _CAME_PLACES + 1) + 1
        start = max(start, end)
        end = stream.find(b"\n", start + _READ_BYTES // _CAME_PLACES)
        if end < 0:
            yield stream[start:]
            return
        yield stream[start:end]


def _hear(dialect: Dialect, line: bytes, heard: _Heard) -> None:
    try:
        event = orjson.loads(line)
    except orjson.JSONDecodeError:  # cut off; or the end of the stream, which says nothing
        heard.texts += _texts_in(line)
        return
    if type(event) is not dict:
        return
    if dialect is Dialect.GEMINI:
        _hear_gemini(event, heard)
    elif dialect is Dialect.ANTHROPIC:
        _hear_anthropic(event, heard)
    elif type(event.get("type")) is str and event["type"].startswith("response."):
        _hear_response(event, heard)
    else:
        _hear_chat(event, heard)


def _hear_gemini(event: dict[str, Any], heard: _Heard) -> None:
    for candidate in _objects(event.get("candidates")):
        for part in _objects(_object(candidate.get("content")).get("parts")):
            for name, value in part.items():
                if name in ("inlineData", "inline_data"):
                    mime = str(_object(value).get("mimeType", ""))
                    heard.unnamed_pictures += not mime.startswith("audio/")
                elif name == "text" and type(value) is str:
                    heard.texts.append(value)
                elif type(value) is dict:  # a function's call, code, what code gave
                    heard.texts.append(_as_text(value))


def _hear_anthropic(event: dict[str, Any], heard: _Heard) -> None:
    delta = _object(event.get("delta"))
    block = _object(event.get("content_block"))
    for shown in (delta, block):
        for name in ("text", "thinking", "partial_json"):
            if type(shown.get(name)) is str:
                heard.texts.append(shown[name])
    if block.get("input"):
        heard.texts.append(_as_text(block["input"]))


def _hear_response(event: dict[str, Any], heard: _Heard) -> None:
    if type(event.get("delta")) is str and event["type"] != "response.audio.delta":
        heard.texts.append(event["delta"])
    elif event["type"].endswith(".done"):
        heard.again += [
            event[name]
            for name in ("text", "arguments", "refusal", "input", "code")
            if type(event.get(name)) is str
        ]
    item = _object(event.get("item"))
    if "partial_image_b64" in event or (item.get("result") and "image" in str(item.get("type"))):
        heard.pictures.add(str(event.get("item_id") or item.get("id")))


def _hear_chat(event: dict[str, Any], heard: _Heard) -> None:
    for choice in _objects(event.get("choices")):
        if type(choice.get("text")) is str:
            heard.texts.append(choice["text"])
        delta = _object(choice.get("delta") or choice.get("message"))
        heard.texts += _strings(delta.get("content"))
        heard.texts += _strings(delta.get("refusal"))
        # Some servers say the same under both names.
        heard.texts += _strings(delta.get("reasoning_content")) or _strings(delta.get("reasoning"))
        calls = _objects(delta.get("tool_calls"))
        for call in (*calls, {"function": delta.get("function_call")}):
            for what in (_object(call.get("function")), _object(call.get("custom"))):
                heard.texts += [
                    what[name]
                    for name in ("name", "arguments", "input")
                    if type(what.get(name)) is str
                ]
        heard.texts += _strings(_object(delta.get("audio")).get("transcript"))
        heard.unnamed_pictures += len(_objects(delta.get("images")))
    if "b64_json" in event:
        heard.pictures.add(str(event.get("output_index")))


def _strings(value: Any) -> list[str]:
    """The texts of a value, which is one or, at some providers, a list of objects with some."""
    if type(value) is str:
        return [value]
    found: list[str] = []
    for part in _objects(value):
        for name in ("text", "thinking"):
            found += _strings(part.get(name))
    return found


def _texts_in(data: bytes) -> list[str]:
    """What a model has said in an answer that is not read field by field."""
    said: list[str] = []
    for found in _SAID.finditer(data):
        text = found[1]
        try:
            said.append(str(orjson.loads(text)))
        except orjson.JSONDecodeError:  # cut, half of a surrogate pair, or of nobody's protocol
            said.append(text.strip(b'"').decode("utf-8", "replace"))
    for found in islice(_CALLED.finditer(data), _MOST_OBJECTS):
        called = data[found.end() : found.end() + _LONGEST_OBJECT_BYTES].decode("utf-8", "replace")
        try:
            said.append(called[: _DECODER.raw_decode(called)[1]])
        except (ValueError, RecursionError):  # cut, or long
            said.append(called)
    return said


def _as_text(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:  # nested deeper than can be written
        return repr(value)


def _object(value: Any) -> dict[str, Any]:
    return value if type(value) is dict else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if type(one) is dict] if type(value) is list else []
