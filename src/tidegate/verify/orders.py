"""How a process under test is told what to do, and when to end: by its stdin and by SIGTERM.

Invariant: whoever gave the orders need not live on: the end of stdin ends the process too.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from typing import Any

_STDIN = 0
_AT_ONCE = 65_536


def read_orders() -> dict[str, Any]:
    """The first line of stdin, and nothing after it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(_STDIN, 1)
        if not byte:
            raise EOFError("no orders came")
        line += byte
    found: dict[str, Any] = json.loads(line)
    return found


def on_end(stop: Callable[[], object]) -> None:
    """Call `stop` on SIGTERM, and when stdin ends."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop)

    def look() -> None:
        if not os.read(_STDIN, _AT_ONCE):
            loop.remove_reader(_STDIN)
            stop()

    loop.add_reader(_STDIN, look)
