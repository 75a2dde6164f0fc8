"""Errors that are told inside of an answer which began as a success. Pure.

Gemini, OpenAI and Anthropic all do so in streams: as an event, or in a list of Gemini's as one of
its objects. What is passed on stays as it came; but who is told of an error first of all can still
be helped, and a stream that ended in one has failed. Inside of a text the quotes and line ends that
make an event would be escaped, so no answer can pretend to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from tidegate.errors import UpstreamError
from tidegate.providers.gemini import faults
from tidegate.relay.headers import Headers

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
