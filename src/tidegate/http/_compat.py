"""Private names of uvicorn that the HTTP protocol uses.

uvicorn >= 0.35, < 0.55. Guarded by `tests/integration/http_input/test_uvicorn_internals.py`.
"""

from __future__ import annotations

import asyncio

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
    """uvicorn's protocol, with public names for what a subclass changes.

    Its timer of an idle connection and its callback at a task's end are others, as each request
    pays for them: one timer is kept for as long as a connection lasts, and looks at the clock. A
    task ends by `ended`.
    """

    _idle_since_s: float | None = None

    def answering(self, cycle: RequestResponseCycle, app: ASGI3Application) -> ASGI3Application:
        """The application that answers the request of `cycle`; `app` unless overridden."""
        return app

    def ended(self) -> None:
        """The present task has made its answer, or has failed."""
        task = asyncio.current_task()
        if task is not None:
            self.tasks.discard(task)

    def end_keep_alive_timer(self) -> None:
        """Stop the timer that closes an idle connection."""
        self._idle_since_s = None
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since_s = None

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
            return
        self._idle_since_s = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._look_later(self.timeout_keep_alive)

    def _look_later(self, after_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(after_s, self._look_whether_idle)

    def _look_whether_idle(self) -> None:
        self.timeout_keep_alive_task = None
        if self._idle_since_s is None:
            return
        left_s = self._idle_since_s + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._look_later(left_s)
        else:
            self.timeout_keep_alive_handler()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        task = self.loop.create_task(cycle.run_asgi(self.answering(cycle, app)))
        self.tasks.add(task)

    def _unsupported_upgrade_warning(self) -> None:
        """Says nothing: a request that offers another protocol is answered in this one, as RFC
        9110, section 7.8 has it, and anybody may send any number of them."""
