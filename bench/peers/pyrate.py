"""pyrate-limiter: its sliding log in Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import redis.asyncio
from pyrate_limiter import Limiter, Rate, RedisBucket

from bench.limiter.orders import Orders


@asynccontextmanager
async def opened(
    orders: Orders,
) -> AsyncIterator[Callable[[int], AbstractAsyncContextManager[None]]]:
    async with redis.asyncio.Redis.from_url(orders.url) as client:
        rates = [Rate(orders.bound, orders.window_ms)]
        limiter = Limiter(await RedisBucket.init(rates, client, "bench"))

        @asynccontextmanager
        async def acquire(_: int) -> AsyncIterator[None]:
            while not await limiter.try_acquire_async("bench"):
                pass
            yield

        yield acquire
