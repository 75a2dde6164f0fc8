"""Lists of models as providers give them, and the one that the gateway makes of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from openai import AsyncOpenAI

from tests.gateway import Gateway, Opener
from tidegate.settings import GOOGLE_URL


@dataclass
class Lists:
    """Answers each path with what is in `bodies`, else with 404. asked: paths with query."""

    bodies: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    async def serve(self, request: web.BaseRequest) -> web.Response:
        self.asked.append(request.raw_path)
        body = self.bodies.get(request.path)
        if body is None:
            return web.json_response({"error": {"message": "no such path"}}, status=404)
        return web.json_response(body)


@pytest.fixture
async def lists() -> AsyncIterator[Lists]:
    found = Lists()
    runner = web.ServerRunner(web.Server(found.serve))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


async def opened(open_gateway: Opener, tmp_path: Path, table: str) -> Gateway:
    """A gateway with this upstream, `one`, and Gemini's for its own models."""
    path = tmp_path / "policy.toml"
    path.write_text(f'[upstreams.gemini]\nmodels = ["gemini-*"]\n[upstreams.one]\n{table}')
    return await open_gateway(worker=False, tidegate_policy=path)


async def tried(gateway: Gateway) -> dict[str, dict[str, Any]]:
    """What `tidegate upstreams test one` shows, by dialect."""
    headers = {"Authorization": f"Bearer {gateway.operator_key}"}
    url = f"{gateway.url}/admin/upstreams/one/test"
    async with gateway.http.post(url, headers=headers) as answer:
        assert answer.status == 200
        return {one["dialect"]: one for one in await answer.json()}


async def test_the_query_of_an_upstream_goes_beside_that_of_a_list(
    open_gateway: Opener, tmp_path: Path, lists: Lists
) -> None:
    lists.bodies = {
        "/v1/models": {"data": [{"id": "claude-x"}]},
        "/v1beta/models": {"models": [{"name": "models/g-x"}]},
    }
    table = f'dialects = {{ anthropic = "{lists.url}", gemini = "{lists.url}" }}\n'
    gateway = await opened(open_gateway, tmp_path, table + 'query = { region = "eu" }\n')
    found = await tried(gateway)
    assert {name: one["models"] for name, one in found.items()} == {
        "anthropic": ["claude-x"],
        "gemini": ["g-x"],
    }
    await gateway.get("/v1beta/models")
    assert sorted(set(lists.asked)) == [
        "/v1/models?limit=1000&region=eu",
        "/v1beta/models?pageSize=1000&region=eu",
    ]


VERTEX = """
dialects = {{ gemini = "{url}", anthropic = "{url}" }}
provider = "vertex"
project = "p-1"
auth = "bearer"
key = "VERTEX_TOKEN"
models = {models}
"""


async def test_models_below_a_publisher_are_listed_as_the_dialects_have_them(
    open_gateway: Opener, tmp_path: Path, lists: Lists, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERTEX_TOKEN", "token-of-vertex")
    for publisher, model in (("google", "gemini-v"), ("anthropic", "claude-v")):
        name = f"publishers/{publisher}/models/{model}"
        body = {"publisherModels": [{"name": name, "versionId": "1"}]}
        lists.bodies[f"/v1beta1/publishers/{publisher}/models"] = body
    table = VERTEX.format(url=lists.url, models='["*"]')
    gateway = await opened(open_gateway, tmp_path, table)
    found = await tried(gateway)
    assert (found["gemini"]["models"], found["gemini"]["problem"]) == (["gemini-v"], "")
    assert (found["anthropic"]["models"], found["anthropic"]["problem"]) == (["claude-v"], "")
    assert (await gateway.get("/v1beta/models"))[1]["models"][-1] == {"name": "models/gemini-v"}
    headers = {"anthropic-version": "2023-06-01"}
    async with gateway.http.get(f"{gateway.url}/v1/models", headers=headers) as answer:
        assert [one["id"] for one in (await answer.json())["data"]] == ["claude-v"]


async def test_a_list_without_an_object_around_it_is_read_and_given_as_openais(
    open_gateway: Opener, tmp_path: Path, lists: Lists, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Together answers: https://docs.together.ai/reference/models-1."""
    monkeypatch.setenv("TOGETHER_API_KEY", "key-of-together")
    lists.bodies = {"/v1/models": [{"id": "org/a", "type": "chat"}, {"id": "org/b"}]}
    path = tmp_path / "policy.toml"
    path.write_text(f'[upstreams.one]\nprovider = "together"\nbase_url = "{lists.url}/v1"\n')
    nothing = {"gemini_api_key": None, "gemini_base_url": GOOGLE_URL}
    gateway = await open_gateway(worker=False, tidegate_policy=path, **nothing)
    (found,) = (await tried(gateway)).values()
    assert (found["models"], found["problem"]) == (["org/a", "org/b"], "")
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="of-a-client") as client:
        assert [one.id async for one in client.models.list()] == ["org/a", "org/b"]


NAMED = """
provider = "azure"
base_url = "{url}"
dialects = {{ anthropic = "{url}/none" }}
models = ["gpt-eu", "claude-eu", "other-*"]
aliases = {{ fast = "gpt-eu" }}
"""


async def test_models_that_are_named_are_listed_whatever_the_provider_lists(
    open_gateway: Opener, tmp_path: Path, lists: Lists, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azure lists base models, not deployments; others have no list at all."""
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "key-of-azure")
    lists.bodies = {"/openai/v1/models": {"data": [{"id": "gpt-5"}, {"id": "other-1"}]}}
    gateway = await opened(open_gateway, tmp_path, NAMED.format(url=lists.url))
    names = [one["id"] for one in (await gateway.get("/v1/models"))[1]["data"]]
    assert names[-4:] == ["other-1", "fast", "gpt-eu", "claude-eu"]
    assert "gpt-5" not in names, "no call may name it"
    headers = {"anthropic-version": "2023-06-01"}
    async with gateway.http.get(f"{gateway.url}/v1/models", headers=headers) as answer:
        listed = [one["id"] for one in (await answer.json())["data"]]
    assert listed == ["fast", "gpt-eu", "claude-eu"]
    found = await tried(gateway)
    assert [one["unlisted"] for one in found.values()] == [[], []], "deployments are no base models"


async def test_models_that_no_list_describes_have_what_the_sdks_demand(
    open_gateway: Opener, tmp_path: Path, lists: Lists, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named in the upstream's table, by an alias or a route, or by a list of names alone."""
    from anthropic import AsyncAnthropic

    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "key-of-azure")
    lists.bodies = {"/openai/v1/models": {"data": [{"id": "other-1"}]}}
    table = NAMED.format(url=lists.url) + '\n[[routes]]\nmodel = "main"\ntry = ["one/gpt-eu"]\n'
    gateway = await opened(open_gateway, tmp_path, table)
    names = {"other-1", "fast", "gpt-eu", "claude-eu", "main"}
    strict = {"api_key": "of-a-client", "_strict_response_validation": True}
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", **strict) as client:
        seen = {one.id: one async for one in client.models.list()}
        assert seen.keys() >= names
        assert {(seen[name].object, seen[name].owned_by) for name in names} == {("model", "one")}
    async with AsyncAnthropic(base_url=gateway.url, **strict) as other:
        described = {one.id: one async for one in other.models.list()}
        assert described.keys() >= names - {"other-1", "main"}
        assert described["fast"].display_name == "fast"


async def test_a_model_that_the_gateway_defines_is_the_one_of_the_list(
    open_gateway: Opener, tmp_path: Path, lists: Lists, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an alias, a route, or a deployment the provider knows nothing."""
    from anthropic import AsyncAnthropic

    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "key-of-azure")
    base = {"id": "other-1", "object": "model", "created": 7, "owned_by": "them", "extra": True}
    lists.bodies = {"/openai/v1/models": {"data": [base]}, "/openai/v1/models/other-2": base}
    routes = """
[[routes]]
model = "main"
try = ["one/other-1"]
[[routes]]
model = "any-*"
try = ["one/other-1"]
"""
    gateway = await opened(open_gateway, tmp_path, NAMED.format(url=lists.url) + routes)
    strict = {"api_key": "of-a-client", "_strict_response_validation": True}
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", **strict) as client:
        seen = {one.id: one async for one in client.models.list()}
        for name in ("main", "fast", "gpt-eu", "claude-eu"):
            assert await client.models.retrieve(name) == seen[name], name
        assert (seen["main"].created, seen["main"].owned_by) == (7, "them")
        pattern = await client.models.retrieve("any-1")
        assert (pattern.id, pattern.created) == ("any-1", 7)
        assert not [one for one in lists.asked if one.startswith("/openai/v1/models/")]
        await client.models.retrieve("other-2")
        assert lists.asked[-1] == "/openai/v1/models/other-2", "of the provider's it is asked"
    async with AsyncAnthropic(base_url=gateway.url, **strict) as other:
        assert (await other.models.retrieve("fast")).display_name == "fast"
    lists.bodies = {}
    gemini = await open_gateway(worker=False, tidegate_policy=gemini_alias(tmp_path))
    async with gemini.http.get(f"{gemini.url}/v1beta/models/flash") as answer:
        assert (answer.status, (await answer.json())["name"]) == (200, "models/flash")


def gemini_alias(folder: Path) -> Path:
    path = folder / "gemini.toml"
    path.write_text('[upstreams.gemini]\naliases = { flash = "gemini-2.5-flash" }\n')
    return path


async def test_a_model_is_missing_only_where_no_dialect_lists_it(
    open_gateway: Opener, tmp_path: Path, lists: Lists
) -> None:
    lists.bodies = {
        "/a/v1/models": {"data": [{"id": "m-1"}]},
        "/b/v1/models": {"data": [{"id": "m-2"}]},
    }
    table = f'dialects = {{ openai = "{lists.url}/a/v1", anthropic = "{lists.url}/b" }}\n'
    gateway = await opened(open_gateway, tmp_path, table + 'models = ["m-1", "m-2", "m-3"]\n')
    assert [one["unlisted"] for one in (await tried(gateway)).values()] == [["m-3"], ["m-3"]]
