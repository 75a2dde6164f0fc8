"""What one client provokes, and what one connection's end is taken for, puts no upstream out."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from tests.gateway import Gateway, Opener
from tests.integration.native.conftest import MODEL
from tests.integration.security.hostile import Hostile, hostile, one_try
from tidegate.spine.routing import FAULTS, LONGEST_MS

__all__ = ["hostile", "one_try"]

pytestmark = pytest.mark.usefixtures("one_try")

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


def error(status: int, message: str, *lines: str) -> bytes:
    body = orjson.dumps({"error": {"code": status, "message": message}})
    head = "\r\n".join((f"HTTP/1.1 {status} No", f"content-length: {len(body)}", *lines))
    return head.encode() + b"\r\n\r\n" + body


POISON: dict[str, Any] = {
    "500": error(500, "An internal error has occurred"),
    "504": error(504, "The prompt is too long to be worked on in time"),
    "garbled": b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n{}",
    "nothing": b"",
    "403 on a thing": error(403, "The caller does not have permission"),
    "402 for one call": error(
        402,
        "This request requires more credits, or fewer max_tokens. You requested up to 65536 "
        "tokens, but can only afford 10492.",
    ),
    "401 for a scope": error(401, "Missing scopes: api.model.images.request"),
}


@pytest.fixture
async def gateway(open_gateway: Opener, hostile: Hostile) -> Gateway:
    return await open_gateway(worker=False, gemini_base_url=hostile.url)


async def ask(
    gateway: Gateway, text: str = "poison", deadline_ms: int = 30_000
) -> tuple[int, bytes]:
    url = f"{gateway.url}/v1beta/models/{MODEL}:generateContent"
    body = {"contents": [{"parts": [{"text": text}]}]}
    headers = {"x-tidegate-deadline-ms": str(deadline_ms)}
    async with gateway.http.post(url, json=body, headers=headers) as response:
        return response.status, await response.read()


@pytest.mark.parametrize("name", POISON)
async def test_one_poisonous_request_puts_nothing_out(
    gateway: Gateway, hostile: Hostile, name: str
) -> None:
    hostile.answer = POISON[name]
    for _ in range(FAULTS + 2):
        assert (await ask(gateway))[0] >= 400
    assert gateway.services.spine.health["gemini"].state == "ok"
    hostile.answer = OK
    assert (await ask(gateway, "of another"))[0] == 200


async def test_an_upstream_that_fails_whatever_it_is_asked_is_out(
    gateway: Gateway, hostile: Hostile
) -> None:
    hostile.answer = POISON["500"]
    for number in range(FAULTS):
        assert (await ask(gateway, str(number)))[0] == 500
    assert gateway.services.spine.health["gemini"].state == "out"


async def test_a_403_that_names_no_key_holds_up_others_for_seconds_at_most(
    gateway: Gateway, hostile: Hostile
) -> None:
    hostile.answer = POISON["403 on a thing"]
    for number in range(FAULTS):
        assert (await ask(gateway, str(number)))[0] == 403
    gate = gateway.services.spine.health["gemini"]
    left = gate.closed()
    assert left is not None
    assert left[0] <= LONGEST_MS
    assert not gate.key_dead
    hostile.answer = OK
    assert (await ask(gateway, "of another"))[0] == 200


async def test_one_that_says_it_is_overloaded_is_out_whoever_asks(
    gateway: Gateway, hostile: Hostile
) -> None:
    hostile.answer = error(503, "The model is overloaded")
    for _ in range(FAULTS):
        assert (await ask(gateway))[0] == 503
    assert gateway.services.spine.health["gemini"].state == "out"


@pytest.mark.parametrize(
    ("answer", "short"),
    [
        (error(503, "No room for the letter to Jane"), "the provider answered 503"),
        (
            error(401, "Incorrect API key provided: sk-proj-****abcd."),
            "the provider rejects this gateway's API key",
        ),
    ],
)
async def test_the_provider_s_words_to_one_are_not_told_to_all(
    gateway: Gateway, hostile: Hostile, answer: bytes, short: str
) -> None:
    hostile.answer = answer
    for _ in range(FAULTS):
        await ask(gateway)
    status, body = 0, b""
    while b"last failure" not in body:  # else it was the one call a second that tries
        status, body = await ask(gateway, "of another", deadline_ms=100)
    assert status == 503
    assert orjson.loads(body)["error"]["message"].endswith(f"the last failure: {short}")
    async with gateway.http.get(f"{gateway.url}/health/dependencies") as response:
        assert (await response.json())["upstreams"]["gemini"]["detail"] == short
    why = gateway.services.spine.health["gemini"].why  # for who runs this
    assert "Jane" in why or "Incorrect API key provided: ***" in why
    assert "abcd" not in why


async def test_a_403_on_a_thing_is_told_in_the_providers_words(
    gateway: Gateway, hostile: Hostile
) -> None:
    hostile.answer = POISON["403 on a thing"]
    status, body = await ask(gateway)
    assert (status, b"does not have permission" in body) == (403, True)


async def test_a_kept_connection_that_was_closed_costs_neither_a_try_nor_health(
    gateway: Gateway, hostile: Hostile
) -> None:
    closes: asyncio.Event = asyncio.Event()

    async def once(writer: asyncio.StreamWriter) -> None:
        if not closes.is_set():  # the answer after which it hangs up without a word
            closes.set()
            return
        writer.write(OK)
        await writer.drain()

    assert (await ask(gateway))[0] == 200  # and its connection is kept
    hostile.answer = once
    before = gateway.services.spine.retries.saved
    url = f"{gateway.url}/v1beta/models/{MODEL}:generateContent"
    body = {"contents": [{"parts": [{"text": "hello"}]}]}
    async with gateway.http.post(url, json=body) as response:
        assert response.status == 200
        request_id = response.headers["x-tidegate-request-id"]
    assert len(hostile.seen) == 3, "it was sent twice"
    assert (await gateway.audit(request_id))["attempts"] == 1
    assert gateway.services.spine.retries.saved >= before
    assert gateway.services.spine.health["gemini"].faults == 0


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (
            error(401, "API key not valid: AIzaSyThisIsOnlyAnExampleOfAKey0"),
            "UPSTREAM_UNAUTHORIZED",
        ),
        (error(402, "Insufficient Balance of account 4711"), "UPSTREAM_UNPAID"),
        (error(429, "Your credit balance is too low"), "UPSTREAM_UNPAID"),
    ],
)
async def test_an_account_without_money_is_no_refused_key(
    gateway: Gateway, hostile: Hostile, answer: bytes, code: str
) -> None:
    hostile.answer = answer
    status, body = await ask(gateway)
    assert status == 502
    assert orjson.loads(body)["error"]["details"][0]["reason"] == code
    assert b"4711" not in body  # the provider's words concern the gateway's account
    assert b"credit balance" not in body
