"""What one call asks of its pool."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.limiter.flow import Tokens
from tidegate.limiter.limits import DEFAULT_HARD_MS


# Not frozen, as all else of its kind: each call would pay for that.
@dataclass(slots=True)
class Demand:
    """All of `limits` or none; nobody changes it.

    tenant: whose share it is. priority: the name of a band, None for the usual one. tokens, images:
    an estimate, for limits that count them. deadline_ms: how long it may wait, None for as long as
    needed. hard_ms: the longest that the call can last. once: take the first answer for the last.
    implicit: limits that the policy does not name are allowed where their scope is implicit; a
    misspelt name would otherwise be a limit without a bound.
    """

    limits: tuple[str, ...]
    tenant: str = "default"
    priority: str | None = None
    tokens: Tokens | None = None
    images: int = 0
    deadline_ms: int | None = None
    hard_ms: int = DEFAULT_HARD_MS
    once: bool = False
    implicit: bool = False
