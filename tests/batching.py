"""Batches as OpenAI's SDK makes them, and what must hold of one that has ended."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import orjson
from openai import AsyncOpenAI
from openai.types import Batch

from tests.waiting import wait_until

ENDPOINT: Any = "/v1/chat/completions"
MODEL = "gemini-2.5-flash"
ENDS = ("completed", "failed", "expired", "cancelled")


def line(custom_id: str, text: str, *, model: str = MODEL, **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    return {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body} | more


def jsonl(lines: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


def nested(levels: int) -> dict[str, Any]:
    """An object in an object, and so on."""
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def content(count: int, *, model: str = MODEL, says: str = "Say word{}.") -> bytes:
    """An input file: line n has the custom_id `id-n` and asks what `says` says of n."""
    return jsonl(line(f"id-{n}", says.format(n), model=model) for n in range(count))


async def begin(client: AsyncOpenAI, given: bytes, **more: Any) -> Batch:
    file = await client.files.create(file=("in.jsonl", given), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", **more
    )


async def completed(client: AsyncOpenAI, batch: Batch) -> int:
    """How many lines have succeeded so far."""
    counts = (await client.batches.retrieve(batch.id)).request_counts
    return 0 if counts is None else counts.completed


async def end_of(client: AsyncOpenAI, batch: Batch, timeout_s: float = 30) -> Batch:
    async def ended() -> Batch | None:
        now = await client.batches.retrieve(batch.id)
        return now if now.status in ENDS else None

    found: Batch = await wait_until(ended, timeout_s, f"the end of {batch.id}")
    return found


async def lines_of(client: AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """Of one of its files; none where there is no file."""
    if file_id is None:
        return []
    raw = (await client.files.content(file_id)).content
    return [orjson.loads(one) for one in raw.splitlines()]


async def assert_all_succeeded(client: AsyncOpenAI, batch: Batch, count: int) -> None:
    """Each line is in the output once, in its place, and the counts say so."""
    assert batch.status == "completed"
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (count, count, 0)
    assert batch.error_file_id is None
    said = await lines_of(client, batch.output_file_id)
    assert [one["custom_id"] for one in said] == [f"id-{number}" for number in range(count)]
    assert {one["response"]["status_code"] for one in said} == {200}
