"""What is on record of a call's cost, in each dialect and on our own routes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.gateway import Gateway, Opener
from tests.integration.native.test_totals import VERSION, fronts, is_added_up
from tests.integration.security.hostile import one_try
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, ask, key_of
from tests.waiting import wait_until

__all__ = ["one_try"]


async def called(gateway: Gateway, path: str, body: dict[str, Any], **headers: str) -> int:
    url, headers = gateway.url + path, headers | VERSION
    async with gateway.http.post(url, json=body, headers=headers) as response:
        await response.read()
        return response.status


def by_hand(row: Any) -> int:
    """At 1.25 a million in and 10 a million out; thinking is output."""
    taken, given, thought = (
        row[name] or 0 for name in ("input_tokens", "output_tokens", "thoughts_tokens")
    )
    return (125 * taken + 1_000 * (given + thought) + 50) // 100


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("streamed", [False, True])
async def test_each_dialect_is_charged_by_its_price(
    open_gateway: Opener, priced: Path, number: int, streamed: bool
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=priced)
    path, body = fronts("Tell me of the sea, at some length")[number]
    more = {"stream": True} if streamed and path.startswith("/v1/") else {}
    assert await called(gateway, path, body | more) == 200
    row = await wait_until(lambda: gateway.database.fetchrow("SELECT * FROM audit"), 20)
    billed = (await gateway.upstream.stats()).billed("finished")
    thought = row["thoughts_tokens"] or 0
    assert row["usage_state"] == "told"
    assert (row["input_tokens"], row["output_tokens"] + thought) == (
        billed.input_tokens,
        billed.output_tokens + (thought and billed.thoughts_tokens),
    )
    assert row["cost_micros"] == by_hand(row) > 0
    await is_added_up(gateway)


async def test_refusals_cost_nothing_and_cut_streams_what_came(
    open_gateway: Opener, priced: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=priced)
    chat = fronts("leave")[0][1] | {"model": "m", "stream": True}
    await gateway.upstream.set_fault("hang_mid_stream", match="leave")
    for path, body in (fronts("leave")[3], ("/v1/chat/completions", chat), fronts("leave")[4]):
        body = body | ({"stream": True} if path == "/v1/messages" else {})
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await called(gateway, path, body)
    await gateway.in_flight(0)
    await wait_until(lambda: gateway.database.fetchval("SELECT count(*) = 3 FROM audit"), 20)
    rows = await gateway.database.fetch("SELECT * FROM audit ORDER BY created_at")
    assert [row["usage_state"] for row in rows] == ["partial", "estimated", "partial"]
    for row in rows:
        assert row["cost_micros"] == by_hand(row) > 0
    # An estimate is marked, and not shown as if the provider had told it.
    record = await gateway.status(str(rows[1]["request_id"]))
    assert "usage" not in record
    await is_added_up(gateway)


async def test_refused_calls_are_charged_nothing(
    open_gateway: Opener, priced: Path, one_try: None
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=priced)
    await gateway.upstream.set_fault("throttled_bare", match="no room")
    path, body = fronts("no room")[2]
    assert await called(gateway, path, body) == 429
    row = await wait_until(lambda: gateway.database.fetchrow("SELECT * FROM audit"), 20)
    assert (row["usage_state"], row["cost_micros"], row["input_tokens"]) == ("none", 0, None)


async def test_jobs_and_streams_cost_too(open_gateway: Opener, priced: Path) -> None:
    gateway = await open_gateway(tidegate_policy=priced)
    job = await gateway.submit(data="Why is the sky blue?", type="text_only", model="m")
    assert (await gateway.end_of(job))["status"] == "succeeded"
    stream = await gateway.stream(data="Why is it red?", type="text_only", model="m")
    free = await gateway.stream(data="And green?", type="text_only", model="free-1")
    picture = await gateway.submit(data="A blue sky", type="image_generation")
    await gateway.end_of(picture)
    for request_id in (job, stream.request_id):
        row = await gateway.audit(request_id)
        assert (row["usage_state"], row["cost_micros"]) == ("told", by_hand(row))
        assert row["cost_micros"] > 0
    assert (await gateway.audit(free.request_id))["cost_micros"] == 0
    drawn = await gateway.audit(picture)
    assert (drawn["images"], drawn["usage_state"]) == (1, "told")
    billed = (await gateway.upstream.stats()).billed("finished")
    sums = await gateway.database.fetchrow(
        "SELECT sum(input_tokens) AS taken, sum(output_tokens) AS given FROM audit"
    )
    assert tuple(sums.values()) == (billed.input_tokens, billed.output_tokens)
    await is_added_up(gateway)
    usage, day = gateway.services.store.usage, datetime.now(UTC).date()
    by, span = ["tenant", "model", "day"], (day - timedelta(days=1), day)
    logged = await usage.totals([*by, "upstream"], *span)
    assert {one.upstream for one in logged} == {"gemini"}
    assert [replace(one, upstream=None) for one in logged] == await usage.totals(by, *span)


async def test_jobs_and_streams_are_on_record_by_their_key(
    open_gateway: Opener, priced: Path
) -> None:
    gateway = await open_gateway(tidegate_policy=priced, auth="on", admin_token=ADMIN_TOKEN)
    key = (await key_of(gateway, "acme"))["Authorization"].removeprefix("Bearer ")
    gateway.http.headers["x-api-key"] = key
    prefix, ends = key[3:13], []
    ends.append(await gateway.submit(data="Why is the sky blue?", type="text_only", model="m"))
    ends.append((await gateway.stream(data="And red?", type="text_only", model="m")).request_id)
    ends.append(await gateway.submit(endpoint=fronts("x")[2][0], body=fronts("x")[2][1]))
    ends.append(await gateway.submit(data="?", type="text_only", model="m", deadline_ms=1))
    for request_id in ends:
        await gateway.end_of(request_id)
    rows = [await gateway.audit(request_id) for request_id in ends]
    assert [row["key_id"] for row in rows] == [prefix] * 4
    spent = sum(row["cost_micros"] for row in rows)
    assert spent > 0
    _, usage = await ask(gateway, "GET", "/admin/usage?by=key", AS_ADMIN)
    assert [(row["key"], row["cost_micros"]) for row in usage["rows"]] == [(prefix, spent)]
    # A budget of the key begins with what the key has spent.
    budget = {"usd": 5, "key": prefix}
    status, made = await ask(gateway, "PUT", "/admin/budgets/of-a-key", AS_ADMIN, budget)
    assert (status, made["most_used"]["spent"]) == (200, spent)


async def test_totals_are_shown_to_their_tenant_and_to_the_operator(
    open_gateway: Opener, priced: Path
) -> None:
    gateway = await open_gateway(
        worker=False, tidegate_policy=priced, auth="on", admin_token=ADMIN_TOKEN
    )
    acme, other = await key_of(gateway, "acme"), await key_of(gateway, "other")
    path, body = fronts("Hello")[2]
    for headers in (acme, acme, other):
        assert await called(gateway, path, body, **headers) == 200
    await wait_until(lambda: gateway.database.fetchval("SELECT count(*) = 3 FROM audit"), 20)
    status, own = await ask(gateway, "GET", "/usage", acme)
    assert status == 200
    assert [(row["model"], row["requests"]) for row in own["rows"]] == [("m", 2)]
    assert own["rows"][0]["cost_micros"] == own["total"]["cost_micros"] > 0
    _, whole = await ask(gateway, "GET", "/admin/usage?by=tenant", AS_ADMIN)
    assert [(row["tenant"], row["requests"]) for row in whole["rows"]] == [
        ("acme", 2),
        ("other", 1),
    ]
    _, one = await ask(gateway, "GET", "/admin/usage?by=day&tenant=other", AS_ADMIN)
    assert one["total"]["requests"] == 1
    _, keys = await ask(gateway, "GET", "/usage?by=key,upstream", acme)
    prefix = acme["Authorization"].removeprefix("Bearer tg_").partition("_")[0]
    assert [(row["key"], row["upstream"], row["requests"]) for row in keys["rows"]] == [
        (prefix, "gemini", 2)
    ]
    assert keys["total"] == own["total"]
    for path in (
        *("/usage?by=colour", "/usage?since=2026-02-01&until=2026-01-01", "/usage?since=x"),
        "/usage?since=2026-02-01&until=2026-03-04&by=key",
    ):
        status, problem = await ask(gateway, "GET", path, acme)
        assert (status, problem["field"]) == (400, path.partition("?")[2].partition("=")[0])
    assert (await ask(gateway, "GET", "/admin/usage", acme))[0] == 403
    status, books = await ask(gateway, "GET", "/admin/reconciliations?until=0001-01-15", AS_ADMIN)
    assert (status, books) == (200, {"items": []})
    _, slow = await ask(gateway, "GET", "/admin/latency?tenant=acme", AS_ADMIN)
    assert sum(hour["requests"] for hour in slow["hours"]) == 2
    names = {(one["of"], one["name"]) for hour in slow["hours"] for one in hour["parts"]}
    assert {("tenant", "acme"), ("model", "m"), ("upstream", "gemini")} <= names
    assert all(hour["took_ms"]["p95"] >= hour["called_ms"]["p95"] > 0 for hour in slow["hours"])
    for query, field in (
        ("until=2026-01-04&since=2026-01-01", "until"),
        ("until=2026-01-01&since=2026-01-01", "until"),
        ("since=9999-12-31T23:00:00", "since"),
    ):
        status, problem = await ask(gateway, "GET", f"/admin/latency?{query}", AS_ADMIN)
        assert (status, problem["field"]) == (400, field), problem
