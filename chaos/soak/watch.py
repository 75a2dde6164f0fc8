"""Memory, open files and connections of what lives through a soak, looked at again and again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
from dataclasses import dataclass, field

import asyncpg
import redis.asyncio
import redis.exceptions

from bench.gateway.processes import resident_bytes
from tests.fleet import Fleet

_EVERY_S = 10.0


@dataclass
class Seen:
    """A series of looks at one thing."""

    values: list[float] = field(default_factory=list)

    def growth(self) -> tuple[float, float]:
        """The median of the second quarter, and of the last: the first is warming up."""
        quarter = max(1, len(self.values) // 4)
        return (
            statistics.median(self.values[quarter : 2 * quarter] or self.values),
            statistics.median(self.values[-quarter:]),
        )


def _open_files(pid: int) -> int:
    """Without sockets: those to clients come and go with the clients."""
    found = 0
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += not os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:")
    return found


@dataclass
class Watch:
    """`run` until it is cancelled. Processes are the API and the worker that are never killed."""

    fleet: Fleet
    seen: dict[str, Seen] = field(default_factory=dict)

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_EVERY_S)

    async def look(self) -> None:
        api = next(iter(self.fleet.apis.values()))
        for name, pid in (("API", api.process.pid), ("worker", self.fleet.workers[0].process.pid)):
            self._note(f"{name}: resident MB", resident_bytes([pid]) / 1e6)
            self._note(f"{name}: open files", _open_files(pid))
        # While a server is away there is nothing to count.
        with contextlib.suppress(OSError, asyncpg.PostgresError, redis.exceptions.RedisError):
            self._note("connections to PostgreSQL", await self._to_postgres())
            self._note("connections to Valkey", await self._to_valkey())

    def _note(self, name: str, value: float) -> None:
        self.seen.setdefault(name, Seen()).values.append(value)

    async def _to_postgres(self) -> int:
        connection = await asyncpg.connect(self.fleet.postgres.url(), timeout=5)
        try:
            count: int = await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tidegate'"
            )
            return count
        finally:
            await connection.close()

    async def _to_valkey(self) -> int:
        async with redis.asyncio.from_url(self.fleet.valkey.url, socket_timeout=5) as client:
            return len(await client.client_list()) - 1
