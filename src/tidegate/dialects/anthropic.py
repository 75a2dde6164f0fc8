"""Refusals in Anthropic's words."""

from __future__ import annotations

import re

from tidegate.dialects.rate_limits import used_up
from tidegate.dialects.refusal import Refusal, Said, until_date_ms

# From the first word on: a provider that repeats a client's text does so further on.
_NO_MONEY = re.compile(
    r"your credit balance is too low|you have reached your specified (?:\w+ )?api usage limits",
    re.IGNORECASE,
)
_NEVER = re.compile(r"extra usage is required", re.IGNORECASE)
_BY_NAME = re.compile(
    r"\b(?P<unit>input tokens|output tokens|tokens|requests) per (?:second|minute|hour|day)\b",
    re.IGNORECASE,
)


def refusal(said: Said) -> Refusal | None:
    """None where it is worded in no way of this dialect's own."""
    details = said.error.get("details")
    code = details.get("error_code") if isinstance(details, dict) else None
    spent = code == "enforced_spend_limit_reached" or "billing_error" in said.words
    if spent or _NO_MONEY.match(said.message):
        return Refusal("unpaid", wait_ms=until_date_ms(said.message, said.now))
    if "authentication_error" in said.words and said.status == 401:
        return Refusal("key")
    if said.status == 429 and _NEVER.match(said.message):
        return Refusal("never")
    if said.status != 429:
        return None
    spent, named = used_up(said.headers, said.now), _BY_NAME.search(said.message)
    if spent is not None:
        return Refusal("throttled", unit=spent.unit, wait_ms=spent.reset_ms)
    if named is not None:
        return Refusal("throttled", unit=named["unit"].lower().replace(" ", "_"))
    return None
