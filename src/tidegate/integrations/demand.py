"""What a request asks of the limiter.

Pure. Invariant: a demand names at least one limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tidegate.limiter.decorate import AcquireOptions
from tidegate.limiter.limits import DEFAULT_HARD_MS, DEFAULT_PRIORITY

if TYPE_CHECKING:
    from tidegate.limiter import Tokens

RequestT = TypeVar("RequestT")


@dataclass(frozen=True, slots=True)
class Demand:
    """The limits that a request is let in by, all or none, and how; as in `Limiter.acquire`.

    limits: one id, or several.
    tokens: LLM tokens to reserve: a number, or `Tokens` for input and output apart.
    deadline_ms: the longest wait for the permit; None waits for ever.
    hard_ms: the longest that the call may be open, from the grant to the end of the answer. Then
        it is closed, and who reads it gets UpstreamTimeout.
    penalise: a limit to pause for all processes when the upstream answers 429 and says for how
        long.
    """

    limits: str | tuple[str, ...]
    tenant: str = "default"
    priority: str = DEFAULT_PRIORITY
    tokens: int | Tokens | None = None
    images: int = 0
    deadline_ms: int | None = None
    hard_ms: int = DEFAULT_HARD_MS
    penalise: str | None = None

    def __post_init__(self) -> None:
        if not self.limits:
            raise ValueError("a demand names at least one limit")

    @property
    def ids(self) -> tuple[str, ...]:
        return (self.limits,) if isinstance(self.limits, str) else self.limits

    @property
    def options(self) -> AcquireOptions:
        return {
            "tenant": self.tenant,
            "priority": self.priority,
            "tokens": self.tokens,
            "images": self.images,
            "deadline_ms": self.deadline_ms,
            "hard_ms": self.hard_ms,
        }


Demanded = Demand | Callable[[RequestT], Demand | None]


def demand_of(demanded: Demanded[RequestT], request: RequestT) -> Demand | None:
    """What `request` needs; None is nothing."""
    return demanded if isinstance(demanded, Demand) else demanded(request)
