"""What an answer names, and a later call names again, belongs to the tenant of the first call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import key_of
from tests.waiting import wait_until
from tidegate.call import new_id
from tidegate.store.provider.resources import NewResource, ResourceOwner

POLICY = """
[upstreams.own]
base_url = "{url}"
dialect = "openai"
auth = "none"
models = ["m"]
passthrough = ["/v1/vector_stores/*", "/v1/containers/*"]
"""
ITEM = "rs_0123456789abcdef0123456789"
RESPONSE: dict[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "status": "completed",
    "output": [{"type": "reasoning", "id": ITEM, "summary": []}],
    "usage": {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2},
}
SPOKEN: dict[str, Any] = {
    "id": "chatcmpl_1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "audio": {"id": "audio_1"}}}],
}
MADE = {"/v1/vector_stores": "vs_1", "/v1/containers": "cntr_1"}


def stream_of(answer: dict[str, Any]) -> bytes:
    if answer is RESPONSE:
        begun = {"type": "response.created", "response": {**RESPONSE, "output": []}}
        events: list[Any] = [begun, {"type": "response.completed", "response": RESPONSE}]
    else:
        said = {**SPOKEN, "choices": [{"index": 0, "delta": {"audio": {"id": "audio_1"}}}]}
        events = [said, {**said, "choices": []}]
    return b"".join(b"data: %b\n\n" % orjson.dumps(one) for one in events)


@pytest.fixture
async def asked() -> list[str]:
    """The paths that reached the provider."""
    return []


@pytest.fixture
async def gateway(open_gateway: Opener, tmp_path: Path, asked: list[str]) -> AsyncIterator[Gateway]:
    async def answer(request: web.BaseRequest) -> web.Response:
        asked.append(request.path)
        body = await request.read()
        wanted = orjson.loads(body) if body else {}
        if request.path not in ("/v1/responses", "/v1/chat/completions"):
            shown = {"id": MADE.get(request.path, "vs_1"), "object": "vector_store"}
            return web.json_response(shown)
        answer = RESPONSE if request.path == "/v1/responses" else SPOKEN
        if wanted.get("store") is False:
            answer = {**answer, "store": False}
        if wanted.get("stream"):
            return web.Response(body=stream_of(answer), content_type="text/event-stream")
        return web.json_response(answer)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY.format(url=f"http://127.0.0.1:{runner.addresses[0][1]}"))
    yield await open_gateway(worker=False, auth="on", tidegate_policy=policy)
    await runner.cleanup()


async def answered(gateway: Gateway, path: str, body: Any, key: dict[str, str]) -> tuple[int, str]:
    async with gateway.http.post(f"{gateway.url}{path}", json=body, headers=key) as response:
        return response.status, await response.text()


async def have_owner(gateway: Gateway, kind: str, one: str) -> bool:
    return bool(await gateway.services.store.provider_resources.owners("openai", kind, [one]))


async def note(gateway: Gateway, kind: str, one: str) -> None:
    owner = ResourceOwner("mine", "own", b"account", new_id())
    resource = NewResource("openai", kind, one, owner)
    await gateway.services.store.provider_resources.note([resource])


@pytest.mark.parametrize("stream", [False, True])
async def test_an_item_of_a_stored_response_is_taken_by_its_tenant_alone(
    gateway: Gateway, asked: list[str], stream: bool
) -> None:
    mine, theirs = [await key_of(gateway, tenant) for tenant in ("mine", "theirs")]
    first = {"model": "m", "input": "Think", "stream": stream}
    assert (await answered(gateway, "/v1/responses", first, mine))[0] == 200
    await wait_until(lambda: have_owner(gateway, "item", ITEM))
    for item in ({"type": "item_reference", "id": ITEM}, RESPONSE["output"][0], {"id": ITEM}):
        again = {"model": "m", "input": [item, {"role": "user", "content": "And?"}]}
        assert (await answered(gateway, "/v1/responses", again, mine))[0] == 200
        count = len(asked)
        status, said = await answered(gateway, "/v1/responses", again, theirs)
        assert (status, ITEM in said) == (404, True)
        assert len(asked) == count
    unknown = {"model": "m", "input": [{"type": "item_reference", "id": "msg_made_elsewhere"}]}
    assert (await answered(gateway, "/v1/responses", unknown, theirs))[0] == 200


async def test_an_item_that_the_provider_does_not_keep_is_nobody_s(gateway: Gateway) -> None:
    mine, theirs = [await key_of(gateway, tenant) for tenant in ("mine", "theirs")]
    first = {"model": "m", "input": "Think", "store": False}
    assert (await answered(gateway, "/v1/responses", first, mine))[0] == 200
    again = {"model": "m", "input": [RESPONSE["output"][0]], "store": False}
    assert (await answered(gateway, "/v1/responses", again, theirs))[0] == 200
    assert not await have_owner(gateway, "item", ITEM)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_audio_of_an_answer_is_named_by_its_tenant_alone(
    gateway: Gateway, asked: list[str], stream: bool
) -> None:
    mine, theirs = [await key_of(gateway, tenant) for tenant in ("mine", "theirs")]
    user = {"role": "user", "content": "Speak"}
    said = {"voice": "alloy", "format": "wav"}
    first = {"model": "m", "messages": [user], "audio": said, "stream": stream}
    assert (await answered(gateway, "/v1/chat/completions", first, mine))[0] == 200
    spoken = {"role": "assistant", "audio": {"id": "audio_1"}}
    again = {"model": "m", "messages": [user, spoken, user]}
    assert (await answered(gateway, "/v1/chat/completions", again, mine))[0] == 200
    count = len(asked)
    assert (await answered(gateway, "/v1/chat/completions", again, theirs))[0] == 404
    assert len(asked) == count


async def test_what_a_path_of_passthrough_makes_is_named_by_its_tenant_alone(
    gateway: Gateway, asked: list[str]
) -> None:
    mine, theirs = [await key_of(gateway, tenant) for tenant in ("mine", "theirs")]
    for path, made in MADE.items():
        assert (await answered(gateway, path, {"name": "Ours"}, mine))[0] == 200
        below = f"{path}/{made}/search"
        assert (await answered(gateway, below, {"query": "?"}, mine))[0] == 200
        count = len(asked)
        status, said = await answered(gateway, below, {"query": "?"}, theirs)
        assert (status, made in said) == (404, True)
        async with gateway.http.delete(f"{gateway.url}{path}/{made}", headers=theirs) as response:
            assert response.status == 404
        assert len(asked) == count
    with_file = {"name": "Ours", "file_ids": ["file_1"]}
    assert (await answered(gateway, "/v1/vector_stores", with_file, theirs))[0] == 200
    await note(gateway, "file", "file_1")
    status, said = await answered(gateway, "/v1/vector_stores", with_file, theirs)
    assert (status, "file_1" in said) == (404, True)
    tool = {"type": "file_search", "vector_store_ids": ["vs_1"]}
    code = {"type": "code_interpreter", "container": "cntr_1"}
    for one in (tool, code):
        body = {"model": "m", "input": "?", "tools": [one]}
        assert (await answered(gateway, "/v1/responses", body, mine))[0] == 200
        assert (await answered(gateway, "/v1/responses", body, theirs))[0] == 404
    shared = {**tool, "vector_store_ids": ["vs_of_the_console"]}
    for key in (mine, theirs):
        changed = await answered(gateway, "/v1/vector_stores/vs_of_the_console", {"name": "x"}, key)
        assert changed[0] == 200
        body = {"model": "m", "input": "?", "tools": [shared]}
        assert (await answered(gateway, "/v1/responses", body, key))[0] == 200
