"""LiteLLM PR 35273, 34299, 18708, PR 34887: servers behind the gateway that hang, or are flooded.

There a Redis that takes connections and says nothing hangs every request while health is green, and
each worker opens database clients until the server has none left.
"""

from __future__ import annotations

import asyncio
import time

from tests.databases import KEPT
from tests.gateway import Gateway, Opener
from tests.integration.rivals.routes import ASKED, GEMINI
from tests.waiting import promised_s, wait_until
from tidegate.embedded.servers import ValkeyServer

MOST_CONNECTIONS = 20


async def ask(gateway: Gateway, within_ms: int = 20_000) -> int:
    url = f"{gateway.url}/v1beta/models/{GEMINI}:generateContent"
    headers = {"x-tidegate-deadline-ms": str(within_ms)}
    async with gateway.http.post(url, json=ASKED, headers=headers) as response:
        await response.read()
        return response.status


async def test_a_frozen_valkey_hangs_no_request_and_health_says_so(
    open_gateway: Opener, own_valkey: ValkeyServer
) -> None:
    gateway = await open_gateway(worker=False, redis_url=own_valkey.url, semaphore_timeout=1.5)
    assert await ask(gateway) == 200
    own_valkey.pause()

    async def is_told() -> bool:
        status, body = await gateway.get("/health/dependencies")
        return status == 503 and body["valkey"]["status"] == "failed"

    began = time.monotonic()
    await wait_until(is_told, 20, "health")
    assert await ask(gateway, 500) in (429, 503)
    assert time.monotonic() - began < promised_s(6)
    own_valkey.resume()

    async def works() -> bool:
        return await ask(gateway, 2_000) == 200

    await wait_until(works, 15, "calls again")


async def test_a_crowd_of_calls_opens_few_clients_of_the_database(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 200})
    await gateway.upstream.set_behaviour(first_byte_ms=50)
    most = 0

    async def look() -> None:
        nonlocal most
        while True:
            found = await gateway.database.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                f"AND application_name <> '{KEPT}'"
            )
            most = max(most, found)
            await asyncio.sleep(0)

    looking = asyncio.create_task(look())
    statuses = await asyncio.gather(*(ask(gateway) for _ in range(400)))
    submits = await asyncio.gather(*(gateway.submit(data="Explain") for _ in range(100)))
    looking.cancel()
    assert set(statuses) == {200}
    assert len(set(submits)) == 100
    assert 1 < most <= MOST_CONNECTIONS
