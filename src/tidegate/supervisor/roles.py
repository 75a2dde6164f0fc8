"""Roles of a process: a worker, and what it shares with an API (`api.py`).

A process stops in order on SIGTERM, SIGINT or SIGHUP. On SIGTERM an API leaves first: it serves for
LEAVE_MS while its readiness probe fails; a supervised one that was replaced on its socket does so
on SIGUSR1. A second signal ends the leaving, a third one the process. A child stops in order if its
supervisor has ended. SIGQUIT logs the process state.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tidegate.metrics.instruments import share_by_name
from tidegate.operator_key import operator_key
from tidegate.settings import Config
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


def work(config: Config) -> None:
    """Run jobs until a signal."""
    telemetry.configure_logging(
        config.log_format, config.log_level, process="worker", has_page=is_child()
    )
    ignore_state_signal()
    with standing(config) as whole:
        run_loop(_work(whole))


def ignore_state_signal() -> None:
    """Ignore STATE_SIGNAL until there is a state to log: it would end a starting process."""
    if sys.platform != "win32":
        signal.signal(STATE_SIGNAL, signal.SIG_IGN)


@contextmanager
def standing(config: Config) -> Iterator[Config]:
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


async def _work(config: Config) -> None:
    from tidegate.app import run_worker

    stop = asyncio.Event()
    opened: list[Services] = []

    def leave() -> None:
        stop.set()
        for services in opened:
            services.leaving.set()

    on_signals(leave)
    on_state_signal(lambda: opened[0] if opened else None)
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
    from tidegate.supervisor.api import QuietServer, uvicorn_config

    with listen(services.config, for_worker=True) as listener:
        app = watched_app(services)
        server = QuietServer(uvicorn_config(app, lifespan="off", timeout_graceful_shutdown=1))
        telemetry.get_logger().info(Log.WATCHED, url=url_of(listener))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.end()
            await asyncio.gather(serving, return_exceptions=True)


def on_state_signal(services: Callable[[], Services | None]) -> None:
    """Log the process state as one line on STATE_SIGNAL."""

    def log_state() -> None:
        opened = services()
        if opened is not None:
            telemetry.get_logger().info(Log.PROCESS_STATE, **opened.state.shown())

    if sys.platform != "win32":
        asyncio.get_running_loop().add_signal_handler(STATE_SIGNAL, log_state)


def on_signals(
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


# How long a thread that reads a large body keeps the interpreter from the event loop's thread,
# which needs it several times for each call. Python's 5 ms delay a small call by tens of ms.
_SWITCH_S = 0.000_5


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a process on an event loop, which gets the interpreter soon from other threads."""
    sys.setswitchinterval(_SWITCH_S)
    if sys.platform == "win32":
        asyncio.run(_unlisted(main))
    else:
        import uvloop

        _raise_open_files()
        uvloop.run(_unlisted(main))


async def _unlisted(main: Coroutine[Any, Any, None]) -> None:
    """Run it on a loop that lists no asynchronous generators: a prompt's call begins seven. The
    list is for the end of a loop; one that is abandoned before is still closed by its finalizer."""
    sys.set_asyncgen_hooks(firstiter=None)
    await main


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
