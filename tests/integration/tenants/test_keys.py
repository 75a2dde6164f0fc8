"""API keys on real servers, over two API processes: who is let in, and for how long."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, ask, key_of, submitted
from tests.loglines import Lines, lines
from tests.waiting import promised_s, wait_until
from tidegate.call import Scope
from tidegate.embedded.servers import PostgresServer
from tidegate.store.tenants import make_key

__all__ = ["lines"]

IN_FORCE_WITHIN_S = promised_s(1.0)
# Answered before anybody is asked who he is.
OPEN = ("/health/live", "/health/ready", "/health/dependencies", "/api/hello")


async def code_of(gateway: Gateway, headers: dict[str, str]) -> int:
    """How a request that needs nothing but a key is answered: 404 for who is let in."""
    status, _ = await ask(gateway, "GET", f"/status/{'0' * 32}", headers)
    return status


async def test_a_key_opens_by_each_header_and_by_the_query(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    headers = await key_of(gateway, "acme")
    text = headers["Authorization"].removeprefix("Bearer ")
    for shown in (headers, {"X-Api-Key": text}, {"X-Goog-Api-Key": text}):
        request_id = await submitted(gateway, shown)
        row = await gateway.database.fetchrow(
            "SELECT tenant_id FROM requests WHERE id = $1::uuid", request_id
        )
        assert row["tenant_id"] == "acme"
        assert (await ask(gateway, "GET", f"/status/{request_id}", shown))[0] == 200
    status, _ = await ask(gateway, "POST", f"/llm/submit?key={text}", {}, {"data": "Explain"})
    assert status == 202
    status, problem = await ask(gateway, "POST", "/submit", {}, {"data": "Explain"})
    assert (status, problem["code"]) == (401, "unauthenticated")
    assert "x-api-key" in problem["detail"]


async def test_wrong_expired_and_revoked_keys_open_nothing(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    tenants = gateway.services.store.tenants
    await key_of(gateway, "acme")
    for wrong in (make_key().text, "tg_", "sk-abc", ADMIN_TOKEN):
        assert await code_of(gateway, {"x-api-key": wrong}) == 401
    for life_s in (0.3, 3, 30):  # on a machine that stalls it may be over before it is used
        soon = datetime.now(UTC) + timedelta(seconds=life_s)
        _, short = await tenants.create_key("acme", expires_at=soon)
        headers = {"x-api-key": short.text}
        if (code := await code_of(gateway, headers)) != 401:
            break
    assert code == 404

    async def has_expired() -> bool:
        return await code_of(gateway, headers) == 401

    await wait_until(has_expired, 60, "the key's end")
    _, problem = await ask(gateway, "POST", "/submit", headers, {"data": "Explain"})
    assert problem["detail"] == f"the key tg_{short.prefix} has expired"


async def test_a_change_is_in_force_in_every_process_within_a_second(
    open_gateway: Opener,
) -> None:
    first = await open_gateway(worker=False, auth="on", admin_token=ADMIN_TOKEN)
    second = await open_gateway(worker=False, auth="on", admin_token=ADMIN_TOKEN)
    both = (first, second)
    made = {"tenant": "default"}
    status, key = await ask(first, "POST", "/admin/keys", AS_ADMIN, made)
    assert status == 201
    headers = {"x-api-key": key["key"]}
    assert [await code_of(one, headers) for one in both] == [404, 404], "at once, everywhere"

    async def all_say(code: int) -> bool:
        return [await code_of(one, headers) for one in both] == [code, code]

    for method, path, body, code in (
        ("PUT", "/admin/tenants/default", {"disabled": True}, 403),
        ("PUT", "/admin/tenants/default", {"disabled": False}, 404),
        ("DELETE", f"/admin/keys/{key['prefix']}", None, 401),
    ):
        began = time.monotonic()
        status, _ = await ask(first, method, path, AS_ADMIN, body)
        assert status == 200
        assert await code_of(first, headers) == code, "at once where it was changed"
        await wait_until(partial(all_say, code), 20, f"{code} everywhere")
        assert time.monotonic() - began < IN_FORCE_WITHIN_S
    refused = await ask(second, "DELETE", "/admin/keys/0123456789", AS_ADMIN)
    assert (refused[0], refused[1]["code"]) == (404, "not_found")


async def test_without_postgresql_known_keys_go_on_and_others_get_503(
    open_gateway: Opener, own_postgres: PostgresServer
) -> None:
    gateway = await open_gateway(
        worker=False, auth="on", auth_outage_ms=2_500, database_url=own_postgres.url()
    )
    headers = await key_of(gateway, "acme")
    _, unseen = await gateway.services.store.tenants.create_key("acme")
    assert await code_of(gateway, headers) == 404
    own_postgres.kill()
    gone_at = time.monotonic()
    await wait_until(lambda: gateway.services.store.connections.unavailable, 20, "the outage")
    streamed = await ask(
        gateway, "POST", "/stream", headers, {"text": "Explain", "type": "text_only"}
    )
    assert streamed[0] == 200
    status, problem = await ask(
        gateway, "POST", "/stream", {"x-api-key": unseen.text}, {"text": "Explain"}
    )
    assert (status, problem["code"]) == (503, "store_unavailable")

    async def is_over() -> bool:
        status, _ = await ask(gateway, "POST", "/stream", headers, {"text": ""})
        return status == 503

    await wait_until(is_over, 20, "the end of the time that cached keys work")
    assert time.monotonic() - gone_at > 1.5
    await asyncio.to_thread(own_postgres.start)

    async def is_back() -> bool:
        return await code_of(gateway, headers) == 404

    await wait_until(is_back, 20, "the return")


async def test_scopes_open_what_they_name(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    infer, read, admin = [
        await key_of(gateway, "acme", scopes=(scope,))
        for scope in (Scope.INFER, Scope.READ, Scope.ADMIN)
    ]
    request_id = await submitted(gateway, infer)
    status, problem = await ask(gateway, "GET", f"/status/{request_id}", infer)
    assert (status, problem["allowed"]) == (403, "infer")
    assert (await ask(gateway, "GET", f"/status/{request_id}", read))[0] == 200
    for headers in (read, admin):
        assert (await ask(gateway, "POST", "/submit", headers, {"data": "Explain"}))[0] == 403
        assert (await ask(gateway, "POST", "/stream", headers, {"data": "Explain"}))[0] == 403
    assert (await ask(gateway, "GET", "/admin/limits", admin))[0] == 200
    assert (await ask(gateway, "GET", "/admin/limits", infer))[0] == 403
    assert (await ask(gateway, "GET", "/admin/keys", {}))[0] == 401


async def test_no_route_is_open_but_those_that_say_so(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on", admin_token=ADMIN_TOKEN)
    _, document = await gateway.get("/openapi.json")
    asked = 0
    for prefix in ("", "/llm"):
        for path, operations in document["paths"].items():
            for method in operations:
                whole = prefix + path.replace("_id}", "}").replace("{request}", "0" * 32)
                whole = whole.replace("{file}", "0" * 32).replace("{", "").replace("}", "")
                for headers in ({}, {"x-api-key": make_key().text}, {"x-tidegate-tenant": "acme"}):
                    async with gateway.http.request(
                        method, gateway.url + whole, headers=headers
                    ) as response:
                        code = 200 if path in OPEN else 401
                        assert response.status == code, (method, whole, headers)
                        if code == 401:
                            assert response.headers["www-authenticate"] == "Bearer"
                asked += 1
    assert asked > 40
    for path in ("/docs", "/openapi.json", "/favicon.ico", "/static/favicon.svg"):
        async with gateway.http.get(gateway.url + path) as response:
            assert response.status == 200


async def test_with_keys_asked_for_the_header_may_only_repeat_the_keys_tenant(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    headers = await key_of(gateway, "acme")
    assert await submitted(gateway, headers | {"x-tidegate-tenant": "acme"})
    status, problem = await ask(
        gateway, "POST", "/submit", headers | {"x-tidegate-tenant": "other"}, {"data": "Explain"}
    )
    assert (status, problem["field"]) == (403, "x-tidegate-tenant")


async def test_with_keys_not_asked_for_the_header_names_the_tenant(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    as_acme = {"x-tidegate-tenant": "acme", "x-api-key": "dummy"}
    request_id = await submitted(gateway, as_acme)
    assert (await ask(gateway, "GET", f"/status/{request_id}", as_acme))[0] == 200
    assert (await ask(gateway, "GET", f"/status/{request_id}", {}))[0] == 404
    bad = {"x-tidegate-tenant": "a|b"}
    status, problem = await ask(gateway, "POST", "/submit", bad, {"data": "Explain"})
    assert (status, problem["field"]) == (400, "x-tidegate-tenant")
    assert problem["allowed"]


async def test_keys_are_asked_for_where_others_can_reach_it(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, host="0.0.0.0")
    assert await code_of(gateway, {}) == 401
    assert await code_of(gateway, await key_of(gateway, "acme")) == 404


async def test_a_start_without_any_key_says_how_to_make_one(
    open_gateway: Opener, lines: Lines
) -> None:
    def told() -> list[dict[str, Any]]:
        return [line for line in lines() if line["event"] == "no_api_key"]

    await open_gateway(worker=False, auth="on")
    await wait_until(told, 20, "the line")
    assert "tidegate keys create" in told()[0]["hint"]
    gateway = await open_gateway(worker=False, auth="on")
    await key_of(gateway, "acme")
    await open_gateway(worker=False, auth="on")
    assert len(told()) <= 2, "once a process, and not where there is a key"


async def test_the_last_use_of_a_key_is_noted_behind(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    headers = await key_of(gateway, "acme")
    tenants = gateway.services.store.tenants
    assert await code_of(gateway, headers) == 404
    assert (await tenants.list_keys("acme"))[0].last_used_at is None
    await asyncio.gather(*(gateway.services.gate.note_uses() for _ in range(2)))
    used_at = (await tenants.list_keys("acme"))[0].last_used_at
    assert used_at is not None
    assert abs((datetime.now(UTC) - used_at).total_seconds()) < 5
