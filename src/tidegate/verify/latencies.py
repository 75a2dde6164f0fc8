"""How soon a permit is had: of a free one, and of one that is freed elsewhere.

Invariant: nobody else wants permits meanwhile, and the bars are round trips of this network, with
something added for a busy machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

from tidegate.limiter import Limiter
from tidegate.limiter.outbox import SPARE_MS
from tidegate.rehearse.findings import waits_of
from tidegate.verify.plan import BATON, LIMIT, WEIGHTS
from tidegate.verify.promises import Report
from tidegate.verify.until import until

# What a busy machine adds to a round trip; and for how long a freed permit is kept for the next one
# in its own process.
_OURS_MS, _KEPT_MS = 10.0, SPARE_MS
_NO_LONGER_SPARE_S = 1.2 * SPARE_MS / 1000


async def measure(here: Limiter, there: Limiter, rounds: int, report: Report) -> None:
    """`here` and `there` are two sessions of one pool."""
    trip = waits_of([await _timed(here.ping(2_000)) for _ in range(rounds)])
    assert trip.p50_ms is not None
    report.measured("a round trip to Valkey, p50 / p99", _ms(trip.p50_ms, trip.p99_ms))
    _judge(
        report,
        "a free permit is had in about a round trip",
        [await _admission(here, number) for number in range(rounds)],
        2 * trip.p50_ms + _OURS_MS,
    )
    pairs = [(here, there) if number % 2 else (there, here) for number in range(rounds)]
    _judge(
        report,
        "a freed permit reaches a waiter elsewhere by push",
        [await _handed_over(*pair) for pair in pairs],
        3 * trip.p50_ms + _KEPT_MS + _OURS_MS,
    )


def _judge(report: Report, promise: str, took_ms: list[float], bar_ms: float) -> None:
    waits = waits_of(took_ms)
    assert waits.p50_ms is not None
    told = f"p50 / p99 {_ms(waits.p50_ms, waits.p99_ms)}"
    report.kept(promise, f"p50 <= {bar_ms:.1f} ms", told, waits.p50_ms <= bar_ms)


async def _admission(here: Limiter, number: int) -> float:
    """A permit that nobody has had just before, so that Valkey has to be asked."""
    began = time.perf_counter()
    async with here.acquire(LIMIT, tenant=list(WEIGHTS)[number % len(WEIGHTS)]):
        took_ms = (time.perf_counter() - began) * 1000
    await asyncio.sleep(_NO_LONGER_SPARE_S)
    return took_ms


async def _timed(work: Awaitable[object]) -> float:
    """How long it took, in ms."""
    began = time.perf_counter()
    await work
    return (time.perf_counter() - began) * 1000


async def _handed_over(here: Limiter, there: Limiter) -> float:
    """From giving a permit back here to its being had by one who waits there, in ms."""
    waits = asyncio.Event()
    freed = 0.0

    async def wait() -> float:
        waits.set()
        async with there.acquire(BATON):
            return time.perf_counter()

    async with here.acquire(BATON):
        waiter = asyncio.create_task(wait())
        await waits.wait()
        await until(lambda: there.local_state().waiting[BATON] > 0, 1.0)
        # The ticket is in the queue once its process has heard so.
        await asyncio.sleep(_NO_LONGER_SPARE_S)
        freed = time.perf_counter()
    return (await waiter - freed) * 1000


def _ms(p50_ms: float | None, p99_ms: float | None) -> str:
    return " / ".join("-" if one is None else f"{one:.1f}" for one in (p50_ms, p99_ms)) + " ms"
