"""The event loop of a process beside its threads."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator

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


def test_an_abandoned_generator_is_closed_though_the_loop_keeps_no_list_of_them() -> None:
    """The list is a set of weak references in Python, which costs a prompt's call a twentieth."""
    found: list[object] = []

    async def main() -> None:
        found.append(sys.get_asyncgen_hooks().firstiter)
        is_closed = asyncio.Event()

        async def events() -> AsyncIterator[int]:
            try:
                yield 1
            finally:
                await asyncio.sleep(0)
                is_closed.set()

        async for _ in events():
            break
        async with asyncio.timeout(30):
            await is_closed.wait()

    run_loop(main())
    assert found == [None]
