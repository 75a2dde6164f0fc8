"""The live feed: looked up once for all viewers, and only while there are any."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import orjson
import pytest

from tests.gateway import Gateway, Opener, small_receive_buffer
from tests.waiting import wait_until
from tidegate.call import Scope
from tidegate.dashboard import feed as feeds
from tidegate.dashboard.feed import RANGES, Feed, Range
from tidegate.embedded.servers import ValkeyServer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "LIVE_EVERY_S", 0.05)
    monkeypatch.setattr(feeds, "PAST_EVERY_S", 0.05)


class Page:
    """What one viewer is told."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self, event: str, count: int = 1) -> dict[str, Any]:
        """The `count`-th event of that name from now on."""
        async with asyncio.timeout(10):
            while True:
                name = (await self.response.content.readline()).decode().strip()
                data = (await self.response.content.readline()).decode()
                await self.response.content.readline()
                assert name.startswith("event: "), (name, data)
                if name == f"event: {event}":
                    count -= 1
                if not count:
                    found: dict[str, Any] = orjson.loads(data.removeprefix("data: "))
                    return found

    async def end(self) -> None:
        """Read to the end; it is whole."""
        async with asyncio.timeout(10):
            while await self.response.content.readline():
                continue


@asynccontextmanager
async def watching(gateway: Gateway, query: str = "", **headers: str) -> AsyncIterator[Page]:
    url = f"{gateway.url}/dashboard/feed{query}"
    async with gateway.http.get(url, headers=headers) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        yield Page(response)


def feed_of(gateway: Gateway) -> Feed:
    return feeds.feed_of(gateway.app)


async def test_the_numbers_move_and_one_task_feeds_all(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 2})
    assert repr(feed_of(gateway)) == "<Feed viewers=0 sampling=False>"
    looks = 0
    snapshot = gateway.services.limiter.snapshot

    async def counted() -> Any:
        nonlocal looks
        looks += 1
        return await snapshot()

    monkeypatch.setattr(gateway.services.limiter, "snapshot", counted)
    await gateway.upstream.set_behaviour(first_byte_ms=400)
    async with watching(gateway) as first, watching(gateway, "?span=1h") as second:
        assert (await first.next("trend"))["range"] == "5m"
        assert (await second.next("trend"))["step_s"] == 60
        for number in range(5):
            await gateway.submit(data=f"Explain tide {number}")
        found: dict[str, Any] = {}
        limit: dict[str, Any] = {}
        while not (found.get("waiting", 0) and limit["used"] == 2):
            (found,) = (await first.next("live"))["pools"]
            (limit,) = [one for one in found["limits"] if one["limit"] == "kind:text_only"]
        assert limit["bound"] == 2
        assert found["tenants"][0]["held_up_by"] == "kind:text_only"
        assert {one["process"].split("-")[0] for one in found["processes"]} == {"api", "worker"}
        looked = looks
        for _ in range(5):
            await first.next("live")
            await second.next("live")
        assert looks - looked <= 12
        assert repr(feed_of(gateway)) == "<Feed viewers=2 sampling=True>"
    await wait_until(lambda: "viewers=0 sampling=False" in repr(feed_of(gateway)))


async def test_a_call_that_has_ended_is_in_the_trend_and_in_the_record(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.dashboard.rollup.FLUSH_EVERY_S", 0.05)
    monkeypatch.setattr("tidegate.dashboard.feed.RECORD_EVERY_S", 0.0)
    monkeypatch.setitem(RANGES, "5m", Range(10, 30, 0.0))
    ahead = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + 15)
    monkeypatch.setattr("tidegate.dashboard.feed.time", ahead)  # the span under way is over
    gateway = await open_gateway()
    async with watching(gateway) as page:
        await gateway.end_of(await gateway.submit(data="Explain tides"))
        assert (await gateway.stream(text="Explain ebbs")).status == 200
        totals: dict[str, Any] = {}
        while totals.get("succeeded", 0) < 2:
            trend = await page.next("trend")
            totals = trend["totals"]
        assert trend["total_lengths"][0] > 0
        assert [one["name"] for one in trend["upstreams"]] == ["gemini"]
        assert (await page.next("now"))["gemini"]["per_second"] > 0
        total: dict[str, Any] = {"requests": 0}
        while total["requests"] < 2:
            total = (await page.next("record"))["spent"]["day"]["total"]
        assert total["output_tokens"] == totals["output_tokens"] > 0


async def test_spend_is_that_of_the_upstream_that_was_chosen(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of jobs too, which are all in the queue of one pool; a viewer who chooses is told at the
    next look, not when the record is due for all."""
    monkeypatch.setenv("SPARE_KEY", "sk-spare")
    gateway = await open_gateway()
    table: dict[str, Any] = {"provider": "vllm", "base_url": f"{gateway.upstream.url}/v1"}
    body = {"table": table | {"models": ["spare-*"], "key": "SPARE_KEY"}, "test": False}
    async with gateway.http.put(f"{gateway.url}/admin/upstreams/spare", json=body) as answer:
        assert answer.status == 200, await answer.text()
    for model in ("gemini-2.5-flash", "spare-1", "spare-1"):
        job = await gateway.submit(data="Explain tides", type="text_only", model=model)
        assert (await gateway.end_of(job))["status"] == "succeeded"
    spent = {"gemini": ["gemini-2.5-flash"], "spare": ["spare-1"]}
    spent[""] = spent["gemini"] + spent["spare"]
    requests = {"": 3, "gemini": 1, "spare": 2}
    async with watching(gateway) as whole:
        for pool, models in spent.items():
            async with watching(gateway, f"?pool={pool}") as page:
                record = await page.next("record")
                assert record["pool"] == pool
                for span in ("day", "month"):
                    found = record["spent"][span]
                    assert found["total"]["requests"] == requests[pool]
                    assert {one["name"] for one in found["models"]} == set(models)
                    assert [one["requests"] for one in found["tenants"]] == [requests[pool]]
        assert (await whole.next("record"))["pool"] == ""
        for pool in spent:
            path = f"/admin/usage?by=model{pool and f'&upstream={pool}'}"
            assert (await gateway.get(path))[1]["total"]["requests"] == requests[pool]


async def test_a_span_that_is_chosen_again_is_read_again(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RANGES, "5m", Range(10, 30, 0.0))
    gateway = await open_gateway(worker=False)
    feed = feed_of(gateway)
    async with watching(gateway) as other:
        async with watching(gateway, "?span=1h") as page:
            await page.next("trend")
        await wait_until(lambda: "viewers=1" in repr(feed))
        await other.next("now", 3)  # nobody looks at the hour meanwhile
        feed._newest.clear()
        async with watching(gateway, "?span=1h") as page:
            assert (await page.next("trend"))["at"][-1] > time.time() - 200


async def test_a_viewer_that_does_not_read_misses_frames_and_is_cut(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, stalled_reader_ms=300)
    connector = aiohttp.TCPConnector(socket_factory=small_receive_buffer)
    async with (
        aiohttp.ClientSession(
            connector=connector, read_bufsize=1, headers=gateway.http.headers
        ) as slow,
        slow.get(f"{gateway.url}/dashboard/feed") as response,
        watching(gateway) as page,
    ):
        assert response.status == 200
        feed = feed_of(gateway)
        await wait_until(lambda: "viewers=2" in repr(feed))
        for _ in range(400):
            feed._send("live", {"padding": "x" * 20_000, "pools": []})
            await page.next("live")
            if "viewers=1" in repr(feed):
                break
        await wait_until(lambda: "viewers=1" in repr(feed), 20, "the slow one is cut")
        await page.next("live")


async def test_more_viewers_than_allowed_are_refused_and_all_end_at_the_drain(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "MOST_VIEWERS", 1)
    gateway = await open_gateway(worker=False)
    async with watching(gateway) as page:
        await page.next("live")
        status, body = await gateway.get("/dashboard/feed")
        assert (status, body["code"]) == (503, "too_many_followers")
        status, body = await gateway.get("/dashboard/feed?pool=none")
        assert (status, body["field"], body["allowed"]) == (400, "pool", "one of gemini")
        gateway.services.draining.set()
        await page.end()
        assert (await gateway.get("/dashboard/feed"))[0] == 503


async def test_a_revoked_key_sees_nothing_more(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    tenants = gateway.services.store.tenants
    _, weak = await tenants.create_key("default", scopes=[Scope.INFER, Scope.READ])
    key, made = await tenants.create_key("default", scopes=[Scope.ADMIN])
    assert (await gateway.get("/dashboard/feed"))[0] == 401
    shown = {"x-api-key": weak.text}
    async with gateway.http.get(f"{gateway.url}/dashboard/feed", headers=shown) as refused:
        assert refused.status == 403
    async with watching(gateway, **{"x-api-key": made.text}) as page:
        await page.next("live")
        await tenants.revoke_key(key.prefix, by="test")
        await page.end()


async def test_while_valkey_is_away_the_feed_says_so_and_comes_back(
    open_gateway: Opener, own_valkey: ValkeyServer
) -> None:
    gateway = await open_gateway(worker=False, redis_url=own_valkey.url)
    async with watching(gateway) as page:
        (pool,) = (await page.next("live"))["pools"]
        assert "problem" not in pool
        own_valkey.pause()
        while "problem" not in pool:
            (pool,) = (await page.next("live"))["pools"]
        own_valkey.resume()
        while "problem" in pool:
            (pool,) = (await page.next("live"))["pools"]
        assert len(pool["limits"]) >= 4
