"""A command's way into a running pool: its limiter and the record of its policy, for a moment.

Invariant: nothing is left behind: the command's session ends, and bundled servers that it had to
start are stopped.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar
from uuid import uuid4

from tidegate.call import DEFAULT_POOL
from tidegate.config import Config
from tidegate.errors import ConfigError
from tidegate.limiter import PoolPolicy
from tidegate.policy import deployed, deployed_upstreams
from tidegate.policy.control import Control
from tidegate.supervisor.ground import prepared

if TYPE_CHECKING:
    from tidegate.store.connection import Connections
    from tidegate.store.tenants import Tenants

T = TypeVar("T")
Work = Callable[[Control], Awaitable[T]]

_ANSWER_WITHIN_MS = 2_000


def in_pool(config: Config, work: Work[T], pool: str = DEFAULT_POOL) -> T:
    """Run `work` with a pool of the deployment that `config` describes.

    Raises ConfigError, LimiterUnavailable where Valkey does not answer, and what `work` raises.
    """
    wanted = policy_of(config, pool)
    with prepared(config, only={"postgres", "valkey"}) as ground:
        whole = ground.config

        async def run() -> T:
            from tidegate.app import open_pool
            from tidegate.store.connection import Connections
            from tidegate.store.policies import Policies
            from tidegate.store.running import Running
            from tidegate.store.tenants import Tenants

            assert whole.database_url is not None
            connections = Connections(whole.database_url.get_secret_value())
            connections.start()
            name = f"cli-{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
            try:
                policies = Policies(connections)
                async with open_pool(whole, policies, name, wanted, pool) as (limiter, keeper):
                    await limiter.ping(_ANSWER_WITHIN_MS)
                    await limiter.joined()
                    tenants = Tenants(connections)
                    return await work(Control(limiter, keeper, Running(connections), tenants))
            finally:
                await connections.aclose()

        return asyncio.run(run())


def policy_of(config: Config, pool: str = DEFAULT_POOL) -> PoolPolicy:
    """What this deployment asks for in a pool. Raises ConfigError, as for one that is unknown."""
    if pool == DEFAULT_POOL:
        return deployed(config)
    others = deployed_upstreams(config).policies
    if pool not in others:
        names = ", ".join((DEFAULT_POOL, *others))
        raise ConfigError("--pool", pool, f"must be one of {names}")
    return others[pool]


def with_tenants(config: Config, work: Callable[[Tenants], Awaitable[T]]) -> T:
    """Run `work` on the record of tenants and keys alone, whatever Valkey does.

    Raises StoreUnavailable, and what `work` raises.
    """

    async def with_them(connections: Connections) -> T:
        from tidegate.store.tenants import Tenants

        return await work(Tenants(connections))

    return with_record(config, with_them)


def with_record(config: Config, work: Callable[[Connections], Awaitable[T]]) -> T:
    """Run `work` on the record alone. Raises StoreUnavailable, and what `work` raises."""
    with prepared(config, only={"postgres"}) as ground:
        url = ground.config.database_url
        assert url is not None

        async def run() -> T:
            from tidegate.store.connection import Connections

            connections = Connections(url.get_secret_value())
            try:
                return await work(connections)
            finally:
                await connections.aclose()

        return asyncio.run(run())
