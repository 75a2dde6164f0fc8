"""Paths that nobody has named but an upstream's `passthrough`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from openai import AsyncOpenAI

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until
from tidegate.prices.budgets import Budget

POLICY = """
[upstreams.new]
base_url = "{url}/v1"
dialect = "openai"
passthrough = ["/v1/new-thing", "/v1/evals/*"]
[upstreams.new.limits]
"kind:other" = 1
[upstreams.new.prices]
"new-*" = {{ input = 1, output = 2 }}
[upstreams.closed]
base_url = "{url}/v1"
passthrough = ["/v1/closed/*"]
passthrough_tenants = ["acme", "b"]
[upstreams.first]
base_url = "{url}/v1"
passthrough = ["/v1/skills/*"]
[upstreams.second]
base_url = "{url}"
dialect = "anthropic"
passthrough = ["/v1/skills/*"]
"""
ANSWER = {"id": "x", "usage": {"input_tokens": 30, "output_tokens": 5, "total_tokens": 35}}
Seen = list[tuple[str, str, bytes]]


@pytest.fixture
async def seen() -> Seen:
    return []


@pytest.fixture
async def faults() -> dict[str, int]:
    """The status that a path answers, where it is not 200."""
    return {}


@pytest.fixture
async def provider(seen: Seen, faults: dict[str, int]) -> AsyncIterator[str]:
    """A server that has any path."""

    async def answer(request: web.BaseRequest) -> web.Response:
        seen.append((request.method, request.path_qs, await request.read()))
        if (status := faults.get(request.path, 200)) != 200:
            return web.json_response({"error": {"message": "not here"}}, status=status)
        return web.json_response(ANSWER)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def passing(open_gateway: Opener, tmp_path: Path, provider: str) -> Gateway:
    policy = tmp_path / "tidegate.toml"
    policy.write_text(POLICY.format(url=provider))
    return await open_gateway(worker=False, tidegate_policy=policy)


async def test_a_named_path_is_relayed_by_any_method_with_what_its_answer_tells(
    passing: Gateway, seen: Seen
) -> None:
    raw = b'{ "model": "new-1",  "anything": [1.10] }'
    url = f"{passing.url}/v1/new-thing?a=b"
    async with passing.http.post(url, data=raw) as response:
        assert (response.status, await response.json()) == (200, ANSWER)
        assert response.headers["x-tidegate-upstream"] == "new"
        row = await passing.audit(response.headers["x-tidegate-request-id"])
    assert (row["model"], row["kind"], row["endpoint"]) == ("new-1", None, "/v1/new-thing")
    assert (row["input_tokens"], row["output_tokens"], row["cost_micros"]) == (30, 5, 40)
    assert (row["usage_state"], row["request"]) == ("told", raw.decode())
    for method, body in (("GET", b""), ("DELETE", b""), ("PATCH", b"no JSON")):
        below = f"{passing.url}/v1/evals/e-1/runs"
        async with passing.http.request(method, below, data=body or None) as response:
            assert response.status == 200
    closed = f"{passing.url}/v1/closed/c-1"
    for tenant, status in (("acme", 200), ("other", 403)):
        async with passing.http.get(closed, headers={"x-tidegate-tenant": tenant}) as response:
            assert response.status == status
    async with passing.http.get(closed) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (403, "forbidden")
    assert seen == [
        ("POST", "/v1/new-thing?a=b", raw),
        ("GET", "/v1/evals/e-1/runs", b""),
        ("DELETE", "/v1/evals/e-1/runs", b""),
        ("PATCH", "/v1/evals/e-1/runs", b"no JSON"),
        ("GET", "/v1/closed/c-1", b""),
    ]


async def test_a_path_of_an_upstream_without_its_key_here_is_unavailable_and_goes_nowhere_else(
    open_gateway: Opener,
    tmp_path: Path,
    provider: str,
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = tmp_path / "tidegate.toml"
    policy.write_text(f"""
[upstreams.other]
base_url = "{provider}/v1"
passthrough = ["/v1/shared/*"]
passthrough_tenants = ["b"]
""")
    monkeypatch.setenv("NEW_KEY", "key-of-new")
    having = await open_gateway(worker=False, tidegate_policy=policy)
    new = {"base_url": provider, "dialect": "anthropic", "models": ["new-*"], "key": "NEW_KEY"}
    tables = {
        "new": {**new, "passthrough": ["/v1/new-thing", "/v1/shared/*"]},
        "closed": {**new, "passthrough": ["/v1/closed"], "passthrough_tenants": ["acme"]},
    }
    for name, table in tables.items():
        put = {"table": table, "test": False}
        url = f"{having.url}/admin/upstreams/{name}"
        async with having.http.put(url, json=put) as response:
            assert response.status == 200, await response.text()
    monkeypatch.delenv("NEW_KEY")
    lacking = await open_gateway(
        worker=False,
        tidegate_policy=policy,
        gemini_base_url=having.config.gemini_base_url,
    )

    async def answer(gateway: Gateway, path: str, tenant: str) -> tuple[int, str]:
        headers = {"x-tidegate-tenant": tenant, "anthropic-version": "2023-06-01"}
        async with gateway.http.get(f"{gateway.url}{path}", headers=headers) as response:
            return response.status, await response.text()

    for path, tenant in (("/v1/new-thing", "a"), ("/v1/shared/x", "a"), ("/v1/closed", "acme")):
        assert (await answer(having, path, tenant))[0] == 200
        status, text = await answer(lacking, path, tenant)
        assert status == 503, text
        lacks = "closed" if path == "/v1/closed" else "new"
        assert "upstream_missing" in text or "overloaded_error" in text, text
        assert f"the upstream of this path: {lacks} lacks NEW_KEY" in text
    assert len(seen) == 3
    assert (await answer(lacking, "/v1/closed", "b"))[0] == 403
    assert (await answer(lacking, "/v1/unknown", "a"))[0] == 404


async def test_a_named_path_of_an_upstream_added_live_is_one_of_ours_at_the_edges(
    open_gateway: Opener, provider: str, seen: Seen, faults: dict[str, int]
) -> None:
    page = {"origin": "https://app.example", "sec-fetch-mode": "cors"}
    gateway = await open_gateway(worker=False, cors_origins=page["origin"])
    new = {"base_url": f"{provider}/v1", "auth": "none", "models": ["new-*"]}
    table = {"table": {**new, "passthrough": ["/v1/new/*"]}, "test": False}
    async with gateway.http.put(f"{gateway.url}/admin/upstreams/new", json=table) as response:
        assert response.status == 200, await response.text()
    url, may_read = f"{gateway.url}/v1/new/thing", "access-control-allow-origin"
    async with gateway.http.options(url) as response:
        allowed = {*response.headers["allow"].split(", ")}
        assert (response.status, {"GET", "HEAD", "PATCH"} <= allowed) == (204, True)
    asks = {**page, "access-control-request-method": "PATCH"}
    for at in (url, f"{gateway.url}/v1beta/cachedContents/c-1"):
        async with gateway.http.options(at, headers=asks) as response:
            assert (response.status, response.headers.get(may_read)) == (200, page["origin"])
    async with gateway.http.request("TRACE", url) as response:
        assert (response.status, "PATCH" in response.headers["allow"]) == (405, True)
    for at in ("/v1/new", "/v1/newer/thing"):
        async with gateway.http.get(f"{gateway.url}{at}", headers=page) as response:
            named = response.headers.get("x-tidegate-upstream")
            assert (response.status, named) == ((200, "new") if at == "/v1/new" else (404, None))
            assert response.headers[may_read] == page["origin"]
    async with gateway.http.head(url) as response:
        assert (response.status, await response.read()) == (200, b"")
    faults["/v1/new/thing"] = 503
    async with gateway.http.patch(url, data=b"{}", headers=page) as response:
        assert (response.status, response.headers[may_read]) == (503, page["origin"])
        assert response.headers["x-tidegate-upstream"] == "new"
        assert "x-tidegate-upstream" in response.headers["access-control-expose-headers"]
    assert [method for method, _, _ in seen] == ["GET", "GET", "PATCH"]


async def test_a_path_that_two_providers_have_goes_to_the_one_whose_sdk_calls_it(
    passing: Gateway, seen: Seen
) -> None:
    from anthropic import AsyncAnthropic  # 3,000 modules

    async with AsyncOpenAI(base_url=f"{passing.url}/v1", api_key="k") as openai:
        answer = await openai.skills.with_raw_response.list()
    assert answer.headers["x-tidegate-upstream"] == "first"
    async with AsyncAnthropic(base_url=passing.url, api_key="k") as anthropic:
        other = await anthropic.beta.skills.with_raw_response.list()
    assert other.headers["x-tidegate-upstream"] == "second"
    assert [path.partition("?")[0] for _, path, _ in seen] == ["/v1/skills"] * 2


@pytest.mark.parametrize("status", [401, 500, 503])
async def test_a_path_that_fails_puts_no_upstream_out_for_other_paths(
    passing: Gateway, seen: Seen, faults: dict[str, int], status: int
) -> None:
    faults["/v1/evals/e-1"] = status
    for number in range(25):
        body = {"a": number}
        async with passing.http.post(f"{passing.url}/v1/evals/e-1", json=body) as response:
            assert response.status == {401: 502}.get(status, status)
    assert len(seen) == 25, "each is sent"
    assert passing.services.spine.health["new"].state == "ok"
    named = {"model": "new-1", "messages": [{"role": "user", "content": "hello"}]}
    url, headers = f"{passing.url}/v1/chat/completions", {"x-tidegate-upstream": "new"}
    async with passing.http.post(url, json=named, headers=headers) as response:
        assert response.status == 200


async def test_what_may_have_made_something_is_sent_once(
    passing: Gateway, seen: Seen, faults: dict[str, int]
) -> None:
    faults["/v1/evals"] = 500
    for method, count in (("POST", 1), ("PATCH", 1), ("GET", 4), ("DELETE", 4)):
        seen.clear()
        async with passing.http.request(method, f"{passing.url}/v1/evals") as response:
            assert (response.status, len(seen)) == (500, count), method


async def test_a_method_whose_answer_repeats_the_key_is_not_relayed(
    passing: Gateway, seen: Seen
) -> None:
    async with passing.http.request("TRACE", f"{passing.url}/v1/evals/e-1") as response:
        assert response.status == 405
        assert "TRACE /v1/evals/e-1" in await response.text()
    assert not seen


@pytest.mark.parametrize(
    "path",
    ["/v1/other", "/v1/new-thing/below", "/v1/evalsx", "/v1/evals/../organization/costs"],
)
async def test_no_other_path_is_opened(passing: Gateway, seen: Seen, path: str) -> None:
    parts = passing.url.removeprefix("http://")
    host, _, port = parts.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    writer.write(head.encode())
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 404")
    assert seen == []


async def test_a_model_that_servers_could_read_in_two_ways_is_refused(
    passing: Gateway, seen: Seen
) -> None:
    raw = b'{"model":"new-1","model":"new-2"}'
    async with passing.http.post(f"{passing.url}/v1/new-thing", data=raw) as response:
        assert response.status == 400
        assert "more than once" in (await response.json())["error"]["message"]
    assert seen == []


async def asked(gateway: Gateway, method: str = "POST") -> tuple[int, str | None]:
    """The status of a call of such a path, and the code of a refusal."""
    body = None if method == "GET" else b'{"model":"new-1"}'
    url = f"{gateway.url}/v1/new-thing"
    async with gateway.http.request(method, url, data=body) as response:
        code = None if response.status == 200 else (await response.json())["error"]["code"]
        return response.status, code


async def test_what_such_a_path_costs_counts_in_budgets_and_a_strict_one_refuses_it(
    passing: Gateway, seen: Seen
) -> None:
    budgets = passing.services.store.budgets
    strict = Budget("day", "usd", 50, "day")
    await budgets.records.set(strict, by="test")
    await budgets.refresh()
    assert await asked(passing) == (403, "budget_unbounded")
    assert [method for method, _, _ in seen] == []
    assert await asked(passing, "GET") == (200, None)  # it runs no model
    await budgets.records.set(replace(strict, doubt="estimate"), by="test")
    await budgets.refresh()
    for _ in range(2):  # 40 micro-dollars each, as their answers report
        assert await asked(passing) == (200, None)
        await wait_until(lambda: budgets.held == 0, 20, "all is settled")
    assert await asked(passing) == (429, "insufficient_quota")
    assert [method for method, _, _ in seen] == ["GET", "POST", "POST"]
