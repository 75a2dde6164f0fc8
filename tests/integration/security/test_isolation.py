"""What a tenant can see and use of another's, on the native paths."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import key_of
from tidegate.call import Scope
from tidegate.policy.format import edit

PATH = "/v1beta/models/gemini-2.5-flash:generateContent"
BODY = {"contents": [{"parts": [{"text": "Say hello"}]}]}
CHAT = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": "Say hello"}]}


@pytest.fixture
async def gateway(open_gateway: Opener) -> Gateway:
    return await open_gateway(worker=False, auth="on")


async def asked(
    gateway: Gateway, method: str, path: str, headers: dict[str, str], body: Any = None
) -> tuple[int, dict[str, str], Any]:
    async with gateway.http.request(
        method, gateway.url + path, headers=headers, json=body
    ) as response:
        answer = await response.json(content_type=None)
        return response.status, {k.lower(): v for k, v in response.headers.items()}, answer


async def test_no_native_path_is_open_without_a_key_and_none_is_a_guess(gateway: Gateway) -> None:
    seen = 0
    for method, path in (
        *(("POST", PATH), ("POST", "/v1/chat/completions"), ("POST", "/v1/messages")),
        *(("GET", "/v1/models"), ("GET", "/v1beta/models"), ("GET", "/v1beta/files/abc")),
        *(("DELETE", "/v1beta/files/abc"), ("POST", "/upload/v1beta/files")),
    ):
        for headers in ({}, {"Authorization": "Bearer tg_0123456789_" + "x" * 43}):
            status, _, body = await asked(gateway, method, path, headers)
            assert status == 401, (method, path)
            assert "error" in body, "in the words of the dialect"
            seen += 1
    assert seen == 16
    assert await gateway.calls() == []


async def test_a_call_and_its_record_are_the_owners_alone(gateway: Gateway) -> None:
    acme, other = [await key_of(gateway, name) for name in ("acme", "other")]
    _, headers, _ = await asked(gateway, "POST", PATH, acme, BODY)
    request_id = headers["x-tidegate-request-id"]
    row = await gateway.audit(request_id)
    assert row["tenant_id"] == "acme"
    for path in (f"/status/{request_id}", "/requests?source=relay"):
        status, _, body = await asked(gateway, "GET", path, other)
        assert (status, body.get("items", [])) in ((404, []), (200, [])), path
        assert (await asked(gateway, "GET", path, acme))[0] == 200, path
    status, _, _ = await asked(gateway, "DELETE", f"/requests/{request_id}", other)
    assert status == 404


async def test_the_tenants_header_opens_nothing_that_the_key_does_not(gateway: Gateway) -> None:
    acme = await key_of(gateway, "acme")
    await key_of(gateway, "other")
    for path, body in ((PATH, BODY), ("/v1/chat/completions", CHAT)):
        status, _, _ = await asked(
            gateway, "POST", path, acme | {"x-tidegate-tenant": "other"}, body
        )
        assert status == 403
    assert await gateway.calls() == []


async def test_an_idempotency_key_is_its_tenants_own(gateway: Gateway) -> None:
    acme, other = [await key_of(gateway, name) for name in ("acme", "other")]
    key = {"Idempotency-Key": "the-same"}
    answers = [await asked(gateway, "POST", PATH, one | key, BODY) for one in (acme, other, acme)]
    assert [status for status, _, _ in answers] == [200, 200, 200]
    assert ["idempotency-replayed" in headers for _, headers, _ in answers] == [False, False, True]
    assert len(await gateway.calls()) == 2
    # Nor does another's tell by a conflict that there is such a key.
    changed = {"contents": [{"parts": [{"text": "Something else"}]}]}
    third = await key_of(gateway, "third")
    assert (await asked(gateway, "POST", PATH, third | key, changed))[0] == 200


async def test_models_that_a_tenant_may_not_ask_are_not_shown_either(gateway: Gateway) -> None:
    acme = await key_of(gateway, "acme", models=("gemini-2.5-flash",))
    for path, key, name in (("/v1/models", "data", "id"), ("/v1beta/models", "models", "name")):
        headers = acme if path == "/v1/models" else {"x-goog-api-key": acme["Authorization"][7:]}
        _, _, body = await asked(gateway, "GET", path, headers)
        assert {one[name].removeprefix("models/") for one in body[key]} == {"gemini-2.5-flash"}
        status, _, _ = await asked(gateway, "GET", f"{path}/gemini-2.5-pro", headers)
        assert status == 403
    for path, body in (
        ("/v1beta/models/gemini-2.5-pro:generateContent", BODY),
        ("/v1beta/models/gemini-2.5-pro:methodOfNextYear", BODY),
        ("/v1beta/models/gemini-2.5-pro:countTokens", BODY),
        ("/v1/chat/completions", {**CHAT, "model": "gemini-2.5-pro"}),
        ("/v1/responses", {"model": "models/gemini-2.5-pro", "input": "hello"}),
    ):
        status, _, _ = await asked(gateway, "POST", path, acme, body)
        assert status == 403, path
    assert [call for call in await gateway.calls() if call.kind != "other"] == []


async def test_files_of_the_account_are_not_listed_to_other_tenants(gateway: Gateway) -> None:
    acme, other = [
        {"x-goog-api-key": (await key_of(gateway, name))["Authorization"].removeprefix("Bearer ")}
        for name in ("acme", "other")
    ]
    start = {"X-Goog-Upload-Protocol": "resumable", "X-Goog-Upload-Command": "start"}
    start |= {"X-Goog-Upload-Header-Content-Length": "1"}
    start |= {"X-Goog-Upload-Header-Content-Type": "text/plain"}
    url = f"{gateway.url}/upload/v1beta/files"
    async with gateway.http.post(url, json={"file": {}}, headers=other | start) as begun:
        place = begun.headers["X-Goog-Upload-URL"]
    ends = {"X-Goog-Upload-Command": "upload, finalize", "X-Goog-Upload-Offset": "0"}
    async with gateway.http.post(place, data=b"x", headers=other | ends) as made:
        assert made.status == 200
    for path in ("/v1beta/files", "/v1beta/files?pageSize=100", "/v1alpha/files", "/v1/files"):
        counts = []
        for headers in (acme, other):
            status, _, body = await asked(gateway, "GET", path, headers)
            assert status == 200, (path, body)
            counts.append(len(body.get("files", [])))
        assert counts == [0, 1], path


async def test_a_tenant_at_its_own_limit_holds_up_nobody_else(gateway: Gateway) -> None:
    await gateway.services.keeper.change(edit({"tenant:acme": 1}), set_by="test")
    acme, other = [await key_of(gateway, name) for name in ("acme", "other")]
    await gateway.upstream.set_fault("hang", count=1)
    holding = asyncio.create_task(asked(gateway, "POST", PATH, acme, BODY))
    await gateway.in_flight(1)
    late = {"x-tidegate-deadline-ms": "100"}
    assert (await asked(gateway, "POST", PATH, acme | late, BODY))[0] == 429
    assert (await asked(gateway, "POST", PATH, other, BODY))[0] == 200
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)


async def test_scopes_hold_on_native_paths(gateway: Gateway) -> None:
    reads = await key_of(gateway, "acme", scopes=(Scope.READ,))
    for method, path in (("POST", PATH), ("GET", "/v1/models"), ("POST", "/upload/v1beta/files")):
        status, _, _ = await asked(gateway, method, path, reads, BODY)
        assert status == 403, path


async def test_no_cache_before_the_gateway_keeps_an_answer_to_a_tenant(gateway: Gateway) -> None:
    """One that knows of Authorization alone, as HTTP has it, or keeps what names no time."""
    acme = {"x-api-key": (await key_of(gateway, "acme"))["Authorization"].split()[1]}
    _, headers, _ = await asked(gateway, "POST", PATH, acme, BODY)
    request_id = headers["x-tidegate-request-id"]
    await gateway.audit(request_id)
    paths = [f"/status/{request_id}", f"/requests/{request_id}/request", "/requests", "/usage"]
    paths += ["/v1/models", "/v1beta/models", "/v1/files", "/v1/batches", "/v1/responses/resp_1"]
    for path in (*paths, f"/files/{request_id}", "/v1/models/gemini-2.5-flash", "/admin/limits"):
        for key in (acme, {}):
            async with gateway.http.get(gateway.url + path, headers=key) as response:
                stated = response.headers.getall("Cache-Control", [])
                assert any("private" in one or "no-store" in one for one in stated), path
