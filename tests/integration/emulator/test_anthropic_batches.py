"""Anthropic's Message Batches API over HTTP, by Anthropic's own SDK."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from tests.integration.emulator.clock import ManualClock
from tidegate.emulator.server import Emulator

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic
    from anthropic.types.messages import MessageBatch, MessageBatchIndividualResponse

MODEL = "claude-haiku-5-5"


@pytest.fixture
async def sdk(emulator: Emulator) -> AsyncIterator[AsyncAnthropic]:
    from anthropic import AsyncAnthropic  # 3,000 modules

    async with AsyncAnthropic(
        api_key="k", base_url=emulator.url, max_retries=0, timeout=10
    ) as client:
        yield client


async def submit(sdk: AsyncAnthropic, *custom_ids: str, **params: Any) -> MessageBatch:
    requests: Any = [
        {
            "custom_id": custom_id,
            "params": {
                "model": MODEL,
                "max_tokens": 100,
                "messages": [{"role": "user", "content": f"say {custom_id}"}],
            }
            | params,
        }
        for custom_id in custom_ids
    ]
    return await sdk.messages.batches.create(requests=requests)


async def results(sdk: AsyncAnthropic, batch: MessageBatch) -> list[MessageBatchIndividualResponse]:
    return [line async for line in await sdk.messages.batches.results(batch.id)]


async def test_a_batch_is_worked_off_on_the_emulators_clock(
    sdk: AsyncAnthropic, emulator: Emulator, clock: ManualClock
) -> None:
    await emulator.control.set_behaviour(batches={"delay_ms": 60_000, "line_ms": 1000})
    batch = await submit(sdk, "a", "b")
    assert (batch.processing_status, batch.results_url) == ("in_progress", None)
    assert (batch.expires_at - batch.created_at).total_seconds() == 86_400
    clock.pass_s(61)
    batch = await sdk.messages.batches.retrieve(batch.id)
    assert (batch.request_counts.processing, batch.request_counts.succeeded) == (2, 0)
    clock.pass_s(1)
    batch = await sdk.messages.batches.retrieve(batch.id)
    assert (batch.processing_status, batch.request_counts.succeeded) == ("ended", 2)
    found = await results(sdk, batch)
    assert [line.custom_id for line in found] == ["b", "a"]
    first = found[0].result
    assert first.type == "succeeded"
    assert first.message.usage.service_tier == "batch"
    logged = [call for call in await emulator.control.calls() if call.tier == "batch"]
    assert [(call.dialect, call.model, call.outcome) for call in logged] == [
        ("anthropic", MODEL, "finished")
    ] * 2
    assert logged[1].output_tokens == first.message.usage.output_tokens


async def test_bad_parameters_are_an_error_of_their_line(sdk: AsyncAnthropic) -> None:
    from anthropic import BadRequestError

    batch = await submit(sdk, "a", max_tokens=0)
    assert (batch.processing_status, batch.request_counts.errored) == ("ended", 1)
    (line,) = await results(sdk, batch)
    assert line.result.type == "errored"
    assert line.result.error.error.type == "invalid_request_error"
    with pytest.raises(BadRequestError, match="unique"):
        await submit(sdk, "a", "a")


async def test_an_expired_batch_keeps_its_results(
    sdk: AsyncAnthropic, emulator: Emulator, clock: ManualClock
) -> None:
    await emulator.control.set_behaviour(batches={"line_ms": 1, "expired_share": 1})
    batch = await submit(sdk, "a", "b")
    clock.pass_s(86_400)
    batch = await sdk.messages.batches.retrieve(batch.id)
    assert (batch.request_counts.succeeded, batch.request_counts.expired) == (1, 1)
    assert [line.result.type for line in await results(sdk, batch)] == ["expired", "succeeded"]


async def test_a_batch_is_cancelled_then_deleted(
    sdk: AsyncAnthropic, emulator: Emulator, clock: ManualClock
) -> None:
    from anthropic import BadRequestError

    await emulator.control.set_behaviour(batches={"line_ms": 1000, "cancelling_ms": 500})
    batch = await submit(sdk, "a", "b")
    clock.pass_s(1)
    batch = await sdk.messages.batches.cancel(batch.id)
    assert batch.processing_status == "canceling"
    with pytest.raises(BadRequestError):
        await sdk.messages.batches.delete(batch.id)
    clock.pass_s(1)
    batch = await sdk.messages.batches.retrieve(batch.id)
    assert batch.processing_status == "ended"
    assert (batch.request_counts.succeeded, batch.request_counts.canceled) == (1, 1)
    await sdk.messages.batches.delete(batch.id)
    assert [found async for found in sdk.messages.batches.list()] == []


async def test_the_queue_has_a_bound_of_requests(
    sdk: AsyncAnthropic, emulator: Emulator, clock: ManualClock
) -> None:
    from anthropic import RateLimitError

    await emulator.control.set_behaviour(batches={"line_ms": 1000, "enqueued_requests": 3})
    await submit(sdk, "a", "b")
    with pytest.raises(RateLimitError):
        await submit(sdk, "c", "d")
    clock.pass_s(2)
    await submit(sdk, "c", "d")


async def test_faults_strike_polls_and_results(sdk: AsyncAnthropic, emulator: Emulator) -> None:
    from anthropic import InternalServerError

    batch = await submit(sdk, "a", "b")
    path = f"GET /v1/messages/batches/{batch.id}"
    await emulator.control.set_fault("internal", kind="other", match=path, count=1)
    await emulator.control.set_fault(
        "cut_mid_stream", kind="other", match=f"{path}/results", count=1
    )
    with pytest.raises(InternalServerError):
        await sdk.messages.batches.retrieve(batch.id)
    with pytest.raises(httpx2.RemoteProtocolError):
        await results(sdk, batch)
    assert len(await results(sdk, batch)) == 2


async def test_batches_are_listed_page_by_page(sdk: AsyncAnthropic) -> None:
    made = [(await submit(sdk, "a")).id for _ in range(5)]
    assert [batch.id async for batch in sdk.messages.batches.list(limit=2)] == made[::-1]
