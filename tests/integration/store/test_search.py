"""Finding requests of all tenants: what is found, in which order, and what it costs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from tests.integration.store.jobs import new_job, now, unadmitted, upload
from tests.waiting import wait_until
from tidegate.call import Kind, Status, new_id
from tidegate.errors import InvalidRequest
from tidegate.record import CallRecord, Failure
from tidegate.store import requests as search
from tidegate.store.database import sql
from tidegate.store.requests import END, SearchFilter
from tidegate.store.retention import Whose
from tidegate.store.store import Store

ALL = SearchFilter()
# Jobs that ended, each with its audit row, and native calls: ids that tell their time, as ours do.
FILL = """
    WITH made AS (
        SELECT n, now() - n * interval '10 seconds' AS at,
            lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint - n * 10000), 12, '0') AS head
        FROM generate_series(1, $1) AS n
    ), jobs AS (
        INSERT INTO requests (id, tenant_id, pool, source, status, kind, classified_by,
            classified_reason, prompt, created_at, finished_at)
        SELECT (head || '7000' || '8' || lpad(to_hex(n), 15, '0'))::uuid, 't' || n % 50, 'gemini',
            'job', 'succeeded', 'text_only', 'rules', '', 'p', at, at
        FROM made
    )
    INSERT INTO audit (id, created_at, request_id, tenant_id, pool, source, status, classified_by,
        classified_reason, priority, attempts, lapses, instance_id, submitted_at, finished_at)
    SELECT (head || '7' || side || '8' || lpad(to_hex(n), 15, '0'))::uuid, at,
        (head || '7' || side || '8' || lpad(to_hex(n), 15, '0'))::uuid, 't' || n % 50, 'gemini',
        source, 'succeeded', 'rules', '', 0, 1, 0, 'w', at, at
    FROM made CROSS JOIN (VALUES ('001', 'job'), ('002', 'relay')) AS sides (side, source)
"""


async def ids(store: Store, wanted: SearchFilter = ALL, limit: int = 200) -> list[UUID]:
    """All pages together."""
    found: list[UUID] = []
    before: UUID | None = END
    while before is not None:
        page = await store.requests.search(wanted, limit, before)
        assert len(page.items) <= limit
        found += [item.listed.request_id for item in page.items]
        before = page.before
    return found


def call(tenant_id: str, **changes: object) -> CallRecord:
    values = {
        "source": "relay",
        "request_id": new_id(),
        "tenant_id": tenant_id,
        "pool": "gemini",
        "endpoint": "/v1/chat/completions",
        "status": "succeeded",
        "http_status": 200,
        "received_at": now(),
        "finished_at": now(),
        "request": b"{}",
        "pieces": [b"{}"],
        "answer_bytes": 2,
    }
    return CallRecord(**{**values, **changes})  # type: ignore[arg-type]


async def put(store: Store, peek: asyncpg.Connection, *records: CallRecord) -> None:
    for record in records:
        store.audit.put(record)

    async def written() -> bool:
        known = [record.request_id for record in records]
        count = await peek.fetchval("SELECT count(*) FROM audit WHERE id = ANY($1)", known)
        return bool(count == len(records))

    await wait_until(written, 20, "the record of native calls")


async def test_all_tenants_and_sources_are_in_one_list_and_each_request_once(
    store: Store, peek: asyncpg.Connection
) -> None:
    job = new_job(tenant_id="a", attachments=(upload(),))
    await store.jobs.submit(job)
    native = call("b")
    await put(store, peek, native)
    stream = new_job(tenant_id="c", request_id=new_id())
    await store.audit.record_stream(stream, unadmitted(Status.SUCCEEDED, source="stream"))
    await wait_until(lambda: not store.audit._tasks, 20, "the record of the streams")
    line = call("d", source="batch", status=Status.FAILED, failure=Failure("upstream", "no"))
    await put(store, peek, line)
    await store.jobs.cancel(job.request_id, "a")
    assert await peek.fetchval("SELECT count(*) FROM audit") == 4, "one for each that has ended"
    newest_first = [line.request_id, stream.request_id, native.request_id, job.request_id]
    for limit in (1, 2, 4, 5):
        assert await ids(store, limit=limit) == newest_first
    (found,) = (await store.requests.search(SearchFilter(source="batch"), 9)).items
    assert (found.tenant_id, found.listed.source, found.endpoint) == (
        *("d", "batch", "/v1/chat/completions"),
    )
    assert found.listed.failure_code == "upstream"
    assert abs((found.listed.created_at - now()).total_seconds()) < 60, "read off its id"


async def test_filters_are_all_obeyed(store: Store, peek: asyncpg.Connection) -> None:
    start = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def at(seconds: int) -> dict[str, Any]:
        moment = start + timedelta(seconds=seconds)
        ms = round(moment.timestamp() * 1000)
        spread = UUID(int=ms << 80 | new_id().int & (1 << 80) - 1)
        return {"created_at": moment, "request_id": spread}

    text = new_job(**at(0), tenant_id="a", model="gemini-a", subject="ann")
    other = new_job(**at(1), tenant_id="b")
    native = call("a", request_id=at(2)["request_id"], received_at=at(2)["created_at"], model="m")
    native.upstream = "spare"
    for job in (text, other):
        await store.jobs.submit(job)
    await put(store, peek, native)
    await store.jobs.cancel(other.request_id, "b")
    expected: dict[SearchFilter, list[Any]] = {
        SearchFilter(statuses=frozenset({Status.QUEUED})): [text],
        SearchFilter(statuses=frozenset({Status.QUEUED, Status.CANCELLED})): [other, text],
        SearchFilter(tenant_id="a"): [native, text],
        SearchFilter(tenant_id="a\0"): [],
        SearchFilter(model="gemini-a"): [text],
        SearchFilter(kind=Kind.TEXT_ONLY): [other, text],
        SearchFilter(source="relay"): [native],
        SearchFilter(failure_code="cancelled"): [other],
        SearchFilter(subject="ann"): [text],
        SearchFilter(upstream="spare"): [native, text],  # which may be called there
        SearchFilter(upstream="spare\0"): [text],
        SearchFilter(since=start + timedelta(seconds=1)): [native, other],
        SearchFilter(until=start + timedelta(seconds=1)): [text],
        SearchFilter(since=datetime.max.replace(tzinfo=UTC)): [],
        SearchFilter(until=datetime.min.replace(tzinfo=UTC)): [],
        SearchFilter(prefix=text.request_id.hex): [text],
        SearchFilter(prefix=text.request_id.hex[:20]): [text],
        SearchFilter(prefix="0"): [native, other, text],
        SearchFilter(prefix="f"): [],
        SearchFilter(prefix="f" * 32): [],
    }
    for wanted, requests in expected.items():
        assert await ids(store, wanted, 2) == [one.request_id for one in requests], wanted


async def test_a_line_of_a_batch_is_found_while_a_worker_has_it(
    store: Store, peek: asyncpg.Connection
) -> None:
    held, queued = new_id(), new_id()
    await peek.execute(
        "INSERT INTO batches (id, tenant_id, endpoint, input_file_id, input_blob, input_bytes, "
        "completion_window, total, expires_at) "
        "VALUES ($1, 'a', '/v1/chat/completions', $1, 'b', 9, '24h', 2, now())",
        held,
    )
    for number, (line, state) in enumerate(((held, "calling"), (queued, "queued"))):
        await peek.execute(
            "INSERT INTO batch_lines (batch_id, line, id, tenant_id, custom_id, body, size_bytes, "
            "state) VALUES ($1, $2, $3, 'a', 'c', '{}', 2, $4)",
            *(held, number, line, state),
        )
    (found,) = (await store.requests.search(ALL, 9)).items
    assert (found.listed.request_id, found.listed.status) == (held, Status.RUNNING)
    detail = await store.requests.detail(held)
    assert (detail.record.source, detail.record.status) == ("batch", Status.RUNNING)


async def test_a_rare_one_is_found_over_several_looks_that_are_each_bounded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MOST_LOOKED_AT", 4)
    rare = new_job(model="rare")
    await store.jobs.submit(rare)
    for _ in range(10):
        await store.jobs.submit(new_job())
    page = await store.requests.search(SearchFilter(model="rare"), 5)
    assert (page.items, page.before is not None) == ((), True)
    assert await ids(store, SearchFilter(model="rare"), 5) == [rare.request_id]


async def test_a_page_reads_no_more_than_it_looks_at(peek: asyncpg.Connection) -> None:
    await peek.execute(FILL, 5_000)
    await peek.execute("ANALYZE requests, audit")
    whole = (UUID(int=0), END)
    nothing: list[object] = [None] * 8
    times = [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC), None]
    rare = [["queued"], *nothing[1:]]
    looks: dict[str, tuple[str, list[object], int]] = {
        "the first page": ("search_requests", [*whole, 51, 4_000, *nothing, *times], 400),
        "a rare one": ("search_requests", [*whole, 51, 4_000, *rare, *times], 12_100),
        "how far it came": ("search_reach", [*whole, 4_000], 12_100),
    }
    for what, (name, arguments, most_rows) in looks.items():
        async with peek.transaction():
            await peek.execute("SET LOCAL enable_seqscan = off; SET LOCAL jit = off")
            lines = await peek.fetch(
                f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {sql(name)}", *arguments
            )
        plan = "\n".join(line[0] for line in lines)
        assert "Seq Scan" not in plan, f"{what}:\n{plan}"
        scans = [line[0] for line in lines if "Scan" in line[0] and "(actual rows=" in line[0]]
        read = sum(float(line.split("(actual rows=")[1].split()[0]) for line in scans)
        assert read <= most_rows, f"{what}:\n{plan}"


async def said(store: Store, text: str, **changes: Any) -> list[UUID]:
    return await ids(store, SearchFilter(text=text, in_prompts=True, **changes), 2)


async def test_words_of_prompts_subjects_and_keys_are_found(
    store: Store, peek: asyncpg.Connection
) -> None:
    begun = now()
    later = [begun + timedelta(seconds=seconds) for seconds in (1, 2, 3)]
    firsts = [UUID(int=round(at.timestamp() * 1000) << 80) for at in later]
    first = call("a", prompt_head="Which tides are highest at Saint-Malo?", subject="ann@acme.org")
    second = call("b", prompt_head="WHICH ferry 'runs' \\ today?", key_id="tg_Qx3")
    third = call("a", prompt_head=None, subject="which")
    for record, request_id in zip((first, second, third), firsts, strict=True):
        record.request_id = request_id
    await put(store, peek, first, second, third)
    job = new_job(tenant_id="a", prompt="Which " + "x " * 250 + "beyond")
    await store.jobs.submit(job)
    assert await said(store, "which") == [one.request_id for one in (third, second, first)]
    await store.jobs.cancel(job.request_id, "a")
    ended = [one.request_id for one in (third, second, first, job)]
    assert await said(store, "which") == ended
    assert await said(store, "WHI") == ended, "by its beginning, in any case"
    expected: dict[str, list[Any]] = {
        "highest saint-malo": [first],
        "highest ferry": [],
        "ferry 'runs' \\ !": [second],
        "ann@acme.org": [first],
        "highest ANN@acme": [first],
        "ann": [first],
        "tg_Qx3": [second],
        "beyond": [],
        "'\\\0": [],
        "& | <-> ((": [],
        str(second.request_id): [second],
        second.id.hex[:20]: [second],
    }
    for text, found in expected.items():
        assert await said(store, text) == [one.request_id for one in found], text
    assert await said(store, "which", tenant_id="b") == [second.request_id]
    assert await said(store, "which", source="job") == [job.request_id]
    without = SearchFilter(text="which")
    assert await ids(store, without) == [third.request_id], "of subjects and keys alone"


async def test_a_text_is_not_found_once_it_is_erased(
    store: Store, peek: asyncpg.Connection
) -> None:
    mine = call("a", prompt_head="which of us", subject="ann")
    other = call("a", prompt_head="which of them", subject="bob")
    await put(store, peek, mine, other)
    await store.retention.erase(Whose("a", "ann"))
    assert await said(store, "which") == [other.request_id]


async def test_a_rare_word_is_found_by_its_index_and_a_common_one_among_the_latest(
    store: Store, peek: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_RECENT", 50)
    await peek.execute(FILL, 5_000)
    await peek.execute(
        "UPDATE audit SET created_at = now(), "
        "prompt_head = 'the tide ' || CASE WHEN n % 2500 = 0 THEN 'rare' "
        "ELSE 'usual' END FROM (SELECT id AS one, row_number() OVER (ORDER BY id) AS n FROM audit) "
        "AS made WHERE one = id"
    )
    await peek.execute("ANALYZE audit")
    newest = await peek.fetch("SELECT request_id FROM audit ORDER BY id DESC LIMIT 3")
    page = await store.requests.search(SearchFilter(text="tide", in_prompts=True), 3)
    assert [one.listed.request_id for one in page.items] == [row[0] for row in newest]
    assert len(await said(store, "rare")) == 4
    times = [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC), None]
    start = now() - timedelta(days=1)
    for among, most_rows in (("recently_ended", 200), ("ended_with_words", 100)):
        text = sql("search_words").format(among=sql(among))
        async with peek.transaction():
            await peek.execute("SET LOCAL enable_seqscan = off; SET LOCAL jit = off")
            lines = await peek.fetch(
                f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {text}",
                *(END, start, "'rare':*", 50, 4, *[None] * 8, *times, UUID(int=0)),
            )
        plan = "\n".join(line[0] for line in lines)
        assert "Seq Scan" not in plan, plan
        scans = [line[0] for line in lines if "Scan" in line[0] and "(actual rows=" in line[0]]
        read = sum(float(line.split("(actual rows=")[1].split()[0]) for line in scans)
        assert read <= most_rows, f"{among}:\n{plan}"


async def test_pages_of_a_common_word_go_on_over_what_is_searched_first(
    store: Store, peek: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left out or found twice where a page ends within a day or a week, here minutes;
    nor is a call that was received before them, and got its id within them."""
    monkeypatch.setattr(search, "_RECENT", 3)
    monkeypatch.setattr(search, "_SEARCHED_FIRST", (timedelta(minutes=1), timedelta(minutes=10)))
    monkeypatch.setattr(search, "_ID_AFTER", timedelta(seconds=55))
    await peek.execute(FILL, 180)
    await peek.execute(
        "UPDATE audit SET prompt_head = 'the tide', created_at = created_at"
        " - CASE WHEN n % 2 = 0 THEN interval '50 seconds' ELSE interval '0 seconds' END"
        " FROM (SELECT id AS one, row_number() OVER (ORDER BY id DESC) AS n FROM audit) AS made"
        " WHERE one = id"
    )
    found = await peek.fetch(
        "SELECT id FROM audit WHERE created_at >= date_trunc('day', now(), 'UTC') ORDER BY id DESC"
    )
    every = [row[0] for row in found]
    assert await ids(store, SearchFilter(text="tide", in_prompts=True), 4) == every


async def test_a_search_that_takes_too_long_is_refused_and_the_store_is_not_away(
    store: Store, peek: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_WORDS_TIMEOUT_MS", 100)
    async with peek.transaction():
        await peek.execute("LOCK TABLE audit IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(InvalidRequest, match="too many requests match"):
            await said(store, "tide")
    assert not store.connections.unavailable
    assert await said(store, "tide") == []
