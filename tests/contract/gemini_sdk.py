"""Google's SDK and plain calls against an emulator, for the tests of its Gemini API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tidegate.emulator.server import Emulator, run_emulator

if TYPE_CHECKING:
    from google.genai import Client

MODEL = "gemini-2.5-flash"
PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 92


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


@pytest.fixture
async def sdk(emulator: Emulator) -> AsyncIterator[Client]:
    from google.genai import Client
    from google.genai.types import HttpOptions

    client = Client(api_key="any-key", http_options=HttpOptions(base_url=emulator.url))
    yield client
    await client.aio.aclose()
    client.close()


async def call(emulator: Emulator, path: str, body: Any, key: str = "k") -> tuple[int, Any]:
    headers = {"x-goog-api-key": key} if key else {}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{emulator.url}{path}", json=body) as response,
    ):
        assert response.headers["x-tidegate-emulator"] == "1"
        return response.status, await response.json()
