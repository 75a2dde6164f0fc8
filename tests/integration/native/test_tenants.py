"""Keys, tenants and what they may, on native paths; and the limits of each upstream's pool."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.commands import Done, tidegate
from tests.gateway import Gateway, Opener
from tests.integration.native.test_upstreams import WriteFile, policy, second
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, key_of
from tests.waiting import wait_until

__all__ = ["policy", "second"]

CHAT = "/v1/chat/completions"
GEMINI = "/v1beta/models/gemini-2.5-flash:generateContent"
CLAUDE = "/v1/messages"
SAID = [{"role": "user", "content": "Say hello"}]
BODIES: dict[str, Any] = {
    CHAT: {"model": "gemini-2.5-flash", "messages": SAID},
    GEMINI: {"contents": [{"parts": [{"text": "Say hello"}]}]},
    CLAUDE: {"model": "claude-x", "max_tokens": 9, "messages": SAID},
}


async def ask(
    gateway: Gateway, path: str, headers: dict[str, str], **changes: Any
) -> tuple[int, Any, str]:
    body = BODIES[path.partition("?")[0]] | changes
    given = headers | ({"anthropic-version": "2023-06-01"} if path == CLAUDE else {})
    async with gateway.http.post(gateway.url + path, json=body, headers=given) as response:
        answer = await response.json(content_type=None)
        return response.status, answer, response.headers["x-tidegate-request-id"]


async def test_a_key_is_asked_for_in_each_dialects_words(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    key = (await key_of(gateway, "acme"))["Authorization"].removeprefix("Bearer ")
    for path, header in (
        (CHAT, "Authorization"),
        (GEMINI, "x-goog-api-key"),
        (CLAUDE, "x-api-key"),
    ):
        shown = f"Bearer {key}" if header == "Authorization" else key
        assert (await ask(gateway, path, {header: shown}))[0] == 200, path
        for wrong in ({}, {header: shown[:-2] + "xx"}):
            status, body, _ = await ask(gateway, path, wrong)
            assert status == 401
            assert "error" in body
            assert key not in str(body)
    assert (await ask(gateway, f"{GEMINI}?key={key}", {}))[0] == 200
    _, body, _ = await ask(gateway, CHAT, {})
    assert body["error"]["code"] == "invalid_api_key"
    assert len(await gateway.calls()) == 4


async def test_a_call_is_its_tenants_and_nobody_elses(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    acme, other = [await key_of(gateway, name, most_priority=10) for name in ("acme", "other")]
    _, _, request_id = await ask(gateway, CHAT, acme | {"x-tidegate-priority": "90"})
    row = await gateway.audit(request_id)
    assert (row["tenant_id"], row["priority"]) == ("acme", 10)
    assert row["key_id"]
    url = f"{gateway.url}/status/{request_id}"
    async with gateway.http.get(url, headers=acme) as response:
        assert response.status == 200
    async with gateway.http.get(url, headers=other) as response:
        assert response.status == 404


async def test_what_a_tenant_may_ask_and_how_much_at_once(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    acme = await key_of(gateway, "acme", models=["gemini-*"], most_streams=1)
    status, body, _ = await ask(gateway, CLAUDE, acme)
    assert (status, body["error"]["type"]) == (403, "permission_error")
    async with gateway.http.get(f"{gateway.url}/v1/models", headers=acme) as response:
        names = [model["id"] for model in (await response.json())["data"]]
    assert names
    assert all(name.startswith("gemini-") for name in names)
    await gateway.upstream.set_fault("hang", count=1)
    body = BODIES[CHAT] | {"stream": True}
    holding = asyncio.create_task(gateway.http.post(gateway.url + CHAT, json=body, headers=acme))
    await gateway.in_flight(1)
    status, answer, _ = await ask(gateway, CHAT, acme, stream=True)
    assert (status, answer["error"]["code"]) == (429, "quota_exceeded")
    assert (await ask(gateway, CHAT, acme))[0] == 200
    path = f"{gateway.url}/v1/responses/resp_1"
    for reading, told in (("", 404), ("?stream=true", 429), ("?stream=false", 404)):
        async with gateway.http.get(f"{path}{reading}", headers=acme) as response:
            assert response.status == told
    spoken = {"model": "gemini-tts", "voice": "a", "input": "b", "stream_format": "sse"}
    async with gateway.http.post(f"{gateway.url}/v1/audio/speech", json=spoken, headers=acme) as it:
        assert it.status == 429
    form = aiohttp.FormData({"model": "gemini-x", "stream": "true"})
    form.add_field("file", b"RIFF", filename="a.wav")
    url = f"{gateway.url}/v1/audio/transcriptions"
    async with gateway.http.post(url, data=form, headers=acme) as response:
        assert response.status == 429
    holding.cancel()
    await wait_until(lambda: gateway.held == 0, 20, "the permit back")


async def test_who_may_ask_some_models_names_one(open_gateway: Opener) -> None:
    """What a saved prompt would ask is not known here."""
    gateway = await open_gateway(worker=False, auth="on")
    saved = {"prompt": {"id": "pmpt_1"}, "input": "Say hello"}
    for name, models, may in (("some", ["gemini-*"], False), ("all", ["*"], True)):
        key = await key_of(gateway, name, models=models)
        url = f"{gateway.url}/v1/responses"
        async with gateway.http.post(url, json=saved, headers=key) as response:
            said = await response.text()
            assert (response.status != 403) == may, said
            assert ("without naming a model" in said) != may
        job = {"endpoint": "/v1/responses", "body": saved}
        async with gateway.http.post(f"{gateway.url}/submit", json=job, headers=key) as response:
            said = await response.text()
            assert response.status == (202 if may else 403), said
            assert ("without naming a model" in said) != may


async def test_without_keys_a_header_names_the_tenant(gateway: Gateway) -> None:
    _, _, request_id = await ask(gateway, CHAT, {"x-tidegate-tenant": "acme"})
    assert (await gateway.audit(request_id))["tenant_id"] == "acme"
    status, body, _ = await ask(gateway, CHAT, {"x-tidegate-tenant": "a b"})
    assert (status, body["error"]["param"]) == (400, "x-tidegate-tenant")


async def until_all_wait(gateway: Gateway, count: int) -> None:
    """Return once so many calls wait in Valkey."""

    async def so() -> bool:
        found = await gateway.services.limiter.snapshot()
        return sum(one.waiting for one in found.tenants) == count

    await wait_until(so, 20, f"{count} wait")


async def test_of_a_tenants_calls_the_one_with_the_earliest_deadline_of_its_own_goes_first(
    open_gateway: Opener, tmp_path: Path
) -> None:
    file = tmp_path / "one.toml"
    file.write_text('[limits]\n"kind:text_only" = 1\n')
    gateway = await open_gateway(worker=False, tidegate_policy=file, stream_wait_ms=40_000)
    await gateway.upstream.set_fault("hang", count=1)
    holding = asyncio.create_task(ask(gateway, CHAT, {}))
    await gateway.in_flight(1)
    tasks = []
    for number, deadline in enumerate(("", "600000", "50000")):
        headers = {"x-tidegate-deadline-ms": deadline} if deadline else {}
        tasks.append(asyncio.create_task(ask(gateway, CHAT, headers)))
        await until_all_wait(gateway, number + 1)
    holding.cancel()
    rows = [await gateway.audit((await task)[2]) for task in tasks]
    order = sorted(range(3), key=lambda number: rows[number]["admitted_at"])
    # The gateway's own 40 s are no deadline: the first is due after ten minutes, just before the
    # second, which came a moment later.
    assert order == [2, 0, 1]


async def test_one_tenants_keys_for_repeating_are_not_anothers(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    ids = set()
    for name in ("acme", "other"):
        headers = await key_of(gateway, name) | {"Idempotency-Key": "same"}
        ids.add((await ask(gateway, CHAT, headers))[2])
    assert len(ids) == len(await gateway.calls()) == 2


@pytest.fixture
async def two_pools(open_gateway: Opener, policy: WriteFile) -> Gateway:
    return await open_gateway(
        worker=False, tidegate_policy=policy(bound=4), admin_token=ADMIN_TOKEN
    )


async def test_the_limits_of_each_pool_are_seen_and_changed_by_its_name(
    two_pools: Gateway,
) -> None:
    url = f"{two_pools.url}/admin/limits"
    async with two_pools.http.get(f"{url}?pool=second", headers=AS_ADMIN) as response:
        body = await response.json()
    assert body["pool"] == "second"
    assert [(one["limit"], one["bound"]) for one in body["limits"]] == [("pool:total", 4)]
    change = {"limit": 9}
    path = f"{url}/pool:total?pool=second"
    async with two_pools.http.put(path, json=change, headers=AS_ADMIN) as response:
        assert response.status == 200
    assert two_pools.services.limiters["second"].policy.bound("pool:total") == 9
    assert "pool:total" not in two_pools.services.limiter.policy.limits
    async with two_pools.http.get(f"{url}?pool=third", headers=AS_ADMIN) as response:
        problem = await response.json()
    assert (response.status, problem["field"]) == (400, "pool")
    assert problem["allowed"] == "one of gemini, second"


async def test_commands_name_a_pool_too(two_pools: Gateway) -> None:
    file = str(two_pools.config.tidegate_policy)

    async def limits(*arguments: str) -> Done:
        return await tidegate(two_pools, "limits", *arguments, TIDEGATE_POLICY=file)

    shown = await limits("--pool", "second", "show", "--json")
    assert [one["limit"] for one in shown.json["limits"]] == ["pool:total"]
    changed = await limits("--pool", "second", "set", "pool:total=6")
    assert changed.code == 0, changed.complained
    second_pool = two_pools.services.limiters["second"]
    await wait_until(lambda: second_pool.policy.bound("pool:total") == 6, 20, "the change")
    unknown = await limits("--pool", "third", "show")
    assert unknown.code != 0
    assert "gemini, second" in unknown.complained
