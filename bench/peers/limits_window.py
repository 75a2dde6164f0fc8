"""limits: its moving window, the exact one of its strategies; asked again when it says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from limits import RateLimitItemPerSecond
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter

from bench.limiter.orders import Orders


@asynccontextmanager
async def opened(
    orders: Orders,
) -> AsyncIterator[Callable[[int], AbstractAsyncContextManager[None]]]:
    storage = RedisStorage(f"async+{orders.url}", implementation="redispy")
    limiter = MovingWindowRateLimiter(storage)
    rate = RateLimitItemPerSecond(orders.bound, orders.window_ms // 1000)

    @asynccontextmanager
    async def acquire(_: int) -> AsyncIterator[None]:
        while not await limiter.hit(rate, "bench"):
            stats = await limiter.get_window_stats(rate, "bench")
            await asyncio.sleep(max(0.001, stats.reset_time - time.time()))
        yield

    yield acquire
