"""self-limiters: a list of permits and BLPOP, in Rust."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from self_limiters import Semaphore

from bench.limiter.orders import Orders


@asynccontextmanager
async def opened(orders: Orders) -> AsyncIterator[Callable[[int], Semaphore]]:
    permits = Semaphore(
        name="bench",
        capacity=orders.bound,
        expiry=orders.lease_ms // 1000,
        redis_url=orders.url,
        connection_pool_size=orders.tasks + 1,
    )
    yield lambda _: permits
