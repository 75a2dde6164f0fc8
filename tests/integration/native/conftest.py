"""A gateway for each test, without a worker: native calls need none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from google.genai import Client
from google.genai.types import HttpOptions

from tests.gateway import Gateway, Opener, open_gateway

__all__ = ["open_gateway"]

MODEL = "gemini-2.5-flash"
MakeSdk = Callable[[Gateway], Client]


@pytest.fixture
async def gateway(open_gateway: Opener) -> Gateway:
    return await open_gateway(worker=False)


@pytest.fixture
async def genai() -> AsyncIterator[MakeSdk]:
    """Google's SDK, pointed at a gateway."""
    made: list[Client] = []

    def make(gateway: Gateway) -> Client:
        options = HttpOptions(base_url=gateway.url, api_version="v1beta")
        made.append(Client(api_key="of-a-client", http_options=options))
        return made[-1]

    yield make
    for client in made:
        await client.aio.aclose()
        client.close()


@pytest.fixture
def ask(gateway: Gateway) -> Callable[..., Awaitable[tuple[int, Any]]]:
    """A bare call in Gemini's dialect: status and body."""

    async def ask(text: str, do: str = "generateContent", **headers: str) -> tuple[int, Any]:
        body = {"contents": [{"role": "user", "parts": [{"text": text}]}]}
        url = f"{gateway.url}/v1beta/models/{MODEL}:{do}"
        async with gateway.http.post(url, json=body, headers=headers) as response:
            return response.status, await response.json(content_type=None)

    return ask
