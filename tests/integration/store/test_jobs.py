"""The life of a job in the record."""

from __future__ import annotations

import asyncio
import zlib
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest
from structlog.testing import capture_logs

from tests.integration.store.jobs import (
    TEXT,
    UNSURE,
    new_job,
    now,
    picture,
    result,
    unadmitted,
    upload,
)
from tidegate.call import DEFAULT_POOL, Classification, ClassifiedBy, Kind, Status, Usage, new_id
from tidegate.errors import ClaimLost, NotFound
from tidegate.record import Failure
from tidegate.store.database import DatabaseSession
from tidegate.store.jobs import Requeue
from tidegate.store.records import ClaimedJob, NewJob
from tidegate.store.store import Store


async def claim_one(store: Store, kind: Kind | None = Kind.TEXT_ONLY) -> ClaimedJob:
    (job,) = await store.queue.claim(pool=DEFAULT_POOL, kind=kind, limit=1)
    return job


async def run_one(store: Store, job: NewJob | None = None) -> ClaimedJob:
    await store.jobs.submit(job or new_job())
    claimed = await claim_one(store)
    await store.queue.running(claimed, model="gemini-test", fence=(1, 7), queue_ms=3.0)
    return claimed


async def test_a_submitted_job_reads_back_as_it_was_given(store: Store) -> None:
    job = new_job(
        attachments=(upload("a.pdf"), upload("b.pdf")),
        image_uri="https://example.com/x.png",
        model="gemini-x",
        priority=3,
        deadline_at=now() + timedelta(hours=1),
    )
    await store.jobs.submit(job)
    record = await store.requests.get(job.request_id, "default")
    assert record.status is Status.QUEUED
    assert record.source == "job"
    assert record.classification == TEXT
    assert (record.model, record.priority, record.place) == ("gemini-x", 3, 1)
    assert record.created_at == job.created_at
    assert record.deadline_at == job.deadline_at
    assert record.usage == Usage()
    assert [file.file_id for file in record.files] == [file.file_id for file in job.attachments]


async def test_an_unknown_request_and_one_of_another_tenant_are_not_found(store: Store) -> None:
    job = new_job(attachments=(upload(),))
    await store.jobs.submit(job)
    for request_id, tenant_id in ((new_id(), "default"), (job.request_id, "other")):
        with pytest.raises(NotFound):
            await store.requests.get(request_id, tenant_id)
    file_id = job.attachments[0].file_id
    assert (await store.requests.file(file_id, "default")).request_id == job.request_id
    with pytest.raises(NotFound):
        await store.requests.file(file_id, "other")


async def test_a_job_goes_from_queue_to_result_with_everything_recorded(
    store: Store, peek: asyncpg.Connection
) -> None:
    job = new_job(attachments=(upload(),))
    await store.jobs.submit(job)
    claimed = await claim_one(store)
    assert claimed.prompt == job.prompt
    assert claimed.attachments == job.attachments
    assert claimed.attempts == 0
    assert (await store.requests.get(job.request_id, "default")).status is Status.QUEUED
    await store.queue.running(claimed, model="gemini-test", fence=(4, 2), queue_ms=3.5)
    running = await store.requests.get(job.request_id, "default")
    assert (running.status, running.attempts, running.queue_ms) == (Status.RUNNING, 1, 3.5)
    assert running.place is None
    output = picture()
    done = result(files=(output,))
    await store.queue.finish(claimed, done)
    record = await store.requests.get(job.request_id, "default")
    assert (record.status, record.text) == (Status.SUCCEEDED, done.result)
    assert record.usage == done.answer.usage
    assert (record.admitted_at, record.finished_at) == (done.admitted_at, done.finished_at)
    assert (record.queue_ms, record.upstream_ms) == (12.5, 340.0)
    assert record.model == "gemini-test"
    assert [file.role for file in record.files] == ["input", "output"]
    assert record.files[1].blob_key == output.blob_key
    attempts = await peek.fetch("SELECT * FROM attempts")
    assert [(row["outcome"], row["number"], row["fence_epoch"]) for row in attempts] == [
        ("succeeded", 1, 4)
    ]
    assert attempts[0]["total_tokens"] == 14
    assert attempts[0]["cached_tokens"] is None


async def test_the_audit_has_request_response_usage_and_timings(
    store: Store, peek: asyncpg.Connection
) -> None:
    claimed = await run_one(store, new_job("A prompt to keep"))
    await store.queue.finish(claimed, result("An answer to keep"))
    (audit,) = await peek.fetch("SELECT * FROM audit")
    assert audit["request_id"] == claimed.request_id
    assert (audit["source"], audit["status"], audit["kind"]) == ("job", "succeeded", "text_only")
    assert audit["classified_reason"] == TEXT.reason
    assert (audit["input_tokens"], audit["thoughts_tokens"]) == (5, None)
    assert (audit["attempts"], audit["upstream_ms"]) == (1, 340.0)
    assert audit["submitted_at"] < audit["finished_at"]
    stored = await peek.fetch("SELECT * FROM bodies WHERE id = $1", audit["id"])
    bodies = {row["role"]: orjson.loads(zlib.decompress(row["data"])) for row in stored}
    assert bodies["request"]["prompt"] == "A prompt to keep"
    assert bodies["response"]["text"] == "An answer to keep"


async def test_a_large_body_goes_to_the_blobs(store: Store, peek: asyncpg.Connection) -> None:
    # Random enough that compression leaves more than 8 KB.
    prompt = "".join(str(new_id()) for _ in range(2000))
    claimed = await run_one(store, new_job(prompt))
    await store.queue.finish(claimed, result("short"))
    row = await peek.fetchrow("SELECT * FROM bodies WHERE role = 'request'")
    assert row["data"] is None
    packed = await store.blobs.get(row["blob_key"])
    assert orjson.loads(zlib.decompress(packed))["prompt"] == prompt


async def test_a_large_result_is_stored_whole_and_none_of_it_comes_back(
    store: Store, peek: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed = await run_one(store, new_job("Explain the tide. " * 10_000))
    text = 'say "é"\n' * 150_000
    fetch, came = DatabaseSession.fetch, list[int]()

    async def noted(session: DatabaseSession, query: str, *values: Any, **more: Any) -> Any:
        found = await fetch(session, query, *values, **more)
        came.extend(len(f"{[*one.values()]}") for one in found)
        return found

    with monkeypatch.context() as watched:
        watched.setattr(DatabaseSession, "fetch", noted)
        await store.audit.end_job(claimed, result(text))
    assert 0 < max(came) < 5_000
    assert (await store.requests.get(claimed.request_id, "default")).text == text
    row = await peek.fetchrow("SELECT data, blob_key FROM bodies WHERE role = 'response'")
    packed = row["data"] or await store.blobs.get(row["blob_key"])
    assert orjson.loads(zlib.decompress(packed))["text"] == text


async def test_a_retry_waits_for_its_time_and_counts_its_attempts(
    store: Store, peek: asyncpg.Connection
) -> None:
    claimed = await run_one(store)
    failure = Failure("upstream_throttled", "too many", retryable=True, retry_after_ms=50)
    await store.queue.retry(claimed, result("", failure=failure), now() + timedelta(hours=1))
    record = await store.requests.get(claimed.request_id, "default")
    assert (record.status, record.attempts, record.failure) == (Status.QUEUED, 1, failure)
    assert await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=5) == []
    await peek.execute("UPDATE requests SET not_before = now()")
    again = await claim_one(store)
    assert (again.request_id, again.attempts) == (claimed.request_id, 1)
    await store.queue.running(again, model="gemini-test", fence=(1, 8), queue_ms=1.0)
    await store.queue.finish(again, result())
    record = await store.requests.get(claimed.request_id, "default")
    assert (record.attempts, record.failure) == (2, None)
    outcomes = await peek.fetch("SELECT number, outcome FROM attempts ORDER BY number")
    assert [tuple(row) for row in outcomes] == [(1, "failed"), (2, "succeeded")]
    assert await peek.fetchval("SELECT count(*) FROM audit") == 1


async def test_a_requeued_job_shows_no_picture_of_the_end_before(
    store: Store, peek: asyncpg.Connection
) -> None:
    claimed = await run_one(store)
    cut_off = Failure("upstream_unavailable", "the answer was cut off")
    early, late = picture(), picture()
    await store.queue.finish(claimed, result(status=Status.FAILED, failure=cut_off, files=(early,)))

    async def shown() -> list[UUID]:
        return [
            one.file_id for one in (await store.requests.get(claimed.request_id, "default")).files
        ]

    assert await shown() == [early.file_id]
    await peek.execute("UPDATE files SET created_at = now() - interval '1 hour'")
    hour = timedelta(hours=1)
    assert (await store.stuck.requeue_all(Requeue(now() - hour, now() + hour))).requeued == 1
    assert await shown() == []
    again = await claim_one(store)
    await store.queue.running(again, model="gemini-test", fence=(1, 8), queue_ms=3.0)
    assert await shown() == []
    await store.queue.finish(again, result(files=(late,)))
    assert await shown() == [late.file_id]
    assert await peek.fetchval("SELECT count(*) FROM files") == 2, "erased and pruned with the job"


async def test_a_job_that_is_requeued_soon_or_then_cancelled_shows_no_picture_of_before(
    store: Store,
) -> None:
    hour, cut_off = timedelta(hours=1), Failure("upstream_unavailable", "the answer was cut off")
    claimed, pictures = await run_one(store), [picture() for _ in range(3)]

    async def shown() -> list[UUID]:
        return [
            one.file_id for one in (await store.requests.get(claimed.request_id, "default")).files
        ]

    for made in pictures:
        end = result(status=Status.FAILED, failure=cut_off, files=(made,))
        await store.queue.finish(claimed, end)
        assert await shown() == [made.file_id]
        assert (await store.stuck.requeue_all(Requeue(now() - hour, now() + hour))).requeued == 1
        claimed = await claim_one(store)
        await store.queue.running(claimed, model="gemini-test", fence=(1, 8), queue_ms=3.0)
    await store.queue.release([claimed])
    await store.jobs.cancel(claimed.request_id, "default")
    assert await shown() == []


async def test_only_the_holder_of_the_claim_may_write(
    store: Store, peek: asyncpg.Connection
) -> None:
    claimed = await run_one(store)
    await store.queue.release([claimed])
    failure = Failure("internal", "x")
    for attempt in (
        store.queue.running(claimed, model="m", fence=(1, 1), queue_ms=0),
        store.queue.classified(claimed, TEXT),
        store.queue.finish(claimed, result("stale")),
        store.queue.fail_unadmitted(claimed, unadmitted(Status.FAILED, failure)),
    ):
        with pytest.raises(ClaimLost):
            await attempt
    record = await store.requests.get(claimed.request_id, "default")
    assert (record.status, record.text) == (Status.QUEUED, None)
    assert await peek.fetchval("SELECT count(*) FROM audit") == 0


async def test_a_job_handed_back_is_ready_at_once(store: Store) -> None:
    await store.jobs.submit(new_job())
    first = await claim_one(store)
    await store.queue.release([first])
    second = await claim_one(store)
    assert second.request_id == first.request_id
    assert second.claim > first.claim


async def test_an_unsure_job_changes_its_queue_when_it_is_classified(store: Store) -> None:
    job = new_job(classification=UNSURE)
    await store.jobs.submit(job)
    assert await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.IMAGE_GENERATION, limit=1) == []
    claimed = await claim_one(store, None)
    chosen = Classification(Kind.IMAGE_GENERATION, ClassifiedBy.LLM, "it asks for a picture")
    await store.queue.classified(claimed, chosen)
    await store.queue.release([claimed])
    assert (await store.requests.get(job.request_id, "default")).classification == chosen
    again = await claim_one(store, Kind.IMAGE_GENERATION)
    assert again.classification == chosen


async def test_a_job_past_its_deadline_expires_even_when_claimed(
    store: Store, peek: asyncpg.Connection
) -> None:
    for _ in range(2):
        await store.jobs.submit(new_job(deadline_at=now() - timedelta(seconds=1)))
    claimed = await claim_one(store)
    assert await store.queue.expire_due() == 2
    assert await store.queue.expire_due() == 0
    record = await store.requests.get(claimed.request_id, "default")
    assert record.status is Status.EXPIRED
    assert record.failure is not None
    assert record.failure.code == "deadline_exceeded"
    with pytest.raises(ClaimLost):
        await store.queue.running(claimed, model="m", fence=(1, 1), queue_ms=0)
    assert await peek.fetchval("SELECT count(*) FROM audit WHERE status = 'expired'") == 2


async def test_a_job_that_ends_in_the_queue_has_its_line_too(
    store: Store, peek: asyncpg.Connection
) -> None:
    cancelled = new_job(created_at=now() - timedelta(hours=1))
    parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    overdue = new_job(deadline_at=now() - timedelta(seconds=1), traceparent=parent)
    hour, failure = timedelta(hours=1), Failure("upstream_unavailable", "it was away")
    requeued = await run_one(store, new_job(created_at=now() - hour, deadline_at=now() + hour))
    await store.queue.finish(requeued, result(status=Status.FAILED, failure=failure))
    await peek.execute("UPDATE requests SET attempt_at = attempt_at - interval '30 minutes'")
    assert (await store.stuck.requeue_all(Requeue(now() - hour, now() + hour))).requeued == 1
    for job in (cancelled, overdue):
        await store.jobs.submit(job)
    with capture_logs() as logs:
        await store.jobs.cancel(cancelled.request_id, "default")
        assert await store.queue.expire_due() == 1
        await store.jobs.cancel(requeued.request_id, "default")
    ends = [line for line in logs if line["event"] == "job_done"]
    assert [(line["request_id"], line["code"], line["type"]) for line in ends] == [
        (str(cancelled.request_id), "cancelled", "text_only"),
        (str(overdue.request_id), "deadline_exceeded", "text_only"),
        (str(requeued.request_id), "cancelled", "text_only"),
    ]
    assert 3_600_000 <= ends[0]["queue_ms"] < 3_700_000
    assert ends[2]["queue_ms"] < 100_000, "since it was requeued"
    assert [line.get("trace_id") for line in ends] == [None, "ab" * 16, None]


async def test_a_job_that_was_never_admitted_can_fail_without_an_attempt(
    store: Store, peek: asyncpg.Connection
) -> None:
    await store.jobs.submit(new_job())
    claimed = await claim_one(store)
    failure = Failure("impossible", "no limit allows it")
    await store.queue.fail_unadmitted(claimed, unadmitted(Status.FAILED, failure))
    record = await store.requests.get(claimed.request_id, "default")
    assert (record.status, record.failure, record.attempts) == (Status.FAILED, failure, 0)
    assert await peek.fetchval("SELECT count(*) FROM attempts") == 0
    assert await peek.fetchval("SELECT count(*) FROM audit") == 1


async def test_the_place_counts_priority_first_then_age(store: Store) -> None:
    jobs = [new_job(), new_job(), new_job(priority=5)]
    for job in jobs:
        await store.jobs.submit(job)
    places = [(await store.requests.get(job.request_id, "default")).place for job in jobs]
    assert places == [2, 3, 1]


async def test_a_hundred_submits_at_once_share_a_few_commits(
    store: Store, peek: asyncpg.Connection
) -> None:
    await store.jobs.submit(new_job())
    jobs = [new_job(attachments=(upload(),)) for _ in range(100)]
    inserted_by = "SELECT count(DISTINCT xmin::text) FROM requests"
    await asyncio.gather(*(store.jobs.submit(job) for job in jobs))
    assert await peek.fetchval("SELECT count(*) FROM requests") == 101
    assert await peek.fetchval("SELECT count(*) FROM files") == 100
    assert await peek.fetchval(inserted_by) <= 5


async def test_text_that_postgresql_cannot_hold_harms_neither_itself_nor_others(
    store: Store,
) -> None:
    odd, plain = new_job("nul \x00 and half \ud83d"), new_job("plain")
    await asyncio.gather(store.jobs.submit(odd), store.jobs.submit(plain))
    assert (await store.requests.get(plain.request_id, "default")).status is Status.QUEUED
    for _ in range(2):
        claimed = await claim_one(store)
        await store.queue.running(claimed, model="m", fence=(1, 1), queue_ms=0)
        await store.queue.finish(claimed, result("answer \x00 \ud83d"))
    record = await store.requests.get(odd.request_id, "default")
    assert record.text == "answer \ufffd ?"


async def test_a_bad_row_fails_alone(store: Store) -> None:
    bad = new_job(priority=2**40)  # does not fit its column
    good = [new_job() for _ in range(5)]
    results = await asyncio.gather(
        *(store.jobs.submit(job) for job in [*good[:2], bad, *good[2:]]), return_exceptions=True
    )
    assert [isinstance(outcome, Exception) for outcome in results] == [False] * 2 + [True] + [
        False
    ] * 3
    for job in good:
        assert (await store.requests.get(job.request_id, "default")).status is Status.QUEUED


async def test_repeating_a_write_whose_reply_was_lost_changes_nothing(
    store: Store, peek: asyncpg.Connection
) -> None:
    job = new_job(attachments=(upload(),))
    await store.jobs.submit(job)
    await store.jobs.submit(job)
    claimed = await claim_one(store)
    for fence in ((1, 7), (1, 8)):
        await store.queue.running(claimed, model="m", fence=fence, queue_ms=0)
    for _ in range(2):
        await store.queue.finish(claimed, result())
    record = await store.requests.get(job.request_id, "default")
    assert (record.attempts, len(record.files)) == (1, 1)
    attempts = await peek.fetch("SELECT fence_sequence FROM attempts")
    assert [row["fence_sequence"] for row in attempts] == [8]
    assert await peek.fetchval("SELECT count(*) FROM audit") == 1
    assert await peek.fetchval("SELECT count(*) FROM bodies") == 2


async def test_ids_come_back_as_plain_uuids(store: Store) -> None:
    claimed = await run_one(store)
    assert type(claimed.request_id) is UUID
    assert type((await store.requests.get(claimed.request_id, "default")).request_id) is UUID
