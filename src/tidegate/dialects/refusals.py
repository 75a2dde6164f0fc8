"""A provider's refusal as one of our errors, whichever dialect it was asked in. Pure.

Each dialect reads its own words first, then those of the others: providers speak several, and
mix them. What none of them knows is decided by the HTTP status. Invariant: a refusal is throttled,
unpaid, of a dead key, busy, never possible, or of this request alone; nothing that a client can
provoke alone is taken for a word on the key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, assert_never

from tidegate.dialects import anthropic, gemini, openai
from tidegate.dialects.refusal import Refusal, Said
from tidegate.dialects.waits import retry_after_ms
from tidegate.errors import (
    UpstreamError,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamUnauthorized,
    UpstreamUnavailable,
    UpstreamUnpaid,
)

# Other 4xx that say "not now" rather than "never": the same call may succeed later.
TRANSIENT_CODES = (408, 425, 499)
_DIALECTS: dict[str, Callable[[Said], Refusal | None]] = {
    "gemini": gemini.refusal,
    "openai": openai.refusal,
    "anthropic": anthropic.refusal,
}
# A server of one's own that has all hands full: vLLM, SGLang, TGI, Ollama, llama.cpp.
_BUSY = re.compile(
    r"server (?:is )?busy|no slots? available|loading model|maximum pending requests|"
    r"queue (?:is )?full|too many (?:pending|waiting|concurrent) requests",
    re.IGNORECASE,
)
# Who refuses the key says so. "The caller does not have permission" is also what Gemini says of a
# private video, and there are keys that may do some things and not others.
_ABOUT_THE_KEY = re.compile(
    r"\b(?:api.?key|credential|consumer|project|account|organi[sz]ation|billing|suspended)",
    re.IGNORECASE,
)
_ABOUT_A_SCOPE = re.compile(r"missing scopes?\b|\bresource\b", re.IGNORECASE)


def error_of_refusal(
    dialect: str, status: int, error: Mapping[str, Any], headers: Mapping[str, str], message: str
) -> UpstreamError:
    """`error` is the error object of the body, `message` what clients may read of it."""
    said = Said(status, error, headers, datetime.now(UTC))
    wait_ms = retry_after_ms(error, said.details, headers)
    found = _by_words(dialect, said)
    if found is None:
        return _by_status(said, message, wait_ms)
    wait_ms = wait_ms if found.wait_ms is None else max(wait_ms or 0, found.wait_ms)
    match found.what:
        case "throttled" | "busy":
            return UpstreamThrottled(
                message,
                status=status,
                retry_after_ms=wait_ms,
                per_day=found.per_day,
                day_quota=found.day_quota,
                unit=found.unit,
                of_account=found.of_account,
            )
        case "unpaid":
            return UpstreamUnpaid(message, status=status, retry_after_ms=wait_ms)
        case "key":
            return UpstreamUnauthorized(message, status=status)
        case "never" | "of_thing":
            return UpstreamRejected(message, status=status)
        case _:
            assert_never(found.what)


def _by_words(dialect: str, said: Said) -> Refusal | None:
    own = _DIALECTS.get(dialect, gemini.refusal)
    throttled = None
    for each in (own, *(one for one in _DIALECTS.values() if one is not own)):
        found = each(said)
        if found is None:
            continue
        if found.what != "throttled":
            return found
        if throttled is None or (throttled.unit is None and (found.unit or found.day_quota)):
            throttled = found
    if said.status in (429, 503) and _BUSY.search(said.message):
        return Refusal("busy")
    return throttled


def _by_status(said: Said, message: str, wait_ms: int | None) -> UpstreamError:
    status = said.status
    if status == 402:
        return UpstreamUnpaid(message, status=status, retry_after_ms=wait_ms)
    if status == 429:
        return UpstreamThrottled(message, retry_after_ms=wait_ms)
    if status in (401, 403):
        return UpstreamUnauthorized(message, status=status, of_key=_is_of_key(said))
    if status >= 500 or status in TRANSIENT_CODES:
        return UpstreamUnavailable(message, status=status, retry_after_ms=wait_ms)
    if 300 <= status < 500:
        return UpstreamRejected(message, status=status)
    return UpstreamGarbled(message, status=status)


def _is_of_key(said: Said) -> bool:
    if any("reason" in detail for detail in said.details):
        return True
    if _ABOUT_A_SCOPE.search(said.message):
        return False
    return said.status != 403 or bool(_ABOUT_THE_KEY.search(said.message))
