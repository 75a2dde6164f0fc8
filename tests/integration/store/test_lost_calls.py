"""Calls whose process died: on record at the upstream that they were made at, so that they explain
what the provider counts."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from os import urandom
from pathlib import Path

import asyncpg
import pytest

from tests.integration.store.conftest import MakeStore
from tests.integration.store.jobs import beat, new_job, now, result
from tests.waiting import wait_until
from tidegate.call import DEFAULT_POOL, Caller, Charge, Kind, Status, Usage, UsageState, new_id
from tidegate.errors import ClaimLost, NotFound, StoreUnavailable
from tidegate.prices.reconciliation import DoubtfulCall, UsageSum, compared
from tidegate.record import CallRecord
from tidegate.store.batches import INPUT, BatchFile, BatchLine
from tidegate.store.queue import MAX_LAPSES
from tidegate.store.records import ClaimedJob, Json
from tidegate.store.retention import Whose, mark_erased
from tidegate.store.spill import CallJournal
from tidegate.store.store import Store

LEASE_MS = 900
TOLD = Charge(UsageState.TOLD, Usage(5, 9, total_tokens=14), None, 100)


def today() -> datetime:
    return datetime.now(UTC)


async def doubtful(store: Store, upstream: str) -> list[DoubtfulCall]:
    days = await store.reconciliations.ours(upstream, today().date())
    return [call for day in days.values() for call in day.doubtful]


def a_stream() -> CallRecord:
    return CallRecord(
        "stream",
        "acme",
        now(),
        new_id(),
        kind="text_only",
        model="m",
        upstream="oai",
        pool="oai",
        attempts=1,
        streamed=True,
        admitted_at=now(),
        subject="s",
        key_id="k",
    )


def died_with(folder: Path, *records: CallRecord) -> None:
    """A process that died in the midst of these calls."""
    journal = CallJournal(folder)
    journal.open()
    for record in records:
        journal.enter(record)
    journal.close()


async def test_a_stream_of_a_killed_process_is_on_record_and_explains_what_it_cost(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection, tmp_path: Path
) -> None:
    stream = a_stream()
    died_with(tmp_path, stream)
    store = await make_store(database_url, spill_dir=tmp_path)

    async def found() -> bool:
        with suppress(NotFound):
            await store.requests.get(stream.id, "acme")
            return True
        return False

    await wait_until(found, 10, "the record of the stream")
    record = await store.requests.get(stream.id, "acme")
    assert (record.source, record.status, record.attempts) == ("stream", Status.FAILED, 1)
    assert record.failure is not None
    assert record.failure.code == "process_died"
    assert (record.model, record.text, record.usage) == ("m", None, Usage())
    row = await peek.fetchrow("SELECT source, usage_state, cost_micros, subject FROM audit")
    assert tuple(row) == ("stream", "unknown", None, "s")
    assert await peek.fetchval("SELECT count(*) FROM bodies") == 0
    (call,) = await doubtful(store, "oai")
    assert (call.request_id, call.state) == (stream.id, "unknown")
    day = today().date()
    ours = await store.reconciliations.ours("oai", day)
    (finding,) = compared(ours, {"m": UsageSum(1, 10, 0, 0, 20, 0, 77)}, {"m": None})
    assert finding.verdict == "explained"
    assert await store.reconciliations.keep("oai", "openai", day, [finding]) == 1
    assert await peek.fetchval("SELECT sum(cost_micros)::int FROM audit") == 77
    assert await peek.fetchval("SELECT sum(cost_micros)::int FROM usage_days") == 77


async def test_a_stream_that_was_recorded_before_its_process_died_stays_as_it_was(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection, tmp_path: Path
) -> None:
    store = await make_store(database_url, spill_dir=tmp_path / "its-own")
    record = result(source="stream", request_id=new_id(), tenant_id="acme", upstream="oai")
    job = new_job(request_id=record.id, tenant_id="acme")
    await store.audit.record_stream(job, record)
    await wait_until(lambda: peek.fetchval("SELECT count(*) FROM audit"))
    other = a_stream()
    died_with(tmp_path / "of-the-dead", dataclasses.replace(record, status=""), other)
    again = await make_store(database_url, spill_dir=tmp_path / "of-the-dead")
    await wait_until(lambda: peek.fetchval("SELECT count(*) = 2 FROM audit"), 10)
    found = await again.requests.get(record.id, "acme")
    assert (found.status, found.text) == (Status.SUCCEEDED, "Because of Rayleigh.")
    assert await peek.fetchval("SELECT count(*) FROM attempts") == 2


async def test_a_stream_leaves_the_journal_with_its_record(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    store = await make_store(database_url)
    record = result(source="stream", request_id=new_id())
    store.journal.enter(record)
    assert record.slot is not None
    await store.audit.record_stream(new_job(request_id=record.id), record)
    await wait_until(lambda: peek.fetchval("SELECT count(*) FROM audit"))
    await wait_until(lambda: record.slot is None)


async def claimed(store: Store) -> ClaimedJob:
    async def look() -> list[ClaimedJob]:
        with suppress(StoreUnavailable):  # within a third of a short lease: the next look does it
            return await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1)
        return []

    job: ClaimedJob
    (job,) = await wait_until(look, 10, "a job to claim")
    return job


async def dies_over_its_job(make_store: MakeStore, url: str, judge: Store, upstream: str) -> None:
    victim = await make_store(url, claim_lease_ms=60_000)
    job = await claimed(victim)
    await victim.queue.running(job, model="m", upstream=upstream, fence=(1, 1), queue_ms=0)

    async def taken() -> bool:
        with suppress(StoreUnavailable):  # within a third of a short lease: the next look does it
            await judge.queue.heartbeat()
            return bool(await judge.queue.retake_expired())
        return False

    await wait_until(taken, 10, "the job of a dead worker")


@pytest.mark.parametrize("ends", ["dead", "cancelled", "answered"])
async def test_a_job_whose_worker_died_is_doubtful_at_the_upstream_of_that_call(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection, ends: str
) -> None:
    judge = await make_store(database_url, claim_lease_ms=LEASE_MS)
    job = new_job()
    await judge.jobs.submit(job)
    for _ in range(MAX_LAPSES if ends == "dead" else 1):
        await dies_over_its_job(make_store, database_url, judge, "oai")
        await peek.execute("UPDATE requests SET not_before = NULL")
    if ends == "cancelled":
        await judge.jobs.cancel(job.request_id, "default")
    elif ends == "answered":
        again = await claimed(judge)
        await judge.queue.running(again, model="m", upstream="oai", fence=(1, 2), queue_ms=0)
        await judge.queue.finish(again, result(upstream="oai", model="m", charge=TOLD))
    (call,) = await doubtful(judge, "oai")
    assert call.request_id == job.request_id
    assert call.state == ("unknown" if ends == "dead" else "repeated")
    assert await doubtful(judge, DEFAULT_POOL) == []


async def begun_line(store: Store, upstream: str) -> BatchLine:
    async def look() -> list[BatchLine]:
        return await store.batch_lines.claim(1, 1_000, [])

    line: BatchLine
    (line,) = await wait_until(look, 10, "a line to claim")
    await store.batch_lines.begin(line, upstream, "m-dated")
    return line


async def with_lines(store: Store, count: int, tenant_id: str = "default") -> list[Json]:
    """Lines of a batch that has begun."""
    file = BatchFile(new_id(), tenant_id, INPUT, "in.jsonl", 100, count, "key")
    await store.batches.add(new_id(), Caller(tenant_id), file, "/v1/chat/completions", None)
    batch = await store.batches.take()
    assert batch is not None
    body = '{"model": "an-alias", "messages": []}'
    lines = [
        {"line": number, "id": new_id(), "custom_id": f"a-{number}", "body": body}
        for number in range(1, count + 1)
    ]
    await store.batches.add_lines(batch, lines)
    await store.batches.begin(batch, count)
    return lines


@pytest.mark.parametrize("lapses", [1, MAX_LAPSES])
async def test_a_line_of_a_batch_whose_worker_died_is_doubtful_at_that_upstream(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection, lapses: int
) -> None:
    judge = await make_store(database_url, claim_lease_ms=LEASE_MS)
    (line,) = await with_lines(judge, 1)
    for number in range(1, lapses + 1):
        victim = await make_store(database_url, claim_lease_ms=60_000)
        await beat(victim)
        await begun_line(victim, "oai")
        await victim.aclose()

        async def taken(number: int = number) -> bool:
            with suppress(StoreUnavailable):
                await judge.queue.heartbeat()
                await judge.batch_lines.retake()
            await peek.execute("UPDATE batch_lines SET not_before = NULL")
            return bool(await peek.fetchval("SELECT lapses = $1 FROM batch_lines", number))

        await wait_until(taken, 10, "the line of a dead worker")
    if lapses < MAX_LAPSES:
        again = await begun_line(judge, "oai")
        assert again.lapses == 1
        record = result(
            source="batch",
            request_id=again.id,
            lapses=again.lapses,
            upstream="oai",
            model="m-dated",
            charge=TOLD,
            model_version=None,
        )
        call = await judge.audit.prepare(record)
        await judge.batch_lines.end(again, call, status_code=200, answer="{}", failure=None)
    days = await judge.reconciliations.ours("oai", today().date())
    assert list(days) == ["m-dated"]
    (lost,) = days["m-dated"].doubtful
    assert lost.request_id == line["id"]
    assert lost.state == ("unknown" if lapses == MAX_LAPSES else "repeated")


async def test_lines_and_a_batch_whose_tenant_is_erased_meanwhile_leave_no_body(
    store: Store, peek: asyncpg.Connection, tmp_path: Path
) -> None:
    """Neither where the tenant is marked as erased, nor where its batches are gone too."""

    def blobs() -> list[Path]:
        return [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]

    await beat(store)
    await with_lines(store, 2, "acme")
    lines = [await begun_line(store, "oai") for _ in range(2)]
    calls = []
    for line in lines:
        record = result(source="batch", request_id=line.id, tenant_id="acme")
        record.request = urandom(30_000)
        calls.append(await store.audit.prepare(record))
    assert len(blobs()) == 2
    await store.connections.run(lambda connection: mark_erased(connection, "acme", None))
    end = partial(store.batch_lines.end, status_code=200, answer="{}", failure=None)
    await end(lines[0], calls[0])
    assert len(blobs()) == 1
    assert (await store.retention.erase(Whose("acme"), dry_run=False, within_s=20)).done
    await end(lines[1], calls[1])
    assert blobs() == []
    assert await peek.fetchval("SELECT count(*) FROM audit") == 0


async def test_a_batch_that_is_erased_before_it_ends_is_lost(
    store: Store, peek: asyncpg.Connection
) -> None:
    await with_lines(store, 1)
    await peek.execute("UPDATE batches SET status = 'finalizing'")
    batch = await store.batches.take()
    assert batch is not None
    await peek.execute("DELETE FROM batches")
    with pytest.raises(ClaimLost, match="erased"):
        await store.batches.end(batch, None, None)
