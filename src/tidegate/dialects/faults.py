"""Classification of upstream refusals and failures as UpstreamErrors, for all dialects.

Each dialect reads its own error bodies first, then those of the others, because providers mix
them; the HTTP status decides what no dialect knows. The source is what arrived on the wire, never
an SDK's exception text, because SDKs raise TypeError on some error bodies.

Invariants: a refusal is one of throttled, unpaid, invalid key, busy, never possible, or about
this request alone; nothing that a client can provoke alone counts as a refusal of the key; no
message holds the API key or a whole foreign page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, assert_never

from tidegate.dialects import anthropic, gemini, openai
from tidegate.dialects.refusal import Refusal, Said, retry_after_ms
from tidegate.errors import (
    UpstreamError,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnauthorized,
    UpstreamUnavailable,
    UpstreamUnpaid,
)
from tidegate.telemetry.logging import redact

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


MAX_MESSAGE_CHARS = 500
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


def error_of_refusal_in(body: bytes) -> dict[str, Any]:
    """The error object of an answer that is known to be a refusal: `error_in`, or all of the body
    where it is flat, as Mistral's and vLLM's are; empty where it tells nothing."""
    if (found := error_in(body)) is not None:
        return found
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    if "message" not in value and isinstance(value.get("detail"), str):
        return {"message": value["detail"]}
    return value if isinstance(value.get("message"), str) else {}


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
    status: int,
    error: Mapping[str, Any],
    headers: Mapping[str, str],
    *,
    secret: str,
    dialect: str = "gemini",
) -> UpstreamError:
    """Our error for an HTTP status (or the code of an error object) and its error object."""
    message = f"the provider answered {status}: {_said(error, secret)}"
    return error_of_refusal(dialect, status, error, headers, message)


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
