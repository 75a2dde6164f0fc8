"""The private names of uvicorn that the HTTP protocol uses.

uvicorn >= 0.35, < 0.55. Guarded by `tests/integration/http_input/test_uvicorn_internals.py`.
"""

from __future__ import annotations

from uvicorn._types import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGISendCallable,
    ASGISendEvent,
    Scope,
)
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

__all__ = [
    "STATUS_LINE",
    "ASGI3Application",
    "ASGIReceiveCallable",
    "ASGISendCallable",
    "ASGISendEvent",
    "RequestResponseCycle",
    "Scope",
    "UvicornProtocol",
]


class UvicornProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with public names for what a subclass changes."""

    def answering(self, cycle: RequestResponseCycle, app: ASGI3Application) -> ASGI3Application:
        """The application that answers the request of `cycle`; `app` unless overridden."""
        return app

    def end_keep_alive_timer(self) -> None:
        """Stop the timer that closes an idle connection."""
        self._unset_keepalive_if_required()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        super()._start_asgi_task(cycle, self.answering(cycle, app))

    def _unsupported_upgrade_warning(self) -> None:
        """Says nothing: a request that offers another protocol is answered in this one, as RFC
        9110, section 7.8 has it, and anybody may send any number of them."""
