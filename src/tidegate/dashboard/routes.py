"""`/dashboard`: the document, its files, and the data that only it asks for.

Invariant: every route but those of the files, and the two that begin and end a session, is behind
`admit_admin`. A person signs in with a key, which the page keeps in the tab's own storage and shows
in a header; or with the one-time code in the address that `tidegate up` prints, which becomes a
cookie (see `http.signin`): HttpOnly, SameSite=Strict, and counting for no other site's page.
"""

from __future__ import annotations

from secrets import token_bytes
from typing import Annotated, Literal, TypedDict
from urllib.parse import quote

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel

from tidegate import __version__
from tidegate.dashboard.feed import feed_of
from tidegate.dashboard.files import HEADERS, Files, document
from tidegate.dashboard.past import Wanted
from tidegate.dashboard.stuck import Waiting, stuck_of
from tidegate.dashboard.watching import Watching
from tidegate.errors import InvalidRequest, StoreUnavailable
from tidegate.http.admin_gate import SIGNED_IN, admit_admin, admitted_as
from tidegate.http.services import Services, services_of
from tidegate.http.signin import checked, cookie_name, make_session

_PREFIXES = ("", "/llm")

router = APIRouter(prefix="/dashboard", include_in_schema=False)
data = APIRouter(prefix="/dashboard", include_in_schema=False, dependencies=[Depends(admit_admin)])


AsksFor = Literal["keys", "operator_key"]
Refused = Literal["used", "unavailable"]


class Cookie(TypedDict):
    """How the cookie of a session is set, and taken back."""

    path: str
    secure: bool
    httponly: bool
    samesite: Literal["strict"]


class Session(BaseModel):
    """What the page needs to know before it shows anything.

    asks_for: `keys` where every caller shows an API key, `operator_key` where only operators show
    one. cookie: whether the browser signed in with a one-time code, and holds no key.
    """

    version: str
    cookie: bool
    asks_for: AsksFor
    pools: list[str]


@router.get("")
async def without_slash(request: Request) -> RedirectResponse:
    # Relative, so that it is right behind a proxy that takes a prefix away.
    query = request.url.query
    return RedirectResponse(f"dashboard/?{query}" if query else "dashboard/", headers=HEADERS)


@router.get("/")
async def page(
    request: Request, code: Annotated[str | None, Query(max_length=200)] = None
) -> Response:
    """The document; with a one-time code in the address a redirect to it, and the cookie."""
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


@router.post("/sign-out", status_code=204)
async def sign_out(request: Request) -> Response:
    """Have the browser forget its session."""
    services = services_of(request)
    refused = services.origins.page_refusal(request.scope["headers"], request.method)
    if refused is not None:
        raise refused
    answer = Response(status_code=204)
    name = cookie_name(services.operator_key.get_secret_value())
    answer.delete_cookie(name, **_cookie(request))
    return answer


async def _refused(services: Services, code: str) -> Refused | None:
    """Spend a one-time code; why it does not count, or None where it does."""
    sound = checked("code", services.operator_key.get_secret_value(), code)
    if sound is None:
        return "used"
    try:
        counts = await services.store.signins.spend(sound.nonce, sound.ends_at, token_bytes(16))
    except StoreUnavailable:
        return "unavailable"
    return None if counts else "used"


def _cookie(request: Request) -> Cookie:
    # Only a proxy knows whether its client spoke TLS; a wrong word of a client concerns itself.
    secure = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
    return {"path": "/", "secure": secure, "httponly": True, "samesite": "strict"}


@data.get("/session")
async def session(request: Request) -> Session:
    services = services_of(request)
    return Session(
        version=__version__,
        asks_for="keys" if services.gate.on else "operator_key",
        cookie=await admitted_as(request) == SIGNED_IN,
        # That of jobs comes last where there is no upstream of its name.
        pools=sorted(
            services.limiters, key=lambda one: one not in services.relay.targets.upstreams
        ),
    )


@data.get("/stuck")
async def stuck(request: Request) -> Waiting:
    return await stuck_of(request.app).waiting()


@data.get("/feed")
async def feed(
    request: Request,
    pool: Annotated[str | None, Query(description="Whose charts and tables")] = None,
    span: Annotated[Literal["5m", "1h", "24h"], Query(description="Of charts and tables")] = "5m",
) -> Response:
    services = services_of(request)
    pool = services.usual_pool if pool is None else pool
    if pool not in services.limiters:
        allowed = f"one of {', '.join(services.limiters)}"
        raise InvalidRequest("pool", f"there is no pool {pool[:100]!a}", allowed=allowed)
    return Watching(request, services, feed_of(request.app), Wanted(span, pool))


async def typed(request: Request, path: str) -> RedirectResponse:
    """From an address as people type it, such as `/dashboard/requests`, to that page."""
    if "text/html" not in request.headers.get("accept", ""):
        raise HTTPException(404)
    query = f"?{request.url.query}" if request.url.query else ""
    up = "../" * path.count("/")
    return RedirectResponse(f"{up}./#/{quote(path.strip('/'))}{query}", headers=HEADERS)


def install(app: FastAPI) -> None:
    """Add the dashboard to the application, with and without the prefix `/llm`."""
    for prefix in _PREFIXES:
        for routes in (router, data):
            app.include_router(routes, prefix=prefix)
        app.mount(f"{prefix}/dashboard/static", Files())
        app.get(f"{prefix}/dashboard/{{path:path}}", include_in_schema=False)(typed)
