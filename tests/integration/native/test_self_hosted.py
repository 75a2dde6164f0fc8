"""A GPU server of one's own behind the gateway: its slots, its words, and clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.emulator.settings import Behaviour, EmulatorSettings
from tidegate.spine.run import MOST_TRIES

FILE = """
[upstreams.local]
provider = "{provider}"
base_url = "{url}"
models = ["local*"]
{more}
[upstreams.local.limits]
"pool:total" = 2
"""
CHAT: Final = "/v1/chat/completions"
# A step is 8 ms: 125 tokens a second of each of the two replies.
SLOTS: Final = {"slots": 2, "step_ms": 6, "slot_ms": 1}
Open = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def server() -> AsyncIterator[Emulator]:
    settings = EmulatorSettings(behaviour=Behaviour().changed({"gpu": SLOTS}))
    async with run_emulator(settings) as running:
        yield running


@pytest.fixture
def opened(open_gateway: Opener, tmp_path: Path, server: Emulator) -> Open:
    async def open_one(
        more: str = "", provider: str = "llama.cpp", *, worker: bool = False
    ) -> Gateway:
        path = tmp_path / "policy.toml"
        path.write_text(FILE.format(url=server.url, more=more, provider=provider))
        return await open_gateway(worker=worker, tidegate_policy=path)

    return open_one


def body(words: str, tokens: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": words}]
    return {"model": "local", "messages": messages, "max_tokens": tokens, **more}


async def ask(gateway: Gateway, words: str, tokens: int, *, streamed: bool = False) -> int:
    sent = body(words, tokens, stream=streamed)
    async with gateway.http.post(gateway.url + CHAT, json=sent) as response:
        await response.read()
        return response.status


def held(gateway: Gateway) -> int:
    """Permits of the server's pool."""
    return sum(gateway.services.limiters["local"].local_state().held.values())


async def computing(server: Emulator, count: int) -> bool:
    return (await server.control.stats()).in_flight == count


async def leave(gateway: Gateway, server: Emulator, sent: dict[str, Any]) -> None:
    """Ask, and leave once the server computes it beside one more."""
    async with aiohttp.ClientSession() as session:
        asking = asyncio.create_task(session.post(gateway.url + CHAT, json=sent))
        await wait_until(lambda: computing(server, 2))
        asking.cancel()


async def row_of(gateway: Gateway, words: str) -> dict[str, Any]:
    """The record of the one call with these words."""

    async def found() -> str | None:
        for row in await gateway.database.fetch("SELECT request_id FROM audit"):
            record = await gateway.audit(str(row["request_id"]))
            if words in str(record["request"]):
                return str(row["request_id"])
        return None

    return await gateway.audit(await wait_until(found, 20, f"a record of {words}"))


async def test_a_slot_is_given_again_once_the_server_is_done_with_who_left(
    opened: Open, server: Emulator
) -> None:
    gateway = await opened()
    stream = body("the stream", 250, stream=True)
    async with gateway.http.post(gateway.url + CHAT, json=stream) as streaming:
        await streaming.content.readany()
        await leave(gateway, server, body("who leaves", 100))
        assert await ask(gateway, "the next", 5) == 200
        async for _ in streaming.content:
            pass
    by_prompt = {call.prompt: call for call in await server.control.calls()}
    left, after = by_prompt["who leaves"], by_prompt["the next"]
    assert left.outcome == "finished", "the server has not noticed, as the stream went on"
    assert left.ended_ns is not None
    assert after.started_ns >= left.ended_ns
    assert (await server.control.stats()).max_in_flight == 2
    row = await row_of(gateway, "who leaves")
    assert (row["status"], row["failure"]["code"]) == ("cancelled", "client_left")
    assert "its upstream's work was over" in row["failure"]["message"]
    assert row["output_tokens"] == 100, "its usage is the server's own"
    assert held(gateway) == 0


async def test_a_stream_that_has_begun_is_closed_and_one_that_has_not_once_it_begins(
    opened: Open, server: Emulator
) -> None:
    gateway = await opened()
    begun = body("begun", 8_000, stream=True)
    async with gateway.http.post(gateway.url + CHAT, json=begun) as streaming:
        await streaming.content.readany()
        await leave(gateway, server, body("not begun " * 300, 8_000, stream=True))
        await wait_until(lambda: computing(server, 1), 10, "the end of the second")
    await wait_until(lambda: computing(server, 0), 10, "the end of both")
    outcomes = {call.prompt[:5]: call for call in await server.control.calls()}
    assert {call.outcome for call in outcomes.values()} == {"client_gone"}
    assert outcomes["not b"].output_tokens < 100, "no more than the first words were computed"
    await wait_until(lambda: held(gateway) == 0)


JOBS: Final[dict[str, dict[str, Any]]] = {
    "prompt": {"text": "called off", "model": "local", "type": "text_only"},
    "wrapped": {"endpoint": CHAT, "body": body("called off", 100)},
}


@pytest.mark.parametrize("sort", JOBS)
async def test_a_slot_is_given_again_once_the_server_is_done_with_a_job_that_was_called_off(
    opened: Open, server: Emulator, sort: str
) -> None:
    await server.control.set_behaviour(gpu=SLOTS | {"reply_tokens": 100})
    gateway = await opened(worker=True)
    stream = body("the stream", 250, stream=True)
    async with gateway.http.post(gateway.url + CHAT, json=stream) as streaming:
        await streaming.content.readany()
        request_id = await gateway.submit(**JOBS[sort])
        await wait_until(lambda: computing(server, 2))
        async with gateway.http.delete(f"{gateway.url}/requests/{request_id}") as response:
            assert response.status < 300
        assert await ask(gateway, "the next", 5) == 200
        async for _ in streaming.content:
            pass
    by_prompt = {call.prompt: call for call in await server.control.calls()}
    left, after = by_prompt["called off"], by_prompt["the next"]
    assert left.outcome == "finished"
    assert left.ended_ns is not None
    assert after.started_ns >= left.ended_ns
    assert (await server.control.stats()).max_in_flight == 2
    ended = await gateway.end_of(request_id)
    assert ended["status"] == "cancelled"
    row = await gateway.audit(request_id)
    assert (row["status"], row["output_tokens"]) == ("cancelled", left.output_tokens)
    assert held(gateway) == 0


async def test_a_streamed_prompt_that_is_left_is_closed_once_it_begins(
    opened: Open, server: Emulator
) -> None:
    await server.control.set_behaviour(gpu=SLOTS | {"reply_tokens": 8_000})
    gateway = await opened()
    sent = {"text": "not begun " * 300, "model": "local", "type": "text_only"}
    async with gateway.http.post(
        gateway.url + CHAT, json=body("begun", 8_000, stream=True)
    ) as streaming:
        await streaming.content.readany()
        async with aiohttp.ClientSession() as session:
            asking = asyncio.create_task(session.post(f"{gateway.url}/stream", json=sent))
            await wait_until(lambda: computing(server, 2))
            asking.cancel()
        await wait_until(lambda: computing(server, 1), 10, "the end of the second")
        await wait_until(lambda: held(gateway) == 1)
    row = await row_of(gateway, "not begun")
    assert (row["status"], row["failure"]["code"]) == ("cancelled", "client_left")
    assert "its upstream's work was over" in row["failure"]["message"]


async def test_a_process_that_stops_waits_for_nobody_who_has_left(
    opened: Open, server: Emulator
) -> None:
    gateway = await opened()
    async with gateway.http.post(
        gateway.url + CHAT, json=body("first", 8_000, stream=True)
    ) as streaming:
        await streaming.content.readany()
        await leave(gateway, server, body("left", 8_000))
        assert held(gateway) == 2
        gateway.drain()
        await asyncio.wait_for(asyncio.shield(gateway.serving), 10)
    await wait_until(lambda: computing(server, 0), 10, "the end of both")


async def test_with_release_the_permit_is_free_at_once(opened: Open, server: Emulator) -> None:
    gateway = await opened('abandoned = "release"')
    stream = body("the stream", 300, stream=True)
    async with gateway.http.post(gateway.url + CHAT, json=stream) as streaming:
        await streaming.content.readany()
        await leave(gateway, server, body("who leaves", 100))
        await wait_until(lambda: held(gateway) == 1)
        assert await computing(server, 2), "the server goes on"


@pytest.mark.parametrize(
    ("software", "streamed"), [("vllm", False), ("tgi", False), ("sglang", True)]
)
async def test_a_busy_server_is_asked_again_and_has_no_fault(
    opened: Open, server: Emulator, software: str, streamed: bool
) -> None:
    gateway = await opened(provider=software)
    await server.control.set_behaviour(gpu=SLOTS | {"software": software, "most_waiting": 0})
    async with aiohttp.ClientSession() as session:  # somebody else has both slots
        others = [
            asyncio.create_task(session.post(server.url + CHAT, json=body(f"other {n}", 8_000)))
            for n in range(2)
        ]
        await wait_until(lambda: computing(server, 2))
        asking = asyncio.create_task(ask(gateway, "waits", 2, streamed=streamed))
        gate = gateway.services.spine.health["local"]
        await wait_until(lambda: gateway.services.limiters["local"].has_pauses)
        assert (gate.faults, gate.state) == (0, "ok")
        for other in others:
            other.cancel()
        assert await asking == 200
    assert (gate.faults, gate.state) == (0, "ok")


async def test_a_server_that_loads_its_model_is_waited_for(opened: Open, server: Emulator) -> None:
    gateway = await opened()
    await server.control.set_behaviour(gpu=SLOTS | {"loading_ms": 300})
    assert await ask(gateway, "first", 2) == 200
    assert gateway.services.spine.health["local"].faults == 0
    row = await row_of(gateway, "first")
    assert row["attempts"] >= 2


async def test_a_server_that_loads_its_model_for_long_is_waited_for_until_the_deadline(
    opened: Open, server: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.spine.routing.FIRST_PAUSE_MS", 10)
    gateway = await opened()
    gateway.services.spine.retries.saved = 0.0  # others have used them up
    await server.control.set_behaviour(gpu=SLOTS | {"loading_ms": 600})
    assert await ask(gateway, "first", 2) == 200
    row = await row_of(gateway, "first")
    assert row["attempts"] > MOST_TRIES


async def test_the_test_of_an_upstream_shows_what_the_server_reports(
    opened: Open, server: Emulator
) -> None:
    gateway = await opened()
    async with gateway.http.post(f"{gateway.url}/admin/upstreams/local/test") as response:
        found, *_ = await response.json()
    assert (found["status"], found["problem"]) == (200, "")
    assert found["load"] == "0 of 2 at work, 0 waiting"


async def test_what_the_server_reports_is_shown_where_its_upstream_is(
    opened: Open, server: Emulator
) -> None:
    gateway = await opened()
    async with gateway.http.post(
        gateway.url + CHAT, json=body("computes", 8_000, stream=True)
    ) as streaming:
        await streaming.content.readany()
        _, listed = await gateway.get("/admin/upstreams")
        loads = {one["name"]: one["load"] for one in listed["upstreams"]}
        assert loads == {"gemini": "", "local": "1 of 2 at work, 0 waiting"}
        async with gateway.http.get(f"{gateway.url}/metrics") as response:
            lines = (await response.text()).splitlines()
    for name, value in (("running", 1), ("waiting", 0), ("slots", 2)):
        assert f'tidegate_server_{name}{{upstream="local"}} {value}.0' in lines
    assert not [one for one in lines if one.startswith("tidegate_server_kv_cache_used_ratio{")]


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


_DOT = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="  # noqa: E501
_INSIDE = "http://169.254.169.254/latest/meta-data"


async def test_a_server_fetches_nothing_from_where_its_upstream_does_not_say(
    opened: Open, server: Emulator
) -> None:
    gateway = await opened('media_hosts = ["cdn.example.com", "*.img.example.com"]')

    async def asked(*parts: dict[str, Any], **more: Any) -> tuple[int, str]:
        content = [{"type": "text", "text": "What is it?"}, *parts]
        sent = {**body("", 5), "messages": [{"role": "user", "content": content}], **more}
        async with gateway.http.post(gateway.url + CHAT, json=sent) as response:
            return response.status, await response.text()

    for wrong in (
        *(picture(url) for url in (_INSIDE, f" {_INSIDE}", "HTTP://LOCALHOST/a", "file:///etc/x")),
        picture("https://cdn.example.com.evil.test/a.png"),
        picture("https://cdn.example.com@127.0.0.1/a.png"),
        picture("https://127.0.0.1\\@cdn.example.com/a.png"),
        picture("https://127.0.0.1:80#@cdn.example.com/a.png"),
        picture("https://[::1]/a.png"),
        {"type": "image_url", "image_url": _INSIDE},
        {"type": "video_url", "video_url": {"detail": "low", "url": _INSIDE}},
        {"type": "image_url", "image_url": {"url": _DOT}, "audio_url": {"url": _INSIDE}},
        {"type": "input_audio", "input_audio": _INSIDE},
    ):
        status, text = await asked(wrong)
        assert (status, "media_hosts" in text) == (400, True), (wrong, text)
    assert [one for one in await server.control.calls() if one.kind != "other"] == []
    call = {"name": "look", "arguments": f'{{"url": "{_INSIDE}"}}'}
    for sound in (
        picture(_DOT),
        picture("https://cdn.example.com/a.png?b=http://x"),
        picture("https://a.b.img.example.com:8443/a.png"),
        {"type": "text", "text": f"What is at {_INSIDE}?"},
    ):
        status, text = await asked(sound, metadata={"url": _INSIDE}, function_call=call)
        assert status == 200, (sound, text)


async def test_a_server_that_may_fetch_from_any_host_fetches_from_no_private_address(
    opened: Open, server: Emulator
) -> None:
    gateway = await opened('media_hosts = ["*", "10.9.*"]')

    async def asked(url: str) -> tuple[int, str]:
        sent = {**body("", 5), "messages": [{"role": "user", "content": [picture(url)]}]}
        async with gateway.http.post(gateway.url + CHAT, json=sent) as response:
            return response.status, await response.text()

    hosts = (
        *(
            "127.0.0.1",
            "10.0.0.1",
            "169.254.169.254",
            "169.254.169.254.",
            "LOCALHOST",
            "a.localhost",
        ),
        *("2852039166", "0xA9FEA9FE", "0xa9.0xfe.0xa9.0xfe", "0251.0376.0251.0376", "127.1", "0"),
        *("[::1]", "[::ffff:10.0.0.1]", "[::ffff:a9fe:a9fe]", "[64:ff9b::a9fe:a9fe]", "[fd00::1]"),
        *("①⑥⑨.254.169.254", "%31%36%39.254.169.254", "metadata.google.internal", "me@8.8.8.8"),
    )
    for wrong in (*(f"http://{host}/a.png" for host in hosts), "file:///etc/x", f" {_INSIDE}"):
        status, text = await asked(wrong)
        assert (status, "* (public ones)" in text) == (400, True), (wrong, text)
    assert [one for one in await server.control.calls() if one.kind != "other"] == []
    for sound in (
        "https://8.8.8.8/a.png",
        "http://cdn.example.com:8080/a",
        "http://10.9.0.1/a.png",
    ):
        status, text = await asked(sound)
        assert status == 200, (sound, text)


async def test_a_file_by_its_url_goes_to_an_upstream_that_may_fetch_it(
    open_gateway: Opener, server: Emulator, tmp_path: Path
) -> None:
    path = tmp_path / "policy.toml"
    own = FILE.format(url=server.url, more="weight = 1000", provider="vllm")
    other = f'[upstreams.other]\nbase_url = "{server.url}/v1"\nmodels = ["local*"]\n'
    path.write_text(own + other)
    gateway = await open_gateway(worker=False, tidegate_policy=path)
    content = [{"type": "text", "text": "What is it?"}, picture(_INSIDE)]
    sent = {**body("", 5), "messages": [{"role": "user", "content": content}]}
    for _ in range(3):
        async with gateway.http.post(gateway.url + CHAT, json=sent) as response:
            assert response.status == 200, await response.text()
    rows = await gateway.database.fetch("SELECT DISTINCT upstream FROM audit")
    assert [row["upstream"] for row in rows] == ["other"]
