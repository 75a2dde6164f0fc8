"""What the provider's own tools make during a call belongs to the call's tenant."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
CONTAINER = "container_011made"
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
    "container": {"id": CONTAINER, "expires_at": "2027-01-02T03:04:05Z"},
}


def event(name: str, **said: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name, **said}))


STREAM = b"".join(
    (
        event("message_start", message={**MESSAGE, "content": [], "container": None}),
        event("content_block_start", index=0, content_block=CALLED),
        event("content_block_stop", index=0),
        event("content_block_start", index=1, content_block=RESULT),
        event("content_block_stop", index=1),
        event("message_delta", delta={"container": MESSAGE["container"]}, usage=USAGE),
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


async def answered(gateway: Gateway, path: str, body: Any, key: dict[str, str]) -> tuple[int, str]:
    async with gateway.http.post(f"{gateway.url}{path}", json=body, headers=key) as response:
        return response.status, await response.text()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_container_is_used_again_by_its_tenant_alone(
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
    assert (await answered(gateway, "/v1/messages", asked, mine))[0] == 200
    for named in (CONTAINER, {"id": CONTAINER, "skills": []}):
        again = {**asked, "container": named}
        assert (await answered(gateway, "/v1/messages", again, mine))[0] == 200
        status, said = await answered(gateway, "/v1/messages", again, theirs)
        assert status == 404
        assert CONTAINER in said
    unknown = {**asked, "container": "container_011of-a-batch"}
    assert (await answered(gateway, "/v1/messages", unknown, theirs))[0] == 200


@dataclass
class Sandboxed:
    """A gateway before a server that names a sandbox in what it answers, and the bodies of the
    requests that reached it."""

    gateway: Gateway
    mine: dict[str, str]
    theirs: dict[str, str]
    asked: list[Any]


@asynccontextmanager
async def sandboxed(
    open_gateway: Opener, tmp_path: Path, dialect: str, answer: dict[str, Any]
) -> AsyncIterator[Sandboxed]:
    asked: list[Any] = []

    async def answers(request: web.BaseRequest) -> web.Response:
        asked.append(orjson.loads(await request.read() or b"null"))
        return web.json_response(answer)

    runner = web.ServerRunner(web.Server(answers))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    policy = tmp_path / "policy.toml"
    own = f'dialect = "{dialect}"\nauth = "none"\nmodels = ["m"]\n'
    policy.write_text(f'[upstreams.own]\nbase_url = "{url}"\n{own}')
    gateway = await open_gateway(worker=False, auth="on", tidegate_policy=policy)
    mine, theirs = [await key_of(gateway, tenant) for tenant in ("mine", "theirs")]
    yield Sandboxed(gateway, mine, theirs, asked)
    await runner.cleanup()


async def test_containers_of_openai_are_used_again_by_their_tenant_alone(
    open_gateway: Opener, tmp_path: Path
) -> None:
    ran = {"type": "code_interpreter_call", "id": "ci_1", "container_id": "cntr_1", "code": "1"}
    shell = {
        "type": "shell_call",
        "id": "sh_1",
        "environment": {"type": "container_reference", "container_id": "cntr_2"},
    }
    answer = {"id": "resp_1", "object": "response", "status": "completed", "output": [ran, shell]}
    async with sandboxed(open_gateway, tmp_path, "openai", answer) as at:
        auto = {"type": "code_interpreter", "container": {"type": "auto"}}
        first = {"model": "m", "input": "Compute", "tools": [auto]}
        assert (await answered(at.gateway, "/v1/responses", first, at.mine))[0] == 200
        for tool in (
            {"type": "code_interpreter", "container": "cntr_1"},
            {
                "type": "shell",
                "environment": {"type": "container_reference", "container_id": "cntr_2"},
            },
        ):
            again = {"model": "m", "input": "And?", "tools": [tool]}
            assert (await answered(at.gateway, "/v1/responses", again, at.mine))[0] == 200
            count = len(at.asked)
            assert (await answered(at.gateway, "/v1/responses", again, at.theirs))[0] == 404
            assert len(at.asked) == count
        unknown = {"type": "code_interpreter", "container": "cntr_of_a_passthrough"}
        again = {"model": "m", "input": [ran, shell], "tools": [unknown]}
        assert (await answered(at.gateway, "/v1/responses", again, at.theirs))[0] == 200


async def test_environments_of_google_are_used_again_by_their_tenant_alone(
    open_gateway: Opener, tmp_path: Path
) -> None:
    """As its documentation shows: a new one is `remote`, and the answer names it."""
    answer = {"id": "i_1", "status": "completed", "environment_id": "env_1", "steps": []}
    async with sandboxed(open_gateway, tmp_path, "gemini", answer) as at:
        path = "/v1beta/interactions"
        first = {"agent": "m", "input": "Write a script", "environment": "remote"}
        assert (await answered(at.gateway, path, first, at.mine))[0] == 200
        ways: list[Any] = ["env_1", {"type": "remote", "environment_id": "env_1"}]
        for way in (*ways, {"type": "remote", "environmentId": "env_1"}):
            again = {**first, "environment": way}
            assert (await answered(at.gateway, path, again, at.mine))[0] == 200
            count = len(at.asked)
            assert (await answered(at.gateway, path, again, at.theirs))[0] == 404
            assert len(at.asked) == count
        unknown = {**first, "environment": "env_of_nobody"}
        assert (await answered(at.gateway, path, unknown, at.mine))[0] == 404
