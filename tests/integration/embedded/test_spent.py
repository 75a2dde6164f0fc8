"""What is spent of a day quota outlives the bundled Valkey, and nothing else does."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import redis

from tests.integration.embedded.traces import Traces
from tests.waiting import wait_until
from tests.zones import ZONE
from tidegate.embedded import servers as place
from tidegate.embedded import servers as process
from tidegate.embedded.lease import Folder, ServersLease, ensure
from tidegate.embedded.servers import ValkeyServer
from tidegate.limiter import Limit, Limiter, PoolPolicy, Quota, Rate

DAY, TOKENS, CALLS, MODEL = "rpd:flash", "tph:flash", "rph:flash", "model:flash"
HOUR_MS = 3_600_000
LIMITS: dict[str, int | Limit] = {
    DAY: Quota(3, zone=ZONE),
    TOKENS: Rate(50, HOUR_MS, "tokens"),
    CALLS: Rate(9, HOUR_MS),
    MODEL: 9,
}
POLICY = PoolPolicy(LIMITS, lease_ms=1000)
SPENT = {DAY: 3, TOKENS: 30, CALLS: 1, MODEL: 0}


def _valkey(data_dir: Path) -> ServersLease:
    return ensure(data_dir, {"valkey"}, idle_s=0.1)


def _limiter(lease: ServersLease) -> Limiter:
    assert lease.redis_url is not None
    return Limiter.from_url(lease.redis_url, pool="gemini", policy=POLICY)


async def _call(limiter: Limiter) -> bool:
    async with limiter.try_acquire(DAY, MODEL) as permit:
        return permit is not None


async def _spend_all(limiter: Limiter) -> None:
    async with limiter.acquire(TOKENS, CALLS, tokens=30):
        pass
    for _ in range(3):
        async with limiter.acquire(DAY, MODEL):
            pass


async def _used(limiter: Limiter) -> dict[str, int]:
    limits = (await limiter.snapshot()).limits
    return {name: limit.used for name, limit in limits.items()}


async def test_a_quota_that_is_used_up_is_used_up_after_a_restart(
    data_dir: Path, traces: Traces
) -> None:
    with _valkey(data_dir) as lease:
        async with _limiter(lease) as limiter:
            await _spend_all(limiter)
            await limiter.penalise(MODEL, reason="for as long as it runs")
        before = process.identify(Folder(data_dir).read().services["valkey"].identity.pid)
    await traces.none_left(timeout_s=20)
    with _valkey(data_dir) as lease:
        assert Folder(data_dir).read().services["valkey"].identity != before
        async with _limiter(lease) as limiter:
            await wait_until(lambda: limiter.state == "up")
            assert not await _call(limiter)
            assert await _used(limiter) == SPENT
            assert limiter.pauses() == {}
            assert len((await limiter.snapshot()).processes) == 1


async def test_survivors_do_not_count_twice_what_the_file_holds(
    data_dir: Path, traces: Traces
) -> None:
    with _valkey(data_dir) as lease:
        assert lease.redis_url is not None
        async with _limiter(lease) as limiter:
            await _spend_all(limiter)
            epoch = (await limiter.snapshot()).epoch
            # What was admitted since a process and the server compared last is counted on top.
            await wait_until(lambda: not limiter._queue.spent_since, what="all is compared")
            with redis.Redis.from_url(lease.redis_url) as server:
                server.save()
            process.RunningProcess(Folder(data_dir).read().services["valkey"].identity).stop(
                signal.SIGKILL
            )
            lease_of = limiter._session.lease
            await wait_until(lambda: lease_of.identity.epoch > epoch, 30, "it has come back")
            await wait_until(lambda: limiter.state == "up", 30, "it recovered")
            assert not await _call(limiter)
            assert await _used(limiter) == SPENT
    await traces.none_left(timeout_s=20)


async def test_clients_never_see_what_the_file_holds_besides(tmp_path: Path) -> None:
    socket = tmp_path / "valkey.sock"
    server = ValkeyServer(tmp_path / "valkey", socket_path=socket, keeps_spent=True)
    server.start()
    with redis.Redis(unix_socket_path=str(socket)) as client:
        client.set("tg:1:{gemini}:session", "of a process that is gone")
        client.set("tg:1:{gemini}:quota:rpd:flash", "3")
        client.save()
    server.kill()
    server.launch()
    try:
        with redis.Redis(unix_socket_path=str(place.uncleaned(socket))) as early:
            await wait_until(lambda: _keys(early) == 2, what="the file is read")
        with redis.Redis(unix_socket_path=str(socket)) as client:
            with pytest.raises(redis.ConnectionError):
                client.ping()
            server.await_ready()
            assert client.keys() == [b"tg:1:{gemini}:quota:rpd:flash"]
    finally:
        server.stop()


def _keys(client: redis.Redis) -> int:
    try:
        return int(client.dbsize())
    except redis.ConnectionError:
        return 0


async def test_a_file_that_cannot_be_read_is_set_aside(data_dir: Path, traces: Traces) -> None:
    folder = Folder(data_dir).path / "valkey"
    folder.mkdir(parents=True, mode=0o700)
    (folder / "spent.rdb").write_bytes(b"REDIS9999 of a later version")
    with _valkey(data_dir) as lease:
        async with _limiter(lease) as limiter, limiter.acquire(DAY):
            pass
    await traces.none_left(timeout_s=20)
    assert (folder / "spent.unreadable").exists()
    with _valkey(data_dir) as lease:
        async with _limiter(lease) as limiter:
            assert (await _used(limiter))[DAY] == 1
    await traces.none_left(timeout_s=20)
