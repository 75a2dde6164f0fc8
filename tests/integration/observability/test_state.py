"""What a process tells of itself while both stores are gone: the dump, and the scrape."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from tests.gateway import Gateway, Opener
from tests.integration.observability.test_metrics import Values, chat, of, scraped
from tests.integration.security.hostile import Hostile, hostile, one_try
from tests.loglines import Lines, lines
from tests.waiting import wait_until
from tidegate.embedded.servers import PostgresServer, ValkeyServer

__all__ = ["hostile", "lines", "one_try"]


async def posted(gateway: Gateway, text: str) -> int:
    async with gateway.http.post(f"{gateway.url}/v1/chat/completions", json=chat(text)) as response:
        await response.read()
        return response.status


async def state_of(gateway: Gateway) -> dict[str, Any]:
    status, body = await gateway.get("/admin/process")
    assert status == 200
    return body


@pytest.mark.slow
async def test_with_both_stores_gone_a_process_still_tells_what_it_is_at(
    open_gateway: Opener, own_valkey: ValkeyServer, own_postgres: PostgresServer, lines: Lines
) -> None:
    gateway = await open_gateway(
        worker=False,
        redis_url=own_valkey.url,
        database_url=own_postgres.url(),
        rate_limits={"text_only": 1},
        semaphore_timeout=4.0,
        first_byte_timeout_ms=60_000,
    )
    await gateway.upstream.set_fault("hang", match="hang")
    hanging = asyncio.create_task(posted(gateway, "hang"))
    await gateway.in_flight(1)
    waiting = asyncio.create_task(posted(gateway, "wait"))
    await wait_until(lambda: gateway.waiting == 1, 20)
    before = await scraped(gateway)
    assert of(before, "tidegate_tenant_waiting", pool="gemini", tenant="default") == 1
    assert of(before, "tidegate_limit_waiting", limit="kind:text_only") == 1
    own_postgres.kill()
    own_valkey.kill()

    async def away() -> dict[str, Any] | None:
        await gateway.get(f"/status/{uuid4()}")  # somebody asks PostgreSQL
        state = await state_of(gateway)
        gone = state["record"]["postgresql"] == "away"
        return state if gone and state["pools"]["gemini"]["valkey"] == "away" else None

    state: dict[str, Any] = await wait_until(away, 20, "both are known to be away")
    pool = state["pools"]["gemini"]
    assert (pool["held"], pool["waiting"]) == (1, 1)
    (permit,), (queue,) = pool["permits"], pool["queues"]
    assert permit["tenant"] == queue["tenant"] == "default"
    assert "kind:text_only" in permit["limits"]
    assert permit["held_ms"] > 0
    assert pool["last_error"]
    assert state["memory_bytes"] > 1e7
    assert state["tasks"]
    assert any(one["event"] == "store_away" for one in state["problems"])

    async def seen_away() -> Values | None:
        values = await scraped(gateway)
        return None if of(values, "tidegate_valkey_up", pool="gemini") else values

    values: Values = await wait_until(seen_away, 20, "a scrape that is no copy of the last")
    assert of(values, "tidegate_valkey_up", pool="gemini") == 0
    assert of(values, "tidegate_postgres_up") == 0
    assert of(values, "tidegate_permits_held", pool="gemini", process="api") == 1
    assert of(values, "tidegate_waiters", pool="gemini") == 1
    assert of(values, "tidegate_limiter_processes", state="away") == 1
    assert not [name for name, _ in values if name == "tidegate_limit_used"], "never stale"
    for task in (hanging, waiting):
        task.cancel()
    await asyncio.gather(hanging, waiting, return_exceptions=True)
    own_valkey.start()
    own_postgres.start()
    await wait_until(
        lambda: not gateway.services.store.connections.unavailable, 20, "PostgreSQL is back"
    )

    async def told() -> bool:
        failed = (await state_of(gateway))["failed_calls"]
        return [one["status"] for one in failed] == ["cancelled"] * 2

    await wait_until(told, 20, "the calls that failed")


async def test_what_an_upstream_announces_of_its_limits_is_told(
    open_gateway: Opener, hostile: Hostile
) -> None:
    """From good answers, whole and streamed, and from a 429; not from what asks no model."""
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url)
    heads = [
        (b"200 OK", b"x-ratelimit-limit-requests: 500\r\nx-ratelimit-remaining-requests: 499"),
        (b"200 OK", b"x-ratelimit-limit-tokens-minute: 9000\r\n"
         b"x-ratelimit-remaining-tokens-minute: 7"),
        (b"200 OK", b"x-other: 1"),
    ]  # fmt: skip
    seen = []
    for number, (status, limits) in enumerate(heads):
        hostile.answer = b"HTTP/1.1 %b\r\n%b\r\ncontent-length: 2\r\n\r\n{}" % (status, limits)
        model = f"m{number}"
        body = chat("Say hello", stream=number == 1) | {"model": model}
        async with gateway.http.post(f"{gateway.url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
            await response.read()
        announced = (await state_of(gateway))["upstreams"]["gemini"]["announced"]
        seen = [{"model": one["model"], "limits": one["limits"]} for one in announced]
    assert seen == [
        {"model": "m0", "limits": [{"unit": "requests", "limit": 500, "remaining": 499}]},
        {
            "model": "m1",
            "limits": [{"unit": "tokens", "window": "minute", "limit": 9000, "remaining": 7}],
        },
    ]
    values = await scraped(gateway)
    labels = {"upstream": "gemini", "model": "m1", "unit": "tokens", "window": "minute"}
    assert of(values, "tidegate_upstream_announced_limit", **labels) == 9000
    assert of(values, "tidegate_upstream_announced_remaining", **labels) == 7
    assert of(values, "tidegate_upstream_announced_limit", model="m0", window="") == 500


async def test_a_429_announces_limits_too(
    open_gateway: Opener, hostile: Hostile, one_try: None
) -> None:
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url)
    limits = b"anthropic-ratelimit-input-tokens-remaining: 0\r\nretry-after: 1"
    hostile.answer = b"HTTP/1.1 429 No\r\n%b\r\ncontent-length: 2\r\n\r\n{}" % limits
    body = chat("Say hello") | {"model": "m", "max_tokens": 5}
    async with gateway.http.post(f"{gateway.url}/v1/messages", json=body) as response:
        assert response.status == 429
    (said,) = (await state_of(gateway))["upstreams"]["gemini"]["announced"]
    assert said["limits"] == [{"unit": "input_tokens", "remaining": 0}]
    # Any client can name a model that is refused: it takes no label from one that has answered.
    named = {name for name, _ in await scraped(gateway)}
    assert "tidegate_upstream_out" in named
    assert "tidegate_upstream_announced_remaining" not in named
