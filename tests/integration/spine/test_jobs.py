"""Jobs that meet faults: what is tried again and when, what is not, and what the record says."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until
from tests.zones import OF_ALL, OF_WORKERS, set_clock
from tidegate.call import Media
from tidegate.errors import FetchFailed, LimiterUnavailable, StoreUnavailable
from tidegate.spine.native import NativeExchange
from tidegate.spine.prompt import PromptCalls, PromptExchange
from tidegate.spine.run import UpstreamAccount
from tidegate.store.blobs import Blobs
from tidegate.store.notifications import AGREE_S
from tidegate.store.queue import MAX_LAPSES, JobQueue
from tidegate.upstream.fetch import ImageFetcher, refused


async def _outcomes(gateway: Gateway, request_id: str) -> list[tuple[int, str]]:
    return [(row["number"], row["outcome"]) for row in await gateway.attempts(request_id)]


async def test_a_throttled_job_is_tried_again_but_not_before_the_provider_says(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway()
    await gateway.upstream.set_fault("throttled", count=1, retry_after_s=0.8)
    request_id = await gateway.submit(data="Explain the tide")
    await wait_until(lambda: _has_error(gateway, request_id), 20)
    waiting = await gateway.status(request_id)
    assert (waiting["status"], waiting["error"]["code"]) == ("queued", "upstream_throttled")
    assert waiting["error"]["retry_after_ms"] == 800
    assert waiting["retry_at"] > waiting["admitted_at"]
    record = await gateway.end_of(request_id)
    assert (record["status"], record["attempts"]) == ("succeeded", 1), (
        "the first counts for nothing"
    )
    assert "error" not in record
    first, second = await gateway.calls()
    assert first.ended_ns is not None
    assert second.started_ns - first.ended_ns >= 800_000_000
    assert await _outcomes(gateway, request_id) == [(1, "failed"), (2, "succeeded")]
    assert (await gateway.audit(request_id))["attempts"] == 1


async def _has_error(gateway: Gateway, request_id: str) -> bool:
    return "error" in await gateway.status(request_id)


async def test_a_fault_in_passing_is_tried_again(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    ids = {}
    for fault in ("unavailable", "cut", "cut_mid_stream", "garbage", "internal"):
        await gateway.upstream.set_fault(fault, count=1, match=f"[{fault}]")
        ids[fault] = await gateway.submit(data=f"Explain [{fault}]")
    for fault, request_id in ids.items():
        record = await gateway.end_of(request_id)
        assert record["status"] == "succeeded", fault
        # What several calls meet in one moment is laid to the upstream, and counts for nothing.
        assert record["attempts"] == 1 or (record["attempts"] == 2 and fault != "unavailable")
        assert record["text"].count("You asked") == 1, "nothing is left of the first attempt"
        assert len(await gateway.calls(f"[{fault}]")) == 2
        outcomes = await _outcomes(gateway, request_id)
        # On a kept connection, which servers close when they like, it is sent again in one attempt.
        is_one_attempt = fault == "cut" and outcomes == [(1, "succeeded")]
        assert is_one_attempt or outcomes == [(1, "failed"), (2, "succeeded")], fault


async def test_a_worker_makes_one_last_try_of_a_job_at_a_time(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    await gateway.stop_worker()
    doubtful = [await gateway.submit(data=f"Explain tide {number}") for number in range(3)]
    sound = [await gateway.submit(data="Explain the moon") for _ in range(3)]
    await gateway.database.execute(
        "UPDATE requests SET lapses = $1 WHERE id = ANY($2::uuid[])", MAX_LAPSES - 1, doubtful
    )
    await gateway.upstream.set_fault("hang", count=1, match="Explain tide")
    gateway.start_worker()
    for request_id in sound:
        assert (await gateway.end_of(request_id))["status"] == "succeeded"
    later = "WHERE status = 'queued' AND not_before IS NOT NULL"

    waiting = f"SELECT id FROM requests {later}"

    async def put_off() -> bool:
        return len(await gateway.database.fetch(waiting)) == 2

    await wait_until(put_off, 20, "two that wait for the last try of a third")
    assert len(await gateway.calls("Explain tide")) == 1
    (hangs,) = set(doubtful) - {str(row["id"]) for row in await gateway.database.fetch(waiting)}
    async with gateway.http.delete(f"{gateway.url}/requests/{hangs}") as response:
        assert response.status < 300
    assert (await gateway.end_of(hangs))["status"] == "cancelled"

    async def succeeded() -> bool:
        await gateway.database.execute(f"UPDATE requests SET not_before = now() {later}")
        ended = "SELECT count(*) FROM requests WHERE status = 'succeeded' AND id = ANY($1::uuid[])"
        return bool(await gateway.database.fetchval(ended, doubtful) == 2)

    await wait_until(succeeded, 20, "the two others")
    times = sorted((call.started_ns, call.ended_ns) for call in await gateway.calls("Explain tide"))
    assert all(ended is not None and ended <= begun for (_, ended), (begun, _) in pairwise(times))


async def test_a_fault_that_stays_fails_the_job_after_the_last_attempt(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(max_attempts=3)
    await gateway.upstream.set_fault("internal")
    request_id = await gateway.submit(data="Explain the tide")
    record = await gateway.end_of(request_id)
    assert (record["status"], record["attempts"]) == ("failed", 3)
    assert record["error"]["code"] == "upstream_unavailable"
    assert record["error"]["upstream_status"] == 500
    assert len(await gateway.calls()) == 3
    audit = await gateway.audit(request_id)
    assert (audit["status"], audit["failure"]["code"]) == ("failed", "upstream_unavailable")
    assert audit["request"]["prompt"] == "Explain the tide"


HOPELESS = {
    "blocked_prompt": "prompt_blocked",
    "safety": "empty_answer",
}


async def test_a_fault_that_would_come_again_is_not_tried_again(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    ids = {}
    for fault in HOPELESS:
        await gateway.upstream.set_fault(fault, match=f"[{fault}]")
        ids[fault] = await gateway.submit(data=f"Explain [{fault}]")
    for fault, request_id in ids.items():
        record = await gateway.end_of(request_id)
        assert (record["status"], record["attempts"]) == ("failed", 1), fault
        assert record["error"]["code"] == HOPELESS[fault]
        assert record["error"]["message"]
        assert len(await gateway.calls(f"[{fault}]")) == 1


async def test_a_model_that_the_provider_does_not_know_fails_at_once(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway()
    await gateway.upstream.set_behaviour(strict_models=True)
    record = await gateway.end_of(await gateway.submit(data="Explain", model="gemini-none"))
    assert (record["status"], record["error"]["code"]) == ("failed", "upstream_rejected")
    assert record["attempts"] == 1


async def test_a_picture_that_cannot_be_fetched_fails_its_job_clearly(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fetch(_fetcher: ImageFetcher, _uri: str, *_more: object) -> Media:
        raise refused("was answered with status 404")

    monkeypatch.setattr(ImageFetcher, "fetch", fetch)
    gateway = await open_gateway()
    uri = "http://example.com/cat.png"
    request_id = await gateway.submit(
        data="Make this picture a watercolour", type="image_generation", image_uri=uri
    )
    record = await gateway.end_of(request_id)
    assert (record["status"], record["error"]["code"]) == ("failed", "fetch_refused")
    assert "image_uri" in record["error"]["message"]
    assert (record["attempts"], await gateway.calls()) == (0, [])
    assert (await gateway.audit(request_id))["request"]["image_uri"] == uri


@pytest.mark.parametrize("failures", [2, 9])
async def test_a_picture_whose_server_fails_is_fetched_again_within_the_attempts(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    fetched = list[str]()

    async def fetch(_fetcher: ImageFetcher, uri: str, *_more: object) -> Media:
        fetched.append(uri)
        if len(fetched) <= failures:
            raise FetchFailed("image_uri", "image_uri was answered with status 503")
        return Media("image/png", b"\x89PNG\r\n\x1a\n" + bytes(64))

    monkeypatch.setattr(ImageFetcher, "fetch", fetch)
    gateway = await open_gateway(max_attempts=3)
    request_id = await gateway.submit(
        data="Describe this picture", type="multi_modal", image_uri="http://example.com/cat.png"
    )
    record = await gateway.end_of(request_id)
    assert (record["attempts"], len(fetched)) == (3, 3)
    assert (await gateway.audit(request_id))["attempts"] == 3
    if failures == 2:
        assert (record["status"], len(await gateway.calls())) == ("succeeded", 1)
    else:
        assert (record["status"], record["error"]["code"]) == ("failed", "fetch_failed")
        assert (record["error"]["retryable"], await gateway.calls()) == (True, [])


async def test_an_upload_whose_bytes_are_gone_fails_its_job_clearly(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    request_id = await gateway.submit(data="Describe this picture", file=b"\x89PNG\r\n\x1a\n" * 9)
    key = await gateway.database.fetchval("SELECT blob_key FROM files")
    await gateway.services.blobs.delete([key])
    gateway.start_worker()
    record = await gateway.end_of(request_id)
    assert (record["status"], record["error"]["code"]) == ("failed", "not_found")
    assert "a.png" in record["error"]["message"]
    assert key not in record["error"]["message"]


async def test_an_error_that_nobody_foresaw_fails_its_job_and_no_other(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = PromptCalls.media

    async def broken(self: PromptCalls, ask: Any) -> Any:
        if "poison" in ask.prompt:
            raise ZeroDivisionError("sensitive words")
        return await media(self, ask)

    monkeypatch.setattr(PromptCalls, "media", broken)
    gateway = await open_gateway(rate_limits={"text_only": 1})
    poisoned = [await gateway.submit(data=f"Explain poison {n}") for n in range(8)]
    good = await gateway.submit(data="Explain the tide")
    for request_id in poisoned:
        record = await gateway.end_of(request_id)
        assert (record["status"], record["error"]["code"]) == ("failed", "internal")
        assert "sensitive" not in record["error"]["message"]
        assert (await gateway.audit(request_id))["failure"]["code"] == "internal"
    assert (await gateway.end_of(good))["status"] == "succeeded"
    streamed = await gateway.stream(text="Explain poison")
    assert (streamed.status, streamed.problem["code"]) == (500, "internal")
    assert (await gateway.recorded(streamed.request_id))["error"]["code"] == "internal"


async def test_an_error_that_nobody_foresaw_in_classifying_fails_its_job(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: PromptCalls, ask: Any, **_named: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(PromptCalls, "decide", broken)
    gateway = await open_gateway()
    record = await gateway.end_of(await gateway.submit(data="Nice!"))
    assert (record["status"], record["error"]["code"]) == ("failed", "internal")


async def test_an_error_after_the_call_keeps_what_the_attempt_brought(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PromptCalls.run

    async def broken(self: PromptCalls, *given: Any, **named: Any) -> None:
        await run(self, *given, **named)
        raise ZeroDivisionError

    monkeypatch.setattr(PromptCalls, "run", broken)
    gateway = await open_gateway()
    request_id = await gateway.submit(data="Explain the tide")
    record = await gateway.end_of(request_id)
    assert (record["status"], record["error"]["code"]) == ("failed", "internal")
    assert record["usage"]["total_tokens"] > 0
    assert await _outcomes(gateway, request_id) == [(1, "failed")]


async def test_a_generated_picture_is_kept_though_the_blob_store_fails_for_a_moment(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failures = Blobs.put, [StoreUnavailable("the blob store failed")] * 2

    async def flaky(self: Blobs, key: str, data: bytes) -> None:
        if failures:
            raise failures.pop()
        await put(self, key, data)

    monkeypatch.setattr(Blobs, "put", flaky)
    gateway = await open_gateway()
    record = await gateway.end_of(await gateway.submit(data="Generate an image of a fox"))
    assert (record["status"], record["attempts"], len(record["images"])) == ("succeeded", 1, 1)
    assert len(await gateway.calls()) == 1


async def test_a_job_that_cannot_be_handed_back_at_once_is_handed_back_later(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, release = PromptCalls.run, JobQueue.release
    no_permits = [LimiterUnavailable("Valkey is away", limit="kind:text_only")]
    no_store = [StoreUnavailable("PostgreSQL is away")]

    async def refused(self: PromptCalls, *given: Any, **named: Any) -> None:
        if no_permits:
            raise no_permits.pop()
        await run(self, *given, **named)

    async def away(self: JobQueue, jobs: Any) -> None:
        if no_store:
            raise no_store.pop()
        await release(self, jobs)

    monkeypatch.setattr(PromptCalls, "run", refused)
    monkeypatch.setattr(JobQueue, "release", away)
    gateway = await open_gateway()
    record = await gateway.end_of(await gateway.submit(data="Explain the tide"))
    assert (record["status"], record["attempts"]) == ("succeeded", 1)
    assert not no_permits
    assert not no_store


async def test_a_full_kind_does_not_hold_up_another(open_gateway: Opener) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 1}, shutdown_grace_ms=100)
    await gateway.upstream.set_fault("hang", match="forever")
    for number in range(20):
        await gateway.submit(data=f"Explain forever {number}")
    await gateway.in_flight(1)
    async with asyncio.timeout(5):
        record = await gateway.end_of(await gateway.submit(data="Generate an image of a fox"))
    assert record["status"] == "succeeded"


@pytest.mark.parametrize("wraps", [False, True])
async def test_a_job_whose_lease_is_found_lost_after_its_whole_answer_is_not_called_again(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch, wraps: bool
) -> None:
    """As of a worker that stood still, for less than its claims last, while the answer came."""
    made = NativeExchange if wraps else PromptExchange
    settle, lost = made.settle, asyncio.Event()

    def lose(exchange: Any, target: Any, account: UpstreamAccount, *args: Any, **named: Any) -> Any:
        if not lost.is_set():
            account.limiter._session.lease._confirmed_ms = float("-inf")
            lost.set()
        return settle(exchange, target, account, *args, **named)

    monkeypatch.setattr(made, "settle", lose)
    gateway = await open_gateway()
    body = {"contents": [{"parts": [{"text": "Say hello"}]}]}
    path = "/v1beta/models/gemini-2.5-flash:generateContent"
    job: dict[str, Any] = {"endpoint": path, "body": body} if wraps else {"data": "Say hello"}
    record = await gateway.end_of(await gateway.submit(**job))
    assert lost.is_set()
    assert (record["status"], record["attempts"]) == ("succeeded", 1)
    assert len(await gateway.calls()) == 1


@pytest.mark.parametrize(("hours", "of"), [(-25, OF_ALL), (25, OF_ALL), (25, OF_WORKERS)])
@pytest.mark.parametrize("wrapped", [False, True])
async def test_a_deadline_goes_by_the_clock_of_postgresql(
    open_gateway: Opener,
    monkeypatch: pytest.MonkeyPatch,
    hours: int,
    of: tuple[ModuleType, ...],
    wrapped: bool,
) -> None:
    """Whatever that of the process is that takes the job, and that of its worker."""
    set_clock(monkeypatch, timedelta(hours=hours), of)
    gateway = await open_gateway()
    clock = gateway.services.store.notifications
    await wait_until(clock.is_sure, 20, "PostgreSQL's clock was read")
    await gateway.upstream.set_fault("unavailable", count=1)
    given: dict[str, Any] = {"data": "Explain the tide"}
    if wrapped:
        body = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": "Explain"}]}
        given = {"endpoint": "/v1/chat/completions", "body": body}
    record = await gateway.end_of(await gateway.submit(**given, deadline_ms=60_000))
    assert record["status"] == "succeeded", record
    await gateway.stop_worker()
    late = await gateway.submit(data="Explain the tide", deadline_ms=1)
    # Two processes that have read the clock may be apart by a round trip each.
    passed = f"SELECT deadline_at < now() - interval '{AGREE_S} seconds' FROM requests"
    over = f"{passed} WHERE id = '{late}'"
    await wait_until(lambda: gateway.database.fetchval(over), 20, "its deadline has passed")
    gateway.start_worker()
    assert (await gateway.end_of(late))["status"] == "expired"
