"""`GET /status/{request_id}` with `Accept: text/event-stream`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import aiohttp
import orjson
import pytest

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until
from tidegate.errors import StoreUnavailable
from tidegate.http import jobs as live
from tidegate.http import services as openings
from tidegate.store.requests import Requests


@dataclass
class Followed:
    """What a client has seen: (id, event, data) each, and comments."""

    status: int
    headers: dict[str, str]
    events: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    comments: int = 0
    retry_ms: int | None = None
    ended: bool = False

    def statuses(self) -> list[str]:
        return [data["status"] for _, event, data in self.events if event == "status"]


async def _read(response: aiohttp.ClientResponse, seen: Followed) -> None:
    rest = b""
    try:
        async for chunk in response.content.iter_any():
            *blocks, rest = (rest + chunk).split(b"\n\n")
            for block in blocks:
                _take(block.decode(), seen)
        seen.ended = True
    except aiohttp.ClientError:
        return


def _take(block: str, seen: Followed) -> None:
    if block.startswith(":"):
        seen.comments += 1
        return
    fields = dict(line.split(": ", 1) for line in block.splitlines())
    if "retry" in fields:
        seen.retry_ms = int(fields["retry"])
        return
    seen.events.append((fields["id"], fields["event"], orjson.loads(fields["data"])))


@asynccontextmanager
async def _following(
    gateway: Gateway, request_id: str, last: str | None = None, prefix: str = ""
) -> AsyncIterator[Followed]:
    headers = {"Accept": "text/event-stream"} | ({} if last is None else {"Last-Event-ID": last})
    url = f"{gateway.url}{prefix}/status/{request_id}"
    async with gateway.http.get(url, headers=headers) as response:
        seen = Followed(response.status, {k.lower(): v for k, v in response.headers.items()})
        reading = asyncio.create_task(_read(response, seen))
        try:
            yield seen
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


async def test_a_job_is_followed_from_the_queue_to_its_end(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_behaviour(first_byte_ms=1_500)  # more than the look at what runs
    request_id = await gateway.submit(data="Explain the tide")
    async with _following(gateway, request_id, prefix="/llm") as seen:
        assert (seen.status, seen.headers["x-tidegate-request-id"]) == (200, request_id)
        assert seen.headers["content-type"].startswith("text/event-stream")
        await wait_until(lambda: seen.statuses() == ["queued"])
        gateway.start_worker()
        await wait_until(lambda: seen.ended)
    assert seen.statuses() == ["queued", "running", "succeeded"]
    assert seen.retry_ms == 1_000
    last_id, event, data = seen.events[-1]
    assert (event, data) == ("done", {"request_id": request_id, "status": "succeeded"})
    status_id, _, shown = seen.events[-2]
    assert shown == await gateway.status(request_id)
    assert last_id == f"{status_id}-done"
    ids = [int(event_id) for event_id, name, _ in seen.events if name == "status"]
    assert ids == sorted(set(ids))
    assert not gateway.services.followers


async def test_who_comes_back_gets_what_he_missed_and_no_more(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    request_id = await gateway.submit(data="Explain the tide")
    async with _following(gateway, request_id) as seen:
        await wait_until(lambda: seen.events)
    first = seen.events[0][0]
    async with _following(gateway, request_id, first) as again:
        await wait_until(lambda: again.retry_ms)
        gateway.start_worker()
        await gateway.end_of(request_id)
        await wait_until(lambda: again.ended)
    assert "queued" not in again.statuses()
    async with _following(gateway, request_id, first) as late:
        await wait_until(lambda: late.ended)
    assert (late.statuses(), late.events[-1][1]) == (["succeeded"], "done")
    async with _following(gateway, request_id, late.events[0][0]) as told:
        await wait_until(lambda: told.ended)
    assert [event for _, event, _ in told.events] == ["done"]
    async with _following(gateway, request_id, late.events[-1][0]) as over:
        assert over.status == 204


async def test_silence_is_filled_with_comments(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "KEEP_ALIVE_S", 0.05)
    gateway = await open_gateway(worker=False)
    async with _following(gateway, await gateway.submit(data="Explain")) as seen:
        await wait_until(lambda: seen.comments >= 2)
    assert len(seen.events) == 1


async def test_it_ends_when_the_client_leaves_and_when_the_process_drains(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    request_id = await gateway.submit(data="Explain the tide")
    async with _following(gateway, request_id) as seen:
        await wait_until(lambda: seen.events)
        assert len(gateway.services.followers) == 1
    await wait_until(lambda: not gateway.services.followers)
    async with _following(gateway, request_id) as seen:
        await wait_until(lambda: seen.events)
        gateway.drain()
        await wait_until(lambda: seen.ended)
    assert [event for _, event, _ in seen.events] == ["status"]


async def test_their_number_is_bounded(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openings, "MOST_FOLLOWERS", 1)
    gateway = await open_gateway(worker=False)
    request_id = await gateway.submit(data="Explain the tide")
    async with _following(gateway, request_id) as first:
        await wait_until(lambda: first.events)
        async with _following(gateway, request_id) as second:
            assert second.status == 503
            assert second.headers["content-type"] == "application/problem+json"
            assert "retry-after" in second.headers
    await wait_until(lambda: not gateway.services.followers)
    async with _following(gateway, request_id) as third:
        assert third.status == 200


async def test_an_outage_of_the_store_is_sat_out(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_change, away = Requests.wait_change, [StoreUnavailable("PostgreSQL is away")]

    async def flaky(self: Requests, *given: Any) -> Any:
        if away:
            raise away.pop()
        return await wait_change(self, *given)

    monkeypatch.setattr(Requests, "wait_change", flaky)
    monkeypatch.setattr(live, "_PAUSE_S", 0.05)
    gateway = await open_gateway(worker=False)
    async with _following(gateway, await gateway.submit(data="Explain")) as seen:
        await wait_until(lambda: not away)
        gateway.start_worker()
        await wait_until(lambda: seen.ended)
    assert seen.statuses()[-1] == "succeeded"


async def test_what_is_unknown_or_makes_no_sense_is_a_problem(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    request_id = await gateway.submit(data="Explain the tide")
    for target, last, expected in ((str(uuid4()), None, 404), (request_id, "x", 400)):
        async with _following(gateway, target, last) as seen:
            assert seen.status == expected
            assert seen.headers["content-type"] == "application/problem+json"
