"""PostgreSQL stopped, killed, frozen and cutting connections, on a server of the tests' own."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg
import orjson
import pytest

from tests.integration.store.conftest import MakeStore
from tests.integration.store.jobs import TEXT, new_job, result
from tests.waiting import promised_s, wait_until, work_for
from tidegate.call import DEFAULT_POOL, Kind, Status, new_id
from tidegate.embedded.servers import PostgresServer
from tidegate.errors import StoreUnavailable
from tidegate.store.records import ClaimedJob
from tidegate.store.store import Store

LEASE_MS = 600


async def running_job(store: Store) -> ClaimedJob:
    await store.jobs.submit(new_job())

    async def claimed() -> list[ClaimedJob]:
        with suppress(StoreUnavailable):  # within a third of a short lease
            return await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1)
        return []

    async def runs() -> bool:
        with suppress(StoreUnavailable):
            await store.queue.running(job, model="m", fence=(1, 1), queue_ms=1.0)
            return True
        return False

    job: ClaimedJob
    (job,) = await wait_until(claimed)
    await wait_until(runs)
    return job


@asynccontextmanager
async def outage(server: PostgresServer, how: str) -> AsyncIterator[None]:
    """PostgreSQL away by `stop`, `kill` or `pause`; back when the block ends."""
    await asyncio.to_thread(getattr(server, how))
    try:
        yield
    finally:
        back: Callable[[], None] = server.resume if how == "pause" else server.start
        await asyncio.to_thread(back)


async def rows(url: str, query: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(url)
    try:
        found: list[asyncpg.Record] = await connection.fetch(query)
        return found
    finally:
        await connection.close()


@pytest.mark.parametrize("how", ["stop", "kill", "pause"])
async def test_an_outage_refuses_submits_quickly_and_keeps_ends_until_it_is_over(
    how: str, own_server: PostgresServer, own_url: str, make_store: MakeStore
) -> None:
    store = await make_store(own_url, claim_lease_ms=LEASE_MS)
    jobs = [await running_job(store) for _ in range(3)]
    unadmitted = new_job()
    await store.jobs.submit(unadmitted)
    async with outage(own_server, how):
        # The first to notice may take its deadline; the others are told at once.
        for limit_s in (3.0, 0.5):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await store.jobs.submit(new_job("lost to the outage"))
            assert time.monotonic() - began < promised_s(limit_s)
            await wait_until(lambda: store.connections.unavailable)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await store.requests.get(jobs[0].request_id, "default")
        await asyncio.gather(*(store.queue.finish(job, result(f"{job.claim}")) for job in jobs))
        stream = new_job("a stream")
        await store.audit.record_stream(stream, result(source="stream"))
        assert time.monotonic() - began < promised_s(1.0)
        await wait_until(lambda: time.monotonic() - began > 0.6)
    for job in jobs:

        async def succeeded(job: ClaimedJob = job) -> bool:
            try:
                return (
                    await store.requests.get(job.request_id, "default")
                ).status is Status.SUCCEEDED
            except StoreUnavailable:
                return False

        await wait_until(succeeded, 4)  # at once, not at the next look into the folder
    await wait_until(lambda: rows_exist(own_url, "SELECT 1 FROM requests WHERE source = 'stream'"))
    assert (await store.requests.get(unadmitted.request_id, "default")).status is Status.QUEUED
    audits = await rows(own_url, "SELECT request_id FROM audit")
    assert len(audits) == len({row["request_id"] for row in audits}) == 4
    lost = await rows(own_url, "SELECT status FROM requests WHERE prompt = 'lost to the outage'")
    # Refused, or (an answer lost in the freeze) whole in the queue: never anything else.
    assert {row["status"] for row in lost} <= {"queued"}


async def rows_exist(url: str, query: str) -> bool:
    return bool(await rows(url, query))


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_claims_are_not_retaken_when_postgresql_returns(
    how: str, own_server: PostgresServer, own_url: str, make_store: MakeStore
) -> None:
    stores = [await make_store(own_url, claim_lease_ms=LEASE_MS) for _ in range(2)]
    jobs = [await running_job(store) for store in stores]
    beats = [asyncio.create_task(keep_beating(store)) for store in stores]
    await wait_until(lambda: all_may_judge(stores))
    async with outage(own_server, how):
        await wait_until(lambda: all(store.connections.unavailable for store in stores))
        # Longer than the lease: by the clock alone both would look dead.
        left = asyncio.get_running_loop().time() + 2 * LEASE_MS / 1000
        await wait_until(lambda: asyncio.get_running_loop().time() > left)
    await wait_until(lambda: not any(store.connections.unavailable for store in stores))
    end = asyncio.get_running_loop().time() + 3 * LEASE_MS / 1000
    while asyncio.get_running_loop().time() < end:
        for store in stores:
            try:
                assert await store.queue.retake_expired() == []
            except StoreUnavailable:
                continue
        await work_for(0.02)
    await wait_until(lambda: all_may_judge(stores))
    for store, job in zip(stores, jobs, strict=True):
        await store.queue.finish(job, result())
        assert (await store.requests.get(job.request_id, "default")).status is Status.SUCCEEDED
    for beat in beats:
        beat.cancel()
    await asyncio.gather(*beats, return_exceptions=True)


def all_may_judge(stores: list[Store]) -> bool:
    return all(store.queue._steadiness.may_judge for store in stores)


async def keep_beating(store: Store) -> None:
    while True:
        with suppress(StoreUnavailable):  # the outage that the test makes
            await store.queue.heartbeat()
        await work_for(LEASE_MS / 3000)


async def test_connections_cut_at_random_moments_lose_and_double_nothing(
    own_url: str, make_store: MakeStore
) -> None:
    stores = [await make_store(own_url, claim_lease_ms=2_000) for _ in range(2)]
    accepted: set[str] = set()
    finished: list[str] = []
    stop = asyncio.Event()

    async def submit(store: Store) -> None:
        for number in range(30):
            job = new_job(f"job {number}")
            while True:
                try:
                    await store.jobs.submit(job)
                    break
                except StoreUnavailable:
                    continue
            accepted.add(str(job.request_id))

    async def work(store: Store) -> None:
        while not stop.is_set():
            try:
                await store.queue.heartbeat()
                jobs = await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=5)
            except StoreUnavailable:
                continue
            await asyncio.gather(*(run(store, job) for job in jobs))
            if not jobs:
                await work_for(0.01)

    async def run(store: Store, job: ClaimedJob) -> None:
        while True:
            try:
                await store.queue.running(job, model="m", fence=(1, 1), queue_ms=0)
                break
            except StoreUnavailable:
                continue
        await store.queue.finish(job, result())
        finished.append(str(job.request_id))

    async def cut() -> None:
        dice = random.Random(7)
        connection = await asyncpg.connect(own_url, server_settings={"application_name": "cutter"})
        number = 0
        while not stop.is_set():
            number += 1
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'tidegate' AND datname = current_database() "
                "AND random() < 0.5"
            )
            # Ever less often, so that a slow machine gets something done in between too.
            await work_for(dice.uniform(0.0, 0.02) * (1 + number / 100))
        await connection.close()

    async def all_ended() -> bool:
        return not await rows_exist(own_url, "SELECT 1 FROM requests WHERE status <> 'succeeded'")

    async with asyncio.TaskGroup() as group:
        for task in (*map(work, stores), cut()):
            group.create_task(task)
        await asyncio.gather(*(submit(store) for store in stores))
        await wait_until(all_ended, 60)
        stop.set()
    recorded = await rows(own_url, "SELECT id::text FROM requests")
    assert {row["id"] for row in recorded} == accepted
    assert len(accepted) == 60
    assert sorted(finished) == sorted(accepted)
    counts = await rows(own_url, "SELECT count(*) AS n FROM audit GROUP BY request_id")
    assert [row["n"] for row in counts] == [1] * 60
    attempts = await rows(own_url, "SELECT count(*) AS n FROM attempts GROUP BY request_id")
    assert [row["n"] for row in attempts] == [1] * 60


async def test_a_store_starts_before_its_database_does(
    own_server: PostgresServer, own_url: str, make_store: MakeStore
) -> None:
    async with outage(own_server, "stop"):
        store = await make_store(own_url)
        with pytest.raises(StoreUnavailable):
            await store.connections.ping(500)
        assert (await store.schema_fits(), store.has_seen_schema) == (False, False)
    await wait_until(store.schema_fits)
    assert store.has_seen_schema
    await store.connections.ping(1000)
    await store.jobs.submit(new_job())


async def test_a_frozen_server_does_not_outlast_a_ping_or_a_closing(
    own_server: PostgresServer, own_url: str, make_store: MakeStore, tmp_path: Path
) -> None:
    store = await make_store(own_url, spill_dir=tmp_path / "spill")
    job = await running_job(store)
    async with outage(own_server, "pause"):
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await store.connections.ping(300)
        assert time.monotonic() - began < promised_s(1.0)
        finishing = asyncio.create_task(store.queue.finish(job, result("late")))
        await wait_until(lambda: store.audit._tasks)
        began = time.monotonic()
        await store.aclose()
        assert time.monotonic() - began < promised_s(12.0)
        await finishing
    again = await make_store(own_url, spill_dir=tmp_path / "spill")
    record = await again.requests.get(job.request_id, "default")
    found = (
        await again.requests.wait_change(job.request_id, "default", record.version, 5000)
        if (record.status is Status.RUNNING)
        else record
    )
    assert (found.status, found.text) == (Status.SUCCEEDED, "late")


async def test_a_full_spill_refuses_what_it_cannot_keep(
    own_server: PostgresServer, own_url: str, make_store: MakeStore
) -> None:
    store = await make_store(own_url, spill_max_bytes=3_000)
    jobs = [await running_job(store) for _ in range(3)]
    async with outage(own_server, "stop"):
        await store.queue.finish(jobs[0], result())
        with pytest.raises(StoreUnavailable, match="spill is full"):
            await store.queue.finish(jobs[1], result("x" * 3_000))
    done = await wait_status(store, jobs[0])
    assert done is Status.SUCCEEDED
    await store.queue.finish(jobs[1], result())


async def wait_status(store: Store, job: ClaimedJob) -> Status:
    async def ended() -> Status | None:
        try:
            status = (await store.requests.get(job.request_id, "default")).status
        except StoreUnavailable:
            return None
        return status if status.is_end else None

    status: Status = await wait_until(ended)
    return status


async def test_the_answer_of_classification_is_not_kept_back_by_an_outage(
    own_server: PostgresServer, own_url: str, make_store: MakeStore
) -> None:
    store = await make_store(own_url)
    await store.jobs.submit(new_job())
    (job,) = await store.queue.claim(pool=DEFAULT_POOL, kind=Kind.TEXT_ONLY, limit=1)
    async with outage(own_server, "stop"):
        for refused in (
            store.queue.classified(job, TEXT),
            store.queue.running(job, model="m", fence=(1, 1), queue_ms=0),
            store.queue.release([job]),
            store.queue.heartbeat(),
        ):
            with pytest.raises(StoreUnavailable):
                await refused


async def test_a_killed_processs_spill_is_replayed_by_the_next_with_its_folder(
    own_server: PostgresServer, own_url: str, make_store: MakeStore, tmp_path: Path
) -> None:
    code = """
import asyncio, os, signal, sys
from pathlib import Path
from tests.integration.store.jobs import new_job, result
from tidegate.call import Kind, Status
from tidegate.store.blobs import Blobs
from tidegate.store.store import Store

async def main(url, folder):
    store = Store(url, instance_id="doomed", blobs=Blobs.from_url("", folder),
        spill_dir=folder / "spill", spill_max_bytes=10**7, audit_full="block",
        claim_lease_ms=60_000)
    await store.start()
    for _ in range(5):
        await store.jobs.submit(new_job())
    jobs = await store.queue.claim(pool="gemini", kind=Kind.TEXT_ONLY, limit=5)
    for job in jobs:
        await store.queue.running(job, model="m", fence=(1, 1), queue_ms=0)
    print("running", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    for job in jobs:
        await store.queue.finish(job, result("kept on disk"))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
"""
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, own_url, str(tmp_path)), stdin=pipe, stdout=pipe
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert await asyncio.wait_for(child.stdout.readline(), 20) == b"running\n"
    async with outage(own_server, "stop"):
        child.stdin.write(b"go\n")
        assert await asyncio.wait_for(child.wait(), 20) == -9
    # Two of the same folder, as a supervisor would start them.
    for _ in range(2):
        await make_store(own_url, spill_dir=tmp_path / "spill")

    async def ended() -> bool:
        found = await rows(own_url, "SELECT result FROM requests WHERE status = 'succeeded'")
        return [row["result"] for row in found] == ["kept on disk"] * 5

    await wait_until(ended)
    assert len(await rows(own_url, "SELECT 1 FROM audit")) == 5
    await wait_until(lambda: not list((tmp_path / "spill").glob("*.spill")))


async def test_whether_the_schema_fits_is_told_in_time_while_all_connections_are_busy(
    store: Store,
) -> None:
    assert await store.schema_fits()
    answered = asyncio.Event()

    async def slow(_connection: asyncpg.Connection) -> None:
        await answered.wait()

    busy = [asyncio.create_task(store.connections.run(slow)) for _ in range(10)]
    await asyncio.sleep(0)  # they have all slots now
    began = time.monotonic()
    assert await store.schema_fits()
    took_s = time.monotonic() - began
    answered.set()
    await asyncio.gather(*busy)
    assert took_s < promised_s(1.8), "before a probe gives up, which has 2 s in deploy/"
    assert not store.connections.unavailable


async def test_a_single_frozen_connection_costs_one_deadline_and_no_more(
    own_url: str, make_store: MakeStore
) -> None:
    store = await make_store(own_url)
    job = new_job()
    await store.jobs.submit(job)
    # Backends of the store frozen one by one, while the server goes on accepting others.
    query = (
        "SELECT pid FROM pg_stat_activity "
        "WHERE application_name = 'tidegate' AND datname = current_database()"
    )
    pids = [row["pid"] for row in await rows(own_url, query)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        began, said = time.monotonic(), set[str]()
        for _ in pids:
            try:
                await store.requests.get(job.request_id, "default")
            except StoreUnavailable as late:
                said.add(late.message)
        assert time.monotonic() - began < promised_s(2.5) * len(pids)
        assert said == {"PostgreSQL failed: no answer within 2000 ms"}
        assert not store.connections.unavailable
        record = await store.requests.get(job.request_id, "default")
        assert record.status is Status.QUEUED
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


_REFUSING = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = '{code}'; END $$;
    CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON {table}
        FOR EACH STATEMENT EXECUTE FUNCTION refuse();
"""
_TABLES = ("requests", "audit")


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("55P03", id="a lock_timeout of the database"),
        pytest.param("58030", id="an error of its disk"),
        pytest.param("53100", id="a full disk"),
        pytest.param("25006", id="a server that only reads"),
    ],
)
async def test_what_a_server_cannot_do_now_is_written_later(
    code: str, own_url: str, make_store: MakeStore
) -> None:
    store = await make_store(own_url, claim_lease_ms=LEASE_MS)
    job, server = await running_job(store), await asyncpg.connect(own_url)
    for table in _TABLES:
        text = _REFUSING.format(code=code, table=table).replace("refuse()", f"refuse_{table}()")
        await server.execute(text)
    for refused in (
        store.jobs.submit(new_job("refused")),
        store.queue.running(job, model="m", fence=(1, 1), queue_ms=0),
        store.queue.release([job]),
    ):
        with pytest.raises(StoreUnavailable):
            await refused
    await store.queue.finish(job, result("kept"))
    await store.audit.record_stream(new_job("a stream"), result(source="stream"))
    store.audit.put(result(source="relay", request_id=new_id()))
    await wait_until(lambda: not (store.audit.waiting or store.audit._pending))
    for table in _TABLES:
        await server.execute(f"DROP TRIGGER refuse ON {table}")
    await server.close()
    assert await wait_status(store, job) is Status.SUCCEEDED

    async def are_recorded() -> bool:
        found = await rows(own_url, "SELECT source FROM audit WHERE status = 'succeeded'")
        return sorted(row["source"] for row in found) == ["job", "relay", "stream"]

    await wait_until(are_recorded)
    await wait_until(lambda: not store.audit._spill.used_bytes)
    assert await are_recorded(), "each once"


async def test_a_batch_of_records_is_under_way_while_another_one_waits_for_postgresql(
    own_url: str, make_store: MakeStore
) -> None:
    """A writer of one batch after another fell behind calls that end at full speed."""
    store, server = await make_store(own_url), await asyncpg.connect(own_url)
    lock = server.transaction()
    await lock.start()
    await server.execute("LOCK TABLE audit IN SHARE MODE")
    for _ in range(500):
        store.audit.put(result(source="relay", request_id=new_id()))
    await wait_until(lambda: store.audit.waiting == 100)
    assert not store.audit._pending, "the first batch had its time out before the second began"
    await lock.rollback()

    async def recorded() -> bool:
        return bool(await server.fetchval("SELECT count(*) = 500 FROM audit"))

    await wait_until(recorded)
    assert await server.fetchval("SELECT sum(requests) FROM usage_days") == 500
    await server.close()


async def test_a_record_that_postgresql_rejects_for_good_is_kept_for_an_operator(
    own_url: str, make_store: MakeStore, tmp_path: Path
) -> None:
    store = await make_store(own_url, spill_dir=tmp_path / "spill")
    job, server = await running_job(store), await asyncpg.connect(own_url)
    await server.execute("ALTER TABLE audit ADD CHECK (model <> 'refused') NOT VALID")
    relayed = result(source="relay", request_id=new_id(), model="refused")
    streamed, rejected = new_job("a stream"), tmp_path / "spill" / "rejected.jsonl"
    store.audit.put(relayed)
    await store.audit.record_stream(streamed, result(source="stream", model="refused"))
    with pytest.raises(asyncpg.CheckViolationError):
        await store.queue.finish(job, result("in vain", model="refused"))
    await wait_until(lambda: rejected.exists() and rejected.read_bytes().count(b"\n") == 3)
    lines = [orjson.loads(line) for line in rejected.read_bytes().splitlines()]
    expected = {str(one) for one in (relayed.request_id, streamed.request_id, job.request_id)}
    assert {line["entry"]["row"]["id"] for line in lines} == expected
    assert all("CheckViolationError" in line["reason"] for line in lines)
    await server.close()


async def test_a_result_that_waits_on_the_disk_is_written_before_its_claim_is_retaken(
    own_url: str, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as that of a worker that was stopped while a table was locked."""
    monkeypatch.setattr("tidegate.store.audit._REPLAY_EVERY_MS", 600_000)
    spill, server = tmp_path / "spill", await asyncpg.connect(own_url)
    stopped = await make_store(own_url, spill_dir=spill, claim_lease_ms=60_000)
    job = await running_job(stopped)
    other = await make_store(own_url, spill_dir=spill, claim_lease_ms=2 * LEASE_MS)
    await server.execute(_REFUSING.format(code="55P03", table="requests"))
    await stopped.queue.finish(job, result("kept"))
    await stopped.aclose()
    beating = asyncio.create_task(keep_beating(other))

    async def refused() -> bool:
        """Nothing is retaken before, while this one has not the steadiness to judge."""
        try:
            assert await other.queue.retake_expired() == []
        except StoreUnavailable:
            return True
        return False

    await wait_until(refused, 60)
    await server.execute("DROP TRIGGER refuse ON requests")

    async def written() -> bool:
        with suppress(StoreUnavailable):
            assert await other.queue.retake_expired() == []
        record = await other.requests.get(job.request_id, "default")
        return (record.status, record.text) == (Status.SUCCEEDED, "kept")

    await wait_until(written, 60)
    beating.cancel()
    await server.close()


async def test_what_is_not_written_when_a_process_ends_is_on_the_disk(
    own_url: str, make_store: MakeStore, tmp_path: Path
) -> None:
    store = await make_store(own_url, spill_dir=tmp_path / "spill")
    job, server = await running_job(store), await asyncpg.connect(own_url)
    async with server.transaction():
        await server.execute("LOCK TABLE requests IN EXCLUSIVE MODE")
        ending = asyncio.create_task(store.queue.finish(job, result("late")))
        await wait_until(lambda: store.audit._tasks)
        await store.audit.aclose(300)
        (file,) = (tmp_path / "spill").glob("*.spill")
        assert str(job.request_id).encode() in file.read_bytes()
    await asyncio.gather(ending, return_exceptions=True)
    await server.close()
    again = await make_store(own_url, spill_dir=tmp_path / "spill")
    assert await wait_status(again, job) is Status.SUCCEEDED
