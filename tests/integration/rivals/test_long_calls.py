"""LiteLLM PR 32441: a place in a limit lives by a fixed time that nobody prolongs.

There a crash costs the place for an hour, and a call that takes longer loses it while it goes on.
"""

from __future__ import annotations

import asyncio

from tests.gateway import Opener
from tests.integration.rivals.routes import ASKED, GEMINI
from tests.waiting import wait_until

LEASE_S = 0.3


async def test_a_stream_keeps_its_permit_through_many_leases(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, semaphore_timeout=1.5, rate_limits={"text_only": 1})
    await gateway.upstream.set_behaviour(chunks=30, between_ms=180)
    url = f"{gateway.url}/v1beta/models/{GEMINI}:streamGenerateContent?alt=sse"
    async with gateway.http.post(url, json=ASKED) as response:
        await response.content.readline()
        (permit,) = await gateway.services.limiter.permits()
        held: set[tuple[int, int]] = set()

        async def others() -> int:
            """Who else gets in meanwhile: nobody."""
            late = {"x-tidegate-deadline-ms": "200"}
            async with gateway.http.post(url, json=ASKED, headers=late) as other:
                await other.read()
                held.update((p.ticket, p.seq) for p in await gateway.services.limiter.permits())
                return other.status

        statuses = [await others() for _ in range(12)]
        assert statuses == [429] * 12
        assert held == {(permit.ticket, permit.seq)}, "the same permit, all the time"
        rest = await response.read()
    assert b"error" not in rest
    assert (await gateway.upstream.stats()).max_in_flight == 1
    await wait_until(lambda: gateway.held == 0, 20)


async def test_what_a_crash_held_is_back_within_a_lease(open_gateway: Opener) -> None:
    """As far as one process can tell: its session ends without a word of goodbye."""
    first = await open_gateway(
        worker=False, semaphore_timeout=LEASE_S, rate_limits={"text_only": 1}
    )
    second = await open_gateway(
        worker=False, semaphore_timeout=LEASE_S, rate_limits={"text_only": 1}
    )
    await first.upstream.set_fault("hang")
    url = f"/v1beta/models/{GEMINI}:generateContent"
    holding = asyncio.create_task(first.http.post(first.url + url, json=ASKED))
    await first.in_flight(1)
    (permit,) = await first.services.limiter.permits()
    loop = asyncio.get_running_loop()
    began = loop.time()
    await second.services.limiter.revoke(permit.process)
    late = {"x-tidegate-deadline-ms": "5000"}
    async with second.http.post(second.url + url, json=ASKED, headers=late) as response:
        assert response.status == 200
    assert loop.time() - began < 5 * LEASE_S + 1
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
