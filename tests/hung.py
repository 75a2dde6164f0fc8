"""A test that does not end ends its process, after telling what its tasks and threads wait for.

`timeout` in pyproject.toml interrupts a test once. Where what it leaves behind hangs too, nothing
would ever end the run: pytest's own watchdog stands down as soon as a test has failed.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import io
import os
import threading
from collections.abc import Iterator

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

_LATER_S = 60.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Around a test with all that is set up for it and taken down after it."""
    usual = item.config.getoption("timeout")
    usual_s = float(item.config.getini("timeout") if usual is None else usual)
    own_s = next((mark.args[0] for mark in item.iter_markers("timeout")), usual_s)
    timer = threading.Timer(max(usual_s, own_s) + _LATER_S, _end, (item,))
    timer.daemon = True
    if usual_s:  # none where a person debugs
        timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()


def _end(item: pytest.Item) -> None:
    told, to = io.StringIO(), item.config.stash[fault_handler_stderr_fd_key]
    told.write(f"\n{item.nodeid} does not end. Its tasks:\n")
    for task in gc.get_objects():
        if isinstance(task, asyncio.Task) and not task.done():
            task.print_stack(file=told)
    os.write(to, told.getvalue().encode())
    faulthandler.dump_traceback(to)
    os._exit(1)
