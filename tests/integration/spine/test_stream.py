"""`POST /stream` that goes well: order, content, pictures, admission and what is recorded."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import pytest

from tests.gateway import PNG, Gateway, Opener, read_stream
from tests.waiting import promised_s, wait_until
from tidegate.record import CallRecord
from tidegate.store.audit import AuditLog
from tidegate.store.records import NewJob


async def test_events_come_in_order_and_hold_what_the_provider_sent(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    answer = "Grüße, “quoted”\nand a second line,  two  spaces \U0001f30a end."
    await gateway.upstream.set_behaviour(answer=answer, chunks=5)
    streamed = await gateway.stream(text="Explain the tide")
    assert (streamed.status, streamed.ended) == (200, True)
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert streamed.headers["x-tidegate-type"] == "text_only"
    assert streamed.names == ["delta"] * 5 + ["usage", "done"]
    assert streamed.text == answer
    usage, done = streamed.events[-2][1], streamed.events[-1][1]
    assert usage["output_tokens"] == len(answer.split())
    assert usage["cached_tokens"] is None
    assert (done["status"], done["type"], done["finish_reason"]) == (
        *("succeeded", "text_only", "STOP"),
    )
    assert done["request_id"] == streamed.request_id
    assert [call.method for call in await gateway.calls()] == ["stream"]


async def test_plain_text_is_the_answer_alone(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_behaviour(answer="One two three four five.")
    plain = await gateway.stream(text="Explain the tide", accept="text/plain")
    assert plain.headers["content-type"] == "text/plain; charset=utf-8"
    assert (plain.raw, plain.ended) == (b"One two three four five.", True)
    both = await gateway.stream(text="Explain", accept="text/event-stream, text/plain;q=0.5")
    assert both.names[-1] == "done"


async def test_a_file_can_be_streamed_about(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    streamed = await gateway.stream(text="Describe this picture", file=PNG)
    assert streamed.headers["x-tidegate-type"] == "multi_modal"
    assert f"image/png ({len(PNG)} bytes)" in streamed.text
    record = await gateway.status(streamed.request_id)
    (upload,) = record["files"]
    async with gateway.http.get(gateway.url + upload["url"]) as response:
        assert await response.read() == PNG


async def test_the_head_goes_out_after_admission_and_before_the_first_byte(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_fault("slow_first_token", delay_ms=800)
    started = time.monotonic()
    async with gateway.open_stream(text="Explain the tide") as response:
        assert response.status == 200
        # A head can only come while the call is open and has sent nothing.
        await gateway.in_flight(1)
        assert gateway.held == 1
        streamed = await read_stream(response)
    assert streamed.names[-1] == "done"
    assert time.monotonic() - started >= 0.8


async def test_no_head_goes_out_while_the_stream_waits_for_its_turn(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1})
    await gateway.upstream.set_behaviour(first_byte_ms=20_000)
    async with gateway.open_stream(text="Explain first"):
        await gateway.in_flight(1)
        await gateway.upstream.set_behaviour(first_byte_ms=0)
        second = asyncio.create_task(gateway.stream(text="Explain second"))
        await wait_until(lambda: gateway.waiting == 1, 20)
        assert len(await gateway.calls("second")) == 0
        assert not second.done()
    streamed = await second
    assert streamed.names[-1] == "done"
    first_call, second_call = await gateway.calls()
    assert first_call.ended_ns is not None
    assert second_call.started_ns >= first_call.ended_ns


async def test_streams_and_jobs_queue_in_order_of_arrival(open_gateway: Opener) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 1})
    await gateway.upstream.set_behaviour(first_byte_ms=1500)
    running = asyncio.create_task(gateway.stream(text="Explain running"))
    await gateway.in_flight(1)
    await gateway.upstream.set_behaviour(first_byte_ms=0)
    tasks = []
    for number in range(3):
        tasks.append(asyncio.create_task(gateway.stream(text=f"Explain stream {number}")))
        await _asked_for(gateway, 2 * number + 2)
        await gateway.submit(data=f"Explain job {number}")
        await _asked_for(gateway, 2 * number + 3)
    await asyncio.gather(running, *tasks)

    async def all_called() -> bool:
        return len(await gateway.calls()) == 7

    await wait_until(all_called, 20)
    prompts = [call.prompt.removeprefix("Explain ") for call in await gateway.calls()]
    assert prompts == [
        *("running", "stream 0", "job 0", "stream 1", "job 1", "stream 2", "job 2"),
    ]


async def _asked_for(gateway: Gateway, count: int) -> None:
    """Wait until so many requests have come to the limiter, those that are through included."""

    async def reached() -> bool:
        snapshot = await gateway.services.limiter.snapshot()
        arrived = (await gateway.upstream.stats())["text_only"].arrived
        return arrived + snapshot.limits["kind:text_only"].waiting >= count

    await wait_until(reached, 20, f"{count} requests at the limiter")


async def test_a_picture_can_be_fetched_as_soon_as_its_stream_is_done(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    for prefix in ("", "/llm"):
        streamed = await gateway.stream(prefix=prefix, text="Generate an image of a fox")
        assert streamed.names == ["delta", "image", "usage", "done"]
        image = dict(streamed.events)["image"]
        assert image["url"].startswith(f"{prefix}/files/")
        async with gateway.http.get(gateway.url + image["url"]) as response:
            data = await response.read()
            assert (response.status, response.content_type) == (200, "image/png")
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert data.endswith(b"IEND\xaeB`\x82")
        assert len(data) == image["size_bytes"]
        record = await gateway.status(streamed.request_id)
        assert [one["url"] for one in record["images"]] == [image["url"].removeprefix("/llm")]


async def test_a_stream_is_done_after_a_second_though_its_record_is_late(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    written = asyncio.Event()
    record_stream = AuditLog.record_stream

    async def late(store: AuditLog, job: NewJob, record: CallRecord) -> None:
        async def write() -> None:
            await written.wait()
            await record_stream(store, job, record)

        writing.append(asyncio.create_task(write()))

    writing: list[asyncio.Task[None]] = []
    monkeypatch.setattr(AuditLog, "record_stream", late)
    started = time.monotonic()
    streamed = await gateway.stream(text="Generate an image of a fox")
    assert streamed.names[-1] == "done"
    assert 0.9 <= time.monotonic() - started < promised_s(4)
    written.set()
    await asyncio.gather(*writing)
    assert (await gateway.recorded(streamed.request_id))["status"] == "succeeded"


async def test_the_audit_has_a_streams_request_and_response(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    streamed = await gateway.stream(text="Explain the tide", priority=3)
    audit = await gateway.audit(streamed.request_id)
    assert (audit["source"], audit["status"], audit["attempts"]) == ("stream", "succeeded", 1)
    assert audit["priority"] == 3
    assert audit["request"]["prompt"] == "Explain the tide"
    assert audit["response"]["text"] == streamed.text
    assert audit["output_tokens"] == dict(streamed.events)["usage"]["output_tokens"]
    assert audit["cached_tokens"] is None
    assert audit["submitted_at"] <= audit["admitted_at"] <= audit["finished_at"]
    (attempt,) = await gateway.attempts(streamed.request_id)
    assert attempt["outcome"] == "succeeded"


async def test_many_streams_never_have_more_calls_open_than_allowed(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_behaviour(first_byte_ms={"uniform": [5, 40]}, between_ms=3)
    bodies: list[dict[str, Any]] = [
        {"text": "Explain the tide"},
        {"text": "Describe this picture", "file": PNG},
    ]
    streams = [gateway.stream(**bodies[number % 2]) for number in range(40)]
    assert {streamed.names[-1] for streamed in await asyncio.gather(*streams)} == {"done"}
    stats = await gateway.upstream.stats()
    assert (stats["text_only"].max_in_flight, stats["multi_modal"].max_in_flight) == (5, 3)
    assert stats["text_only"].arrived + stats["multi_modal"].arrived == 40


async def test_a_body_that_is_refused_calls_nobody(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    refused = await gateway.stream(text="Explain", type="poem")
    assert (refused.status, refused.problem["field"]) == (400, "type")
    form = aiohttp.FormData({"text": ""})
    async with gateway.http.post(f"{gateway.url}/stream", data=form) as response:
        assert response.status == 400
    assert await gateway.calls() == []
    assert await gateway.database.fetchval("SELECT count(*) FROM requests") == 0


async def test_a_pause_that_outlasts_the_deadline_is_told_immediately(
    open_gateway: Opener,
) -> None:
    one: dict[str, Any] = {"text_only": 1}
    gateway = await open_gateway(worker=False, rate_limits=one)
    limiter = gateway.services.limiter
    await gateway.upstream.set_fault("hang")
    holding = asyncio.create_task(gateway.stream(text="Explain the tide"))
    await gateway.in_flight(1)
    waits = asyncio.create_task(gateway.stream(text="Explain the wind"))
    await wait_until(lambda: gateway.waiting == 1, what="the second stream waits")
    await limiter.penalise("kind:text_only", for_ms=3_600_000)
    for streamed in (await waits, await gateway.stream(text="Explain the rain")):
        assert (streamed.status, b"limit_paused" in streamed.raw) == (503, True)
        assert 3_000 < int(streamed.headers["retry-after"]) <= 3_600
    assert len(await gateway.calls()) == 1
    holding.cancel()
