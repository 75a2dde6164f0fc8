"""LiteLLM 17323, 20256, 27955, PR 28160: a count that goes up and never down again.

There one kind of route, a failure upstream or a client that left kept its place in a parallel limit
for good, until the key let nobody in. Here every route is taken through every way in which a
request can end, and after each nothing is held and nobody waits.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

from tests.gateway import Gateway, Opener
from tests.integration.rivals.routes import NATIVE, OWN, Route
from tests.waiting import wait_until
from tidegate import dialects
from tidegate.dialects import gemini
from tidegate.dialects.spec import GOING_ON, Dialect, Operation
from tidegate.policy.format import edit

KINDS = ("text_only", "multi_modal", "image_generation", "other")
Way = Callable[[Gateway, Route], Awaitable[None]]


@pytest.fixture
async def gateway(open_gateway: Opener) -> Gateway:
    """One place of each kind, so that a single one that is not given back is felt at once."""
    limits = {kind: 1 for kind in KINDS if kind != "other"}
    gateway = await open_gateway(worker=False, rate_limits=limits, stream_wait_ms=10_000)
    await gateway.services.keeper.change(edit({"kind:other": 1}), set_by="test")
    return gateway


def used(gateway: Gateway) -> tuple[int, int]:
    """What this process holds and how many wait in it, over all limits of all pools."""
    states = [limiter.local_state() for limiter in gateway.services.limiters.values()]
    held = sum(sum(state.held.values()) for state in states)
    return held, sum(sum(state.waiting.values()) for state in states)


async def ask(
    gateway: Gateway, route: Route, body: dict[str, Any] | None = None, within_ms: int = 2_000
) -> int:
    """The status; an answer that is cut is -1."""
    headers = {**route.headers, "x-tidegate-deadline-ms": str(within_ms)}
    payload = route.payload(body)
    url = gateway.url + route.path
    try:
        async with gateway.http.request(route.method, url, headers=headers, **payload) as answer:
            await answer.read()
            return answer.status
    except aiohttp.ClientError:
        return -1


async def succeeds(gateway: Gateway, route: Route) -> None:
    status = await ask(gateway, route)
    assert status == 200 or (_is_unknown(route) and status in (403, 404)), (route.name, status)


def _is_unknown(route: Route) -> bool:
    """The emulator refuses it immediately, or nobody is asked for a list of nothing: ends as good
    as any."""
    return route.path.endswith(("/files", "/files/abc", "computeTokens", "/v1/completions"))


async def is_refused_here(gateway: Gateway, route: Route) -> None:
    """For what its body says."""
    if route.broken is not None:
        before = len(await gateway.calls())
        assert 400 <= await ask(gateway, route, route.broken) < 500, route.name
        assert len(await gateway.calls()) == before or "generationConfig" in route.broken


async def is_late(gateway: Gateway, route: Route) -> None:
    """No room comes before its deadline."""
    if route.kind == "upload":
        return
    async with AsyncExitStack() as stack:
        for kind in KINDS:
            await stack.enter_async_context(gateway.services.limiter.acquire(f"kind:{kind}"))
        own = {**(route.body or {}), "deadline_ms": 30} if route in OWN else None
        assert await ask(gateway, route, own, within_ms=30) == (429 if own is None else 504), (
            route.name
        )
        assert used(gateway) == (len(KINDS), 0), route.name


async def leaves_the_queue(gateway: Gateway, route: Route) -> None:
    if route.kind == "upload":
        return
    async with AsyncExitStack() as stack:
        for kind in KINDS:
            await stack.enter_async_context(gateway.services.limiter.acquire(f"kind:{kind}"))
        await _leave(gateway, route, lambda: used(gateway)[1] >= 1)
        await wait_until(lambda: used(gateway) == (len(KINDS), 0), 20, f"{route.name}: no waiter")


async def leaves_in_the_call(gateway: Gateway, route: Route) -> None:
    if route.kind == "upload":
        return
    await order(gateway, "hang")
    await _leave(gateway, route, lambda: used(gateway)[0] >= 1)


async def leaves_in_the_answer(gateway: Gateway, route: Route) -> None:
    if not route.streams:
        return
    await order(gateway, "hang_mid_stream")
    async with aiohttp.ClientSession() as leaving:
        url, headers = gateway.url + route.path, dict(route.headers)
        async with leaving.request(
            route.method, url, headers=headers, **route.payload()
        ) as response:
            assert response.status == 200, route.name
            if response.content_type == "text/event-stream":
                await response.content.readline()
            assert used(gateway)[0] >= 1, route.name


def fails_by(fault: str, *statuses: int) -> Way:
    async def fails(gateway: Gateway, route: Route) -> None:
        await order(gateway, fault)
        status = await ask(gateway, route)
        # What has begun with a 200 ends in an event, or is cut. Uploads know no faults there.
        begun = route in OWN or fault.endswith("_stream") or route.kind == "upload"
        assert status in statuses or begun or _is_unknown(route), (route.name, status)

    fails.__name__ = fault
    return fails


async def order(gateway: Gateway, fault: str) -> None:
    await gateway.upstream.set_fault(fault)
    await gateway.upstream.set_fault(fault, kind="other")


async def _leave(gateway: Gateway, route: Route, when: Callable[[], bool]) -> None:
    async with aiohttp.ClientSession() as leaving:
        url, headers = gateway.url + route.path, dict(route.headers)
        asked = asyncio.create_task(_read(leaving, route, url, headers))
        await wait_until(lambda: when() or asked.done(), 20, f"{route.name}: the moment")
        assert not asked.done() or _is_unknown(route), (route.name, asked.result())
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


async def _read(
    session: aiohttp.ClientSession, route: Route, url: str, headers: dict[str, str]
) -> int:
    async with session.request(route.method, url, headers=headers, **route.payload()) as answer:
        await answer.read()
        return answer.status


WAYS = (
    *(succeeds, is_refused_here, is_late, leaves_the_queue, leaves_in_the_call),
    *(leaves_in_the_answer, fails_by("forbidden", 502, 403), fails_by("internal", 500, 502, 503)),
    *(fails_by("cut", 502), fails_by("garbage", 502, 200), fails_by("cut_mid_stream", -1, 200)),
    *(fails_by("error_in_stream", 200, 502, 503), fails_by("blocked_prompt", 200)),
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_every_route_gives_its_permit_back(gateway: Gateway, way: Way) -> None:
    for route in (*NATIVE, *OWN):
        await way(gateway, route)
        await wait_until(lambda: used(gateway) == (0, 0), 20, f"{route.name}: nothing held")
        await gateway.upstream.clear_faults()
        await gateway.services.spine.health["gemini"].open()
        for name in KINDS:  # a throttling that was ordered is over
            await gateway.services.limiter.resume(f"kind:{name}")
    stats = await gateway.upstream.stats()
    await gateway.in_flight(0)
    assert stats.max_in_flight <= len(KINDS)
    # And each place can be had at once.
    async with AsyncExitStack() as stack:
        for kind in KINDS:
            limiter = gateway.services.limiter
            await stack.enter_async_context(limiter.acquire(f"kind:{kind}", deadline_ms=1_000))


def test_no_native_route_is_left_out() -> None:
    seen = {re.sub(r"\?.*", "", route.path) for route in NATIVE}
    known = {*dialects._POSTED, "/v1/models", "/v1beta/models"}
    assert known <= seen
    # Work that goes on after its answer keeps its permit until then: native/test_gemini_work.py.
    ended = [do for do, operation in gemini._OPERATIONS.items() if operation not in GOING_ON]
    for do in (*ended, "generateContent", "streamGenerateContent"):
        assert any(path.endswith(f":{do}") for path in seen), do
    by_operation = {
        endpoint.operation
        for route in NATIVE
        for hint in (Dialect.GEMINI, Dialect.OPENAI)
        if (endpoint := dialects.endpoint_of(route.method, route.path.partition("?")[0], hint))
    }
    # What is passed through has a name only in the settings.
    assert by_operation == {one for one in Operation if one not in GOING_ON} - {Operation.OTHER}
