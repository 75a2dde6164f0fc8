"""An emulator that enforces its limit, limiters of one pool, and the check that nothing is held."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from typing import Any
from uuid import uuid4

import pytest
import redis

from tests.integration.library.http_clients import NAMES, Demanded, Http, connect
from tests.integration.library.makers import LIMIT, MakeLimiter, MakeSync, held, policy, waiting
from tests.integration.library.upstream import Upstream, run_upstream
from tests.integration.limiter.conftest import leftovers
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.emulator.settings import Behaviour, EmulatorSettings
from tidegate.integrations.exchange import Penalised, Usage
from tidegate.limiter import Limiter, SyncLimiter


@pytest.fixture
def pool() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture(autouse=True)
async def _nothing_leaks(valkey_url: str, pool: str) -> AsyncIterator[None]:
    """Of a pool whose sessions have all ended only the record and the policy may be left."""
    yield
    assert await leftovers(valkey_url, pool) == []


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    """Refuses more than 3 text calls at once."""
    behaviour = Behaviour(concurrency={LIMIT.partition(":")[2]: 3})
    async with run_emulator(EmulatorSettings(behaviour=behaviour)) as running:
        yield running


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with run_upstream() as running:
        yield running


@pytest.fixture
async def make_limiter(valkey_url: str, pool: str) -> AsyncIterator[MakeLimiter]:
    """Started limiters of the test's pool. At the end none of them holds or waits for anything."""
    async with AsyncExitStack() as stack:
        made: list[Limiter] = []

        async def make(bound: int = 1, instance_id: str | None = None) -> Limiter:
            limiter = Limiter.from_url(
                valkey_url, pool=pool, policy=policy(bound), instance_id=instance_id
            )
            made.append(await stack.enter_async_context(limiter))
            return limiter

        yield make
        await wait_until(
            lambda: not any(held(limiter) or waiting(limiter) for limiter in made),
            what="nothing is held or waited for",
        )


@pytest.fixture
def make_sync(valkey_url: str, pool: str) -> Iterator[MakeSync]:
    """Started limiters for threads, of the test's pool."""
    with ExitStack() as stack:

        def make(bound: int = 1) -> SyncLimiter:
            limiter = SyncLimiter.from_url(valkey_url, pool=pool, policy=policy(bound))
            return stack.enter_context(limiter)

        yield make


@pytest.fixture(params=NAMES)
async def make_http(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Http]]:
    """Makes clients of each library in turn: `make_http(limiter, demand)`."""
    async with AsyncExitStack() as stack:

        def make(
            limiter: Limiter,
            demand: Demanded,
            usage: Usage | None = None,
            penalise: Penalised = None,
        ) -> Http:
            http = connect(request.param, limiter, demand, usage, penalise)
            stack.push_async_callback(http.aclose)
            return http

        yield make


@pytest.fixture
def command_valkey() -> Callable[..., None]:
    """Say something to a Valkey: `command_valkey(url, "CONFIG", "SET", ...)`."""

    def command(url: str, *words: str) -> None:
        client: Any = redis.Redis.from_url(url)
        client.execute_command(*words)
        client.close()

    return command
