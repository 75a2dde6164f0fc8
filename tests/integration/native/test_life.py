"""A native call from its admission to its record, whatever ends it."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.gateway import Gateway, Opener
from tests.integration.native.conftest import MODEL
from tests.integration.security.hostile import Hostile, hostile
from tests.waiting import wait_until
from tidegate.http.uvicorn_protocol import Direct
from tidegate.spine.native import NativeExchange

__all__ = ["hostile"]

Ask = Callable[..., Awaitable[tuple[int, Any]]]
BODY = {"contents": [{"parts": [{"text": "Say hello"}]}]}


def url_of(gateway: Gateway, do: str = "generateContent") -> str:
    return f"{gateway.url}/v1beta/models/{MODEL}:{do}"


async def test_bytes_go_through_as_they_are_and_everything_is_recorded(gateway: Gateway) -> None:
    raw = b'{"contents" :[{"parts":[{"text":"Say hello"}]}], "fieldOfNextYear": 1.10}'
    headers = {"Content-Type": "application/json", "x-tidegate-subject": "user-7"}
    async with gateway.http.post(url_of(gateway), data=raw, headers=headers) as response:
        answer = await response.read()
        assert response.status == 200
        request_id = response.headers["x-tidegate-request-id"]
        assert float(response.headers["x-tidegate-queue-ms"]) >= 0
        assert response.headers["x-tidegate-upstream"] == "gemini"
    row = await gateway.audit(request_id)
    assert row["request"] == raw.decode()
    assert row["response"] == answer.decode()
    usage = json.loads(answer)["usageMetadata"]
    assert row["input_tokens"] == usage["promptTokenCount"]
    assert row["output_tokens"] == usage["candidatesTokenCount"]
    assert (row["source"], row["status"], row["http_status"]) == ("relay", "succeeded", 200)
    assert (row["kind"], row["model"], row["subject"]) == ("text_only", MODEL, "user-7")
    record = await gateway.status(request_id)
    assert (record["source"], record["status"]) == ("relay", "succeeded")
    assert record["usage"]["output_tokens"] == usage["candidatesTokenCount"]


async def test_a_call_leaves_nothing_for_the_garbage_collector_to_find(gateway: Gateway) -> None:
    """Objects that hold one another stay until it looks: that is a tenth of what a call costs."""

    async def one() -> None:
        async with gateway.http.post(url_of(gateway), json=BODY) as response:
            await response.read()

    await one()
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(8):
            await one()
        await wait_until(lambda: gateway.held == 0)
        gc.collect()
        rooms = (
            "tidegate.http.",
            "tidegate.spine.native.",
            "tidegate.limiter.",
            "tidegate.upstream.transport",
        )
        left = [one for one in gc.garbage if type(one).__module__.startswith(rooms)]
        assert len(left) < 8, left  # what is done once a second may leave some
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


async def test_the_limit_holds_and_those_over_it_wait(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 3})
    await gateway.upstream.set_behaviour(first_byte_ms=150)

    async def one() -> int:
        async with gateway.http.post(url_of(gateway), json=BODY) as response:
            await response.read()
            return response.status

    assert set(await asyncio.gather(*(one() for _ in range(20)))) == {200}
    stats = await gateway.upstream.stats()
    assert stats.max_in_flight == 3
    assert gateway.held == 0


async def test_a_wait_that_is_too_long_is_told_with_a_time(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1})
    await gateway.upstream.set_fault("hang", match="hold it")
    held = {"contents": [{"parts": [{"text": "hold it"}]}]}
    holding = asyncio.create_task(gateway.http.post(url_of(gateway), json=held))
    await gateway.in_flight(1)
    headers = {"x-tidegate-deadline-ms": "50"}
    async with gateway.http.post(url_of(gateway), json=BODY, headers=headers) as response:
        body = await response.json()
        assert (response.status, body["error"]["status"]) == (429, "RESOURCE_EXHAUSTED")
        assert int(response.headers["Retry-After"]) >= 1
        request_id = response.headers["x-tidegate-request-id"]
    assert any(one["@type"].endswith("RetryInfo") for one in body["error"]["details"])
    row = await gateway.audit(request_id)
    assert row["status"] == "expired"
    assert row["queue_ms"] >= 50, "all of its wait, though it was never admitted"
    holding.cancel()


@pytest.mark.parametrize("do", ["generateContent", "streamGenerateContent?alt=sse"])
async def test_a_call_whose_lease_is_found_lost_after_its_whole_answer_has_succeeded(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, do: str
) -> None:
    """As in a process that stood still while the last bytes went out."""
    settle, lost = NativeExchange.settle, asyncio.Event()
    lease = gateway.services.limiter._session.lease

    def lose(exchange: NativeExchange, *args: Any, **named: Any) -> Any:
        lease._confirmed_ms = float("-inf")
        lost.set()
        return settle(exchange, *args, **named)

    monkeypatch.setattr(NativeExchange, "settle", lose)
    async with gateway.http.post(url_of(gateway, do), json=BODY) as response:
        assert response.status == 200
        await response.read()
        request_id = response.headers["x-tidegate-request-id"]
    row = await gateway.audit(request_id)
    assert lost.is_set()
    assert (row["status"], row["failure"]) == ("succeeded", None)
    assert row["output_tokens"]


@pytest.mark.parametrize("do", ["generateContent", "streamGenerateContent?alt=sse"])
async def test_a_client_that_leaves_frees_the_permit_and_the_provider(
    open_gateway: Opener, do: str
) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1})
    await gateway.upstream.set_behaviour(chunks=50, between_ms=50, first_byte_ms=200)
    async with aiohttp.ClientSession() as leaving:
        task = asyncio.create_task(leaving.post(url_of(gateway, do), json=BODY))
        await gateway.in_flight(1)
        task.cancel()
    await gateway.in_flight(0)
    await wait_until(lambda: gateway.held == 0, 20, "the permit back")
    assert [call.outcome for call in await gateway.calls()] == ["client_gone"]
    rows = await wait_until(
        lambda: gateway.database.fetch("SELECT * FROM audit WHERE source = 'relay'"), 20
    )
    assert [row["status"] for row in rows] == ["cancelled"]


async def test_a_client_that_closes_its_sending_side_counts_as_one_that_has_left(
    open_gateway: Opener,
) -> None:
    """The end of its bytes is all that the network tells of a client that has left."""
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1})
    await gateway.upstream.set_behaviour(first_byte_ms=60_000)
    body = json.dumps(BODY).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(gateway.url).port)
    head = f"POST {url_of(gateway)} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\nContent-Type: application/json\r\n\r\n" + body)
    await gateway.in_flight(1)
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()
    await wait_until(lambda: gateway.held == 0, 20, "the permit back")
    assert [call.outcome for call in await gateway.calls()] == ["client_gone"]
    rows = await wait_until(
        lambda: gateway.database.fetch("SELECT * FROM audit WHERE source = 'relay'"), 20
    )
    assert [(row["status"], json.loads(row["failure"])["code"]) for row in rows] == [
        ("cancelled", "client_left")
    ]


async def test_a_client_that_leaves_in_the_queue_leaves_nothing(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1})
    await gateway.upstream.set_fault("hang", match="hello")
    holding = asyncio.create_task(gateway.http.post(url_of(gateway), json=BODY))
    await gateway.in_flight(1)
    async with aiohttp.ClientSession() as leaving:
        task = asyncio.create_task(leaving.post(url_of(gateway), json=BODY))
        await wait_until(lambda: gateway.waiting == 1)
        task.cancel()
    await wait_until(lambda: gateway.waiting == 0, 20, "an empty queue")
    holding.cancel()
    await wait_until(lambda: gateway.held == 0, 20, "the permit back")


@pytest.mark.parametrize("end", ["client", "process"])
async def test_a_call_is_on_record_whose_client_leaves_while_its_failure_is_sent(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """As one that has stopped reading: what is sent to it waits until it is cut off."""
    sending = asyncio.Event()

    async def wait(direct: Direct, *args: Any) -> None:
        sending.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Direct, "whole", wait)
    await gateway.upstream.set_fault("forbidden")
    async with aiohttp.ClientSession() as leaving:
        task = asyncio.create_task(leaving.post(url_of(gateway), json=BODY))
        await sending.wait()
        if end == "process":
            (front,) = gateway.services.streams
            front.cancel()
            with pytest.raises(aiohttp.ClientError):
                await task
        task.cancel()
    rows = await wait_until(
        lambda: gateway.database.fetch("SELECT * FROM audit WHERE source = 'relay'"), 20
    )
    assert [row["status"] for row in rows] == ["failed"]
    assert json.loads(rows[0]["failure"])["code"] == "upstream_unauthorized"


async def test_a_call_with_an_error_that_nobody_foresaw_is_on_record(
    gateway: Gateway, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(exchange: NativeExchange, *args: Any, **named: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(NativeExchange, "settle", fails)
    status, _ = await ask("Say hello", "streamGenerateContent")
    rows = await wait_until(
        lambda: gateway.database.fetch("SELECT * FROM audit WHERE source = 'relay'"), 20
    )
    assert [row["status"] for row in rows] == ["failed"]
    assert (status, gateway.held) == (200, 0), "its answer had come"


async def test_a_thousand_random_leavers_leak_nothing(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 5})
    await gateway.upstream.set_behaviour(first_byte_ms=5, chunks=3, between_ms=5)

    async def one(number: int) -> None:
        do = "generateContent" if number % 2 else "streamGenerateContent?alt=sse"
        try:
            async with (
                asyncio.timeout(number % 29 / 1000 + 0.001),
                aiohttp.ClientSession() as session,
                session.post(url_of(gateway, do), json=BODY) as response,
            ):
                await response.read()
        except (TimeoutError, aiohttp.ClientError):
            return

    for begin in range(0, 1000, 100):
        await asyncio.gather(*(one(number) for number in range(begin, begin + 100)))
    await wait_until(lambda: gateway.held == gateway.waiting == 0, 20, "nothing held or waiting")
    await gateway.in_flight(0)
    assert (await gateway.upstream.stats()).max_in_flight <= 5


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"x-tidegate-deadline-ms": "soon"}, "x-tidegate-deadline-ms"),
        ({"x-tidegate-deadline-ms": "0"}, "x-tidegate-deadline-ms"),
        ({"x-tidegate-priority": "101"}, "x-tidegate-priority"),
        ({"x-tidegate-subject": "x" * 201}, "x-tidegate-subject"),
    ],
)
async def test_a_wrong_header_is_named(gateway: Gateway, headers: Any, field: str) -> None:
    async with gateway.http.post(url_of(gateway), json=BODY, headers=headers) as response:
        body = await response.json()
    assert response.status == 400
    assert field in body["error"]["message"]
    assert await gateway.calls() == []


async def test_a_priority_comes_first(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1})
    await gateway.upstream.set_fault("hang", match="first")

    async def one(text: str, priority: str) -> None:
        body = {"contents": [{"parts": [{"text": text}]}]}
        headers = {"x-tidegate-priority": priority}
        async with gateway.http.post(url_of(gateway), json=body, headers=headers) as response:
            assert response.status == 200

    async def two_wait() -> bool:  # in Valkey, which chooses
        queues = (await gateway.services.limiter.snapshot()).queues
        return sum(queue.waiting for queue in queues) == 2

    first = asyncio.create_task(one("first", "0"))
    await gateway.in_flight(1)
    tasks = [asyncio.create_task(one("later", "-50")), asyncio.create_task(one("soon", "50"))]
    await wait_until(two_wait)
    first.cancel()
    await asyncio.gather(*tasks)
    assert [call.prompt for call in await gateway.calls()] == ["first", "soon", "later"]


async def test_with_postgresql_away_calls_go_on_and_are_recorded_later(
    gateway: Gateway, ask: Ask
) -> None:
    await gateway.database.execute("ALTER TABLE audit RENAME TO audit_away")
    status, _ = await ask("Say hello")
    assert status == 200
    await gateway.database.execute("ALTER TABLE audit_away RENAME TO audit")
    rows = await wait_until(
        lambda: gateway.database.fetch("SELECT * FROM audit WHERE source = 'relay'"),
        15,
        "the record of what was answered meanwhile",
    )
    assert len(rows) == 1


async def test_the_answer_says_what_is_left(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 7})

    async def left() -> str:
        async with gateway.http.post(url_of(gateway), json=BODY) as response:
            return response.headers.get("x-tidegate-remaining", "")

    found = await wait_until(left, 20, "what is left")
    limit, _, number = found.partition("=")
    assert limit == "kind:text_only"
    assert 5 <= int(number) <= 7


async def test_comments_keep_a_waiting_stream_alive(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1}, keep_alive_after_ms=30)
    await gateway.upstream.set_fault("hang", match="hold it", count=1)
    held = {"contents": [{"parts": [{"text": "hold it"}]}]}
    holding = asyncio.create_task(gateway.http.post(url_of(gateway), json=held))
    await gateway.in_flight(1)
    said = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    async with gateway.http.post(f"{gateway.url}/v1/chat/completions", json=said) as response:
        assert response.status == 200
        assert (await response.content.readline()).startswith(b": waiting")
        holding.cancel()
        rest = await response.read()
    assert rest.count(b"data: {") > 4
    assert b"error" not in rest


@pytest.mark.parametrize("coding", ["gzip", "br"])
async def test_what_is_packed_unasked_after_a_comment_is_unpacked_or_said(
    open_gateway: Opener, hostile: Hostile, coding: str
) -> None:
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url, keep_alive_after_ms=20)
    event = b'data: {"candidates": [{"content": {"parts": [{"text": "Hi"}]}}]}\n\n'
    packed, may_answer = gzip.compress(event * 3), asyncio.Event()

    async def late(writer: asyncio.StreamWriter) -> None:
        await may_answer.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
        writer.write(b"content-encoding: %b\r\n\r\n" % coding.encode())
        writer.write(packed[:30])
        await writer.drain()
        writer.write(packed[30:])

    hostile.answer = late
    stream = url_of(gateway, "streamGenerateContent?alt=sse")
    async with gateway.http.post(stream, json=BODY) as response:
        assert await response.content.readline() == b"\n"
        may_answer.set()
        events = [line for line in (await response.read()).splitlines() if line.startswith(b"data")]
    if coding == "gzip":
        assert events == [event.strip()] * 3
    else:
        assert json.loads(events[0].removeprefix(b"data: "))["error"]["code"] == 502
        assert len(events) == len(hostile.seen) == 1, "it is not paid for again"


async def test_a_refusal_after_a_comment_is_an_event(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1}, keep_alive_after_ms=20)
    await gateway.upstream.set_fault("hang", match="hold it", count=1)
    held = {"contents": [{"parts": [{"text": "hold it"}]}]}
    holding = asyncio.create_task(gateway.http.post(url_of(gateway), json=held))
    await gateway.in_flight(1)
    stream = url_of(gateway, "streamGenerateContent?alt=sse")
    headers = {"x-tidegate-deadline-ms": "1500"}
    async with gateway.http.post(stream, json=BODY, headers=headers) as response:
        seen = await response.read()
        assert response.status == 200
    last = seen.decode().strip().rpartition("data: ")[2]
    assert json.loads(last)["error"]["status"] == "RESOURCE_EXHAUSTED"
    holding.cancel()


async def next_place(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The next comment of a waiting stream."""
    line = b"\n"
    while line == b"\n":  # comments are events, which end with an empty line
        line = await response.content.readline()
    assert line.startswith(b": wait {")
    place: dict[str, Any] = json.loads(line.removeprefix(b": wait "))
    return place


@pytest.mark.parametrize("others", ["", '"rpm:total" = 600\n"itpm:total" = 1_000_000\n'])
async def test_a_stream_shows_its_place_where_the_client_asks(
    open_gateway: Opener, tmp_path: Path, others: str
) -> None:
    """However many other limits apply to its call."""
    policy = tmp_path / "policy.toml"
    policy.write_text(f'[limits]\n"kind:text_only" = 1\n{others}')
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    await gateway.upstream.set_fault("hang", match="hold it", count=1)
    held = {"contents": [{"parts": [{"text": "hold it"}]}]}
    holding = asyncio.create_task(gateway.http.post(url_of(gateway), json=held))
    await gateway.in_flight(1)
    headers = {"x-tidegate-show-wait": "1"}
    said = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    native = gateway.http.post(f"{gateway.url}/v1/chat/completions", json=said, headers=headers)
    own = gateway.http.post(f"{gateway.url}/stream", json={"data": "Hi"}, headers=headers)
    async with native as first, own as second:
        assert (first.status, second.status) == (200, 200)
        for response in (first, second):
            shown = await next_place(response)
            while shown == {"limit": None}:  # Valkey does not know the call yet
                shown = await next_place(response)
            assert shown["limit"] == "kind:text_only"
            assert shown["ahead"] in (0, 1)
            assert shown["wait_ms"] > 0
        holding.cancel()
        rest, answer = await first.read(), await second.read()
    assert rest.count(b"data: {") > 4
    assert b"error" not in rest
    assert b"event: done" in answer


async def test_a_stream_that_waits_for_its_provider_alone_shows_nothing(
    open_gateway: Opener,
) -> None:
    """Its head is the provider's, whose refusal would be a real one."""
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_behaviour(first_byte_ms={"*": 2_500})
    said = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    headers = {"x-tidegate-show-wait": "1"}
    url = f"{gateway.url}/v1/chat/completions"
    async with gateway.http.post(url, json=said, headers=headers) as response:
        assert "x-tidegate-upstream" in response.headers
        assert (await response.read()).startswith(b"data: {")


async def test_a_stream_shows_nothing_where_nobody_asks(open_gateway: Opener) -> None:
    """What is refused after it has waited is a real refusal."""
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1})
    await gateway.upstream.set_fault("hang", match="hold it", count=1)
    held = {"contents": [{"parts": [{"text": "hold it"}]}]}
    holding = asyncio.create_task(gateway.http.post(url_of(gateway), json=held))
    await gateway.in_flight(1)
    said = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    for value, status in (("0", 429), ("yes", 400)):
        headers = {"x-tidegate-deadline-ms": "1200", "x-tidegate-show-wait": value}
        url = f"{gateway.url}/v1/chat/completions"
        async with gateway.http.post(url, json=said, headers=headers) as response:
            error = (await response.json())["error"]
        assert response.status == status
        if status == 429:
            assert error["is_estimate"]
            assert "which is an estimate" in error["message"]
        else:
            assert error["param"] == "x-tidegate-show-wait"
    holding.cancel()


async def test_health_shows_the_upstreams(gateway: Gateway) -> None:
    _, body = await gateway.get("/health/dependencies")
    assert body["upstreams"] == {"gemini": {"status": "ok", "key_refused": False, "detail": None}}


async def test_native_calls_are_listed_among_the_others(gateway: Gateway, ask: Ask) -> None:
    first = await gateway.submit(data="Explain the tide")
    assert (await ask("Say hello"))[0] == 200
    last = await gateway.submit(data="Explain the ebb")

    async def listed() -> list[dict[str, Any]] | None:
        found: list[dict[str, Any]] = []
        after = ""
        while True:
            _, page = await gateway.get(f"/requests?limit=2{after}")
            found += page["items"]
            if "next_cursor" not in page:
                return found if len(found) == 3 else None
            after = f"&cursor={page['next_cursor']}"

    items = await wait_until(listed, 20, "three requests")
    assert [item["source"] for item in items] == ["job", "relay", "job"]
    assert (items[0]["request_id"], items[2]["request_id"]) == (last, first)
    _, only = await gateway.get("/requests?source=relay&type=text_only")
    assert [item["request_id"] for item in only["items"]] == [items[1]["request_id"]]
    assert (await gateway.get(items[1]["status_url"]))[0] == 200


async def test_a_record_that_cannot_keep_up_holds_nobody_for_ever(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    monkeypatch.setattr("tidegate.store.audit.MAX_WAITING", 0)
    status, body = await ask("Say hello", **{"x-tidegate-deadline-ms": "50"})
    assert (status, body["error"]["status"]) == (503, "UNAVAILABLE")
    assert await gateway.calls() == []


async def test_what_a_process_holds_of_bodies_is_bounded(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, max_body_bytes=300_000, max_held_bytes=400_000)
    bodies = gateway.services.bodies
    await gateway.upstream.set_fault("hang", match="hold it", count=1)

    async def ask(text: str) -> tuple[int, str]:
        body = {"contents": [{"parts": [{"text": text + " " + "x" * 250_000}]}]}
        async with gateway.http.post(url_of(gateway), json=body) as response:
            return response.status, response.headers.get("retry-after", "")

    holding = asyncio.create_task(ask("hold it"))
    await gateway.in_flight(1)
    assert bodies.held_bytes > 250_000
    assert await ask("too much") == (429, "1")
    async with gateway.http.post(url_of(gateway), json=BODY) as response:  # a small one
        assert response.status == 200
    holding.cancel()
    await wait_until(lambda: bodies.held_bytes == 0, 20, "what the first one held is free")
    assert (await ask("now it fits"))[0] == 200
    assert bodies.held_bytes == 0


async def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, max_body_bytes=200_000)
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += "Content-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: 200001\r\n\r\n{{".encode())
    async with asyncio.timeout(10):  # the rest never comes: silence would be a 408 after 15 s
        status = await reader.readline()
        assert b" 413 " in status
        assert b"at most 200000 bytes" in await reader.read()
    writer.close()


async def test_a_stop_refuses_calls_that_wait_and_lets_those_under_way_end(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1})
    await gateway.upstream.set_behaviour(first_byte_ms=2_000)

    async def one() -> tuple[int, str, Any]:
        async with gateway.http.post(url_of(gateway), json=BODY) as response:
            return response.status, response.headers.get("Retry-After", ""), await response.json()

    under_way = asyncio.create_task(one())
    await gateway.in_flight(1)
    waiting = asyncio.create_task(one())
    streaming = asyncio.create_task(gateway.stream(text="Explain the tide"))
    await wait_until(lambda: gateway.waiting == 2, 20)
    gateway.services.reject_waiters()
    status, retry_after, body = await waiting
    assert (status, retry_after, body["error"]["status"]) == (503, "1", "UNAVAILABLE")
    streamed = await streaming
    assert (streamed.status, streamed.problem["code"]) == (503, "shutting_down")
    assert (await one())[0] == 503  # on a connection that was open before
    assert (await under_way)[0] == 200
    assert gateway.held == 0
    assert len(await gateway.calls()) == 1
