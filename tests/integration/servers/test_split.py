"""Two masters at once: a replica is promoted while the old master goes on with its own clients."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from chaos.limiter.fleet import Fleet
from chaos.limiter.truth import Truth
from chaos.limiter.worker import Orders
from tests.integration.servers.daemon import Daemon
from tests.waiting import wait_until

LIMIT = 6
LEASE_MS = 1000
QUICK = ("repl-diskless-sync-delay 0",)
SAFE = ("min-replicas-to-write 1", "min-replicas-max-lag 1")


@pytest.fixture
async def truth() -> AsyncIterator[Truth]:
    truth = Truth()
    await truth.start()
    yield truth
    await truth.stop()


def orders(server: Daemon, pool: str, truth: Truth, name: str) -> Orders:
    url = f"redis://127.0.0.1:{server.port}"
    times = (LIMIT, LEASE_MS)
    return Orders(url, pool, truth.port, name, *times, on_lost="cancel")


async def split(old: Daemon, new: Daemon, truth: Truth, pool: str, *, old_stops: bool) -> None:
    """Cut the replica off, promote it, and let each side have a process of its own."""
    await wait_until(lambda: new.say("ROLE")[3] == "connected", what="a replica in step")
    async with Fleet(forks=True) as fleet:
        fleet.start(orders(old, pool, truth, "old"))
        await wait_until(lambda: truth.total > 50, 20, "calls at the old master")
        new.pause()
        if old_stops:
            await wait_until(lambda: truth.open_calls == 0, 20, "the end of the calls there")
        new.resume()
        new.say("REPLICAOF", "NO", "ONE")
        fleet.start(orders(new, pool, truth, "new"))
        await wait_until(lambda: truth.by_worker.get("new"), 20, "calls at the new master")
        calls = truth.total  # only now: the old master's clients may have made many since
        await wait_until(lambda: truth.total > calls + 200, 20, "more of them")
        if not old_stops:
            await wait_until(lambda: truth.peak > LIMIT, 20, "calls at both at once")


@pytest.mark.timeout(60)
async def test_a_master_that_wants_a_replica_lets_nobody_in_once_it_is_cut_off(
    tmp_path: Path, truth: Truth, pool: str
) -> None:
    with (
        Daemon(tmp_path, *QUICK, *SAFE) as old,
        Daemon(tmp_path, f"replicaof 127.0.0.1 {old.port}") as new,
    ):
        await split(old, new, truth, pool, old_stops=True)
    assert truth.peak == LIMIT


@pytest.mark.timeout(60)
async def test_without_that_each_side_has_the_whole_limit(
    tmp_path: Path, truth: Truth, pool: str
) -> None:
    with (
        Daemon(tmp_path, *QUICK) as old,
        Daemon(tmp_path, f"replicaof 127.0.0.1 {old.port}") as new,
    ):
        await split(old, new, truth, pool, old_stops=False)
    assert LIMIT < truth.peak <= 2 * LIMIT
