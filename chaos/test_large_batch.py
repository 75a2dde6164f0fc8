"""The largest batch that is taken, 50,000 lines, counted at the provider."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from openai import AsyncOpenAI

from tests import batching
from tests.fleet import Fleet

LINES = 50_000


async def test_50_000_lines(tmp_path: Path) -> None:
    settings = {"RATE_LIMITS": '{"text_only": 64}'}
    async with (
        Fleet(tmp_path, apis=1, workers=1, settings=settings) as fleet,
        AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0) as client,
    ):
        batch = await batching.begin(client, batching.content(LINES))
        begun = time.monotonic()
        done = await batching.end_of(client, batch, 600)
        took_s = time.monotonic() - begun
        await batching.assert_all_succeeded(client, done, LINES)
        truth = (await fleet.truth())["text_only"]
        assert (truth.arrived, truth.over) == (LINES, 0)
        sys.stdout.write(f"\n  {LINES} lines in {took_s:.0f} s, {LINES / took_s:.0f} a second\n")
