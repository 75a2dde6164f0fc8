"""Our errors in the words of the dialect that the client speaks. Pure.

An SDK tells errors by status and shape, and tries again by `Retry-After`: so "no room in time" is
a 429 here, as the provider itself would say it. Invariant: the same facts as in problem JSON.
"""

from __future__ import annotations

import math
from typing import Any

import orjson

from tidegate import errors
from tidegate.http.methods import allow
from tidegate.http.problems import native_status_of
from tidegate.relay.paths import Dialect

Headers = list[tuple[bytes, bytes]]

# https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
_GOOGLE = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    409: "ABORTED",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_OPENAI = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_SPENT = "insufficient_quota"  # both type and code, as of an account without money
_RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"
_BAD_REQUEST = "type.googleapis.com/google.rpc.BadRequest"
_ERROR_INFO = "type.googleapis.com/google.rpc.ErrorInfo"
_USUAL_RETRY_MS = 1_000
# The SDKs of OpenAI and Anthropic try again sooner than told where that is longer than a minute.
_SDK_WAITS_MS = 60_000


def not_relayed(method: str, path: str, methods: tuple[str, ...]) -> errors.TidegateError:
    """What is said of a path that no native front has, or has by other `methods` only, so that
    nobody takes it for the provider's word."""
    if methods:
        known = " and ".join(methods)
        said = f"Tidegate does not relay {method} {path[:200]}, but {known}"
        return errors.MethodNotAllowed(said, methods=methods)
    said = f"Tidegate does not relay {method} {path[:200]}; docs/gateway.md says what it relays"
    return errors.NotFound(said)


def refusal(dialect: Dialect, error: errors.TidegateError) -> tuple[int, Headers, bytes]:
    """Status, headers and body of an answer that says `error`."""
    status = native_status_of(error)
    after_ms = error.retry_after_ms
    if after_ms is None and status in (429, 503, 504):
        after_ms = _USUAL_RETRY_MS
    headers: Headers = [(b"content-type", b"application/json")]
    if after_ms is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(after_ms / 1000))).encode()))
    far = isinstance(error, errors.DeadlineExceeded) and (after_ms or 0) > _SDK_WAITS_MS
    if (far or isinstance(error, errors.BudgetExceeded)) and dialect is not Dialect.GEMINI:
        headers.append((b"x-should-retry", b"false"))  # a word of these SDKs: it would be in vain
    if isinstance(error, errors.PayloadTooLarge | errors.RequestTimeout):
        headers.append((b"connection", b"close"))
    if isinstance(error, errors.UnsupportedMedia) and error.field == "Content-Encoding":
        headers.append((b"accept-encoding", b"identity"))  # RFC 9110, 12.5.3
    if isinstance(error, errors.MethodNotAllowed):
        headers.append((b"allow", allow(error.methods).encode()))
    body = orjson.dumps(body_of(dialect, error, status, after_ms))
    headers.append((b"content-length", str(len(body)).encode()))
    return status, headers, body


def event(dialect: Dialect, error: errors.TidegateError) -> bytes:
    """The last event of a stream that failed in the middle."""
    body = orjson.dumps(body_of(dialect, error, native_status_of(error), error.retry_after_ms))
    name = b"event: error\n" if dialect is Dialect.ANTHROPIC else b""
    return b"%bdata: %b\n\n" % (name, body)


def comfort(dialect: Dialect) -> bytes:
    """What says in a stream of events that we are still there: a comment. Google's SDK takes one
    for an answer that is not JSON, but passes over empty lines."""
    return b"\n\n" if dialect is Dialect.GEMINI else b": waiting for admission\n\n"


def body_of(
    dialect: Dialect, error: errors.TidegateError, status: int, after_ms: int | None
) -> dict[str, Any]:
    """The body as an object."""
    if dialect is Dialect.GEMINI:
        return {"error": _google(error, status, after_ms)}
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message_of(error)}}
    kind = _OPENAI.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if isinstance(error, errors.BudgetExceeded):
        kind = _SPENT
    limit = getattr(error, "limit", None)
    said: dict[str, Any] = {
        "message": message_of(error),
        "type": kind,
        "param": getattr(error, "field", None),
        "code": _code(error),
    }
    return {"error": said | ({"limit": limit} if limit else {})}


def message_of(error: errors.TidegateError) -> str:
    """What is wrong, and what would be right: no dialect has a place of its own for that."""
    allowed = getattr(error, "allowed", None)
    if not allowed or allowed in error.message:
        return error.message
    return f"{error.message}; allowed: {allowed}"


def _code(error: errors.TidegateError) -> str:
    if isinstance(error, errors.Unauthenticated):
        return "invalid_api_key"
    if isinstance(error, errors.NotFound) and error.field == "model":
        return "model_not_found"
    if isinstance(error, errors.BudgetExceeded):
        return _SPENT
    return error.code


def _google(error: errors.TidegateError, status: int, after_ms: int | None) -> dict[str, Any]:
    domain = {"@type": _ERROR_INFO, "reason": error.code.upper(), "domain": "tidegate"}
    limit = getattr(error, "limit", None)
    details: list[dict[str, Any]] = [domain | ({"metadata": {"limit": limit}} if limit else {})]
    if after_ms is not None:
        details.append({"@type": _RETRY_INFO, "retryDelay": f"{after_ms / 1000:g}s"})
    field = getattr(error, "field", None)
    if field is not None:
        violation = {"field": field, "description": message_of(error)}
        details.append({"@type": _BAD_REQUEST, "fieldViolations": [violation]})
    fallback = "INTERNAL" if status >= 500 else "INVALID_ARGUMENT"
    return {
        "code": status,
        "message": message_of(error),
        "status": _GOOGLE.get(status, fallback),
        "details": details,
    }
