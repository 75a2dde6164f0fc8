"""The least that a relay on our own server and client can cost: `bare PORT UPSTREAM-URL`.

uvicorn with our bounded protocol, set up as `tidegate serve` sets it up, and our connections to
an upstream: reads the body, posts it, hands the answer on as it comes. No limits, no record, no
routes, no retries.
"""

from __future__ import annotations

import sys

import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send

from tidegate.http.protocol import bounded
from tidegate.providers.gemini.timeouts import Timeouts
from tidegate.providers.relay import RelayWire

_HOP_BY_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade"}
_TIMEOUTS = Timeouts(connect_ms=5_000, first_byte_ms=60_000, idle_ms=60_000, total_ms=600_000)


class Relay:
    def __init__(self, upstream_url: str) -> None:
        self._upstream_url = upstream_url
        self._wire: RelayWire

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
        headers = [
            pair
            for pair in scope["headers"]
            if pair[0] in (b"authorization", b"content-type", b"accept")
        ]
        place = self._wire.place(self._upstream_url + scope["path"])
        got = await self._wire.open(scope["method"], place, headers, body)
        kept = [pair for pair in got.headers if pair[0].lower() not in _HOP_BY_HOP]
        await send({"type": "http.response.start", "status": got.status, "headers": kept})
        while piece := await got.next():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        got.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._wire = RelayWire(_TIMEOUTS)
        await self._wire.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._wire.aclose()
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
