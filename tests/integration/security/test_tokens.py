"""Tokens of services as credentials for calls: what they open, and that they go no further."""

from __future__ import annotations

import time
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import connect

from tests.gateway import Opener
from tests.integration.security.hostile import BODY, PATH, Hostile
from tests.integration.tenants.asking import ask, submitted
from tests.issuer import AUDIENCE, issuer_server
from tests.waiting import wait_until
from tidegate.http import auth
from tidegate.upstream import issuer as issuers


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_a_service_calls_as_its_tenant_and_its_token_reaches_no_upstream(
    open_gateway: Opener, hostile: Hostile
) -> None:
    async with issuer_server() as issuer:
        settings: dict[str, Any] = {
            "jwt_issuer": issuer.url,
            "jwt_audience": AUDIENCE,
            "jwt_tenant_claim": "org",
        }
        gateway = await open_gateway(
            worker=False, auth="on", gemini_base_url=hostile.url, **settings
        )
        await gateway.services.store.tenants.set("acme", {}, by="test")
        token = issuer.token(org="acme")
        shown = (
            {"Authorization": f"Bearer {token}"},
            {"x-goog-api-key": token},
            {"Authorization": f"Bearer {token}", "x-goog-api-key": "placeholder"},
        )
        for headers in shown:
            async with gateway.http.post(
                gateway.url + PATH,
                data=BODY,
                headers={"Content-Type": "application/json"} | headers,
            ) as answer:
                assert answer.status == 200, await answer.text()
        assert len(hostile.seen) == len(shown)
        for seen in hostile.seen:
            assert token.encode() not in seen
            assert token.split(".")[2].encode() not in seen
        request_id = await submitted(gateway, bearer(token))
        assert (await ask(gateway, "GET", f"/status/{request_id}", bearer(token)))[0] == 200
        other = issuer.token(org="default")
        assert (await ask(gateway, "GET", f"/status/{request_id}", bearer(other)))[0] == 404
        for path in ("/admin/limits", "/metrics", "/dashboard/session"):
            assert (await ask(gateway, "GET", path, bearer(token)))[0] == 403
        assert issuer.asked["/keys"] == 1

        async def is_on_record() -> bool:
            found = await gateway.database.fetch("SELECT key_id, tenant_id FROM requests")
            return [tuple(row) for row in found] == [("jwt:svc-a", "acme")]

        await wait_until(is_on_record, 10, "the record of the job")
        stored = str(await gateway.database.fetch("SELECT * FROM requests"))
        assert token.split(".")[2] not in stored


async def test_attacks_and_mistakes_are_refused_in_words(open_gateway: Opener) -> None:
    async with issuer_server() as issuer:
        gateway = await open_gateway(
            worker=False, auth="on", jwt_issuer=issuer.url, jwt_audience=AUDIENCE
        )
        await gateway.services.store.tenants.set("acme", {}, by="test")
        for claims, why in (
            ({"tenant": "acme", "aud": "another"}, "another audience"),
            ({"tenant": "acme", "exp": time.time() - 90}, "has expired"),
            ({"tenant": "nobody"}, "claim tenant is not the name of a tenant"),
            ({}, "lacks the claim tenant"),
        ):
            token = issuer.token(**claims)
            status, problem = await ask(gateway, "GET", "/requests", bearer(token))
            assert status == 401
            assert why in problem["detail"]
            assert token not in str(problem)
        good = issuer.token(tenant="acme")
        head, body, signature = good.split(".")
        for bad in (f"{head}.{body}.{signature[:-4]}AAAA", f"eyJhbGciOiJub25lIn0.{body}."):
            assert (await ask(gateway, "GET", "/requests", bearer(bad)))[0] == 401
        assert (await ask(gateway, "GET", "/requests", bearer(good)))[0] == 200
        issuer.is_down = True
        assert (await ask(gateway, "GET", "/requests", bearer(good)))[0] == 200
        another = issuer.token(tenant="acme", jti="2", exp=str(int(time.time()) + 300))
        assert (await ask(gateway, "GET", "/requests", bearer(another)))[0] == 200


async def test_an_issuer_that_never_answered_is_a_503_and_keys_of_ours_go_on(
    open_gateway: Opener,
) -> None:
    async with issuer_server() as issuer:
        issuer.is_down = True
        gateway = await open_gateway(
            worker=False, auth="on", jwt_issuer=issuer.url, jwt_audience=AUDIENCE
        )
        _, made = await gateway.services.store.tenants.create_key("default")
        token = issuer.token(tenant="default")
        status, problem = await ask(gateway, "GET", "/requests", bearer(token))
        assert (status, problem["code"]) == (503, "issuer_unavailable")
        assert (await ask(gateway, "GET", "/requests", bearer(made.text)))[0] == 200


async def test_a_realtime_session_goes_on_while_its_issuer_is_unavailable(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with issuer_server() as issuer:
        gateway = await open_gateway(
            worker=False, auth="on", jwt_issuer=issuer.url, jwt_audience=AUDIENCE
        )
        headers = bearer(issuer.token(tenant="default"))
        monkeypatch.setattr(auth, "VERIFIED_FOR_S", 0.0)
        url = f"ws{gateway.url.removeprefix('http')}/v1/realtime?model=gemini-2.5-flash"
        async with connect(url, additional_headers=headers, proxy=None) as socket:
            await socket.recv()
            issuer.is_down = True
            monkeypatch.setattr(issuers, "KEYS_USABLE_S", 0.0)
            monkeypatch.setattr(issuers, "KEYS_ASKED_EVERY_S", 0.0)
            asked = issuer.asked.total()
            await wait_until(lambda: issuer.asked.total() >= asked + 2, 20, "checks of its token")
            await socket.send('{"type":"response.create"}')
            while orjson.loads(await socket.recv())["type"] != "response.done":
                pass
