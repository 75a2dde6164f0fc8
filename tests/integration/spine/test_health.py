"""Health: alive, ready, and what the process depends on, whatever state that is in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis.asyncio

from tests.clusters import FAST, copied
from tests.gateway import Gateway, Opener
from tests.waiting import promised_s, wait_until
from tidegate.embedded.servers import PostgresServer, ValkeyServer


@pytest.fixture
async def own_postgres(tmp_path: Path) -> AsyncIterator[PostgresServer]:
    """A PostgreSQL of the test's own, with a migrated database, to pause and stop."""
    server = copied(tmp_path / "postgres", FAST, migrated=True)
    await asyncio.to_thread(server.start)
    yield server
    server.resume()
    await asyncio.to_thread(server.stop)


async def test_all_is_well(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    assert await gateway.get("/health/live") == (200, {"status": "ok"})
    assert await gateway.get("/health/ready") == (200, {"status": "ready"})
    status, body = await gateway.get("/health/dependencies")
    assert (status, body["status"], body["limiter"]) == (200, "ok", "up")
    for name in ("valkey", "postgresql"):
        assert (body[name]["status"], body[name]["detail"]) == ("ok", None)
        assert 0 < body[name]["took_ms"] < 2_000


async def test_any_number_of_probes_are_one_of_each_store(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may ask, without a key, and each look at PostgreSQL was a connection of its own."""
    gateway = await open_gateway(worker=False)
    services, looks = gateway.services, list[str]()
    connections, blobs = services.store.connections, services.blobs
    ping, fits, list_days = connections.ping, services.store.schema_fits, blobs.ping

    async def noted_ping(timeout_ms: int) -> None:
        looks.append("postgresql")
        await ping(timeout_ms)

    async def noted_fits() -> bool:
        looks.append("schema")
        return await fits()

    async def noted_list() -> None:
        looks.append("blobs")
        await list_days()

    monkeypatch.setattr(connections, "ping", noted_ping)
    monkeypatch.setattr(blobs, "ping", noted_list)
    monkeypatch.setattr(services.store, "schema_fits", noted_fits)
    monkeypatch.setattr("tidegate.http.services.PROBED_EVERY_MS", 60_000)
    paths = ["/health/dependencies", "/health/ready"] * 50
    answers = await asyncio.gather(*map(gateway.get, paths))
    assert {status for status, _ in answers} == {200}
    assert sorted(looks) == ["blobs", "postgresql", "schema"]


async def test_a_process_that_drains_is_alive_but_not_ready(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    gateway.services.draining.set()
    status, body = await gateway.get("/health/ready")
    assert (status, body) == (503, {"status": "not_ready", "reason": "draining"})
    assert (await gateway.get("/health/live"))[0] == 200


async def test_a_database_that_was_never_migrated_is_not_ready(
    open_gateway: Opener, empty_database_url: str
) -> None:
    gateway = await open_gateway(worker=False, database_url=empty_database_url)
    status, body = await gateway.get("/health/ready")
    assert (status, body["status"]) == (503, "not_ready")
    assert "schema" in body["reason"]


async def test_a_valkey_that_may_evict_is_unavailable_until_an_operator_has_fixed_it(
    open_gateway: Opener, own_valkey: ValkeyServer
) -> None:
    gateway = await open_gateway(redis_url=own_valkey.url)
    client = redis.asyncio.Redis.from_url(own_valkey.url)
    await client.config_set("maxmemory", "100mb")
    await client.config_set("maxmemory-policy", "allkeys-lru")
    await client.client_kill_filter(_type="normal", skipme=True)

    async def is_noticed() -> bool:
        body = (await gateway.get("/health/dependencies"))[1]
        return "noeviction" in str(body["valkey"].get("detail"))

    await wait_until(is_noticed, what="the policy is noticed")
    refused = await gateway.stream(text="Explain the tide", deadline_ms=1_200)
    assert (refused.status, refused.problem["code"]) == (503, "limiter_unavailable")
    job = await gateway.submit(data="Say hi.", type="text_only")
    await client.config_set("maxmemory-policy", "noeviction")
    await client.aclose()
    assert (await gateway.end_of(job))["status"] == "succeeded"


async def without_saves(client: redis.asyncio.Redis) -> None:
    """Have a background save fail, with the settings that refuse writes then."""
    folder = (await client.config_get("dir"))["dir"]
    name = (await client.config_get("dbfilename"))["dbfilename"]
    await asyncio.to_thread(lambda: Path(str(folder), str(name)).mkdir())
    await client.config_set("save", "3600 1")
    await client.config_set("stop-writes-on-bgsave-error", "yes")
    await client.bgsave()

    async def has_failed() -> bool:
        return bool((await client.info("persistence"))["rdb_last_bgsave_status"] == "err")

    await wait_until(has_failed, 20, "a failed save")


async def demoted(client: redis.asyncio.Redis) -> None:
    await client.replicaof("127.0.0.1", "1")


async def too_few_replicas(client: redis.asyncio.Redis) -> None:
    await client.config_set("min-replicas-to-write", "1")


@pytest.mark.parametrize(
    ("begin", "end", "said"),
    [
        (without_saves, lambda one: one.config_set("save", ""), "MISCONF"),
        (demoted, lambda one: one.replicaof("NO", "ONE"), "read only replica"),
        (
            too_few_replicas,
            lambda one: one.config_set("min-replicas-to-write", "0"),
            "replicas to write",
        ),
    ],
    ids=["MISCONF", "READONLY", "NOREPLICAS"],
)
async def test_a_valkey_that_answers_but_refuses_writes_is_unavailable(
    open_gateway: Opener,
    own_valkey: ValkeyServer,
    begin: Callable[[redis.asyncio.Redis], Awaitable[None]],
    end: Callable[[redis.asyncio.Redis], Awaitable[object]],
    said: str,
) -> None:
    gateway = await open_gateway(worker=False, redis_url=own_valkey.url)
    async with redis.asyncio.Redis.from_url(own_valkey.url, decode_responses=True) as client:
        await begin(client)

        async def noticed(status: str) -> dict[str, Any] | None:
            body = (await gateway.get("/health/dependencies"))[1]
            return body if body["valkey"]["status"] == status else None

        body = await wait_until(lambda: noticed("failed"), 20, "the refusal is noticed")
        assert said in body["valkey"]["detail"]
        assert [one["kind"] for one in body["verdict"]["causes"]] == ["valkey_away"]
        for _ in range(20):
            assert await noticed("failed"), "it does not come and go"
        await end(client)
        await wait_until(lambda: noticed("ok"), 20, "its return")


async def test_a_valkey_whose_memory_is_full_still_admits_calls(
    open_gateway: Opener, own_valkey: ValkeyServer
) -> None:
    gateway = await open_gateway(
        worker=False, redis_url=own_valkey.url, rate_limits={"text_only": 1}
    )
    async with redis.asyncio.Redis.from_url(own_valkey.url) as client:
        await client.config_set("maxmemory", "1")
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            await client.set("another", "key")
    answers = await asyncio.gather(*(gateway.stream(text="Explain the tide") for _ in range(5)))
    assert {one.status for one in answers} == {200}
    assert (await gateway.get("/health/dependencies"))[1]["valkey"]["status"] == "ok"


@pytest.mark.parametrize("how", ["paused", "stopped"])
async def test_without_valkey_it_stays_ready_and_says_what_is_wrong_in_time(
    how: str, open_gateway: Opener, own_valkey: ValkeyServer
) -> None:
    gateway = await open_gateway(worker=False, redis_url=own_valkey.url)
    if how == "paused":
        own_valkey.pause()
    else:
        await asyncio.to_thread(own_valkey.stop)
    started = time.monotonic()
    status, body = await gateway.get("/health/dependencies")
    assert time.monotonic() - started < promised_s(3)
    assert (status, body["valkey"]["status"], body["postgresql"]["status"]) == (
        *(503, "failed", "ok"),
    )
    assert body["valkey"]["detail"]
    assert body["verdict"]["health"] == "down"
    assert [one["kind"] for one in body["verdict"]["causes"]] == ["valkey_away"]
    assert (await gateway.get("/health/ready"))[0] == 200
    limiter = gateway.services.limiter
    await wait_until(lambda: limiter.local_state().state == "away", 20, "a failed exchange")
    refused = await gateway.stream(text="Explain the tide", deadline_ms=1_200)
    assert (refused.status, refused.problem["code"]) == (503, "limiter_unavailable")
    assert int(refused.headers["retry-after"]) >= 1


async def test_without_postgresql_all_answers_come_in_time_and_streams_go_on(
    open_gateway: Opener, own_postgres: PostgresServer
) -> None:
    gateway = await open_gateway(worker=False, database_url=own_postgres.url())
    assert (await gateway.get("/health/ready"))[0] == 200
    request_id = await gateway.submit(data="Explain the tide")
    own_postgres.pause()
    started = time.monotonic()
    status, body = await gateway.get("/health/dependencies")
    assert time.monotonic() - started < promised_s(3)
    assert (status, body["postgresql"]["status"], body["valkey"]["status"]) == (
        *(503, "failed", "ok"),
    )
    assert (await gateway.get("/health/ready"))[0] == 200
    # The record is late; `done` and the answer are not.
    started = time.monotonic()
    streamed = await gateway.stream(text="Generate an image of a fox")
    assert time.monotonic() - started < promised_s(3)
    assert streamed.names == ["delta", "image", "usage", "done"]
    status, body = await gateway.get(f"/status/{request_id}")
    assert (status, body["code"]) == (503, "store_unavailable")
    async with gateway.http.post(f"{gateway.url}/submit", json={"data": "Hello"}) as response:
        assert response.status == 503
        assert "retry-after" in response.headers
    own_postgres.resume()
    await wait_until(lambda: not gateway.services.store.connections.unavailable, 20)
    record = await gateway.recorded(streamed.request_id)
    assert (record["status"], len(record["images"])) == ("succeeded", 1)


async def test_a_postgresql_that_only_reads_is_unavailable_until_it_writes_again(
    open_gateway: Opener, own_postgres: PostgresServer
) -> None:
    gateway = await open_gateway(worker=False, database_url=own_postgres.url())
    request_id = await gateway.submit(data="Explain the tide", type="text_only")
    server = await asyncpg.connect(own_postgres.url("postgres"))
    await server.execute("ALTER SYSTEM SET default_transaction_read_only = on")
    await server.execute("SELECT pg_reload_conf()")

    async def found() -> dict[str, Any] | None:
        status, body = await gateway.get("/health/dependencies")
        causes = [one["kind"] for one in body["verdict"]["causes"]]
        return body if status == 503 and "postgresql_away" in causes else None

    body = await wait_until(found, what="that it only reads is noticed")
    why = "PostgreSQL accepts no writes: default_transaction_read_only is on"
    assert (body["postgresql"]["status"], body["postgresql"]["detail"]) == ("failed", why)
    (cause,) = body["verdict"]["causes"]
    assert (cause["words"].partition(":")[0], cause["detail"]) == (why.partition(":")[0], why)
    await wait_until(lambda: scraped(gateway, 0), what="the metrics say so")
    async with gateway.http.post(f"{gateway.url}/submit", json={"data": "Hello"}) as response:
        assert (response.status, response.headers["retry-after"]) == (503, "1")
    assert (await gateway.get(f"/status/{request_id}"))[0] == 200
    await server.execute("SET default_transaction_read_only = off")
    await server.execute("ALTER SYSTEM RESET default_transaction_read_only")
    await server.execute("SELECT pg_reload_conf()")
    await server.close()

    async def is_well() -> bool:
        return bool((await gateway.get("/health/dependencies"))[0] == 200)

    await wait_until(is_well, what="that it writes is noticed")
    await gateway.submit(data="Hello", type="text_only")
    await wait_until(lambda: scraped(gateway, 1), what="the metrics say so")


async def scraped(gateway: Gateway, is_up: int) -> bool:
    async with gateway.http.get(f"{gateway.url}/metrics") as response:
        return f"\ntidegate_postgres_up {is_up}.0\n" in await response.text()


async def test_a_valkey_that_answers_pings_alone_is_unavailable(
    open_gateway: Opener, own_valkey: ValkeyServer
) -> None:
    gateway = await open_gateway(worker=False, redis_url=own_valkey.url)
    client = redis.asyncio.Redis.from_url(own_valkey.url)
    await client.replicaof("127.0.0.1", 1)  # as after a failover

    async def is_noticed() -> bool:
        status, body = await gateway.get("/health/dependencies")
        return status == 503 and "read only replica" in str(body["valkey"]["detail"])

    await wait_until(is_noticed, what="that it takes no writes is noticed")
    await client.replicaof("NO", "ONE")
    await client.aclose()

    async def is_well() -> bool:
        return bool((await gateway.get("/health/dependencies"))[0] == 200)

    await wait_until(is_well, what="that it takes writes is noticed")
