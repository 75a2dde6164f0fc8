"""Sessions of Gemini Live at a provider that answers as the recorded one does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
from websockets.asyncio.server import ServerConnection, serve

from tests.gateway import Gateway, Opener
from tests.integration.realtime.test_realtime_life import LIVE, rows, send, talk

USAGE = {"promptTokenCount": 100, "responseTokenCount": 10, "totalTokenCount": 110}
ENDS = {"serverContent": {"turnComplete": True}, "usageMetadata": USAGE}
Answers = Callable[[dict[str, Any]], list[dict[str, Any]]]


@asynccontextmanager
async def gateway_before(
    answers: Answers, open_gateway: Opener, tmp_path: Path
) -> AsyncIterator[Gateway]:
    """A gateway before a provider that answers each message after the setup by `answers`."""

    async def serves(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send(orjson.dumps({"setupComplete": {}}))
        async for message in socket:
            for one in answers(orjson.loads(message)):
                await socket.send(orjson.dumps(one))

    async with serve(serves, "127.0.0.1", 0, compression=None) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        policy = tmp_path / "policy.toml"
        table = f'base_url = "{url}"\ndialect = "gemini"\nmodels = ["m"]\nauth = "none"\n'
        policy.write_text(f"[upstreams.own]\n{table}")
        yield await open_gateway(worker=False, tidegate_policy=policy)


async def test_results_of_tools_are_no_turns_of_their_own(
    open_gateway: Opener, tmp_path: Path
) -> None:
    """The provider pauses its turn for them, reports no usage before, and answers them all
    together; one that is `SILENT` it does not answer."""
    pending: list[str] = []

    def answers(message: dict[str, Any]) -> list[dict[str, Any]]:
        if "realtimeInput" in message:
            pending[:] = ["a", "b"]
            calls = [{"id": one, "name": "tide", "args": {}} for one in pending]
            return [{"toolCall": {"functionCalls": calls}}]
        for one in message["toolResponse"]["functionResponses"]:
            pending.remove(one["id"])
        return [] if pending else [ENDS]

    async with gateway_before(answers, open_gateway, tmp_path) as gateway:
        async with talk(gateway, LIVE) as socket:
            await send(socket, setup={"model": "models/m"})
            await socket.recv()
            for _ in range(2):
                await send(socket, realtimeInput={"text": "When is high tide?"})
                assert b"toolCall" in await socket.recv()
                for one in ("a", "b"):
                    result = {"id": one, "name": "tide", "response": {"output": "now"}}
                    await send(socket, toolResponse={"functionResponses": [result]})
                assert b"turnComplete" in await socket.recv()
        (row,) = await rows(gateway, 1)
        assert (row["input_tokens"], row["output_tokens"]) == (200, 20), "only what was reported"
        assert row["usage_state"] == "told"


async def test_a_turn_that_is_cut_costs_the_instructions_of_its_session_too(
    open_gateway: Opener, tmp_path: Path
) -> None:
    def answers(message: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"serverContent": {"modelTurn": {"parts": [{"text": "High tide is"}]}}}]

    async with gateway_before(answers, open_gateway, tmp_path) as gateway:
        async with talk(gateway, LIVE) as socket:
            instructions = {"parts": [{"text": "Speak of tides. " * 500}]}
            await send(socket, setup={"model": "models/m", "systemInstruction": instructions})
            await socket.recv()
            await send(socket, realtimeInput={"text": "When is it?"})
            assert b"modelTurn" in await socket.recv()
        (row,) = await rows(gateway, 1)
        assert row["input_tokens"] >= 2_000, "four characters a token"
