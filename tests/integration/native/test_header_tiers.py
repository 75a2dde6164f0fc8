"""Tiers that a client requests by a header are charged as the provider charges them."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import aiohttp
import orjson
import pytest

from tests.gateway import Opener
from tests.integration.security.hostile import Hostile, hostile, one_try
from tests.waiting import wait_until

__all__ = ["hostile", "one_try"]

_POLICY = """
[upstreams.gemini]
models = ["none"]
[upstreams.clouds]
dialects = {{ bedrock = "{url}", gemini = "{url}" }}
models = ["*"]
[upstreams.clouds.prices]
"*" = {{ input = 10, output = 100, tiers = {{ {tiers} }} }}
"""
_SHARES = {"priority": 2.0, "flex": 0.5, "optimized": 1.25}
_TIERS = ", ".join(f"{name} = {{ share = {share} }}" for name, share in _SHARES.items())
_INVOKE, _GENERATE = "/model/m/invoke", "/v1beta/models/m:generateContent"
_BEDROCK, _VERTEX = "x-amzn-bedrock-service-tier", "x-vertex-ai-llm-shared-request-type"
_LATENCY = "x-amzn-bedrock-performanceconfig-latency"
_USED = {"usageMetadata": {"promptTokenCount": 100, "candidatesTokenCount": 10}}
_FULL = {"contents": [{"parts": [{"text": "x"}]}]}
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
_USAGE = b"x-amzn-bedrock-input-token-count: 100\r\nx-amzn-bedrock-output-token-count: 10\r\n"
_USUAL_MICROS = 2_000


@pytest.mark.parametrize(
    ("path", "header", "served", "tier", "share"),
    [
        (_INVOKE, "priority", "priority", "priority", 2.0),
        (_INVOKE, "priority", "default", None, 1.0),
        (_INVOKE, "flex", "flex", "flex", 0.5),
        (_INVOKE, "reserved", "reserved", None, 1.0),
    ],
)
async def test_a_whole_answer_is_charged_by_the_tier_that_served_it(
    open_gateway: Opener,
    hostile: Hostile,
    tmp_path: Path,
    path: str,
    header: str,
    served: str,
    tier: str | None,
    share: float,
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(_POLICY.format(url=hostile.url, tiers=_TIERS))
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    named = f"{_BEDROCK}: {served}\r\n".encode()
    hostile.answer = _HEAD + _USAGE + named + b"content-length: 2\r\n\r\n{}"
    asked = gateway.http.post(gateway.url + path, json=_FULL, headers={_BEDROCK: header})
    async with asked as response:
        assert response.status == 200, await response.text()
    assert f"{_BEDROCK}: {header}".encode() in hostile.seen[0].lower()
    row = await wait_until(partial(gateway.database.fetchrow, "SELECT * FROM audit"), 10)
    assert row["cost_micros"] == _USUAL_MICROS * share
    assert orjson.loads(row["usage_details"] or "{}").get("tier") == tier


@pytest.mark.parametrize(("served", "micros"), [("optimized", 2_500), ("standard", 2_000)])
async def test_a_latency_that_is_optimized_has_its_own_price(
    open_gateway: Opener, hostile: Hostile, tmp_path: Path, served: str, micros: int
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(_POLICY.format(url=hostile.url, tiers=_TIERS))
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    tiers = f"{_BEDROCK}: default\r\n{_LATENCY}: {served}\r\n".encode()
    hostile.answer = _HEAD + _USAGE + tiers + b"content-length: 2\r\n\r\n{}"
    headers = {_LATENCY: "optimized"}
    async with gateway.http.post(gateway.url + _INVOKE, json=_FULL, headers=headers) as response:
        assert response.status == 200, await response.text()
    row = await wait_until(partial(gateway.database.fetchrow, "SELECT * FROM audit"), 10)
    assert (row["usage_state"], row["cost_micros"]) == ("told", micros)


@pytest.mark.parametrize(
    ("path", "headers", "body", "dear"),
    [
        (_INVOKE, {_BEDROCK: "priority"}, {}, True),
        (_INVOKE, {_BEDROCK: "flex"}, {}, False),
        (_INVOKE, {}, {}, False),
        (_INVOKE, {_BEDROCK: "flex"}, {"serviceTier": {"type": "priority"}}, True),
        (_GENERATE, {_VERTEX: "priority"}, {}, True),
        (_GENERATE, {}, {}, False),
    ],
)
async def test_an_answer_that_breaks_off_is_charged_by_the_requested_tier(
    open_gateway: Opener,
    hostile: Hostile,
    one_try: None,
    tmp_path: Path,
    path: str,
    headers: dict[str, str],
    body: dict[str, object],
    dear: bool,
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(_POLICY.format(url=hostile.url, tiers=_TIERS))
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    answer = orjson.dumps({"inputTokens": 100, "outputTokens": 10, "text": "x" * 9_000} | _USED)

    async def breaks_off(writer: asyncio.StreamWriter) -> None:
        writer.write(_HEAD + b"content-length: 20000\r\n\r\n" + answer)
        await writer.drain()

    hostile.answer = breaks_off
    asked = gateway.http.post(gateway.url + path, json=_FULL | body, headers=headers)
    async with asked as response:
        assert response.status == 200, await response.text()
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    row = await wait_until(partial(gateway.database.fetchrow, "SELECT * FROM audit"), 10)
    tokens = row["input_tokens"] * 10 + row["output_tokens"] * 100
    assert row["cost_micros"] == tokens * (2 if dear else 1)
