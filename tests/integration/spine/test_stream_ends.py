"""Streams that end badly: refused, failed upstream, left, stalled, or cut by our own stop."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import pytest

from tests.gateway import Gateway, Opener, read_stream, small_receive_buffer
from tests.integration.security.hostile import one_try
from tests.outages import all_is_well
from tests.waiting import wait_turns, wait_until
from tidegate.call import Media
from tidegate.embedded.servers import ValkeyServer
from tidegate.errors import FetchFailed, FetchRefused
from tidegate.upstream.fetch import ImageFetcher

__all__ = ["one_try"]

_NO_IMAGE = FetchRefused("image_uri", "image_uri is not an image")
_PASSING = FetchFailed("image_uri", "image_uri was answered with status 503", retry_after_ms=2_000)


async def _all_closed(gateway: Gateway) -> None:
    """No permit, no waiter and no call upstream, a quarter of a second after a client left."""

    async def closed() -> bool:
        return (
            gateway.held == gateway.waiting == 0 and (await gateway.upstream.stats()).in_flight == 0
        )

    await wait_turns(closed, what="everything closed")

    async def free() -> bool:
        limits = (await gateway.services.limiter.snapshot()).limits
        return all(view.used == view.waiting == 0 for view in limits.values())

    await wait_until(free, 20, "every permit back in Valkey")


async def test_a_stream_that_waits_too_long_is_a_504_and_calls_nobody(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1})
    await gateway.upstream.set_fault("hang", match="forever")
    async with gateway.open_stream(text="Explain forever"):
        await gateway.in_flight(1)
        started = time.monotonic()
        refused = await gateway.stream(text="Explain in vain", deadline_ms=150)
        assert time.monotonic() - started >= 0.1
    assert (refused.status, refused.problem["code"]) == (504, "deadline_exceeded")
    assert refused.headers["content-type"] == "application/problem+json"
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.problem["limit"] == "kind:text_only"
    assert await gateway.calls("in vain") == []
    record = await gateway.recorded(refused.request_id)
    assert (record["status"], record["attempts"]) == ("expired", 0)
    audit = await gateway.audit(refused.request_id)
    assert (audit["status"], audit["failure"]["code"]) == ("expired", "deadline_exceeded")
    assert audit["request"]["prompt"] == "Explain in vain"
    assert audit["total_tokens"] is None


async def test_the_deadline_counts_the_classifiers_time_too(open_gateway: Opener) -> None:
    gateway = await open_gateway(
        worker=False,
        rate_limits={"text_only": 1, "image_generation": 0},
        classifier_timeout_ms=60_000,
    )
    await gateway.upstream.set_fault("hang")
    async with gateway.open_stream(text="Explain forever"):
        await gateway.in_flight(1)
        refused = await gateway.stream(text="Nice!", deadline_ms=150)
    assert (refused.status, refused.problem["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("failed", [_NO_IMAGE, _PASSING], ids=["for good", "now"])
async def test_a_picture_that_cannot_be_fetched_is_refused_before_any_call(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch, failed: FetchRefused
) -> None:
    async def fetch(_fetcher: ImageFetcher, _uri: str, *_more: object) -> Media:
        raise failed

    monkeypatch.setattr(ImageFetcher, "fetch", fetch)
    gateway = await open_gateway(worker=False)
    answer = await gateway.stream(
        text="Make this picture a watercolour",
        type="image_generation",
        image_uri="http://example.com/cat.png",
    )
    assert (answer.status, answer.problem["code"]) == (422, failed.code)
    assert answer.problem.get("retry_after_ms") == failed.retry_after_ms
    assert await gateway.calls() == []
    assert (await gateway.recorded(answer.request_id))["error"]["code"] == failed.code


FAULTS: dict[str, tuple[dict[str, Any], str, int]] = {
    "throttled": ({"retry_after_s": 3}, "upstream_throttled", 503),
    "unavailable": ({}, "upstream_unavailable", 502),
    # Twice: what meets the end of a kept connection is sent again, once, on a new one.
    "cut": ({"count": 2}, "upstream_unavailable", 502),
    "unauthorized": ({}, "upstream_unauthorized", 502),
    "garbage": ({}, "upstream_garbled", 502),
    "error_in_stream": ({}, "upstream_unavailable", 502),
    "cut_mid_stream": ({}, "upstream_unavailable", 502),
    "hang_mid_stream": ({}, "upstream_timeout", 504),
    "blocked_prompt": ({}, "prompt_blocked", 422),
    "safety": ({}, "empty_answer", 502),
    "no_candidates": ({}, "empty_answer", 502),
}


async def test_a_fault_upstream_is_the_last_event_and_in_the_record(
    open_gateway: Opener, one_try: None
) -> None:
    gateway = await open_gateway(worker=False, idle_timeout_ms=1_500)
    for fault in FAULTS:
        await gateway.upstream.reset()
        await gateway.upstream.set_fault(fault, **{"count": 1, **FAULTS[fault][0]})
        await _assert_told_and_recorded(gateway, fault)
        await all_is_well(gateway)


async def test_a_stream_is_tried_again_while_nothing_of_an_answer_was_sent(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_fault("unavailable", count=1)
    streamed = await gateway.stream(text="Explain the tide")
    assert streamed.names[-1] == "done"
    audit = await gateway.audit(streamed.request_id)
    assert (audit["status"], audit["attempts"]) == ("succeeded", 2)
    assert len(await gateway.calls()) == 2
    await gateway.upstream.set_fault("cut_mid_stream", count=1)
    streamed = await gateway.stream(text="Explain the ebb")
    assert streamed.names[-1] == "error"
    assert (await gateway.audit(streamed.request_id))["attempts"] == 1
    await _all_closed(gateway)


async def _assert_told_and_recorded(gateway: Gateway, fault: str) -> None:
    _, code, status = FAULTS[fault]
    # The pause of a 429 outlasts the deadline.
    more: dict[str, Any] = {"deadline_ms": 2_000} if fault == "throttled" else {}
    streamed = await gateway.stream(text="Explain the tide", **more)
    assert (streamed.status, streamed.ended) == (200, True), fault
    assert streamed.names[-1] == "error", fault
    assert streamed.names.count("error") == 1
    assert "done" not in streamed.names
    assert (streamed.problem["code"], streamed.problem["status"]) == (code, status), fault
    assert streamed.problem["request_id"] == streamed.request_id
    assert {"type", "title", "detail"} <= streamed.problem.keys()
    if fault == "throttled":
        assert streamed.problem["retry_after_ms"] == 3_000
    record = await gateway.recorded(streamed.request_id)
    assert (record["status"], record["error"]["code"]) == ("failed", code)
    assert (record["text"] or "") == streamed.text
    audit = await gateway.audit(streamed.request_id)
    assert audit["failure"]["code"] == code
    assert audit["response"]["text"] == streamed.text
    assert len(await gateway.calls()) == FAULTS[fault][0].get("count", 1)
    await _all_closed(gateway)


async def test_a_stream_under_a_paused_limit_is_told_when_the_pause_ends(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.services.limiter.penalise("kind:text_only", for_ms=60_000, by="ann")
    late = await gateway.stream(text="Explain the tide", deadline_ms=50)
    assert (late.status, late.problem["code"]) == (503, "limit_paused")
    assert 55_000 < late.problem["retry_after_ms"] <= 60_000
    assert 55 < int(late.headers["retry-after"]) <= 60


async def test_a_fault_cuts_a_plain_text_stream_so_that_the_client_notices(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_fault("error_in_stream", count=1, after_chunks=2)
    streamed = await gateway.stream(text="Explain the tide", accept="text/plain")
    assert (streamed.status, streamed.ended) == (200, False)
    assert b"[upstream_unavailable: " in streamed.raw
    assert streamed.raw.startswith(b"You asked")


async def test_a_client_that_leaves_while_waiting_leaves_no_waiter(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1})
    await gateway.upstream.set_fault("hang", match="forever", count=1)
    async with gateway.open_stream(text="Explain forever"):
        await gateway.in_flight(1)
        waiting = asyncio.create_task(gateway.stream(text="Explain in vain"))
        await wait_until(lambda: gateway.waiting == 1, 20)
        waiting.cancel()
        await wait_turns(lambda: gateway.waiting == 0, what="no waiter")
    assert (await gateway.stream(text="Explain freely", deadline_ms=20_000)).names[-1] == "done"
    assert await gateway.calls("in vain") == []
    row = await wait_until(lambda: _cancelled(gateway, "in vain"), 20)
    assert row["admitted_at"] is None


async def _cancelled(gateway: Gateway, prompt: str) -> Any:
    return await gateway.database.fetchrow(
        "SELECT audit.* FROM audit JOIN requests r ON r.id = audit.request_id "
        "WHERE r.prompt LIKE $1 AND audit.status = 'cancelled'",
        f"%{prompt}%",
    )


async def test_a_client_that_leaves_before_the_first_byte_closes_the_call(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_fault("hang")
    async with gateway.open_stream(text="Explain forever") as response:
        await gateway.in_flight(1)
        request_id = response.headers["x-tidegate-request-id"]
    await _all_closed(gateway)
    stats = await gateway.upstream.stats()
    assert stats["text_only"].client_gone == 1
    audit = await gateway.audit(request_id)
    assert (audit["status"], audit["failure"]["code"]) == ("cancelled", "client_left")
    assert audit["response"]["text"] == ""
    # Its request went out: the input is charged as it was estimated.
    assert (audit["usage_state"], audit["total_tokens"]) == ("estimated", None)
    assert (audit["input_tokens"], audit["output_tokens"]) == (4, 0)


async def test_what_was_streamed_before_the_client_left_is_kept_with_its_usage(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_behaviour(answer="one two three four five six", chunks=6)
    await gateway.upstream.set_fault("hang_mid_stream", after_chunks=3)
    async with gateway.open_stream(text="Explain the tide") as response:
        raw = b""
        while raw.count(b"event: delta") < 3:
            raw += await response.content.readany()
        request_id = response.headers["x-tidegate-request-id"]
    await _all_closed(gateway)
    audit = await gateway.audit(request_id)
    assert audit["status"] == "cancelled"
    assert audit["response"]["text"] == "one two three "
    assert audit["output_tokens"] == 3
    assert audit["cached_tokens"] is None
    record = await gateway.status(request_id)
    assert (record["status"], record["text"]) == ("cancelled", "one two three ")


async def test_a_client_that_does_not_read_is_cut_and_its_call_closed(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, stalled_reader_ms=400)
    await gateway.upstream.set_behaviour(answer=("x" * 100_000 + " ") * 300, chunks=300)
    connector = aiohttp.TCPConnector(socket_factory=small_receive_buffer)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=1024) as client:
        url = f"{gateway.url}/stream"
        async with client.post(url, json={"text": "Explain the tide"}) as response:
            request_id = response.headers["x-tidegate-request-id"]
            await gateway.in_flight(1)
            await gateway.in_flight(0)
            await wait_until(lambda: gateway.held == 0, 20, "the permit is free")
            streamed = await read_stream(response)
    assert not streamed.ended
    assert "done" not in streamed.names
    audit = await gateway.audit(request_id)
    assert (audit["status"], audit["failure"]["code"]) == ("cancelled", "client_stalled")
    assert (await gateway.upstream.stats())["text_only"].client_gone == 1


async def test_a_lost_lease_ends_a_stream_in_an_error_event(
    open_gateway: Opener, own_valkey: ValkeyServer
) -> None:
    gateway = await open_gateway(
        worker=False, redis_url=own_valkey.url, on_lost="cancel", semaphore_timeout=0.3
    )
    await gateway.upstream.set_fault("hang_mid_stream")
    reading = asyncio.create_task(gateway.stream(text="Explain the tide"))
    await gateway.in_flight(1)
    own_valkey.pause()
    streamed = await reading
    own_valkey.resume()
    assert streamed.ended
    assert streamed.names == ["delta", "error"]
    assert (streamed.problem["code"], streamed.problem["status"]) == ("lease_lost", 503)
    record = await gateway.recorded(streamed.request_id)
    assert (record["status"], record["error"]["code"]) == ("failed", "lease_lost")
    assert (await gateway.upstream.stats()).in_flight == 0


async def test_a_stop_lets_streams_finish_within_the_grace(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_behaviour(first_byte_ms=400)
    reading = asyncio.create_task(gateway.stream(text="Explain the tide"))
    await gateway.in_flight(1)
    gateway.drain()
    assert (await reading).names[-1] == "done"
    await gateway.serving


async def test_a_stop_ends_what_outlasts_the_grace_in_an_error_and_records_it(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(
        worker=False, shutdown_grace_ms=1_000, rate_limits={"text_only": 1}
    )
    await gateway.upstream.set_fault("hang_mid_stream")
    reading = asyncio.create_task(gateway.stream(text="Explain the tide"))
    await gateway.in_flight(1)
    waiting = asyncio.create_task(gateway.stream(text="Explain in vain"))
    await wait_until(lambda: gateway.waiting == 1, 20)
    gateway.drain()
    streamed, refused = await reading, await waiting
    assert (streamed.ended, streamed.names[-1]) == (True, "error")
    assert streamed.problem["code"] == "shutting_down"
    assert (refused.status, refused.problem["code"]) == (503, "shutting_down")
    await gateway.serving
    for ended in (streamed, refused):
        row = await gateway.database.fetchrow(
            "SELECT status, failure FROM audit WHERE request_id = $1::uuid", ended.request_id
        )
        assert (row["status"], "shutting_down" in row["failure"]) == ("failed", True)
    assert (await gateway.upstream.stats()).in_flight == 0


async def test_many_clients_leaving_at_once_leave_nothing(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    limiter = gateway.services.limiter
    await limiter.penalise("kind:text_only", for_ms=20_000, by="ann")
    streams = [asyncio.create_task(gateway.stream(text=f"Explain {n}")) for n in range(40)]
    # One that leaves before is nobody's, and on no record.
    await wait_until(lambda: gateway.waiting == 40, 20, "all of them")
    await gateway.upstream.set_behaviour(first_byte_ms={"uniform": [0, 60]}, between_ms=20)
    await limiter.resume("kind:text_only", by="ann")
    await wait_until(lambda: sum(stream.done() for stream in streams) >= 8, 20)
    for stream in streams:
        stream.cancel()
    await _all_closed(gateway)
    assert (await gateway.upstream.stats())["text_only"].max_in_flight <= 5

    async def all_recorded() -> bool:
        ends = await gateway.database.fetch("SELECT request_id, count(*) FROM audit GROUP BY 1")
        return len(ends) == 40 and all(row["count"] == 1 for row in ends)

    await wait_until(all_recorded, 20, "each of them in the audit, once")
