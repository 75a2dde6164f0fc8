"""Ray: each actor has a limiter; its calls wait in the queue that all actors share."""

import os

import ray

from tidegate.limiter import Limiter

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")


@ray.remote(max_concurrency=100)
class Caller:
    """Async methods of one actor run concurrently, and wait in the fair queue of all actors."""

    async def start(self) -> None:
        self._limiter = Limiter.from_url(REDIS_URL, pool="example-ray", policy={"llm": 20})
        await self._limiter.start()

    async def ask(self, prompt: str) -> str:
        async with self._limiter.acquire("llm", timeout=300):
            return f"You said: {prompt}"  # one call to the provider

    async def stop(self) -> None:
        await self._limiter.aclose(grace_ms=10_000)


if __name__ == "__main__":
    ray.init()
    callers = [Caller.remote() for _ in range(4)]
    ray.get([caller.start.remote() for caller in callers])
    answers = [callers[number % 4].ask.remote(f"call {number}") for number in range(100)]
    print(len(ray.get(answers)), "answered")
    ray.get([caller.stop.remote() for caller in callers])
