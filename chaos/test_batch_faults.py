"""One batch while everything beside it fails in turn, and a line under which workers die."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from pathlib import Path

from openai import AsyncOpenAI, InternalServerError
from openai.types import Batch

from tests import batching
from tests.fleet import Fleet
from tests.waiting import wait_until, work_for

LINES = 6_000
LIMIT = 16
AWAY_S = 6.0  # three times the lease of a claim


async def test_a_batch_through_outages_and_kills(tmp_path: Path) -> None:
    settings = {"RATE_LIMITS": f'{{"text_only": {LIMIT}}}'}
    async with (
        Fleet(tmp_path, settings=settings) as fleet,
        AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0) as client,
    ):
        await fleet.control.set_behaviour(first_byte_ms={"uniform": [40, 80]})
        batch, begun = await batching.begin(client, batching.content(LINES)), time.monotonic()
        await _more_than(client, batch, 600)
        await asyncio.to_thread(fleet.postgres.stop)
        await work_for(AWAY_S)
        await asyncio.to_thread(fleet.postgres.start)
        await _more_than(client, batch, 1_400)
        await asyncio.to_thread(fleet.postgres.kill)
        await asyncio.to_thread(fleet.postgres.start)
        await _more_than(client, batch, 2_200)
        await asyncio.to_thread(fleet.valkey.kill)
        await work_for(AWAY_S)
        await asyncio.to_thread(fleet.valkey.start)
        await _more_than(client, batch, 3_000)
        assert max((await _asked(fleet)).values()) == 1, "outages repeat nothing"
        fleet.workers[0].kill()
        await _more_than(client, batch, 3_800)
        fleet.start_worker()
        done = await batching.end_of(client, batch, 300)
        took_s = time.monotonic() - begun
        await batching.assert_all_succeeded(client, done, LINES)
        asked, truth = await _asked(fleet), (await fleet.truth())["text_only"]
        sys.stdout.write(
            f"\n  {LINES} lines in {took_s:.0f} s, {asked.total() - LINES} asked twice, "
            f"{truth.max_in_flight} of {LIMIT} in flight\n"
        )
        assert truth.max_in_flight <= LIMIT
        assert max(asked.values()) <= 2
        # What was in flight at the kill, or had just ended and was not on record yet.
        assert asked.total() - LINES <= 2 * LIMIT


async def test_a_line_under_which_three_workers_die(tmp_path: Path) -> None:
    settings = {"RATE_LIMITS": f'{{"text_only": {LIMIT}}}'}
    async with (
        Fleet(tmp_path, apis=1, workers=1, settings=settings) as fleet,
        AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0) as client,
    ):
        # Those beside it are under way at the first two deaths, and must not fail with it.
        await fleet.control.set_behaviour(first_byte_ms=20)
        await fleet.control.set_fault("hang", match="word50.")
        batch = await batching.begin(client, batching.content(100))
        for death in range(1, 4):

            async def hangs(death: int = death) -> bool:
                return (await _asked(fleet))["Say word50."] >= death

            await wait_until(hangs, 60, f"call {death} that hangs")
            await wait_until(lambda: batching.completed(client, batch), 60, "other lines")
            fleet.workers[-1].kill()
            fleet.start_worker()
        done = await batching.end_of(client, batch, 90)
        counts = done.request_counts
        assert counts is not None
        assert (done.status, counts.completed, counts.failed) == ("completed", 99, 1)
        (failed,) = await batching.lines_of(client, done.error_file_id)
        assert (failed["custom_id"], failed["error"]["code"]) == ("id-50", "worker_lost")
        said = await batching.lines_of(client, done.output_file_id)
        assert [one["custom_id"] for one in said] == [f"id-{n}" for n in range(100) if n != 50]
        assert (await _asked(fleet))["Say word50."] == 3


async def _more_than(client: AsyncOpenAI, batch: Batch, least: int) -> None:
    async def reached() -> bool:
        try:
            return await batching.completed(client, batch) > least
        except InternalServerError:  # PostgreSQL is away
            return False

    await wait_until(reached, 120, f"more than {least} answers")


async def _asked(fleet: Fleet) -> Counter[str]:
    """How often the provider was asked for each line."""
    return Counter(call.prompt for call in await fleet.control.calls(contains="Say word"))
