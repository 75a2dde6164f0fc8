"""The operator's key, while callers show no API key: what asks for it, and what does not."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
import pytest

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until
from tidegate.http.browsers import READ_AGAIN_S, cookie_name, make_code, make_session

CHAT = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": "Say hello"}]}
NO_ID = "00000000-0000-7000-8000-000000000000"
GUARDED = (
    *("/requests", "/requests/running", "/usage", "/metrics", "/dashboard/session"),
    *("/dashboard/stuck", "/dashboard/feed"),
)


@pytest.fixture
async def stranger() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that shows nothing."""
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        yield session


async def status_of(
    client: aiohttp.ClientSession, url: str, method: str = "GET", **options: Any
) -> int:
    async with client.request(method, url, allow_redirects=False, **options) as answer:
        return answer.status


def routes_of(gateway: Gateway) -> list[tuple[str, str]]:
    """Every documented route, as method and path with values for its parameters."""
    paths = gateway.app.openapi()["paths"]
    return [
        (method.upper(), re.sub(r"\{.*?\}", NO_ID, path))
        for path in paths
        for method in paths[path]
    ]


def is_guarded(path: str) -> bool:
    return path.startswith(("/admin", "/metrics", "/usage", "/dashboard")) or (
        path.startswith("/requests")
        and path not in (f"/requests/{NO_ID}", f"/requests/{NO_ID}/why")
    )


async def test_what_operates_or_tells_of_others_asks_for_the_key_on_loopback_too(
    open_gateway: Opener, stranger: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(worker=False)
    shown = {"Authorization": f"Bearer {gateway.operator_key}"}
    routes = [(method, path) for method, path in routes_of(gateway) if is_guarded(path)]
    assert len(routes) > 25
    for prefix in ("", "/llm"):
        for method, path in [*routes, *(("GET", path) for path in GUARDED)]:
            url = f"{gateway.url}{prefix}{path}"
            for headers in (
                {},
                {"Authorization": f"Bearer {gateway.operator_key}x"},
                {"Authorization": f"Basic {gateway.operator_key}"},
                {"x-tidegate-tenant": "acme"},
                {"Cookie": f"{cookie_name(gateway.operator_key)}={gateway.operator_key}"},
            ):
                found = await status_of(stranger, url, method, headers=headers)
                assert found == 401, (method, path, headers)
            assert await status_of(stranger, f"{url}?key={gateway.operator_key}", method) == 401
    for path in GUARDED[:-1]:
        assert await status_of(stranger, gateway.url + path, headers=shown) == 200, path
    as_key = {"x-api-key": gateway.operator_key}
    assert await status_of(stranger, f"{gateway.url}/admin/limits", headers=as_key) == 200


async def test_calling_models_and_following_ones_own_work_does_not(
    open_gateway: Opener, stranger: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway()
    for prefix in ("", "/llm"):
        body = {"data": "Explain the tide", "type": "text_only"}
        async with stranger.post(f"{gateway.url}{prefix}/submit", json=body) as answer:
            assert answer.status == 202
            request_id = orjson.loads(await answer.read())["request_id"]
        await gateway.end_of(request_id)
        url = f"{gateway.url}{prefix}/status/{request_id}"
        assert await status_of(stranger, url) == 200
        text = {"data": "Explain the tide"}
        assert await status_of(stranger, f"{gateway.url}{prefix}/stream", "POST", json=text) == 200
        file = f"{gateway.url}{prefix}/files/{NO_ID}"
        assert await status_of(stranger, file) == 404
        assert await status_of(stranger, f"{gateway.url}{prefix}/health/dependencies") == 200
    chat = f"{gateway.url}/v1/chat/completions"
    assert await status_of(stranger, chat, "POST", json=CHAT) == 200
    for body_of in ("request", "response"):
        url = f"{gateway.url}/requests/{request_id}/{body_of}"
        assert await status_of(stranger, url) == 401
        assert await status_of(gateway.http, url) == 200


async def test_an_admin_key_opens_it_too_and_other_keys_do_not(
    open_gateway: Opener, stranger: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(worker=False)

    async def made(scopes: list[str]) -> dict[str, Any]:
        url = f"{gateway.url}/admin/keys"
        async with gateway.http.post(url, json={"scopes": scopes}) as answer:
            assert answer.status == 201
            found: dict[str, Any] = orjson.loads(await answer.read())
            return found

    admin, usual = await made(["admin"]), await made(["infer", "read"])
    for path in GUARDED[:-1]:
        url = gateway.url + path
        for key, status in ((admin["key"], 200), (usual["key"], 403)):
            headers = {"Authorization": f"Bearer {key}", "x-tidegate-tenant": "acme"}
            assert await status_of(stranger, url, headers=headers) == status, path
    async with gateway.http.delete(f"{gateway.url}/admin/keys/{admin['prefix']}") as answer:
        assert answer.status == 200
    headers = {"Authorization": f"Bearer {admin['key']}"}
    assert await status_of(stranger, f"{gateway.url}/admin/limits", headers=headers) == 401


async def test_the_tenants_header_chooses_a_tenant_and_opens_nothing(
    open_gateway: Opener, stranger: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(worker=False)
    acme = {"x-tidegate-tenant": "acme"}
    body = {"data": "Explain", "type": "text_only"}
    async with stranger.post(f"{gateway.url}/submit", json=body, headers=acme) as answer:
        request_id = orjson.loads(await answer.read())["request_id"]
    assert await status_of(stranger, f"{gateway.url}/status/{request_id}", headers=acme) == 200
    assert await status_of(stranger, f"{gateway.url}/status/{request_id}") == 404
    assert await status_of(stranger, f"{gateway.url}/requests", headers=acme) == 401
    async with gateway.http.get(f"{gateway.url}/requests", headers=acme) as answer:
        page = orjson.loads(await answer.read())
    assert [one["request_id"] for one in page["items"]] == [request_id]
    assert (await gateway.get("/requests"))[1]["items"] == []


async def test_a_one_time_code_becomes_a_cookie_once_over_all_processes(
    open_gateway: Opener, stranger: aiohttp.ClientSession
) -> None:
    first, second = await open_gateway(worker=False), await open_gateway(worker=False)
    assert first.operator_key == second.operator_key
    code = make_code(first.operator_key)
    url = f"{first.url}/dashboard/?code={code}"
    async with stranger.get(url, allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (303, "./")
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cache-Control"] == "no-store"
        cookie = answer.headers["Set-Cookie"]
        assert first.operator_key not in str(answer.headers)
    name, _, rest = cookie.partition("=")
    _, *marks = [one.strip().lower() for one in rest.split(";")]
    assert {"httponly", "samesite=strict", "path=/"} <= set(marks)
    session = {"Cookie": cookie.partition(";")[0]}
    for gateway in (first, second):
        for path in ("/admin/limits", "/requests", "/usage", "/metrics", "/dashboard/session"):
            assert await status_of(stranger, gateway.url + path, headers=session) == 200, path
    for gateway in (first, second):
        again = f"{gateway.url}/dashboard/?code={code}"
        async with stranger.get(again, allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (303, "./?sign-in=used")
            assert "Set-Cookie" not in answer.headers
    assert name == cookie_name(first.operator_key)


async def test_a_code_that_is_over_or_made_up_is_none(
    open_gateway: Opener, stranger: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(worker=False)
    for code in (
        make_code(gateway.operator_key, now=0),
        make_code("tgop_" + "x" * 43),
        make_session(gateway.operator_key),
        gateway.operator_key,
        "%20",
    ):
        url = f"{gateway.url}/dashboard/?code={code}"
        async with stranger.get(url, allow_redirects=False) as answer:
            assert answer.headers["Location"] == "./?sign-in=used"
            assert "Set-Cookie" not in answer.headers


async def test_the_cookie_counts_for_no_other_sites_page(
    open_gateway: Opener, stranger: aiohttp.ClientSession
) -> None:
    for settings in ({}, {"auth": "on"}):
        gateway = await open_gateway(worker=False, **settings)
        key = gateway.operator_key
        session = {"Cookie": f"{cookie_name(key)}={make_session(key)}"}
        url = f"{gateway.url}/admin/limits/kind:text_only/pause"
        for marks, status in (
            ({}, 200),
            ({"Origin": gateway.url, "Sec-Fetch-Site": "same-origin"}, 200),
            ({"Origin": "http://localhost:9999", "Sec-Fetch-Site": "same-site"}, 403),
            ({"Origin": "http://localhost:9999"}, 403),
            ({"Sec-Fetch-Site": "cross-site"}, 403),
        ):
            headers = session | marks
            found = await status_of(stranger, url, "POST", json={"for_ms": 1}, headers=headers)
            assert found == status, marks
        over = {"Cookie": f"{cookie_name(key)}={make_session(key, now=0)}"}
        assert await status_of(stranger, f"{gateway.url}/admin/limits", headers=over) == 401


async def test_signing_out_takes_the_cookie_back(
    open_gateway: Opener, stranger: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(worker=False)
    url = f"{gateway.url}/dashboard/sign-out"
    async with stranger.post(url) as answer:
        assert answer.status == 204
        assert cookie_name(gateway.operator_key) in answer.headers["Set-Cookie"]
        assert "Max-Age=0" in answer.headers["Set-Cookie"]
    assert await status_of(stranger, url, "POST", headers={"Origin": "http://evil.example"}) == 403


async def test_signing_out_ends_every_copy_of_the_session_in_all_processes(
    open_gateway: Opener, stranger: aiohttp.ClientSession
) -> None:
    here, other = await open_gateway(worker=False), await open_gateway(worker=False)
    key = here.operator_key
    ended, kept = ({"Cookie": f"{cookie_name(key)}={make_session(key)}"} for _ in range(2))
    for gateway in (here, other):
        assert await status_of(stranger, f"{gateway.url}/admin/limits", headers=ended) == 200
    sign_out = f"{here.url}/dashboard/sign-out"
    foreign = ended | {"Origin": "http://evil.example"}
    assert await status_of(stranger, sign_out, "POST", headers=foreign) == 403
    assert await status_of(stranger, f"{here.url}/admin/limits", headers=ended) == 200
    assert await status_of(stranger, sign_out, "POST", headers=ended) == 204
    assert await status_of(stranger, f"{here.url}/admin/limits", headers=ended) == 401
    respelled = {"Cookie": f"{ended['Cookie']}~"}
    assert await status_of(stranger, f"{here.url}/admin/limits", headers=respelled) == 401

    async def has_ended_there() -> bool:
        status = await status_of(stranger, f"{other.url}/admin/limits", headers=ended)
        assert status in (200, 401)
        return status == 401

    await wait_until(has_ended_there, READ_AGAIN_S + 5, "the end in the other process")
    for gateway in (here, other):
        assert await status_of(stranger, f"{gateway.url}/admin/limits", headers=kept) == 200
    nobody = {"Cookie": f"{cookie_name(key)}=made-up"}
    assert await status_of(stranger, sign_out, "POST", headers=nobody) == 204
    count = "SELECT count(*) FROM spent_codes"
    assert await here.database.fetchval(count) == 1, "only a sound session is put on record"


async def test_a_page_of_somebody_else_gets_no_answer_from_any_route(
    open_gateway: Opener, stranger: aiohttp.ClientSession
) -> None:
    """Neither by a request to another site, nor under a name of its own that leads here."""
    gateway = await open_gateway(worker=False)
    port = gateway.url.rpartition(":")[2]
    native = [
        *(("POST", "/v1/chat/completions"), ("POST", "/v1/messages"), ("GET", "/v1/models")),
        *(("POST", "/v1beta/models/m:generateContent"), ("GET", "/v1/files"), ("GET", "/v1/none")),
        *(("GET", "/v1/batches"), ("POST", "/upload/v1beta/files")),
    ]
    pages = [("GET", path) for path in ("/", "/docs", "/openapi.json", "/dashboard/", "/none")]
    files = [("GET", "/static/favicon.svg"), ("GET", "/dashboard/static/main.js")]
    probes = ("/health/live", "/health/ready")
    routes = [*native, *pages, *files, *routes_of(gateway)]
    for marks in (
        {"Host": f"evil.example:{port}"},
        {"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "null"},
    ):
        for method, path in routes:
            headers = {"Content-Type": "text/plain", **marks}
            found = await status_of(stranger, gateway.url + path, method, headers=headers)
            assert found == (200 if path in probes else 403), (method, path, marks)
    assert await gateway.calls() == []
    url, evil = f"{gateway.url}/v1/messages", {"Host": "evil.example"}
    async with stranger.post(url, json={}, headers=evil) as answer:
        assert orjson.loads(await answer.read())["error"]["type"] == "permission_error"


async def test_names_of_the_setting_are_answered(
    open_gateway: Opener, stranger: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(worker=False, allowed_hosts="gate.example")
    named = {"Host": "gate.example", "Origin": "https://gate.example"}
    chat = f"{gateway.url}/v1/chat/completions"
    assert await status_of(stranger, chat, "POST", json=CHAT, headers=named) == 200
    assert await status_of(stranger, f"{gateway.url}/admin/limits", headers=named) == 401


async def test_no_page_frames_the_documentation_or_the_dashboard(
    open_gateway: Opener, stranger: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(worker=False)
    for path in ("/docs", "/dashboard/"):
        async with stranger.get(gateway.url + path) as answer:
            assert answer.headers["X-Frame-Options"] == "DENY"
            policy = answer.headers["Content-Security-Policy"]
            assert "frame-ancestors 'none'" in policy
            assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]


async def test_upstreams_are_named_to_operators_alone(
    open_gateway: Opener, stranger: aiohttp.ClientSession
) -> None:
    for settings in ({}, {"auth": "on"}):
        gateway = await open_gateway(worker=False, **settings)
        url = f"{gateway.url}/health/dependencies"
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            async with stranger.get(url, headers=headers) as answer:
                raw = await answer.read()
                assert answer.status == 200
                assert "gemini" not in raw.decode()
                assert not {"upstreams", "verdict"} & orjson.loads(raw).keys()
        shown = {"Authorization": f"Bearer {gateway.operator_key}"}
        async with stranger.get(url, headers=shown) as answer:
            told = orjson.loads(await answer.read())
            assert list(told["upstreams"]) == ["gemini"]
            assert told["verdict"]["sentence"] == "Healthy: nothing waits."


async def test_who_made_a_key_is_on_record(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    async with gateway.http.post(f"{gateway.url}/admin/keys", json={}) as answer:
        made = orjson.loads(await answer.read())
    assert made["made_by"] == "the operator's key"
    tenants = gateway.services.store.tenants
    assert await tenants.unvouched_keys() == []
    # As a version before this one made it, whoever asked.
    await gateway.database.execute("UPDATE keys SET made_by = NULL, scopes = '{admin}'")
    assert [key.prefix for key in await tenants.unvouched_keys()] == [made["prefix"]]
    async with gateway.http.get(f"{gateway.url}/admin/keys") as answer:
        assert [one["made_by"] for one in orjson.loads(await answer.read())] == [None]
    kept = await tenants.keep_key(made["prefix"], by="kept by ann")
    assert kept.made_by == "kept by ann"
    assert await tenants.unvouched_keys() == []
