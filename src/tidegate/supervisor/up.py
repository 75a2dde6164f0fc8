"""`tidegate up`: everything on one machine, from nothing to a start-up page and back to nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from tempfile import TemporaryDirectory
from types import FrameType

from tidegate import telemetry
from tidegate.config import Config, load, operator_key
from tidegate.errors import ConfigError
from tidegate.metrics.instruments import forget
from tidegate.metrics.names import SHARED
from tidegate.policy import deployed, deployed_upstreams, emulates
from tidegate.supervisor.bounds import bounds_in_force
from tidegate.supervisor.family import RENEW_SIGNAL, Child, Family
from tidegate.supervisor.ground import Ground, environment_of, migrate, prepared
from tidegate.supervisor.listening import listen, url_of
from tidegate.supervisor.notice import tell_ready, tell_stopping
from tidegate.supervisor.page import Page

_PROBE = b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_PROBE_S = 2.0
_POLL_S = 0.05
_PATIENCE_S = 5.0


def up(config: Config, apis: int, workers: int) -> int:
    """Start everything, keep it running until a signal, stop it. Returns the exit code.

    Raises ConfigError, `embedded.ServerFailed` and StoreUnavailable; nothing is left running then.
    """
    telemetry.configure_logging(config.log_format, config.log_level, process="supervisor")
    # Until the children run, any of the signals interrupts as Ctrl-C does, with all clean-up.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    signal.signal(RENEW_SIGNAL, signal.SIG_IGN)  # there is nothing to renew yet
    page = Page(config, apis, workers)
    with listen(config) as listener:
        operator_key(config)  # made before children start, so that one line tells what is wrong
        with (
            prepared(config, busy=page.busy) as ground,
            TemporaryDirectory(prefix="tidegate-counts-") as counts,
        ):
            migrate(ground.config, page.note)
            family = Family(
                _children(listener, apis, workers),
                environment={**os.environ, **environment_of(ground), SHARED: counts},
                pass_fds=[listener.fileno(), *([ground.lease.descriptor] if ground.lease else [])],
                grace_s=config.shutdown_grace_ms / 1000,
                leave_s=config.leave_ms / 1000,
                on_stopping=_both(tell_stopping, page.stopping),
                on_ended=lambda name: forget(name, counts),
                reread=lambda: {**_reread(ground), SHARED: counts},
            )
            asyncio.run(_run(family, listener, page, ground))
        if family.failure is not None:
            sys.stderr.write(f"tidegate: {family.failure}; its log above says why\n")
            return 1
        page.stopped()
        return 0


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        first()
        second()

    return run


def _reread(ground: Ground) -> dict[str, str]:
    """The environment of new children: the settings as they are written down now.

    Raises ConfigError where one is wrong, or is of those that this process itself stands on.
    """
    wanted = load()
    deployed(wanted)
    deployed_upstreams(wanted)
    of_ours = {name: getattr(ground.config, name) for name in ("host", "port", "data_dir")}
    changed = [name for name, value in of_ours.items() if getattr(wanted, name) != value]
    if wanted.embedded != ground.embedded:
        changed.append("database_url")
    if emulates(wanted) != ground.emulated:
        changed.append("gemini_api_key")
    if changed:
        why = "was changed, for which `tidegate up` must be stopped and started again"
        raise ConfigError(changed[0].upper(), "(another)", why)
    filled_in = [
        *(("database_url", "redis_url") if ground.embedded else ()),
        *(("gemini_base_url", "gemini_api_key") if ground.emulated else ()),
    ]
    kept = {name: getattr(ground.config, name) for name in filled_in}
    whole = replace(ground, config=wanted.model_copy(update=kept))
    return {**os.environ, **environment_of(whole)}


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _children(listener: socket.socket, apis: int, workers: int) -> list[Child]:
    program = (sys.executable, "-m", "tidegate")
    serve = (*program, "serve", "--fd", str(listener.fileno()))
    return [
        *(Child(f"api-{number}", serve) for number in range(1, apis + 1)),
        *(Child(f"worker-{number}", (*program, "worker")) for number in range(1, workers + 1)),
    ]


async def _run(family: Family, listener: socket.socket, page: Page, ground: Ground) -> None:
    announcing = asyncio.create_task(_announce(family, listener, page, ground))
    try:
        await family.run()
    finally:
        announcing.cancel()


async def _announce(family: Family, listener: socket.socket, page: Page, ground: Ground) -> None:
    """Show the page once the product is ready; until then say, after a while, why it is not."""
    patient_until = time.monotonic() + _PATIENCE_S
    told = ""
    while (reason := await _not_ready(listener)) is not None:
        if time.monotonic() > patient_until and reason != told:
            page.note(f"still waiting for the API: {reason}")
            told = reason
        await asyncio.sleep(_POLL_S)
    if family.stopping:
        return
    family.settled()
    tell_ready()
    policy, redis_url = deployed(ground.config), ground.config.redis_url
    assert redis_url is not None
    in_force = await bounds_in_force(redis_url.get_secret_value(), policy)
    if not family.stopping:
        page.ready(ground, url_of(listener), policy, in_force)


async def _not_ready(listener: socket.socket) -> str | None:
    """Why `/health/ready` does not say 200, or None when it does."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        async with asyncio.timeout(_PROBE_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                request = (
                    "GET /health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                )
                writer.write(request.encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
    except TimeoutError:
        return "it does not answer yet"
    except OSError as refused:
        return refused.strerror or str(refused)
    return None if b" 200 " in head.partition(b"\r\n")[0] else body.decode(errors="replace").strip()
