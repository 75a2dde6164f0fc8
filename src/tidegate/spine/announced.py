"""What an upstream's answers say of its own rate limits: bound, what remains, when it begins again.

Of each model the latest answer counts, a good one or a 429. Invariant: an answer costs one entry in
a table; its headers are parsed when someone asks, and no more is kept than `MOST_MODELS` answers.
Nothing is limited by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from tidegate.dialects.rate_headers import RateStatus, rate_statuses

MOST_MODELS = 50
_MOST_HEADERS = 40

RawHeaders = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Announcement:
    """Of one model. at: when it was announced, in seconds since 1970; `reset_ms` of each limit
    counts from then."""

    model: str
    at: float
    limits: tuple[RateStatus, ...]

    def shown(self) -> dict[str, Any]:
        """As plain values, without what was not announced."""
        limits = [
            {name: value for name, value in asdict(one).items() if value is not None}
            for one in self.limits
        ]
        at = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds")
        return {"model": self.model, "at": at, "limits": limits}


class Announced:
    """Of one upstream, as this process has heard it."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._heads: dict[str, tuple[RawHeaders, float]] = {}
        self._read: dict[str, tuple[RawHeaders, Announcement | None]] = {}

    def note(self, model: str, headers: RawHeaders) -> None:
        """Keep the headers of an answer; nobody changes them."""
        heads = self._heads
        if model not in heads and len(heads) >= MOST_MODELS:
            del heads[next(iter(heads))]
        heads[model] = headers, self._clock()

    def all(self) -> list[Announcement]:
        """The latest of each model that announced any limit."""
        self._read = {model: self._of(model, *head) for model, head in self._heads.items()}
        return [found for _, found in self._read.values() if found is not None]

    def _of(self, model: str, headers: RawHeaders, at: float) -> tuple[RawHeaders, Any]:
        known = self._read.get(model)
        if known is not None and known[0] is headers:
            return known
        limits = _limits_in(headers, at)
        return headers, Announcement(model, at, limits) if limits else None


def _limits_in(headers: Iterable[tuple[bytes, bytes]], at: float) -> tuple[RateStatus, ...]:
    """One of each unit and window: the one of which least remains."""
    named = [(name.lower(), value) for name, value in headers]
    said = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in [pair for pair in named if b"ratelimit" in pair[0]][:_MOST_HEADERS]
    }
    found: dict[tuple[str, str | None], RateStatus] = {}
    for one in rate_statuses(said, datetime.fromtimestamp(at, UTC)) if said else ():
        other = found.get((one.unit, one.window))
        if other is None or _left(one) < _left(other):
            found[one.unit, one.window] = one
    return tuple(found.values())


def _left(status: RateStatus) -> float:
    return float("inf") if status.remaining is None else status.remaining
