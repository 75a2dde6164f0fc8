"""Tidegate's own limiter under limits of many units, of which the concurrency binds.

`options["units"]`: `usual` has requests, input and output tokens a minute and requests a day; `all`
has each unit, with weights, a pace and a ramp beside them. Every call is counted by all of them,
and settled with what it used. The first needs nothing that came after limits could say more, so
that it can be measured of older commits too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from bench.limiter.orders import Orders
from tidegate import limiter as library
from tidegate.limiter import Limiter, Permit, PoolPolicy, Quota, Rate, Tokens

CALLS = "kind:text_only"
PLENTY = 1_000_000_000
MINUTE_MS = 60_000


def _usual() -> dict[str, Any]:
    return {
        "rpm:bench": Rate(PLENTY, MINUTE_MS),
        "itpm:bench": Rate(PLENTY, MINUTE_MS, unit="input_tokens"),
        "otpm:bench": Rate(PLENTY, MINUTE_MS, unit="output_tokens"),
        "rpd:bench": Quota(PLENTY),
    }


def _all() -> dict[str, Any]:
    weights = library.Weights(1, 0.1, 1.25, 5)
    ramp = library.Ramp(50, PLENTY)
    rates: dict[str, Any] = {
        "rpm:bench": Rate(PLENTY, MINUTE_MS, pace_ms=10_000),
        "tpm:bench": Rate(PLENTY, MINUTE_MS, unit="tokens", weights=weights, reserve="bound"),
        "itpm:bench": Rate(PLENTY, MINUTE_MS, unit="uncached_input_tokens"),
        "otpm:bench": Rate(PLENTY, MINUTE_MS, unit="output_tokens", ramp=ramp),
        "ipm:bench": Rate(PLENTY, MINUTE_MS, unit="images"),
    }
    more = {
        f"{unit}:bench": Rate(PLENTY, MINUTE_MS, unit=unit) for unit in ("audio_seconds", "usd")
    }
    return rates | more | {"rpd:bench": Quota(PLENTY)}


@asynccontextmanager
async def opened(
    orders: Orders,
) -> AsyncIterator[Callable[[int], AbstractAsyncContextManager[Permit]]]:
    every = orders.options["units"] == "all"
    limits = {CALLS: orders.bound, **(_all() if every else _usual())}
    policy = PoolPolicy(limits, lease_ms=orders.lease_ms)
    async with Limiter.from_url(orders.url, pool="bench", policy=policy) as limiter:
        guess, used = Tokens(900, 300), Tokens(850, 220)

        def of_usual(_: int) -> Any:
            return limiter.acquire(*limits, tokens=guess)

        def of_all(_: int) -> Any:
            return limiter.acquire_for(
                library.Demand(
                    tuple(limits),
                    tokens=guess,
                    images=1,
                    audio_seconds=3,
                    cost_micros=4_200,
                    most=Tokens(900, 4_096),
                )
            )

        acquire_one = of_all if every else of_usual
        more = {"audio_seconds": 2, "cost_micros": 3_100} if every else {}

        @asynccontextmanager
        async def acquire(task: int) -> AsyncIterator[Permit]:
            async with acquire_one(task) as permit:
                yield permit
                permit.settle(tokens=used, images=1, **more)

        yield acquire


async def before_call(permit: Permit) -> None:
    await permit.confirm()
