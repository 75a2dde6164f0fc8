"""Budgets are asked when a call is admitted: what waited before they were spent is not made."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.batching import begin, completed, content
from tests.gateway import Gateway, Opener
from tests.integration.accounting.test_budgets import called
from tests.integration.batches.conftest import MakeSdk, sdk
from tests.integration.native.test_totals import fronts
from tests.integration.tenants.asking import ADMIN_TOKEN, key_of, submitted
from tests.waiting import wait_until
from tidegate.jobs import calls

__all__ = ["sdk"]

ON: dict[str, Any] = {"auth": "on", "admin_token": ADMIN_TOKEN, "worker": False}
ANSWER_TOKENS = 500  # about; what is reserved for a call is more, from 800 to 1,100
BUDGET = 2_200
CALLS = 3  # that it takes to spend it


async def spending_slowly(gateway: Gateway, **behaviour: Any) -> dict[str, str]:
    """A tenant whose budget takes three calls, one after the other."""
    await gateway.upstream.set_behaviour(
        answer="four " * ANSWER_TOKENS, first_byte_ms=50, **behaviour
    )
    return await key_of(gateway, "acme", budget_day_tokens=BUDGET)


async def answers(gateway: Gateway, headers: dict[str, str], calls: int) -> list[int]:
    waiting = headers | {"x-tidegate-deadline-ms": "60000"}
    said = await asyncio.gather(
        *(called(gateway, number % 5, waiting, max_tokens=900) for number in range(calls))
    )
    for status, body, _ in said:
        assert status == 200 or "budget" in str(body)
    return [status for status, *_ in said]


@pytest.mark.parametrize("at_once", [1, 50])
async def test_what_waits_is_refused_once_the_budget_is_spent(
    open_gateway: Opener, at_once: int
) -> None:
    gateway = await open_gateway(**ON, rate_limits={"text_only": at_once})
    acme = await spending_slowly(gateway)
    said = await answers(gateway, acme, 60)
    made = await gateway.calls()
    assert said.count(200) == len(made)
    assert said.count(429) == 60 - len(made)
    # Those under way when it was spent had reserved what they would cost.
    assert len(made) == CALLS
    await wait_until(lambda: gateway.held == gateway.waiting == 0, 20, "all permits back")
    await wait_until(lambda: gateway.services.budgets.held == 0, 20, "nothing is reserved")


async def test_streams_of_ours_are_refused_as_well(open_gateway: Opener) -> None:
    gateway = await open_gateway(**ON, rate_limits={"text_only": 1})
    acme = await spending_slowly(gateway)

    async def stream() -> int:
        url, body = f"{gateway.url}/stream", {"data": "Tell me", "type": "text_only"}
        async with gateway.http.post(url, json=body, headers=acme) as response:
            await response.read()
            return response.status

    said = await asyncio.gather(*(stream() for _ in range(20)))
    assert said.count(200) == len(await gateway.calls()) == CALLS
    assert said.count(429) == 20 - CALLS
    await wait_until(lambda: gateway.held == gateway.waiting == 0, 20, "all permits back")


async def test_a_refused_call_has_spent_nothing_of_a_limit_of_tokens(
    open_gateway: Opener, tmp_path: Path
) -> None:
    policy = tmp_path / "tokens.toml"
    policy.write_text('[limits]\n"tpm:tenant/acme" = 1_000_000\n')
    gateway = await open_gateway(**ON, tidegate_policy=policy, rate_limits={"text_only": 2})
    acme = await spending_slowly(gateway)
    await answers(gateway, acme, 30)
    made = await gateway.calls()
    really = sum(call.input_tokens + call.output_tokens for call in made)

    async def settled() -> bool:
        view = (await gateway.services.limiter.snapshot()).limits["tpm:tenant/acme"]
        return (view.used, view.reserved) == (really, 0)

    await wait_until(settled, 20, f"{really} tokens spent and no more")


@pytest.mark.parametrize("wrapped", [False, True])
async def test_jobs_wait_for_a_budget_and_none_fails(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    monkeypatch.setattr(calls, "_SPENT_WAIT_MS", 400)
    gateway = await open_gateway(**ON, rate_limits={"text_only": 2})
    acme = await spending_slowly(gateway)
    path, body = fronts("Work")[0]
    job: dict[str, Any] = {"endpoint": path, "body": body} if wrapped else {"data": "Why?"}
    ids = [
        await submitted(gateway, acme, **(job if wrapped else job | {"type": "text_only"}))
        for _ in range(12)
    ]
    gateway.start_worker()

    async def states() -> list[str]:
        rows = await gateway.database.fetch("SELECT status FROM requests ORDER BY status")
        return [row["status"] for row in rows]

    async def stand_still() -> bool:
        rows = await gateway.database.fetch(
            "SELECT status, not_before FROM requests WHERE status <> 'succeeded'"
        )
        put_off = [row for row in rows if row["status"] == "queued" and row["not_before"]]
        return len(put_off) == len(rows) == 12 - CALLS

    await wait_until(stand_still, 30, "the jobs to wait for the budget")
    assert len(await gateway.calls()) == CALLS
    await gateway.services.store.tenants.set("acme", {"budget_day_tokens": None}, by="test")

    async def done() -> bool:
        return await states() == ["succeeded"] * 12

    await wait_until(done, 30, "all jobs")
    attempts = await gateway.database.fetchval("SELECT sum(attempts) FROM requests")
    assert attempts == len(await gateway.calls()) == len(ids)


async def test_lines_of_a_batch_reserve_too(open_gateway: Opener, sdk: MakeSdk) -> None:
    gateway = await open_gateway(**ON, rate_limits={"text_only": 50})
    acme = await spending_slowly(gateway)
    gateway.start_worker()
    key = acme["Authorization"].removeprefix("Bearer ")
    client = sdk(gateway, api_key=key, default_headers={})
    batch = await begin(client, content(40))

    async def halted() -> bool:
        busy = await gateway.database.fetchval(
            "SELECT count(*) FROM batch_lines WHERE state IN ('claimed', 'calling')"
        )
        return bool(busy == 0 and await completed(client, batch) >= CALLS)

    await wait_until(halted, 30, "a batch that stands still")
    assert len(await gateway.calls()) == CALLS
    assert (await client.batches.retrieve(batch.id)).status == "in_progress"
