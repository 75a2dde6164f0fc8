"""`GET /status/{request_id}`: states, timings and the long poll."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from itertools import product
from typing import Any
from uuid import uuid4

import orjson
import pytest

from tests.gateway import Gateway, Opener
from tests.waiting import promised_s, wait_until


async def _poll(
    gateway: Gateway, request_id: str, wait: str = "20", until: str = "end"
) -> tuple[dict[str, Any], float]:
    """The answer of a long poll, and how many seconds it took."""
    started = time.monotonic()
    status, body = await gateway.get(f"/status/{request_id}?wait={wait}&until={until}")
    assert status == 200, body
    return body, time.monotonic() - started


async def test_a_request_is_queued_then_running_then_succeeded(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_behaviour(first_byte_ms=1_500)  # more than the look at what runs
    ids = [await gateway.submit(data=f"Explain {name}") for name in ("one", "two")]
    queued = [await gateway.status(request_id) for request_id in ids]
    assert [(body["status"], body["place"]) for body in queued] == [("queued", 1), ("queued", 2)]
    assert "admitted_at" not in queued[0]
    gateway.start_worker()
    running, _ = await _poll(gateway, ids[0], until="change")
    assert (running["status"], running["attempts"]) == ("running", 1)
    assert "place" not in running
    assert running["admitted_at"] >= running["submitted_at"]
    ended, _ = await _poll(gateway, ids[0])
    assert (ended["status"], ended["attempts"]) == ("succeeded", 1)


async def test_a_long_poll_waits_for_the_end(open_gateway: Opener) -> None:
    """Also if it begins while the job is queued: a client that waits wants the answer."""
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_behaviour(first_byte_ms=300)
    request_id = await gateway.submit(data="Explain the tide")
    poll = asyncio.create_task(_poll(gateway, request_id))
    await wait_until(lambda: len(gateway.services.store.notifications) == 1, 20)
    gateway.start_worker()
    body, _ = await poll
    assert (body["status"], body["attempts"]) == ("succeeded", 1)


async def test_timings_agree_with_one_another_and_with_the_provider(open_gateway: Opener) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 1})
    await gateway.upstream.set_behaviour(first_byte_ms=200)
    ids = [await gateway.submit(data=f"Explain {name}") for name in ("one", "two", "three")]
    for request_id in ids:
        record = await gateway.end_of(request_id)
        at = {
            name: datetime.fromisoformat(record[name]).timestamp() * 1000
            for name in ("submitted_at", "admitted_at", "finished_at")
        }
        assert at["submitted_at"] <= at["admitted_at"] <= at["finished_at"]
        assert record["queue_ms"] == pytest.approx(at["admitted_at"] - at["submitted_at"], abs=1)
        assert record["upstream_ms"] <= at["finished_at"] - at["admitted_at"] + 1
        assert record["upstream_ms"] >= 200
    # The third waited for two calls of 200 ms each, wherever it did so.
    assert record["queue_ms"] >= 390
    call = (await gateway.calls("three"))[0]
    assert call.ended_ns is not None
    assert record["upstream_ms"] >= (call.ended_ns - call.started_ns) / 1e6 - 5


async def test_a_long_poll_answers_at_once_for_what_has_ended(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    request_id = await gateway.submit(data="Explain the tide")
    await gateway.end_of(request_id)
    _, took_s = await _poll(gateway, request_id)
    assert took_s < promised_s(1)


async def test_a_long_poll_answers_when_its_time_is_up(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    request_id = await gateway.submit(data="Explain the tide")
    body, took_s = await _poll(gateway, request_id, wait="0.3")
    assert body["status"] == "queued"
    assert 0.29 <= took_s < promised_s(2)


async def test_a_long_poll_answers_at_once_when_the_process_drains(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    request_id = await gateway.submit(data="Explain the tide")
    poll = asyncio.create_task(_poll(gateway, request_id))
    await wait_until(lambda: len(gateway.services.store.notifications) == 1, 20)
    gateway.services.draining.set()
    body, _ = await asyncio.wait_for(poll, promised_s(1))
    assert body["status"] == "queued"
    _, took_s = await _poll(gateway, request_id)
    assert took_s < promised_s(1)


async def test_a_client_that_leaves_a_long_poll_leaves_nothing_behind(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    request_id = await gateway.submit(data="Explain the tide")
    poll = asyncio.create_task(_poll(gateway, request_id))
    await wait_until(lambda: len(gateway.services.store.notifications) == 1, 20)
    poll.cancel()
    await wait_until(lambda: len(gateway.services.store.notifications) == 0, 20, "nobody watches")


async def test_unknown_and_senseless_questions_are_problems(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    known = await gateway.submit(data="Explain the tide")
    expected = {
        f"/status/{uuid4()}": (404, "not_found"),
        "/status/not-an-id": (400, "invalid_request"),
        f"/status/{known}?wait=abc": (400, "invalid_request"),
        f"/status/{known}?wait=1000": (400, "invalid_request"),
        f"/status/{known}?wait=-1": (400, "invalid_request"),
        f"/status/{known}?wait=nan": (400, "invalid_request"),
        f"/status/{known}?wait=1&until=running": (400, "invalid_request"),
        f"/files/{uuid4()}": (404, "not_found"),
        "/files/..%2f..%2fetc": (404, "not_found"),
        "/nothing": (404, "not_found"),
    }
    for (path, wanted), prefix in product(expected.items(), ("", "/llm")):
        url = f"{gateway.url}{prefix}{path}"
        async with gateway.http.get(url) as response:
            body = orjson.loads(await response.read())
            assert (response.status, body["code"]) == wanted, (path, body)
            assert response.content_type == "application/problem+json", path
            assert body["status"] == response.status
            assert body["type"] == f"urn:tidegate:problem:{wanted[1]}", path
            assert {"title", "detail"} <= body.keys()


async def test_a_wrong_method_is_a_problem_that_names_the_right_one(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    wrong = {"/submit": "GET", "/stream": "GET", "/health/live": "POST", "/status/x": "DELETE"}
    for (path, method), prefix in product(wrong.items(), ("", "/llm")):
        async with gateway.http.request(method, f"{gateway.url}{prefix}{path}") as response:
            assert response.status == 405, path
            assert response.content_type == "application/problem+json", path
            known = "GET, HEAD, OPTIONS" if method != "GET" else "POST, OPTIONS"
            assert response.headers["allow"] == known, path
            body = orjson.loads(await response.read())
            assert body["type"] == "urn:tidegate:problem:method_not_allowed", path


async def test_every_path_answers_with_and_without_the_prefix(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    for prefix in ("", "/llm"):
        request_id = await gateway.submit(prefix, data="Generate an image of a fox")
        record = await gateway.end_of(request_id)
        (image,) = record["images"]
        for path in (f"/status/{request_id}", image["url"], "/health/live", "/health/ready"):
            async with gateway.http.get(f"{gateway.url}{prefix}{path}") as response:
                assert response.status == 200, path
        streamed = await gateway.stream(prefix=prefix, text="Explain the tide")
        assert streamed.names[-1] == "done"


async def test_the_record_of_a_stream_is_found_by_its_id_once_it_is_done(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    for _ in range(20):
        streamed = await gateway.stream(text="Explain the tide")
        record = await gateway.status(streamed.events[-1][1]["request_id"])
        assert (record["source"], record["status"]) == ("stream", "succeeded")
        assert record["text"] == streamed.text
        assert record["request_id"] == streamed.request_id
