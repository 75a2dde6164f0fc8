"""A stage for faults: servers, ways to them, workers, and the truth that watches.

Invariant: whatever happens on it, everything that it started has ended when it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from uuid import uuid4

from chaos.history import flows_again_ns
from chaos.limiter.fleet import Fleet
from chaos.limiter.network import Cable
from chaos.limiter.proxy import Proxy
from chaos.limiter.servers import APPEND_ONLY, REPLICATING, Clock, Server
from chaos.limiter.truth import Truth
from chaos.limiter.worker import LIMIT, Orders, policy_of
from tests.integration.limiter.conftest import leftovers
from tests.waiting import wait_until
from tidegate.checker import NS, Curve, Interruption, in_flight
from tidegate.limiter import Limiter

# How the workers reach Valkey: straight; each through a proxy of its own; each by a cable of its
# own; through one proxy each to a primary that has a replica.
Way = Literal["straight", "proxies", "cables", "replica"]

# A limit of this name says that a fault is measured by its use, not by that of `LIMIT`.
RATE = "rpm:x"
START_S = 60.0
BACK_S = 20.0
# For so long the permits must be used again after a fault.
BACK_WINDOW_NS = NS


@dataclass(frozen=True, slots=True)
class Size:
    """How large: `tasks` in each worker, all of which always want a permit.

    spread_ms: over so long a worker's tasks begin, so that the waiters of all workers mix.
    back_share: how much of the permits must be used again after a fault. slack_s: how much later
    than promised that may be, for the time that the processes themselves take.
    """

    workers: int = 4
    tasks: int = 300
    limit: int = 16
    lease_ms: int = 1000
    call_ms: float = 100.0
    spread_ms: float = 1500.0
    back_share: float = 0.9
    slack_s: float = 0.0


# What depends on a quiet machine, how soon and how well permits are used again, is not judged so.
SMALL = Size(
    workers=3,
    tasks=30,
    limit=6,
    lease_ms=600,
    call_ms=50.0,
    spread_ms=50.0,
    back_share=0.3,
    slack_s=15.0,
)


@dataclass
class Scene:
    """What a fault can reach. `frozen` says which worker stood still when."""

    folder: Path
    size: Size
    orders: dict[str, Any]
    chance: random.Random
    truth: Truth
    fleet: Fleet
    server: Server
    replica: Server | None = None
    clock: Clock | None = None
    links: list[Proxy] = field(default_factory=list)  # from a replica to its primary
    proxies: dict[str, Proxy] = field(default_factory=dict)
    cables: dict[str, Cable] = field(default_factory=dict)
    frozen: list[Interruption] = field(default_factory=list)
    deeds: list[tuple[int, str]] = field(default_factory=list)  # what chance chose, and when
    pool: str = field(default_factory=lambda: f"chaos-{uuid4().hex[:8]}")

    @property
    def names(self) -> list[str]:
        return [f"w{number}" for number in range(self.size.workers)]

    @property
    def lease_s(self) -> float:
        return self.size.lease_ms / 1000

    def orders_of(self, name: str) -> Orders:
        url, truth = self.server.url, self.truth.port
        if name in self.proxies:
            url = self.proxies[name].url
        shape: dict[str, Any] = asdict(self.size)
        for of_the_scene in ("workers", "back_share", "slack_s"):
            del shape[of_the_scene]
        orders: dict[str, Any] = {"pool": self.pool, "history": True} | shape | self.orders
        if name in self.cables:
            url = self.server.url_at(self.cables[name].address)
            return Orders(url=url, truth=str(self.folder / "truth"), name=name, **orders)
        return Orders(url=url, truth=truth, name=name, **orders)

    def busiest(self) -> str:
        """The worker that holds the most permits now."""
        there = self.truth.by_worker
        return max(self.names, key=lambda name: there.get(name, 0))

    def launch(self, name: str) -> None:
        prefix = self.cables[name].enter if name in self.cables else ()
        self.fleet.start(self.orders_of(name), prefix)

    @contextlib.contextmanager
    def standing_still(self, name: str, *, longer_s: float = 0.0) -> Iterator[None]:
        """Record that a worker is paused for the time of the block, and for `longer_s`."""
        began_ns = time.monotonic_ns()
        yield
        end_ns = time.monotonic_ns() + int(longer_s * NS)
        self.frozen.append(Interruption(name, began_ns, end_ns))

    async def ready(self) -> None:
        """Wait until all workers are there and all permits in use."""

        def all_used() -> bool:
            self.check_workers()
            there = len(self.truth.by_worker) == self.size.workers
            return there and self._in_full_use(0, time.monotonic_ns()) is not None

        await wait_until(all_used, START_S, "all workers, and all permits in use")

    def check_workers(self) -> None:
        """Raises AssertionError if one has ended by itself."""
        for name, status in self.fleet.ended().items():
            raise AssertionError(f"{name} ended with {status}: {self.last_words(name)}")

    def last_words(self, name: str) -> str:
        return self.fleet.log_of(name).read_text(errors="replace")[-1500:]

    def used(self) -> Curve:
        """Permits in use over time; what a worker held while it stood still was not."""
        return in_flight(self.truth.log, LIMIT, without=self.frozen)

    def _in_full_use(self, since_ns: int, known_ns: int) -> int | None:
        """Ns from `since_ns` to when what the fault is measured by was used up, and stayed so."""
        size = self.size
        rate = self.orders.get("limits", {}).get(RATE)
        if rate is not None:
            _, bound, window_ms, _ = rate
            # The limiter's window is longer by the slack that it gives to arrivals.
            window_ns, least = int(window_ms * 1.05e6), int(bound * size.back_share)
            return flows_again_ns(
                self.truth.log, RATE, since_ns, known_ns, window_ns=window_ns, least=least
            )
        window_ns = BACK_WINDOW_NS if since_ns else 1
        return self.used().recovered_ns(
            size.limit, since_ns, known_ns, window_ns=window_ns, share=size.back_share
        )

    async def recovered(self, since_ns: int) -> float | None:
        """Seconds from `since_ns` until all permits were in use again, and stayed so."""
        end_s = time.monotonic() + BACK_S
        while True:
            self.check_workers()
            found = self._in_full_use(since_ns, time.monotonic_ns())
            if found is not None:
                return found / NS
            if time.monotonic() > end_s:
                return None
            await asyncio.sleep(0.2)

    async def finish(self) -> list[str]:
        """End all workers in good order; what of the pool is left that should not be."""
        orders = self.orders_of("watcher")
        watcher = Limiter.from_url(
            self.server.url, pool=self.pool, policy=policy_of(orders), on_conflict="keep"
        )
        async with watcher:
            status = await self.fleet.end()
            bad = [f"{name} ended with {code}: {self.last_words(name)}"
                   for name, code in status.items() if code != 0]  # fmt: skip

            async def empty() -> bool:
                snapshot = await watcher.snapshot()
                views = [snapshot.limits[name] for name, _ in concurrency_of(orders)]
                taken = any(view.used or view.waiting for view in views)
                return snapshot.sessions == 1 and not taken

            try:
                await wait_until(empty, self.lease_s + orders.hard_ms / 1000 + 5, "an empty pool")
            except AssertionError:
                bad.append(f"the pool does not become empty: {await watcher.snapshot()}")
        return bad + await leftovers(self.server.url, self.pool)


def concurrency_of(orders: Orders) -> list[tuple[str, int]]:
    """The limits that count calls in flight, `LIMIT` first, with the bound of each."""
    more = [(name, spec) for name, spec in orders.limits.items() if isinstance(spec, int)]
    return [(LIMIT, orders.limit), *more]


@contextlib.asynccontextmanager
async def open_scene(
    way: Way,
    size: Size,
    orders: dict[str, Any],
    chance: random.Random,
    *,
    append_only: bool = False,
    own_clock: bool = False,
    forks: bool = False,
) -> AsyncIterator[Scene]:
    """Everything started and at full use inside the block."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        names = [f"w{number}" for number in range(size.workers)]
        cables = {name: Cable() for name in names} if way == "cables" else {}
        for cable in cables.values():
            stack.callback(cable.remove)
            cable.lay()
        truth = Truth()
        await truth.start(folder / "truth")
        stack.push_async_callback(truth.stop)
        clock = Clock(folder) if own_clock else None
        server = Server(
            folder / "valkey",
            APPEND_ONLY if append_only else REPLICATING if way == "replica" else (),
            addresses=[cable.address for cable in cables.values()],
            clock=clock,
        )
        await _start(server, stack)
        fleet = await stack.enter_async_context(Fleet(folder, forks=forks))
        scene = Scene(folder, size, orders, chance, truth, fleet, server)
        scene.cables, scene.clock = cables, clock
        if way == "replica":
            await add_replica(scene, stack)
        if way in ("proxies", "replica"):
            scene.proxies = {name: await _proxy(server.port, stack) for name in names}
        for name in names:
            scene.launch(name)
        await scene.ready()
        yield scene


async def _start(server: Server, stack: contextlib.AsyncExitStack) -> None:
    def end() -> None:
        server.resume()
        server.kill()

    stack.callback(end)
    await asyncio.to_thread(server.start)


async def _proxy(target: int, stack: contextlib.AsyncExitStack) -> Proxy:
    proxy = await Proxy(target).start()
    stack.push_async_callback(proxy.stop)
    return proxy


async def add_replica(scene: Scene, stack: contextlib.AsyncExitStack) -> None:
    """Give the primary a replica, through a proxy, and let it refuse to write without one."""
    scene.links = [await _proxy(scene.server.port, stack)]
    scene.replica = Server(scene.folder / "replica", REPLICATING)
    await _start(scene.replica, stack)
    await follow(scene)


async def follow(scene: Scene) -> None:
    """Make `scene.replica` a replica of `scene.server` by the link, and wait until it is one."""
    assert scene.replica is not None
    scene.links[0].switch(scene.server.port)
    await say(scene.replica, "REPLICAOF", "127.0.0.1", str(scene.links[0].port))
    await say(scene.replica, "CONFIG", "SET", "min-replicas-to-write", "0")

    async def followed() -> bool:
        return b"min_slaves_good_slaves:1" in await say(scene.server, "INFO", "replication")

    await say(scene.server, "CONFIG", "SET", "min-replicas-to-write", "1")
    await wait_until(followed, 30, "the replica follows")


async def say(server: Server, *words: str) -> bytes:
    """One command to a server, by hand; what it answers, as it came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        parts = "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
        writer.write(f"*{len(words)}\r\n{parts}".encode())
        answer = await reader.readuntil(b"\r\n")
        if answer.startswith(b"-"):
            raise RuntimeError(f"{' '.join(words)}: {answer.decode().strip()}")
        if answer.startswith(b"$"):
            answer = await reader.readexactly(int(answer[1:]))
        return answer
    finally:
        writer.close()


Act = Callable[[Scene, str, int], Awaitable[int]]
