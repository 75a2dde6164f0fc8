"""Realtime sessions whose process, or client, is killed: permits are exact all the same."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import asyncpg
import orjson
from websockets.asyncio.client import ClientConnection, connect

from tests.fleet import Fleet
from tests.waiting import wait_until

MODEL = "gemini-2.5-flash"
_CLIENT = """
import sys
from websockets.sync.client import connect
with connect(sys.argv[1], additional_headers={"Authorization": "Bearer x"}, proxy=None) as socket:
    socket.recv()
    socket.recv()
"""


def session(url: str) -> connect:
    address = f"ws{url.removeprefix('http')}/v1/realtime?model={MODEL}"
    return connect(address, additional_headers={"Authorization": "Bearer x"}, proxy=None)


async def opened(url: str) -> ClientConnection:
    return await session(url)


async def a_turn(socket: ClientConnection) -> None:
    await socket.send('{"type":"response.create","response":{"output_modalities":["text"]}}')
    while orjson.loads(await socket.recv())["type"] != "response.done":
        pass


async def test_permits_are_exact_through_kills(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('[limits]\n"kind:realtime" = 2\n')
    settings = {"TIDEGATE_POLICY": str(policy)}
    async with Fleet(tmp_path / "fleet", apis=1, workers=0, settings=settings) as fleet:
        doomed, other = fleet.url, fleet.start_api()
        await fleet.ready(other)

        async def in_flight(count: int) -> bool:
            return (await fleet.control.stats())["realtime"].in_flight == count

        first, second = await session(doomed), await session(doomed)
        for each in (first, second):
            await a_turn(each)
        third = asyncio.create_task(opened(other))
        await asyncio.wait({third}, timeout=0.2)
        assert not third.done()
        fleet.apis[doomed].kill()
        socket = await asyncio.wait_for(third, 20)
        await a_turn(socket)
        await wait_until(lambda: in_flight(1), 10, "the end of what the dead process had")
        await wait_until(lambda: first.close_code, 10, "its client")
        url = f"ws{other.removeprefix('http')}/v1/realtime?model={MODEL}"
        client = await asyncio.create_subprocess_exec(sys.executable, "-c", _CLIENT, url)
        await wait_until(lambda: in_flight(2), 20, "the client's session")
        client.kill()
        await client.wait()
        await wait_until(lambda: in_flight(1), 10, "its end")
        await socket.close()
        await wait_until(lambda: in_flight(0), 10, "the end of all")
        one, two = await session(other), await session(other)  # there is room for two again
        await one.close()
        await two.close()
        assert (await fleet.control.stats())["realtime"].max_in_flight == 2
        database = await asyncpg.connect(fleet.postgres.url())
        query = (
            "SELECT count(*) = 2 FROM audit WHERE kind = 'realtime' AND failure ->> 'code' = $1"
            " AND usage_state = 'partial' AND output_tokens > 0"
        )
        await wait_until(lambda: database.fetchval(query, "process_died"), 20, "its rows and turns")
        await database.close()
