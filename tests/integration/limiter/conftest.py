"""A pool per test, and the check that nothing of it is left behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import pytest
import redis.asyncio

from chaos.limiter.truth import Truth
from tests.integration.limiter.makers import Maker
from tests.integration.limiter.slices import stray_fields
from tests.waiting import wait_until
from tidegate.limiter import Limiter
from tidegate.limiter.messages import Keyspace
from tidegate.limiter.policy import PoolPolicy

LIVES_ON = {
    *("meta", "layout", "history", "timed", "expected", "spending", "paused"),
    *("past:", "log:", "rate:", "quota:", "charged:", "note:", "claim:", "progress:"),
}


@pytest.fixture
def pool() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
async def maker(pool: str) -> AsyncIterator[Maker]:
    """Makes limiters of the test's pool, and closes them."""
    async with AsyncExitStack() as stack:
        yield Maker(pool, stack)


@pytest.fixture
async def truth() -> AsyncIterator[Truth]:
    truth = Truth()
    await truth.start()
    yield truth
    await truth.stop()


async def policy_of(url: str, pool: str) -> PoolPolicy:
    """The one in force."""
    client: Any = redis.asyncio.Redis.from_url(url)
    try:
        return PoolPolicy.unpack(await client.hget(Keyspace(pool).meta, "policy"))
    finally:
        await client.aclose()


async def stray(url: str, meta: str) -> list[str]:
    """The fields of a pool's record that belong to nothing."""
    client: Any = redis.asyncio.Redis.from_url(url)
    try:
        raw: dict[bytes, bytes] = await client.hgetall(meta)
    finally:
        await client.aclose()
    blob = raw.pop(b"policy", None)
    if blob is None:
        return []
    policy = PoolPolicy.unpack(blob)
    record = {field.decode(): value.decode(errors="replace") for field, value in raw.items()}
    return stray_fields(record, policy.weights, set(policy.limits))


async def leftovers(url: str, pool: str) -> list[str]:
    """Keys of a pool that should not be there when every session has ended."""
    keys = Keyspace(pool)
    client: Any = redis.asyncio.Redis.from_url(url, decode_responses=True)
    found: list[str] = []
    try:
        found += await stray(url, keys.meta)
        names = [name async for name in client.scan_iter(match=f"*{{{pool}}}*", count=1000)]
        for name in names:
            shape = keys.shape_of(name)
            if shape is None:
                found.append(f"{name}: not declared in keys.py")
            elif (kind := await client.type(name)) != shape.type:
                found.append(f"{name}: is a {kind}")
            elif shape.expires and await client.pttl(name) <= 0:
                found.append(f"{name}: has no end")
            elif shape.name not in LIVES_ON:
                found.append(f"{name}: outlives its session")
    finally:
        await client.aclose()
    return found


async def reaped(url: str, pool: str) -> None:
    """Return once no session is left, as a process of the pool sees to."""
    async with Limiter.from_url(url, pool=pool, policy=await policy_of(url, pool)) as limiter:

        async def is_alone() -> bool:
            return len((await limiter.snapshot()).processes) == 1

        await wait_until(is_alone, 20, "the end of the other sessions")


@pytest.fixture(autouse=True)
async def _nothing_leaks(request: pytest.FixtureRequest, pool: str) -> AsyncIterator[None]:
    """Of a pool whose sessions have all ended only the record and the policy may be left."""
    # Asked for first, so that this check runs after the limiters have been closed.
    if "own_valkey" in request.fixturenames:
        url = request.getfixturevalue("own_valkey").url
    else:
        url = request.getfixturevalue("valkey_url")
    yield
    found = await leftovers(url, pool)
    if found and "own_valkey" in request.fixturenames:
        # A close that a server under faults did not answer in time is for another process to end.
        await reaped(url, pool)
        found = await leftovers(url, pool)
    assert found == []
