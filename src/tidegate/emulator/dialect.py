"""Dialect interface of the emulator, and Gemini's wire format.

A refused call carries facts; the dialect of its front turns them into status, headers and body.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidegate.emulator.limits import Fault, FaultName, Refusal

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer that is an error, as it goes over the wire."""

    status: int
    body: Json | list[Json]
    headers: Mapping[str, str] = field(default_factory=dict)


class Refused(Exception):
    """The request makes no sense to the API that was asked, which has worded the answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.body)
        self.failure = failure


class LimitReached(Exception):
    """A limit that the emulator enforces said no."""

    def __init__(self, refusal: Refusal, model: str) -> None:
        super().__init__(refusal.limit)
        self.refusal = refusal
        self.model = model


@dataclass(frozen=True, slots=True)
class Dialect:
    """`plain` are the faults that are an error of one status and message.

    `throttled` words those that are a 429, and gives None for all others. `inside` is the error
    object that comes inside a 200: its arguments are a status and a message.
    """

    name: str
    error: Callable[[int, str], Failure]
    refused: Callable[[Refusal, str], Failure]
    plain: Mapping[FaultName, tuple[int, str]]
    throttled: Callable[[Fault, str], Failure | None]
    inside: Callable[[int, str], Json]

    def ordered(self, fault: Fault, model: str) -> Failure | None:
        """A fault that is an error response instead of an answer; None when it is another."""
        if (plain := self.plain.get(fault.fault)) is not None:
            return self.error(*plain)
        return self.throttled(fault, model)


def wait_s(refusal: Refusal) -> float | None:
    """How long until it may fit, rounded up to a ms; None where there is no time to name."""
    return None if refusal.rate is None else -(-refusal.retry_after_ns // 1_000_000) / 1000


_TYPE = "type.googleapis.com/google.rpc."
_QUOTA_URL = "https://ai.google.dev/gemini-api/docs/rate-limits"
STATUS_OF = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}


class WireError(Refused):
    """An answer that is an error: raised anywhere while serving, sent by the server."""

    def __init__(self, code: int, message: str, details: Sequence[Json] = ()) -> None:
        super().__init__(Failure(code, error(code, message, details)))


def error(code: int, message: str, details: Sequence[Json] = ()) -> Json:
    inner: Json = {"code": code, "message": message, "status": STATUS_OF.get(code, "UNKNOWN")}
    if details:
        inner["details"] = list(details)
    return {"error": inner}


def key_missing() -> WireError:
    return WireError(
        403,
        "Method doesn't allow unregistered callers (callers without established identity). "
        "Please use API Key or other form of API consumer identity to call this API.",
    )


def key_invalid() -> WireError:
    detail = {
        "@type": f"{_TYPE}ErrorInfo",
        "reason": "API_KEY_INVALID",
        "domain": "googleapis.com",
        "metadata": {"service": "generativelanguage.googleapis.com"},
    }
    return WireError(400, "API key not valid. Please pass a valid API key.", [detail])


def throttled(
    model: str, *, quota_id: str, metric: str, value: int, retry_after_s: float | None
) -> Json:
    """429 as Gemini words it; without a time to name there is no RetryInfo."""
    violation = {
        "quotaMetric": f"generativelanguage.googleapis.com/{metric}",
        "quotaId": quota_id,
        "quotaDimensions": {"location": "global", "model": model},
        "quotaValue": str(value),
    }
    details: list[Json] = [
        {
            "@type": f"{_TYPE}Help",
            "links": [{"description": "Learn more about Gemini API quotas", "url": _QUOTA_URL}],
        },
        {"@type": f"{_TYPE}QuotaFailure", "violations": [violation]},
    ]
    message = (
        "You exceeded your current quota, please check your plan and billing details. "
        f"For more information on this error, head to: {_QUOTA_URL}."
    )
    if retry_after_s is not None:
        message += f"\nPlease retry in {retry_after_s:.9g}s."
        details.append({"@type": f"{_TYPE}RetryInfo", "retryDelay": f"{retry_after_s:.9g}s"})
    return error(429, message, details)


def refused(refusal: Refusal, model: str) -> Failure:
    """The 429 of a limit that the emulator really enforces."""
    rate = refusal.rate
    if rate is None:
        quota_id, metric = "GenerateConcurrentRequestsPerProject", "generate_concurrent_requests"
    elif rate.measure == "input_tokens":
        per = "Day" if rate.per_day else "Minute"
        quota_id = f"GenerateContentInputTokensPerModelPer{per}-Emulated"
        metric = "generate_content_input_token_count"
    else:
        per = "Day" if rate.per_day else "Minute"
        quota_id = f"GenerateRequestsPer{per}PerProjectPerModel-Emulated"
        metric = "generate_requests"
    body = throttled(
        model,
        quota_id=quota_id,
        metric=metric,
        value=refusal.bound,
        retry_after_s=wait_s(refusal),
    )
    return Failure(429, body)


def text_part(text: str) -> Json:
    return {"text": text}


def thought_part(text: str) -> Json:
    return {"text": text, "thought": True}


def call_part(name: str, given: Json, signature: str | None) -> Json:
    part: Json = {"functionCall": {"name": name, "args": given}}
    return part if signature is None else part | {"thoughtSignature": signature}


def media_part(mime_type: str, data: bytes) -> Json:
    return {"inlineData": {"mimeType": mime_type, "data": b64encode(data).decode()}}


def usage(
    input_by_modality: Mapping[str, int], output_tokens: int, thoughts_tokens: int | None
) -> Json:
    input_tokens = sum(input_by_modality.values())
    body: Json = {
        "promptTokenCount": input_tokens,
        "totalTokenCount": input_tokens + output_tokens + (thoughts_tokens or 0),
        "promptTokensDetails": [
            {"modality": name, "tokenCount": count} for name, count in input_by_modality.items()
        ],
    }
    if output_tokens:
        body["candidatesTokenCount"] = output_tokens
    if thoughts_tokens is not None:
        body["thoughtsTokenCount"] = thoughts_tokens
    return body


def answer(
    model: str,
    response_id: str,
    usage_metadata: Json,
    *,
    parts: Sequence[Json] | None,
    finish_reason: str | None,
) -> Json:
    """A whole response, or one chunk of a stream. `parts` None: a candidate without content."""
    candidate: Json = {"index": 0}
    if parts is not None:
        candidate["content"] = {"parts": list(parts), "role": "model"}
    if finish_reason is not None:
        candidate["finishReason"] = finish_reason
    return {
        "candidates": [candidate],
        "usageMetadata": usage_metadata,
        "modelVersion": model,
        "responseId": response_id,
    }


def blocked(model: str, response_id: str, usage_metadata: Json, reason: str) -> Json:
    return {
        "promptFeedback": {"blockReason": reason},
        "usageMetadata": usage_metadata,
        "modelVersion": model,
        "responseId": response_id,
    }


def throttled_on_order(fault: Fault, model: str) -> Failure | None:
    match fault.fault:
        case FaultName.THROTTLED:
            return Failure(429, _minute_quota(model, fault.retry_after_s))
        case FaultName.THROTTLED_BARE:
            return Failure(429, error(429, "Resource has been exhausted (e.g. check quota)."))
        case FaultName.DAY_QUOTA:
            return Failure(429, _day_quota(model, fault.retry_after_s))
        case FaultName.ERROR_LIST:
            return Failure(429, [_minute_quota(model, fault.retry_after_s)])
    return None


def _minute_quota(model: str, retry_after_s: float) -> Json:
    return throttled(
        model,
        quota_id="GenerateRequestsPerMinutePerProjectPerModel-FreeTier",
        metric="generate_content_free_tier_requests",
        value=10,
        retry_after_s=retry_after_s,
    )


def _day_quota(model: str, retry_after_s: float) -> Json:
    return throttled(
        model,
        quota_id="GenerateRequestsPerDayPerProjectPerModel-FreeTier",
        metric="generate_content_free_tier_requests",
        value=250,
        retry_after_s=retry_after_s,
    )


GEMINI = Dialect(
    name="gemini",
    error=lambda code, message: Failure(code, error(code, message)),
    refused=refused,
    plain={
        FaultName.UNAVAILABLE: (503, "The model is overloaded. Please try again later."),
        FaultName.INTERNAL: (500, "An internal error has occurred. Please retry."),
        FaultName.UNAUTHORIZED: (401, "Request had invalid authentication credentials."),
        FaultName.FORBIDDEN: (
            403,
            "Your API key was reported as leaked. Please use another API key.",
        ),
    },
    throttled=throttled_on_order,
    inside=error,
)
