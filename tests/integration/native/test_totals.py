"""What we have on record is what the provider billed, whatever happened on the way."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until

LEAVES = "leave me"
CALLS = 150
VERSION = {"anthropic-version": "2023-06-01"}
TODAY = datetime.now(UTC).date()


def fronts(text: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    said = [{"role": "user", "content": text}]
    parts = {"contents": [{"parts": [{"text": text}]}]}
    return (
        ("/v1/chat/completions", {"model": "m", "messages": said}),
        ("/v1/responses", {"model": "m", "input": text}),
        ("/v1beta/models/m:generateContent", parts),
        ("/v1beta/models/m:streamGenerateContent?alt=sse", parts),
        ("/v1/messages", {"model": "m", "max_tokens": 90, "messages": said}),
    )


async def one(gateway: Gateway, number: int) -> None:
    leaves = number % 7 == 0
    text = f"{LEAVES} {number}." if leaves else f"Tell me number {number}"
    path, body = fronts(text)[number % 5]
    streamed = {"stream": True} if path.startswith("/v1/") and number % 2 else {}

    async def ask() -> None:
        async with (
            asyncio.timeout(100),
            aiohttp.ClientSession() as session,
            session.post(gateway.url + path, json=body | streamed, headers=VERSION) as response,
        ):
            if leaves and streamed:  # once its call has begun, however long it waited for it
                await response.content.readany()
            else:
                await response.read()

    asking = asyncio.create_task(ask())
    if leaves and not streamed:
        await wait_until(lambda: asking.done() or is_called(gateway, text), 100, "its call")
        asking.cancel()
    with suppress(asyncio.CancelledError, TimeoutError, aiohttp.ClientError):
        await asking


async def is_called(gateway: Gateway, text: str) -> bool:
    """Whether the provider has begun to answer it."""
    return any(call.bytes for call in await gateway.upstream.calls(contains=text))


async def test_totals_of_settled_calls_are_the_providers_own(open_gateway: Opener) -> None:
    # Callers leave, and nothing of ours ends a call: where a machine stands still for longer than a
    # lease, the limiter cancels calls that the provider goes on with, and bills.
    patience = {"first_byte_timeout_ms": 60_000, "idle_timeout_ms": 60_000, "semaphore_timeout": 5}
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 40}, **patience)
    await gateway.upstream.set_behaviour(first_byte_ms=5, between_ms=3)
    await gateway.upstream.set_fault("hang_mid_stream", match=LEAVES)
    for fault in ("unavailable", "throttled_bare", "internal", "cut_mid_stream"):
        await gateway.upstream.set_fault(fault, probability=0.05)
    await asyncio.gather(*(one(gateway, number) for number in range(CALLS)))
    await wait_until(lambda: gateway.held == gateway.waiting == 0, 20, "the end of all")
    await gateway.in_flight(0)

    async def recorded() -> bool:
        count: int = await gateway.database.fetchval("SELECT count(*) FROM audit")
        return count == CALLS

    await wait_until(recorded, 20, "all records")
    ours = await gateway.database.fetchrow(
        "SELECT sum(input_tokens) AS taken, sum(output_tokens) AS given, count(*) AS calls"
        " FROM audit WHERE status = 'succeeded'"
    )
    theirs = (await gateway.upstream.stats()).billed("finished")
    assert ours["calls"] > CALLS // 2
    assert (ours["taken"], ours["given"]) == (theirs.input_tokens, theirs.output_tokens)
    told = await gateway.database.fetchrow(
        "SELECT sum(input_tokens) AS taken, sum(output_tokens) AS given FROM audit"
        " WHERE usage_state = 'told'"
    )
    assert tuple(told.values()) == (theirs.input_tokens, theirs.output_tokens)
    cut = await gateway.database.fetch(
        "SELECT usage_state, input_tokens, output_tokens FROM audit"
        # A caller that left before its call was sent has cost nothing.
        " WHERE status = 'cancelled' AND endpoint = '/v1/responses' AND attempts > 0"
    )
    assert cut
    assert {row["usage_state"] for row in cut} == {"estimated"}
    assert all(row["input_tokens"] for row in cut)
    await is_added_up(gateway)


async def is_added_up(gateway: Gateway) -> None:
    """Whether the totals are what the audit comes to, however it was written."""
    sums = ", ".join(
        f"sum({name})::bigint AS {name}"
        for name in ("input_tokens", "output_tokens", "thoughts_tokens", "cost_micros")
    )
    counts = ", ".join(
        f"count(*) FILTER (WHERE usage_state = '{state}') AS {state}"
        for state in ("partial", "estimated", "unknown")
    )
    audit = await gateway.database.fetchrow(
        f"SELECT count(*) AS requests, {sums}, {counts} FROM audit"
    )
    total = (await gateway.services.store.usage.totals((), TODAY, TODAY + timedelta(days=1)))[0]
    theirs = {name: value or 0 for name, value in audit.items()}
    assert {name: getattr(total, name) for name in theirs} == theirs
