"""A test that does not end ends its process, after telling what its tasks and threads wait for.

`timeout` in pyproject.toml interrupts a test once. Where what it leaves behind hangs too, nothing
would ever end the run: pytest's own watchdog stands down as soon as a test has failed.

One thread looks at the running test every second: to start a thread for each test takes 0.2 ms.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import io
import os
import threading
import time
from collections.abc import Iterator

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

_LATER_S = 60.0
_LOOKS_S = 1.0

_never = threading.Event()
# The test that runs, and when it should have ended; none between tests, and where a person debugs.
_running: tuple[pytest.Item, float] | None = None
_watching: threading.Thread | None = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Around a test with all that is set up for it and taken down after it."""
    global _running, _watching
    usual = item.config.getoption("timeout")
    usual_s = float(item.config.getini("timeout") if usual is None else usual)
    own_s = next((mark.args[0] for mark in item.iter_markers("timeout")), usual_s)
    if usual_s:  # none where a person debugs
        _running = item, time.monotonic() + max(usual_s, own_s) + _LATER_S
        if _watching is None:
            _watching = threading.Thread(target=_watch, name="hung", daemon=True)
            _watching.start()
    try:
        return (yield)
    finally:
        _running = None


def _watch() -> None:
    while not _never.wait(_LOOKS_S):
        running = _running
        if running is not None and time.monotonic() > running[1]:
            _end(running[0])


def _end(item: pytest.Item) -> None:
    told, to = io.StringIO(), item.config.stash[fault_handler_stderr_fd_key]
    told.write(f"\n{item.nodeid} does not end. Its tasks:\n")
    for task in gc.get_objects():
        if isinstance(task, asyncio.Task) and not task.done():
            task.print_stack(file=told)
    os.write(to, told.getvalue().encode())
    faulthandler.dump_traceback(to)
    os._exit(1)
