"""llama.cpp's server behind two API processes: its slots are never asked for more than it has.

The server's own metrics are the truth: how many compute, and how many wait in its silent queue.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

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
ROUNDS = 4
MOST_SPELL_S = 2.0
STREAMS_AND_PLAIN = 60


@asynccontextmanager
async def deployed(
    folder: Path, abandoned: str = "wait", workers: int = 0
) -> AsyncIterator[tuple[Fleet, LlamaServer]]:
    async with llama_server(folder, slots=SLOTS) as server:
        policy = folder / "policy.toml"
        policy.write_text(POLICY.format(url=server.url, abandoned=abandoned, slots=SLOTS))
        settings = {"TIDEGATE_POLICY": str(policy), "STREAM_WAIT_MS": "300000"}
        async with Fleet(folder / "fleet", workers=workers, settings=settings) as fleet:
            yield fleet, server


def body(words: str, tokens: int, *, streamed: bool = False) -> dict[str, Any]:
    messages = [{"role": "user", "content": words}]
    return {"model": MODEL, "messages": messages, "max_tokens": tokens, "stream": streamed}


class Watch:
    """What computes at the server, the most that waited there, and for how long at a time, seen
    every tenth of a second. Asking has the server notice who has left even later."""

    def __init__(self, url: str) -> None:
        self.running = self.most_waiting = 0
        self.longest_s = 0.0
        self._url = url
        self._free = time.monotonic()

    async def watch(self) -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                self.running, waiting = await gauges(session, self._url)
                self.most_waiting = max(self.most_waiting, waiting)
                now = time.monotonic()
                if waiting:
                    self.longest_s = max(self.longest_s, now - self._free)
                else:
                    self._free = now
                await work_for(0.1)


async def first_byte_s(session: aiohttp.ClientSession, url: str, sent: dict[str, Any]) -> float:
    began = time.monotonic()
    async with session.post(url + CHAT, json=sent) as answer:
        assert answer.status == 200
        await answer.content.readany()
        return time.monotonic() - began


async def leave(url: str, sent: dict[str, Any]) -> None:
    """Ask; cancelled, the connection is closed."""
    async with aiohttp.ClientSession() as session, session.post(url + CHAT, json=sent) as answer:
        await answer.read()


async def call_off(url: str, sent: dict[str, Any]) -> None:
    """Submit it as a job; cancelled, the job is called off."""
    async with aiohttp.ClientSession() as session:
        job = {"endpoint": CHAT, "body": sent}
        async with session.post(f"{url}/submit", json=job) as answer:
            assert answer.status == 202
            request_id = (await answer.json())["request_id"]
        try:
            await asyncio.Event().wait()
        finally:
            async with session.delete(f"{url}/requests/{request_id}") as answer:
                assert answer.status in {200, 202}


@pytest.mark.parametrize("kind", ["plain calls", "streams", "jobs"])
async def test_slots_of_who_left_are_given_again_when_they_are_free(
    tmp_path: Path, kind: str
) -> None:
    """Of plain calls and jobs exactly; a stream's slot is free one step of the server after its
    end."""
    streamed, asked = kind == "streams", call_off if kind == "jobs" else leave
    async with (
        deployed(tmp_path, workers=kind == "jobs") as (fleet, server),
        aiohttp.ClientSession() as session,
    ):
        urls, watch, waited_s = list(fleet.apis), Watch(server.url), 0.0
        watching = asyncio.create_task(watch.watch())
        for number in range(ROUNDS):
            streaming = asyncio.create_task(
                first_to_last(session, urls[0], body(f"stream {number}", 200, streamed=True))
            )
            leaving = [
                asyncio.create_task(
                    asked(urls[1], body(f"leaver {number} {one}", 80, streamed=streamed))
                )
                for one in range(SLOTS - 1)
            ]
            await wait_until(lambda: watch.running == SLOTS, 60, "a full server")
            for one in leaving:
                one.cancel()
            firsts = await asyncio.gather(
                *(
                    first_byte_s(session, urls[0], body(f"next {number} {one}", 2))
                    for one in range(SLOTS - 1)
                )
            )
            waited_s = max(waited_s, *firsts)
            await streaming
        watching.cancel()
        sys.stdout.write(
            f"\n  {ROUNDS * (SLOTS - 1)} leavers of {kind} beside a stream: at most "
            f"{watch.most_waiting} others waited at the server, {watch.longest_s:.1f} s at a time; "
            f"their first bytes took {waited_s:.1f} s\n"
        )
        if streamed:
            assert watch.longest_s < MOST_SPELL_S
        else:
            assert watch.most_waiting == 0
        ends = [first_byte_s(session, urls[0], body(f"end {one}", 2)) for one in range(SLOTS)]
        assert len(await asyncio.gather(*ends)) == SLOTS, "every permit can be had"


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
