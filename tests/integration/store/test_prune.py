"""Retention: what goes, what stays, and the partitions by day."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta
from typing import Never

import asyncpg
import pytest
from structlog.testing import capture_logs

from tests.integration.store.jobs import new_job, now, result
from tests.waiting import wait_until
from tidegate.call import DEFAULT_POOL, Attachment, Kind, new_id
from tidegate.errors import NotFound
from tidegate.record import OutputFile
from tidegate.store import database as partitions
from tidegate.store import retention
from tidegate.store.blobs import new_key
from tidegate.store.records import attempts_since, dumps, ends_of
from tidegate.store.store import Store

_LOCKED = (
    "SELECT relation::regclass::text AS name FROM pg_locks "
    "WHERE pid = pg_backend_pid() AND relation IS NOT NULL"
)


async def stored(store: Store, data: bytes) -> str:
    key = new_key(datetime.now(UTC) - timedelta(days=40))
    await store.blobs.put(key, data)
    return key


async def there(store: Store, key: str) -> bool:
    try:
        await store.blobs.get(key)
    except NotFound:
        return False
    return True


async def test_pruning_takes_the_old_ended_requests_and_never_a_queued_or_running_one(
    store: Store, peek: asyncpg.Connection
) -> None:
    keys = {name: await stored(store, b"x") for name in ("old", "picture", "fresh", "queued")}
    ended = {}
    for name in ("old", "fresh"):
        upload = Attachment(new_id(), "a.pdf", "application/pdf", 1, keys[name])
        await store.jobs.submit(new_job(attachments=(upload,)))
        (claimed,) = await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1)
        await store.queue.running(claimed, model="m", fence=(1, 1), queue_ms=0)
        pictures: tuple[OutputFile, ...] = ()
        if name == "old":
            pictures = (OutputFile(new_id(), "image/png", 1, keys["picture"]),)
        await store.queue.finish(claimed, result(files=pictures))
        ended[name] = claimed.request_id
    upload = Attachment(new_id(), "a.pdf", "application/pdf", 1, keys["queued"])
    ancient = now() - timedelta(days=400)
    waiting = new_job(created_at=ancient, attachments=(upload,))
    running = new_job(created_at=ancient - timedelta(days=1))
    await store.jobs.submit(running)
    (claimed,) = await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1)
    await store.queue.running(claimed, model="m", fence=(1, 1), queue_ms=0)
    await store.jobs.submit(waiting)
    await peek.execute(
        "UPDATE requests SET finished_at = now() - interval '31 days 1 hour' WHERE id = $1",
        ended["old"],
    )
    report = await store.retention.prune(30)
    assert (report.requests, report.blobs) == (1, 2)
    left = {row["id"] for row in await peek.fetch("SELECT id FROM requests")}
    assert left == {ended["fresh"], waiting.request_id, running.request_id}
    assert {name: await there(store, key) for name, key in keys.items()} == {
        "old": False,
        "picture": False,
        "fresh": True,
        "queued": True,
    }
    assert (await store.retention.prune(30)).requests == 0


async def test_old_partitions_are_dropped_with_the_blobs_of_their_bodies(
    store: Store, peek: asyncpg.Connection
) -> None:
    old = datetime.now(UTC).date() - timedelta(days=45)
    async with peek.transaction():
        await partitions.make_ahead(peek, old)
    key = await stored(store, b"body")
    await peek.execute(
        "INSERT INTO bodies (id, created_at, role, pool, encoding, size_bytes, blob_key) "
        "VALUES ($1, $2, 'request', 'gemini', 'zlib', 4, $3)",
        new_id(),
        datetime.combine(old, datetime.min.time(), UTC) + timedelta(hours=5),
        key,
    )
    report = await store.retention.prune(30)
    made = (partitions.DAYS_AHEAD + 1) * len(partitions.TABLES)
    assert (report.partitions, report.skipped, report.blobs) == (made, 0, 1)
    assert not await there(store, key)
    name = partitions.name_of("bodies", old)
    assert await peek.fetchval("SELECT to_regclass($1) IS NULL", name)


async def test_a_partition_in_use_is_left_for_the_next_run(
    store: Store, peek: asyncpg.Connection
) -> None:
    old = datetime.now(UTC).date() - timedelta(days=45)
    async with peek.transaction():
        await partitions.make_ahead(peek, old)
    name = partitions.name_of("audit", old)
    async with peek.transaction():
        await peek.execute(f"LOCK TABLE {name} IN ACCESS SHARE MODE")
        report = await store.retention.prune(30)
    assert report.skipped == 1
    assert (await store.retention.prune(30)).partitions == 1


async def test_rows_that_fell_into_the_default_partition_move_to_their_day(
    peek: asyncpg.Connection,
) -> None:
    day = date(2031, 5, 17)
    when = datetime(2031, 5, 17, 12, tzinfo=UTC)
    insert = (
        "INSERT INTO bodies (id, created_at, role, pool, encoding, size_bytes, data) "
        "VALUES ($1, $2, 'request', 'gemini', 'zlib', 1, 'x')"
    )
    await peek.execute(insert, new_id(), when)
    assert await peek.fetchval("SELECT count(*) FROM bodies_default") == 1
    for _ in range(2):
        async with peek.transaction():
            await partitions.make_ahead(peek, day)
    assert await peek.fetchval("SELECT count(*) FROM bodies_default") == 0
    assert await peek.fetchval("SELECT count(*) FROM bodies_20310517") == 1


async def test_rows_that_come_while_their_partition_is_made_are_in_it(
    peek: asyncpg.Connection, database_url: str
) -> None:
    insert = (
        "INSERT INTO bodies (id, created_at, role, pool, encoding, size_bytes, data) "
        "VALUES ($1, '2031-05-17 12:00Z', 'request', 'gemini', 'zlib', 1, 'x')"
    )
    maker, before, after = [await asyncpg.connect(database_url) for _ in range(3)]

    async def waits(one: asyncpg.Connection) -> bool:
        query = "SELECT cardinality(pg_blocking_pids($1)) > 0"
        return bool(await peek.fetchval(query, one.get_server_pid()))

    async def make() -> list[str]:
        async with maker.transaction():
            return await partitions.make_ahead(maker, date(2031, 5, 17))

    async with before.transaction():
        await before.execute(insert, new_id())
        making = asyncio.create_task(make())
        await wait_until(lambda: waits(maker))
        writing = asyncio.create_task(after.execute(insert, new_id()))
        await wait_until(lambda: waits(after))
    assert "bodies_20310517" in await making
    await writing
    assert await peek.fetchval("SELECT count(*) FROM bodies_20310517") == 2
    for one in (maker, before, after):
        await one.close()


async def test_partitions_that_are_there_are_found_beside_one_that_makes_others(
    peek: asyncpg.Connection, database_url: str
) -> None:
    maker = await asyncpg.connect(database_url)
    async with maker.transaction():
        await maker.execute(f"SELECT pg_advisory_xact_lock({partitions.PARTITIONS_LOCK})")
        async with asyncio.timeout(10), peek.transaction():
            assert await partitions.make_ahead(peek, datetime.now(UTC).date()) == []
    await maker.close()


async def test_no_partition_is_waited_for_while_a_backup_has_the_table(
    peek: asyncpg.Connection, database_url: str
) -> None:
    reader = await asyncpg.connect(database_url)
    async with reader.transaction():
        await reader.execute("LOCK TABLE attempts_default IN ACCESS SHARE MODE")
        async with asyncio.timeout(5):
            with pytest.raises(asyncpg.LockNotAvailableError):
                async with peek.transaction():
                    await partitions.make_ahead(peek, date(2031, 5, 17))
    await reader.close()


async def test_a_running_store_makes_the_partitions_of_the_coming_days(
    store: Store, peek: asyncpg.Connection
) -> None:
    ahead = datetime.now(UTC).date() + timedelta(days=partitions.DAYS_AHEAD)
    name = partitions.name_of("audit", ahead)
    await wait_until(lambda: peek.fetchval("SELECT to_regclass($1) IS NOT NULL", name))


async def test_partitions_that_cannot_be_made_are_told_of_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries = 0

    class Refusing(partitions.Connections):
        async def run(self, *_: object, **__: object) -> Never:
            nonlocal tries
            tries += 1
            raise asyncpg.InvalidObjectDefinitionError(f"they overlap, at try {tries}")

    monkeypatch.setattr(retention, "_HOUSE_RETRY_S", 0)
    with capture_logs() as logs:
        making = asyncio.create_task(retention.make_partitions(Refusing("postgresql://x")))
        await wait_until(lambda: tries > 2, 10)
        making.cancel()
        await asyncio.gather(making, return_exceptions=True)
    (told,) = logs
    assert (told["event"], told["log_level"]) == ("partitions_missing", "warning")
    assert told["detail"] == "they overlap, at try 1"


async def test_a_job_locks_the_partitions_of_its_own_days_alone(
    store: Store, database_url: str, peek: asyncpg.Connection
) -> None:
    """However long the record is kept: the server has room for so many locks and no more."""
    async with peek.transaction():
        await partitions.make_ahead(peek, now().date() - timedelta(days=9))
    kind = partitions.DatabaseSession
    session = await asyncpg.connect(database_url, statement_cache_size=0, connection_class=kind)
    came = now()
    first, again = ({"id": new_id(), "claim": claim, "created_at": came} for claim in (1, 2))
    for name, values in {
        "end_attempts": ends_of([first]),
        "begin_running": (dumps([first]), "w", attempts_since([first])),
        "begin_another": (first["id"], first["id"], 1, "w", "m", 0, 0, now(), "u", now()),
    }.items():
        for _ in range(7):  # a plan for any value is made at the sixth
            async with session.transaction():
                await session.execute(partitions.sql(name), *values)
                locked = {row["name"] for row in await session.fetch(_LOCKED)}
            assert "attempts" in locked
            assert not locked & {
                partitions.name_of("attempts", now().date() - timedelta(days=day))
                for day in range(2, 10)
            }, name
    await session.close()
    assert attempts_since([first, again]) < came < attempts_since([first])


async def test_processes_that_make_partitions_at_once_do_not_collide(
    store: Store, database_url: str
) -> None:
    async def make() -> None:
        connection = await asyncpg.connect(database_url)
        async with connection.transaction():
            await partitions.make_ahead(connection, date(2032, 1, 1))
        await connection.close()

    await asyncio.gather(make(), make(), make())


async def test_a_request_is_read_in_no_partition_of_before_its_receipt(
    store: Store, peek: asyncpg.Connection
) -> None:
    old = partitions.name_of("audit", datetime.now(UTC).date() - timedelta(days=45))
    async with peek.transaction():
        await partitions.make_ahead(peek, datetime.now(UTC).date() - timedelta(days=45))
    async with peek.transaction():
        await peek.execute(f"LOCK TABLE {old} IN ACCESS EXCLUSIVE MODE")
        for read in (
            store.requests.get(new_id(), "default"),
            store.requests.detail(new_id()),
            store.requests.body(new_id(), "default", "request"),
            store.requests.body_of_any(new_id(), "request"),
        ):
            with pytest.raises(NotFound):
                await read


async def test_an_old_upload_whose_submit_never_came_is_swept(
    store: Store, peek: asyncpg.Connection
) -> None:
    orphan, wanted = await stored(store, b"x"), await stored(store, b"y")
    upload = Attachment(new_id(), "a.pdf", "application/pdf", 1, wanted)
    await store.jobs.submit(new_job(attachments=(upload,)))
    report = await store.retention.prune(30)
    assert report.blobs == 1
    assert (await there(store, orphan), await there(store, wanted)) == (False, True)
