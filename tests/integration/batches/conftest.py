"""A gateway for each test, and OpenAI's SDK before it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.gateway import Gateway, open_gateway

__all__ = ["open_gateway"]

MakeSdk = Callable[..., AsyncOpenAI]


@pytest.fixture
async def sdk() -> AsyncIterator[MakeSdk]:
    made: list[AsyncOpenAI] = []

    def make(gateway: Gateway, tenant: str = "default", **options: Any) -> AsyncOpenAI:
        usual = {
            "base_url": f"{gateway.url}/v1",
            "api_key": "of-a-client",
            "max_retries": 0,
            "default_headers": {"x-tidegate-tenant": tenant},
        }
        made.append(AsyncOpenAI(**{**usual, **options}))
        return made[-1]

    yield make
    for client in made:
        await client.close()
