"""Which methods a path is known by, as OPTIONS and a 405 say it (RFC 9110, 9.3.7 and 10.2.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Mount
from starlette.types import Receive, Scope, Send

_ORDER = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_ASKED = ("GET", "POST", "PUT", "PATCH", "DELETE")
_OF_FILES = ("GET",)  # of a folder of files, whose route takes every method


def allow(methods: Iterable[str]) -> str:
    """The value of `Allow`: HEAD is answered wherever GET is, OPTIONS everywhere."""
    known = {*methods, "OPTIONS"}
    known |= {"HEAD"} if "GET" in known else set()
    return ", ".join(method for method in _ORDER if method in known)


def methods_in(routes: Sequence[BaseRoute], scope: Scope) -> tuple[str, ...]:
    """Of all routes that have this path; none where it has none."""

    def is_known(method: str) -> bool:
        asking = {**scope, "method": method}
        return any(
            route.matches(asking)[0] is Match.FULL
            for route in routes
            if method in _OF_FILES or not isinstance(route, Mount)
        )

    return tuple(method for method in _ASKED if is_known(method))


async def answer_options(
    methods: tuple[str, ...], scope: Scope, receive: Receive, send: Send
) -> None:
    """204: what can be asked, and nothing of what would be answered."""
    await Response(status_code=204, headers={"Allow": allow(methods)})(scope, receive, send)
