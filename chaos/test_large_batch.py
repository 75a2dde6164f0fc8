"""The largest batch that is taken, 50,000 lines, counted at the provider."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from openai import AsyncOpenAI

from tests.fleet import Fleet
from tests.waiting import wait_until

LINES = 50_000
_ENDPOINT = "/v1/chat/completions"


def content() -> bytes:
    lines = [
        {
            "custom_id": f"id-{number}",
            "method": "POST",
            "url": _ENDPOINT,
            "body": {
                "model": "gemini-2.5-flash",
                "messages": [{"role": "user", "content": f"Say word{number}."}],
            },
        }
        for number in range(LINES)
    ]
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


async def test_50_000_lines(tmp_path: Path) -> None:
    settings = {"RATE_LIMITS": '{"text_only": 64}'}
    async with (
        Fleet(tmp_path, apis=1, workers=1, settings=settings) as fleet,
        AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0) as client,
    ):
        file = await client.files.create(file=("in.jsonl", content()), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        begun = time.monotonic()

        async def completed() -> bool:
            return (await client.batches.retrieve(batch.id)).status == "completed"

        await wait_until(completed, 600, "the batch's end")
        took_s = time.monotonic() - begun
        done = await client.batches.retrieve(batch.id)
        assert done.request_counts is not None
        assert (done.request_counts.completed, done.request_counts.failed) == (LINES, 0)
        output = (await client.files.content(done.output_file_id or "")).content.splitlines()
        assert [json.loads(one)["custom_id"] for one in output] == [f"id-{n}" for n in range(LINES)]
        truth = (await fleet.truth())["text_only"]
        assert (truth.arrived, truth.over) == (LINES, 0)
        sys.stdout.write(f"\n  {LINES} lines in {took_s:.0f} s, {LINES / took_s:.0f} a second\n")
