"""Everything that needs PostgreSQL, with PgBouncer in transaction mode on the way to it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from openai import AsyncOpenAI

from tests.batching import assert_all_succeeded, begin, content
from tests.batching import end_of as end_of_batch
from tests.clusters import FAST, copied
from tests.gateway import Gateway, Opener, read_stream
from tests.integration.pgbouncer.bouncer import SERVERS, Bouncer
from tests.integration.store.test_connections import all_wait_for_the_one
from tests.waiting import promised_s, wait_until
from tidegate.embedded.servers import PostgresServer
from tidegate.store import notifications
from tidegate.store.database import HEAD, Connections, DatabaseSession, migrate

JOBS = 40
STREAMS = 20
REVOKED_WITHIN_S = promised_s(1.0)
ADMIN_TOKEN = "the-token-of-these-tests"
AS_ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}

OpenBoth = Callable[..., Any]


@pytest.fixture
async def opened(bouncer: Bouncer, database_url: str, open_gateway: Opener) -> OpenBoth:
    """Opens a gateway, and its worker, whose every connection is one to PgBouncer."""
    pooled = bouncer.url(database_url.rpartition("/")[2])

    async def one(**settings: Any) -> Gateway:
        return await open_gateway(database_url=pooled, direct_url=database_url, **settings)

    return one


@pytest.fixture
async def peek(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def test_jobs_and_streams_end_and_are_recorded(
    opened: OpenBoth, peek: asyncpg.Connection
) -> None:
    gateway = await opened()
    ids = await asyncio.gather(*(gateway.submit(data=f"Explain {n}") for n in range(JOBS)))
    streams = await asyncio.gather(*(gateway.stream(data=f"Tell {n}") for n in range(STREAMS)))
    ends = [await gateway.end_of(request_id) for request_id in ids]
    assert {end["status"] for end in ends} == {"succeeded"}
    assert {stream.names[-1] for stream in streams} == {"done"}
    for request_id in [*ids, *(stream.request_id for stream in streams)]:
        row = await gateway.audit(request_id)
        assert row["response"] is not None
    assert await peek.fetchval("SELECT count(*) FROM audit") == JOBS + STREAMS
    servers = await peek.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name = 'tidegate'"
    )
    assert 0 < servers <= SERVERS, "all of it went through the pooler"


async def test_who_waits_is_woken_by_polling(
    opened: OpenBoth, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Transaction mode loses nearly all that is said to a listener, and by chance not everything.
    monkeypatch.setattr(notifications.Notifications, "_on_message", lambda *_: None)
    gateway = await opened(worker=False)
    request_id = await gateway.submit(data="Explain")
    first = await gateway.status(request_id)
    assert first["status"] == "queued"
    waiting = asyncio.create_task(gateway.get(f"/status/{request_id}?wait=20"))
    gateway.start_worker()
    _, seen = await waiting
    assert seen["status"] != "queued"
    assert (await gateway.end_of(request_id))["status"] == "succeeded"
    await gateway.upstream.set_behaviour(first_byte_ms=60_000)
    cancelled = await gateway.submit(data="Explain")
    await gateway.in_flight(1)
    async with gateway.http.delete(f"{gateway.url}/requests/{cancelled}") as answer:
        assert answer.status < 300
    assert (await gateway.end_of(cancelled))["status"] == "cancelled"


async def test_a_revoked_key_opens_nothing_in_another_process(opened: OpenBoth) -> None:
    asked, other = [
        await opened(worker=False, auth="on", admin_token=ADMIN_TOKEN) for _ in range(2)
    ]
    async with asked.http.post(
        f"{asked.url}/admin/keys", json={"tenant": "default"}, headers=AS_ADMIN
    ) as answer:
        key = await answer.json()

    async def code() -> int:
        url = f"{other.url}/status/{'0' * 32}"
        async with other.http.get(url, headers={"x-api-key": key["key"]}) as answer:
            return int(answer.status)

    assert await code() == 404
    async with asked.http.delete(
        f"{asked.url}/admin/keys/{key['prefix']}", headers=AS_ADMIN
    ) as answer:
        assert answer.status < 300
    began = time.monotonic()

    async def refused() -> bool:
        return await code() == 401

    await wait_until(refused, 20, "the key's end")
    assert time.monotonic() - began < REVOKED_WITHIN_S


async def test_a_batch_gives_an_answer_to_each_line(opened: OpenBoth) -> None:
    gateway = await opened()
    async with AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key="of-a-client", max_retries=0
    ) as client:
        batch = await begin(client, content(30))
        await assert_all_succeeded(client, await end_of_batch(client, batch), 30)


async def test_nothing_is_prepared_on_servers_that_clients_share(
    bouncer: Bouncer, database_url: str
) -> None:
    connections = Connections(bouncer.url(database_url.rpartition("/")[2]))
    for _ in range(10):
        assert await connections.rows("get_erased", ["a"], []) == []
    names = "SELECT count(*) FROM pg_prepared_statements"
    assert await connections.run(lambda session: session.fetchval(names)) == 0
    # The servers are shared: a setting of a session would be one of other clients.
    other = await asyncpg.connect(
        bouncer.url(database_url.rpartition("/")[2]), statement_cache_size=0
    )
    for _ in range(SERVERS):
        assert await other.fetchval("SHOW enable_seqscan") == "on"
    await other.close()
    assert not DatabaseSession.shares_servers, "it is known before it does harm"
    await connections.aclose()


async def test_the_schema_is_made_by_processes_that_start_at_once(
    bouncer: Bouncer, empty_database_url: str
) -> None:
    pooled = bouncer.url(empty_database_url.rpartition("/")[2])
    # Processes of their own: asyncpg counts the names of prepared statements in each.
    code = (
        "import asyncio, sys; from tidegate.store.database import migrate; "
        "print(asyncio.run(migrate(sys.argv[1])))"
    )
    children = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code, pooled), stdout=asyncio.subprocess.PIPE
        )
        for _ in range(3)
    ]
    said = [(await child.communicate())[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert any(HEAD.encode() in one for one in said)
    assert await migrate(pooled) is None
    connection = await asyncpg.connect(empty_database_url)
    assert await connection.fetchval("SELECT count(*) FROM alembic_version") == 1
    await connection.close()


async def test_a_pooler_that_takes_no_more_connections_is_not_taken_for_an_outage(
    postgres_server: PostgresServer, empty_database_url: str, tmp_path: Path
) -> None:
    with Bouncer(tmp_path / "pgbouncer", postgres_server, "max_client_conn = 1") as bouncer:
        connections = Connections(bouncer.url(empty_database_url.rpartition("/")[2]), size=2)
        try:
            await all_wait_for_the_one(connections)
        finally:
            await connections.aclose()


async def test_a_server_that_went_away_behind_the_pooler_is_noticed(
    open_gateway: Opener, asked_each_time: None, tmp_path: Path
) -> None:
    server = copied(tmp_path / "postgres", FAST, migrated=True)
    server.start()
    try:
        again = "server_login_retry = 1"  # by default its return would be seen after 15 s
        with Bouncer(tmp_path / "pgbouncer", server, again) as bouncer:
            await _goes_and_comes(open_gateway, server, bouncer, "tidegate")
    finally:
        server.stop()


async def _goes_and_comes(
    open_gateway: Opener, server: PostgresServer, bouncer: Bouncer, database: str
) -> None:
    gateway = await open_gateway(database_url=bouncer.url(database))
    assert (await gateway.end_of(await gateway.submit(data="Before")))["status"] == "succeeded"
    server.stop()
    await wait_until(
        lambda: gateway.services.store.connections.unavailable, 20, "the outage to be noticed"
    )
    async with gateway.http.post(f"{gateway.url}/submit", json={"data": "Now"}) as answer:
        assert answer.status == 503
    status, health = await gateway.get("/health/dependencies")
    assert (status, health["postgresql"]["status"]) == (503, "failed")
    async with gateway.open_stream(data="Tell") as response:
        stream = await read_stream(response)
    assert stream.names[-1] == "done", "streams go on"
    server.start()
    await wait_until(lambda: not gateway.services.store.connections.unavailable, 40, "its return")
    assert (await gateway.recorded(stream.request_id))["status"] == "succeeded"
    assert (await gateway.end_of(await gateway.submit(data="After")))["status"] == "succeeded"
