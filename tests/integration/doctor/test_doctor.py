"""`tidegate doctor` beside a running gateway, and with all that can be wrong around it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from tests.commands import Done, tidegate
from tests.gateway import Gateway, Opener
from tests.waiting import wait_until
from tidegate.emulator.server import run_emulator
from tidegate.policy.format import edit


async def examined(gateway: Gateway, **settings: str) -> tuple[Done, dict[str, dict[str, Any]]]:
    """With a free port; what was found, by check."""
    settings = {"PORT": "0", "GEMINI_BASE_URL": gateway.config.gemini_base_url} | settings
    done = await tidegate(gateway, "doctor", "--json", **settings)
    return done, {one["check"]: one for one in json.loads(done.said)["checks"]}


async def test_a_sound_deployment_passes_and_nothing_is_changed(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    await wait_until(gateway.services.keeper.settled.is_set, 20, "the policy on record")
    done, found = await examined(gateway)
    bad = {name: one for name, one in found.items() if one["state"] in ("fail", "warn")}
    assert (done.code, set(bad) - {"postgresql.durability", "machine.descriptors"}) == (0, set()), (
        bad
    )
    assert found["provider.gemini"]["found"].endswith("takes the key")
    assert found["pool.gemini.processes"]["found"] == "2 take part"
    plain = await tidegate(gateway, "doctor", "--offline", PORT="0")
    assert plain.code == 0
    assert "valkey.acl" in plain.said
    assert "provider.gemini" not in plain.said
    assert "\x1b[" not in plain.said
    assert gateway.config.redis_url is not None
    assert len(await gateway.services.limiter.permits()) == 0
    assert len(await gateway.services.keeper.history(10)) == 1


async def test_what_is_wrong_around_it_is_found_at_once(
    open_gateway: Opener, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False)
    await wait_until(gateway.services.keeper.settled.is_set, 20, "the policy on record")
    await gateway.services.keeper.change(edit({"kind:text_only": 9}), set_by="ann", reason="more")
    await gateway.services.limiter.penalise("kind:multi_modal", for_ms=60_000, by="bob")
    job = {"data": "Hello", "type": "text_only"}
    async with gateway.http.post(f"{gateway.url}/submit", json=job) as response:
        assert response.status == 202
    secret = tmp_path / "secret"
    secret.write_text("a-token-of-some-length\n")
    secret.chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done, found = await examined(
            gateway,
            PORT=str(taken.getsockname()[1]),
            GEMINI_API_KEY="invalid-key",
            ADMIN_TOKEN_FILE=str(secret),
            AUTH="on",
        )
    assert done.code == 1
    states = {name: found[name]["state"] for name in found}
    assert (states["machine.port"], "pid " in found["machine.port"]["found"]) == ("fail", True)
    assert found["jobs.workers"]["found"] == "no worker runs or answers: 1 job can't begin"
    assert states["provider.gemini"] == "fail"
    assert "refuses the key" in found["provider.gemini"]["found"]
    assert "invalid-key" not in done.said
    assert states["files.secrets"] == "warn"
    assert found["files.secrets"]["fix"] == f"chmod 600 {secret}"
    assert states["access.keys"] == "fail"
    assert states["pool.gemini.policy"] == "ok", "it was set so on purpose"
    assert "kind:text_only: 9 -> 5" in found["pool.gemini.policy"]["found"]
    assert "by ann" in found["pool.gemini.policy"]["found"]
    assert states["pool.gemini.limits"] == "warn"
    assert "kind:multi_modal is paused by bob" in found["pool.gemini.limits"]["found"]


async def test_an_upstream_that_was_added_while_running_is_examined_as_it_is_by_now(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    async with run_emulator() as server:
        await server.control.set_behaviour(gpu={"slots": 4})
        table = {"provider": "llama.cpp", "base_url": server.url, "limits": {"pool:total": 8}}
        url = f"{gateway.url}/admin/upstreams/gpu"
        async with gateway.http.put(url, json={"table": table}) as added:
            assert added.status == 200, await added.text()
        keeper = gateway.services.keepers["gpu"]
        await wait_until(keeper.settled.is_set, 20, "the policy on record")
        _, found = await examined(gateway)
        assert found["server.gpu"]["fix"] == "tidegate limits set --pool gpu pool:total=4"
        await keeper.change(edit({"pool:total": 4}), set_by="ann", reason="its slots")
        await gateway.services.limiters["gpu"].penalise("pool:total", for_ms=60_000, by="bob")
        _, found = await examined(gateway)
    assert found["server.gpu"]["state"] == "ok", found["server.gpu"]
    assert "pool:total is paused by bob" in found["pool.gpu.limits"]["found"]
    assert found["pool.gpu.policy"]["state"] == "ok"


async def test_servers_and_settings_that_are_not_there_are_told(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    done, found = await examined(
        gateway,
        REDIS_URL="redis://127.0.0.1:1",
        DATABASE_URL="postgresql://me:sesame@127.0.0.1:1/x",
        GEMINI_BASE_URL="http://127.0.0.1:1",
        BLOB_URL="s3://no-such-bucket-of-ours",
        AWS_ENDPOINT="http://127.0.0.1:1",
        AWS_ALLOW_HTTP="true",
        AWS_ACCESS_KEY_ID="a",
        AWS_SECRET_ACCESS_KEY="b",
        AWS_REGION="us-east-1",
    )
    failed = {name for name, one in found.items() if one["state"] == "fail"}
    assert (done.code, failed) == (
        1,
        {"valkey.reach", "postgresql.reach", "provider.gemini", "files.bucket"},
    )
    assert "sesame" not in done.said
    done, found = await examined(gateway, RATE_LIMITS="{}x")
    assert (done.code, set(found)) == (1, {"settings.sound"})
