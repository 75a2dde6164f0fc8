"""The floor of the harness: no limiter at all, only each process's part of the bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from bench.limiter.orders import Orders


@asynccontextmanager
async def opened(orders: Orders) -> AsyncIterator[Callable[[int], asyncio.Semaphore]]:
    permits = asyncio.Semaphore(orders.part_of_bound)
    yield lambda _: permits
