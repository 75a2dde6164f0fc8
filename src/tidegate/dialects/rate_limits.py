"""Rate-limit headers: parsing those of providers, and writing ours on relayed answers.

Known are OpenAI's names with those of compatible providers (Azure, Groq, Mistral, Cerebras,
Together, OpenRouter) and Anthropic's; Google sends none. Values that are no numbers are skipped,
never an error. Our own headers show figures that are at most some seconds old; no answer waits
for them.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from tidegate.dialects.refusal import bounded_ms, span_ms, until_ms
from tidegate.errors import TidegateError
from tidegate.limiter import MAX_BOUND, Limiter
from tidegate.telemetry.logging import Log, get_logger

Unit = Literal["input_tokens", "output_tokens", "tokens", "images", "requests"]

_BY_SIZE = re.compile(
    r"(?:x-)?ratelimitbysize-(?P<what>limit|remaining|reset)(?:-(?P<window>minute|month))?"
)
_NAMES = (
    re.compile(
        r"x-ratelimit-(?P<what>limit|remaining|reset)(?:-(?P<of>[a-z_-]{1,40}?))??"
        r"(?:-(?P<window>second|minute|hour|day|month))?"
    ),
    re.compile(r"anthropic-ratelimit-(?P<of>[a-z-]{1,40})-(?P<what>limit|remaining|reset)"),
    _BY_SIZE,
)
_UNITS: dict[str, Unit] = {
    "requests": "requests",
    "req": "requests",
    "project-requests": "requests",
    "tokens": "tokens",
    "project-tokens": "tokens",
    "tokens_usage_based": "tokens",
    "input-tokens": "input_tokens",
    "output-tokens": "output_tokens",
    "images": "images",
    "input-images": "images",
}
_NARROWEST_FIRST: tuple[Unit, ...] = (
    "input_tokens",
    "output_tokens",
    "tokens",
    "images",
    "requests",
)
_EPOCH_S, _EPOCH_MS = 1e9, 1e12


@dataclass(frozen=True, slots=True)
class RateStatus:
    """One rate limit. window: `second`, `minute`, `hour`, `day` or `month`; None where its headers
    do not name it, mostly a minute."""

    unit: Unit
    window: str | None = None
    limit: int | None = None
    remaining: int | None = None
    reset_ms: int | None = None


def rate_statuses(headers: Mapping[str, str], now: datetime) -> list[RateStatus]:
    """All that the headers tell of; their names are in lower case."""
    found: dict[tuple[int, str, str | None], dict[str, int]] = {}
    for name, value in headers.items():
        if "ratelimit" not in name:
            continue
        for sort, pattern in enumerate(_NAMES):
            if (match := pattern.fullmatch(name)) is None:
                continue
            parts = match.groupdict()
            of = parts.get("of") or ("tokens" if pattern is _BY_SIZE else "requests")
            number = _reset_ms(value, now) if parts["what"] == "reset" else _whole(value)
            if of in _UNITS and number is not None:
                found.setdefault((sort, of, parts.get("window")), {})[parts["what"]] = number
            break
    return [
        RateStatus(_UNITS[of], window, said.get("limit"), said.get("remaining"), said.get("reset"))
        for (_, of, window), said in found.items()
    ]


def used_up(headers: Mapping[str, str], now: datetime) -> RateStatus | None:
    """The narrowest limit of which nothing remains, with the time after which all of them begin
    again; None where something remains of each."""
    empty = [one for one in rate_statuses(headers, now) if one.remaining == 0]
    if not empty:
        return None
    first = min(empty, key=lambda one: _NARROWEST_FIRST.index(one.unit))
    resets_ms = [one.reset_ms for one in empty if one.reset_ms is not None]
    return RateStatus(first.unit, first.window, first.limit, 0, max(resets_ms, default=None))


def _whole(value: str) -> int | None:
    value = value.strip()
    return int(value) if re.fullmatch(r"\d{1,15}", value) else None


def _reset_ms(value: str, now: datetime) -> int | None:
    """From a span of time, a moment as RFC 3339 writes it, or seconds or ms since 1970."""
    if re.fullmatch(r"\d{1,15}(?:\.\d{1,9})?", value := value.strip()):
        number = float(value)
        if number >= _EPOCH_S:
            at_s = number / 1000 if number >= _EPOCH_MS else number
            return bounded_ms((at_s - now.timestamp()) * 1000)
        return bounded_ms(number * 1000)
    span = span_ms(value)
    return until_ms(value, now) if span is None else bounded_ms(span)


_FRESH_S = 1.0


class Remaining:
    """Of one pool."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._left: dict[str, int] = {}
        self._texts: dict[tuple[str, ...], bytes] = {}
        self._asked = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    def of(self, limits: tuple[str, ...]) -> bytes:
        """`kind:text_only=3, rpm:m=57`, as far as is known; empty while nothing is."""
        now = time.monotonic()
        if now - self._asked > _FRESH_S and self._asking is None:
            self._asked = now
            self._asking = asyncio.create_task(self._ask())
        text = self._texts.get(limits)
        if text is None:
            known = [f"{one}={self._left[one]}" for one in limits if one in self._left]
            text = self._texts[limits] = ", ".join(known).encode()
        return text

    async def _ask(self) -> None:
        try:
            snapshot = await self._limiter.snapshot()
        except TidegateError as away:
            get_logger().debug(Log.STORE_AWAY, detail=away.message)
            self._left = {}
        else:
            self._left = {
                name: max(0, view.current - view.used)
                for name, view in snapshot.limits.items()
                if view.bound < MAX_BOUND  # one that no policy names has none
            }
        finally:
            self._texts = {}
            self._asking = None
