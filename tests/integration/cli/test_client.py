"""`tidegate submit`, `status` and `requests` against a running gateway, as a person runs them."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.gateway import PNG, Opener
from tests.integration.cli.calling import forwarding, run, under_way
from tests.integration.tenants.asking import key_of
from tests.waiting import wait_until
from tidegate.cli import client
from tidegate.settings import load_client

PRICES = '[upstreams.gemini.prices]\n"*" = { input = 1.0, output = 1.0, image = 0.5 }\n'


async def test_a_request_is_handed_in_answered_shown_and_listed(
    open_gateway: Opener, tmp_path: Path
) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    gateway = await open_gateway(tidegate_policy=tmp_path / "prices.toml")
    handed_in = await run(gateway, "submit", "Explain the tide", "--idempotency-key", "once")
    request_id = handed_in.said.strip()
    assert handed_in.code == 0
    assert f"tidegate status {request_id} --follow" in handed_in.complained
    again = await run(
        *(gateway, "submit", "Explain the tide", "--idempotency-key", "once", "--json")
    )
    assert again.json["request_id"] == request_id

    ended = await run(gateway, "status", request_id, "--follow")
    assert ended.code == 0
    assert "Explain the tide" in ended.said
    assert "succeeded" in ended.complained
    shown = await run(gateway, "status", request_id, "--json")
    assert (await run(gateway, "status", request_id[-8:], "--json")).json == shown.json
    assert shown.json["cost_micros"] == shown.json["usage"]["total_tokens"]

    options = ("--priority", "5", "--deadline", "1m", "--subject", "ann", "--model", "m")
    waited = await run(gateway, "submit", "Explain the moon", *options, "--wait", "--json")
    assert (waited.code, waited.json["status"], waited.json["priority"]) == (0, "succeeded", 5)
    assert (waited.json["model"], waited.complained) == ("m", "")

    listed = await run(gateway, "requests", "--limit", "1", "--since", "1h", "--json")
    assert [one["request_id"] for one in listed.json["items"]] == [waited.json["request_id"]]
    rest = await run(
        gateway, "requests", "--cursor", listed.json["next_cursor"], "--status", "succeeded"
    )
    assert request_id in rest.said
    assert waited.json["request_id"] not in rest.said
    assert (await run(gateway, "requests", "--model", "nobody")).said == ""


async def test_files_go_along_and_pictures_come_back(open_gateway: Opener, tmp_path: Path) -> None:
    gateway = await open_gateway()
    (tmp_path / "cat.png").write_bytes(PNG)
    asked = await run(
        *(gateway, "submit", "What is this?", "--file", str(tmp_path / "cat.png")),
        *("--wait", "--json"),
    )
    assert asked.json["type"] == "multi_modal"
    assert [one["mime_type"] for one in asked.json["files"]] == ["image/png"]
    folder = tmp_path / "pictures"
    drawn = await run(
        *(gateway, "submit", "Draw a picture of a cat", "--follow", "--output", str(folder)),
        TIDEGATE_URL=f"{gateway.url}/llm",
    )
    assert drawn.code == 0, drawn.complained
    (picture,) = folder.iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in drawn.complained
    within_a_file = str(tmp_path / "cat.png" / "pictures")
    lost = await run(gateway, "status", picture.stem, "--output", within_a_file)
    assert (lost.code, lost.said) == (2, "")
    assert f"tidegate: --output={within_a_file}" in lost.complained
    assert "cannot be written: Not a directory" in lost.complained
    asked = await run(gateway, "submit", "What is this?", "--file", str(folder))
    assert (asked.code, "Traceback" in asked.complained) == (2, False)


async def test_who_leaves_leaves_the_request_to_its_end(
    open_gateway: Opener, tmp_path: Path
) -> None:
    gateway = await open_gateway()
    limiter = gateway.services.limiter
    await limiter.penalise("kind:text_only", for_ms=600_000, reason="secret words", by="ann")
    with under_way(gateway.url, tmp_path, "submit", "Explain the tide", "--follow") as command:
        await wait_until(lambda: "queued" in command.complained(), 20, "its first state")
        (item,) = (await gateway.get("/requests"))[1]["items"]
        request_id = item["request_id"]

        async def is_held_up() -> bool:
            why = (await gateway.get(f"/requests/{request_id}/why"))[1]
            return bool(why.get("limit") == "kind:text_only")

        await wait_until(is_held_up, 20, "the limit that it waits for")
        waits = await run(gateway, "status", request_id)
        assert waits.code == 0
        assert "it waits for kind:text_only, which is paused for " in waits.complained
        assert "secret" not in waits.complained, "its owner is not told why somebody paused it"
        command.process.send_signal(signal.SIGINT)
        assert await command.ended() == 130
        assert f"tidegate status {request_id} --follow finds it again" in command.complained()
    await limiter.resume("kind:text_only", by="ann")
    assert (await gateway.end_of(request_id))["status"] == "succeeded"


async def test_a_lost_connection_is_taken_up_where_it_was(
    open_gateway: Opener, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False)
    request_id = await gateway.submit(data="Explain the tide")
    async with forwarding(gateway) as (url, cut):
        with under_way(url, tmp_path, "status", request_id, "--follow", "--json") as command:
            await wait_until(lambda: command.said().count("\n") == 1, 20, "its first state")
            cut()
            gateway.start_worker()
            assert await command.ended() == 0
        states = [json.loads(line)["status"] for line in command.said().splitlines()]
    assert states[0] == "queued"
    assert states[-1] == "succeeded"
    assert len(set(states)) == len(states), "nothing is told twice"


async def test_a_connection_that_had_nothing_to_tell_for_long_is_taken_up_too(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    request_id = await gateway.submit(data="Explain the tide")
    now, states = [0.0], list[str]()
    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(client.Progress, "state", lambda _, view: states.append(view["status"]))
    async with forwarding(gateway) as (url, cut):
        monkeypatch.setenv("TIDEGATE_URL", url)
        async with client.GatewayClient(load_client()) as far:
            progress = client.Progress(silent=True)
            work = client.follow(far, request_id, progress, as_json=False)
            following = asyncio.create_task(work)
            await wait_until(lambda: states == ["queued"], 20, "its first state")
            now[0] += 2 * client.DOWN_S
            cut()
            gateway.start_worker()
            assert (await following)["status"] == "succeeded"


async def test_exit_codes_say_what_kind_of_failure_it_is(
    open_gateway: Opener, tmp_path: Path
) -> None:
    gateway = await open_gateway(auth="on")
    headers = await key_of(gateway, "acme")
    key = headers["Authorization"].removeprefix("Bearer ")
    (tmp_path / "key").write_text(f"{key}\n")
    nobody = "019abf3e-7c1e-7b52-9f0e-0e1f5a3c2d4b"
    with_key = {"TIDEGATE_API_KEY_FILE": str(tmp_path / "key")}
    await gateway.upstream.set_fault("blocked_prompt", match="forbidden")
    emulator = gateway.config.gemini_base_url
    cases = [
        (("submit", "Hello"), {}, 3, "set TIDEGATE_API_KEY"),
        (("submit", "Hello"), {"TIDEGATE_API_KEY": "tg_aaaaaaaa_wrong"}, 3, "key"),
        (
            ("status",),
            {"TIDEGATE_API_KEY": "tg_aaaaaaaa_wrong"},
            3,
            "not an API key of this gateway;",
        ),
        (("requests",), {}, 3, "set TIDEGATE_API_KEY to one that `tidegate keys create` makes\n"),
        (("batch", "list"), with_key, 3, "; `tidegate keys create` makes another\n"),
        (("status",), with_key, 0, "shows the rest"),
        (("submit", "Hello", "--idempotency-key", "a\nb"), with_key, 2, "printable ASCII"),
        (("status", nobody), with_key, 1, "no request"),
        (("submit", "Hello", "--model", "a b"), with_key, 2, "allowed: "),
        (("submit", "--wait"), with_key, 2, "prompt is missing"),
        (("submit", "a forbidden word", "--type", "text_only", "--wait"), with_key, 1, "blocked"),
        (("submit", "Hello"), {"TIDEGATE_URL": "http://127.0.0.1:1"}, 4, "Connection refused"),
        (("submit", "Hello"), {"TIDEGATE_URL": emulator}, 4, "is not a Tidegate gateway"),
        (("submit", "Hello"), {"TIDEGATE_URL": f"https{gateway.url[4:]}"}, 4, "TLS: [SSL"),
        (("submit", "Hello"), {"TIDEGATE_URL": "nowhere"}, 2, "http:// or https:// URL"),
        (("submit", "Hello", "--wait"), with_key, 0, ""),
        (("requests", "--since", "soon"), with_key, 2, "such as 2h"),
    ]
    for arguments, settings, code, said in cases:
        done = await run(gateway, *arguments, **settings)
        assert (done.code, said in done.complained) == (code, True), (arguments, done)
        assert key not in done.complained


async def test_the_state_of_the_deployment_in_a_sentence_with_its_causes(
    open_gateway: Opener, tmp_path: Path
) -> None:
    """As docs/dashboard.md shows it."""
    gateway = await open_gateway(worker=False)
    key = {"TIDEGATE_API_KEY": gateway.operator_key}
    well = await run(gateway, "status", **key)
    assert (well.code, well.said.strip()) == (0, "● Healthy: nothing waits.")
    files, aside = gateway.services.config.data_dir / "blobs", tmp_path / "aside"
    files.rename(aside)

    async def complains() -> bool:  # a probe may be a quarter of a second old
        found = await run(gateway, "status", **key)
        return (found.code, "The blob store does not answer: " in found.complained) == (1, True)

    async def is_well() -> bool:
        return (await run(gateway, "status", **key)).code == 0

    await wait_until(complains, 10, "the blob store is missed")
    aside.rename(files)
    await wait_until(is_well, 10, "the blob store is back")
    await gateway.services.limiter.penalise("kind:text_only", for_ms=600_000, by="ann: quota")

    async def paused() -> bool:
        verdict = (await run(gateway, "status", "--json", **key)).json
        return bool(verdict["causes"])

    await wait_until(paused, 10, "the verdict knows the pause")
    degraded = await run(gateway, "status", **key)
    assert degraded.code == 1
    assert "▲ Degraded: 1 problem, nothing waits." in degraded.said
    assert "kind:text_only is paused for" in degraded.said
    assert "-> tidegate limits resume kind:text_only --pool gemini" in degraded.said
    unknown = await run(gateway, "status", TIDEGATE_API_KEY="tg_nobody")
    assert (unknown.code, unknown.said) == (3, "")
    key = {"TIDEGATE_API_KEY": (await key_of(gateway, "acme"))["Authorization"][7:]}
    stranger = await run(gateway, "status", **key)
    assert (stranger.code, "postgresql  ok" in stranger.said) == (0, True)
    assert "causes" not in stranger.said
    assert "The operator's key" in stranger.complained
