"""Routes of `/dashboard`: the page, its files, its live feed and its sessions.

Every route except the files and those that begin and end a session requires an operator. A person
signs in with an API key, which the page keeps in the tab's storage, with an OpenID Connect issuer,
or with the one-time code that `tidegate up` prints. The last two set a cookie (HttpOnly,
SameSite=Strict; see `http.browsers`).

Invariants: the content security policy allows no script but these files; the files contain no
secrets and no figures; revoking a key ends its feed; a client that does not read is disconnected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from hmac import compare_digest
from pathlib import Path
from secrets import token_bytes
from typing import Annotated, Any, Literal, TypedDict
from urllib.parse import quote

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import BaseModel
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from tidegate import __version__
from tidegate.call import OperatorRole
from tidegate.dashboard.changes import MOST_REVISIONS, revisions_page
from tidegate.dashboard.feed import ALL, Feed, Grouping, Viewing, feed_of, limits_page
from tidegate.errors import (
    InvalidRequest,
    LimiterUnavailable,
    NotFound,
    ShuttingDown,
    StoreUnavailable,
    TidegateError,
    TooManyFollowers,
)
from tidegate.http.browsers import (
    CODE_S,
    PERSON_S,
    Pass,
    SignIn,
    SignInRefused,
    checked,
    cookie_name,
    make_session,
    make_state,
    state_cookie_name,
)
from tidegate.http.guards import (
    SIGNED_IN,
    address_of,
    admit_admin,
    checked_operator,
    operator_of,
    own_origin,
    own_scheme,
    reads_bodies,
    who_signed_in,
)
from tidegate.http.problems import problem_response
from tidegate.http.services import Services, services_of
from tidegate.http.sse import ClientStalled, EventWriter, abort, disconnected
from tidegate.metrics.process import Recent
from tidegate.store.records import acting
from tidegate.telemetry.logging import Log, get_logger

_MOST_BEGUN = 3  # sign-ins of one browser that wait for the issuer
FOLDER = Path(__file__).parent / "static"
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Revalidated each time, with 304: after an upgrade no module is mixed with an older one.
    "Cache-Control": "no-cache",
}
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


def document() -> FileResponse:
    """Return the one HTML document, which selects its view by the fragment of the URL."""
    return FileResponse(FOLDER / "index.html", headers=HEADERS, media_type="text/html")


class Files:
    """ASGI application for the styles, modules and images, with the same headers."""

    def __init__(self) -> None:
        self._files = StaticFiles(directory=FOLDER)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_RAW_HEADERS]
            await send(message)

        await self._files(scope, receive, headed)


class Watching(Response):
    """Sends the feed to one viewer until it disconnects, its key ends or the process drains."""

    def __init__(self, request: Request, services: Services, feed: Feed, viewing: Viewing) -> None:
        super().__init__()
        self._request = request
        self._services = services
        self._feed = feed
        self._viewing = viewing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._feed.watched(self._viewing) as viewer:
                disconnect = asyncio.ensure_future(disconnected(receive))
                disconnect.add_done_callback(lambda _: viewer.leave())
                stalled_ms = self._services.config.stalled_reader_ms
                writer = EventWriter(send, plain_text=False, stalled_ms=stalled_ms)
                try:
                    await writer.start({})
                    while (frames := await viewer.take()) and await self._may_go_on():
                        await writer.encoded(frames)
                    await writer.end()
                except ClientStalled:
                    abort(scope)
                finally:
                    disconnect.cancel()
        except (TooManyFollowers, ShuttingDown) as refused:
            await problem_response(refused)(scope, receive, send)

    async def _may_go_on(self) -> bool:
        """Return whether the credential is valid. If not, the page reconnects to learn why."""
        try:
            await checked_operator(self._request)
        except TidegateError:
            return False
        return True


FRESH_S = 1.0

log = get_logger()


class StuckFrame(BaseModel):
    """What waits for a person. Both are None while PostgreSQL is unavailable."""

    dead_jobs: int | None = None
    webhooks_given_up: int | None = None


async def _waiting(services: Services) -> StuckFrame:
    try:
        stuck = await services.store.stuck.counts()
    except StoreUnavailable as unavailable:
        log.debug(Log.STORE_AWAY, detail=unavailable.message)
        return StuckFrame()
    return StuckFrame(dead_jobs=stuck.jobs, webhooks_given_up=stuck.webhooks)


def _waiting_of(app: FastAPI) -> Recent[StuckFrame]:
    """Return the cached state of an application, created by the first request."""
    recent: Recent[StuckFrame] | None = getattr(app.state, "dashboard_waiting", None)
    if recent is None:
        recent = app.state.dashboard_waiting = Recent(
            FRESH_S, partial(_waiting, app.state.services)
        )
    return recent


router = APIRouter(prefix="/dashboard", include_in_schema=False)
data = APIRouter(prefix="/dashboard", include_in_schema=False, dependencies=[Depends(admit_admin)])


AsksFor = Literal["keys", "operator_key"]
Refused = Literal["used", "unavailable"]
_NO_STORE = {**HEADERS, "Cache-Control": "no-store"}


class Cookie(TypedDict):
    """Attributes by which a session's cookie is set and deleted."""

    path: str
    secure: bool
    httponly: bool
    samesite: Literal["strict", "lax"]


class PageSession(BaseModel):
    """What the page must know before it shows anything.

    asks_for: `keys` if every caller needs an API key, `operator_key` if only operators need a key.
    cookie: whether the browser signed in with a one-time code and has no key. operator: the name of
    the person. text_model: the default model of texts.
    """

    version: str
    cookie: bool
    operator: str
    role: OperatorRole
    reads_bodies: bool
    asks_for: AsksFor
    text_model: str
    pools: list[str]


@router.get("")
async def without_slash(request: Request) -> RedirectResponse:
    # Relative, so that it is correct behind a proxy that removes a prefix.
    query = request.url.query
    return RedirectResponse(f"dashboard/?{query}" if query else "dashboard/", headers=HEADERS)


@router.get("/")
async def page(
    request: Request, code: Annotated[str | None, Query(max_length=200)] = None
) -> Response:
    """Return the document; a one-time code in the URL redirects to it with the cookie."""
    if code is None:
        return document()
    services = services_of(request)
    refused = await _refused(services, code)
    headers = {**HEADERS, "Cache-Control": "no-store"}
    answer = RedirectResponse(f"./?sign-in={refused}" if refused else "./", 303, headers)
    if refused is None:
        key = services.operator_key.get_secret_value()
        answer.set_cookie(cookie_name(key), make_session(key), **_cookie(request))
    return answer


class WaysIn(BaseModel):
    """The methods to sign in, besides a key."""

    single_sign_on: bool


@router.get("/ways-in")
async def ways_in(request: Request) -> WaysIn:
    """Return the methods to sign in. Public, because nobody has signed in yet."""
    return WaysIn(single_sign_on=services_of(request).sign_in is not None)


@router.get("/sign-in")
async def sign_in(request: Request) -> Response:
    """Redirect the browser to the issuer, with a state that only this browser can return."""
    services, by_issuer = services_of(request), _by_issuer(request)
    key = services.operator_key.get_secret_value()
    state = make_state(key)
    try:
        place = await by_issuer.begin(state, _redirect_uri(request))
    except SignInRefused as refused:
        return RedirectResponse(f"./?sign-in={refused.why}", 303, _NO_STORE)
    answer = RedirectResponse(place, 303, _NO_STORE)
    marks = _cookie(request)
    marks["samesite"] = "lax"  # sent when the issuer's page redirects here
    name = state_cookie_name(key)
    begun = [*_states_in(request.cookies.get(name, "")), state][-_MOST_BEGUN:]
    answer.set_cookie(name, ".".join(begun), max_age=CODE_S, **marks)
    return answer


@router.get("/signed-in")
async def signed_in(
    request: Request,
    state: Annotated[str, Query(max_length=200)] = "",
    code: Annotated[str, Query(max_length=4_000)] = "",
    iss: Annotated[str | None, Query(max_length=2_000)] = None,
) -> Response:
    """Complete a sign-in at the issuer. Redirects only to the page itself."""
    services, by_issuer = services_of(request), _by_issuer(request)
    key = services.operator_key.get_secret_value()
    name = state_cookie_name(key)
    begun = _states_in(request.cookies.get(name, ""))
    try:
        sound = _state_of(services, state, begun)
        if not code:
            raise SignInRefused("refused")
        peer = "" if request.client is None else request.client.host
        person = await by_issuer.finish(state, code, iss, _redirect_uri(request), address=peer)
        # Only now, so that unsuccessful sign-ins do not fill the table.
        tenants = services.store.tenants
        if not await tenants.spend_code(sound.nonce, sound.ends_at, token_bytes(16)):
            raise SignInRefused("state")
        with acting(person.name, person.role, address_of(request)):
            await services.store.tenants.actions.write("sign_in", person.subject)
    except StoreUnavailable:
        answer = RedirectResponse("./?sign-in=unavailable", 303, _NO_STORE)
    except SignInRefused as refused:
        answer = RedirectResponse(f"./?sign-in={refused.why}", 303, _NO_STORE)
    else:
        answer = RedirectResponse("./", 303, _NO_STORE)
        value = by_issuer.cookie(person)
        answer.set_cookie(cookie_name(key), value, max_age=PERSON_S, **_cookie(request))
    if others := [one for one in begun if one != state]:  # sign-ins of other tabs continue
        marks = _cookie(request)
        marks["samesite"] = "lax"
        answer.set_cookie(name, ".".join(others), max_age=CODE_S, **marks)
    else:
        answer.delete_cookie(name, **_cookie(request))
    return answer


def _by_issuer(request: Request) -> SignIn:
    found = services_of(request).sign_in
    if found is None:
        raise NotFound("single sign-on is not configured: OIDC_ISSUER is not set")
    return found


def _redirect_uri(request: Request) -> str:
    return f"{own_origin(request.scope)}{request.scope.get('root_path', '')}/dashboard/signed-in"


def _states_in(cookie: str) -> list[str]:
    """Return the states of a browser's sign-ins, which may be in several tabs, newest last."""
    return [one for one in cookie.split(".")[-_MOST_BEGUN:] if one]


def _state_of(services: Services, state: str, begun: Sequence[str]) -> Pass:
    """Return the state of a sign-in that this browser began. Raises SignInRefused."""
    sound = checked("state", services.operator_key.get_secret_value(), state)
    if sound is None or not any(compare_digest(state.encode(), one.encode()) for one in begun):
        raise SignInRefused("state")
    return sound


@router.post("/sign-out", status_code=204)
async def sign_out(request: Request) -> Response:
    """Delete the browser's session cookie, and end the session for all copies of the cookie."""
    services = services_of(request)
    refused = services.origins.page_refusal(request.scope["headers"], request.method)
    if refused is not None:
        raise refused
    name = cookie_name(services.operator_key.get_secret_value())
    operator = await who_signed_in(request, services)
    if operator is not None:
        try:
            await services.sessions.end(request.cookies[name])
        except StoreUnavailable as unavailable:
            log.warning(Log.SIGN_OUT_UNRECORDED, by=operator.name, detail=unavailable.message)
    answer = Response(status_code=204)
    answer.delete_cookie(name, **_cookie(request))
    return answer


async def _refused(services: Services, code: str) -> Refused | None:
    """Spend a one-time code; return why it is invalid, or None if it is valid."""
    sound = checked("code", services.operator_key.get_secret_value(), code)
    if sound is None:
        return "used"
    try:
        counts = await services.store.tenants.spend_code(
            sound.nonce, sound.ends_at, token_bytes(16)
        )
    except StoreUnavailable:
        return "unavailable"
    return None if counts else "used"


def _cookie(request: Request) -> Cookie:
    secure = own_scheme(request.scope) == "https"
    return {"path": "/", "secure": secure, "httponly": True, "samesite": "strict"}


@data.get("/session")
async def session(request: Request) -> PageSession:
    services, operator = services_of(request), await operator_of(request)
    return PageSession(
        version=__version__,
        asks_for="keys" if services.gate.on else "operator_key",
        text_model=services.config.text_model,
        cookie=operator.name == SIGNED_IN,
        operator=operator.name,
        role=operator.role,
        reads_bodies=reads_bodies(request, operator),
        # The pool of jobs comes last if it has no upstream of its name.
        pools=sorted(
            services.limiters, key=lambda one: one not in services.spine.targets.upstreams
        ),
    )


@data.get("/stuck")
async def stuck(request: Request) -> StuckFrame:
    return await _waiting_of(request.app).get()


@data.get("/feed")
async def feed(
    request: Request,
    pool: Annotated[str | None, Query(description="Whose charts and tables; all if absent")] = None,
    span: Annotated[Literal["5m", "1h", "24h"], Query(description="Of charts and tables")] = "5m",
) -> Response:
    services = services_of(request)
    return Watching(request, services, feed_of(request.app), Viewing(span, _scope(services, pool)))


def _scope(services: Services, pool: str | None) -> str:
    """Return the named pool, or `ALL`. Raises InvalidRequest."""
    if not pool:
        return ALL
    if pool not in services.limiters:
        allowed = f"one of {', '.join(services.limiters)}"
        raise InvalidRequest("pool", f"there is no pool {pool[:100]!a}", allowed=allowed)
    return pool


@data.get("/limits")
async def limits(
    request: Request,
    pool: Annotated[str | None, Query(description="Whose; all if absent")] = None,
    group: Annotated[Grouping, Query()] = "none",
    search: Annotated[str, Query(max_length=1_000)] = "",
    offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
) -> dict[str, Any]:
    """Return a page of all limits, at most half a second old."""
    services = services_of(request)
    scope = _scope(services, pool)
    chosen = [one for one in services.limiters.values() if scope in (ALL, one.pool)]
    snapshots = await asyncio.gather(*(services.recent_reads.of(one) for one in chosen))
    known = [
        (one.pool, snapshot, one.policy)
        for one, snapshot in zip(chosen, snapshots, strict=True)
        if snapshot is not None
    ]
    if not known:
        raise LimiterUnavailable("Valkey does not answer", limit="")
    return limits_page(known, group, search, offset)


@data.get("/revisions")
async def revisions(request: Request, pool: Annotated[str | None, Query()] = None) -> list[Any]:
    """Return the last changes of a pool's limits, newest first."""
    services = services_of(request)
    keeper = services.keepers[_scope(services, pool) or services.usual_pool]
    return revisions_page(await keeper.history(MOST_REVISIONS))


async def typed(request: Request, path: str) -> RedirectResponse:
    """Redirect from a typed address, such as `/dashboard/requests`, to that page."""
    if "text/html" not in request.headers.get("accept", ""):
        raise HTTPException(404)
    query = f"?{request.url.query}" if request.url.query else ""
    up = "../" * path.count("/")
    return RedirectResponse(f"{up}./#/{quote(path.strip('/'))}{query}", headers=HEADERS)


def install(app: FastAPI) -> None:
    """Add the dashboard to the application."""
    app.router.routes.extend([*router.routes, *data.routes])
    app.mount("/dashboard/static", Files())
    app.get("/dashboard/{path:path}", include_in_schema=False)(typed)


__all__ = ["install"]
