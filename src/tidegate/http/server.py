"""The web application: routes, documentation, error bodies and the access log."""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from tidegate import __version__
from tidegate.http import (
    admin,
    admin_requests,
    admin_requeues,
    admin_stuck,
    admin_subjects,
    admin_tenants,
    admin_webhooks,
    health,
    jobs,
    metrics,
    problems,
    process,
    recorded,
    requests,
    running,
    stream,
    usage,
    waits,
)
from tidegate.http.access import AccessLog
from tidegate.http.batches import batch_methods, batches, is_batch_path
from tidegate.http.foreign import refuse_foreign, why_foreign
from tidegate.http.methods import answer_options, methods_in
from tidegate.http.native import native
from tidegate.http.openapi import described
from tidegate.http.problems import Handler
from tidegate.http.refused import note_refused
from tidegate.http.services import Services
from tidegate.http.target import SoundTarget
from tidegate.observed import Source
from tidegate.relay.paths import dialect_of, methods_at, native_path

_LAST_WORDS_S = 5.0
_STATIC = Path(__file__).parent / "static"
_DESCRIPTION = """
A gateway in front of large language models. It never lets a fleet of services exceed what the
provider allows, wastes none of it, and remembers every request.

Every path works with and without the prefix `/llm`. Errors are problem JSON (RFC 9457).
"""


_OF_OPERATORS = ("/admin", "/dashboard", "/metrics", "/llm/admin", "/llm/dashboard", "/llm/metrics")
_CORS: dict[str, Any] = {
    "allow_methods": ["GET", "HEAD", "POST", "PUT", "DELETE"],
    "allow_headers": ["*"],
    "expose_headers": [
        *("retry-after", "x-request-id", "request-id"),
        *("x-tidegate-request-id", "x-tidegate-queue-ms", "x-tidegate-upstream"),
        *("x-tidegate-remaining", "x-tidegate-type"),
    ],
}


class Gateway(FastAPI):
    """FastAPI, but for the paths that carry the load: their handlers are called directly.

    FastAPI's and Starlette's layers cost as much CPU as all the work on a submitted job. The same
    handlers are ordinary routes as well, for the documentation.
    """

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        called = {
            "/submit": self._called(jobs.submit, "job"),
            "/stream": self._called(stream.stream, "stream"),
        }
        self._pages: CORSMiddleware | None = None
        self._batches = AccessLog(batches)
        self._direct = {
            f"{prefix}{path}": AccessLog(app)
            for path, app in called.items()
            for prefix in ("", "/llm")
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
        elif self._is_of_page(scope):
            if self._pages is None:
                origins = self.state.services.config.cors_origins
                self._pages = CORSMiddleware(self._answer, allow_origins=origins, **_CORS)
            await self._pages({**scope, "extensions": {}}, receive, send)
        else:
            await self._answer(scope, receive, send)

    def _is_of_page(self, scope: Scope) -> bool:
        """Whether a page may be told by `Access-Control-*` that it may read the answer."""
        services: Services = self.state.services
        if not services.config.cors_origins or scope["path"].startswith(_OF_OPERATORS):
            return False
        return any(name == b"origin" for name, _ in scope["headers"])

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        services: Services = self.state.services
        if scope["method"] == "HEAD":  # the server leaves the body out
            scope = {**scope, "method": "GET", "extensions": {}}
        path = scope["path"]
        if (native_at := native_path(path)) is not None:
            path = scope["path"] = native_at
        if not services.gate.on and (foreign := why_foreign(services, scope)) is not None:
            scope["app"] = self
            await refuse_foreign(foreign, scope, receive, send)
        elif scope["method"] == "OPTIONS" and (known := self._methods_at(scope, native_at)):
            scope["app"] = self
            await AccessLog(partial(answer_options, known))(scope, receive, send)
        elif native_at is not None:
            if is_batch_path(scope):
                scope["app"] = self
                await self._batches(scope, receive, send)
            else:
                await native(services, scope, receive, send)
        elif scope["method"] == "POST" and (direct := self._direct.get(path)) is not None:
            scope["app"] = self
            await direct(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def _methods_at(self, scope: Scope, native_at: str | None) -> tuple[str, ...]:
        """By which methods a path is known; none where it is not."""
        if native_at is None:
            return methods_in(self.routes, scope)
        if is_batch_path(scope):
            return batch_methods(native_at)
        names = {name for name, _ in scope["headers"]}
        return methods_at(native_at, dialect_of(native_at, names, scope["query_string"]))

    def openapi(self) -> dict[str, Any]:
        if not self.openapi_schema:
            self.openapi_schema = described(super().openapi())
        return self.openapi_schema

    @staticmethod
    def _called(handler: Handler, source: Source) -> ASGIApp:
        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            refused = partial(note_refused, scope, source)
            await problems.answered(handler, scope, receive, send, refused)

        return call


def build(open_services: Callable[[], AbstractAsyncContextManager[Services]]) -> FastAPI:
    """The application; `open_services` is entered when it starts and left when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services() as services:
            app.state.services = services
            yield
            services.draining.set()
            await _end_streams(services)

    app = Gateway(
        title="Tidegate",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    routes = APIRouter()
    for room in (jobs, requests, running, waits, recorded, usage, stream, health, metrics):
        routes.include_router(room.router)
    routes.include_router(running.admin)  # before the route of `/admin/requests/{request_id}`
    rooms = (
        admin,
        admin_requests,
        admin_requeues,
        admin_tenants,
        admin_webhooks,
        admin_stuck,
        admin_subjects,
    )
    for room in (process, *rooms):
        routes.include_router(room.router)
    app.include_router(routes)
    app.include_router(routes, prefix="/llm", include_in_schema=False)
    problems.install(app)
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    _serve_docs(app)
    app.add_middleware(SoundTarget)
    app.add_middleware(AccessLog)
    return app


async def _end_streams(services: Services) -> None:
    """Let streams that were cut off tell their clients and be recorded, while that can be done."""
    if services.streams:
        await asyncio.wait(set(services.streams), timeout=_LAST_WORDS_S)
    for late in list(services.streams):
        late.cancel()


def _headers_of(page: bytes) -> dict[str, str]:
    """Let a page run its own inline scripts and files of ours, and let no other page frame it."""
    scripts = [
        f"'sha256-{b64encode(sha256(script).digest()).decode()}'"
        for script in re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    ]
    policy = (
        "default-src 'none'",
        f"script-src 'self' {' '.join(scripts)}",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {
        "Content-Security-Policy": "; ".join(policy),
        "X-Frame-Options": "DENY",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


def _serve_docs(app: FastAPI) -> None:
    """Swagger UI from our own files: no CDN, so that it works in a closed network."""
    bundle = "/static/vendor/swagger-ui"

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        options: dict[str, Any] = {"tryItOutEnabled": True, "defaultModelsExpandDepth": 0}
        page = get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="Tidegate: HTTP API",
            swagger_js_url=f"{bundle}/swagger-ui-bundle.js",
            swagger_css_url=f"{bundle}/swagger-ui.css",
            swagger_favicon_url="/static/favicon.svg",
            swagger_ui_parameters=options,
        )
        page.headers.update(_headers_of(bytes(page.body)))
        return page

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> RedirectResponse:
        return RedirectResponse("/static/favicon.svg")

    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> RedirectResponse:
        """People go to the dashboard, programs to the description of the API."""
        is_browser = "text/html" in request.headers.get("accept", "")
        return RedirectResponse("dashboard/" if is_browser else "/docs")
