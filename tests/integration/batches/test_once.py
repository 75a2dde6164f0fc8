"""`Idempotency-Key` when batches are made."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch

from tests.batching import ENDPOINT, content
from tests.gateway import Gateway, Opener
from tests.integration.batches.conftest import MakeSdk
from tests.integration.batches.test_budgets import ON, with_key
from tidegate.store.retention import Whose

REPLAYED = "idempotency-replayed"


async def uploaded(client: AsyncOpenAI) -> str:
    file = await client.files.create(file=("in.jsonl", content(2)), purpose="batch")
    return str(file.id)


async def made(
    client: AsyncOpenAI, file_id: str, key: str | None = None, **changes: Any
) -> tuple[Batch, bool]:
    """The batch, and whether it was there before."""
    asked: dict[str, Any] = {"endpoint": ENDPOINT, "completion_window": "24h", **changes}
    headers = {} if key is None else {"Idempotency-Key": key}
    raw = await client.batches.with_raw_response.create(
        input_file_id=file_id, extra_headers=headers, **asked
    )
    return raw.parse(), raw.headers.get(REPLAYED) == "true"


async def refused(client: AsyncOpenAI, file_id: str, key: str, **changes: Any) -> tuple[int, Any]:
    with pytest.raises(openai.APIStatusError) as told:
        await made(client, file_id, key, **changes)
    return told.value.status_code, told.value.code


async def count(gateway: Gateway) -> int:
    return int(await gateway.database.fetchval("SELECT count(*) FROM batches"))


async def test_a_hundred_at_once_are_one_batch(open_gateway: Opener, sdk: MakeSdk) -> None:
    gateways = [await open_gateway(worker=False), await open_gateway(worker=False)]
    # May be too much at once for a slow machine: who asks again with the same key loses nothing.
    clients = [sdk(gateway, max_retries=5) for gateway in gateways]
    file_id = await uploaded(clients[0])
    answers = await asyncio.gather(
        *(made(client, file_id, "k-1") for _ in range(50) for client in clients)
    )
    assert len({batch.id for batch, _ in answers}) == 1
    assert sum(replayed for _, replayed in answers) == 99
    assert await count(gateways[0]) == 1


async def test_a_key_stands_for_one_batch(open_gateway: Opener, sdk: MakeSdk) -> None:
    gateway = await open_gateway(worker=False)
    client = sdk(gateway)
    file_id = await uploaded(client)
    first, _ = await made(client, file_id, "k-2", metadata={"a": "1", "b": "2"})
    assert (await refused(client, file_id, "k-2"))[0] == 409
    assert await refused(client, file_id, "k-2", endpoint="/v1/embeddings") == (
        409,
        "idempotency_conflict",
    )
    assert (await refused(client, await uploaded(client), "k-2"))[0] == 409
    assert (await refused(client, file_id, "x" * 256)) == (400, "invalid_request")
    # What is asked for is the same, though its file is gone and its state another one.
    await client.batches.cancel(first.id)
    await client.files.delete(file_id)
    again, replayed = await made(client, file_id, "k-2", metadata={"b": "2", "a": "1"})
    assert (again.id, again.status, replayed) == (first.id, "cancelling", True)
    assert await count(gateway) == 1


async def test_without_a_key_each_request_makes_a_batch(open_gateway: Opener, sdk: MakeSdk) -> None:
    gateway = await open_gateway(worker=False)
    client, other = sdk(gateway), sdk(gateway, "other")
    file_id, theirs = await uploaded(client), await uploaded(other)
    batches = [await made(client, file_id) for _ in range(2)]
    batches.append(await made(client, file_id, "k-3"))
    batches.append(await made(other, theirs, "k-3"))  # another tenant's key is another
    assert len({batch.id for batch, _ in batches}) == 4
    assert not any(replayed for _, replayed in batches)


async def test_a_key_of_a_call_is_none_of_a_batch(open_gateway: Opener, sdk: MakeSdk) -> None:
    gateway = await open_gateway(worker=False)
    client = sdk(gateway)
    file_id, asked = await uploaded(client), {"Idempotency-Key": "k-4"}
    words: Any = [{"role": "user", "content": "Hi"}]
    await client.chat.completions.create(model="m", messages=words, extra_headers=asked)
    assert (await refused(client, file_id, "k-4"))[0] == 409
    await made(client, file_id, "k-5")
    asked["Idempotency-Key"] = "k-5"
    with pytest.raises(openai.ConflictError) as told:
        await client.chat.completions.create(model="m", messages=words, extra_headers=asked)
    assert told.value.code == "idempotency_conflict"
    assert len(await gateway.calls()) == 1


async def test_a_known_batch_costs_nothing_and_is_told_by_who_has_spent_all(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(**ON | {"worker": False})
    caps: dict[str, Any] = {"most_queued_jobs": 2, "budget_day_tokens": 1}
    client = await with_key(gateway, sdk, **caps)
    file_id = await uploaded(client)
    first, _ = await made(client, file_id, "k-6")
    again, replayed = await made(client, file_id, "k-6")  # the queue is full of it
    assert (again.id, replayed) == (first.id, True)
    await gateway.services.store.tenants.set("acme", {"budget_day_tokens": 0}, by="test")
    await gateway.services.store.budgets.refresh()
    assert await refused(client, file_id, "k-7") == (429, "insufficient_quota")
    again, replayed = await made(client, file_id, "k-6")
    assert (again.id, replayed) == (first.id, True)


async def test_a_key_goes_with_its_tenants_batches(open_gateway: Opener, sdk: MakeSdk) -> None:
    gateway = await open_gateway(worker=False)
    client = sdk(gateway, "acme")
    first, _ = await made(client, await uploaded(client), "k-8")
    await gateway.services.store.retention.erase(Whose("acme"), dry_run=False, within_s=20)
    second, replayed = await made(client, await uploaded(client), "k-8")
    assert (second.id != first.id, replayed) == (True, False)
