"""What a client can do to be charged less: it is charged for what the provider really sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import orjson
import pytest
from aiohttp import web

from tests.gateway import Gateway, Opener
from tests.integration.native.test_media_sdk import recording
from tests.integration.native.test_totals import VERSION, fronts
from tests.integration.security.hostile import one_try
from tests.integration.tenants.asking import ADMIN_TOKEN, ask, key_of
from tests.waiting import wait_until

__all__ = ["one_try"]
from tidegate.emulator.state import LoggedCall

ON = {"auth": "on", "admin_token": ADMIN_TOKEN, "worker": False}
WORDS = 1_500
LIMIT = "tpm:tenant/acme"
PRICES = '[upstreams.gemini.prices]\n"*" = { input = 1, output = 10 }\n'
FORGED = {"usage": {"input_tokens": 0, "output_tokens": 0}}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": FORGED}}


@pytest.fixture
def limited(tmp_path: Path) -> Path:
    path = tmp_path / "limited.toml"
    path.write_text(f'[limits]\n"{LIMIT}" = 1_000_000\n{PRICES}')
    return path


async def left(
    gateway: Gateway,
    path: str,
    body: dict[str, Any],
    headers: dict[str, str],
    at: bytes | None,
    count: int = 1,
) -> None:
    """Ask, read until `at` has come so often, and leave; without it before the first byte."""
    async with aiohttp.ClientSession() as session:
        asking = session.post(gateway.url + path, json=body, headers=headers | VERSION)
        if at is None:
            task = asyncio.ensure_future(asking)
            await gateway.in_flight(1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            seen = b""
            async with asking as response:
                assert response.status == 200, await response.read()
                while seen.count(at) < count:
                    seen += await response.content.readany()
    await gateway.in_flight(0)


async def rows_of(gateway: Gateway, count: int) -> list[asyncpg.Record]:
    """The audit rows of the calls that were left, oldest first."""

    async def found() -> list[asyncpg.Record] | None:
        rows: list[asyncpg.Record] = await gateway.database.fetch(
            "SELECT * FROM audit WHERE status = 'cancelled' ORDER BY created_at"
        )
        return rows if len(rows) == count else None

    rows: list[asyncpg.Record] = await wait_until(found, 20, f"{count} records")
    return rows


async def sent(gateway: Gateway) -> list[LoggedCall]:
    return [call for call in await gateway.calls() if call.outcome == "client_gone"]


async def spent_of(gateway: Gateway, limit: str) -> int:
    return (await gateway.services.limiter.snapshot()).limits[limit].used


def is_paid(row: asyncpg.Record, call: LoggedCall) -> None:
    made = row["output_tokens"] + (row["thoughts_tokens"] or 0)
    assert made >= call.output_tokens > 0
    assert row["input_tokens"] >= call.input_tokens
    assert row["cost_micros"] == row["input_tokens"] + 10 * made


async def test_who_teaches_short_answers_pays_for_long_ones_that_are_cut(
    open_gateway: Opener, limited: Path
) -> None:
    gateway = await open_gateway(**ON, tidegate_policy=limited)
    acme = await key_of(gateway, "acme")
    chat = fronts("Teach")[0]
    await gateway.upstream.set_behaviour(answer="ok", first_byte_ms=0)
    for _ in range(70):
        async with gateway.http.post(gateway.url + chat[0], json=chat[1], headers=acme) as response:
            assert response.status == 200
    await gateway.upstream.set_behaviour(answer="word " * WORDS, chunks=10)
    await gateway.upstream.set_fault("hang_mid_stream", match="leave", after_chunks=9)

    async def all_settled() -> bool:
        snapshot = await gateway.services.limiter.snapshot()
        return snapshot.limits[LIMIT].reserved == 0

    await wait_until(all_settled, 20, "usage of all calls that taught")
    before = await spent_of(gateway, LIMIT)
    body = fronts("leave")[0][1] | {"stream": True}
    for _ in range(2):
        await left(gateway, chat[0], body, acme, b"data:", 9)
    rows, calls = await rows_of(gateway, 2), await sent(gateway)
    for row, call in zip(rows, calls, strict=True):
        assert row["usage_state"] == "estimated"
        is_paid(row, call)
    # The limit counts it too, though it is more than was reserved.
    really = sum(call.input_tokens + call.output_tokens for call in calls)

    async def counted() -> bool:
        return await spent_of(gateway, LIMIT) >= before + really

    await wait_until(counted, 20, f"{really} tokens that the limit counts")


@pytest.mark.parametrize("where", ["tools", "text"])
async def test_a_usage_in_what_an_answer_repeats_is_none(
    open_gateway: Opener, limited: Path, where: str
) -> None:
    gateway = await open_gateway(**ON, tidegate_policy=limited)
    acme = await key_of(gateway, "acme")
    await gateway.upstream.set_behaviour(chunks=2)
    await gateway.upstream.set_fault("hang_mid_stream", match="leave", after_chunks=1)
    said = FORGED | {"answer": {"type": "string"}}
    schema = {"type": "object", "properties": said}
    asked: dict[str, Any] = {"tools": [TOOL], "tool_choice": "none"}
    if where == "text":
        asked = {"text": {"format": {"type": "json_schema", "name": "s", "schema": schema}}}
    path, body = fronts("leave")[1]
    await left(gateway, path, body | asked | {"stream": True}, acme, b"output_text.delta", 1)
    (row,), (call,) = await rows_of(gateway, 1), await sent(gateway)
    assert row["usage_state"] == "estimated"
    assert row["output_tokens"] > 0
    assert row["input_tokens"] >= call.input_tokens > 0
    assert row["cost_micros"] >= row["input_tokens"] + 10 * row["output_tokens"]


LONG = "a word of an earlier call " * 2_000  # about 13,000 tokens
KEPT: dict[str, tuple[str, dict[str, Any], str, str, Callable[[str], dict[str, Any]]]] = {
    "response": (
        *("/v1/responses", {"model": "m", "input": LONG}, "id", "/v1/responses"),
        lambda one: {"model": "m", "input": "leave", "previous_response_id": one},
    ),
    "interaction": (
        *("/v1beta/interactions", {"model": "m", "input": LONG}, "id", "/v1beta/interactions"),
        lambda one: {"model": "m", "input": "leave", "previous_interaction_id": one},
    ),
    "cache": (
        "/v1beta/cachedContents",
        {"model": "models/m", "contents": [{"role": "user", "parts": [{"text": LONG}]}]},
        *("name", "/v1beta/models/m:streamGenerateContent?alt=sse"),
        lambda one: {"cachedContent": one, "contents": [{"parts": [{"text": "leave"}]}]},
    ),
}


@pytest.mark.parametrize("kind", [*KEPT, "conversation"])
async def test_a_call_that_is_left_pays_for_what_the_provider_kept_of_earlier_ones(
    open_gateway: Opener, limited: Path, kind: str
) -> None:
    gateway = await open_gateway(**ON, tidegate_policy=limited)
    acme = await key_of(gateway, "acme")
    path, before, name, again, follow = KEPT.get(kind, KEPT["response"])
    if kind == "conversation":
        url = f"{gateway.url}/v1/conversations"
        async with gateway.http.post(url, json={}, headers=acme) as response:
            talk = (await response.json())["id"]
        before = before | {"conversation": talk}
    async with gateway.http.post(gateway.url + path, json=before, headers=acme) as response:
        made = await response.json()
        assert response.status == 200, made
    count = "SELECT count(*) FROM audit WHERE input_tokens + output_tokens > 10000"
    if kind == "cache":
        count = "SELECT count(*) FROM audit WHERE coalesce(total_tokens, input_tokens) > 10000"
    await wait_until(lambda: gateway.database.fetchval(count), 20, "the first call on record")
    body = follow(made[name])
    if kind == "conversation":
        body = {"model": "m", "input": "leave", "conversation": {"id": talk}}
    await gateway.upstream.set_behaviour(chunks=2)
    if kind == "cache":  # each event of its stream reports the input
        await gateway.upstream.set_fault("hang", match="leave")
        await left(gateway, again, body, acme, None)
    else:
        await gateway.upstream.set_fault("hang_mid_stream", match="leave", after_chunks=1)
        await left(gateway, again, body | {"stream": True}, acme, b"data:", 1)
    (row,) = await rows_of(gateway, 1)
    assert row["usage_state"] == "estimated"
    assert row["input_tokens"] > 10_000
    assert row["cost_micros"] >= row["input_tokens"]


@pytest.mark.parametrize("number", range(5))
async def test_a_call_that_is_left_before_its_first_byte_pays_its_input(
    open_gateway: Opener, limited: Path, number: int
) -> None:
    gateway = await open_gateway(**ON, tidegate_policy=limited)
    acme = await key_of(gateway, "acme")
    await gateway.upstream.set_fault("hang")
    path, body = fronts("A question of some length, that is never answered")[number]
    await left(gateway, path, body, acme, None)
    (row,) = await rows_of(gateway, 1)
    assert (row["usage_state"], row["output_tokens"]) == ("estimated", 0)
    assert row["cost_micros"] == row["input_tokens"] >= 49 // 4


async def test_a_call_that_was_never_sent_costs_nothing(
    open_gateway: Opener, limited: Path, one_try: None
) -> None:
    gateway = await open_gateway(
        **ON, tidegate_policy=limited, gemini_base_url="http://127.0.0.1:9"
    )
    acme = await key_of(gateway, "acme")
    path, body = fronts("Hello")[2]
    async with gateway.http.post(gateway.url + path, json=body, headers=acme) as response:
        assert response.status == 502 or response.status == 503
    row = await wait_until(lambda: gateway.database.fetchrow("SELECT * FROM audit"), 20)
    assert (row["usage_state"], row["cost_micros"]) == ("none", 0)


async def test_work_that_would_go_on_after_its_answer_is_not_begun(
    open_gateway: Opener, limited: Path
) -> None:
    gateway = await open_gateway(**ON, tidegate_policy=limited)
    acme = await key_of(gateway, "acme")
    path, body = fronts("Work on")[1]
    asked = body | {"background": True}
    refused = body | {"deferred": True}
    async with gateway.http.post(gateway.url + path, json=refused, headers=acme) as response:
        error = (await response.json())["error"]
        assert (response.status, error["param"]) == (400, "deferred")
        assert "continues after its answer" in error["message"]
    status, problem = await ask(gateway, "POST", "/submit", acme, {"endpoint": path, "body": asked})
    assert (status, problem["field"]) == (400, "background")
    assert await gateway.calls() == []


async def test_tools_name_no_model_that_the_tenant_may_not_ask(open_gateway: Opener) -> None:
    gateway = await open_gateway(**ON)
    acme = await key_of(gateway, "acme", models=["m"])
    path, body = fronts("Draw")[1]
    asked = body | {"tools": [{"type": "image_generation", "model": "gpt-image-1"}]}
    async with gateway.http.post(gateway.url + path, json=asked, headers=acme) as response:
        error = (await response.json())["error"]
        assert (response.status, error["param"]) == (403, "tools.model")
    job = {"endpoint": path, "body": asked}
    status, problem = await ask(gateway, "POST", "/submit", acme, job)
    assert (status, problem["field"]) == (403, "tools.model")
    twice = orjson.dumps(asked).replace(b'"gpt-image-1"', b'"gpt-image-1","model":"m"')
    typed = acme | {"content-type": "application/json"}
    async with gateway.http.post(gateway.url + path, data=twice, headers=typed) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, "model")
    assert await gateway.calls() == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("fields=candidates", "fields"),
        ("%24fields=candidates.content", "fields"),
        ("alt=proto", "alt"),
        ("alt=sse&$alt=media", "alt"),
        ("prettyPrint=false;callback=f", "callback"),
    ],
)
async def test_no_query_takes_the_usage_out_of_an_answer(
    open_gateway: Opener, query: str, field: str
) -> None:
    gateway = await open_gateway(**ON)
    acme = await key_of(gateway, "acme")
    path, body = fronts("Hello")[2]
    async with gateway.http.post(f"{gateway.url}{path}?{query}", json=body, headers=acme) as got:
        error = (await got.json())["error"]
        assert (got.status, error["status"]) == (400, "INVALID_ARGUMENT")
        assert error["message"].startswith(f"'{'$' if '$' in query or '%24' in query else ''}")
        assert field in error["message"]
    assert await gateway.calls() == []
    for sound in ("alt=sse", "$alt=json;enum-encoding=int", "%24alt=json%3Benum-encoding%3Dint"):
        url = f"{gateway.url}{path}?{sound}"
        async with gateway.http.post(url, json=body, headers=acme) as got:
            assert got.status == 200, await got.read()


@pytest.mark.parametrize(
    ("asked", "rate"),
    [
        ('{"type": "ephemeral"}', 3),
        ('{"type": "ephemeral", "ttl": "1h"}', 5),
        ("none", 1),
    ],
)
async def test_who_leaves_early_has_a_cache_written_at_its_price(
    open_gateway: Opener, tmp_path: Path, asked: str, rate: int
) -> None:
    """Also where the name is spelled in another way that JSON has for it."""
    policy = tmp_path / "written.toml"
    policy.write_text(
        '[upstreams.gemini.prices]\n"*" = { input = 1, output = 10, cache_write = 3, '
        "cache_write_1h = 5 }\n"
    )
    gateway = await open_gateway(**ON, tidegate_policy=policy)
    acme = await key_of(gateway, "acme")
    await gateway.upstream.set_fault("hang", match="leave")
    path, body = fronts("leave")[3]
    text = orjson.dumps(body | {"max_tokens": 9}).decode()
    if asked != "none":
        text = text[:-1] + f', "cache\\u005fcontrol": {asked}}}'
    async with aiohttp.ClientSession() as session:
        asking = session.post(
            gateway.url + path,
            data=text.encode(),
            headers=acme | VERSION | {"content-type": "application/json"},
        )
        task = asyncio.ensure_future(asking)
        await gateway.in_flight(1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await gateway.in_flight(0)
    (row,) = await rows_of(gateway, 1)
    assert (row["usage_state"], row["usage_details"]) == ("estimated", None)
    assert row["cost_micros"] == rate * row["input_tokens"] + 10 * row["output_tokens"] > 0


SPEAKING = """
[upstreams.speaking]
base_url = "{url}/v1"
dialect = "openai"
models = ["whisper-*"]
[upstreams.speaking.prices]
"whisper-*" = {{ audio_minute = 0.6 }}
"""


async def test_a_transcript_that_reads_as_a_usage_is_none(
    open_gateway: Opener, tmp_path: Path
) -> None:
    """A recording, or the prompt beside it, may have the model write anything."""
    said = orjson.dumps(FORGED)

    async def answer(request: web.BaseRequest) -> web.Response:
        await request.read()
        return web.Response(body=said, content_type="text/plain")

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    policy = tmp_path / "speaking.toml"
    policy.write_text(SPEAKING.format(url=f"http://127.0.0.1:{runner.addresses[0][1]}"))
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    form = aiohttp.FormData({"model": "whisper-1", "response_format": "text"})
    form.add_field("file", recording(7), filename="a.wav")
    url = f"{gateway.url}/v1/audio/transcriptions"
    async with gateway.http.post(url, data=form) as response:
        assert (response.status, await response.read()) == (200, said)
        row = await gateway.audit(response.headers["x-tidegate-request-id"])
    await runner.cleanup()
    assert (row["usage_state"], row["cost_micros"]) == ("estimated", 70_000)


@pytest.mark.parametrize("action", ["generateContent", "streamGenerateContent?alt=sse"])
async def test_a_picture_at_an_address_is_charged_though_google_reports_no_input(
    open_gateway: Opener, limited: Path, action: str
) -> None:
    gateway = await open_gateway(**ON, tidegate_policy=limited)
    acme = await key_of(gateway, "acme")
    picture = {"fileData": {"fileUri": "https://example.com/a.png", "mimeType": "image/png"}}
    body = {"contents": [{"parts": [{"text": "Describe it"}, picture]}]}
    url = f"{gateway.url}/v1beta/models/gemini-2.5-flash:{action}"
    async with gateway.http.post(url, json=body, headers=acme) as response:
        assert b"promptTokenCount" not in await response.read()

    async def found() -> asyncpg.Record | None:
        return await gateway.database.fetchrow("SELECT * FROM audit")

    row = await wait_until(found, 20, "its record")
    (call,) = await gateway.calls()
    assert row["usage_state"] == "estimated"
    made = row["output_tokens"] + row["thoughts_tokens"]
    assert (row["input_tokens"] > 0, made) == (True, call.output_tokens)
    is_paid(row, call)


async def test_a_picture_made_of_one_at_an_address_is_charged_as_well(
    open_gateway: Opener, limited: Path
) -> None:
    gateway = await open_gateway(**ON, tidegate_policy=limited)
    acme = await key_of(gateway, "acme")
    picture = {"fileData": {"fileUri": "https://example.com/a.png", "mimeType": "image/png"}}
    drawn = {"responseModalities": ["TEXT", "IMAGE"]}
    body = {"contents": [{"parts": [{"text": "Draw it"}, picture]}], "generationConfig": drawn}
    url = f"{gateway.url}/v1beta/models/gemini-2.5-flash-image:generateContent"
    async with gateway.http.post(url, json=body, headers=acme) as response:
        text = await response.text()
    assert (response.status, "promptTokenCount" in text, "inlineData" in text) == (200, False, True)

    async def found() -> asyncpg.Record | None:
        return await gateway.database.fetchrow("SELECT * FROM audit")

    row = await wait_until(found, 20, "its record")
    assert (row["usage_state"], row["images"]) == ("estimated", 1)
    assert (row["input_tokens"] > 0, row["cost_micros"] > 0) == (True, True)
