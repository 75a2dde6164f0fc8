"""Limits and injected faults of the emulator. Pure: the clock is an argument.

Whole numbers only (nanoseconds, requests, LLM tokens), so that a bound is exact:
- fixed window: at most L in any window [k*w, (k+1)*w) of the clock;
- sliding window: at most L in any (t-w, t];
- token bucket: at most L + d*L/w in any span of length d; full at first.

Invariants: a refused demand spends nothing of any limit; a fault with a count goes to exactly
that many matching calls in their order of arrival; the first matching fault wins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from random import Random
from typing import Any, Protocol, Self

from tidegate.emulator.settings import KINDS, TOTAL, RateLimit
from tidegate.errors import InvalidRequest


class Counter(Protocol):
    """One limit's state. `amount` is requests or LLM tokens, times are in ns of one clock."""

    def wait_ns(self, amount: int, now_ns: int) -> int:
        """0 when `amount` fits now; else how long until it may (a whole window if it never can)."""

    def take(self, amount: int, now_ns: int) -> None:
        """Spend an amount for which `wait_ns` has just returned 0."""


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
class LimitRefusal:
    """The limit that refused. `rate` is None for a concurrency limit, which has no time to name."""

    limit: str
    bound: int
    retry_after_ns: int
    rate: RateLimit | None


class LimitGate:
    """All limits of the emulator: all or none."""

    def __init__(self, concurrency: Mapping[str, int], rates: Iterable[RateLimit]) -> None:
        self._concurrency = concurrency
        self._rates = [(rate, counter_for(rate)) for rate in rates]

    def full(self, kind: str, in_flight: int, in_flight_total: int) -> LimitRefusal | None:
        """The concurrency limit that has no room for one more, if any."""
        held = ((kind, in_flight), (TOTAL, in_flight_total))
        for scope, count in held if kind != "other" else held[:1]:
            bound = self._concurrency.get(scope)
            if bound is not None and count >= bound:
                return LimitRefusal(f"concurrency:{scope}", bound, 0, None)
        return None

    def spend(self, kind: str, input_tokens: int, now_ns: int) -> LimitRefusal | None:
        """Spend one request and its tokens of every rate; or nothing, and return the refusal."""
        scopes = (kind,) if kind == "other" else (kind, TOTAL)
        mine = [
            (rate, counter, 1 if rate.measure == "requests" else input_tokens)
            for rate, counter in self._rates
            if rate.scope in scopes
        ]
        for rate, counter, amount in mine:
            if wait_ns := counter.wait_ns(amount, now_ns):
                return LimitRefusal(rate.name, rate.limit, wait_ns, rate)
        for _, counter, amount in mine:
            counter.take(amount, now_ns)
        return None


class FaultName(StrEnum):
    """Faults that can be injected. The first group ends the call before it is answered."""

    THROTTLED = "throttled"  # 429 with RetryInfo
    THROTTLED_BARE = "throttled_bare"  # 429 without details
    DAY_QUOTA = "day_quota"  # 429: a quota per day is gone
    UNAVAILABLE = "unavailable"  # 503
    INTERNAL = "internal"  # 500
    UNAUTHORIZED = "unauthorized"  # 401
    FORBIDDEN = "forbidden"  # 403
    ERROR_LIST = "error_list"  # 429 as a list of one error
    HANG = "hang"  # no header ever comes
    CUT = "cut"  # the connection closes before the headers
    # A 200 that goes wrong
    GARBAGE = "garbage"  # broken JSON
    ERROR_IN_STREAM = "error_in_stream"  # an error object inside a 200
    HANG_MID_STREAM = "hang_mid_stream"
    CUT_MID_STREAM = "cut_mid_stream"
    # A 200 as the protocol allows it
    BLOCKED_PROMPT = "blocked_prompt"  # no candidates, promptFeedback
    NO_CANDIDATES = "no_candidates"  # an empty list
    UNKNOWN_FINISH = "unknown_finish"  # content, finishReason SOMETHING_NEW
    SAFETY = "safety"  # a finish without content
    NO_IMAGE = "no_image"  # likewise
    SLOW_FIRST_TOKEN = "slow_first_token"


BREAKS_OFF = {FaultName.HANG_MID_STREAM, FaultName.CUT_MID_STREAM}
MID_ANSWER = {FaultName.GARBAGE, FaultName.ERROR_IN_STREAM} | BREAKS_OFF
BODIES = {
    FaultName.BLOCKED_PROMPT,
    FaultName.NO_CANDIDATES,
    FaultName.UNKNOWN_FINISH,
    FaultName.SAFETY,
    FaultName.NO_IMAGE,
}


@dataclass(slots=True)
class Fault:
    """An injected fault. Without `count` it stays until removed; without `probability` it is sure.

    `kind` None means every kind but `other`. `match` is a part of the prompt, or of a file's path.
    """

    fault: FaultName
    count: int | None = None
    probability: float | None = None
    kind: str | None = None
    match: str | None = None
    retry_after_s: float = 2.0  # of `throttled`, `day_quota` and `error_list`
    delay_ms: int = 5_000  # of `slow_first_token`
    after_chunks: int = 1  # good chunks before a fault in mid-stream
    code: int = 503  # of `error_in_stream`
    reason: str = "SAFETY"  # of `blocked_prompt`

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> Self:
        """From JSON; raises InvalidRequest naming the field."""
        known = {item.name for item in fields(cls)}
        if unknown := set(value) - known:
            raise InvalidRequest("faults", f"a fault has no field {min(unknown)!r}")
        names = [name.value for name in FaultName]
        if value.get("fault") not in names:
            raise InvalidRequest(
                "fault", f"{value.get('fault')!r} is no fault", allowed=", ".join(names)
            )
        if value.get("kind") not in (None, *KINDS):
            raise InvalidRequest("kind", f"{value['kind']!r} is none of {', '.join(KINDS)}")
        for name, kinds in _TYPES.items():
            given = value.get(name)
            if given is not None and (isinstance(given, bool) or not isinstance(given, kinds)):
                raise InvalidRequest(name, f"{name}: {given!r} has the wrong type")
        return cls(**{**value, "fault": FaultName(value["fault"])})

    def suits(self, kind: str, prompt: str) -> bool:
        if self.count == 0:
            return False
        if self.kind is None and kind == "other":
            return False
        if self.kind is not None and self.kind != kind:
            return False
        return self.match is None or self.match in prompt


_TYPES: dict[str, type | tuple[type, ...]] = {
    "count": int,
    "probability": (int, float),
    "match": str,
    "retry_after_s": (int, float),
    "delay_ms": int,
    "after_chunks": int,
    "code": int,
    "reason": str,
}


class FaultOrders:
    """The injected faults in force."""

    def __init__(self, orders: Iterable[Mapping[str, Any]], random: Random) -> None:
        self._orders = [Fault.parse(order) for order in orders]
        self._random = random

    def replace(self, orders: Iterable[Mapping[str, Any]]) -> None:
        self._orders = [Fault.parse(order) for order in orders]

    def add(self, orders: Iterable[Mapping[str, Any]]) -> None:
        self._orders += [Fault.parse(order) for order in orders]

    def strike(self, kind: str, prompt: str) -> Fault | None:
        """The fault of this call, its count reduced by one."""
        for order in self._orders:
            if not order.suits(kind, prompt):
                continue
            if order.probability is not None and self._random.random() >= order.probability:
                continue
            if order.count is not None:
                order.count -= 1
            return order
        return None

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(order) for order in self._orders]
