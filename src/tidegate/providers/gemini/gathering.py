"""Many events of a stream as one that says the same, for answers that nobody follows. Pure.

The SDK parses, prunes and validates each event, which costs far more than bringing its bytes here.
Invariant: what is not plain (an error, a blocked prompt, a field that is not listed here, a value
of a wrong type) is left to the SDK as it came, with all that came beside it.
"""

from __future__ import annotations

from typing import Any

import orjson

_EVENT = frozenset(("candidates", "usageMetadata", "modelVersion", "responseId"))
_CANDIDATE = frozenset(("content", "finishReason", "index"))
_CONTENT = frozenset(("parts", "role"))
# What the SDK would check and nobody would read is left out of a usage.
_USAGE = frozenset(
    (
        *("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount"),
        *("cachedContentTokenCount", "totalTokenCount"),
    )
)
_PART = {"text": str, "thought": bool, "thoughtSignature": str}
_DATA = b"data: "


class _NotPlain(Exception):
    """An event that must be read as it is."""


def gathered(stream: bytes) -> bytes | None:
    """One event for all events of `stream`, of fields that are listed here; None unless all of them
    are plain."""
    events = stream.replace(b"\r\n", b"\n").split(b"\n\n")
    if events.pop() or not events:
        return None  # cut in mid-event, or there is nothing to gather
    whole = _Whole()
    try:
        for event in events:
            if not event.startswith(_DATA) or b"\n" in event:
                return None
            whole.add(orjson.loads(event[len(_DATA) :]))
    except (_NotPlain, orjson.JSONDecodeError):
        return None
    return b"%b%b\n\n" % (_DATA, orjson.dumps(whole.event()))


def whole_events(stream: bytes) -> bytes:
    """What was cut, up to the end of its last whole event."""
    ends = (stream.rfind(end) + len(end) for end in (b"\n\n", b"\r\n\r\n") if end in stream)
    return stream[: max(ends, default=0)]


class _Whole:
    """All that the events so far have said. `add` raises _NotPlain."""

    def __init__(self) -> None:
        self._said: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._candidate: dict[str, Any] | None = None
        self._parts: list[dict[str, Any] | list[str]] = []  # a list: pieces of one text

    def add(self, event: Any) -> None:
        if not isinstance(event, dict) or not event or not event.keys() <= _EVENT:
            raise _NotPlain
        for name, value in event.items():
            if name == "candidates":
                self._add_candidates(value)
            elif name == "usageMetadata":
                self._add_usage(value)
            elif not isinstance(value, str) or not value:
                raise _NotPlain
            else:
                self._said[name] = value

    def _add_candidates(self, candidates: Any) -> None:
        if not isinstance(candidates, list) or len(candidates) != 1:
            raise _NotPlain
        candidate = _fields(candidates[0], _CANDIDATE)
        if self._candidate is None:
            self._candidate = {}
        if "finishReason" in candidate:
            reason = candidate["finishReason"]
            if not isinstance(reason, str) or not reason:
                raise _NotPlain
            self._candidate["finishReason"] = reason
        if type(candidate.get("index", 0)) is not int:
            raise _NotPlain
        if "content" in candidate:
            self._add_content(_fields(candidate["content"], _CONTENT))

    def _add_content(self, content: dict[str, Any]) -> None:
        parts = content.get("parts", [])
        if not isinstance(parts, list) or not isinstance(content.get("role", ""), str):
            raise _NotPlain
        for part in parts:
            if not isinstance(part, dict) or "text" not in part:
                raise _NotPlain
            if any(type(value) is not _PART.get(name) for name, value in part.items()):
                raise _NotPlain
            last = self._parts[-1] if self._parts else None
            if len(part) > 1:
                self._parts.append(part)
            elif isinstance(last, list):
                last.append(part["text"])
            else:
                self._parts.append([part["text"]])

    def _add_usage(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            raise _NotPlain
        for name, value in usage.items():
            if type(value) is int and value >= 0:
                if name in _USAGE:
                    self._usage[name] = value
            elif not isinstance(value, list) or name in _USAGE:
                raise _NotPlain

    def event(self) -> dict[str, Any]:
        said = self._said
        if self._candidate is not None:
            parts = [{"text": "".join(p)} if isinstance(p, list) else p for p in self._parts]
            content = {"parts": parts}
            said = {"candidates": [{"content": content, **self._candidate}], **said}
        return {**said, "usageMetadata": self._usage} if self._usage else said


def _fields(value: Any, known: frozenset[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or not value.keys() <= known:
        raise _NotPlain
    return value
