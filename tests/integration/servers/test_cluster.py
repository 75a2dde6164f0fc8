"""Cluster: each pool at the node that has its slot, followed when the slot moves."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest

from tests.integration.limiter.makers import LIMIT, Maker
from tests.integration.servers import suite
from tests.integration.servers.acl import of_a_cluster
from tests.integration.servers.cluster import MASTERS, Cluster, slot_of
from tests.integration.servers.daemon import Daemon
from tests.waiting import wait_until, work_for
from tidegate.limiter.limiter import Limiter
from tidegate.limiter.messages import Keyspace
from tidegate.limiter.topology import Server

POOLS_OF_A_NODE = 2
BOUND = 3


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path, of_a_cluster()) as cluster:
        yield cluster


def spread(cluster: Cluster) -> dict[str, Daemon]:
    """Pools of which every node has the same number."""
    found: defaultdict[int, dict[str, Daemon]] = defaultdict(dict)
    while sum(map(len, found.values())) < POOLS_OF_A_NODE * MASTERS:
        pool = f"t{uuid4().hex[:12]}"
        node = cluster.owner(slot_of(pool))
        if len(found[node.port]) < POOLS_OF_A_NODE:
            found[node.port][pool] = node
    return {pool: node for pools in found.values() for pool, node in pools.items()}


@pytest.mark.timeout(60)
async def test_every_pool_of_a_cluster_works_and_is_never_over(cluster: Cluster) -> None:
    pools = spread(cluster)
    async with AsyncExitStack() as stack:
        makers = [Maker(pool, stack) for pool in pools]
        pairs = [[await maker(cluster.url, BOUND) for _ in range(2)] for maker in makers]
        await asyncio.gather(*(suite.never_over(pair, BOUND) for pair in pairs))
    for pool, node in pools.items():
        assert node.say("EXISTS", Keyspace(pool).meta) == 1


class Load:
    """Calls over several limiters until the block is left; counts what runs at once."""

    def __init__(self, limiters: list[Limiter]) -> None:
        self.running = self.peak = self.done = 0
        self._limiters = limiters
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        self._tasks = [
            asyncio.create_task(self._call(limiter)) for limiter in self._limiters for _ in range(6)
        ]
        await self.more(50)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def more(self, calls: int) -> None:
        """Wait for that many calls more."""
        before = self.done
        await wait_until(lambda: self.done > before + calls, 20, f"{calls} calls")

    async def _call(self, limiter: Limiter) -> None:
        while True:
            async with limiter.acquire(LIMIT):
                self.running += 1
                self.peak = max(self.peak, self.running)
                await work_for(0.002)
                self.running -= 1
                self.done += 1


@pytest.mark.timeout(60)
async def test_a_pool_is_followed_to_the_node_that_gets_its_slot(
    cluster: Cluster, pool: str
) -> None:
    source = cluster.owner(slot_of(pool))
    target = next(node for node in cluster.nodes if node is not source)
    run = target.say("INFO", "server")["run_id"]
    async with AsyncExitStack() as stack:
        maker = Maker(pool, stack)
        limiters = [await maker(cluster.url, BOUND) for _ in range(2)]
        async with Load(limiters) as load:
            await asyncio.to_thread(cluster.migrate, slot_of(pool), source, target)
            await load.more(200)
            for limiter in limiters:
                await wait_until(partial(at, limiter, run), 20, "all at the target")
        await suite.is_pushed(BOUND, *limiters)
    assert load.peak == BOUND


@pytest.mark.timeout(60)
async def test_never_over_when_a_replica_takes_the_place_of_a_node_that_was_killed(
    tmp_path: Path,
) -> None:
    async with Cluster(tmp_path, of_a_cluster(), replicas=1) as cluster, AsyncExitStack() as stack:
        pool = next(pool for pool, node in spread(cluster).items() if node is cluster.nodes[0])
        maker = Maker(pool, stack)
        limiters = [await maker(cluster.url, BOUND) for _ in range(2)]
        async with Load(limiters) as load:
            cluster.nodes[0].kill()
            replica = cluster.nodes[-1]
            await wait_until(lambda: cluster.owner(slot_of(pool), 1) is replica, 20, "promotion")
            await load.more(200)
        assert load.peak == BOUND
        run = replica.say("INFO", "server")["run_id"]
        for limiter in limiters:
            await wait_until(partial(at, limiter, run), 20, "all at the replica")


def at(limiter: Limiter, run: str) -> bool:
    """Whether both the link and the subscription are at the server with this run id."""
    listener, server = limiter._listener, limiter._link.server
    assert listener is not None
    return server is not None and (server.run, listener.run_id, listener.subscribed) == (
        run,
        run,
        True,
    )


@pytest.mark.timeout(60)
async def test_nodes_that_the_url_names_may_be_gone_or_hang(cluster: Cluster, pool: str) -> None:
    owner = cluster.owner(slot_of(pool))
    gone, stuck = (node for node in cluster.nodes if node is not owner)
    gone.kill()
    stuck.pause()
    server = Server(cluster.url_of(gone, stuck, owner), Keyspace(pool).meta)
    for _ in range(3):
        connection = await server.connect(1.0)
        assert connection.port == owner.port  # type: ignore[attr-defined]
        await connection.disconnect()
        blocking = server.connect_blocking(1.0)
        assert blocking.port == owner.port  # type: ignore[attr-defined]
        blocking.disconnect()  # type: ignore[no-untyped-call]
