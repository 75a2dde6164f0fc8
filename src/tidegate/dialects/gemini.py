"""Refusals in Google's words, in Gemini's own dialect and in the others that it speaks."""

from __future__ import annotations

import re
from typing import Any

from tidegate.dialects.refusal import Refusal, Said

# From the first word on: a provider that repeats a client's text does so further on.
_DEAD_KEY = re.compile(
    r"\W*(?:your )?api key (?:not valid|not found|expired|has been)", re.IGNORECASE
)
_NO_MONEY = re.compile(
    r"your (?:prepayment credits are depleted|project has exceeded its (?:\w+ )?spending cap)",
    re.IGNORECASE,
)
# A 403 on what was asked for, such as a file that is not there (Gemini's word for it) or a model
# that the account may not use: it says nothing of the key, which serves others at this moment.
_ABOUT_A_THING = re.compile(r"\b(?:file|model|cached ?content)s?\b", re.IGNORECASE)


def refusal(said: Said) -> Refusal | None:
    """None where it is worded in no way of this dialect's own."""
    if _NO_MONEY.match(said.message):
        return Refusal("unpaid")
    if said.status == 403 and _ABOUT_A_THING.search(said.message):
        return Refusal("of_thing")
    if said.status == 400 and _dead_key(said):
        return Refusal("key")
    if said.status != 429:
        return None
    quotas = _quota_ids(said.details)
    if not quotas:
        return None
    of_day = [one for one in quotas if "perday" in one]
    return Refusal(
        "throttled",
        unit=_unit_of(" ".join(of_day or quotas)),
        per_day=bool(of_day),
        day_quota=bool(of_day),
        of_account=not any("permodel" in one or "freetier" in one for one in quotas),
    )


def _unit_of(quotas: str) -> str | None:
    names = {"inputtoken": "input_tokens", "token": "tokens", "request": "requests"}
    return next((unit for name, unit in names.items() if name in quotas), None)


def _quota_ids(details: list[dict[str, Any]]) -> list[str]:
    """The quotas that a call was over, such as generaterequestsperdayperprojectpermodel-freetier:
    in lower case, since their spelling varies."""
    return [
        str(violation["quotaId"]).lower()
        for detail in details
        for violation in (detail.get("violations") or ())
        if isinstance(violation, dict) and "quotaId" in violation
    ]


def _dead_key(said: Said) -> bool:
    if any(str(detail.get("reason")).startswith("API_KEY_") for detail in said.details):
        return True
    return bool(_DEAD_KEY.match(said.message))
