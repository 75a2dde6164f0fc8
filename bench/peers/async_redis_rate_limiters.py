"""async-redis-rate-limiters: a sorted set and BLPOP, behind a semaphore in each process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from async_redis_rate_limiters import DistributedSemaphoreManager

from bench.limiter.orders import Orders


@asynccontextmanager
async def opened(
    orders: Orders,
) -> AsyncIterator[Callable[[int], AbstractAsyncContextManager[None]]]:
    manager = DistributedSemaphoreManager(redis_url=orders.url, redis_ttl=orders.lease_ms // 1000)
    yield lambda _: manager.get_semaphore("bench", orders.bound)
