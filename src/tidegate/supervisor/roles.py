"""The two kinds of process: one that serves HTTP and one that works on jobs.

Both stop in order on SIGTERM, SIGINT or SIGHUP, and a second signal ends them at once. A child of
a supervisor also stops in order when its supervisor is gone, however that went.
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
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

from tidegate import telemetry
from tidegate.config import Config
from tidegate.supervisor.ground import LIFELINE, is_child, migrate, prepared
from tidegate.supervisor.listening import listen, url_of
from tidegate.telemetry import Log

if TYPE_CHECKING:
    from tidegate.store.erase import EraseReport, Whose
    from tidegate.store.prune import PruneReport

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MARGIN_S = 5.0
# Longer than clients and balancers keep an idle connection (60 s is common): whoever closes first
# must not be us, or a request that is on its way meets a closed door.
_KEEP_ALIVE_S = 75


def serve(config: Config, fd: int | None = None) -> None:
    """Serve HTTP until a signal; on the listening socket `fd`, or on one of our own.

    Raises ConfigError where HOST and PORT cannot be had.
    """
    telemetry.configure_logging(config.log_format, config.log_level, process="api")
    # Before the servers are started: a taken port should be told at once.
    listener = socket.socket(fileno=fd) if fd is not None else listen(config)
    with listener, _standing(config) as whole:
        if not is_child():
            telemetry.get_logger().info(Log.STARTED, url=url_of(listener))
        _run(_serve(whole, listener))


def work(config: Config) -> None:
    """Work on jobs until a signal."""
    telemetry.configure_logging(config.log_format, config.log_level, process="worker")
    with _standing(config) as whole:
        _run(_work(whole))


def prune(config: Config, days: int | None) -> PruneReport:
    """Delete what ended more than `days` (or RETENTION_DAYS) ago."""
    from tidegate.store.blobs import Blobs
    from tidegate.store.connection import Connections
    from tidegate.store.prune import prune as run

    async def work(url: str) -> PruneReport:
        connections = Connections(url)
        connections.start()
        try:
            blobs = Blobs.from_url(config.blob_url, config.data_dir)
            return await run(connections, blobs, days or config.retention_days)
        finally:
            await connections.aclose()

    with prepared(config, only={"postgres"}) as ground:
        assert ground.config.database_url is not None
        return asyncio.run(work(ground.config.database_url.get_secret_value()))


def erase(config: Config, whose: Whose, *, dry_run: bool) -> EraseReport:
    """Erase all of a subject or tenant, or only count it."""
    from tidegate.store.blobs import Blobs
    from tidegate.store.connection import Connections
    from tidegate.store.erase import Eraser

    async def work(url: str) -> EraseReport:
        connections = Connections(url)
        connections.start()
        try:
            blobs = Blobs.from_url(config.blob_url, config.data_dir)
            eraser = Eraser(connections, blobs, config.data_dir / "spill", whose)
            return await eraser.run(dry_run=dry_run)
        finally:
            await connections.aclose()

    with prepared(config, only={"postgres"}) as ground:
        assert ground.config.database_url is not None
        return asyncio.run(work(ground.config.database_url.get_secret_value()))


@contextmanager
def _standing(config: Config) -> Iterator[Config]:
    """A whole configuration on a migrated database: of the supervisor's making, or of our own."""
    if is_child():
        follow_lifeline(int(os.environ[LIFELINE]), config.shutdown_grace_ms / 1000)
        yield config
        return
    with prepared(config) as ground:
        if ground.emulated:
            telemetry.get_logger().warning(
                Log.DEMO_MODE, reason="no GEMINI_API_KEY: answers come from the built-in emulator"
            )
        migrate(ground.config, lambda why: sys.stderr.write(f"tidegate: {why}\n"))
        yield ground.config


class Server(uvicorn.Server):
    """Leaves the signals to us: uvicorn would raise them again at its end, and die of them."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(config: Config, listener: socket.socket) -> None:
    from tidegate.app import create_app
    from tidegate.http.protocol import bounded

    app = create_app(config)
    settings = uvicorn.Config(
        app,
        http=bounded(
            receive_timeout_ms=config.receive_timeout_ms,
            stalled_reader_ms=config.stalled_reader_ms,
        ),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # whom a proxy speaks for decides nothing here
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(config.shutdown_grace_ms / 1000)),
    )
    # Its notes on starting and stopping say nothing that ours do not.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server = Server(settings)

    def stop() -> None:
        server.should_exit = True
        if (services := getattr(app.state, "services", None)) is not None:
            services.draining.set()

    _on_stop_signal(stop)
    await server.serve(sockets=[listener])


async def _work(config: Config) -> None:
    from tidegate.app import run_worker

    stop = asyncio.Event()
    _on_stop_signal(stop.set)
    await run_worker(config, stop)


def _on_stop_signal(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()

    def first() -> None:
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)  # the next one ends the process
        telemetry.get_logger().info(Log.STOPPING)
        stop()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, first)


def _run(main: Coroutine[Any, Any, None]) -> None:
    if sys.platform == "win32":
        asyncio.run(main)
    else:
        import uvloop

        uvloop.run(main)


def follow_lifeline(descriptor: int, grace_s: float) -> None:
    """Stop in order when the other end of the pipe closes: the supervisor never writes to it."""

    def follow() -> None:
        os.read(descriptor, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s + _MARGIN_S)
        os._exit(1)

    threading.Thread(target=follow, name="lifeline", daemon=True).start()
