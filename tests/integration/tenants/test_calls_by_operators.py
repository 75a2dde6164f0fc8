"""Calls that operators make as a tenant: whose limits apply, what is on record, who may do so."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, ask, key_of
from tests.loglines import Lines, lines
from tests.waiting import wait_until
from tidegate.call import Scope
from tidegate.policy.format import edit

__all__ = ["lines"]

MODEL = "gemini-2.5-flash"
CHAT = "/v1/chat/completions"
WITH_KEYS = {"auth": "on", "admin_token": ADMIN_TOKEN}
AS_ACME = {"X-Tidegate-As-Tenant": "acme"}
MESSAGES = [{"role": "user", "content": "Explain the tide"}]
GEMINI = f"/v1beta/models/{MODEL}:generateContent"
CALLS: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": MESSAGES},
    "/v1/responses": {"model": MODEL, "input": "Explain the tide", "stream": True},
    GEMINI: {"contents": [{"role": "user", "parts": [{"text": "Explain the tide"}]}]},
    "/stream": {"data": "Explain the tide"},
    "/submit": {"data": "Explain the tide"},
}


async def called(
    gateway: Gateway, path: str, body: Any, headers: dict[str, str]
) -> tuple[int, str]:
    url = f"{gateway.url}/admin/calls{path}"
    async with gateway.http.post(url, json=body, headers=headers) as answer:
        return answer.status, await answer.text()


async def rows(gateway: Gateway, count: int) -> list[Any]:
    query = "SELECT * FROM audit WHERE status <> 'queued' ORDER BY submitted_at"

    async def found() -> list[Any] | None:
        listed = await gateway.database.fetch(query)
        return listed if len(listed) >= count else None

    listed: list[Any] = await wait_until(found, 20, f"{count} rows")
    assert len(listed) == count
    return listed


async def recorded_calls(gateway: Gateway) -> list[dict[str, Any]]:
    """The recorded actions, the first one first."""
    headers = {"Authorization": f"Bearer {gateway.operator_key}"}
    status, page = await ask(gateway, "GET", "/admin/actions?what=tenant.call", headers)
    assert status == 200
    found: list[dict[str, Any]] = page["items"]
    return found[::-1]


async def operator_of(gateway: Gateway, *scopes: Scope) -> tuple[str, dict[str, str]]:
    """An id of a key of the tenant `default`, and headers with it."""
    key, made = await gateway.services.store.tenants.create_key("default", scopes=scopes)
    return key.prefix, {"Authorization": f"Bearer {made.text}"}


@pytest.mark.parametrize("settings", [WITH_KEYS, {}], ids=["keys", "keyless"])
async def test_each_call_is_the_tenants_and_names_its_operator(
    open_gateway: Opener, settings: dict[str, Any]
) -> None:
    gateway = await open_gateway(**settings)
    await gateway.services.store.tenants.set("acme", {}, by="test")
    prefix, operator = await operator_of(gateway, Scope.OPERATOR)
    operator |= {"X-Forwarded-For": "203.0.113.9", **AS_ACME}
    for path, body in CALLS.items():
        status, text = await called(gateway, path, body, operator)
        assert status in (200, 202), (path, text)
    listed = await rows(gateway, len(CALLS))
    for row in listed:
        assert (row["tenant_id"], row["key_id"]) == ("acme", f"operator:tg_{prefix}")
        assert (row["status"], row["total_tokens"] > 0) == ("succeeded", True)
    assert {row["endpoint"] for row in listed} == {CHAT, "/v1/responses", GEMINI, None}
    found = await recorded_calls(gateway)
    assert [one["after"] for one in found] == [{"path": path} for path in CALLS]
    for one in found:
        assert (one["operator"], one["role"]) == (f"the key tg_{prefix}", "operator")
        assert (one["target"], one["address"]) == ("acme", "127.0.0.1, forwarded for 203.0.113.9")
    for call in await gateway.upstream.calls():
        assert "tg_" not in str(call)
    status, page = await ask(gateway, "GET", "/admin/requests?tenant=acme&limit=1", operator)
    assert (status, page["items"][0]["key"]) == (200, f"operator:tg_{prefix}")


async def test_each_call_is_one_line_of_the_log(open_gateway: Opener, lines: Lines) -> None:
    gateway = await open_gateway(**WITH_KEYS, worker=False)
    await key_of(gateway, "acme")
    for path in (CHAT, "/stream", "/submit"):
        await called(gateway, path, CALLS[path], AS_ADMIN | AS_ACME)
    await recorded_calls(gateway)

    def written() -> list[dict[str, Any]]:
        return [line for line in lines() if line["event"] == "request_done"]

    await wait_until(lambda: any(line["method"] == "GET" for line in written()), 20)
    posts = [line for line in written() if line["method"] == "POST"]
    assert [line["status"] for line in posts] == [200, 200, 202], posts


async def test_a_tenant_sees_calls_by_operators_and_not_who_made_them(open_gateway: Opener) -> None:
    gateway = await open_gateway(**WITH_KEYS, worker=False)
    acme = await key_of(gateway, "acme")
    own = acme["Authorization"].removeprefix("Bearer tg_").partition("_")[0]
    operators = [await operator_of(gateway, Scope.OPERATOR) for _ in range(2)]
    for _, headers in operators:
        assert (await called(gateway, GEMINI, CALLS[GEMINI], headers | AS_ACME))[0] == 200
    assert (await ask(gateway, "POST", GEMINI, acme, CALLS[GEMINI]))[0] == 200
    await rows(gateway, 3)
    usage, database = gateway.services.store.usage, gateway.database
    since = datetime.now(UTC).date() - timedelta(days=2)
    named = {own: 1, **{f"operator:tg_{prefix}": 1 for prefix, _ in operators}}
    for is_summed in (False, True):  # read from the request log, and from a day's sums
        if is_summed:
            await database.execute("UPDATE audit SET created_at = created_at - interval '1 day'")
            await database.execute("UPDATE usage_days SET day = day - 1")
            assert await usage.sum_days() > 0
            await database.execute("UPDATE usage_sums SET images = images + 1")
        for path, keys in (("/usage", {own: 1, "operator": 2}), ("/admin/usage", named)):
            headers = acme if path == "/usage" else AS_ADMIN
            for by in ("key", "key,upstream", "key,day"):
                query = f"{path}?by={by}&since={since}"
                status, sums = await ask(gateway, "GET", query, headers)
                found = {row["key"]: row["requests"] for row in sums["rows"]}
                assert (status, found) == (200, keys), query
            assert sums["total"]["requests"] == 3
            assert (sums["total"]["images"] > 0) == is_summed


async def test_the_tenants_limits_budgets_and_models_apply(open_gateway: Opener) -> None:
    gateway = await open_gateway(**WITH_KEYS, worker=False)
    await key_of(gateway, "acme", models=["gemini-2.5-*"], budget_day_tokens=1)
    await gateway.services.keeper.change(edit({"tenant:other": 1}), set_by="test")
    await key_of(gateway, "other")
    admin = AS_ADMIN | AS_ACME
    status, text = await called(gateway, CHAT, {"model": "o9", "messages": MESSAGES}, admin)
    assert (status, "o9" in text) == (403, True)
    status, text = await called(gateway, CHAT, CALLS[CHAT], admin)
    assert (status, "insufficient_quota" in text) == (429, True), text
    await gateway.upstream.set_fault("hang")
    other = AS_ADMIN | {"X-Tidegate-As-Tenant": "other"}
    body = {"model": MODEL, "messages": MESSAGES}
    running = asyncio.create_task(called(gateway, CHAT, body, other))
    await gateway.in_flight(1)
    soon = other | {"x-tidegate-deadline-ms": "100"}
    status, text = await called(gateway, CHAT, body, soon)
    assert (status, "tenant:other" in text) == (429, True), text
    running.cancel()
    await wait_until(lambda: gateway.held == 0, 10, "its end")


async def test_nobody_but_an_operator_calls_as_a_tenant(open_gateway: Opener) -> None:
    for settings in (WITH_KEYS, {"admin_token": ADMIN_TOKEN}):
        gateway = await open_gateway(**settings, worker=False)
        acme = await key_of(gateway, "acme")
        await key_of(gateway, "gone")
        await gateway.services.store.tenants.set("gone", {}, disabled=True, by="test")
        _, viewer = await operator_of(gateway, Scope.VIEWER, Scope.INFER, Scope.READ)
        unknown = {"Authorization": "Bearer tg_aaaaaaaaaa_" + "a" * 32}
        foreign = AS_ADMIN | {"Origin": "https://evil.test", "Sec-Fetch-Site": "cross-site"}
        for path, body in CALLS.items():
            for credentials, refused in (
                ({}, 401),
                (unknown, 401),
                (viewer, 403),
                (acme, 403),
            ):
                status, text = await called(gateway, path, body, credentials | AS_ACME)
                assert status == refused, (path, credentials, text)
        status, text = await called(gateway, CHAT, CALLS[CHAT], viewer | AS_ACME)
        assert "this needs the role operator" in text
        if not gateway.services.gate.on:
            assert (await called(gateway, CHAT, CALLS[CHAT], foreign | AS_ACME))[0] == 403
        for named, refused in (
            ({}, 400),
            ({"X-Tidegate-As-Tenant": "no {name}"}, 400),
            ({"X-Tidegate-As-Tenant": "gone"}, 403),
            ({"X-Tidegate-As-Tenant": "unknown"}, 404 if gateway.services.gate.on else 200),
        ):
            status, text = await called(gateway, CHAT, CALLS[CHAT], AS_ADMIN | named)
            assert status == refused, (named, text)
        allowed = [one["target"] for one in await recorded_calls(gateway)]
        assert allowed == ([] if gateway.services.gate.on else ["unknown"])


async def test_only_calls_of_models_are_made_as_a_tenant(open_gateway: Opener) -> None:
    gateway = await open_gateway(**WITH_KEYS, worker=False)
    await key_of(gateway, "acme")
    admin = AS_ADMIN | AS_ACME
    for path in (
        "/v1/files",
        "/v1/batches",
        "/v1/messages/batches",
        "/v1/responses/resp_1/cancel",
        "/upload/v1beta/files",
        "/v1beta/cachedContents",
        "/v1/none",
        "/admin/keys",
        "/status/x",
        "/admin/calls/v1/chat/completions",
        "",
    ):
        status, text = await called(gateway, path, {}, admin)
        assert status in (404, 405), (path, text)
    async with gateway.http.get(f"{gateway.url}/admin/calls/v1/models", headers=admin) as answer:
        assert answer.status == 405
    assert await recorded_calls(gateway) == []
    forged = {"tidegate.caller_by_operator": "acme", **AS_ACME}
    async with gateway.http.post(gateway.url + CHAT, json=CALLS[CHAT], headers=forged) as answer:
        assert answer.status == 401


async def test_a_call_that_cannot_be_recorded_is_not_made(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(**WITH_KEYS, worker=False)
    await key_of(gateway, "acme")
    await gateway.database.execute("ALTER TABLE operator_actions RENAME TO elsewhere")
    status, _ = await called(gateway, CHAT, CALLS[CHAT], AS_ADMIN | AS_ACME)
    assert status >= 500
    assert await gateway.upstream.calls() == []


async def test_a_client_that_leaves_ends_its_call(open_gateway: Opener) -> None:
    gateway = await open_gateway(**WITH_KEYS, worker=False)
    await key_of(gateway, "acme")
    await gateway.upstream.set_fault("hang")
    for path in (CHAT, "/stream"):
        running = asyncio.create_task(called(gateway, path, CALLS[path], AS_ADMIN | AS_ACME))
        await wait_until(lambda: gateway.held == 1, 10, "a call in flight")
        running.cancel()
        await wait_until(lambda: gateway.held == 0, 10, "its end")
    for row in await rows(gateway, 2):
        assert (row["status"], row["tenant_id"]) == ("cancelled", "acme")
        assert row["key_id"] == "operator:the operator's key"
