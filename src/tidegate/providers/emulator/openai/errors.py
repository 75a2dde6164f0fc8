"""What goes wrong, in OpenAI's words.

Invariant: every error is `{"error": {message, type, param, code}}`; but `error_list` is what
Gemini's endpoint in this dialect sends: a list with a google.rpc error.
"""

from __future__ import annotations

import math

from tidegate.providers.emulator import wire
from tidegate.providers.emulator.dialect import Dialect, Failure, Json, Refused, wait_s
from tidegate.providers.emulator.faults import Fault, FaultName
from tidegate.providers.emulator.limits import Refusal

_TYPE_OF = {429: "requests", 500: "server_error", 503: "server_error", 529: "server_error"}
_CODE_OF = {401: "invalid_api_key", 403: "permission_denied", 429: "rate_limit_exceeded"}
_WRONG_KEY = (
    "Incorrect API key provided: inva***-key. You can find your API key at "
    "https://platform.openai.com/account/api-keys."
)
_NO_QUOTA = (
    "You exceeded your current quota, please check your plan and billing details. For more "
    "information on this error, read the docs: "
    "https://platform.openai.com/docs/guides/error-codes/api-errors."
)


def body(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    kind: str | None = None,
) -> Json:
    inner = {
        "message": message,
        "type": kind or _TYPE_OF.get(status, "invalid_request_error"),
        "param": param,
        "code": code or _CODE_OF.get(status),
    }
    return {"error": inner}


class OpenAIError(Refused):
    """A request that OpenAI would refuse."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(Failure(status, body(status, message, param=param, code=code)))


def wrong(param: str, message: str, code: str = "invalid_value") -> OpenAIError:
    """400 for one field."""
    return OpenAIError(400, message, param=param, code=code)


def key_missing() -> OpenAIError:
    return OpenAIError(
        401,
        "You didn't provide an API key. You need to provide your API key in an Authorization "
        "header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
    )


def key_invalid() -> OpenAIError:
    return OpenAIError(401, _WRONG_KEY)


def model_unknown(model: str) -> OpenAIError:
    return OpenAIError(
        404,
        f"The model `{model}` does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )


def duration(seconds: float) -> str:
    """As OpenAI writes it: `350ms`, `1.2s`, `6m0s`, `1h0m0s`."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{round(rest, 3):g}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def throttled(model: str, measure: str, bound: int, retry_after_s: float) -> Failure:
    """429 that says when to come back. `measure` is `requests` or `tokens`."""
    name = "tokens per min (TPM)" if measure == "tokens" else "requests per min (RPM)"
    wait = duration(retry_after_s)
    message = (
        f"Rate limit reached for {model} in organization org-emulated on {name}: Limit {bound}. "
        f"Please try again in {wait}. "
        "Visit https://platform.openai.com/account/rate-limits to learn more."
    )
    headers = {
        "retry-after": str(math.ceil(retry_after_s)),
        "retry-after-ms": str(math.ceil(retry_after_s * 1000)),
        f"x-ratelimit-limit-{measure}": str(bound),
        f"x-ratelimit-remaining-{measure}": "0",
        f"x-ratelimit-reset-{measure}": wait,
    }
    return Failure(429, body(429, message, kind=measure), headers)


def no_quota() -> Failure:
    kind = "insufficient_quota"
    return Failure(429, body(429, _NO_QUOTA, kind=kind, code=kind))


def refused(refusal: Refusal, model: str) -> Failure:
    """The 429 of a limit that the emulator really enforces."""
    wait = wait_s(refusal)
    if refusal.rate is None or wait is None:
        message = f"Too many concurrent requests for {model}: limit {refusal.bound}."
        return Failure(429, body(429, message))
    if refusal.rate.per_day:
        return no_quota()
    measure = "tokens" if refusal.rate.measure == "input_tokens" else "requests"
    return throttled(model, measure, refusal.bound, wait)


def _throttled_on_order(fault: Fault, model: str) -> Failure | None:
    match fault.fault:
        case FaultName.THROTTLED:
            return throttled(model, "requests", 10, fault.retry_after_s)
        case FaultName.THROTTLED_BARE:
            return Failure(429, body(429, "Rate limit reached."))
        case FaultName.DAY_QUOTA:
            return no_quota()
        case FaultName.ERROR_LIST:
            return wire.throttled_on_order(fault, model)
    return None


OPENAI = Dialect(
    name="openai",
    error=lambda status, message: Failure(status, body(status, message)),
    refused=refused,
    plain={
        FaultName.UNAVAILABLE: (
            503,
            "The engine is currently overloaded, please try again later.",
        ),
        FaultName.INTERNAL: (
            500,
            "The server had an error while processing your request. Sorry about that!",
        ),
        FaultName.UNAUTHORIZED: (401, _WRONG_KEY),
        FaultName.FORBIDDEN: (403, "Your key has no access to this resource."),
    },
    throttled=_throttled_on_order,
    inside=body,
)
