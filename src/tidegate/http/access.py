"""One log line per request, and the safety net under all routes.

Invariant: an exception that reaches this middleware is logged once, with its traceback, and goes
no further: the client gets a plain 500, or finds its connection closed before the answer's end.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tidegate.call import ANYBODY, Caller
from tidegate.errors import TidegateError
from tidegate.http.counted import count_answer, route_of
from tidegate.http.events import abort, disconnected
from tidegate.http.problems import REQUEST_ID_HEADER, problem_response
from tidegate.telemetry import FrequentLog, Log, get_logger

_CUT_WITHIN_S = 1.0
_REDIRECT = 307
_REQUEST_ID = REQUEST_ID_HEADER.encode()
# What machines ask all the time: lines at the level `debug`.
_ROUTINE = ("/health", "/llm/health", "/metrics", "/llm/metrics")
TRACE_IN_SCOPE = "tidegate.trace"  # the id of the trace that a request is part of, as text
CALLER_IN_SCOPE = "tidegate.caller"  # a Caller: whoever finds out who asks puts it there

log = get_logger()
log_request = FrequentLog(Log.REQUEST_DONE)


async def _cut(scope: Scope, receive: Receive) -> None:
    """End an answer that was begun, and wait until the server has seen that it is over.

    It would write a line of its own about an answer that is not complete.
    """
    abort(scope)
    try:
        async with asyncio.timeout(_CUT_WITHIN_S):
            await disconnected(receive)
    except TimeoutError:
        return


class AccessLog:
    """ASGI middleware; health checks and scrapes are logged at debug level."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0  # stays 0 where the client left before it could be answered
        request_id: str | None = None

        async def watched(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                for name, value in message["headers"]:
                    if name == _REQUEST_ID:
                        request_id = value.decode()
                if status == _REDIRECT:
                    message = {**message, "headers": [_here(one) for one in message["headers"]]}
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:  # the top of a request's task: logged here, and nowhere else
            log.exception(Log.INTERNAL_ERROR, method=scope["method"], path=scope["path"])
            if not status:
                answer = problem_response(TidegateError("an internal error; it has been logged"))
                await answer(scope, receive, watched)
            else:
                await _cut(scope, receive)
        finally:
            took_s = time.monotonic() - started
            path = scope["path"]
            count_answer(scope["app"].state.services.tally, route_of(path), status, took_s)
            fields: dict[str, Any] = {
                "method": scope["method"],
                "path": path,
                "status": status,
                "took_ms": round(took_s * 1000, 1),
                **({"request_id": request_id} if request_id else {}),
                **({"trace_id": scope[TRACE_IN_SCOPE]} if TRACE_IN_SCOPE in scope else {}),
                **who(scope.get(CALLER_IN_SCOPE)),
            }
            # After the answers that are ready to go out: in a burst they would wait for the lines.
            asyncio.get_running_loop().call_soon(say_done, fields)


def _here(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """A slash too much is redirected to a whole URL: of http, where a proxy before us ends TLS, so
    that a key would be sent in the clear. The path alone leads to the same place."""
    name, value = header
    if name != b"location":
        return header
    parts = urlsplit(value)
    own = parts.netloc and not parts.path.startswith(b"//")
    return (name, urlunsplit((b"", b"", parts.path, parts.query, b""))) if own else header


def say_done(fields: dict[str, Any]) -> None:
    """The line of a request that has been answered."""
    if fields["path"].startswith(_ROUTINE):
        log.debug(Log.REQUEST_DONE, **fields)
    else:
        log_request(fields)


def who(caller: Caller | None) -> dict[str, str]:
    """The tenant, and the key by its prefix, where a request named one."""
    if caller is None or caller is ANYBODY:
        return {}
    key = {} if caller.key_id is None else {"key_id": caller.key_id}
    return {"tenant": caller.tenant_id, **key}
