"""`Idempotency-Key` on native paths."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import orjson
import pytest

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until, work_for
from tidegate import record as call_record
from tidegate.http import idempotency as once

BODY = {"model": "m", "messages": [{"role": "user", "content": "Say hello"}]}
REPLAYED, LOST = "idempotency-replayed", "idempotency-lost"


async def ask(gateway: Gateway, key: str, **changes: Any) -> tuple[int, dict[str, str], bytes]:
    url = f"{gateway.url}/v1/chat/completions"
    headers = {"Idempotency-Key": key}
    async with gateway.http.post(url, json=BODY | changes, headers=headers) as response:
        body = await response.read()
        return response.status, {k.lower(): v for k, v in response.headers.items()}, body


async def served(gateway: Gateway, key: str) -> tuple[int, dict[str, str], bytes]:
    """As SDKs do: a busy PostgreSQL is a 503, and asked again after a while."""
    while (answer := await ask(gateway, key))[0] == 503:
        await work_for(0.2)
    return answer


async def test_a_hundred_at_once_are_one_call(open_gateway: Opener) -> None:
    one, two = await open_gateway(worker=False), await open_gateway(worker=False)
    for gateway in (one, two):
        await gateway.upstream.set_behaviour(first_byte_ms=200)
    answers = await asyncio.gather(
        *(served(gateway, "k-1") for _ in range(50) for gateway in (one, two))
    )
    assert {status for status, _, _ in answers} == {200}
    assert len({body for _, _, body in answers}) == 1
    assert len({headers["x-tidegate-request-id"] for _, headers, _ in answers}) == 1
    assert sum(REPLAYED in headers for _, headers, _ in answers) == 99
    assert len(await one.calls()) + len(await two.calls()) == 1
    # What a busy PostgreSQL refused is on record too.
    answered = "SELECT id FROM audit WHERE status = 'succeeded'"
    rows = await wait_until(lambda: one.database.fetch(answered), 20)
    assert len(rows) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_the_same_again_is_the_same_answer(gateway: Gateway, stream: bool) -> None:
    first = await ask(gateway, "k-2", stream=stream)
    again = await ask(gateway, "k-2", stream=stream)
    assert (first[0], first[2]) == (again[0], again[2])
    assert again[1]["content-type"] == first[1]["content-type"]
    assert b'"choices":[]' not in again[2]
    assert (await ask(gateway, "k-3", stream=stream))[1].get(REPLAYED) is None


async def test_another_request_under_the_key_is_refused(gateway: Gateway) -> None:
    await ask(gateway, "k-4")
    status, _, body = await ask(gateway, "k-4", temperature=1)
    assert status == 409
    assert b"idempotency_conflict" in body


async def test_what_failed_may_be_asked_again(gateway: Gateway) -> None:
    await gateway.upstream.set_fault("unauthorized", count=1)
    assert (await ask(gateway, "k-5"))[0] == 502
    await gateway.services.spine.health["gemini"].open()
    assert (await ask(gateway, "k-5"))[0] == 200


async def test_a_key_that_is_none_is_named(gateway: Gateway) -> None:
    status, _, body = await ask(gateway, "x" * 256)
    assert status == 400
    assert b"Idempotency-Key" in body


GEMINI = {"contents": [{"parts": [{"text": "Say hello"}]}]}
STREAM = "/v1beta/models/gemini-2.5-flash:streamGenerateContent"


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (STREAM, f"{STREAM}?alt=sse"),
        (f"{STREAM}?alt=sse", f"{STREAM}?alt=json"),
        (STREAM, STREAM.replace("flash", "pro")),
        (STREAM, STREAM.replace("streamG", "g")),
        (STREAM, STREAM.replace("v1beta", "v1")),
    ],
)
async def test_the_same_body_elsewhere_is_another_request(
    gateway: Gateway, first: str, other: str
) -> None:
    async def to(target: str) -> tuple[int, bytes, bool]:
        headers = {"Idempotency-Key": "k-6"}
        async with gateway.http.post(
            gateway.url + target, json=GEMINI, headers=headers
        ) as response:
            return response.status, await response.read(), REPLAYED in response.headers

    status, answer, replayed = await to(first)
    assert (status, replayed) == (200, False)
    status, said, _ = await to(other)
    assert status == 409
    assert b"used for a different request" in said
    assert await to(first) == (200, answer, True)


async def test_a_query_asks_the_same_in_any_order_and_with_any_key(gateway: Gateway) -> None:
    answers = []
    for query in ("alt=sse&x=%41", "x=A&alt=sse", "key=of-a-client&x=A&alt=sse"):
        url = f"{gateway.url}{STREAM}?{query}"
        async with gateway.http.post(
            url, json=GEMINI, headers={"Idempotency-Key": "k-7"}
        ) as response:
            answers.append((response.status, await response.read()))
    assert answers[0][0] == 200
    assert answers[1:] == answers[:1] * 2


async def test_who_goes_with_its_whole_answer_has_not_cancelled(gateway: Gateway) -> None:
    """The answer is kept after it has gone out: meanwhile most clients close their connections."""
    await gateway.upstream.set_behaviour(first_byte_ms=200)
    reader, writer = await asyncio.open_connection(*gateway.url.removeprefix("http://").split(":"))
    body = json.dumps(BODY).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: k-8\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    held = "SELECT 1 FROM native_keys FOR UPDATE"
    async with gateway.database.acquire() as other, other.transaction():
        await wait_until(lambda: other.fetch(held), 20, "the key is taken, and held up here")
        told = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", told.lower())
        assert length is not None
        assert await reader.readexactly(int(length[1]))
        writer.close()
        await writer.wait_closed()

        async def lost() -> bool:
            return len(gateway.server.server_state.connections) == 0

        await wait_until(lost, 20, "the connection is lost")
    (row,) = await wait_until(lambda: gateway.database.fetch("SELECT status FROM audit"), 20)
    assert row["status"] == "succeeded"
    assert (await ask(gateway, "k-8"))[1][REPLAYED] == "true"


async def test_a_call_that_was_lost_with_its_process_is_named_by_the_next(gateway: Gateway) -> None:
    """As kill -9 leaves a key: taken, not answered, and renewed by nobody."""
    first = await ask(gateway, "k-10")
    killed = (
        "UPDATE native_keys SET ended_at = NULL, answer = NULL, seen_at = created_at "
        "WHERE ended_at IS NOT NULL RETURNING 1"
    )
    await wait_until(lambda: gateway.database.fetch(killed), 20, "the answer is kept")
    status, headers, _ = await ask(gateway, "k-10")
    assert (status, headers.get(REPLAYED)) == (200, None)
    assert headers[LOST] == first[1]["x-tidegate-request-id"]
    assert len(await gateway.calls()) == 2
    again = await ask(gateway, "k-10")
    assert again[1][REPLAYED] == "true"
    assert LOST not in again[1]


async def test_who_asks_beside_a_call_under_way_is_told_when_to_come_back(gateway: Gateway) -> None:
    await gateway.upstream.set_behaviour(first_byte_ms=2_500)
    first = asyncio.create_task(ask(gateway, "k-11"))
    await gateway.in_flight(1)
    url, headers = f"{gateway.url}/v1/chat/completions", {"Idempotency-Key": "k-11"}
    soon = headers | {"x-tidegate-deadline-ms": "10"}
    async with gateway.http.post(url, json=BODY, headers=soon) as response:
        assert (response.status, response.headers["retry-after"]) == (409, "1")
        assert b"still in progress" in await response.read()
    # Longer than a lease: a call that lives keeps its key.
    status, kept, _ = await ask(gateway, "k-11")
    assert (status, kept[REPLAYED], (await first)[0]) == (200, "true", 200)
    assert len(await gateway.calls()) == 1


async def test_an_answer_too_long_to_be_kept_is_not_given_in_parts(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (call_record, once):
        monkeypatch.setattr(module, "KEPT_BYTES", 100)
    first = await ask(gateway, "k-9")
    again = await ask(gateway, "k-9")
    assert (first[0], again[0]) == (200, 200)
    assert REPLAYED not in again[1]
    assert len(await gateway.calls()) == 2
    assert orjson.loads(again[2])["choices"] == orjson.loads(first[2])["choices"]
