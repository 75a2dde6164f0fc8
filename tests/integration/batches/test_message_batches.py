"""Message Batches through the unmodified Anthropic SDK."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import openai
import pytest

from tests.gateway import KEY, Gateway, Opener
from tests.integration.batches.conftest import MakeSdk
from tests.integration.tenants.asking import key_of
from tests.waiting import wait_until

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic
    from anthropic.types.messages import MessageBatch

MODEL = "claude-x"
MakeClaude = Callable[..., "AsyncAnthropic"]


@pytest.fixture
async def claude() -> AsyncIterator[MakeClaude]:
    from anthropic import AsyncAnthropic  # 3,000 modules

    made: list[AsyncAnthropic] = []

    def make(gateway: Gateway, headers: dict[str, str] | None = None) -> AsyncAnthropic:
        key = (headers or {}).get("Authorization", "Bearer of-a-client").removeprefix("Bearer ")
        made.append(AsyncAnthropic(base_url=gateway.url, api_key=key, max_retries=0))
        return made[-1]

    yield make
    for client in made:
        await client.close()


def asking(custom_id: str, text: str, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    params = {"model": MODEL, "max_tokens": 50, "messages": messages} | changes
    return {"custom_id": custom_id, "params": params}


def several(count: int) -> list[dict[str, Any]]:
    return [asking(f"id-{n}", f"Say word{n}.") for n in range(count)]


async def made(client: AsyncAnthropic, requests: list[Any], **more: Any) -> MessageBatch:
    return await client.messages.batches.create(requests=requests, **more)


async def end_of(client: AsyncAnthropic, batch: MessageBatch) -> MessageBatch:
    async def ended() -> MessageBatch | None:
        now = await client.messages.batches.retrieve(batch.id)
        return now if now.processing_status == "ended" else None

    found: MessageBatch = await wait_until(ended, 30, f"the end of {batch.id}")
    return found


async def results_of(client: AsyncAnthropic, batch: MessageBatch) -> dict[str, Any]:
    """Each request's result; that none has two is checked here."""
    told = [one async for one in await client.messages.batches.results(batch.id)]
    found = {one.custom_id: one.result for one in told}
    assert len(found) == len(told)
    return found


def counts_of(batch: MessageBatch) -> dict[str, int]:
    return {name: count for name, count in batch.request_counts.model_dump().items() if count}


async def test_a_batch_from_its_requests_to_their_results(
    open_gateway: Opener, claude: MakeClaude, sdk: MakeSdk
) -> None:
    import anthropic  # 3,000 modules

    gateway = await open_gateway(auth="on")
    await gateway.upstream.set_behaviour(strict_models=True)
    keys = [await key_of(gateway, tenant) for tenant in ("mine", "theirs")]
    mine, theirs = (claude(gateway, key) for key in keys)
    requests = [
        asking("said", "Say word1.", model="claude-haiku-5-5"),
        asking("un-known", "Say word2.", model="no-such-model"),
    ]
    batch = await made(mine, requests)
    assert (batch.type, batch.processing_status) == ("message_batch", "in_progress")
    assert counts_of(batch) == {"processing": 2}
    assert (batch.results_url, batch.ended_at, batch.archived_at) == (None, None, None)
    assert (batch.expires_at - batch.created_at).total_seconds() == 86_400
    done = await end_of(mine, batch)
    assert counts_of(done) == {"succeeded": 1, "errored": 1}
    assert done.ended_at is not None
    assert done.cancel_initiated_at is None
    results = await results_of(mine, done)
    said = results["said"].message
    assert (said.type, "word1" in said.content[0].text) == ("message", True)
    failed = results["un-known"].error
    assert (failed.type, failed.error.type) == ("error", "not_found_error")
    # Others see nothing of it, and no other API does.
    for call in (theirs.messages.batches.retrieve, theirs.messages.batches.delete):
        with pytest.raises(anthropic.NotFoundError):
            await call(batch.id)
    with pytest.raises(anthropic.NotFoundError):
        await results_of(theirs, done)
    assert [one async for one in theirs.messages.batches.list()] == []
    other = sdk(gateway, "mine", api_key=keys[0]["Authorization"].removeprefix("Bearer "))
    assert [one async for one in other.batches.list()] == []
    assert [one async for one in other.files.list(purpose="batch_output")] == []
    assert [one async for one in other.files.list(purpose="batch")] == []
    with pytest.raises(openai.NotFoundError):
        await other.batches.retrieve(f"batch_{batch.id[9:]}")
    # Each of its calls is on record, in the tenant's usage.
    rows = await gateway.database.fetch(
        "SELECT tenant_id, source, status, cost_micros FROM audit WHERE source = 'batch'"
    )
    assert {(row["tenant_id"], row["status"]) for row in rows} == {
        ("mine", "succeeded"),
        ("mine", "failed"),
    }
    # What is deleted is gone, bytes too.
    assert (await mine.messages.batches.delete(batch.id)).type == "message_batch_deleted"
    with pytest.raises(anthropic.NotFoundError):
        await mine.messages.batches.retrieve(batch.id)
    assert await gateway.database.fetchval("SELECT count(*) FROM batch_files") == 0
    # Its betas are those of its calls.
    asked: Any = requests[:1]
    odd = await mine.beta.messages.batches.create(requests=asked, betas=["odd"])
    results = await results_of(
        mine, await end_of(mine, await mine.messages.batches.retrieve(odd.id))
    )
    assert "`odd` for the `anthropic-beta` header" in results["said"].error.error.message


async def test_a_batch_that_is_cancelled_names_each_request(
    open_gateway: Opener, claude: MakeClaude
) -> None:
    """Also one whose requests no worker has read yet."""
    import anthropic  # 3,000 modules

    gateway = await open_gateway(worker=False)
    client = claude(gateway)
    batch = await made(client, several(3))
    for early in (client.messages.batches.delete, client.messages.batches.results):
        with pytest.raises((anthropic.BadRequestError, anthropic.AnthropicError)):
            await early(batch.id)
    cancelled = await client.messages.batches.cancel(batch.id)
    assert (cancelled.processing_status, counts_of(cancelled)) == ("canceling", {"processing": 3})
    await gateway.start_ready_worker()
    done = await end_of(client, batch)
    assert counts_of(done) == {"canceled": 3}
    assert done.cancel_initiated_at is not None
    results = await results_of(client, done)
    assert {name: one.type for name, one in results.items()} == {
        f"id-{n}": "canceled" for n in range(3)
    }
    assert await gateway.calls() == []
    # One that has ended stays so; and pages go both ways.
    again = await end_of(client, await made(client, several(1)))
    with pytest.raises(anthropic.BadRequestError, match="has ended"):
        await client.messages.batches.cancel(again.id)
    third = await made(client, several(1))
    ids = [third.id, again.id, batch.id]
    batches = client.messages.batches
    assert [one.id async for one in batches.list(limit=1)] == ids
    first = await batches.list(limit=2)
    assert ([one.id for one in first.data], first.has_more) == (ids[:2], True)
    before = await batches.list(before_id=ids[2], limit=1)
    assert ([one.id for one in before.data], before.has_more) == ([ids[1]], True)
    between = await batches.list(after_id=ids[0], before_id=ids[2])
    assert [one.id for one in between.data] == [ids[1]]
    assert (await batches.list(after_id="msgbatch_of_another")).data == []
    await end_of(client, third)


async def test_a_refusal_names_the_batch_and_why_in_the_form_of_its_api(
    open_gateway: Opener, claude: MakeClaude, sdk: MakeSdk, monkeypatch: pytest.MonkeyPatch
) -> None:
    import anthropic  # 3,000 modules

    gateway = await open_gateway(worker=False)
    client = claude(gateway)
    missing = f"msgbatch_{uuid4().hex}"
    with pytest.raises(anthropic.NotFoundError, match=missing):
        await client.messages.batches.retrieve(missing)
    batch = await made(client, several(1))
    await gateway.database.execute("UPDATE batches SET status = 'finalizing'")
    with pytest.raises(anthropic.BadRequestError, match="no request left"):
        await client.messages.batches.cancel(batch.id)

    async def broken(*_: object) -> None:
        raise ValueError("unforeseen")

    monkeypatch.setattr(gateway.services.store.batches, "get", broken)
    with pytest.raises(anthropic.InternalServerError) as theirs:
        await client.messages.batches.retrieve(batch.id)
    said: Any = theirs.value.body
    assert (said["type"], said["error"]["type"]) == ("error", "api_error")
    with pytest.raises(openai.InternalServerError) as other:
        await sdk(gateway).batches.retrieve(batch.id.replace("msgbatch", "batch"))
    assert "an internal error" in other.value.message
    assert other.value.type == "server_error"


async def test_one_key_makes_one_batch(open_gateway: Opener, claude: MakeClaude) -> None:
    import anthropic  # 3,000 modules

    gateway = await open_gateway(worker=False)
    client, once = claude(gateway), {"Idempotency-Key": "k-1"}
    answers = await asyncio.gather(
        *(made(client, several(2), extra_headers=once) for _ in range(10))
    )
    assert len({one.id for one in answers}) == 1
    with pytest.raises(anthropic.ConflictError):
        await made(client, several(3), extra_headers=once)
    assert await gateway.database.fetchval("SELECT count(*) FROM batches") == 1
    blobs = [
        one for one in (gateway.services.config.data_dir / "blobs").rglob("*") if one.is_file()
    ]
    assert len(blobs) == 1


_OF_JOBS = """
    INSERT INTO provider_batches (id, pool, upstream, dialect, endpoint, model, key_digest, state,
        lines, size_bytes, provider_id)
    VALUES (gen_random_uuid(), 'default', 'gemini', 'anthropic', '/v1/messages', 'claude-x', '',
        'done', 1, 1, $1)
"""


async def test_a_batch_of_the_provider_s_own_is_reached_through_the_gateway(
    open_gateway: Opener, claude: MakeClaude
) -> None:
    """But not one that the gateway made there, of jobs of whatever tenants."""
    import anthropic  # 3,000 modules
    from anthropic import AsyncAnthropic

    gateway = await open_gateway(worker=False)
    async with AsyncAnthropic(base_url=gateway.upstream.url, api_key=KEY) as direct:
        batch = await made(direct, several(1))
        client = claude(gateway)
        await end_of(client, batch)
        shown = await client.messages.batches.retrieve(batch.id)
        assert shown.results_url == f"{gateway.url}/v1/messages/batches/{batch.id}/results"
        assert set(await results_of(client, shown)) == {"id-0"}
        assert (await client.messages.batches.delete(batch.id)).id == batch.id
        of_jobs = await made(direct, several(1))
        await gateway.database.execute(_OF_JOBS, of_jobs.id)
        for call in (client.messages.batches.retrieve, client.messages.batches.cancel):
            with pytest.raises(anthropic.NotFoundError):
                await call(of_jobs.id)
