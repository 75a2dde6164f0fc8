"""Cache writes, audio, images, searches and a provider's own cost: on record on every path."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.batching import begin, content, end_of
from tests.gateway import Gateway, Opener
from tests.integration.accounting.test_budgets import with_budgets
from tests.integration.batches.conftest import MakeSdk, sdk
from tests.integration.native.test_totals import VERSION
from tests.integration.security.hostile import Hostile, hostile
from tests.waiting import wait_until
from tidegate.http.problems import REQUEST_ID_HEADER
from tidegate.prices.budgets import Budget

__all__ = ["hostile", "sdk"]

MODEL = "gemini-2.5-flash"
PRICES = f"""
[upstreams.gemini.prices]
"{MODEL}" = {{ input = 4, output = 20, cached = 0.4, cache_write = 5, cache_write_1h = 8, \
input_audio = 10 }}
"dear" = {{ input = 400, output = 2000 }}
"""
CHAT: dict[str, Any] = {
    "id": "c-1",
    "model": "served-1",
    "choices": [{"index": 0, "message": {"content": "Hello"}, "finish_reason": "stop"}],
    "usage": {
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "total_tokens": 110,
        "prompt_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 30},
        "cost": 0.001234,
        "server_tool_use_details": {"web_search_requests": 2},
    },
}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "model": "served-2",
    "content": [{"type": "text", "text": "Hello"}],
    "stop_reason": "end_turn",
    "usage": {
        "input_tokens": 10,
        "output_tokens": 10,
        "cache_read_input_tokens": 20,
        "cache_creation_input_tokens": 70,
        "cache_creation": {"ephemeral_5m_input_tokens": 30, "ephemeral_1h_input_tokens": 40},
        "server_tool_use": {"web_search_requests": 1},
    },
}
CONTENT = {
    "responseId": "r-1",
    "modelVersion": "served-3",
    "candidates": [
        {
            "content": {"role": "model", "parts": [{"text": "Hello"}]},
            "finishReason": "STOP",
            "groundingMetadata": {"webSearchQueries": ["a", "b"]},
        }
    ],
    "usageMetadata": {
        "promptTokenCount": 100,
        "candidatesTokenCount": 10,
        "totalTokenCount": 110,
        "promptTokensDetails": [
            {"modality": "TEXT", "tokenCount": 40},
            {"modality": "AUDIO", "tokenCount": 60},
        ],
    },
}
OF_CHAT = {"cache_write_tokens": 30, "searches": 2, "provider_cost_micros": 1_234}
OF_MESSAGE = {
    "cache_write_tokens": 70,
    "cache_write_5m_tokens": 30,
    "cache_write_1h_tokens": 40,
    "searches": 1,
}
OF_CONTENT = {"input_audio_tokens": 60, "searches": 2}
# 50 fresh, 20 cached, 30 written; 10, 20, 30, 40 for an hour; 40 of text, 60 of audio; 10 given.
COSTS = 200 + 8 + 150 + 200, 40 + 8 + 150 + 320 + 200, 160 + 600 + 200
ASKED = [{"role": "user", "content": "Say hello"}]
OPENAI, ANTHROPIC = "/v1/chat/completions", "/v1/messages"
GEMINI = f"/v1beta/models/{MODEL}"


def answer_to(request: bytes) -> bytes:
    """By the path that was asked, whole or as a stream."""
    head, _, body = request.partition(b"\r\n\r\n")
    path = head.split(b" ", 2)[1]
    streams = b'"stream":true' in body.replace(b" ", b"") or b"streamGenerate" in path
    if b"messages" in path:
        usage = MESSAGE["usage"]
        begun = {"type": "message_start", "message": MESSAGE | {"stop_reason": None}}
        ended = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}
        events: list[Any] = [begun, ended] if streams else [MESSAGE]
    else:
        events = [CHAT if b"chat" in path else CONTENT]
    kind, said = b"application/json", orjson.dumps(events[0])
    if streams:
        kind = b"text/event-stream"
        said = b"".join(b"data: %b\n\n" % orjson.dumps(one) for one in events)
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\nconnection: close\r\n\r\n%b" % (kind, said)


@pytest.fixture
async def gateway(open_gateway: Opener, hostile: Hostile, tmp_path: Path) -> Gateway:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(answer_to(hostile.seen[-1]))
        await writer.drain()

    hostile.answer = answer
    policy = tmp_path / "priced.toml"
    policy.write_text(PRICES)
    return await open_gateway(gemini_base_url=hostile.url, tidegate_policy=policy)


async def rows_of(gateway: Gateway, count: int) -> list[tuple[Any, int, str | None]]:
    """The details, cost and model version of so many records, in their order of receipt."""
    whole = "SELECT count(*) = $1 FROM audit"
    await wait_until(lambda: gateway.database.fetchval(whole, count), 20, f"{count} records")
    rows = await gateway.database.fetch("SELECT * FROM audit ORDER BY submitted_at")
    return [
        (orjson.loads(row["usage_details"]), row["cost_micros"], row["model_version"])
        for row in rows
    ]


async def asked(gateway: Gateway, path: str, body: dict[str, Any]) -> str:
    async with gateway.http.post(gateway.url + path, json=body, headers=VERSION) as response:
        assert response.status == 200, await response.read()
        await response.read()
        return response.headers[REQUEST_ID_HEADER]


async def test_native_calls_whole_and_streamed(gateway: Gateway) -> None:
    body: dict[str, Any] = {"model": MODEL, "messages": ASKED, "max_tokens": 50}
    contents = {"contents": [{"role": "user", "parts": [{"text": "Say hello"}]}]}
    ids = []
    for path, given in (
        (OPENAI, body),
        (OPENAI, body | {"stream": True}),
        (ANTHROPIC, body),
        (ANTHROPIC, body | {"stream": True}),
        (f"{GEMINI}:generateContent", contents),
        (f"{GEMINI}:streamGenerateContent?alt=sse", contents),
    ):
        ids.append(await asked(gateway, path, given))
    wanted = [
        (details, cost, f"served-{number}")
        for number, (details, cost) in enumerate(
            zip((OF_CHAT, OF_MESSAGE, OF_CONTENT), COSTS, strict=True), 1
        )
        for _ in range(2)
    ]
    assert await rows_of(gateway, 6) == wanted
    for request_id, (details, _, version) in zip(ids, wanted, strict=True):
        assert details.items() <= (await gateway.status(request_id))["usage"].items()
        url = f"{gateway.url}/admin/requests/{request_id}"
        async with gateway.http.get(url) as response:
            shown = (await response.json())["request"]
        assert details.items() <= shown["usage"].items()
        assert shown["model_version"] == version
    async with gateway.http.get(f"{gateway.url}/usage") as response:
        total = (await response.json())["total"]
    assert (total["cache_write_tokens"], total["searches"]) == (2 * (30 + 70), 2 * (2 + 1 + 2))
    assert (total["input_audio_tokens"], total["provider_cost_micros"]) == (120, 2 * 1_234)


async def test_jobs_streams_of_ours_and_lines_of_batches(gateway: Gateway, sdk: MakeSdk) -> None:
    job = await gateway.submit(data="Say hello", type="text_only")
    shown = await gateway.end_of(job)
    assert shown["status"] == "succeeded", shown
    body = {"model": MODEL, "messages": ASKED, "max_tokens": 50}
    wrapped = await gateway.submit(endpoint=ANTHROPIC, body=body)
    assert OF_MESSAGE.items() <= (await gateway.end_of(wrapped))["usage"].items()
    async with gateway.http.post(
        f"{gateway.url}/stream", json={"data": "Say hello", "type": "text_only"}
    ) as response:
        assert '"input_audio_tokens":60' in (await response.text()).replace(" ", "")
    client = sdk(gateway)
    done = await end_of(client, await begin(client, content(1)))
    assert done.status == "completed"
    found = await rows_of(gateway, 4)
    of_content = (OF_CONTENT, COSTS[2], "served-3")
    assert found == [
        of_content,
        (OF_MESSAGE, COSTS[1], "served-2"),
        of_content,
        (OF_CHAT, COSTS[0], "served-1"),
    ]

    async def is_shown() -> bool:
        view = await gateway.status(job)
        return bool(OF_CONTENT.items() <= view["usage"].items())

    await wait_until(is_shown, 20, "the details of a job")


async def test_absurd_figures_are_left_out_of_a_record_that_is_written(
    gateway: Gateway, hostile: Hostile
) -> None:
    usage = CHAT["usage"] | {"cost": 1e300, "num_sources_used": 10**18, "server_tool_use": [1]}
    usage["prompt_tokens_details"] = {"audio_tokens": -5, "cache_write_tokens": 10**17}
    said = orjson.dumps(CHAT | {"usage": usage}).replace(b"1e300", b"1e999")
    hostile.answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(said), said)
    request_id = await asked(gateway, OPENAI, {"model": MODEL, "messages": ASKED})
    row = await gateway.audit(request_id)
    assert (row["status"], row["usage_state"]) == ("succeeded", "told")
    assert orjson.loads(row["usage_details"]) == {"searches": 2}
    assert row["input_tokens"] == 100


async def test_texts_that_no_column_holds_lose_no_record(
    gateway: Gateway, hostile: Hostile
) -> None:
    odd = "s\x00v"
    finish = [{"index": 0, "message": {"content": "Hello"}, "finish_reason": odd}]
    chat = CHAT | {"id": odd, "model": odd, "service_tier": odd, "choices": finish}
    said = orjson.dumps(chat)
    hostile.answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(said), said)
    body = {"model": MODEL, "messages": ASKED, "max_tokens": 50}
    row = await gateway.audit(await asked(gateway, OPENAI, body))
    assert (row["status"], row["usage_state"]) == ("succeeded", "told")
    job = await gateway.submit(endpoint=OPENAI, body=body)
    assert (await gateway.end_of(job))["status"] == "succeeded"
    for found in (row, await gateway.audit(job)):
        assert orjson.loads(found["usage_details"])["tier"] == "s\ufffdv"
        assert found["model_version"] == "s\ufffdv"


COUNTS = {
    OPENAI: ("usage", "prompt_tokens", "completion_tokens", "total_tokens"),
    ANTHROPIC: ("usage", "input_tokens", "output_tokens", "total_tokens"),
    f"{GEMINI}:generateContent": (
        *("usageMetadata", "promptTokenCount", "candidatesTokenCount", "totalTokenCount"),
    ),
}


@pytest.mark.parametrize("path", COUNTS)
@pytest.mark.parametrize("taken", [0, 7])
async def test_zeros_are_no_usage_of_an_answer_that_has_a_text(
    gateway: Gateway, hostile: Hostile, path: str, taken: int
) -> None:
    plain = {"candidates": [{"content": {"parts": [{"text": "Hello"}]}, "finishReason": "STOP"}]}
    name, *counts = COUNTS[path]
    usage = dict(zip(counts, (taken, 0, taken), strict=True))
    said = orjson.dumps({OPENAI: CHAT, ANTHROPIC: MESSAGE}.get(path, plain) | {name: usage})
    hostile.answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(said), said)
    body = {"model": MODEL, "messages": ASKED, "max_tokens": 50}
    if path.startswith(GEMINI):
        body = {"contents": [{"parts": [{"text": "Say hello"}]}]}
    row = await gateway.audit(await asked(gateway, path, body))
    assert (row["status"], row["usage_state"]) == ("succeeded", "estimated")
    assert row["input_tokens"] == taken or (row["input_tokens"] > 0 and not taken)
    assert row["output_tokens"] > 0
    assert row["cost_micros"] == 4 * row["input_tokens"] + 20 * row["output_tokens"]


@pytest.mark.parametrize("path", [OPENAI, "/v1/embeddings"])
async def test_an_answer_that_nothing_here_decodes_is_charged_by_its_size_if_it_is_a_text(
    gateway: Gateway, hostile: Hostile, path: str
) -> None:
    coded = b"*" * 400
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: snappy\r\ncontent-length: 400\r\n\r\n"
    hostile.answer = head + coded
    body: dict[str, Any] = {"model": MODEL, "input": "Say hello"}
    if path == OPENAI:
        body = {"model": MODEL, "messages": ASKED, "max_tokens": 50}
    row = await gateway.audit(await asked(gateway, path, body))
    assert (row["status"], row["usage_state"]) == ("succeeded", "estimated")
    assert row["output_tokens"] == (100 if path == OPENAI else 0)


async def test_an_echo_of_the_prompt_is_no_output(gateway: Gateway, hostile: Hostile) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}
    said = orjson.dumps({"id": "c", "choices": [{"text": "Say hello"}], "usage": usage})
    hostile.answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(said), said)
    body = {"model": MODEL, "prompt": "Say hello", "max_tokens": 0, "echo": True}
    row = await gateway.audit(await asked(gateway, "/v1/completions", body))
    assert (row["usage_state"], row["input_tokens"], row["output_tokens"]) == ("told", 7, 0)


@pytest.mark.parametrize("field", ["models", "fallbacks"])
async def test_another_model_that_answers_is_charged_and_bounded_by_its_own_price(
    gateway: Gateway, hostile: Hostile, field: str
) -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    said = orjson.dumps(CHAT | {"model": "dear", "usage": usage})
    hostile.answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(said), said)
    body = {"model": MODEL, "messages": ASKED, "max_tokens": 50}
    row = await gateway.audit(await asked(gateway, OPENAI, body | {field: ["dear"]}))
    assert row["cost_micros"] == 100 * 400 + 10 * 2000
    row = await gateway.audit(await asked(gateway, OPENAI, body | {field: [MODEL]}))
    assert row["cost_micros"] == 100 * 4 + 10 * 20, (
        "a name that was not requested counts for nothing"
    )
    await with_budgets(gateway, Budget("all", "usd", 10**9, "day"))
    named = body | {field: [{"model": "dear"}]}
    async with gateway.http.post(gateway.url + OPENAI, json=named) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (403, "budget_unbounded")
        assert "another model that it names may answer" in error["message"]
