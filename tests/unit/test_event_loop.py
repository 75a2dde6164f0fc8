"""The event loop of a process beside its threads."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tidegate.supervisor.roles import run_loop


@pytest.fixture(autouse=True)
def _usual_switches() -> Iterator[None]:
    usual_s = sys.getswitchinterval()
    yield
    sys.setswitchinterval(usual_s)


def test_a_thread_that_reads_a_large_body_yields_to_the_event_loop_within_a_millisecond() -> None:
    found: list[float] = []

    async def main() -> None:
        found.append(sys.getswitchinterval())

    run_loop(main())
    assert found[0] < 0.001
