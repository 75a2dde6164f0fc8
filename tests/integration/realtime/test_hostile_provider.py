"""What a provider of realtime sessions may say harms no other call."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from websockets.asyncio.server import ServerConnection, serve

from tests.gateway import Opener
from tests.integration.realtime.test_realtime_life import (
    KEYS,
    closed,
    nothing_held,
    rows,
    send,
    talk,
    until,
)
from tidegate.policy.format import edit
from tidegate.realtime import exchange, turns

_TURNS = 40
_POLICY = """
[upstreams.hostile]
base_url = "http://127.0.0.1:{port}/v1"
dialect = "openai"
models = ["hostile"]
[upstreams.hostile.prices]
"hostile" = {{ input = 30, output = 30 }}
"""


async def boasts(socket: ServerConnection) -> None:
    """Turns that nobody asked for, of more tokens than there are."""
    session = {"type": "realtime", "model": "hostile"}
    await socket.send(orjson.dumps({"type": "session.created", "session": session}).decode())
    usage = {"input_tokens": 2**53 - 1, "output_tokens": 2**53 - 1}
    for number in range(_TURNS):
        for kind in ("response.created", "response.done"):
            response = {"id": f"resp_{number}", "status": "completed", "usage": usage}
            await socket.send(orjson.dumps({"type": kind, "response": response}).decode())


async def begins(socket: ServerConnection) -> None:
    """Turns without an end."""
    session = {"type": "realtime", "model": "hostile"}
    await socket.send(orjson.dumps({"type": "session.created", "session": session}).decode())
    for number in range(2_000):
        response = {"id": f"resp_{number}", "status": "in_progress"}
        event = {"type": "response.created", "response": response}
        await socket.send(orjson.dumps(event).decode())
    await socket.wait_closed()


@pytest.mark.parametrize("limits", [{}, {"tpm:hostile": 1}])
async def test_turns_that_a_provider_never_ends_end_the_session(
    open_gateway: Opener, tmp_path: Path, limits: dict[str, int]
) -> None:
    async with serve(begins, "127.0.0.1", 0, compression=None) as server:
        policy = tmp_path / "policy.toml"
        policy.write_text(_POLICY.format(port=server.sockets[0].getsockname()[1]))
        gateway = await open_gateway(worker=False, tidegate_policy=policy)
        await gateway.services.keepers["hostile"].change(edit(limits), set_by="test")
        async with talk(gateway, "/v1/realtime?model=hostile") as socket:
            code, reason = await closed(socket)
        assert (code, reason) == (1011, "the provider starts turns without ending any")
        await nothing_held(gateway)
        assert len(await rows(gateway, 1)) == 1


@pytest.mark.parametrize(
    ("own", "about", "then"),
    [
        ("a", "other", "error"),
        ("a", "a", "response.done"),
        (None, None, "error"),  # such as one about a message without an id that cancels nothing
        (None, "its own", "response.done"),
    ],
)
async def test_an_error_frees_the_turn_of_the_message_that_it_is_about(
    open_gateway: Opener, tmp_path: Path, own: str | None, about: str | None, then: str
) -> None:
    asked: list[str] = []

    async def refuses_first(socket: ServerConnection) -> None:
        session = {"type": "realtime", "model": "hostile"}
        await socket.send(orjson.dumps({"type": "session.created", "session": session}).decode())
        async for message in socket:
            asked.append(orjson.loads(message)["event_id"])
            named = asked[0] if about == "its own" else about
            event: dict[str, object] = {"type": "error", "error": {"event_id": named}}
            if len(asked) > 1:
                usage = {"input_tokens": 1, "output_tokens": 1}
                event = {"type": "response.done", "response": {"id": "r", "usage": usage}}
            await socket.send(orjson.dumps(event).decode())

    async with serve(refuses_first, "127.0.0.1", 0, compression=None) as server:
        policy = tmp_path / "policy.toml"
        policy.write_text(_POLICY.format(port=server.sockets[0].getsockname()[1]))
        gateway = await open_gateway(worker=False, tidegate_policy=policy)
        await gateway.services.keepers["hostile"].change(edit({"tpm:hostile": 1}), set_by="test")
        # A process that has just begun may wait for half a lease before it admits.
        soon = {**KEYS, "x-tidegate-deadline-ms": "3000"}
        first = {"type": "response.create"} | ({} if own is None else {"event_id": own})
        async with talk(gateway, "/v1/realtime?model=hostile", soon) as socket:
            await send(socket, **first)
            shown = (await until(socket, "error"))["error"]["event_id"]
            assert shown == (None if about == "its own" else about), "an added id is not shown"
            await send(socket, type="response.create", event_id="b")
            found = await until(socket, "error", "response.done")
        assert found["type"] == then, found
        assert own is None or asked[0] == own
        assert asked[1:] == ([] if then == "error" else ["b"])
        if then == "error":
            assert found["error"]["event_id"] == "b", "the first turn may still begin"
        await nothing_held(gateway)


async def test_an_error_without_an_id_frees_a_turn_that_does_not_begin(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a server whose errors name no message."""
    monkeypatch.setattr(turns, "UNBEGUN_S", 0.2)
    monkeypatch.setattr(exchange, "WATCH_EVERY_S", 0.05)
    asked: list[bool] = []

    async def names_nothing(socket: ServerConnection) -> None:
        session = {"type": "realtime", "model": "hostile"}
        await socket.send(orjson.dumps({"type": "session.created", "session": session}).decode())
        async for _ in socket:
            asked.append(True)
            events: list[dict[str, object]] = [{"type": "error", "error": {"message": "no"}}]
            if len(asked) == 3:
                usage = {"input_tokens": 30, "output_tokens": 4}
                done = {"id": "r", "status": "completed", "usage": usage}
                events = [
                    {"type": "response.created", "response": {"id": "r"}},
                    {"type": "response.done", "response": done},
                ]
            for event in events:
                await socket.send(orjson.dumps(event).decode())

    async with serve(names_nothing, "127.0.0.1", 0, compression=None) as server:
        policy = tmp_path / "policy.toml"
        policy.write_text(_POLICY.format(port=server.sockets[0].getsockname()[1]))
        gateway = await open_gateway(worker=False, tidegate_policy=policy)
        await gateway.services.keepers["hostile"].change(edit({"tpm:hostile": 1}), set_by="test")
        async with talk(gateway, "/v1/realtime?model=hostile") as socket:
            for answer in ("error", "error", "response.done"):
                await send(socket, type="response.create")  # waits until the limit is free
                found = await until(socket, "error", "response.done")
                assert found["type"] == answer, found
        assert len(asked) == 3
        (row,) = await rows(gateway, 1)
        assert (row["input_tokens"], row["output_tokens"]) == (30, 4), "no refused turn is charged"
        await nothing_held(gateway)


async def test_turns_that_do_not_begin_are_bounded(open_gateway: Opener, tmp_path: Path) -> None:
    received: list[object] = []

    async def is_silent(socket: ServerConnection) -> None:
        session = {"type": "realtime", "model": "hostile"}
        await socket.send(orjson.dumps({"type": "session.created", "session": session}).decode())
        async for message in socket:
            received.append(message)

    async with serve(is_silent, "127.0.0.1", 0, compression=None) as server:
        policy = tmp_path / "policy.toml"
        policy.write_text(_POLICY.format(port=server.sockets[0].getsockname()[1]))
        gateway = await open_gateway(worker=False, tidegate_policy=policy)
        async with talk(gateway, "/v1/realtime?model=hostile") as socket:
            for number in range(turns.MOST_REQUESTED + 1):
                await send(socket, type="response.create", event_id=f"e{number}")
            error = (await until(socket, "error"))["error"]
            assert error["event_id"] == f"e{turns.MOST_REQUESTED}", "the first one too many"
        assert len(received) == turns.MOST_REQUESTED
        await nothing_held(gateway)


async def test_usage_beyond_all_counts_is_taken_for_none(
    open_gateway: Opener, tmp_path: Path
) -> None:
    async with serve(boasts, "127.0.0.1", 0, compression=None) as server:
        policy = tmp_path / "policy.toml"
        policy.write_text(_POLICY.format(port=server.sockets[0].getsockname()[1]))
        gateway = await open_gateway(worker=False, tidegate_policy=policy)
        async with talk(gateway, "/v1/realtime?model=hostile") as socket:
            async for _ in socket:
                pass
        (row,) = await rows(gateway, 1)
        assert (row["status"], row["usage_state"]) == ("succeeded", "estimated")
        assert row["cost_micros"] < 10**6
