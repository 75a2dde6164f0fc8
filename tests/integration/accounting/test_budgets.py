"""Budgets over HTTP: what they refuse, in each dialect and process, and what they let through."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.gateway import PNG, Gateway, Opener
from tests.integration.native.test_totals import VERSION, fronts
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, ask, key_of, submitted
from tests.waiting import wait_until
from tests.zones import ZONE, set_clock
from tidegate.emulator.server import run_emulator
from tidegate.jobs import calls
from tidegate.prices import budgets as prices
from tidegate.prices.budgets import Budget, Dimension
from tidegate.spine import run
from tidegate.store import budgets as store_budgets
from tidegate.store import notifications
from tidegate.store.budgets import Budgets
from tidegate.usual_models import EMULATORS_KEY

ON = {"auth": "on", "admin_token": ADMIN_TOKEN, "worker": False}
BOUND = 90  # of an answer, in tokens


async def called(
    gateway: Gateway, number: int, headers: dict[str, str], **changes: Any
) -> tuple[int, Any, dict[str, str]]:
    path, body = fronts("Tell me of the sea")[number]
    if "generateContent" in path or "streamGenerate" in path:
        most = changes.pop("max_tokens", BOUND)
        body = body | {"generationConfig": {"maxOutputTokens": most}}
    else:
        name = "max_output_tokens" if path.endswith("responses") else "max_tokens"
        body = body | {name: changes.pop("max_tokens", BOUND)}
    url, named = gateway.url + path, headers | VERSION
    async with gateway.http.post(url, json=body | changes, headers=named) as response:
        said = {name.lower(): value for name, value in response.headers.items()}
        body = await response.json(content_type=None) if response.status >= 400 else {}
        await response.read()
        return response.status, body, said


async def with_budgets(gateway: Gateway, *budgets: Budget) -> None:
    """Have budgets in force at this gateway."""
    store = gateway.services.store
    for one in budgets:
        await store.budgets.records.set(one, by="test")
    await store.budgets.refresh()


async def spend(gateway: Gateway, name: str, scope: str, amount: int) -> None:
    """Have so much of a budget spent in its present period."""
    await gateway.database.execute(
        "INSERT INTO budget_books (budget, scope, period, spent)"
        " SELECT name, $2, budget_period(period, zone, now()), $3 FROM budgets WHERE name = $1"
        " ON CONFLICT (budget, scope, period) DO UPDATE SET spent = excluded.spent",
        *(name, scope, amount),
    )


async def test_a_spent_budget_is_told_in_the_words_of_each_dialect(open_gateway: Opener) -> None:
    gateway = await open_gateway(**ON)
    await gateway.database.execute(
        "INSERT INTO usage_days (tenant_id, day, model, pool, output_tokens)"
        " VALUES ('acme', $1, 'm', 'gemini', 5000)",
        datetime.now(UTC).date(),
    )
    acme = await key_of(gateway, "acme", budget_day_tokens=5_000)
    other = await key_of(gateway, "other")
    until_midnight = 86_400 - (datetime.now(UTC) - _midnight()).total_seconds()
    status, openai, headers = await called(gateway, 0, acme)
    assert (status, openai["error"]["code"]) == (429, "insufficient_quota")
    assert openai["error"]["limit"] == "budget_day_tokens"
    said = openai["error"]["message"]
    assert "5,000 tokens of 5,000 tokens spent" in said
    assert f"it resets at {_midnight() + timedelta(days=1):%Y-%m-%d %H:%M} UTC" in said
    assert headers["x-should-retry"] == "false"
    assert abs(int(headers["retry-after"]) - until_midnight) < 10
    status, gemini, _ = await called(gateway, 2, acme)
    assert (status, gemini["error"]["status"]) == (429, "RESOURCE_EXHAUSTED")
    status, anthropic, _ = await called(gateway, 4, acme)
    assert (status, anthropic["error"]["type"]) == (429, "rate_limit_error")
    status, problem = await ask(
        gateway, "POST", "/stream", acme, {"data": "W?", "type": "text_only"}
    )
    assert (status, problem["code"]) == (429, "budget_exceeded")
    assert await gateway.calls() == []
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
    acme = await key_of(gateway, "acme", budget_day_tokens=1_000_000)
    known, new = acme | {"Idempotency-Key": "k-1"}, acme | {"Idempotency-Key": "k-2"}
    job = {"data": "Why?"}
    status, taken = await ask(gateway, "POST", "/submit", known, job)
    assert status == 202
    assert (await called(gateway, 0, known))[0] == 200
    await gateway.services.store.tenants.set("acme", {"budget_day_tokens": 1}, by="test")
    await gateway.services.store.budgets.refresh()
    assert (await called(gateway, 0, acme))[0] == 429
    status, _, headers = await called(gateway, 0, known)
    assert (status, headers["idempotency-replayed"]) == (200, "true")
    assert (await called(gateway, 0, known, temperature=1))[0] == 409
    status, again = await ask(gateway, "POST", "/submit", known, job)
    assert (status, again["request_id"]) == (202, taken["request_id"])
    # A key that nothing is known under opens nothing, and stays free.
    await wait_until(lambda: gateway.services.budgets.held == 0, 20, "all is settled")
    for _ in range(2):
        status, said, _ = await called(gateway, 0, new)
        assert (status, said["error"]["code"]) == (429, "insufficient_quota")
        status, problem = await ask(gateway, "POST", "/submit", new, job)
        assert (status, problem["code"]) == (429, "budget_exceeded")
        assert "has nothing left: " in problem["detail"], "what it takes is not known yet"

    async def keys() -> list[str]:
        """Of the last refusal the key may be freed only after its answer."""
        rows = await gateway.database.fetch("SELECT idempotency_key FROM native_keys")
        return [row["idempotency_key"] for row in rows]

    async def is_free() -> bool:
        return "k-2" not in await keys()

    await wait_until(is_free, 20, "the key of refused calls")
    assert await keys() == ["k-1"]
    assert len(await gateway.calls()) == 1


async def test_money_is_spent_too_and_an_unpriced_call_is_refused_or_estimated(
    open_gateway: Opener, tmp_path: Path
) -> None:
    policy = tmp_path / "prices.toml"
    policy.write_text('[upstreams.gemini.prices]\n"dear" = { input = 1000, output = 1000 }\n')
    gateway = await open_gateway(**ON, tidegate_policy=policy)
    acme = await key_of(gateway, "acme", budget_month_money=0.25)
    for _ in range(3):
        assert (await called(gateway, 0, acme))[0] == 200  # no price: estimated as nothing
    # About 200 bytes and 90 tokens of an answer are $0.25 at most: one such call fits.
    assert (await called(gateway, 0, acme, model="dear", max_tokens=10))[0] == 200
    status, said, headers = await called(gateway, 0, acme, model="dear")
    assert (status, said["error"]["limit"]) == (429, "budget_month_money")
    assert "of $0.25 spent" in said["error"]["message"]
    assert int(headers["retry-after"]) >= (_next_month() - datetime.now(UTC)).total_seconds() - 10
    # A higher budget is in force within a second.
    await gateway.services.store.tenants.set("acme", {"budget_month_money": 1_000}, by="test")

    async def admitted() -> bool:
        return (await called(gateway, 0, acme, model="dear"))[0] == 200

    await wait_until(admitted, 20, "the higher budget")
    hard = await key_of(gateway, "hard")
    await with_budgets(gateway, Budget("h", "usd", 10**9, "day", tenant="hard"))
    status, said, headers = await called(gateway, 0, hard)
    assert (status, said["error"]["limit"]) == (403, "h")
    assert "the price of its model is not known" in said["error"]["message"]
    assert headers["x-should-retry"] == "false"
    status, said, _ = await called(gateway, 0, hard, model="dear", max_tokens=0)
    assert "it has no max_tokens" in said["error"]["message"]
    assert (await called(gateway, 0, hard, model="dear"))[0] == 200


async def test_emulated_answers_cost_what_geminis_would_so_that_a_budget_can_be_tried(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(**ON, gemini_api_key=EMULATORS_KEY)
    acme = await key_of(gateway, "acme")
    await with_budgets(gateway, Budget("acme-day", "usd", 200_000, "day", tenant="acme"))
    for most in (200, None):  # without a bound of the call that of the model
        status, said, _ = await called(gateway, 0, acme, model="gemini-2.5-flash", max_tokens=most)
        assert status == 200, said

    async def charged() -> list[Any]:
        rows = await gateway.database.fetch("SELECT cost_micros FROM audit")
        return [row[0] for row in rows] if len(rows) == 2 else []

    costs = await wait_until(charged, 20, "two calls on record")
    assert all(costs)
    (book,) = await gateway.services.budgets.records.books("acme-day")
    assert book.spent == sum(costs)
    status, said, _ = await called(gateway, 0, acme, model="gemini-2.5-flash", max_tokens=100_000)
    assert (status, said["error"]["limit"]) == (429, "acme-day")


async def test_two_processes_never_spend_more_than_there_is(open_gateway: Opener) -> None:
    first = await open_gateway(**ON, rate_limits={"text_only": 8})
    second = await open_gateway(
        **ON, rate_limits={"text_only": 8}, gemini_base_url=first.config.gemini_base_url
    )
    most = 5_000
    acme = await key_of(first, "acme", budget_day_tokens=most)
    await second.services.store.budgets.refresh()
    await first.upstream.set_behaviour(first_byte_ms=40)
    spent_at: set[str] = set()

    async def keep_asking(gateway: Gateway) -> None:
        while gateway.url not in spent_at:
            status, body, _ = await called(gateway, 2, acme)
            if status == 429 and "resets at" in body["error"]["message"]:
                spent_at.add(gateway.url)

    await asyncio.gather(*(keep_asking(one) for one in (first, second) for _ in range(4)))
    calls = await first.calls()
    spent = sum(one.input_tokens + one.output_tokens + one.thoughts_tokens for one in calls)
    assert spent <= most
    a_call = BOUND + 250  # at most: what was left did not suffice for one more
    assert spent > most - a_call
    book = await settled_book(first, "acme/budget_day_tokens")
    assert book["spent"] == spent


async def settled_book(gateway: Gateway, name: str) -> asyncpg.Record:
    """The one book of a budget, once nothing is held of it."""
    query = "SELECT spent, estimated, held FROM budget_books WHERE budget = $1"

    async def settled() -> bool:
        held = await gateway.database.fetchval(f"SELECT sum(held) FROM ({query}) AS b", name)
        return bool(held == 0)

    await wait_until(settled, 20, "what is held is settled")
    (book,) = await gateway.database.fetch(query, name)
    return book


async def test_what_was_spent_before_a_budget_was_set_counts(open_gateway: Opener) -> None:
    gateway = await open_gateway(**ON)
    today = datetime.now(UTC).date()
    await gateway.database.execute(
        "INSERT INTO usage_days (tenant_id, day, model, pool, output_tokens)"
        " VALUES ('acme', $1, 'm', 'gemini', 500), ('acme', $2, 'm', 'gemini', 9999)",
        today,
        today.replace(day=1) - timedelta(days=1),
    )
    acme = await key_of(gateway, "acme", budget_day_tokens=500, budget_month_tokens=9_000)
    status, said, _ = await called(gateway, 0, acme)
    assert (status, said["error"]["limit"]) == (429, "budget_day_tokens")
    assert "500 tokens of 500 tokens spent" in said["error"]["message"]


@pytest.mark.parametrize("each", [(), ("subject",)])
async def test_what_was_spent_before_counts_by_any_pattern_of_models(
    open_gateway: Opener, each: tuple[Dimension, ...]
) -> None:
    """The first is read from the sums of days, the second from the calls."""
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_behaviour(answer="yes")
    for model in ("m-1", "m-4", "models-1"):
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
        async with gateway.http.post(f"{gateway.url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
    query = "SELECT count(*) FROM audit"
    await wait_until(lambda: recorded(gateway, query, 3), 20, "three calls on record")
    spent = await gateway.database.fetchval(
        "SELECT sum(input_tokens + output_tokens) FROM audit WHERE model = 'm-1'"
    )
    await with_budgets(gateway, Budget("b", "tokens", 999, "day", model="m-[1-3]", each=each))
    (book,) = await gateway.services.budgets.records.books("b")
    assert book.spent == spent > 0


async def recorded(gateway: Gateway, query: str, count: int) -> bool:
    return bool(await gateway.database.fetchval(query) == count)


async def test_each_person_has_a_budget_and_calls_without_one_share(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await with_budgets(gateway, Budget("each", "tokens", 350, "day", each=("subject",)))
    await gateway.upstream.set_behaviour(answer="yes")
    for subject in ("ann", "bob", None, None, "ann"):
        headers: dict[str, str] = {} if subject is None else {"x-tidegate-subject": subject}
        assert (await called(gateway, 0, headers))[0] == 200
    status, said, _ = await called(gateway, 0, {"x-tidegate-subject": "ann"}, max_tokens=300)
    assert (status, said["error"]["limit"]) == (429, "each")
    assert "the budget each of ann has no room" in said["error"]["message"]
    assert (await called(gateway, 0, {"x-tidegate-subject": "eve"}))[0] == 200
    await with_budgets(gateway, Budget("talk", "tokens", 10, "day", conversation="c-1", model="m"))
    assert (await called(gateway, 0, {"x-tidegate-conversation": "c-1"}))[0] == 429
    assert (await called(gateway, 0, {"x-tidegate-conversation": "c-2"}))[0] == 200


async def test_a_call_that_waits_for_what_is_reserved_is_told_so_at_its_deadline(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    within_ms = 60_000
    monkeypatch.setattr(run, "_LAST_TRY_MS", within_ms)  # after which it tries no more
    gateway = await open_gateway(worker=False)
    await with_budgets(gateway, Budget("day", "tokens", 1_200, "day", doubt="estimate"))
    await gateway.upstream.set_fault("hang", count=1)
    first = asyncio.create_task(called(gateway, 0, {}, max_tokens=700))
    await gateway.in_flight(1)
    status, said, headers = await called(
        gateway, 0, {"x-tidegate-deadline-ms": f"{within_ms}"}, max_tokens=700
    )
    assert (status, said["error"]["code"]) == (429, "budget_reserved")
    assert (said["error"]["limit"], headers["retry-after"]) == ("day", "1")
    assert len(await gateway.calls()) == 1
    first.cancel()


async def test_a_call_that_waits_for_what_is_reserved_has_waited_in_its_record_too(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    await with_budgets(gateway, Budget("day", "tokens", 1_200, "day", doubt="estimate"))
    await gateway.upstream.set_fault("hang", count=1)
    room, began = Budgets.room, []

    async def waiting(budgets: Budgets, within_s: float) -> None:
        began.append(time.monotonic())
        await room(budgets, within_s)

    monkeypatch.setattr(Budgets, "room", waiting)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(called(gateway, 0, {}, max_tokens=700))
        await gateway.in_flight(1)
        second = group.create_task(called(gateway, 0, {}, max_tokens=700))
        await wait_until(lambda: len(began) >= 3, 20, "a while in which it waits")
        waited_ms = (began[2] - began[0]) * 1000
        first.cancel()
    status, _, headers = second.result()
    assert status == 200
    assert float(headers["x-tidegate-queue-ms"]) >= waited_ms


async def test_a_spent_budget_falls_back_to_its_cheaper_model(
    open_gateway: Opener, tmp_path: Path
) -> None:
    policy = tmp_path / "prices.toml"
    policy.write_text(
        '[upstreams.gemini.prices]\n"dear" = { input = 1000, output = 1000 }\n'
        '"cheap" = { input = 1, output = 1 }\n'
    )
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    await with_budgets(
        gateway,
        Budget("b", "usd", 100_000, "day", at_end="fall_back", fallback="cheap"),
    )
    for number in (0, 2, 4):
        model = {"model": "dear"} if number != 2 else {}
        assert (await called(gateway, number, {}, **model))[0] == (200 if number != 2 else 403)
    assert [one.model for one in await gateway.calls()] == ["cheap", "cheap"]
    records = "SELECT DISTINCT model FROM audit WHERE status = 'succeeded'"

    async def recorded() -> bool:
        return [row["model"] for row in await gateway.database.fetch(records)] == ["cheap"]

    await wait_until(recorded, 20, "both records")


async def test_the_cheaper_upstream_is_called_where_a_budget_refuses_the_dear_one(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk")
    policy = tmp_path / "two.toml"
    async with run_emulator() as provider:
        lines = ['[[routes]]\nmodel = "smart"\ntry = ["dear/m", "free/m", "cheap/m"]']
        for name, price in (("dear", 1000), ("free", None), ("cheap", 1)):
            lines += [f"[upstreams.{name}]", f'base_url = "{provider.url}"', 'models = ["m"]']
            lines += ['key = "SOME_KEY"', 'provider = "anthropic"']
            if price is not None:
                lines += [f"[upstreams.{name}.prices]", f"m = {{ input = {price}, output = 1 }}"]
        policy.write_text("\n".join(lines))
        gateway = await open_gateway(worker=False, tidegate_policy=policy)
        await with_budgets(gateway, Budget("b", "usd", 100_000, "day"))
        status, said, _ = await called(gateway, 4, {}, model="smart")
        assert status == 200, said
        # Of none that is left the first refusal is told; no day has room for as much.
        status, said, headers = await called(gateway, 4, {}, model="smart", max_tokens=200_000)
        assert (status, said["error"]["type"]) == (429, "rate_limit_error")
        assert "retry-after" not in headers
    records = "SELECT upstream, status FROM audit ORDER BY created_at"

    async def both() -> list[Any]:
        return [tuple(row) for row in await gateway.database.fetch(records)]

    async def recorded() -> bool:
        return len(await both()) == 2

    await wait_until(recorded, 20, "both records")
    assert (await both())[0] == ("cheap", "succeeded")
    assert (await settled_book(gateway, "b"))["spent"] < 1_000


async def test_a_call_of_the_cheaper_model_that_waits_for_a_drained_upstream_goes_elsewhere(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk")
    policy = tmp_path / "three.toml"
    async with run_emulator() as provider:
        lines = []
        for name, model in (("dear", "dear"), ("cheap", "mini"), ("any", "*")):
            lines += [f"[upstreams.{name}]", f'base_url = "{provider.url}"', 'key = "SOME_KEY"']
            lines += ['provider = "anthropic"', f'models = ["{model}"]']
            lines += [f"[upstreams.{name}.prices]", "dear = { input = 1000, output = 1000 }"]
            lines += ["mini = { input = 1, output = 1 }"]
        policy.write_text("\n".join(lines))
        gateway = await open_gateway(worker=False, tidegate_policy=policy)
        budget = Budget("b", "usd", 100_000, "day", at_end="fall_back", fallback="mini")
        await with_budgets(gateway, budget)
        limiter = gateway.services.limiters["cheap"]
        await limiter.penalise("model:mini", for_ms=50_000, ramp_ms=1)
        waits = {"x-tidegate-deadline-ms": "100000"}
        call = asyncio.create_task(called(gateway, 4, waits, model="dear"))
        await wait_until(lambda: limiter.waiters == 1, what="it waits for the cheaper model")
        drain = f"{gateway.url}/admin/upstreams/cheap/drain"
        async with gateway.http.post(drain, json={"by": "ada"}) as answer:
            assert answer.status == 200, await answer.text()
        status, said, headers = await call
        assert (status, headers["x-tidegate-upstream"]) == (200, "any"), said


async def test_a_conversation_leaves_the_order_of_its_cheaper_models_route_as_it_is(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk")
    policy = tmp_path / "two.toml"
    async with run_emulator() as provider:
        lines = ['[[routes]]\nmodel = "cheap"\ntry = ["one/m", "two/m"]']
        for name in ("one", "two"):
            lines += [f"[upstreams.{name}]", f'base_url = "{provider.url}"', 'key = "SOME_KEY"']
            lines += ['provider = "anthropic"', 'models = ["dear", "m"]']
            lines += [f"[upstreams.{name}.prices]", "dear = { input = 1000, output = 1000 }"]
            lines += ["m = { input = 1, output = 1 }"]
        policy.write_text("\n".join(lines))
        gateway = await open_gateway(worker=False, tidegate_policy=policy)
        budget = Budget("b", "usd", 100_000, "day", at_end="fall_back", fallback="cheap")
        await with_budgets(gateway, budget)
        for number in range(6):
            talk = {"x-tidegate-conversation": f"c-{number}"}
            status, said, headers = await called(gateway, 4, talk, model="dear")
            assert (status, headers["x-tidegate-upstream"]) == (200, "one"), said
    assert not gateway.services.spine.affinity._warm, "nothing is known of the dear one's cache"


async def test_streams_and_jobs_are_bound_by_the_budget_of_their_conversation(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    talk = Budget("talk", "tokens", 9_000, "day", conversation="c-1", doubt="estimate")
    await with_budgets(gateway, talk)
    await spend(gateway, "talk", "", 8_999)
    mine = {"data": "Why is the sea salty?", "type": "text_only", "conversation": "c-1"}
    status, problem = await ask(gateway, "POST", "/stream", {}, mine)
    assert (status, problem["limit"]) == (429, "talk")
    other = mine | {"conversation": "c-2"}
    assert (await ask(gateway, "POST", "/stream", {}, other))[0] == 200
    gateway.start_worker()  # which knows the budget from its first call on
    # A job whose conversation has something left is taken, and waits where its call is refused.
    body = {"model": "m", "max_tokens": 90, "messages": [{"role": "user", "content": "Hi"}]}
    wrapped = {"endpoint": "/v1/chat/completions", "body": body, "conversation": "c-1"}
    for job in (mine, wrapped):
        status, taken = await ask(gateway, "POST", "/submit", {}, job)
        assert status == 202
        said = await refused_once(gateway, taken["request_id"])
        assert said["error"]["code"] == "budget_exceeded"
    assert len(await gateway.calls()) == 1
    _, bad = await ask(gateway, "POST", "/submit", {}, mine | {"conversation": 5})
    assert bad["field"] == "conversation"


async def refused_once(gateway: Gateway, request_id: str) -> dict[str, Any]:
    """The status of a job once a budget has refused it, while it waits to be tried again."""
    said: dict[str, Any] = {}

    async def refused() -> bool:
        nonlocal said
        _, said = await ask(gateway, "GET", f"/status/{request_id}", {})
        return "error" in said and said["status"] == "queued"

    await wait_until(refused, 20, "the refusal")
    return said


async def test_a_job_of_unknown_cost_is_refused_or_waits_for_a_person(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_SPENT_WAIT_MS", 2_000)
    policy = tmp_path / "prices.toml"
    policy.write_text('[upstreams.gemini.prices]\n"dear" = { input = 1, output = 1 }\n')
    gateway = await open_gateway(tidegate_policy=policy, worker=False)
    hard = Budget("hard", "usd", 10**9, "day")
    await with_budgets(gateway, hard)
    messages = [{"role": "user", "content": "Hi"}]
    for body, why in (
        ({"model": "m", "messages": messages, "max_tokens": 9}, "the price of its model"),
        ({"model": "dear", "messages": messages}, "it has no max_tokens"),
    ):
        wrapped = {"endpoint": "/v1/chat/completions", "body": body}
        status, problem = await ask(gateway, "POST", "/submit", {}, wrapped)
        assert (status, problem["code"], problem["limit"]) == (403, "budget_unbounded", "hard")
        assert why in problem["detail"]
    assert (await ask(gateway, "POST", "/submit", {}, {"data": "W?", "type": "text_only"}))[
        0
    ] == 403
    assert await gateway.database.fetchval("SELECT count(*) FROM requests") == 0
    gateway.start_worker()
    # What can't be known at its submission waits, says for what, and goes on.
    request_id = await submitted(gateway, {}, data="What is in it?", file=PNG)
    said = await refused_once(gateway, request_id)
    assert said["error"]["code"] == "budget_unbounded"

    async def told() -> bool:
        _, why = await ask(gateway, "GET", f"/requests/{request_id}/why", {})
        sentence: str = why["sentence"]
        way_out = "`tidegate budgets set hard --doubt estimate`"
        return (
            sentence.startswith("waits for a budget: the budget hard applies to this call")
            and way_out in sentence
        )

    await wait_until(told, 20, "why it waits")
    await with_budgets(gateway, replace(hard, doubt="estimate"))

    async def done() -> bool:
        _, status = await ask(gateway, "GET", f"/status/{request_id}", {})
        return bool(status["status"] == "succeeded")

    await wait_until(done, 20, "its end")


async def test_a_budget_whose_name_has_a_line_break_is_refused_by_its_field(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(**ON)
    url = f"{gateway.url}/admin/budgets/a%0Ab"
    async with gateway.http.put(url, json={"usd": 1}, headers=AS_ADMIN) as answer:
        assert (answer.status, (await answer.json())["field"]) == (400, "name")
    async with gateway.http.delete(url, headers=AS_ADMIN) as answer:
        assert answer.status == 404


async def test_a_paused_budget_goes_on_once_it_is_resumed(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await with_budgets(gateway, Budget("p", "tokens", 2_000, "day", at_end="pause"))
    status, said, _ = await called(gateway, 0, {}, max_tokens=5_000)
    assert (status, "has no room for this call" in said["error"]["message"]) == (429, True)
    assert (await called(gateway, 0, {}))[0] == 200, "one that needs too much stops no other"
    await spend(gateway, "p", "", 2_000)
    for number, expected in ((0, 403), (4, 429)):
        status, said, headers = await called(gateway, number, {})
        assert (status, "retry-after" in headers) == (expected, False), "nobody knows for how long"
        assert "a person must resume it" in said["error"]["message"]
    records = gateway.services.budgets.records
    assert await records.resume("p", scope=None, extra=2_000, by="test") == [""]
    await gateway.services.budgets.refresh()
    assert (await called(gateway, 0, {}))[0] == 200


async def test_a_budget_that_jobs_have_spent_is_paused_until_a_person_resumes_it(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    budget = Budget("p", "tokens", 2_000, "day", doubt="estimate", at_end="pause")
    await with_budgets(gateway, budget)
    gateway.start_worker()  # which knows the budget from its first call on
    await gateway.submit(data="Explain the tide", type="text_only")
    books = "SELECT spent FROM budget_books WHERE spent > 0"
    await wait_until(lambda: gateway.database.fetch(books), 20, "a charge")
    await spend(gateway, "p", "", 2_030)
    waits = await gateway.submit(data="Explain the moon", type="text_only")

    async def paused() -> bool:
        error = (await gateway.status(waits)).get("error") or {}
        return bool(error.get("code") == "budget_paused")

    await wait_until(paused, 20, "a pause of the budget")
    asked = {"data": "Explain the sun", "type": "text_only"}
    async with gateway.http.post(f"{gateway.url}/submit", json=asked) as refused:
        assert (refused.status, (await refused.json())["code"]) == (429, "budget_paused")


async def test_a_budget_binds_calls_while_postgresql_is_away_and_others_go_on(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    await with_budgets(gateway, Budget("t", "tokens", 10**6, "day", tenant="acme"))
    connections = gateway.services.store.connections
    acme = {"x-tidegate-tenant": "acme"}

    async def no_answer(_timeout_s: float) -> asyncpg.Connection:
        raise OSError("a test")

    with monkeypatch.context() as outage:
        outage.setattr(connections, "_answered", no_answer)
        connections._mark_down("a test")
        status, said, _ = await called(gateway, 0, acme)
        assert (status, said["error"]["code"]) == (503, "store_unavailable")
        assert (await called(gateway, 0, {}))[0] == 200
        assert len(await gateway.calls()) == 1

    async def back() -> bool:
        return (await called(gateway, 0, acme))[0] == 200

    await wait_until(back, 20, "PostgreSQL")


def _midnight() -> datetime:
    return datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _next_month() -> datetime:
    return (_midnight().replace(day=1) + timedelta(days=32)).replace(day=1)


async def test_the_use_of_budgets_is_in_the_metrics(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await with_budgets(
        gateway,
        Budget("day", "tokens", 1_000, "day"),
        Budget("people", "tokens", 10, "day", each=("subject",), at_end="pause", tenant="acme"),
    )
    await spend(gateway, "people", '["ann"]', 10)
    assert (await called(gateway, 0, {}))[0] == 200
    acme = {"x-tidegate-tenant": "acme", "x-tidegate-subject": "ann"}
    assert (await called(gateway, 0, acme))[0] == 403
    await settled_book(gateway, "day")

    async def shown() -> bool:
        async with gateway.http.get(f"{gateway.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("tidegate_budget"))
        used = float(values.get('tidegate_budget_used_ratio{budget="day"}', 0))
        paused = values.get('tidegate_budget_paused{budget="people"}')
        return 0 < used < 1 and paused == "1.0" and len(values) == 3

    await wait_until(shown, 20, "the metrics of budgets")


async def test_a_question_of_the_classifier_is_charged_to_the_budgets_of_its_tenant_alone(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(**ON, classifier="llm", classifier_timeout_ms=10_000)
    acme = await key_of(gateway, "acme")
    prefix = await gateway.database.fetchval("SELECT prefix FROM keys")
    await with_budgets(
        gateway,
        Budget("tenant", "tokens", 10**9, "day", tenant="acme", doubt="estimate"),
        Budget("key", "tokens", 10**9, "day", key=prefix, doubt="estimate"),
    )
    prompt = {"data": "A lighthouse at dusk, oil on canvas"}
    async with gateway.http.post(f"{gateway.url}/stream", json=prompt, headers=acme) as response:
        assert response.status == 200
        await response.read()
    kinds = [one.kind for one in await gateway.upstream.calls()]
    assert len(kinds) == 2
    assert kinds[0] == "classifier"
    await wait_until(lambda: gateway.services.budgets.held == 0, 10, "all is settled")
    books = await gateway.services.store.budgets.records.books()
    spent = {one.budget: one.spent for one in books}
    # Charges are written with the record, or before it where that is late.
    query = (
        "SELECT source, input_tokens + output_tokens + coalesce(thoughts_tokens, 0) AS tokens"
        " FROM audit"
    )
    calls = await wait_until(lambda: gateway.database.fetch(query), 20, "the record")
    assert [(row["source"], row["tokens"]) for row in calls] == [("stream", spent["key"])]
    assert spent["tenant"] > spent["key"] > 0


async def test_what_is_remembered_of_refusals_is_bounded(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients name whom a budget has a book of, and a refusal costs them nothing."""
    monkeypatch.setattr(prices, "MOST_REMEMBERED", 3)
    gateway = await open_gateway(**ON)
    acme = await key_of(gateway, "acme")
    await with_budgets(gateway, Budget("each", "tokens", 50, "day", each=("conversation",)))
    for name in ("1", "2", "3", "4", "5"):
        status, _, _ = await called(gateway, 0, acme | {"x-tidegate-conversation": name})
        assert status == 429
    known = [scope for _, scope in gateway.services.budgets._refusals.books]
    assert len(known) == 3
    assert "5" in known[-1]


@pytest.mark.parametrize("minutes", [-10, 10])
async def test_the_end_of_a_period_is_told_by_the_clock_of_postgresql(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch, minutes: int
) -> None:
    """Before the end of a period, a process ahead of it told calls and jobs to come again each
    second, and one behind it told them to wait for that much longer."""
    set_clock(monkeypatch, timedelta(minutes=minutes), (notifications, prices, store_budgets))
    gateway = await open_gateway(worker=False)
    await wait_until(gateway.services.store.notifications.is_sure, 20, "PostgreSQL's clock")
    await with_budgets(gateway, Budget("day", "tokens", 900, "day", zone=ZONE))
    await spend(gateway, "day", "", 900)
    left_s = "SELECT extract(epoch FROM budget_reset('day', $1, now()) - now())::float"
    before_s = await gateway.database.fetchval(left_s, ZONE)
    reset_at = "SELECT extract(epoch FROM budget_reset('day', $1, now()))::bigint"
    for _ in range(2):  # refused by PostgreSQL, and as remembered
        status, said, headers = await called(gateway, 0, {}, max_tokens=10)
        after_s = await gateway.database.fetchval(left_s, ZONE)
        assert status == 429
        assert said["error"]["resets_at"] == await gateway.database.fetchval(reset_at, ZONE)
        assert after_s - 1 <= int(headers["retry-after"]) <= before_s + 2
    assert gateway.services.budgets._refusals.books
    job = {"data": "Why?", "type": "text_only"}
    status, problem = await ask(gateway, "POST", "/submit", {}, job)
    assert status == 429
    assert before_s - 60 <= problem["retry_after_ms"] / 1000 <= before_s + 2


async def test_a_job_that_expires_while_it_waits_for_a_budget_names_the_budget(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    await with_budgets(gateway, Budget("day", "tokens", 9_000, "day", doubt="estimate"))
    await spend(gateway, "day", "", 8_999)
    gateway.start_worker()  # which knows the budget from its first call on
    job = await gateway.submit(data="Why?", type="text_only")
    refused = f"SELECT failure->>'code' = 'budget_exceeded' FROM requests WHERE id = '{job}'"
    await wait_until(lambda: gateway.database.fetchval(refused), 20, "a refusal by the budget")
    await gateway.database.execute("UPDATE requests SET deadline_at = now() WHERE id = $1", job)
    record = await gateway.end_of(job)
    assert (record["status"], record["error"]["code"]) == ("expired", "deadline_exceeded")
    assert record["error"]["message"].startswith(
        "its deadline came while it was queued (last error: the budget day has no room for this"
    )


async def test_a_job_that_needs_more_than_a_whole_budget_fails_and_says_so(
    open_gateway: Opener,
) -> None:
    """Another that only has to wait for the next period is retried."""
    gateway = await open_gateway(worker=False)
    await with_budgets(
        gateway,
        Budget("small", "tokens", 10, "day", tenant="acme", doubt="estimate"),
        Budget("day", "tokens", 9_000, "day", tenant="default", doubt="estimate"),
    )
    await spend(gateway, "day", "", 8_999)
    gateway.start_worker()  # which knows the budgets from its first call on
    acme = {"x-tidegate-tenant": "acme"}
    waits = await submitted(gateway, {}, data="Why?", type="text_only")
    fails = await submitted(gateway, acme, data="Why?", type="text_only")

    async def ended() -> Any:
        _, record = await ask(gateway, "GET", f"/status/{fails}", acme)
        return record if record["status"] == "failed" else None

    record = await wait_until(ended, 20, "its end")
    assert (record["error"]["code"], record["error"]["retryable"]) == ("budget_exceeded", False)
    assert "it needs more than a whole period allows" in record["error"]["message"]
    said = await refused_once(gateway, waits)
    assert (said["status"], said["error"]["retryable"]) == ("queued", True)
    assert await gateway.calls() == []
