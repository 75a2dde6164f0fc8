"""Refusals in OpenAI's words and in those of compatible providers: Azure, xAI, DeepSeek, Groq."""

from __future__ import annotations

import re

from tidegate.dialects.rate_limits import used_up
from tidegate.dialects.refusal import Refusal, Said

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
    r"your [\w ]{0,40}credits? (?:is|are|has been|have been) exhausted|"
    r"your team [\w -]{0,80}\b(?:has|have) (?:either )?used all available credits",
    re.IGNORECASE,
)
_DEAD_KEY = re.compile(
    r"(?:incorrect|invalid) api key|access denied due to invalid subscription key", re.IGNORECASE
)
_TOO_LARGE = re.compile(r"\brequest too large\b", re.IGNORECASE)
_LIMIT_AND_REQUESTED = re.compile(
    r"\bLimit:? (\d{1,12}), (?:Used:? \d{1,12}, )?Requested:? (\d{1,12})"
)
# By its type, by the name of the limit, and as Azure says it.
_UNITS = ("tokens", "requests")
_BY_NAME = re.compile(r"\b(token|request)s? per (?:second|min|minute|hour|day)\b", re.IGNORECASE)
_BY_RATE = re.compile(r"\b(token|request|call) rate limit\b", re.IGNORECASE)
_PER_DAY = re.compile(r"\b(?:token|request)s? per day\b", re.IGNORECASE)


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
    spent = used_up(said.headers, said.now)
    unit = _unit_of(said) or (spent.unit if spent else None)
    of_day = spent is not None and spent.window == "day" and spent.unit == unit
    wait_ms = spent.reset_ms if spent else None
    per_day = of_day or bool(_PER_DAY.search(said.message))
    return Refusal("throttled", unit=unit, wait_ms=wait_ms, per_day=per_day)


def _unit_of(said: Said) -> str | None:
    """What there was too much of, as the refusal says."""
    if unit := next((unit for unit in _UNITS if unit in said.words), None):
        return unit
    found = _BY_NAME.search(said.message) or _BY_RATE.search(said.message)
    if found is None:
        return None
    return "tokens" if found[1].lower() == "token" else "requests"


def _is_too_large(message: str) -> bool:
    """Whether one request alone is more than the limit ever gives."""
    if _TOO_LARGE.search(message):
        return True
    found = _LIMIT_AND_REQUESTED.search(message)
    return found is not None and int(found[2]) > int(found[1])
