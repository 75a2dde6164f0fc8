"""Takes out of a stream the usage event that the client has not asked for. Pure.

Chat completions tell the usage of a stream in an event of its own, and only when `stream_options`
asks for it. We ask; who has not asked must not see an event without choices. Invariant: all other
bytes go on as they came, whole events at a time.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

# An event ends with an empty line; providers write either kind of line.
_END = re.compile(rb"\r?\n\r?\n")
_ENDS = (b"\n\n", b"\r\n\r\n")
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
# Null beside what has no choices either, such as the results of a moderation that was asked for.
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
# Where a usage event tells an error too, it is for the client.
_ERROR = re.compile(rb'"error"\s*:\s*[{"]')
_LONGEST_EVENT_BYTES = 1_000_000


def asking_for_usage(raw: bytes, body: dict[str, Any]) -> bytes:
    """The body with `stream_options.include_usage`; otherwise as it came, where that can be."""
    if "stream_options" not in body:
        start = raw.index(b"{") + 1
        return b'%b"stream_options":{"include_usage":true},%b' % (raw[:start], raw[start:])
    options = body["stream_options"]
    asked = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    # From the bytes, since a large body is parsed without its files.
    return orjson.dumps({**orjson.loads(raw), "stream_options": asked})


class WithoutUsageEvent:
    """Give it the stream piece by piece; what it returns is for the client."""

    def __init__(self) -> None:
        self._held = b""
        self._through = False

    def take(self, piece: bytes) -> bytes:
        """The whole events in it, and in what was held back before."""
        if self._through:
            return piece
        if not self._held and piece.endswith(_ENDS) and not _is_usage(piece):
            return piece  # as nearly all are: whole events, and nothing in them to take out
        data = self._held + piece
        ends = [found.end() for found in _END.finditer(data)]
        whole, self._held = (data[: ends[-1]], data[ends[-1] :]) if ends else (b"", data)
        if len(self._held) > _LONGEST_EVENT_BYTES:  # not a stream of events: none of our business
            self._through = True
            whole, self._held = whole + self._held, b""
        if not _is_usage(whole):
            return whole
        starts = [0, *ends[:-1]]
        events = (whole[start:end] for start, end in zip(starts, ends, strict=True))
        return b"".join(event for event in events if not _is_usage(event) or _ERROR.search(event))

    def rest(self) -> bytes:
        """What was left when the stream ended, without the end of an event."""
        held, self._held = self._held, b""
        return held


def _is_usage(event: bytes) -> bool:
    """Whether it is the usage event, or holds it."""
    if b'"usage"' not in event or _NO_CHOICES.search(event) is None:
        return False
    return _USAGE.search(event) is not None
