"""Several processes: any of them shows what all have open, and how each finds the upstreams."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.gateway import Opener
from tests.integration.dashboard.test_feed import watching
from tests.integration.observability.test_metrics import chat
from tests.integration.observability.test_shared import ask, ready, running
from tests.waiting import wait_until
from tidegate.dashboard import feed as feeds
from tidegate.embedded.servers import free_port
from tidegate.spine.routing import FAULTS


async def test_any_process_shows_the_calls_and_the_upstreams_of_all(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "LIVE_EVERY_S", 0.1)
    gateway = await open_gateway(worker=False)
    port = free_port()
    other = f"http://127.0.0.1:{port}"
    with running(gateway, tmp_path, "serve", PORT=str(port)):
        await ready(gateway, other)
        await gateway.upstream.set_fault("hang", match="hold it")

        async def asked(text: str, within_ms: int) -> None:
            url, within = f"{other}/v1/chat/completions", {"x-tidegate-deadline-ms": f"{within_ms}"}
            async with gateway.http.post(url, json=chat(text), headers=within) as response:
                await response.read()

        holding = asyncio.create_task(asked("hold it", 30_000))
        page: dict[str, Any] = {}

        async def seen() -> bool:
            nonlocal page
            page = (await gateway.get("/admin/requests/running"))[1]
            return [one["status"] for one in page["items"]] == ["running"]

        await wait_until(seen, 20, "the call of the other process")
        (call,) = page["items"]
        assert call["endpoint"] == "/v1/chat/completions"
        assert call["process"] != gateway.services.board.process
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)

        async with watching(gateway) as page_of:

            async def upstream() -> dict[str, Any]:
                (found,) = (await page_of.next("live"))["upstreams"]
                return dict(found)

            found = await upstream()
            while found["processes"] < 2:
                found = await upstream()
            assert (found["state"], found["out_in"], found["found"]) == ("ok", 0, [])
            await gateway.upstream.set_fault("unavailable")
            await asyncio.gather(*(asked(f"Hi {number}", 2_000) for number in range(FAULTS)))
            while found["out_in"] < 2:  # also in the one that has asked nothing
                found = await upstream()
            assert found["state"] in ("out", "trying")
            assert found["processes"] == 2
            assert call["process"] in {one["process"] for one in found["found"]}
            assert all(one["detail"] for one in found["found"])
            await gateway.upstream.clear_faults()

            async def well() -> bool:
                try:
                    await ask(gateway, other)
                except AssertionError:
                    return False
                return True

            await wait_until(well, 20, "it answers again")
            while found["out_in"]:
                found = await upstream()
