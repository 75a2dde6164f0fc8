"""Refusals as OpenAI words them, and those who speak its dialect: Azure, xAI, DeepSeek, Groq."""

from __future__ import annotations

import re

from tidegate.dialects.refusal import Refusal, Said
from tidegate.dialects.waits import bounded_ms, span_ms

_UNPAID = frozenset(
    {
        "insufficient_quota",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "billing_hard_limit_reached",
        "billing_not_active",
    }
)
# From the first word on: a provider that repeats a client's text does so further on.
_NO_CREDITS = re.compile(
    r"(?:your|the|this) [\w ]{0,60}doesn't have any credits|insufficient (?:credits|balance)|"
    r"your [\w ]{0,40}credits? (?:is|are|has been|have been) exhausted",
    re.IGNORECASE,
)
_DEAD_KEY = re.compile(
    r"(?:incorrect|invalid) api key|access denied due to invalid subscription key", re.IGNORECASE
)
_TOO_LARGE = re.compile(r"\brequest too large\b", re.IGNORECASE)
_LIMIT_AND_REQUESTED = re.compile(
    r"\bLimit:? (\d{1,12}), (?:Used:? \d{1,12}, )?Requested:? (\d{1,12})"
)
_UNITS = ("tokens", "requests")


def refusal(said: Said) -> Refusal | None:
    """None where it is worded in no way of this dialect's own."""
    no_credits = said.status in (402, 403, 429) and _NO_CREDITS.match(said.message)
    if no_credits or said.words & _UNPAID:
        return Refusal("unpaid")
    if said.status in (400, 401, 403) and (
        "invalid_api_key" in said.words or _DEAD_KEY.match(said.message)
    ):
        return Refusal("key")
    if said.status != 429:
        return None
    if _is_too_large(said.message):
        return Refusal("never")
    unit = next((unit for unit in _UNITS if unit in said.words), None)
    unit = unit or next((u for u in _UNITS if re.search(rf"\b{u} per\b", said.message)), None)
    return Refusal("throttled", unit=unit, wait_ms=_when_full(said))


def _is_too_large(message: str) -> bool:
    """Whether one request alone is more than the limit ever gives."""
    if _TOO_LARGE.search(message):
        return True
    found = _LIMIT_AND_REQUESTED.search(message)
    return found is not None and int(found[2]) > int(found[1])


def _when_full(said: Said) -> int | None:
    """When the limits of which nothing is left begin again."""
    spans = [
        span_ms(said.headers.get(f"x-ratelimit-reset-{of}", ""))
        for of in ("requests", "tokens")
        if said.headers.get(f"x-ratelimit-remaining-{of}", "").strip() == "0"
    ]
    return max((bounded_ms(each) for each in spans if each is not None), default=None)
