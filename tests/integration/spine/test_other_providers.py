"""A gateway of other providers than Google: what is called natively, and what a prompt is told."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.gateway import Gateway, Opener, payload_of
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.settings import GOOGLE_URL

CHAT = {"model": "gpt-5-mini", "messages": [{"role": "user", "content": "Say hello"}]}
# As it is where others reach it: no emulator takes the place of Gemini's account.
NO_GEMINI = {
    "host": "0.0.0.0",
    "auth": "off",
    "gemini_api_key": None,
    "gemini_base_url": GOOGLE_URL,
}


@pytest.fixture
async def openai() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


@pytest.fixture
def policy(tmp_path: Path, openai: Emulator, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-openai")
    path = tmp_path / "policy.toml"
    lines = ("[upstreams.openai]", f'base_url = "{openai.url}"', 'key = "OPENAI_API_KEY"')
    path.write_text("\n".join([*lines, 'models = ["gpt-*"]']))
    return path


async def post(gateway: Gateway, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    async with gateway.http.post(f"{gateway.url}{path}", **payload_of(body)) as response:
        return response.status, await response.json(content_type=None)


async def test_a_gateway_without_an_account_of_gemini(
    open_gateway: Opener, policy: Path, openai: Emulator
) -> None:
    gateway = await open_gateway(tidegate_policy=policy, **NO_GEMINI)
    assert list(gateway.services.spine.health) == ["openai"]
    assert (await gateway.get("/dashboard/session"))[1]["pools"] == ["openai", "gemini"]
    _, usual = await gateway.get("/admin/limits")
    assert usual["pool"] == "openai"
    status, answer = await post(gateway, "/v1/chat/completions", **CHAT)
    assert (status, answer["object"]) == (200, "chat.completion")
    wrapped = await gateway.submit(endpoint="/v1/chat/completions", body=CHAT)
    assert (await gateway.end_of(wrapped))["status"] == "succeeded"
    for path in ("/submit", "/stream"):
        status, said = await post(gateway, path, data="Nice!", model="claude-x")
        assert (status, said["code"], said["field"]) == (400, "invalid_request", "model")
        assert said["detail"] == "no upstream serves the model 'claude-x'"
        assert said["allowed"] == "openai: gpt-*"
    status, said = await post(gateway, "/v1/chat/completions", **CHAT | {"model": "claude-x"})
    assert (status, said["error"]["param"]) == (404, "model")
    assert [call.model for call in await openai.control.calls()] == ["gpt-5-mini"] * 2


@pytest.fixture
def one_at_a_time(policy: Path) -> Path:
    policy.write_text(f'{policy.read_text()}\nlimits = {{ "model:gpt-*" = 1 }}')
    return policy


async def test_a_job_names_the_limit_of_the_upstream_that_serves_its_model(
    open_gateway: Opener, one_at_a_time: Path, openai: Emulator
) -> None:
    gateway = await open_gateway(tidegate_policy=one_at_a_time)
    await openai.control.set_fault("hang")
    wanted = {"data": "Say hello", "type": "text_only", "model": "gpt-5-mini"}
    running = await gateway.submit(**wanted)

    async def is_called() -> bool:
        _, reason = await gateway.get(f"/admin/why/{running}")
        return [one["request_id"] for one in reason["holders"]] == [running]

    await wait_until(is_called, 20, "its permit in the pool of its upstream")
    job = await gateway.submit(**wanted)

    async def names_it() -> Any:
        _, reason = await gateway.get(f"/admin/why/{job}")
        return reason if reason.get("held_up_by") else None

    reason = await wait_until(names_it, 20, "the limit that a job waits for")
    assert reason["held_up_by"] == "model:gpt-*"
    assert "model:gpt-*: 1 of 1 are in use, held by default (1)" in reason["sentence"]
    assert (await gateway.get(f"/requests/{job}/why"))[1]["limit"] == "model:gpt-*"

    async def status_names_it() -> bool:  # by a snapshot that it keeps for a moment
        return (await gateway.get(f"/status/{job}"))[1].get("waits_for") == "model:gpt-*"

    await wait_until(status_names_it, 20, "the limit in its status")
    _, seen = await gateway.get(f"/admin/requests/{job}")
    assert seen["waiting"]["held_up_by"] == "model:gpt-*"


async def test_the_usual_models_are_those_of_the_account_that_there_is(
    open_gateway: Opener, policy: Path, openai: Emulator
) -> None:
    settings = NO_GEMINI | {"openai_api_key": "key-of-openai"}
    gateway = await open_gateway(tidegate_policy=policy, **settings)
    answer = {"kind": "text_only", "reason": "because the test says so"}
    await openai.control.set_behaviour(classifier_answer=answer)
    for prompt in ("Explain the tide", "Nice!", "Draw a lighthouse"):
        done = await gateway.end_of(await gateway.submit(data=prompt))
        assert done["status"] == "succeeded", done
        assert (await gateway.stream(text=prompt)).names[-1] == "done"
    asked = ["gpt-6-luna"] * 6 + ["gpt-image-2.5-flare"] * 2
    assert sorted(call.model for call in await openai.control.calls()) == asked


async def test_a_job_whose_model_nobody_serves_any_more_fails_and_is_not_misrouted(
    open_gateway: Opener, policy: Path
) -> None:
    gateway = await open_gateway(worker=False)
    job = await gateway.submit(data="Say hello", model="claude-x")
    other = await open_gateway(tidegate_policy=policy, **NO_GEMINI)
    record = await other.end_of(job)
    assert (record["status"], record["error"]["code"]) == ("failed", "invalid_request")
    assert await gateway.calls() == await other.calls() == []


async def test_where_nobody_serves_the_classifiers_model_keywords_decide(
    open_gateway: Opener, policy: Path, openai: Emulator
) -> None:
    gateway = await open_gateway(tidegate_policy=policy, **NO_GEMINI)
    record = await gateway.end_of(await gateway.submit(data="Nice!", model="gpt-5-mini"))
    assert (record["status"], record["classified_by"]) == ("succeeded", "keywords")
    assert [call.model for call in await openai.control.calls()] == ["gpt-5-mini"]


async def test_a_server_of_ones_own_needs_an_address_and_no_key(
    open_gateway: Opener, tmp_path: Path
) -> None:
    seen: list[tuple[str, set[str]]] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append((request.path, {name.lower() for name in request.headers}))
        if (await request.json())["model"] == "away":
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        choice = {"index": 0, "message": {"role": "assistant", "content": "hello"}}
        usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
        body = {"id": "c", "object": "chat.completion", "choices": [choice], "usage": usage}
        return web.json_response(body)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        (address,) = runner.addresses
        file = tmp_path / "policy.toml"
        file.write_text(f'[upstreams.gpu]\nbase_url = "http://127.0.0.1:{address[1]}"\n')
        gateway = await open_gateway(worker=False, tidegate_policy=file, **NO_GEMINI)
        url, client = f"{gateway.url}/v1/chat/completions", {"Authorization": "Bearer of-a-client"}
        async with gateway.http.post(url, json=CHAT, headers=client) as response:
            assert (response.status, response.headers["x-tidegate-upstream"]) == (200, "gpu")
        async with gateway.http.post(url, json=CHAT | {"model": "away"}) as response:
            refused = await response.json()
            assert (response.status, refused) == (404, {"error": {"message": "no such model"}})
    finally:
        await runner.cleanup()
    (path, headers), _ = seen
    assert path == "/v1/chat/completions"
    assert not headers & {"authorization", "x-api-key", "api-key"}


async def _mistral(request: web.BaseRequest) -> web.StreamResponse:
    """Streams as Mistral does, and refuses a field that it does not know."""
    body = await request.json()
    if "stream_options" in body:
        refused = {"type": "extra_forbidden", "loc": ["body", "stream_options", "include_usage"]}
        return web.json_response({"object": "error", "message": {"detail": [refused]}}, status=422)
    choice = {"index": 0, "delta": {"role": "assistant", "content": "Bonjour"}}
    last = {"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    events = (chunk | {"choices": [choice]}, chunk | {"choices": [last], "usage": usage})
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return web.Response(
        text="".join((*lines, "data: [DONE]\n\n")), content_type="text/event-stream"
    )


async def test_streams_of_mistral_are_not_asked_for_the_usage_that_they_report(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTRAL_API_KEY", "key-of-mistral")
    runner = web.ServerRunner(web.Server(_mistral))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    path = tmp_path / "mistral.toml"
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    path.write_text(f'[upstreams.mistral]\nprovider = "mistral"\nbase_url = "{url}"\n')
    gateway = await open_gateway(worker=False, tidegate_policy=path, **NO_GEMINI)
    model = "mistral-small-latest"
    rows = []
    for asking in ({}, {"stream_options": {"include_usage": True}}):  # as most agents do
        body = CHAT | {"model": model, "stream": True, **asking}
        async with gateway.http.post(f"{gateway.url}/v1/chat/completions", json=body) as answer:
            assert (answer.status, "Bonjour" in await answer.text()) == (200, True)
            rows.append(await gateway.audit(answer.headers["x-tidegate-request-id"]))
    streamed = await gateway.stream(text="Say hello", model=model)
    assert streamed.names[-1] == "done"
    for found in (*rows, await gateway.audit(streamed.request_id)):
        assert (found["input_tokens"], found["output_tokens"]) == (7, 3)
    await runner.cleanup()
