"""Counting rules of rate limits: windows, buckets, growth, and what a call counts. Pure.

Whole numbers only (nanoseconds, requests, tokens), so that a bound is exact. Amounts are taken only
if they fit:
- fixed window: at most L in any window [k*w, (k+1)*w) of the clock, or in any day of a time zone;
- sliding window: at most L in any (t-w, t];
- token bucket: at most L + d*L/w in any span of length d; full at first;
- growth: at most A in any (t-60s, t], where A follows earlier amounts.

Amounts that are known only afterwards (an answer's tokens) are always added, so that a window may
exceed its bound; then nothing is taken until there is capacity again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, Protocol
from zoneinfo import ZoneInfo

Mode = Literal["fixed_window", "sliding_window", "token_bucket", "calendar_day"]
Unit = Literal[
    "requests", "tokens", "input_tokens", "uncached_input_tokens", "output_tokens", "images"
]
Reserve = Literal["input", "max", "sum"]
Settle = Literal["never", "end", "as_made"]
MINUTE_NS = 60 * 10**9


@dataclass(slots=True)
class CountedAmount:
    """An amount taken by a counter at `at_ns`; `total` includes later additions."""

    at_ns: int
    amount: int
    total: int


class Counter(Protocol):
    """The state of a limit. Amounts are whole numbers of its unit, times are in ns of one clock."""

    limit: int

    def wait_ns(self, amount: int, now_ns: int) -> int:
        """Return 0 if `amount` fits now; otherwise the time until it may (a whole window if it
        never can)."""

    def take(self, amount: int, now_ns: int) -> CountedAmount:
        """Take an amount, whether or not it fits: call `wait_ns` before."""

    def correct(self, taken: CountedAmount, total: int, now_ns: int) -> None:
        """Change the total of a taken amount: an increase counts from now on, a decrease as if
        never taken."""

    def remaining(self, now_ns: int) -> int:
        """Return how much fits now; at least 0."""

    def full_ns(self, now_ns: int) -> int:
        """Return the time until the whole bound is free again."""

    def resize(self, limit: int, now_ns: int) -> None:
        """Change the bound; the use so far is kept."""


class FixedWindow:
    """Windows of the clock; with a `zone`, its calendar days instead."""

    def __init__(self, limit: int, window_ns: int, zone: str | None = None) -> None:
        self.limit = limit
        self.window_ns = window_ns
        self._zone = None if zone is None else ZoneInfo(zone)
        self._start = 0
        self._end = 0
        self._used = 0

    def wait_ns(self, amount: int, now_ns: int) -> int:
        self._turn(now_ns)
        if self._used + amount <= self.limit:
            return 0
        return self._end - now_ns

    def take(self, amount: int, now_ns: int) -> CountedAmount:
        self._turn(now_ns)
        self._used += amount
        return CountedAmount(max(now_ns, self._start), amount, amount)

    def correct(self, taken: CountedAmount, total: int, now_ns: int) -> None:
        self._turn(now_ns)
        if total > taken.total or taken.at_ns >= self._start:
            self._used += total - taken.total
        taken.total = total

    def remaining(self, now_ns: int) -> int:
        self._turn(now_ns)
        return max(self.limit - self._used, 0)

    def full_ns(self, now_ns: int) -> int:
        self._turn(now_ns)
        return self._end - now_ns if self._used else 0

    def resize(self, limit: int, now_ns: int) -> None:
        self.limit = limit

    def _turn(self, now_ns: int) -> None:
        # If the clock steps back, the counter stays in the latest window.
        if now_ns < self._end:
            return
        self._start, self._end = self._edges(now_ns)
        self._used = 0

    def _edges(self, now_ns: int) -> tuple[int, int]:
        if self._zone is None:
            start = now_ns // self.window_ns * self.window_ns
            return start, start + self.window_ns
        day = datetime.fromtimestamp(now_ns // 10**9, self._zone).date()
        midnights = [
            datetime(date.year, date.month, date.day, tzinfo=self._zone)
            for date in (day, day + timedelta(days=1))
        ]
        start, end = (int(midnight.timestamp()) * 10**9 for midnight in midnights)
        return start, end


class SlidingWindow:
    """A counter of the amounts taken within the last `window_ns`."""

    def __init__(self, limit: int, window_ns: int) -> None:
        self.limit = limit
        self.window_ns = window_ns
        self._taken: deque[CountedAmount] = deque()
        self._used = 0

    def wait_ns(self, amount: int, now_ns: int) -> int:
        self._forget(now_ns)
        if self._used + amount <= self.limit:
            return 0
        if amount > self.limit:
            return self.window_ns
        left = self._used + amount - self.limit
        for taken in self._taken:
            left -= taken.amount
            if left <= 0:
                return taken.at_ns + self.window_ns - now_ns
        raise AssertionError("the log holds less than what was used")

    def take(self, amount: int, now_ns: int) -> CountedAmount:
        latest_ns = self._taken[-1].at_ns if self._taken else now_ns
        taken = CountedAmount(max(now_ns, latest_ns), amount, amount)
        self._taken.append(taken)
        self._used += amount
        return taken

    def correct(self, taken: CountedAmount, total: int, now_ns: int) -> None:
        self._forget(now_ns)
        more = total - taken.total
        taken.total = total
        if more > 0:
            self.take(more, now_ns)
        elif taken.at_ns + self.window_ns > now_ns:
            less = min(-more, taken.amount)
            taken.amount -= less
            self._used -= less

    def remaining(self, now_ns: int) -> int:
        self._forget(now_ns)
        return max(self.limit - self._used, 0)

    def full_ns(self, now_ns: int) -> int:
        self._forget(now_ns)
        return self._taken[-1].at_ns + self.window_ns - now_ns if self._used else 0

    def resize(self, limit: int, now_ns: int) -> None:
        self.limit = limit

    def _forget(self, now_ns: int) -> None:
        while self._taken and self._taken[0].at_ns + self.window_ns <= now_ns:
            self._used -= self._taken.popleft().amount


class TokenBucket:
    """A token bucket. The level is in units of 1/window_ns of a request; `limit` units a ns are
    refilled."""

    def __init__(self, limit: int, window_ns: int) -> None:
        self.limit = limit
        self.window_ns = window_ns
        self._level = limit * window_ns
        self._at_ns: int | None = None

    def wait_ns(self, amount: int, now_ns: int) -> int:
        self._refill(now_ns)
        if amount > self.limit:
            return self.window_ns
        lacking = amount * self.window_ns - self._level
        return 0 if lacking <= 0 else -(-lacking // self.limit)

    def take(self, amount: int, now_ns: int) -> CountedAmount:
        self._refill(now_ns)
        self._level -= amount * self.window_ns
        return CountedAmount(now_ns, amount, amount)

    def correct(self, taken: CountedAmount, total: int, now_ns: int) -> None:
        self._refill(now_ns)
        level = self._level - (total - taken.total) * self.window_ns
        self._level = min(self.limit * self.window_ns, level)
        taken.total = total

    def remaining(self, now_ns: int) -> int:
        self._refill(now_ns)
        return max(self._level // self.window_ns, 0)

    def full_ns(self, now_ns: int) -> int:
        self._refill(now_ns)
        if not self.limit:
            return 0
        return -(-(self.limit * self.window_ns - self._level) // self.limit)

    def resize(self, limit: int, now_ns: int) -> None:
        self._refill(now_ns)
        self._level += (limit - self.limit) * self.window_ns
        self.limit = limit

    def _refill(self, now_ns: int) -> None:
        if self._at_ns is not None and now_ns > self._at_ns:
            gained = (now_ns - self._at_ns) * self.limit
            self._level = min(self.limit * self.window_ns, self._level + gained)
        if self._at_ns is None or now_ns > self._at_ns:
            self._at_ns = now_ns


class Growth:
    """No faster growth than `percent` in `per_ns`, above an amount of `start` a minute.

    At the end of every `per_ns` the allowed amount of a minute becomes the largest amount of any
    minute in it, plus `percent`; never less than `start`.
    """

    def __init__(self, start: int, percent: int, per_ns: int) -> None:
        self._start = start
        self._percent = percent
        self._per_ns = per_ns
        self._minute = SlidingWindow(start, MINUTE_NS)
        self._most = 0
        self._turn_ns: int | None = None

    def wait_ns(self, amount: int, now_ns: int) -> int:
        self._turn(now_ns)
        if amount > self._minute.limit:
            assert self._turn_ns is not None  # set by the line above
            return max(self._turn_ns - now_ns, 1)
        return self._minute.wait_ns(amount, now_ns)

    def take(self, amount: int, now_ns: int) -> None:
        self._turn(now_ns)
        self._minute.take(amount, now_ns)
        used = self._minute.limit - self._minute.remaining(now_ns)
        self._most = max(self._most, used)

    def _turn(self, now_ns: int) -> None:
        if self._turn_ns is None:
            self._turn_ns = now_ns + self._per_ns
        while now_ns >= self._turn_ns:
            allowed = self._most * (100 + self._percent) // 100
            self._minute.resize(max(self._start, allowed), now_ns)
            idle = now_ns - self._turn_ns >= self._per_ns
            used = self._minute.limit - self._minute.remaining(now_ns)
            self._most = 0 if idle else used
            self._turn_ns += self._per_ns


def counter_of(mode: Mode, limit: int, window_ns: int, zone: str | None = None) -> Counter:
    """Return an unused counter of this mode; `zone` is that of a calendar day."""
    match mode:
        case "fixed_window":
            return FixedWindow(limit, window_ns)
        case "calendar_day":
            return FixedWindow(limit, window_ns, zone or "UTC")
        case "sliding_window":
            return SlidingWindow(limit, window_ns)
        case "token_bucket":
            return TokenBucket(limit, window_ns)


@dataclass(frozen=True, slots=True)
class CallSize:
    """What a provider knows about a call before its answer: the tokens of its input by how they are
    billed, its bound on the output (None without one), its number of answers and of images."""

    uncached: int = 0
    cached: int = 0
    cache_write: int = 0
    most_output: int | None = None
    choices: int = 1
    images: int = 0

    @property
    def input(self) -> int:
        return self.uncached + self.cached + self.cache_write


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """The weight of a token of each part of a call."""

    uncached: int = 1
    cached: int = 1
    cache_write: int = 1
    output: int = 1

    def of(self, size: CallSize, output_tokens: int) -> int:
        return (
            size.uncached * self.uncached
            + size.cached * self.cached
            + size.cache_write * self.cache_write
            + output_tokens * self.output
        )


WEIGHTS: Mapping[Unit, TokenWeights] = {
    "tokens": TokenWeights(),
    "input_tokens": TokenWeights(output=0),
    "uncached_input_tokens": TokenWeights(cached=0, output=0),
    "output_tokens": TokenWeights(uncached=0, cached=0, cache_write=0),
}


@dataclass(frozen=True, slots=True)
class CountingRule:
    """How much a call counts for a limit: `reserve` at its start, `settle` at its end.

    `input` reserves the weighted input; `max` the larger of it and the bound on the output; `sum`
    both together, with an output token counting once. `end` corrects the count to the use, output
    by its weight; `as_made` does so while the answer is made; `never` keeps the reservation.
    """

    unit: Unit
    reserve: Reserve = "input"
    settle: Settle = "end"
    weights: TokenWeights = TokenWeights()

    def at_start(self, size: CallSize) -> int:
        if self.unit == "requests":
            return 1
        if self.unit == "images":
            return size.images
        most = (size.most_output or 0) * size.choices if self.weights.output else 0
        count = self.weights.of(size, 0)
        match self.reserve:
            case "max":
                return max(count, most)
            case "sum":
                return count + most
        return count

    def in_all(self, size: CallSize, output_tokens: int) -> int:
        """Return the count of a call with so many output tokens."""
        if self.settle == "never" or self.unit in ("requests", "images"):
            return self.at_start(size)
        return self.weights.of(size, output_tokens)
