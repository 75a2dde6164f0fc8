"""Interface of an emulated API: limits, injected faults, error bodies and lists.

A refused call carries facts; the API that serves it turns them into status, headers and body.

Invariants: a refused call spends nothing of any limit; a fault with a count applies to exactly that
many matching calls in their order of arrival; the first matching fault applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from random import Random
from typing import Any, Self

from tidegate.emulator.account import AccountRefusal, AccountSpec
from tidegate.emulator.counting import Counter, counter_of
from tidegate.emulator.settings import KINDS, TOTAL, RateLimit
from tidegate.errors import InvalidRequest

Json = dict[str, Any]


def rfc3339(at_ns: int) -> str:
    """Return a time in the format of the APIs of Google and Anthropic."""
    return datetime.fromtimestamp(at_ns / 1e9, UTC).isoformat().replace("+00:00", "Z")


def listing(items: Sequence[Json], most: int) -> Json:
    """Return the first `most` items in the form of the lists of OpenAI and Anthropic."""
    page = list(items[:most])
    return {
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > len(page),
    }


def counter_for(rate: RateLimit) -> Counter:
    return counter_of(rate.mode, rate.limit, round(rate.window_s * 1e9))


@dataclass(frozen=True, slots=True)
class LimitRefusal:
    """The limit that refused a call. `rate` is None for a concurrency limit, which states no
    wait."""

    limit: str
    bound: int
    retry_after_ns: int
    rate: RateLimit | None


class LimitGate:
    """All limits of the emulator; a call gets all of them or none."""

    def __init__(self, concurrency: Mapping[str, int], rates: Iterable[RateLimit]) -> None:
        self._concurrency = concurrency
        self._rates = [(rate, counter_for(rate)) for rate in rates]

    def full(self, kind: str, in_flight: int, in_flight_total: int) -> LimitRefusal | None:
        """Return the concurrency limit that is full for another call, or None."""
        held = ((kind, in_flight), (TOTAL, in_flight_total))
        for scope, count in held if kind != "other" else held[:1]:
            bound = self._concurrency.get(scope)
            if bound is not None and count >= bound:
                return LimitRefusal(f"concurrency:{scope}", bound, 0, None)
        return None

    def spend(self, kind: str, input_tokens: int, now_ns: int) -> LimitRefusal | None:
        """Spend one request and its tokens from every rate; or spend nothing and return the
        refusal."""
        scopes = (kind,) if kind == "other" else (kind, TOTAL)
        applied = [
            (rate, counter, 1 if rate.measure == "requests" else input_tokens)
            for rate, counter in self._rates
            if rate.scope in scopes
        ]
        for rate, counter, amount in applied:
            if wait_ns := counter.wait_ns(amount, now_ns):
                return LimitRefusal(rate.name, rate.limit, wait_ns, rate)
        for _, counter, amount in applied:
            counter.take(amount, now_ns)
        return None


class FaultName(StrEnum):
    """Faults that can be injected. The first group ends the call before it is answered."""

    THROTTLED = "throttled"  # 429 with RetryInfo
    THROTTLED_BARE = "throttled_bare"  # 429 without details
    DAY_QUOTA = "day_quota"  # 429: a quota per day is used up
    UNAVAILABLE = "unavailable"  # 503
    INTERNAL = "internal"  # 500
    UNAUTHORIZED = "unauthorized"  # 401
    FORBIDDEN = "forbidden"  # 403
    ERROR_LIST = "error_list"  # 429 as a list of one error
    HANG = "hang"  # no header is ever sent
    CUT = "cut"  # the connection closes before the headers
    ANSWER_LOST = "answer_lost"  # the same, after the call has taken effect
    # A 200 with a failure
    GARBAGE = "garbage"  # broken JSON
    ERROR_IN_STREAM = "error_in_stream"  # an error object inside a 200
    HANG_MID_STREAM = "hang_mid_stream"
    CUT_MID_STREAM = "cut_mid_stream"
    # An unusual 200 that the protocol allows
    BLOCKED_PROMPT = "blocked_prompt"  # no candidates, promptFeedback
    NO_CANDIDATES = "no_candidates"  # an empty list
    UNKNOWN_FINISH = "unknown_finish"  # content, finishReason SOMETHING_NEW
    SAFETY = "safety"  # a finish without content
    NO_IMAGE = "no_image"  # the same
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
    """An injected fault. Without `count` it stays until removed; without `probability` it always
    applies.

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
        """Parse JSON. Raises InvalidRequest naming the field."""
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
        """Return the fault that applies to a call and lower its count; None without one."""
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


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """An error response: status, body and headers."""

    status: int
    body: Json | list[Json]
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def listed(self) -> ErrorResponse:
        """Return the response as a list of one error, without headers."""
        body = self.body if isinstance(self.body, list) else [self.body]
        return ErrorResponse(self.status, body)


class Refused(Exception):
    """A request that the API refuses. `facts` are further fields of its error object."""

    def __init__(self, status: int, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.facts = facts


class LimitReached(Exception):
    """A limit of the emulator is exceeded."""

    def __init__(self, refusal: LimitRefusal, model: str) -> None:
        super().__init__(refusal.limit)
        self.refusal = refusal
        self.model = model


@dataclass(frozen=True, slots=True)
class EmulatedApi:
    """Errors of an API. `faults` are those with a fixed status and message.

    `throttled` returns the response to faults that are a 429, and None for all others.
    `no_capacity` is the refusal of a call of the flex tier; None without such a tier. `json_type`
    and `stream_type` are the content types of its answers.
    """

    name: str
    error: Callable[..., ErrorResponse]  # by status, message and the facts of a `Refused`
    refused: Callable[[LimitRefusal, str], ErrorResponse]
    faults: Mapping[FaultName, tuple[int, str]]
    throttled: Callable[[Fault, str], ErrorResponse | None]
    refused_by_account: Callable[[AccountSpec, AccountRefusal, str], ErrorResponse]
    no_capacity: ErrorResponse | None = None
    json_type: str = "application/json"
    stream_type: str = "text/event-stream; charset=utf-8"

    def ordered(self, fault: Fault, model: str) -> ErrorResponse | None:
        """Return the error response of a fault; None for a fault of another kind."""
        if (error := self.faults.get(fault.fault)) is not None:
            return self.error(*error)
        return self.throttled(fault, model)


def wait_s(refusal: LimitRefusal) -> float | None:
    """Return the time until the call may fit in s, rounded up to a ms; None if the limit states
    none."""
    return None if refusal.rate is None else -(-refusal.retry_after_ns // 1_000_000) / 1000
