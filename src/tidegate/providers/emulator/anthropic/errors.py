"""What goes wrong, in Anthropic's words.

Invariant: every error is `{"type": "error", "error": {type, message}}`; an overload is a 529.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

from tidegate.providers.emulator.answers import new_response_id
from tidegate.providers.emulator.dialect import Dialect, Failure, Json, Refused, wait_s
from tidegate.providers.emulator.faults import Fault, FaultName
from tidegate.providers.emulator.limits import Refusal

_TYPE_OF = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def body(status: int, message: str) -> Json:
    inner = {"type": _TYPE_OF.get(status, "api_error"), "message": message}
    return {"type": "error", "error": inner, "request_id": f"req_{new_response_id()}"}


class AnthropicError(Refused):
    """A request that Anthropic would refuse."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(Failure(status, body(status, message)))


def throttled(measure: str, bound: int, retry_after_s: float, per: str = "minute") -> Failure:
    """429 that says when to come back. `measure` is `requests` or `input-tokens`."""
    message = (
        f"This request would exceed your organization's rate limit of {bound} "
        f"{measure.replace('-', ' ')} per {per}."
    )
    name = f"anthropic-ratelimit-{measure}"
    reset = datetime.now(UTC) + timedelta(seconds=retry_after_s)
    headers = {
        "retry-after": str(math.ceil(retry_after_s)),
        f"{name}-limit": str(bound),
        f"{name}-remaining": "0",
        f"{name}-reset": reset.isoformat(timespec="seconds").replace("+00:00", "Z"),
    }
    return Failure(429, body(429, message), headers)


def refused(refusal: Refusal, model: str) -> Failure:
    """The 429 of a limit that the emulator really enforces."""
    wait = wait_s(refusal)
    if refusal.rate is None or wait is None:
        message = (
            f"Number of concurrent connections to {model} has exceeded your rate limit. "
            "Please try again later or contact sales."
        )
        return Failure(429, body(429, message))
    measure = "input-tokens" if refusal.rate.measure == "input_tokens" else "requests"
    return throttled(measure, refusal.bound, wait, "day" if refusal.rate.per_day else "minute")


def _throttled_on_order(fault: Fault, model: str) -> Failure | None:
    minute = throttled("requests", 10, fault.retry_after_s)
    match fault.fault:
        case FaultName.THROTTLED:
            return minute
        case FaultName.THROTTLED_BARE:
            return Failure(429, body(429, f"Rate limit of {model} reached."))
        case FaultName.DAY_QUOTA:
            return throttled("requests", 250, fault.retry_after_s, "day")
        case FaultName.ERROR_LIST:
            return Failure(429, [minute.body] if isinstance(minute.body, dict) else minute.body)
    return None


ANTHROPIC = Dialect(
    name="anthropic",
    error=lambda status, message: Failure(status, body(status, message)),
    refused=refused,
    plain={
        FaultName.UNAVAILABLE: (529, "Overloaded"),
        FaultName.INTERNAL: (500, "Internal server error"),
        FaultName.UNAUTHORIZED: (401, "invalid x-api-key"),
        FaultName.FORBIDDEN: (403, "Your API key has no permission to use this resource."),
    },
    throttled=_throttled_on_order,
    inside=body,
)
