"""Error responses: RFC 9457 problem JSON, the dialects' own shapes, and what to do about them.

The only table from an error to an HTTP status. In a dialect the same facts have the provider's
shape; a call that is not admitted in time is a 429 there, because SDKs decide by status and
`Retry-After`. OPTIONS and 405 name the methods of a path (RFC 9110, 9.3.7 and 10.2.1).

Invariants: no client sees a stack trace; every error code has its advice.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Mount
from starlette.types import Message, Receive, Scope, Send

from tidegate import errors
from tidegate.dialects import ADMINISTRATION, DIALECTS
from tidegate.dialects.spec import Dialect, Headers
from tidegate.telemetry.logging import Log, get_logger

if TYPE_CHECKING:
    from fastapi import FastAPI

_KINDS = {
    "uuid_parsing": ("is not an id", "an id, such as request_id in the answer of /submit"),
    "uuid_type": ("is not an id", "an id, such as request_id in the answer of /submit"),
    "int_parsing": ("is not a whole number", "a whole number"),
    "int_type": ("is not a whole number", "a whole number"),
    "int_from_float": ("is not a whole number", "a whole number"),
    "float_parsing": ("is not a number", "a number"),
    "float_type": ("is not a number", "a number"),
    "decimal_parsing": ("is not a number", "a number"),
    "decimal_type": ("is not a number", "a number"),
    "bool_parsing": ("is neither true nor false", "true or false"),
    "bool_type": ("is neither true nor false", "true or false"),
    "string_type": ("is not a text", "a text"),
    "list_type": ("is not a list", "a list"),
    "dict_type": ("is not an object", "an object"),
    "date_from_datetime_inexact": ("is not a day", "a day such as 2026-01-31"),
    "date_from_datetime_parsing": ("is not a day", "a day such as 2026-01-31"),
    "date_parsing": ("is not a day", "a day such as 2026-01-31"),
    "datetime_from_date_parsing": ("is not a time", "a time such as 2026-01-31T12:00:00Z"),
    "datetime_parsing": ("is not a time", "a time such as 2026-01-31T12:00:00Z"),
    "extra_forbidden": ("is not known", None),
    "missing": ("is not given", "required"),
}
_BOUNDS = {
    "greater_than_equal": ("is too small", "{ge} or more"),
    "greater_than": ("is too small", "more than {gt}"),
    "less_than_equal": ("is too large", "{le} or less"),
    "less_than": ("is too large", "less than {lt}"),
    "string_too_short": ("is too short", "{min_length} characters or more"),
    "string_too_long": ("is too long", "{max_length} characters or fewer"),
    "too_short": ("has too few", "{min_length} or more"),
    "too_long": ("has too many", "{max_length} or fewer"),
    "literal_error": ("is not known", "{expected}"),
    "enum": ("is not known", "{expected}"),
}


def in_words(error: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return what is wrong, and the allowed values if known; `error` is one of Pydantic's."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _KINDS:
        return _KINDS[kind]
    if kind in _BOUNDS:
        reason, allowed = _BOUNDS[kind]
        return reason, allowed.format(**context)
    return f"is not valid: {error['msg']}", None


_ORDER = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
_OF_FILES = ("GET",)  # of a folder of files, whose route matches every method


def allow(methods: Iterable[str]) -> str:
    """Return the value of `Allow`: HEAD is supported wherever GET is, OPTIONS everywhere."""
    known = {*methods, "OPTIONS"}
    known |= {"HEAD"} if "GET" in known else set()
    return ", ".join(method for method in _ORDER if method in known)


def methods_in(routes: Sequence[BaseRoute], scope: Scope) -> tuple[str, ...]:
    """Return the methods of all routes with this path; none if there is no such route."""

    def is_known(method: str) -> bool:
        asking = {**scope, "method": method}
        return any(
            route.matches(asking)[0] is Match.FULL
            for route in routes
            if method in _OF_FILES or not isinstance(route, Mount)
        )

    return tuple(method for method in _METHODS if is_known(method))


async def answer_options(
    methods: tuple[str, ...], scope: Scope, receive: Receive, send: Send
) -> None:
    """Answer 204 with the methods of a path."""
    await Response(status_code=204, headers={"Allow": allow(methods)})(scope, receive, send)


MEDIA_TYPE = "application/problem+json"
REQUEST_ID_HEADER = "x-tidegate-request-id"

STATUS: dict[type[errors.TidegateError], int] = {
    errors.TidegateError: 500,
    errors.InvalidRequest: 400,
    errors.PayloadTooLarge: 413,
    errors.UnsupportedMedia: 415,
    errors.FetchRefused: 422,
    errors.RequestTimeout: 408,
    errors.RealtimeIdle: 408,
    errors.RealtimeStalled: 408,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.WebSocketRefused: 426,
    errors.IdempotencyConflict: 409,
    errors.AlreadyEnded: 409,
    errors.PolicyChanged: 409,
    errors.NotEnded: 409,
    errors.UpstreamsChanged: 409,
    errors.UpstreamUnfit: 409,
    errors.UpstreamInUse: 409,
    errors.RequestCancelled: 409,
    errors.TooManyFollowers: 503,
    errors.BudgetUnbounded: 403,
    errors.QuotaExceeded: 429,
    errors.DeadlineExceeded: 504,
    errors.LimitPaused: 503,
    errors.LimitUsedUp: 429,
    errors.DemandImpossible: 422,
    errors.QueueFull: 503,
    errors.LimiterUnavailable: 503,
    errors.LeaseLost: 503,
    errors.UpstreamMissing: 503,
    errors.UpstreamError: 502,
    errors.UpstreamThrottled: 503,
    errors.UpstreamTierBusy: 503,
    errors.UpstreamUnavailable: 502,
    errors.UpstreamOut: 503,
    errors.UpstreamDrained: 503,
    errors.UpstreamTimeout: 504,
    errors.UpstreamRejected: 422,
    errors.PromptBlocked: 422,
    errors.StoreUnavailable: 503,
    errors.IssuerUnavailable: 503,
    errors.ShuttingDown: 503,
}
# Where a provider uses another status, so that its SDK reacts as it does to the provider.
NATIVE_STATUS: dict[type[errors.TidegateError], int] = {
    errors.DeadlineExceeded: 429,
    errors.LimitPaused: 429,
    errors.QueueFull: 429,
    errors.DemandImpossible: 400,
    errors.UpstreamThrottled: 429,
    errors.UpstreamTierBusy: 429,
    errors.BudgetPaused: 403,
}
_DEFAULT_RETRY_AFTER_MS = 1_000

Handler = Callable[[Request], Awaitable[Response]]

log = get_logger()


class Problem(BaseModel):
    """RFC 9457 problem details. `code` is the stable name to test for."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": "urn:tidegate:problem:invalid_request",
                "title": "Bad Request",
                "status": 400,
                "detail": "neither a prompt nor a file was given",
                "code": "invalid_request",
                "field": "data",
                "allowed": "a text in `data` (or `text`), or at least one file",
            }
        }
    )

    type: str = Field(description="A URN that names the kind of problem")
    title: str
    status: int
    detail: str
    code: str
    field: str | None = Field(default=None, description="The field of the wrong input")
    allowed: str | None = Field(default=None, description="The allowed values")
    limit: str | None = Field(
        default=None,
        description="The limit that rejected the request, such as kind:text_only or most_streams",
    )
    retry_after_ms: int | None = None
    is_estimate: bool | None = Field(
        default=None,
        description="True if `retry_after_ms` is an estimate, which depends on when running calls "
        "end",
    )


def status_of(error: errors.TidegateError) -> int:
    """Return the HTTP status of the nearest ancestor in the table."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def native_status_of(error: errors.TidegateError) -> int:
    """Return the HTTP status of an error in a provider's dialect."""
    found = (NATIVE_STATUS.get(kind, STATUS.get(kind)) for kind in type(error).__mro__)
    return next(status for status in found if status is not None)


_STATUS_OF_CODE = {kind.code: status for kind, status in (STATUS | NATIVE_STATUS).items()}


def status_of_code(code: str) -> int:
    """Return the HTTP status in a provider's dialect for the code of a failure."""
    return _STATUS_OF_CODE.get(code, 500)


def problem(error: errors.TidegateError) -> Problem:
    """Return the problem details of `error`."""
    status = status_of(error)
    retry_after_ms = error.retry_after_ms
    if retry_after_ms is None and status in (503, 504) and not _has_unknown_end(error):
        retry_after_ms = _DEFAULT_RETRY_AFTER_MS
    return Problem(
        type=f"urn:tidegate:problem:{error.code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=error.client_message,
        code=error.code,
        field=getattr(error, "field", None),
        allowed=getattr(error, "allowed", None),
        limit=getattr(error, "limit", None) or None,
        retry_after_ms=retry_after_ms,
        is_estimate=getattr(error, "is_estimate", False) or None,
    )


def problem_response(error: errors.TidegateError, request_id: str | None = None) -> Response:
    """Return `error` as a response, with Retry-After if waiting helps."""
    body = problem(error)
    headers = {} if request_id is None else {REQUEST_ID_HEADER: request_id}
    if body.retry_after_ms is not None:
        headers["Retry-After"] = str(max(1, math.ceil(body.retry_after_ms / 1000)))
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.PayloadTooLarge | errors.RequestTimeout):
        headers["Connection"] = "close"  # the rest of the body is still being sent
    return JSONResponse(
        body.model_dump(exclude_none=True), body.status, headers, media_type=MEDIA_TYPE
    )


def install(app: FastAPI) -> None:
    """Register handlers that turn every error of a route of `app` into problem JSON."""
    from fastapi.exceptions import RequestValidationError  # a worker needs no FastAPI

    app.add_exception_handler(errors.TidegateError, _on_own_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


async def answered(
    handler: Handler,
    scope: Scope,
    receive: Receive,
    send: Send,
    refused: Callable[[errors.TidegateError], None],
) -> None:
    """Call a handler without a router; its errors become problem responses as for a route, and
    `refused` is called with each of them.

    Other errors, and those after the head of the response was sent, are raised.
    """
    started = False

    async def watched(message: Message) -> None:
        nonlocal started
        started = started or message["type"] == "http.response.start"
        await send(message)

    request = Request(scope, receive, watched)
    try:
        response = await handler(request)
        await response(scope, receive, watched)
    except errors.TidegateError as error:
        if started:
            raise
        refused(error)
        answer = await _on_own_error(request, error)
        await answer(scope, receive, send)
    except ClientDisconnect:
        return


async def _on_own_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.TidegateError)
    if type(error) is errors.TidegateError:
        log.error(Log.INTERNAL_ERROR, exc_info=error)
    return problem_response(error)


async def _on_validation_error(_request: Request, error: Exception) -> Response:
    from fastapi.exceptions import RequestValidationError

    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    where = ".".join(str(step) for step in first["loc"][1:]) or str(first["loc"][0])
    reason, allowed = in_words(first)
    return problem_response(errors.InvalidRequest(where, f"{where} {reason}", allowed=allowed))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    headers, detail = dict(error.headers or {}), str(error.detail)
    requested = f"{request.method} {request.url.path[:200]}"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        methods = methods_in(request.app.routes, request.scope) or ("GET",)
        headers["Allow"] = allow(methods)
        detail = f"Tidegate has no {requested}, but {' and '.join(methods)}"
    elif detail == HTTPStatus.NOT_FOUND.phrase:
        detail = f"Tidegate has no {requested}{_ELSE}"
    code = phrase.lower().replace(" ", "_")
    body = Problem(
        type=f"urn:tidegate:problem:{code}" if code in ADVICE else "about:blank",
        title=phrase,
        status=error.status_code,
        detail=detail,
        code=code,
    )
    return JSONResponse(
        body.model_dump(exclude_none=True),
        error.status_code,
        headers,
        media_type=MEDIA_TYPE,
    )


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # the client has disconnected


_RETRY_IT = "Nothing is wrong with the request itself: retry it."

ADVICE: dict[str, str] = {
    "internal": "This is a fault of the gateway: its log has the details under the request's id.",
    "config": "A setting is wrong: the log of the process names it.",
    "preempted": "It gave way to a call of a higher priority. It is queued again automatically.",
    "last_try_waits": "It is queued again automatically, and called when the other call ends.",
    "invalid_request": "The request is invalid: fix it before you send it again.",
    "too_large": "It is larger than what is allowed: send less, or raise the limit on its size.",
    "files_full": "Its tenant has reached its limit on batch files: delete some.",
    "unsupported_media": "A file has an unsupported type: convert it, or leave it out.",
    "fetch_refused": "The picture at its address could not, or must not, be fetched: check that "
    "the address is public and answers with a picture.",
    "fetch_failed": "The server of the picture failed or did not answer: retry it later, or send "
    "the picture as a file.",
    "request_timeout": "The client sent too slowly. It may send again.",
    "realtime_idle": "Neither side of the realtime session sent anything for "
    "IDLE_TIMEOUT_MS: raise it, or open another session.",
    "forbidden": "Its tenant or key does not allow this: see the tenant's models and the "
    "key's scopes.",
    "unauthenticated": "The API key was invalid: see the tenant's keys.",
    "not_found": "No upstream serves it: check the model's name.",
    "method_not_allowed": "The path has another method: the response names it.",
    "websocket_refused": "The path is not relayed as a WebSocket: send the request in HTTP.",
    "policy_conflict": "A program's limits are not those in force: change one or the other.",
    "idempotency_conflict": "Its idempotency key belongs to another request: use a new key.",
    "policy_changed": "The policy changed meanwhile: reload it, and apply the change to it.",
    "upstreams_changed": "The upstreams changed meanwhile: reload them, and apply the change.",
    "upstream_unfit": "The upstream failed its test: the response says at what.",
    "upstream_in_use": "Calls or objects need the upstream: wait for their end, or force the "
    "removal.",
    "upstream_missing": "One process lacks what an upstream needs: `tidegate doctor` names both. "
    "Retry it: another process may have it.",
    "upstream_drained": "An operator drained the upstream: resume it, or name another one.",
    "already_ended": "It had ended before.",
    "not_ended": "It has not ended yet.",
    "cancelled": "It was cancelled. Retry it if that was a mistake.",
    "too_many_followers": "This process has too many followers: retry later.",
    "quota_exceeded": "Its tenant has reached its cap on queued or open requests: raise the "
    "cap, or wait.",
    "budget_reserved": "Calls in progress may spend what is left of a budget: retry it when they "
    "end.",
    "budget_exceeded": "A budget has no room for it: raise it, or wait for its next period.",
    "budget_paused": "A budget is paused: see what has spent it, then resume it with "
    "`tidegate budgets resume`.",
    "budget_unbounded": "A budget applies to it, and its maximum cost is not known: set "
    "max_tokens, give its model a price, or have the budget take estimates (doubt = estimate).",
    "admission": "The limiter did not admit it: see the limits.",
    "deadline_exceeded": "It was not admitted before its deadline: raise the limit that it waited "
    "for, give it a higher priority or a later deadline.",
    "limit_paused": "A limit that it needs is paused for longer than it could wait: see who paused "
    "it and until when, then retry it or end the pause.",
    "limit_used_up": "A rate or day quota that it needs has no room before its deadline: raise it, "
    "give a later deadline, or retry it once there is room.",
    "impossible": "It needs more than the limit can ever give: raise the limit, or request less.",
    "queue_full": "The queue is full: send fewer concurrent requests, or allow a longer queue.",
    "limiter_unavailable": "Valkey was unavailable: see /health/dependencies, then retry it.",
    "lease_lost": f"The process that ran it lost touch with Valkey. {_RETRY_IT}",
    "upstream": "The provider failed with an error of its own: its message is in the response.",
    "upstream_throttled": "The provider throttled the request: lower the limit to what it "
    "really allows, then retry it.",
    "upstream_tier_busy": "The requested processing tier has no capacity at the moment: retry it "
    "later, or without the tier.",
    "upstream_unavailable": f"The provider was unavailable or unreachable. {_RETRY_IT}",
    "upstream_out": "The upstream is out of service after failures, so the call was not made. One "
    "call at a time probes it: retry the request once the upstream is back.",
    "upstream_unpaid": "The account at the provider has no credit left: top it up, then retry it.",
    "upstream_timeout": "The provider took too long: retry it, or allow it more time.",
    "upstream_rejected": "The provider rejected the request as invalid: fix it before you retry. "
    "Its error message is in the response.",
    "upstream_unauthorized": "The provider rejected the API key: configure a valid one, then "
    "retry it.",
    "upstream_garbled": f"The provider's response broke its protocol. {_RETRY_IT}",
    "prompt_blocked": "The provider's safety filter blocked the prompt: change its wording.",
    "empty_answer": "The provider answered without content: the finish reason says why. Allow "
    "more output tokens, or change the prompt.",
    "store_unavailable": "PostgreSQL or the blob store was unavailable: see /health/dependencies.",
    "issuer_unavailable": "The keys of the token's issuer could not be read: try again.",
    "claim_lost": "Another worker took over; its result is used.",
    "shutting_down": f"The process that had it was stopping. {_RETRY_IT}",
    "worker_died": "The workers that ran it died each time: examine the request and the "
    "workers' logs before you requeue it.",
    "process_died": "The process that made the call was killed: call again. What it cost is "
    "known once the day is reconciled with the provider, if that is OpenAI or Anthropic.",
    "worker_lost": "The workers that ran it died each time: examine the request and the "
    "workers' logs before you submit it again.",
    "gateway_unreachable": "The gateway did not answer: check whether it is running.",
    "gateway_refused": "The gateway rejected the request; see its error message.",
    "client_left": "Its client disconnected before the response was complete.",
    "client_stalled": "Its client stopped reading and was disconnected.",
}


def advice(code: str | None) -> str | None:
    """Return one or two sentences of advice; None for an unknown code."""
    return None if code is None else ADVICE.get(code)


_USUAL_RETRY_MS = 1_000
# Above this, older SDKs of OpenAI and Anthropic retry earlier than the header says, and current
# ones of Anthropic sleep for the whole time: both without a message.
_SDK_WAITS_MS = 60_000


_ELSE = "; docs/gateway.md says what it relays"
_SECRET = (
    ": a key of the provider's would lead past the limits here; a web page gives a key of this "
    "gateway in the subprotocol openai-insecure-api-key.<key>"
)
_GOOGLES = (
    ": a token of the provider's would lead past the limits here; a web page gives a key of this "
    "gateway as ?key=<key>"
)
_OPENED = "; passthrough of an upstream opens it nevertheless"
# Known paths that are deliberately not relayed.
_PAST_LIMITS = (
    ("/v1/realtime/client_secrets", _SECRET + _OPENED),
    ("/v1/realtime/sessions", _SECRET + _OPENED),
    ("/v1/realtime/transcription_sessions", _SECRET + _OPENED),
    ("/v1alpha/auth_tokens", _GOOGLES + _OPENED),
    ("/v1beta/auth_tokens", _GOOGLES + _OPENED),
    ("/v1/realtime/calls", f": the sound would go past this gateway; use the WebSocket{_OPENED}"),
    (
        "/v1/traces/ingest",
        ": the traces of all tenants would be in one account; OPENAI_AGENTS_DISABLE_TRACING=1 "
        f"stops an agent from sending them{_OPENED}",
    ),
    (
        "/v1/live/sessions",
        ": its sound, and the models that it calls, would go past the limits here; the WebSocket "
        f"of /v1/realtime is relayed{_OPENED}",
    ),
    (
        "/v1/agents",
        f": its sessions would run models at the provider, past the limits here{_OPENED}",
    ),
    ("/v1/vaults", f": the credentials of all tenants would be in one account{_OPENED}"),
)
_ADMINISTRATION = ": it administers the provider's account, for which no tenant has a key"
_WEBSOCKET = ", which is a WebSocket: connect with Upgrade: websocket"


def not_relayed(
    method: str,
    path: str,
    methods: tuple[str, ...],
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> errors.TidegateError:
    """Return the error for a path that no native route has, or that has other `methods` only; its
    message names Tidegate, so that it is not taken for the provider's."""
    if methods and any(
        name == b"upgrade" and b"websocket" in value.lower() for name, value in headers
    ):
        message = f"Tidegate does not relay {path[:200]} as a WebSocket, but {methods[0]} in HTTP"
        return errors.WebSocketRefused(message, methods=methods)
    if methods:
        known = " and ".join(methods)
        message = f"Tidegate does not relay {method} {path[:200]}, but {known}"
        return errors.MethodNotAllowed(message, methods=methods)
    message = f"Tidegate does not relay {method} {path[:200]}"
    for begin, why in _PAST_LIMITS:
        if path == begin or path.startswith(f"{begin}/"):
            return errors.Forbidden(message + why)
    if any(path == begin or path.startswith(f"{begin}/") for begin in ADMINISTRATION):
        return errors.NotFound(message + _ADMINISTRATION)
    return errors.NotFound(message + (_WEBSOCKET if path.startswith("/v1/realtime") else _ELSE))


def is_far(after_ms: int | None) -> bool:
    """Return whether a wait is so long that an SDK ignores it, or would sleep for too long."""
    return (after_ms or 0) > _SDK_WAITS_MS


def _has_unknown_end(error: errors.TidegateError) -> bool:
    """Return whether a pause lasts until a person ends it: no wait is stated, and no retry helps
    before."""
    return isinstance(error, errors.LimitPaused) and error.retry_after_ms is None


def refusal(
    dialect: Dialect, error: errors.TidegateError, sent_to: str | None = None
) -> tuple[int, Headers, bytes]:
    """Return status, headers and body of an answer with `error`. `sent_to`: the upstream that has
    the call, if the error is not about the upstream."""
    spec = DIALECTS[dialect]
    status, after_ms = native_status_of(error), error.retry_after_ms
    if isinstance(error, errors.BudgetPaused):
        status = spec.paused_status  # the time of its end is unknown
    elif isinstance(error, errors.BudgetExceeded) or _has_unknown_end(error):
        pass  # without a known time no wait helps
    elif after_ms is None and status in (429, 503, 504):
        after_ms = _USUAL_RETRY_MS
    headers: Headers = [(b"content-type", b"application/json")]
    if after_ms is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(after_ms / 1000))).encode()))
    is_useless = isinstance(error, errors.BudgetExceeded | errors.BudgetUnbounded)
    if is_far(after_ms) or is_useless or _has_unknown_end(error):
        headers += spec.no_retry
    if isinstance(error, errors.PayloadTooLarge | errors.RequestTimeout):
        headers.append((b"connection", b"close"))
    if isinstance(error, errors.UnsupportedMedia) and error.field == "Content-Encoding":
        headers.append((b"accept-encoding", b"identity"))  # RFC 9110, 12.5.3
    if isinstance(error, errors.MethodNotAllowed):
        headers.append((b"allow", allow(error.methods).encode()))
    if isinstance(error, errors.WebSocketRefused):
        headers.append((b"upgrade", b"HTTP/1.1"))  # RFC 9110, 15.5.22
    if (upstream := error.at_upstream or sent_to) is not None:
        headers.append((b"x-tidegate-upstream", upstream.encode()))
    body = orjson.dumps(spec.problem(error, status, after_ms))
    headers.append((b"content-length", str(len(body)).encode()))
    return status, headers, body


def error_event(dialect: Dialect, error: errors.TidegateError) -> bytes:
    """Return the last event of a stream that failed after its beginning."""
    spec = DIALECTS[dialect]
    body = spec.problem(error, native_status_of(error), error.retry_after_ms)
    if spec.error_frame is not None:
        return spec.error_frame(body)
    return b"%bdata: %b\n\n" % (spec.error_event, orjson.dumps(body))


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entry of problem JSON for each status, by reference: FastAPI would check
    the model for each status of each route, a tenth of the import time of a start."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"content": content} for status in statuses}
