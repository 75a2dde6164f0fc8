"""Interface of an emulated API: how it words refusals, errors and injected faults.

A refused call carries facts; the API that serves it turns them into status, headers and body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tidegate.emulator.account import AccountRefusal
from tidegate.emulator.limits import Fault, FaultName, LimitRefusal
from tidegate.emulator.profiles import AccountSpec

Json = dict[str, Any]


def rfc3339(at_ns: int) -> str:
    """A time in the form of the APIs of Google and Anthropic."""
    return datetime.fromtimestamp(at_ns / 1e9, UTC).isoformat().replace("+00:00", "Z")


def listing(items: Sequence[Json], most: int) -> Json:
    """The first `most` items in the form of the lists of OpenAI and Anthropic."""
    shown = list(items[:most])
    return {
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(items) > len(shown),
    }


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """An error response: status, body and headers."""

    status: int
    body: Json | list[Json]
    headers: Mapping[str, str] = field(default_factory=dict)


class Refused(Exception):
    """A request that the API would refuse. `facts` are further fields of its error object."""

    def __init__(self, status: int, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.facts = facts


class LimitReached(Exception):
    """A limit that the emulator enforces has no room."""

    def __init__(self, refusal: LimitRefusal, model: str) -> None:
        super().__init__(refusal.limit)
        self.refusal = refusal
        self.model = model


@dataclass(frozen=True, slots=True)
class EmulatedApi:
    """Errors of an API. `faults` are those with one status and message.

    `throttled` words the faults that are a 429, and returns None for all others. `no_capacity`
    refuses a call of the flex tier; None where there is no such tier.
    """

    name: str
    error: Callable[..., ErrorResponse]  # status, message and the facts of a `Refused`
    refused: Callable[[LimitRefusal, str], ErrorResponse]
    faults: Mapping[FaultName, tuple[int, str]]
    throttled: Callable[[Fault, str], ErrorResponse | None]
    refused_by_account: Callable[[AccountSpec, AccountRefusal, str], ErrorResponse]
    no_capacity: ErrorResponse | None = None

    def ordered(self, fault: Fault, model: str) -> ErrorResponse | None:
        """The error response that a fault is; None when it is another kind of fault."""
        if (error := self.faults.get(fault.fault)) is not None:
            return self.error(*error)
        return self.throttled(fault, model)


def wait_s(refusal: LimitRefusal) -> float | None:
    """Seconds until the call may fit, rounded up to a ms; None where there is no time to name."""
    return None if refusal.rate is None else -(-refusal.retry_after_ns // 1_000_000) / 1000
