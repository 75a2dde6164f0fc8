"""tokens really billed, in Gemini's dialect: what was told, or what had been sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.waiting import wait_until
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.emulator.state import Billed

BODY = {"contents": [{"parts": [{"text": "Hello there"}]}]}
STREAM = "streamGenerateContent?alt=sse"


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(headers={"x-goog-api-key": "k"}) as opened:
        yield opened


def address(emulator: Emulator, model: str, action: str) -> str:
    return f"{emulator.url}/v1beta/models/{model}:{action}"


async def test_a_finished_call_is_billed_what_it_was_told(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    thinking = {"gemini-2.5-flash", "gemini-2.5-pro", "gemini-3-flash"}
    others = {"gemini-2.5-flash-lite", "gemini-2.5-flash-image", "gemini-3.1-flash-lite"}
    for model in sorted(thinking | others):
        for action in ("generateContent", STREAM, "streamGenerateContent"):
            await emulator.control.reset()
            url = address(emulator, model, action)
            async with session.post(url, json=BODY) as response:
                text = await response.text()
            if action == STREAM:
                text = text.strip().split("\r\n\r\n")[-1].removeprefix("data: ")
            said = json.loads(text)
            said = (said[-1] if isinstance(said, list) else said)["usageMetadata"]
            thoughts = said.get("thoughtsTokenCount", 0)
            assert (thoughts > 0) == (model in thinking)
            billed = Billed(
                1, said["promptTokenCount"], said["candidatesTokenCount"] + thoughts, thoughts
            )
            assert (await emulator.control.stats()).tokens == {model: {"finished": billed}}


@pytest.mark.parametrize("fault", ["unavailable", "throttled", "cut", "garbage"])
async def test_nothing_is_billed_when_no_answer_began(
    emulator: Emulator, session: aiohttp.ClientSession, fault: str
) -> None:
    await emulator.control.set_fault(fault, count=1)
    url = address(emulator, "m", "generateContent")
    try:
        async with session.post(url, json=BODY) as response:
            await response.read()
    except aiohttp.ClientError:
        assert fault == "cut"
    async with session.post(address(emulator, "m", "countTokens"), json=BODY) as response:
        assert response.status == 200
    stats = await emulator.control.stats()
    assert (stats["text_only"].failed, stats["other"].finished, stats.tokens) == (1, 1, {})


async def test_a_call_that_broke_off_is_billed_for_what_had_been_sent(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    await emulator.control.set_fault("cut_mid_stream", after_chunks=2, count=1)
    await emulator.control.set_fault("hang_mid_stream", after_chunks=1, count=1)
    url = address(emulator, "m", STREAM)
    with pytest.raises(aiohttp.ClientError):
        await read(session, url)
    reader = asyncio.create_task(read(session, url))

    async def one_chunk_sent() -> Any:
        calls = await emulator.control.calls()
        return len(calls) == 2 and calls[1].output_tokens

    await wait_until(one_chunk_sent)
    reader.cancel()

    async def ended() -> bool:
        return (await emulator.control.stats()).in_flight == 0

    await wait_until(ended)
    cut, left = await emulator.control.calls()
    stats = await emulator.control.stats()
    assert cut.output_tokens > left.output_tokens > 0
    assert cut.input_tokens == left.input_tokens == 3
    assert stats.tokens == {
        "m": {
            "failed": Billed(1, 3, cut.output_tokens),
            "client_gone": Billed(1, 3, left.output_tokens),
        }
    }
    assert stats.billed() == Billed(2, 6, cut.output_tokens + left.output_tokens)


async def read(session: aiohttp.ClientSession, url: str) -> bytes:
    async with session.post(url, json=BODY) as response:
        return await response.read()
