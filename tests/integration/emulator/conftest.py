"""The emulator on a clock that the tests move."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.integration.emulator.clock import ManualClock
from tidegate.emulator.server import Emulator, run_emulator


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def emulator(clock: ManualClock) -> AsyncIterator[Emulator]:
    async with run_emulator(clock_ns=clock) as running:
        yield running
