"""Load: a full backlog of mixed calls by live clients and by jobs, and agents' conversations.

The mix is drawn from one seed: prompts of 200 to 12,000 characters (lognormal, median 2,000),
`max_tokens` of 64 to 4,096 where the dialect has it and in three of four calls where it may be left
out, half of the calls streamed, models in turn. Answers are the emulator's, 120 words or less.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiohttp

MEDIAN_CHARS, SIGMA = 2_000, 0.8
LEAST_CHARS, MOST_CHARS = 200, 12_000
BOUNDS = (64, 256, 1024, 4096)
# Live clients for each model, each with one call at a time, and jobs that wait for each.
CLIENTS, JOBS = 24, 40
ANSWER = " ".join(f"word{number}" for number in range(120))
# Of an agent: its system prompt in characters, turns, and how much each adds to the conversation,
# so that nine tenths of all input come from the prompt cache.
SYSTEM_CHARS, TURNS, GROWTH = 16_000, 25, 0.09
AGENTS = 8
_TOTAL_S = 600.0
_ALPHABET = "etaoin shrdlu cmfwyp vbgkjq xz "


@dataclass(frozen=True, slots=True)
class DrawnCall:
    """A call of the mix: its path at the gateway, and its body."""

    path: str
    body: dict[str, Any]


def _text(random: Random, chars: int) -> str:
    """Words of no sense, so that no two prompts begin alike."""
    letters = "".join(random.choices(_ALPHABET, k=min(chars, 400)))
    return (letters * math.ceil(chars / len(letters)))[:chars]


def mix(dialect: str, models: Sequence[str], seed: int) -> Iterator[DrawnCall]:
    """An endless mix of calls in a dialect."""
    random = Random(seed)
    for model in itertools.cycle(models):
        chars = round(random.lognormvariate(math.log(MEDIAN_CHARS), SIGMA))
        prompt = _text(random, min(max(chars, LEAST_CHARS), MOST_CHARS))
        bound: int | None = random.choice(BOUNDS)
        if dialect != "anthropic" and random.random() < 0.25:
            bound = None
        yield drawn(dialect, model, [prompt], bound, streamed=random.random() < 0.5)


def drawn(
    dialect: str,
    model: str,
    turns: Sequence[str],
    bound: int | None,
    *,
    streamed: bool,
    system: str = "",
) -> DrawnCall:
    """A call of a conversation whose turns are the user's and the model's, one after the other."""
    if dialect == "gemini":
        contents = [
            {"role": "model" if index % 2 else "user", "parts": [{"text": turn}]}
            for index, turn in enumerate(turns)
        ]
        config = {} if bound is None else {"generationConfig": {"maxOutputTokens": bound}}
        action = "streamGenerateContent?alt=sse" if streamed else "generateContent"
        return DrawnCall(f"/v1beta/models/{model}:{action}", {"contents": contents, **config})
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": turn}
        for index, turn in enumerate(turns)
    ]
    body: dict[str, Any] = {"model": model, "messages": messages, "stream": streamed}
    if bound is not None:
        body["max_tokens"] = bound
    if dialect == "anthropic":
        return DrawnCall("/v1/messages", {**body, **({"system": system} if system else {})})
    return DrawnCall("/v1/chat/completions", body)


@dataclass(slots=True)
class MixedLoad:
    """Clients of a gateway that keep its queue full while the block runs.

    clients: for each model. `statuses` counts what they got: statuses, or names of exceptions.
    """

    url: str
    dialect: str
    models: Sequence[str]
    clients: int = CLIENTS
    seed: int = 1
    statuses: Counter[str] = field(default_factory=Counter)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> MixedLoad:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=_TOTAL_S),
        )
        for index, model in enumerate(self.models):
            await self._submit_jobs(model, self.seed * 1000 + index)
            for client in range(self.clients):
                hundred, one = divmod(client, 100)
                seed = self.seed * 10_000 + index * 100 + one + hundred * 1_000_000
                calls = mix(self.dialect, [model], seed)
                self._tasks.append(asyncio.create_task(self._call_on(calls)))
        return self

    async def __aexit__(self, *_: object) -> None:
        await _end(self._tasks, self._session)

    async def _call_on(self, calls: Iterator[DrawnCall]) -> None:
        assert self._session is not None  # set before any task
        for call in calls:
            self.statuses[await send(self._session, self.url, call)] += 1

    async def _submit_jobs(self, model: str, seed: int) -> None:
        assert self._session is not None  # set before
        for call in itertools.islice(mix(self.dialect, [model], seed), JOBS):
            # A job has a whole answer; only the path says it in Gemini's dialect.
            path = call.path.replace("streamGenerateContent?alt=sse", "generateContent")
            whole = {"stream": False} if "stream" in call.body else {}
            job = {"endpoint": path, "body": call.body | whole}
            async with self._session.post(f"{self.url}/submit", json=job) as answer:
                self.statuses[f"job {answer.status}"] += 1


async def send(session: aiohttp.ClientSession, url: str, call: DrawnCall) -> str:
    """Send a call and read its answer to the end; its status, or the name of what failed."""
    headers = {"anthropic-version": "2023-06-01"} if call.path == "/v1/messages" else {}
    try:
        async with session.post(url + call.path, json=call.body, headers=headers) as answer:
            await answer.read()
            return str(answer.status)
    except (aiohttp.ClientError, TimeoutError) as failed:
        return type(failed).__name__


async def _end(tasks: Sequence[asyncio.Task[None]], session: aiohttp.ClientSession | None) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task
    if session is not None:
        await session.close()


@dataclass(slots=True)
class AgentLoad:
    """Agents that each hold conversations, one call at a time, while the block runs."""

    url: str
    model: str
    seed: int = 1
    statuses: Counter[str] = field(default_factory=Counter)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> AgentLoad:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=_TOTAL_S),
        )
        for agent in range(AGENTS):
            self._tasks.append(asyncio.create_task(self._converse(Random(self.seed + agent))))
        return self

    async def __aexit__(self, *_: object) -> None:
        await _end(self._tasks, self._session)

    async def _converse(self, random: Random) -> None:
        """Conversations with one system prompt, which all agents have."""
        assert self._session is not None  # set before any task
        system = _text(Random(self.seed), SYSTEM_CHARS)
        while True:
            turns: list[str] = []
            chars = SYSTEM_CHARS
            for _ in range(TURNS):
                added = _text(random, round(chars * GROWTH))
                chars += len(added) + len(ANSWER)
                turns.append(added)
                call = drawn("anthropic", self.model, turns, 4096, streamed=True, system=system)
                self.statuses[await send(self._session, self.url, call)] += 1
                turns.append(ANSWER)
