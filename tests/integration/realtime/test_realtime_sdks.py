"""Realtime sessions by the unmodified SDKs of OpenAI and Google: only their base URL is another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
from google.genai import Client
from openai import AsyncOpenAI

from tests.gateway import Gateway
from tests.waiting import wait_until

MODEL = "gemini-2.5-flash"


async def the_record(gateway: Gateway) -> dict[str, Any]:
    """The row of the only session."""
    query = "SELECT request_id FROM audit WHERE kind = 'realtime'"
    rows = await wait_until(lambda: gateway.database.fetch(query), 20, "a session's row")
    assert len(rows) == 1
    return await gateway.audit(str(rows[0]["request_id"]))


def says(text: str) -> Any:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


async def test_turns_of_openais_sdk_and_their_record(
    gateway: Gateway, openai: Callable[..., AsyncOpenAI]
) -> None:
    told: list[Any] = []
    async with openai(gateway).realtime.connect(model=MODEL) as session:
        first = await session.recv()
        assert first.type == "session.created"
        assert gateway.held == 1
        await session.session.update(session={"type": "realtime", "output_modalities": ["text"]})
        for text in ("Say hello", "And once more"):
            await session.conversation.item.create(item=says(text))
            await session.response.create()
            said = ""
            async for event in session:
                if event.type == "response.output_text.delta":
                    said += event.delta
                if event.type == "response.done":
                    told.append(event.response.usage)
                    break
            assert text in said
    await wait_until(lambda: gateway.held == 0, 5, "the permit's return")
    row = await the_record(gateway)
    assert (row["status"], row["http_status"], row["model"]) == ("succeeded", 101, MODEL)
    assert row["input_tokens"] == sum(one.input_tokens for one in told)
    assert row["output_tokens"] == sum(one.output_tokens for one in told)
    assert row["cached_tokens"] == sum(one.input_token_details.cached_tokens for one in told)
    assert row["usage_state"] == "told"
    summary = orjson.loads(row["response"])
    assert (summary["turns"], summary["closed_by"], summary["code"]) == (2, "client", 1000)
    (call,) = await gateway.calls()
    assert (call.dialect, call.kind, call.outcome) == ("openai", "realtime", "finished")
    assert (call.input_tokens, call.output_tokens) == (row["input_tokens"], row["output_tokens"])


async def test_turns_of_googles_sdk_and_their_record(
    gateway: Gateway, genai: Callable[..., Client]
) -> None:
    config: Any = {"response_modalities": ["TEXT"]}
    total = 0
    async with genai().aio.live.connect(model=MODEL, config=config) as session:
        assert gateway.held == 1
        for text in ("Say hello", "And once more"):
            turns: Any = {"role": "user", "parts": [{"text": text}]}
            await session.send_client_content(turns=turns, turn_complete=True)
            said = ""
            async for message in session.receive():
                said += message.text or ""
                if message.usage_metadata is not None:
                    total += message.usage_metadata.total_token_count or 0
            assert text in said
    await wait_until(lambda: gateway.held == 0, 5, "the permit's return")
    row = await the_record(gateway)
    assert (row["status"], row["model"]) == ("succeeded", MODEL)
    assert row["input_tokens"] + row["output_tokens"] == total
    assert orjson.loads(row["response"])["turns"] == 2
    assert orjson.loads(row["request"])["setup"]["model"] == f"models/{MODEL}"
