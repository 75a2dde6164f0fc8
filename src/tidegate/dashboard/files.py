"""The files of the page: one HTML document, styles and ES modules as they are in the package.

Invariant: no answer here lets a script run that is not one of these files. There is no inline
script, no eval and no text that is taken for HTML, and the browser is told to enforce that. None of
them holds a secret or a figure: they are for everybody, what they show is not.
"""

from __future__ import annotations

from pathlib import Path

from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

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
    # Asked for anew each time, answered with 304: after an upgrade no module meets an older one.
    "Cache-Control": "no-cache",
}
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


def document() -> FileResponse:
    """The one HTML document; it finds its view from the part of the address after `#`."""
    return FileResponse(FOLDER / "index.html", headers=HEADERS, media_type="text/html")


class Files:
    """ASGI application: the styles, modules and pictures, with the same headers."""

    def __init__(self) -> None:
        self._files = StaticFiles(directory=FOLDER)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_RAW_HEADERS]
            await send(message)

        await self._files(scope, receive, headed)
