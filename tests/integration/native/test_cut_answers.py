"""Plain answers that lack their end: failed, charged for what came, and tried again at first."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import orjson
import pytest

from tests.gateway import Gateway, Opener
from tests.integration.security.hostile import Hostile, hostile, one_try

__all__ = ["hostile", "one_try"]

MODEL = "gemini-2.5-flash"
SAID = "The tide comes in. " * 40
ANSWER = orjson.dumps(
    {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": SAID},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 160, "total_tokens": 172},
    }
)
CUT = ANSWER[: ANSWER.index(b'"finish_reason"') - 20]
LINES = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
CHUNK = b"%x\r\n%b\r\n"
HEADS = {
    "no length": (LINES + b"\r\n", b""),
    "chunked": (LINES + b"transfer-encoding: chunked\r\n\r\n", b"0\r\n\r\n"),
}


def framed(name: str, *pieces: bytes) -> bytes:
    head, end = HEADS[name]
    if end:
        pieces = tuple(CHUNK % (len(one), one) for one in pieces)
    return head + b"".join(pieces) + end


BODY = {"model": MODEL, "messages": [{"role": "user", "content": "What does the tide do?"}]}


def asked(gateway: Gateway) -> Any:
    return gateway.http.post(f"{gateway.url}/v1/chat/completions", json=BODY)


async def assert_cut(gateway: Gateway, request_id: str) -> None:
    row = await gateway.audit(request_id)
    assert (row["status"], row["failure"]["code"]) == ("failed", "upstream_unavailable")
    assert row["usage_state"] == "estimated"
    assert row["input_tokens"] > 0
    assert row["output_tokens"] >= len(SAID) // 8, "what has come is charged"


@pytest.mark.usefixtures("one_try")
async def test_a_plain_answer_that_lacks_its_end_has_failed(
    open_gateway: Opener, hostile: Hostile
) -> None:
    hostile.answer = framed("chunked", CUT)
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url)
    async with asked(gateway) as response:
        assert response.status == 502
        assert b"cut off before its end" in await response.read()
    await assert_cut(gateway, response.headers["x-tidegate-request-id"])


@pytest.mark.parametrize("framing", HEADS)
async def test_a_client_that_has_its_beginning_sees_the_connection_break(
    open_gateway: Opener, hostile: Hostile, framing: str
) -> None:
    begun = asyncio.Event()

    async def answer(writer: asyncio.StreamWriter) -> None:
        whole, half = framed(framing, CUT[:200], CUT[200:]), len(HEADS[framing][0]) + 210
        writer.write(whole[:half])
        await begun.wait()
        writer.write(whole[half:])
        await writer.drain()

    hostile.answer = answer
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url)
    async with asked(gateway) as response:
        assert await response.content.readany()
        begun.set()
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    await assert_cut(gateway, response.headers["x-tidegate-request-id"])


async def test_a_call_whose_answer_lacks_its_end_is_tried_again(
    open_gateway: Opener, hostile: Hostile
) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(framed("chunked", CUT if len(hostile.seen) == 1 else ANSWER))
        await writer.drain()

    hostile.answer = answer
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url)
    async with asked(gateway) as response:
        assert (response.status, await response.read()) == (200, ANSWER)
    row = await gateway.audit(response.headers["x-tidegate-request-id"])
    assert (row["status"], row["attempts"], row["output_tokens"]) == ("succeeded", 2, 160)
