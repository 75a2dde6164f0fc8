"""The garbage collector rests while the tests are imported, and then leaves alone what that made.

A third of the time that collecting all tests takes would else go into looking through them, in each
of the processes beside one another; and so would a part of every full collection in a test. While
tests run it looks seldom: at Python's own thresholds it took a twentieth of the unit tests' time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

_NEW_OBJECTS = 100_000
_YOUNGER = gc.get_threshold()[1:]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()
    gc.set_threshold(_NEW_OBJECTS, *_YOUNGER)
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup() -> None:
    """A gateway of an earlier test has set what is right where it serves: there it looks after
    20,000 objects, and at all of them now and then. It took a twelfth of such tests' time."""
    gc.set_threshold(_NEW_OBJECTS, *_YOUNGER)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    gc.collect()  # so that what was never awaited or closed is reported
    gc.freeze()
