"""Budgets: who has spent what it may is told so, in each dialect, by every process."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.gateway import Gateway, Opener
from tests.integration.native.test_totals import VERSION, fronts
from tests.integration.tenants.asking import ADMIN_TOKEN, ask, key_of
from tests.waiting import wait_until
from tidegate.errors import BudgetExceeded
from tidegate.store.usage import _exceeded

BUDGET = 12_000
A_LOOK_S = 1.6  # a second, a call, and what it takes to write and to read on a busy machine
ON = {"auth": "on", "admin_token": ADMIN_TOKEN, "worker": False}


async def called(
    gateway: Gateway, number: int, headers: dict[str, str], **changes: Any
) -> tuple[int, Any, dict[str, str]]:
    path, body = fronts("Tell me of the sea")[number]
    url, named = gateway.url + path, headers | VERSION
    async with gateway.http.post(url, json=body | changes, headers=named) as response:
        said = {name.lower(): value for name, value in response.headers.items()}
        body = await response.json(content_type=None) if response.status >= 400 else {}
        await response.read()
        return response.status, body, said


async def test_a_spent_budget_is_told_in_the_words_of_each_dialect(open_gateway: Opener) -> None:
    gateway = await open_gateway(**ON)
    acme = await key_of(gateway, "acme", budget_day_tokens=1)
    other = await key_of(gateway, "other")
    assert (await called(gateway, 0, acme))[0] == 200
    until_midnight = 86_400 - (datetime.now(UTC) - _midnight()).total_seconds()
    status, openai, headers = await called(gateway, 0, acme)
    assert (status, openai["error"]["code"]) == (429, "insufficient_quota")
    assert openai["error"]["limit"] == "budget_day_tokens"
    assert headers["x-should-retry"] == "false"
    assert abs(int(headers["retry-after"]) - until_midnight) < 10
    status, gemini, _ = await called(gateway, 2, acme)
    assert (status, gemini["error"]["status"]) == (429, "RESOURCE_EXHAUSTED")
    status, anthropic, _ = await called(gateway, 4, acme)
    assert (status, anthropic["error"]["type"]) == (429, "rate_limit_error")
    for path in ("/submit", "/stream"):
        status, problem = await ask(gateway, "POST", path, acme, {"data": "Why?"})
        assert (status, problem["code"]) == (429, "budget_exceeded")
        assert "UTC" in problem["detail"]
        assert problem["limit"] == "budget_day_tokens"
    # What asks no model, and whoever has no budget, goes on.
    assert (await ask(gateway, "GET", "/usage", acme))[0] == 200
    async with gateway.http.get(f"{gateway.url}/v1/models", headers=acme) as response:
        assert response.status == 200
    assert (await called(gateway, 0, other))[0] == 200


async def test_what_is_known_under_a_key_is_told_to_who_has_spent_all(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(**ON)
    acme = await key_of(gateway, "acme", budget_day_tokens=1)
    known, new = acme | {"Idempotency-Key": "k-1"}, acme | {"Idempotency-Key": "k-2"}
    job = {"data": "Why?"}
    status, taken = await ask(gateway, "POST", "/submit", known, job)
    assert status == 202
    assert (await called(gateway, 0, known))[0] == 200
    assert (await called(gateway, 0, acme))[0] == 429
    status, _, headers = await called(gateway, 0, known)
    assert (status, headers["idempotency-replayed"]) == (200, "true")
    assert (await called(gateway, 0, known, temperature=1))[0] == 409
    status, again = await ask(gateway, "POST", "/submit", known, job)
    assert (status, again["request_id"]) == (202, taken["request_id"])
    # A key that nothing is known under opens nothing, and stays free.
    for _ in range(2):
        status, said, _ = await called(gateway, 0, new)
        assert (status, said["error"]["code"]) == (429, "insufficient_quota")
        status, problem = await ask(gateway, "POST", "/submit", new, job)
        assert (status, problem["code"]) == (429, "budget_exceeded")
    keys = await gateway.database.fetch("SELECT idempotency_key FROM native_keys")
    assert [row["idempotency_key"] for row in keys] == ["k-1"]
    assert len(await gateway.calls()) == 1


async def test_who_waits_under_a_key_for_an_answer_has_it_though_all_is_spent_meanwhile(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(**ON)
    acme = await key_of(gateway, "acme", budget_day_tokens=1)
    known = acme | {"Idempotency-Key": "k-1"}
    await gateway.upstream.set_behaviour(first_byte_ms=1_500)
    first = asyncio.create_task(called(gateway, 0, known))
    await gateway.in_flight(1)
    # All that is left is reserved for it: another call waits, and learns that it has spent all.
    other = asyncio.create_task(called(gateway, 0, acme))
    status, _, headers = await called(gateway, 0, known)
    assert (status, headers["idempotency-replayed"]) == (200, "true")
    assert (await first)[0] == 200
    assert (await other)[0] == 429
    assert len(await gateway.calls()) == 1


async def test_money_is_spent_too_and_a_model_without_a_price_adds_nothing(
    open_gateway: Opener, tmp_path: Path
) -> None:
    policy = tmp_path / "prices.toml"
    policy.write_text('[upstreams.gemini.prices]\n"dear" = { input = 1000, output = 1000 }\n')
    gateway = await open_gateway(**ON, tidegate_policy=policy)
    acme = await key_of(gateway, "acme", budget_month_money=0.01)
    for _ in range(3):
        assert (await called(gateway, 0, acme))[0] == 200  # no price
    assert (await called(gateway, 0, acme, model="dear"))[0] == 200
    status, said, headers = await called(gateway, 0, acme)
    assert (status, said["error"]["limit"]) == (429, "budget_month_money")
    assert int(headers["retry-after"]) >= (_next_month() - datetime.now(UTC)).total_seconds() - 10

    async def unpriced() -> bool:
        _, usage = await ask(gateway, "GET", "/usage", acme)
        return bool(usage["total"]["unpriced"] == 3)

    await wait_until(unpriced, 20, "three requests without a price")
    # A higher budget is in force within a second.
    await gateway.services.store.tenants.set("acme", {"budget_month_money": 1_000}, by="test")

    async def let_in() -> bool:
        return (await called(gateway, 0, acme))[0] == 200

    await wait_until(let_in, 20, "the higher budget")


async def test_two_processes_stop_within_what_is_in_flight_and_a_second(
    open_gateway: Opener,
) -> None:
    first = await open_gateway(**ON, rate_limits={"text_only": 8})
    second = await open_gateway(
        **ON, rate_limits={"text_only": 8}, gemini_base_url=first.config.gemini_base_url
    )
    acme = await key_of(first, "acme", budget_day_tokens=BUDGET)
    await first.upstream.set_behaviour(first_byte_ms=80)
    refused_at: dict[str, float] = {}
    let_in_at: list[float] = []
    loop = asyncio.get_running_loop()

    async def keep_asking(gateway: Gateway) -> None:
        while gateway.url not in refused_at:
            asked_at = loop.time()
            status, *_ = await called(gateway, 2, acme)
            if status == 429:
                refused_at.setdefault(gateway.url, asked_at)
            else:
                let_in_at.append(asked_at)

    await asyncio.gather(*(keep_asking(one) for one in (first, second) for _ in range(4)))
    spent = await _spent_at_the_end(first, len(let_in_at))
    last = max(refused_at.values())
    a_call = spent / len(let_in_at)
    within_a_look = [at for at in let_in_at if at > last - A_LOOK_S]
    assert BUDGET <= spent <= BUDGET + a_call * len(within_a_look)
    assert spent < 2 * BUDGET  # which each by itself would have come to
    for gateway in (first, second):
        assert (await called(gateway, 2, acme))[0] == 429


async def _spent_at_the_end(gateway: Gateway, calls: int) -> int:
    async def recorded() -> bool:
        count: int = await gateway.database.fetchval(
            "SELECT count(*) FROM audit WHERE status = 'succeeded'"
        )
        return count == calls

    await wait_until(recorded, 20, "all records")
    spent: int = await gateway.database.fetchval(
        "SELECT sum(input_tokens + output_tokens + thoughts_tokens)::bigint FROM usage_days"
    )
    return spent


async def test_what_was_spent_before_a_start_counts(
    open_gateway: Opener, database_url: str
) -> None:
    gateway = await open_gateway(**ON)
    acme = await key_of(gateway, "acme", budget_day_tokens=500, budget_month_tokens=900)
    connection = await asyncpg.connect(database_url)
    today = datetime.now(UTC).date()
    await connection.execute(
        "INSERT INTO usage_days (tenant_id, day, model, pool, output_tokens)"
        " VALUES ('acme', $1, 'm', 'gemini', 500), ('acme', $2, 'm', 'gemini', 9999)",
        today,
        today.replace(day=1) - timedelta(days=1),
    )
    await connection.close()
    status, said, _ = await called(gateway, 0, acme)
    assert (status, said["error"]["limit"]) == (429, "budget_day_tokens")


@pytest.mark.parametrize(
    ("limit", "now", "ends"),
    [
        ("budget_day_tokens", "2026-02-28T23:59:50", "2026-03-01 00:00"),
        ("budget_month_tokens", "2026-02-28T23:59:50", "2026-03-01 00:00"),
        ("budget_month_money", "2026-12-01T00:00:00", "2027-01-01 00:00"),
        ("budget_month_money", "2026-01-31T12:00:00", "2026-02-01 00:00"),
    ],
)
def test_a_period_ends_in_utc(limit: str, now: str, ends: str) -> None:
    error: BudgetExceeded = _exceeded("a", limit, 5, 6, datetime.fromisoformat(f"{now}+00:00"))
    assert f"begins at {ends} UTC" in error.message
    assert error.retry_after_ms is not None


def _midnight() -> datetime:
    return datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _next_month() -> datetime:
    return (_midnight().replace(day=1) + timedelta(days=32)).replace(day=1)
