"""What went wrong upstream, as one of our errors.

Owns the table from Gemini's error bodies, HTTP statuses and the SDK's exceptions to the
`UpstreamError`s. Invariant: decided by what arrived on the wire (status, headers, last bytes),
not by the SDK's wording, since the SDK fails with a TypeError or AttributeError on some error
bodies; and no message holds the API key or a whole foreign page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from tidegate.errors import (
    UpstreamError,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnauthorized,
    UpstreamUnavailable,
)
from tidegate.telemetry import redact

MAX_MESSAGE_CHARS = 500
MAX_RETRY_AFTER_MS = 86_400_000
CODES = {
    "CANCELLED": 499,
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNKNOWN": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
# Other 4xx that say "not now" rather than "never": the same call may succeed later.
TRANSIENT_CODES = (408, 425, 499)
_DURATION = re.compile(r"^\s*(\d{1,9}(?:\.\d{1,9})?)\s*s?\s*$")
_NUMBER = r"\d{1,9}(?:\.\d{1,9})?"
# A span of time as Go writes it, and with it OpenAI: 17ms, 1.5s, 6m0s, 1h2m3s.
_SPAN = re.compile(
    rf"(?=\d)(?:({_NUMBER})d)?(?:({_NUMBER})h)?(?:({_NUMBER})m(?!s))?(?:({_NUMBER})s)?(?:({_NUMBER})ms)?"
)
_SPANS_MS = (86_400_000, 3_600_000, 60_000, 1_000, 1)
_RETRY_IN_MESSAGE = re.compile(
    r"\b(?:retry|try again) in\s+([\d.]{1,20}\s?[dhms][\d.dhms]{0,60})", re.IGNORECASE
)
_DEAD_KEY = re.compile(r"api key (?:not valid|not found|expired|has been)", re.IGNORECASE)
# A 403 on what was asked for, such as a file that is not there (Gemini's word for it) or a model
# that the account may not use: it says nothing of the key, which serves others at this moment.
_ABOUT_A_THING = re.compile(r"\b(?:file|model|cached ?content)s?\b", re.IGNORECASE)
# Who refuses the key says so. "The caller does not have permission" is also what Gemini says of a
# private video, and there are keys that may do some things and not others.
_ABOUT_THE_KEY = re.compile(
    r"\b(?:api.?key|credential|consumer|project|account|organi[sz]ation|billing|suspended)",
    re.IGNORECASE,
)
_ABOUT_A_SCOPE = re.compile(r"missing scopes?\b|\bresource\b", re.IGNORECASE)
# How OpenAI tells which key it has refused: its first and its last letters.
_MASKED_KEY = re.compile(r"\S*\*{3,}\S*")
_GOOGLE_KEY = re.compile(r"AIza[0-9A-Za-z_-]{20,}")


@dataclass(frozen=True, slots=True)
class Wreck:
    """What is known of a failed exchange: `status` is None when no response had begun."""

    status: int | None
    headers: Mapping[str, str]
    tail: bytes


def translate(failure: Exception, wreck: Wreck | None, *, secret: str) -> UpstreamError:
    """Our error for `failure`, raised by the SDK or the HTTP client. `wreck` is None when nothing
    was sent. `secret` is the API key, removed from every message.
    """
    if isinstance(failure, UpstreamTimeout):
        return failure
    if wreck is not None and wreck.status is not None:
        error = error_in(wreck.tail)
        if wreck.status != 200:
            return from_status(wreck.status, error or {}, wreck.headers, secret=secret)
        if error is not None:
            return from_status(code_of(error), error, wreck.headers, secret=secret)
    if isinstance(failure, UpstreamError):
        return failure
    return _without_error_body(failure, sent=wreck is not None)


def _without_error_body(failure: Exception, *, sent: bool) -> UpstreamError:
    import httpx2

    name = type(failure).__name__
    if isinstance(failure, httpx2.ConnectTimeout):
        return UpstreamTimeout("connecting to the provider took too long", phase="connect")
    if isinstance(failure, httpx2.TimeoutException):
        return UpstreamTimeout("the provider was silent for too long", phase="idle")
    if isinstance(failure, httpx2.RemoteProtocolError):
        # One class for two faults: the text tells a cut connection from bytes that aren't HTTP.
        if "disconnected" in str(failure) or "peer closed" in str(failure):
            return UpstreamUnavailable("the provider closed the connection in mid-answer")
        return UpstreamGarbled("the provider's answer is not HTTP")
    if isinstance(failure, httpx2.LocalProtocolError | httpx2.UnsupportedProtocol):
        return UpstreamRejected(f"the request could not be sent ({name})")
    if isinstance(failure, httpx2.ConnectError):
        return UpstreamUnavailable("could not connect to the provider", broke="connecting")
    if isinstance(failure, httpx2.TransportError | OSError):
        return UpstreamUnavailable(f"the connection to the provider broke ({name})")
    if not sent:
        return UpstreamRejected(f"the request could not be built ({name})", status=400)
    return UpstreamGarbled(f"the provider's answer is not what its protocol says ({name})")


def error_in(tail: bytes) -> dict[str, Any] | None:
    """The error object in the last bytes of a response: a JSON body or an SSE event, either an
    object or a list of one. None when there is none.
    """
    text = tail.decode("utf-8", "replace")
    found = _error_of(text)
    if found is not None:
        return found
    data: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("data:"):
            data.append(line[5:])
        elif not line and data:
            found = _error_of("\n".join(data))
            if found is not None:
                return found
            data = []
    return None


def _error_of(text: str) -> dict[str, Any] | None:
    if '"error"' not in text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list) and value:
        value = value[0]
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, str):
        return {"message": error}
    return error if isinstance(error, dict) else None


def code_of(error: Mapping[str, Any]) -> int:
    """The HTTP code that an error object means; 500 where it doesn't say."""
    code = error.get("code")
    if isinstance(code, str) and code.isascii() and code.isdigit():
        code = int(code)
    if isinstance(code, int) and 400 <= code <= 599:
        return code
    return CODES.get(str(error.get("status")), 500)


def from_status(
    status: int, error: Mapping[str, Any], headers: Mapping[str, str], *, secret: str
) -> UpstreamError:
    """Our error for an HTTP status (or the code of an error object) and its error object."""
    message = f"the provider answered {status}: {_said(error, secret)}"
    details = [item for item in _list(error.get("details")) if isinstance(item, dict)]
    retry_after_ms = _retry_after_ms(error, details, headers)
    if status == 429:
        # OpenAI says what there was too much of in the error's type.
        quotas = " ".join((*_quota_ids(details), str(error.get("type"))))
        return UpstreamThrottled(
            message,
            retry_after_ms=retry_after_ms,
            day_quota="perday" in quotas,
            unit=next((unit for unit in ("tokens", "requests") if unit in quotas), None),
        )
    if status == 403 and _ABOUT_A_THING.search(str(error.get("message"))):
        return UpstreamRejected(message, status=status)
    if status in (401, 403) or (status == 400 and _dead_key(error, details)):
        of_key = _is_of_key(status, error, details)
        return UpstreamUnauthorized(message, status=status, of_key=of_key)
    if status >= 500 or status in TRANSIENT_CODES:
        return UpstreamUnavailable(message, status=status, retry_after_ms=retry_after_ms)
    if 300 <= status < 500:
        return UpstreamRejected(message, status=status)
    return UpstreamGarbled(message, status=status)


def _said(error: Mapping[str, Any], secret: str) -> str:
    message = error.get("message")
    if not isinstance(message, str) or not message.strip():
        status = error.get("status")
        return status[:100] if isinstance(status, str) else "no reason given"
    return clean(message, secret)


def clean(message: str, secret: str) -> str:
    """A provider's text on one line, cut to a bound, without keys."""
    if secret:
        message = message.replace(secret, "***")
    message = " ".join(message.split())
    if "***" in message:  # cut first: a word without end would be searched again and again
        message = _MASKED_KEY.sub("***", message[: 4 * MAX_MESSAGE_CHARS])
    message = redact(_GOOGLE_KEY.sub("***", message))
    return message if len(message) <= MAX_MESSAGE_CHARS else f"{message[:MAX_MESSAGE_CHARS]}..."


def _retry_after_ms(
    error: Mapping[str, Any], details: list[dict[str, Any]], headers: Mapping[str, str]
) -> int | None:
    for detail in details:
        if str(detail.get("@type", "")).endswith("RetryInfo"):
            found = _DURATION.match(str(detail.get("retryDelay", "")))
            if found:
                return _bounded_ms(float(found[1]) * 1000)
    said = _RETRY_IN_MESSAGE.search(str(error.get("message", "")))
    if said and (span_ms := _span_ms(said[1])) is not None:
        return _bounded_ms(span_ms)
    if re.fullmatch(_NUMBER, header := headers.get("retry-after-ms", "").strip()):
        return _bounded_ms(float(header))
    said_ms = _of_header(headers.get("retry-after", ""))
    return _when_full(headers) if said_ms is None else said_ms


def _of_header(header: str) -> int | None:
    """Seconds, or a date."""
    found = _DURATION.match(header)
    if found:
        return _bounded_ms(float(found[1]) * 1000)
    try:
        at = parsedate_to_datetime(header)
        left = at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)
    except (ValueError, TypeError, OverflowError):
        return None
    return _bounded_ms(left.total_seconds() * 1000)


def _when_full(headers: Mapping[str, str]) -> int | None:
    """When the limits of which nothing is left begin anew, in the words of OpenAI and of those who
    speak like it."""
    spans = [
        _span_ms(headers.get(f"x-ratelimit-reset-{of}", ""))
        for of in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{of}", "").strip() == "0"
    ]
    return max((_bounded_ms(span_ms) for span_ms in spans if span_ms is not None), default=None)


def _span_ms(text: str) -> float | None:
    """None where it is not a span of time; a bare number is one of seconds."""
    text = text.replace(" ", "").lower().rstrip(".")
    if re.fullmatch(_NUMBER, text):
        return float(text) * 1000
    found = _SPAN.fullmatch(text)
    if found is None:
        return None
    parts = zip(found.groups(), _SPANS_MS, strict=True)
    return sum(float(part) * unit_ms for part, unit_ms in parts if part is not None)


def _bounded_ms(value: float) -> int:
    return min(max(0, round(value)), MAX_RETRY_AFTER_MS)


def _quota_ids(details: list[dict[str, Any]]) -> list[str]:
    """The quotas that a call was over, such as generaterequestsperdayperprojectpermodel-freetier:
    in lower case, since their spelling varies."""
    return [
        str(violation.get("quotaId")).lower()
        for detail in details
        for violation in _list(detail.get("violations"))
        if isinstance(violation, dict)
    ]


def _dead_key(error: Mapping[str, Any], details: list[dict[str, Any]]) -> bool:
    if any(str(detail.get("reason")).startswith("API_KEY_") for detail in details):
        return True
    return bool(_DEAD_KEY.search(str(error.get("message", ""))))


def _is_of_key(status: int, error: Mapping[str, Any], details: list[dict[str, Any]]) -> bool:
    said = str(error.get("message", ""))
    if any("reason" in detail for detail in details):
        return True
    if _ABOUT_A_SCOPE.search(said):
        return False
    return status != 403 or bool(_ABOUT_THE_KEY.search(said))


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
