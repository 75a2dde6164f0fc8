"""Realtime sessions under limits, budgets and keys, and what hostile messages and ends do to them.

The client is a bare WebSocket: no SDK would send these messages, or show these codes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from socket import AF_INET, SOCK_STREAM
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.commands import tidegate
from tests.gateway import KEY, Gateway, Opener, small_receive_buffer
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, ask, key_of
from tests.waiting import wait_until
from tidegate.policy.format import edit
from tidegate.prices.budgets import Budget
from tidegate.realtime import sockets

MODEL = "gemini-2.5-flash"
TEXT = {"type": "session.update", "session": {"type": "realtime", "output_modalities": ["text"]}}
LIVE = "/ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent"
_PRICES = """
[upstreams.gemini.prices]
"gemini-*" = { input = 1, output = 2, input_audio = 5 }
"whisper-x" = { audio_minute = 0.6 }
"""
_TRANSCRIPT = "conversation.item.input_audio_transcription"
WITH_KEYS = {"auth": "on", "admin_token": ADMIN_TOKEN, "worker": False}
KEYS = {"Authorization": "Bearer of-a-client"}


@asynccontextmanager
async def talk(
    gateway: Gateway, path: str = "", headers: dict[str, str] | None = None, **options: Any
) -> AsyncIterator[ClientConnection]:
    """A session in OpenAI's dialect, past its first event."""
    url = f"ws{gateway.url.removeprefix('http')}{path or f'/v1/realtime?model={MODEL}'}"
    named = KEYS if headers is None else headers
    options = {"compression": None, "proxy": None, **options}
    async with connect(url, additional_headers=named, **options) as socket:
        if "/realtime" in url:
            assert orjson.loads(await socket.recv())["type"] == "session.created"
        yield socket


async def send(socket: ClientConnection, **event: Any) -> None:
    await socket.send(orjson.dumps(event).decode())


@asynccontextmanager
async def unread(gateway: Gateway) -> AsyncIterator[ClientConnection]:
    """A session with a long answer under way, of which its client reads nothing: so that soon
    nothing more is read of the provider either."""
    small = small_receive_buffer((AF_INET, SOCK_STREAM, 0))
    small.connect(("127.0.0.1", int(gateway.url.rpartition(":")[2])))
    async with talk(gateway, sock=small) as socket:
        socket.transport.pause_reading()
        content = [{"type": "input_text", "text": "[tokens 100000]"}]
        item = {"type": "message", "role": "user", "content": content}
        await send(socket, type="conversation.item.create", item=item)
        await send(socket, type="response.create", response={"output_modalities": ["audio"]})
        yield socket


async def until(socket: ClientConnection, *kinds: str) -> dict[str, Any]:
    """The next event of one of these types."""
    async with asyncio.timeout(10):
        while True:
            event: dict[str, Any] = orjson.loads(await socket.recv())
            if event["type"] in kinds:
                return event


async def turn(socket: ClientConnection, text: str, until_kind: str = "response.done") -> Any:
    content = [{"type": "input_text", "text": text}]
    item = {"type": "message", "role": "user", "content": content}
    await send(socket, type="conversation.item.create", item=item)
    await send(socket, type="response.create", response={"output_modalities": ["text"]})
    return await until(socket, until_kind)


async def closed(socket: ClientConnection) -> tuple[int, str]:
    """The code and the reason with which the gateway closes."""
    async with asyncio.timeout(10):
        with suppress(ConnectionClosed):
            while True:
                await socket.recv()
        await socket.wait_closed()
        return socket.close_code or 0, socket.close_reason or ""


async def refused(gateway: Gateway, path: str = "", **options: Any) -> tuple[int, Any]:
    """Status and body of a session that is refused before it begins."""
    with pytest.raises(InvalidStatus) as refusal:
        async with talk(gateway, path, **options):
            pass
    response = refusal.value.response
    return response.status_code, orjson.loads(response.body)


async def rows(gateway: Gateway, count: int) -> list[Any]:
    query = "SELECT * FROM audit WHERE kind = 'realtime' ORDER BY submitted_at"

    async def found() -> list[Any] | None:
        listed = await gateway.database.fetch(query)
        return listed if len(listed) >= count else None

    listed: list[Any] = await wait_until(found, 10, f"{count} rows of sessions")
    return listed


async def nothing_held(gateway: Gateway) -> None:
    await wait_until(lambda: gateway.held == 0, 10, "the return of all permits")
    await gateway.in_flight(0)


async def test_a_session_waits_for_one_to_end_before_its_handshake_is_answered(
    gateway: Gateway,
) -> None:
    async with talk(gateway), talk(gateway) as second:
        assert gateway.held == 2
        hurried = {**KEYS, "x-tidegate-deadline-ms": "50"}
        status, body = await refused(gateway, headers=hurried)
        assert status == 429
        assert body["error"]["type"] == "rate_limit_error"
        waits = asyncio.create_task(turn_alone(gateway))
        await wait_until(lambda: gateway.waiting == 1, 5, "a session that waits")
        await second.close()
        assert await waits == "response.done"
    await nothing_held(gateway)
    listed = await rows(gateway, 4)
    assert sorted(row["status"] for row in listed) == ["expired", *["succeeded"] * 3]


async def turn_alone(gateway: Gateway) -> str:
    async with talk(gateway) as socket:
        return str((await turn(socket, "hello"))["type"])


async def test_hostile_messages_harm_nobody(gateway: Gateway) -> None:
    async with talk(gateway) as socket:
        for wrong in ("{", "[]", '{"type":"a","type":"session.update"}', b"\xff\xfe"):
            await socket.send(wrong)
            event = await until(socket, "error")
            assert event["error"]["type"] == "invalid_request_error"
        await send(socket, type="session.update", event_id="e7", session={"model": "o9"})
        error = (await until(socket, "error"))["error"]
        assert (error["event_id"], error["param"]) == ("e7", "session.model")
        many = {"type": "session.update", "event_id": "e8", "session": {"a": [{}] * 100_000}}
        await send(socket, **many)
        error = (await until(socket, "error"))["error"]
        assert error["event_id"] == "e8"
        assert error["message"].startswith("a message holds too many values")
        whole = orjson.dumps(TEXT).decode()
        await socket.send([whole[:9], whole[9:20], whole[20:]])  # as three fragments
        await until(socket, "session.updated")
        done = await turn(socket, f"hello {KEY}")  # which the provider repeats
        assert done["response"]["status"] == "completed"
        assert "hello ***" in str(done)
        assert KEY not in str(done)
        # The head of a frame alone, which says how long it is.
        socket.transport.write(b"\x81\xff" + (16 * 1024 * 1024 + 1).to_bytes(8) + bytes(4))
        assert (await closed(socket))[0] == 1009
    await nothing_held(gateway)
    async with talk(gateway) as socket:
        socket.transport.write(b"\x81\x82\0\0\0\0\xff\xfe")  # a text that is not UTF-8
        assert (await closed(socket))[0] == 1007
    await nothing_held(gateway)
    async with talk(gateway) as socket:
        socket.transport.abort()
    await nothing_held(gateway)
    listed = await rows(gateway, 3)
    assert listed[2]["status"] == "cancelled"


async def test_a_client_that_reads_nothing_is_cut(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, stalled_reader_ms=300)
    await gateway.services.keeper.change(edit({"kind:realtime": 1}), set_by="test")
    async with unread(gateway) as socket:
        await nothing_held(gateway)
        (row,) = await rows(gateway, 1)
        assert (row["status"], row["usage_state"]) == ("cancelled", "estimated")
        assert orjson.loads(row["failure"])["code"] == "client_stalled"
        assert row["output_tokens"] > 100
        socket.transport.resume_reading()


async def test_a_side_that_is_not_read_of_misses_no_ping(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "PING_S", 0.8)  # by twice that the answer has filled the buffers
    gateway = await open_gateway(worker=False)
    await gateway.services.keeper.change(edit({"kind:realtime": 1}), set_by="test")
    async with unread(gateway) as socket:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + 4 * sockets.PING_S
        await wait_until(lambda: loop.time() >= until_s, 10, "the time of several pings")
        assert gateway.held == 1
        socket.transport.resume_reading()
        await until(socket, "response.done")
    (row,) = await rows(gateway, 1)
    assert row["status"] == "succeeded"
    async with talk(gateway) as socket:  # there is nothing to read, and no pong comes
        socket.transport.pause_reading()
        row = (await rows(gateway, 2))[1]
        code = orjson.loads(row["failure"] or "{}").get("code")
        assert (row["status"], code) == ("cancelled", "client_left")
        socket.transport.abort()
    await nothing_held(gateway)


async def test_a_client_that_reads_nothing_keeps_no_session_open_that_has_to_end(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "CLOSE_S", 0.5)
    gateway = await open_gateway(worker=False, total_timeout_ms=1_000)
    await gateway.services.keeper.change(edit({"kind:realtime": 1}), set_by="test")
    async with unread(gateway) as socket:
        await nothing_held(gateway)  # long before a client is cut that has stopped reading
        socket.transport.abort()
    (row,) = await rows(gateway, 1)
    assert orjson.loads(row["failure"])["code"] == "upstream_timeout"


async def test_what_the_provider_says_of_the_end_reaches_the_client(gateway: Gateway) -> None:
    async with talk(gateway) as socket:
        await turn(socket, "[close 4001 enough is said]", "response.created")
        assert await closed(socket) == (4001, "enough is said")
    async with talk(gateway) as socket:
        await turn(socket, "[close 1001 going away]", "response.created")
        assert await closed(socket) == (1001, "going away")
    await nothing_held(gateway)
    failed, succeeded = await rows(gateway, 2)
    assert (failed["status"], succeeded["status"]) == ("failed", "succeeded")
    assert failed["usage_state"] == "estimated"  # the turn had begun
    await gateway.upstream.set_fault("forbidden", kind="realtime")
    status, body = await refused(gateway)
    assert (status, body["error"]["type"]) == (403, "invalid_request_error")
    assert "no access" in body["error"]["message"]
    await nothing_held(gateway)


async def test_of_a_tenant_without_bodies_no_words_of_a_session_are_on_record(
    open_gateway: Opener,
) -> None:
    """Neither the client's nor the provider's, of turns, instructions and failures, nor to be found
    by a search; but usage."""
    gateway, word = await open_gateway(worker=False, bodies_off="quiet"), "unspeakable"
    of_quiet = {**KEYS, "x-tidegate-tenant": "quiet"}
    async with talk(gateway, headers=of_quiet) as socket:
        instructions = {"type": "realtime", "instructions": f"Say {word} often"}
        await send(socket, type="session.update", session=instructions)
        assert word in str((await turn(socket, f"Explain {word}"))["response"]["output"])
    setup: dict[str, Any] = {"model": f"models/{MODEL}"}
    setup["generationConfig"] = {"responseModalities": ["TEXT"]}
    async with talk(gateway, LIVE, headers=of_quiet) as socket:
        await send(socket, setup=setup)
        await socket.recv()
        turns = [{"role": "user", "parts": [{"text": f"Explain {word}"}]}]
        await send(socket, clientContent={"turns": turns, "turnComplete": True})
        said = b""
        async with asyncio.timeout(10):
            while b"turnComplete" not in said:
                said += bytes(await socket.recv(decode=False))
        assert word.encode() in said
    async with talk(gateway, headers=of_quiet) as socket:
        await turn(socket, f"[close 1013 no more of {word}]", "response.created")
        assert (await closed(socket))[0] == 1013
    listed = await rows(gateway, 3)
    assert [row["status"] for row in listed] == ["succeeded", "succeeded", "failed"]
    assert {row["tenant_id"] for row in listed} == {"quiet"}
    assert all(row["total_tokens"] for row in listed[:2])
    for table in ("audit", "requests", "attempts", "bodies"):
        query = f"SELECT count(*) FROM {table} AS one WHERE one::text ~ $1"
        assert await gateway.database.fetchval(query, word) == 0, table
    assert await gateway.database.fetchval("SELECT count(*) FROM bodies") == 0
    status, found = await ask(
        gateway,
        "GET",
        f"/admin/requests?text={word}",
        {"Authorization": f"Bearer {gateway.operator_key}"},
    )
    assert (status, found["items"]) == (200, [])


async def test_a_spent_budget_closes_the_session_with_its_reason(open_gateway: Opener) -> None:
    gateway = await open_gateway(**WITH_KEYS)
    acme, other = await key_of(gateway, "acme"), await key_of(gateway, "other")
    store = gateway.services.store
    limit = Budget("acme", "tokens", 3_000, "day", tenant="acme", doubt="estimate")
    await store.budgets.records.set(limit, by="test")
    await store.budgets.refresh()
    async with talk(gateway, headers=acme) as socket, talk(gateway, headers=other) as at_ease:
        assert (await turn(socket, "hello"))["response"]["usage"]["total_tokens"] < 100
        await turn(socket, "[tokens 2900]", "response.done")
        error = (await until(socket, "error"))["error"]
        assert (error["code"], error["limit"]) == ("insufficient_quota", "acme")
        code, reason = await closed(socket)
        assert (code, reason.startswith("the budget acme")) == (1008, True)
        assert (await turn(at_ease, "hello"))["response"]["status"] == "completed"
    await store.budgets.flush()
    (book,) = await store.budgets.records.books("acme")
    spent = await rows(gateway, 2)
    of_acme = next(row for row in spent if row["tenant_id"] == "acme")
    assert book.spent == of_acme["input_tokens"] + of_acme["output_tokens"] > 2_900
    assert (book.held, gateway.services.budgets.held) == (0, 0)
    status, body = await refused(gateway, headers=acme)
    assert (status, body["error"]["code"]) == (429, "insufficient_quota")


async def test_transcripts_are_part_of_what_a_session_costs(
    open_gateway: Opener, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(_PRICES)
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    store = gateway.services.store
    await store.budgets.records.set(Budget("all", "usd", 10**9, "day", doubt="estimate"), by="test")
    await store.budgets.refresh()
    audio = {"input": {"transcription": {"model": "whisper-x"}, "turn_detection": None}}
    async with talk(gateway) as socket:
        await send(socket, type="session.update", session={"type": "realtime", "audio": audio})
        await send(socket, type="input_audio_buffer.append", audio="A" * 64_000)
        await send(socket, type="input_audio_buffer.commit")
        usage = (await turn(socket, "hello"))["response"]["usage"]
    (row,) = await rows(gateway, 1)
    tokens = usage["input_tokens"], usage["output_tokens"]
    assert (row["input_tokens"], row["output_tokens"]) == tokens
    heard = usage["input_token_details"]["audio_tokens"]
    second = 10_000  # of audio, by its transcript's model
    assert row["cost_micros"] == tokens[0] - heard + 5 * heard + 2 * tokens[1] + second
    await store.budgets.flush()
    (book,) = await store.budgets.records.books("all")
    assert (book.spent, book.held) == (row["cost_micros"], 0)


async def test_words_of_a_transcript_begin_no_turn(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    limits = {"kind:realtime": 5, "rpm:total": 9, "rpm:whisper-x": 9}
    await gateway.services.keeper.change(edit(limits), set_by="test")
    audio = {"input": {"transcription": {"model": "whisper-x"}, "turn_detection": None}}
    async with talk(gateway) as socket:
        await send(socket, type="session.update", session={"type": "realtime", "audio": audio})
        await send(socket, type="input_audio_buffer.append", audio="A" * 64_000)
        await send(socket, type="input_audio_buffer.commit")
        await until(socket, f"{_TRANSCRIPT}.completed")
        usage = (await turn(socket, "hello"))["response"]["usage"]
    (row,) = await rows(gateway, 1)
    tokens = usage["input_tokens"], usage["output_tokens"]
    assert (row["input_tokens"], row["output_tokens"]) == tokens
    snapshot = await gateway.services.limiter.snapshot()
    assert snapshot.limits["rpm:total"].used == 1
    assert snapshot.limits["rpm:whisper-x"].used == 1, "but a request of its model"


async def test_a_transcript_behind_a_refused_turn_is_charged_to_budgets_too(
    open_gateway: Opener, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(_PRICES)
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    limits = {"kind:realtime": 5, f"tpm:{MODEL}": 1_000}
    await gateway.services.keeper.change(edit(limits), set_by="test")
    store = gateway.services.store
    await store.budgets.records.set(Budget("all", "usd", 10**9, "day", doubt="estimate"), by="test")
    await store.budgets.refresh()
    audio = {"input": {"transcription": {"model": "whisper-x"}, "turn_detection": None}}
    async with talk(gateway, headers={**KEYS, "x-tidegate-deadline-ms": "300"}) as socket:
        await send(socket, type="session.update", session={"type": "realtime", "audio": audio})
        await turn(socket, "[tokens 900]")
        await turn(socket, "hello", "error")  # the window has no room for it
        await send(socket, type="input_audio_buffer.append", audio="A" * 64_000)
        await send(socket, type="input_audio_buffer.commit")
        await until(socket, "conversation.item.input_audio_transcription.completed")
    (row,) = await rows(gateway, 1)
    await store.budgets.flush()
    (book,) = await store.budgets.records.books("all")
    assert (book.spent, book.held) == (row["cost_micros"], 0)


async def read_into(seen: list[dict[str, Any]], socket: ClientConnection) -> None:
    """All events to the end of a session."""
    with suppress(ConnectionClosed):
        while True:
            seen.append(orjson.loads(await socket.recv()))


def transcripts_or_end(seen: list[dict[str, Any]], count: int) -> bool:
    kinds = [event["type"] for event in seen]
    return "error" in kinds or kinds.count(f"{_TRANSCRIPT}.completed") >= count


async def test_transcripts_without_a_turn_end_a_session_whose_budget_is_spent(
    open_gateway: Opener, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(_PRICES)
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    store = gateway.services.store
    limit = Budget("all", "usd", 55_000, "day", doubt="estimate")
    await store.budgets.records.set(limit, by="test")
    await store.budgets.refresh()
    audio = {"input": {"transcription": {"model": "whisper-x"}, "turn_detection": None}}
    async with talk(gateway) as socket:
        await send(socket, type="session.update", session={"type": "realtime", "audio": audio})
        seen: list[dict[str, Any]] = []
        reading = asyncio.create_task(read_into(seen, socket))
        with suppress(ConnectionClosed):
            for second in range(1, 10):  # of a cent each
                await send(socket, type="input_audio_buffer.append", audio="A" * 64_000)
                await send(socket, type="input_audio_buffer.commit")
                come = partial(transcripts_or_end, seen, second)
                await wait_until(come, 10, "a transcript, or the end")
                await store.budgets.flush()
        await reading
        error = seen[-1]["error"]
        assert (error["code"], error["limit"]) == ("insufficient_quota", "all")
        assert (await closed(socket))[0] == 1008
    (row,) = await rows(gateway, 1)
    await store.budgets.flush()
    (book,) = await store.budgets.records.books("all")
    assert (book.spent, book.held) == (row["cost_micros"], 0)
    assert 60_000 <= book.spent <= 70_000


async def test_keys_and_models_hold_for_the_whole_session(open_gateway: Opener) -> None:
    gateway = await open_gateway(**WITH_KEYS)
    acme = await key_of(gateway, "acme", models=["gemini-2.5-*"])
    assert (await refused(gateway, headers={}))[0] == 401
    page = {**acme, "Origin": "https://evil.test"}  # no page reads from here, with a key neither
    assert (await refused(gateway, headers=page))[0] == 403
    assert (await refused(gateway, "/v1/realtime?model=o9", headers=acme))[0] == 403
    status, body = await refused(gateway, f"/v1/realtime?model={MODEL}&call_id=rtc_1", headers=acme)
    assert (status, body["error"]["param"]) == (400, "call_id")
    key = acme["Authorization"].removeprefix("Bearer ")
    protocols: Any = {"subprotocols": ["realtime", f"openai-insecure-api-key.{key}"]}
    async with talk(gateway, headers={}, **protocols) as socket:
        assert socket.subprotocol == "realtime"
        await turn(socket, "hello")
        prefix = key.removeprefix("tg_").partition("_")[0]
        status, _ = await ask(gateway, "DELETE", f"/admin/keys/{prefix}", AS_ADMIN)
        assert status < 300
        assert (await closed(socket))[0] == 1008
    await gateway.in_flight(0)


async def test_turns_are_counted_by_the_rates(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    limits = {"kind:realtime": 5, f"tpm:{MODEL}": 1_000, "rpm:total": 100}
    await gateway.services.keeper.change(edit(limits), set_by="test")
    async with talk(gateway, headers={**KEYS, "x-tidegate-deadline-ms": "300"}) as socket:
        await turn(socket, "[tokens 900]")
        error = (await turn(socket, "hello", "error"))["error"]  # the next one has to wait
        assert error["type"] in ("rate_limit_error", "usage_limit_reached")
        assert error["limit"] == f"tpm:{MODEL}"
        snapshot = await gateway.services.limiter.snapshot()
        assert snapshot.limits[f"tpm:{MODEL}"].used >= 900
        sound = "A" * 64_000  # the provider begins a turn by itself: it is counted all the same
        await send(socket, type="input_audio_buffer.append", audio=sound)
        await until(socket, "response.done")
        await send(socket, type="input_audio_buffer.append", audio="A" * 64)
        assert (await closed(socket))[0] == 1013
    await nothing_held(gateway)
    snapshot = await gateway.services.limiter.snapshot()
    assert snapshot.limits[f"tpm:{MODEL}"].used >= 1_800


async def test_a_session_whose_permit_is_lost_is_closed_in_words_for_its_client(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, idle_timeout_ms=60_000)
    await gateway.services.keeper.change(
        edit({"kind:realtime": 5, "pool.on_lost": "cancel"}), set_by="test"
    )
    async with talk(gateway) as socket:
        await turn(socket, "hello")
        (process,) = {one.name for one in (await gateway.services.limiter.snapshot()).processes}
        revoked = await tidegate(gateway, "permits", "revoke", process, "--yes")
        assert (revoked.code, revoked.complained) == (0, "")
        code, reason = await closed(socket)
        lost = "the gateway lost its right to make this call, and ended it: send it again"
        assert (code, reason) == (1013, lost)
    (row,) = await rows(gateway, 1)
    failure = orjson.loads(row["failure"])
    assert failure["code"] == "lease_lost"
    assert failure["message"].startswith("the session that held"), "for operators"


async def test_words_to_gemini_wait_for_the_limits_before_they_are_sent(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    limits = {"kind:realtime": 5, "rpm:total": 2}
    await gateway.services.keeper.change(edit(limits), set_by="test")
    turns = 0
    async with talk(gateway, LIVE, {**KEYS, "x-tidegate-deadline-ms": "300"}) as socket:
        as_text = {"responseModalities": ["TEXT"]}
        await send(socket, setup={"model": f"models/{MODEL}", "generationConfig": as_text})
        assert "setupComplete" in orjson.loads(await socket.recv())
        with suppress(ConnectionClosed):
            while turns < 9:
                await send(socket, realtimeInput={"text": "hello"})
                while b"turnComplete" not in await socket.recv():
                    pass
                turns += 1
        assert (await closed(socket))[0] == 1013
    assert turns == 2
    (row,) = await rows(gateway, 1)
    (call,) = await gateway.calls()
    assert row["input_tokens"] == call.input_tokens
    snapshot = await gateway.services.limiter.snapshot()
    assert snapshot.limits["rpm:total"].used == 2


async def test_each_of_several_texts_to_gemini_waits_for_the_limits(open_gateway: Opener) -> None:
    """They are sent before the first of them is answered."""
    gateway = await open_gateway(worker=False)
    limits = {"kind:realtime": 5, "rpm:total": 2}
    await gateway.services.keeper.change(edit(limits), set_by="test")
    await gateway.upstream.set_behaviour(first_byte_ms=100)
    async with talk(gateway, LIVE, {**KEYS, "x-tidegate-deadline-ms": "1000"}) as socket:
        as_text = {"responseModalities": ["TEXT"]}
        await send(socket, setup={"model": f"models/{MODEL}", "generationConfig": as_text})
        for text in ("one", "two", "three"):
            await send(socket, realtimeInput={"text": text})
        assert (await closed(socket))[0] == 1013
    await nothing_held(gateway)
    (row,) = await rows(gateway, 1)
    response = await gateway.http.get(f"{gateway.url}/requests/{row['request_id']}/response")
    assert (await response.json())["turns"] == 2, "the third one was not sent"
    snapshot = await gateway.services.limiter.snapshot()
    assert snapshot.limits["rpm:total"].used == 2


async def test_texts_that_are_answered_together_hold_no_permits_for_good(
    open_gateway: Opener, tmp_path: Path
) -> None:
    asked: list[bytes | str] = []

    async def answers_the_third(socket: ServerConnection) -> None:
        async for message in socket:
            asked.append(message)
            said: dict[str, object] = {"setupComplete": {}}
            if len(asked) > 1:
                usage = {"promptTokenCount": 1, "responseTokenCount": 1, "totalTokenCount": 2}
                said = {"serverContent": {"turnComplete": True}, "usageMetadata": usage}
            if len(asked) not in (2, 3):
                await socket.send(orjson.dumps(said))

    async with serve(answers_the_third, "127.0.0.1", 0, compression=None) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        policy = tmp_path / "policy.toml"
        table = f'base_url = "{url}"\ndialect = "gemini"\nmodels = ["merging"]\nauth = "none"\n'
        policy.write_text(f"[upstreams.merging]\n{table}")
        gateway = await open_gateway(worker=False, tidegate_policy=policy)
        await gateway.services.keepers["merging"].change(edit({"rpm:total": 3}), set_by="test")
        async with talk(gateway, LIVE, {**KEYS, "x-tidegate-deadline-ms": "300"}) as socket:
            await send(socket, setup={"model": "models/merging"})
            await socket.recv()
            for text in ("one", "two", "three"):
                await send(socket, realtimeInput={"text": text})
            await socket.recv()
            for text in ("four", "five"):  # two of the three have not been answered by themselves
                await send(socket, realtimeInput={"text": text})
                await socket.recv()
        await nothing_held(gateway)
        (row,) = await rows(gateway, 1)
        assert (row["input_tokens"], row["output_tokens"]) == (3, 3), "none is charged twice"


async def test_searches_of_gemini_are_part_of_what_a_session_costs(
    open_gateway: Opener, tmp_path: Path
) -> None:
    async def searches(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send(orjson.dumps({"setupComplete": {}}))
        async for _ in socket:
            for queries in (["ebb"], ["ebb", "flood", ""]):
                content = {"groundingMetadata": {"webSearchQueries": queries}}
                await socket.send(orjson.dumps({"serverContent": content}))
            usage = {"promptTokenCount": 10, "responseTokenCount": 5, "totalTokenCount": 15}
            said = {"serverContent": {"turnComplete": True}, "usageMetadata": usage}
            await socket.send(orjson.dumps(said))

    async with serve(searches, "127.0.0.1", 0, compression=None) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        policy = tmp_path / "policy.toml"
        table = f'base_url = "{url}"\ndialect = "gemini"\nmodels = ["m"]\nauth = "none"\n'
        prices = "[upstreams.own.prices]\nm = { input = 1, output = 2, search = 14 }\n"
        policy.write_text(f"[upstreams.own]\n{table}{prices}")
        gateway = await open_gateway(worker=False, tidegate_policy=policy)
        async with talk(gateway, LIVE) as socket:
            await send(socket, setup={"model": "models/m"})
            await socket.recv()
            for _ in range(2):
                await send(socket, realtimeInput={"text": "What do tides do?"})
                while b"turnComplete" not in await socket.recv():
                    pass
        (row,) = await rows(gateway, 1)
        assert (row["input_tokens"], row["output_tokens"]) == (20, 10)
        assert orjson.loads(row["usage_details"])["searches"] == 4, "each once in its turn"
        assert row["cost_micros"] == 20 + 2 * 10 + 4 * 14_000
        assert row["usage_state"] == "told"


async def test_a_turn_of_gemini_costs_what_the_provider_publishes_for_each_modality(
    open_gateway: Opener, tmp_path: Path
) -> None:
    def of(**counts: int) -> list[dict[str, Any]]:
        return [{"modality": name, "tokenCount": count} for name, count in counts.items()]

    usage = {
        "promptTokenCount": 1_000,
        "promptTokensDetails": of(TEXT=100, AUDIO=200, IMAGE=300, VIDEO=400),
        "responseTokenCount": 300,
        "responseTokensDetails": of(AUDIO=250, TEXT=50),
        "thoughtsTokenCount": 50,
        "totalTokenCount": 1_350,
    }

    async def answers(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send(orjson.dumps({"setupComplete": {}}))
        async for _ in socket:
            said = {"serverContent": {"turnComplete": True}, "usageMetadata": usage}
            await socket.send(orjson.dumps(said))

    async with serve(answers, "127.0.0.1", 0, compression=None) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        policy = tmp_path / "policy.toml"
        own = f'provider = "gemini"\nbase_url = "{url}"\nauth = "none"\n'
        policy.write_text(f'[upstreams.own]\n{own}models = ["gemini-3.8-live"]\n')
        gateway = await open_gateway(worker=False, tidegate_policy=policy)
        async with talk(gateway, LIVE) as socket:
            await send(socket, setup={"model": "models/gemini-3.8-live"})
            await socket.recv()
            for _ in range(2):
                await send(socket, realtimeInput={"text": "What do tides do?"})
                await socket.recv()
        (row,) = await rows(gateway, 1)
        assert (row["usage_state"], row["thoughts_tokens"]) == ("told", 100)
        text, audio = 100 * 0.75 + (50 + 50) * 4.5, 200 * 3 + 250 * 12
        assert row["cost_micros"] == 2 * (text + audio + 300 + 400)


async def test_a_client_that_leaves_while_its_turn_waits_begins_none(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    limits = {"kind:realtime": 5, f"tpm:{MODEL}": 1_000}
    await gateway.services.keeper.change(edit(limits), set_by="test")
    patient = {**KEYS, "x-tidegate-deadline-ms": "100000"}  # its window has room by then
    async with talk(gateway, headers=patient) as socket:
        await turn(socket, "[tokens 900]")
        await send(socket, type="response.create")
        await wait_until(lambda: gateway.waiting == 1, 5, "a turn that waits")
        socket.transport.abort()
        await nothing_held(gateway)
    assert gateway.waiting == 0
    (row,) = await rows(gateway, 1)
    code = orjson.loads(row["failure"] or "{}").get("code")
    assert (row["status"], code) == ("cancelled", "client_left")


async def test_a_session_is_on_record_whose_client_leaves_while_its_refusal_is_sent(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that has stopped reading: what is sent to it waits until it is cut off."""
    sending = asyncio.Event()

    async def wait(*args: Any) -> None:
        sending.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("tidegate.http.realtime.front._SessionFront._respond", wait)
    await gateway.upstream.set_fault("forbidden")

    async def leave() -> None:
        async with talk(gateway):
            pass

    leaving = asyncio.create_task(leave())
    await sending.wait()
    leaving.cancel()
    (row,) = await rows(gateway, 1)
    assert (row["status"], orjson.loads(row["failure"])["code"]) == (
        "failed",
        "upstream_unauthorized",
    )


async def test_the_client_s_sound_is_taken_of_the_limits_on_seconds_and_on_record(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    limits = {"kind:realtime": 5, f"aspm:{MODEL}": 20, "rpm:total": 100}
    await gateway.services.keeper.change(edit(limits), set_by="test")

    async def used() -> int:
        snapshot = await gateway.services.limiter.snapshot()
        return snapshot.limits[f"aspm:{MODEL}"].used

    async with talk(gateway, headers={**KEYS, "x-tidegate-deadline-ms": "300"}) as socket:
        update = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
        await send(socket, type="session.update", session=update)
        await until(socket, "session.updated")
        for _ in range(12):
            await send(socket, type="input_audio_buffer.append", audio="A" * 64_000)
        await turn(socket, "hello")
        assert await used() == 15, "in steps of five seconds, ahead"
        await send(socket, type="input_audio_buffer.append", audio="A" * 64_000 * 9)
        assert (await closed(socket))[0] == 1013
    await nothing_held(gateway)
    query = "SELECT usage_details FROM audit WHERE kind = 'realtime'"
    (row,) = await wait_until(lambda: gateway.database.fetch(query), 20, "its record")
    assert orjson.loads(row["usage_details"])["input_audio_seconds"] == 12, "what was passed on"


async def test_a_session_is_told_that_its_process_goes_away(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, shutdown_grace_ms=300)
    async with talk(gateway) as socket:
        gateway.drain()
        assert (await closed(socket))[0] == 1001
    await gateway.serving
    await gateway.in_flight(0)


async def test_bounds_in_time_and_pages_of_others(open_gateway: Opener, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[upstreams.gemini]\nidle_timeout_ms = 700\n")
    gateway = await open_gateway(
        worker=False, tidegate_policy=policy, cors_origins="https://own.test"
    )
    async with talk(gateway) as socket:
        assert await closed(socket) == (1001, "neither side sent anything for 700 ms")
    (row,) = await rows(gateway, 1)
    assert row["status"] == "succeeded"
    for headers in (
        {"Origin": "https://evil.test"},
        {"Origin": "https://evil.test", "Authorization": f"Bearer {gateway.operator_key}"},
    ):
        assert (await refused(gateway, headers=headers))[0] == 403, headers
        with pytest.raises(InvalidStatus):
            async with talk(gateway, LIVE, headers=headers):
                pass
    port = int(gateway.url.rpartition(":")[2])
    rebound = f"ws://evil.test:{port}/v1/realtime?model={MODEL}"
    with pytest.raises(InvalidStatus):
        async with connect(rebound, host="127.0.0.1", port=port, additional_headers=KEYS):
            pass
    async with talk(gateway, headers={"Origin": "https://own.test"}):
        pass
    async with gateway.http.get(f"{gateway.url}/v1/realtime?model={MODEL}") as response:
        assert response.status == 404
        assert "which is a WebSocket" in await response.text()
    for below, why in (
        ("v1/realtime/client_secrets", "past the limits here"),
        ("v1/realtime/sessions", "past the limits here"),
        ("v1alpha/auth_tokens", "?key=<key>"),
        ("v1beta/auth_tokens", "?key=<key>"),
        ("v1/realtime/calls", "use the WebSocket"),
        ("v1/traces/ingest", "in one account"),
    ):
        async with gateway.http.post(f"{gateway.url}/{below}") as response:
            said = (await response.json())["error"]
            assert response.status == 403, below
            assert said["code"] in ("forbidden", 403)  # of OpenAI's dialect, of Gemini's
            assert why in said["message"]
            assert "passthrough" in said["message"]


async def test_gemini_live_refuses_by_close_codes(gateway: Gateway) -> None:
    wrongs: list[tuple[Any, int]] = [
        ({"clientContent": {}}, 1007),
        ({"setup": {"model": f"models/{MODEL}", "sessionResumption": {"handle": "h"}}}, 1008),
        ({"setup": {"model": "models/claude-nowhere"}}, 1011),
    ]
    await gateway.upstream.set_behaviour(strict_models=True)
    for wrong, code in wrongs[:2]:
        async with talk(gateway, LIVE) as socket:
            await socket.send(orjson.dumps(wrong).decode())
            assert (await closed(socket))[0] == code, wrong
    async with talk(gateway, LIVE) as socket:
        await send(socket, setup={"model": f"models/{MODEL}"})
        assert "setupComplete" in orjson.loads(await socket.recv())
        await send(socket, setup={"model": "models/another"})
        assert (await closed(socket))[0] == 1007
    await nothing_held(gateway)


async def test_a_session_names_no_file_of_another_tenant(open_gateway: Opener) -> None:
    gateway = await open_gateway(**WITH_KEYS)
    acme, other = await key_of(gateway, "acme"), await key_of(gateway, "other")
    start = {"x-goog-upload-protocol": "resumable", "x-goog-upload-command": "start"}
    start |= {"x-goog-upload-header-content-length": "8"}
    start |= {"x-goog-upload-header-content-type": "text/plain"}
    url = f"{gateway.url}/upload/v1beta/files"
    async with gateway.http.post(url, json={"file": {}}, headers=acme | start) as begun:
        place = begun.headers["x-goog-upload-url"]
    ends = {"x-goog-upload-command": "upload, finalize", "x-goog-upload-offset": "0"}
    async with gateway.http.post(place, data=b"a secret", headers=ends) as made:
        file = (await made.json())["file"]
    data = {"mimeType": "text/plain", "fileUri": file["uri"]}
    turns = [{"role": "user", "parts": [{"fileData": data}, {"text": "Read it"}]}]
    setup = {"model": f"models/{MODEL}", "generationConfig": {"responseModalities": ["TEXT"]}}
    naming = {**setup, "systemInstruction": {"parts": [{"fileData": data}]}}
    for key, is_own in ((other, False), (acme, True)):
        async with talk(gateway, LIVE, key) as socket:
            await send(socket, setup=setup)
            assert "setupComplete" in orjson.loads(await socket.recv())
            await send(socket, clientContent={"turns": turns, "turnComplete": True})
            if is_own:
                assert b"serverContent" in await socket.recv()
            else:
                code, reason = await closed(socket)
                assert (code, "not found" in reason) == (1008, True)
        async with talk(gateway, LIVE, key) as socket:
            await send(socket, setup=naming)
            if is_own:
                assert "setupComplete" in orjson.loads(await socket.recv())
            else:
                assert (await closed(socket))[0] == 1008
    item: dict[str, Any] = {"type": "message", "role": "user"}
    item["content"] = [{"type": "input_image", "file_id": "file-of-acme"}]
    async with talk(gateway, headers=other) as socket:
        await send(socket, type="conversation.item.create", event_id="e1", item=item)
        error = (await until(socket, "error"))["error"]
        assert (error["event_id"], "not found" in error["message"]) == ("e1", True)
        await turn(socket, "hello")
    await nothing_held(gateway)


async def test_half_a_character_is_refused_and_its_session_stays_on_record(
    gateway: Gateway,
) -> None:
    half = '{"type":"session.update","session":{"model":"\\ud83d"}}'
    async with talk(gateway) as socket:
        await turn(socket, "hello")
        await socket.send(half)
        assert (await until(socket, "error"))["error"]["type"] == "invalid_request_error"
    async with talk(gateway, LIVE) as socket:
        await send(socket, setup={"model": f"models/{MODEL}"})
        assert "setupComplete" in orjson.loads(await socket.recv())
        await socket.send('{"\\ud83d": 1}')
        assert (await closed(socket))[0] == 1007
    async with talk(gateway, LIVE) as socket:
        await socket.send('{"setup":{"model":"models/m","a":"\\ud83d"}}')
        assert (await closed(socket))[0] == 1007
    listed = await rows(gateway, 3)
    assert [row["status"] for row in listed] == ["succeeded", "failed", "failed"]
    await nothing_held(gateway)


def unfinished(size_bytes: int) -> bytes:
    """A message of a client of which the last byte is missing."""
    head = b"\x81\xff" + (size_bytes + 1).to_bytes(8, "big") + bytes(4)
    return head + b"a" * size_bytes


async def test_messages_that_are_not_whole_count_in_what_a_process_holds(
    open_gateway: Opener,
) -> None:
    bounds = {"max_held_bytes": 24_000_000, "max_body_bytes": 20_000_000}
    gateway = await open_gateway(**WITH_KEYS, **bounds)
    acme, other = await key_of(gateway, "acme"), await key_of(gateway, "other")
    bodies = gateway.services.bodies
    async with talk(gateway, headers=acme) as first, talk(gateway, headers=acme) as second:
        first.transport.write(unfinished(14_000_000))
        await wait_until(lambda: bodies.held_bytes >= 14_000_000, 10, "the first is held")
        second.transport.write(unfinished(14_000_000))
        with pytest.raises(ConnectionClosed) as closed:
            await second.recv()
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, "no memory left" in closed.value.rcvd.reason) == (
            1013,
            True,
        )
        async with talk(gateway, headers=other) as third:
            await send(third, **TEXT)
            await until(third, "session.updated")
    await wait_until(lambda: not bodies.held_bytes, 10, "nothing is held any more")
