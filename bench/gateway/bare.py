"""The least that a relay on our own server can cost: `bare PORT UPSTREAM-URL own|aiohttp`.

uvicorn with our bounded protocol, set up as `tidegate serve` sets it up, and our own connections to
an upstream, or aiohttp's: reads the body, posts it, hands the answer on as it comes. No limits, no
record, no routes, no retries.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod

import aiohttp
import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send

from tidegate.http.uvicorn_protocol import bounded
from tidegate.upstream.transport import RelayWire, Timeouts

Headers = list[tuple[bytes, bytes]]

_PASSED = (b"authorization", b"content-type", b"accept")
_HOP_BY_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade"}
_TIMEOUTS = Timeouts(connect_ms=5_000, first_byte_ms=60_000, idle_ms=60_000, total_ms=600_000)


class Relay(ABC):
    """An ASGI application."""

    def __init__(self, upstream_url: str) -> None:
        self._upstream_url = upstream_url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await self.open()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self.close()
            await send({"type": "lifespan.shutdown.complete"})
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = [pair for pair in scope["headers"] if pair[0] in _PASSED]
        url = self._upstream_url + scope["path"]
        await self.relay(scope["method"], url, headers, body, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @abstractmethod
    async def open(self) -> None: ...

    @abstractmethod
    async def close(self) -> None: ...

    @abstractmethod
    async def relay(
        self, method: str, url: str, headers: Headers, body: bytes, send: Send
    ) -> None: ...

    @staticmethod
    async def begin(status: int, headers: Headers, send: Send) -> None:
        kept = [pair for pair in headers if pair[0].lower() not in _HOP_BY_HOP]
        await send({"type": "http.response.start", "status": status, "headers": kept})

    @staticmethod
    async def go_on(piece: bytes, send: Send) -> None:
        await send({"type": "http.response.body", "body": piece, "more_body": True})


class ByOurConnections(Relay):
    async def open(self) -> None:
        self._wire = RelayWire(_TIMEOUTS)
        await self._wire.start()

    async def close(self) -> None:
        await self._wire.aclose()

    async def relay(self, method: str, url: str, headers: Headers, body: bytes, send: Send) -> None:
        got = await self._wire.open(method, self._wire.place(url), headers, body)
        await self.begin(got.status, got.headers, send)
        while piece := await got.next():
            await self.go_on(piece, send)
        got.close()


class ByAiohttp(Relay):
    async def open(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    async def close(self) -> None:
        await self._session.close()

    async def relay(self, method: str, url: str, headers: Headers, body: bytes, send: Send) -> None:
        named = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        async with self._session.request(method, url, data=body, headers=named) as got:
            await self.begin(got.status, list(got.raw_headers), send)
            async for piece in got.content.iter_any():
                await self.go_on(piece, send)


_CLIENTS = {"own": ByOurConnections, "aiohttp": ByAiohttp}


def main() -> None:
    port, upstream_url, client = sys.argv[1:]
    settings = uvicorn.Config(
        _CLIENTS[client](upstream_url),
        port=int(port),
        http=bounded(receive_timeout_ms=15_000, stalled_reader_ms=30_000),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=75,
    )
    uvloop.run(uvicorn.Server(settings).serve())


if __name__ == "__main__":
    main()
