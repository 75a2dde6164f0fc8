"""Processes of a pool whose clock and network are the test's, on the real scripts.

What a script reads is counted in the script itself: how many commands it ran, and how many elements
their answers had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import redis

from tidegate.limiter.connection import pack_request, unpack_reply
from tidegate.limiter.flow import Waiter
from tidegate.limiter.messages import Keyspace, load
from tidegate.limiter.policy import PoolPolicy
from tidegate.limiter.queue import LocalQueue
from tidegate.limiter.session import Lease, Observer, Session
from tidegate.limiter.views import Snapshot, read_pool

CLOCK = """
function T.wall_clock_ms() return tonumber(redis.call('GET', T.prefix .. 'testclock')) end
"""
# In the place of `local call = redis.call`.
COUNTED = b"""
local function call(...)
  local answer = redis.call(...)
  redis.call('HINCRBY', KEYS[1] .. ':testwork', 'commands', 1)
  local elements = type(answer) == 'table' and #answer or 1
  redis.call('HINCRBY', KEYS[1] .. ':testwork', 'elements', elements)
  return answer
end
"""


# The families of fields in a record; those of a later version are none of our business.
FAMILIES = set("duwpgaxebstn")


class Pool:
    """A pool at a server; `run` names the server's life."""

    def __init__(self, server: redis.Redis, pool: str, policy: PoolPolicy) -> None:
        self.server: Any = server
        self.keys = Keyspace(pool)
        self.policy = policy
        self.run = "run-0"
        self.now_ms = 1_700_000_000_000
        self.behind_ms = 0
        self.loop = asyncio.new_event_loop()
        self.scripts = {}
        for name in ("sync", "tend", "inspect"):
            source = load(name, clock=CLOCK).source
            assert source.count(b"local call = redis.call\n") == 1
            source = source.replace(b"local call = redis.call\n", COUNTED)
            self.scripts[name] = self.server.script_load(source)
        self.pass_time(0)

    def pass_time(self, by_ms: int) -> None:
        self.now_ms += by_ms
        self.server.set(f"{self.keys.prefix}testclock", self.now_ms - self.behind_ms)

    def set_back(self, by_ms: int) -> None:
        """The server's clock is set back; those of the processes measure durations."""
        self.behind_ms += by_ms
        self.pass_time(0)

    def lose_everything(self) -> None:
        """The server restarts empty."""
        self.wipe()
        self.run += "'"
        self.pass_time(1)

    def wipe(self) -> None:
        names = self.server.keys(f"*{{{self.keys.pool}}}*")
        if names:
            self.server.delete(*names)

    def close(self) -> None:
        self.wipe()
        self.loop.close()

    def run_counted(self, name: str, packed: bytes) -> tuple[bytes, dict[str, int]]:
        """The answer of a script, and its work."""
        where = f"{self.keys.meta}:testwork"
        self.server.delete(where)
        raw = self.server.evalsha(self.scripts[name], 2, self.keys.meta, self.keys.layout, packed)
        counted = self.server.hgetall(where)
        return raw, {key.decode(): int(count) for key, count in counted.items()}

    def inspect(
        self, *, permits: bool = False, limits: list[str] | None = None
    ) -> tuple[Snapshot, list[dict[str, int]]]:
        """The pool as it is shown, and the work of each part."""
        parts = []

        async def run(packed: bytes) -> bytes:
            raw, work = self.run_counted("inspect", packed)
            parts.append(work)
            return raw

        reading = read_pool(run, "up", permits=permits, limits=limits)
        return self.loop.run_until_complete(reading), parts

    def field(self, name: str) -> str:
        return (self.server.hget(self.keys.meta, name) or b"").decode()

    def fields(self, letter: str) -> set[str]:
        """The limits of which the record has a field of that letter."""
        names = (name.decode() for name in self.server.hkeys(self.keys.meta))
        return {name[2:] for name in names if name.startswith(f"{letter}:")}


class Process:
    """One process of the pool."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.queue = LocalQueue(pool.loop.create_future)
        self.session = Session(
            pool.policy,
            self.queue,
            Observer(),
            Lease(pool.policy.lease_ms, lambda: float(pool.now_ms)),
            wake=lambda: None,
            alarm=lambda name, in_ms: None,
        )

    def say(self) -> list[dict[str, int]]:
        """Everything that there is to say; returns the work of each call."""
        work = []
        while self.session.is_request_due() or not self.session.lease.identity.gen:
            work.append(self.exchange())
        return work

    def compare(self) -> list[dict[str, int]]:
        """As once in a third of a lease."""
        self.session.refresh()
        return self.say()

    def exchange(self, *, lost: bool = False) -> dict[str, int]:
        """One call, whose answer may be lost."""
        pool, session = self.pool, self.session
        batch, request = session.prepare(pool.run, 10_000_000)
        name = "sync" if session.is_ordinary(request) else "tend"
        raw, work = pool.run_counted(name, pack_request(request))
        if lost:
            session.unanswered(batch)
        else:
            session.answered(batch, request, unpack_reply(raw), float(pool.now_ms))
        return work

    def ask(self, tenant: str, *limits: str, hard_ms: int = 600_000, band: int = 1) -> Waiter:
        flow = self.queue.flow(band, tenant, tuple(sorted(limits)))
        flow.refresh(self.session.policy)
        return self.queue.ask(
            flow,
            amounts="",
            hard_ms=hard_ms,
            now_ms=float(self.pool.now_ms),
            deadline_ms=float("inf"),
        )

    def end(self, tickets: Iterable[int], *, later: bool = False) -> None:
        now_ms = float(self.pool.now_ms)
        for ticket in tickets:
            self.queue.release(
                ticket, outcome="success", actual="", now_ms=now_ms, usage_later=later
            )
        self.say()


def stray_fields(
    record: Mapping[str, str], weights: Mapping[str, int], limits: set[str]
) -> list[str]:
    """The fields of a pool's record that belong to no limit in force, no pause, no weight, no
    waiter and no permit; `record` as Valkey has it."""
    found = []
    for field, value in record.items():
        letter, colon, name = field.partition(":")
        if not colon or letter not in FAMILIES:
            continue
        if letter == "t":
            stays = name in weights
        elif letter == "n":
            stays = int(value.split("|")[0]) > 0
        elif letter == "u":
            stays = int(value) > 0
        elif letter == "w" and name not in limits:
            stays = any(int(band.split(":")[0]) > 0 for band in value.split(","))
        elif letter in "pg":
            stays = True  # as long as it lasts: `paused` has its end
        else:
            stays = name in limits
        if not stays:
            found.append(f"{field} = {value}")
    return found
