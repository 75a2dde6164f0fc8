"""An upstream that is out for seconds: no job or line fails, and nothing hammers it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from openai import AsyncOpenAI

from tests.batching import assert_all_succeeded, begin, completed, content, end_of
from tests.gateway import Gateway, Opener
from tests.waiting import wait_until
from tidegate.spine.routing import FAULTS

MODEL = "gemini-2.5-flash"
CHAT = "/v1/chat/completions"
EACH = 20
LINES = 40
LIMIT = 4
COUNTED = "SELECT (SELECT sum(attempts) FROM requests) + (SELECT sum(attempts) FROM batch_lines)"
HELD_UP = "SELECT count(*) FROM requests WHERE status = 'queued' AND not_before IS NOT NULL"


def chat(text: str) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}]}


async def hand_in(gateway: Gateway) -> list[str]:
    return await asyncio.gather(
        *(gateway.submit(data=f"Say word{n}.", type="text_only") for n in range(EACH)),
        *(gateway.submit(endpoint=CHAT, body=chat(f"Say word{n}.")) for n in range(EACH)),
    )


async def next_call(gateway: Gateway) -> None:
    before = len(await gateway.calls())

    async def came() -> bool:
        return len(await gateway.calls()) > before

    await wait_until(came)


@pytest.fixture
async def sdk() -> AsyncIterator[list[AsyncOpenAI]]:
    made: list[AsyncOpenAI] = []
    yield made
    for client in made:
        await client.close()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["unavailable", "throttled_bare"])
async def test_jobs_and_lines_outlast_an_outage(
    open_gateway: Opener, sdk: list[AsyncOpenAI], fault: str
) -> None:
    gateway = await open_gateway(rate_limits={"text_only": LIMIT}, max_attempts=2, worker=False)
    sdk.append(AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="of-a-client", max_retries=0))
    await gateway.upstream.set_fault(fault)
    ids = await hand_in(gateway)
    batch = await begin(sdk[0], content(LINES))
    gateway.start_worker()
    for _ in range(3):
        await next_call(gateway)
    assert len(await gateway.calls()) <= 4 * LIMIT, "probes, and what was called when it began"
    assert not await completed(sdk[0], batch)
    assert await gateway.database.fetchval("SELECT max(attempts) FROM requests") <= 1
    await gateway.upstream.clear_faults()
    records = [await gateway.end_of(request_id, 60) for request_id in ids]
    assert {(one["status"], one["attempts"]) for one in records} == {("succeeded", 1)}
    await assert_all_succeeded(sdk[0], await end_of(sdk[0], batch, 60), LINES)


@pytest.mark.parametrize("head", ["403 Forbidden", "404 Not Found", "302 Found"])
async def test_jobs_outlast_another_server_in_the_providers_place(
    open_gateway: Opener, head: str
) -> None:
    """Such as a balancer's while the servers behind it are replaced."""
    page, calls = b"404 page not found", list[bytes]()
    answer = b"HTTP/1.1 %b\r\nlocation: https://elsewhere/\r\n" % head.encode()
    answer += b"content-length: %d\r\n\r\n%b" % (len(page), page)

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        gateway = await open_gateway(gemini_base_url=f"http://127.0.0.1:{port}", max_attempts=8)
        ids = await hand_in(gateway)
        await wait_until(lambda: gateway.services.spine.health["gemini"].state != "ok")
        seen = len(calls)
        await wait_until(lambda: len(calls) > seen + 1)
        states = {(await gateway.status(one))["status"] for one in ids}
        assert states <= {"queued", "running"}
        await gateway.stop_worker()


@pytest.mark.slow
async def test_a_provider_that_returns_hours_before_it_said_is_used_within_the_minute(
    open_gateway: Opener,
) -> None:
    is_out, calls = True, 0
    away = (
        b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 14400\r\n"
        b"content-type: text/plain\r\ncontent-length: 4\r\n\r\naway"
    )
    message = {"role": "assistant", "content": "Ahoy"}
    body = orjson.dumps(
        {
            "id": "c1",
            "object": "chat.completion",
            "created": 1,
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
        }
    )
    good = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
    good += b"content-length: %d\r\n\r\n%b" % (len(body), body)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        await reader.readuntil(b"\r\n\r\n")
        calls += 1
        writer.write(away if is_out else good)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        gateway = await open_gateway(
            gemini_base_url=f"http://127.0.0.1:{port}",
            rate_limits={"text_only": LIMIT},
            max_attempts=2,
        )
        gateway.start_worker()  # each process has to notice by itself
        submitted = (
            gateway.submit(endpoint=CHAT, body=chat(f"Say word{n}.")) for n in range(6 * EACH)
        )
        ids = await asyncio.gather(*submitted)
        await wait_until(lambda: gateway.services.spine.health["gemini"].state != "ok")
        at_first = calls
        await wait_until(lambda: calls > at_first)
        is_out = False
        async with asyncio.timeout(60):
            ends = [await gateway.end_of(request_id, 60) for request_id in ids]
    assert {one["status"] for one in ends} == {"succeeded"}
    assert calls <= len(ids) + 4 * LIMIT, "probes, and what was called when it began"


@pytest.mark.slow
async def test_faults_that_others_meet_too_use_up_no_attempts(
    open_gateway: Opener, sdk: list[AsyncOpenAI]
) -> None:
    gateway = await open_gateway(rate_limits={"text_only": LIMIT}, worker=False)
    sdk.append(AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="of-a-client", max_retries=0))
    await gateway.upstream.set_fault("internal")
    await hand_in(gateway)
    await begin(sdk[0], content(LINES))
    gateway.start_worker()
    await wait_until(lambda: gateway.services.spine.health["gemini"].state != "ok")
    early = len(await gateway.calls())
    for _ in range(3):
        await next_call(gateway)
    # One of those early ones put it out; the last probe may still be under way.
    assert await gateway.database.fetchval(COUNTED) <= early, "probes cost nobody an attempt"


@pytest.mark.parametrize("fault", ["blocked_prompt", "safety"])
async def test_answers_without_content_put_no_upstream_out(
    open_gateway: Opener, fault: str
) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_fault(fault)
    for number in range(FAULTS + 1):
        refused = await gateway.stream(text=f"Explain tide {number}", type="text_only")
        assert refused.problem["code"] in ("prompt_blocked", "empty_answer")
    assert gateway.services.spine.health["gemini"].state == "ok"


@pytest.mark.parametrize("fault", ["day_quota", "unavailable"])
async def test_jobs_of_a_model_that_is_out_hold_up_no_jobs_of_others(
    open_gateway: Opener, fault: str
) -> None:
    """Nor does a provider that has no capacity for one model, and says 503."""
    gateway = await open_gateway(rate_limits={"text_only": LIMIT}, worker=False)
    await gateway.upstream.set_fault(fault, match="exotic")
    exotic: dict[str, Any] = {
        "endpoint": "/v1beta/models/gemini-exotic:generateContent",
        "body": {"contents": [{"parts": [{"text": "An exotic word"}]}]},
    }
    await asyncio.gather(*(gateway.submit(**exotic) for _ in range(5 * EACH)))
    other = await gateway.submit(endpoint=CHAT, body=chat("Say hello"))
    gateway.start_worker()
    assert (await gateway.end_of(other, 25))["status"] == "succeeded"


async def test_a_refused_key_fails_nothing(open_gateway: Opener) -> None:
    gateway = await open_gateway(rate_limits={"text_only": LIMIT}, worker=False)
    await gateway.upstream.set_fault("unauthorized")
    ids = await hand_in(gateway)
    gateway.start_worker()

    async def held_up() -> bool:
        return bool(await gateway.database.fetchval(HELD_UP))

    await wait_until(held_up)
    statuses = {(await gateway.status(request_id))["status"] for request_id in ids}
    assert statuses <= {"queued", "running"}
    assert len(await gateway.calls()) <= 2 * LIMIT
    await gateway.upstream.clear_faults()
    await gateway.services.spine.health["gemini"].open()  # as a person does who has paid, say
    ends = [await gateway.end_of(request_id, 30) for request_id in ids]
    assert {one["status"] for one in ends} == {"succeeded"}, "half a minute before the next probe"


async def test_a_deadline_bounds_the_wait_for_an_upstream(open_gateway: Opener) -> None:
    gateway = await open_gateway(gemini_base_url="http://127.0.0.1:9")  # nothing listens there
    bound = await gateway.submit(data="Say hello", type="text_only", deadline_ms=1_500)
    free = await gateway.submit(data="Say hello", type="text_only")
    record = await gateway.end_of(bound)
    assert (record["status"], record["error"]["code"]) == ("expired", "deadline_exceeded")

    async def waits_without_a_counted_attempt() -> bool:  # while it is the probe, it runs
        record = await gateway.status(free)
        return (record["status"], record["attempts"]) == ("queued", 0)

    await wait_until(waits_without_a_counted_attempt)
