"""py-redis-semaphore: a sorted set with fencing, a heartbeat per permit, and BLPOP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import redis.asyncio
from redis_semaphore import Semaphore, SemaphoreConfig

from bench.limiter.orders import Orders


@asynccontextmanager
async def opened(orders: Orders) -> AsyncIterator[Callable[[int], Semaphore]]:
    config = SemaphoreConfig("bench", orders.bound, lock_timeout=orders.lease_ms / 1000)
    async with redis.asyncio.Redis.from_url(
        orders.url, max_connections=2 * orders.tasks + 10
    ) as client:
        yield lambda _: Semaphore(client, config)
