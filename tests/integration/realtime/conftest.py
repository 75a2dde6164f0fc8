"""A gateway for each test, without a worker, and the SDKs that speak to it by WebSocket."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from google.genai import Client
from google.genai.types import HttpOptions
from google.oauth2.credentials import Credentials
from openai import AsyncOpenAI

from tests.gateway import Gateway, Opener, open_gateway
from tests.integration.servers.certificates import Authority
from tidegate.policy.format import edit

__all__ = ["open_gateway"]


@pytest.fixture
async def gateway(open_gateway: Opener) -> Gateway:
    """With room for two realtime sessions at a time."""
    gateway = await open_gateway(worker=False)
    await gateway.services.keeper.change(edit({"kind:realtime": 2}), set_by="test")
    return gateway


@pytest.fixture
async def openai() -> AsyncIterator[Callable[..., AsyncOpenAI]]:
    """OpenAI's SDK, pointed at a gateway."""
    made: list[AsyncOpenAI] = []

    def make(gateway: Gateway, **options: Any) -> AsyncOpenAI:
        usual = {"base_url": f"{gateway.url}/v1", "api_key": "of-a-client", "max_retries": 0}
        made.append(AsyncOpenAI(**{**usual, **options}))
        return made[-1]

    yield make
    for client in made:
        await client.close()


@asynccontextmanager
async def tls_before(url: str, folder: Path) -> AsyncIterator[tuple[str, ssl.SSLContext]]:
    """What ends TLS before a gateway, since Google's SDK opens no WebSocket without it: its URL,
    and a client's context that trusts it."""
    authority = Authority(folder)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.sign("front"))
    port = int(url.rpartition(":")[2])

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65_536):
            writer.write(piece)
            await writer.drain()
        writer.close()

    async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, before = await asyncio.open_connection("127.0.0.1", port)
        with suppress(ConnectionError):
            await asyncio.gather(pass_on(reader, before), pass_on(behind, writer))

    server = await asyncio.start_server(both, "127.0.0.1", 0, ssl=context)
    trusting = ssl.create_default_context(cafile=str(authority.ca))
    yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", trusting
    server.close()


@pytest.fixture
async def genai(gateway: Gateway, tmp_path: Path) -> AsyncIterator[Callable[..., Client]]:
    """Google's SDK, pointed at the gateway."""
    made: list[Client] = []
    async with tls_before(gateway.url, tmp_path / "tls") as (url, trusting):

        def make(key: str = "of-a-client", *, of_vertex: bool = False) -> Client:
            version = "v1beta1" if of_vertex else "v1beta"
            options = HttpOptions(
                base_url=url, api_version=version, async_client_args={"ssl": trusting}
            )
            who: dict[str, Any] = {"api_key": key}
            if of_vertex:
                given = Credentials(token=key)  # type: ignore[no-untyped-call]
                who = {"vertexai": True, "project": "p", "location": "l", "credentials": given}
            made.append(Client(http_options=options, **who))
            return made[-1]

        yield make
        for client in made:
            await client.aio.aclose()
            client.close()
