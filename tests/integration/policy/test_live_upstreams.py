"""Upstreams added, changed, drained and removed under load, over several processes.

The emulators are the ground truth: what they were called for, and when.
"""

from __future__ import annotations

import asyncio
import shlex
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
from openai import AsyncOpenAI
from pydantic import SecretStr
from typer.testing import CliRunner

from tests.gateway import Gateway, Opener, open_gateway
from tests.integration.native.clouds import PROJECT, Clouds, run_clouds
from tests.integration.security.hostile import one_try
from tests.integration.store.lossy import lossy
from tests.markdown import blocks
from tests.waiting import promised_s, wait_until, work_for
from tidegate.app import run_worker
from tidegate.cli import app
from tidegate.emulator.client import EmulatorControl
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.errors import UpstreamDrained
from tidegate.spine.routing import Target
from tidegate.store.provider.upstreams import Seen, UpstreamProcess

__all__ = ["one_try", "open_gateway"]

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
            ['second.aliases: not set -> {"q": "x"}', "second.weight: not set -> 50"],
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


async def test_the_commands_of_upstreams_md_do_what_it_says(
    open_gateway: Opener, second: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    monkeypatch.setenv("GPU_KEY", KEY)
    (block,) = [one for one in blocks("docs/upstreams.md") if "upstreams add" in one.text]
    said, env = "", {"TIDEGATE_URL": gateway.url, "ADMIN_TOKEN": gateway.operator_key}
    for line in block.text.splitlines():
        words = shlex.split(line.replace("http://gpu-2:8000", second.url))
        invoke = partial(CliRunner().invoke, app, words[1:], env=env, catch_exceptions=False)
        done = await asyncio.to_thread(invoke)
        assert done.exit_code == 0, (line, done.output)
        said += done.output
    assert "revision 1 is in force in 1 process after" in said
    assert "gpu-2.weight: not set -> 3" in said
    assert "gpu-2 is drained" in said
    assert "it is the larger one" in said
    assert "nothing is changed yet; revision 6 is in force" in said
    assert KEY not in said


async def test_a_drain_that_waits_does_not_drain_again_what_another_operator_resumed(
    open_gateway: Opener, second: Emulator, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    monkeypatch.setenv("SECOND_KEY", KEY)
    new = {"base_url": f"{second.url}/v1", "models": [ONLY], "key": "SECOND_KEY"}
    assert (await admin(gateway, "PUT", "/second", table=new))[0] == 200
    await second.control.set_behaviour(first_byte_ms=60_000)
    call = asyncio.create_task(chat(gateway, ONLY))

    async def state() -> str:
        _, listed = await admin(gateway, "GET")
        return str({one["name"]: one["state"] for one in listed["upstreams"]}["second"])

    async def is_called() -> bool:
        return bool(await second.control.calls())

    await wait_until(is_called, 20, "its call")
    env = {"TIDEGATE_URL": gateway.url, "ADMIN_TOKEN": gateway.operator_key}
    words = ["upstreams", "drain", "second", "--wait", "--for", "10s"]
    waiting = asyncio.create_task(
        asyncio.to_thread(lambda: CliRunner().invoke(app, words, env=env))
    )
    await wait_until(lambda: _is(state, "draining"), 20, "it is drained")
    assert (await admin(gateway, "POST", "/second/resume"))[0] == 200
    done = await waiting
    assert str(done.exception) == "second was resumed meanwhile: it is not drained"
    assert await state() == "in service"
    call.cancel()
    words[2] = "nope"
    unknown = await asyncio.to_thread(lambda: CliRunner().invoke(app, words, env=env))
    known = "there is no upstream nope; known: gemini, second"
    assert str(unknown.exception) == known, "and not once more as what is allowed"


async def test_what_lives_at_a_drained_upstream_can_be_reached_until_it_is_removed(
    open_gateway: Opener, second: Emulator, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    monkeypatch.setenv("SECOND_KEY", KEY)
    monkeypatch.setenv("WRONG_KEY", "invalid-key")
    new = {"base_url": f"{second.url}/v1", "models": [ONLY], "limits": {"pool:total": 7}}
    status, done = await admin(gateway, "PUT", "/second", table=new | {"key": "LOST_KEY"})
    assert (status, done["field"]) == (400, "LOST_KEY")
    status, done = await admin(gateway, "PUT", "/second", table=new | {"key": "WRONG_KEY"})
    assert (status, done["code"]) == (409, "upstream_unfit")
    assert "refuses the credentials with 401" in done["detail"]
    table = new | {"key": "SECOND_KEY"}
    assert (await admin(gateway, "PUT", "/second", table=table, expected=3))[0] == 409
    several = {"set": {"weight": 3}, "read_again": True}
    status, done = await admin(gateway, "PATCH", "/gemini", **several)
    assert (status, done["field"]) == (400, "read_again")
    assert (await admin(gateway, "PATCH", "/gemini", deployed=True, remove=["weight"]))[0] == 400
    status, done = await admin(gateway, "PUT", "/second", table=table, reason="more room")
    assert (status, done["revision"]) == (200, 1)
    assert gateway.services.limiters["second"].policy.bound("pool:total") == 7

    url = f"{gateway.url}/v1/responses"
    async with gateway.http.post(url, json={"model": ONLY, "input": "Say hello"}) as response:
        made = await response.json()
        assert response.status == 200, made
    assert (await admin(gateway, "POST", "/second/drain"))[1]["in_progress"] == 0
    status, refused = await chat(gateway, ONLY)
    assert (status, refused["error"]["code"]) == (503, "upstream_drained")
    async with gateway.http.get(f"{url}/{made['id']}") as response:
        assert (response.status, (await response.json())["id"]) == (200, made["id"])
    again = {"model": ONLY, "input": "More", "previous_response_id": made["id"]}
    async with gateway.http.post(url, json=again) as response:
        assert response.status == 503, "it is a new call there"

    status, done = await admin(gateway, "DELETE", "/second")
    assert (status, done["code"]) == (409, "upstream_in_use")
    query = "SELECT count(*) > 1 FROM provider_resources"  # with its item, which is noted later
    await wait_until(lambda: gateway.database.fetchval(query))
    status, done = await admin(gateway, "DELETE", "/second")
    assert "1 resources of callers" in done["detail"]
    assert (await admin(gateway, "POST", "/second/resume"))[0] == 200
    assert (await chat(gateway, ONLY))[0] == 200
    status, done = await admin(gateway, "DELETE", "/second?force=true")
    assert "second: no longer added" in done["changes"]
    async with gateway.http.get(f"{url}/{made['id']}") as response:
        assert response.status == 404
        assert "not configured any more" in await response.text()
    assert (await chat(gateway, ONLY))[0] == 404

    status, done = await admin(gateway, "POST", "/rollback", revision=10**30)
    assert (status, done["field"]) == (400, "revision")
    done = (await admin(gateway, "POST", "/rollback", revision=1, reason="too soon"))[1]
    assert "second: added" in done["changes"]
    assert (await chat(gateway, ONLY))[0] == 200
    async with gateway.http.get(f"{gateway.url}/admin/upstreams/history") as response:
        reasons = [one["reason"] for one in await response.json()]
    assert reasons == ["too soon", "", "", "", "more room"]

    assert (await admin(gateway, "DELETE", "/second?force=true"))[0] == 200
    bare = {key: value for key, value in table.items() if key != "limits"}
    assert (await admin(gateway, "PUT", "/second", table=bare))[0] == 200
    usual = gateway.services.limiters["second"].policy.bound("pool:total")
    assert usual == 64, "not that of the one that was removed"


@pytest.mark.parametrize("how", ["another key", "added again"])
async def test_what_runs_at_an_upstream_goes_on_while_it_is_changed(
    open_gateway: Opener,
    second: Emulator,
    policy: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """A stream, and a response in the background that a worker polls."""
    monkeypatch.setenv("SECOND_KEY", KEY)
    monkeypatch.setenv("THIRD_KEY", "key-of-the-third")
    gateway = await open_gateway(tidegate_policy=policy, background_poll_ms=100)
    new = {"base_url": f"{second.url}/v1", "models": [ONLY], "key": "SECOND_KEY"}
    assert (await admin(gateway, "PUT", "/second", table=new))[0] == 200
    await second.control.set_behaviour(first_byte_ms=1_000)
    url, body = f"{gateway.url}/v1/responses", {"model": ONLY, "input": "Say hello"}
    async with gateway.http.post(url, json=body | {"background": True}) as response:
        made = await response.json()

    async def streamed() -> str:
        async with gateway.http.post(url, json=body | {"stream": True}) as response:
            return await response.text()

    streaming = asyncio.create_task(streamed())
    await wait_until(lambda: gateway.services.limiters["second"].permits_held == 1)
    if how == "another key":
        assert (await admin(gateway, "PATCH", "/second", set={"key": "THIRD_KEY"}))[0] == 200
    else:
        assert (await admin(gateway, "DELETE", "/second?force=true"))[0] == 200
        assert (await admin(gateway, "PUT", "/second", table=new))[0] == 200
    assert "response.completed" in await streaming

    async def ended() -> list[str]:
        query = "SELECT status FROM audit WHERE endpoint = '/v1/responses'"
        rows = await gateway.database.fetch(query)
        return [row["status"] for row in rows] if len(rows) == 2 else []

    assert await wait_until(ended, 20, "both records") == ["succeeded", "succeeded"]
    async with gateway.http.get(f"{url}/{made['id']}") as response:
        assert (await response.json())["status"] == "completed"


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("second", {}, "second.models: * (none are stated: every model that no upstream names)"),
        ("openai", {}, "openai.models: gpt-"),
        ("second", {"models": ["a-*"]}, 'second.models: ["a-*"]'),
    ],
)
async def test_an_upstream_that_is_added_says_which_models_it_serves(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch, name: str, more: Any, said: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    gateway = await open_gateway(worker=False)
    new = {"key": "OPENAI_API_KEY", **more}
    new |= {"base_url": "http://127.0.0.1:9/v1"} if name == "second" else {}
    for dry_run in (True, False):
        done = (await admin(gateway, "PUT", f"/{name}", table=new, test=False, dry_run=dry_run))[1]
        (models,) = (line for line in done["changes"] if line.startswith(f"{name}.models"))
        assert models.startswith(said)


async def test_a_call_that_waits_for_a_drained_upstream_goes_elsewhere(
    open_gateway: Opener, second: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    monkeypatch.setenv("SECOND_KEY", KEY)
    new = table(second, models=[ONLY], limits={"pool:total": 1})
    status, done = await admin(gateway, "PUT", "/second", table=new)
    assert status == 200, done
    await second.control.set_behaviour(first_byte_ms=400)
    calls = [asyncio.create_task(chat(gateway, ONLY)) for _ in range(3)]
    limiter = gateway.services.limiters["second"]
    await wait_until(lambda: limiter.waiters == 2 and limiter.permits_held == 1, 20, "waiters")
    assert (await admin(gateway, "POST", "/second/drain"))[0] == 200
    answers = await asyncio.gather(*calls)
    assert [status for status, _ in answers] == [200] * 3, answers
    begun = [one for one in await second.control.calls() if one.model == ONLY]
    assert len(begun) == 1, "only what was in progress"
    assert len(await gateway.calls()) == 2, "the account that takes any model has the others"


async def test_an_upstream_has_the_time_to_connect_that_it_is_given_while_running(
    open_gateway: Opener, one_try: None
) -> None:
    """Calls, its test and realtime sessions; all others have that of the settings."""
    gateway = await open_gateway(worker=False, connect_timeout_ms=60_000)
    leaving = asyncio.Event()

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await leaving.wait()  # no handshake of TLS ever ends here
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    late = "the provider took longer than 150 ms (connect)"
    far = {"dialects": {"openai": f"{url}/v1", "gemini": url}, "auth": "none", "models": [ONLY]}
    try:
        status, done = await admin(gateway, "PUT", "/far", table=far, test=False)
        assert status == 200, done
        said: dict[str, Any] = {"connect_timeout_ms": 150}
        assert (await admin(gateway, "PATCH", "/far", set=said))[0] == 200
        status, body = await chat(gateway, ONLY)
        assert (status, body["error"]["message"]) == (504, late)
        tests: Any = (await admin(gateway, "POST", "/far/test"))[1]
        assert {one["problem"] for one in tests} == {late}
        socket = f"{gateway.url}/v1/realtime?model={ONLY}"
        upgrade = {"upgrade": "websocket", "connection": "Upgrade", "sec-websocket-version": "13"}
        key = {"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}
        async with gateway.http.get(socket, headers={**upgrade, **key}) as answer:
            assert b"no connection to the provider within 150 ms" in await answer.read()
    finally:
        leaving.set()
        server.close()


async def test_a_call_that_waits_with_an_earlier_key_learns_of_a_drain_too(
    open_gateway: Opener, second: Emulator, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False, key_folder=tmp_path)
    (file := tmp_path / "second.key").write_text(KEY)
    new = {**table(second, models=[ONLY]), "key_file": str(file)}
    del new["key"]
    assert (await admin(gateway, "PUT", "/second", table=new))[0] == 200
    limiter = gateway.services.limiters["second"]
    await limiter.penalise("pool:total", for_ms=5_000)
    waiting = asyncio.create_task(chat(gateway, ONLY))
    await wait_until(lambda: limiter.waiters == 1, 20, "a call that waits")
    for number in range(2):
        file.write_text(f"{KEY}-{number}")
        assert (await admin(gateway, "PATCH", "/second", read_again=True))[0] == 200
    assert (await admin(gateway, "POST", "/second/drain"))[0] == 200
    await wait_until(lambda: limiter.waiters == 0, 2, "the call has left")
    assert (await waiting)[0] == 200
    assert not [one for one in await second.control.calls() if one.model == ONLY]


async def test_a_new_upstream_has_its_credentials_while_a_removed_one_ends(
    open_gateway: Opener, second: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.spine.upstreams._CLOSE_AFTER_S", 0.0)
    gateway = await open_gateway(worker=False, key_folder=tmp_path)
    monkeypatch.setenv("SECOND_KEY", KEY)
    assert (await admin(gateway, "PUT", "/second", table=table(second, models=[ONLY])))[0] == 200
    await second.control.set_behaviour(first_byte_ms=60_000)
    lasting = asyncio.create_task(chat(gateway, ONLY))
    limiter = gateway.services.limiters["second"]
    await wait_until(lambda: limiter.permits_held == 1, 20, "a call that goes on")
    removed = Target(gateway.services.spine.targets.upstreams["second"], ONLY)
    assert (await admin(gateway, "DELETE", "/second?force=true"))[0] == 200
    await second.control.set_behaviour(first_byte_ms=0)
    async with run_clouds(second.url) as clouds:
        new = vertex(clouds, clouds.service_account(tmp_path))
        status, done = await admin(gateway, "PUT", "/vertex", table=new, test=False)
        assert status == 200, done
        assert (await ask_claude(gateway))[0] == 200
    lasting.cancel()
    await asyncio.gather(lasting, return_exceptions=True)

    async def is_forgotten() -> bool:
        await gateway.services.upstreams.look()
        try:
            gateway.services.spine.account(removed)
        except UpstreamDrained:
            return True
        return False

    await wait_until(is_forgotten, 20, "what was learned of the removed one is not kept")


async def ask_claude(gateway: Gateway) -> tuple[int, str]:
    body = BODY | {"model": "claude-x", "max_tokens": 50}
    async with gateway.http.post(f"{gateway.url}/v1/messages", json=body) as response:
        return response.status, await response.text()


async def test_a_replaced_file_of_credentials_counts_once_it_is_read_again(
    open_gateway: Opener, second: Emulator, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False, key_folder=tmp_path)

    async with run_clouds(second.url) as clouds:
        new = vertex(clouds, clouds.service_account(tmp_path))
        assert (await admin(gateway, "PUT", "/vertex", table=new, test=False))[0] == 200
        assert (await ask_claude(gateway))[0] == 200
        clouds.service_account(tmp_path)  # another key under the old name
        clouds.issued.clear()  # and the old one is revoked
        status, done = await admin(gateway, "PATCH", "/vertex", read_again=True)
        assert (status, done["changes"]) == (200, ["vertex: secrets read again"]), done
        status, text = await ask_claude(gateway)
        assert status == 200, text


async def test_a_call_that_waits_for_long_keeps_the_credentials_it_began_with(
    open_gateway: Opener, second: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.spine.upstreams._CLOSE_AFTER_S", 0.0)
    gateway = await open_gateway(worker=False, key_folder=tmp_path)

    async with run_clouds(second.url) as clouds:
        new = vertex(clouds, clouds.service_account(tmp_path))
        assert (await admin(gateway, "PUT", "/vertex", table=new, test=False))[0] == 200
        limiter = gateway.services.limiters["vertex"]
        await limiter.penalise(total := next(iter(limiter.policy.limits)), for_ms=5_000)
        waiting = asyncio.create_task(ask_claude(gateway))
        await wait_until(lambda: limiter.waiters == 1, 20, "a call that waits")
        clouds.service_account(tmp_path)
        assert (await admin(gateway, "PATCH", "/vertex", read_again=True))[0] == 200
        upstreams = gateway.services.upstreams
        await upstreams.look()
        assert not upstreams._left, "nothing is kept of the upstream that was replaced"
        await limiter.resume(total)
        status, text = await waiting
        assert status == 200, text


def vertex(clouds: Clouds, account: Path) -> dict[str, Any]:
    return {
        "provider": "vertex",
        "base_url": clouds.url,
        "project": PROJECT,
        "credentials_file": str(account),
        "models": ["claude-*"],
    }


async def test_calls_of_a_removed_upstream_go_on_where_it_can_not_be_added_again(
    open_gateway: Opener, second: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    monkeypatch.setenv("SECOND_KEY", KEY)
    new = table(second, models=[ONLY])
    assert (await admin(gateway, "PUT", "/second", table=new))[0] == 200
    await second.control.set_behaviour(first_byte_ms=60_000)
    lasting = asyncio.create_task(chat(gateway, ONLY))
    limiter = gateway.services.limiters["second"]
    await wait_until(lambda: limiter.permits_held == 1, 20, "a call that goes on")
    assert (await admin(gateway, "DELETE", "/second?force=true"))[0] == 200
    lacks = UpstreamProcess("other", "api", 2, 3, proposed_problems={"second": "no SECOND_KEY"})
    record = gateway.services.upstreams.record
    await record.see(lacks)
    status, done = await admin(gateway, "PUT", "/second", table=new, test=False)
    assert (status, done["code"]) == (409, "upstream_unfit"), done
    await record.leave("other")
    assert (await admin(gateway, "PUT", "/second", table=new, test=False))[0] == 200
    assert gateway.services.limiters["second"] is limiter
    assert (limiter.permits_held, lasting.done()) == (1, False), "and is counted"
    lasting.cancel()


async def test_a_process_that_has_just_started_has_what_was_changed_through_it(
    open_gateway: Opener, second: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not on record yet when the change waits for all processes."""
    gateway = await open_gateway(worker=False)
    monkeypatch.setenv("SECOND_KEY", KEY)
    record, asked = gateway.services.upstreams.record, asyncio.Event()
    see, processes = record.see, record.processes

    async def see_late(process: UpstreamProcess) -> Seen:
        await asked.wait()
        return await see(process)

    async def ask() -> list[UpstreamProcess]:
        found = await processes()
        asked.set()
        return found

    monkeypatch.setattr(record, "see", see_late)
    monkeypatch.setattr(record, "processes", ask)
    for one in await processes():
        await record.leave(one.instance_id)
    status, done = await admin(gateway, "PUT", "/second", table=table(second, models=[ONLY]))
    assert (status, done["processes"]) == (200, 1)
    assert "second" in gateway.services.limiters


async def test_an_upload_goes_on_where_it_has_begun(
    open_gateway: Opener, second: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    monkeypatch.setenv("SECOND_KEY", KEY)
    headers = {"x-goog-upload-protocol": "resumable", "x-goog-upload-command": "start"}
    headers |= {"x-goog-upload-header-content-length": "5"}
    begin = f"{gateway.url}/upload/v1beta/files"
    async with gateway.http.post(begin, headers=headers, json={"file": {}}) as response:
        assert response.status == 200
        url = response.headers["x-goog-upload-url"]
    assert (await admin(gateway, "PUT", "/second", table=table(second)))[0] == 200
    assert (await admin(gateway, "POST", "/gemini/drain"))[0] == 200
    headers = {"x-goog-upload-command": "upload, finalize", "x-goog-upload-offset": "0"}
    async with gateway.http.post(url, headers=headers, data=b"hello") as response:
        made = await response.json(content_type=None)
        assert response.status == 200, made
    async with gateway.http.get(f"{gateway.url}/v1beta/{made['file']['name']}") as response:
        assert (response.status, response.headers["x-tidegate-upstream"]) == (200, "gemini")


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


async def with_second(
    open_gateway: Opener, second: Emulator, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> Gateway:
    """A gateway without a worker, to which an upstream was added while it ran."""
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    monkeypatch.setenv("SECOND_KEY", KEY)
    status, done = await admin(gateway, "PUT", "/second", table=table(second, models=[ONLY]))
    assert status == 200, done
    return gateway


async def test_a_worker_that_starts_in_an_outage_works_once_it_knows_what_was_changed(
    open_gateway: Opener, second: Emulator, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of an upstream that was added while running is not failed as one that nobody serves."""
    gateway = await with_second(open_gateway, second, policy, monkeypatch)
    jobs = [await gateway.submit(data="Say hello", type="text_only", model=ONLY) for _ in range(3)]
    assert gateway.config.database_url is not None
    async with lossy(gateway.config.database_url.get_secret_value()) as proxy:
        proxy.is_away = True
        ready = asyncio.Event()
        config = gateway.config.model_copy(update={"database_url": SecretStr(proxy.url)})
        stop = asyncio.Event()
        working = asyncio.create_task(run_worker(config, stop, on_ready=ready.set))
        gateway.workers.append((stop, working))
        await wait_until(ready.is_set, 20, "a worker that started without PostgreSQL")
        proxy.is_away = False
        ended = [await gateway.end_of(one) for one in jobs]
        assert [one["status"] for one in ended] == ["succeeded"] * 3
        await gateway.stop_worker()


async def test_a_worker_without_the_key_leaves_jobs_and_lines_to_others(
    open_gateway: Opener, second: Emulator, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await with_second(open_gateway, second, policy, monkeypatch)
    monkeypatch.delenv("SECOND_KEY")
    await gateway.start_ready_worker()
    job = await gateway.submit(data="Say hello", type="text_only", model=ONLY)
    body = {"model": ONLY, "messages": BODY["messages"]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="of-a-client") as client:
        file = await client.files.create(file=("a", orjson.dumps(line)), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )

        async def are_left() -> bool:
            row = await gateway.database.fetchrow(
                "SELECT (SELECT not_before FROM requests WHERE id = $1::uuid) IS NOT NULL AND"
                " (SELECT not_before FROM batch_lines) IS NOT NULL AS left_both",
                job,
            )
            return bool(row and row["left_both"])

        await wait_until(are_left, 20, "the job and the line are left to others")
        monkeypatch.setenv("SECOND_KEY", KEY)
        gateway.start_worker()
        ended = await gateway.end_of(job)
        assert (ended["status"], ended["attempts"]) == ("succeeded", 1)

        async def is_over() -> bool:
            return bool((await client.batches.retrieve(batch.id)).status == "completed")

        await wait_until(is_over, 20, "the batch")
        counts = (await client.batches.retrieve(batch.id)).request_counts
        assert counts is not None
        assert (counts.completed, counts.failed) == (1, 0)


async def test_a_process_without_the_key_says_so_while_another_one_serves(
    open_gateway: Opener, second: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    having = await open_gateway(worker=False)
    monkeypatch.setenv("SECOND_KEY", KEY)
    new = table(second, models=[ONLY], aliases={"quick": ONLY})
    assert (await admin(having, "PUT", "/second", table=new))[0] == 200
    stored = f"{having.url}/v1/responses"
    async with having.http.post(stored, json={"model": ONLY, "input": "Say hello"}) as response:
        kept = (await response.json())["id"]
    monkeypatch.delenv("SECOND_KEY")
    lacking = await open_gateway(worker=False, gemini_base_url=having.config.gemini_base_url)
    for model in (ONLY, "quick"):
        status, body = await chat(lacking, model)
        assert (status, body["error"]["code"]) == (503, "upstream_missing"), body
        assert f"the model '{model}': second lacks SECOND_KEY" in body["error"]["message"]
    assert (await chat(lacking, "gemini-2.5-flash"))[0] == 200, "what others serve is called"
    form = {"data": "Say hello", "type": "text_only", "model": ONLY}
    async with lacking.http.post(f"{lacking.url}/stream", data=form) as response:
        assert (response.status, (await response.json())["code"]) == (503, "upstream_missing")
    async with lacking.http.get(f"{lacking.url}/v1/responses/{kept}") as response:
        assert response.status == 503, "what lives there is not gone"
        assert "second lacks SECOND_KEY" in await response.text()
    assert (await chat(having, ONLY))[0] == 200
    job = await lacking.submit(data="Say hello", type="text_only", model=ONLY)
    monkeypatch.setenv("SECOND_KEY", KEY)
    await having.start_ready_worker()
    assert (await having.end_of(job))["status"] == "succeeded", "a worker that has the key takes it"
    called = [one.model for one in await having.calls()]
    assert called == [BODY["model"]], "nothing of it went to who takes any model"


async def test_no_secret_of_the_gateways_own_becomes_an_upstreams_key(
    open_gateway: Opener, second: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    mounted = tmp_path / "webhook-secret"
    mounted.write_text("mounted-secret-0001")
    monkeypatch.setenv("WEBHOOK_SECRET_FILE", str(mounted))
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:password-0001@db/x")
    monkeypatch.setenv("OIDC_CLIENT_SECRET", "client-secret-0001")
    monkeypatch.setenv("ALERT_WEBHOOK_URL", "https://chat.example.com/may-post-0001")
    own = table(second)
    headers = {"x-a": "env:DATABASE_URL"}
    files = [gateway.config.data_dir / "operator.key", mounted]
    files[0].write_text(gateway.operator_key)
    tried: tuple[dict[str, Any], ...] = (
        {"key": "DATABASE_URL"},
        *({"key_file": str(one), "key": None} for one in files),
        {"key_file": f"{gateway.config.data_dir}/embedded/../operator.key", "key": None},
        {"key": None, "headers": headers, "auth": "none"},
        {"key": "OIDC_CLIENT_SECRET"},
        {"query": {"a": "env:ALERT_WEBHOOK_URL"}},
    )
    for more in tried:
        asked = {name: one for name, one in (own | more).items() if one is not None}
        status, said = await admin(gateway, "PUT", "/second", table=asked)
        assert (status, said["code"]) == (400, "invalid_request"), (more, said)
        assert "a secret of this gateway's own" in said["detail"]
    async with EmulatorControl(second.url) as control:
        assert await control.calls() == []


async def test_no_other_file_of_the_machine_becomes_an_upstreams_key(
    open_gateway: Opener, second: Emulator
) -> None:
    gateway = await open_gateway(worker=False)
    folder = gateway.config.data_dir / "keys"
    folder.mkdir()
    (folder / "second").write_text(KEY)
    own = table(second, models=[ONLY])
    del own["key"]
    for named in ("/etc/hostname", "/no/such/file", str(folder.parent / "operator.key")):
        status, said = await admin(gateway, "PUT", "/second", table=own | {"key_file": named})
        assert (status, said["code"]) == (400, "invalid_request"), said
    async with EmulatorControl(second.url) as control:
        assert await control.calls() == [], "nothing of it was sent"
    sound = own | {"key_file": str(folder / "second")}
    assert (await admin(gateway, "PUT", "/second", table=sound))[0] == 200
    assert (await chat(gateway, ONLY))[0] == 200


async def test_a_request_is_replayed_at_the_upstream_that_an_operator_names(
    open_gateway: Opener, second: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway()
    monkeypatch.setenv("SECOND_KEY", KEY)

    async def replay(request_id: str, upstream: str, role: str = "") -> tuple[int, dict[str, Any]]:
        url = f"{gateway.url}/admin/requests/{request_id}/replay"
        headers = {"Authorization": f"Bearer {role}"} if role else {}
        body = {"upstream": upstream, "by": "ada", "reason": "to compare"}
        async with gateway.http.post(url, json=body, headers=headers) as response:
            return response.status, orjson.loads(await response.read())

    await gateway.upstream.set_fault("safety", match="salty")
    failed = await gateway.submit(data="Why is the sea salty?", type="text_only", subject="ann")
    assert (await gateway.end_of(failed))["status"] == "failed"
    url = f"{gateway.url}/v1/chat/completions"
    async with gateway.http.post(url, json=BODY | {"stream": True}) as response:
        await response.read()
        native = response.headers["x-tidegate-request-id"]
    path = "/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse"
    contents = {"contents": [{"role": "user", "parts": [{"text": "Say goodbye"}]}]}
    async with gateway.http.post(f"{gateway.url}{path}", json=contents) as response:
        await response.read()
        googles = response.headers["x-tidegate-request-id"]
    streamed = (await gateway.stream(text="Explain the tide")).request_id
    for tables in (
        ("second", table(second)),
        ("llamas", table(second, models=["llama-*"])),
        ("chats", table(second, dialects={"openai": f"{second.url}/v1beta/openai"})),
    ):
        assert (await admin(gateway, "PUT", f"/{tables[0]}", table=tables[1], test=False))[0] == 200
    for request_id, words in (
        *((failed, "salty"), (native, "Say hello"), (googles, "Say goodbye")),
        (streamed, "Explain the tide"),
    ):
        await gateway.audit(request_id)
        for place, asked in ((second.control, "second"), (gateway.upstream, "gemini")):
            before = len(await place.calls(contains=words))
            await gateway.upstream.clear_faults()
            status, taken = await replay(request_id, asked)
            assert status == 202, taken
            ended = await gateway.end_of(taken["request_id"])
            assert ended["status"] == "succeeded", ended
            assert len(await place.calls(contains=words)) == before + 1
            _, found = await gateway.get(f"/admin/requests/{taken['request_id']}")
            seen = found["request"]
            assert (seen["repeats"], seen["bound_upstream"]) == (request_id, asked)
            assert [one["upstream"] for one in (seen, *found["attempts"])] == [asked] * 2
            assert seen["tenant"] == "default"
            assert seen.get("subject") == ("ann" if request_id == failed else None)
    for request_id, asked, told, allowed in (
        (failed, "none", "there is no upstream", "second"),
        (failed, "llamas", "does not serve the model", "second"),
        (native, "llamas", "does not serve the model", "second"),
        (googles, "chats", "does not speak the gemini dialect", "second"),
    ):
        status, problem = await replay(request_id, asked)
        assert (status, problem["field"]) == (400, "upstream"), problem
        assert told in problem["detail"]
        assert allowed in problem["allowed"]
    assert (await admin(gateway, "POST", "/second/drain"))[0] == 200
    status, problem = await replay(failed, "second")
    assert (status, problem["field"]) == (400, "upstream")
    assert "drained" in problem["detail"]
    url = f"{gateway.url}/admin/keys"
    async with gateway.http.post(url, json={"name": "eve", "scopes": ["viewer"]}) as response:
        viewer = (await response.json())["key"]
    assert (await replay(failed, "gemini", viewer))[0] == 403
