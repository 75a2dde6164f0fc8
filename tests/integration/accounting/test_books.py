"""The books of a day with kills -9 and cut streams, against the provider's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import asyncpg
import pytest

from tests.accounts import write_accounts
from tests.fleet import Fleet
from tests.waiting import wait_until
from tidegate.call import Usage
from tidegate.emulator.client import Stats
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.jobs.reconciliation import ReconcileReport, account_of, reconcile
from tidegate.policy.deployment import Upstream
from tidegate.prices.rates import Rates, catalog, cost_micros
from tidegate.prices.reconciliation import UsageSum, compared
from tidegate.store.database import Connections
from tidegate.store.provider.reconciliations import Reconciliations
from tidegate.upstream.transport import RelayWire
from tidegate.upstream.usage_api import USAGE_PROVIDERS, USAGE_TIMEOUTS, UsageProvider

pytestmark = pytest.mark.slow
VERSION = {"anthropic-version": "2023-06-01"}
# Of both a token costs whole micro-dollars, so that nothing is lost by rounding.
GPT, CLAUDE = "gpt-4.1", "claude-haiku-4-5"
ROUNDS, AT_ONCE, KILLED_IN = 8, 16, (2, 5)
POOLS: dict[UsageProvider, str] = {"openai": "oai", "anthropic": "ant"}


@pytest.fixture
async def provider(tmp_path: Path) -> AsyncIterator[Emulator]:
    async with run_emulator() as emulator:
        await emulator.control.set_behaviour(answer="word " * 60, chunks=12, first_byte_ms=400)
        write_accounts(tmp_path, emulator)
        yield emulator


async def ask(fleet: Fleet, random: Random, text: str) -> None:
    """One call of either dialect, whole or streamed; of the streams a third is left halfway."""
    streamed = random.random() < 0.6
    leaves = streamed and random.random() < 0.34
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "stream": streamed}
    if random.random() < 0.5:
        path, headers = "/v1/chat/completions", {}
        body |= {"model": GPT}
    else:
        path, headers = "/v1/messages", VERSION
        body |= {"model": CLAUDE, "max_tokens": 300}
    with suppress(aiohttp.ClientError, TimeoutError):  # of an API that is killed
        async with (
            aiohttp.ClientSession(headers=fleet.as_operator) as session,
            session.post(fleet.url + path, json=body, headers=headers) as response,
        ):
            if leaves:
                await response.content.readany()
                return
            await response.read()


async def submit(fleet: Fleet, text: str) -> None:
    messages = [{"role": "user", "content": text}]
    body = {"endpoint": "/v1/chat/completions", "body": {"model": GPT, "messages": messages}}
    with suppress(aiohttp.ClientError):
        async with fleet.http.post(fleet.url + "/submit", json=body) as response:
            assert response.status == 202, await response.read()


async def books(fleet: Fleet, provider: Emulator, name: UsageProvider) -> ReconcileReport:
    base = provider.url + ("/v1" if name == "openai" else "")
    upstream = Upstream(POOLS[name], {name: base}, "sk", provider=name)
    connections = Connections(fleet.postgres.url())
    connections.start()
    wire = RelayWire(USAGE_TIMEOUTS)
    await wire.start()
    try:
        account = account_of(upstream, name, lambda _: "sk-admin")
        day = datetime.now(UTC).date()
        return await reconcile(Reconciliations(connections), wire, upstream, account, day)
    finally:
        await wire.aclose()
        await connections.aclose()


async def test_the_books_of_a_day_with_kills_and_cut_streams_balance(
    tmp_path: Path, provider: Emulator
) -> None:
    random = Random(15)
    settings = {
        "TIDEGATE_POLICY": str(tmp_path / "tidegate.toml"),
        "OPENAI_API_KEY": "sk",
        "ANTHROPIC_API_KEY": "sk",
    }
    async with Fleet(tmp_path / "fleet", apis=2, workers=1, settings=settings) as fleet:
        for number in range(ROUNDS):
            asked = [ask(fleet, random, f"Say {number} {one}") for one in range(AT_ONCE)]
            calls = [asyncio.create_task(one) for one in asked]
            calls += [asyncio.create_task(submit(fleet, f"Do {number} {one}")) for one in range(3)]
            if number in KILLED_IN:
                await wait_until(lambda: in_flight(provider), 20, "calls under way")
                victim = next(u for u, c in fleet.apis.items() if c.process.poll() is None)
                fleet.start_api()
                fleet.apis[victim].kill()
                fleet.workers[-1].kill()
                fleet.start_worker()
            await asyncio.gather(*calls)
        database = await asyncpg.connect(fleet.postgres.url())
        try:
            await settled(database, provider)
            lost = await database.fetchval(
                "SELECT count(*) FROM audit WHERE failure ->> 'code' = 'process_died'"
            )
            assert lost > 0, "no call was under way when its process was killed"
            for name in USAGE_PROVIDERS:
                report = await books(fleet, provider, name)
                (finding,) = report.findings
                assert finding.verdict in ("equal", "explained"), finding
                cost = await database.fetchval(
                    "SELECT sum(cost_micros)::bigint FROM audit WHERE upstream = $1", POOLS[name]
                )
                assert cost == finding.theirs.cost_micros > 0
                assert (await books(fleet, provider, name)).verdict == "equal"
            totals = await database.fetchrow(
                "SELECT (SELECT sum(cost_micros) FROM usage_days) AS days,"
                " (SELECT sum(cost_micros) FROM audit) AS calls"
            )
            assert totals["days"] == totals["calls"]
        finally:
            await database.close()


async def test_a_stream_of_a_killed_api_explains_what_its_provider_counts(tmp_path: Path) -> None:
    async with Fleet(tmp_path / "fleet", apis=2, workers=0) as fleet:
        await fleet.control.set_behaviour(answer="word " * 400, chunks=20)
        await fleet.control.set_fault("hang_mid_stream", match="Go on", after_chunks=10)
        victim = fleet.url
        body = {"data": "Go on and on", "type": "text_only"}
        async with fleet.http.post(f"{victim}/stream", json=body) as response:
            assert response.status == 200, await response.read()
            request_id = response.headers["x-tidegate-request-id"]
            await response.content.readany()
            fleet.apis[victim].kill()
            with suppress(aiohttp.ClientError):
                await response.read()
        connections = Connections(fleet.postgres.url())
        connections.start()
        try:
            record = Reconciliations(connections)
            day = datetime.now(UTC).date()

            async def found() -> bool:
                return bool(await record.ours("gemini", day))

            await wait_until(found, 30, "the record of the killed process's stream")
            status = await fleet.status(request_id)
            assert (status["status"], status["error"]["code"]) == ("failed", "process_died")
            (call,) = await fleet.control.calls(contains="Go on")
            assert call.output_tokens > 0
            price = catalog().find("gemini", call.model, day)
            assert price is not None
            rates = Rates.of(price, is_public=True)
            used = Usage(call.input_tokens, call.output_tokens + call.thoughts_tokens)
            cost = cost_micros(rates, used, None) or 0
            theirs = UsageSum(1, used.input_tokens or 0, 0, 0, used.output_tokens or 0, 0, cost)
            ours = await record.ours("gemini", day)
            (finding,) = compared(ours, {call.model: theirs}, {call.model: rates})
            assert (finding.verdict, finding.difference_micros) == ("explained", cost)
            assert [str(one.call.request_id) for one in finding.corrections] == [request_id]
            assert await record.keep("gemini", "gemini", day, [finding]) == 1
            (after,) = (await record.ours("gemini", day)).values()
            assert after.cost_micros == cost > 0
        finally:
            await connections.aclose()


async def in_flight(provider: Emulator) -> bool:
    stats: Stats = await provider.control.stats()
    return stats.in_flight >= 2


async def settled(database: asyncpg.Connection, provider: Emulator) -> None:
    """Every job has ended, nothing is under way, and each call is on record, of the dead too."""

    async def done() -> bool:
        open_jobs = await database.fetchval(
            "SELECT count(*) FROM requests WHERE status IN ('queued', 'running')"
        )
        relayed = await database.fetchval("SELECT count(*) FROM audit WHERE source = 'relay'")
        stats: Stats = await provider.control.stats()
        said = await provider.control.calls(contains="Say ")
        return not open_jobs and not stats.in_flight and relayed >= len(said)

    await wait_until(done, 90, "the record of all calls")
