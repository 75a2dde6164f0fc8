"""A steady load of strict clients: every request must be answered in full, whatever is restarted.

The clients keep their connections and never repeat a request, so that one which an ending process
cut, refused or did not answer is seen. Half of the streams and native calls come over a connection
of their own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import orjson

from tests.waiting import wait_until
from tidegate.emulator.client import EmulatorControl

KINDS = ("submit", "stream", "native", "native_stream")
_MODEL = "gemini-2.5-flash"


@dataclass(slots=True)
class Steady:
    """What the clients have seen so far. `jobs` is each marker's request id."""

    url: str
    http: aiohttp.ClientSession
    done: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    jobs: dict[str, str] = field(default_factory=dict)
    calls: set[str] = field(default_factory=set)
    _stop: bool = False
    _number: int = 0

    async def more(self, count: int, timeout_s: float = 60) -> None:
        """Return when every kind of request was answered `count` times more, or one has failed."""
        wanted = {kind: self.done[kind] + count for kind in KINDS}

        def reached() -> bool:
            enough = all(self.done[kind] >= number for kind, number in wanted.items())
            return enough or bool(self.failed)

        await wait_until(reached, timeout_s, f"{wanted}, have {self.done}")

    async def assert_called_once(self, upstream: EmulatorControl, name: str) -> None:
        """The provider saw each prompt exactly once."""
        seen: Counter[str] = Counter()
        for call in await upstream.calls(contains=f"[{name}"):
            if call.kind != "classifier":
                seen[call.prompt.split("[", 1)[1].split("]", 1)[0]] += 1
        assert seen == Counter({*self.jobs, *self.calls})

    async def _client(self, name: str, one: Callable[[str], Awaitable[str]], kind: str) -> None:
        while not self._stop:
            self._number += 1
            marker = f"{name}{self._number}"
            try:
                wrong = await one(marker)
            except (aiohttp.ClientError, TimeoutError) as cut:
                wrong = repr(cut)
            self.done[kind] += 1
            if wrong:
                self.failed.append(f"{kind} {marker}: {wrong}")

    async def _submit(self, marker: str) -> str:
        body = {"data": f"Explain why the tide turns [{marker}]"}
        async with self.http.post(f"{self.url}/submit", json=body) as answer:
            text = await answer.text()
            if answer.status != 202:
                return f"{answer.status} {text}"
            request_id = self.jobs[marker] = orjson.loads(text)["request_id"]
        status = "queued"
        while status in ("queued", "running"):
            async with self.http.get(f"{self.url}/status/{request_id}?wait=10") as answer:
                if answer.status != 200:
                    return f"{answer.status} {await answer.text()}"
                status = (await answer.json())["status"]
        return "" if status == "succeeded" else status

    async def _stream(self, marker: str, fresh: aiohttp.ClientSession | None = None) -> str:
        self.calls.add(marker)
        body = {"text": f"Explain why the tide turns [{marker}]"}
        async with (fresh or self.http).post(f"{self.url}/stream", json=body) as answer:
            text = await answer.text()
            return "" if "event: done" in text else f"{answer.status} {text}"

    async def _native(self, marker: str, fresh: aiohttp.ClientSession | None = None) -> str:
        return await self._chat(marker, '"finish_reason":"stop"', fresh, stream=False)

    async def _native_stream(self, marker: str, fresh: aiohttp.ClientSession | None = None) -> str:
        return await self._chat(marker, "data: [DONE]", fresh, stream=True)

    async def _chat(
        self, marker: str, ends_with: str, fresh: aiohttp.ClientSession | None, *, stream: bool
    ) -> str:
        self.calls.add(marker)
        messages = [{"role": "user", "content": f"Explain why the tide turns [{marker}]"}]
        body = {"model": _MODEL, "messages": messages, "stream": stream}
        url = f"{self.url}/v1/chat/completions"
        async with (fresh or self.http).post(url, json=body) as answer:
            text = await answer.text()
            return "" if ends_with in text.replace(": ", ":") or ends_with in text else text


@asynccontextmanager
async def steady_load(url: str, name: str) -> AsyncIterator[Steady]:
    """Eight clients at work, whose prompts are marked `[<name>1]` and so on; all of them have
    ended their last request, and the last job, after the block."""
    timeout = aiohttp.ClientTimeout(total=60)
    async with (
        aiohttp.ClientSession(timeout=timeout) as kept,
        aiohttp.ClientSession(
            timeout=timeout, connector=aiohttp.TCPConnector(force_close=True)
        ) as fresh,
    ):
        load = Steady(url, kept)
        kinds = {
            "submit": (load._submit, load._submit),
            "stream": (load._stream, lambda marker: load._stream(marker, fresh)),
            "native": (load._native, lambda marker: load._native(marker, fresh)),
            "native_stream": (
                load._native_stream,
                lambda marker: load._native_stream(marker, fresh),
            ),
        }
        clients = [
            asyncio.create_task(load._client(name, one, kind))
            for kind, pair in kinds.items()
            for one in pair
        ]
        try:
            yield load
            load._stop = True
            await asyncio.gather(*clients)
            assert not load.failed, load.failed[:5]
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
