"""Each fault of a real server of the limiter's is found, and reported with its fix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.integration.servers.acl import OF_THE_CONNECTIONS, documented, of_the_limiter
from tests.integration.servers.daemon import Daemon
from tests.waiting import wait_until
from tidegate.doctor.checks import Finding, State
from tidegate.doctor.stores import judge_absence
from tidegate.doctor.stores import judge_valkey as judge
from tidegate.errors import ConfigError, LimiterUnavailable
from tidegate.limiter import Limiter, commands, examine

LEASE_MS = 3_000
PASSWORD = "sesame"
KEPT = {"maxmemory": "0", "maxmemory-policy": "noeviction", "min-replicas-to-write": "0"}


@pytest.fixture(scope="module", params=["valkey-server", "redis-server"])
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    lines = (
        f"user default on >{PASSWORD} ~* &* +@all",
        f"user tidegate on >{PASSWORD} {' '.join(documented())}",
    )
    folder = tmp_path_factory.mktemp("server")
    access = {"password": PASSWORD}
    with Daemon(folder, *lines, make=request.param, access=access) as server:
        yield server


@pytest.fixture
def server(running: Daemon) -> Iterator[Daemon]:
    """Left as it was."""
    yield running
    for name, value in KEPT.items():
        running.say("CONFIG", "SET", name, value)
    running.say("ACL", "SETUSER", "tidegate", "reset", "on", f">{PASSWORD}", *documented())


def _good(server: Daemon) -> int:
    """Replicas that count for min-replicas-to-write; 0 where that is not set."""
    return int(server.say("INFO", "replication").get("min_slaves_good_slaves", 0))


def _followers(server: Daemon) -> int:
    return int(server.say("INFO", "replication")["connected_slaves"])


async def found(
    server: Daemon, user: str = "tidegate", password: str = PASSWORD
) -> dict[str, Finding]:
    url = f"redis://{user}:{password}@127.0.0.1:{server.port}"
    try:
        report = await examine(url, f"t{uuid4().hex[:12]}")
    except (LimiterUnavailable, ConfigError) as failed:
        one = judge_absence(failed)
        return {one.check: one}
    return {one.check: one for one in judge(report, LEASE_MS, embedded=False)}


async def test_a_sound_server_is_well_and_left_as_it_was(server: Daemon) -> None:
    before = server.say("DBSIZE")
    all_found = await found(server)
    assert {one.state for one in all_found.values()} == {State.OK}, all_found
    assert len(all_found) == 9
    assert server.say("DBSIZE") == before == 0
    assert all_found["valkey.version"].found.startswith(("Valkey", "Redis"))


async def test_a_user_who_may_not_read_by_pages_reads_a_pool_in_one_piece(server: Daemon) -> None:
    server.say("ACL", "SETUSER", "tidegate", "-hscan")
    assert "may not run hscan" in (await found(server))["valkey.acl"].found
    url = f"redis://tidegate:{PASSWORD}@127.0.0.1:{server.port}"
    policy = {f"l-{number}": 5 for number in range(100)}
    made = Limiter.from_url(url, pool=f"t{uuid4().hex[:12]}", policy=policy)
    async with made as limiter, limiter.acquire("l-7", "l-80"):
        seen = (await limiter.snapshot()).limits
    server.say("FLUSHALL")
    assert len(seen) == 100
    assert {name for name, limit in seen.items() if limit.used} == {"l-7", "l-80"}


async def test_rights_that_are_missing_are_named(server: Daemon) -> None:
    server.say("ACL", "SETUSER", "tidegate", "-hset", "-zadd", "-ssubscribe")
    all_found = await found(server)
    rights = all_found["valkey.acl"]
    assert rights.state is State.FAIL
    assert "may not run hset, ssubscribe, zadd" in rights.found
    assert "+hset +ssubscribe +zadd" in rights.fix
    assert all_found["valkey.pushes"].state is State.FAIL
    server.say("ACL", "SETUSER", "tidegate", "-eval", "-evalsha")
    assert "scripts do not run" in (await found(server))["valkey.acl"].found
    server.say("ACL", "SETUSER", "tidegate", "-info")
    for refused in (await found(server), await found(server, password="wrong")):
        assert [one.state for one in refused.values()] == [State.FAIL]
        assert set(refused) == {"valkey.acl"}, refused


async def test_a_server_that_may_evict_or_is_full_is_told(server: Daemon) -> None:
    server.say("CONFIG", "SET", "maxmemory", "100mb")
    assert (await found(server))["valkey.memory"].state is State.OK
    server.say("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    evicting = (await found(server))["valkey.memory"]
    assert evicting.state is State.FAIL
    assert "allkeys-lru" in evicting.found
    assert "noeviction" in evicting.fix
    server.say("CONFIG", "SET", "maxmemory-policy", "noeviction")
    used = server.say("INFO", "memory")["used_memory"]
    server.say("CONFIG", "SET", "maxmemory", int(used * 1.1))
    assert (await found(server))["valkey.memory"].state is State.WARN


async def test_replicas_without_a_promise_and_replicas_themselves_are_told(tmp_path: Path) -> None:
    everybody = f"user tidegate on >{PASSWORD} ~* &* +@all"
    with Daemon(tmp_path, everybody, "repl-diskless-sync-delay 0") as server:
        assert (await found(server))["valkey.failover"].state is State.OK, "nothing to promise"
        server.say("CONFIG", "SET", "min-replicas-to-write", "1")
        alone = (await found(server))["valkey.failover"]
        assert (alone.state, "writes are refused" in alone.found) == (State.FAIL, True)
        server.say("CONFIG", "SET", "min-replicas-to-write", "0")
        with Daemon(tmp_path, everybody, f"replicaof 127.0.0.1 {server.port}") as replica:
            await wait_until(lambda: _followers(server) == 1, 20, "a replica")
            followed = (await found(server))["valkey.failover"]
            assert followed.state is State.WARN
            assert "min-replicas-to-write is 0" in followed.found
            server.say("CONFIG", "SET", "min-replicas-to-write", "1")
            await wait_until(lambda: _good(server) == 1, 20, "a replica that counts")
            assert (await found(server))["valkey.failover"].state is State.OK
            itself = (await found(replica))["valkey.failover"]
            assert (itself.state, "refuses writes" in itself.found) == (State.FAIL, True)


async def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(LimiterUnavailable) as away:
        await examine("redis://127.0.0.1:1", "gemini")
    assert judge_absence(away.value).check == "valkey.reach"


def test_the_commands_that_are_tried_are_those_that_are_needed() -> None:
    assert set(commands()) | {"eval", "evalsha"} == of_the_limiter() | OF_THE_CONNECTIONS


async def test_a_server_whose_last_save_failed_is_told(tmp_path: Path) -> None:
    everybody = f"user tidegate on >{PASSWORD} ~* &* +@all"
    with Daemon(tmp_path, everybody) as server:
        (server.folder / "dump.rdb").mkdir()  # in the way of the file
        server.say("CONFIG", "SET", "save", "3600 1")
        server.say("BGSAVE")
        await wait_until(lambda: _last_save(server) == "err", 20, "the error")
        for stops, says in (("yes", "MISCONF"), ("no", "save to disk failed")):
            server.say("CONFIG", "SET", "stop-writes-on-bgsave-error", stops)
            saved = (await found(server))["valkey.persistence"]
            assert (saved.state, says in saved.found) == (
                State.FAIL if stops == "yes" else State.WARN,
                True,
            ), saved


def _last_save(server: Daemon) -> str:
    return str(server.say("INFO", "persistence")["rdb_last_bgsave_status"])
