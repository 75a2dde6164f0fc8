"""A receiver of webhooks on a real socket, and the convention's own formula to check them by."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()

Answer = Callable[[], Awaitable[web.StreamResponse]]


@dataclass
class Received:
    """One webhook as it came."""

    headers: dict[str, str]
    body: bytes

    @property
    def webhook_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(self.body)
        return found

    def is_signed(self, tenant: str = "default") -> bool:
        """By the tenant's own key, which is derived from the deployment's."""
        key = hmac.new(KEY, f"tidegate webhooks of {tenant}".encode(), hashlib.sha256).digest()
        sent_at = self.headers["webhook-timestamp"]
        signed = f"{self.webhook_id}.{sent_at}.".encode() + self.body
        digest = hmac.new(key, signed, hashlib.sha256).digest()
        fresh = abs(int(sent_at) - time.time()) < 60
        expected = "v1," + base64.b64encode(digest).decode()
        return fresh and expected in self.headers["webhook-signature"].split(" ")


@dataclass
class Receiver:
    """`answers` are given in turn, then 204 for ever."""

    url: str = ""
    headers: dict[str, str] = field(default_factory=dict)  # of what is no success
    answers: list[int | Answer] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(headers, await request.read()))
        answer = self.answers.pop(0) if self.answers else 204
        if not isinstance(answer, int):
            return await answer()
        moved = {"Location": f"{self.url}/elsewhere"} if 300 <= answer < 400 else {}
        more = self.headers if answer >= 400 else {}
        return web.Response(status=answer, headers=moved | more)


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application(client_max_size=10_000_000)
    app.router.add_post("/{path:.*}", receiver.take)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server = site._server
    assert server is not None
    port = server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    receiver.url = f"http://127.0.0.1:{port}"
    try:
        yield receiver
    finally:
        await runner.cleanup()
