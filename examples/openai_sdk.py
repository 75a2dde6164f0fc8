"""OpenAI's SDK: at most 20 calls in flight and 500 a minute, over all processes that run this."""

import asyncio
import os

import httpx2
from openai import AsyncOpenAI

from tidegate.integrations.httpx2 import AsyncLimitedTransport
from tidegate.limiter import Demand, Limiter, Rate

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")
POLICY = {"openai": 20, "openai-rpm": Rate.per_minute(500)}


async def main() -> None:
    async with Limiter.from_url(REDIS_URL, pool="example-openai", policy=POLICY) as limiter:
        demand = Demand(("openai", "openai-rpm"), deadline_ms=60_000)
        # A 429 that says for how long pauses `openai-rpm` in all processes.
        transport = AsyncLimitedTransport(limiter, demand, penalise="openai-rpm")
        http = httpx2.AsyncClient(transport=transport, timeout=60)
        async with AsyncOpenAI(http_client=http) as sdk:
            answer = await sdk.chat.completions.create(
                model="gpt-5-mini", messages=[{"role": "user", "content": "Say hello"}]
            )
            print(answer.choices[0].message.role)


if __name__ == "__main__":
    asyncio.run(main())
