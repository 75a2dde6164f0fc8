"""Gemini's batch API over HTTP, by Google's own SDK."""

from __future__ import annotations

import io
from typing import Any

import httpx2
import orjson
import pytest
from google import genai
from google.genai.errors import ClientError
from google.genai.types import BatchJob, HttpOptions, JobState

from tests.integration.emulator.clock import ManualClock
from tidegate.emulator.server import Emulator

MODEL = "gemini-2.5-flash"


@pytest.fixture
def sdk(emulator: Emulator) -> genai.client.AsyncClient:
    return genai.Client(api_key="k", http_options=HttpOptions(base_url=emulator.url)).aio


async def submit(sdk: genai.client.AsyncClient, *texts: str, name: str = "job") -> BatchJob:
    requests: Any = [{"contents": [{"role": "user", "parts": [{"text": text}]}]} for text in texts]
    return await sdk.batches.create(model=MODEL, src=requests, config={"display_name": name})


async def found(sdk: genai.client.AsyncClient, job: BatchJob) -> BatchJob:
    assert job.name is not None
    return await sdk.batches.get(name=job.name)


async def test_inline_requests_are_worked_off_on_the_emulators_clock(
    sdk: genai.client.AsyncClient, emulator: Emulator, clock: ManualClock
) -> None:
    await emulator.control.set_behaviour(batches={"validating_ms": 1000, "line_ms": 1000})
    job = await submit(sdk, "one", "two", name="intent-1")
    assert (job.state, job.display_name) == (JobState.JOB_STATE_PENDING, "intent-1")
    clock.pass_s(2)
    assert (await found(sdk, job)).state == JobState.JOB_STATE_RUNNING
    clock.pass_s(1)
    job = await found(sdk, job)
    assert job.state == JobState.JOB_STATE_SUCCEEDED
    assert job.dest is not None
    answers = [item.response for item in job.dest.inlined_responses or ()]
    assert [bool(answer and answer.text) for answer in answers] == [True, True]
    logged = [call for call in await emulator.control.calls() if call.tier == "batch"]
    assert [(call.dialect, call.prompt) for call in logged] == [
        ("gemini", "one"),
        ("gemini", "two"),
    ]


async def test_a_file_of_requests_has_a_file_of_results(sdk: genai.client.AsyncClient) -> None:
    contents = [{"role": "user", "parts": [{"text": "hi"}]}]
    lines = [{"key": "a", "request": {"contents": contents}}, {"key": "b", "request": {}}]
    data = io.BytesIO(b"\n".join(map(orjson.dumps, lines)))
    file = await sdk.files.upload(file=data, config={"mime_type": "application/jsonl"})
    assert file.name is not None
    job = await sdk.batches.create(model=MODEL, src=file.name, config={"display_name": "f"})
    job = await found(sdk, job)
    assert job.dest is not None
    assert job.dest.file_name is not None
    text = await sdk.files.download(file=job.dest.file_name)
    results = {line["key"]: line for line in map(orjson.loads, text.splitlines())}
    assert results["a"]["response"]["candidates"]
    assert results["b"]["error"]["code"] == 3


async def test_a_batch_that_expires_has_no_results(
    sdk: genai.client.AsyncClient, emulator: Emulator, clock: ManualClock
) -> None:
    await emulator.control.set_behaviour(batches={"line_ms": 1, "expired_share": 1})
    job = await submit(sdk, "one", "two")
    clock.pass_s(86_400)
    assert (await found(sdk, job)).state == JobState.JOB_STATE_RUNNING
    clock.pass_s(86_400)
    job = await found(sdk, job)
    assert (job.state, job.dest) == (JobState.JOB_STATE_EXPIRED, None)


async def test_a_batch_is_cancelled_then_deleted(
    sdk: genai.client.AsyncClient, emulator: Emulator, clock: ManualClock
) -> None:
    await emulator.control.set_behaviour(batches={"line_ms": 1000})
    job = await submit(sdk, "one", "two")
    assert job.name is not None
    await sdk.batches.cancel(name=job.name)
    assert (await found(sdk, job)).state == JobState.JOB_STATE_CANCELLED
    await sdk.batches.delete(name=job.name)
    with pytest.raises(ClientError, match="not found"):
        await found(sdk, job)


async def test_open_batches_and_enqueued_tokens_have_bounds(
    sdk: genai.client.AsyncClient, emulator: Emulator, clock: ManualClock
) -> None:
    await emulator.control.set_behaviour(batches={"line_ms": 1000, "open_batches": 1})
    await submit(sdk, "one")
    with pytest.raises(ClientError, match="RESOURCE_EXHAUSTED"):
        await submit(sdk, "two")
    clock.pass_s(1)
    await emulator.control.set_behaviour(batches={"enqueued_tokens": 1})
    with pytest.raises(ClientError, match="RESOURCE_EXHAUSTED"):
        await submit(sdk, "a prompt of more than one token")


async def test_a_batch_whose_answer_was_lost_is_found_by_its_name(
    sdk: genai.client.AsyncClient, emulator: Emulator
) -> None:
    """The SDK repeats a request whose connection was closed, by itself: here once only is asked."""
    await emulator.control.set_fault(
        "answer_lost", kind="other", match=":batchGenerateContent", count=1
    )
    content = {"role": "user", "parts": [{"text": "one"}]}
    requests = {"requests": [{"request": {"contents": [content]}}]}
    batch = {"displayName": "intent-7", "inputConfig": {"requests": requests}}
    url = f"{emulator.url}/v1beta/models/{MODEL}:batchGenerateContent?key=k"
    async with httpx2.AsyncClient() as http:
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.post(url, json={"batch": batch})
    jobs = [job async for job in await sdk.batches.list(config={"page_size": 1})]
    assert [job.display_name for job in jobs] == ["intent-7"]
