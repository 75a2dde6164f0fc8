"""A client that makes one plain call of the emulator at a time: for those who only count them."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import aiohttp
import orjson

_PATH = "/v1beta/models/gemini-2.5-flash:generateContent"
_HEADERS = {"x-goog-api-key": "any", "content-type": "application/json"}
_TOTAL_S = 60


class Caller:
    """`async with Caller(url) as caller: status = await caller.call("a prompt")`."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/") + _PATH
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=_TOTAL_S),
            trust_env=False,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def call(self, prompt: str) -> int | None:
        """The status of the answer, which has been read to its end; None where none came.
        Cancellation closes the connection."""
        body = orjson.dumps({"contents": [{"role": "user", "parts": [{"text": prompt}]}]})
        try:
            async with self._session.post(self._url, data=body, headers=_HEADERS) as answer:
                await answer.read()
                return answer.status
        except (aiohttp.ClientError, TimeoutError):
            return None
