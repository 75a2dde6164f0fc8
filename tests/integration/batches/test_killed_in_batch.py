"""A worker killed by -9 in the middle of a batch: another one finishes it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import orjson
from openai import AsyncOpenAI

from tests.fleet import LIMITS, Fleet
from tests.waiting import wait_until

LINES = 300
MODEL = "gemini-2.5-flash"


def content() -> bytes:
    lines = [
        {
            "custom_id": f"id-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": MODEL,
                "messages": [{"role": "user", "content": f"Say word{number}."}],
            },
        }
        for number in range(LINES)
    ]
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


async def test_no_finished_line_is_repeated(tmp_path: Path) -> None:
    async with (
        Fleet(tmp_path / "fleet", apis=1, workers=1) as fleet,
        AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0) as client,
    ):
        await fleet.control.set_behaviour(first_byte_ms=40)
        file = await client.files.create(file=("in.jsonl", content()), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )

        async def completed(least: int) -> bool:
            counts = (await client.batches.retrieve(batch.id)).request_counts
            return counts is not None and counts.completed >= least

        await wait_until(lambda: completed(50), 30, "fifty answers")
        fleet.workers[-1].kill()
        before = (await client.batches.retrieve(batch.id)).request_counts
        assert before is not None
        assert before.completed < LINES
        fleet.start_worker()
        await wait_until(lambda: completed(LINES), 60, "all answers")

        async def assembled() -> bool:
            return (await client.batches.retrieve(batch.id)).status == "completed"

        await wait_until(assembled, 15, "the output file")
        done = await client.batches.retrieve(batch.id)
        counts = done.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (LINES, LINES, 0)
        output = (await client.files.content(done.output_file_id or "")).content
        said = [orjson.loads(one) for one in output.splitlines()]
        assert [one["custom_id"] for one in said] == [f"id-{n}" for n in range(LINES)]
        asked = Counter(call.prompt for call in await fleet.control.calls(contains="Say word"))
        assert asked.total() - LINES <= LIMITS["text_only"]
        assert max(asked.values()) <= 2
