"""redis-semaphore-eval: a sorted set and BLPOP; after its one wait it gives up, so ask again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import redis
from redis_semaphore_eval import FailedToAcquireLock, semaphore

from bench.limiter.orders import Orders


@contextmanager
def opened(orders: Orders) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
    client = redis.Redis.from_url(orders.url)

    @contextmanager
    def acquire(_: int) -> Iterator[None]:
        with ExitStack() as held:
            while True:
                attempt = semaphore(
                    client, "bench", orders.bound, expire_in=orders.lease_ms // 1000, timeout=1
                )
                try:
                    held.enter_context(attempt)
                except FailedToAcquireLock:
                    continue
                break
            yield

    yield acquire
