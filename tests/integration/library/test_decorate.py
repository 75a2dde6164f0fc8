"""Coroutine functions that run with a permit in hand."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.library.makers import LIMIT, MakeLimiter, held
from tests.waiting import wait_until
from tidegate.errors import DeadlineExceeded, LeaseLost
from tidegate.limiter import limited


async def test_each_call_runs_with_a_permit_of_its_own(make_limiter: MakeLimiter) -> None:
    limiter = await make_limiter(2)
    peak = 0

    @limited(limiter, LIMIT, deadline_ms=20_000)
    async def double(number: int, *, more: int = 0) -> int:
        """Says what it does."""
        nonlocal peak
        await asyncio.sleep(0)
        peak = max(peak, held(limiter))
        return 2 * number + more

    answers = await asyncio.gather(*(double(number, more=1) for number in range(20)))
    assert answers == [2 * number + 1 for number in range(20)]
    assert (peak, double.__name__, double.__doc__) == (2, "double", "Says what it does.")
    assert held(limiter) == 0


async def test_errors_of_the_function_and_of_the_limiter_leave_the_call(
    make_limiter: MakeLimiter,
) -> None:
    limiter = await make_limiter()

    @limited(limiter, LIMIT)
    async def fail() -> None:
        raise ZeroDivisionError

    @limited(limiter, LIMIT, deadline_ms=20)
    async def come_late() -> None:
        raise AssertionError("let in")

    with pytest.raises(ZeroDivisionError):
        await fail()
    async with limiter.acquire(LIMIT):
        with pytest.raises(DeadlineExceeded):
            await come_late()


async def test_a_function_whose_permit_is_lost_is_cancelled(make_limiter: MakeLimiter) -> None:
    limiter = await make_limiter()
    ended = []

    @limited(limiter, LIMIT)
    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    task = asyncio.create_task(wait())
    await wait_until(lambda: held(limiter) == 1)
    await limiter.aclose()
    with pytest.raises(LeaseLost):
        await task
    assert ended == [True]


async def test_only_coroutine_functions_are_decorated(make_limiter: MakeLimiter) -> None:
    limiter = await make_limiter()

    def plain() -> None: ...

    async def generator() -> object:
        yield

    for function in (plain, generator):
        with pytest.raises(TypeError, match="no coroutine function"):
            limited(limiter, LIMIT)(function)  # type: ignore[arg-type]
