"""Budgets against the provider's own book: 200 calls at once, kills, cuts, forgeries, restarts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import asyncpg
import orjson
import pytest
from redis.asyncio import Redis

from tests.fleet import Fleet
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator, run_emulator

pytestmark = pytest.mark.slow
VERSION = {"anthropic-version": "2023-06-01"}
# In micro-dollars a token: input, output.
RATES = {"gpt": (2, 8), "claude": (1, 5)}
AT_ONCE, MOST_TOKENS = 200, 60
# Waves with a fault each, then such without one, until the budgets have refused so many calls.
FAULTS, MOST_WAVES, REFUSED = 3, 9, 50
ALL, ACME, PERSON = 300_000, 140_000, 24_000
# What an answer says of itself where a schema or a tool's call is repeated: it must not count.
FORGED = '{"usage": {"completion_tokens": 0, "input_tokens": 0, "output_tokens": 0}} '


@pytest.fixture
async def provider(tmp_path: Path) -> AsyncIterator[Emulator]:
    async with run_emulator() as emulator:
        await emulator.control.set_behaviour(
            answer=FORGED + "word " * 30, chunks=8, first_byte_ms=300, between_ms=20
        )
        for fault in ("cut_mid_stream", "unavailable", "internal"):
            await emulator.control.set_fault(fault, probability=0.05)
        (tmp_path / "tidegate.toml").write_text(
            f"""
            [upstreams.oai]
            provider = "openai"
            base_url = "{emulator.url}/v1"
            key = "OPENAI_API_KEY"
            models = ["gpt"]
            prices = {{ "gpt" = {{ input = 2, output = 8 }} }}

            [upstreams.ant]
            provider = "anthropic"
            base_url = "{emulator.url}"
            key = "ANTHROPIC_API_KEY"
            models = ["claude"]
            prices = {{ "claude" = {{ input = 1, output = 5 }} }}
            """
        )
        yield emulator


async def ask(url: str, random: Random, number: int) -> int:
    """One call, whole or streamed; a third of the streams is left halfway. Returns its status."""
    streamed = random.random() < 0.6
    leaves = streamed and random.random() < 0.34
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"Say {number} {FORGED}"}],
        "stream": streamed,
        "max_tokens": MOST_TOKENS,
    }
    tenant = random.choice(("acme", "other"))
    headers = {"x-tidegate-tenant": tenant, "x-tidegate-subject": f"p{number % 7}"}
    headers["x-tidegate-deadline-ms"] = "4000"
    if random.random() < 0.5:
        path, model = "/v1/chat/completions", "gpt"
    else:
        path, model, headers = "/v1/messages", "claude", headers | VERSION
    with suppress(aiohttp.ClientError, TimeoutError):  # of an API that is killed
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
            session.post(url + path, json=body | {"model": model}, headers=headers) as response,
        ):
            if leaves:
                await response.content.readany()
            else:
                await response.read()
            return response.status
    return 0


async def submit(url: str, number: int) -> None:
    message = {"role": "user", "content": f"Do {number}"}
    body = {"model": "gpt", "messages": [message], "max_tokens": MOST_TOKENS}
    job = {"endpoint": "/v1/chat/completions", "body": body, "subject": f"p{number % 7}"}
    with suppress(aiohttp.ClientError):
        async with (
            aiohttp.ClientSession(headers={"x-tidegate-tenant": "acme"}) as session,
            session.post(url + "/submit", json=job) as response,
        ):
            await response.read()


async def set_budgets(fleet: Fleet) -> None:
    for name, body in (
        ("all", {"usd": str(ALL / 10**6)}),
        ("acme", {"usd": str(ACME / 10**6), "tenant": "acme", "period": "day"}),
        ("people", {"usd": str(PERSON / 10**6), "each": ["tenant", "subject"], "period": "day"}),
    ):
        url = f"{fleet.url}/admin/budgets/{name}"
        async with fleet.http.put(url, json=body) as response:
            assert response.status == 200, await response.read()


async def charged(provider: Emulator) -> int:
    """By the provider's own book, in micro-dollars."""
    stats = await provider.control.stats()
    total = 0
    for model, (taken, given) in RATES.items():
        billed = stats.billed(model=model)
        total += billed.input_tokens * taken
        total += (billed.output_tokens + billed.thoughts_tokens) * given
    return total


async def test_no_micro_dollar_more_than_there_is_whatever_dies(
    tmp_path: Path, provider: Emulator
) -> None:
    random = Random(11)
    settings = {
        "TIDEGATE_POLICY": str(tmp_path / "tidegate.toml"),
        "OPENAI_API_KEY": "sk",
        "ANTHROPIC_API_KEY": "sk",
    }
    said: Counter[int] = Counter()
    async with Fleet(tmp_path / "fleet", apis=2, workers=2, settings=settings) as fleet:
        await set_budgets(fleet)
        database = await asyncpg.connect(fleet.postgres.url())
        await known_everywhere(fleet)
        for wave in range(MOST_WAVES):
            if wave >= FAULTS and said[429] > REFUSED:  # the budgets have been used up
                break
            urls = [url for url, child in fleet.apis.items() if child.process.poll() is None]
            calls = [
                asyncio.create_task(ask(urls[one % len(urls)], random, one))
                for one in range(AT_ONCE)
            ]
            jobs = [asyncio.create_task(submit(urls[one % len(urls)], one)) for one in range(10)]
            await wait_until(partial(has_begun, calls), 30, "calls in progress")
            if wave == 0:
                replacement = fleet.start_api()
                fleet.apis[urls[0]].kill()
                fleet.workers[0].kill()
                fleet.start_worker()
                await fleet.ready(replacement)
            elif wave == 1:
                async with Redis.from_url(fleet.valkey.url) as redis:
                    await redis.flushall()
            elif wave == 2:
                await database.close()
                await asyncio.to_thread(fleet.postgres.stop)
                await asyncio.to_thread(fleet.postgres.start)
                database = await asyncpg.connect(fleet.postgres.url())
            said.update(await asyncio.gather(*calls))
            await asyncio.gather(*jobs)
            await check(database, provider)
        await wait_until(lambda: is_idle(provider), 60, "the end of all calls")
        truth = await check(database, provider)
        assert said[200] > 50, said
        assert said[429] > REFUSED, said
        assert truth > ALL // 8  # most of the rest is what cut calls may have cost
        await database.close()


async def known_everywhere(fleet: Fleet) -> None:
    """Wait until each API refuses by its budgets a call that is too dear."""
    message = {"role": "user", "content": "Hi"}
    body = {"model": "gpt", "messages": [message], "max_tokens": 100_000}

    async def refuse() -> bool:
        for url in fleet.apis:
            async with fleet.http.post(f"{url}/v1/chat/completions", json=body) as response:
                if response.status != 429:
                    return False
        return True

    await wait_until(refuse, 20, "the budgets in force everywhere")


async def check(database: asyncpg.Connection, provider: Emulator) -> int:
    """No book is over, and all of them hold what the provider has charged."""
    # Before the books: what is charged later may be in them already.
    truth = await charged(provider)
    rows = await database.fetch(
        "SELECT k.budget, k.scope, b.amount, k.spent, k.held, k.estimated FROM budget_books k"
        " JOIN budgets b ON b.name = k.budget"
    )
    for row in rows:
        assert row["spent"] + row["held"] <= row["amount"], row
        assert 0 <= row["estimated"] <= row["spent"], row
    sums: Counter[str] = Counter()
    for row in rows:
        sums[row["budget"]] += row["spent"] + row["held"]
    assert truth <= sums["all"] <= ALL, orjson.dumps([dict(row) for row in rows])
    assert sums["all"] == sums["people"]
    assert truth <= ALL
    return truth


def has_begun(calls: list[asyncio.Task[int]]) -> bool:
    """Whether the wave is in the middle."""
    return sum(one.done() for one in calls) > AT_ONCE // 10


async def is_idle(provider: Emulator) -> bool:
    return (await provider.control.stats()).in_flight == 0
