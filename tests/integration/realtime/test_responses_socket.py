"""The Responses API over WebSocket: each turn is a call, by OpenAI's SDK and by bare messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import orjson
import pytest
from openai import AsyncOpenAI
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import ADMIN_TOKEN, key_of
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.http.realtime import responses as front
from tidegate.policy.format import edit
from tidegate.prices.budgets import Budget

MODEL = "gpt-5-mini"
SECRET = "key-of-the-account"
_POLICY = """
[upstreams.account]
provider = "openai"
base_url = "{url}/v1"
key = "ACCOUNT_KEY"
models = ["gpt-*"]
aliases = {{ "gpt-fast" = "gpt-5-mini" }}
[upstreams.account.prices]
"gpt-*" = {{ input = 1, output = 2 }}
[upstreams.plain]
dialects = {{ openai = "{url}/v1" }}
key = "ACCOUNT_KEY"
models = ["other-*"]
"""


class Room:
    """A gateway over an account of OpenAI."""

    def __init__(self, gateway: Gateway, account: Emulator) -> None:
        self.gateway = gateway
        self.account = account

    @property
    def held(self) -> int:
        state = self.gateway.services.limiters["account"].local_state()
        return sum(state.held.values())

    async def limit(self, **limits: int) -> None:
        changes = edit({name.replace("_", ":"): bound for name, bound in limits.items()})
        services = self.gateway.services
        await services.keepers["account"].change(changes, set_by="test")
        limiter = services.limiters["account"]

        def in_force() -> bool:
            found = (limiter.policy.limit(name.replace("_", ":")) for name in limits)
            return [getattr(one, "bound", None) for one in found] == list(limits.values())

        await wait_until(in_force, 10, "the limits in force")

    async def in_flight(self, count: int) -> None:
        async def reached() -> bool:
            return (await self.account.control.stats()).in_flight == count

        await wait_until(reached, 20, f"{count} calls in flight")

    async def rows(self, count: int) -> list[dict[str, Any]]:
        """The rows of all calls in the order of their receipt, once there are so many."""

        async def found() -> list[Any]:
            query = "SELECT * FROM audit ORDER BY submitted_at, request_id"
            return [dict(row) for row in await self.gateway.database.fetch(query)]

        async def enough() -> bool:
            return len(await found()) >= count

        await wait_until(enough, 20, f"{count} rows")
        rows = await found()
        assert len(rows) == count
        return rows


@asynccontextmanager
async def opened(
    open_gateway: Opener,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    url: str = "",
    **more: Any,
) -> AsyncIterator[Room]:
    monkeypatch.setenv("ACCOUNT_KEY", SECRET)
    async with run_emulator() as account:
        path = tmp_path / "policy.toml"
        path.write_text(_POLICY.format(url=url or account.url))
        options = {"worker": False, "tidegate_policy": path, **more}
        yield Room(await open_gateway(**options), account)


@pytest.fixture
async def room(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Room]:
    async with opened(open_gateway, tmp_path, monkeypatch) as room:
        yield room


@asynccontextmanager
async def talk(gateway: Gateway, **headers: str) -> AsyncIterator[ClientConnection]:
    url = f"ws{gateway.url.removeprefix('http')}/v1/responses"
    named = {"Authorization": "Bearer of-a-client", **headers}
    async with connect(url, additional_headers=named, compression=None, proxy=None) as socket:
        yield socket


async def send(socket: ClientConnection, text: str = "Say hello", **fields: Any) -> None:
    event = {"type": "response.create", "model": MODEL, "store": False, "input": text, **fields}
    await socket.send(orjson.dumps(event).decode())


async def ended(socket: ClientConnection) -> dict[str, Any]:
    """The last event of a turn."""
    async with asyncio.timeout(10):
        while True:
            event: dict[str, Any] = orjson.loads(await socket.recv())
            name = event["type"].removeprefix("response.")
            if name in ("completed", "failed", "incomplete", "error", "steer.failed"):
                return event


async def begun(socket: ClientConnection) -> None:
    """Wait for the first event of a turn."""
    async with asyncio.timeout(10):
        await socket.recv()


# Turns and their records


async def test_turns_of_openais_sdk_are_calls_with_records_of_their_own(
    room: Room, openai: Callable[..., AsyncOpenAI]
) -> None:
    usages: list[Any] = []
    ids: list[str] = []
    async with openai(room.gateway).responses.connect() as connection:
        for text in ("Say hello", "And once more"):
            before = {"previous_response_id": ids[-1]} if ids else {}
            await connection.response.create(model="gpt-fast", input=text, store=False, **before)
            said = ""
            async for event in connection:
                if event.type == "response.output_text.delta":
                    said += event.delta
                if event.type == "response.completed":
                    usages.append(event.response.usage)
                    ids.append(event.response.id)
                    break
            assert said
        assert room.held == 0
    rows = await room.rows(2)
    for row, usage in zip(rows, usages, strict=True):
        assert (row["status"], row["http_status"], row["model"]) == ("succeeded", 200, MODEL)
        assert row["endpoint"] == "/v1/responses"
        output_tokens = row["output_tokens"] + row["thoughts_tokens"]
        assert (row["input_tokens"], output_tokens) == (usage.input_tokens, usage.output_tokens)
        cost_micros = usage.input_tokens + 2 * usage.output_tokens
        assert (row["usage_state"], row["cost_micros"]) == ("told", cost_micros)
    calls = await room.account.control.calls()
    assert [(call.method, call.model, call.outcome) for call in calls] == [
        ("socket", MODEL, "finished")
    ] * 2
    record = await room.gateway.audit(str(rows[0]["request_id"]))
    assert orjson.loads(record["request"])["input"] == "Say hello"
    assert "response.completed" in record["response"]


async def test_of_a_tenant_without_bodies_no_words_of_a_turn_are_on_record(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(open_gateway, tmp_path, monkeypatch, bodies_off="quiet") as room:
        for tenant in ("quiet", "acme"):
            async with talk(room.gateway, **{"x-tidegate-tenant": tenant}) as socket:
                await send(socket, "Explain the unspeakable", instructions="Be unspeakable")
                assert "unspeakable" in str((await ended(socket))["response"]["output"])
        quiet, acme = await room.rows(2)
        assert (quiet["tenant_id"], quiet["prompt_head"]) == ("quiet", None)
        assert "unspeakable" not in str(quiet)
        assert acme["prompt_head"] == "Explain the unspeakable"
        kept = await room.gateway.database.fetch("SELECT DISTINCT tenant_id FROM bodies")
        assert [row["tenant_id"] for row in kept] == ["acme"]


async def test_a_turn_that_only_prepares_the_next_has_no_output(room: Room) -> None:
    async with talk(room.gateway) as socket:
        await send(socket, generate=False, stream_id="main")
        warm = await ended(socket)
        assert (warm["response"]["output"], warm["stream_id"]) == ([], "main")
        await send(socket, previous_response_id=warm["response"]["id"], stream_id="main")
        assert (await ended(socket))["type"] == "response.completed"
    first, _ = await room.rows(2)
    assert (first["output_tokens"], first["usage_state"]) == (0, "told")


async def test_only_its_own_connection_continues_what_is_not_stored(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"auth": "on", "admin_token": ADMIN_TOKEN}
    async with opened(open_gateway, tmp_path, monkeypatch, **keys) as room:
        acme, other = await key_of(room.gateway, "acme"), await key_of(room.gateway, "other")
        async with talk(room.gateway, **acme) as socket, talk(room.gateway, **other) as foreign:
            await send(socket)
            unstored = (await ended(socket))["response"]["id"]
            await send(socket, store=True)
            stored = (await ended(socket))["response"]["id"]
            for response_id in (unstored, stored):
                await send(foreign, previous_response_id=response_id)
                error = await ended(foreign)
                assert (error["status"], error["error"]["code"]) == (
                    *(400, "previous_response_not_found"),
                )
            for response_id in (unstored, stored):
                await send(socket, previous_response_id=response_id)
                assert (await ended(socket))["type"] == "response.completed"
            async with talk(room.gateway, **acme) as again:
                await send(again, previous_response_id=unstored)
                assert (await ended(again))["error"]["code"] == "previous_response_not_found"
                await send(again, previous_response_id=stored)
                assert (await ended(again))["type"] == "response.completed"


# Limits, budgets, models


async def test_limits_bind_each_turn_and_a_rejection_leaves_the_connection_open(
    room: Room,
) -> None:
    control = room.account.control
    await room.limit(pool_total=1)
    await control.set_behaviour(between_ms=30_000)
    async with talk(room.gateway, **{"x-tidegate-deadline-ms": "200"}) as socket:
        async with talk(room.gateway) as other:
            await send(other, "Say something long")
            await begun(other)
            await send(socket, stream_id="side")
            error = await ended(socket)
        assert (error["type"], error["status"], error["stream_id"]) == ("error", 429, "side")
        assert error["error"]["limit"] == "pool:total"
        assert int(error["headers"]["retry-after"]) >= 1
        assert error["error"]["headers"] == error["headers"]
        await wait_until(lambda: room.held == 0, 10, "the permit's return")
        await control.set_behaviour(between_ms=0)
        await send(socket)
        assert (await ended(socket))["type"] == "response.completed"
        await room.limit(rpm_total=1)
        await send(socket)
        await ended(socket)
        await send(socket)
        error = await ended(socket)
        assert (error["status"], error["error"]["limit"]) == (429, "rpm:total")
    rows = await room.rows(5)
    assert sorted(row["status"] for row in rows[:3]) == ["cancelled", "expired", "succeeded"]


async def test_turns_of_many_connections_never_exceed_a_limit(room: Room) -> None:
    await room.limit(pool_total=2)
    await room.account.control.set_behaviour(between_ms=5)

    async def work() -> None:
        async with talk(room.gateway) as socket:
            for _ in range(3):
                await send(socket, "Say something long")
                assert (await ended(socket))["type"] == "response.completed"

    await asyncio.gather(*(work() for _ in range(6)))
    stats = await room.account.control.stats()
    assert (stats.max_in_flight, stats.in_flight) == (2, 0)
    assert len(await room.account.control.calls()) == 18


async def test_a_budget_counts_and_rejects_turns(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"auth": "on", "admin_token": ADMIN_TOKEN}
    async with opened(open_gateway, tmp_path, monkeypatch, **keys) as room:
        acme = await key_of(room.gateway, "acme")
        budgets = room.gateway.services.store.budgets
        bound = Budget("acme", "tokens", 1_000, "day", tenant="acme", doubt="estimate")
        await budgets.records.set(bound, by="test")
        await budgets.refresh()
        async with talk(room.gateway, **acme) as socket:
            spent = 0
            for _ in range(60):
                await send(socket, max_output_tokens=100)
                event = await ended(socket)
                if event["type"] == "error":
                    break
                spent += event["response"]["usage"]["total_tokens"]
            assert (event["status"], event["error"]["code"]) == (429, "insufficient_quota")
        await budgets.flush()
        (book,) = await budgets.records.books("acme")
        assert 1_000 >= book.spent == spent > 0
        assert (book.held, room.gateway.services.budgets.held) == (0, 0)


async def test_models_of_a_tenant_bind_each_turn_and_its_tools(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"auth": "on", "admin_token": ADMIN_TOKEN}
    async with opened(open_gateway, tmp_path, monkeypatch, **keys) as room:
        acme = await key_of(room.gateway, "acme", models=[MODEL], most_streams=1)
        async with talk(room.gateway, **acme) as socket:
            await send(socket, model="gpt-5")
            assert (await ended(socket))["status"] == 403
            await send(socket, tools=[{"type": "image_generation", "model": "gpt-image-1"}])
            assert (await ended(socket))["status"] == 403
            await send(socket)
            assert (await ended(socket))["type"] == "response.completed"
            with pytest.raises(InvalidStatus) as caps:
                async with talk(room.gateway, **acme):
                    pass
            assert caps.value.response.status_code == 429
        with pytest.raises(InvalidStatus) as unknown:
            async with talk(room.gateway):
                pass
        assert unknown.value.response.status_code == 401
        assert len(await room.account.control.calls()) == 1


async def test_a_model_whose_upstream_has_no_websocket_is_rejected_with_426(
    room: Room, open_gateway: Opener
) -> None:
    async with talk(room.gateway) as socket:
        await send(socket, model="other-1")
        error = await ended(socket)
        assert (error["status"], error["error"]["code"]) == (426, "websocket_refused")
    assert await room.account.control.calls() == []
    gateway = await open_gateway(worker=False)
    with pytest.raises(InvalidStatus) as refused:
        async with talk(gateway):
            pass
    assert refused.value.response.status_code == 426


async def test_an_offer_of_another_protocol_is_a_request_over_http(room: Room) -> None:
    body = {"model": MODEL, "input": "Say hello"}
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMA"}
    url = f"{room.gateway.url}/v1/responses"
    async with room.gateway.http.post(url, json=body, headers=offer) as response:
        assert (response.status, (await response.json())["status"]) == (200, "completed")
    async with room.gateway.http.get(url, headers=offer) as response:
        assert response.status == 405


# Failures


async def test_a_throttled_turn_is_retried_and_an_error_keeps_its_status(room: Room) -> None:
    control = room.account.control
    async with talk(room.gateway) as socket:
        await control.set_fault("unavailable", count=1)
        await send(socket)
        assert (await ended(socket))["type"] == "response.completed"
        await control.set_fault("throttled", count=1)
        await send(socket)
        assert (await ended(socket))["type"] == "response.completed"
        await send(socket, input=7)
        assert (await ended(socket))["status"] == 400
        await control.set_fault("error_in_stream", count=1)
        await send(socket, "Say something long")
        assert (await ended(socket))["type"] == "error"
        assert (await ended(socket))["type"] == "response.failed"
        await send(socket)
        assert (await ended(socket))["type"] == "response.completed"
    rows = await room.rows(5)
    assert [row["attempts"] for row in rows] == [2, 2, 1, 1, 1]
    assert [row["status"] for row in rows] == [
        *("succeeded", "succeeded", "failed", "failed", "succeeded"),
    ]


@pytest.mark.parametrize("fault", ["cut", "cut_mid_stream", "hang_mid_stream"])
async def test_a_provider_that_breaks_off_ends_the_turn_with_an_error_alone(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    more: dict[str, Any] = {"idle_timeout_ms": 600}
    async with opened(open_gateway, tmp_path, monkeypatch, **more) as room:
        await room.account.control.set_fault(fault, after_chunks=2)
        async with talk(room.gateway) as socket:
            await send(socket, "Say something long")
            error = await ended(socket)
            assert (error["type"], error["status"] >= 500) == ("error", True)
            await room.in_flight(0)
            assert room.held == 0
            await room.account.control.clear_faults()
            await send(socket)
            assert (await ended(socket))["type"] == "response.completed"
        rows = await room.rows(2)
        assert [row["status"] for row in rows] == ["failed", "succeeded"]


async def test_a_client_that_leaves_ends_its_turn_and_then_its_permit(room: Room) -> None:
    await room.limit(pool_total=1)
    await room.account.control.set_behaviour(between_ms=30_000)
    for leave in ("close", "abort"):
        async with talk(room.gateway) as socket:
            await send(socket, "Say something long")
            await begun(socket)
            await room.in_flight(1)
            assert room.held == 1
            if leave == "abort":
                socket.transport.abort()
        await room.in_flight(0)
        await wait_until(lambda: room.held == 0, 10, "the permit's return")
    rows = await room.rows(2)
    assert {row["status"] for row in rows} == {"cancelled"}
    assert all(row["cost_micros"] >= row["input_tokens"] > 0 for row in rows)
    await room.account.control.set_behaviour(between_ms=0)
    async with talk(room.gateway) as socket:
        await send(socket)
        assert (await ended(socket))["type"] == "response.completed"
    stats = await room.account.control.stats()
    assert stats.max_in_flight == 1


async def test_a_client_that_leaves_in_the_queue_is_never_called(room: Room) -> None:
    await room.limit(pool_total=1)
    await room.account.control.set_behaviour(between_ms=30_000)
    async with talk(room.gateway) as first:
        await send(first, "Say something long")
        await begun(first)
        async with talk(room.gateway) as second:
            await send(second)
            limiter = room.gateway.services.limiters["account"]
            await wait_until(lambda: sum(limiter.local_state().waiting.values()), 10, "a waiter")
        await wait_until(lambda: not sum(limiter.local_state().waiting.values()), 10, "its end")
    await room.in_flight(0)
    assert len(await room.account.control.calls()) == 1


# The connection


async def test_messages_that_request_no_turn_are_answered_and_harm_none(room: Room) -> None:
    await room.account.control.set_behaviour(between_ms=50)
    async with talk(room.gateway) as socket:
        await send(socket, "Say something long")
        await begun(socket)
        steer = {"type": "response.steer", "previous_response_id": "resp_1", "input": "shorter"}
        await socket.send(orjson.dumps(steer).decode())
        failed = await ended(socket)
        assert failed["error"]["code"] == "steering_not_supported"
        assert failed["steer"] == {"previous_response_id": "resp_1", "input": "shorter"}
        for message in ("no json", "[]", '{"type":"session.update"}', '{"type":7}'):
            await socket.send(message)
            assert (await ended(socket))["status"] == 400
        await send(socket, background=True)
        assert (await ended(socket))["error"]["param"] == "background"
        assert (await ended(socket))["type"] == "response.completed"
    assert len(await room.account.control.calls()) == 1


async def test_requests_of_turns_are_answered_in_their_order_up_to_a_number(room: Room) -> None:
    await room.limit(pool_total=1)
    await room.account.control.set_behaviour(between_ms=1)
    async with talk(room.gateway) as socket, talk(room.gateway) as other:
        await room.account.control.set_behaviour(first_byte_ms=1_000)
        await send(other)
        await room.in_flight(1)
        await send(socket, stream_id="lane-0")
        limiter = room.gateway.services.limiters["account"]
        await wait_until(lambda: sum(limiter.local_state().waiting.values()), 10, "a waiter")
        for number in range(1, front.MOST_PENDING + 2):
            await send(socket, stream_id=f"lane-{number}")
        full = await ended(socket)
        assert (full["type"], full["error"]["limit"]) == ("error", "turns")
        assert full["stream_id"] == f"lane-{front.MOST_PENDING + 1}"
        await room.account.control.set_behaviour(first_byte_ms=0)
        lanes = [(await ended(socket))["stream_id"] for _ in range(1 + front.MOST_PENDING)]
        assert lanes == [f"lane-{number}" for number in range(1 + front.MOST_PENDING)]
    assert (await room.account.control.stats()).max_in_flight == 1


async def test_turns_that_wait_count_in_what_a_process_holds(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"auth": "on", "admin_token": ADMIN_TOKEN}
    bounds: dict[str, Any] = {"max_held_bytes": 24_000_000, "max_body_bytes": 20_000_000}
    async with opened(open_gateway, tmp_path, monkeypatch, **keys, **bounds) as room:
        acme, other = await key_of(room.gateway, "acme"), await key_of(room.gateway, "other")
        await room.limit(pool_total=1)
        await room.account.control.set_behaviour(between_ms=30_000)
        bodies, large = room.gateway.services.bodies, "word " * 1_400_000
        async with talk(room.gateway, **acme) as busy, talk(room.gateway, **acme) as socket:
            await send(busy, "Say something long")
            await begun(busy)
            await send(socket, large)
            await wait_until(lambda: bodies.held_bytes >= 7_000_000, 10, "the first turn")
            with pytest.raises(ConnectionClosed) as closed:
                await asyncio.gather(*(send(socket, large) for _ in range(3)), socket.recv())
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1013
            await wait_until(lambda: not bodies.held_bytes, 10, "the end of what it had sent")
            async with talk(room.gateway, **other) as unharmed:
                await room.account.control.set_behaviour(between_ms=0)
                await busy.close()
                await send(unharmed)
                assert (await ended(unharmed))["type"] == "response.completed"
        assert len(await room.account.control.calls()) == 2


async def test_a_connection_ends_at_its_longest_time_after_its_turn(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "LONGEST_S", 0.4)
    await room.account.control.set_behaviour(first_byte_ms=600)
    async with talk(room.gateway) as socket:
        await send(socket)
        assert (await ended(socket))["type"] == "response.completed"
        error = await ended(socket)
        assert (error["status"], error["error"]["code"]) == (
            *(400, "websocket_connection_limit_reached"),
        )
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1000


async def test_a_provider_that_closes_its_side_closes_the_clients(room: Room) -> None:
    async with talk(room.gateway) as socket:
        await send(socket, "[too old]")
        assert (await ended(socket))["error"]["code"] == "websocket_connection_limit_reached"
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1000
    (row,) = await room.rows(1)
    assert row["status"] == "failed"


async def test_a_process_that_stops_ends_connections_after_their_turns(room: Room) -> None:
    await room.account.control.set_behaviour(first_byte_ms=300)
    async with talk(room.gateway) as busy, talk(room.gateway) as idle:
        await send(busy)
        await room.in_flight(1)
        room.gateway.drain()
        with pytest.raises(ConnectionClosed) as closed:
            await idle.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
        assert (await ended(busy))["type"] == "response.completed"
        with pytest.raises(ConnectionClosed):
            await busy.recv()


async def test_a_turn_that_outlasts_the_grace_of_a_process_ends_with_an_error(room: Room) -> None:
    await room.account.control.set_behaviour(between_ms=60_000)
    async with talk(room.gateway) as socket:
        await send(socket, "Say something long")
        await begun(socket)
        room.gateway.drain()
        error = await ended(socket)
        assert (error["type"], error["status"] >= 500) == ("error", True)
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
    await room.in_flight(0)
    (row,) = await room.rows(1)
    assert (row["status"], orjson.loads(row["failure"])["code"]) == ("failed", "shutting_down")


async def test_a_hostile_provider_harms_no_other_turn(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = '{\n"type": "response.completed",\n"response": {"id": 7, "usage": 8}}'
    answers = iter(
        (
            ["no json"],
            [
                '{"type":"response.created","response":{"id":"resp_1"}}',
                '{"type":"error","error":7}',
            ],
            ['{"type":"error","status":"no","error":{"message":"odd"}}'],
            [f'{{"type":"error","status":401,"error":{{"message":"wrong {SECRET}"}}}}'],
        )
    )
    turns = count()

    async def hostile(socket: ServerConnection) -> None:
        async for _ in socket:
            for message in [good] if next(turns) % 2 else next(answers):
                await socket.send(message)

    monkeypatch.setattr("tidegate.realtime.responses._FAILED_WITHIN_S", 0.1)
    # No turn is tried again: the pause before that is longer than it may wait.
    monkeypatch.setattr("tidegate.spine.run._FIRST_PAUSE_S", 3_600.0)
    monkeypatch.setattr("tidegate.spine.run._LONGEST_PAUSE_S", 3_600.0)
    async with serve(hostile, "127.0.0.1", 0, compression=None) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with opened(open_gateway, tmp_path, monkeypatch, url) as room:
            async with talk(room.gateway) as socket:
                for place in range(7):
                    await send(socket)
                    event = await ended(socket)
                    assert event["type"] == ("response.completed" if place % 2 else "error")
                    assert SECRET not in str(event)
            assert room.held == 0


@pytest.mark.parametrize("status", [400, 403])
async def test_a_provider_that_refuses_the_handshake_rejects_the_turn_alone(
    open_gateway: Opener,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    def refuses(connection: ServerConnection, _: Any) -> Any:
        return connection.respond(status, "not here")

    async def never(_: ServerConnection) -> None:
        raise AssertionError("the handshake was refused")

    async with serve(never, "127.0.0.1", 0, process_request=refuses) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with opened(open_gateway, tmp_path, monkeypatch, url) as room:
            async with talk(room.gateway, **{"x-tidegate-deadline-ms": "300"}) as socket:
                await send(socket)
                assert (await ended(socket))["status"] == status
            (row,) = await room.rows(1)
            assert (row["status"], room.held) == ("failed", 0)


async def test_what_a_provider_says_between_turns_and_codex_notices_are_passed_on(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[dict[str, Any]] = []
    response = {"id": "resp_1", "status": "completed", "usage": {"total_tokens": 5}}

    async def provider(socket: ServerConnection) -> None:
        async for message in socket:
            heard.append(orjson.loads(message))
            if heard[-1]["type"] == "response.create":
                event = {"type": "response.completed", "response": response}
                await socket.send(orjson.dumps(event).decode())
            else:
                await socket.send(f'{{"type":"notice","key":"{SECRET}"}}')

    async with serve(provider, "127.0.0.1", 0, compression=None) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with (
            opened(open_gateway, tmp_path, monkeypatch, url) as room,
            talk(room.gateway, **{"OpenAI-Beta": "responses_websockets=1"}) as socket,
        ):
            await send(socket, stream_id="a")
            await ended(socket)
            for response_id in ("resp_of_others", "resp_1"):
                notice = {"type": "response.processed", "response_id": response_id}
                await socket.send(orjson.dumps(notice).decode())
            assert orjson.loads(await socket.recv()) == {"type": "notice", "key": "***"}
    create, notice = heard
    assert create["stream_id"] == "a"
    assert "stream" not in create
    assert notice["response_id"] == "resp_1"
