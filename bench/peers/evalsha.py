"""The floor of a round trip: `EVALSHA return 1` by redis-py; limits nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import redis.asyncio

from bench.limiter.orders import Orders


@asynccontextmanager
async def opened(
    orders: Orders,
) -> AsyncIterator[Callable[[int], AbstractAsyncContextManager[None]]]:
    async with redis.asyncio.Redis.from_url(orders.url) as client:
        sha = await client.script_load("return 1")

        class RoundTrip:
            async def __aenter__(self) -> None:
                await client.evalsha(sha, 0)

            async def __aexit__(self, *_: object) -> None: ...

        yield lambda _: RoundTrip()
