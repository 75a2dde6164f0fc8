"""The garbage collector rests while the tests are imported, and then leaves alone what that made.

A third of the time that collecting all tests takes would else go into looking through them, in each
of the processes beside one another; and so would a part of every full collection in a test.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
