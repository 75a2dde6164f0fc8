"""Beginning of an answer: what comes before its first output, held back.

A provider can answer 200 and fail before the first output. So an answer is held back for at most
`HELD_S` and `HELD_BYTES`, until it has content. Invariant: no byte is lost or changed.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from tidegate.dialects import refusals
from tidegate.upstream.transport import Exchange

HELD_S = 2.0
HELD_BYTES = 65_536
_FIELDS = (b":", b"event:", b"id:", b"retry:")
_BEGUN = frozenset(
    {
        *("response.created", "response.in_progress", "response.queued"),
        *("response.content_part.added", "response.reasoning_summary_part.added"),
        *("message_start", "ping"),
    }
)


async def beginning_of(exchange: Exchange, *, streams: bool) -> tuple[bytes, dict[str, Any] | None]:
    """The first bytes of an answer, up to its first output where it `streams`, and the object that
    tells an error where there was one before that. Raises UpstreamError. Cancelling leaves the
    exchange open."""
    first = await exchange.next()
    if streams:
        prelude = Prelude()
        until = asyncio.get_running_loop().time() + HELD_S
        holds = prelude.holds(first, at_end=exchange.at_end)
        while holds and not exchange.at_end and len(first) < HELD_BYTES:
            try:
                async with asyncio.timeout_at(until):
                    piece = await exchange.next()
            except TimeoutError:
                break
            first += piece
            holds = prelude.holds(piece, at_end=exchange.at_end)
        if prelude.is_events:
            return first, prelude.error
    # Half a line is of no use to anybody.
    while streams and refusals.is_too_short(first) and not exchange.at_end:
        first += await exchange.next()
    if not refusals.may_begin_with_error(first):
        return first, None
    while (value := refusals.error_event_in(first)) is None:
        if exchange.at_end or len(first) > refusals.LONGEST_BYTES:
            return first, None
        first += await exchange.next()
    return first, value


class Prelude:
    """The events of a stream before any output. `error` is the one that tells an error; `is_events`
    is false for what is no stream of events."""

    __slots__ = ("_rest", "error", "is_events")

    def __init__(self) -> None:
        self.error: dict[str, Any] | None = None
        self.is_events = True
        self._rest = b""

    def holds(self, piece: bytes, *, at_end: bool) -> bool:
        """Whether no output has come, this piece included; nor an error."""
        data, start = self._rest + piece, 0
        while (end := data.find(b"\n", start)) >= 0 or (at_end and start < len(data)):
            end = len(data) if end < 0 else end
            if not self._is_without_output(data[start:end].rstrip(b"\r")):
                return False
            start = end + 1
        self._rest = data[start:]
        return True

    def _is_without_output(self, line: bytes) -> bool:
        if not line.startswith(b"data:"):
            if line and not line.startswith(_FIELDS):
                self.is_events = False
                return False
            return True
        try:
            value = orjson.loads(line[5:])
        except orjson.JSONDecodeError:  # the end, or nobody's protocol
            return False
        if type(value) is not dict:
            return False
        if refusals.error_object(value) is not None:
            self.error = value
            return False
        return _has_no_output(value)


def _has_no_output(event: dict[str, Any]) -> bool:
    kind = event.get("type")
    if kind == "content_block_start":
        block = _object(event.get("content_block"))
        return block.get("type") in ("text", "thinking") and not _says(block)
    if kind == "response.output_item.added":
        return _object(event.get("item")).get("type") in ("message", "reasoning")
    if type(kind) is str:
        return kind in _BEGUN
    choices = event.get("choices")
    if type(choices) is not list or event.get("usage") is not None:
        return False
    return all(type(one) is dict and _is_empty(one) for one in choices)


def _is_empty(choice: dict[str, Any]) -> bool:
    if choice.get("finish_reason") or choice.get("text"):
        return False
    return not any(value for name, value in _object(choice.get("delta")).items() if name != "role")


def _says(block: dict[str, Any]) -> bool:
    return any(block.get(name) for name in ("text", "thinking", "signature", "citations"))


def _object(value: Any) -> dict[str, Any]:
    return value if type(value) is dict else {}
