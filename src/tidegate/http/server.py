"""Web applications: routes, with those of health, OpenAPI description, middleware.

Readiness of an API does not depend on Valkey or PostgreSQL: otherwise an outage of either would
take every process out of the load balancer, and none could answer 503 or use its local share. A
worker serves only metrics, state and health; it is ready only while both stores answer. While
callers need no API key, requests of other sites' pages are rejected before any route, except the
two health probes.

Invariant: the description names problem JSON as the only form of an error.
"""

from __future__ import annotations

import asyncio
import gc
import re
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Lock, RLock
from typing import Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from pydantic import BaseModel, Field
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from tidegate import __version__
from tidegate.dialects import METHODS, dialect_of, methods_at, native_path
from tidegate.errors import ConfigError, Forbidden, TidegateError
from tidegate.http import jobs, problems, stream
from tidegate.http.anthropic import message_batches
from tidegate.http.batches import BATCH_PATHS, batch_methods, batches, is_batch_path
from tidegate.http.guards import admin_router, admit_admin, is_admitted
from tidegate.http.idempotency import LOST_HEADER, REPLAYED_HEADER
from tidegate.http.native import native
from tidegate.http.problems import (
    MEDIA_TYPE,
    Handler,
    Problem,
    answer_options,
    methods_in,
    problem_response,
    problem_responses,
    refusal,
)
from tidegate.http.services import (
    AccessLog,
    Services,
    SoundTarget,
    note_refused,
    services_of,
    services_of_scope,
)
from tidegate.http.uvicorn_protocol import UPGRADE_EXTENSION
from tidegate.limiter import Limiter
from tidegate.metrics.verdict import DeploymentVerdict
from tidegate.policy.deployment import StatedSetting, doubtful, policy_file, stated_settings
from tidegate.record import Source
from tidegate.settings import SECTIONS, Config, shown
from tidegate.telemetry.logging import redact

_UNFIT = "the database's schema does not fit this version: `tidegate migrate` brings it up to date"
_UNSEEN = "PostgreSQL has not answered this process yet: its log and `tidegate doctor` show why"
_DEADLINE_MS = 2_000

health_router = APIRouter(tags=["health"])
process_router = admin_router()


class Liveness(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """`reason` says why a process takes no traffic."""

    status: Literal["ready", "not_ready"]
    reason: str | None = None


class Dependency(BaseModel):
    status: Literal["ok", "failed"]
    took_ms: float
    detail: str | None = None


class UpstreamHealth(BaseModel):
    """How native calls of this process find an upstream: `ok`, `out` after some faults in a row, or
    `trying` again. `key_refused`: it takes our key for wrong. `detail` is the last fault,
    without the provider's own words: they may be about somebody's request."""

    status: Literal["ok", "out", "trying"]
    key_refused: bool = False
    detail: str | None = None


class Dependencies(BaseModel):
    status: Literal["ok", "failed"]
    valkey: Dependency
    postgresql: Dependency
    blobs: Dependency
    limiter: str
    upstreams: dict[str, UpstreamHealth] | None = Field(
        default=None, description="Only with the operator's key or a key of any role"
    )
    verdict: DeploymentVerdict | None = Field(
        default=None,
        description="Verdict on the whole deployment; with the same keys as `upstreams`",
    )


@health_router.get("/health/live", response_model=Liveness, summary="The process runs")
async def live() -> Liveness:
    return Liveness()


@health_router.get("/api/hello", include_in_schema=False)
async def hello() -> dict[str, str]:
    """Answer the request that Claude Code's SDK sends before its first call, without a key."""
    return {"message": "hello"}


@health_router.get(
    "/health/ready",
    response_model=Readiness,
    response_model_exclude_none=True,
    responses={503: {"model": Readiness}},
    summary="The process accepts traffic",
)
async def ready(request: Request) -> JSONResponse:
    services = services_of(request)
    reason = None
    if services.draining.is_set():
        reason = "draining"
    elif services.leaving.is_set():
        reason = "leaving"
    else:
        reason = await _unfit(services)
    return readiness(reason)


async def _unfit(services: Services) -> str | None:
    """Return what is wrong with the database's schema; None if nothing is."""
    if await services.recent_reads.probed("schema", services.store.schema_fits):
        return None
    return _UNFIT if services.store.has_seen_schema else _UNSEEN


def readiness(reason: str | None) -> JSONResponse:
    """Return the answer of a readiness probe: ready, unless there is a reason."""
    body = Readiness(status="not_ready" if reason else "ready", reason=reason)
    return JSONResponse(body.model_dump(exclude_none=True), 503 if reason else 200)


@health_router.get(
    "/health/dependencies",
    response_model=Dependencies,
    responses={503: {"model": Dependencies}},
    summary="State of Valkey, PostgreSQL and the blob store, checked with a deadline",
)
async def dependencies(request: Request) -> JSONResponse:
    services, is_operator = services_of(request), await is_admitted(request)
    valkey, postgresql, blobs, verdict = await asyncio.gather(
        _valkey(services, _DEADLINE_MS),
        _postgresql(services, _DEADLINE_MS),
        services.recent_reads.probed("blobs", lambda: probe(services.blobs.ping())),
        _verdict(services) if is_operator else _no_verdict(),
    )
    failed = "failed" in (valkey.status, postgresql.status, blobs.status)
    body = Dependencies(
        status="failed" if failed else "ok",
        valkey=valkey,
        postgresql=postgresql,
        blobs=blobs,
        limiter=services.limiter.state,
        upstreams=_upstreams(services) if is_operator else None,
        verdict=verdict,
    )
    content = body.model_dump(exclude=None if is_operator else {"upstreams", "verdict"})
    return JSONResponse(content, 503 if failed else 200)


async def _valkey(services: Services, deadline_ms: int) -> Dependency:
    return await services.recent_reads.probed(
        "valkey", lambda: probe(_answer_of_valkey(services.limiter, deadline_ms), deadline_ms)
    )


async def _postgresql(services: Services, deadline_ms: int) -> Dependency:
    return await services.recent_reads.probed(
        "postgresql", lambda: probe(services.store.connections.ping(deadline_ms), deadline_ms)
    )


async def _verdict(services: Services) -> DeploymentVerdict | None:
    """Return the verdict on the deployment; None if it takes too long: a probe must be answered in
    time."""
    try:
        async with asyncio.timeout(_DEADLINE_MS / 1000):
            return await services.standing.verdict()
    except TimeoutError:
        return None


async def _no_verdict() -> None:
    return None


def _upstreams(services: Services) -> dict[str, UpstreamHealth]:
    return {
        name: UpstreamHealth(
            status=health.state, key_refused=health.key_dead, detail=health.in_short or None
        )
        for name, health in services.spine.health.items()
    }


async def _answer_of_valkey(limiter: Limiter, deadline_ms: int) -> None:
    """Raise LimiterUnavailable unless Valkey answers; not only pings, such as a replica does."""
    await limiter.ping(deadline_ms)
    if limiter.state == "away":
        await limiter.snapshot()


async def probe(ping: Awaitable[None], deadline_ms: int = _DEADLINE_MS) -> Dependency:
    """Return whether a dependency answers in time, and what is wrong if it does not."""
    started = time.monotonic()
    detail = None
    try:
        async with asyncio.timeout(deadline_ms / 1000):
            await ping
    except TidegateError as error:
        detail = error.message
    except TimeoutError:
        detail = f"no answer within {deadline_ms} ms"
    took_ms = round((time.monotonic() - started) * 1000, 1)
    return Dependency(status="failed" if detail else "ok", took_ms=took_ms, detail=detail)


@health_router.get(
    "/metrics",
    dependencies=[Depends(admit_admin)],
    response_class=Response,
    responses=problem_responses(401, 403)
    | {
        200: {
            "description": "In the text format of Prometheus, or OpenMetrics",
            "content": {"text/plain": {}},
        }
    },
    summary="Metrics for Prometheus",
)
async def metrics(request: Request) -> Response:
    """Metrics of this process and its siblings under one supervisor, and the state of all limits
    and queues. Requires ADMIN_TOKEN or a key of any role, like `/admin`."""
    exposition = services_of(request).exposition
    body, media_type = await exposition.text(request.headers.get("accept", ""))
    return Response(body, media_type=media_type)


@process_router.get("/process", summary="State of the process that answers")
async def process(request: Request) -> dict[str, Any]:
    """Permits, waiters, sessions, tasks, memory and recent failures of the process. Reads neither
    Valkey nor PostgreSQL. SIGQUIT writes the same to the log of a process."""
    services = services_of(request)
    return {"draining": services.draining.is_set(), **services.state.shown()}


class SettingView(BaseModel):
    """A setting, as `tidegate config check --defaults` shows it."""

    name: str
    value: str | None = Field(description="(hidden) for a secret; null if not set")
    origin: str | None = Field(description="Source of the value; null for the default")
    section: str
    text: str = Field(description="Description of the setting")


class SettingsView(BaseModel):
    """Settings of the process that answers, and possible mistakes in them."""

    process: str
    policy_file: str | None
    settings: list[SettingView]
    doubts: list[str]


@process_router.get("/settings", summary="Settings of the process that answers")
async def settings(request: Request) -> SettingsView:
    """Settings as of the start of the process. Secrets are not shown."""
    services = services_of(request)
    stated, file, doubts = await to_thread.run_sync(_stated, services.config)
    section, views = "", list[SettingView]()
    for one in stated:
        field = one.name.lower()
        section = SECTIONS.get(field, section)
        text = Config.model_fields[field].description or ""
        value = None if one.value is None else redact(shown(one.name, one.value))
        views.append(
            SettingView(name=one.name, value=value, origin=one.origin, section=section, text=text)
        )
    return SettingsView(
        process=services.board.process,
        policy_file=None if file is None else str(file),
        settings=views,
        doubts=doubts,
    )


def _stated(config: Config) -> tuple[list[StatedSetting], Path | None, list[str]]:
    stated, file = stated_settings(config), policy_file(config)
    try:
        doubts = [str(one) for one in doubtful(config)]
    except OSError as unreadable:
        doubts = [f"{file} can't be read any more: {unreadable.strerror}"]
    except ConfigError as invalid:  # of a file that has changed since the start
        doubts = [invalid.message]
    return stated, file, doubts


_SCHEMES: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, tg_..."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "x-goog-api-key": {"type": "apiKey", "in": "header", "name": "x-goog-api-key"},
    "key": {"type": "apiKey", "in": "query", "name": "key"},
}
_FOREIGN = ("HTTPValidationError", "ValidationError")


def described(schema: dict[str, Any]) -> dict[str, Any]:
    """Correct the error responses in `schema`, in place, and return it."""
    for path in schema["paths"].values():
        for operation in path.values():
            responses = operation["responses"]
            for status, response in list(responses.items()):
                content = response.get("content", {})
                if MEDIA_TYPE in content:
                    content.pop("application/json", None)
                elif "HTTPValidationError" in str(content):
                    del responses[status]
    schemas = schema["components"]["schemas"]
    for name in _FOREIGN:
        schemas.pop(name, None)
    schemas[Problem.__name__] = Problem.model_json_schema(mode="serialization")
    schema["components"]["schemas"] = dict(sorted(schemas.items()))
    schema["components"]["securitySchemes"] = _SCHEMES
    # Where AUTH requires keys; an empty entry means that it may not.
    schema["security"] = [*({name: []} for name in _SCHEMES), {}]
    return schema


_PROBES = ("/health/live", "/health/ready", "/llm/health/live", "/llm/health/ready")


def why_foreign(services: Services, scope: Scope) -> Forbidden | None:
    """Return why a request without a key is rejected; None if it is accepted, or if callers must
    send keys."""
    if services.gate.on or scope["path"] in _PROBES:
        return None
    return services.origins.refusal(scope["headers"], scope["method"])


class NoForeignPages:
    """ASGI middleware that rejects requests of other sites' pages."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        why = why_foreign(services_of_scope(scope), scope) if scope["type"] == "http" else None
        answer = self._app if why is None else problem_response(why)
        await answer(scope, receive, send)


async def _refuse(why: Forbidden, scope: Scope, receive: Receive, send: Send) -> None:
    if native_path(scope["path"]) is None:
        await problem_response(why)(scope, receive, send)
        return
    names = {name for name, _ in scope["headers"]}
    status, headers, body = refusal(dialect_of(scope["path"], names, scope["query_string"]), why)
    fields = {name.decode(): value.decode() for name, value in headers}
    await Response(body, status, fields)(scope, receive, send)


_LAST_WORDS_S = 5.0
_STATIC = Path(__file__).parent / "static"
_DESCRIPTION = """
A self-hosted LLM gateway, compatible with the OpenAI, Anthropic and Gemini APIs. It enforces the
providers' rate limits over all processes with one fair queue, and records every request.

All paths but those of the providers' SDKs work with and without the prefix `/llm`. Errors are
problem JSON (RFC 9457); on the paths of an SDK they have its provider's format.
"""


_PREFIX = "/llm"
_OF_OPERATORS = ("/admin", "/dashboard", "/metrics", "/llm/admin", "/llm/dashboard", "/llm/metrics")
_CORS: dict[str, Any] = {
    "allow_methods": ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
    "allow_headers": ["*"],
    "expose_headers": [
        *("retry-after", "retry-after-ms", "x-should-retry", "x-request-id", "request-id"),
        *("x-tidegate-request-id", "x-tidegate-queue-ms", "x-tidegate-upstream"),
        *("x-tidegate-remaining", "x-tidegate-type", "x-tidegate-omitted-bytes"),
        *(REPLAYED_HEADER, LOST_HEADER),
    ],
}


Opens = Callable[[Services, Scope, Receive, Send], Awaitable[None]]


class Gateway(FastAPI):
    """FastAPI, except for the paths that carry the load, whose handlers are called directly.

    The layers of FastAPI and Starlette cost as much CPU as all the work on a submitted job. The
    same handlers are also registered as routes, for the documentation.

    `further` imports what a usual call to a model does not need, and adds its routes: realtime
    sessions, requests and usage, operators, the dashboard and the description. It is called once,
    by `complete` or before the first request for one of them.
    """

    def __init__(self, *, further: Callable[[FastAPI], None], **named: Any) -> None:
        self._further: Callable[[FastAPI], None] | None = further
        self._adding = RLock()
        super().__init__(**named)
        called = {
            "/submit": self._called(jobs.submit, "job"),
            "/stream": self._called(stream.stream, "stream"),
        }
        self._pages: CORSMiddleware | None = None
        self._describing = Lock()
        self._batches = AccessLog(batches)
        self._message_batches = AccessLog(message_batches.message_batches)
        self._direct = {
            f"{prefix}{path}": AccessLog(app)
            for path, app in called.items()
            for prefix in ("", _PREFIX)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
        elif UPGRADE_EXTENSION in scope["extensions"] and (opening := await self._opening(scope)):
            await self._socket(opening, scope, receive, send)
        elif self._is_of_page(scope):
            origins = self.state.services.config.cors_origins
            if self._pages is None or self._pages.allow_origins != origins:
                self._pages = CORSMiddleware(self._answer, allow_origins=origins, **_CORS)
            await self._pages({**scope, "extensions": {}}, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _opening(self, scope: Scope) -> Opens | None:
        """Return the front of the WebSocket that a request opens, None for other requests."""
        await self.complete()
        from tidegate.http.realtime.front import is_realtime, realtime
        from tidegate.http.realtime.responses import opens_responses, responses

        if is_realtime(scope["path"]):
            return realtime
        return responses if opens_responses(self.state.services, scope) else None

    async def _socket(self, opening: Opens, scope: Scope, receive: Receive, send: Send) -> None:
        services: Services = self.state.services
        if (foreign := why_foreign(services, scope)) is not None:
            scope["app"] = self
            await AccessLog(partial(_refuse, foreign))(scope, receive, send)
        else:
            await opening(services, scope, receive, send)

    def _is_of_page(self, scope: Scope) -> bool:
        """Return whether the answer needs CORS headers for the page that requests it."""
        services: Services = self.state.services
        if not services.config.cors_origins or scope["path"].startswith(_OF_OPERATORS):
            return False
        return any(name == b"origin" for name, _ in scope["headers"])

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        services: Services = self.state.services
        if scope["method"] == "HEAD":  # the server removes the body
            scope = {**scope, "method": "GET", "extensions": {}}
        path = scope["path"]
        if (native_at := native_path(path)) is not None:
            path = scope["path"] = native_at
        elif path.startswith(f"{_PREFIX}/"):
            scope["root_path"] = _PREFIX
        if (foreign := why_foreign(services, scope)) is not None:
            scope["app"] = self
            await AccessLog(partial(_refuse, foreign))(scope, receive, send)
        elif scope["method"] == "OPTIONS" and (known := await self._methods_at(scope, native_at)):
            scope["app"] = self
            await AccessLog(partial(answer_options, known))(scope, receive, send)
        elif native_at is not None:
            if path.startswith(BATCH_PATHS) and is_batch_path(scope):
                scope["app"] = self
                await self._batches(scope, receive, send)
            elif path.startswith(message_batches.PATH) and message_batches.is_served_here(scope):
                scope["app"] = self
                await self._message_batches(scope, receive, send)
            else:
                await native(services, scope, receive, send)
        elif scope["method"] == "POST" and (direct := self._direct.get(path)) is not None:
            scope["app"] = self
            await direct(scope, receive, send)
        else:
            if self._further is not None and not self._has_route(scope):
                await self.complete()
            await super().__call__(scope, receive, send)

    async def complete(self) -> None:
        """Add the further routes, in a thread: their modules take a fifth of a second to import.
        If cancelled, the thread continues."""
        if self._further is not None:
            await to_thread.run_sync(self._complete, abandon_on_cancel=True)

    @property
    def routes(self) -> list[BaseRoute]:
        """All routes, with the further ones."""
        self._complete()
        return self.router.routes

    def _complete(self) -> None:
        with self._adding:
            if self._further is not None:
                self._further(self)
                self._further = None
                gc.freeze()  # as what was imported at the start

    def _has_route(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] is Match.FULL for route in self.router.routes)

    async def _methods_at(self, scope: Scope, native_at: str | None) -> tuple[str, ...]:
        """Return the methods of a path; none for an unknown one."""
        if native_at is None:
            await self.complete()
            return methods_in(self.routes, scope)
        if is_batch_path(scope):
            return batch_methods(native_at)
        if native_at.startswith(message_batches.PATH):
            return message_batches.message_batch_methods(native_at)
        names = {name for name, _ in scope["headers"]}
        dialect = dialect_of(native_at, names, scope["query_string"])
        passing = self.state.services.spine.targets.passthrough.endpoint(native_at, dialect)
        return methods_at(native_at, dialect) if passing is None else METHODS

    def openapi(self) -> dict[str, Any]:
        """Return the description, built by the first of concurrent threads: FastAPI cannot build
        two at the same time."""
        with self._describing:
            if not self.openapi_schema:
                self.openapi_schema = described(super().openapi())
            return self.openapi_schema

    @staticmethod
    def _called(handler: Handler, source: Source) -> ASGIApp:
        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            refused = partial(note_refused, scope, source)
            await problems.answered(handler, scope, receive, send, refused)

        return call


def build(
    open_services: Callable[[], AbstractAsyncContextManager[Services]],
    further: Callable[[FastAPI], None] = lambda _: None,
) -> Gateway:
    """Return the application; `open_services` is entered when it starts and left when it stops.
    `further` adds routes after those of operators, as `Gateway` says."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services() as services:
            app.state.services = services
            yield
            services.draining.set()
            await _end_streams(services)

    def complete(app: FastAPI) -> None:
        _add_operators(app)
        further(app)

    app = Gateway(
        further=complete,
        title="Tidegate",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        openapi_url=None,  # see `_serve_docs`
        redoc_url=None,
    )
    # The routes themselves: including a router would build each of them again.
    for router in (jobs.router, stream.router, health_router):
        app.router.routes.extend(router.routes)
    problems.install(app)
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    app.add_middleware(SoundTarget)
    app.add_middleware(AccessLog)
    return app


def _add_operators(app: FastAPI) -> None:
    """Add the routes of requests, usage, operators and the description; import the fronts of
    WebSockets."""
    import tidegate.http.realtime.front
    import tidegate.http.realtime.responses  # noqa: F401
    from tidegate.http import own_requests
    from tidegate.http.admin import (
        all_batches,
        budgets,
        conversations,
        limits,
        requests,
        tenant_calls,
        tenants,
        upstreams,
    )

    for router in (
        *(own_requests.router, own_requests.usage_router),
        own_requests.admin_running,  # before the route of `/admin/requests/{request_id}`
        *(process_router, limits.router, requests.router, conversations.router),
        *(tenants.router, tenants.subjects_router, tenants.actions_router, tenant_calls.router),
        *(budgets.router, upstreams.router, all_batches.router),
    ):
        app.router.routes.extend(router.routes)
    _serve_docs(app)


async def _end_streams(services: Services) -> None:
    """Wait until streams that were cut off have notified their clients and are recorded, within a
    bound."""
    if services.streams:
        await asyncio.wait(set(services.streams), timeout=_LAST_WORDS_S)
    for late in list(services.streams):
        late.cancel()


def _headers_of(page: bytes) -> dict[str, str]:
    """Return headers that allow a page its own inline scripts and files of ours, and forbid
    framing."""
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
    """Serve Swagger UI from our own files, without a CDN, so that it works in a closed network."""
    bundle = "/static/vendor/swagger-ui"

    @app.get("/openapi.json", include_in_schema=False)
    async def description(request: Request) -> JSONResponse:
        """Return the description, built at the first request in a thread: on the event loop it
        would take long enough for a probe to fail."""
        described_all = await to_thread.run_sync(app.openapi)
        if root := request.scope.get("root_path", "").rstrip("/"):
            described_all = described_all | {"servers": [{"url": root}]}
        return JSONResponse(described_all)

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
        """Redirect browsers to the dashboard, and programs to the description of the API."""
        is_browser = "text/html" in request.headers.get("accept", "")
        return RedirectResponse("dashboard/" if is_browser else "/docs")


# Shorter than the timeouts of the probes (deploy/), so that they receive the reason.
DEADLINE_MS = 1_000

worker_router = APIRouter()


@worker_router.get("/health/ready")
async def worker_ready(request: Request) -> JSONResponse:
    return readiness(await _why_not(services_of(request)))


async def _why_not(services: Services) -> str | None:
    """Return why this worker claims no jobs; None if it does."""
    if services.leaving.is_set():
        return "draining"
    valkey, postgresql = await asyncio.gather(
        _valkey(services, DEADLINE_MS), _postgresql(services, DEADLINE_MS)
    )
    if postgresql.detail is not None:
        return f"PostgreSQL: {postgresql.detail}"
    if valkey.detail is not None and services.limiter.policy.when_away == "closed":
        return f"Valkey: {valkey.detail}"
    return await _unfit(services)


def watched_app(services: Services) -> FastAPI:
    """Return the application of a process whose services are open already."""
    app = FastAPI(title="Tidegate: a worker", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(worker_router)  # before the route of `health`, which is an API's
    for router in (health_router, process_router):
        app.include_router(router)
    problems.install(app)
    app.add_middleware(NoForeignPages)
    app.add_middleware(AccessLog)
    app.state.services = services
    return app
