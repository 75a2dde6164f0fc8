"""API process: HTTP on a listening socket.

A worker does not import this module unless it has a port of its own: uvicorn, and what it imports,
take a twentieth of a worker's start.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn

from tidegate.errors import ConfigError
from tidegate.http.uvicorn_protocol import MOST_A_ROUND, MOST_OF_SHARED, Acceptor
from tidegate.settings import Config
from tidegate.store.notifications import next_beat_s
from tidegate.supervisor.roles import (
    ignore_state_signal,
    on_signals,
    on_state_signal,
    run_loop,
    standing,
)
from tidegate.supervisor.services import is_child
from tidegate.supervisor.supervisor import listen, living, report_ready, url_of
from tidegate.telemetry import logging as telemetry
from tidegate.telemetry.logging import Log

if TYPE_CHECKING:
    from tidegate.http.services import Services

# Longer than clients and load balancers keep an idle connection (60 s is common): if this side
# closed first, a request on its way would meet a closed connection.
_KEEP_ALIVE_S = 75
_TICK_S = 1.0  # the date in answers is in whole seconds
# How long the first request waits for answers of Valkey and PostgreSQL, which may be unavailable.
_WARM_WITHIN_MS = 2_000
# This long before the end of the grace period, waiting calls are rejected: they could not finish.
_LAST_S = 1.0


def serve(config: Config, fd: int | None = None) -> None:
    """Serve HTTP until a signal, on the listening socket `fd` or on one of its own.

    Raises ConfigError if HOST and PORT are not available, or `fd` is not a socket.
    """
    telemetry.configure_logging(
        config.log_format, config.log_level, process="api", has_page=is_child()
    )
    ignore_state_signal()
    # Before the servers are started: a port in use should be reported immediately.
    listener = _inherited(fd) if fd is not None else listen(config)
    with listener, standing(config) as whole:
        if not is_child():
            telemetry.get_logger().info(Log.STARTED, url=url_of(listener))
        run_loop(_serve(whole, listener, shares=fd is not None))


def _inherited(fd: int) -> socket.socket:
    try:
        return socket.socket(fileno=fd)
    except OSError as refused:
        allowed = f"must be a listening socket that was inherited: {refused.strerror}"
        raise ConfigError("--fd", f"{fd}", allowed) from None


class QuietServer(uvicorn.Server):
    """A server without uvicorn's signal handling, which would raise the signals again at its end
    and die of them. `end` stops it by an event, where uvicorn polls ten times a second. It accepts
    several connections in an iteration of the event loop, which uvloop does not. `shares`: other
    processes accept on the same socket."""

    def __init__(self, config: uvicorn.Config, *, shares: bool = False) -> None:
        super().__init__(config)
        self._shares = shares
        self._ended = asyncio.Event()

    def end(self) -> None:
        """Accept no more, finish open requests, and return from `serve`."""
        self.should_exit = True
        self._ended.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        if sockets is None or not type(loop).__module__.startswith("uvloop"):
            await super().startup(sockets)
            return
        most = MOST_OF_SHARED if self._shares else MOST_A_ROUND
        await super().startup([])
        made: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        protocol = partial(
            made,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )

        self.servers: list[Any] = [Acceptor(loop, one, protocol, most) for one in sockets]

    async def main_loop(self) -> None:
        # Tick 0 renews the date of answers. Without connections the next one to open renews it.
        while not await self.on_tick(0 if self.server_state.connections else 1):
            with suppress(TimeoutError):
                async with asyncio.timeout(next_beat_s(_TICK_S)):
                    await self._ended.wait()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class NotifyingServer(QuietServer):
    """Reports that it is up, to the supervisor or systemd, and runs `further`: the rest of the
    start, which no call to a model waits for."""

    def __init__(
        self,
        config: uvicorn.Config,
        further: Callable[[], Coroutine[Any, Any, None]],
        *,
        shares: bool = False,
    ) -> None:
        super().__init__(config, shares=shares)
        self._further = further
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        report_ready()
        task = asyncio.create_task(self._further())
        self._tasks.add(task)  # the event loop has only a weak reference
        task.add_done_callback(self._tasks.discard)


def uvicorn_config(app: Callable[..., Any], **options: Any) -> uvicorn.Config:
    # uvicorn's messages on starting and stopping repeat ours.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return uvicorn.Config(
        app,
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # addresses that a proxy reports have no effect here
        **options,
    )


async def _serve(config: Config, listener: socket.socket, *, shares: bool) -> None:
    from tidegate.app import create_app
    from tidegate.http.uvicorn_protocol import bounded

    app = create_app(config, warm_within_ms=_WARM_WITHIN_MS)
    protocol = bounded(
        receive_timeout_ms=config.receive_timeout_ms,
        stalled_reader_ms=config.stalled_reader_ms,
    )
    settings = uvicorn_config(
        app,
        http=protocol,
        lifespan="off",  # below: uvicorn would log a traceback for a setting that is refused
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(config.shutdown_grace_ms / 1000)),
    )
    server = NotifyingServer(settings, app.complete, shares=shares)

    def opened() -> Services | None:
        return getattr(app.state, "services", None)

    def leave() -> None:
        protocol.leaving = True
        for connection in server.server_state.connections:
            if isinstance(connection, protocol):
                connection.leave()
        if (services := opened()) is not None:
            services.leaving.set()

    def reject_waiting() -> None:
        if (services := opened()) is not None:
            services.reject_waiters()

    def stop() -> None:
        server.end()
        grace_s = config.shutdown_grace_ms / 1000
        asyncio.get_running_loop().call_later(max(grace_s - _LAST_S, grace_s / 2), reject_waiting)
        if (services := opened()) is not None:
            services.draining.set()

    on_signals(stop, leave=leave, leave_ms=config.leave_ms, hurry=reject_waiting)
    on_state_signal(opened)
    with living():
        async with app.router.lifespan_context(app):
            await server.serve(sockets=[listener])
