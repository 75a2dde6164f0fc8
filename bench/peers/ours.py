"""Tidegate's own limiter."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from bench.limiter.orders import Orders
from tidegate.limiter import Acquisition, Limiter, Permit, PoolPolicy, Rate

CALLS = "kind:text_only"
ARRIVALS = "rpm:bench"


@asynccontextmanager
async def opened(orders: Orders) -> AsyncIterator[Callable[[int], Acquisition]]:
    options: dict[str, Any] = {"lease_ms": orders.lease_ms, **orders.options}
    slack_ms = options.pop("slack_ms", None)
    limit, bound = (
        (ARRIVALS, Rate(orders.bound, orders.window_ms, slack_ms=slack_ms))
        if orders.window_ms
        else (CALLS, orders.bound)
    )
    tenants = list(options.get("weights", ["default"]))
    policy = PoolPolicy({limit: bound}, **options)
    async with Limiter.from_url(orders.url, pool="bench", policy=policy) as limiter:
        yield lambda task: limiter.acquire(limit, tenant=tenants[task % len(tenants)])


async def before_call(permit: Permit) -> None:
    await permit.confirm()
