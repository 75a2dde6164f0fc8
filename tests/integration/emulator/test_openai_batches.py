"""OpenAI's batch API over HTTP, by OpenAI's own SDK."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal
from typing import Any, Final

import httpx2
import orjson
import pytest
from openai import APIConnectionError, AsyncOpenAI, ConflictError, InternalServerError
from openai.types import Batch

from tests.integration.emulator.clock import ManualClock
from tidegate.emulator.server import Emulator

MODEL = "gpt-4o-mini"
CHAT: Final = "/v1/chat/completions"


@pytest.fixture
async def sdk(emulator: Emulator) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        api_key="k", base_url=f"{emulator.url}/v1", max_retries=0, timeout=10
    ) as client:
        yield client


def line(custom_id: str, **body: Any) -> bytes:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": f"say {custom_id}"}]}
    whole = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": chat | body}
    return orjson.dumps(whole)


async def submit(sdk: AsyncOpenAI, lines: Sequence[bytes], **more: Any) -> Batch:
    file = await sdk.files.create(file=("in.jsonl", b"\n".join(lines)), purpose="batch")
    return await sdk.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", **more
    )


async def results(sdk: AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    if file_id is None:
        return {}
    text = (await sdk.files.content(file_id)).text
    found = [orjson.loads(item) for item in text.splitlines()]
    return {item["custom_id"]: item for item in found}


async def test_a_batch_is_worked_off_on_the_emulators_clock(
    sdk: AsyncOpenAI, emulator: Emulator, clock: ManualClock
) -> None:
    await emulator.control.set_behaviour(
        batches={"validating_ms": 1000, "delay_ms": 3_600_000, "line_ms": 1000}
    )
    batch = await submit(sdk, [line("a"), line("b", model="")], metadata={"intent": "i-1"})
    assert (batch.status, batch.completion_window, batch.endpoint) == ("validating", "24h", CHAT)
    assert batch.expires_at == batch.created_at + 86_400
    clock.pass_s(3602)
    batch = await sdk.batches.retrieve(batch.id)
    assert batch.status == "in_progress"
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed) == (2, 1)
    assert batch.output_file_id is None
    clock.pass_s(1)
    batch = await sdk.batches.retrieve(batch.id)
    assert batch.status == "completed"
    assert batch.metadata == {"intent": "i-1"}
    output = await results(sdk, batch.output_file_id)
    errors = await results(sdk, batch.error_file_id)
    assert output["a"]["response"]["body"]["choices"][0]["message"]["content"]
    assert errors["b"]["response"]["status_code"] == 400
    usage = output["a"]["response"]["body"]["usage"]
    assert batch.usage is not None
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    (logged,) = [call for call in await emulator.control.calls() if call.tier == "batch"]
    assert (logged.input_tokens, logged.output_tokens, logged.outcome) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
        "finished",
    )
    assert (await emulator.control.stats()).max_in_flight == 0


async def test_a_batch_costs_half_of_a_live_call(sdk: AsyncOpenAI, emulator: Emulator) -> None:
    async def costs() -> Decimal:
        headers = {"Authorization": "Bearer sk-admin-k"}
        query = {"start_time": str(int(time.time()) - 86_400)}
        async with httpx2.AsyncClient(base_url=emulator.url, headers=headers) as http:
            page = (await http.get("/v1/organization/costs", params=query)).json()
        found = [result for bucket in page["data"] for result in bucket["results"]]
        return sum((Decimal(one["amount"]["value"]) for one in found), Decimal())

    await submit(sdk, [line("a")])
    batch = await costs()
    assert batch > 0
    await sdk.chat.completions.create(**orjson.loads(line("a"))["body"])
    assert await costs() == 3 * batch


async def test_an_expired_batch_has_both_files(
    sdk: AsyncOpenAI, emulator: Emulator, clock: ManualClock
) -> None:
    await emulator.control.set_behaviour(batches={"line_ms": 1, "expired_share": 1})
    batch = await submit(sdk, [line("a"), line("b")])
    clock.pass_s(86_400)
    batch = await sdk.batches.retrieve(batch.id)
    assert batch.status == "expired"
    assert list(await results(sdk, batch.output_file_id)) == ["a"]
    (expired,) = (await results(sdk, batch.error_file_id)).values()
    assert (expired["response"], expired["error"]["code"]) == (None, "batch_expired")


async def test_a_batch_is_cancelled_once(
    sdk: AsyncOpenAI, emulator: Emulator, clock: ManualClock
) -> None:
    await emulator.control.set_behaviour(batches={"line_ms": 1000, "cancelling_ms": 600})
    batch = await submit(sdk, [line("a"), line("b")])
    clock.pass_s(1)
    assert (await sdk.batches.cancel(batch.id)).status == "cancelling"
    clock.pass_s(1)
    batch = await sdk.batches.retrieve(batch.id)
    assert batch.status == "cancelled"
    assert list(await results(sdk, batch.output_file_id)) == ["a"]
    with pytest.raises(ConflictError):
        await sdk.batches.cancel(batch.id)


async def test_an_unsound_file_fails_the_batch_in_validation(sdk: AsyncOpenAI) -> None:
    batch = await submit(sdk, [line("a"), line("a"), b"{no json"])
    assert batch.status == "failed"
    assert batch.errors is not None
    found = [(error.code, error.line) for error in batch.errors.data or ()]
    assert found == [("duplicate_custom_id", 2), ("invalid_json_line", 3)]


async def test_a_model_has_a_bound_of_enqueued_tokens(
    sdk: AsyncOpenAI, emulator: Emulator, clock: ManualClock
) -> None:
    await emulator.control.set_behaviour(batches={"line_ms": 1000, "enqueued_tokens": 12})
    lines = [line(f"line-{number}") for number in range(3)]
    first = await submit(sdk, lines)
    second = await submit(sdk, lines)
    assert (first.status, second.status) == ("in_progress", "failed")
    assert second.errors is not None
    assert [error.code for error in second.errors.data or ()] == ["token_limit_exceeded"]
    clock.pass_s(3)
    assert (await submit(sdk, lines)).status == "in_progress"


async def test_a_batch_whose_answer_was_lost_is_found_by_its_metadata(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    await emulator.control.set_fault("answer_lost", kind="other", match="POST /v1/batches", count=1)
    with pytest.raises(APIConnectionError):
        await submit(sdk, [line("a")], metadata={"intent": "i-7"})
    found = [batch async for batch in sdk.batches.list(limit=1)]
    assert [batch.metadata for batch in found] == [{"intent": "i-7"}]


async def test_faults_strike_polls_and_results(sdk: AsyncOpenAI, emulator: Emulator) -> None:
    batch = await submit(sdk, [line("a"), line("b")])
    assert batch.output_file_id is not None
    path = f"GET /v1/files/{batch.output_file_id}/content"
    await emulator.control.set_fault("unavailable", kind="other", match="GET /v1/batches/", count=1)
    await emulator.control.set_fault("cut_mid_stream", kind="other", match=path, count=1)
    with pytest.raises(InternalServerError):
        await sdk.batches.retrieve(batch.id)
    assert (await sdk.batches.retrieve(batch.id)).status == "completed"
    with pytest.raises(APIConnectionError):
        await sdk.files.content(batch.output_file_id)
    assert set(await results(sdk, batch.output_file_id)) == {"a", "b"}


async def test_batches_and_files_are_listed_page_by_page(sdk: AsyncOpenAI) -> None:
    made = [(await submit(sdk, [line("a")])).id for _ in range(5)]
    assert [batch.id async for batch in sdk.batches.list(limit=2)] == made[::-1]
    inputs = [file async for file in sdk.files.list(purpose="batch")]
    assert len(inputs) == 5
    assert (await sdk.files.delete(inputs[0].id)).deleted
    assert len([file async for file in sdk.files.list(purpose="batch")]) == 4
