"""Names and small waits for the tests of this folder."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tests.waiting import wait_until
from tidegate.limiter import Limiter, PoolPolicy
from tidegate.limiter.threads import SyncLimiter

LIMIT = "kind:text_only"
MakeLimiter = Callable[..., Awaitable[Limiter]]
MakeSync = Callable[..., SyncLimiter]
MODEL = "gemini-2.5-flash"


def policy(bound: int) -> PoolPolicy:
    return PoolPolicy({LIMIT: bound})


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


async def until_free(limiter: Limiter) -> None:
    await wait_until(lambda: held(limiter) == 0, what="the permit is given back")
