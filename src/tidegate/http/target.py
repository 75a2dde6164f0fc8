"""A request's target: refused where it holds what PostgreSQL can't, before any route reads it.

Starlette reads bytes that are not UTF-8 as U+FFFD, so that a filter or a name would silently be
another one. Native paths don't come here: their queries pass on as they are.
"""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Receive, Scope, Send

from tidegate.errors import InvalidRequest
from tidegate.http.problems import problem_response

_ALLOWED = "text in UTF-8 without NUL"


class SoundTarget:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                check_target(scope)
            except InvalidRequest as error:
                await problem_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_target(scope: Scope) -> None:
    """Raises InvalidRequest that names the parameter, or the path."""
    query: bytes = scope["query_string"]
    if b"%" in query:
        for pair in query.split(b"&"):
            name, _, value = pair.partition(b"=")
            shown = ascii(unquote_to_bytes(name)[:64].decode("utf-8", "replace"))[1:-1]
            for part in (name, value):
                if "\0" in _text_of(part, shown):
                    raise InvalidRequest(
                        shown, f"{shown} has a NUL character in it", allowed=_ALLOWED
                    )
    raw: bytes = scope.get("raw_path") or b""
    if b"%" in raw:  # NUL in it is for its route to refuse, which knows what it names
        _text_of(raw, "path")


def _text_of(raw: bytes, field: str) -> str:
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise InvalidRequest(field, f"{field} is not text in UTF-8", allowed=_ALLOWED) from None
