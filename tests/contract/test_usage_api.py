"""The providers' usage and cost APIs: our reader against the emulator, and against odd answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tidegate.emulator.server import run_emulator
from tidegate.errors import UpstreamGarbled, UpstreamRejected, UpstreamUnauthorized
from tidegate.prices.rates import Price, Rates
from tidegate.prices.reconciliation import ModelDay, UsageSum, compared
from tidegate.upstream.transport import RelayWire
from tidegate.upstream.usage_api import (
    USAGE_PROVIDERS,
    USAGE_TIMEOUTS,
    UsageAccount,
    UsageProvider,
    usage_of_day,
)

DAY = date(2026, 11, 24)


@pytest.fixture
async def wire() -> AsyncIterator[RelayWire]:
    wire = RelayWire(USAGE_TIMEOUTS)
    await wire.start()
    yield wire
    await wire.aclose()


@asynccontextmanager
async def server(
    handle: Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]],
) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def of_openai(base: str) -> UsageAccount:
    return UsageAccount("openai", f"{base}/v1", "sk-admin-1")


def of_anthropic(base: str) -> UsageAccount:
    return UsageAccount("anthropic", base, "sk-ant-admin-1")


def page(results: list[dict[str, Any]], after: str | None = None) -> dict[str, Any]:
    bucket = {"object": "bucket", "results": results}
    return {"object": "page", "data": [bucket], "has_more": after is not None, "next_page": after}


async def test_openai_is_read_page_by_page_and_costs_are_exact(wire: RelayWire) -> None:
    asked: list[tuple[str, dict[str, str], str]] = []

    async def handle(request: web.Request) -> web.Response:
        query = dict(request.query)
        asked.append((request.path, query, request.headers["Authorization"]))
        if request.path.endswith("costs"):
            lines = [("gpt-5-2025-08-07, input", 0.1), ("gpt-5-2025-08-07, output", 0.2)]
            rows = [{"amount": {"value": v, "currency": "usd"}, "line_item": n} for n, v in lines]
            rows.append({"amount": {"value": "0.03", "currency": "usd"}, "line_item": "containers"})
            return web.json_response(page(rows))
        if request.path.endswith("embeddings"):
            return web.json_response(page([]))
        row = {"model": "gpt-5-2025-08-07", "input_tokens": 100, "output_tokens": 10,
               "input_cached_tokens": 40, "num_model_requests": 2}  # fmt: skip
        return web.json_response(page([row], None if "page" in query else "next"))

    async with server(handle) as base:
        found = await usage_of_day(wire, of_openai(base), DAY)
    assert found == {
        "gpt-5-2025-08-07": UsageSum(4, 200, 80, 0, 20, 0, 300_000),
        "containers": UsageSum(requests=None, cost_micros=30_000, is_counted=False),
    }
    assert {key for _, _, key in asked} == {"Bearer sk-admin-1"}
    completions = [query for path, query, _ in asked if path.endswith("completions")]
    begin = int(datetime(2026, 11, 24, tzinfo=UTC).timestamp())
    assert completions[0]["start_time"] == str(begin)
    assert completions[0]["end_time"] == str(begin + 86_400)
    assert [query.get("page") for query in completions] == [None, "next"]


async def test_anthropic_reports_input_in_three_parts_and_costs_in_cents(wire: RelayWire) -> None:
    async def handle(request: web.Request) -> web.Response:
        assert request.headers["x-api-key"] == "sk-ant-admin-1"
        assert request.query["starting_at"] == "2026-11-24T00:00:00Z"
        assert request.query["ending_at"] == "2026-11-25T00:00:00Z"
        if request.path.endswith("cost_report"):
            assert request.query.getall("group_by[]") == ["description"]
            rows: list[dict[str, Any]] = [
                {"amount": "123.4565", "currency": "USD", "model": "claude-opus-5",
                 "description": "Claude Opus 5 Usage - Output", "cost_type": "tokens"},
                {"amount": "1", "currency": "USD", "model": None, "description": "Web Search Usage",
                 "cost_type": "web_search"},
            ]  # fmt: skip
            return web.json_response(page(rows))
        row = {"model": "claude-opus-5", "uncached_input_tokens": 5, "cache_read_input_tokens": 70,
               "cache_creation": {"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 5},
               "output_tokens": 9, "server_tool_use": {"web_search_requests": 3}}  # fmt: skip
        return web.json_response(page([row]))

    async with server(handle) as base:
        found = await usage_of_day(wire, of_anthropic(base), DAY)
    assert found == {
        "claude-opus-5": UsageSum(None, 100, 70, 25, 9, 3, 1_244_565),
    }


async def test_searches_of_the_web_cost_the_models_that_made_them(wire: RelayWire) -> None:
    """As the record has it, in which a call costs what it searched too."""
    usage = [
        {"model": name, "uncached_input_tokens": 1_000, "output_tokens": 0,
         "server_tool_use": {"web_search_requests": searches}}
        for name, searches in (("a", 1), ("b", 2), ("c", 0))
    ]  # fmt: skip

    async def handle(request: web.Request) -> web.Response:
        if not request.path.endswith("cost_report"):
            return web.json_response(page(usage))
        rows: list[dict[str, Any]] = [
            {"amount": "0.3", "model": one["model"], "cost_type": "tokens"} for one in usage
        ]
        whole = {"amount": "3", "model": None, "cost_type": "web_search"}
        named = {"description": "Web Search Usage"}
        return web.json_response(page([*rows, whole | named]))

    async with server(handle) as base:
        theirs = await usage_of_day(wire, of_anthropic(base), DAY)
    rates = Rates.of(Price(input=3, output=15, search=10))
    ours = {
        name: ModelDay(UsageSum(1, 1_000, 0, 0, 0, searches, 3_000 + searches * 10_000))
        for name, searches in (("a", 1), ("b", 2), ("c", 0))
    }
    found = compared(ours, theirs, dict.fromkeys(ours, rates))
    assert [(one.model, one.verdict) for one in found] == [
        ("a", "equal"), ("b", "equal"), ("c", "equal")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (401, {"error": {"message": "sk-admin-1 is wrong"}}, UpstreamUnauthorized),
        (403, {}, UpstreamUnauthorized),
        (500, {}, UpstreamRejected),
        (200, [], UpstreamGarbled),
        (200, page([{"line_item": "m", "amount": {"value": "NaN"}}]), UpstreamGarbled),
        (200, page([{"line_item": "m", "amount": {"value": "much"}}]), UpstreamGarbled),
        (200, page([{"line_item": "m", "amount": {"value": "1e400"}}]), UpstreamGarbled),
        (200, page([], "the same again"), UpstreamGarbled),
    ],
)
async def test_what_cannot_be_read_says_so_without_the_key(
    wire: RelayWire, status: int, body: Any, error: type[Exception]
) -> None:
    asked = 0

    async def handle(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.json_response(body, status=status)

    async with server(handle) as base:
        with pytest.raises(error) as raised:
            await usage_of_day(wire, of_openai(base), DAY)
    assert "sk-admin-1" not in str(raised.value)
    assert asked <= 3
    if status in (401, 403):
        assert "OPENAI_ADMIN_KEY" in str(raised.value)


async def test_the_emulator_counts_what_it_billed_and_shows_it_to_an_admin_key_only(
    wire: RelayWire,
) -> None:
    today = datetime.now(UTC).date()
    async with run_emulator() as emulator, aiohttp.ClientSession() as http:
        await emulator.control.set_behaviour(answer="word " * 20)
        bases: dict[UsageProvider, str] = {
            "openai": f"{emulator.url}/v1",
            "anthropic": emulator.url,
        }
        for name in USAGE_PROVIDERS:
            account = UsageAccount(name, bases[name], "sk-admin")
            assert await usage_of_day(wire, account, today) == {}
            with pytest.raises(UpstreamUnauthorized):
                await usage_of_day(wire, UsageAccount(name, bases[name], "sk-of-calls"), today)
        body = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 99}
        told = {"openai": 0, "anthropic": 0}
        for _ in range(3):
            url, bearer = f"{emulator.url}/v1/chat/completions", {"Authorization": "Bearer k"}
            async with http.post(url, json=body | {"model": "gpt-4.1"}, headers=bearer) as answer:
                usage = (await answer.json())["usage"]
                told["openai"] += 2 * usage["prompt_tokens"] + 8 * usage["completion_tokens"]
            url, key = f"{emulator.url}/v1/messages", {"x-api-key": "k"}
            headers = key | {"anthropic-version": "2023-06-01"}
            asked = body | {"model": "claude-haiku-4-5"}
            async with http.post(url, json=asked, headers=headers) as answer:
                usage = (await answer.json())["usage"]
                told["anthropic"] += usage["input_tokens"] + 5 * usage["output_tokens"]
        for name in USAGE_PROVIDERS:
            found = await usage_of_day(wire, UsageAccount(name, bases[name], "sk-admin"), today)
            (total,) = found.values()
            assert total.cost_micros == told[name] > 0
            assert total.requests in (3, None)
            before = today - timedelta(days=1)
            account = UsageAccount(name, bases[name], "sk-admin")
            assert await usage_of_day(wire, account, before) == {}
