"""llama.cpp's server behind two API processes: its slots are never asked for more than it has.

The server's own metrics are the truth: how many compute, and how many wait in its silent queue.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import aiohttp

from bench.selfhosted.llama import MODEL, LlamaServer, gauges, llama_server
from tests.fleet import Fleet
from tests.waiting import wait_until, work_for

SLOTS = 4
POLICY = """
[upstreams.local]
provider = "llama.cpp"
base_url = "{url}"
models = ["local"]
abandoned = "{abandoned}"
[upstreams.local.limits]
"pool:total" = {slots}
"""
CHAT = "/v1/chat/completions"
LEAVERS = 60
STREAMS_AND_PLAIN = 60


@asynccontextmanager
async def deployed(
    folder: Path, abandoned: str = "wait"
) -> AsyncIterator[tuple[Fleet, LlamaServer]]:
    async with llama_server(folder, slots=SLOTS) as server:
        policy = folder / "policy.toml"
        policy.write_text(POLICY.format(url=server.url, abandoned=abandoned, slots=SLOTS))
        settings = {"TIDEGATE_POLICY": str(policy), "STREAM_WAIT_MS": "300000"}
        async with Fleet(folder / "fleet", workers=0, settings=settings) as fleet:
            yield fleet, server


def body(words: str, tokens: int, *, streamed: bool = False) -> dict[str, Any]:
    messages = [{"role": "user", "content": words}]
    return {"model": MODEL, "messages": messages, "max_tokens": tokens, "stream": streamed}


class Watch:
    """The most that computed and waited at the server, seen every tenth of a second. Asking has the
    server notice who has left even later."""

    def __init__(self, url: str) -> None:
        self.most_running = self.most_waiting = 0
        self._url = url

    async def watch(self) -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                running, waiting = await gauges(session, self._url)
                self.most_running = max(self.most_running, running)
                self.most_waiting = max(self.most_waiting, waiting)
                await work_for(0.1)


async def first_byte_s(session: aiohttp.ClientSession, url: str, sent: dict[str, Any]) -> float:
    began = time.monotonic()
    async with session.post(url + CHAT, json=sent) as answer:
        assert answer.status == 200
        await answer.content.readany()
        return time.monotonic() - began


async def leave(url: str, sent: dict[str, Any], after_s: float) -> None:
    with suppress(TimeoutError):
        async with (
            asyncio.timeout(after_s),
            aiohttp.ClientSession() as session,
            session.post(url + CHAT, json=sent) as answer,
        ):
            await answer.read()


async def test_slots_of_who_left_are_given_again_when_they_are_free(tmp_path: Path) -> None:
    random = Random(1)
    async with deployed(tmp_path) as (fleet, server), aiohttp.ClientSession() as session:
        urls, watch = list(fleet.apis), Watch(server.url)
        watching = asyncio.create_task(watch.watch())
        streaming = asyncio.create_task(
            first_to_last(session, urls[0], body("the stream " * 5, 600, streamed=True))
        )
        leaving = [
            leave(
                urls[number % 2],
                body(f"leaver {number} " * 5, 60, streamed=number % 3 == 0),
                random.uniform(0.1, 8),
            )
            for number in range(LEAVERS)
        ]
        await asyncio.gather(*leaving)
        next_s = await first_byte_s(session, urls[0], body("the next", 5, streamed=True))
        await streaming

        async def idle() -> bool:
            return await gauges(session, server.url) == (0, 0)

        await wait_until(idle, 120, "an idle server")
        watching.cancel()
        sys.stdout.write(
            f"\n  {LEAVERS} leavers beside a stream: at most {watch.most_running} computed and "
            f"{watch.most_waiting} waited at the server; the next one's first byte took "
            f"{next_s:.2f} s\n"
        )
        assert watch.most_waiting == 0
        ends = await asyncio.gather(
            *(first_byte_s(session, urls[0], body(f"end {n}", 2)) for n in range(SLOTS))
        )
        assert len(ends) == SLOTS, "every permit can be had"


async def first_to_last(session: aiohttp.ClientSession, url: str, sent: dict[str, Any]) -> None:
    async with session.post(url + CHAT, json=sent) as answer:
        assert answer.status == 200
        await answer.read()


async def test_a_connection_that_is_closed_behind_each_stream_costs_nothing(
    tmp_path: Path,
) -> None:
    async with deployed(tmp_path) as (fleet, _), aiohttp.ClientSession() as session:
        url = next(iter(fleet.apis))
        for number in range(STREAMS_AND_PLAIN):
            await first_to_last(session, url, body("again", 3, streamed=number % 2 == 0))


async def test_what_a_client_can_provoke_is_not_the_servers_fault(tmp_path: Path) -> None:
    """Answers of 400 and 500, more than the breaker takes."""
    wrong: list[dict[str, Any]] = [
        {"model": MODEL, "messages": [{"role": "user", "content": "word " * 20_000}]},
        {"model": MODEL, "messages": "no list"},
        {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "unknown"}]}]},
        {"model": MODEL, "messages": [{"role": "user", "content": 5}], "max_tokens": 1},
        {"model": MODEL, "messages": [], "response_format": {"type": "json_schema"}},
        {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "tools": [{"type": 3}]},
    ]
    async with deployed(tmp_path) as (fleet, _), aiohttp.ClientSession() as session:
        url, seen = next(iter(fleet.apis)), []
        for sent in wrong * 5:
            async with session.post(url + CHAT, json={"max_tokens": 2} | sent) as answer:
                seen.append((answer.status, (await answer.text())[:160]))
        sys.stdout.write("".join(f"\n  {status} {said}" for status, said in sorted(set(seen))))
        sys.stdout.write("\n")
        assert {status for status, _ in seen} <= {200, 400, 500}
        await first_to_last(session, url, body("it still works", 3))
