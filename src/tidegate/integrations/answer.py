"""What an upstream's answer tells the limiter: how the call went, how long to stay away, its usage.

Does no I/O. Invariant: what cannot be read is unknown, never an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from tidegate.errors import UpstreamTimeout

if TYPE_CHECKING:
    from tidegate.limiter import Tokens
    from tidegate.limiter.permit import Outcome

logger = logging.getLogger("tidegate.integrations")

# From the decoded body of a 2xx answer to the LLM tokens that it used; None is unknown.
Usage = Callable[[bytes], "int | Tokens | None"]

THROTTLED = 429
# Statuses by which an upstream says that it has too much to do. 529 is Anthropic's.
OVERLOADED = frozenset({THROTTLED, 503, 529})
MAX_PAUSE_MS = 86_400_000
# What is kept of a body to read the usage from; that of a larger one is unknown.
MAX_KEPT_BYTES = 4_000_000
# google.rpc.RetryInfo in JSON: https://github.com/googleapis/googleapis, error_details.proto
_RETRY_INFO = re.compile(rb'"retryDelay"\s*:\s*"(\d{1,9}(?:\.\d{1,9})?)s"')


def outcome_of_status(status: int) -> Outcome:
    return "dropped" if status in OVERLOADED else "success"


def outcome_of_error(error: BaseException, overload: tuple[type[Exception], ...]) -> Outcome:
    """How a call went that ended with `error`; only what speaks of overload is `dropped`."""
    return "dropped" if isinstance(error, (UpstreamTimeout, *overload)) else "ignored"


def retry_after_ms(headers: Mapping[str, str], now: datetime) -> int | None:
    """How long a 429 says to stay away: `retry-after-ms`, or `retry-after` in seconds or as a date.

    None where it does not say.
    """
    exact = _number(headers.get("retry-after-ms"))
    if exact is not None:
        return _bounded(exact)
    value = headers.get("retry-after")
    seconds = _number(value)
    if seconds is not None:
        return _bounded(seconds * 1000)
    if value is None:
        return None
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return None
    if at.tzinfo is None:
        return None
    return _bounded((at - now).total_seconds() * 1000)


def retry_info_ms(body: bytes) -> int | None:
    """How long Google's APIs say to stay away: the RetryInfo of an error's body."""
    found = _RETRY_INFO.search(body)
    return None if found is None else _bounded(float(found[1]) * 1000)


def _number(text: str | None) -> float | None:
    if text is None or not re.fullmatch(r"\s*\d{1,9}(\.\d{1,9})?\s*", text):
        return None
    return float(text)


def _bounded(pause_ms: float) -> int | None:
    return None if pause_ms <= 0 else min(MAX_PAUSE_MS, -int(-pause_ms // 1))


class Review:
    """One answer, read while it passes by. `take` every chunk, then ask."""

    __slots__ = ("_chunks", "_decode", "_due_in_body", "_size_bytes", "_usage", "pause_ms")

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        *,
        now: datetime,
        usage: Usage | None,
        pauses: bool,
        decode: Callable[[bytes], bytes],
    ) -> None:
        """`decode` undoes the content encoding. `pauses`: whether a 429 is to be obeyed."""
        throttled = pauses and status == THROTTLED
        self.pause_ms = retry_after_ms(headers, now) if throttled else None
        self._due_in_body = throttled and self.pause_ms is None
        self._usage = usage if 200 <= status < 300 else None
        self._decode = decode
        self._chunks: list[bytes] = []
        self._size_bytes = 0

    @property
    def wants_body(self) -> bool:
        return self._usage is not None or self._due_in_body

    def take(self, chunk: bytes) -> None:
        if not self.wants_body:
            return
        self._size_bytes += len(chunk)
        if self._size_bytes <= MAX_KEPT_BYTES:
            self._chunks.append(chunk)
        else:
            self._chunks.clear()

    def end(self) -> int | Tokens | None:
        """The body has ended: the LLM tokens that the call used, None where that is unknown.

        `pause_ms` is the last word from here on.
        """
        if self._size_bytes == 0 or self._size_bytes > MAX_KEPT_BYTES:
            return None
        body = self._decode(b"".join(self._chunks))
        self._chunks.clear()
        if self._due_in_body:
            self.pause_ms = retry_info_ms(body)
        if self._usage is None:
            return None
        try:
            return self._usage(body)
        except Exception:
            # The answer is good, and paid for: a wrong reader of its usage must not lose it.
            logger.exception("reading the usage of an answer failed: its reservation is kept")
            return None
