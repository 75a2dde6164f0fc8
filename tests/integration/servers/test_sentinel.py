"""Sentinel: found through any sentinel that works, and never over through a failover."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from chaos.limiter.fleet import Fleet
from chaos.limiter.truth import Truth
from chaos.limiter.worker import Orders
from tests.integration.servers.acl import of_sentinels
from tests.integration.servers.sentinels import Sentinels
from tests.waiting import wait_until
from tidegate.limiter.topology import Server

LIMIT = 6
# So that the server that was replaced takes no writes of those who have not heard of it.
SAFE = ("min-replicas-to-write 1", "min-replicas-max-lag 1")


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Sentinels]:
    async with Sentinels(tmp_path, of_sentinels(), *SAFE, watchers=3, replicas=2) as deployment:
        yield deployment


@pytest.fixture
async def truth() -> AsyncIterator[Truth]:
    truth = Truth()
    await truth.start()
    yield truth
    await truth.stop()


def run_id(info: bytes) -> str:
    return info.decode().partition("run_id:")[2].split()[0]


@pytest.mark.timeout(60)
async def test_a_sentinel_that_hangs_or_is_gone_keeps_nobody_from_the_master(
    deployment: Sentinels,
) -> None:
    deployment.watchers[0].pause()
    deployment.watchers[1].kill()
    server = Server(deployment.url, "k")
    master = deployment.servers[0].say("INFO", "server")["run_id"]
    for _ in range(3):
        connection = await server.connect(1.0)
        await connection.send_command("INFO", "server")
        assert run_id(await connection.read_response()) == master
        await connection.disconnect()
        blocking = server.connect_blocking(1.0)
        blocking.send_command("INFO", "server")  # type: ignore[no-untyped-call]
        assert run_id(blocking.read_response()) == master
        blocking.disconnect()  # type: ignore[no-untyped-call]
    unknown = Server(deployment.url.replace("/front?", "/back?"), "k")
    with pytest.raises(ConnectionError, match=r"no master of back: .*knows no back"):
        await unknown.connect(2.0)


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("fault", ["killed", "stands still and comes back"])
async def test_never_over_through_the_failover_of_a_master_that(
    fault: str, deployment: Sentinels, truth: Truth, pool: str
) -> None:
    old = deployment.servers[0]
    async with Fleet(forks=True) as fleet:
        for name in ("one", "two", "three"):
            orders = Orders(deployment.url, pool, truth.port, name, limit=LIMIT, lease_ms=1500)
            fleet.start(orders)
        await wait_until(lambda: truth.total > 100, 20, "calls before the fault")
        if fault == "killed":
            old.kill()
        else:
            old.pause()
        await wait_until(lambda: deployment.master() is not old, 20, "another master")
        calls = truth.total
        await wait_until(lambda: truth.total > calls + 100, 20, "calls after the failover")
        if fault != "killed":
            old.resume()
            calls = truth.total
            await wait_until(lambda: truth.total > calls + 300, 20, "calls after the return")
    assert truth.peak <= LIMIT
