"""The clients of a soak: calls of every kind, each with a mark that leads to it at the provider.

Invariant: every call ends in one of the classes of `End`; an answer that fits none is `wrong`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
import orjson

from tests.fleet import Fleet
from tests.load import PNG

# whole: a complete answer; refused: 429, 503 or 504 of ours with Retry-After or a code; upstream:
# an error that the provider gave; cut: the connection ended early; left: by our own leaving.
End = Literal["whole", "refused", "upstream", "cut", "left", "wrong"]
REFUSALS = {
    *("limiter_unavailable", "store_unavailable", "deadline_exceeded", "queue_full"),
    "limit_used_up",
    *("lease_lost", "shutting_down", "stalled"),
}
MODEL = "gemini-2.5-flash"
_LEAVES_AFTER_S = 0.08


@dataclass(slots=True)
class Call:
    """One call as its client saw it. `status` is None where no head of an answer came."""

    mark: str
    way: str
    url: str
    began_s: float = 0.0
    ended_s: float = 0.0
    end: End = "cut"
    request_id: str = ""
    status: int | None = None
    said: str = ""


@dataclass
class Clients:
    """Makes calls of all ways in fixed shares, over all live APIs."""

    fleet: Fleet
    chance: random.Random
    calls: list[Call] = field(default_factory=list)
    jobs: dict[str, str] = field(default_factory=dict)  # request id by mark, as answered with 202
    _number: int = 0

    async def one(self) -> Call:
        """Make one call and follow it to its answer; never raises what the network does."""
        self._number += 1
        way = self.chance.choices(list(_WAYS), [share for share, _ in _WAYS.values()])[0]
        live = [url for url, child in self.fleet.apis.items() if child.process.poll() is None]
        call = Call(f"s{self._number}", way, self.chance.choice(live), time.monotonic())
        self.calls.append(call)
        try:
            await _WAYS[way][1](self, call)
        except (aiohttp.ClientError, ConnectionError):
            call.end = "cut"
        except TimeoutError:
            call.end, call.said = "wrong", "no end within two minutes"
        call.ended_s = time.monotonic()
        return call

    def ends(self) -> Counter[str]:
        return Counter(call.end for call in self.calls)

    async def _post(self, call: Call, path: str, **what: Any) -> bytes:
        """The whole answer; fills the call but for a whole one's end."""
        async with self.fleet.http.post(call.url + path, **what) as response:
            call.status = response.status
            call.request_id = response.headers.get("x-tidegate-request-id", "")
            body = await response.read()
            if response.status >= 400:
                call.end, call.said = _of_error(response.status, body)
            return body

    async def chat(self, call: Call) -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": f"[{call.mark}] Say"}]}
        answer = await self._post(call, "/v1/chat/completions", json=body)
        if call.status == 200:
            call.end = "whole" if b'"usage"' in answer else "wrong"

    async def chat_stream(self, call: Call) -> None:
        said = [{"role": "user", "content": f"[{call.mark}] Tell"}]
        body = {"model": MODEL, "messages": said, "stream": True}
        answer = await self._post(call, "/v1/chat/completions", json=body)
        if call.status == 200:
            failed = b'"error"' in answer
            call.end = "whole" if answer.endswith(b"data: [DONE]\n\n") else "cut"
            call.end = "upstream" if failed else call.end

    async def gemini_stream(self, call: Call) -> None:
        body = {"contents": [{"parts": [{"text": f"[{call.mark}] Tell"}]}]}
        path = f"/v1beta/models/{MODEL}:streamGenerateContent?alt=sse"
        answer = await self._post(call, path, json=body)
        if call.status == 200:
            failed = b'"error"' in answer
            call.end = "upstream" if failed else "whole" if b"finishReason" in answer else "cut"

    async def leaver(self, call: Call) -> None:
        said = [{"role": "user", "content": f"[{call.mark}] Leave"}]
        body = {"model": MODEL, "messages": said, "stream": True}
        try:
            async with asyncio.timeout(_LEAVES_AFTER_S * self.chance.uniform(0.2, 1.8)):
                await self._post(call, "/v1/chat/completions", json=body)
        except TimeoutError:
            call.end = "left"
        else:
            call.end = "whole" if call.status == 200 else call.end

    async def stream(self, call: Call) -> None:
        form = aiohttp.FormData()
        form.add_field("data", f"[{call.mark}] Describe this picture")
        form.add_field("file", PNG, filename="a.png", content_type="image/png")
        answer = await self._post(call, "/stream", data=form)
        if call.status == 200:
            failed = b"event: error" in answer
            call.end = "upstream" if failed else "whole" if b"event: done" in answer else "cut"

    async def job(self, call: Call) -> None:
        """Handed in; its end is looked for when the soak is over."""
        answer = await self._post(call, "/submit", json={"data": f"[{call.mark}] Explain the tide"})
        if call.status == 202:
            call.end = "whole"
            call.request_id = orjson.loads(answer)["request_id"]
            self.jobs[call.mark] = call.request_id


_WAYS: dict[str, tuple[int, Any]] = {
    "chat": (45, Clients.chat),
    "chat_stream": (12, Clients.chat_stream),
    "gemini_stream": (8, Clients.gemini_stream),
    "leaver": (5, Clients.leaver),
    "stream": (5, Clients.stream),
    "job": (25, Clients.job),
}


def _of_error(status: int, body: bytes) -> tuple[End, str]:
    said = body[:300].decode("utf-8", "replace")
    if status == 500 and "internal error; it has been logged" in said:
        return "wrong", said
    if any(code in said for code in REFUSALS):
        return "refused", said
    return ("upstream" if status in (429, 500, 502, 503, 504) else "wrong"), said
