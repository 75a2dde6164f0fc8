"""Limiters and small waits for the tests of this folder."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import redis.asyncio

from tests.integration.limiter.hands import Hands
from tests.waiting import wait_until
from tidegate.limiter.limiter import Limiter
from tidegate.limiter.policy import OnConflict, PoolPolicy
from tidegate.limiter.session import Clock, Observer

LIMIT = "kind:text_only"
LEASE_MS = 600


class Maker:
    """Makes limiters of one pool. `bound` is the limit; other fields go to the policy."""

    def __init__(self, pool: str, stack: AsyncExitStack) -> None:
        self.pool = pool
        self._stack = stack

    def cold(
        self,
        url: str,
        bound: int = 2,
        *,
        observer: Observer | None = None,
        max_waiters: int = 100_000,
        lease_ms: int = LEASE_MS,
        policy: PoolPolicy | None = None,
        on_conflict: OnConflict = "keep",
        clock: Clock | None = None,
        **fields: Any,
    ) -> Limiter:
        """A limiter that has not been started; of `policy`, or of one limit."""
        return Limiter(
            url,
            pool=self.pool,
            policy=policy or PoolPolicy({LIMIT: bound}, lease_ms=lease_ms, **fields),
            observer=observer,
            on_conflict=on_conflict,
            max_waiters=max_waiters,
            clock=clock,
        )

    async def __call__(self, url: str, bound: int = 2, **options: Any) -> Limiter:
        """A started limiter that is ready to let in; closed at the end of the test."""
        limiter = self.cold(url, bound, **options)
        if isinstance(limiter._clock, Hands):
            limiter._clock.limiters.append(limiter)
        await limiter.start()
        self._stack.push_async_callback(limiter.aclose)
        await wait_until(lambda: limiter.local_state().state == "up", what="the limiter is up")
        await wait_until(lambda: limiter._listener is not None and limiter._listener.subscribed)
        return limiter


class Body:
    """A task that acquires, and holds its permit until it is told to let go."""

    def __init__(self, limiter: Limiter, **options: Any) -> None:
        self.admitted = asyncio.Event()
        self.let_go = asyncio.Event()
        self.fence: tuple[int, int] | None = None
        self.task = asyncio.create_task(self._run(limiter, options))

    async def _run(self, limiter: Limiter, options: dict[str, Any]) -> None:
        async with limiter.acquire(LIMIT, **options) as permit:
            self.fence = permit.fence
            self.admitted.set()
            await self.let_go.wait()

    async def until_admitted(self, timeout_s: float = 20) -> Body:
        async with asyncio.timeout(timeout_s):
            await self.admitted.wait()
        return self

    async def end(self) -> None:
        self.let_go.set()
        await self.task


async def used(limiter: Limiter) -> int:
    """Permits in use as Valkey counts them."""
    return (await limiter.snapshot()).limits[LIMIT].used


async def quiet(*limiters: Limiter) -> None:
    """Give the pool a lease of a minute, so that in a test nothing happens by periodic renewal."""
    bound = limiters[0].policy.limits[LIMIT]
    await limiters[0].set_policy(PoolPolicy({LIMIT: bound}, lease_ms=60_000, revision=9))
    leases = [limiter._session.lease for limiter in limiters]
    await wait_until(lambda: all(lease.lease_ms == 60_000 for lease in leases), what="long leases")


async def until_waiting(limiter: Limiter, count: int, timeout_s: float = 20) -> None:
    async def reached() -> bool:
        return (await limiter.snapshot()).limits[LIMIT].waiting == count

    await wait_until(reached, timeout_s, f"{count} waiters")


async def until_used(limiter: Limiter, count: int, timeout_s: float = 20) -> None:
    async def reached() -> bool:
        return await used(limiter) == count

    await wait_until(reached, timeout_s, f"{count} permits in use")


async def command(url: str, *words: str) -> None:
    """Say something to Valkey."""
    client: Any = redis.asyncio.Redis.from_url(url)
    await client.execute_command(*words)
    await client.aclose()
