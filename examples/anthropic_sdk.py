"""Anthropic's SDK: at most 10 calls in flight, over all processes that run this."""

import asyncio
import os

import httpx2
from anthropic import AsyncAnthropic

from tidegate.integrations.httpx2 import AsyncLimitedTransport
from tidegate.limiter import Demand, Limiter

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")


async def main() -> None:
    policy = {"anthropic": 10}
    async with Limiter.from_url(REDIS_URL, pool="example-anthropic", policy=policy) as limiter:
        transport = AsyncLimitedTransport(limiter, Demand(("anthropic",), deadline_ms=60_000))
        http = httpx2.AsyncClient(transport=transport, timeout=60)
        async with AsyncAnthropic(http_client=http) as sdk:
            answer = await sdk.messages.create(
                model="claude-haiku-5-5",
                max_tokens=100,
                messages=[{"role": "user", "content": "Say hello"}],
            )
            print(answer.role)


if __name__ == "__main__":
    asyncio.run(main())
