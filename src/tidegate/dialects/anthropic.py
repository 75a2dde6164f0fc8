"""Refusals as Anthropic words them."""

from __future__ import annotations

import re

from tidegate.dialects.refusal import Refusal, Said
from tidegate.dialects.waits import until_date_ms, until_ms

# From the first word on: a provider that repeats a client's text does so further on.
_NO_MONEY = re.compile(
    r"your credit balance is too low|you have reached your specified (?:\w+ )?api usage limits",
    re.IGNORECASE,
)
_NEVER = re.compile(r"extra usage is required", re.IGNORECASE)
# Header -> the unit that it counts, the narrowest first.
_UNITS = {
    "input-tokens": "input_tokens",
    "output-tokens": "output_tokens",
    "tokens": "tokens",
    "requests": "requests",
}


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
    if said.status == 429:
        for name, unit in _UNITS.items():
            if said.headers.get(f"anthropic-ratelimit-{name}-remaining", "").strip() == "0":
                reset = said.headers.get(f"anthropic-ratelimit-{name}-reset", "")
                return Refusal("throttled", unit=unit, wait_ms=until_ms(reset, said.now))
    return None
