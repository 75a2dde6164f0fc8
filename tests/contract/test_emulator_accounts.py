"""Accounts over HTTP: usage with cached tokens, headers, refusals, books, the rate-limit APIs."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tidegate.emulator.server import Emulator, run_emulator
from tidegate.errors import InvalidRequest

LIMITS = [
    {"unit": "requests", "bound": 3, "models": "gpt-*"},
    {"unit": "tokens", "bound": 5_000, "models": "gpt-*"},
]
CLAUDE = {
    "provider": "anthropic",
    "limits": [
        {"unit": "uncached_input_tokens", "bound": 2_000},
        {"unit": "output_tokens", "bound": 1_000},
    ],
    "cache": "prefix",
    "cache_min_tokens": 10,
}
LONG = "A long system prompt that is the same in all turns. " * 20


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


async def chat(session: aiohttp.ClientSession, emulator: Emulator, **body: Any) -> Any:
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}], **body}
    url = f"{emulator.url}/v1/chat/completions"
    headers = {"Authorization": "Bearer k"}
    async with session.post(url, json=body, headers=headers) as answer:
        return answer.status, answer.headers.copy(), await answer.json()


async def message(
    session: aiohttp.ClientSession, emulator: Emulator, turns: list[str], path: str = "/v1/messages"
) -> Any:
    roles = ["user", "assistant"]
    messages = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
    body = {"model": "claude-opus-5-5", "max_tokens": 64_000, "system": LONG, "messages": messages}
    headers = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
    async with session.post(f"{emulator.url}{path}", json=body, headers=headers) as answer:
        return answer.status, answer.headers.copy(), await answer.json()


async def test_good_answers_and_refusals_bear_what_remains(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    await emulator.control.set_account(provider="openai", limits=LIMITS)
    status, headers, _ = await chat(session, emulator, max_tokens=4_000)
    assert status == 200
    assert 1_000 <= int(headers["x-ratelimit-remaining-tokens"]) < 2_000  # it refills meanwhile
    assert headers["x-ratelimit-remaining-requests"] == "2"
    status, headers, body = await chat(session, emulator, max_tokens=4_000)
    assert status == 429
    used = re.search(r"Limit 5000, Used (\d+), Requested 4000", body["error"]["message"])
    assert used is not None
    assert 3_000 < int(used[1]) < 4_100  # it refills meanwhile
    # The refused request counts as one.
    assert headers["x-ratelimit-remaining-requests"] == "1"
    assert 30 <= int(headers["retry-after"]) <= 36
    assert (await emulator.control.stats())["text_only"].refused == {"tokens:gpt-*:60s": 1}


async def test_a_bad_request_counts_at_openai(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    await emulator.control.set_account(provider="openai", limits=LIMITS)
    assert (await chat(session, emulator, messages=[]))[0] == 400
    assert (await emulator.control.account())["limits"][0]["counted"] == 1


async def test_a_conversation_is_read_from_the_cache(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    await emulator.control.set_account(**CLAUDE)
    _, headers, body = await message(session, emulator, ["First question"])
    first = body["usage"]
    assert first["cache_read_input_tokens"] == 0
    assert first["cache_creation_input_tokens"] > 250
    assert headers["anthropic-ratelimit-input-tokens-remaining"] == "2000"
    _, _, body = await message(session, emulator, ["First question", "Answer", "Second question"])
    second = body["usage"]
    assert second["cache_read_input_tokens"] == first["cache_creation_input_tokens"]
    assert second["cache_creation_input_tokens"] < 10
    book = {item["unit"]: item for item in (await emulator.control.account())["limits"]}
    written = first["cache_creation_input_tokens"] + second["cache_creation_input_tokens"]
    assert book["uncached_input_tokens"]["counted"] == written
    made = first["output_tokens"] + second["output_tokens"]
    assert book["output_tokens"]["counted"] == made
    calls = await emulator.control.calls()
    assert calls[1].cached_tokens == second["cache_read_input_tokens"]


async def test_a_share_of_the_input_is_cached_in_openais_usage(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    await emulator.control.set_account(provider="openai", limits=[], cache=0.9)
    prompt = [{"role": "user", "content": "x" * 400}]
    _, _, body = await chat(session, emulator, messages=prompt)
    assert body["usage"]["prompt_tokens"] == 100
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 90


async def test_bedrock_refuses_in_both_dialects_without_a_time(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    tokens = {"unit": "tokens", "bound": 1_000}
    await emulator.control.set_account(provider="bedrock", limits=[tokens])
    status, headers, body = await message(session, emulator, ["Hello"], "/anthropic/v1/messages")
    assert (status, body["error"]["type"]) == (429, "rate_limit_error")
    assert body["error"]["message"].startswith("Too many tokens")
    assert not [name for name in headers if "retry" in name.lower() or "limit" in name.lower()]
    status, _, body = await chat(session, emulator, max_tokens=2_000)
    assert status == 429
    assert body["error"]["message"].startswith("Too many tokens")


async def test_geminis_compatible_endpoint_refuses_with_a_list(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    requests = {"unit": "requests", "bound": 0}
    await emulator.control.set_account(provider="gemini", limits=[requests])
    status, _, body = await chat(session, emulator)
    assert status == 429
    (details,) = [item["error"]["details"] for item in body]
    (failure,) = [item for item in details if item["@type"].endswith("QuotaFailure")]
    assert failure["violations"][0]["quotaId"] == "GenerateRequestsPerMinutePerProjectPerModel"


async def test_an_answers_end_has_settled_what_it_counts(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    tokens = {"unit": "tokens", "bound": 10_000}
    await emulator.control.set_account(provider="bedrock", limits=[tokens])
    for _ in range(5):
        status, _, body = await chat(session, emulator, max_tokens=9_000)
        assert status == 200
    counted = 5 * (body["usage"]["prompt_tokens"] + 5 * body["usage"]["completion_tokens"])
    assert (await emulator.control.account())["limits"][0]["counted"] == counted


async def test_calls_in_another_dialect_are_not_of_the_account(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    await emulator.control.set_account(provider="anthropic", limits=[])
    status, headers, _ = await chat(session, emulator)
    assert status == 200
    assert "x-ratelimit-limit-requests" not in headers
    assert (await emulator.control.account())["calls"] == 0


async def test_a_new_tier_is_in_force_from_the_next_call_on(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    await emulator.control.set_account(provider="openai", limits=LIMITS)
    await chat(session, emulator)
    await emulator.control.set_account(tier=2)
    _, headers, _ = await chat(session, emulator)
    assert headers["x-ratelimit-limit-requests"] == "6"
    assert headers["x-ratelimit-remaining-requests"] == "4"
    await emulator.control.reset()
    with pytest.raises(InvalidRequest):
        await emulator.control.account()


async def listed(session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> Any:
    async with session.get(url, headers=headers) as answer:
        return answer.status, await answer.json()


async def test_openais_rate_limit_api(emulator: Emulator, session: aiohttp.ClientSession) -> None:
    url = f"{emulator.url}/v1/organization/projects/proj_1/rate_limits"
    admin = {"Authorization": "Bearer sk-admin-1"}
    assert (await listed(session, url, admin))[0] == 404
    await emulator.control.set_account(provider="openai", limits=LIMITS)
    assert (await listed(session, url, {"Authorization": "Bearer sk-proj-1"}))[0] == 403
    status, page = await listed(session, f"{url}?limit=1", admin)
    assert (status, page["object"], page["has_more"]) == (200, "list", True)
    assert page["data"][0]["max_tokens_per_1_minute"] == 5_000


async def test_anthropics_rate_limit_api(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    await emulator.control.set_account(**CLAUDE, workspaces={"wrkspc_1": 0.5})
    admin = {"x-api-key": "sk-ant-admin-1", "anthropic-version": "2023-06-01"}
    url = f"{emulator.url}/v1/organizations"
    status, page = await listed(session, f"{url}/rate_limits", admin)
    assert status == 200
    assert page["data"][0]["models"] == ["claude-haiku-5-5", "claude-opus-5-5", "claude-sonnet-5-5"]
    status, page = await listed(session, f"{url}/workspaces/wrkspc_1/rate_limits", admin)
    assert page["data"][0]["limits"][0]["org_limit"] == 2_000
    assert (await listed(session, f"{url}/rate_limits", admin | {"x-api-key": "sk-ant-1"}))[
        0
    ] == 403
