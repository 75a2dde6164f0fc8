"""concurrency-limit: a hash that everybody polls every 100 ms, which is its default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import redis
from concurrency_limit import LimitConfiguration, RedisConfiguration, limit

from bench.limiter.orders import Orders


@contextmanager
def opened(orders: Orders) -> Iterator[Callable[[int], AbstractContextManager[int]]]:
    # With a pool of ours, since the pool that it makes does not suit redis-py 8 over TCP.
    pool = redis.BlockingConnectionPool.from_url(orders.url, max_connections=orders.tasks + 1)
    server = RedisConfiguration(connection_pool=pool)
    bound = LimitConfiguration(
        "bench", orders.bound, limit_timeout=3600, limit_expire=orders.lease_ms // 1000
    )
    yield lambda _: limit(server, bound)
