"""orditect-core: a sorted set that is polled with back-off, and a watchdog per permit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import redis.asyncio
from orditect.core.limiter.semaphore import AsyncLeaseSemaphore

from bench.limiter.orders import Orders


@asynccontextmanager
async def opened(
    orders: Orders,
) -> AsyncIterator[Callable[[int], AbstractAsyncContextManager[object]]]:
    async with redis.asyncio.Redis.from_url(
        orders.url, max_connections=2 * orders.tasks + 10, decode_responses=True
    ) as client:
        permits = AsyncLeaseSemaphore(
            client, "bench", orders.bound, lease_time=orders.lease_ms / 1000
        )
        yield lambda _: permits.hold()
