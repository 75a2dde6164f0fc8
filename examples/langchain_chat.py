"""LangChain: each call of a chain takes a permit, by the HTTP client under `ChatOpenAI`."""

import asyncio
import os

import httpx2
from langchain_openai import ChatOpenAI

from tidegate.integrations.httpx2 import AsyncLimitedTransport
from tidegate.limiter import Demand, Limiter

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")


async def main() -> None:
    policy = {"openai": 5}
    async with Limiter.from_url(REDIS_URL, pool="example-langchain", policy=policy) as limiter:
        transport = AsyncLimitedTransport(limiter, Demand(("openai",), deadline_ms=60_000))
        async with httpx2.AsyncClient(transport=transport, timeout=60) as http:
            model = ChatOpenAI(model="gpt-5-mini", http_async_client=http, max_retries=0)
            answers = await model.abatch([f"Say hello {number}" for number in range(8)])
            print(len(answers), "answered")


if __name__ == "__main__":
    asyncio.run(main())
