"""Requests of other sites' web pages, refused before any route while callers show no API key.

Invariant: no route is left out, but the two that a balancer or an orchestrator probes under a name
of its own and that tell nothing but that a process is up. A refusal is in the dialect of its path.
"""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tidegate.errors import Forbidden
from tidegate.http.access import AccessLog
from tidegate.http.dialects import refusal
from tidegate.http.problems import problem_response
from tidegate.http.services import Services, services_of_scope
from tidegate.relay.paths import dialect_of, is_native

_PROBES = ("/health/live", "/health/ready", "/llm/health/live", "/llm/health/ready")
_WHY = "tidegate.foreign"


def why_foreign(services: Services, scope: Scope) -> Forbidden | None:
    """Why a request is not answered without a key; None where it is."""
    refused = services.origins.refusal(scope["headers"], scope["method"])
    return None if refused is None or scope["path"] in _PROBES else refused


async def refuse_foreign(why: Forbidden, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what `why_foreign` says; with a line in the log."""
    scope[_WHY] = why
    await _refusing(scope, receive, send)


class NoForeignPages:
    """ASGI middleware, for an application whose requests all pass its middlewares."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            services = services_of_scope(scope)
            if not services.gate.on and (why := why_foreign(services, scope)) is not None:
                await problem_response(why)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    why: Forbidden = scope[_WHY]
    if not is_native(scope["path"]):
        await problem_response(why)(scope, receive, send)
        return
    names = {name for name, _ in scope["headers"]}
    status, headers, body = refusal(dialect_of(scope["path"], names, scope["query_string"]), why)
    told = {name.decode(): value.decode() for name, value in headers}
    await Response(body, status, told)(scope, receive, send)


_refusing = AccessLog(_refuse)
