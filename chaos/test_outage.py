"""A provider that is out for a minute, under 10,000 queued jobs and a batch of 1,000 lines.

Nothing fails, next to nothing arrives at the provider meanwhile, and all of it is done within a
minute of its return, beyond the time that the work itself takes. A whole day of it is played on a
clock of its own, here and in tests/unit/jobs/test_outages.py.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from openai import AsyncOpenAI

from tests import batching
from tests.fleet import Fleet
from tests.unit.jobs.test_outages import BARE, DAY_S, outlast
from tests.waiting import wait_until, work_for
from tidegate.embedded.servers import free_port

JOBS = 10_000
LINES = 1_000
LIMIT = 32
OUT_S = 60.0
WITHIN_S = 60.0
ONSET_S = 5.0
SETTINGS = {"RATE_LIMITS": f'{{"text_only": {LIMIT}}}', "MAX_ATTEMPTS": "2"}
BODY = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": "Say hello"}]}
LEFT = "SELECT count(*) FROM requests WHERE status IN ('queued', 'running')"
ENDS = "SELECT status, max(attempts) AS attempts, count(*) AS jobs FROM requests GROUP BY status"


class Door:
    """A way to the provider that can be closed: then connections to it are refused."""

    def __init__(self) -> None:
        self.port = free_port()
        self.target = 0
        self.refused = 0
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._through, "127.0.0.1", self.port)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._clients:
            writer.close()
        self._server = None

    async def _through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        self._clients.add(writer)
        try:
            await asyncio.gather(_pump(reader, back), _pump(there, writer))
        finally:
            self._clients.discard(writer)
            back.close()
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest.mark.parametrize("fault", ["unavailable", "unauthorized", "throttled_bare", "refused"])
async def test_a_minute_without_the_provider_fails_nothing(tmp_path: Path, fault: str) -> None:
    door = Door()
    settings = SETTINGS | {"GEMINI_BASE_URL": door.url}
    async with (
        Fleet(tmp_path, apis=1, workers=2, settings=settings) as fleet,
        AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=2) as client,
    ):
        door.target = int(fleet.control.url.rpartition(":")[2])
        await door.open()
        await fleet.control.set_behaviour(first_byte_ms=20)
        began_ns = time.time_ns()
        if fault == "refused":
            await door.close()
        else:
            await fleet.control.set_fault(fault)
        batch = await batching.begin(client, batching.content(LINES))
        await _submit_all(fleet)
        out_for_s = OUT_S - (time.time_ns() - began_ns) / 1e9
        await work_for(max(5.0, out_for_s))
        calls = await fleet.control.calls()
        back_ns = time.time_ns()
        if fault == "refused":
            await door.open()
        else:
            await fleet.control.clear_faults()
        ends = await _ends(fleet)
        done = await batching.end_of(client, batch, 400)
        took_s = (time.time_ns() - back_ns) / 1e9
        await batching.assert_all_succeeded(client, done, LINES)
        assert ends == {"succeeded": JOBS}
        each = Counter(int((call.started_ns - began_ns) / 1e9) for call in calls)
        probes = sum(count for second, count in each.items() if second >= ONSET_S)
        work_s = await _work_s(fleet)
        sys.stdout.write(
            f"\n  {fault}: {len(calls)} calls in {max(each, default=0)} s, {probes} of them after "
            f"{ONSET_S:.0f} s; all done {took_s:.0f} s after its return (work: {work_s:.0f} s)\n"
        )
        assert probes <= (back_ns - began_ns) / 1e9 - ONSET_S
        assert took_s <= WITHIN_S + work_s


async def _submit_all(fleet: Fleet) -> None:
    room = asyncio.Semaphore(64)

    async def submit(number: int) -> None:
        text = {"data": f"Say word{number}.", "type": "text_only"}
        body: dict[str, Any] = (
            text if number % 2 else {"endpoint": "/v1/chat/completions", "body": BODY}
        )
        async with room, fleet.http.post(f"{fleet.url}/submit", json=body) as answer:
            assert answer.status == 202, await answer.text()

    await asyncio.gather(*(submit(number) for number in range(JOBS)))


async def _ends(fleet: Fleet) -> dict[str, int]:
    """How many jobs have ended in which state, once all have."""
    connection = await asyncpg.connect(fleet.postgres.url())
    try:

        async def all_ended() -> bool:
            return bool(await connection.fetchval(LEFT) == 0)

        await wait_until(all_ended, 400, "the end of all jobs")
        rows = await connection.fetch(ENDS)
        assert all(row["attempts"] <= 1 for row in rows), "an outage uses up no attempt"
        return {row["status"]: row["jobs"] for row in rows}
    finally:
        await connection.close()


async def _work_s(fleet: Fleet) -> float:
    """What as many jobs and lines take this deployment with nothing in the way."""
    began = time.monotonic()
    await _submit_all(fleet)
    await _ends(fleet)
    return (time.monotonic() - began) * (JOBS + LINES) / JOBS


async def test_a_model_that_is_throttled_for_a_day_fails_nothing() -> None:
    await outlast(BARE, 60, DAY_S)
