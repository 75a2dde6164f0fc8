"""A worker and an API killed by -9 while responses and a video go on in the background: each counts
as long as it takes at the provider, and is on record once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiohttp import ClientSession
from openai import AsyncOpenAI

from tests.fleet import LIMITS, Fleet
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

MODEL = "gemini-2.5-flash"
BOUND = LIMITS["text_only"]
SETTINGS = {"BACKGROUND_POLL_MS": "200", "STREAM_WAIT_MS": "60000"}


async def test_the_permits_of_background_responses_outlive_every_process(tmp_path: Path) -> None:
    async with Fleet(tmp_path / "fleet", apis=2, workers=1, settings=SETTINGS) as fleet:
        await fleet.control.set_behaviour(first_byte_ms=6_000)
        doomed, other = list(fleet.apis)
        begun = await asyncio.gather(*(_begun(fleet, doomed, n) for n in range(BOUND - 1)))
        film = await _filmed(fleet, doomed)
        # One more is at the provider, and its id on nobody's way: the API dies before it reads it.
        await fleet.control.set_fault("slow_first_token", match="Think lost", delay_ms=30_000)
        lost = asyncio.create_task(_begun(fleet, doomed, "lost"))

        async def all_there() -> bool:
            return bool((await fleet.truth())["text_only"].in_flight == BOUND)

        await wait_until(all_there, 20, "all at the provider")
        fleet.apis[doomed].kill()
        fleet.workers[0].kill()
        await asyncio.gather(lost, return_exceptions=True)
        await fleet.control.set_behaviour(first_byte_ms=50)
        waiting = [asyncio.create_task(_asked(fleet, other, n)) for n in range(2 * BOUND)]
        fleet.start_worker()
        await asyncio.gather(*waiting)
        await fleet.assert_never_over()
        rows = await wait_until(lambda: _rows(fleet, len(begun) + 1), 40, "all on record")
        assert len(rows) == len({row["id"] for row in rows}) == len(begun) + 1
        told = {row["response_id"]: row["usage_state"] for row in rows if row["response_id"]}
        assert told == dict.fromkeys(begun, "told")
        (gone,) = [row for row in rows if not row["response_id"]]
        assert (gone["status"], gone["usage_state"]) == ("failed", "unknown")
        videos = await wait_until(lambda: _videos(fleet), 40, "the video on record")
        ends = [(row["status"], row["usage_state"], row["upstream"]) for row in videos]
        assert ends == [("succeeded", "told", "gemini")], film


def _sdk(fleet: Fleet, url: str) -> AsyncOpenAI:
    token = fleet.as_operator["Authorization"].split()[1]
    return AsyncOpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)


async def _begun(fleet: Fleet, url: str, number: object) -> str:
    async with _sdk(fleet, url) as sdk:
        begun = await sdk.responses.create(model=MODEL, input=f"Think {number}", background=True)
        assert begun.status == "queued"
        return str(begun.id)


async def _filmed(fleet: Fleet, url: str) -> str:
    call = f"{url}/v1beta/models/veo-3.1-generate-preview:predictLongRunning"
    body = {"instances": [{"prompt": "Film it"}]}
    async with (
        ClientSession(headers=fleet.as_operator) as http,
        http.post(call, json=body) as made,
    ):
        assert made.status == 200, await made.text()
        return str((await made.json())["name"])


async def _videos(fleet: Fleet) -> list[Any]:
    connection = await asyncpg.connect(fleet.postgres.url())
    try:
        query = "SELECT * FROM audit WHERE endpoint LIKE '%:predictLongRunning'"
        return list(await connection.fetch(query))
    finally:
        await connection.close()


async def _asked(fleet: Fleet, url: str, number: int) -> None:
    async with _sdk(fleet, url) as sdk:
        await sdk.responses.create(model=MODEL, input=f"Say {number}", store=False)


async def _rows(fleet: Fleet, count: int) -> list[Any] | None:
    connection = await asyncpg.connect(fleet.postgres.url())
    try:
        rows: list[Any] = await connection.fetch(
            "SELECT a.* FROM audit a JOIN bodies b ON b.id = a.id AND b.role = 'request'"
            " WHERE a.endpoint = '/v1/responses' AND convert_from(b.data, 'UTF8') LIKE '%Think%'"
            " UNION ALL SELECT * FROM audit WHERE failure->>'code' = 'process_died'"
        )
    finally:
        await connection.close()
    return rows if len(rows) >= count else None
