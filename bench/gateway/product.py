"""Our product as it is deployed: API processes and workers with a Valkey and a PostgreSQL of their
own, limits that bind nobody, and everything on the record.

Invariant: leaving it ends all that it started.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import asyncpg
import redis

from bench.environments import ours_python
from bench.gateway.processes import Program, await_rest, cpu_ns, family
from tidegate.embedded.servers import PostgresServer, ValkeyServer, free_port

# Above what is ever open here: the limits are asked and kept, and hold up nobody.
_AT_ONCE = 5000
_KINDS = ("text_only", "multi_modal", "image_generation")
_ON_DISK = Path("/var/tmp")


class Product:
    """`with Product(upstream.url, apis=1) as product:` starts it; it may not be ready yet.

    With a `policy`, the text of a tidegate.toml, its upstreams are all there are.
    """

    def __init__(
        self,
        upstream_url: str,
        *,
        apis: int,
        workers: int = 0,
        policy: str = "",
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self._stack = ExitStack()
        self._upstream_url = upstream_url
        self._counts = (apis, workers)
        self._policy = policy
        self._settings = settings or {}
        self.folder: Path
        self.valkey: ValkeyServer
        self.postgres: PostgresServer
        self.program: Program

    def __enter__(self) -> Self:
        # PostgreSQL writes to a disk, as it would for anybody.
        place = _ON_DISK if _ON_DISK.is_dir() else None
        folder = self.folder = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=place))
        )
        folder.chmod(0o755)  # the user that root's PostgreSQL runs as has its cluster here too
        try:
            self.valkey = ValkeyServer(folder / "valkey")
            self.postgres = PostgresServer(folder / "postgres")
            self._stack.callback(self.postgres.stop)
            self._stack.callback(self.valkey.stop)
            self.valkey.start()
            self.postgres.start()
            apis, workers = self._counts
            if self._policy:
                (folder / "tidegate.toml").write_text(self._policy, encoding="utf-8")
            self.program = Program(
                _command(apis, workers),
                cwd=folder,
                env=self.environment(),
                log=folder / "tidegate.log",
            )
            self._stack.callback(self.program.stop)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def environment(self) -> dict[str, str]:
        """Of its processes, and of a command that is to find them."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        account = {"GEMINI_API_KEY": "bench", "GEMINI_BASE_URL": self._upstream_url}
        return {
            **kept,
            "PYTHONPATH": str(ours_python().parents[2] / "src"),
            "PORT": str(self.port),
            "REDIS_URL": self.valkey.url,
            "DATABASE_URL": self.postgres.url(),
            **({} if self._policy else account),
            "RATE_LIMITS": json.dumps(dict.fromkeys(_KINDS, _AT_ONCE)),
            "DATA_DIR": str(self.folder / "data"),
            "LOG_FORMAT": "json",
            **self._settings,
        }

    def pids(self, role: str) -> list[int]:
        """The processes of one role: `serve`, `worker`, `valkey` or `postgres`."""
        if role == "valkey":
            return family(self.valkey.pid)
        if role == "postgres":
            return family(self.postgres.pid)
        return self.program.pids(lambda words: role in words)

    def cpu_ns(self) -> dict[str, int]:
        """What each role has used up to now."""
        return {role: cpu_ns(self.pids(role)) for role in ("serve", "worker", "valkey", "postgres")}

    def await_rest(self) -> None:
        """Wait until all roles have done what a load left to do."""
        await_rest(lambda: sum(self.cpu_ns().values()))

    def wal_bytes(self) -> int:
        """What PostgreSQL has written to its log up to now."""
        return int(self.query("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn AS at")[0]["at"])

    def valkey_reads(self) -> int:
        """What Valkey has read up to now: a pipeline counts once, as it is one round trip."""
        client = redis.Redis.from_url(self.valkey.url)
        try:
            stats = client.info("stats")
        finally:
            client.close()
        return int(stats["total_reads_processed"])

    def query(self, sql: str) -> list[Any]:
        async def run() -> list[Any]:
            connection = await asyncpg.connect(self.postgres.url())
            try:
                return list(await connection.fetch(sql))
            finally:
                await connection.close()

        return asyncio.run(run())


def _command(apis: int, workers: int) -> Sequence[str | Path]:
    program = (ours_python(), "-m", "tidegate")
    if (apis, workers) == (1, 0):
        return (*program, "serve")
    return (*program, "up", "--api", str(apis), "--workers", str(workers))
