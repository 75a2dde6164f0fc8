"""A quota that is used up refuses now, with its own name and the true time, in every dialect."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from aiohttp import web
from openai import AsyncOpenAI

from tests.gateway import Gateway, Opener
from tests.integration.native.conftest import MODEL
from tests.waiting import wait_until
from tests.zones import ZONE
from tidegate.emulator.server import Emulator, run_emulator

LIMIT = f"rpd:{MODEL}"
SAID = f"Daily limit {LIMIT} is used up (1 of 1 requests). It resets at 00:00 {ZONE}, in "
GEMINI: tuple[str, dict[str, Any]] = (
    f"/v1beta/models/{MODEL}:generateContent",
    {"contents": [{"parts": [{"text": "Say hello"}]}]},
)
OPENAI: tuple[str, dict[str, Any]] = (
    "/v1/chat/completions",
    {"model": MODEL, "messages": [{"role": "user", "content": "Say hello"}]},
)
ONE_A_DAY = f'''
[limits]
"kind:text_only" = 5
"{LIMIT}" = {{ bound = 1, zone = "{ZONE}" }}
'''
CHAIN = """
[upstreams.second]
dialects = {{ gemini = "{url}" }}
key = "SECOND_KEY"

[upstreams.second.limits]
"pool:total" = 1
"rpd:{model}" = {{ bound = {day}, zone = "{zone}" }}

[[routes]]
model = "*"
try = ["gemini", "second"]
"""
Answer = tuple[int, dict[str, str], dict[str, Any]]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(ONE_A_DAY)
    return path


@pytest.fixture
async def second() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


@pytest.fixture
def chain(policy: Path, second: Emulator, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECOND_KEY", "key-of-the-second")
    policy.write_text(ONE_A_DAY + CHAIN.format(url=second.url, model=MODEL, day=2, zone=ZONE))
    return policy


@pytest.fixture
def tokens(policy: Path) -> Path:
    policy.write_text(f'{ONE_A_DAY}"tpm:{MODEL}" = 300\n"itpm:total" = 300\n"rpm:total" = 9\n')
    return policy


async def ask(
    gateway: Gateway, call: tuple[str, dict[str, Any]] = GEMINI, within_ms: int = 3_600_000
) -> Answer:
    async with asyncio.timeout(60):  # a call waits for an hour where it is not refused
        headers = {"x-tidegate-deadline-ms": str(within_ms)}
        path, body = call
        async with gateway.http.post(gateway.url + path, json=body, headers=headers) as response:
            named = {name.lower(): value for name, value in response.headers.items()}
            return response.status, named, orjson.loads(await response.read())


async def room_ms(gateway: Gateway) -> int:
    return (await gateway.services.limiter.snapshot()).limits[LIMIT].room_in_ms


async def test_a_days_quota_of_ours_that_is_used_up_is_told_in_each_dialect(
    open_gateway: Opener, policy: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    assert (await ask(gateway))[0] == 200
    status, headers, body = await ask(gateway, OPENAI)
    error = body["error"]
    assert (status, error["code"], error["limit"]) == (429, "limit_used_up", LIMIT)
    assert (error["type"], error["message"].startswith(SAID)) == ("usage_limit_reached", True)
    assert 0 <= error["resets_at"] - time.time() - await room_ms(gateway) / 1000 < 60
    assert 0 <= int(headers["retry-after"]) - await room_ms(gateway) / 1000 < 60
    assert headers["x-should-retry"] == "false"
    status, headers, body = await ask(gateway)
    error = body["error"]
    assert (status, error["status"]) == (429, "RESOURCE_EXHAUSTED")
    assert error["message"].startswith(SAID)
    [info, retry] = error["details"]
    assert info["metadata"] == {"limit": LIMIT}
    assert float(retry["retryDelay"].rstrip("s")) <= int(headers["retry-after"])
    assert len(await gateway.calls()) == 1


async def test_the_sdks_tell_the_true_time_without_a_second_call(
    open_gateway: Opener, policy: Path
) -> None:
    import anthropic  # 3,000 modules
    from anthropic import AsyncAnthropic

    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    assert (await ask(gateway))[0] == 200
    said: Any = [{"role": "user", "content": "Say hello"}]
    tried: list[float] = []
    began = time.monotonic()

    async def seen(_: Any) -> None:
        tried.append(time.monotonic())

    hooks = {"request": [seen]}
    async with AsyncOpenAI(
        base_url=f"{gateway.url}/v1",
        api_key="any",
        http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks),
    ) as one:
        with pytest.raises(openai.RateLimitError, match=f"Daily limit {LIMIT} is used up"):
            await one.chat.completions.create(model=MODEL, messages=said)
    async with AsyncAnthropic(
        base_url=gateway.url,
        api_key="any",
        http_client=anthropic.DefaultAsyncHttpxClient(event_hooks=hooks),
    ) as two:
        with pytest.raises(anthropic.RateLimitError, match=f"Daily limit {LIMIT} is used up"):
            await two.messages.create(model=MODEL, messages=said, max_tokens=9)
    assert len(tried) == 2
    assert time.monotonic() - began < 30, "nothing slept for the hours until then"


async def test_what_runs_no_model_takes_nothing_of_its_limits_and_no_tokens(
    open_gateway: Opener, tokens: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=tokens)
    text = "tide and moon " * 300
    long: dict[str, Any] = {"contents": [{"parts": [{"text": text}]}]}
    counted = {"model": MODEL, "input": text}
    for call in (
        (f"/v1beta/models/{MODEL}:countTokens", long),
        (f"/v1beta/models/{MODEL}:countTokens", long),
        ("/v1/responses/input_tokens", counted),
    ):
        assert (await ask(gateway, call))[0] == 200
    async with gateway.http.get(f"{gateway.url}/v1beta/models/{MODEL}") as answer:
        assert answer.status == 200
    limits = (await gateway.services.limiter.snapshot()).limits
    assert [limits[one].used for one in (LIMIT, f"tpm:{MODEL}", "itpm:total")] == [0, 0, 0]
    assert limits["rpm:total"].used == 4, "which is of all calls"
    assert (await ask(gateway))[0] == 200


async def test_a_stream_of_ours_and_a_job_with_a_deadline_hear_it_too(
    open_gateway: Opener, policy: Path
) -> None:
    gateway = await open_gateway(tidegate_policy=policy)
    assert (await ask(gateway))[0] == 200
    streamed = await gateway.stream(text="Explain", model=MODEL, deadline_ms=3_600_000)
    problem = streamed.problem
    assert (streamed.status, problem["code"], problem["limit"]) == (429, "limit_used_up", LIMIT)
    assert 0 <= problem["retry_after_ms"] - await room_ms(gateway) < 60_000
    # Before the one without a deadline, which counts as due in ten minutes.
    timed = await gateway.submit(data="Explain this", model=MODEL, deadline_ms=300_000)
    patient = await gateway.submit(data="Explain that", model=MODEL)
    record = await gateway.end_of(timed, 60)
    assert (record["status"], record["error"]["code"]) == ("expired", "limit_used_up")
    assert record["error"]["message"].startswith(SAID)

    async def waits() -> bool:
        return (await gateway.services.limiter.snapshot()).limits[LIMIT].waiting == 1

    await wait_until(waits, 20, "the job without a deadline")
    assert (await gateway.status(patient))["status"] == "queued"


async def test_another_upstream_is_waited_for_instead_until_its_quota_is_used_up_too(
    open_gateway: Opener, chain: Path, second: Emulator
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=chain)
    assert (await ask(gateway))[1]["x-tidegate-upstream"] == "gemini"
    await second.control.set_fault("hang", count=1)
    holding = asyncio.create_task(ask(gateway))

    async def holds() -> bool:
        return (await second.control.stats()).in_flight == 1

    await wait_until(holds, 20, "the second's only place")
    waits = asyncio.create_task(ask(gateway))
    limiter = gateway.services.limiters["second"]
    await wait_until(lambda: limiter.local_state().waiting["pool:total"] == 1, 20, "the queue")
    holding.cancel()
    status, headers, _ = await waits
    assert (status, headers["x-tidegate-upstream"]) == (200, "second")
    status, _, body = await ask(gateway, GEMINI)
    assert (status, body["error"]["message"].split(" (")[0]) == (429, SAID.split(" (")[0])


@pytest.fixture
def one_at_a_time(policy: Path) -> Path:
    policy.write_text('[limits]\n"kind:text_only" = 1\n')
    return policy


async def test_behind_a_long_queue_a_call_is_refused_by_an_estimate(
    open_gateway: Opener, one_at_a_time: Path
) -> None:
    """A call takes half a second; twenty wait. The next may wait for a second and a half."""
    gateway = await open_gateway(worker=False, tidegate_policy=one_at_a_time, stream_wait_ms=1_500)
    await gateway.upstream.set_behaviour(first_byte_ms=500)
    url, headers = gateway.url + OPENAI[0], {"x-tidegate-deadline-ms": "60000"}

    async def wait() -> int:
        async with gateway.http.post(url, json=OPENAI[1], headers=headers) as response:
            return response.status

    for _ in range(2):  # how long calls take is known
        assert await wait() == 200
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(wait()) for _ in range(21)]
        await wait_until(lambda: gateway.services.limiter.waiters >= 19, 20, "calls that wait")
        async with gateway.http.post(url, json=OPENAI[1]) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (429, "limit_used_up")
            assert 1 < int(response.headers["retry-after"]) < 60
        assert (error["limit"], error["is_estimate"]) == ("kind:text_only", True)
        assert error["message"].endswith(", which is an estimate.")
        for one in waiting:
            one.cancel()


_OF_PROVIDERS = """
[upstreams.one]
dialects = {{ openai = "{url}/v1", anthropic = "{url}" }}
models = ["gpt-*", "claude-*"]
"""


@pytest.fixture
async def exhausted() -> AsyncIterator[str]:
    """A provider that has nothing left for an hour, and says that to repeat the call is right."""

    async def refuse(_: web.BaseRequest) -> web.Response:
        body = {"type": "error", "error": {"type": "rate_limit_error", "message": "Come later."}}
        headers = {"retry-after": "3600", "x-should-retry": "true"}
        return web.json_response(body, status=429, headers=headers)

    runner = web.ServerRunner(web.Server(refuse))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_no_sdk_sleeps_until_the_end_of_a_provider_s_own_refusal(
    open_gateway: Opener, tmp_path: Path, exhausted: str
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(_OF_PROVIDERS.format(url=exhausted))
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    said: Any = [{"role": "user", "content": "Say hello"}]
    for path, model in (("/v1/messages", "claude-x"), ("/v1/chat/completions", "gpt-x")):
        call = {"model": model, "messages": said, "max_tokens": 9}
        status, headers, body = await ask(gateway, (path, call), 3_000)
        assert (status, body["error"]["message"]) == (429, "Come later."), "in its own words"
        assert (headers["retry-after"], headers["x-should-retry"]) == ("3600", "false")
        status, headers, _ = await ask(gateway, (path, call), 3_000)  # its limit is paused by now
        assert (status, headers["x-should-retry"]) == (429, "false")
