"""`Idempotency-Key` on native paths."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until

BODY = {"model": "m", "messages": [{"role": "user", "content": "Say hello"}]}
REPLAYED = "idempotency-replayed"


async def ask(gateway: Gateway, key: str, **changes: Any) -> tuple[int, dict[str, str], bytes]:
    url = f"{gateway.url}/v1/chat/completions"
    headers = {"Idempotency-Key": key}
    async with gateway.http.post(url, json=BODY | changes, headers=headers) as response:
        body = await response.read()
        return response.status, {k.lower(): v for k, v in response.headers.items()}, body


async def test_a_hundred_at_once_are_one_call(open_gateway: Opener) -> None:
    one, two = await open_gateway(worker=False), await open_gateway(worker=False)
    for gateway in (one, two):
        await gateway.upstream.set_behaviour(first_byte_ms=200)
    answers = await asyncio.gather(
        *(ask(gateway, "k-1") for _ in range(50) for gateway in (one, two))
    )
    assert {status for status, _, _ in answers} == {200}
    assert len({body for _, _, body in answers}) == 1
    assert len({headers["x-tidegate-request-id"] for _, headers, _ in answers}) == 1
    assert sum(REPLAYED in headers for _, headers, _ in answers) == 99
    assert len(await one.calls()) + len(await two.calls()) == 1
    rows = await wait_until(lambda: one.database.fetch("SELECT id FROM audit"), 5)
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
    gateway.services.relay.health["gemini"].succeeded()
    assert (await ask(gateway, "k-5"))[0] == 200


async def test_a_key_that_is_none_is_named(gateway: Gateway) -> None:
    status, _, body = await ask(gateway, "x" * 256)
    assert status == 400
    assert b"Idempotency-Key" in body
