"""`DELETE /requests/{request_id}`: the truth is what the provider and the limiter saw."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson
import pytest

from tests.gateway import Gateway, Opener
from tests.waiting import promised_s, wait_until
from tidegate.store.queue import JobQueue

TOLD_WITHIN_S = promised_s(1.2)


async def _cancel(
    gateway: Gateway, request_id: str, prefix: str = ""
) -> tuple[int, dict[str, Any]]:
    url = f"{gateway.url}{prefix}/requests/{request_id}"
    async with gateway.http.delete(url) as response:
        return response.status, orjson.loads(await response.read())


async def _permits(gateway: Gateway) -> int:
    limits = (await gateway.services.limiter.snapshot()).limits
    return sum(view.used + view.waiting for view in limits.values())


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_a_queued_request_is_cancelled_at_once_and_never_called(
    prefix: str, open_gateway: Opener
) -> None:
    gateway = await open_gateway(worker=False)
    request_id = await gateway.submit(data="Explain the tide")
    for _ in range(2):
        status, body = await _cancel(gateway, request_id, prefix)
        assert (status, body["status"], body["error"]["code"]) == (200, "cancelled", "cancelled")
    assert body == await gateway.status(request_id)
    gateway.start_worker()
    other = await gateway.submit(data="Explain the moon")
    await gateway.end_of(other)
    assert [call.prompt for call in await gateway.calls()] == ["Explain the moon"]
    assert (await gateway.audit(request_id))["status"] == "cancelled"


async def test_at_a_server_that_would_go_on_a_running_call_is_read_to_its_end(
    open_gateway: Opener, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('[upstreams.gemini]\nabandoned = "wait"\n')
    gateway = await open_gateway(tidegate_policy=policy)
    await gateway.upstream.set_behaviour(first_byte_ms={"text_only": 600})
    request_id = await gateway.submit(data="Explain the tide")
    await gateway.in_flight(1)
    status, body = await _cancel(gateway, request_id)
    assert (status, body["status"], body["error"]["code"]) == (200, "cancelled", "cancelled")
    assert body["usage"]["output_tokens"] > 0, "the provider reported it at the end"
    stats = await gateway.upstream.stats()
    assert (stats.in_flight, stats["text_only"].client_gone) == (0, 0)
    await wait_until(lambda: _none_used(gateway), 20)


async def test_a_job_is_cancelled_whose_worker_has_not_read_yet_that_it_is_running(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PostgreSQL's reply is late, or the worker stood still."""
    running, is_running = JobQueue.running, asyncio.Event()

    async def late(queue: JobQueue, *args: Any, **named: Any) -> None:
        await running(queue, *args, **named)
        is_running.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(JobQueue, "running", late)
    gateway = await open_gateway()
    request_id = await gateway.submit(data="Explain the tide")
    await is_running.wait()
    status, body = await _cancel(gateway, request_id)
    assert (status, body["status"], body["error"]["code"]) == (200, "cancelled", "cancelled")
    (attempt,) = await gateway.attempts(request_id)
    assert attempt["outcome"] == "cancelled"
    assert (await gateway.audit(request_id))["status"] == "cancelled"
    assert await gateway.calls() == []
    await wait_until(lambda: _none_used(gateway), 20)


async def test_a_running_call_is_closed_its_permit_is_free_and_what_had_come_is_kept(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 1})
    await gateway.upstream.set_fault("hang_mid_stream", count=1)
    request_id = await gateway.submit(data="Explain the tide")
    await gateway.in_flight(1)

    async def has_sent() -> bool:
        return (await gateway.upstream.stats())["text_only"].bytes > 0

    await wait_until(has_sent, 20)
    started = time.monotonic()
    status, body = await _cancel(gateway, request_id)
    assert time.monotonic() - started < TOLD_WITHIN_S
    assert (status, body["status"], body["error"]["code"]) == (200, "cancelled", "cancelled")
    stats = await gateway.upstream.stats()
    assert (stats.in_flight, stats["text_only"].client_gone) == (0, 1)
    assert body["text"].startswith("You asked")
    assert body["attempts"] == 1
    assert body["upstream_ms"] > 0
    (attempt,) = await gateway.attempts(request_id)
    assert attempt["outcome"] == "cancelled"
    audit = await gateway.audit(request_id)
    assert (audit["status"], audit["response"]["text"]) == ("cancelled", body["text"])
    # The only permit there is: the next one gets it, and nobody held it up.
    record = await gateway.end_of(await gateway.submit(data="Explain the moon"))
    assert record["queue_ms"] < promised_s(0.5) * 1000
    await wait_until(lambda: _none_used(gateway), 20)
    assert (await _cancel(gateway, request_id))[0] == 200
    assert len(await gateway.calls("tide")) == 1


async def _none_used(gateway: Gateway) -> bool:
    return await _permits(gateway) == 0


async def test_one_that_waits_for_a_permit_in_a_worker_leaves_its_place(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 1}, shutdown_grace_ms=100)
    await gateway.upstream.set_fault("hang", match="forever")
    blocker = await gateway.submit(data="Explain forever")
    await gateway.in_flight(1)
    request_id = await gateway.submit(data="Explain the tide")
    await wait_until(lambda: _all(gateway, 2), 20, "it waits in the worker")
    status, body = await _cancel(gateway, request_id)
    assert (status, body["status"], body["attempts"]) == (200, "cancelled", 0)
    await wait_until(lambda: _all(gateway, 1), TOLD_WITHIN_S, "its ticket is gone")
    assert (await _cancel(gateway, blocker))[1]["status"] == "cancelled"
    assert await gateway.calls("tide") == []


async def _all(gateway: Gateway, count: int) -> bool:
    limit = (await gateway.services.limiter.snapshot()).limits["kind:text_only"]
    return limit.used + limit.waiting == count


async def test_it_works_without_a_notification_too(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tidegate.store.notifications import Notifications

    monkeypatch.setattr(Notifications, "cancel", lambda self, ids: None)
    gateway = await open_gateway()
    await gateway.upstream.set_fault("hang")
    request_id = await gateway.submit(data="Explain the tide")
    await gateway.in_flight(1)
    started = time.monotonic()
    status, body = await _cancel(gateway, request_id)
    assert (status, body["status"]) == (200, "cancelled")
    assert time.monotonic() - started < promised_s(2)
    await gateway.in_flight(0)


async def test_what_has_ended_is_a_conflict_and_what_is_unknown_is_not_found(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway()
    request_id = await gateway.submit(data="Explain the tide")
    record = await gateway.end_of(request_id)
    status, problem = await _cancel(gateway, request_id)
    assert (status, problem["code"]) == (409, "already_ended")
    assert "succeeded" in problem["detail"]
    assert await gateway.status(request_id) == record
    streamed = await gateway.stream(text="Explain the moon")
    await gateway.recorded(streamed.request_id)
    assert (await _cancel(gateway, streamed.request_id))[0] == 409
    assert (await _cancel(gateway, str(uuid4())))[0] == 404
    assert (await _cancel(gateway, "nonsense"))[0] == 400
    await gateway.database.execute("UPDATE requests SET tenant_id = 'other'")
    assert (await _cancel(gateway, request_id))[0] == 404


async def test_a_cancel_that_races_with_the_end_has_one_winner(open_gateway: Opener) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 50})
    await gateway.upstream.set_behaviour(first_byte_ms={"uniform": [0, 60]})
    ids = [await gateway.submit(data=f"Explain [{number}]") for number in range(30)]
    answers = await asyncio.gather(*(_cancel(gateway, request_id) for request_id in ids))
    for number, (request_id, (status, body)) in enumerate(zip(ids, answers, strict=True)):
        record = await gateway.end_of(request_id)
        assert status in (200, 409), body
        assert (record["status"] == "cancelled") == (status == 200)
        assert (await gateway.audit(request_id))["status"] == record["status"]
        assert len(await gateway.calls(f"[{number}]")) <= 1
    assert (await gateway.upstream.stats()).in_flight == 0
    await wait_until(lambda: _none_used(gateway), 20)
