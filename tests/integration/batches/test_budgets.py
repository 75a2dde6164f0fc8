"""Batches of tenants that have spent their budgets, or may do nothing any more."""

from __future__ import annotations

from functools import partial
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch

from tests.batching import assert_all_succeeded, begin, completed, content, end_of, lines_of
from tests.gateway import Gateway, Opener
from tests.integration.batches.conftest import MakeSdk
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, ask, key_of
from tests.waiting import wait_until

LINES = 60
# What is reserved for a line at least; it takes less.
A_LINE = 800
# In one look: what is held for a line goes back when it ends, and the next one is called.
HALTED = """
    SELECT min(b.amount - k.spent - k.held) < $1 AND NOT EXISTS (
        SELECT FROM batch_lines WHERE state IN ('claimed', 'calling')
    ) FROM budgets b JOIN budget_books k ON k.budget = b.name
"""
ON = {"auth": "on", "admin_token": ADMIN_TOKEN, "rate_limits": {"text_only": 2}}


async def with_key(
    gateway: Gateway, sdk: MakeSdk, tenant: str = "acme", **changes: Any
) -> AsyncOpenAI:
    headers = await key_of(gateway, tenant, **changes)
    key = headers["Authorization"].removeprefix("Bearer ")
    return sdk(gateway, api_key=key, default_headers={})


async def stands_still(gateway: Gateway, client: AsyncOpenAI, batch: Batch) -> int:
    """How many lines had been called when the batch came to a halt, with others left."""

    halted = partial(gateway.database.fetchval, HALTED, A_LINE)
    await wait_until(halted, 20, "a batch that stands still")
    done = await completed(client, batch)
    assert (await client.batches.retrieve(batch.id)).status == "in_progress"
    assert 0 < done < LINES
    assert len(await gateway.calls()) == done
    return done


async def test_a_batch_is_not_made_where_the_budget_is_spent(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(**ON | {"worker": False})
    client = await with_key(gateway, sdk, budget_day_tokens=0)
    file = await client.files.create(file=("in.jsonl", content(2)), purpose="batch")
    with pytest.raises(openai.RateLimitError) as refused:
        await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
    assert refused.value.code == "insufficient_quota"
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert await gateway.database.fetchval("SELECT count(*) FROM batches") == 0
    assert (await client.batches.list()).data == []


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["budget_day_tokens", "budget_month_money"])
async def test_a_batch_waits_while_a_budget_is_spent_and_then_goes_on(
    open_gateway: Opener, sdk: MakeSdk, tmp_path: Any, budget: str
) -> None:
    policy = tmp_path / "prices.toml"
    policy.write_text('[upstreams.gemini.prices]\n"*" = { input = 1, output = 1 }\n')
    gateway = await open_gateway(**ON | {"worker": False}, tidegate_policy=policy)
    await gateway.upstream.set_behaviour(first_byte_ms=300)
    most: Any = 1_500 if budget.endswith("tokens") else 0.0015
    client = await with_key(gateway, sdk, **{budget: most})
    gateway.start_worker()
    batch = await begin(client, content(LINES))
    await stands_still(gateway, client, batch)
    await gateway.upstream.set_behaviour(first_byte_ms=10)
    # Others go on beside it.
    other = await with_key(gateway, sdk, "other")
    await assert_all_succeeded(other, await end_of(other, await begin(other, content(3))), 3)
    await gateway.services.store.tenants.set("acme", {budget: None}, by="test")
    await assert_all_succeeded(client, await end_of(client, batch), LINES)


async def test_a_line_that_needs_more_than_a_whole_budget_fails(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(**ON | {"worker": False})
    client = await with_key(gateway, sdk, budget_day_tokens=10)
    gateway.start_worker()
    batch = await end_of(client, await begin(client, content(2)))
    assert batch.request_counts is not None
    assert (batch.status, batch.request_counts.failed) == ("completed", 2)
    assert batch.error_file_id is not None
    errors = (await client.files.content(batch.error_file_id)).text
    assert errors.count("it needs more than a whole period allows") == 2


async def test_a_batch_of_a_disabled_tenant_stands_still(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(**ON)
    await gateway.upstream.set_behaviour(first_byte_ms=300)
    client = await with_key(gateway, sdk)
    batch = await begin(client, content(LINES))

    async def begun() -> bool:
        return await completed(client, batch) > 0

    await wait_until(begun, 20, "a line that has ended")
    tenants = gateway.services.store.tenants
    await tenants.set("acme", {}, by="test", disabled=True)

    async def held() -> bool:
        busy = await gateway.database.fetchval(
            "SELECT count(*) FROM batch_lines WHERE state IN ('claimed', 'calling')"
        )
        return bool(busy == 0)

    await wait_until(held, 20, "a batch that stands still")
    _, why = await ask(gateway, "GET", f"/admin/why/{batch.id}", AS_ADMIN)
    assert why["sentence"].startswith("is paused while its tenant acme is disabled or removed; ")
    await gateway.database.execute("UPDATE batches SET expires_at = now()")
    await tenants.set("acme", {}, by="test", disabled=False)
    await gateway.services.gate.refresh()
    done = await end_of(client, batch)
    assert done.status == "expired"
    said = await lines_of(client, done.error_file_id)
    assert {one["error"]["code"] for one in said} == {"batch_expired"}
    assert len(said) + await completed(client, batch) == LINES
    assert len(await gateway.calls()) == await completed(client, batch)
