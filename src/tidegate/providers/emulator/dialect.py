"""A dialect: how one provider's API words what goes wrong. The errors that end a call early.

Invariant: whoever refuses a call says why in facts; only the dialect of the front that was asked
turns them into a status, a body and headers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tidegate.providers.emulator.faults import Fault, FaultName
from tidegate.providers.emulator.limits import Refusal

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer that is an error, as it goes over the wire."""

    status: int
    body: Json | list[Json]
    headers: Mapping[str, str] = field(default_factory=dict)


class Refused(Exception):
    """The request makes no sense to the API that was asked, which has worded the answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.body)
        self.failure = failure


class LimitReached(Exception):
    """A limit that the emulator enforces said no."""

    def __init__(self, refusal: Refusal, model: str) -> None:
        super().__init__(refusal.limit)
        self.refusal = refusal
        self.model = model


@dataclass(frozen=True, slots=True)
class Dialect:
    """`plain` are the faults that are an error of one status and message.

    `throttled` words those that are a 429, and gives None for all others. `inside` is the error
    object that comes inside a 200: its arguments are a status and a message.
    """

    name: str
    error: Callable[[int, str], Failure]
    refused: Callable[[Refusal, str], Failure]
    plain: Mapping[FaultName, tuple[int, str]]
    throttled: Callable[[Fault, str], Failure | None]
    inside: Callable[[int, str], Json]

    def ordered(self, fault: Fault, model: str) -> Failure | None:
        """A fault that is an error response instead of an answer; None when it is another."""
        if (plain := self.plain.get(fault.fault)) is not None:
            return self.error(*plain)
        return self.throttled(fault, model)


def wait_s(refusal: Refusal) -> float | None:
    """How long until it may fit, rounded up to a ms; None where there is no time to name."""
    return None if refusal.rate is None else -(-refusal.retry_after_ns // 1_000_000) / 1000
