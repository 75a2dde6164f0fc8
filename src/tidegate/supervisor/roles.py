"""Roles of a process: API or worker.

A process stops in order on SIGTERM, SIGINT or SIGHUP. On SIGTERM an API leaves first: it serves for
LEAVE_MS while its readiness probe fails; a supervised one that was replaced on its socket does so
on SIGUSR1. A second signal ends the leaving, a third one the process. A child stops in order if its
supervisor has ended. SIGQUIT logs the process state.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn

from tidegate.errors import ConfigError
from tidegate.http.uvicorn_protocol import MOST_A_ROUND, MOST_OF_SHARED, Acceptor
from tidegate.metrics.instruments import share_by_name
from tidegate.operator_key import operator_key
from tidegate.settings import Config
from tidegate.store.notifications import next_beat_s
from tidegate.supervisor.services import (
    check_database_url,
    is_child,
    make_folders,
    migrate,
    prepared,
)
from tidegate.supervisor.supervisor import (
    LEAVE_SIGNAL,
    LIFELINE,
    STATE_SIGNAL,
    listen,
    living,
    open_files_of,
    report_ready,
    report_stopping,
    url_of,
)
from tidegate.telemetry import logging as telemetry
from tidegate.telemetry.logging import Log

if TYPE_CHECKING:
    from tidegate.http.services import Services

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, LEAVE_SIGNAL)
_MARGIN_S = 5.0
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
    _ignore_state_signal()
    # Before the servers are started: a port in use should be reported immediately.
    listener = _inherited(fd) if fd is not None else listen(config)
    with listener, _standing(config) as whole:
        if not is_child():
            telemetry.get_logger().info(Log.STARTED, url=url_of(listener))
        _run(_serve(whole, listener, shares=fd is not None))


def _inherited(fd: int) -> socket.socket:
    try:
        return socket.socket(fileno=fd)
    except OSError as refused:
        allowed = f"must be a listening socket that was inherited: {refused.strerror}"
        raise ConfigError("--fd", f"{fd}", allowed) from None


def work(config: Config) -> None:
    """Run jobs until a signal."""
    telemetry.configure_logging(
        config.log_format, config.log_level, process="worker", has_page=is_child()
    )
    _ignore_state_signal()
    with _standing(config) as whole:
        _run(_work(whole))


def _ignore_state_signal() -> None:
    """Ignore STATE_SIGNAL until there is a state to log: it would end a starting process."""
    if sys.platform != "win32":
        signal.signal(STATE_SIGNAL, signal.SIG_IGN)


@contextmanager
def _standing(config: Config) -> Iterator[Config]:
    """Yield a complete configuration on a migrated database, prepared by the supervisor or here."""
    share_by_name()
    make_folders(config)  # first, so that a failure is one line
    operator_key(config)
    if is_child():
        follow_lifeline(int(os.environ[LIFELINE]), config.shutdown_grace_ms / 1000)
        yield config
        return
    with prepared(config) as ground:
        if ground.emulated:
            reason = "no GEMINI_API_KEY: answers of gemini come from the built-in emulator"
            telemetry.get_logger().warning(Log.DEMO_MODE, reason=reason)
        if config.migrate_at_start or ground.embedded:
            migrate(ground.config, lambda why: sys.stderr.write(f"tidegate: {why}\n"))
        else:
            check_database_url(ground.config)
        yield ground.config


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
    """Reports that it is up, to the supervisor or systemd."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        report_ready()


def _uvicorn_config(app: Callable[..., Any], **options: Any) -> uvicorn.Config:
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
    settings = _uvicorn_config(
        app,
        http=protocol,
        lifespan="on",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(config.shutdown_grace_ms / 1000)),
    )
    server = NotifyingServer(settings, shares=shares)

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

    _on_signals(stop, leave=leave, leave_ms=config.leave_ms, hurry=reject_waiting)
    _on_state_signal(opened)
    with living():
        await server.serve(sockets=[listener])


async def _work(config: Config) -> None:
    from tidegate.app import run_worker

    stop = asyncio.Event()
    opened: list[Services] = []

    def leave() -> None:
        stop.set()
        for services in opened:
            services.leaving.set()

    _on_signals(leave)
    _on_state_signal(lambda: opened[0] if opened else None)
    alone = config.worker_port is not None and not is_child()

    @asynccontextmanager
    async def beside(services: Services) -> AsyncIterator[None]:
        opened.append(services)
        async with AsyncExitStack() as stack:
            if alone:
                await stack.enter_async_context(_watched(services))
            yield

    with living():
        await run_worker(config, stop, on_ready=report_ready, alongside=beside)


@asynccontextmanager
async def _watched(services: Services) -> AsyncIterator[None]:
    """Run a worker's own small server for probes and scrapes during the block."""
    from tidegate.http.server import watched_app

    with listen(services.config, for_worker=True) as listener:
        app = watched_app(services)
        server = QuietServer(_uvicorn_config(app, lifespan="off", timeout_graceful_shutdown=1))
        telemetry.get_logger().info(Log.WATCHED, url=url_of(listener))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.end()
            await asyncio.gather(serving, return_exceptions=True)


def _on_state_signal(services: Callable[[], Services | None]) -> None:
    """Log the process state as one line on STATE_SIGNAL."""

    def log_state() -> None:
        opened = services()
        if opened is not None:
            telemetry.get_logger().info(Log.PROCESS_STATE, **opened.state.shown())

    if sys.platform != "win32":
        asyncio.get_running_loop().add_signal_handler(STATE_SIGNAL, log_state)


def _on_signals(
    stop: Callable[[], None],
    *,
    leave: Callable[[], None] = lambda: None,
    leave_ms: int = 0,
    hurry: Callable[[], None] = lambda: None,
) -> None:
    """Register the signal handlers. `hurry` is called before `stop` if the process does not leave
    first."""
    loop = asyncio.get_running_loop()
    leaving: list[asyncio.TimerHandle] = []

    def stop_now() -> None:
        for timer in leaving:
            timer.cancel()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)  # the next one ends the process
        stop()

    def begin(softly: bool) -> None:
        if leaving:
            hurry()
            stop_now()
            return
        telemetry.get_logger().info(Log.STOPPING)
        report_stopping()
        if not softly:
            hurry()
            stop_now()
            return
        leave()
        leaving.append(loop.call_later(leave_ms / 1000, stop))  # no signal: the next is the second

    soft = LEAVE_SIGNAL if is_child() else signal.SIGTERM
    for number in _SIGNALS:
        loop.add_signal_handler(number, begin, number == soft)


def _run(main: Coroutine[Any, Any, None]) -> None:
    if sys.platform == "win32":
        asyncio.run(main)
    else:
        import uvloop

        _raise_open_files()
        uvloop.run(main)


def _raise_open_files() -> None:
    """Allow as many open files and connections as the system does: many shells start a process with
    1,024, for programs that use `select`."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # the system's own bound may be lower; `doctor` reports it
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files_of(soft, hard), hard))


def follow_lifeline(descriptor: int, grace_s: float) -> None:
    """Stop in order when the other end of the pipe closes: the supervisor never writes to it."""

    def follow() -> None:
        os.read(descriptor, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s + _MARGIN_S)
        os._exit(1)

    threading.Thread(target=follow, name="lifeline", daemon=True).start()
