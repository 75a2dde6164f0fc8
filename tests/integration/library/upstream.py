"""A small upstream for what the emulator does not serve: redirects, empty answers, OpenAI's API."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from tests.waiting import work_for


@dataclass
class Upstream:
    """`paths` are the requests that arrived, in order. `in_flight` and `peak` count chats."""

    url: str = ""
    paths: list[str] = field(default_factory=list)
    in_flight: int = 0
    peak: int = 0

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(request.path)
        match request.path:
            case "/whole":
                return web.json_response({"usage": {"total_tokens": 7}})
            case "/zipped":
                body = gzip.compress(json.dumps({"usage": {"total_tokens": 7}}).encode())
                headers = {"content-encoding": "gzip", "content-type": "application/json"}
                return web.Response(body=body, headers=headers)
            case "/redirect":
                return web.Response(status=302, headers={"location": "/whole"}, text="over there")
            case "/empty":
                return web.Response(status=204)
            case "/throttled":
                return web.Response(status=429, headers={"retry-after": "30"}, text="slow down")
            case "/v1/chat/completions":
                return await self._chat(request)
        return web.Response(status=404)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            asked = await request.json()
            await work_for(0.005)
            message = {
                "role": "assistant",
                "content": f"You said {asked['messages'][-1]['content']}",
            }
            return web.json_response(
                {
                    "id": "chat-1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": asked["model"],
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7},
                }
            )
        finally:
            self.in_flight -= 1


@asynccontextmanager
async def run_upstream() -> AsyncIterator[Upstream]:
    upstream = Upstream()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", upstream.serve)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        upstream.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield upstream
    finally:
        await runner.cleanup()
