"""`/dashboard`: the document, its files, and the data that only it asks for.

Invariant: every route but those of the files is behind `admit_admin`. The page holds the key that
a person entered in the tab's own storage and shows it in a header, as every client does: there is
no cookie that a browser would send along for another site, so there is nothing to forge a request
with; and no session to be kept by one process out of many.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import FileResponse, RedirectResponse, Response
from pydantic import BaseModel

from tidegate import __version__
from tidegate.call import DEFAULT_POOL
from tidegate.dashboard.feed import feed_of
from tidegate.dashboard.files import Files, document
from tidegate.dashboard.past import Wanted
from tidegate.dashboard.stuck import Waiting, stuck_of
from tidegate.dashboard.watching import Watching
from tidegate.errors import InvalidRequest
from tidegate.http.admin_gate import admit_admin
from tidegate.http.services import services_of

_PREFIXES = ("", "/llm")

router = APIRouter(prefix="/dashboard", include_in_schema=False)
data = APIRouter(prefix="/dashboard", include_in_schema=False, dependencies=[Depends(admit_admin)])


AsksFor = Literal["keys", "token", "nothing"]


class Session(BaseModel):
    """What the page needs to know before it shows anything.

    asks_for: `keys` where every caller shows an API key, `token` where ADMIN_TOKEN guards `/admin`
    alone, `nothing` on a loopback address without either.
    """

    version: str
    asks_for: AsksFor
    pools: list[str]


@router.get("")
async def without_slash() -> RedirectResponse:
    # Relative, so that it is right behind a proxy that takes a prefix away.
    return RedirectResponse("dashboard/")


@router.get("/")
async def page() -> FileResponse:
    return document()


@data.get("/session")
async def session(request: Request) -> Session:
    services = services_of(request)
    guarded: AsksFor = "token" if services.config.admin_token is not None else "nothing"
    return Session(
        version=__version__,
        asks_for="keys" if services.gate.on else guarded,
        pools=list(services.limiters),
    )


@data.get("/stuck")
async def stuck(request: Request) -> Waiting:
    return await stuck_of(request.app).waiting()


@data.get("/feed")
async def feed(
    request: Request,
    pool: Annotated[str, Query(description="Whose charts and tables")] = DEFAULT_POOL,
    span: Annotated[Literal["5m", "1h", "24h"], Query(description="Of charts and tables")] = "5m",
) -> Response:
    services = services_of(request)
    if pool not in services.limiters:
        allowed = f"one of {', '.join(services.limiters)}"
        raise InvalidRequest("pool", f"there is no pool {pool[:100]!a}", allowed=allowed)
    return Watching(request, services, feed_of(request.app), Wanted(span, pool))


def install(app: FastAPI) -> None:
    """Add the dashboard to the application, with and without the prefix `/llm`."""
    for prefix in _PREFIXES:
        for routes in (router, data):
            app.include_router(routes, prefix=prefix)
        app.mount(f"{prefix}/dashboard/static", Files())
