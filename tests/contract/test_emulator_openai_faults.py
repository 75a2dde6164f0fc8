"""Faults, limits and tokens really billed, as the unmodified OpenAI SDK meets them."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.contract.openai_sdk import MODEL, ask, client, emulator, sdk, stream, text_of
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.emulator.settings import Behaviour, EmulatorSettings, RateLimit
from tidegate.emulator.state import Billed, LoggedCall

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["emulator", "sdk"]


async def gone(emulator: Emulator, count: int) -> bool:
    return (await emulator.control.stats())["text_only"].client_gone == count


async def listen(sdk: AsyncOpenAI, received: list[Any]) -> None:
    async for chunk in await ask(sdk, stream=True):
        received.append(chunk)


STATUSES: list[tuple[str, str, str | None]] = [
    ("throttled", "RateLimitError", "rate_limit_exceeded"),
    ("throttled_bare", "RateLimitError", "rate_limit_exceeded"),
    ("day_quota", "RateLimitError", "insufficient_quota"),
    ("unavailable", "InternalServerError", None),
    ("internal", "InternalServerError", None),
    ("unauthorized", "AuthenticationError", "invalid_api_key"),
    ("forbidden", "PermissionDeniedError", None),
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("fault", "name", "code"), STATUSES)
async def test_a_plain_error_has_its_class_and_code(
    sdk: AsyncOpenAI, emulator: Emulator, fault: str, name: str, code: str | None, streamed: bool
) -> None:
    import openai

    await emulator.control.set_fault(fault)
    with pytest.raises(getattr(openai, name)) as failed:
        await (stream(sdk) if streamed else ask(sdk))
    assert failed.value.code == code
    assert set(failed.value.body) == {"message", "type", "param", "code"}
    stats = await emulator.control.stats()
    text_only = stats["text_only"]
    assert (text_only.failed, text_only.finished, text_only.in_flight) == (1, 0, 0)
    assert stats.billed() == Billed()


async def test_throttled_says_when_to_come_back(sdk: AsyncOpenAI, emulator: Emulator) -> None:
    from openai import RateLimitError

    await emulator.control.set_fault("throttled", retry_after_s=1.2)
    with pytest.raises(
        RateLimitError, match=r"Limit 10, Used 10, Requested 1\. Please try again in 1\.2s\."
    ) as failed:
        await ask(sdk)
    headers = failed.value.response.headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("2", "1200")
    assert headers["x-ratelimit-limit-requests"] == "10"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"] == "1.2s"


async def test_the_sdks_own_retry_waits_as_it_was_told(emulator: Emulator) -> None:
    await emulator.control.set_fault("throttled", count=1, retry_after_s=0.05)
    async with client(emulator, max_retries=1) as sdk:
        assert (await ask(sdk)).choices
    calls = await emulator.control.calls()
    assert [call.outcome for call in calls] == ["failed", "finished"]
    assert calls[1].started_ns - (calls[0].ended_ns or 0) >= 50_000_000


async def test_an_error_list_is_what_geminis_own_endpoint_sends(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    from openai import RateLimitError

    await emulator.control.set_fault("error_list")
    with pytest.raises(RateLimitError) as failed:
        await ask(sdk)
    body: Any = failed.value.body
    assert body[0]["error"]["status"] == "RESOURCE_EXHAUSTED"


LIMITS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"rates": [{"scope": "total", "limit": 0}]}, "rate_limit_exceeded", "requests"),
    (
        {"rates": [{"scope": "total", "limit": 0, "measure": "input_tokens"}]},
        "rate_limit_exceeded",
        "tokens",
    ),
    ({"rates": [{"scope": "total", "limit": 0, "window_s": 86_400}]}, "insufficient_quota", None),
    ({"concurrency": {"text_only": 0}}, "rate_limit_exceeded", None),
]


@pytest.mark.parametrize(("limits", "code", "measure"), LIMITS, ids=str)
async def test_a_limit_that_is_enforced_is_told_in_this_dialect(
    sdk: AsyncOpenAI, emulator: Emulator, limits: dict[str, Any], code: str, measure: str | None
) -> None:
    from openai import RateLimitError

    await emulator.control.set_behaviour(**limits)
    with pytest.raises(RateLimitError) as failed:
        await ask(sdk)
    assert failed.value.code == code
    assert ("retry-after" in failed.value.response.headers) == (measure is not None)
    if measure is not None:
        assert failed.value.response.headers[f"x-ratelimit-limit-{measure}"] == "0"
        assert failed.value.type == measure
    stats = (await emulator.control.stats())["text_only"]
    assert (stats.arrived, stats.started, sum(stats.refused.values())) == (1, 0, 1)


async def test_both_dialects_spend_of_the_same_limit() -> None:
    from google.genai import Client
    from google.genai.types import HttpOptions
    from openai import RateLimitError

    settings = EmulatorSettings(behaviour=Behaviour(rates=(RateLimit("total", 2, 3600),)))
    async with run_emulator(settings) as emulator, client(emulator) as sdk:
        google = Client(api_key="k", http_options=HttpOptions(base_url=emulator.url))
        await google.aio.models.generate_content(model="gemini-2.5-flash", contents="Hello")
        await google.aio.aclose()
        await ask(sdk)
        with pytest.raises(RateLimitError, match=r"try again in (1h0m|59m)"):
            await ask(sdk)
        assert [call.dialect for call in await emulator.control.calls()] == [
            "gemini",
            "openai",
            "openai",
        ]


@pytest.mark.parametrize("code", [429, 503])
async def test_an_error_comes_inside_a_stream_that_began_well(
    sdk: AsyncOpenAI, emulator: Emulator, code: int
) -> None:
    from openai import APIError

    await emulator.control.set_fault("error_in_stream", code=code, after_chunks=2)
    received: list[Any] = []
    with pytest.raises(APIError) as failed:
        await listen(sdk, received)
    assert failed.value.type == ("requests" if code == 429 else "server_error")
    (call,) = await emulator.control.calls()
    assert call.outcome == "failed"
    assert call.output_tokens == len(text_of(received).split()) > 0
    assert (await emulator.control.stats()).billed("failed").output_tokens == call.output_tokens


async def test_an_error_comes_inside_a_streamed_response(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    """As OpenAI ends one: the error within its event, then the response as it is stored, failed.
    The SDK raises at the first of both."""
    from openai import APIError

    for after_chunks in (0, 1):
        await emulator.control.set_fault("error_in_stream", count=2, after_chunks=after_chunks)
        with pytest.raises(APIError) as failed:
            async for _ in await sdk.responses.create(model=MODEL, input="Hello", stream=True):
                pass
        assert failed.value.code == "server_error"
        body = {"model": MODEL, "input": "Hello", "stream": True}
        url, headers = f"{emulator.url}/v1/responses", {"Authorization": "Bearer k"}
        async with aiohttp.request("POST", url, json=body, headers=headers) as response:
            text = await response.text()
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert [event["type"] for event in events[:2]] == [
            "response.created",
            "response.in_progress",
        ]
        error, end = events[-2:]
        assert (error["type"], error["error"]["code"]) == ("error", "server_error")
        assert (end["type"], end["response"]["output"]) == ("response.failed", [])
        assert end["response"]["error"]["message"] == error["error"]["message"]
        kept = await sdk.responses.retrieve(end["response"]["id"])
        assert (kept.status, kept.error and kept.error.code) == ("failed", "server_error")


async def test_garbage_is_not_json(sdk: AsyncOpenAI, emulator: Emulator) -> None:
    from json import JSONDecodeError

    await emulator.control.set_fault("garbage")
    with pytest.raises(JSONDecodeError):
        await ask(sdk)
    with pytest.raises(JSONDecodeError):
        await stream(sdk)
    assert (await emulator.control.stats())["text_only"].failed == 2


@pytest.mark.parametrize("fault", ["cut", "cut_mid_stream"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_cut_is_a_lost_connection(
    sdk: AsyncOpenAI, emulator: Emulator, fault: str, streamed: bool
) -> None:
    from openai import APIConnectionError

    await emulator.control.set_fault(fault)
    with pytest.raises(APIConnectionError):
        await (stream(sdk) if streamed else ask(sdk))
    (call,) = await emulator.control.calls()
    assert (call.outcome, call.fault) == ("failed", fault)
    assert bool(call.input_tokens) == bool(call.bytes) == (fault == "cut_mid_stream")


async def test_a_hang_gives_no_headers_until_the_client_leaves(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    from openai import APITimeoutError

    await emulator.control.set_fault("hang")
    with pytest.raises(APITimeoutError):
        await ask(sdk, timeout=0.05)
    await wait_until(partial(gone, emulator, 1))
    assert (await emulator.control.stats()).billed() == Billed()


async def test_a_slow_first_token_is_late_by_the_delay(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    await emulator.control.set_fault("slow_first_token", delay_ms=120)
    await stream(sdk)

    async def ended() -> LoggedCall | None:
        (call,) = await emulator.control.calls()
        return call if call.ended_ns else None

    call: LoggedCall = await wait_until(ended, what="its end in the emulator's log")
    assert call.ended_ns is not None
    assert call.ended_ns - call.started_ns >= 115_000_000  # timers are of whole milliseconds


UNUSUAL: list[tuple[str, str | None]] = [
    ("blocked_prompt", "content_filter"),
    ("safety", "content_filter"),
    ("unknown_finish", "something_new"),
    ("no_candidates", None),
]


@pytest.mark.parametrize(("fault", "reason"), UNUSUAL)
async def test_an_unusual_answer_is_well_formed(
    sdk: AsyncOpenAI, emulator: Emulator, fault: str, reason: str | None
) -> None:
    await emulator.control.set_fault(fault)
    answer = await ask(sdk)
    assert [choice.finish_reason for choice in answer.choices] == ([reason] if reason else [])
    assert bool(answer.usage.completion_tokens) == (fault == "unknown_finish")
    chunks = await stream(sdk)
    reasons = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert reasons == ([reason] if reason else [])
    assert (await emulator.control.stats())["text_only"].finished == 2


async def test_leaving_in_mid_stream_is_counted_and_charged_for_what_came(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    await emulator.control.set_fault("hang_mid_stream", after_chunks=2)
    received: list[Any] = []
    task = asyncio.create_task(listen(sdk, received))
    await wait_until(lambda: len(received) == 3)
    task.cancel()
    await wait_until(partial(gone, emulator, 1))
    stats = await emulator.control.stats()
    words = len(text_of(received).split())
    assert stats.tokens == {MODEL: {"client_gone": Billed(1, 2, words)}}
    assert stats["text_only"].in_flight == 0


async def test_the_totals_billed_are_the_usage_that_was_told(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    told = [(await ask(sdk, "x" * size, reasoning_effort="low")).usage for size in (4, 40, 400)]
    chunks = await stream(sdk, "hello", stream_options={"include_usage": True})
    told.append(chunks[-1].usage)
    await stream(sdk, "hello")
    told.append(chunks[-1].usage)
    stats = await emulator.control.stats()
    billed = stats.billed("finished", MODEL)
    assert billed.calls == 5
    assert billed.input_tokens == sum(usage.prompt_tokens for usage in told)
    assert billed.output_tokens == sum(usage.completion_tokens for usage in told)
    assert billed.thoughts_tokens == 3 * 32
    assert stats.billed() == billed
    await emulator.control.reset()
    assert (await emulator.control.stats()).tokens == {}
