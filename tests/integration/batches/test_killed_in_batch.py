"""A worker killed by -9 in the middle of a batch: another one finishes it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from openai import AsyncOpenAI

from tests import batching
from tests.fleet import LIMITS, Fleet
from tests.waiting import wait_until

LINES = 300


async def test_no_finished_line_is_repeated(tmp_path: Path) -> None:
    async with (
        Fleet(tmp_path / "fleet", apis=1, workers=1) as fleet,
        AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0) as client,
    ):
        await fleet.control.set_behaviour(first_byte_ms=40)
        batch = await batching.begin(client, batching.content(LINES))

        async def half_way() -> bool:
            return await batching.completed(client, batch) >= 50

        await wait_until(half_way, 30, "fifty answers")
        fleet.workers[-1].kill()
        assert await batching.completed(client, batch) < LINES
        fleet.start_worker()
        done = await batching.end_of(client, batch, 75)
        await batching.assert_all_succeeded(client, done, LINES)
        asked = Counter(call.prompt for call in await fleet.control.calls(contains="Say word"))
        assert asked.total() - LINES <= LIMITS["text_only"]
        assert max(asked.values()) <= 2
