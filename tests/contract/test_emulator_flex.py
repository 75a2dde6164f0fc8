"""The emulator's flex tier: reported in the answer, billed at its own price, slower, and refused in
the provider's words while the provider is short of capacity."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest

from tidegate.emulator.server import Emulator, run_emulator
from tidegate.errors import InvalidRequest
from tidegate.upstream.transport import RelayWire
from tidegate.upstream.usage_api import USAGE_TIMEOUTS, UsageAccount, usage_of_day

OPENAI = {"Authorization": "Bearer sk-1"}
GEMINI = {"x-goog-api-key": "k"}
PROMPT: dict[str, Any] = {"contents": [{"parts": [{"text": "Why?"}]}]}
CHAT: dict[str, Any] = {"model": "gpt-5", "messages": [{"role": "user", "content": "Why?"}]}


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        await running.control.set_behaviour(answer="word " * 20)
        yield running


async def post(
    emulator: Emulator, path: str, body: dict[str, Any], headers: dict[str, str] = OPENAI
) -> tuple[int, dict[str, Any]]:
    url = f"{emulator.url}{path}"
    async with (
        aiohttp.ClientSession() as http,
        http.post(url, json=body, headers=headers) as answer,
    ):
        return answer.status, await answer.json()


async def test_an_answer_reports_the_tier_that_it_was_served_in(emulator: Emulator) -> None:
    for asked, told in ((None, "default"), ("auto", "default"), ("flex", "flex")):
        status, chat = await post(emulator, "/v1/chat/completions", CHAT | {"service_tier": asked})
        assert (status, chat["service_tier"]) == (200, told)
    response = {"model": "gpt-5", "input": "Why?", "service_tier": "flex"}
    assert (await post(emulator, "/v1/responses", response))[1]["service_tier"] == "flex"
    generate = "/v1beta/models/gemini-2.5-flash:generateContent"
    for name in ("service_tier", "serviceTier"):
        status, said = await post(emulator, generate, PROMPT | {name: "FLEX"}, GEMINI)
        assert (status, said["usageMetadata"]["serviceTier"]) == (200, "flex")
    plain = (await post(emulator, generate, PROMPT, GEMINI))[1]["usageMetadata"]
    assert plain["serviceTier"] == "standard"


async def test_a_model_that_has_no_such_tier_refuses_it(emulator: Emulator) -> None:
    for body in (CHAT | {"model": "gpt-4o"}, CHAT):
        tier = "flex" if body["model"] == "gpt-4o" else "turbo"
        status, said = await post(emulator, "/v1/chat/completions", body | {"service_tier": tier})
        assert status == 400
        assert "Unsupported service_tier" in said["error"]["message"]


async def test_it_is_billed_at_its_own_price(emulator: Emulator) -> None:
    wire, today = RelayWire(USAGE_TIMEOUTS), datetime.now(UTC).date()
    await wire.start()
    try:
        costs = []
        for tier in ("default", "flex"):
            await emulator.control.reset()
            await post(emulator, "/v1/chat/completions", CHAT | {"service_tier": tier})
            account = UsageAccount("openai", f"{emulator.url}/v1", "sk-admin")
            costs.append((await usage_of_day(wire, account, today))["gpt-5"].cost_micros)
    finally:
        await wire.aclose()
    usual, flex = costs
    assert usual is not None
    assert flex is not None
    assert abs(2 * flex - usual) <= 1


async def test_without_capacity_it_is_refused_and_nothing_is_billed(emulator: Emulator) -> None:
    await emulator.control.set_behaviour(flex={"busy_share": 1})
    body = CHAT | {"service_tier": "flex"}
    status, said = await post(emulator, "/v1/chat/completions", body)
    assert (status, said["error"]["code"]) == (429, "resource_unavailable")
    generate = "/v1beta/models/gemini-2.5-flash:generateContent"
    status, said = await post(emulator, generate, PROMPT | {"serviceTier": "flex"}, GEMINI)
    assert (status, said["error"]["status"]) == (503, "UNAVAILABLE")
    assert (await post(emulator, "/v1/chat/completions", CHAT))[0] == 200
    calls = await emulator.control.calls()
    assert [one.fault for one in calls] == ["flex_busy", "flex_busy", None]
    assert (await emulator.control.stats()).billed().calls == 1


async def test_it_is_slower_than_the_usual_tier(emulator: Emulator) -> None:
    await emulator.control.set_behaviour(flex={"delay_ms": 200})
    began = time.perf_counter()
    await post(emulator, "/v1/chat/completions", CHAT | {"service_tier": "flex"})
    assert time.perf_counter() - began >= 0.2


@pytest.mark.parametrize("flex", [{"busy_share": 2}, {"speed": 1}, {"delay_ms": -1}])
async def test_a_pace_that_makes_no_sense_is_refused(
    emulator: Emulator, flex: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest):
        await emulator.control.set_behaviour(flex=flex)
