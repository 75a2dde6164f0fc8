"""Upstreams changed over processes of which one is killed by -9, and one has no key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.fleet import Fleet
from tests.waiting import wait_until, work_for
from tidegate.emulator.server import run_emulator

pytestmark = pytest.mark.slow

SETTINGS = {"SECOND_KEY": "key-of-the-second"}
BODY = {"messages": [{"role": "user", "content": "Say hello"}]}


async def test_who_restarts_has_the_latest_and_who_lacks_the_key_is_named(tmp_path: Path) -> None:
    async with (
        run_emulator() as second,
        Fleet(tmp_path / "fleet", apis=2, workers=1, settings=SETTINGS) as fleet,
    ):
        table = {"base_url": f"{second.url}/v1", "key": "SECOND_KEY", "models": ["gemini-*"]}
        first, doomed = fleet.apis
        took: list[float] = []
        failed: list[Any] = []
        load = [asyncio.create_task(_load(fleet, first, failed)) for _ in range(4)]

        async def change(method: str, path: str = "", **body: Any) -> tuple[int, dict[str, Any]]:
            status, done = await _admin(fleet, first, method, path, **body)
            took.append(done.get("in_force_ms", 0.0))
            return status, done

        status, done = await change("PUT", "/second", table=table)
        assert (status, done["processes"], done["unreached"]) == (200, 3, []), done
        fleet.apis[doomed].kill()
        status, done = await change("POST", "/second/drain")
        assert status == 200, done
        begun = len(await second.control.calls())
        restarted = fleet.start_api()
        await fleet.ready(restarted)
        assert (await _states(fleet, restarted))["second"] in ("draining", "drained")
        assert (await _ask(fleet, restarted))[1] == "gemini"
        assert len(await second.control.calls()) == begun

        del fleet.settings["SECOND_KEY"]
        lacking = fleet.start_api()
        await fleet.ready(lacking)
        assert (await _states(fleet, lacking))["second"] == "missing"
        status, done = await change("PUT", "/third", table=table)
        assert status == 409
        assert "SECOND_KEY must be set" in done["detail"]
        assert "third" not in await _states(fleet, first)
        fleet.apis[lacking].kill()

        async def is_added() -> bool:
            return (await change("PUT", "/third", table=table))[0] == 200

        await wait_until(is_added, 30, "the process that is gone is not waited for")
        for name in ("second", "third"):
            await change("POST", f"/{name}/drain")
            status, done = await change("DELETE", f"/{name}")
            assert status == 200, done
        for task in load:
            task.cancel()
        await asyncio.gather(*load, return_exceptions=True)
        assert not failed
        in_force = sorted(one for one in took if one)
        assert in_force[len(in_force) // 2] < 1_000, in_force
        (tmp_path / "in_force_ms").write_text(str(in_force))


async def _admin(
    fleet: Fleet, url: str, method: str, path: str = "", **body: Any
) -> tuple[int, dict[str, Any]]:
    given: dict[str, Any] = {} if method in ("GET", "DELETE") else {"json": body}
    async with fleet.http.request(method, f"{url}/admin/upstreams{path}", **given) as response:
        return response.status, orjson.loads(await response.read())


async def _states(fleet: Fleet, url: str) -> dict[str, str]:
    _, listed = await _admin(fleet, url, "GET")
    return {one["name"]: one["state"] for one in listed["upstreams"]}


async def _ask(fleet: Fleet, url: str) -> tuple[int, str]:
    body = BODY | {"model": "gemini-2.5-flash"}
    async with fleet.http.post(f"{url}/v1/chat/completions", json=body) as response:
        await response.read()
        return response.status, response.headers.get("x-tidegate-upstream", "")


async def _load(fleet: Fleet, url: str, failed: list[Any]) -> None:
    while True:
        if (answer := await _ask(fleet, url))[0] != 200:
            failed.append(answer)
        await work_for(0.1)
