"""PostgreSQL restarted, and a worker killed by -9, in the middle of a batch."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from pathlib import Path

import asyncpg
import pytest
from openai import AsyncOpenAI, InternalServerError
from openai.types import Batch

from tests import batching
from tests.fleet import Fleet
from tests.load import ARRIVED_NS, RECORDED_NS
from tests.waiting import wait_until, work_for
from tidegate.emulator.state import LoggedCall

pytestmark = pytest.mark.slow

LINES = 200
OUTAGE_S = 1.0


async def test_no_finished_line_is_repeated(tmp_path: Path) -> None:
    async with (
        Fleet(tmp_path / "fleet", apis=1, workers=1) as fleet,
        AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0) as client,
    ):
        await fleet.control.set_behaviour(first_byte_ms=40)
        batch = await batching.begin(client, batching.content(LINES))
        await _more_than(client, batch, 30)
        await asyncio.to_thread(fleet.postgres.stop)
        await work_for(OUTAGE_S)
        await asyncio.to_thread(fleet.postgres.start)
        await fleet.ready(fleet.url)
        await _more_than(client, batch, 100)
        assert await _repeated(fleet) == [], "an outage repeats nothing"
        await fleet.control.set_behaviour(first_byte_ms=1000)

        async def is_calling() -> bool:
            return (await fleet.truth()).in_flight > 0

        await wait_until(is_calling, 20, "a call in flight")
        fleet.workers[-1].kill()
        await fleet.control.set_behaviour(first_byte_ms=40)
        killed_ns = time.time_ns()
        assert await batching.completed(client, batch) < LINES
        fleet.start_worker()
        done = await batching.end_of(client, batch, 75)
        await batching.assert_all_succeeded(client, done, LINES)
        repeated = await _repeated(fleet)
        database = await asyncpg.connect(fleet.postgres.url())
        lapsed = await database.fetchval(
            "SELECT count(*) FROM audit"
            " WHERE source = 'batch' AND lapses = 1 AND upstream = 'gemini'"
        )
        await database.close()
        assert lapsed >= max(1, len(repeated)), "reconcile takes their first calls into account"
        for first, *others in repeated:
            assert len(others) == 1
            # It was in flight, or had ended so shortly before that it was not on record yet.
            assert first.started_ns - ARRIVED_NS <= killed_ns
            assert killed_ns <= (first.ended_ns or killed_ns) + RECORDED_NS


async def _more_than(client: AsyncOpenAI, batch: Batch, least: int) -> None:
    async def reached() -> bool:
        try:
            return await batching.completed(client, batch) > least
        except InternalServerError:  # PostgreSQL is away
            return False

    await wait_until(reached, 30, f"more than {least} answers")


async def _repeated(fleet: Fleet) -> list[list[LoggedCall]]:
    """The calls of each line that the provider was asked for more than once."""
    calls: defaultdict[str, list[LoggedCall]] = defaultdict(list)
    for call in await fleet.control.calls(contains="Say word"):
        calls[call.prompt].append(call)
    return [of_one for of_one in calls.values() if len(of_one) > 1]
