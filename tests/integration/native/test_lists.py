"""Lists of models as providers give them, and the one that the gateway makes of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.gateway import Gateway, Opener


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
