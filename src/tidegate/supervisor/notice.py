"""What a process tells whoever started it: that it is up, that it lives, that it is about to end.

Two listeners are known: our own supervisor, by a pipe of its own for each child, and systemd
(`Type=notify`), by the datagram socket that it names. Both are optional, and neither is waited for.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

READY_PIPE = "TIDEGATE_READY_FD"
_SYSTEMD = "NOTIFY_SOCKET"
_WATCHDOG, _WATCHED = "WATCHDOG_USEC", "WATCHDOG_PID"


def tell_ready() -> None:
    """Say, once, that this process takes requests or jobs."""
    pipe = os.environ.pop(READY_PIPE, "")
    if pipe:
        _write_and_close(int(pipe))
    _tell_systemd("READY=1")


def tell_stopping() -> None:
    """Say that the end of this process has begun, so that it is not taken for a crash."""
    _tell_systemd("STOPPING=1")


@contextmanager
def living() -> Iterator[None]:
    """Inside, systemd's watchdog hears from the event loop as long as it turns; where the unit has
    one (`WatchdogSec`), and means this process."""
    every_s = _watchdog_s() / 2
    if not every_s:
        yield
        return
    telling = asyncio.create_task(_tell_life(every_s), name="watchdog")
    try:
        yield
    finally:
        telling.cancel()


async def _tell_life(every_s: float) -> None:
    while True:
        _tell_systemd("WATCHDOG=1")
        await asyncio.sleep(every_s)


def _watchdog_s() -> float:
    """How long we may be silent; 0 where nobody listens, or to our parent alone."""
    span_us = os.environ.get(_WATCHDOG, "")
    if not span_us.isdecimal() or os.environ.get(_WATCHED) != str(os.getpid()):
        return 0.0
    return int(span_us) / 1_000_000


def _write_and_close(pipe: int) -> None:
    try:
        os.write(pipe, b"1")
    except BrokenPipeError:
        return  # the supervisor is gone, which the lifeline tells in its own way
    finally:
        os.close(pipe)


def _tell_systemd(state: str) -> None:
    address = os.environ.get(_SYSTEMD, "")
    if not address.startswith(("/", "@")) or not hasattr(socket, "AF_UNIX"):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaking:
        speaking.setblocking(False)
        try:
            speaking.sendto(state.encode(), address)
        except OSError:
            return  # nobody listens (any more): a process does not fail for want of a listener
