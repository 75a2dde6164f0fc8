"""Clients of the emulator: of its control API, and for single calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Self

import aiohttp
import orjson

from tidegate.emulator.state import Billed, Ending, KindStats, LoggedCall
from tidegate.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts by kind; `in_flight` and `max_in_flight` are over all kinds but `other`.

    `tokens` are the billed tokens, by model and by how the calls ended.
    """

    kinds: Mapping[str, KindStats]
    in_flight: int
    max_in_flight: int
    last_id: int
    tokens: Mapping[str, Mapping[str, Billed]]

    def billed(self, outcome: Ending | None = None, model: str | None = None) -> Billed:
        """Return the sum over all calls with this outcome and model; None matches all."""
        total = Billed()
        for name, by_outcome in self.tokens.items():
            for ending, billed in by_outcome.items():
                if model in (None, name) and outcome in (None, ending):
                    total.add(billed)
        return total

    def __getitem__(self, kind: str) -> KindStats:
        return self.kinds[kind]


class EmulatorControl:
    """Client of the control API. Use it as `async with EmulatorControl(url) as control`, or call
    `close` at the end.

    Every method raises aiohttp.ClientError if the emulator is unavailable.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    async def stats(self) -> Stats:
        """Return the current counters."""
        body = await self._ask("GET", "stats")
        kinds = {kind: KindStats(**counts) for kind, counts in body.pop("kinds").items()}
        tokens = {
            model: {outcome: Billed(**counts) for outcome, counts in by_outcome.items()}
            for model, by_outcome in body.pop("tokens").items()
        }
        return Stats(kinds=kinds, tokens=tokens, **body)

    async def calls(self, since: int = 0, contains: str = "") -> list[LoggedCall]:
        """Return the calls with an id above `since` whose prompt contains `contains`, in order of
        arrival.

        Only the first 200 characters of a prompt are searched. Calls in flight are included, with
        `outcome` None.
        """
        query = {"since": str(since), "contains": contains}
        body = await self._ask("GET", "calls", query=query)
        return [LoggedCall(**call) for call in body["calls"]]

    async def reset(self) -> None:
        """Reset counters, log, windows, files, faults and behaviour to the start."""
        await self._ask("POST", "reset")

    async def set_fault(self, fault: str, **order: Any) -> None:
        """Inject a fault: see `dialect.Fault` for its fields (`count`, `kind`, `match` and more).

        Raises InvalidRequest if it is invalid.
        """
        await self._ask("POST", "faults", body={"faults": [{"fault": fault, **order}]})

    async def clear_faults(self) -> None:
        await self._ask("PUT", "faults", body={"faults": []})

    async def set_behaviour(self, **changes: Any) -> None:
        """Replace fields of `settings.Behaviour`, by JSON or its own types.

        Raises InvalidRequest, having changed nothing, if a value is invalid.
        """
        await self._ask("PUT", "behaviour", body=changes)

    async def account(self) -> dict[str, Any]:
        """Return the account's state: `account.ProviderAccount.to_json`. Raises InvalidRequest
        without an account."""
        book: dict[str, Any] = await self._ask("GET", "account")
        return book

    async def set_account(self, **changes: Any) -> dict[str, Any]:
        """Change fields of `account.AccountSpec` and return the account's state. Usage is kept
        while provider, limits and clock are the same. Raises InvalidRequest."""
        book: dict[str, Any] = await self._ask("PUT", "account", body=changes)
        return book

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _ask(
        self,
        method: str,
        name: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10))
        data = None if body is None else orjson.dumps(body, default=_plain)
        url = f"{self.url}/_emulator/{name}"
        async with self._session.request(method, url, params=query, data=data) as response:
            answer = orjson.loads(await response.read())
            if response.status == 400:
                raise InvalidRequest(name, answer["error"]["message"])
            response.raise_for_status()
            return answer


def _plain(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"not JSON: {value!r}")


_PATH = "/v1beta/models/gemini-2.5-flash:generateContent"
_HEADERS = {"x-goog-api-key": "any", "content-type": "application/json"}
_TOTAL_S = 60


PlainCall = Callable[[str], Awaitable[int | None]]


@asynccontextmanager
async def plain_caller(url: str) -> AsyncIterator[PlainCall]:
    """Open a client of single calls: `async with plain_caller(url) as call: await call(prompt)`.

    A call reads the whole answer and returns its status; None without an answer. Cancellation
    closes its connection.
    """
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=_TOTAL_S),
        trust_env=False,
    ) as session:

        async def call(prompt: str) -> int | None:
            body = orjson.dumps({"contents": [{"role": "user", "parts": [{"text": prompt}]}]})
            try:
                async with session.post(place, data=body, headers=_HEADERS) as answer:
                    await answer.read()
                    return answer.status
            except (aiohttp.ClientError, TimeoutError):
                return None

        place = url.rstrip("/") + _PATH
        yield call
