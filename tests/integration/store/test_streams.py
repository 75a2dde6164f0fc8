"""Streams in the record: whole, once, in batches, through a bounded buffer."""

from __future__ import annotations

import asyncio
import time

import asyncpg
import pytest

from tests.integration.store.conftest import MakeStore
from tests.integration.store.jobs import new_job, picture, result, unadmitted, upload
from tests.waiting import promised_s, wait_until
from tidegate.call import Status, Usage
from tidegate.embedded.servers import PostgresServer
from tidegate.record import CallRecord, Failure
from tidegate.store import audit as recorder
from tidegate.store.records import NewJob
from tidegate.store.store import Store


def stream(record: CallRecord | None = None) -> tuple[NewJob, CallRecord]:
    job = new_job("What is modern family?", attachments=(upload(),))
    return job, record or result(source="stream", files=(picture(),))


async def count(connection: asyncpg.Connection, table: str) -> int:
    found: int = await connection.fetchval(f"SELECT count(*) FROM {table}")
    return found


async def test_a_stream_is_recorded_whole(store: Store, peek: asyncpg.Connection) -> None:
    job, record = stream()
    await store.audit.record_stream(job, record)
    await wait_until(lambda: peek.fetchval("SELECT count(*) FROM audit"))
    found = await store.requests.get(job.request_id, "default")
    assert (found.source, found.status, found.attempts) == ("stream", Status.SUCCEEDED, 1)
    assert [file.role for file in found.files] == ["input", "output"]
    assert found.model == "gemini-test"
    (attempt,) = await peek.fetch("SELECT * FROM attempts")
    assert (attempt["outcome"], attempt["request_id"]) == ("succeeded", job.request_id)
    assert (attempt["fence_epoch"], attempt["total_tokens"]) == (1, 14)
    (audit,) = await peek.fetch("SELECT * FROM audit")
    assert (audit["source"], audit["output_tokens"]) == ("stream", 9)
    assert await count(peek, "bodies") == 2


async def test_a_stream_that_was_never_admitted_is_recorded_with_its_refusal(
    store: Store, peek: asyncpg.Connection
) -> None:
    failure = Failure("deadline_exceeded", "still waiting after 30 s")
    job, record = stream(unadmitted(Status.EXPIRED, failure, source="stream"))
    await store.audit.record_stream(job, record)
    await wait_until(lambda: peek.fetchval("SELECT count(*) FROM audit"))
    found = await store.requests.get(job.request_id, "default")
    assert (found.status, found.failure, found.attempts) == (Status.EXPIRED, failure, 0)
    assert found.usage == Usage()
    assert await count(peek, "attempts") == 0


async def test_a_stream_recorded_twice_is_there_once(
    store: Store, peek: asyncpg.Connection
) -> None:
    job, record = stream()
    for _ in range(2):
        await store.audit.record_stream(job, record)
        await wait_until(lambda: not store.audit._tasks)
    assert await count(peek, "audit") == 1
    assert await count(peek, "attempts") == 1


async def test_many_streams_share_few_transactions(store: Store, peek: asyncpg.Connection) -> None:
    await asyncio.gather(*(store.audit.record_stream(*stream()) for _ in range(200)))
    await wait_until(lambda: not store.audit._tasks)
    assert await count(peek, "audit") == 200
    assert await peek.fetchval("SELECT count(DISTINCT xmin::text) FROM audit") <= 40


async def test_closing_writes_what_is_buffered(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    store = await make_store(database_url)
    await asyncio.gather(*(store.audit.record_stream(*stream()) for _ in range(50)))
    await store.aclose()
    assert await count(peek, "audit") == 50


@pytest.mark.parametrize("when_full", ["block", "drop"])
async def test_a_full_buffer_blocks_or_drops_as_it_was_told(
    when_full: str,
    own_server: PostgresServer,
    own_url: str,
    make_store: MakeStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder, "MAX_PENDING_STREAMS", 5)
    store = await make_store(own_url, audit_full=when_full, spill_max_bytes=0)
    await wait_until(store.schema_fits)
    own_server.stop()
    try:
        for _ in range(5):
            await store.audit.record_stream(*stream())
        began = time.monotonic()
        sixth = asyncio.create_task(store.audit.record_stream(*stream()))
        if when_full == "drop":
            await sixth
            assert store.audit._entries_left_out.count == 1
        else:
            await asyncio.wait({sixth}, timeout=0.3)
            assert not sixth.done()
        assert time.monotonic() - began < promised_s(2.0)
    finally:
        await asyncio.to_thread(own_server.start)
    await asyncio.wait_for(sixth, 10)
    await wait_until(lambda: not store.audit._tasks)
    peek = await asyncpg.connect(own_url)
    assert await count(peek, "audit") == (6 if when_full == "block" else 5)
    await peek.close()
