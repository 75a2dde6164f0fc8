"""The least that a relay on our own server and client can cost: `bare PORT UPSTREAM-URL`.

uvicorn with our bounded protocol, set up as `tidegate serve` sets it up, and aiohttp: reads the
body, posts it, hands the answer on as it comes. No limits, no record, no routes, no retries.
"""

from __future__ import annotations

import sys

import aiohttp
import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send

from tidegate.http.protocol import bounded

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}


class Relay:
    def __init__(self, upstream_url: str) -> None:
        self._upstream_url = upstream_url
        self._session: aiohttp.ClientSession

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"authorization", b"content-type", b"accept")
        }
        url = self._upstream_url + scope["path"]
        async with self._session.request(scope["method"], url, data=body, headers=headers) as got:
            kept = [
                (name.encode("latin-1"), value.encode("latin-1"))
                for name, value in got.headers.items()
                if name.lower() not in _HOP_BY_HOP
            ]
            await send({"type": "http.response.start", "status": got.status, "headers": kept})
            async for piece in got.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._session.close()
        await send({"type": "lifespan.shutdown.complete"})


def main() -> None:
    port, upstream_url = sys.argv[1:]
    settings = uvicorn.Config(
        Relay(upstream_url),
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
