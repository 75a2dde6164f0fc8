"""`tidegate why batch_...`: what the lines of a batch wait for."""

from __future__ import annotations

from typing import Any

from tests.batching import begin, end_of, jsonl, line, lines_of
from tests.commands import tidegate
from tests.gateway import Gateway, Opener, operators_headers
from tests.integration.accounting.test_budgets import spend, with_budgets
from tests.integration.batches.conftest import MakeSdk
from tests.waiting import wait_until
from tidegate.prices.budgets import Budget


async def why(gateway: Gateway, what: str) -> dict[str, Any]:
    url, headers = f"{gateway.url}/admin/why/{what}", operators_headers(gateway.config)
    async with gateway.http.get(url, headers=headers) as answer:
        assert answer.status == 200, await answer.read()
        found: dict[str, Any] = await answer.json()
        return found


async def test_a_batch_names_the_limit_that_its_lines_wait_for(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(
        worker=False, rate_limits={"text_only": 1}, first_byte_timeout_ms=5_000
    )
    client = sdk(gateway)
    await gateway.upstream.set_fault("hang", match="hold it")
    batch = await begin(client, jsonl([line(f"id-{n}", f"hold it {n}") for n in range(4)]))
    checked = await why(gateway, batch.id)
    assert (checked["what"], checked["status"]) == (batch.id, "validating")
    assert checked["sentence"] == "waits for a worker that checks its 4 lines"
    gateway.start_worker()
    await gateway.in_flight(1)

    async def held_up() -> dict[str, Any] | None:
        reason = await why(gateway, batch.id)
        # Not before a line has been called, and the next one waits in a worker.
        is_told = reason["held_up_by"] and reason["process"] and "has 3 of" in reason["sentence"]
        return reason if is_told else None

    reason = await wait_until(held_up, 20, "the limit that the lines wait for")
    assert (reason["held_up_by"], reason["status"]) == ("kind:text_only", "in_progress")
    assert reason["sentence"].startswith(
        "has 3 of 4 lines left to call; the next waits for kind:text_only: 1 of 1 are in use"
    )
    assert "higher priority" not in reason["next_action"]
    assert [one["limits"] for one in reason["holders"]]

    for what in (batch.id, batch.id[-8:], batch.id[:-4], f"msg{batch.id[:-4]}"):
        done = await tidegate(gateway, "why", what)
        assert (done.code, done.complained) == (0, ""), what
        assert done.said.startswith(f"{batch.id} {reason['sentence'].partition(', held by')[0]}")

    await gateway.upstream.clear_faults()
    await client.batches.cancel(batch.id)
    await end_of(client, batch)
    ended = await why(gateway, batch.id)
    assert ended["sentence"].startswith("waits for nothing: cancelled, ")
    assert ended["held_up_by"] is None

    missing = await tidegate(gateway, "why", f"batch_{'0' * 32}")
    assert missing.code != 0
    assert "there is no batch" in missing.complained


async def test_a_batch_names_the_budget_that_its_lines_wait_for(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(worker=False)
    client = sdk(gateway)
    batch = await begin(client, jsonl(line(f"id-{n}", f"say {n}") for n in range(3)))
    await with_budgets(gateway, Budget("small", "tokens", 9_000, "day", doubt="estimate"))
    await spend(gateway, "small", "", 8_999)
    gateway.start_worker()

    async def refused() -> dict[str, Any] | None:
        reason = await why(gateway, batch.id)
        return reason if "waits for a budget" in reason["sentence"] else None

    reason = await wait_until(refused, 20, "the budget that the lines wait for")
    assert reason["sentence"].startswith(
        "has 3 of 3 lines left to call; the next waits for a budget: the budget small has no room"
    )
    assert "`tidegate budgets resume small --extra-tokens N` allows" in reason["next_action"]
    await client.batches.cancel(batch.id)
    ended = await end_of(client, batch)
    said = await lines_of(client, ended.error_file_id)
    assert {one["error"]["code"] for one in said} == {"batch_cancelled"}
    assert await gateway.calls() == []
