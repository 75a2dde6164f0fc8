"""Each fault that can be ordered, as the unmodified google-genai SDK meets it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.waiting import wait_until
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.emulator.settings import EmulatorSettings

if TYPE_CHECKING:
    from google.genai import Client

MODEL = "gemini-2.5-flash"


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


@pytest.fixture
async def sdk(emulator: Emulator) -> AsyncIterator[Client]:
    """On an HTTP client of ours: with aiohttp the SDK repeats a broken call by itself."""
    import httpx2
    from google.genai import Client
    from google.genai.types import HttpOptions

    async with httpx2.AsyncClient(timeout=5) as transport:
        options = HttpOptions(base_url=emulator.url, httpx_async_client=transport)
        yield Client(api_key="any-key", http_options=options)


async def ask(sdk: Client, prompt: str = "Hello") -> Any:
    return await sdk.aio.models.generate_content(model=MODEL, contents=prompt)


async def stream(sdk: Client, received: list[str], prompt: str = "Hello") -> None:
    chunks = await sdk.aio.models.generate_content_stream(model=MODEL, contents=prompt)
    async for chunk in chunks:
        received.append(chunk.text or "")


def detail(error: Any, name: str) -> Any:
    for item in error.details["error"].get("details", []):
        if item["@type"] == f"type.googleapis.com/google.rpc.{name}":
            return item
    return None


async def test_throttled_says_when_to_retry_and_which_quota(
    sdk: Client, emulator: Emulator
) -> None:
    from google.genai.errors import ClientError

    await emulator.control.set_fault("throttled", count=1, retry_after_s=53.5)
    with pytest.raises(ClientError) as failed:
        await ask(sdk)
    assert (failed.value.code, failed.value.status) == (429, "RESOURCE_EXHAUSTED")
    assert "Please retry in 53.5s." in (failed.value.message or "")
    assert detail(failed.value, "RetryInfo")["retryDelay"] == "53.5s"
    violation = detail(failed.value, "QuotaFailure")["violations"][0]
    assert "PerMinute" in violation["quotaId"]
    assert detail(failed.value, "Help")["links"]
    assert (await ask(sdk)).text


async def test_throttled_bare_has_no_details(sdk: Client, emulator: Emulator) -> None:
    from google.genai.errors import ClientError

    await emulator.control.set_fault("throttled_bare")
    with pytest.raises(ClientError) as failed:
        await ask(sdk)
    assert failed.value.code == 429
    assert "details" not in failed.value.details["error"]


async def test_a_day_quota_is_named_per_day(sdk: Client, emulator: Emulator) -> None:
    from google.genai.errors import ClientError

    await emulator.control.set_fault("day_quota")
    with pytest.raises(ClientError) as failed:
        await ask(sdk)
    violation = detail(failed.value, "QuotaFailure")["violations"][0]
    assert violation["quotaId"] == "GenerateRequestsPerDayPerProjectPerModel-FreeTier"


STATUSES = [
    ("unavailable", 503, "UNAVAILABLE"),
    ("internal", 500, "INTERNAL"),
    ("unauthorized", 401, "UNAUTHENTICATED"),
    ("forbidden", 403, "PERMISSION_DENIED"),
    ("error_list", 429, None),
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("fault", "code", "status"), STATUSES)
async def test_a_plain_error_has_its_status(
    sdk: Client, emulator: Emulator, fault: str, code: int, status: str | None, streamed: bool
) -> None:
    from google.genai.errors import APIError

    await emulator.control.set_fault(fault)
    with pytest.raises(APIError) as failed:
        await (stream(sdk, []) if streamed else ask(sdk))
    assert failed.value.code == code
    assert status is None or failed.value.status == status
    stats = (await emulator.control.stats())["text_only"]
    assert (stats.failed, stats.finished, stats.in_flight) == (1, 0, 0)


async def test_an_error_list_is_a_list_of_one_error(emulator: Emulator) -> None:
    await emulator.control.set_fault("error_list")
    url = f"{emulator.url}/v1beta/models/{MODEL}:generateContent?key=k"
    body = {"contents": [{"parts": [{"text": "x"}]}]}
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        (only,) = await response.json()
    assert only["error"]["code"] == 429


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_hang_gives_no_headers_until_the_client_leaves(
    sdk: Client, emulator: Emulator, streamed: bool
) -> None:
    await emulator.control.set_fault("hang")
    task = asyncio.create_task(stream(sdk, []) if streamed else ask(sdk))

    async def in_flight() -> bool:
        return (await emulator.control.stats())["text_only"].in_flight == 1

    await wait_until(in_flight)
    done, _ = await asyncio.wait([task], timeout=0.1)
    assert not done
    task.cancel()

    async def gone() -> bool:
        return (await emulator.control.stats())["text_only"].client_gone == 1

    await wait_until(gone)
    (call,) = await emulator.control.calls()
    assert (call.outcome, call.fault) == ("client_gone", "hang")


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_cut_closes_the_connection_before_the_headers(
    sdk: Client, emulator: Emulator, streamed: bool
) -> None:
    import httpx2

    await emulator.control.set_fault("cut")
    with pytest.raises(httpx2.RemoteProtocolError):
        await (stream(sdk, []) if streamed else ask(sdk))
    (call,) = await emulator.control.calls()
    assert (call.outcome, call.fault, call.bytes) == ("failed", "cut", 0)


async def test_a_stream_hangs_after_the_ordered_number_of_chunks(
    sdk: Client, emulator: Emulator
) -> None:
    await emulator.control.set_fault("hang_mid_stream", after_chunks=2)
    received: list[str] = []
    task = asyncio.create_task(stream(sdk, received))
    await wait_until(lambda: len(received) == 2)
    done, _ = await asyncio.wait([task], timeout=0.1)
    assert not done
    assert len(received) == 2
    task.cancel()


async def test_a_stream_is_cut_in_the_middle(sdk: Client, emulator: Emulator) -> None:
    import httpx2

    await emulator.control.set_fault("cut_mid_stream", after_chunks=3)
    received: list[str] = []
    with pytest.raises(httpx2.RemoteProtocolError):
        await stream(sdk, received)
    assert len(received) == 3
    assert (await emulator.control.stats())["text_only"].failed == 1


async def test_an_answer_that_is_not_streamed_can_be_cut_in_its_middle(
    sdk: Client, emulator: Emulator
) -> None:
    import httpx2

    await emulator.control.set_fault("cut_mid_stream")
    with pytest.raises(httpx2.RemoteProtocolError):
        await ask(sdk)


async def test_garbage_is_not_json(sdk: Client, emulator: Emulator) -> None:
    from json import JSONDecodeError

    from google.genai.errors import UnknownApiResponseError

    await emulator.control.set_fault("garbage")
    with pytest.raises(JSONDecodeError):
        await ask(sdk)
    received: list[str] = []
    with pytest.raises(UnknownApiResponseError):
        await stream(sdk, received)
    assert len(received) == 1


@pytest.mark.parametrize("code", [429, 503])
async def test_an_error_comes_inside_a_stream_that_began_well(
    emulator: Emulator, code: int
) -> None:
    await emulator.control.set_fault("error_in_stream", code=code)
    url = f"{emulator.url}/v1beta/models/{MODEL}:streamGenerateContent?alt=sse&key=k"
    body = {"contents": [{"parts": [{"text": "x"}]}]}
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        assert response.status == 200
        events = (await response.text()).split("\r\n\r\n")
    assert '"candidates"' in events[0]
    assert events[1].startswith(f'data: {{"error":{{"code":{code},')
    assert events[2:] == [""]


async def test_a_blocked_prompt_has_feedback_and_no_candidates(
    sdk: Client, emulator: Emulator
) -> None:
    await emulator.control.set_fault("blocked_prompt", reason="PROHIBITED_CONTENT")
    answer = await ask(sdk)
    assert answer.candidates is None
    assert answer.prompt_feedback.block_reason == "PROHIBITED_CONTENT"
    received: list[str] = []
    await stream(sdk, received)
    assert received == [""]


async def test_no_candidates_is_an_empty_list(sdk: Client, emulator: Emulator) -> None:
    await emulator.control.set_fault("no_candidates")
    assert (await ask(sdk)).candidates == []


FINISHES = [("unknown_finish", "SOMETHING_NEW"), ("safety", "SAFETY"), ("no_image", "NO_IMAGE")]


@pytest.mark.parametrize(("fault", "reason"), FINISHES)
@pytest.mark.filterwarnings("ignore:SOMETHING_NEW is not a valid FinishReason")
async def test_an_unusual_finish_is_named(
    sdk: Client, emulator: Emulator, fault: str, reason: str
) -> None:
    await emulator.control.set_fault(fault)
    answer = await ask(sdk)
    assert answer.candidates[0].finish_reason == reason
    assert bool(answer.text) == (fault == "unknown_finish")


async def test_a_slow_first_token_is_late_by_the_delay(sdk: Client, emulator: Emulator) -> None:
    await emulator.control.set_fault("slow_first_token", delay_ms=150, count=1)
    before = time.monotonic()
    assert (await ask(sdk)).text
    assert time.monotonic() - before >= 0.15


async def test_a_fault_with_a_count_strikes_that_often(sdk: Client, emulator: Emulator) -> None:
    from google.genai.errors import ServerError

    await emulator.control.set_fault("unavailable", count=2)
    for _ in range(2):
        with pytest.raises(ServerError):
            await ask(sdk)
    assert (await ask(sdk)).text


async def test_a_fault_strikes_only_what_matches(sdk: Client, emulator: Emulator) -> None:
    from google.genai.errors import ServerError

    await emulator.control.set_fault("unavailable", match="unlucky")
    await emulator.control.set_fault("internal", kind="image_generation")
    assert (await ask(sdk, "a lucky one")).text
    with pytest.raises(ServerError) as failed:
        await ask(sdk, "an unlucky one")
    assert failed.value.code == 503
    with pytest.raises(ServerError) as failed:
        await sdk.aio.models.generate_content(model="gemini-2.5-flash-image", contents="x")
    assert failed.value.code == 500
    assert (await sdk.aio.models.count_tokens(model=MODEL, contents="unlucky")).total_tokens
    await emulator.control.clear_faults()
    assert (await ask(sdk, "an unlucky one")).text


async def test_a_fault_with_a_probability_strikes_about_that_often(emulator: Emulator) -> None:
    await emulator.control.set_fault("unavailable", probability=0.3)
    url = f"{emulator.url}/v1beta/models/{MODEL}:generateContent?key=k"
    body = {"contents": [{"parts": [{"text": "x"}]}]}
    failed = 0
    async with aiohttp.ClientSession() as session:
        for _ in range(200):
            async with session.post(url, json=body) as response:
                failed += response.status == 503
    assert 35 <= failed <= 90


async def test_calls_that_generate_nothing_fail_when_ordered_by_kind(
    sdk: Client, emulator: Emulator
) -> None:
    from google.genai.errors import ServerError

    await emulator.control.set_fault("unavailable", kind="other", match="/files")
    with pytest.raises(ServerError):
        await sdk.aio.files.get(name="files/abc")
    assert (await sdk.aio.models.count_tokens(model=MODEL, contents="x")).total_tokens == 1


async def test_faults_can_stand_from_the_start_and_reset_brings_them_back() -> None:
    settings = EmulatorSettings(faults=({"fault": "unavailable", "count": 1},))
    body = {"contents": [{"parts": [{"text": "x"}]}]}
    async with run_emulator(settings) as emulator, aiohttp.ClientSession() as session:
        url = f"{emulator.url}/v1beta/models/{MODEL}:generateContent?key=k"
        statuses = []
        for turn in range(4):
            if turn == 2:
                await emulator.control.reset()
            async with session.post(url, json=body) as response:
                statuses.append(response.status)
    assert statuses == [503, 200, 503, 200]
