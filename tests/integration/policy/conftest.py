"""Processes of a deployment, as far as their policy goes: a limiter, the record, a keeper."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from uuid import uuid4

import pytest
from pydantic import SecretStr

from tidegate.limiter import Limiter, PoolPolicy
from tidegate.policy.rollout import PolicyKeeper, open_pool
from tidegate.settings import Config
from tidegate.store.database import Connections
from tidegate.store.tenants import Policies


@dataclass
class Member:
    """One running process."""

    limiter: Limiter
    keeper: PolicyKeeper
    policies: Policies
    keeping: asyncio.Task[None]

    @property
    def limit(self) -> int:
        return self.limiter.policy.bound("kind:text_only")

    async def record(self) -> list[tuple[int, str, int]]:
        """What was in force, the oldest first: revision, origin, limit."""
        rows = await self.policies.history(self.limiter.pool, 100)
        found = [(r.revision, r.origin, r.policy["limits"]["kind:text_only"]) for r in rows]
        return found[::-1]


Start = Callable[..., Awaitable[Member]]


@pytest.fixture
async def start(valkey_url: str, database_url: str) -> AsyncIterator[Start]:
    """`await start(5)`: a process whose deployment asks for 5 of kind:text_only."""
    pool = f"p{uuid4().hex[:12]}"
    async with AsyncExitStack() as stack:

        async def one(
            limit: int,
            *,
            url: str = valkey_url,
            database: str = database_url,
            name: str = "api-1",
            more: Mapping[str, int] | None = None,
            within_s: float = 0.0,
        ) -> Member:
            connections = Connections(database)
            connections.start()
            stack.push_async_callback(connections.aclose)
            policies = Policies(connections)
            wanted = PoolPolicy({"kind:text_only": limit, **(more or {})}, lease_ms=800)
            config = Config(
                redis_url=SecretStr(url),
                database_url=SecretStr(database),
                gemini_api_key=SecretStr("key"),
            )
            opening = open_pool(config, policies, name, wanted, pool, within_s=within_s)
            keeper = await stack.enter_async_context(opening)
            keeping = asyncio.create_task(keeper.run())
            stack.callback(keeping.cancel)
            return Member(keeper.limiter, keeper, policies, keeping)

        yield one
