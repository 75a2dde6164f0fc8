"""Realtime sessions and turns whose process, or client, is killed: their permits are exact."""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from pathlib import Path

import asyncpg
import orjson
from websockets.asyncio.client import ClientConnection, connect

from tests.fleet import Fleet
from tests.waiting import wait_until
from tidegate.emulator.server import run_emulator

MODEL = "gemini-2.5-flash"
_CLIENT = """
import sys
from websockets.sync.client import connect
with connect(sys.argv[1], additional_headers={"Authorization": "Bearer x"}, proxy=None) as socket:
    socket.recv()
    socket.recv()
"""


_RESPONSES = """
[upstreams.account]
provider = "openai"
base_url = "{url}/v1"
key = "ACCOUNT_KEY"
models = ["gpt-*"]
[upstreams.account.limits]
"pool:total" = 1
"""
_TURN = '{"type":"response.create","model":"gpt-5-mini","store":false,"input":"Say something long"}'


async def responses(url: str) -> ClientConnection:
    address = f"ws{url.removeprefix('http')}/v1/responses"
    return await connect(address, additional_headers={"Authorization": "Bearer x"}, proxy=None)


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


async def test_permits_of_responses_turns_are_exact_through_kills(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    async with run_emulator() as account:
        policy.write_text(_RESPONSES.format(url=account.url))
        settings = {"TIDEGATE_POLICY": str(policy), "ACCOUNT_KEY": "key-of-the-account"}

        async def in_flight(count: int) -> bool:
            return (await account.control.stats()).in_flight == count

        async with Fleet(tmp_path / "fleet", apis=1, workers=0, settings=settings) as fleet:
            doomed, other = fleet.url, fleet.start_api()
            await fleet.ready(other)
            await account.control.set_behaviour(between_ms=60_000)
            first, second = await responses(doomed), await responses(other)
            await first.send(_TURN)
            await first.recv()
            await wait_until(lambda: in_flight(1), 10, "the first turn")
            await second.send(_TURN)
            waiting = asyncio.create_task(second.recv())
            await asyncio.wait({waiting}, timeout=0.2)
            assert not waiting.done()
            fleet.apis[doomed].kill()
            await asyncio.wait_for(waiting, 20)
            await wait_until(lambda: in_flight(1), 10, "the second turn alone")
            await wait_until(lambda: first.close_code, 10, "the first client")
            await second.close()
            await wait_until(lambda: in_flight(0), 10, "the end of all")
            assert (await account.control.stats()).max_in_flight == 1
            database = await asyncpg.connect(fleet.postgres.url())
            query = "SELECT count(*) = 1 FROM audit WHERE failure ->> 'code' = $1"
            for code in ("process_died", "client_left"):
                await wait_until(partial(database.fetchval, query, code), 20, code)
            await database.close()
