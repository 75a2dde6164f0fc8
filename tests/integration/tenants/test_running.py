"""Streams and native calls are seen while they are under way, each by its tenant and by admins."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.commands import tidegate
from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, ask, key_of
from tests.waiting import wait_until
from tidegate.embedded.servers import ValkeyServer
from tidegate.metrics import process as board

MODEL = "gemini-2.5-flash"


async def native(gateway: Gateway, text: str, headers: dict[str, str]) -> int:
    path = f"/v1beta/models/{MODEL}:generateContent"
    body = {"contents": [{"parts": [{"text": text}]}]}
    return (await ask(gateway, "POST", path, headers, body))[0]


async def seen(gateway: Gateway, path: str, headers: dict[str, str]) -> dict[str, Any]:
    status, page = await ask(gateway, "GET", path, headers)
    assert status == 200
    assert page["complete"]
    found: dict[str, Any] = page
    return found


async def test_what_runs_and_what_waits_is_told_to_its_tenant_and_to_admins(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(
        worker=False,
        auth="on",
        admin_token=ADMIN_TOKEN,
        rate_limits={"text_only": 1},
        first_byte_timeout_ms=60_000,
        stream_wait_ms=600_000,
    )
    acme, other = [await key_of(gateway, name) for name in ("acme", "other")]
    await gateway.upstream.set_fault("hang", match="hold it")
    holding = asyncio.create_task(native(gateway, "hold it", acme))
    await gateway.in_flight(1)
    waiting = asyncio.create_task(
        ask(gateway, "POST", "/stream", other, {"text": "Explain the tide", "type": "text_only"})
    )
    await wait_until(lambda: gateway.waiting == 1)

    (mine,) = (await seen(gateway, "/requests/running", acme))["items"]
    assert (mine["source"], mine["status"], mine["type"]) == ("relay", "running", "text_only")
    assert (mine["model"], mine["endpoint"]) == (MODEL, f"/v1beta/models/{MODEL}:generateContent")
    assert mine["submitted_at"] <= mine["admitted_at"]
    assert not {"tenant", "process", "waits_for"} & mine.keys()
    (theirs,) = (await seen(gateway, "/llm/requests/running", other))["items"]
    assert (theirs["source"], theirs["status"]) == ("stream", "queued")
    assert theirs["waits_for"] == "kind:text_only"
    assert "admitted_at" not in theirs
    assert (await ask(gateway, "GET", "/admin/requests/running", acme))[0] == 403
    page = await seen(gateway, "/admin/requests/running", AS_ADMIN)
    assert [one["tenant"] for one in page["items"]] == ["acme", "other"], "the oldest first"
    assert page["items"][0]["upstream"] == "gemini"
    assert {one["process"].split("-")[0] for one in page["items"]} == {"api"}
    assert page["under_way"] == 2

    key = other["Authorization"].removeprefix("Bearer ")
    client = {"TIDEGATE_URL": gateway.url, "TIDEGATE_API_KEY": key}
    told = await tidegate(gateway, "requests", "--running", **client)
    assert theirs["request_id"] in told.said
    assert "queued for kind:text_only" in told.said
    assert mine["request_id"] not in told.said
    refused = await tidegate(gateway, "requests", "--running", "--status", "failed", **client)
    assert (refused.code, "no other filter" in refused.complained) == (2, True)

    holding.cancel()
    assert (await waiting)[0] == 200
    await asyncio.gather(holding, return_exceptions=True)

    async def none() -> bool:
        page = await seen(gateway, "/admin/requests/running", AS_ADMIN)
        return (page["items"], page["under_way"]) == ([], 0)

    await wait_until(none, 20, "all have ended")


async def test_more_than_a_process_tells_is_said_and_without_valkey_its_own_is_told(
    open_gateway: Opener, own_valkey: ValkeyServer, monkeypatch: Any
) -> None:
    monkeypatch.setattr(board, "MOST_CALLS", 1)
    monkeypatch.setattr(board, "FRESH_S", 0.0)
    monkeypatch.setattr(board, "READ_WITHIN_S", 0.3)
    gateway = await open_gateway(
        worker=False, redis_url=own_valkey.url, semaphore_timeout=1.5, first_byte_timeout_ms=60_000
    )
    await gateway.upstream.set_fault("hang", match="hold it")
    holding = [asyncio.create_task(native(gateway, "hold it", {})) for _ in range(2)]
    await gateway.in_flight(2)
    _, page = await ask(gateway, "GET", "/admin/requests/running", {})
    assert (len(page["items"]), page["under_way"], page["complete"]) == (1, 2, False)
    monkeypatch.setattr(board, "MOST_CALLS", 2)
    assert (await seen(gateway, "/requests/running", {}))["items"][1]["status"] == "running"
    own_valkey.pause()
    _, page = await ask(gateway, "GET", "/requests/running", {})
    assert (len(page["items"]), page["complete"]) == (2, False)
    own_valkey.resume()
    for task in holding:
        task.cancel()
    await asyncio.gather(*holding, return_exceptions=True)
