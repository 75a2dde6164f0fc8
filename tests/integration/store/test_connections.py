"""What callers hear of connections that end at a bad moment."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import pytest

from tests.integration.store.jobs import new_job
from tests.loglines import Lines, lines
from tests.waiting import wait_until
from tidegate.call import new_id
from tidegate.embedded.servers import PostgresServer
from tidegate.errors import NotFound, StoreUnavailable
from tidegate.store import database
from tidegate.store.database import Connections, sql
from tidegate.store.notifications import ReadTurns
from tidegate.store.store import Store

__all__ = ["lines"]

LAST_STEP = 40  # of the event loop, by which the work below has long ended


@pytest.fixture
async def connections(empty_database_url: str) -> AsyncIterator[Connections]:
    opened = Connections(empty_database_url, size=1)
    yield opened
    await opened.aclose()


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def opened(url: str, stack: AsyncExitStack, size: int = 1) -> Connections:
    """Connections that are closed after the test."""
    connections = Connections(url, size=size)
    stack.push_async_callback(connections.aclose)
    return connections


async def _cut_after(steps: int, connection: asyncpg.Connection) -> None:
    for _ in range(steps):
        await asyncio.sleep(0)
    connection.terminate()


async def test_a_connection_cut_between_any_two_steps_is_repeated_or_told_as_away(
    connections: Connections,
) -> None:
    for steps in range(LAST_STEP):
        cuts: list[asyncio.Task[None]] = []

        async def work(
            connection: asyncpg.Connection,
            after: int = steps,
            made: list[asyncio.Task[None]] = cuts,
        ) -> int:
            if not made:
                made.append(asyncio.create_task(_cut_after(after, connection)))
            await connection.fetch("SELECT $1::int", 1)
            return len(await connection.fetch("SELECT $1::int", 2))

        assert await connections.run(work) == 1
        await asyncio.gather(*cuts)


async def test_a_command_waits_for_a_slow_server_where_a_process_goes_on_without_it(
    postgres_server: PostgresServer, empty_database_url: str
) -> None:
    usual = Connections(empty_database_url)
    patient = Connections(empty_database_url, patience_ms=20_000)
    other = await asyncpg.connect(empty_database_url)
    await other.execute("SELECT pg_advisory_lock(7)")

    async def slow(connection: asyncpg.Connection) -> int:
        await connection.execute("SELECT pg_advisory_xact_lock_shared(7)")
        return 1

    async with AsyncExitStack() as stack:
        for connections in (usual, patient):
            stack.push_async_callback(connections.aclose)
            await connections.run(lambda connection: connection.execute("SELECT 1"))
        postgres_server.pause()  # no new connection is answered
        try:
            first, second = [
                asyncio.create_task(one.run(slow, timeout_ms=30_000)) for one in (usual, patient)
            ]
            with pytest.raises(StoreUnavailable):
                await first
        finally:
            postgres_server.resume()
        await other.execute("SELECT pg_advisory_unlock(7)")
        assert await second == 1
        await other.close()


async def test_a_command_gives_work_longer_than_a_process_that_serves(
    empty_database_url: str,
) -> None:
    usual = Connections(empty_database_url)
    patient = Connections(empty_database_url, patience_ms=60_000)
    other = await asyncpg.connect(empty_database_url)
    await other.execute("SELECT pg_advisory_lock(7)")

    async def held(connection: asyncpg.Connection) -> int:
        await connection.execute("SELECT pg_advisory_xact_lock_shared(7)")
        return 1

    async with AsyncExitStack() as stack:
        for connections in (usual, patient):
            stack.push_async_callback(connections.aclose)
            await connections.run(lambda connection: connection.execute("SELECT 1"))
        waiting = asyncio.create_task(patient.run(held, timeout_ms=50))
        with pytest.raises(StoreUnavailable, match="no answer within 50 ms") as late:
            await usual.run(held, timeout_ms=50)
        assert late.value.client_message == "PostgreSQL failed"
        await other.execute("SELECT pg_advisory_unlock(7)")
        assert await waiting == 1
        await other.close()


async def test_a_server_that_takes_no_writes_is_logged_once_until_it_does(
    empty_database_url: str, lines: Lines
) -> None:
    """A process that was pointed at a replica starts, and its log would name no reason."""
    name = urlsplit(empty_database_url).path.removeprefix("/")
    one = Connections(empty_database_url)
    for state in ("on", "on", "off"):
        change = f'ALTER DATABASE "{name}" SET default_transaction_read_only = {state}'
        await one.run(lambda connection: connection.execute(change))  # noqa: B023
        (await one.dedicated()).terminate()
    await one.aclose()
    told = [line for line in lines() if line["event"].startswith("store_")]
    assert [line["event"] for line in told] == ["store_away", "store_back"]
    refusal = "PostgreSQL accepts no writes: default_transaction_read_only is on"
    assert told[0]["reason"] == f"{refusal}; DATABASE_URL must lead to the primary"


async def test_a_statement_past_the_deadline_is_told_as_away(connections: Connections) -> None:
    async def slow(connection: asyncpg.Connection) -> None:
        while True:
            await connection.fetch("SELECT $1::int", 1)

    with pytest.raises(StoreUnavailable):
        await connections.run(slow, timeout_ms=50)


async def test_a_schema_that_is_not_there_is_told_with_its_mend(connections: Connections) -> None:
    with pytest.raises(StoreUnavailable, match=r"\"requests\" does not exist; `tidegate migrate`"):
        await connections.run(lambda connection: connection.fetch("SELECT * FROM requests"))


async def test_what_fails_after_its_caller_has_left_complains_to_nobody(
    connections: Connections,
) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, told: complaints.append(told))
    working, ended = asyncio.Event(), asyncio.Event()

    async def work(connection: asyncpg.Connection) -> None:
        try:
            working.set()
            await connection.fetch("SELECT pg_sleep(10)")
        finally:
            ended.set()

    for cut in (False, True):
        working.clear()
        ended.clear()
        begun = asyncio.create_task(working.wait())
        while not working.is_set():  # on a busy machine it may time out before it begins
            caller = asyncio.create_task(connections.run(work, timeout_ms=100))
            await asyncio.wait({caller, begun}, return_when=asyncio.FIRST_COMPLETED)
            if caller.done():
                caller.exception()  # this caller has not left
        caller.cancel()
        if cut:
            for connection in connections._busy:
                connection.terminate()
        await asyncio.gather(caller, return_exceptions=True)
        await ended.wait()
        await wait_until(lambda: not connections._tasks)
    del caller
    gc.collect()
    assert complaints == []


async def test_a_loop_that_is_held_is_no_outage_of_postgresql(empty_database_url: str) -> None:
    """Nor a busy machine: the answers were there, and nobody read them."""
    connections = Connections(empty_database_url)
    asking = asyncio.create_task(connections.ping(200))
    for _ in range(4):
        until_s = perf_counter() + 0.3
        while perf_counter() < until_s:
            pass
        await asyncio.sleep(0)
        assert not asking.done()
    await asking
    await connections.aclose()


async def test_a_free_connection_is_taken_before_another_one_is_open(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections = Connections(empty_database_url, size=10)
    connect, gate, go = connections._connect, asyncio.Event(), asyncio.Event()
    opening: list[database._Patience] = []

    async def slowly(patience: database._Patience) -> asyncpg.Connection:
        opening.append(patience)
        await gate.wait()
        return await connect(patience)

    async def work(connection: asyncpg.Connection) -> int:
        return int(await connection.fetchval("SELECT 1"))

    assert await connections.run(work) == 1
    monkeypatch.setattr(connections, "_connect", slowly)
    holding = asyncio.create_task(connections.run(lambda _: go.wait()))
    await wait_until(lambda: connections._busy)
    others = [asyncio.create_task(connections.run(work)) for _ in range(5)]
    await wait_until(lambda: opening)
    go.set()
    await wait_until(lambda: sum(other.done() for other in others) == 4)
    assert len(opening) == 1
    gate.set()
    assert await asyncio.gather(*others) == [1] * 5
    assert await holding
    await connections.aclose()


async def test_one_statement_takes_one_message_in_a_session_with_the_settings_of_a_transaction(
    database_url: str, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections, said = await opened(database_url, stack), list[str]()
    execute = asyncpg.Connection.execute

    async def noted(session: asyncpg.Connection, query: str, *values: Any, **more: Any) -> Any:
        said.append(query)
        return await execute(session, query, *values, **more)

    monkeypatch.setattr(asyncpg.Connection, "execute", noted)
    await connections.rows("get_erased", ["a"], [])
    said.clear()
    assert await connections.rows("get_erased", ["a"], []) == []
    assert await connections.row("get_erased", ["a"], []) is None
    assert await connections.execute("get_erased", ["a"], []) == 0
    assert said == []
    (session,) = connections._idle
    shown = [
        await session.fetchval(f"SHOW {name}")
        for name in ("jit", "enable_seqscan", "statement_timeout")
    ]
    assert shown == ["off", "off", "5s"]
    # What may not be repeated after its COMMIT, and what may take longer than the session allows.
    await connections.rows("get_erased", ["a"], [], repeatable=False)
    await connections.rows("get_erased", ["a"], [], timeout_ms=database.COMMAND_TIMEOUT_MS + 1)
    assert [one.partition(";")[0] for one in said] == ["BEGIN", "COMMIT"] * 2


async def test_a_session_listens_and_finds_whether_it_is_direct_in_one_round_trip_each(
    database_url: str, stack: AsyncExitStack
) -> None:
    """A statement with values, or whose rows are read, takes two, and is parsed twice."""
    session, said = await (await opened(database_url, stack)).dedicated(), list[str]()
    stack.callback(session.terminate)
    session.add_log_listener(lambda _, message: said.append(message.message))
    await session.execute("SET client_min_messages = log; SET log_min_duration_statement = 0")
    await session.add_listener("of_a_test", lambda *_: None)
    assert await session.runs_alone()
    await wait_until(lambda: any("LISTEN" in one for one in said))
    assert [one for one in said if "statement: " not in one] == []


_NAMES = "SELECT array_agg(name::text ORDER BY name) FROM pg_prepared_statements"


async def prepared(connections: Connections) -> list[str]:
    """The statements that the last session to be used has prepared."""
    found = await connections.run(lambda session: session.fetchval(_NAMES))
    return [name.rpartition("_")[0] for name in found or ()]


async def test_what_is_run_for_calls_is_prepared_once_a_session(
    database_url: str, stack: AsyncExitStack
) -> None:
    connections = await opened(database_url, stack)
    for _ in range(3):
        assert await connections.rows("get_erased", ["a"], []) == []
        assert await connections.execute("add_bodies", "[]") == 0
        assert await connections.row("get_request", new_id(), "a") is None
    assert await prepared(connections) == ["add_bodies", "get_erased"]


@pytest.mark.parametrize("jobs", [0, 50])
async def test_a_look_for_jobs_that_became_ready_is_not_planned_each_time(
    database_url: str, stack: AsyncExitStack, store: Store, jobs: int
) -> None:
    """Planning takes longer than the look; PostgreSQL goes on with it where the values promise a
    cheaper plan."""
    for _ in range(jobs):
        await store.jobs.submit(new_job())
    connections = await opened(database_url, stack)
    if jobs:
        await connections.run(lambda session: session.execute("ANALYZE requests"))
    for _ in range(8):
        await connections.rows("came", "gemini", "text_only", 5, 2_000, [], 0.0)
    plans = "SELECT generic_plans FROM pg_prepared_statements WHERE name LIKE 'came%'"
    assert await connections.run(lambda session: session.fetchval(plans)) == 3


async def test_a_statement_is_prepared_again_after_a_change_of_the_schema(
    database_url: str, stack: AsyncExitStack, store: Store
) -> None:
    await store.jobs.submit(new_job())
    connections = await opened(database_url, stack, size=6)
    go, begun = asyncio.Event(), list[int]()
    none = "w", 1, 1, "{}", list[UUID](), list[str]()

    async def held(session: asyncpg.Connection) -> None:
        await session.fetch(sql("claim_batch_lines"), *none)
        begun.append(1)
        await go.wait()

    holding = [asyncio.create_task(connections.run(held)) for _ in range(6)]
    await wait_until(lambda: len(begun) == 6)
    go.set()
    await asyncio.gather(*holding)
    await connections.run(
        lambda session: session.execute("ALTER TABLE batch_lines ADD COLUMN of_later text")
    )
    for _ in range(6):
        assert await connections.rows("claim_batch_lines", *none) == []
    assert not database.DatabaseSession.shares_servers


async def test_a_statement_that_another_server_has_ends_preparing(
    database_url: str, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database.DatabaseSession, "shares_servers", False)
    connections = await opened(database_url, stack)
    await connections.rows("get_erased", ["a"], [])
    await connections.run(lambda session: session.execute("DEALLOCATE ALL"))
    assert await connections.rows("get_erased", ["a"], []) == []
    assert database.DatabaseSession.shares_servers
    assert await connections.rows("get_erased", ["a"], []) == []
    assert await prepared(connections) == []


async def test_the_reads_of_one_tenant_leave_connections_to_others(
    empty_database_url: str,
) -> None:
    connections, turns = Connections(empty_database_url, size=5), ReadTurns(4)
    go, under_way = asyncio.Event(), []

    async def read(tenant_id: str, *, until: asyncio.Event | None) -> int:
        async def work(connection: asyncpg.Connection) -> int:
            under_way.append(tenant_id)
            if until is not None:
                await until.wait()
            return int(await connection.fetchval("SELECT 1"))

        async with turns.turn(tenant_id, 20_000):
            return await connections.run(work)

    many = [asyncio.create_task(read("alice", until=go)) for _ in range(50)]
    await wait_until(lambda: under_way.count("alice") == 4)
    assert await read("bob", until=None) == 1
    with pytest.raises(StoreUnavailable, match="of tenant alice"):
        async with turns.turn("alice", 10):
            raise AssertionError("there was no turn left")
    assert under_way == [*["alice"] * 4, "bob"]
    go.set()
    assert await asyncio.gather(*many) == [1] * 50
    await connections.aclose()


async def test_a_request_is_read_in_a_turn_of_its_tenant(store: Store) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(store.requests._turns.turn("alice", 20_000))
        waiting = asyncio.create_task(store.requests.get(new_id(), "alice"))
        with pytest.raises(NotFound):
            await store.requests.get(new_id(), "bob")
        assert not waiting.done()
    with pytest.raises(NotFound):
        await waiting


async def test_a_burst_of_short_work_opens_no_connection_while_one_comes_free_soon(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_OPEN_AFTER_S", 10.0)
    opened = Connections(database_url)
    try:
        served_by = await asyncio.gather(
            *(opened.run(lambda one: one.fetchval("SELECT pg_backend_pid()")) for _ in range(5))
        )
    finally:
        await opened.aclose()
    assert len(set(served_by)) == 1


async def test_a_caller_waits_for_a_connection_where_the_server_takes_no_more(
    empty_database_url: str, stack: AsyncExitStack
) -> None:
    few = f"few_{new_id().hex}"
    owner = await asyncpg.connect(empty_database_url)
    stack.push_async_callback(owner.close)
    await owner.execute(f"CREATE ROLE {few} LOGIN CONNECTION LIMIT 1")
    stack.push_async_callback(owner.execute, f"DROP ROLE {few}")
    url = urlsplit(empty_database_url)
    host = url.netloc.rpartition("@")[2]
    connections = await opened(url._replace(netloc=f"{few}@{host}").geturl(), stack, size=2)
    await all_wait_for_the_one(connections)


async def test_a_process_without_any_connection_left_says_so_once_until_it_has_one(
    empty_database_url: str, stack: AsyncExitStack, lines: Lines
) -> None:
    """Of several processes the last found all connections taken, and its log did not name that."""
    few = f"few_{new_id().hex}"
    owner = await asyncpg.connect(empty_database_url)
    stack.push_async_callback(owner.close)
    await owner.execute(f"CREATE ROLE {few} LOGIN CONNECTION LIMIT 1")
    stack.push_async_callback(owner.execute, f"DROP ROLE {few}")
    url = urlsplit(empty_database_url)
    own_url = url._replace(netloc=f"{few}@{url.netloc.rpartition('@')[2]}").geturl()
    taken = await asyncpg.connect(own_url)
    last = Connections(own_url)
    stack.push_async_callback(last.aclose)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="no connection left for this process: too many"):
            await last.run(lambda one: one.fetchval("SELECT 1"))
    assert not last.unavailable
    await taken.close()
    assert await last.run(lambda one: one.fetchval("SELECT 1")) == 1
    told = [line for line in lines() if line["event"].startswith("store_")]
    assert [line["event"] for line in told] == ["store_away", "store_back"]
    assert told[0]["reason"].startswith("it has no connection left for this process: too many")
    assert told[0]["reason"].endswith("; raise max_connections: docs/servers.md")


async def all_wait_for_the_one(connections: Connections) -> None:
    """Have two callers use the one connection that there is room for, which the first keeps until
    the second has been refused another one more often than a transaction is tried."""
    refusals = 0
    connect = connections._connect

    async def counted(patience: database._Patience) -> database.DatabaseSession:
        nonlocal refusals
        try:
            return await connect(patience)
        except asyncpg.PostgresError:
            refusals += 1
            raise

    async def work(connection: asyncpg.Connection) -> int:
        await wait_until(lambda: refusals >= 5)
        return int(await connection.fetchval("SELECT 1"))

    connections._connect = counted  # type: ignore[method-assign]
    assert await asyncio.gather(*(connections.run(work) for _ in range(2))) == [1, 1]
    assert not connections.unavailable


async def test_connections_that_a_burst_has_opened_are_closed_after_it(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_TRIM_AFTER_S", 0.05)
    opened = Connections(empty_database_url)
    name = f"burst-{new_id()}"
    together = asyncio.Barrier(4)

    counted = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"

    async def work(connection: asyncpg.Connection) -> object:
        await connection.execute(f"SET application_name = '{name}'")
        await together.wait()
        found = await connection.fetchval(counted, name)
        await together.wait()
        return found

    other = await asyncpg.connect(empty_database_url)  # a look by `opened` would use one of them
    try:
        assert await asyncio.gather(*(opened.run(work) for _ in range(4))) == [4] * 4

        async def are_closed() -> bool:
            return bool(await other.fetchval(counted, name) == 1)

        await wait_until(are_closed, 10, "one connection")
    finally:
        await other.close()
        await opened.aclose()
