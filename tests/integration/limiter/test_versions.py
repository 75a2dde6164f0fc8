"""Two versions of the product in one pool: upgrade, downgrade, and both at once.

The next version is the product's own source with more of everything that goes over the wire or is
kept in Valkey. What is there has to ignore it, and must not lose it where it may not.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis.asyncio

import tidegate
from chaos.limiter.fleet import Fleet
from chaos.limiter.truth import Truth
from chaos.limiter.worker import Orders
from tests.integration.limiter.makers import LIMIT, Maker
from tests.waiting import wait_until
from tidegate.limiter.limiter import Limiter
from tidegate.limiter.messages import Keyspace
from tidegate.limiter.policy import PoolPolicy

BOUND = 3
LEASE_MS = 10_000  # none is lost, whatever the machine does
TASKS = 10

# What the next version adds, by the end of which file.
MORE = {
    "limiter/lua/lib/core.lua": """
local pack = cmsgpack.pack
local cmsgpack = { unpack = cmsgpack.unpack, pack = function(values)
  values[#values + 1] = { 'next' }
  return pack(values)
end }
""",
    "limiter/lua/lib/pool.lua": """
local save_before = T.save_pool
function T.save_pool()
  T.put('next', 'of the pool')
  for name in pairs(T.limits) do T.put('z:' .. name, 'of a limit') end
  for name in pairs(T.tenants) do T.put('y:' .. name, 'of a tenant') end
  save_before()
end
""",
    "limiter/lua/lib/permits.lua": """
local flush_before = T.flush_own
function T.flush_own()
  if own.dirty then
    own.written.next = 'of a session'
    own.written['z:' .. q.sid] = 'of something in it'
  end
  flush_before()
end
""",
    "limiter/lua/lib/hints.lua": """
local hints_before = T.hints
function T.hints()
  local list = hints_before()
  for _, hint in ipairs(list) do hint[#hint + 1] = 'next' end
  return list
end
""",
    "limiter/lua/lib/comparison.lua": """
local whole_before, roster_before = T.whole, T.roster
function T.roster()
  local roster = roster_before()
  roster[#roster + 1] = 'next'
  return roster
end
function T.whole()
  local all = whole_before()
  for _, held in ipairs(all[2]) do held[#held + 1] = 'next' end
  all[#all + 1] = 'next'
  return all
end
""",
    "limiter/messages.py": """

_pack_before, _fields_before = pack, Join.as_fields


def pack(value):
    more = {"next": {"of": "a request"}} if "sid" in value else {}
    return _pack_before({**value, **more})


def _as_fields(self):
    fields = _fields_before(self)
    policy = {**fields["policy"], "next": 7}
    return {**fields, "policy": policy, "next": ["of a join"]}


Join.as_fields = _as_fields
""",
    "limiter/connection.py": """

_request_before = pack_request


def pack_request(request):
    fields = msgpack.unpackb(_request_before(request), raw=True)
    return msgpack.packb({**fields, "next": {"of": "a request"}}, use_bin_type=False)
""",
    "limiter/policy.py": """

_policy_before = PoolPolicy.pack


def _pack(self):
    return msgpack.packb([*msgpack.unpackb(_policy_before(self)), {"next": "of a policy"}])


PoolPolicy.pack = _pack
""",
}


@pytest.fixture(scope="module")
def next_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of a next version of the product."""
    source = tmp_path_factory.mktemp("next")
    assert tidegate.__file__ is not None
    product = source / "tidegate"
    shutil.copytree(
        Path(tidegate.__file__).parent, product, ignore=shutil.ignore_patterns("__pycache__")
    )
    for name, more in MORE.items():
        path = product / name
        path.write_text(path.read_text(encoding="utf-8") + more, encoding="utf-8")
    return source


class Rollout:
    """Processes of both versions in one pool."""

    def __init__(self, url: str, pool: str, truth: Truth, fleet: Fleet, source: Path) -> None:
        self._pool = pool
        self._truth = truth
        self._fleet = fleet
        self._source = source
        self._count = 0
        self._url = url
        self._meta = Keyspace(pool).meta

    async def start(self, *, new: bool) -> str:
        """Start one, and wait until it makes calls."""
        self._count += 1
        name = f"{'new' if new else 'old'}{self._count}"
        orders = Orders(
            self._url,
            self._pool,
            self._truth.port,
            name,
            limit=BOUND,
            lease_ms=LEASE_MS,
            tasks=TASKS,
            tenants=("a", "b"),
            history=True,
        )
        if new:
            self._fleet.start(orders, source=self._source)
        else:
            self._fleet.start(orders)
        await self.served(name)
        return name

    async def served(self, *names: str) -> None:
        """Wait until each of these has been let in ten times more."""
        seen = len(self._truth.log)

        def all_served() -> bool:
            log = self._truth.log[seen:]
            calls = Counter(event.worker for event in log if event.what == "begin")
            return all(calls[name] >= 10 for name in names)

        await wait_until(all_served, 20, f"ten calls each of {', '.join(names)}")

    async def replace(self, name: str, *, new: bool) -> str:
        """As a rolling deployment does: the next one is there before the last one goes."""
        successor = await self.start(new=new)
        process = self._fleet.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 10) == 0
        return successor

    async def record(self) -> dict[str, str]:
        """What the pool's record says."""
        client: Any = redis.asyncio.Redis.from_url(self._url)
        fields = await client.hgetall(self._meta)
        await client.aclose()
        return {name.decode(): value.decode(errors="replace") for name, value in fields.items()}


@pytest.fixture
async def rollout(
    valkey_url: str, pool: str, truth: Truth, next_version: Path
) -> AsyncIterator[Rollout]:
    async with Fleet(forks=True) as fleet:
        yield Rollout(valkey_url, pool, truth, fleet, next_version)
        assert set((await fleet.end()).values()) <= {0}


@pytest.mark.slow
async def test_upgrade_and_rollback_under_load_are_never_over_the_limit(
    rollout: Rollout, truth: Truth
) -> None:
    old = [await rollout.start(new=False) for _ in range(2)]
    assert "next" not in await rollout.record()
    new = [await rollout.start(new=True) for _ in range(2)]
    assert (await rollout.record())["next"] == "of the pool"
    await rollout.served(*old, *new)

    upgraded = [await rollout.replace(name, new=True) for name in old]
    await rollout.served(*new, *upgraded)
    back = [await rollout.replace(name, new=False) for name in (*new, *upgraded)]
    await rollout.served(*back)

    assert truth.peak == BOUND
    assert truth.leases_lost == 0
    refused = [event for event in truth.log if event.what == "leave"]
    assert {event.worker for event in refused} <= {*old, *new, *upgraded}  # as each of them ended


async def test_a_pool_that_the_next_version_made_is_seen_by_this_one(
    rollout: Rollout, truth: Truth, maker: Maker, valkey_url: str
) -> None:
    await rollout.start(new=True)
    limiter = await maker(valkey_url, BOUND, lease_ms=LEASE_MS)
    await rollout.served("new1")
    snapshot = await limiter.snapshot()
    assert snapshot.limits[LIMIT].bound == BOUND
    assert {view.waiting for view in snapshot.tenants} <= set(range(TASKS))
    async with limiter.acquire(LIMIT, deadline_ms=5000):
        permits = await limiter.permits()
    assert len(permits) <= BOUND
    [change] = await limiter.history()
    assert change.policy == PoolPolicy({LIMIT: BOUND}, lease_ms=LEASE_MS)
    assert truth.peak <= BOUND


async def test_a_policy_of_the_next_version_is_no_conflict(
    rollout: Rollout, maker: Maker, valkey_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await rollout.start(new=True)
    before = (await rollout.record())["policy"]
    limiter: Limiter = await maker(valkey_url, BOUND, lease_ms=LEASE_MS)
    async with limiter.acquire(LIMIT, deadline_ms=5000):
        assert not [record for record in caplog.records if "another policy" in record.message]
    assert (await rollout.record())["policy"] == before


async def test_another_policy_of_the_same_revision_is_told(
    maker: Maker, valkey_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await maker(valkey_url, BOUND, lease_ms=LEASE_MS)
    other = await maker(valkey_url, BOUND + 1, lease_ms=LEASE_MS)
    await wait_until(lambda: other.policy.limits == {LIMIT: BOUND}, what="the pool's is in force")
    assert [record for record in caplog.records if "another policy" in record.message]


def test_fields_that_a_next_version_adds_to_a_policy_are_ignored() -> None:
    policy = PoolPolicy({LIMIT: BOUND, "pool:total": 9}, weights={"a": 4})
    blob = msgpack.packb([*msgpack.unpackb(policy.pack()), {"next": 1}, "more"])
    assert PoolPolicy.unpack(blob) == policy
