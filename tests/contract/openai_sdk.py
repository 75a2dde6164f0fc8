"""The unmodified OpenAI SDK, given to the contract tests of the emulator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from tidegate.emulator.server import Emulator, run_emulator

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

MODEL = "gpt-4o-mini"


def client(emulator: Emulator, prefix: str = "/v1", **options: Any) -> AsyncOpenAI:
    """It repeats nothing by itself, so that a test sees what came."""
    from openai import AsyncOpenAI

    url = f"{emulator.url}{prefix}"
    return AsyncOpenAI(**{"api_key": "any-key", "base_url": url, "max_retries": 0, **options})


def sync_client(emulator: Emulator, **options: Any) -> OpenAI:
    from openai import OpenAI

    url = f"{emulator.url}/v1"
    return OpenAI(**{"api_key": "any-key", "base_url": url, "max_retries": 0, **options})


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


@pytest.fixture
async def sdk(emulator: Emulator) -> AsyncIterator[AsyncOpenAI]:
    async with client(emulator) as opened:
        yield opened


def user(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


async def ask(sdk: AsyncOpenAI, content: Any = "Hello", **options: Any) -> Any:
    return await sdk.chat.completions.create(model=MODEL, messages=user(content), **options)


async def stream(sdk: AsyncOpenAI, content: Any = "Hello", **options: Any) -> list[Any]:
    """All chunks of a streamed answer."""
    return [chunk async for chunk in await ask(sdk, content, stream=True, **options)]


def text_of(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
