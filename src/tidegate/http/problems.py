"""Errors as RFC 9457 problem JSON, and the only table from an error to an HTTP status.

Invariant: a client never sees a stack trace. An error that we did not foresee is not answered
here: it goes on to the access log's middleware, the safety net.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from tidegate import errors
from tidegate.http.methods import allow, methods_in
from tidegate.http.wrong_value import in_words
from tidegate.telemetry import Log, get_logger

MEDIA_TYPE = "application/problem+json"
REQUEST_ID_HEADER = "x-tidegate-request-id"

STATUS: dict[type[errors.TidegateError], int] = {
    errors.TidegateError: 500,
    errors.InvalidRequest: 400,
    errors.PayloadTooLarge: 413,
    errors.UnsupportedMedia: 415,
    errors.FetchRefused: 422,
    errors.RequestTimeout: 408,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.IdempotencyConflict: 409,
    errors.AlreadyEnded: 409,
    errors.PolicyChanged: 409,
    errors.NotEnded: 409,
    errors.RequestCancelled: 409,
    errors.TooManyFollowers: 503,
    errors.QuotaExceeded: 429,
    errors.DeadlineExceeded: 504,
    errors.LimitPaused: 503,
    errors.LimitUsedUp: 429,
    errors.DemandImpossible: 422,
    errors.QueueFull: 503,
    errors.LimiterUnavailable: 503,
    errors.LeaseLost: 503,
    errors.UpstreamError: 502,
    errors.UpstreamThrottled: 503,
    errors.UpstreamUnavailable: 502,
    errors.UpstreamOut: 503,
    errors.UpstreamTimeout: 504,
    errors.UpstreamRejected: 422,
    errors.PromptBlocked: 422,
    errors.StoreUnavailable: 503,
    errors.ShuttingDown: 503,
}
# Where a provider would use another one, so that its SDK does what it does with the provider.
NATIVE_STATUS: dict[type[errors.TidegateError], int] = {
    errors.DeadlineExceeded: 429,
    errors.LimitPaused: 429,
    errors.QueueFull: 429,
    errors.DemandImpossible: 400,
    errors.UpstreamThrottled: 429,
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
    field: str | None = Field(default=None, description="The input that was wrong")
    allowed: str | None = Field(default=None, description="What would have been right")
    limit: str | None = Field(
        default=None, description="The limit that refused, such as kind:text_only or most_streams"
    )
    retry_after_ms: int | None = None


def status_of(error: errors.TidegateError) -> int:
    """The HTTP status of the nearest ancestor in the table."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def native_status_of(error: errors.TidegateError) -> int:
    """The same for an answer in a provider's dialect."""
    found = (NATIVE_STATUS.get(kind, STATUS.get(kind)) for kind in type(error).__mro__)
    return next(status for status in found if status is not None)


def problem(error: errors.TidegateError) -> Problem:
    """The body for `error`."""
    status = status_of(error)
    retry_after_ms = error.retry_after_ms
    if retry_after_ms is None and status in (503, 504):
        retry_after_ms = _DEFAULT_RETRY_AFTER_MS
    return Problem(
        type=f"urn:tidegate:problem:{error.code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=error.message,
        code=error.code,
        field=getattr(error, "field", None),
        allowed=getattr(error, "allowed", None),
        limit=getattr(error, "limit", None),
        retry_after_ms=retry_after_ms,
    )


def problem_response(error: errors.TidegateError, request_id: str | None = None) -> Response:
    """`error` as a whole response, with Retry-After where waiting helps."""
    body = problem(error)
    headers = {} if request_id is None else {REQUEST_ID_HEADER: request_id}
    if body.retry_after_ms is not None:
        headers["Retry-After"] = str(max(1, math.ceil(body.retry_after_ms / 1000)))
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.PayloadTooLarge | errors.RequestTimeout):
        headers["Connection"] = "close"  # the rest of the body is still on its way
    return JSONResponse(
        body.model_dump(exclude_none=True), body.status, headers, media_type=MEDIA_TYPE
    )


def install(app: FastAPI) -> None:
    """Let every error that leaves a route of `app` become problem JSON."""
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
    """Call a handler without a router; its errors become the same problems as a route's, and
    `refused` is told of them.

    Other errors, and those after the head of the response has gone out, are raised.
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
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    where = ".".join(str(step) for step in first["loc"][1:]) or str(first["loc"][0])
    wrong, allowed = in_words(first)
    return problem_response(errors.InvalidRequest(where, f"{where} {wrong}", allowed=allowed))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = allow(methods_in(request.app.routes, request.scope) or ("GET",))
    body = Problem(
        type="about:blank",
        title=phrase,
        status=error.status_code,
        detail=str(error.detail),
        code=phrase.lower().replace(" ", "_"),
    )
    return JSONResponse(
        body.model_dump(exclude_none=True),
        error.status_code,
        headers,
        media_type=MEDIA_TYPE,
    )


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody is there to read it
