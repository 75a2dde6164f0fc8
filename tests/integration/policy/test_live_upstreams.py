"""Upstreams added, changed, drained and removed under load, over several processes.

The emulators are the ground truth: what they were called for, and when.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.gateway import Gateway, Opener, open_gateway
from tests.integration.cli.calling import run
from tests.waiting import promised_s, wait_until, work_for
from tidegate.emulator.server import Emulator, run_emulator

__all__ = ["open_gateway"]

KEY = "key-of-the-second"
BODY = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": "Say hello"}]}


@pytest.fixture
async def second() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


@pytest.fixture
async def gateways(open_gateway: Opener, tmp_path: Path) -> tuple[Gateway, Gateway]:
    """Two API processes and a worker of one deployment."""
    first = await open_gateway()
    return first, await open_gateway(worker=False, gemini_base_url=first.config.gemini_base_url)


async def admin(
    gateway: Gateway, method: str, path: str = "", **body: Any
) -> tuple[int, dict[str, Any]]:
    url = f"{gateway.url}/admin/upstreams{path}"
    given: dict[str, Any] = {} if method in ("GET", "DELETE") else {"json": body}
    async with gateway.http.request(method, url, **given) as response:
        return response.status, orjson.loads(await response.read())


def table(second: Emulator, **more: Any) -> dict[str, Any]:
    return {
        "dialects": {"openai": f"{second.url}/v1beta/openai", "gemini": second.url},
        "key": "SECOND_KEY",
        "models": ["gemini-*"],
        **more,
    }


class Load:
    """Steady calls at all gateways, until it is left; none of which may fail."""

    def __init__(self, gateways: tuple[Gateway, ...], model: str = "gemini-2.5-flash") -> None:
        self._gateways = gateways
        self._model = model
        self._tasks: list[asyncio.Task[None]] = []
        self._stop = False
        self.failed: list[tuple[int, bytes]] = []
        self.by_upstream: Counter[str] = Counter()

    async def __aenter__(self) -> Load:
        self._tasks = [
            asyncio.create_task(self._call(one)) for one in self._gateways for _ in range(3)
        ]
        await self.go_on(6)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)

    async def go_on(self, count: int) -> None:
        """Wait for so many more answers."""
        wanted = self.by_upstream.total() + count
        await wait_until(lambda: self.by_upstream.total() >= wanted, 20, "answers")

    async def _call(self, gateway: Gateway) -> None:
        url, body = f"{gateway.url}/v1/chat/completions", BODY | {"model": self._model}
        while not self._stop:
            async with gateway.http.post(url, json=body) as response:
                raw = await response.read()
                if response.status != 200:
                    self.failed.append((response.status, raw))
                self.by_upstream[response.headers.get("x-tidegate-upstream", "none")] += 1
            await work_for(0.01)


async def test_an_upstream_comes_and_goes_under_load_without_a_failed_call(
    gateways: tuple[Gateway, Gateway], second: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = gateways
    monkeypatch.setenv("SECOND_KEY", KEY)
    took: list[float] = []
    async with Load(gateways) as load:
        status, done = await admin(first, "PUT", "/second", table=table(second), by="ada")
        assert (status, done["unreached"], done["processes"]) == (200, [], 3), done
        assert done["tests"][0]["model_count"] > 0
        took.append(done["in_force_ms"])
        await wait_until(lambda: load.by_upstream["second"] > 5, 20, "calls of the added one")

        status, done = await admin(other, "PATCH", "/second", set={"weight": 50, "aliases.q": "x"})
        assert (status, done["changes"]) == (
            200,
            ["second.aliases: not set live -> {'q': 'x'}", "second.weight: not set live -> 50"],
        )
        took.append(done["in_force_ms"])
        assert first.services.spine.targets.upstreams["second"].weight == 50

        await second.control.set_behaviour(first_byte_ms=150)
        await work_for(0.2)  # calls wait for its answers
        status, done = await admin(first, "POST", "/second/drain", reason="maintenance")
        assert (status, done["unreached"]) == (200, []), done
        took.append(done["in_force_ms"])
        begun = len(await second.control.calls())
        await load.go_on(20)
        assert len(await second.control.calls()) == begun, "none begins after it"

        async def state() -> str:
            _, listed = await admin(first, "GET")
            states: dict[str, str] = {one["name"]: one["state"] for one in listed["upstreams"]}
            return states["second"]

        await wait_until(lambda: _is(state, "drained"), 20, "its calls have ended")
        status, done = await admin(other, "DELETE", "/second")
        assert (status, done["unreached"]) == (200, []), done
        took.append(done["in_force_ms"])
        await load.go_on(20)
    assert load.failed == []
    assert {one["name"] for one in (await admin(other, "GET"))[1]["upstreams"]} == {"gemini"}
    # All of them share one event loop here, with their callers.
    assert min(took) < promised_s(1) * 1000, took
    assert max(took) < promised_s(3) * 1000, took


async def _is(ask: Any, value: str) -> bool:
    return bool(await ask() == value)


ONLY = "only-second"


async def chat(gateway: Gateway, model: str) -> tuple[int, dict[str, Any]]:
    url = f"{gateway.url}/v1/chat/completions"
    async with gateway.http.post(url, json=BODY | {"model": model}) as response:
        return response.status, orjson.loads(await response.read())


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Nothing but the second upstream serves the model `ONLY`."""
    path = tmp_path / "policy.toml"
    path.write_text('[upstreams.gemini]\nmodels = ["gemini-*"]\n')
    return path


async def test_commands_change_upstreams_and_what_lives_there_can_be_reached(
    open_gateway: Opener, second: Emulator, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    monkeypatch.setenv("SECOND_KEY", KEY)

    async def command(*arguments: str, code: int = 0) -> str:
        token = gateway.operator_key
        done = await run(gateway, "upstreams", *arguments, ADMIN_TOKEN=token)
        assert done.code == code, done
        return done.said + done.complained

    where = f"base_url={second.url}/v1"
    asked = ("add", "second", where, "--model", ONLY, "--limit", "pool:total=7")
    said = await command(*asked, "--key", "LOST_KEY", code=2)
    assert "LOST_KEY must be set" in said
    monkeypatch.setenv("WRONG_KEY", "invalid-key")
    said = await command(*asked, "--key", "WRONG_KEY", code=2)
    assert "refuses the credentials with 401" in said
    said = await command(*asked, "--key", "SECOND_KEY", "--reason", "more room")
    assert "revision 1 is in force in 1 processes" in said
    assert KEY not in said
    assert gateway.services.limiters["second"].policy.bound("pool:total") == 7

    url = f"{gateway.url}/v1/responses"
    async with gateway.http.post(url, json={"model": ONLY, "input": "Say hello"}) as response:
        made = await response.json()
        assert response.status == 200, made
    assert "second is drained" in await command("drain", "second", "--wait")
    status, refused = await chat(gateway, ONLY)
    assert (status, refused["error"]["code"]) == (503, "upstream_drained")
    async with gateway.http.get(f"{url}/{made['id']}") as response:
        assert (response.status, (await response.json())["id"]) == (200, made["id"])
    again = {"model": ONLY, "input": "More", "previous_response_id": made["id"]}
    async with gateway.http.post(url, json=again) as response:
        assert response.status == 503, "it is a new call there"

    said = await command("remove", "second", code=2)
    assert "1 resources of callers" in said
    assert (await admin(gateway, "POST", "/second/resume"))[0] == 200
    assert (await chat(gateway, ONLY))[0] == 200
    said = await command("remove", "second", "--force")
    assert "second: no longer added" in said
    async with gateway.http.get(f"{url}/{made['id']}") as response:
        assert response.status == 404
        assert "not configured any more" in await response.text()
    assert (await chat(gateway, ONLY))[0] == 404

    done = await admin(gateway, "POST", "/rollback", revision=1, reason="too soon")
    assert "second: added" in done[1]["changes"]
    assert (await chat(gateway, ONLY))[0] == 200
    async with gateway.http.get(f"{gateway.url}/admin/upstreams/history") as response:
        reasons = [one["reason"] for one in await response.json()]
    assert reasons == ["too soon", "", "", "", "more room"]
    assert "SECOND_KEY" in await command("list")


async def test_jobs_wait_for_a_drained_upstream_and_no_attempt_is_used_up(
    open_gateway: Opener, second: Emulator, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(tidegate_policy=policy)
    monkeypatch.setenv("SECOND_KEY", KEY)
    status, done = await admin(gateway, "PUT", "/second", table=table(second, models=[ONLY]))
    assert status == 200, done
    assert (await admin(gateway, "POST", "/second/drain"))[0] == 200
    asked = {"data": "Say hello", "type": "text_only", "model": ONLY}
    request_id = await gateway.submit(**asked)

    async def is_put_off() -> bool:
        row = await gateway.database.fetchrow(
            "SELECT not_before > now() AS waits FROM requests WHERE id = $1::uuid", request_id
        )
        return bool(row and row["waits"])

    await wait_until(is_put_off, 20, "the job is put off")
    assert (await admin(gateway, "POST", "/second/resume"))[0] == 200
    ended = await gateway.end_of(request_id)
    assert (ended["status"], ended["attempts"]) == ("succeeded", 1)
