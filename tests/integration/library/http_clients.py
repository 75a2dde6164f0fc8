"""The three HTTP clients behind one face, each with its transport or middleware under a limiter."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import aiohttp
import httpx
import httpx2

from tidegate.integrations import aiohttp as ours_aiohttp
from tidegate.integrations import httpx as ours_httpx
from tidegate.integrations import httpx2 as ours_httpx2
from tidegate.integrations.exchange import Penalised, Usage
from tidegate.limiter import Demand, Limiter


class OpenAnswer(Protocol):
    """An answer whose headers have come."""

    status: int

    async def read(self) -> bytes: ...
    def chunks(self) -> AsyncIterator[bytes]: ...
    async def close(self) -> None: ...


class Http(Protocol):
    async def send(self, method: str, url: str, body: Any = None) -> OpenAnswer: ...
    async def aclose(self) -> None: ...


Demanded = Demand | Callable[[Any], Demand | None]


class _HttpxAnswer:
    def __init__(self, response: Any) -> None:
        self.status = response.status_code
        self._response = response

    async def read(self) -> bytes:
        content: bytes = await self._response.aread()
        return content

    def chunks(self) -> AsyncIterator[bytes]:
        chunks: AsyncIterator[bytes] = self._response.aiter_bytes()
        return chunks

    async def close(self) -> None:
        await self._response.aclose()


class _Httpx:
    def __init__(self, client: Any) -> None:
        self._client = client

    async def send(self, method: str, url: str, body: Any = None) -> OpenAnswer:
        headers = {"x-goog-api-key": "k"}
        request = self._client.build_request(method, url, json=body, headers=headers)
        return _HttpxAnswer(await self._client.send(request, stream=True, follow_redirects=True))

    async def aclose(self) -> None:
        await self._client.aclose()


class _AiohttpAnswer:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self._response = response

    async def read(self) -> bytes:
        return await self._response.read()

    async def chunks(self) -> AsyncIterator[bytes]:
        async with self._response:
            async for chunk in self._response.content.iter_any():
                yield chunk

    async def close(self) -> None:
        self._response.close()


class Aiohttp:
    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def send(self, method: str, url: str, body: Any = None) -> OpenAnswer:
        headers = {"x-goog-api-key": "k"}
        return _AiohttpAnswer(await self._session.request(method, url, json=body, headers=headers))

    async def aclose(self) -> None:
        await self._session.close()


CLIENT_ERRORS = (httpx.TransportError, httpx2.TransportError, aiohttp.ClientError)
NAMES = ("httpx", "httpx2", "aiohttp")


def connect(
    name: str,
    limiter: Limiter,
    demand: Demanded,
    usage: Usage | None = None,
    penalise: Penalised = None,
) -> Http:
    """A client of the library `name` under `limiter`."""
    options: Any = {"usage": usage, "penalise": penalise}
    match name:
        case "httpx":
            one = ours_httpx.AsyncLimitedTransport(limiter, demand, **options)
            return _Httpx(httpx.AsyncClient(transport=one, timeout=20))
        case "httpx2":
            two = ours_httpx2.AsyncLimitedTransport(limiter, demand, **options)
            return _Httpx(httpx2.AsyncClient(transport=two, timeout=20))
    middleware = ours_aiohttp.LimitMiddleware(limiter, demand, **options)
    return Aiohttp(aiohttp.ClientSession(middlewares=(middleware,)))
