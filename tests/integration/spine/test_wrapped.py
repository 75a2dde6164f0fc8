"""Jobs that wrap a native call: `endpoint` and `body`."""

from __future__ import annotations

import asyncio
from json import dumps
from typing import Any

import pytest

from tests.gateway import Gateway, Opener, payload_of
from tests.integration.tenants.asking import key_of

MODEL = "gemini-2.5-flash"


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}]} | more


async def refused(gateway: Gateway, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with gateway.http.post(f"{gateway.url}/submit", **payload_of(body)) as response:
        return response.status, await response.json(content_type=None)


async def test_an_answer_that_was_cut_off_is_asked_for_again(open_gateway: Opener) -> None:
    """Without a length an answer ends where its connection does, or breaks."""
    said = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}}]}
    whole, asked = dumps(said).encode(), list[bytes]()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(head + (whole[:-20] if len(asked) == 1 else whole))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        gateway = await open_gateway(gemini_base_url=f"http://127.0.0.1:{port}")
        request_id = await gateway.submit(endpoint="/v1/chat/completions", body=chat("Say hello"))
        record = await gateway.end_of(request_id)
        assert (record["status"], record["attempts"]) == ("succeeded", 2)
        assert record["answer"] == said
        first, _ = await gateway.attempts(request_id)
        assert first["outcome"] == "failed"
        await gateway.stop_worker()


async def test_a_job_wraps_calls_of_several_dialects(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    first = await gateway.submit(endpoint="/v1/chat/completions", body=chat("Say hello"))
    gemini = {"contents": [{"role": "user", "parts": [{"text": "Say hello"}]}]}
    path = f"/v1beta/models/{MODEL}:generateContent"
    second = await gateway.submit(endpoint=path, body=gemini)
    third = await gateway.submit(
        endpoint="/v1/messages", body=chat("Say hello", model="claude-x", max_tokens=50)
    )
    judged = await gateway.submit(
        endpoint="/v1/moderations", body={"input": "I kill", "model": "m"}
    )
    ranked = await gateway.submit(
        endpoint="/v1/rerank", body={"model": "m", "query": "a", "documents": ["b", "a"]}
    )
    assert (await gateway.end_of(judged))["answer"]["results"][0]["flagged"]
    assert (await gateway.end_of(ranked))["answer"]["results"][0]["index"] == 1
    record = await gateway.end_of(first)
    assert (record["status"], record["type"], record["attempts"]) == ("succeeded", "text_only", 1)
    assert (record["source"], record["model"]) == ("job", MODEL)
    assert "Say hello" in record["answer"]["choices"][0]["message"]["content"]
    assert "text" not in record
    told = record["answer"]["usage"]["completion_tokens"]
    assert record["usage"]["output_tokens"] == told > 0
    other = await gateway.end_of(second)
    assert other["answer"]["candidates"][0]["content"]["parts"]
    last = await gateway.end_of(third)
    assert last["answer"]["content"], last
    assert last["usage"]["output_tokens"] == last["answer"]["usage"]["output_tokens"] > 0
    dialects = {call.dialect for call in await gateway.calls()}
    assert dialects == {"openai", "gemini", "anthropic"}
    (attempt,) = await gateway.attempts(first)
    assert attempt["outcome"] == "succeeded"
    row = await gateway.audit(first)
    assert row["request"]["endpoint"] == "/v1/chat/completions"


async def test_what_the_provider_refuses_fails_the_job(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    await gateway.upstream.set_behaviour(strict_models=True)
    body = chat("Say hello") | {"model": "no-such-model"}
    record = await gateway.end_of(await gateway.submit(endpoint="/v1/chat/completions", body=body))
    assert (record["status"], record["error"]["upstream_status"]) == ("failed", 404)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"endpoint": "/v1/chat/completions", "body": chat("x", stream=True)}, "body.stream"),
        ({"endpoint": "/v1/responses", "body": chat("x", background=True)}, "background"),
        ({"endpoint": "/v1/nothing", "body": chat("x")}, "endpoint"),
        ({"endpoint": "/v1/messages/count_tokens", "body": chat("x")}, "endpoint"),
        ({"endpoint": f"/v1beta/models/{MODEL}:streamGenerateContent", "body": {}}, "endpoint"),
        ({"endpoint": "/v1/audio/speech", "body": chat("x", input="x")}, "endpoint"),
        ({"endpoint": "/v1/chat/completions", "body": {}}, "model"),
        ({"endpoint": "/v1/chat/completions", "body": "x"}, "body"),
        ({"endpoint": "/v1/chat/completions", "body": chat("x"), "data": "y"}, "data"),
    ],
)
async def test_what_cannot_be_a_job_is_refused_by_name(
    open_gateway: Opener, body: dict[str, Any], field: str
) -> None:
    gateway = await open_gateway(worker=False)
    status, problem = await refused(gateway, body)
    assert (status, problem["field"]) == (400, field)
    assert problem["allowed"]


@pytest.mark.parametrize(
    "value", ["1e999", '"a\\ud800b"', "[" * 1_100 + "]" * 1_100], ids=["number", "half", "deep"]
)
async def test_a_body_that_could_not_be_relayed_is_no_job(open_gateway: Opener, value: str) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    keys = [await key_of(gateway, "acme", models=[MODEL]), await key_of(gateway, "other")]
    call = dumps(chat("Say hello"))[:-1] + f', "user": {value}}}'
    wrapped = f'{{"endpoint": "/v1/chat/completions", "body": {call}}}'
    for path, body in (("/v1/chat/completions", call), ("/submit", wrapped)):
        for headers in keys:
            given = headers | {"Content-Type": "application/json"}
            url = gateway.url + path
            async with gateway.http.post(url, data=body, headers=given) as response:
                assert response.status == 400, await response.text()
    assert await gateway.database.fetchval("SELECT count(*) FROM requests") == 0
