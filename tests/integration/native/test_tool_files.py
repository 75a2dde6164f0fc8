"""Files that the provider's own tool makes during a call belong to the call's tenant."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import key_of

POLICY = """
[upstreams.gemini]
models = ["claude-other"]
[upstreams.skilled]
dialects = {{ anthropic = "{url}" }}
key = "SECOND_KEY"
models = ["claude-x"]
"""
MADE, ECHOED, QUOTED = "file_011made", "file_011of-another", "file_011in-a-text"
OUTPUT = {"type": "bash_code_execution_output", "file_id": MADE}
RESULT = {
    "type": "bash_code_execution_tool_result",
    "tool_use_id": "srvtoolu_1",
    "content": {
        "type": "bash_code_execution_result",
        "stdout": f'{{"file_id": "{QUOTED}"}}',
        "stderr": "",
        "return_code": 0,
        "content": [OUTPUT],
    },
}
# What a client has its model write into the input of a tool.
CALLED = {
    "type": "tool_use",
    "id": "t",
    "name": "open",
    "input": {"type": RESULT["type"], "content": [{**OUTPUT, "file_id": ECHOED}]},
}
USAGE = {"input_tokens": 9, "output_tokens": 4}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-x",
    "content": [CALLED, RESULT],
    "stop_reason": "end_turn",
    "usage": USAGE,
}


def event(name: str, **said: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name, **said}))


STREAM = b"".join(
    (
        event("message_start", message={**MESSAGE, "content": [], "stop_reason": None}),
        event("content_block_start", index=0, content_block=CALLED),
        event("content_block_stop", index=0),
        event("content_block_start", index=1, content_block=RESULT),
        event("content_block_stop", index=1),
        event("message_delta", delta={"stop_reason": "end_turn"}, usage=USAGE),
        event("message_stop"),
    )
)


@pytest.fixture
async def provider() -> AsyncIterator[str]:
    """A server whose model runs code, in the shape of Anthropic's documentation."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "GET":
            return web.Response(body=b"made", content_type="text/csv")
        if not orjson.loads(await request.read()).get("stream"):
            return web.json_response(MESSAGE)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        place = STREAM.index(MADE.encode()) + 5  # within the id
        for piece in (STREAM[:place], STREAM[place:]):
            await response.write(piece)
        return response

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def content(gateway: Gateway, key: dict[str, str], file_id: str) -> tuple[int, str]:
    url = f"{gateway.url}/v1/files/{file_id}/content"
    async with gateway.http.get(url, headers=key | {"anthropic-version": "2023-06-01"}) as response:
        return response.status, response.headers.get("x-tidegate-upstream", "")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_file_that_code_execution_makes_is_its_tenant_s_alone(
    open_gateway: Opener,
    provider: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    monkeypatch.setenv("SECOND_KEY", "key-of-the-second")
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY.format(url=provider))
    gateway = await open_gateway(worker=False, auth="on", tidegate_policy=policy)
    mine, theirs = [await key_of(gateway, tenant) for tenant in ("mine", "theirs")]
    asked: dict[str, Any] = {
        "model": "claude-x",
        "max_tokens": 50,
        "stream": stream,
        "messages": [{"role": "user", "content": "Make a table"}],
        "tools": [{"type": "code_execution_20250825", "name": "code_execution"}],
    }
    url, expected = f"{gateway.url}/v1/messages", STREAM if stream else orjson.dumps(MESSAGE)
    async with gateway.http.post(url, json=asked, headers=mine) as response:
        said = await response.read()
        assert response.status == 200, said
    assert said == expected if stream else orjson.loads(said) == MESSAGE
    assert await content(gateway, mine, MADE) == (200, "skilled")
    assert (await content(gateway, theirs, MADE))[0] == 404
    for other in (ECHOED, QUOTED):
        assert (await content(gateway, mine, other))[0] == 404
    async with gateway.http.post(url, json=asked, headers=theirs) as response:
        await response.read()
    assert (await content(gateway, theirs, MADE))[0] == 404, "it keeps its owner"
