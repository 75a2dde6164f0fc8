"""Sessions of Gemini Live at a provider that answers as the recorded one does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from websockets.asyncio.server import ServerConnection, serve

from tests.gateway import Gateway, Opener
from tests.integration.realtime.test_realtime_life import (
    LIVE,
    WITH_KEYS,
    closed,
    rows,
    send,
    talk,
)
from tests.integration.tenants.asking import key_of

USAGE = {"promptTokenCount": 100, "responseTokenCount": 10, "totalTokenCount": 110}
ENDS = {"serverContent": {"turnComplete": True}, "usageMetadata": USAGE}
Answers = Callable[[dict[str, Any]], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECOND_KEY", "key-of-the-second")


@asynccontextmanager
async def gateway_before(
    answers: Answers,
    open_gateway: Opener,
    tmp_path: Path,
    setups: list[dict[str, Any]] | None = None,
    **options: Any,
) -> AsyncIterator[Gateway]:
    """A gateway before a provider that answers each message after the setup by `answers`, and adds
    that to `setups`."""

    async def serves(socket: ServerConnection) -> None:
        setup = orjson.loads(await socket.recv())["setup"]
        if setups is not None:
            setups.append(setup)
        await socket.send(orjson.dumps({"setupComplete": {}}))
        async for message in socket:
            for one in answers(orjson.loads(message)):
                await socket.send(orjson.dumps(one))

    async with serve(serves, "127.0.0.1", 0, compression=None) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        policy = tmp_path / "policy.toml"
        table = f'base_url = "{url}"\ndialect = "gemini"\nmodels = ["m"]\nkey = "SECOND_KEY"\n'
        policy.write_text(f"[upstreams.own]\n{table}")
        yield await open_gateway(tidegate_policy=policy, **{"worker": False, **options})


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


async def test_a_session_is_resumed_by_its_tenant_alone(
    open_gateway: Opener, tmp_path: Path
) -> None:
    """Google ends a connection after some minutes, and names a handle to continue by."""
    setups: list[dict[str, Any]] = []

    def answers(message: dict[str, Any]) -> list[dict[str, Any]]:
        if len(setups) > 1:
            return [{"serverContent": {"modelTurn": {"parts": [{"text": "High tide is"}]}}}]
        update = {"newHandle": "handle-1", "resumable": True}
        return [ENDS, {"sessionResumptionUpdate": update}, {"goAway": {"timeLeft": "10s"}}]

    at = gateway_before(answers, open_gateway, tmp_path, setups, **WITH_KEYS)
    async with at as gateway:
        mine, theirs = [await key_of(gateway, tenant) for tenant in ("mine", "theirs")]
        async with talk(gateway, LIVE, mine) as socket:
            await send(socket, setup={"model": "models/m", "sessionResumption": {}})
            await socket.recv()
            await send(socket, realtimeInput={"text": "When is high tide?"})
            assert b"turnComplete" in await socket.recv()
            told = orjson.loads(await socket.recv())["sessionResumptionUpdate"]
            assert b"goAway" in await socket.recv()
        assert told["resumable"]
        assert told["newHandle"] != "handle-1"
        for key, handle in (
            (theirs, told["newHandle"]),
            *((theirs, "handle-1"), (mine, "handle-1"), (mine, told["newHandle"] + "x")),
        ):
            async with talk(gateway, LIVE, key) as socket:
                named = {"handle": handle}
                await send(socket, setup={"model": "models/m", "sessionResumption": named})
                code, reason = await closed(socket)
            assert (code, len(setups)) == (1008, 1), reason
        async with talk(gateway, LIVE, mine) as socket:
            named = {"handle": told["newHandle"]}
            await send(socket, setup={"model": "models/m", "session_resumption": named})
            await socket.recv()
            await send(socket, realtimeInput={"text": "And low tide?"})
            assert b"modelTurn" in await socket.recv()
        assert setups[1]["session_resumption"] == {"handle": "handle-1"}
        listed = await rows(gateway, 6)
        assert listed[-1]["input_tokens"] >= 110, "the conversation so far"


async def test_what_follows_the_usage_of_a_turn_begins_no_other(
    open_gateway: Opener, tmp_path: Path
) -> None:
    """Google's reference allows a usage beside any message of a turn, not only its last."""
    piece = {"serverContent": {"modelTurn": {"parts": [{"text": "High tide is"}]}}}

    def answers(message: dict[str, Any]) -> list[dict[str, Any]]:
        over = {"serverContent": {"turnComplete": True}}
        return [piece, {**piece, "usageMetadata": USAGE}, piece, over]

    async with gateway_before(answers, open_gateway, tmp_path) as gateway:
        async with talk(gateway, LIVE) as socket:
            await send(socket, setup={"model": "models/m"})
            await socket.recv()
            for _ in range(2):
                await send(socket, realtimeInput={"text": "When is high tide?"})
                while b"turnComplete" not in await socket.recv():
                    pass
        (row,) = await rows(gateway, 1)
        assert (row["input_tokens"], row["output_tokens"]) == (200, 20), "only what was reported"


VERTEX = "/ws/google.cloud.aiplatform.v1beta1.LlmBidiService/BidiGenerateContent"


@pytest.mark.parametrize("path", [LIVE, VERTEX])
@pytest.mark.parametrize("provider", ["gemini", "vertex"])
async def test_each_of_googles_two_clients_reaches_each_of_its_two_apis(
    open_gateway: Opener, tmp_path: Path, path: str, provider: str
) -> None:
    heard: list[tuple[str, str]] = []

    async def serves(socket: ServerConnection) -> None:
        assert socket.request is not None
        model = orjson.loads(await socket.recv())["setup"]["model"]
        heard.append((socket.request.path, model))
        await socket.send(orjson.dumps({"setupComplete": {}}))
        await socket.recv()
        await socket.send(orjson.dumps(ENDS))
        await socket.wait_closed()

    async with serve(serves, "127.0.0.1", 0, compression=None) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        policy = tmp_path / "policy.toml"
        place = 'project = "p"\nlocation = "l"\n' if provider == "vertex" else ""
        own = f'provider = "{provider}"\nbase_url = "{url}"\nauth = "none"\nmodels = ["m"]\n'
        policy.write_text(f"[upstreams.own]\n{own}{place}")
        gateway = await open_gateway(worker=False, tidegate_policy=policy)
        named = "publishers/google/models/m"
        if path == VERTEX:
            named = f"projects/of-the-client/locations/us/{named}"
        async with talk(gateway, path) as socket:
            await send(socket, setup={"model": named if path == VERTEX else "models/m"})
            assert b"setupComplete" in await socket.recv()
            await send(socket, realtimeInput={"text": "When is high tide?"})
            assert b"turnComplete" in await socket.recv()
        (row,) = await rows(gateway, 1)
        assert (row["model"], row["input_tokens"]) == ("m", 100)
    whole = "projects/p/locations/l/publishers/google/models/m"
    assert heard == [(VERTEX, whole) if provider == "vertex" else (LIVE, "models/m")]
