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
from typing import Any

from tidegate.dialects import error_of_refusal
from tidegate.errors import (
    UpstreamError,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from tidegate.telemetry import redact

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
