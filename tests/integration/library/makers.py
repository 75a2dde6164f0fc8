"""Names and small waits for the tests of this folder."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tests.waiting import wait_until
from tidegate.limiter import Limiter, PoolPolicy, Rate, SyncLimiter

LIMIT = "kind:text_only"
OTHER = "pool:total"
REQUESTS = "rpm:flash"
TOKENS = "tpm:flash"
MakeLimiter = Callable[..., Awaitable[Limiter]]
MakeSync = Callable[..., SyncLimiter]
MODEL = "gemini-2.5-flash"


def policy(bound: int) -> PoolPolicy:
    minute_ms = 60_000
    return PoolPolicy(
        {
            LIMIT: bound,
            OTHER: 100,
            REQUESTS: Rate(1_000, window_ms=minute_ms),
            TOKENS: Rate(10_000, window_ms=minute_ms, unit="tokens"),
        }
    )


def ask(prompt: str) -> dict[str, Any]:
    """A body of Gemini's generateContent."""
    return {"contents": [{"role": "user", "parts": [{"text": prompt}]}]}


def whole(url: str) -> str:
    return f"{url}/v1beta/models/{MODEL}:generateContent"


def stream(url: str) -> str:
    return f"{url}/v1beta/models/{MODEL}:streamGenerateContent?alt=sse"


def held(limiter: Limiter | SyncLimiter) -> int:
    return limiter.local_state().held[LIMIT]


def waiting(limiter: Limiter | SyncLimiter) -> int:
    return limiter.local_state().waiting[LIMIT]


async def until_used(limiter: Limiter, limit: str, amount: int) -> None:
    """Wait until Valkey counts so much under `limit`: what was given back is said in time."""

    async def reached() -> bool:
        return (await limiter.snapshot()).limits[limit].used == amount

    await wait_until(reached, what=f"{amount} used of {limit}")


async def until_free(limiter: Limiter) -> None:
    await wait_until(lambda: held(limiter) == 0, what="the permit is given back")
