"""Running the emulator inside this event loop.

Invariant: after `run_emulator` ends, its port is closed and none of its handlers runs.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from tidegate.providers.emulator.client import EmulatorControl
from tidegate.providers.emulator.server import EmulatorServer
from tidegate.providers.emulator.settings import EmulatorSettings
from tidegate.providers.emulator.state import State

STOP_GRACE_S = 0.1


@dataclass(frozen=True, slots=True)
class Emulator:
    """A running emulator. `url` is what Google's SDK wants; OpenAI's wants `/v1` behind it."""

    url: str
    port: int
    control: EmulatorControl


@asynccontextmanager
async def run_emulator(
    settings: EmulatorSettings | None = None, *, clock_ns: Callable[[], int] = time.time_ns
) -> AsyncIterator[Emulator]:
    """Serve until the block ends. `clock_ns` is the clock that rate limits go by.

    Raises OSError when the port is taken. At the end, calls in flight are cut off.
    """
    settings = settings or EmulatorSettings()
    state = State(settings, clock_ns)
    runner = web.ServerRunner(EmulatorServer(state).web_server(), shutdown_timeout=STOP_GRACE_S)
    await runner.setup()
    site = web.TCPSite(runner, settings.host, settings.port, backlog=4096)
    await site.start()
    port: int = runner.addresses[0][1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    control = EmulatorControl(f"http://{host}:{port}")
    try:
        yield Emulator(control.url, port, control)
    finally:
        await control.close()
        await runner.cleanup()
        state.presence.close()
