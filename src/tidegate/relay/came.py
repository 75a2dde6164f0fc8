"""What visibly came of an answer: text, thoughts, calls of tools, pictures. Pure.

Invariant: whatever a client was shown counts, also of an answer that was cut in the middle of a
text; a text that a stream repeats at its end counts once. Nothing here is ever taken from what was
estimated or learned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import orjson

from tidegate.demand.cost import came_tokens
from tidegate.relay.paths import Dialect
from tidegate.relay.usage import pictures_in

# A longer stream is read in places spread evenly over it, and what they hold stands for the rest.
_READ_BYTES = 2_000_000
_PLACES = 16
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
_DECODER = json.JSONDecoder()
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
    for number in range(_PLACES):
        start = stream.rfind(b"\ndata:", 0, number * len(stream) // _PLACES + 1) + 1
        start = max(start, end)
        end = stream.find(b"\n", start + _READ_BYTES // _PLACES)
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
