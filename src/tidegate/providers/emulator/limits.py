"""How providers count: fixed window, sliding window, token bucket. Pure: the clock is handed in.

Invariant: whole numbers only (nanoseconds, requests, LLM tokens), so that a bound is exact:
- fixed window: at most L in any window [k*w, (k+1)*w) of the clock;
- sliding window: at most L in any (t-w, t];
- token bucket: at most L + d*L/w in any span of length d; full at first.
A refused demand has spent nothing of any limit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from tidegate.providers.emulator.settings import TOTAL, RateLimit


class Counter(Protocol):
    """One limit's state. `amount` is requests or LLM tokens, times are in ns of one clock."""

    def wait_ns(self, amount: int, now_ns: int) -> int:
        """0 when `amount` fits now; else how long until it may (a whole window if it never can)."""

    def take(self, amount: int, now_ns: int) -> None:
        """Spend what `wait_ns` has just said fits."""


class FixedWindow:
    def __init__(self, limit: int, window_ns: int) -> None:
        self.limit = limit
        self.window_ns = window_ns
        self._window = 0
        self._used = 0

    def wait_ns(self, amount: int, now_ns: int) -> int:
        # A clock that steps back stays in the window it had reached.
        window = max(now_ns // self.window_ns, self._window)
        used = self._used if window == self._window else 0
        if used + amount <= self.limit:
            return 0
        return (window + 1) * self.window_ns - now_ns

    def take(self, amount: int, now_ns: int) -> None:
        window = max(now_ns // self.window_ns, self._window)
        if window != self._window:
            self._window, self._used = window, 0
        self._used += amount


class SlidingWindow:
    def __init__(self, limit: int, window_ns: int) -> None:
        self.limit = limit
        self.window_ns = window_ns
        self._taken: deque[tuple[int, int]] = deque()
        self._used = 0

    def wait_ns(self, amount: int, now_ns: int) -> int:
        self._forget(now_ns)
        if self._used + amount <= self.limit:
            return 0
        if amount > self.limit:
            return self.window_ns
        left = self._used + amount - self.limit
        for taken_ns, taken in self._taken:
            left -= taken
            if left <= 0:
                return taken_ns + self.window_ns - now_ns
        raise AssertionError("the log holds less than what was used")

    def take(self, amount: int, now_ns: int) -> None:
        latest_ns = self._taken[-1][0] if self._taken else now_ns
        self._taken.append((max(now_ns, latest_ns), amount))
        self._used += amount

    def _forget(self, now_ns: int) -> None:
        while self._taken and self._taken[0][0] + self.window_ns <= now_ns:
            self._used -= self._taken.popleft()[1]


class TokenBucket:
    """The level is kept in units of 1/window_ns of a request, which refills `limit` units a ns."""

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

    def take(self, amount: int, now_ns: int) -> None:
        self._refill(now_ns)
        self._level -= amount * self.window_ns

    def _refill(self, now_ns: int) -> None:
        if self._at_ns is not None and now_ns > self._at_ns:
            gained = (now_ns - self._at_ns) * self.limit
            self._level = min(self.limit * self.window_ns, self._level + gained)
        if self._at_ns is None or now_ns > self._at_ns:
            self._at_ns = now_ns


def counter_for(rate: RateLimit) -> Counter:
    kinds: Mapping[str, type[FixedWindow | SlidingWindow | TokenBucket]] = {
        "fixed_window": FixedWindow,
        "sliding_window": SlidingWindow,
        "token_bucket": TokenBucket,
    }
    return kinds[rate.mode](rate.limit, round(rate.window_s * 1e9))


@dataclass(frozen=True, slots=True)
class Refusal:
    """Which limit said no. `rate` is None for a concurrency limit, which has no time to name."""

    limit: str
    bound: int
    retry_after_ns: int
    rate: RateLimit | None


class Gate:
    """All limits of the emulator: all or none."""

    def __init__(self, concurrency: Mapping[str, int], rates: Iterable[RateLimit]) -> None:
        self._concurrency = concurrency
        self._rates = [(rate, counter_for(rate)) for rate in rates]

    def full(self, kind: str, in_flight: int, in_flight_total: int) -> Refusal | None:
        """The concurrency limit that has no room for one more, if any."""
        held = ((kind, in_flight), (TOTAL, in_flight_total))
        for scope, count in held if kind != "other" else held[:1]:
            bound = self._concurrency.get(scope)
            if bound is not None and count >= bound:
                return Refusal(f"concurrency:{scope}", bound, 0, None)
        return None

    def spend(self, kind: str, input_tokens: int, now_ns: int) -> Refusal | None:
        """Spend one request and its tokens of every rate, or nothing and say which refused."""
        scopes = (kind,) if kind == "other" else (kind, TOTAL)
        mine = [
            (rate, counter, 1 if rate.measure == "requests" else input_tokens)
            for rate, counter in self._rates
            if rate.scope in scopes
        ]
        for rate, counter, amount in mine:
            if wait_ns := counter.wait_ns(amount, now_ns):
                return Refusal(rate.name, rate.limit, wait_ns, rate)
        for _, counter, amount in mine:
            counter.take(amount, now_ns)
        return None
