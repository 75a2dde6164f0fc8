"""A day of mixed traffic against the emulator's own usage and cost APIs: equal, or explained."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.accounts import ADMIN_KEY, provider
from tests.commands import tidegate
from tests.gateway import Gateway, Opener
from tests.waiting import wait_until, work_for
from tidegate.emulator.server import Emulator
from tidegate.errors import ConfigError
from tidegate.jobs.reconciliation import (
    NightlyReconciliation,
    ReconcileReport,
    account_of,
    nightly_accounts,
    others_of,
    reconcile,
    upstream_of,
)
from tidegate.policy.deployment import Deployment, Upstream, deployed_upstreams
from tidegate.prices.budgets import Budget
from tidegate.store.database import Connections
from tidegate.store.provider.reconciliations import Reconciliations
from tidegate.store.retention import Whose
from tidegate.upstream.transport import RelayWire
from tidegate.upstream.usage_api import USAGE_PROVIDERS, USAGE_TIMEOUTS, UsageProvider

__all__ = ["provider"]

VERSION = {"anthropic-version": "2023-06-01"}
MODELS = ("gpt-5", "gpt-5-mini", "gpt-4.1")
CLAUDE = "claude-haiku-4-5"


def today() -> date:
    return datetime.now(UTC).date()


async def chat(gateway: Gateway, model: str, text: str, **more: Any) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
    url = gateway.url + "/v1/chat/completions"
    async with gateway.http.post(url, json=body) as response:
        await response.read()
        return response.status


async def message(gateway: Gateway, text: str, **more: Any) -> int:
    body = {"model": CLAUDE, "max_tokens": 500, "messages": [{"role": "user", "content": text}]}
    url = gateway.url + "/v1/messages"
    async with gateway.http.post(url, json=body | more, headers=VERSION) as response:
        await response.read()
        return response.status


async def left(gateway: Gateway, path: str, body: dict[str, Any]) -> None:
    """Begin a stream and leave after its first bytes."""
    headers = VERSION if path.endswith("messages") else {}
    async with (
        aiohttp.ClientSession(headers=gateway.http.headers) as session,
        session.post(gateway.url + path, json=body, headers=headers) as response,
    ):
        assert response.status == 200, await response.read()
        await response.content.readany()


async def recorded(gateway: Gateway, count: int) -> None:
    async def found() -> bool:
        return bool(await gateway.database.fetchval("SELECT count(*) FROM audit") >= count)

    await wait_until(found, 30, f"{count} records")


async def reconciled(
    gateway: Gateway,
    name: UsageProvider,
    day: date,
    *,
    of_upstream: str | None = None,
    dry_run: bool = False,
) -> ReconcileReport:
    deployment = deployed_upstreams(gateway.services.config)
    upstream = upstream_of(deployment, name, of_upstream)
    others = others_of(deployment.upstreams, upstream, name)
    account = account_of(upstream, name, lambda _: ADMIN_KEY)
    wire = RelayWire(USAGE_TIMEOUTS)
    await wire.start()
    try:
        record = gateway.services.store.reconciliations
        return await reconcile(record, wire, upstream, account, day, others=others, dry_run=dry_run)
    finally:
        await wire.aclose()


async def test_whole_answers_are_equal_to_the_micro_dollar_but_for_rounding(
    open_gateway: Opener, provider: Emulator, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=tmp_path / "tidegate.toml")
    day = today()
    asked = [chat(gateway, model, f"Say {n} " * n) for model in MODELS for n in range(1, 8)]
    asked += [message(gateway, f"Tell {n} " * n) for n in range(1, 8)]
    asked += [chat(gateway, "gpt-5", "Go on", stream=True) for _ in range(3)]
    assert set(await asyncio.gather(*asked)) == {200}
    await recorded(gateway, len(asked))
    for name in USAGE_PROVIDERS:
        report = await reconciled(gateway, name, day)
        assert {finding.verdict for finding in report.findings} <= {"equal", "explained"}
        for finding in report.findings:
            # What is rounded half up a call never comes to more than half a micro-dollar of it.
            assert finding.corrections == ()
            assert abs(finding.difference_micros) <= 12, finding
            assert finding.ours_micros > 0
            assert finding.ours.told.output_tokens == finding.theirs.output_tokens
            assert finding.ours.told.input_tokens == finding.theirs.input_tokens


async def test_cut_streams_explain_the_difference_and_cost_what_the_provider_says_from_then_on(
    open_gateway: Opener, provider: Emulator, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=tmp_path / "tidegate.toml")
    day = today()
    await provider.control.set_behaviour(answer="word " * 400, chunks=20)
    await provider.control.set_fault("hang_mid_stream", match="leave", after_chunks=10)
    assert await chat(gateway, "gpt-5", "Whole") == 200
    assert await message(gateway, "Whole") == 200
    for _ in range(3):
        messages = [{"role": "user", "content": "leave"}]
        body = {"model": "gpt-5", "messages": messages, "stream": True}
        await left(gateway, "/v1/chat/completions", body)
        await left(gateway, "/v1/messages", body | {"model": CLAUDE, "max_tokens": 900})
    await recorded(gateway, 8)
    spent = "SELECT sum(cost_micros)::bigint FROM {} WHERE pool = $1"
    for name, pool in zip(USAGE_PROVIDERS, ("oai", "ant"), strict=True):
        before = await gateway.database.fetchval(spent.format("audit"), pool)
        dry = await reconciled(gateway, name, day, dry_run=True)
        assert dry.ours_micros == before
        report = await reconciled(gateway, name, day)
        (finding,) = report.findings
        assert finding.verdict == "explained", finding
        assert {each.call.state for each in finding.corrections} <= {"partial", "estimated"}
        assert len(finding.corrections) == 3
        assert report.corrected > 0
        for table in ("audit", "usage_days"):
            after = await gateway.database.fetchval(spent.format(table), pool)
            assert after == finding.theirs.cost_micros
        again = await reconciled(gateway, name, day)
        assert (again.verdict, again.corrected) == ("equal", 0)
        assert again.ours_micros == again.theirs_micros
        (kept,) = [
            one
            for one in await gateway.services.store.reconciliations.found(day, day)
            if one.upstream == pool
        ]
        assert (kept.verdict, kept.difference_micros) == ("equal", 0)
        assert len(kept.calls) == 3


async def test_a_call_that_is_bound_to_a_region_costs_more_and_a_cut_one_as_its_requested_tier(
    open_gateway: Opener, provider: Emulator, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=tmp_path / "tidegate.toml")
    await provider.control.set_behaviour(answer="word " * 400, chunks=20)
    await provider.control.set_fault("hang_mid_stream", match="leave", after_chunks=10)
    for more in ({}, {"inference_geo": "us"}):
        assert await message(gateway, "Why?", **more) == 200
    messages = [{"role": "user", "content": "leave"}]
    body = {"model": "gpt-5", "messages": messages, "stream": True}
    for tier in ("flex", "priority"):
        await left(gateway, "/v1/chat/completions", body | {"service_tier": tier})
    await recorded(gateway, 4)
    rows = await gateway.database.fetch(
        "SELECT input_tokens AS i, output_tokens + coalesce(thoughts_tokens, 0) AS o, cost_micros"
        " FROM audit ORDER BY created_at"
    )
    usual, bound, flex, priority = rows
    assert usual["cost_micros"] == usual["i"] + 5 * usual["o"]
    assert bound["cost_micros"] == (110 * (bound["i"] + 5 * bound["o"]) + 50) // 100
    assert flex["cost_micros"] == (125 * flex["i"] + 1_000 * flex["o"] + 50) // 100
    assert priority["cost_micros"] == (250 * priority["i"] + 2_000 * priority["o"] + 50) // 100


async def test_a_model_that_writes_its_cache_unasked_is_bounded_and_charged_by_that_price(
    open_gateway: Opener, provider: Emulator, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=tmp_path / "tidegate.toml")
    await provider.control.set_behaviour(answer="word " * 400, chunks=20)
    await provider.control.set_fault("hang_mid_stream", match="leave", after_chunks=10)
    day = Budget("day", "usd", 10**9, "day")
    await gateway.services.budgets.records.set(day, by="test")
    await gateway.services.budgets.refresh()
    messages = [{"role": "user", "content": "leave" * 400}]
    body = {"model": "gpt-6-sol", "messages": messages, "stream": True, "max_tokens": 1_000}
    await left(gateway, "/v1/chat/completions", body)
    await recorded(gateway, 1)
    query = "SELECT usage_state, input_tokens AS i, output_tokens AS o, cost_micros AS c FROM audit"
    (row,) = await gateway.database.fetch(query)
    assert row["usage_state"] == "estimated"
    assert row["c"] == (25 * row["i"] + 100 * row["o"] + 5) // 10

    async def charged() -> bool:
        return bool(await gateway.database.fetchval("SELECT estimated FROM budget_books"))

    await wait_until(charged, 10, "the bound of the cut call")
    bound = await gateway.database.fetchval("SELECT estimated FROM budget_books")
    assert bound >= 25 * len("leave" * 400) // 10 + 10 * 1_000


async def test_a_cut_call_in_a_tier_that_others_use_costs_what_the_provider_says(
    open_gateway: Opener, provider: Emulator, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=tmp_path / "tidegate.toml")
    await provider.control.set_behaviour(answer="word " * 400, chunks=20)
    await provider.control.set_fault("hang_mid_stream", match="leave", after_chunks=10)
    assert await chat(gateway, "gpt-5", "Whole", service_tier="flex") == 200
    body = {"messages": [{"role": "user", "content": "leave"}], "stream": True}
    flex = {"model": "gpt-5", "service_tier": "flex"}
    await left(gateway, "/v1/chat/completions", body | flex)
    await recorded(gateway, 2)
    (finding,) = (await reconciled(gateway, "openai", today())).findings
    assert (finding.verdict, len(finding.corrections)) == ("explained", 1), finding
    cost = await gateway.database.fetchval("SELECT sum(cost_micros)::bigint FROM audit")
    assert cost == finding.theirs.cost_micros < finding.ours_micros


async def test_another_consumer_of_the_account_is_not_explained(
    open_gateway: Opener, provider: Emulator, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=tmp_path / "tidegate.toml")
    day = today()
    assert await chat(gateway, "gpt-5", "Ours") == 200
    await recorded(gateway, 1)
    body = {"model": "gpt-5", "messages": [{"role": "user", "content": "Theirs"}]}
    direct = gateway.http.post(
        f"{provider.url}/v1/chat/completions", json=body, headers={"Authorization": "Bearer sk-2"}
    )
    async with direct as response:
        assert response.status == 200
    (finding,) = (await reconciled(gateway, "openai", day)).findings
    assert finding.verdict == "unexplained"
    assert "the provider counts 1 requests of calls that are not on record" in finding.reason


async def test_the_cost_of_calls_that_were_erased_is_laid_at_no_other_calls_door(
    open_gateway: Opener, provider: Emulator, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=tmp_path / "tidegate.toml")
    await provider.control.set_behaviour(answer="word " * 400, chunks=20)
    await provider.control.set_fault("hang_mid_stream", match="leave", after_chunks=10)
    body = {"model": CLAUDE, "max_tokens": 500, "messages": [{"role": "user", "content": "Whose"}]}
    url, headers = f"{gateway.url}/v1/messages", VERSION | {"x-tidegate-subject": "jane"}
    async with gateway.http.post(url, json=body, headers=headers) as response:
        assert response.status == 200, await response.read()
    cut = body | {"messages": [{"role": "user", "content": "leave"}], "stream": True}
    await left(gateway, "/v1/messages", cut)
    await recorded(gateway, 2)
    await gateway.services.store.retention.erase(Whose(None, "jane"))
    spent = "SELECT sum(cost_micros)::bigint FROM audit"
    before = await gateway.database.fetchval(spent)
    (finding,) = (await reconciled(gateway, "anthropic", today())).findings
    assert (finding.verdict, finding.corrections) == ("unexplained", ())
    assert "1 calls of the day are no longer on record" in finding.reason
    assert await gateway.database.fetchval(spent) == before > 0


async def test_the_cost_of_another_upstream_of_the_account_is_laid_at_no_cut_calls_door(
    open_gateway: Opener, provider: Emulator, tmp_path: Path
) -> None:
    policy = tmp_path / "tidegate.toml"
    second = f"""
        [upstreams.ant2]
        provider = "anthropic"
        base_url = "{provider.url}"
        key = "ANTHROPIC_API_KEY"
        models = ["second"]

        [[routes]]
        model = "second"
        try = ["ant2/{CLAUDE}"]
        """
    policy.write_text(policy.read_text() + second)
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    await provider.control.set_behaviour(answer="word " * 400, chunks=20)
    await provider.control.set_fault("hang_mid_stream", match="leave", after_chunks=10)
    assert await message(gateway, "Whole", model="second") == 200
    cut = {"model": CLAUDE, "max_tokens": 500, "stream": True}
    said = [{"role": "user", "content": "leave"}]
    await left(gateway, "/v1/messages", cut | {"messages": said})
    await recorded(gateway, 2)
    (finding,) = (await reconciled(gateway, "anthropic", today(), of_upstream="ant")).findings
    assert len(finding.ours.doubtful) == 1
    assert (finding.verdict, finding.corrections) == ("unexplained", ())
    assert "another upstream of the same account" in finding.reason


async def test_the_command_compares_yesterday_and_says_so_by_its_exit_code(
    open_gateway: Opener, provider: Emulator, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=tmp_path / "tidegate.toml")
    nothing = await tidegate(gateway, "reconcile", "openai", "--json")
    assert (nothing.code, nothing.json["verdict"], nothing.json["models"]) == (0, "equal", [])
    assert await chat(gateway, "gpt-5", "Why?") == 200
    await recorded(gateway, 1)
    await gateway.database.execute(
        "UPDATE audit SET created_at = created_at - interval '1 day',"
        " finished_at = finished_at - interval '1 day'"
    )
    missed = await tidegate(gateway, "reconcile", "openai")
    assert missed.code == 1
    assert "gpt-5: the provider counts fewer" in missed.said
    assert "$0.0" in missed.said
    for wrong in (("mistral",), ("openai", "--day", "tomorrow"), ("openai", "--day", "2999-01-01")):
        refused = await tidegate(gateway, "reconcile", *wrong)
        assert (refused.code, refused.complained.count("\n")) == (2, 1)


async def test_an_upstream_that_was_added_while_running_is_compared_too(
    open_gateway: Opener, provider: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tidegate.toml").write_text("")
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    monkeypatch.setenv("CLAUDE_KEY", "sk-of-calls")
    gateway = await open_gateway(worker=False, tidegate_policy=tmp_path / "tidegate.toml")
    missing = await tidegate(gateway, "reconcile", "anthropic")
    assert (missing.code, "must be the provider of an upstream" in missing.complained) == (2, True)
    words = f"upstreams add claude --base-url {provider.url} --key CLAUDE_KEY".split()
    key = {"ADMIN_TOKEN": gateway.operator_key, "TIDEGATE_URL": gateway.url}
    added = await tidegate(gateway, *words, "provider=anthropic", "--no-test", **key)
    assert added.code == 0, added.complained
    done = await tidegate(gateway, "reconcile", "anthropic", "--json")
    assert (done.code, done.json["upstream"]) == (0, "claude"), done.complained


async def test_the_last_day_of_a_month_is_shown_in_the_next_one(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    day = today().replace(day=1) - timedelta(days=1)
    await gateway.database.execute(
        "INSERT INTO reconciliations (upstream, day, model, provider, ours_micros, theirs_micros,"
        " verdict, reason, calls)"
        " VALUES ('openai', $1, 'm', 'openai', 1, 2, 'unexplained', '', '[]')",
        day,
    )
    url = f"{gateway.url}/admin/reconciliations"
    as_operator = {"Authorization": f"Bearer {gateway.operator_key}"}
    for query, days in (("", [f"{day}"]), (f"?since={today()}", [])):
        async with gateway.http.get(url + query, headers=as_operator) as response:
            assert [one["day"] for one in (await response.json())["items"]] == days


async def test_each_night_the_day_before_is_compared_once(
    open_gateway: Opener, provider: Emulator, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=tmp_path / "tidegate.toml")
    day = today()
    assert await chat(gateway, "gpt-5", "Why?") == 200
    await recorded(gateway, 1)
    record, deployment = (
        gateway.services.store.reconciliations,
        deployed_upstreams(gateway.services.config),
    )
    times = [
        datetime.combine(day + timedelta(days=1), time(hour), UTC) for hour in (4, 6)
    ]  # before the hour, and after it

    async def nightly(now: datetime) -> asyncio.Task[None]:
        nightly = NightlyReconciliation(
            record,
            lambda: deployment,
            ["openai", "anthropic"],
            lambda _: ADMIN_KEY,
            now=lambda: now,
        )
        return asyncio.create_task(nightly.run())

    tasks = [await nightly(times[0])]
    try:
        await work_for(0.3)
        assert await record.found(day, day) == []
        tasks += [await nightly(times[1]), await nightly(times[1])]  # of two workers

        async def compared() -> bool:
            return [one.model for one in await record.found(day, day)] == ["gpt-5"]

        await wait_until(compared, 20, "the comparison")
        (found,) = await record.found(day, day)
        assert (found.upstream, found.verdict) in (("oai", "equal"), ("oai", "explained"))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_day_that_was_compared_too_early_is_compared_again_at_night(
    open_gateway: Opener, provider: Emulator, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=tmp_path / "tidegate.toml")
    day = today() - timedelta(days=1)
    early = datetime.combine(today(), time(0, 10), UTC)
    await gateway.database.execute(
        "INSERT INTO reconciliations (upstream, day, model, provider, ours_micros, theirs_micros,"
        " verdict, reason, calls, reconciled_at)"
        " VALUES ('oai', $1, 'gpt-5', 'openai', 1, 0, 'unexplained', '', '[]', $2)",
        *(day, early),
    )
    assert await chat(gateway, "gpt-5", "Why?") == 200
    await recorded(gateway, 1)
    await gateway.database.execute(
        "UPDATE audit SET created_at = created_at - interval '1 day',"
        " finished_at = finished_at - interval '1 day'"
    )
    nightly = NightlyReconciliation(
        gateway.services.store.reconciliations,
        lambda: deployed_upstreams(gateway.services.config),
        ["openai"],
        lambda _: ADMIN_KEY,
        now=lambda: datetime.combine(today(), time(6), UTC),
    )
    task = asyncio.create_task(nightly.run())

    async def compared() -> bool:
        found = await gateway.services.store.reconciliations.found(day, day)
        return [one.reconciled_at > early for one in found] == [True]

    try:
        await wait_until(compared, 20, "the comparison at night")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_fault_in_a_comparison_at_night_ends_no_other_one(
    open_gateway: Opener, provider: Emulator, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=tmp_path / "tidegate.toml")
    asked: list[str] = []

    class Broken(Reconciliations):
        async def is_done(self, upstream: str, day: date, since: datetime) -> bool:
            asked.append(upstream)
            raise ZeroDivisionError

    nightly = NightlyReconciliation(
        Broken(Connections("postgresql://u@127.0.0.1:1/d")),
        lambda: deployed_upstreams(gateway.services.config),
        ["openai", "anthropic"],
        lambda _: ADMIN_KEY,
        now=lambda: datetime.combine(today(), time(6), UTC),
    )
    task = asyncio.create_task(nightly.run())
    try:
        await wait_until(lambda: asked == ["oai", "ant"], 20, "the other comparison")
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_nightly_reconciliation_needs_an_upstream_and_a_key() -> None:
    for providers, said in ((["mistral"], "PROVIDER"), (["openai"], "RECONCILE")):
        with pytest.raises(ConfigError, match=said):
            nightly_accounts(Deployment(()), providers, lambda _: "")
    upstream = Upstream("o", {"openai": "https://api.openai.com/v1"}, "k", provider="openai")
    with pytest.raises(ConfigError, match="OPENAI_ADMIN_KEY"):
        nightly_accounts(Deployment((upstream,)), ["openai"], lambda _: "")
