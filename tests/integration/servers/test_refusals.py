"""A server that answers but may not be written to is an outage, and the limiter survives it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.integration.limiter.makers import LIMIT, Maker
from tests.integration.servers.daemon import MAKES, Daemon, fresh_port
from tests.waiting import wait_until
from tidegate.errors import LimiterUnavailable

Deed = Callable[[Daemon], object]


def too_few_replicas(server: Daemon) -> None:
    server.say("CONFIG", "SET", "min-replicas-to-write", 1)


def enough_replicas(server: Daemon) -> None:
    server.say("CONFIG", "SET", "min-replicas-to-write", 0)


def demoted(server: Daemon) -> None:
    server.say("REPLICAOF", "127.0.0.1", fresh_port())


def promoted(server: Daemon) -> None:
    server.say("REPLICAOF", "NO", "ONE")


@pytest.fixture(params=MAKES)
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Daemon]:
    with Daemon(tmp_path, make=request.param) as server:
        yield server


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("begin", "end", "said"),
    [
        (too_few_replicas, enough_replicas, "good replicas to write"),
        (demoted, promoted, "read only replica"),
    ],
    ids=["NOREPLICAS", "READONLY"],
)
async def test_a_server_that_refuses_writes_is_an_outage(
    begin: Deed, end: Deed, said: str, server: Daemon, pool: str
) -> None:
    async with AsyncExitStack() as stack:
        limiter = await Maker(pool, stack)(f"redis://127.0.0.1:{server.port}", 1)
        begin(server)
        await wait_until(lambda: limiter.local_state().state == "away", what="an outage")
        assert said in limiter._session.last_error
        await wait_until(limiter._session.lease.all_lapsed, what="the end of the lease")
        with pytest.raises(LimiterUnavailable):
            async with limiter.acquire(LIMIT, deadline_ms=1):
                pass
        end(server)
        async with limiter.acquire(LIMIT, deadline_ms=10_000) as permit:
            assert not permit.lost.is_set()
