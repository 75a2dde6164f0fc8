"""Answers of a provider that nest deeper than JSON is mostly written."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import pytest
from aiohttp import web

from tests.gateway import Opener
from tests.waiting import wait_until

_POLICY = """
[upstreams.deep]
base_url = "{url}/v1"
dialect = "openai"
models = ["deep"]
"""
_ANSWER = (
    '{"id":"x","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant",'
    '"content":"hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1,'
    '"total_tokens":2},"deep":%s}'
)


@dataclass
class Deep:
    """A provider whose answers nest `depth` levels, and the receiver of a webhook."""

    depth: int = 0
    url: str = ""
    received: list[bytes] = field(default_factory=list)

    @property
    def said(self) -> str:
        return _ANSWER % ('{"a":' * self.depth + "1" + "}" * self.depth)

    async def answer(self, request: web.BaseRequest) -> web.Response:
        body = await request.read()
        if request.path != "/hook":
            return web.Response(text=self.said, content_type="application/json")
        self.received.append(body)
        return web.Response()


@pytest.fixture
async def deep() -> AsyncIterator[Deep]:
    provider = Deep()
    runner = web.ServerRunner(web.Server(provider.answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    provider.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield provider
    await runner.cleanup()


@pytest.mark.parametrize("depth", [150, 253, 900, 1_500])
async def test_an_answer_that_nests_deep_reaches_its_owner_by_every_way(
    open_gateway: Opener, deep: Deep, tmp_path: Path, depth: int
) -> None:
    policy, deep.depth = tmp_path / "policy.toml", depth
    policy.write_text(_POLICY.format(url=deep.url))
    gateway = await open_gateway(
        tidegate_policy=policy,
        webhook_secret=f"whsec_{b64encode(bytes(32)).decode()}",
        webhook_allow_private=True,
    )
    body = {"model": "deep", "messages": [{"role": "user", "content": "hi"}]}
    path, hook = "/v1/chat/completions", f"{deep.url}/hook"
    job = await gateway.submit(endpoint=path, body=body, webhook_url=hook)
    whole = orjson.loads(deep.said) if depth < 200 else deep.said
    end = await gateway.end_of(job)
    assert (end["status"], end["answer"]) == ("succeeded", whole)
    await wait_until(lambda: deep.received, 20, "the webhook")
    assert orjson.loads(deep.received[0])["data"]["answer"] == whole
    async with gateway.http.get(f"{gateway.url}/admin/requests/{job}") as response:
        assert response.status == 200, await response.text()
